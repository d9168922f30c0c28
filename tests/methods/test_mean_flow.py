"""MeanFlow: the times of its rows, its weights, and the networks it takes."""

import pytest
import torch

import ds
from ds.diffusion.noise import Draws
from ds.methods import MeanFlow, Progress
from ds.methods.base import student_net
from ds.methods.proof import Formula
from ds.models.teacher import Teacher
from ds.nets import MLPConfig, UNetConfig
from ds.pairs.sources import Batch

DRAWS = Draws(0, torch.arange(20_000))


@pytest.mark.parametrize("equal", [0.0, 0.25, 0.75])
def test_a_share_of_rows_learns_the_velocity_itself(equal):
    t, h = MeanFlow(equal=equal)._times(DRAWS)
    assert (h == 0).double().mean().item() == pytest.approx(equal, abs=0.01)
    assert (h >= 0).all() and (t - h >= 0).all() and (t <= 1).all()


def test_both_times_have_the_distribution_that_the_fields_say():
    t, h = MeanFlow(equal=0.0, time_mean=-0.4, time_std=1.0)._times(DRAWS)
    logits = torch.cat([t, t - h]).logit()
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logits.std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("power", "expected"), [(0.0, 48.0), (0.5, 48.0**0.5), (1.0, 1.0)])
def test_a_row_is_divided_by_a_power_of_its_squared_error(power, expected):
    """A constant error of 4 in each of 3 elements, whatever the time."""
    zeros, index = torch.zeros(8, 3), torch.arange(8)
    rows = Batch(zeros, zeros, index, Draws(0, index))
    method = MeanFlow(power=power, offset=1e-9)
    loss = method.loss({"student": Formula(lambda x, t, h: 0 * x + 4)}, rows, Progress(0, 1))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def teacher(net):
    denoiser = ds.Denoiser(net, ds.schedule.LinearBeta())
    return Teacher(denoiser, ds.solvers.DDIM(), (800,))


def test_a_network_without_h_is_built_to_take_it_and_keeps_its_weights():
    small = UNetConfig(
        image_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
    )
    own = small.build()
    net = MeanFlow().init(teacher(own))["student"]
    assert net.config.conditions == ("h",)
    x, t = ds.noise(0, range(2), (1, 8, 8)), torch.tensor([0.1, 0.9])
    torch.testing.assert_close(net(x, t, h=t), own(x, t))
    again = student_net(teacher(net), None, "h")
    assert again is not net and again.config == net.config


def test_the_student_may_be_another_network_with_weights_of_its_own():
    exact = ds.analytic.GaussianMixture().teacher(ds.solvers.DDIM(), (800,))
    one, again = (MeanFlow(student=MLPConfig(conditions=("h",))).init(exact) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    with pytest.raises(
        ValueError, match=r"takes h, which the teacher's network \(ExactNet\) does not"
    ):
        MeanFlow().init(exact)
