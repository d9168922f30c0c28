"""MeanFlow: the times of its rows, its weights, guidance, and the networks it takes."""

import math

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
from ds.training.parallel import Loss


def times_of(method: MeanFlow) -> tuple[torch.Tensor, torch.Tensor]:
    """Times and steps of many rows."""
    index = torch.arange(20_000)
    zeros = torch.zeros(len(index), 1)
    return method.rows(torch.nn.Identity(), Batch(zeros, zeros, index, Draws(0, index)))[2:4]


@pytest.mark.parametrize("equal", [0.0, 0.25, 0.75])
def test_a_share_of_rows_learns_the_velocity_itself(equal):
    t, h = times_of(MeanFlow(equal=equal))
    assert (h == 0).double().mean().item() == pytest.approx(equal, abs=0.01)
    assert (h >= 0).all() and (t - h >= 0).all() and (t <= 1).all()


def test_both_times_have_the_distribution_that_the_fields_say():
    t, h = times_of(MeanFlow(equal=0.0, time_mean=-0.4, time_std=1.0))
    logits = torch.cat([t, t - h]).logit()
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logits.std().item() == pytest.approx(1.0, abs=0.02)
    # The larger of two standard normal numbers has the mean 1 / sqrt(pi).
    assert t.logit().mean().item() == pytest.approx(-0.4 + math.pi**-0.5, abs=0.02)


def test_an_end_with_times_of_its_own_is_cut_so_more_rows_learn_the_velocity():
    """The published pair: t from (-0.6, 1.6), r from (-4, 1.6), so r is later in 7% of the rows."""
    t, h = times_of(MeanFlow(time_mean=-0.6, time_std=1.6, end_times=(-4.0, 1.6)))
    later = 0.5 * math.erfc((4 - 0.6) / (1.6 * 2))
    share = (h == 0).double().mean().item()
    assert share == pytest.approx(0.25 + 0.75 * later, abs=0.01)
    assert share > 0.28
    assert t.logit().mean().item() == pytest.approx(-0.6, abs=0.03)
    assert t.logit().std().item() == pytest.approx(1.6, abs=0.03)
    even = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    one, other = (mean + 1.6 * even for mean in (-0.6, -4.0))
    weight = torch.exp(-(even[:, None] ** 2 + even**2) / 2)
    apart = (one.sigmoid()[:, None] - other.sigmoid()).clamp(min=0)
    mean = 0.75 * (weight * apart).sum() / weight.sum()
    assert h.double().mean().item() == pytest.approx(mean.item(), abs=0.005)


@pytest.mark.parametrize(("numbers", "power"), [(2, 0.0), (64, 0.0), (256, 0.75), (3072, 0.75)])
def test_the_power_of_the_weight_is_by_default_that_of_the_dimension(numbers, power):
    error = torch.full((4, numbers), 3.0)
    assert MeanFlow().weighted(error) == MeanFlow(power=power).weighted(error)
    assert MeanFlow().weighted(error) != MeanFlow(power=0.5).weighted(error)


def labelled(label: torch.Tensor) -> Batch:
    index = torch.arange(len(label))
    x0 = ds.noise(1, index, (3,))
    return Batch(x0, ds.noise(2, index, (3,)), index, Draws(0, index), {"label": label})


def test_guidance_learns_the_velocity_of_equation_21_and_of_no_class_where_labels_are_left_out():
    """A network whose velocity is its label, which is -1 for no class."""
    net = Formula(lambda x, t, h, label: label[:, None] + 100 * h[:, None] + 0 * x)
    rows = labelled(torch.arange(20_000) % 10)
    _, v, _, _, cond = MeanFlow(guidance=3.0, kappa=0.2, label_dropout=0.3).rows(net, rows)
    data, label, left_out = rows.noise - rows.x0, rows.cond["label"], cond["label"] == -1
    wanted = 2.4 * data + 0.2 * label[:, None] - (1 - 2.4 - 0.2)
    torch.testing.assert_close(v, torch.where(left_out[:, None], data, wanted))
    assert torch.equal(cond["label"][~left_out], label[~left_out])
    assert left_out.double().mean().item() == pytest.approx(0.3, abs=0.01)


def test_without_guidance_the_loss_is_the_plain_one_to_the_bit():
    assert not MeanFlow(label_dropout=0.9).guided
    now, free, v = (ds.noise(i, range(4), (3,)) for i in range(3))
    assert torch.equal(MeanFlow().toward(v, now, free), v)
    net = MLPConfig(dim=3, classes=10, conditions=("h",)).build()
    rows = labelled(torch.arange(64) % 10)
    plain, off, on = (
        MeanFlow(**fields).loss({"student": net}, rows, Progress(0, 1))
        for fields in ({}, {"label_dropout": 0.9}, {"guidance": 2.0})
    )
    assert torch.equal(off, plain) and not torch.equal(on, plain)


def test_a_guided_loss_is_one_graph():
    net = MLPConfig(dim=3, width=8, depth=1, classes=10, conditions=("h",)).build()
    loss = Loss(MeanFlow(guidance=2.0, kappa=0.1), torch.nn.ModuleDict({"student": net}))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    given = labelled(torch.arange(32) % 10), Progress(0, 1)
    assert torch.equal(compiled(*given), loss(*given))


def test_guidance_needs_classes():
    net = MLPConfig(conditions=("h",)).build()
    with pytest.raises(ValueError, match=r"guidance 2.0 and kappa 0.0 need a network with classes"):
        MeanFlow(guidance=2.0).init(teacher(net))


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
