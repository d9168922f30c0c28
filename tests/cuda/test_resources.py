"""The report of benchmarks/cuda_resources.py: up to date, and what is asked of the code in it."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds.ops import _native

ROOT = Path(__file__).resolve().parent.parent.parent
ARCH = "sm_90"
REPORT = ROOT / "benchmarks" / "results" / "cuda_resources.json"
pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs a checkout"),
    pytest.mark.skipif(
        not _native.build_info("cuda")["built"], reason=str(_native.build_info("cuda")["reason"])
    ),
]


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(REPORT.read_text())


@pytest.fixture(scope="module")
def fresh() -> dict:
    """Read the figures for one architecture off the library that is installed here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "cuda_resources.py"), "--arch", ARCH]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_report_is_that_of_the_library(committed, fresh):
    """Another compiler may spend other registers, but has the same kernels."""
    rows = [row for row in committed["kernels"] if row["arch"] == ARCH]
    if fresh["compiler"] == committed["compiler"]:
        assert fresh["kernels"] == rows, f"run: python benchmarks/cuda_resources.py > {REPORT}"
    else:
        assert [row["kernel"] for row in fresh["kernels"]] == [row["kernel"] for row in rows]


def test_the_cuts_are_those_of_the_library(committed):
    cut = _native.cuda_library().ds_cuda_group_norm_silu_tiles
    for row in committed["cuts"]:
        for name, cluster in (("cluster", True), ("two passes", False)):
            shared = ctypes.c_int64()
            sizes = row["pixels"], row["channels"], row["groups"], 2
            tiles = cut(*sizes, cluster, ctypes.addressof(shared))
            assert row[name] == ({"tiles": tiles, "shared": shared.value} if tiles else None)


def test_the_code_is_what_is_asked_of_it(committed):
    """No memory of its own but registers, and wide access to what is large.

    What moves x, and the step of Adam, do so 16 bytes at a time, and 8 of bfloat16.
    """
    wide = {
        "ClusterForward": ("copies", "stores"), "SumsForward": ("copies",),
        "ApplyForward": ("loads", "stores"), "Step": ("loads", "stores"),
        "SumSquares float32": ("loads",), "PrepareBatch float32": ("stores",),
    }  # fmt: skip
    for row in committed["kernels"]:
        assert row["stack"] == row["spills"] == 0, row
        assert row["registers"] <= 80, row  # three blocks of 256 threads a multiprocessor
        for name, accesses in wide.items():
            if row["kernel"].startswith(name):
                assert all(row[access].get("128", 0) >= 1 for access in accesses), row
    assert {row["arch"] for row in committed["kernels"]} == {"sm_80", "sm_90"}


def test_the_blocks_fit_the_shared_memory(committed):
    assert committed["cuts"]
    for row in committed["cuts"]:
        assert row["two passes"]["shared"] <= 48 * 1024
        if row["cluster"] is not None:
            assert row["cluster"]["tiles"] <= 8
            assert row["cluster"]["shared"] <= 227 * 1024
