"""A training run on a GPU: its loaders, its steps in bfloat16 and float32, and going on."""

import itertools
import os
from contextlib import closing
from dataclasses import replace

import pytest
import torch

import ds
from ds.methods import DenoisingStudent
from ds.methods.networks import SharedDropout
from ds.pairs.sources import Images, Pairs
from ds.system.signals import Interrupted
from ds.training.batches import Batches
from ds.training.config import RuntimeConfig, TrainConfig
from ds.training.loader import load
from ds.training.trainer import Trainer
from tests import emulated
from tests.training.runs import assert_same_bits, lines, state, steady, stop_at, store

__all__ = ["store"]
pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
ROWS = 2  # of a batch
CONFIG = TrainConfig(
    batch_size=ROWS,
    epochs=2,
    lr=1e-3,
    warmup_steps=1,
    grad_clip_norm=1.0,
    log_every=1,
    check_every=2,
)
KINDS = ["memory_map", "resident"]
LEVELS = torch.arange(40 * 8 * 8).view(40, 8, 8, 1).remainder(251).byte()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Let an emulated GPU not measure its matrix product, and draw 2 images instead of 64."""
    if emulated.VARIABLE in os.environ:
        monkeypatch.setattr("ds.training.throughput.matmul_tflops", lambda *_: 1.0)
        monkeypatch.setattr("ds.training.trainer.noise", lambda seed, _, *args, **options: ds.noise(
            seed, range(2), *args, **options))  # fmt: skip


def trainer(store, out, device="cuda", kind="auto", **config) -> Trainer:
    """A run of two steps."""
    source, held_out = (Pairs(store, range(i, i + ROWS)) for i in (ROWS, 0))
    return Trainer(
        DenoisingStudent(), steady(), source, held_out, out, replace(CONFIG, **config),
        device=device, runtime=RuntimeConfig(loader=kind),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", ["pairs", "images"])
def test_a_loader_brings_the_rows_of_the_batches(store, kind, make):
    source = Pairs(store, range(40)) if make == "pairs" else Images(LEVELS, seed=3)
    batches = Batches(source, 16, seed=1)
    with closing(load(batches, 1, GPU, kind, 2)) as steps:
        for step, found in zip((1, 2, 3, 4), itertools.islice(steps, 4), strict=True):
            for x, y in zip(found, batches.read(step), strict=True):
                assert x.is_cuda and torch.equal(x.cpu(), y)
            draws = batches.draws(step)
            there, here = (source.prepare(*rows, draws) for rows in (found, batches.read(step)))
            assert torch.equal(there.x0.cpu(), here.x0), "the same bits everywhere"
            torch.testing.assert_close(there.noise.cpu(), here.noise, rtol=1e-6, atol=1e-6)


def goes_the_way_of(run: Trainer, here: Trainer, bound: float) -> None:
    """Compare weights, by how far they went, and losses with those of a run on the CPU."""
    assert all(w.is_cuda for w in state(run).values())
    weights = [torch.cat([w.cpu().flatten() for w in state(each).values()]) for each in (run, here)]
    start = torch.cat([w.flatten() for w in steady().net.state_dict().values()]).repeat(3)
    assert (weights[0] - weights[1]).norm() < bound * (weights[1] - start).norm()
    losses = [[line["loss"] for line in lines(each.out) if "loss" in line] for each in (run, here)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_run_in_bfloat16_goes_on_to_the_same_bits(store, tmp_path, monkeypatch):
    here = trainer(store, tmp_path / "cpu", "cpu", precision="float32")
    here.fit()
    whole = trainer(store, tmp_path / "whole", kind="resident")
    assert whole.config.precision == "bfloat16"
    whole.fit()
    goes_the_way_of(whole, here, 0.3)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Interrupted):
            trainer(store, tmp_path / "cut", kind="memory_map").fit()
    resumed = trainer(store, tmp_path / "cut", kind="memory_map")
    resumed.fit()
    assert_same_bits(whole, resumed)


def test_forwards_share_their_dropout_on_a_gpu():
    net, x = torch.nn.Dropout(0.5), torch.ones(4096, device=GPU)
    shared = SharedDropout(net, device=GPU)
    with shared:
        first = net(x)
    with shared:
        assert torch.equal(net(x), first)
    assert not torch.equal(net(x), first)
