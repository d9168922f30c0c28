"""Write the page of what is given: a run, several runs, or a demo."""

from collections.abc import Sequence
from pathlib import Path

import ds
from ds.evaluation.report import chapters, comparison, demo, page
from ds.evaluation.report.markup import Part, tag
from ds.evaluation.report.runs import END, read_run
from ds.system import targets

NAME = "report.html"


def target(paths: Sequence[Path], out: Path | None, *, force: bool = False) -> Path:
    """Return where the page is written: `out`, or the directory of the one run, or else here.

    Raises ValueError if nothing can be written there, for a name that does not end in .html, for a
    run that is given twice, and for a directory that holds no run.
    """
    if len({str(path.resolve()).removesuffix(END) for path in paths}) < len(paths):
        raise ValueError("report: a run is given twice; give each once")
    single = len(paths) == 1
    folder = paths[0] if single and demo.is_demo(paths[0]) else None
    if folder is None:
        folders = [read_run(path).folder for path in paths]
        folder = folders[0] if single else None
    where = out or (folder or Path()) / NAME
    if where.suffix != ".html":
        raise ValueError(f"{where}: a page is one HTML file; give a name that ends in .html")
    return targets.file(where, force=force)


def write_report(paths: Sequence[Path], out: Path, *, force: bool = False) -> None:
    """Write the page of a run or of a demo, or the page that compares several runs.

    Raises ValueError as `target` does.
    """
    where = target(paths, out, force=force)
    if len(paths) > 1:
        title, parts = "Runs side by side", comparison.page_of([read_run(path) for path in paths])
    elif demo.is_demo(paths[0]):
        title, parts = "One call instead of many", demo.page_of(paths[0])
    else:
        run = read_run(paths[0])
        title, parts = chapters.title(run), chapters.page_of(run)
    last: Part = tag("footer", f"Made by denoising-student {ds.__version__}, dstudent report.")
    page.write(where, title, *parts, last, force=force)
