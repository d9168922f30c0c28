"""Options that several verbs have, and how a verb talks to people."""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from ds.models import pretrained
from ds.system import targets
from ds.system.config import NotNegative, check
from ds.system.distributed import is_first, joined
from ds.system.files import redacted
from ds.training.presets import Machine, SolveConfig
from ds.training.trainer import RUN, TrainConfig

Model = Annotated[Path, tyro.conf.Positional]
Store = Annotated[str, tyro.conf.Positional]  # a directory, or a URL such as s3://bucket/folder
Price = Annotated[NotNegative, tyro.conf.arg(help="dollars an hour of all that runs; 0: not known")]
log = logging.getLogger("ds")
Here = Annotated[Machine, tyro.conf.arg(name="")]  # --device, not --machine.device


class Verb(ABC):
    """What one verb does. Its fields are its options."""

    shared: ClassVar[bool] = False  # by the processes that torchrun starts

    def __post_init__(self):
        check(self)

    @abstractmethod
    def prepare(self) -> Callable[[], None]:
        """Find all that can be wrong before the work, and write nothing; return the work."""

    def run(self, *, dry: bool = False) -> None:
        """Do the work, or only what comes before it and say what the work will cost."""
        with joined() if self.shared else nullcontext():
            work = self.prepare()
            if not dry:
                work()
            elif is_first() and (cost := self.budget()):
                log.info(cost)

    def budget(self) -> str:
        """Say what the work will cost, where that is worth a word."""
        return ""

    def idle(self) -> dict[str, str]:
        """Return the options that have no effect beside the others, and why."""
        return {}

    def refuse_idle(self, given: Iterable[str]) -> None:
        """Raise ValueError for an option that was given and has no effect."""
        for option, reason in self.idle().items():
            if option in given:
                raise ValueError(f"--{option} has no effect {reason}; leave it out")


def solve_idle(solve: SolveConfig) -> dict[str, str]:
    """Return what of a grid's options has no effect."""
    uniform = {"solve.top": "with --solve.grid uniform, which has a first time of its own"}
    return uniform if solve.grid == "uniform" else {}


def train_idle(train: TrainConfig) -> dict[str, str]:
    """Return what of a training's options has no effect."""
    return {"train.ema-decay": "with --train.ema-gamma"} if train.ema_gamma else {}


def home_of(name: str) -> Path:
    """Return where the results of a preset go by default."""
    return Path("runs") / name


def check_outputs(out: Path, *, force: bool = False, apart: targets.Inputs = ()) -> None:
    """Raise ValueError where a model, or the run that makes it, cannot be written.

    A model that is there must be of the run beside it, which the run itself is held against later.
    """
    run = targets.kept(run_folder(out), "run", RUN, apart=apart)
    model = pretrained.is_ours(out) and (run / RUN).exists()
    pretrained.target(out, force=force, run=pretrained.run_of(out) if model else None, apart=apart)


def run_folder(out: Path) -> Path:
    """Return where a run keeps its checkpoints and metrics, beside what it produces."""
    return out.with_name(f"{out.name}-run")


def watched() -> bool:
    """Say whether somebody looks at standard error, and so at a progress bar."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """Print a line, at once, without the secrets of its URLs."""
    try:
        print(redacted(line), flush=True)
    except OSError as error:
        raise RuntimeError(f"standard output: {error.strerror}") from None
