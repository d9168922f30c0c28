"""Denoising Student: learn what a teacher makes of its noise, in one network call."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ds.diffusion.denoiser import Denoiser, time_of_each
from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import (
    X0,
    Eps,
    LearnedVariance,
    Preconditioned,
    Rescaled,
    TrigFlow,
    V,
    Velocity,
    as_prediction,
)
from ds.diffusion.schedules import MOST, AbstractTable
from ds.methods import losses
from ds.methods.base import AbstractMethod, Progress, student_net
from ds.methods.proof import Check, Trial
from ds.methods.proofs import denoising_student as proof
from ds.models.teacher import Teacher
from ds.pairs.sources import Batch
from ds.system.config import Between, check


class Form(NamedTuple):
    """A student of noise z: gain * net(z, t), plus z if it is residual."""

    t: float
    residual: bool
    gain: float


PAPER = Form(999, True, -1.0)  # for 1000 steps and predicted noise


@dataclass(frozen=True)
class DenoisingStudent(AbstractMethod):
    """Regress the endpoint of a deterministic sampler on its noise, in one network call.

    The network starts with the teacher's weights, and the student as near to the data as these
    bring it at the last time T. That depends on what the teacher predicts:

        the noise, a velocity     student(x_T) = x_T - net(x_T, T)
        x0                        student(x_T) = net(x_T, T)
        v                         student(x_T) = -net(x_T, T)

    The paper's teachers predict the noise. The difference x_T - x0 is then a target of ordinary
    size; x0 itself would need the noise prediction divided by alpha_T = 1/157. Luhman & Luhman
    2021, arXiv:2101.02388, section 3.

    Fields that are None are the paper's until `on` takes them from a teacher. Training raises
    ValueError if that teacher needs others.

    The loss is the mean over elements. The paper's is the sum over the elements of an image, and
    Adam takes the same steps for both.
    """

    feeds: ClassVar = "pairs"

    loss_type: Literal["l1", "l2"] = "l2"
    # the time the network is told; None: the last one of the teacher's schedule, which the teacher
    # may not visit
    t: Annotated[float, Between(0, MOST - 1)] | None = None
    # whether the student is the noise plus the output, or the output alone; None: what suits the
    # teacher's prediction
    residual: bool | None = None
    # factor of the output; None: what suits the teacher's prediction
    gain: Annotated[float, Between(-1e6, 1e6)] | None = None

    def __post_init__(self):
        check(self, "DenoisingStudent: ")

    def on(self, teacher: Teacher) -> "DenoisingStudent":
        if None not in (self.t, self.residual, self.gain):
            return self
        t, residual, gain = self._or(_form(teacher.denoiser))
        return replace(self, t=t, residual=residual, gain=gain)

    def _or(self, form: Form) -> Form:
        """Return t, residual and gain: those of `form` where they are None here."""
        return Form(
            form.t if self.t is None else self.t,
            form.residual if self.residual is None else self.residual,
            form.gain if self.gain is None else self.gain,
        )

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        if isinstance(teacher.denoiser.schedule, AbstractTable) and self.t is not None:
            teacher.denoiser.schedule.check(self.t)
        if (there := self.on(teacher)._or(PAPER)) != self._or(PAPER):
            raise ValueError(
                f"DenoisingStudent: this teacher needs t = {there.t:g}, residual = "
                f"{there.residual} and gain = {there.gain:g}; use method.on(teacher)"
            )
        return nn.ModuleDict({"student": student_net(teacher, None)})

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        error = self.sample(modules["student"], batch.noise, cond=batch.cond) - batch.x0
        return losses.mean(error, self.loss_type)

    def times(self, nfe: int) -> Grid:
        if nfe != 1:
            raise ValueError(f"DenoisingStudent: makes an image in 1 network call, not {nfe}")
        return (self._or(PAPER).t,)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        (t,), (_, residual, gain) = self.times(nfe), self._or(PAPER)
        out = net(z, time_of_each(z, t), **(cond or {}))
        return torch.add(z, out, alpha=gain) if residual else gain * out

    def trial(self) -> Trial:
        return Trial(bars={1: 0.07}, agreement=0.97)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)


def _form(denoiser: Denoiser) -> Form:
    """Return the form that makes the teacher's network its best guess of x0 at the last time.

    What alpha * x adds to that guess is left out, since alpha is small there. Raises ValueError for
    a prediction without such a form.
    """
    prediction, last = as_prediction(denoiser.prediction), denoiser.schedule.noise
    if isinstance(prediction, LearnedVariance):  # whose student has the first half of the channels
        prediction = prediction.prediction
    told = denoiser.c_noise(last)
    if isinstance(prediction, Rescaled):  # at pure noise, which is as long on every schedule
        prediction = prediction.prediction
    match prediction:
        case Eps() | Velocity():
            return Form(told, True, -1.0)
        case X0():
            return Form(told, False, 1.0)
        case V():
            return Form(told, False, -1.0)
        case Preconditioned(sigma_data=sigma_data):
            return Form(told, False, sigma_data)
        case TrigFlow(sigma_data=sigma_data):
            return Form(told, False, -sigma_data)
    raise ValueError(
        f"DenoisingStudent: knows no start for the prediction {prediction}; set t, residual and "
        f"gain of the method"
    )
