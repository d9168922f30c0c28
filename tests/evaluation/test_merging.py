"""The planner of merges against all orders there are, and against students that are trained."""

from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from ds import analytic
from ds.diffusion.grids import quadratic, uniform
from ds.diffusion.predictions import Preconditioned
from ds.diffusion.schedules import EDM, LinearBeta, Trig
from ds.diffusion.solvers import DDIM, integrate
from ds.evaluation import merging
from ds.evaluation.merging import Chain, best, merges, merges_table, order_text, strategies

GRID = uniform(4, Trig())


def chain(*variances, count=4, tau=1.0):
    return Chain.of(Trig(), uniform(count, Trig()), torch.tensor(variances), tau)


def orders(start, end):
    """Every order of the steps start to end, by enumeration: all cuts into parts, recursively."""
    if end - start == 1:
        yield start
    for n in range(1, end - start):
        for inner in combinations(range(start + 1, end), n):
            ends = (start, *inner, end)
            yield from products([list(orders(a, b)) for a, b in pairwise(ends)])


def products(parts):
    if not parts:
        yield ()
        return
    for head in parts[0]:
        for tail in products(parts[1:]):
            yield (head, *tail)


def students(chain, schedule, grid, variances, tau=1.0, rate=2e-3):
    """Return a function that trains numbers, one for each time and mode, merge by merge.

    They are trained by gradient descent. Samples of x_t are plus and minus its deviation, so that
    their second moment is exact.
    """

    @cache
    def train(order):
        if isinstance(order, int):
            return torch.from_numpy(chain.steps[order])
        first, *rest = map(train, order)
        alpha, sigma = schedule.at(grid[merging._start(order)])
        x = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None]
        x = x * (alpha**2 * variances + sigma**2).sqrt()
        number, target = first.clone(), first * torch.stack(rest).prod(0) * x
        for _ in range(round(tau / rate)):
            number.requires_grad_()
            (slope,) = torch.autograd.grad((number * x - target).square().mean(0).sum(), number)
            number = number.detach() - rate * slope
        return number

    return lambda order: train(order).numpy()


def test_there_are_as_many_orders_as_the_little_schroeder_numbers():
    assert [len(list(orders(0, n))) for n in (1, 2, 3, 4, 5)] == [1, 1, 3, 11, 45]


@pytest.mark.parametrize("goal", ["teacher", "ode"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "variances", [(0.05,), (0.5,), (1.0,), (4.0,), (0.1, 3.0), (0.02, 0.5, 2.0, 7.0)]
)
def test_the_program_finds_the_best_of_all_orders(goal, count, variances):
    steps = chain(*variances, count=count)
    order, sure = best(steps, goal)
    every = [float(steps.error(steps.merged(one), goal)) for one in orders(0, count)]
    assert sure
    assert abs(float(steps.error(steps.merged(order), goal)) - min(every)) < 1e-12
    assert max(every) > min(every) + 1e-4 or count == 2


@pytest.mark.parametrize("goal", ["teacher", "ode"])
def test_a_bounded_search_says_so_and_beats_every_named_order(goal, monkeypatch):
    steps = chain(0.02, 0.5, 3.0, count=7)
    full, _ = best(steps, goal)
    monkeypatch.setattr(merging, "MOST", 6)
    order, bounded = best(steps, goal)
    least, found = (float(steps.error(steps.merged(one), goal)) for one in (full, order))
    named = [float(steps.error(steps.merged(one), goal)) for one in strategies(7).values()]
    assert not bounded and least <= found <= min(named)
    assert found < least + 0.2 * (min(named) - least) + 1e-3


def test_the_winner_flips_across_variance_1():
    def named(variance, goal):
        steps = chain(variance)
        errors = {n: steps.error(steps.merged(o), goal) for n, o in strategies(4).items()}
        return min(errors, key=errors.get)

    assert [named(v, "teacher") for v in (0.05, 0.5, 1.0, 2.0, 4.0)] == (
        ["from the noise"] * 3 + ["all at once"] * 2
    )
    assert [named(v, "ode") for v in (0.25, 0.5, 1.0, 4.0)] == (
        ["from the data"] * 3 + ["all at once"]
    )
    assert best(chain(0.5), "teacher")[0] == strategies(4)["from the noise"]
    assert best(chain(4.0), "teacher")[0] == strategies(4)["all at once"]


def test_training_students_ranks_the_orders_as_the_planner_does():
    """Numbers trained by gradient descent, for every order of four steps and three variances."""
    variances = torch.tensor([4.0, 0.5, 0.05], dtype=torch.float64)
    steps = chain(*variances.tolist())
    train, every = students(steps, Trig(), GRID, variances), list(orders(0, 4))
    measured = np.array([train(order) for order in every])
    predicted = np.array([steps.merged(order) for order in every])
    assert np.abs(measured - predicted).max() < 1e-3
    wanted = steps.steps.prod(0)
    measured, predicted = np.abs(measured - wanted), np.abs(predicted - wanted)
    assert [every[i] for i in measured.argmin(0)] == [every[i] for i in predicted.argmin(0)]
    assert len({every[i] for i in measured.argmin(0)}) == 2  # all at once, and from the noise
    for mode in range(3):
        assert (
            best(chain(float(variances[mode])), "teacher")[0] == every[measured[:, mode].argmin()]
        )
        apart = predicted[:, None, mode] < predicted[None, :, mode] - 2e-3
        assert apart.sum() > 20
        assert (measured[:, None, mode] < measured[None, :, mode])[apart].all()


def test_more_training_leaves_less_of_the_error():
    errors = [
        float(steps.error(steps.merged((0, 1, 2, 3)), "teacher"))
        for steps in (chain(0.5, tau=tau) for tau in (0.1, 1.0, 10.0))
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-8


@pytest.mark.parametrize(("schedule", "grid"), [(Trig(), GRID), (LinearBeta(), quadratic(9))])
def test_the_steps_of_a_chain_are_those_of_the_sampler(schedule, grid):
    data = analytic.Gaussian(mean=0.0, std=0.4, shape=(1,))
    z = torch.ones(1, 1, dtype=torch.float64)
    steps = Chain.of(schedule, grid, torch.tensor([0.16], dtype=torch.float64))
    end = integrate(data.teacher(DDIM(), grid, schedule).denoiser, DDIM(), grid, z)
    assert steps.steps.prod() == pytest.approx(float(end), rel=1e-10)
    exact = data.endpoint(z, *schedule.at(grid[0]))
    assert steps.exact.prod() == pytest.approx(float(exact), rel=1e-6)


def test_what_the_network_is_fed_decides_how_far_training_gets():
    grid = uniform(4, EDM())
    plain = Chain.of(EDM(), grid, torch.tensor([0.25]))
    scaled = Chain.of(EDM(), grid, torch.tensor([0.25]), 1.0, Preconditioned(0.5))
    assert (plain.shares > 1 - 1e-9).all()  # x of deviation 80
    np.testing.assert_allclose(scaled.shares, 1 - np.exp(-2.0), rtol=1e-6)  # of deviation 1


def test_named_orders_are_what_their_names_say():
    assert strategies(4) == {
        "all at once": (0, 1, 2, 3),
        "halving": ((0, 1), (2, 3)),
        "from the data": (0, (1, (2, 3))),
        "from the noise": (((0, 1), 2), 3),
    }
    assert strategies(5)["halving"] == (((0, 1), (2, 3)), 4)
    assert [stage for stage, _ in merges(((0, 1), (2, 3)))] == [1, 1, 2]


def test_an_order_is_told_as_stages_of_times():
    text = order_text(((0, 1), (2, 3)), (800, 500, 200, 0))
    assert text == (
        "stage 1: merge 800 > 500 > 200, 200 > 0 > data; stage 2: merge 800 > 200 > data"
    )
    long = order_text(strategies(9)["from the noise"], tuple(range(9, 0, -1)))
    assert long.endswith("and so on to stage 8, merge 9 > 1 > data")
    table = merges_table(chain(0.5), GRID, 1.0, 1).splitlines()
    assert table[-2:] == [
        "For the teacher: from the noise (as BOOT).",
        "For the ODE: from the data (as consistency models).",
    ]
    assert table[3].split()[-4:-2] == ["1", "1"] and "linear-Gaussian case" in table[0]


@pytest.mark.parametrize(
    ("grid", "variances", "tau", "words"),
    [
        ((1.0,), [1.0], 1.0, "2 to 128 steps, not 1"),
        (uniform(129, Trig()), [1.0], 1.0, "2 to 128 steps, not 129"),
        (GRID, [0.0], 1.0, "variances must be positive"),
        (GRID, [1.0], 0.0, "tau must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(grid, variances, tau, words):
    with pytest.raises(ValueError, match=words):
        Chain.of(Trig(), grid, torch.tensor(variances), tau)
