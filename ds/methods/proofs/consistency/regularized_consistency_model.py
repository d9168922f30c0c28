"""The proof of RegularizedConsistencyModel."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ds.analytic import Gaussian
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import Estimate, Preconditioned
from ds.diffusion.schedules import EDM
from ds.diffusion.solvers import DDIM
from ds.methods.consistency.distribution_matching import criticism, moved
from ds.methods.networks import Frozen
from ds.methods.proof import NOISE, NORMAL, Check, Formula, exact
from ds.methods.proofs.consistency import simplified_consistency_model as first

Judge = Callable[[Tensor, Tensor], Estimate]


def identity(method: Any) -> tuple[Check, ...]:
    """sCM's g is 0 for the right map, and the samples' push is the gradient of a divergence."""
    plain = replace(method.consistency, prediction=None, converted=False, derivative="exact")
    method = replace(method, consistency=plain)
    return *_warmup(method), _divergence(method), _agreement(method), _critic(method)


def _warmup(method: Any) -> tuple[Check, ...]:
    """At r = 1 both forms of g are one and vanish for the right map. Before, they do neither."""
    F, slope, t, sCM = (
        first.velocity(method.consistency),
        first.slope,
        first.angles(),
        method.consistency,
    )
    v = slope(sCM)

    def g(form: str, net: Any, ramp: float = 1.0) -> Tensor:
        out, rate = sCM.velocity(Formula(net), NOISE, t, v, {})
        formed = replace(method, warmup_form=form)
        return formed.tangent(out, rate, NOISE, t, v, torch.full_like(t, ramp))

    def other(u: Tensor, t: Tensor) -> Tensor:  # for which g is not 0
        return 0.5 * F(u, t) + u

    return (
        exact(
            "g in the form of the code",
            g("code", F),
            in_the_warm_up=g("code", F, 0.5),
            tangent_of_x_flipped=g("code", lambda u, s: F(2 * NOISE / sCM.sigma_data - u, s)),
            time_tangent_dropped=g("code", lambda u, _: F(u, t)),
        ),
        exact(
            "g of the code minus that of the paper",
            g("code", other) - g("paper", other),
            in_the_warm_up=g("code", other, 0.5) - g("paper", other, 0.5),
        ),
    )


def _judges(method: Any, drawn: Gaussian) -> tuple[Judge, Denoiser]:
    """Return a teacher of another path, and the best critic of samples that are `drawn`."""
    data, path = method.consistency.sigma_data, method.consistency.path

    def F(u: Tensor, t: Tensor) -> Tensor:
        cos, sin = t.cos()[:, None], data * t.sin()[:, None]
        return (cos * data * u - drawn.x0(data * u, cos, sin)) / sin

    teacher = NORMAL.teacher(DDIM(), (80.0,), EDM(), Preconditioned(0.7))
    frozen = partial(Frozen(teacher.denoiser, path), cond={})
    return frozen, method.consistency.denoiser(Formula(F))


def _student() -> tuple[Tensor, Tensor]:
    """Return means and deviations of what a student draws, around those of the data, [N, 3]."""
    off = NOISE / 4
    means, stds = off + NORMAL.mean, (1 + off.flip(0)).abs() * NORMAL.std
    return means.requires_grad_(True), stds.requires_grad_(True)


def _nodes() -> Iterator[tuple[float, float]]:
    """Yield pairs over which the mean of a square form is that over two normal numbers."""
    yield from product((1.0, -1.0), (1.0, -1.0))


def _divergence(method: Any) -> Check:
    """The mean push of normal samples is the gradient of their divergence from normal data."""
    means, stds = _student()
    drawn, t = Gaussian(means.detach(), stds.detach(), (3,)), first.angles()
    teacher, critic = _judges(method, drawn)
    alpha, sigma = method.consistency.path.gather(t, NOISE)

    def gradient(teacher: Judge, critic: Any, renoised: bool = True) -> Tensor:
        """Return the gradient with respect to means and deviations, times sigma**2."""
        total = torch.zeros_like(t)
        for z, e in _nodes():
            made, eps = means + stds * z, torch.full_like(means, e)
            if not renoised:
                eps = ((1 - alpha) * made / sigma).detach()
            seen = teacher(alpha * made.detach() + sigma * eps, t).x0
            size = (made - seen).abs().mean(1).detach()
            total = total + size * moved(made, t, eps, teacher, critic) / 4
        weighted = alpha[:, 0] ** 2 * total / 2
        return torch.cat(torch.autograd.grad(weighted.sum(), (means, stds)))

    wide = [(alpha**2 * std**2 + sigma**2).sqrt() for std in (stds, NORMAL.std)]
    there = [Normal(alpha * m, s) for m, s in zip((means, NORMAL.mean), wide, strict=True)]
    known = sigma**2 * kl_divergence(*there)
    known = torch.cat(torch.autograd.grad(known.sum(), (means, stds)))
    found = gradient(teacher, critic)
    return exact(
        "gradient of KL(student, data)",
        found - known,
        sign_flipped=-found - known,
        critic_and_teacher_swapped=gradient(critic, _judges(method, NORMAL)[1]) - known,
        not_renoised=gradient(teacher, critic, renoised=False) - known,
    )


def _agreement(method: Any) -> Check:
    """Samples of the data are not pushed."""
    t, eps = first.angles(), NOISE.flip(0)

    def push(student: Gaussian, critic_of: Gaussian) -> Tensor:
        made = (student.mean + student.std * NOISE).requires_grad_(True)
        loss = moved(made, t, eps, *_judges(method, critic_of)).sum()
        return torch.autograd.grad(loss, made)[0]

    other = Gaussian(0.1, 1.5 * NORMAL.std, (3,))
    return exact(
        "push where the student is the data",
        push(NORMAL, NORMAL),
        student_elsewhere=push(other, other),
        critic_of_another_student=push(NORMAL, other),
    )


def _critic(method: Any) -> Check:
    """The critic's loss is least, by its gradient, where it sees the mean of what was drawn."""
    means, stds = (x.detach() for x in _student())
    t, drawn = first.angles(), Gaussian(means, stds, (3,))

    def gradient(shown: Gaussian, renoised: bool = True) -> Tensor:
        right = _judges(method, drawn)[1].net
        shift, gain = (torch.zeros_like(NOISE).requires_grad_(True) for _ in range(2))
        net = Formula(lambda u, t: right(u, t) + shift + gain * u)
        loss = torch.zeros_like(t)
        for z, e in _nodes():
            made, eps = (
                shown.mean + shown.std * z * torch.ones_like(NOISE),
                torch.full_like(NOISE, e),
            )
            critic = method.consistency.denoiser(net)
            loss = loss + criticism(critic, made, t, eps if renoised else 0 * eps) / 4
        return torch.cat(torch.autograd.grad(loss.sum(), (shift, gain)))

    return exact(
        "gradient of the best critic",
        gradient(drawn),
        shown_the_data=gradient(NORMAL),
        not_renoised=gradient(drawn, renoised=False),
    )


def measure(method: Any, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
    """Check that samples of one call are in the modes, and that every mode keeps its mass."""
    data = method.trial().data
    away, mode = torch.cdist(method.sample(net, z), data.centres(z)).min(1)
    off = float((away > 4 * data.std).double().mean())
    held = torch.bincount(mode, minlength=len(data.weights)) / len(z)
    least = float((held / held.new_tensor(data.weights)).min())
    return (
        Check("share of samples in no mode", off, share=0.7, against=("sCM alone",)),
        Check(
            "least mass of a mode, of its own", least, 0.5, at_least=True, against=("DMD alone",)
        ),
    )
