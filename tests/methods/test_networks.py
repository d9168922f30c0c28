"""Targets and shared dropout."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ds.methods.networks import SharedDropout, follow, target_of

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
