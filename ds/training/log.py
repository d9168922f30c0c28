"""What a run notes of itself: metrics.jsonl always, and whoever else wants the same figures."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds.system.files import opened, parse_json, present
from ds.system.staging import open_own, replacing, subfolder

METRICS = "metrics.jsonl"
LONGEST = 1 << 20  # bytes of a line
log = logging.getLogger("ds")


def check_project(project: str) -> None:
    """Raise ValueError if a project is named and wandb is not installed."""
    if project and not find_spec("wandb"):
        raise ValueError("runtime.wandb: wandb is not installed: pip install wandb")


class Records:
    """The figures of a run, a line for each log and each check in metrics.jsonl.

    TensorBoard gets them too where it is installed, Weights & Biases where a project is named.
    Lines after `step`, where the run goes on, are dropped: those steps are taken again.
    """

    def __init__(self, out: Path, step: int, run: dict[str, Any], *, wandb: str = ""):
        self.path, self.step = out / METRICS, step
        self._trim()
        self.board = self.project = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out), purge_step=step + 1)
        if wandb:
            from wandb import init

            subfolder(out / "wandb")
            name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
            self.project = init(project=wandb, dir=out, id=name, resume="allow", config=run)

    def note(self, step: int, **figures: float) -> None:
        """Write the figures of a step down."""
        with open(open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        if self.project is not None:
            self.project.log(figures, step=step)

    def close(self) -> None:
        """Hand over what still waits to be written."""
        if self.board is not None:
            self.board.close()
        if self.project is not None:
            self.project.finish()

    def _trim(self) -> None:
        if not present(self.path):
            return
        with replacing(self.path) as temporary, open(temporary, "wb") as file:
            file.writelines(line for line, note in _lines(self.path) if note["step"] <= self.step)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return what was noted in a run: figures by name, and their step.

    A line that is damaged is left out, and the log says which.
    """
    return [note for _, note in _lines(run / METRICS)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the whole lines of a file of notes, and what they say."""
    with opened(path) as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            if note := _note(line):
                yield line, note
            elif line.endswith(b"\n"):  # a last one without an end was being written
                log.warning("%s: line %d is damaged, and left out", path, number)


def _note(line: bytes) -> dict[str, Any] | None:
    try:
        note = parse_json(line, METRICS, finite=False)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(note, dict) and type(note.get("step")) is int
    return note if whole else None
