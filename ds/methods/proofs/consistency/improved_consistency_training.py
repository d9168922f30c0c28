"""The proof of ImprovedConsistencyTraining. Mistakes of public copies are among its controls."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ds.analytic import Gaussian
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws
from ds.diffusion.predictions import Bounded, Level
from ds.methods.base import Progress
from ds.methods.consistency.levels import disagreement, noisy
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact
from ds.methods.proofs.consistency.consistency_distillation import end_of_a_call, follows
from ds.methods.proofs.consistency.consistency_training import LEVELS, on_average
from ds.nets import MLPConfig
from ds.nets.embedding import sinusoids
from ds.pairs.sources import Batch

INDEX = torch.arange(len(NOISE), dtype=torch.int64, device="cpu")
STEPS = torch.tensor(len(NOISE), dtype=torch.float64, device="cpu")


class _NoRoot(Bounded):
    """c_in = 1 / (sigma**2 + sigma_data**2)."""

    def inputs(self, x: Tensor, t: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        unit, told = super().inputs(x, t, alpha, sigma)
        return unit / (sigma**2 + self.sigma_data**2) ** 0.5, told


class _NoDeviation(Bounded):
    """c_out without the factor sigma_data."""

    def _weights(self, level: Level) -> tuple[Level, Level]:
        skip, gain = super()._weights(level)
        return skip, gain / self.sigma_data


class _Given(Draws):
    """Draws whose uniform numbers are those in the place of the index."""

    def uniform(self, stream: int) -> Tensor:
        return self.index


def _changed(kind: type[Bounded], f: Denoiser) -> Any:
    """Return the prediction of a consistency function with a mistake."""
    own: Any = f.prediction
    return kind(own.sigma_data, own.noise_scale, own.sigma_min)


def elementwise(error: Tensor, width: float) -> Tensor:
    """Return the sum of the pseudo-Huber losses of the elements of each row, [N]."""
    return ((error.square() + width**2).sqrt() - width).flatten(1).sum(1)


def identity(method: Any) -> tuple[Check, ...]:
    """Of a single image, f is exact for every row; and each part of the method is what it is."""
    facts = end_of_a_call, of_one_image, of_normal_data, boundary, inputs, outputs, features
    return tuple(of(method) for of in (*facts, whole_rows, weight, density, curriculum))


def of_one_image(method: Any) -> Check:
    """All that a single image and one noise lead to is the image with the noise at sigma_min."""
    # What is left has the size of sigma_min, so a larger one than usual shows more.
    method = replace(method, sigma_min=0.2, mid=1.0, sigma_max=80.0)
    x0 = torch.full_like(NOISE, 0.3)
    batch = Batch(x0, NOISE, INDEX, Draws(0, INDEX))
    other = batch._replace(noise=NOISE.roll(1, 0))
    net = follows(method, data=Gaussian(0.3, 0.0, (3,)))
    f = method.denoiser(net)
    t, s, next_s = (method.levels(i.clamp(max=STEPS), STEPS) for i in (INDEX, INDEX + 1, INDEX + 2))
    x = noisy(batch, t)
    return exact(
        "error of a single image",
        method.error(net, batch, t, s),
        target_of_the_next_level=disagreement(f, x, t, f, noisy(batch, s), next_s),
        other_noise_in_the_target=disagreement(f, x, t, f, noisy(other, s), s),
    )


def of_normal_data(method: Any) -> Check:
    """The error is on average that of Euler's step, as of consistency training."""

    def error(student: nn.Module, target: nn.Module, batch: Batch, i: Tensor) -> Tensor:
        t, s = (method.levels(k, torch.full_like(STEPS, LEVELS - 1)) for k in (i, i + 1))
        if target is student:
            return method.error(student, batch, t, s)
        f, wrong = map(method.denoiser, (student, target))
        return disagreement(f, noisy(batch, t), t, wrong, noisy(batch, s), s)

    return on_average(method, error)


def boundary(method: Any) -> Check:
    """Whatever the network says, f returns x at sigma_min."""
    f: Any = method.denoiser(Formula(lambda x, t: 100 * x.cos()))
    least = torch.full_like(NOISE[:, 0], method.sigma_min)
    edm: Any = replace(f, prediction=replace(f.prediction, sigma_min=1e-30))
    return exact(
        "f minus x at sigma_min",
        f(NOISE, least).x0 - NOISE,
        no_shift_by_sigma_min=edm(NOISE, least).x0 - NOISE,
    )


def inputs(method: Any) -> Check:
    """At every level, the network is fed numbers of variance 1."""
    sigma = method.levels(INDEX, STEPS)[:, None]
    x = (sigma**2 + method.sigma_data**2).sqrt()
    f = method.denoiser(nn.Identity())

    def variance(prediction: Bounded) -> Tensor:
        return prediction.inputs(x, sigma, 1.0, sigma)[0] ** 2

    return exact(
        "variance of the network's input, less 1",
        variance(f.prediction) - 1,
        c_in_without_the_root=variance(_changed(_NoRoot, f)) - 1,
    )


def outputs(method: Any) -> Check:
    """Where noise is all, f has the deviation of the data if the network's output has that of 1."""
    method = replace(method, sigma_data=0.5)  # another than 1, which hides the mistake
    f = method.denoiser(Formula(lambda x, t: torch.ones_like(x)))
    nothing, level = torch.zeros_like(NOISE), torch.full_like(NOISE[:, 0], 1e20)

    def deviation(prediction: Bounded) -> Tensor:
        return prediction.estimate(nothing, torch.ones_like(nothing), 1.0, level[:, None]).x0

    return exact(
        "deviation of f without a signal, less that of the data",
        deviation(f.prediction) - 0.5,
        c_out_without_sigma_data=deviation(_changed(_NoDeviation, f)) - 0.5,
    )


def features(method: Any) -> Check:
    """At the end of a run, what a network is told hardly changes from one level to the next."""
    i = torch.arange(1281, dtype=torch.int64, device="cpu")
    steps = torch.tensor(1280.0, dtype=torch.float64, device="cpu")
    sigma, like = method.levels(i, steps), torch.zeros(len(i), 1, dtype=torch.float64, device="cpu")
    told = method.denoiser(nn.Identity()).prediction.inputs(like, sigma, 1.0, sigma)[1]

    def change(scale: float) -> float:
        embedded = sinusoids(scale * told, 16, MLPConfig().frequencies)
        return float(embedded.diff(dim=0).square().mean(1).sqrt().max())

    # Fourier features of the scale 16 are off by a factor of 800, and these by one of 16.
    controls = {"full frequency": change(4 / method.noise_scale)}
    return Check("change of the embedding in a step", change(1), 0.02, controls, miss=0.1)


def whole_rows(method: Any) -> Check:
    """The loss of a row does not change as its error turns."""
    width = method.huber * 3**0.5
    turn = torch.linalg.qr(torch.vander(torch.arange(1.0, 4, dtype=NOISE.dtype, device="cpu")))[0]
    return exact(
        "loss of an error, turned",
        method.distance(NOISE @ turn) - method.distance(NOISE),
        huber_of_each_element=elementwise(NOISE @ turn, width) - elementwise(NOISE, width),
    )


def weight(method: Any) -> Check:
    """A row counts by the inverse of the step between its levels."""
    net, progress = Formula(lambda x, t: x.sin()), Progress(0, 1)
    batch = Batch(NORMAL.endpoint(NOISE, 0, 1), NOISE.flip(0), INDEX, Draws(0, INDEX))
    steps = method.steps(progress)
    i = method.drawn(batch.draws, steps)
    t, s = method.levels(i, steps), method.levels(i + 1, steps)
    rows = method.distance(method.error(net, batch, t, s))
    found = method.loss(nn.ModuleDict({"student": net}), batch, progress)
    return exact(
        "loss over the mean of distance / step, less 1",
        found / (rows / (t - s)).mean() - 1,
        weight_inverted=found / (rows * (t - s)).mean() - 1,
        no_weight=found / rows.mean() - 1,
    )


def density(method: Any) -> Check:
    """A step is drawn as often as a difference of erf says, and all of them together always."""
    i = torch.arange(len(NOISE) + 1, dtype=torch.int64, device="cpu")
    mean, std = method.log_sigma
    below = torch.erf((method.levels(i, STEPS).log() - mean) / (std * 2**0.5))
    share = (below[:-1] - below[1:]) / (below[0] - below[-1])
    middle = 1 - (share.cumsum(0) - share / 2)

    def off(other: Any, late: int = 0) -> Tensor:
        return (other.drawn(_Given(0, middle), STEPS) - INDEX + late).double()

    return exact(
        "level drawn where erf has it",
        torch.cat([off(method), share.sum(0, keepdim=True) - 1]),
        moved_by_one=off(method, 1),
        sign_of_the_mean=off(replace(method, log_sigma=(-mean, std))),
    )


def curriculum(method: Any) -> Check:
    """The number of steps between levels doubles at the whole eighths of a run, 10 to 1280."""
    method = replace(method, start_steps=10, end_steps=1280)
    moments = [k + at for k in range(0, 800, 100) for at in (0, 99)]

    def off(late: int) -> Tensor:
        steps = torch.stack([method.steps(Progress(max(k - late, 0), 800)) for k in moments])
        return steps - steps.new_tensor([10.0 * 2 ** (k // 100) for k in moments])

    return exact("steps between levels, less 10 * 2**k", off(0), one_step_late=off(1))


def without_root(method: Any) -> Any:
    """Return the method with a mistake in c_in, to be trained as a control."""
    kind = type(method)

    def denoiser(self: Any, net: nn.Module) -> Denoiser:
        right = kind.denoiser(self, net)
        return replace(right, prediction=_changed(_NoRoot, right))

    wrong = type("NoRoot", (kind,), {"denoiser": denoiser})
    return wrong(**{field.name: getattr(method, field.name) for field in fields(method)})
