"""Charts: where their lines, ticks and words are."""

import math
import re

import pytest

from ds.evaluation.report.axes import Axis, number
from ds.evaluation.report.charts import Line, chart

NAN, INF = math.nan, math.inf
RISING = Line("loss", [(0, 1.0), (50, 2.0), (100, 3.0)])


def polylines(svg: str) -> list[list[tuple[float, ...]]]:
    """The points of each line, in thousandths of the plot, down from its top."""
    found = re.findall(r'<polyline points="([^"]*)">', svg)
    return [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]


def dots(svg: str) -> list[tuple[str, str, str]]:
    return re.findall(r'<circle r="3" class="dot( faint)?" cx="([^"]*)" cy="([^"]*)">', svg)


def names(svg: str) -> dict[str, float]:
    """The names at the ends of lines, and how far down they are."""
    found = re.findall(r'<text x="100%" dx="8" y="([\d.-]+)%"[^>]*>([^<]*)<', svg)
    return {name: float(at) for at, name in found}


def test_a_line_goes_from_its_first_point_to_its_last():
    (line,) = polylines(chart("Loss", [RISING]))
    assert [p[0] for p in line] == [0, 500, 1000]
    # A twentieth of the range is left above and below.
    assert line[0][1] == pytest.approx(1000 * 2.1 / 2.2, abs=0.1)
    assert line[2][1] == pytest.approx(1000 * 0.1 / 2.2, abs=0.1)


def test_steps_begin_at_zero():
    (line,) = polylines(chart("Loss", [Line("loss", [(50, 1.0), (100, 2.0)])]))
    assert [p[0] for p in line] == [500, 1000]


def test_tenfold_numbers_are_as_far_apart_on_a_logarithmic_axis():
    points = [(0, 100.0), (1, 10.0), (2, 1.0)]
    (line,) = polylines(chart("Loss", [Line("loss", points)], log=True))
    heights = [p[1] for p in line]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


@pytest.mark.parametrize("lost", [NAN, INF, -INF])
def test_what_is_no_number_leaves_a_gap(lost):
    points = [(0, 1.0), (1, 2.0), (2, lost), (3, 2.0), (4, 1.0)]
    left, right = polylines(chart("Loss", [Line("loss", points)]))
    assert [p[0] for p in left] == [0, 250] and [p[0] for p in right] == [750, 1000]


@pytest.mark.parametrize("lost", [0.0, -1.0])
def test_zero_and_less_leave_a_gap_on_a_logarithmic_axis(lost):
    points = [(0, 1.0), (1, 2.0), (2, lost), (3, 2.0), (4, 1.0)]
    assert len(polylines(chart("Loss", [Line("loss", points)], log=True))) == 2
    assert len(polylines(chart("Loss", [Line("loss", points)]))) == 1


def test_an_axis_without_positive_numbers_is_linear():
    assert not Axis.of([-1.0, 0.0], log=True).log
    (line,) = polylines(chart("Loss", [Line("loss", [(0, -1.0), (1, 0.0)])], log=True))
    assert len(line) == 2


def test_a_single_point_is_a_dot():
    svg = chart("Loss", [Line("loss", [(7, 0.5)])], log=True)
    assert polylines(svg) == []
    assert dots(svg) == [("", "100.00%", "50.00%")]


def test_a_point_between_gaps_is_a_dot_that_is_seen():
    points = [(i, NAN if i in (49, 51) else 1.0 + i % 2) for i in range(100)]
    seen = [(x, y) for faint, x, y in dots(chart("Loss", [Line("loss", points)])) if not faint]
    assert [x for x, _ in seen] == [f"{100 * 50 / 99:.2f}%"]


@pytest.mark.parametrize("values", [[], [NAN], [INF, NAN]])
def test_a_chart_of_nothing_is_empty_and_whole(values):
    svg = chart("Loss", [Line("loss", list(enumerate(values)))], log=True)
    assert polylines(svg) == [] and dots(svg) == [] and svg.endswith("</figure>")
    assert "nan" not in svg and "inf" not in svg


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-12, 1e30])
@pytest.mark.parametrize("log", [False, True])
def test_numbers_that_are_all_the_same_are_in_the_middle(value, log):
    axis = Axis.of([value, value], log=log)
    assert axis.at(value) == pytest.approx(0.5)
    assert 1 <= len(axis.ticks()) <= 6


TICKS = [
    (Axis(0, 10), [0, 2, 4, 6, 8, 10]),
    (Axis(-1, 1), [-1, -0.5, 0, 0.5, 1]),
    (Axis(0.9, 3.1), [1, 1.5, 2, 2.5, 3]),
    (Axis(0, 1344), [0, 500, 1000]),
    (Axis(0.05, 0.6, True), [0.05, 0.1, 0.2, 0.5]),
    (Axis(1e-3, 10, True), [0.001, 0.01, 0.1, 1, 10]),
    (Axis(1e-9, 1e9, True), [1e-9, 1e-5, 0.1, 1000, 1e7]),
    (Axis(0.21, 0.29, True), [0.22, 0.24, 0.26, 0.28]),
]


@pytest.mark.parametrize("axis, expected", TICKS)
def test_ticks_are_round_numbers_on_the_axis(axis, expected):
    assert axis.ticks() == pytest.approx(expected)


def test_a_tick_has_its_number_at_its_height():
    svg = chart("Loss", [Line("loss", [(0, 0.0), (1, 10.0)])])
    found = dict(re.findall(r'<text x="-8" y="([\d.]+)%"[^>]*>([^<]*)<', svg))
    assert {label: float(at) for at, label in found.items()} == pytest.approx(
        {str(n): 100 * (10.5 - n) / 11 for n in (0, 5, 10)}, abs=0.01
    )


def test_names_at_the_ends_of_lines_stay_apart_and_in_order():
    ends = {"a": 2.0, "b": 2.01, "c": 9.0}
    lines = [Line(name, [(0, 1.0), (1, end)]) for name, end in ends.items()]
    at = names(chart("Loss", lines))
    assert at["c"] < at["b"] < at["a"] <= 100
    assert at["a"] - at["b"] >= 8 and at["b"] - at["c"] >= 8


def test_one_line_needs_no_name_beside_its_title():
    assert names(chart("Loss", [RISING])) == {} and 'class="legend"' not in chart("Loss", [RISING])


def test_a_point_says_what_it_is():
    assert "<title>loss, step 50: 2</title>" in chart("Loss", [RISING])


def test_a_chart_is_told_to_those_who_do_not_see_it():
    assert 'role="img" aria-label="Loss. loss: 1 at step 0, 3 at step 100."' in chart(
        "Loss", [RISING]
    )


def test_names_are_text():
    svg = chart("<b>", [RISING._replace(name='"><script>')] * 2)
    assert "<script>" not in svg and "<b>" not in svg


@pytest.mark.parametrize(
    "value, text",
    [
        (12000, "12,000"),
        (0.12345, "0.1235"),
        (1e-7, "1e-07"),
        (0, "0"),
        (2.0, "2"),
        (INF, "inf"),
        (NAN, "nan"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text
