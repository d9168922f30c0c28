"""How many network calls are needed: the endpoints of solvers and grids against the exact ODE."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ds.diffusion import grids
from ds.diffusion.conditions import Conditions
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.schedules import AbstractSchedule, AbstractTable
from ds.diffusion.solvers import DCW, AbstractSolver, DPMSolverPP, evaluations, integrate
from ds.evaluation.spectrum import fitted, spectrum, spectrum_error
from ds.models.execution import Execution, Precision
from ds.models.model import device_of
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.training.presets import SolveConfig

CALLS = (8, 12, 16, 24, 36)
REFERENCE = DPMSolverPP(order=3)
log = logging.getLogger("ds")


@dataclass(frozen=True)
class Row:
    """A way to integrate, its cost, and how far from the ODE's endpoint it ends."""

    solve: SolveConfig
    nfe: int
    error: float  # root mean square over noises and elements
    best: bool = False  # no other row is as close with as few calls


@dataclass(frozen=True)
class Correction:
    """A row without and with ds.solvers.DCW, whose strength is fitted to the reference."""

    plain: Row
    with_dcw: Row
    spectrum_errors: tuple[float, float]  # mean |log ratio| to the reference, without and with
    gaussian: float  # the strength for Gaussian data of the reference's spectrum


@dataclass(frozen=True)
class Frontier:
    """Rows in order of their calls, the row asked for, and the accuracy of the reference."""

    rows: tuple[Row, ...]
    asked: Row
    reference_nfe: int
    reference_error: float  # how far the reference moves with half of its times
    truth: Tensor = field(repr=False, compare=False)  # the reference's endpoints
    corrections: tuple[Correction, ...] = ()

    @property
    def answer(self) -> Row | None:
        """The cheapest row that is as close as the one asked for with fewer calls, if any.

        A corrected row is one only where no plain one of as few calls is.
        """
        rows = (*self.rows, *(c.with_dcw for c in self.corrections))
        enough = [r for r in rows if r.error <= self.asked.error and r.nfe < self.asked.nfe]
        return min(enough, key=lambda r: (r.nfe, r.solve.dcw != 0, r.error), default=None)


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

    A denoiser that takes conditions is given those of z: denoiser.given(label=...).

    The reference is a third-order solver on a grid of up to 400 times. Its distance to the same
    solver with half as many times bounds its error; smaller differences between rows mean nothing.
    `among` defaults to `candidates`; all of its grids must begin at the same time. Raises
    ValueError for a grid that does not and for a solver that adds noise, RuntimeError if the
    reference is not finite.
    """
    schedule = denoiser.schedule
    solver, grid = asked.build(schedule)
    if solver.stochastic:
        raise ValueError(
            f"frontier: {asked.solver} adds fresh noise and follows no ODE; compare a solver that "
            f"adds none"
        )
    top = grid[0]
    fine, half = (_fine(n, schedule, top) for n in (400, 200))
    among = list(candidates(schedule, top) if among is None else among)
    with tqdm(total=len(among) + 3, unit=" rows", disable=not progress, leave=False) as bar:

        def endpoint(solver: AbstractSolver, grid: Grid) -> Tensor:
            if grid[0] != top:
                raise ValueError(f"frontier: a grid begins at {grid[0]}, not at {top}")
            bar.update()
            return integrate(denoiser, solver, grid, schedule.prior(z, top))

        truth, check = (endpoint(REFERENCE, times) for times in (fine, half))
        if not truth.isfinite().all():
            raise RuntimeError("frontier: the denoiser returned numbers that are not finite")

        def row(solve: SolveConfig) -> Row:
            solver, grid = solve.build(schedule)
            nfe = evaluations(denoiser, solver, grid)
            return Row(solve, nfe, _rms(endpoint(solver, grid), truth))

        first, rows = row(asked), [row(solve) for solve in among]
    return Frontier(_mark([first, *rows]), first, len(fine), _rms(check, truth), truth)


@torch.no_grad()
def endpoints(denoiser: Denoiser, z: Tensor, top: float) -> Tensor:
    """Return where the ODE leads noise z [N, *shape] from time `top`, by up to 200 fine steps."""
    grid = _fine(200, denoiser.schedule, top)
    return integrate(denoiser, REFERENCE, grid, denoiser.schedule.prior(z, top))


def _fine(n: int, schedule: AbstractSchedule, top: float) -> Grid:
    """Return up to n times from `top` down, on which a reference is computed."""
    above = max(top, 1) if isinstance(schedule, AbstractTable) else top
    return tuple(sorted({top, *grids.quadratic(n, schedule, top=above)}, reverse=True))


@torch.no_grad()
def corrected(found: Frontier, denoiser: Denoiser, z: Tensor) -> Frontier:
    """Return a frontier of the noises z [N, *shape] with corrections, fitted and measured.

    They are those of the row asked for, and of the best rows with fewer calls. A strength is the
    one that ends nearest to the reference: the vertex of a parabola through the squared errors of
    three, 0 where that is no better than none. Beside it stands what `fitted` computes from the
    spectrum, which real data may be far from. One sample has no spectrum, and gets no corrections.
    """
    if len(z) < 2:
        log.warning("plan: no corrections (DCW), which need the spectrum of 2 or more noises")
        return found
    variances, truth, schedule = spectrum(found.truth), found.truth, denoiser.schedule

    def correction(row: Row) -> Correction:
        solve = replace(row.solve, dcw=0.0)
        solver, grid = solve.build(schedule)

        def end(strength: float) -> Tensor:
            dcw = DCW(solver, low=strength)
            return integrate(denoiser, dcw, grid, schedule.prior(z, grid[0]))

        gaussian, none = fitted(variances, grid, schedule, solver), end(0.0)
        plain = replace(row, solve=solve, error=_rms(none, truth))
        wide = min(max(abs(gaussian) / 2, 0.002), 0.05)
        below, above = (_rms(end(c), truth) ** 2 for c in (-wide, wide))
        low = round(_vertex(wide, below, plain.error**2, above), 4)
        if (error := _rms(best := end(low), truth)) >= plain.error:
            low, error, best = 0.0, plain.error, none
        off = spectrum_error(none, truth), spectrum_error(best, truth)
        return Correction(
            plain, replace(plain, solve=replace(solve, dcw=low), error=error), off, gaussian
        )

    cheap = [row for row in found.rows if row.best and row.nfe < found.asked.nfe]
    return replace(found, corrections=tuple(map(correction, [found.asked, *cheap])))


def _vertex(wide: float, below: float, middle: float, above: float) -> float:
    """Return where the parabola with these values at -wide, 0 and wide is least, within 2 wide."""
    bend = below - 2 * middle + above
    if not bend > 0:
        return wide if above < below else -wide
    return wide * min(max((below - above) / (2 * bend), -2.0), 2.0)


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
    return "\n".join([*lines, *_corrections_table(found.corrections), _answer(found)])


def _corrections_table(corrections: tuple[Correction, ...]) -> list[str]:
    """Return lines that say what the correction DCW gives."""
    if not corrections:
        return []
    lines = [
        "A correction after each step (DCW) costs no call. Its strength is fitted to the ODE's "
        "endpoints; spectrum: how far the",
        "powers are off, mean |log ratio|; Gaussian: the strength that data of this spectrum would "
        "need if they were Gaussian",
        f"{'calls':>5}  {'solver':9}{'grid':10}{'steps':>5}{'--solve.dcw':>13}{'error':>10}"
        f"{'with it':>10}{'spectrum':>10}{'with it':>10}{'Gaussian':>10}",
    ]
    for c in corrections:
        s = c.with_dcw.solve
        lines.append(
            f"{c.plain.nfe:5}  {s.solver:9}{s.grid:10}{s.steps:5}{s.dcw:13.4f}"
            f"{c.plain.error:10.2g}{c.with_dcw.error:10.2g}"
            f"{c.spectrum_errors[0]:10.2g}{c.spectrum_errors[1]:10.2g}{c.gaussian:10.3f}"
        )
    return lines


def _answer(found: Frontier) -> str:
    asked = f"{found.asked.nfe} calls of {found.asked.solve.solver}"
    if (row := found.answer) is None:
        return f"No fewer calls end as close to the ODE as the {asked} do: keep them."
    s = row.solve
    return (
        f"{row.nfe} calls of {s.solver} on {s.grid} end as close to the ODE as {asked}: "
        f"--solve.solver {s.solver} --solve.grid {s.grid} --solve.steps {s.steps} "
        f"--solve.top {s.top}" + (f" --solve.dcw {s.dcw}" if s.dcw else "")
    )


def fidelity(
    teacher: Teacher, seed: int, count: int, conditions: Conditions | None = None
) -> dict[Precision, float]:
    """Return how far a few endpoints move, root mean square, when products are less precise.

    They are compared with the same teacher in float32, for the precisions that its device has; fp8
    only if its gate is open. `conditions` are as for a ds.Sampler.
    """

    def endpoints(precision: Precision) -> Tensor:
        execution = Execution.default(teacher, precision=precision)
        sampler = Sampler(teacher, batch_size=count, execution=execution, conditions=conditions)
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
