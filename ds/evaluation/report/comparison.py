"""The page that compares runs: curves in one chart, figures and samples side by side."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ds.evaluation.evaluate import SECONDS
from ds.evaluation.report import page
from ds.evaluation.report.axes import number
from ds.evaluation.report.chapters import (
    FIGURES,
    curve,
    flat,
    sheet,
    title,
)
from ds.evaluation.report.charts import Line, chart
from ds.evaluation.report.markup import Markup, Part, tag
from ds.evaluation.report.runs import Run, is_number, part
from ds.evaluation.report.tables import Row
from ds.system.config import short
from ds.system.cost import duration

SETTINGS = ("method", "train", "start", "source", "held_out", "net")
JUDGING = ("n", "extractor", "reference", "classes")  # what figures must share to be compared
Of = Callable[[Run], Any]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return what tells paths apart: they begin and end alike, and differ in between."""
    parts = [Path(path).parts for path in paths]
    begin = end = 0
    shortest = min(map(len, parts))
    while begin < shortest - 1 and len({p[begin] for p in parts}) == 1:
        begin += 1
    while end < shortest - begin - 1 and len({p[-1 - end] for p in parts}) == 1:
        end += 1
    return ["/".join(p[begin : len(p) - end]) for p in parts]


def page_of(runs: Sequence[Run]) -> list[Part]:
    """Return the parts of the page that compares runs."""
    names = short_names([title(run) for run in runs])
    remarks = [
        f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes
    ]
    lead = ", ".join(
        f"{name} by {run.method.replace('_', ' ')}" for name, run in zip(names, runs, strict=True)
    )
    sheets = [*_sheets(runs, names, remarks)]
    return [
        page.opening("comparison", f"{len(runs)} runs side by side", f"{lead}."),
        page.table(names, _rows(runs)),
        page.notes([*_remarks(runs), *remarks]),
        tag("h3", _about_sheets(runs)) if sheets else None,
        page.group("strip", *sheets),
        page.group("charts wide", *_losses(runs, names)),
        page.group("charts", *_curves(runs, names)),
        *_differences(runs, names),
    ]


def _rows(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield the table: what the runs are, and their figures, the best of which is bold."""
    yield Row("method", tuple(run.method.replace("_", " ") for run in runs))
    yield from _row("network calls", runs, _calls, "{:,}".format)
    yield from _row("weights", runs, lambda run: run.weights, "{:,}".format)
    yield from _row("steps", runs, lambda run: sum(one.step for one in run.every), "{:,}".format)
    yield from _row("training time", runs, _seconds, duration)
    better = "lower" if _same_rows(runs) else ""
    yield from _row("held-out loss", runs, _held_out, number, better)
    for name, shown in FIGURES.items():
        better = shown.better if _comparable(runs, name) else ""
        yield from _row(shown.name, runs, partial(_figure, name), shown.text, better)


def _calls(run: Run) -> Any:
    return run.model.get("nfe") or part(run.figures, "protocol").get("nfe")


def _seconds(run: Run) -> float | None:
    found = [one.seconds() for one in run.every]
    return sum(s for s in found if s is not None) if any(found) else None


def _held_out(run: Run) -> float | None:
    best = run.every[-1].best()
    return best and best[1]


def _figure(name: str, run: Run) -> Any:
    return run.figures.get(name)


def _row(
    name: str, runs: Sequence[Run], of: Of, text: Callable[[Any], str], better: str = ""
) -> Iterator[Row]:
    """Yield a row, if any run has the value; `better` says which one is marked."""
    values = [value if is_number(value := of(run)) else None for run in runs]
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return
    best = {"lower": min, "higher": max}[better](known) if better and len(known) > 1 else None
    cells = ("" if v is None else tag("b", text(v)) if v == best else text(v) for v in values)
    yield Row(name, tuple(cells))


def _comparable(runs: Sequence[Run], name: str) -> bool:
    """Return whether a figure of all runs that have it was measured in the same way."""
    judged = [run for run in runs if name in run.figures]
    if name in ("pair_rms", "pair_r2"):
        return len({str(part(part(run.figures, "protocol"), "held_out")) for run in judged}) == 1
    names = ("device", "execution") if name == SECONDS else JUDGING
    ways = ({n: part(run.figures, "protocol").get(n) for n in names} for run in judged)
    return len({str(way) for way in ways}) == 1


def _same_rows(runs: Sequence[Run]) -> bool:
    """Return whether losses are of one method, on the same held-out rows."""
    ends = [run.every[-1].about for run in runs]
    return len({(str(about.get("method")), str(about.get("held_out"))) for about in ends}) == 1


def _remarks(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what keeps figures of these runs from being compared."""
    if not _same_rows(runs):
        yield "Losses of different methods, or on different rows, cannot be compared."
    known = [name for name in FIGURES if any(name in run.figures for run in runs)]
    if odd := [FIGURES[name].name for name in known if not _comparable(runs, name)]:
        yield f"Not measured in the same way, so no best is marked: {', '.join(odd)}."


def _sheets(runs: Sequence[Run], names: Sequence[str], remarks: list[str]) -> Iterator[Markup]:
    """Yield the last preview of each run."""
    for name, run in zip(names, runs, strict=True):
        for preview in (run.every[-1].previews or run.previews)[-1:]:
            caption = f"{name}, step {preview.step:,}"
            if shown := sheet(preview, remarks, caption):
                yield shown


def _about_sheets(runs: Sequence[Run]) -> str:
    seeds = {part(run.about, "train").get("seed") for run in runs if run.previews}
    return "Samples of the same noise" if len(seeds) == 1 else "Samples, of different noise"


def _losses(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Markup]:
    for name, words in (
        ("held_out_loss", "Held-out loss of the average"),
        ("loss", "Training loss"),
    ):
        if lines := _lines(runs, names, name):
            yield chart(words, lines, log=True)


def _curves(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Markup]:
    judged = (name for run in runs for one in run.every for name in one.judged())
    for name in dict.fromkeys(judged):
        if lines := _lines(runs, names, name):
            yield curve(name, lines)


def _lines(runs: Sequence[Run], names: Sequence[str], name: str) -> list[Line]:
    """Return the line of a figure of each run that has it; a run keeps its colour everywhere."""
    found = (
        Line(n, run.along(name), i) for i, (n, run) in enumerate(zip(names, runs, strict=True))
    )
    return [line for line in found if any(math.isfinite(value) for _, value in line.points)]


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Part]:
    """Yield a table of the settings that differ."""
    settings = [_settings(run, net=all(run.model for run in runs)) for run in runs]
    rows = []
    every = dict.fromkeys(name for found in settings for name in found)
    for name in sorted(every, key=lambda name: SETTINGS.index(name.partition(".")[0])):
        values = [found.get(name, "") for found in settings]
        if len(set(values)) > 1:
            rows.append(Row(name, tuple(map(_brief, values))))
    yield tag("h2", "What differs")
    if rows:
        yield page.table(names, rows, words=True)
    else:
        yield tag("p", "Their configurations are the same.")


def _settings(run: Run, *, net: bool) -> dict[str, str]:
    """Return the settings of a run by path, those of its network too if that of all is known."""
    found = {name: run.about[name] for name in SETTINGS if name in run.about}
    return flat(found | ({"net": part(run.model, "net")} if net else {}))


def _brief(text: str) -> str:
    """Return a value with its hashes, and itself, cut short."""
    return short(re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1...", text))
