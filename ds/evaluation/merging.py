"""In which order to merge a teacher's steps into one: a planner for staged distillation.

Of Gaussian data, a DDIM step multiplies each mode of variance L by a number: with
v_t = (alpha_t sqrt(L), sigma_t), it is <v_s, v_t> / |v_t|^2 from t to s. A student of numbers, one
for each time and mode, is trained to do in one step what several steps do one after another. If it
starts as the first of them, and is trained by gradient flow for a time tau, it ends at

    M = w (product of the parts) + (1 - w) (first part),    w = 1 - exp(-2 tau |v_t|^2)

because training is finite. So the error of a one-step student depends on the order of the merges.
This is our derivation, for the linear-Gaussian case alone, of what Gao & Li 2025,
arXiv:2505.16024, study; it is not their code. Real networks share weights between times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ds.diffusion.denoiser import time_of_each
from ds.diffusion.grids import Grid
from ds.diffusion.predictions import AbstractPrediction, Eps
from ds.diffusion.schedules import AbstractSchedule
from ds.evaluation.spectrum import groups
from ds.system.config import Positive, require

# A step, by its number from the noise, or a merge of orders that follow each other.
Order = int | tuple["Order", ...]
Goal = Literal["teacher", "ode"]
GROUPS = 8  # of modes, in a plan
# The most operators that are kept for an interval: no cut happens up to 6 steps.
MOST, LEAST = 512, 4
MOST_STEPS = 128
_GOALS: dict[Goal, str] = {"teacher": "the teacher", "ode": "the ODE"}
_NAMED = {
    "all at once": "all at once (Denoising Student)",
    "halving": "halving (progressive distillation)",
    "from the data": "from the data (as consistency models)",
    "from the noise": "from the noise (as BOOT)",
}


@dataclass(frozen=True, eq=False)
class Chain:
    """A teacher's T steps on M modes, and how far each time's training goes; float64 [T, M]."""

    steps: np.ndarray  # what DDIM multiplies a mode by
    exact: np.ndarray  # what the ODE does
    shares: np.ndarray  # w, how far a merge that starts at this time gets
    weights: np.ndarray  # [M], of the squared errors: they add up to a mean over the samples

    @classmethod
    def of(
        cls,
        schedule: AbstractSchedule,
        grid: Grid,
        variances: torch.Tensor,
        tau: float = 1.0,
        prediction: AbstractPrediction | None = None,
    ) -> "Chain":
        """Return the chain of DDIM on a grid for Gaussian modes of these variances [M].

        The second moment |v_t|^2 in w is that of what the prediction feeds its network. Raises
        ValueError for a grid of fewer than 2 steps or more than `MOST_STEPS`, and for variances
        that are not positive.
        """
        require("merges", Positive, tau=tau)
        if not 2 <= len(grid) <= MOST_STEPS:
            raise ValueError(
                f"merges: plans 2 to {MOST_STEPS} steps, not {len(grid)}; --solve.steps sets them"
            )
        if not bool((variances > 0).all()):
            raise ValueError("merges: variances must be positive")
        values, sizes = groups(variances.double().cpu(), GROUPS)
        spread, sizes = values.sqrt().numpy(), sizes.numpy()
        levels = [schedule.at(t) for t in (*grid, schedule.data)]
        v = np.array([[a * spread, np.full_like(spread, s)] for a, s in levels])  # [T + 1, 2, M]
        moments = (v**2).sum(1)
        fed = np.array([_fed(prediction or Eps(), schedule, t) for t in grid])[:, None]
        return cls(
            steps=(v[1:] * v[:-1]).sum(1) / moments[:-1],
            exact=np.sqrt(moments[1:] / moments[:-1]),
            shares=-np.expm1(-2 * tau * fed**2 * moments[:-1]),
            weights=sizes / sizes.sum() * moments[0],
        )

    def merged(self, order: Order) -> np.ndarray:
        """Return what a student that was trained in this order multiplies each mode by, [M]."""
        if isinstance(order, int):
            return self.steps[order]
        first, *rest = map(self.merged, order)
        return self._learned(_start(order), first, np.prod(rest, 0))

    def error(self, found: np.ndarray, goal: Goal, start: int = 0, end: int | None = None):
        """Return the root mean square error of operators [..., M] over steps start to end."""
        off = found - self._wanted(goal, start, end)
        return np.sqrt((self.weights * off**2).sum(-1))

    def _learned(self, start: int, first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        w = self.shares[start]
        return first * (w * rest + 1 - w)

    def _wanted(self, goal: Goal, start: int = 0, end: int | None = None) -> np.ndarray:
        return (self.steps if goal == "teacher" else self.exact)[start:end].prod(0)


def _fed(prediction: AbstractPrediction, schedule: AbstractSchedule, t: float) -> float:
    """Return what a prediction multiplies x_t by before its network sees it."""
    one = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    return float(prediction.inputs(one, time_of_each(one, t), *schedule.at(t))[0])


def _start(order: Order) -> int:
    return order if isinstance(order, int) else _start(order[0])


def strategies(count: int) -> dict[str, Order]:
    """Return the orders that have names, for `count` steps, 2 or more.

    They are those of Luhman & Luhman 2021 (all at once), of Salimans & Ho 2022 (halving), and two
    that grow by a step at a time: from the data, as consistency, and from the noise, as BOOT.
    """
    halves: list[Order] = [*range(count)]
    while len(halves) > 1:
        halves = [_merge(halves[i : i + 2]) for i in range(0, len(halves), 2)]
    from_data: Order = count - 1
    for step in range(count - 2, -1, -1):
        from_data = (step, from_data)
    from_noise: Order = 0
    for step in range(1, count):
        from_noise = (from_noise, step)
    return {
        "all at once": tuple(range(count)),
        "halving": halves[0],
        "from the data": from_data,
        "from the noise": from_noise,
    }


def _merge(parts: Sequence[Order]) -> Order:
    return tuple(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True, eq=False)
class _Kept:
    """Operators [K, M] that orders make of an interval, and these orders as tuples of parts."""

    values: np.ndarray
    parts: list[tuple[Order, ...]]


def best(chain: Chain, goal: Goal) -> tuple[Order, bool]:
    """Return the order of merges that ends nearest to a goal, and whether it is surely the best.

    A dynamic program over intervals keeps every operator that an order can make of each. Where
    there are too many, it keeps those that are nearest to the interval's own goal and that no other
    is nearer than in every mode, a Pareto set of bounded size; then the order is a good one, at
    least as good as all of `strategies`, but perhaps not the best.
    """
    count = len(chain.steps)
    most = min(MOST, max(LEAST, 2**18 // count**3))
    one: dict[tuple[int, int], _Kept] = {}  # merged to one operator
    some: dict[tuple[int, int], _Kept] = {}  # a chain of operators, one after another
    sure = True
    for length in range(1, count + 1):
        for i in range(count - length + 1):
            j = i + length
            if length == 1:
                one[i, j] = some[i, j] = _Kept(chain.steps[i : i + 1], [(i,)])
                continue
            pairs = [(one[i, k], some[k, j]) for k in range(i + 1, j)]
            firsts = [np.repeat(a.values, len(b.values), 0) for a, b in pairs]
            rests = [np.tile(b.values, (len(a.values), 1)) for a, b in pairs]
            first, rest = np.concatenate(firsts), np.concatenate(rests)
            learned = chain._learned(i, first, rest)
            one[i, j], uncut = _cut(chain, goal, (i, j), learned, pairs, most)
            sure &= uncut
            if i:  # what starts at the noise is no rest of anything
                some[i, j], uncut = _cut(chain, goal, (i, j), first * rest, pairs, most, one[i, j])
                sure &= uncut
    ends = [*(_merge(parts) for parts in one[0, count].parts), *strategies(count).values()]
    return min(ends, key=lambda order: chain.error(chain.merged(order), goal)), sure


def _cut(
    chain: Chain,
    goal: Goal,
    ends: tuple[int, int],
    values: np.ndarray,
    pairs: list[tuple[_Kept, _Kept]],
    most: int,
    single: _Kept | None = None,
) -> tuple[_Kept, bool]:
    """Keep at most `most` operators of an interval; return them, and whether all were kept.

    `values` belong to all pairs of a first part and a rest, in order. With `single`, operators of
    one part are kept beside them.
    """
    extra = 0 if single is None else len(single.values)
    values = values if single is None else np.concatenate([single.values, values])
    _, kept = np.unique(values.round(14), axis=0, return_index=True)
    uncut = len(kept) <= most
    if not uncut:
        kept = kept[np.argsort(chain.error(values[kept], goal, *ends), kind="stable")][: 4 * most]
        off = np.abs(values[kept] - chain._wanted(goal, *ends))
        behind = [bool((off[:n] <= row).all(1).any()) for n, row in enumerate(off)]
        kept = kept[~np.array(behind)][:most]
    sizes = np.cumsum([0, *(len(a.values) * len(b.values) for a, b in pairs)])

    def parts(n: int) -> tuple[Order, ...]:
        if n < extra and single is not None:
            return (_merge(single.parts[n]),)
        k = int(np.searchsorted(sizes, n - extra, side="right")) - 1
        a, b = divmod(n - extra - int(sizes[k]), len(pairs[k][1].values))
        return (_merge(pairs[k][0].parts[a]), *pairs[k][1].parts[b])

    return _Kept(values[kept], [parts(int(n)) for n in kept]), uncut


def merges(order: Order) -> Iterator[tuple[int, tuple[Order, ...]]]:
    """Yield the merges of an order, parts first, each with its stage: 1 needs none before it."""
    if not isinstance(order, int):
        inner = [m for part in order for m in merges(part)]
        yield from inner
        yield 1 + max((stage for stage, _ in inner), default=0), order


def merges_table(chain: Chain, grid: Grid, tau: float, modes: int) -> str:
    """Return what named and best orders end with, as text; grid is that of the chain's steps."""
    count = len(chain.steps)
    found: dict[Goal, tuple[Order, bool]] = {goal: best(chain, goal) for goal in _GOALS}
    rows = {_NAMED[name]: order for name, order in strategies(count).items()}
    sure = all(exact for _, exact in found.values())
    words = "best" if sure else "best found"
    rows |= {f"{words} for {_GOALS[goal]}": order for goal, (order, _) in found.items()}
    lines = [
        f"Merging {count} steps into one, linear-Gaussian case, from our derivation (note 0035): "
        f"{modes} modes of the",
        f"spectrum; each merge is trained for tau = {tau:g}. Errors are root mean square, per "
        f"number of a sample.",
        f"{'order':38}{'merges':>7}{'stages':>7}{'to the teacher':>16}{'to the ODE':>12}",
    ]
    for name, order in rows.items():
        stages = [stage for stage, _ in merges(order)]
        end = chain.merged(order)
        lines.append(
            f"{name:38}{len(stages):7}{max(stages):7}"
            f"{chain.error(end, 'teacher'):16.3g}{chain.error(end, 'ode'):12.3g}"
        )
    for goal, (order, _) in found.items():
        same = [_NAMED[n] for n, o in strategies(count).items() if o == order]
        lines.append(f"For {_GOALS[goal]}: {same[0] if same else order_text(order, grid)}.")
    return "\n".join(lines)


def order_text(order: Order, grid: Grid, most: int = 6) -> str:
    """Return an order as its stages, each with the times that a merge goes through."""
    stages: dict[int, list[str]] = {}
    times = [*(f"{t:g}" for t in grid), "data"]
    for stage, parts in merges(order):
        stops = [times[_start(part)] for part in parts] + [times[_end(parts[-1])]]
        stages.setdefault(stage, []).append(" > ".join(stops))
    lines = [f"stage {stage}: merge {', '.join(ways)}" for stage, ways in sorted(stages.items())]
    if len(lines) > most:
        lines = [*lines[: most - 1], f"and so on to stage {len(lines)}, {lines[-1].split(': ')[1]}"]
    return "; ".join(lines)


def _end(order: Order) -> int:
    return order + 1 if isinstance(order, int) else _end(order[-1])
