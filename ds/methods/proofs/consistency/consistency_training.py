"""The proof of ConsistencyTraining."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds.diffusion.noise import Draws
from ds.methods.consistency.levels import disagreement, karras
from ds.methods.proof import NOISE, NORMAL, Check, exact
from ds.methods.proofs.consistency.consistency_distillation import end_of_a_call, follows
from ds.pairs.sources import Batch

LEVELS = 6


def identity(method: Any) -> tuple[Check, ...]:
    """A call ends where the ODE does, and the error is on average that of Euler's step."""

    def error(student: nn.Module, target: nn.Module, batch: Batch, i: Tensor) -> Tensor:
        f, wanted = method.ends({"student": student, "target": target}, batch, i, LEVELS)
        return f - wanted

    return end_of_a_call(method), on_average(method, error)


def on_average(
    method: Any, error: Callable[[nn.Module, nn.Module, Batch, Tensor], Tensor]
) -> Check:
    """On average over the images that x_t may come from, the error is that of Euler's step.

    So says Theorem 2 of the paper for small steps. The f of normal data is linear in x, so that it
    holds for all, and two images, one deviation above the mean and one below, stand for the rest.
    `error` is that of a student, a target and rows at levels i [N] of LEVELS.
    """
    i = torch.arange(LEVELS - 1, dtype=torch.int64, device="cpu").repeat_interleave(len(NOISE))
    t, s = (karras(k, LEVELS, method.sigma_min, method.sigma_max) for k in (i, i + 1))
    sigma, below = t[:, None], s[:, None]
    x = NORMAL.mean + (NORMAL.std**2 + sigma**2).sqrt() * NOISE.repeat(LEVELS - 1, 1)
    given: Any = NORMAL.posterior(x, 1.0, sigma)
    right, late = (follows(method, late / (LEVELS - 1)) for late in (0, 1))
    f = method.denoiser(right)

    def mean(target: nn.Module = right, other: int = 0) -> Tensor:
        """Return the mean error; `other` shifts the noise of the target's rows."""
        total = torch.zeros_like(x)
        for x0 in (given.mean + given.std, given.mean - given.std):
            noise = (x - x0) / sigma
            if other:
                nearer = x0 + below * noise.roll(other, 0)
                total += disagreement(f, x, t, method.denoiser(target), nearer, s) / 2
            else:
                total += error(right, target, Batch(x0, noise, i, Draws(0, i)), i) / 2
        return total

    euler = x + (below - sigma) * (x - given.mean) / sigma
    expected = f(x, t).x0 - f(euler, s).x0
    return exact(
        "mean error minus Euler's",
        mean() - expected,
        other_noise_in_the_target=mean(other=1) - expected,
        target_of_the_next_level=mean(late) - expected,
        x_t_as_its_own_target=-expected,
    )
