"""dstudent doctor: what this machine has."""

import json
import os
import re

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.cli.doctor import PLANS
from ds.evaluation import environment
from ds.training.throughput import flop_counter
from tests.cli.chain import (
    ROOT,
    python,
)


def test_doctor_shows_every_op_with_its_backends(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("python", "torch", "gpu", "triton", "dali", "apex", "extension", "backend"):
        assert word in said, word
    table = [line.split() for line in said.splitlines() if line.startswith("group_norm_silu ")]
    assert {"reference"} <= {row[2] for row in table}
    assert {row[1] for row in table} == {"cpu", "cuda"}


def test_doctor_prints_json_for_machines(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == ds.__version__
    assert {"op", "device", "backend", "status", "reason"} == report["ops"][0].keys()


def test_doctor_prints_the_plan_of_a_network(capsys):
    assert main(["doctor", "--plan", "cifar10", "--images", "264", "--device", "cuda"]) == 0
    first, *rows, total, about, launches, full = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"110 launches, [\d.]+ MB moved needlessly", launches)
    assert full == "multiples of 528 images fill 132 multiprocessors"
    assert first.split() == ["call", "makes", "shape", "MB", "GFLOP", "floor,", "us"]
    assert total.split()[0] == str(len(rows))
    assert any(row.startswith("gemm 2x2      up.1.upsample.conv") for row in rows)
    assert sum(float(row.split()[-2]) for row in rows) == pytest.approx(264 * 11.217, rel=1e-3)
    assert about.startswith("264 images, bfloat16, ")


@pytest.mark.parametrize("plan", ["edm-cifar10", "adm-imagenet64"])
def test_doctor_prints_the_plans_of_edm_and_adm(plan, capsys):
    """The FLOPs are those of the network, less a few that doubling after a convolution saves."""
    assert main(["doctor", "--plan", plan, "--images", "1", "--device", "cuda"]) == 0
    *_, total, _, _, _ = capsys.readouterr().out.splitlines()
    with torch.device("meta"):
        net = PLANS[plan.replace("-", "_")]().net.build()
        cond = {"label": torch.zeros(1, dtype=torch.int64)} if net.config.classes else {}
        with flop_counter() as counter:
            net(torch.zeros(1, *net.shape), torch.zeros(1), **cond)
    counted = counter.get_total_flops() / 1e9
    assert 0.94 * counted < float(total.split()[-2]) < counted


@pytest.mark.parametrize("probe", ["torch", "gpu", "extension", "ops"])
def test_doctor_reports_a_broken_probe_and_goes_on(probe, capsys, monkeypatch):
    def broken():
        raise OSError("libcudart.so: cannot open\nshared object file")

    monkeypatch.setitem(environment._PROBES, probe, broken)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "failed: OSError: libcudart.so: cannot open shared object file" in said
    assert "numpy" in said


def test_doctor_prints_where_torch_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    code = "import sys; from ds.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, "doctor", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert "failed: ImportError: libtorch_cpu.so: cannot open" in done.stdout
    assert f"version       {ds.__version__}" in done.stdout
    assert done.stderr.startswith("dstudent: libtorch_cpu.so: cannot open")
    assert len(done.stderr.splitlines()) == 1
