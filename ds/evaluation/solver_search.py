"""How many network calls are needed: the endpoints of solvers and grids against the exact ODE."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.schedules import AbstractSchedule, AbstractTable
from ds.diffusion.solvers import AbstractSolver, DPMSolverPP, evaluations, integrate
from ds.models.execution import Execution, Precision
from ds.models.model import device_of
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.training.presets import SolveConfig

CALLS = (8, 12, 16, 24, 36)


@dataclass(frozen=True)
class Row:
    """A way to integrate, its cost, and how far from the ODE's endpoint it ends."""

    solve: SolveConfig
    nfe: int
    error: float  # root mean square over noises and elements
    best: bool = False  # no other row is as close with as few calls


@dataclass(frozen=True)
class Frontier:
    """Rows in order of their calls, the row asked for, and the accuracy of the reference."""

    rows: tuple[Row, ...]
    asked: Row
    reference_nfe: int
    reference_error: float  # how far the reference moves with half of its times

    @property
    def answer(self) -> Row | None:
        """The cheapest row that is as close as the one asked for with fewer calls, if any."""
        enough = [r for r in self.rows if r.error <= self.asked.error and r.nfe < self.asked.nfe]
        return min(enough, key=lambda r: (r.nfe, r.error), default=None)


def candidates(schedule: AbstractSchedule, top: float) -> list[SolveConfig]:
    """Return the solvers and grids to compare, from `top` down; note 0008 says why these.

    A grid is left out if it starts elsewhere: for a quadratic one, rounding can change its top.
    """
    share = top / schedule.num_steps if isinstance(schedule, AbstractTable) else None
    # log(alpha / sigma) has no even spacing from a time without signal.
    kinds = ("quadratic", "log_snr") if schedule.at(top)[0] else ("quadratic",)
    every = [
        SolveConfig(solver=s, grid=g, steps=calls // 2 if s == "heun" else calls, top=share)
        for s in ("ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc")
        for g in kinds
        for calls in CALLS
    ]
    return [solve for solve in every if solve.build(schedule)[1][0] == top]


@torch.no_grad()
def frontier(
    denoiser: Denoiser,
    z: Tensor,
    asked: SolveConfig,
    among: Iterable[SolveConfig] | None = None,
    *,
    progress: bool = False,
) -> Frontier:
    """Integrate z [N, *shape] in many ways, from the first time of the grid asked for.

    The reference is a third-order solver on a grid of up to 400 times. Its distance to the same
    solver with half as many times bounds its error; smaller differences between rows mean nothing.
    `among` defaults to `candidates`; all of its grids must begin at the same time. Raises
    ValueError for a grid that does not, RuntimeError if the reference is not finite.
    """
    schedule = denoiser.schedule
    top = asked.build(schedule)[1][0]
    above = max(top, 1) if isinstance(schedule, AbstractTable) else top
    fine, half = (
        tuple(sorted({top, *grids.quadratic(n, schedule, top=above)}, reverse=True))
        for n in (400, 200)
    )
    among = list(candidates(schedule, top) if among is None else among)
    with tqdm(total=len(among) + 3, unit=" rows", disable=not progress, leave=False) as bar:

        def endpoint(solver: AbstractSolver, grid: Grid) -> Tensor:
            if grid[0] != top:
                raise ValueError(f"frontier: a grid begins at {grid[0]}, not at {top}")
            bar.update()
            return integrate(denoiser, solver, grid, schedule.prior(z, top))

        truth, check = (endpoint(DPMSolverPP(order=3), times) for times in (fine, half))
        if not truth.isfinite().all():
            raise RuntimeError("frontier: the denoiser returned numbers that are not finite")

        def row(solve: SolveConfig) -> Row:
            solver, grid = solve.build(schedule)
            return Row(
                solve, evaluations(denoiser, solver, grid), _rms(endpoint(solver, grid), truth)
            )

        first, rows = row(asked), [row(solve) for solve in among]
    return Frontier(_mark([first, *rows]), first, len(fine), _rms(check, truth))


def _rms(a: Tensor, b: Tensor) -> float:
    return (a - b).double().square().mean().sqrt().item()


def _mark(rows: list[Row]) -> tuple[Row, ...]:
    """Sort rows by calls and error; mark those closer than all rows with as few calls."""
    closest, marked = float("inf"), []
    for row in sorted(rows, key=lambda r: (r.nfe, r.error)):
        marked.append(replace(row, best=row.error < closest))
        closest = min(closest, row.error)
    return tuple(marked)


def plan_table(found: Frontier, seconds: float, count: int) -> str:
    """Return a frontier as text, given the seconds per network call and image, and the images.

    The best grid is shown for every solver and number of calls. The last line is the answer.
    """
    lines = [
        f"error: distance to the ODE's endpoint, root mean square; the ODE: "
        f"{found.reference_nfe} calls of a third-order solver,",
        f"which half of them miss by {found.reference_error:.2g}. *: none is as close for as few",
        f"{'calls':>5}  {'solver':9}{'grid':10}{'steps':>5}{'error':>10}"
        f"{'s / 1000':>10}{'hours':>8}",
    ]
    shown = set()
    for r in found.rows:
        if (r.solve.solver, r.nfe) not in shown or r.solve == found.asked.solve:
            shown.add((r.solve.solver, r.nfe))
            cost = r.nfe * seconds
            lines.append(
                f"{r.nfe:5}  {r.solve.solver:9}{r.solve.grid:10}{r.solve.steps:5}{r.error:10.2g}"
                f"{cost * 1000:10.3g}{cost * count / 3600:8.3g}{' *' if r.best else ''}"
            )
    return "\n".join([*lines, _answer(found)])


def _answer(found: Frontier) -> str:
    asked = f"{found.asked.nfe} calls of {found.asked.solve.solver}"
    if (row := found.answer) is None:
        return f"No fewer calls end as close to the ODE as the {asked} do: keep them."
    s = row.solve
    return (
        f"{row.nfe} calls of {s.solver} on {s.grid} end as close to the ODE as {asked}: "
        f"--solve.solver {s.solver} --solve.grid {s.grid} --solve.steps {s.steps} "
        f"--solve.top {s.top}"
    )


def fidelity(teacher: Teacher, seed: int, count: int) -> dict[Precision, float]:
    """Return how far a few endpoints move, root mean square, when products are less precise.

    They are compared with the same teacher in float32, for the precisions that its device has; fp8
    only if its gate is open.
    """

    def endpoints(precision: Precision) -> Tensor:
        execution = Execution.default(teacher, precision=precision)
        sampler = Sampler(teacher, batch_size=count, execution=execution)
        return torch.cat([*sampler.batches(seed, range(count))])

    exact = endpoints("float32")
    lower: tuple[Precision, ...] = ("tf32", "bfloat16", "fp8")
    lower = tuple(p for p in lower if _is_supported(teacher, p))
    return {precision: _rms(endpoints(precision), exact) for precision in lower}


def _is_supported(teacher: Teacher, precision: Precision) -> bool:
    try:
        Execution.default(teacher, precision=precision).check(teacher, device_of(teacher.net))
    except ValueError:
        return False
    return True


def fidelity_table(moved: dict[Precision, float], found: Frontier) -> str:
    """Return a line with the errors of precisions beside that of the solver asked for."""
    figures = ", ".join(f"{name} {error:.2g}" for name, error in moved.items())
    return (
        f"distance to the same endpoints in float32: {figures}; "
        f"{found.asked.nfe} calls of {found.asked.solve.solver} miss the ODE by "
        f"{found.asked.error:.2g}"
    )
