"""dstudent report: a page about a run, or about several side by side."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ds.cli.verb import Verb, say
from ds.evaluation.report.pages import target, write_report

Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN", help="directories of teachers, students, or of a demo"),
]


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write a page about a run: losses, distances, samples, and how it was set.

    Several runs are compared. The page is one HTML file that needs no other. A run that goes on, or
    broke off, has a page too.
    """

    runs: Runs = ()
    # an HTML file; None: report.html in the directory of the run, and here for several
    out: Path | None = None
    force: bool = False  # replace the file

    def prepare(self) -> Callable[[], None]:
        if not self.runs:
            raise ValueError("report: name a run, such as runs/digits/student, or several")
        out = target(self.runs, self.out, force=self.force)
        return partial(self._write, out)

    def _write(self, out: Path) -> None:
        write_report(self.runs, out, force=self.force)
        say(f"report: {out}")
