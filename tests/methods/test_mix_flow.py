"""MixFlow: its sources, its predictor, and what is left of it when it samples."""

import pytest
import torch

import ds
from ds.diffusion.noise import Draws
from ds.methods import MixFlow, Progress, RectifiedFlow
from ds.methods.flow.mix_flow import _predictor
from ds.methods.proof import NOISE, Formula, normal_pairs
from ds.models.teacher import Teacher
from ds.nets import MLPConfig, UNetConfig
from ds.pairs.sources import Batch

FLAT = MixFlow(time_scale=1.0)
BATCH = normal_pairs()
VELOCITY = Formula(lambda x, told: torch.sin(x) * told[:, None])


def predicting(mean: float, log_var: float) -> Formula:
    return Formula(lambda x, t: torch.cat([0 * x + mean, 0 * x + log_var], 1))


def test_w_forced_to_0_reproduces_rectified_flow_to_the_bit():
    mixed, _ = FLAT.mixed(predicting(3.0, -1.0), BATCH, torch.zeros(len(NOISE)))
    assert torch.equal(mixed.noise, BATCH.noise)
    plain = RectifiedFlow(reflow=0, time_scale=1.0)
    ours, theirs = FLAT.flow.errors(VELOCITY, mixed), plain.errors(VELOCITY, BATCH)
    assert all(map(torch.equal, ours, theirs))


def test_a_predictor_of_noise_makes_the_loss_of_rectified_flow():
    modules = {"student": VELOCITY, "predictor": predicting(0.0, 0.0)}
    plain = RectifiedFlow(reflow=0, time_scale=1.0).loss(modules, BATCH, Progress(0, 1))
    torch.testing.assert_close(FLAT.loss(modules, BATCH, Progress(0, 1)), plain)


def test_sources_have_the_mean_and_the_variance_of_their_share():
    """Of many rows with m = 2 and var = 1/4, by w."""
    count = 40_000
    x0, index = torch.zeros(count, 1), torch.arange(count)
    rows = Batch(x0, ds.noise(0, index, (1,)), index, Draws(0, index))
    for w in (0.0, 0.3, 1.0):
        own = predicting(2.0, torch.tensor(0.25).log().item())
        source = FLAT.mixed(own, rows, torch.full((count,), w))[0].noise
        assert source.mean().item() == pytest.approx(2 * w, abs=0.02)
        assert source.var().item() == pytest.approx(0.25 * w + 1 - w, rel=0.03)


def test_the_divergence_is_weighted_and_a_mean_over_rows():
    modules = {"student": VELOCITY, "predictor": predicting(2.0, 0.0)}
    losses = [MixFlow(time_scale=1.0, kl_weight=k) for k in (0.0, 0.5)]
    without, with_it = (method.loss(modules, BATCH, Progress(0, 1)) for method in losses)
    assert (with_it - without).item() == pytest.approx(0.5 * 3 * 2.0**2 / 2)  # of three elements


def test_the_predictor_is_dropped_when_it_samples():
    made = FLAT.result(VELOCITY)
    assert isinstance(made, Teacher) and made.net is VELOCITY and made.nfe == 10
    again = RectifiedFlow(reflow=0, time_scale=1.0).sample(VELOCITY, NOISE, nfe=10)
    assert torch.equal(made.sample(NOISE), again)
    assert torch.equal(FLAT.sample(VELOCITY, NOISE), again)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((2,), MLPConfig(dim=2, out_dim=4)),
        ((3, 32, 32), (32, 64, 64, 64)),
        ((1, 8, 8), (32, 64)),
        ((1, 28, 28), (32, 64, 64)),
        ((3, 9, 9), (32,)),
    ],
)
def test_the_predictor_is_small_and_returns_a_mean_and_a_log_variance(shape, config):
    found = _predictor(shape)
    if isinstance(found, UNetConfig):
        assert found.widths == config
    else:
        assert found == config
    x = ds.noise(0, range(2), shape)
    out = found.build()(x, torch.zeros(2))
    assert out.shape == (2, 2 * shape[0], *shape[1:])


def test_a_predictor_without_a_variance_is_refused():
    with pytest.raises(ValueError, match="returns 3 channels of 3; it must return 6"):
        FLAT.mixed(Formula(lambda x, t: x), BATCH, torch.zeros(len(NOISE)))
