"""Shortcut models: which rows learn which steps, what they are told, and what they cost."""

import pytest
import torch
from torch import nn

import ds
from ds.diffusion.noise import Draws
from ds.methods import Progress, Shortcut
from ds.methods.proof import Formula
from ds.nets.base import NO_CLASS
from ds.pairs.sources import Batch

FLOW = 3  # log2 of the steps below
METHOD = Shortcut(steps=8, bootstrap_every=4, time_scale=1.0)


class Told(nn.Module):
    """A network that returns `says` of what it is told, and notes that."""

    def __init__(self, says=lambda x, t, level, label=None: 0 * x):
        super().__init__()
        self.says, self.calls = says, []

    def forward(self, x, t, **cond):
        self.calls.append({"x": x, "t": t, **cond})
        return self.says(x, t, **cond)


def rows(first: int, count: int, **cond) -> Batch:
    index = torch.arange(first, first + count)
    data, noise = (ds.noise(seed, index, (2,)) for seed in (1, 2))
    return Batch(data, noise, index, Draws(0, index), cond)


def told(batch: Batch, method: Shortcut = METHOD) -> tuple[dict, list[dict]]:
    """What the student and the target are told about a batch."""
    student, target = Told(), Told()
    method.loss({"student": student, "target": target}, batch, Progress(0, 1))
    return student.calls[0], target.calls


def test_one_row_in_so_many_learns_larger_steps_each_size_equally_often():
    level = told(rows(0, 48))[0]["level"]
    assert [int((level == k).sum()) for k in range(FLOW + 1)] == [4, 4, 4, 36]


@pytest.mark.parametrize("count", [1, 3, 5, 16])
@pytest.mark.parametrize("first", [0, 2, 3])
def test_what_a_row_learns_does_not_depend_on_how_a_batch_is_cut(first, count):
    net = Told(lambda x, t, level: torch.sin(x + t[:, None] + level[:, None]))
    whole = METHOD.error(net, net, rows(0, 24))
    part = METHOD.error(net, net, rows(first, count))
    assert torch.equal(part, whole[first : first + count])


def test_times_are_multiples_of_the_step_and_each_is_as_likely():
    student = told(rows(0, 24_000))[0]
    for level in range(FLOW + 1):
        t, count = student["t"][student["level"] == level], 2**level
        found = torch.stack([(t == (k + 1) / count).sum() for k in range(count)])
        assert found.sum() == len(t)
        chi_square = (found - len(t) / count).square().sum() / (len(t) / count)
        assert chi_square < 30  # of 7 degrees of freedom at most: once in 10,000


def test_the_two_half_steps_meet_in_the_middle_and_cost_few_rows():
    """A larger step of 16 rows in 4, told half its size, at its start and at its middle."""
    student, (first, second) = told(rows(0, 16))
    larger = student["level"] < FLOW
    start, size = student["t"][larger], 2.0 ** -student["level"][larger]
    for call, t in ((first, start), (second, start - size / 2)):
        assert call["level"].equal(student["level"][larger] + 1)
        assert call["t"].equal(t)
    assert first["x"].equal(student["x"][larger])


def test_states_and_targets_are_cut():
    wild = Told(lambda x, t, level: 1e3 + 0 * x)
    x, t, level = torch.zeros(2, 2), torch.ones(2), torch.zeros(2)
    assert METHOD.halves(wild, x, t, level).eq(METHOD.clip).all()
    assert wild.calls[1]["x"].eq(-METHOD.clip).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_only_the_smallest_step_is_guided(guidance):
    """As a target and in samples; larger steps have learnt it."""
    method = Shortcut(steps=8, guidance=guidance, clip=100.0, time_scale=1.0)
    net = Told(lambda x, t, level, label: label[:, None] + 0 * x)
    x, t, level = torch.zeros(3, 2), torch.ones(3), torch.tensor([0, 1, 2])
    cond = {"label": torch.tensor([4, 4, 4])}
    guided = NO_CLASS + guidance * (4 - NO_CLASS)
    assert method.halves(net, x, t, level, **cond)[:, 0].tolist() == [4, 4, guided]
    for nfe, expected in ((1, 4), (4, 4), (8, guided)):
        assert method.sample(net, x, nfe=nfe, cond=cond).eq(-expected).all()


def test_labels_are_left_out_of_rows_of_the_smallest_step_only():
    label = torch.arange(400) % 10
    method = Shortcut(label_dropout=0.5, bootstrap_every=2)
    student, target = told(rows(0, 400, label=label), method)
    flow = student["level"] == method._level(method.steps)
    assert student["label"][~flow].equal(label[~flow])
    assert target[0]["label"].equal(label[~flow])
    left_out = student["label"][flow] == NO_CLASS
    assert 70 < left_out.sum() < 130
    assert student["label"][flow][~left_out].equal(label[flow][~left_out])


def test_a_guided_loss_is_one_graph():
    net = Formula(lambda x, t, level, label: (x + level[:, None]) * label[:, None])
    modules, batch = {"student": net, "target": net}, rows(0, 16, label=torch.arange(16) % 3)
    method, progress = Shortcut(guidance=3.0), Progress(0, 1)
    loss = torch.compile(method.loss, fullgraph=True, backend="eager")
    assert torch.equal(loss(modules, batch, progress), method.loss(modules, batch, progress))


def test_guidance_needs_labels():
    net = Formula(lambda x, t, level: x)
    with pytest.raises(ValueError, match="guidance needs a label for each of 2 samples"):
        Shortcut(guidance=2.0).sample(net, torch.zeros(2, 2), nfe=128)


def test_the_target_follows_the_student():
    modules = {name: nn.Linear(1, 1) for name in ("student", "target")}
    expected = modules["target"].weight.lerp(modules["student"].weight, 1 - METHOD.target_decay)
    METHOD.after_step(modules, Progress(0, 1))
    assert modules["target"].weight.equal(expected)


@pytest.mark.parametrize("steps", [3, 100])
def test_a_number_of_steps_that_is_no_power_of_two_is_refused(steps):
    with pytest.raises(ValueError, match=f"a power of two up to {steps}, not {steps}"):
        Shortcut(steps=steps)
    with pytest.raises(ValueError, match=f"a power of two up to 128, not {steps}"):
        Shortcut().times(steps)


def test_more_steps_than_were_learnt_are_refused():
    with pytest.raises(ValueError, match="up to 8, not 16"):
        METHOD.times(16)
