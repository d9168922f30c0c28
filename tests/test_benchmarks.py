"""The harness times nothing that is wrong, and saves nothing that no commit names."""

import json

import pytest
import torch

from benchmarks import group_norm_silu, harness, tables
from benchmarks.harness import Case, Side

CPU = torch.device("cpu")


def case(**sides) -> Case:
    x = torch.linspace(-1, 1, 64)
    return Case(
        "square",
        {name: Side(lambda _, f=f: f(x)) for name, f in sides.items()},
        lambda: x.double().square(),
        bytes=2 * x.nbytes,
    )


def first(cases) -> dict:
    return next(harness.run(cases, CPU, harness.QUICK))


def test_right_sides_are_timed():
    row = first([case(eager=torch.square, ours=lambda x: x * x)])
    for times in row["us"].values():
        assert 0 < times["p20"] <= times["median"] <= times["p80"]
    assert row["bytes"] == 512


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x * x + 1e-3, "ours is off by"),
        (lambda x: x * float("nan"), "ours is off by nan"),
        (lambda x: (x * x)[:-1], r"a result is \[63\], not \[64\]"),
        (lambda x: (x * x, x), "ours returns 2 tensors, not 1"),
    ],
)
def test_a_broken_side_is_refused(broken, message):
    with pytest.raises(harness.Wrong, match=message):
        first([case(eager=torch.square, ours=broken)])


def test_a_kernel_broken_on_purpose_is_refused(monkeypatch):
    real = group_norm_silu.ops.group_norm_silu

    def broken(*args, **parts):
        return 1.01 * real(*args, **parts)

    monkeypatch.setattr(group_norm_silu.ops, "group_norm_silu", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(harness.Wrong, match="ours is off by"):
        first(group_norm_silu.cases(CPU, quick=True))


def test_a_dirty_checkout_saves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "dirty", lambda: True)
    with pytest.raises(ValueError, match="uncommitted changes"):
        harness.save("square", "here", [], {}, CPU)
    assert not list(tmp_path.iterdir())


def test_what_is_saved_names_machine_versions_and_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "dirty", lambda: False)
    row = first([case(eager=torch.square)])
    saved = json.loads(harness.save("square", "here", [row], {"copy_gbs": 1.0}, CPU).read_text())
    assert saved["cases"] == [row]
    assert saved["calibration"] == {"copy_gbs": 1.0}
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["environment"]["commit"] == harness.git("rev-parse", "HEAD")


def test_the_tables_of_the_documents_are_those_of_the_results():
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page, "run: python -m benchmarks.tables"


def test_a_table_has_a_row_for_each_case(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "dirty", lambda: False)
    row = first([case(eager=torch.square, ours=lambda x: x * x)])
    row["us"]["eager"]["median"], row["us"]["ours"]["median"] = 9.0, 4.5
    rates = {"copy_gbs": 1.0, "matmul_tflops_float32": 0.1}
    harness.save("square", "here", [row], rates, CPU)
    page = "a\n<!-- table: here/square -->\nold\n<!-- end -->\nb\n"
    filled = tables.filled(page)
    assert "| square | 9 | 4 | 2.00 | 11% |" in filled
    assert "old" not in filled
    assert tables.filled(filled) == filled
