"""dstudent demo: the whole chain on scanned digits, from teacher to report."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ds.cli.distill import Distill
from ds.cli.pairs import MakePairs
from ds.cli.teach import Teach
from ds.cli.verb import Verb, say
from ds.evaluation.evaluate import evaluate, record, split_floor
from ds.evaluation.features import Digits
from ds.evaluation.report import Row, draw, text_table, write_page
from ds.models.load import load_student, load_teacher
from ds.models.sampler import Sampler
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.pairs.sources import Pairs, digits
from ds.pairs.store import PairStore
from ds.system import targets
from ds.training import presets

COLUMNS = (
    "network calls",
    "Frechet distance",
    "KID",
    "precision",
    "recall",
    "s / 1,000 images",
    "speed-up",
)
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

    Results of an interrupted demo are kept. Returns the figures of each model. Raises ValueError if
    `out` holds anything but a demo.
    """
    begin = time.perf_counter()
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
    rows = _rows(figures)
    say(f"\n{text_table(COLUMNS, rows)}")
    _write(out, models, rows, figures, places, time.perf_counter() - begin)
    say(f"\nreport: {out / 'report.html'}")
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
    folder = places["student"].parent / "metrics"
    figures = {}
    for name, model in models.items():
        out = folder / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        figures[name] = evaluate(model, real, extractor, held_out=held_out, out=out, force=True)
        if isinstance(model, Student):
            record(places["student"], model, figures[name])
    return {**figures, "real digits, 1,500 to 297": {"frechet_distance": floor}}


def _rows(figures: dict[str, dict[str, Any]]) -> list[Row]:
    slowest = next(iter(figures.values()))["seconds_per_1000_images"]
    rows = []
    for name, f in figures.items():
        if "protocol" in f:
            seconds = f["seconds_per_1000_images"]
            cells = (
                str(f["protocol"]["nfe"]),
                f"{f['frechet_distance']:.2f}",
                f"{f['kernel_distance']:.4g}",
                f"{f['precision']:.2f}",
                f"{f['recall']:.2f}",
                f"{seconds:.2f}",
                f"{slowest / seconds:.1f}x",
            )
        else:
            cells = ("", f"{f['frechet_distance']:.2f}", *[""] * 5)
        rows.append(Row(name, cells))
    return rows


def _write(
    out: Path,
    models: dict[str, Teacher | Student],
    rows: list[Row],
    figures: dict[str, dict[str, Any]],
    places: dict[str, Path],
    seconds: float,
) -> None:
    count = 36
    strips = {name: Sampler(model)(2, range(count)) for name, model in models.items()}
    real, _ = digits()
    strips["real digits"] = real[:count]
    draw(strips, places["student"].with_name("student-run"), out / "report.png", force=True)
    teacher, student = list(figures.values())[:2]
    write_page(
        out / "report.html",
        "One call instead of many",
        f"A diffusion teacher was trained on 1,797 scanned digits and distilled into a student "
        f"that makes an image in one network call. All images in a column come from the same "
        f"noise, which the student was not trained on. The whole chain took {seconds:.0f} s.",
        out / "report.png",
        COLUMNS,
        rows,
        [
            f"Frechet distance, KID, precision and recall compare {teacher['protocol']['n']:,} "
            f"images with all real digits on the features of a small digits classifier. They "
            f"cannot be compared with distances on Inception features.",
            "The last row compares 1,500 of the real digits with the other 297, the mean of five "
            "splits. It is the floor for sets of this size.",
            f"On held-out noise the student is {student['pair_rms']:.3f} from its teacher (root "
            f"mean square in units of [-1, 1]), R2 = {student['pair_r2']:.3f}.",
        ],
        force=True,
    )
