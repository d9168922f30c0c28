"""Schedules: tables against numpy and diffusers, paths against their formulas, and their times."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds.diffusion.schedules import (
    EDM,
    VP,
    Cosine,
    Linear,
    LinearBeta,
    ScaledLinear,
    Sigmoid,
    Table,
    Trig,
    zero_terminal_snr,
)

TABLES = [
    LinearBeta(),
    LinearBeta(50),
    ScaledLinear(),
    Cosine(),
    Sigmoid(),
    Table((0.1, 0.5, 1.0)),
]
PATHS = [EDM(), VP(), Linear(), Trig(), Trig(0.5)]
every_schedule = pytest.mark.parametrize("schedule", [*TABLES, *PATHS], ids=repr)


def times(schedule, n=7):
    """Real times between data and noise, few of them indices."""
    return [schedule.data + (schedule.noise - schedule.data) * i / n for i in range(1, n)]


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


@pytest.mark.parametrize(
    ("schedule", "peer"),
    [
        (ScaledLinear(), {"beta_schedule": "scaled_linear"}),
        (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (Sigmoid(1000, 0.00085, 0.012), {"beta_schedule": "sigmoid"}),
        (
            zero_terminal_snr(ScaledLinear()),
            {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        ),
    ],
    ids=lambda v: f"{v!s:.20}",
)
def test_a_table_is_that_of_diffusers(schedule, peer):
    edges = {"beta_start": 0.00085, "beta_end": 0.012}
    theirs = pytest.importorskip("diffusers").DDPMScheduler(**edges, **peer).alphas_cumprod
    # theirs is a product of 1,000 numbers of float32
    np.testing.assert_allclose(schedule.alphas_bar().numpy(), theirs, rtol=2e-4, atol=1e-9)


def test_a_table_of_the_same_betas_is_the_same_schedule():
    table = Table(tuple(LinearBeta(30).betas().tolist()))
    assert [table.at(t) for t in range(-1, 30)] == [LinearBeta(30).at(t) for t in range(-1, 30)]


def test_a_schedule_without_signal_at_last_keeps_its_first_step():
    for schedule in TABLES[:-1]:
        rescaled = zero_terminal_snr(schedule)
        assert rescaled.at(0)[0] == pytest.approx(schedule.at(0)[0], rel=1e-12)
        assert rescaled.at(rescaled.noise) == (0.0, 1.0)
    with pytest.raises(ValueError, match="zero_terminal_snr: needs 2 steps or more"):
        zero_terminal_snr(LinearBeta(1))


def test_a_last_beta_of_1_leaves_no_signal():
    schedule = Table((0.1, 0.5, 1.0))
    assert schedule.at(2) == (0.0, 1.0) and schedule.lam(2) == -math.inf


@pytest.mark.parametrize("schedule", [*TABLES, Trig()], ids=repr)
def test_the_variance_is_preserved(schedule):
    for t in times(schedule):
        alpha, sigma = schedule.at(t)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=4e-16)


@every_schedule
def test_data_has_all_signal_and_no_noise(schedule):
    assert schedule.at(schedule.data) == (1.0, 0.0) and schedule.lam(schedule.data) == math.inf


@pytest.mark.parametrize("schedule", [Linear(), Trig(0.5)], ids=repr)
def test_the_end_of_a_flow_is_noise_alone(schedule):
    assert schedule.at(schedule.noise) == (0.0, getattr(schedule, "sigma_data", 1.0))
    assert schedule.lam(schedule.noise) == -math.inf


@every_schedule
def test_time_inverts_lam_which_falls(schedule):
    lams = [schedule.lam(t) for t in times(schedule)]
    assert lams == sorted(lams, reverse=True)
    for t, lam in zip(times(schedule), lams, strict=True):
        # log alpha-bar of a table is near 0 towards the data, where its rounding counts most
        assert schedule.time(lam) == pytest.approx(t, rel=1e-9)
    assert schedule.time(math.inf) == schedule.data


def test_a_table_is_linear_in_log_abar_between_its_indices():
    schedule = LinearBeta()
    logs = [2 * math.log(schedule.at(t)[0]) for t in (400, 400.25, 401)]
    assert logs[1] == pytest.approx(0.75 * logs[0] + 0.25 * logs[2], rel=1e-13)
    assert schedule.at(400.0) == schedule.at(400) == schedule.at(np.float32(400))


@every_schedule
def test_gather_has_the_values_of_at(schedule):
    t = torch.tensor([*times(schedule), schedule.noise], dtype=torch.float64)
    alpha, sigma = schedule.gather(t, torch.zeros(len(t), 1, dtype=torch.float64))
    expected = torch.tensor([schedule.at(u) for u in t.tolist()], dtype=torch.float64)
    # The end of an arc is the cosine of a rounded pi / 2; the rest differs in how it is rounded.
    torch.testing.assert_close(torch.cat([alpha, sigma], 1), expected, rtol=1e-12, atol=1e-15)


@every_schedule
def test_gather_is_differentiable_in_time(schedule):
    t = torch.tensor(times(schedule), dtype=torch.float64)
    like, h = torch.zeros(len(t), dtype=torch.float64), 1e-6 * schedule.noise

    def levels(t):
        return torch.cat(schedule.gather(t, like))

    _, found = torch.func.jvp(levels, (t,), (torch.ones_like(t),))
    central = (levels(t + h) - levels(t - h)) / (2 * h)
    torch.testing.assert_close(found, central, rtol=1e-6, atol=1e-8)


def test_gather_agrees_with_at_to_the_bit_at_indices():
    schedule, t = LinearBeta(), torch.tensor([0, 999, 3, LinearBeta.data])
    alpha, sigma = schedule.gather(t, torch.zeros(4, dtype=torch.float64))
    assert list(zip(alpha.tolist(), sigma.tolist(), strict=True)) == [
        schedule.at(u) for u in t.tolist()
    ]


def test_gather_rounds_once_to_the_dtype_of_what_it_multiplies():
    schedule = LinearBeta()
    alpha, _ = schedule.gather(torch.arange(1000), torch.zeros(1000))
    assert torch.equal(alpha, schedule.alphas_bar().sqrt().float())


def test_gather_gives_each_sample_its_own_factor():
    schedule, x = LinearBeta(), torch.ones(2, 3, 4, 5, dtype=torch.float64)
    alpha, _ = schedule.gather(torch.tensor([10, 990]), x)
    for row, t in zip(alpha * x, (10, 990), strict=True):
        assert torch.equal(row, torch.full((3, 4, 5), schedule.at(t)[0], dtype=torch.float64))


def test_gather_refuses_an_index_beyond_the_last():
    with pytest.raises(IndexError):
        LinearBeta().gather(torch.tensor([1000]), torch.zeros(1))


@pytest.mark.parametrize(("schedule", "std"), [(EDM(), 80), (Linear(), 1), (Trig(0.5), 0.5)])
def test_a_sample_starts_from_noise_of_the_deviation_of_the_end(schedule, std):
    z = torch.tensor([1.0, -2.0])
    assert torch.equal(schedule.prior(z), std * z)
    assert torch.equal(schedule.prior(z, 0.25), schedule.at(0.25)[1] * z)


def test_a_table_takes_noise_as_it_is():
    z = torch.ones(1)
    assert LinearBeta().prior(z) is z


@pytest.mark.parametrize(
    ("schedule", "t", "words"),
    [
        (LinearBeta(), -2, "t = -2 .* the indices 0 to 999"),
        (LinearBeta(), 1000, "t = 1000 .* the indices 0 to 999"),
        (LinearBeta(), 999.5, "t = 999.5 .* the indices 0 to 999"),
        (Linear(), 1.5, "t = 1.5 .* the times 0 to 1"),
        (EDM(), -1, "t = -1 .* the times 0 to 80"),
        (EDM(), math.nan, "t = nan .* does not exist|t = nan does not exist"),
        (Trig(), "0", "t = '0' does not exist"),
        (Trig(), None, "t = None does not exist"),
    ],
)
@pytest.mark.parametrize("method", ["at", "check", "lam"])
def test_a_time_the_schedule_lacks_is_named(method, schedule, t, words):
    with pytest.raises(ValueError, match=words):
        getattr(schedule, method)(t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearBeta(0), "num_steps must be at least 1, not 0"),
        (lambda: LinearBeta(10, 0.0, 0.02), "beta_start must be above 0, not 0.0"),
        (lambda: LinearBeta(10, 0.02, 0.01), "beta_start <= beta_end"),
        (lambda: ScaledLinear(10, 0.01, 1.0), "ScaledLinear: .* beta_end < 1"),
        (lambda: LinearBeta(10, math.nan, 0.02), "not nan"),
        (lambda: Cosine(10, 0.0), "Cosine: offset must be above 0"),
        (lambda: Table(()), "Table: values must be at least 1"),
        (lambda: Table((0.1, 0.0)), "values.* must be above 0"),
        (lambda: Table((1.0, 0.1)), "only the last"),
        (lambda: EDM(-1.0), "EDM: sigma_max must be above 0"),
        (lambda: Trig(0.0), "Trig: sigma_data must be above 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@every_schedule
def test_schedules_are_values(schedule):
    assert hash(schedule) == hash(dataclasses.replace(schedule)) and len({schedule, schedule}) == 1


@pytest.mark.parametrize("t", [torch.tensor([0, 3]), torch.tensor([0.5, 3.5])])
def test_a_compiled_loss_is_one_graph_that_holds_the_table(t):
    schedule, called = LinearBeta(7), []

    def backend(module, _):
        called.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def loss(t):
        alpha, sigma = schedule.gather(t, torch.zeros(2))
        return alpha + sigma

    assert torch.equal(torch.compile(loss, fullgraph=True, backend=backend)(t), loss(t))
    assert called and torch.cumprod not in called


@every_schedule
def test_times_of_noise_levels_are_the_inverse_of_the_levels(schedule):
    first = max(schedule.data, 0)
    t = torch.linspace(first, schedule.noise, 8, dtype=torch.float64)
    alpha, sigma = schedule.gather(t, t)
    torch.testing.assert_close(schedule.times_of(sigma / alpha), t, rtol=1e-10, atol=1e-10)


@every_schedule
def test_beyond_its_levels_a_schedule_has_its_last_time(schedule):
    ratio = torch.tensor([0.0, math.inf], dtype=torch.float64)
    expected = [max(schedule.data, 0), schedule.noise]
    assert schedule.times_of(ratio).tolist() == pytest.approx(expected, rel=1e-12)
