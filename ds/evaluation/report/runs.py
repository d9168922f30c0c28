"""What the directory of a run holds, as far as a page shows it. Nothing in it is run or unpickled.

A run that goes on, one that broke off, and a model without its run lack some of it. What is damaged
is left out, with a note.
"""

import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

from ds.models import pretrained
from ds.system import config
from ds.system.files import by_name, read_json, read_sealed, regular, whole
from ds.training.config import RUN
from ds.training.log import MEASURED, read_metrics

END = "-run"  # of the name of a run's directory, beside the model that it makes
TEACHES = "denoising"  # the method of a teacher
OF_STEPS = ("step", "lr", "loss", "held_out_loss", "best", *MEASURED)
log = logging.getLogger("ds")
T = TypeVar("T")


class Preview(NamedTuple):
    """A sheet of samples that a check drew, always from the same noise."""

    step: int
    file: Path


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, the model that it made, and what was measured of both; empty where it is not there."""

    name: str
    folder: Path | None  # of the run
    about: dict[str, Any] = field(default_factory=dict)  # run.json
    lines: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl
    previews: list[Preview] = field(default_factory=list)
    sheet: Path | None = None  # samples of a teacher beside real pictures
    model: dict[str, Any] = field(default_factory=dict)  # config.json
    weights: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)  # metrics.json
    notes: list[str] = field(default_factory=list)
    stages: "list[Run]" = field(default_factory=list)  # the second and later ones

    @property
    def step(self) -> int:
        """The last step of which anything is known."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def method(self) -> str:
        """The tag of the method."""
        return str(part(self.about or self.model, "method").get("type", TEACHES))

    @property
    def kind(self) -> str:
        """What the run makes."""
        return "teacher" if self.method == TEACHES else "student"

    @property
    def said(self) -> str:
        """What the method is, in a sentence, if it is one of the library's."""
        kind = config.known().get(self.method)
        text = sys.modules[kind.__module__].__doc__ if kind else None
        return (text or "").partition("\n")[0]

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return a figure by step."""
        return [(line["step"], line[name]) for line in self.lines if is_number(line.get(name))]

    @property
    def every(self) -> "list[Run]":
        """The stages, this one first."""
        return [self, *self.stages]

    def along(self, name: str) -> list[tuple[float, float]]:
        """Return a figure by step of all stages one after the other, with a gap between them."""
        found, begin = [], 0
        for stage in self.every:
            found += [(begin, math.nan)] if begin else []
            found += [(begin + step, value) for step, value in stage.points(name)]
            begin += stage.step
        return found

    def judged(self) -> list[str]:
        """Return the names of figures that were measured on the way, besides losses."""
        names = dict.fromkeys(name for line in self.lines for name in line)
        return [n for n in names if n not in OF_STEPS and not n.endswith("_loss")]

    def best(self) -> tuple[float, float] | None:
        """Return the step and the loss of the best average on held-out rows."""
        found = (p for p in self.points("held_out_loss") if math.isfinite(p[1]))
        return min(found, key=lambda p: p[1], default=None)

    def seconds(self) -> float | None:
        """Return the time that the steps took, without checks and evaluations."""
        turns = getattr(config.known().get(self.method), "turns", None)
        rows = part(self.about, "train").get("batch_size")
        speed = [(step, rate) for step, rate in self.points("images_per_second") if rate > 0]
        if turns is None or not is_number(rows) or not speed:
            return None
        begins = [0, *(step for step, _ in speed)]
        taken = ((step - begin) / rate for begin, (step, rate) in zip(begins, speed, strict=False))
        return sum(taken) * rows * len(turns)


def part(data: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields under a name; {} where there are none."""
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def places(path: Path) -> tuple[Path | None, Path | None]:
    """Return the directories of a run and of the model that it makes, of which either is given.

    Each is None where nothing is there.
    """
    where = Path(os.path.abspath(path))
    own = (where / RUN).exists()
    folder = where if own else where.with_name(where.name + END)
    model = where.with_name(where.name.removesuffix(END)) if own else where
    there = model != folder and (model / pretrained.CONFIG).exists()
    return folder if (folder / RUN).exists() else None, model if there else None


def read_run(path: Path) -> Run:
    """Return what is known of a run, whose own directory or that of its model is given.

    Raises ValueError if neither is there.
    """
    folder, model = places(path)
    if folder is None and not (model and pretrained.is_ours(model)):
        raise ValueError(f"{path}: no run is here{_instead(path)}")
    with _warned() as notes:
        return _read(str(path).removesuffix(END), folder, model, notes)


def _instead(path: Path) -> str:
    """Say what to give instead of a path where no run is."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    if names := dict.fromkeys(p.name.removesuffix(END) for p in inside if any(places(p))):
        return f"; it holds {', '.join(names)}, give one of them"
    return "; give the directory of a teacher or a student, such as runs/digits/student"


def _read(name: str, folder: Path | None, model: Path | None, notes: list[str]) -> Run:
    found: dict[str, Any] = {}
    if folder:
        found["about"] = _there(lambda: read_sealed(folder / RUN), {}, notes)
        found["lines"] = _there(lambda: read_metrics(folder), [], notes)
        found["previews"] = _previews(folder / "samples")
        sheet = folder / "samples.png"
        found["sheet"] = sheet if sheet.is_file() else None
    if model:
        found["model"] = _there(lambda: read_sealed(model / pretrained.CONFIG), {}, notes)
        found["weights"] = _there(lambda: _weights(model / pretrained.WEIGHTS), None, notes)
        figures = model / pretrained.METRICS
        found["figures"] = _there(lambda: read_figures(figures), {}, notes)
    stages = []
    while folder and (folder / f"stage-{len(stages) + 2}" / RUN).exists():
        stages.append(_read(name, folder / f"stage-{len(stages) + 2}", None, []))
    return Run(name=name, folder=folder, notes=notes, stages=stages, **found)


def read_figures(file: Path) -> dict[str, Any]:
    """Return the figures of an evaluation, and their protocol."""
    return by_name(read_json(file, finite=False), file)


def _there(read: Callable[[], T], otherwise: T, notes: list[str]) -> T:
    """Return what is read; `otherwise` where nothing is there or, with a note, it is damaged."""
    try:
        return read()
    except FileNotFoundError:
        return otherwise
    except (ValueError, RuntimeError, OSError) as error:
        notes.append(str(error))
        return otherwise


def _weights(file: Path) -> int:
    """Return how many numbers a safetensors file holds, by its header."""
    from safetensors import safe_open

    regular(file)
    with whole(file, "safetensors file"), safe_open(file, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return sum(map(math.prod, shapes))


def _previews(folder: Path) -> list[Preview]:
    files = folder.iterdir() if folder.is_dir() else ()
    steps = ((re.fullmatch(r"step-(\d{7,12})\.png", file.name), file) for file in files)
    return sorted(Preview(int(found[1]), file) for found, file in steps if found)


class _Kept(logging.Handler):
    """Keeps the text of what is logged."""

    def __init__(self, kept: list[str]):
        super().__init__(logging.WARNING)
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


@contextmanager
def _warned() -> Iterator[list[str]]:
    """Yield the list of the library's warnings within a block."""
    kept: list[str] = []
    log.addHandler(handler := _Kept(kept))
    try:
        yield kept
    finally:
        log.removeHandler(handler)
