"""Small runs for the tests of training, and what to compare of them."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import ds
from ds.analytic import Gaussian
from ds.methods import DenoisingStudent
from ds.nets import UNetConfig
from ds.pairs.sources import Pairs
from ds.system.signals import Stop
from ds.training.config import TrainConfig
from ds.training.log import MEASURED
from ds.training.trainer import Trainer

DATA = Gaussian(mean=0.1, std=0.15, shape=(1, 8, 8))
TEACHER = DATA.teacher(ds.solvers.DDIM(), ds.grids.quadratic(100))
HELD_OUT = 256
TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
    dropout=0.2,
)
SHORT = TrainConfig(
    batch_size=32, epochs=12 / 8, lr=1e-2, warmup_steps=0, ema_decay=0.5, log_every=3, check_every=4
)


class Affine(nn.Module):
    """Two parameters: with x - net(x), the student is gain * x + shift."""

    shape = DATA.shape

    def __init__(self, gain: float = 0.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, t):
        return x - (self.gain * x + self.shift)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return ds.generate_pairs(TEACHER, folder, 4096 + HELD_OUT, batch_size=1024)


def started(net: nn.Module) -> ds.Teacher:
    """A teacher with a network of noise prediction, for a run to start from."""
    return ds.Teacher(ds.Denoiser(net, ds.schedule.LinearBeta()), TEACHER.solver, (999,))


def affine() -> ds.Teacher:
    return started(Affine())


def unet(classes: int = 0) -> ds.Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = replace(TINY, classes=classes).build()
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.05 * torch.randn_like(w))
    return started(net)


def steady(classes: int = 0) -> ds.Teacher:
    """The same without dropout, whose masks depend on how a batch is cut into parts."""
    init = unet(classes)
    for module in init.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return init


def trainer(store, out, config=SHORT, *, init=None, method=None, rows=256, **options) -> Trainer:
    """A run of 12 steps of 8 a epoch, unless the configuration says otherwise."""
    source, held_out = Pairs(store, range(HELD_OUT, HELD_OUT + rows)), Pairs(store, range(64))
    method = method or DenoisingStudent()
    return Trainer(method, init or affine(), source, held_out, out, config, **options)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict]:
    """The lines without what is measured."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(out)]


def state(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a run has learnt."""
    kinds = {"now": run.state.modules, "ema": run.averages.ema, "best": run.averages.best}
    return {
        f"{kind} {name}": w
        for kind, module in kinds.items()
        for name, w in module.state_dict().items()
    }


def assert_same_bits(a: Trainer, b: Trainer) -> None:
    here, there = state(a), state(b)
    assert here.keys() == there.keys()
    for name, w in here.items():
        assert torch.equal(w, there[name]), name


def stop_at(monkeypatch, step: int) -> None:
    """Send the signal of Ctrl-C, in effect, while that step is taken."""
    asked = iter(range(1, 10**9))

    @contextlib.contextmanager
    def signals():
        stop = Stop()
        stop.__class__ = type("Asked", (Stop,), {"__call__": lambda _: int(next(asked) == step)})
        yield stop

    monkeypatch.setattr("ds.training.trainer.deferred_signals", signals)


class Exploding(DenoisingStudent):
    """Not finite from step 6 on."""

    def loss(self, modules, batch, progress):
        loss = super().loss(modules, batch, progress)
        return loss * (math.nan if progress.step >= 6 and loss.requires_grad else 1)
