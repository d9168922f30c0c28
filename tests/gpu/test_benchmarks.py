"""Cases of the benchmarks, so small that nothing is learnt but that they run and are right."""

import functools
import json
import sys

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import harness

pytestmark = pytest.mark.gpu
calibrate = functools.cache(harness.calibrate)
# What is left out of a case, which would take an emulated GPU minutes.
CASES = {
    "ops": (),
    "network": ("--only", "bfloat16"),
    "edm": (),
    "roofline": ("--only", "norm"),
    "convs": ("--only", "3x3"),
    "group_norm_silu": ("--only", "float32", "--without", "inductor"),
    "scale_shift": ("--only", "float32", "--without", "inductor"),
    "loader": ("--without", "DALI"),
    "where": ("--without", "diffusers"),
    "teacher_loop": ("--only", r"bfloat16.*\[1,"),
    "pairs": (),
    "student": (),
    "train_step": (),
}
ELSEWHERE = {
    "cold_start",  # its sides are processes of their own
    "frontier",  # trains a teacher first
}


def test_every_case_is_known():
    assert {*CASES, *ELSEWHERE} == {*benchmarks.CASES}


SLOW = "pairs", "student", "teacher_loop"  # half a minute and more, emulated


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_a_case_runs_and_is_right(name, tmp_path, monkeypatch):
    options = ["--size", "tiny", "--device", "cuda", "--out", str(tmp_path), *CASES[name]]
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, *options])
    monkeypatch.setattr(harness, "FLUSH_BYTES", 1)  # of a cache that an emulation does not have
    monkeypatch.setattr(harness, "calibrate", calibrate)  # once
    assert benchmarks.main() == 0
    rows = json.loads((tmp_path / f"{name}.json").read_text())["cases"]
    assert rows and all(row["us"] and not row.get("refused") for row in rows)
