"""The report of benchmarks/aot.py: complete, up to date, and what is asked of the code in it."""

import collections
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds.ops.kernels import group_norm_silu, group_norm_silu_backward

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs a checkout")

KEY = "kernel", "arch", "warps", "constants", "shapes"
RESULTS = ROOT / "benchmarks" / "results"
REPORT = RESULTS / "aot.json"
# Backward at 32 x 32 pixels a program has room for one group of 12 channels, and groups start on
# multiples of 24 bytes; at 16 x 16 for one of 18, on multiples of 36. So accesses have these bits.
NARROW = {(1024, 12): 64, (256, 18): 32}
# Loads and stores of 128 bits of the kernels that take tensors element by element, at least: 8
# elements a thread, 16 in quantize, which reads planes one element at a time.
WIDE = {
    "noise_kernel": (0, 2),
    "prepare_batch_kernel": (0, 1),
    "quantize_kernel": (0, 1),
    "solver_update_kernel": (3, 3),
}

SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227}  # KB of a program, at most

ATTENTION = "heads_kernel", "projected_kernel"

SIDES = "IMAGES", "ROWS", "COLUMNS"  # of a box of pixels
PARTS = "residual_desc", "table_ptr"
# How many of the norm's kernels have fewer programs resident with Triton 3.6; 41 others have more.
FEWER = {"fwd_kernel": 11, "bwd_kernel": 8}

ARGUMENTS = {
    name.strip("_"): set(kernel.arg_names)
    for module in (group_norm_silu, group_norm_silu_backward)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(REPORT.read_text())


@pytest.fixture(scope="module")
def fresh() -> dict:
    """Compile a few of the kernels again, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "aot.py"), "--every", "37"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_the_report_has_every_kernel_at_every_shape(committed, fresh):
    def keys(report):
        return [{name: row[name] for name in KEY} for row in report["kernels"]]

    assert keys(committed) == keys(fresh), "run: python benchmarks/aot.py > " + str(REPORT)


@pytest.mark.slow
def test_the_code_is_what_the_report_says(committed, fresh):
    compiled = [
        (new, old)
        for new, old in zip(fresh["kernels"], committed["kernels"], strict=True)
        if "registers" in new
    ]
    assert len(compiled) >= 7
    for new, old in compiled:
        check(new)
        if importlib.metadata.version("triton") == committed["triton"]:
            assert new == old


def test_the_code_is_what_is_asked_of_it(committed):
    for row in committed["kernels"]:
        check(row)


def test_attention_multiplies_on_tensor_cores(committed):
    """Hopper's instructions for 64 rows and more, where an image has as many queries."""
    rows = [row for row in committed["kernels"] if row["kernel"] in ATTENTION]
    assert {row["shapes"][0][0] for row in rows} == {16, 64, 256}
    for row in rows:
        wide = row["arch"] == "sm_90" and row["constants"]["BLOCK_M"] >= 64
        assert set(row["mma"]) == {"HGMMA" if wide else "HMMA"}, row
        assert row["loads"]["128"] > 0, row
        assert row["stores"].keys() == {"128"}, row


def test_convolutions_gather_wide_and_multiply_on_tensor_cores(committed):
    """A row is for many convolutions, of which none or all have narrow images or results."""
    rows = [row for row in committed["kernels"] if row["kernel"] == "conv_kernel"]
    kinds = {"1x1", "2x2", "3x3", "3x3 float8", "3x3+gn", "3x3/2", "3x3/2+gn"}
    assert {shape[0] for row in rows for shape in row["shapes"]} == kinds
    for row in rows:
        constants, (_, channels, out, *_) = row["constants"], row["shapes"][0]
        letter, element = ("Q", 1) if is_float8(row) else ("H", 2)  # of the instruction, and bytes
        products = "GMMA" if row["arch"] == "sm_90" else "MMA"
        assert set(row["mma"]) == {letter + products}, row
        if channels < 128 or out < 128:  # the first and the last of a network
            continue
        m, n, k = (constants[f"BLOCK_{which}"] for which in "MNK")
        vectors = 8 * row["warps"] * 32  # of as many elements of bfloat16, one a thread
        assert row["copies"].keys() == {"128"}, row
        assert row["copies"]["128"] >= (m + n) * k * element // 2 // vectors, row
        results = {"y_ptr", "normed_ptr"} - constants.keys()
        assert row["stores"]["128"] >= len(results) * m * n // vectors, row
        if row["arch"] == "sm_90" and "normed_ptr" in constants and not is_float8(row):
            # two fit a multiprocessor
            assert row["registers"] * row["warps"] * 32 <= 65536 // 2, row
            assert row["shared"] + 1024 <= 228 * 1024 // 2, row


def test_the_convolution_for_sm_90_moves_boxes_and_multiplies_them_where_they_lie(committed):
    """Both factors from shared memory, with a load of each for every stage, and none gathered."""
    rows = [row for row in committed["kernels"] if row["kernel"] == "conv_hopper_kernel"]
    kinds = {"1x1", "2x2", "3x3", "3x3+gn"}
    assert {shape[0] for row in rows for shape in row["shapes"]} == kinds
    pixels = {math.prod(row["constants"][side] for side in SIDES) for row in rows}
    assert pixels == {128, 256}
    for row in rows:
        check_boxes(row)
        residual, table = (name not in row["constants"] for name in PARTS)
        assert row["boxes"]["UTMALDG"] == 2 * row["stages"] + 4 * residual, row
        assert row["copies"] == {}, row
        assert bool(row["stores"]) == table, row  # a tile's sums; what is stored else is boxes


def check_boxes(row: dict) -> None:
    assert row["arch"] == "sm_90", row
    assert row["mma"] == {"HGMMA": 4}, row  # 64 of K, in one place of the code
    assert row["boxes"]["UTMALDG"] >= 6 and row["boxes"]["UTMASTG"] >= 2, row
    assert row["boxes"]["USETMAXREG"] == 0, row  # docs/notes/0018


def test_the_triton_of_gpu_machines_makes_no_worse_code_but_of_some_norms(committed):
    """No spills, the same products and boxes, and as many programs a multiprocessor."""
    other = json.loads((RESULTS / "aot-3.6.json").read_text())
    assert other["triton"].startswith("3.6.")
    own = [row for row in committed["kernels"] if row["arch"] == "sm_90"]
    fewer = collections.Counter()
    for new, row in zip(own, other["kernels"], strict=True):
        assert [new[name] for name in KEY[:3]] == [row[name] for name in KEY[:3]]
        assert row["stack"] == row["spills"] == 0, row
        assert row["shared"] <= SHARED[row["arch"]] * 1024, row
        assert (row.get("mma"), row.get("boxes")) == (new.get("mma"), new.get("boxes")), row
        fewer[row["kernel"]] += resident(row) < resident(new)
    assert +fewer == FEWER


def resident(row: dict) -> int:
    """Return how many programs of a kernel a multiprocessor of sm_90 holds."""
    threads = 32 * row["warps"]
    registers = 65536 // (-(-row["registers"] // 8) * 8 * threads)
    return min(2048 // threads, registers, 228 * 1024 // (row["shared"] + 1024))


def is_float8(row: dict) -> bool:
    return any("float8" in str(part) for part in row["shapes"][0])


def test_what_a_plan_in_float8_needs_is_compiled_where_there_is_float8(committed):
    rows = [row for row in committed["kernels"] if is_float8(row)]
    assert {row["kernel"] for row in rows} == {"conv_kernel", "fwd_kernel", "fwd_apply_kernel"}
    assert {row["arch"] for row in rows} == {"sm_89", "sm_90"}


def check(row: dict) -> None:
    """No memory of its own but registers, room for the shared memory, and wide access to tensors.

    Tensors are of bfloat16 tiles, the rest are small tables. A kernel reads or writes those of its
    arguments that are not None; x and skip, and their gradients, are one tile each time or two.
    Of a result in float8 a thread may have too little for a wide access.
    """
    constants = row["constants"]
    assert row["stack"] == row["spills"] == 0, row
    assert row["shared"] <= SHARED[row["arch"]] * 1024, row
    assert row["registers"] * row["warps"] * 32 <= 65536, row
    loads, stores = WIDE.get(row["kernel"], (0, 0))
    assert row["loads"].get("128", 0) >= loads, row
    assert row["stores"].get("128", 0) >= stores, row
    if "BLOCK_P" not in constants:
        return
    one_group = constants.get("GROUPS") == 1 and (constants["PIXELS"], constants["PER_GROUP"])
    vector = NARROW.get(one_group, 128)
    tile = constants["BLOCK_P"] * constants["BLOCK_C"] * 16 // vector // (row["warps"] * 32)
    pairs = {"reads": ("residual", "skip", "grad_merged"), "writes": ("merged", "d_skip")}
    given = {
        what: sum(f"{name}_ptr" in ARGUMENTS[row["kernel"]] - constants.keys() for name in names)
        for what, names in pairs.items()
    }
    reads = given["reads"] + (2 if row["kernel"].startswith("bwd") else 1)
    writes = given["writes"] + (0 if "sums" in row["kernel"] or is_float8(row) else 1)
    assert row["loads"][str(vector)] >= reads * tile, row
    assert row["stores"].get(str(vector), 0) >= writes * tile, row
