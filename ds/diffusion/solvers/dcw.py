"""DCW: a correction after every step of any solver, for the signal that its steps lose."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast

from torch import Tensor
from torch.nn import functional as F

from ds.diffusion.denoiser import Denoiser, Parts
from ds.diffusion.grids import LARGEST, Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Estimate
from ds.diffusion.schedules import AbstractSchedule
from ds.diffusion.solvers.base import AbstractSolver
from ds.diffusion.solvers.clipped import Clipped
from ds.diffusion.solvers.ddim import DDIM
from ds.system.config import Between, Positive, check

Strength = Annotated[float, Between(-10.0, 10.0)]


@dataclass(frozen=True)
class DCW(AbstractSolver):
    """A solver whose every step is lengthened, away from the x0 that was predicted last.

    Steps of a finite size lose variance, and a state that has lost some is taken for less noisy
    than its time says ("SNR-t bias"). In y = x / alpha and r = sigma / alpha, with D the x0 of the
    step's last network call, the y' that a step leads to becomes

        y' + low * (y' - D)

    on every path, so that paths are views of one thing. In the wavelet form, of pictures, `low`
    multiplies the low band alone, of an orthonormal Haar transform of one level, and `high` the
    three others. Weights follow the noise level r that a step starts at: `low` is multiplied by
    r / sigma_max, and `high` by 1 - r / sigma_max. It costs no network call. Strengths of 0 leave
    the solver as it is. Yu et al. 2026, arXiv:2604.16044, Eq. 17, 20 and 21, in the order of
    AMAP-ML/DCW, whose paths other than EDM's leave alpha out. The best strength depends on the
    solver, the grid and the data; ds.evaluation.spectrum.fitted computes one.

    What a solver keeps for its next step is not corrected: UniPC and singlestep solvers, which go
    on from there, see a correction only through what the network says of it. An odd side is as if
    its last row stood there twice. Raises ValueError for a `high` without wavelets, and in a step
    of the wavelet form for samples that are no pictures of at least 2 x 2.
    """

    solver: AbstractSolver = field(default_factory=DDIM)
    low: Strength = 0.0  # of all of x, or of its low band; above 0 it adds signal
    high: Strength = 0.0  # of the high bands
    wavelet: bool = False  # correct bands, and not pixels
    weighted: bool | None = None  # by the noise level; None: bands are, pixels are not
    sigma_max: Positive = LARGEST  # noise level of weight 1; those above it weigh 1 too

    def __post_init__(self):
        check(self, "DCW: ")
        if self.high and not self.wavelet:
            raise ValueError(
                f"DCW: high = {self.high} is of the wavelet form; pass wavelet=True, or no high"
            )

    @property
    def order(self) -> int:
        return self.solver.order

    @property
    def stochastic(self) -> bool:
        return self.solver.stochastic

    def nfe(self, grid: Grid) -> int:
        return self.solver.nfe(grid)

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: float,
        s: float,
        state: Any,
        draws: Draws | None = None,
    ) -> tuple[Tensor, Any]:
        if isinstance(self.solver, Clipped):  # D is what the solver used, so it is clipped first
            inside = replace(self, solver=self.solver.solver)
            return replace(self.solver, solver=inside).step(denoiser, x, t, s, state, draws)
        if not (self.low or self.high):
            return self.solver.step(denoiser, x, t, s, state, draws)
        watched = _Watched(denoiser)
        x, state = self.solver.step(cast(Denoiser, watched), x, t, s, state, draws)
        away = x - denoiser.schedule.at(s)[0] * watched.x0
        return x + self._correction(away, denoiser.schedule, t), state

    def _correction(self, away: Tensor, schedule: AbstractSchedule, t: float) -> Tensor:
        """Return what a step from time t adds, given its way from the predicted x0."""
        low, high = self.strengths(schedule, t)
        if not self.wavelet:
            return low * away
        return high * away + (low - high) * _low_band(away)

    def strengths(self, schedule: AbstractSchedule, t: float) -> tuple[float, float]:
        """Return `low` and `high` as they are weighted in the step from time t."""
        if not (self.wavelet if self.weighted is None else self.weighted):
            return self.low, self.high
        alpha, sigma = schedule.at(t)
        weight = min(1.0, sigma / (alpha * self.sigma_max)) if alpha else 1.0
        return self.low * weight, self.high * (1 - weight)


def bare(solver: AbstractSolver | None) -> AbstractSolver | None:
    """Return a solver without its clipping and its correction."""
    while isinstance(solver, Clipped | DCW):
        solver = solver.solver
    return solver


class _Watched:
    """What a solver needs of a denoiser, and the x0 that it was told last."""

    x0: Tensor

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def __call__(self, x: Tensor, t: float) -> Estimate:
        return self.parts(x, t).estimate

    def parts(self, x: Tensor, t: float) -> Parts:
        """Return the denoiser's parts, and remember the x0 that they give."""
        found = self.denoiser.parts(x, t)
        self.x0 = found.estimate.x0
        return found


def _low_band(x: Tensor) -> Tensor:
    """Return pictures [N, C, H, W] with only their low band: each 2 x 2 block is its mean."""
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        raise ValueError(
            f"DCW: the wavelet form takes pictures [N, C, H, W] of at least 2 x 2, not "
            f"{list(x.shape)}; the pixel form, wavelet=False, takes samples of any shape, and "
            f"captured loops take it alone"
        )
    means = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    wide = means.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return wide[..., : x.shape[2], : x.shape[3]]
