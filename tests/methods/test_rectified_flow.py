"""Rectified flow: its stages, its result, and the times of its rows."""

import pytest
import torch

import ds
from ds.diffusion.noise import Draws
from ds.methods import Progress, RectifiedFlow
from ds.methods.proof import NOISE, Formula
from ds.models.teacher import Teacher
from ds.pairs.sources import Batch


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (RectifiedFlow(reflow=0), [("images", 1)]),
        (RectifiedFlow(), [("images", 100), ("pairs", 1)]),
        (RectifiedFlow(reflow=2, steps=7, nfe=3), [("images", 7), ("pairs", 7), ("pairs", 3)]),
        (RectifiedFlow(feeds="pairs"), [("pairs", 100), ("pairs", 1)]),
    ],
)
def test_a_stage_feeds_on_what_the_last_one_makes(method, stages):
    found = method.stages()
    assert [(stage.feeds, stage.result(Formula(None)).nfe) for stage in found] == stages
    assert all(stage.stages() == (stage,) for stage in found)
    assert all(stage.student is None for stage in found[1:])


def test_the_result_is_a_teacher_whose_samples_are_those_of_the_method():
    net = Formula(lambda x, told: torch.sin(x) * told[:, None] / 999)
    method = RectifiedFlow(reflow=0, nfe=4)
    result = method.result(net)
    assert isinstance(result, Teacher)
    assert torch.equal(result.sample(NOISE), method.sample(net, NOISE, nfe=4))


def test_a_pair_has_another_time_at_every_draw():
    """Times that belonged to the pair would show each pair at one time for the whole run."""
    told = []
    net = Formula(lambda x, t: told.append(t) or 0 * x)
    x = torch.zeros(8, 3)
    for first in (0, 8):
        draws = Draws(0, torch.arange(first, first + 8))
        pairs = Batch(x, x, torch.arange(8), draws)
        RectifiedFlow().loss({"student": net}, pairs, Progress(0, 1))
    times = torch.cat(told)
    assert len(times.unique()) == 16
    assert times.min() >= 0 and times.max() <= 999


def test_the_paths_of_the_data_bend_and_straight_ones_do_not():
    z = ds.noise(0, range(64), (3,)).double()
    bend = {}
    for name, field in {
        "straight": lambda x, _: 0 * x + 2,
        "bent": lambda x, t: t[:, None] + 0 * x,
    }.items():
        (check,) = RectifiedFlow(feeds="pairs", time_scale=1.0).measure(Formula(field), z)
        bend[name] = check.value
    assert bend["straight"] < 1e-12
    assert bend["bent"] == pytest.approx(3 / 12, rel=1e-2)  # the variance of t, three times
