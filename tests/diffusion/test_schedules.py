"""LinearBeta against numpy, and the rules for indices."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds.diffusion.schedules import LinearBeta


@settings(max_examples=25, deadline=None)
@given(
    num_steps=st.integers(1, 2000),
    betas=st.tuples(st.floats(1e-6, 0.05), st.floats(1e-6, 0.05)).map(sorted),
)
def test_alphas_bar_are_the_running_product_of_one_minus_beta(num_steps, betas):
    schedule = LinearBeta(num_steps, *betas)
    expected = np.cumprod(1 - np.linspace(*betas, num_steps, dtype=np.float64))
    # 2,000 factors, each rounded to 1.1e-16, in an order of summation of their own
    np.testing.assert_allclose(schedule.alphas_bar().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("t", "alpha"), [(800, 0.0388), (980, 0.0077), (999, 1 / 157)])
def test_the_paper_s_schedule_has_the_known_signal_at_its_starting_times(t, alpha):
    assert LinearBeta().at(t)[0] == pytest.approx(alpha, rel=0.01)  # figures of three digits


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_variance_is_preserved(t):
    alpha, sigma = LinearBeta().at(t)
    assert alpha**2 + sigma**2 == pytest.approx(1, abs=4e-16)


def test_data_has_all_signal_and_no_noise():
    assert LinearBeta().at(LinearBeta.data) == (1.0, 0.0)


def test_gather_agrees_with_at_to_the_bit_in_float64():
    schedule, t = LinearBeta(), torch.tensor([0, 999, 3, LinearBeta.data])
    alpha, sigma = schedule.gather(t, torch.zeros(4, dtype=torch.float64))
    assert list(zip(alpha.tolist(), sigma.tolist(), strict=True)) == list(
        map(schedule.at, t.tolist())
    )


def test_gather_rounds_once_to_the_dtype_of_what_it_multiplies():
    schedule = LinearBeta()
    alpha, _ = schedule.gather(torch.arange(1000), torch.zeros(1000))
    assert torch.equal(alpha, schedule.alphas_bar().sqrt().float())


def test_gather_gives_each_sample_its_own_factor():
    schedule, x = LinearBeta(), torch.ones(2, 3, 4, 5, dtype=torch.float64)
    alpha, _ = schedule.gather(torch.tensor([10, 990]), x)
    for row, t in zip(alpha * x, (10, 990), strict=True):
        assert torch.equal(row, torch.full((3, 4, 5), schedule.at(t)[0], dtype=torch.float64))


@pytest.mark.parametrize("t", [-2, 1000])
@pytest.mark.parametrize("method", ["at", "check"])
def test_a_time_the_schedule_lacks_is_named(method, t):
    with pytest.raises(ValueError, match=rf"t = {t} does not exist.* 0 to 999"):
        getattr(LinearBeta(), method)(t)


def test_gather_refuses_a_time_beyond_the_last():
    with pytest.raises(IndexError):
        LinearBeta().gather(torch.tensor([1000]), torch.zeros(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "num_steps must be at least 1, not 0"),
        ((10, 0.0, 0.02), "beta_start must be above 0, not 0.0"),
        ((10, 0.02, 0.01), "beta_start <= beta_end"),
        ((10, 0.01, 1.0), "beta_end < 1"),
        ((10, math.nan, 0.02), "not nan"),
    ],
)
def test_impossible_betas_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearBeta(*arguments)


def test_schedules_are_values():
    assert LinearBeta() == LinearBeta(1000, 1e-4, 0.02) and len({LinearBeta(), LinearBeta()}) == 1
