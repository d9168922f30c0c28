"""Discrete MeanFlow: what each stage learns, and that only the last takes a derivative."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import ds
from ds.diffusion.noise import Draws
from ds.methods import DiscreteMeanFlow, MeanFlow, Progress, RectifiedFlow
from ds.methods.proof import Formula
from ds.nets import MLPConfig
from ds.pairs.sources import Batch
from ds.training.parallel import Loss

TOTAL = 60  # steps: ten for each stage
MLP = MLPConfig(dim=3, width=8, depth=1, conditions=("h",))


def rows(count: int = 32) -> Batch:
    index = torch.arange(count)
    x0, noise = (ds.noise(seed, index, (3,)) for seed in (1, 2))
    return Batch(x0, noise, index, Draws(0, index))


@pytest.mark.parametrize("stages", [2, 3, 6])
def test_no_stage_but_the_last_takes_a_derivative(monkeypatch, stages):
    """Counted where PyTorch makes dual numbers: of x, t and h in each step of the last stage."""
    made, make = [], torch.autograd.forward_ad.make_dual
    method, modules = DiscreteMeanFlow(num_stages=stages), {"student": MLP.build()}
    for step in range(TOTAL):
        with monkeypatch.context() as patch:
            spy = lambda *args, step=step: made.append(step) or make(*args)  # noqa: E731
            patch.setattr("torch.autograd.forward_ad.make_dual", spy)
            method.loss(modules, rows(), Progress(step, TOTAL))
    last = range(TOTAL - TOTAL // stages, TOTAL)
    assert made == [step for step in last for _ in ("x", "t", "h")]


@pytest.mark.parametrize("stage", range(6))
def test_a_stage_holds_the_network_to_the_step_of_its_own(stage):
    """The calls of a network, whose value is its time, and the target they make by Eq. 5."""
    called = []
    net = Formula(lambda x, t, h: called.append((x, t, h)) or (t[:, None] + 0 * x))
    method, batch = DiscreteMeanFlow(last=MeanFlow(equal=0.0)), rows()
    x, v, t, h, _ = method.last.rows(net, batch)
    found = method.loss({"student": net}, batch, Progress(10 * stage + 5, TOTAL))
    if stage == 0:
        target = v
    elif stage == 5:
        target = v - h[:, None]  # the derivative of the time by the time is 1
    else:
        d = (h / 2**stage)[:, None]
        target = (d * v + h[:, None] * (t[:, None] - d)) / (d + h[:, None])
        (nearer,) = [told for told in called if told[1].ne(t).any()]
        expected = x - d * v, t - d[:, 0], h - d[:, 0]
        for ours, theirs in zip(nearer, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    error = (t[:, None] - target).square().sum(1).mean()
    torch.testing.assert_close(found, error)


def test_steps_may_be_even_in_the_noise_level():
    t, h = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.4])
    share = DiscreteMeanFlow(ratio=3.0, even_in="sigma").share(t, h, 2)
    far, near = (s / (1 - s) for s in (t[:2], (t - h)[:2]))
    level = far - (far - near) / 9
    torch.testing.assert_close(t[:2] - share[:2] * h[:2], level / (1 + level))
    assert share[2] == 0  # noise alone is at no finite level


def test_the_weight_and_the_guidance_are_those_of_the_last_stage():
    method, modules = DiscreteMeanFlow(), {"student": MLP.build()}
    other = replace(method, last=MeanFlow(power=0.5))
    for step in (0, 15, 55):
        losses = [m.loss(modules, rows(), Progress(step, TOTAL)) for m in (method, other)]
        assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="need a network with classes"):
        teacher = ds.analytic.GaussianMixture().teacher(ds.solvers.DDIM(), (800,))
        net = MLPConfig(conditions=("h",)).build()
        DiscreteMeanFlow(last=MeanFlow(guidance=2.0)).init(teacher.using(net))


def test_it_goes_on_with_the_velocity_of_a_trained_flow():
    flow = RectifiedFlow(time_scale=1.0).result(replace(MLP, conditions=()).build())
    net, (x, v, t, h, _) = DiscreteMeanFlow().init(flow)["student"], MeanFlow().rows(None, rows())
    velocity = flow.denoiser.net(x, t)
    assert not torch.equal(velocity, v)
    torch.testing.assert_close(net(x, t, h=h), velocity)


def test_a_compiled_run_has_a_graph_for_each_kind_of_stage_and_no_more():
    """So that a curriculum of any number of stages stays within the compiler's limit."""
    method, modules = DiscreteMeanFlow(num_stages=12), nn.ModuleDict({"student": MLP.build()})
    graphs = CompileCounter()
    loss = torch.compile(Loss(method, modules), fullgraph=True, backend=graphs)
    for step in range(0, TOTAL, 3):
        progress = Progress(step, TOTAL)
        assert torch.equal(loss(rows(), progress), method.loss(modules, rows(), progress))
    assert graphs.frame_count <= 4  # the first step, the first stage, the others, the last
