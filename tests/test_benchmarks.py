"""The harness times nothing that is wrong, and saves nothing that no commit names."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import chain, group_norm_silu, harness, ops, plots, roofline, tables, where
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


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_the_tables_of_the_documents_are_those_of_the_results(path):
    page = path.read_text()
    assert tables.MARKED.search(page)
    assert tables.filled(page) == page, "run: python -m benchmarks.tables"


def test_a_table_has_a_row_for_each_case_and_its_floor(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "dirty", lambda: False)
    row = first([case(eager=torch.square, ours=lambda x: x * x)])
    row["us"]["eager"]["median"], row["us"]["ours"]["median"] = 9.0, 4.5
    rates = {"copy_gbs": 0.512, "matmul_tflops_float32": 0.1}
    harness.save("square", "here", [row], rates, CPU)
    page = "a\n<!-- table: square -->\nold\n<!-- end -->\nb\n"
    filled = tables.filled(page)
    assert "| square | 9 | 4 | 2.00 | 1 | 22% |" in filled
    assert "old" not in filled
    assert tables.filled(filled) == filled


def test_a_floor_is_the_longer_of_moving_and_multiplying():
    rates = {"copy_gbs": 10.0, "matmul_tflops_float32": 0.1, "matmul_tflops_bfloat16": 0.2}
    row = {"bytes": 10_000, "flops": 400_000, "dtype": "float32"}
    assert harness.floor(row, rates) == 4.0
    assert harness.floor(row | {"dtype": "bfloat16"}, rates) == 2.0
    assert harness.floor(row | {"flops": 0}, rates) == 1.0


def test_the_phases_and_the_error_of_a_side_are_in_its_row():
    phases = {"ours": {"load": [3.0, 1.0, 2.0]}}
    row = first([replace(case(eager=torch.square), phases=phases)])
    assert row["phases"] == {"ours": {"load": 2.0}}
    assert 0 < row["error"]["eager"] < 1e-6


@pytest.mark.parametrize("make", [ops.attention, ops.noise, ops.prepare_batch, ops.quantize])
def test_a_broken_op_is_refused(make, monkeypatch):
    """Whatever the op returns, a hundredth more of it, or two levels more of an image."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    name = {"attention": "attention_residual"}.get(make.__name__, make.__name__)
    real = getattr(ops.ops, name)

    def broken(*args):
        made = real(*args)
        parts = made if isinstance(made, tuple) else (made,)
        return [x // 2 if x.dtype == torch.uint8 else 1.01 * x for x in parts]

    monkeypatch.setattr(ops.ops, name, broken)
    with pytest.raises(harness.Wrong, match="is off by"):
        first([make(8, CPU)])


def test_layers_of_the_plan_are_right_and_have_a_floor():
    rows = harness.run(roofline.cases(CPU, quick=True), CPU, harness.Pace(rounds=1, seconds=0))
    for row in itertools.islice(rows, 4):
        assert row["bytes"] > 0
        assert row["error"]["engine"] < 1e-5


def test_kinds_of_layers():
    names = ("aten::mkldnn_convolution", "winograd x2", "aten::native_group_norm", "attend", "add")
    kinds = ["convolution", "convolution", "norm and SiLU", "attention and linear", "other"]
    assert [where.kind(name) for name in names] == kinds


def test_plots_come_from_json_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "PLOTS", tmp_path / "plots")
    us = {"peer": {"median": 9.0}, "engine": {"median": 4.0}, "engine, bfloat16": {"median": 5.0}}
    row = {
        "case": "conv 3x3 8x4x4 -> 8x4x4, 1 of 1", "us": us, "error": dict.fromkeys(us, 0.1),
        "bytes": 64, "flops": 640, "dtype": "float32", "images": 2,
        "phases": {"peer": {"a": 1.0, "b": 2.0}, "engine": {"a": 1.0}},
    }  # fmt: skip
    environment = {"device": "d", "timing": "", "threads": 1, "torch": "t", "date": "today"}
    rates = {"copy_gbs": 10.0, "matmul_tflops_float32": 0.1}
    saved = {"environment": environment, "calibration": rates, "cases": [row]}
    (tmp_path / "here").mkdir()
    for case in plots.DRAWN:
        (tmp_path / "here" / f"{case.replace('*', 'digits')}.json").write_text(json.dumps(saved))
    plots.main()
    drawn = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert drawn == {*tables.CAPTIONS}


@pytest.mark.parametrize(("ours", "refused"), [(0.24, False), (0.25, True), (0.1, False)])
def test_a_chain_whose_student_is_worse_than_the_peer_s_is_refused(ours, refused):
    assert chain.refused({"diffusers and plain PyTorch": 0.2, "ours": ours}) is refused


def test_a_chain_without_a_peer_is_not_refused():
    assert not chain.refused({"ours": 0.9})


def test_what_waits_is_saved_as_wall_clock_time(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "dirty", lambda: False)
    for wall, timing in ((True, "wall-clock time"), (False, "process CPU time")):
        row = first([replace(case(eager=torch.square), wall=wall)])
        path = harness.save("square", "here", [row], {"copy_gbs": 1.0}, CPU)
        assert json.loads(path.read_text())["environment"]["timing"] == timing
