"""A run's table fits a terminal, has units, and ends with where ours wins and where it loses."""

import pytest

from benchmarks import printed

RATES = {"copy_gbs": 1.0, "matmul_tflops_float32": 0.1, "matmul_tflops_bfloat16": 0.2}


def row(name: str = "square", missing=(), refused=(), phases=None, **us: tuple[float, ...]) -> dict:
    """A row of sides whose names have _ for a space, each with p20, median and p80."""
    sides = {side.replace("_", " "): times for side, times in us.items()}
    return {
        "case": name,
        "us": {s: dict(zip(("p20", "median", "p80"), t, strict=True)) for s, t in sides.items()},
        "error": dict.fromkeys(sides, 1.25e-7),
        "bytes": 1000,
        "flops": 0,
        "dtype": "float32",
        "missing": dict(missing),
        "refused": dict(refused),
        "phases": phases or {},
    }


def test_a_row_has_a_line_for_each_side():
    lines = printed.table(row(eager=(8, 9, 9.5), ours=(1900, 2000, 2e6)), RATES).splitlines()
    assert lines[0] == "square"
    assert " ".join(lines[1].split()) == "eager 9.00 us 8.00 us to 9.50 us 1.2e-07 0.00"
    # A copy of 1000 bytes takes a microsecond at 1 GB/s, and ours took 2000.
    assert " ".join(lines[2].split()) == "ours 2.00 ms 1.90 ms to 2.00 s 1.2e-07 1.00 0%"


def test_columns_stand_below_their_names():
    top = printed.head("ops").splitlines()[-1]
    line = printed.table(row(ours=(1, 1, 1)), RATES).splitlines()[1]
    for name, cell in (("median", "1.00 us "), ("off by", "1.2e-07"), ("x ours", "1.00  100%")):
        end = top.index(name) + len(name)
        assert line.index(cell) + len(cell.split("  ")[0].rstrip()) == end, name


def test_no_line_is_wider_than_a_terminal():
    long = "a long reason " * 30 + "\nand a second line"
    given = row("x" * 200, {"peer": long}, {"other": long}, {"ours": {long: 1.0}}, ours=(1, 2, 3))
    text = printed.table(given, RATES)
    assert max(map(len, text.splitlines())) == printed.WIDTH
    assert "second line" not in text and text.count("...") == 2
    assert max(map(len, printed.head("ops").splitlines())) <= printed.WIDTH


def test_a_check_has_errors_and_no_times():
    checked = row(eager=(1, 1, 1), ours=(1, 1, 1)) | {"us": {}}
    name, error = printed.table(checked, RATES).splitlines()[1].split()
    assert (name, error) == ("eager", "1.2e-07")


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0.5, "0.50 us"),
        (12.345, "12.3 us"),
        (999.4, "999 us"),
        (999.6, "1.00 ms"),
        (813_000, "813 ms"),
        (999_600, "1.00 s"),
        (2.8433e6, "2.84 s"),
        (1.5e9, "1,500 s"),
    ],
)
def test_a_time_has_a_unit(microseconds, text):
    assert printed.duration(microseconds) == text


def test_the_end_names_every_loss_and_counts_the_wins():
    ops = [
        row("won twice over", eager=(9, 9, 9), inductor=(4, 4, 4), ours=(2, 2, 2)),
        row("won", eager=(3, 3, 3), ours=(2, 2, 2)),
        row("lost", eager=(9, 9, 9), inductor=(1, 1, 1), reference=(0.1, 0.1, 0.1), ours=(2, 2, 2)),
        row("even", eager=(1, 2, 3), ours=(2, 2.5, 3)),
        row("alone", net=(1, 1, 1), ours=(2, 2, 2)),
        row("checked") | {"us": {}},
    ]
    assert printed.verdict({"ops": ops, "roofline": []}).splitlines()[2:] == [
        "Faster:",
        "   1.75x  ops: median of 2 rows, 1.50x to 2.00x",
        "Level, within their spread:",
        "   0.80x  ops: even, eager 2.00 us, ours 2.50 us",
        "Slower:",
        "   0.50x  ops: lost, inductor 1.00 us, ours 2.00 us",
    ]


def test_the_end_says_that_nothing_was_lost():
    assert printed.verdict({"ops": [row(eager=(2, 2, 2), ours=(1, 1, 1))]}).endswith(
        "Faster:\n   2.00x  ops: median of 1 row\nSlower: nowhere."
    )
    assert printed.verdict({"ops": []}) == ""
