"""Evaluation shared by processes: the same figures for any number of them and any batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ds
from ds.evaluation.evaluate import evaluate
from ds.evaluation.features import Pixels
from ds.methods import DenoisingStudent
from ds.nets import UNetConfig
from ds.pairs.sources import digits
from ds.system import distributed
from tests.processes import Two

CONFIG = UNetConfig(
    image_size=8, in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), norm_groups=4,
)  # fmt: skip
TIMES = "seconds_per_1000_images"


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CONFIG.build()
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("ranks") / "student"
    ds.Student(net, DenoisingStudent()).save_pretrained(path)
    return path


def alone(student: Path, batch_size: int) -> dict:
    reference = digits()[0][:301]
    result = evaluate(
        ds.load_student(student), reference, Pixels(), n=101, batch_size=batch_size
    )  # fmt: skip
    return {k: v for k, v in result.items() if k not in (TIMES, "protocol")}


def shared(student: Path, out: Path) -> None:
    with distributed.joined():
        model = ds.load_student(student)
        result = evaluate(model, digits()[0][:301], Pixels(), n=101, batch_size=16)
        out.with_suffix(f".{int(distributed.is_first())}").write_text(json.dumps(result))


@pytest.mark.slow
def test_the_verb_evaluate_runs_in_two_processes(student, tmp_path):
    # torchrun reads what comes after the module too, and takes shortened names for its own.
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ds.cli",
    )
    options = ("--count", "101", "--batch-size", "16", "--extractor", "pixels", "--out", "e.json")
    command = [sys.executable, *launcher, "evaluate", str(student), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["protocol"]["n"] == 101


def test_two_processes_find_what_one_does(student, tmp_path):
    two = Two(shared, student, tmp_path / "result")
    _, said = two.communicate(timeout=120)
    assert two.returncode == 0, said
    first, second = (json.loads((tmp_path / f"result.{i}").read_text()) for i in (1, 0))
    expected = alone(student, 16)
    # Each process draws in batches of its own, and a pixel on an edge may round the other way.
    assert {k: first[k] for k in expected} == pytest.approx(expected, rel=1e-6)
    assert {k: second[k] for k in expected} == {k: first[k] for k in expected}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_changes_no_figure(student, batch_size):
    assert alone(student, batch_size) == pytest.approx(alone(student, 256), rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_the_shares_of_all_ranks_make_the_whole(n, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(distributed.share(n))
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
