"""Line charts as SVG inside HTML. A plot is as wide as its column, and its text keeps its size."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ds.evaluation.report.axes import Axis, number
from ds.evaluation.report.markup import Markup, tag

COLORS = 6  # classes c0 to c5 of a style sheet
FEW = 12  # points, up to which each is marked
HOVERED = 80  # points at most that say what they are
Point = tuple[float, float]


class Line(NamedTuple):
    """A name, points (x, y) by increasing x, and the number of a colour."""

    name: str
    points: Sequence[Point]
    color: int = 0


def chart(title: str, lines: Sequence[Line], *, log: bool = False, note: str = "") -> Markup:
    """Return a figure of lines over their steps, a logarithmic one with `log`.

    Numbers without a place, such as not-a-number, leave a gap. A point says what it is where a
    mouse rests on it.
    """
    x = Axis.of((0, *(p[0] for line in lines for p in line.points)), margin=0)
    y = Axis.of((p[1] for line in lines for p in line.points), log=log)
    drawn = [_line(line, x, y) for line in reversed(lines)]
    named = len(lines) > 1 or any(line.name.lower() != title.lower() for line in lines)
    plot = tag(
        "svg", *_grid(x, y), *drawn, *(_labels(lines, y) if named else ()),
        role="img", aria_label=f"{title}. {' '.join(map(_said, lines))}",
    )  # fmt: skip
    names = (tag("span", line.name, class_=f"key c{line.color % COLORS}") for line in lines)
    legend = tag("p", *names, class_="legend") if named else None
    words = tag("figcaption", title, tag("small", note) if note else None)
    return tag("figure", words, legend, plot, class_="chart")


def _said(line: Line) -> str:
    ends = [p for p in line.points if math.isfinite(p[1])]
    if not ends:
        return f"{line.name}: no numbers."
    (a, first), (b, last) = ends[0], ends[-1]
    return f"{line.name}: {number(first)} at step {number(a)}, {number(last)} at step {number(b)}."


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _grid(x: Axis, y: Axis) -> Iterator[Markup]:
    for value in y.ticks():
        at = _percent(1 - y.at(value))
        yield tag("line", x1="0", x2="100%", y1=at, y2=at, class_="rule")
        yield tag("text", number(value), x="-8", y=at, dy=".35em", text_anchor="end")
    for value in x.ticks(5):
        at = _percent(x.at(value))
        yield tag("text", number(value), x=at, y="100%", dy="1.5em", text_anchor="middle")


def _line(line: Line, x: Axis, y: Axis) -> Markup:
    """Draw a line: its runs of numbers in a box that is stretched, and its points over that."""
    places = [(x.at(step), 1 - y.at(value)) for step, value in line.points]
    there = [math.isfinite(across + down) for across, down in places]
    runs = [
        [places[i] for i, _ in run]
        for found, run in groupby(enumerate(there), key=lambda e: e[1])
        if found
    ]
    paths = (" ".join(f"{1000 * a:.1f},{1000 * b:.1f}" for a, b in run) for run in runs if run[1:])
    stretched = tag(
        "svg", *(tag("polyline", points=path) for path in paths),
        viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%",
    )  # fmt: skip
    alone = {run[0] for run in runs if not run[1:]}
    every = -(-len(places) // HOVERED)
    marks = []
    for i, place in enumerate(places):
        seen = place in alone or len(places) <= FEW
        if there[i] and (seen or i % every == 0 or i == len(places) - 1):
            said = "{}, step {}: {}".format(line.name, *map(number, line.points[i]))
            at = {"cx": _percent(place[0]), "cy": _percent(place[1])}
            kind = "dot" if seen else "dot faint"
            marks.append(tag("circle", tag("title", said), r="3", class_=kind, **at))
    return tag("g", stretched, *marks, class_=f"c{line.color % COLORS}")


def _labels(lines: Sequence[Line], y: Axis, apart: float = 0.085) -> Iterator[Markup]:
    """Name lines at the height of their ends, moved apart where they would touch."""
    ends = (
        (line, [at for p in line.points if math.isfinite(at := 1 - y.at(p[1]))]) for line in lines
    )
    placed = sorted(((found[-1], line) for line, found in ends if found), key=lambda e: e[0])
    least, room = 0.0, 1 - apart * (len(placed) - 1)
    for height, line in placed:
        at = max(least, min(height, room))
        least, room = at + apart, room + apart
        yield tag(
            "text", _cut(line.name), x="100%", dx="8", y=_percent(at), dy=".35em",
            class_=f"end c{line.color % COLORS}",
        )  # fmt: skip


def _cut(name: str, most: int = 20) -> str:
    """Return a name that fits beside a plot."""
    return name if len(name) <= most else f"...{name[3 - most :]}"
