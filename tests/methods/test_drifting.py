"""Drifting: who pulls and pushes whom, the memory of real rows, and the features it compares."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import ds
from ds.analytic import GaussianMixture
from ds.diffusion.noise import Draws
from ds.evaluation.metrics import sliced_wasserstein
from ds.methods import DenoisingStudent, Drifting, Progress
from ds.methods.neighbours import EMPTY, Memory, force
from ds.methods.proof import Formula
from ds.methods.proofs import drifting as proof
from ds.nets.lpips import LPIPS
from ds.pairs.sources import Batch, Images
from ds.system import distributed
from ds.training.config import TrainConfig
from ds.training.throughput import price_of_rows
from ds.training.trainer import Trainer
from tests.methods.runs import start

DATA, STEP = GaussianMixture(), Progress(0, 10)
LABELS = torch.tensor([0, 0, 0, 1, 1, 0])


def rows(count: int, first: int = 0) -> Batch:
    index = torch.arange(first, first + count)
    x0, z = DATA.sample(0, index.tolist()), ds.noise(1, index, (2,))
    return Batch(x0, z, index, Draws(0, index))


def modules(method: Drifting, **more: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"student": Formula(lambda x, t, **label: x.sin()), **more})


def test_the_mean_shift_is_the_score_and_laplace_is_not_but_comes_nearer_in_64_dimensions():
    gaussian, laplace = proof.shifts(50_000), proof.far(500)
    assert gaussian.passed and gaussian.control > 0.1 and laplace.passed
    assert gaussian.controls["laplace kernel"] > 0.3
    assert proof.shifts(500).value > 0.03  # with few samples, it is their own law


@pytest.mark.parametrize(("kernel", "rate"), [("laplace", 5.0), ("gaussian", 75.0)])
def test_points_that_go_down_the_loss_come_to_the_data_and_uphill_they_leave(kernel, rate):
    batch, method = rows(128), Drifting(kernel=kernel)

    def far(sign: int, steps: int = 40) -> float:
        away = torch.zeros(128, 2, requires_grad=True)
        for _ in range(steps):
            net = Formula(lambda z, t: -away)
            loss = method.loss(nn.ModuleDict({"student": net}), batch, STEP)
            away.data -= sign * rate * torch.autograd.grad(loss, away)[0]
        return sliced_wasserstein(batch.noise + away.detach(), batch.x0)

    start = far(1, steps=0)
    assert far(1) < 0.65 * start and far(-1) > 2 * start


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_rows_meet_their_class_alone_and_with_guidance_every_real_row_pushes(guidance):
    theirs = torch.tensor([0, 1, 2, 1, EMPTY])
    pulls, pushes = Drifting(guidance=guidance).weights(LABELS, theirs)
    assert torch.equal(pulls, (LABELS[:, None] == theirs).float())
    samples, others = pushes[:, :6], pushes[:, 6:]
    assert torch.equal(samples.sum(1), torch.tensor([3.0, 3, 3, 1, 1, 3]))
    assert not samples.diagonal().any() and not samples[LABELS == 0][:, LABELS == 1].any()
    assert others.shape == (6, 5 if guidance > 1 else 0)
    if guidance > 1:  # rows of every class, none of an empty place, twice the weight of the samples
        assert torch.equal(others[:, :4], (2 * samples.sum(1) / 4)[:, None].expand(-1, 4))
        assert not others[:, 4].any()


@pytest.mark.parametrize("kernel", ["laplace", "gaussian"])
def test_a_row_that_nothing_pushes_or_pulls_stays(kernel):
    x, real = rows(4).noise, rows(4).x0
    pulls, pushes = torch.ones(4, 4), 1 - torch.eye(4)
    pulls[0] = pushes[1] = 0
    found = force(x, real, x, (pulls, pushes), kernel, (0.2,))[0]
    assert not found[:2].any() and found[2:].all()


def test_bandwidths_are_those_of_the_kernel_unless_given():
    batch = rows(32)

    def loss(**fields) -> torch.Tensor:
        method = Drifting(**fields)
        return method.loss(modules(method), batch, STEP)

    assert torch.equal(loss(), loss(bandwidths=(0.02, 0.05, 0.2)))
    for kernel, own in (("laplace", (0.02, 0.05, 0.2)), ("gaussian", (0.05, 0.15, 0.5))):
        assert torch.equal(loss(kernel=kernel), loss(kernel=kernel, bandwidths=own))
        assert not torch.equal(loss(kernel=kernel), loss(kernel=kernel, bandwidths=own[:2]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bandwidths": ()}, "bandwidths is empty; give one or more"),
        ({"generator": DenoisingStudent(loss_type="l1")}, "loss_type is l1, which is not used"),
        ({"guidance": 0.5}, "guidance"),
    ],
)
def test_fields_that_would_do_nothing_are_refused(fields, words):
    with pytest.raises(ValueError, match=f"Drifting: .*{words}"):
        Drifting(**fields)


def test_the_memory_holds_the_last_rows_and_a_step_that_is_taken_again_leaves_the_same():
    memory, seen = Memory(8, (2,)), [rows(3, 3 * step) for step in range(4)]
    for step in (0, 1, 1, 2, 3, 3):
        x0, label = memory(seen[step].x0, torch.full((3,), step), step, keep=True)
        assert torch.equal(x0, memory.x0) and torch.equal(label, memory.label)
        assert (label == EMPTY).sum() == max(0, 8 - 3 * (step + 1))
    assert sorted(memory.label.tolist()) == [1, 1, 2, 2, 2, 3, 3, 3]
    before = memory.x0.clone()
    x0, _ = memory(seen[0].x0, torch.zeros(3).long(), 4, keep=False)
    assert torch.equal(memory.x0, before) and not torch.equal(x0, before)
    with pytest.raises(ValueError, match=r"holds 8 rows, a batch has 9; make it at least as large"):
        memory(rows(9).x0, torch.zeros(9).long(), 0, keep=True)


def test_rows_of_the_memory_pull_beside_those_of_the_batch():
    method, memory = Drifting(memory=32), Memory(32, (2,))
    batch, both = rows(16, 16), rows(32)
    memory(rows(16).x0, torch.zeros(16).long(), 0, keep=True)
    found = method.loss(modules(method, memory=memory), batch, Progress(1, 10))
    x, y = batch.noise, both.x0
    made = x - x.sin()
    weights = torch.ones(16, 32), 1 - torch.eye(16)
    moved = force(made, y, made, weights, "laplace", (0.02, 0.05, 0.2))[0]
    torch.testing.assert_close(found, moved.square().mean())


def test_a_run_with_a_memory_is_resumed_to_the_same_bits(tmp_path):
    method, images = Drifting(memory=48).on(start()), Images(DATA.sample(0, range(64)))
    short = TrainConfig(
        batch_size=32, epochs=2, warmup_steps=0, ema_decay=0.5, log_every=2, check_every=2
    )

    def run(out: str, epochs: float) -> Trainer:
        trainer = Trainer(
            method, start(), images, images, tmp_path / out, replace(short, epochs=epochs)
        )
        trainer._flops = lambda: 0.0
        trainer.fit()
        return trainer

    whole, cut = run("whole", 2), run("cut", 1)
    half = cut.state.modules.state_dict()["memory.x0"].clone()
    cut = run("cut", 2)
    found, wanted = (r.state.modules.state_dict() for r in (cut, whole))
    assert not torch.equal(found["memory.x0"], half)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Slices(nn.Module):
    """In the place of LPIPS: features of two slices."""

    def features(self, x):
        return [x.square(), x[:, :1].cos()]


def test_features_of_lpips_are_compared_beside_pixels_each_with_a_size_of_its_own(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(LPIPS, "load", lambda path: Slices())
    (file := tmp_path / "lpips.pth").write_bytes(b"")
    method = Drifting(features=file, bandwidths=(0.3,))
    teacher = ds.Teacher(
        ds.Denoiser(start().net, ds.schedule.LinearBeta()), ds.solvers.DDIM(), (800,)
    )
    features = method.init(teacher)["features"]
    z, index = ds.noise(0, range(8), (2, 4, 4)), torch.arange(8)
    batch = Batch(ds.noise(1, range(8), (2, 4, 4)) - 1, z, index, Draws(0, index))
    scale = torch.ones((), requires_grad=True)
    net = Formula(lambda x, t: x * (1 - scale))
    loss = method.loss(nn.ModuleDict({"student": net, "features": features}), batch, STEP)
    assert loss.item() == pytest.approx(5, rel=1e-5)  # the forces of each have the size 1
    (slope,) = torch.autograd.grad(loss, scale)
    assert slope.isfinite() and slope != 0
    plain = replace(method, features=None)
    (alone,) = torch.autograd.grad(plain.loss(modules(plain, student=net), batch, STEP), scale)
    assert slope != alone


def test_a_process_that_measures_alone_waits_for_no_other(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.all_gather", lambda *_: pytest.fail("waits"))
    assert (distributed.rank(), distributed.world_size()) == (1, 2)
    with distributed.alone():
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    config, images = TrainConfig(batch_size=32), Images(DATA.sample(0, range(32)))
    assert price_of_rows(Drifting(), start(), images, config, torch.device("cpu"))[0] > 0
    assert distributed.world_size() == 2
