"""dstudent demo: the whole chain on scanned digits, from teacher to report."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ds.cli.distill import Distill
from ds.cli.pairs import MakePairs
from ds.cli.teach import Teach
from ds.cli.verb import Verb, say
from ds.evaluation.evaluate import evaluate, record, split_floor
from ds.evaluation.features import Digits
from ds.evaluation.report.demo import COLUMNS, draw, rows
from ds.evaluation.report.pages import NAME, write_report
from ds.evaluation.report.tables import text_table
from ds.models.load import load_student, load_teacher
from ds.models.pretrained import METRICS
from ds.models.sampler import Sampler
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.pairs.sources import Pairs, digits
from ds.pairs.store import PairStore
from ds.system import targets
from ds.system.staging import write_json
from ds.training import presets

SHOWN = 36  # images of each model
log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Train a teacher and a one-step student on scanned digits, evaluate both, write a report."""

    out: Path = Path("runs/demo")  # a directory for everything the demo makes

    def prepare(self) -> Callable[[], Any]:
        targets.kept(self.out, "demo", targets.MARK)
        return partial(demo, self.out)


def demo(out: Path, preset: presets.Preset | None = None) -> dict[str, dict[str, Any]]:
    """Run the verbs one after another in `out`, and write report.html and report.png there.

    Results of an interrupted demo are kept. Returns the figures of each model, which metrics.json
    has too. Raises ValueError if `out` holds anything but a demo.
    """
    out = targets.kept(out, "demo", targets.MARK)
    if targets.marked(out, "demo") is None:
        out.mkdir(parents=True, exist_ok=True)
        targets.mark(out, "demo")
    preset = preset or presets.digits()
    places = {name: out / name for name in ("teacher", "pairs", "student")}
    for title, task in _tasks(preset, places):
        log.info("\n== %s", title)
        task.run()

    log.info("\n== evaluate and report")
    teacher, student = load_teacher(places["teacher"]), load_student(places["student"])
    first = int(teacher.denoiser.schedule.noise)
    models = {
        f"teacher, {teacher.nfe} calls": teacher,
        "student, 1 call": student,
        "teacher, 1 call": replace(teacher, grid=(first,)),
    }
    figures = _figures(models, places, preset)
    write_json(out / METRICS, figures)
    say(f"\n{text_table(COLUMNS, rows(figures))}")
    draw(_strips(models), out)
    write_report([out], out / NAME, force=True)
    say(f"\nreport: {out / NAME}")
    return figures


def _tasks(preset: presets.Preset, places: dict[str, Path]) -> list[tuple[str, Any]]:
    """Return the three verbs that make models and pairs. Each skips what is already done."""
    teacher, store, student = places.values()
    return [
        ("teach", replace(Teach.of("digits", preset), out=teacher)),
        ("pairs", replace(MakePairs.of("digits", preset), teacher=teacher, out=str(store))),
        (
            "distill",
            replace(Distill.of("digits", preset), teacher=teacher, store=str(store), out=student),
        ),
    ]


def _figures(
    models: dict[str, Teacher | Student], places: dict[str, Path], preset: presets.Preset
) -> dict[str, dict[str, Any]]:
    real, extractor = digits()[0], Digits()
    held_out = Pairs(PairStore(places["pairs"]), range(preset.pairs.held_out))
    floor = split_floor(real, extractor, first=1500)
    figures = {}
    for name, model in models.items():
        figures[name] = evaluate(model, real, extractor, held_out=held_out)
        if isinstance(model, Student):
            record(places["student"], model, figures[name])
    return {**figures, "real digits, 1,500 to 297": {"frechet_distance": floor}}


def _strips(models: dict[str, Teacher | Student]) -> dict[str, Tensor]:
    """Return images of each model, from noise that the student was not trained on, and digits."""
    strips = {name: Sampler(model)(2, range(SHOWN)) for name, model in models.items()}
    return {**strips, "real digits": digits()[0][:SHOWN]}
