"""Targets, shared dropout and the learned weight of a loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.analytic import GaussianMixture
from ds.methods.consistency.levels import disagreement
from ds.methods.networks import Frozen, SharedDropout, Weight, follow, target_of

CPU = torch.device("cpu")


def net(p: float = 0.5) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.BatchNorm1d(8))


def test_forwards_in_the_context_have_the_same_masks_and_others_do_not():
    student, x = net(), torch.randn(64, 8)
    target = target_of(student).train()
    shared = SharedDropout(student, target, device=CPU)
    with shared:
        a = student(x)
    between = torch.rand(3)
    with shared:
        b = target(x)
    assert torch.equal(a, b)
    assert not torch.equal(a, student(x))
    assert not torch.equal(between, torch.rand(3))


@pytest.mark.parametrize("change", [lambda n: n.eval(), lambda n: setattr(n[1], "p", 0.0)])
def test_without_dropout_at_work_the_generators_are_left_alone(monkeypatch, change):
    monkeypatch.setattr(torch, "get_rng_state", None)
    quiet = net()
    change(quiet)
    with SharedDropout(quiet, device=CPU):
        quiet(torch.zeros(2, 8))


def test_the_state_of_a_gpu_is_kept_too(monkeypatch):
    """Checked on calls alone: the GPU's generator goes back with the CPU's."""
    calls = []
    state = SimpleNamespace(
        get_rng_state=lambda device: calls.append(("get", device)) or "state",
        set_rng_state=lambda state, device: calls.append((state, device)),
    )
    monkeypatch.setattr(torch, "cuda", state)
    shared = SharedDropout(net(), device=torch.device("cuda", 1))
    for _ in range(3):
        with shared:
            pass
    gpu = torch.device("cuda", 1)
    assert calls == [("get", gpu), ("state", gpu), ("state", gpu)]


def test_a_loss_with_the_context_and_no_dropout_is_one_graph():
    quiet, graphs = net(0.0), CompileCounter()

    def loss(x):
        shared = SharedDropout(quiet, device=x.device)
        with shared:
            a = quiet(x)
        with shared:
            return (a - quiet(2 * x)).square().mean()

    assert torch.compile(loss, fullgraph=True, backend=graphs)(torch.randn(4, 8)).isfinite()
    assert graphs.frame_count == 1


def denoiser(student: nn.Module) -> ds.Denoiser:
    return ds.Denoiser(Untimed(student), ds.schedule.EDM(80.0), "x0")


class Untimed(nn.Module):
    """A network that is told no time."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def test_a_stop_gradient_target_is_the_network_itself_and_its_gradient_goes_one_way():
    """The gradient is that towards a constant, with the masks of the student at p = .5."""
    student, x = net(), torch.randn(16, 8)
    student.pop(2)  # a norm of the batch
    y, levels = x + 0.1, torch.full((16,), 2.0)
    f = denoiser(student)
    torch.manual_seed(0)
    assert disagreement(f, x, levels, f, x, levels).abs().max() == 0  # the same masks
    torch.manual_seed(0)
    disagreement(f, x, levels, f, y, levels).square().sum().backward()
    torch.manual_seed(0)
    with torch.no_grad():
        wanted = student(y)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad((student(x) - wanted).square().sum(), student[0].weight)
    assert torch.equal(student[0].weight.grad, expected)


@pytest.mark.parametrize("path", [ds.schedule.EDM(80.0), ds.schedule.Trig(0.5)])
def test_a_frozen_teacher_is_the_same_denoiser_on_every_path(path):
    """Its x0 is that of the data there, though its own schedule is a table of DDPM's."""
    data = GaussianMixture()
    teacher = data.teacher(ds.solvers.DDIM(), ds.grids.quadratic(4)).denoiser
    frozen = Frozen(teacher, path)
    t = path.times_of(torch.tensor([0.05, 0.5, 4.0], dtype=torch.float64))
    alpha, sigma = (w[:, None] for w in path.gather(t, torch.zeros(3, dtype=torch.float64))[:2])
    x0, z = data.sample(0, range(3)).double(), ds.noise(1, range(3), (2,)).double()
    found = frozen(alpha * x0 + sigma * z, t, {})
    for i in range(3):
        exact = data.x0(alpha[i] * x0[i : i + 1] + sigma[i] * z[i : i + 1], *path.at(t[i].item()))
        torch.testing.assert_close(found.x0[i : i + 1], exact, rtol=1e-9, atol=1e-9)


def test_a_frozen_teacher_is_a_copy_that_does_not_learn():
    teacher = denoiser(net())
    frozen = Frozen(teacher, teacher.schedule)
    assert not any(p.requires_grad for p in frozen.parameters())
    x, t = torch.randn(4, 8), torch.ones(4)
    frozen.eval()
    before = frozen(x, t, {}).x0
    with torch.no_grad():
        teacher.net.net[0].weight.add_(1)
    assert torch.equal(frozen(x, t, {}).x0, before)
    assert teacher.net.net[0].weight.requires_grad


def test_a_target_follows_its_network_and_does_not_learn():
    student = net()
    target = target_of(student)
    start = target[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1)
        student[2].running_mean.add_(1)
    follow(target, student, 0.75)
    torch.testing.assert_close(target[0].weight, start + 0.25)
    assert torch.equal(target[2].running_mean, student[2].running_mean)
    assert not any(p.requires_grad for p in target.parameters())
    follow(target, student, 0.0)
    torch.testing.assert_close(target[0].weight, student[0].weight)


def test_the_weight_of_a_loss_is_made_of_waves_of_the_log_of_the_noise_level():
    weight, t = Weight(4), torch.tensor([0.2, 0.8, 1.5], dtype=torch.float64)
    assert torch.equal(weight(t), torch.zeros(3))
    told = t.tan().log() / 4
    waves = torch.stack([(6 * told).sin(), (told / 2).sin(), (6 * told).cos(), (told / 2).cos()], 1)
    for i in range(4):
        with torch.no_grad():
            weight.gains.copy_(torch.eye(4)[i])
        torch.testing.assert_close(weight(t), waves[:, i].float(), rtol=0, atol=1e-6)
