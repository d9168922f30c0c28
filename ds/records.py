"""What a run notes of itself: metrics.jsonl always, and whoever else wants the same figures."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ds.files import replacing

METRICS = "metrics.jsonl"


class Records:
    """The figures of a run, a line for each log and each check in metrics.jsonl.

    TensorBoard gets them too where it is installed, Weights & Biases where a project is named.
    Lines after `step`, where the run goes on, are dropped: those steps are taken again. Raises
    ValueError if a project is named and wandb is not installed.
    """

    def __init__(self, out: Path, step: int, run: dict[str, Any], *, wandb: str = ""):
        self.path, self.step = out / METRICS, step
        self._trim()
        self.board = self.project = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out), purge_step=step + 1)
        if wandb:
            if not find_spec("wandb"):
                raise ValueError("runtime.wandb: wandb is not installed: pip install wandb")
            from wandb import init

            name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
            self.project = init(project=wandb, dir=out, id=name, resume="allow", config=run)

    def note(self, step: int, **figures: float) -> None:
        """Write the figures of a step down."""
        with open(self.path, "a") as file:
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
        if not self.path.exists():
            return
        whole = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
        with replacing(self.path) as temporary:
            temporary.write_text(
                "".join(line for line in whole if json.loads(line)["step"] <= self.step)
            )
