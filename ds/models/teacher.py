"""A teacher: a denoiser, and the solver and grid that integrate it from noise to a sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser
from ds.diffusion.grids import Grid
from ds.diffusion.guidance import ClassifierFree, ClassifierGuidance
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import as_prediction
from ds.diffusion.schedules import AbstractTable
from ds.diffusion.solvers import AbstractSolver, evaluations, integrate
from ds.models.decoder import Decoder
from ds.models.model import Model
from ds.system.config import to_json


@dataclass(frozen=True, eq=False)
class Teacher(Model):
    """A denoiser, the solver that integrates it, and the grid of times the solver visits.

    A teacher of latents may have a decoder, which makes pictures of them.

    Raises ValueError for a grid that does not fall or has a time that the schedule lacks, for one
    that starts at an index without signal if the prediction says nothing of x0 there, and for a
    decoder of other latents.
    """

    denoiser: Denoiser
    solver: AbstractSolver
    grid: Grid
    provenance: dict[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None
    kind: ClassVar[str] = "teacher"

    def __post_init__(self):
        falling = all(t > s for t, s in pairwise(self.grid))
        data = self.denoiser.schedule.data
        if not self.grid or not falling or self.grid[-1] <= data:
            raise ValueError(
                f"Teacher: a grid falls from noise to a time above {data}, not {self.grid}"
            )
        self.denoiser.schedule.check(*self.grid)
        self._check_decoder()
        _check_signal(self.denoiser, self.grid[0])

    @property
    def net(self) -> nn.Module:
        """The denoiser's network."""
        return self.denoiser.net

    @property
    def classes(self) -> int:
        guidance = self.denoiser.guidance
        return super().classes or (guidance.classes if guidance else 0)

    def _told(self) -> tuple[str, ...]:
        guidance = self.denoiser.guidance
        return (*super()._told(), *(guidance.takes if guidance else ()))

    @property
    def nfe(self) -> int:
        """Network evaluations per sample: one a call, two where classifier-free guidance works."""
        return evaluations(self.denoiser, self.solver, self.grid)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        *,
        progress: bool = False,
        cond: Mapping[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Integrate noise [N, *shape] to data of the same shape, about [-1, 1], not clipped.

        A network with conditions takes them from `cond`, a stochastic solver its noise from
        `draws`. Raises ValueError for conditions that are missing, unknown or out of range.
        """
        self._check(cond := cond or {}, noise)
        denoiser = self.denoiser.given(**cond)
        x = denoiser.schedule.prior(noise, self.grid[0])
        return integrate(denoiser, self.solver, self.grid, x, progress=progress, draws=draws)

    @torch.no_grad()
    def call(self, noise: Tensor) -> Tensor:
        x = self.denoiser.schedule.prior(noise, self.grid[0])
        guidance = self.denoiser.guidance
        if isinstance(guidance, ClassifierFree):  # one evaluation: that of the label
            guidance = replace(guidance, interval=(0.0, 1e-30))
        denoiser = replace(self.denoiser, guidance=guidance).given(**self.plain(noise))
        return denoiser(x, self.grid[0]).x0

    def unguided(self) -> "Teacher":
        if self.denoiser.guidance is None:
            return self
        return replace(self, denoiser=replace(self.denoiser, guidance=None))

    def using(self, net: nn.Module) -> "Teacher":
        return replace(self, denoiser=replace(self.denoiser, net=net))

    def _headline(self) -> str:
        return (
            f"# A teacher for denoising-student\n\n"
            f"{self._describe()}, {self.nfe} network calls a sample."
        )

    def _about(self) -> dict[str, Any]:
        guidance = self.denoiser.guidance
        if isinstance(guidance, ClassifierGuidance):
            raise ValueError(
                "a teacher guided by a classifier cannot be saved; save it without, by "
                "dataclasses.replace(denoiser, guidance=None), and guide it anew where it is loaded"
            )
        return {
            "schedule": to_json(self.denoiser.schedule),
            "prediction": to_json(self.denoiser.prediction),
            **({} if guidance is None else {"guidance": to_json(guidance)}),
            "solver": to_json(self.solver),
            "grid": list(self.grid),
        }


def _check_signal(denoiser: Denoiser, t: float) -> None:
    """Raise ValueError if the first time of a table leaves no way to x0."""
    prediction = as_prediction(denoiser.prediction)
    table = isinstance(denoiser.schedule, AbstractTable)
    if table and prediction.needs_signal and denoiser.schedule.at(t)[0] == 0:
        raise ValueError(
            f"Teacher: alpha is 0 at the first time, t = {t}, where {prediction} says nothing of "
            f"x0; accepted are a grid that starts earlier, and networks that predict v or x0"
        )
