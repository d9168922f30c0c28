"""Averages made after a training: against the same averages taken while it ran."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from scipy.integrate import quad
from torch import nn

import ds
from ds.system.signals import Interrupted
from ds.training import ema
from tests.system.test_reading import NO_FILES, no_file
from tests.training.runs import SHORT, TEACHER, stop_at, trainer

STEPS, EVERY = 2000, 100


class Walk(nn.Module):
    """Weights that take a random walk of length 1, and a counter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))
        self.register_buffer("count", torch.tensor(0))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A run of 20 snapshots, and what averages of other lengths were at its end."""
    run, net, draw = tmp_path_factory.mktemp("run"), Walk(), torch.Generator().manual_seed(0)
    tracked = [Walk() for _ in ema.LENGTHS]
    direct = {length: Walk() for length in (0.02, 0.05, 0.07, 0.15, 0.2)}
    lengths = [*zip(ema.LENGTHS, tracked, strict=True), *direct.items()]
    for step in range(STEPS):
        net.weight.data += torch.randn(64, generator=draw) / STEPS**0.5
        for length, mean in lengths:
            decay = ema.power_decay(step, ema.gamma_of(length))
            ema.average([mean.weight], [net.weight], decay)
        for mean in tracked:
            mean.count.fill_(step)
        if (step + 1) % EVERY == 0:
            ema.write_snapshot(run, step + 1, tracked)
    return run, {length: mean.weight.detach() for length, mean in direct.items()}


def test_an_average_made_afterwards_is_that_of_the_training(walked):
    """A run of 1 in length; averages of the tracked lengths and between them are the nearest."""
    run, direct = walked
    for length, bar in ((0.02, 1e-2), (0.05, 1e-6), (0.07, 2e-4), (0.15, 5e-4), (0.2, 2e-3)):
        found = ds.post_hoc_ema(run, length)
        away = (found["weight"] - direct[length]).square().mean().sqrt().item()
        print(f"length {length}: {away:.1e}")
        assert away < bar
        assert found["count"] == STEPS - 1


def test_the_length_is_the_standard_deviation_of_the_weights_in_time():
    """In closed form: the moments of (gamma + 1) t^gamma on [0, 1]."""
    for length in (0.01, 0.05, 0.1, 0.25):
        n = ema.gamma_of(length) + 1
        assert n / (n + 2) - (n / (n + 1)) ** 2 == pytest.approx(length**2)


def test_a_training_writes_snapshots_and_goes_on_with_its_averages(tmp_path, monkeypatch):
    store = ds.generate_pairs(TEACHER, tmp_path / "store", 512 + 256, batch_size=1024)
    config = replace(SHORT, snapshot_every=5)
    whole = trainer(store, tmp_path / "whole", config)
    before = {name: w.clone() for name, w in whole.state.modules["student"].state_dict().items()}
    whole.fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            trainer(store, tmp_path / "cut", config).fit()
    trainer(store, tmp_path / "cut", config).fit()
    files = sorted((tmp_path / "whole" / "snapshots").iterdir())
    assert [file.stem for file in files] == ["step-0000005", "step-0000010", "step-0000012"]
    for file in files:
        other = tmp_path / "cut" / "snapshots" / file.name
        assert file.read_bytes() == other.read_bytes()
    student = copy.deepcopy(whole.state.modules["student"])
    student.load_state_dict(ds.post_hoc_ema(tmp_path / "whole", 0.1))
    for name, w in student.state_dict().items():
        torch.testing.assert_close(w, whole.averages.tracked[1].state_dict()[name])
        assert not torch.equal(w, before[name])


def test_what_is_no_run_with_snapshots_is_named(walked, tmp_path):
    with pytest.raises(ValueError, match=r"no snapshots are here; train with train.snapshot_every"):
        ds.post_hoc_ema(tmp_path, 0.1)
    for length in (0.0, 0.3):
        with pytest.raises(ValueError, match=rf"length must lie in 0.01 .. 0.25 .*, not {length}"):
            ds.post_hoc_ema(walked[0], length)


@no_file
def test_a_snapshot_that_is_no_file_is_said(tmp_path, kind):
    (tmp_path / "snapshots").mkdir()
    NO_FILES[kind](tmp_path / "snapshots" / "step-0000001.safetensors")
    with pytest.raises(ValueError, match=f"step-0000001.safetensors: {kind}"):
        ds.post_hoc_ema(tmp_path, 0.1)


@pytest.mark.parametrize(
    "name", ["step-.safetensors", "step-1e3.safetensors", "step--1.safetensors"]
)
def test_a_snapshot_is_known_by_its_name(walked, tmp_path, name):
    shutil.copytree(walked[0] / "snapshots", tmp_path / "snapshots")
    shutil.copy(tmp_path / "snapshots" / "step-0000100.safetensors", tmp_path / "snapshots" / name)
    with pytest.raises(ValueError, match=f"{name}: not the name of a snapshot"):
        ds.post_hoc_ema(tmp_path, 0.1)


@pytest.mark.parametrize("content", ["no snapshot", "of another step", "of another network"])
def test_a_snapshot_of_something_else_is_named(walked, tmp_path, content):
    shutil.copytree(walked[0] / "snapshots", tmp_path / "snapshots")
    file = tmp_path / "snapshots" / "step-0000200.safetensors"
    if content == "no snapshot":
        file.write_bytes(b"no snapshot")
    elif content == "of another step":
        shutil.copy(tmp_path / "snapshots" / "step-0000100.safetensors", file)
    else:
        ema.write_snapshot(tmp_path, 200, [nn.Linear(1, 1) for _ in range(2)])
    with pytest.raises(ValueError, match=f"{file}: not a whole snapshot"):
        ds.post_hoc_ema(tmp_path, 0.1)


@pytest.mark.parametrize("a", [(100, 6.0), (40, 16.5)])
@pytest.mark.parametrize("b", [(100, 6.0), (70, 3.2)])
def test_what_two_averages_share_is_the_integral_of_their_weights(a, b):
    """An average of t steps weighs step s by (gamma + 1) * s**gamma / t**(gamma + 1)."""

    def weight(average: tuple[int, float], s: float) -> float:
        t, gamma = average
        return (gamma + 1) / t * (s / t) ** gamma

    shared, _ = quad(lambda s: weight(a, s) * weight(b, s), 0, min(a[0], b[0]), epsrel=1e-12)
    assert ema._product(a, b) == pytest.approx(shared, rel=1e-9)
    assert ema._product(b, a) == ema._product(a, b)
