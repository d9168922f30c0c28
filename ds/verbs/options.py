"""Options that several verbs have, and how a verb talks to people."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from ds.presets import Machine

Model = Annotated[Path, tyro.conf.Positional]
Store = Annotated[str, tyro.conf.Positional]  # a directory, or a URL such as s3://bucket/folder
Price = Annotated[float, tyro.conf.arg(help="dollars an hour of all that runs; 0: not known")]
Here = Annotated[Machine, tyro.conf.arg(name="")]  # --device, not --machine.device


def at_least(least: float, **values: float) -> None:
    """Raise ValueError for an option below the least, or one that is no number."""
    for option, value in values.items():
        if not least <= value < float("inf"):
            raise ValueError(f"{option} must be at least {least}, not {value}")


def home_of(name: str) -> Path:
    """Return where the results of a preset go by default."""
    return Path("runs") / name


def run_folder(out: Path) -> Path:
    """Return where a run keeps its checkpoints and metrics, beside what it produces."""
    return out.with_name(f"{out.name}-run")


def watched() -> bool:
    """Say whether somebody looks at standard error, and so at a progress bar."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """Print a line, at once."""
    print(line, flush=True)
