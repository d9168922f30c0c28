"""The log of a run: metrics in JSONL, TensorBoard and Weights & Biases."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds.system import distributed
from ds.system.files import opened, parse_json, present
from ds.system.staging import open_own, replacing, subfolder

METRICS = "metrics.jsonl"
# Metrics that differ between runs to the same bits.
MEASURED = ("images_per_second", "tflops", "peak_share", "loader_wait", "memory_gb")
LONGEST = 1 << 20  # bytes of a line
log = logging.getLogger("ds")


def check_project(project: str) -> None:
    """Raise ValueError if a project is named and wandb is not installed."""
    if project and not find_spec("wandb"):
        raise ValueError(
            "runtime.wandb: wandb is not installed: pip install 'denoising-student[wandb]'"
        )


class RunLog:
    """Writes the figures of a run to metrics.jsonl, a line for each log and each check.

    TensorBoard gets them too where it is installed, and Weights & Biases where a project is named.
    The first process of a run writes; in the others nothing happens. Lines after `step`, where the
    run goes on, are dropped: those steps are taken again.
    """

    def __init__(self, out: Path, step: int, run: Mapping[str, Any], *, wandb: str = ""):
        self.path, self.step = out / METRICS, step
        self.board = self.project = None
        self.writes = distributed.is_first()
        if not self.writes:
            return
        self._trim()
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out), purge_step=step + 1)
        if wandb:
            from wandb import init  # pyright: ignore[reportMissingImports]

            subfolder(out / "wandb")
            name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
            self.project = init(project=wandb, dir=out, id=name, resume="allow", config=run)

    def write(self, step: int, **figures: float) -> None:
        """Write the figures of a step."""
        if not self.writes:
            return
        with open(open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
        if self.project is not None:
            self.project.log(figures, step=step)

    def close(self) -> None:
        """Write what still waits to be written."""
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
    """Return the lines of a run's metrics.jsonl: figures by name, and their step.

    A damaged line is left out with a warning.
    """
    return [note for _, note in _lines(run / METRICS)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the whole lines of a file, and the figures in each."""
    with opened(path) as file:
        number = 0
        while line := file.readline(LONGEST):
            number += 1
            if note := _note(line):
                yield line, note
            elif line.endswith(b"\n"):  # without its end, the last line was being written
                log.warning("%s: line %d is damaged, and left out", path, number)


def _note(line: bytes) -> dict[str, Any] | None:
    try:
        note = parse_json(line, METRICS, finite=False)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(note, dict) and type(note.get("step")) is int
    return note if whole else None
