"""Consistency training: how the number of levels and the target's decay change in a run."""

import copy
import math

import pytest
import torch
from torch import nn

import ds
from ds.diffusion.noise import Draws
from ds.methods import ConsistencyTraining, Progress
from ds.nets import MLPConfig
from ds.pairs.sources import Batch

TOTAL = 400
# By hand for s0 = 2, s1 = 150, mu0 = 0.9: step, levels N, and mu by the N before the + 1. At the
# middle sqrt(0.5 * (151**2 - 4) + 4) - 1 = 105.78, so there are 106 steps, 107 levels, and mu is
# 0.9**(2 / 106).
SCHEDULE = [
    (0, 2, 0.81),
    (1, 8, 0.970346),
    (100, 76, 0.997194),
    (200, 107, 0.998014),
    (300, 131, 0.998380),
    (400, 151, 0.998596),
]


@pytest.mark.parametrize(("step", "levels", "decay"), SCHEDULE)
def test_the_schedules_are_those_of_the_released_code(step, levels, decay):
    method, progress = ConsistencyTraining(), Progress(step, TOTAL)
    assert method.steps(progress).item() + 1 == levels
    assert method.decay(progress) == pytest.approx(decay, abs=1e-6)
    assert abs(0.9 ** (2 / levels) - decay) > 5e-6, "mu takes the number before the + 1"


def test_the_target_follows_by_the_decay_of_its_step():
    method, net = ConsistencyTraining(), nn.Linear(2, 2)
    modules = nn.ModuleDict({"student": net, "target": copy.deepcopy(net)})
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    method.after_step(modules, Progress(0, TOTAL))
    torch.testing.assert_close(modules["target"].weight - before, torch.full((2, 2), 1 - 0.81))


@pytest.mark.parametrize(("step", "levels"), [(0, 2), (200, 107)])
def test_rows_have_all_levels_but_the_last_of_their_step(step, levels):
    """Seen in what the student is told; the target is told the next level."""
    method, told = ConsistencyTraining(), {}

    class Told(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.map = name, nn.Linear(2, 2)

        def forward(self, x, t):
            told[self.name] = t
            return self.map(x)

    index = torch.arange(4096)
    x0, z = (ds.noise(seed, index, (2,)) for seed in (1, 2))
    modules = nn.ModuleDict({name: Told(name) for name in ("student", "target")})
    method.loss(modules, Batch(x0, z, index, Draws(0, index)), Progress(step, TOTAL))
    grid = ds.grids.karras(levels, ds.schedule.EDM(), top=80.0, bottom=0.002)
    logs = torch.tensor([math.log(sigma) / 4 for sigma in grid])
    i = {name: (t[:, None] - logs).abs().argmin(1) for name, t in told.items()}
    assert i["student"].unique().tolist() == [*range(levels - 1)]
    assert torch.equal(i["target"], i["student"] + 1)


def test_a_student_may_start_afresh_and_no_teacher_is_kept():
    teacher = ds.analytic.GaussianMixture().teacher(ds.solvers.DDIM(), (80.0,), ds.schedule.EDM())
    modules = ConsistencyTraining(student=MLPConfig()).init(teacher)
    assert {*modules} == {"student", "target"}


def test_more_levels_at_the_start_than_at_the_end_are_refused():
    with pytest.raises(ValueError, match=r"start_levels \(30\) must be at most end_steps \+ 1"):
        ConsistencyTraining(start_levels=30, end_steps=20)
    with pytest.raises(ValueError, match=r"start_levels \(22\) must be at most"):
        ConsistencyTraining(start_levels=22, end_steps=20)
    assert ConsistencyTraining(start_levels=21, end_steps=20).start_levels == 21
