"""The harness times nothing that is wrong, and keeps no result that no commit names."""

import argparse
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import (
    chain,
    convs,
    group_norm_silu,
    harness,
    network,
    ops,
    pairs,
    plots,
    roofline,
    student,
    tables,
    teacher_loop,
    where,
)
from benchmarks.harness import Case, Side
from ds.engine import Plan, Target, rewrites
from ds.models.execution import Execution

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
    return next(harness.run(cases, CPU, harness.PACES["quick"]))


def test_right_sides_are_timed():
    row = first([case(eager=torch.square, ours=lambda x: x * x)])
    for times in row["us"].values():
        assert 0 < times["p20"] <= times["median"] <= times["p80"]
    assert row["bytes"] == 512


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x * x + 1e-3, "off by 0.001, "),
        (lambda x: x * float("nan"), "off by nan, "),
        (lambda x: (x * x)[:-1], "a result is [63], not [64]"),
        (lambda x: (x * x, x), "2 tensors, not 1"),
        (lambda x: x @ x[1:], "RuntimeError: "),
    ],
)
def test_a_broken_side_is_refused_and_the_others_are_timed(broken, message):
    row = first([case(eager=torch.square, broken=broken, ours=lambda x: x * x)])
    assert row["refused"]["broken"].startswith(message)
    assert [*row["us"]] == [*row["error"]] == ["eager", "ours"]


def test_a_side_without_a_peer_is_held_to_a_bound():
    """Else it would be held to itself."""
    wrong = {"ours": lambda x: x * x + 1e-3}
    assert "off by 0.001, 0.0001 is allowed" in first([case(**wrong)])["refused"]["ours"]
    narrow = replace(case(**wrong), dtype=torch.bfloat16)
    assert not first([narrow])["refused"]
    assert first([replace(narrow, bound=1e-5)])["refused"]


def test_a_single_number_may_be_right_by_luck():
    """As the first side's loss may be, of a sum that was computed in bfloat16."""
    x = torch.tensor(1.0)
    sides = {"eager": Side(lambda _: x), "ours": Side(lambda _: 1.01 * x)}
    lucky = Case("loss", sides, lambda: x.double())
    assert [*first([lucky])["refused"]] == ["ours"]
    assert not first([replace(lucky, dtype=torch.bfloat16)])["refused"]


def test_the_first_side_that_is_right_is_the_baseline():
    row = first([case(eager=lambda x: x, slow=torch.square, ours=lambda x: x * x + 1e-5)])
    assert [*row["refused"]] == ["eager", "ours"]


def test_a_side_that_cannot_be_built_is_refused_alone():
    built = []

    def build():
        built.append(1)
        return torch.square

    def impossible():
        raise RuntimeError("no such kernel")

    sides = {"eager": harness.late(build), "ours": harness.late(impossible)}
    row = first([case(**sides)])
    assert row["refused"] == {"ours": "RuntimeError: no such kernel"}
    assert [*row["us"]] == ["eager"] and built == [1]


def test_float32_is_not_tf32_and_cudnn_may_search():
    seen = []

    def look(x):
        backends = torch.backends
        flags = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
        seen.append((*flags, backends.cudnn.benchmark))
        return x * x

    before = torch.backends.cudnn.allow_tf32
    first([case(eager=look)])
    harness._fastest(lambda: look(torch.ones(1)), CPU)  # of a calibration
    assert {*seen} == {(False, False, True)}
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_kernel_broken_on_purpose_is_refused(monkeypatch):
    real = group_norm_silu.ops.group_norm_silu

    def broken(*args, **parts):
        return 1.01 * real(*args, **parts)

    monkeypatch.setattr(group_norm_silu.ops, "group_norm_silu", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert first(group_norm_silu.cases(CPU, "quick"))["refused"]["ours"].startswith("off by")


@pytest.fixture
def fake(monkeypatch):
    """A case of two rows and then an error, in place of all cases."""

    def cases(device, size):
        yield case(eager=torch.square, ours=lambda x: x * x)
        yield case(eager=torch.square, ours=lambda x: x)
        raise MemoryError("of a case")

    monkeypatch.setitem(sys.modules, "benchmarks.fake", SimpleNamespace(cases=cases))
    monkeypatch.setitem(sys.modules, "benchmarks.other", SimpleNamespace(cases=cases))
    monkeypatch.setattr(main, "CASES", ("fake", "other"))


def test_rows_are_written_as_they_end_and_an_error_is_that_of_its_case(
    fake, monkeypatch, tmp_path, capsys
):
    arguments = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert main.main() == 1
    for name in ("fake", "other"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())["cases"]
        assert [[*row["us"]] for row in rows] == [["eager", "ours"], ["eager"]]
    printed = capsys.readouterr().out
    assert "not timed: square: ours: off by" in printed
    assert "not timed: fake: MemoryError: of a case" in printed


def test_a_check_times_nothing(fake, monkeypatch, tmp_path):
    arguments = ["fake", "--check", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--without", "eager"])
    main.main()
    rows = json.loads((tmp_path / "fake.json").read_text())["cases"]
    assert [row["us"] for row in rows] == [{}, {}]
    assert [*rows[0]["error"]] == ["ours"] and "ours" in rows[1]["refused"]


def folder(*arguments: str) -> Path | None:
    parser = argparse.ArgumentParser()
    harness.saving(parser)
    options = parser.parse_args(arguments)
    return harness.folder(argparse.Namespace(**vars(options), device="cpu", threads=1))


@pytest.mark.parametrize("commit", ["unknown", "a" * 40 + "+"])
def test_code_that_no_commit_names_has_no_results_to_commit(commit, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "commit", lambda: commit)
    for arguments in (["--commit"], ["--out", str(harness.RESULTS / "here")]):
        with pytest.raises(ValueError, match="commit your changes, or leave --commit out"):
            folder(*arguments)
    assert folder("--out", str(tmp_path)) == tmp_path
    assert folder("--no-save") is None


def test_what_a_person_measures_is_kept_outside_of_what_is_tracked(monkeypatch):
    monkeypatch.setattr(harness, "commit", lambda: "a" * 40 + "+")
    kept = folder()
    assert kept.parent == harness.RUNS / harness.machine(CPU)
    harness.git("check-ignore", str(kept))  # raises for what git would see
    monkeypatch.setattr(harness, "commit", lambda: "a" * 40)
    assert folder("--commit", "--machine", "mine") == harness.RESULTS / "mine"


@pytest.mark.parametrize("arguments", [["--check"], ["--size", "quick"]])
def test_only_what_was_timed_in_full_is_committed(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "ops", "--commit", *arguments])
    with pytest.raises(SystemExit):
        main.main()
    assert "leave out --check and --size" in capsys.readouterr().err


def test_a_tree_without_git_is_measured_and_may_say_its_commit(monkeypatch):
    def no_git(*_):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(harness, "git", no_git)
    monkeypatch.delenv("DS_COMMIT", raising=False)
    assert harness.environment(CPU)["commit"] == "unknown"
    monkeypatch.setenv("DS_COMMIT", "b" * 40)
    assert harness.environment(CPU)["commit"] == "b" * 40


def test_the_commit_of_a_checkout_with_changes_has_a_plus(monkeypatch):
    monkeypatch.delenv("DS_COMMIT", raising=False)
    monkeypatch.setattr(harness, "dirty", lambda: True)
    assert harness.commit() == harness.git("rev-parse", "HEAD") + "+"


def test_what_is_saved_names_machine_versions_and_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "dirty", lambda: False)
    row = first([case(eager=torch.square)])
    path = harness.save("square", tmp_path, [row], {"copy_gbs": 1.0}, CPU)
    saved = json.loads(path.read_text())
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
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = first([case(eager=torch.square, ours=lambda x: x * x)])
    row["us"]["eager"]["median"], row["us"]["ours"]["median"] = 9.0, 4.5
    refused = first([replace(case(eager=torch.square, ours=lambda x: x), name="cube")])
    rates = {"copy_gbs": 0.512, "matmul_tflops_float32": 0.1}
    harness.save("square", tmp_path / "here", [row, refused], rates, CPU)
    page = "a\n<!-- table: square -->\nold\n<!-- end -->\nb\n"
    filled = tables.filled(page)
    assert "| square | 9 | 4 | 2.00 | 1 | 22% |" in filled
    assert "Refused in cube: ours (off by" in filled and "| cube" not in filled
    assert "old" not in filled
    assert tables.filled(filled) == filled
    monkeypatch.setattr(tables, "EXACTNESS", ("square",))
    off = [f"{error:.1e}" for error in row["error"].values()]
    assert f"| square | 9 ({off[0]}) | 4 ({off[1]}) | 2.00 |" in tables.filled(page)


def test_results_of_several_threads_are_kept_apart():
    folders = [harness.machine(CPU, threads) for threads in (1, 2, 4)]
    assert folders == [folders[0], f"{folders[0]}-2-threads", f"{folders[0]}-4-threads"]


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
    assert first([make(8, CPU)])["refused"]["ours"].startswith("off by")


def test_layers_of_the_plan_are_right_and_have_a_floor():
    rows = harness.run(roofline.cases(CPU, "quick"), CPU, harness.Pace(rounds=1, seconds=0))
    for row in itertools.islice(rows, 4):
        assert row["bytes"] > 0
        assert row["error"]["engine"] < 1e-5


def compared(count: int | None = None) -> list[dict]:
    """So many convolutions as they are compared on a GPU, ours by its reference; or all."""
    net, target = network.random_cifar10(CPU, "tiny"), Target(CPU, torch.bfloat16, 2)
    cases = itertools.islice(convs.compare(net, target, ["reference"]), count)
    return [*harness.run(cases, CPU, None)]


def test_convolutions_are_right_and_named_as_the_engine_looks_them_up(monkeypatch):
    rows = compared()
    assert all([*row["error"]] == ["cuDNN", "reference"] for row in rows)
    asked, get = set(), rewrites.choice_name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "made up")
    monkeypatch.setitem(rewrites.FASTER, "made up", {})
    monkeypatch.setattr(
        rewrites, "choice_name", lambda *args: asked.add(name := get(*args)) or name
    )
    target = Target(torch.device("cuda"), torch.bfloat16, 2)
    Plan.of(network.random_cifar10(CPU, "tiny"), target)
    assert asked and {f"{name}, 2 images" for name in asked} == {row["case"] for row in rows}


def test_a_backend_that_does_not_take_a_convolution_is_missing_there(monkeypatch):
    def refuse(self, *args):
        def run(*given):
            raise RuntimeError("conv: backend 'x' was asked for, but it needs more channels")

        return run

    monkeypatch.setattr(convs.ImplicitGemm, "prepare", refuse)
    for row in compared(2):
        assert row["missing"] == {"reference": "it needs more channels"}
        assert [*row["error"]] == ["cuDNN"] and not row["refused"]


def test_a_convolution_that_is_wrong_is_refused(monkeypatch):
    real = convs.ImplicitGemm.prepare

    def broken(self, *args):
        run = real(self, *args)
        return lambda *given: torch.utils._pytree.tree_map(lambda x: 1.5 * x, run(*given))

    monkeypatch.setattr(convs.ImplicitGemm, "prepare", broken)
    assert all(row["refused"]["reference"].startswith("off by 0.") for row in compared(2))


@pytest.mark.parametrize("module", [student, pairs])
def test_a_case_draws_in_the_precision_of_its_peers(module, monkeypatch):
    """By itself a Sampler would take bfloat16 on a GPU, and be refused beside float32."""
    asked = []
    name = "Sampler" if module is student else "generate_pairs"
    real = getattr(module, name)

    def noting(*args, **options):
        asked.append(options["execution"].precision)
        return real(*args, **options)

    monkeypatch.setattr(module, name, noting)
    row = next(harness.run(module.cases(CPU, "tiny"), CPU, None))
    assert asked == [row["dtype"]] == ["float32"] and not row["refused"]


def test_a_loop_on_a_gpu_is_timed_as_a_sampler_runs_it(monkeypatch):
    made = []
    monkeypatch.setattr(teacher_loop, "peers", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(
        teacher_loop,
        "Sampler",
        lambda *_, **options: made.append(options) or SimpleNamespace(sample=abs),
    )
    net = network.random_cifar10(CPU, "tiny")
    loops, _ = teacher_loop.contenders(net, 2, torch.bfloat16, torch.device("cuda"), slow=True)
    assert [*loops] == ["net", "engine", "ours, tuned", "ours"]
    assert loops["ours"](-1) == loops["ours, tuned"](-1) == 1
    way = Execution("bfloat16", "engine")  # of a network on a CPU
    tuned = replace(way, tune=True)
    assert made == [{"batch_size": 2, "execution": e} for e in (way, tuned)]


def test_kinds_of_layers():
    kinds = {
        "aten::mkldnn_convolution": "convolution", "winograd x2": "convolution",
        "gemm 3x3+gn": "convolution", "aten::native_group_norm": "norm and SiLU",
        "attend": "attention and linear", "add": "other",
    }  # fmt: skip
    assert {name: where.kind(name) for name in kinds} == kinds


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
    for wall, timing in ((True, "wall-clock time"), (False, "process CPU time")):
        row = first([replace(case(eager=torch.square), wall=wall)])
        path = harness.save("square", tmp_path, [row], {"copy_gbs": 1.0}, CPU)
        assert json.loads(path.read_text())["environment"]["timing"] == timing
