"""The proof of ConsistencyTraining."""

from typing import Any

import torch
from torch import Tensor, nn

from ds.diffusion.noise import Draws
from ds.methods.consistency.levels import ends, karras
from ds.methods.proof import NOISE, NORMAL, Check, exact
from ds.methods.proofs.consistency.consistency_distillation import end_of_a_call, follows
from ds.pairs.sources import Batch

LEVELS = 6


def identity(method: Any) -> tuple[Check, ...]:
    """On average over the images that x_t may come from, the error is that of Euler's step.

    So says Theorem 2 of the paper for small steps. The f of normal data is linear in x, so that it
    holds for all, and two images, one deviation above the mean and one below, stand for the rest.
    """
    i = torch.arange(LEVELS - 1, dtype=torch.int64, device="cpu").repeat_interleave(len(NOISE))
    t, s = (karras(k, LEVELS, method.sigma_min, method.sigma_max) for k in (i, i + 1))
    sigma, below = t[:, None], s[:, None]
    x = NORMAL.mean + (NORMAL.std**2 + sigma**2).sqrt() * NOISE.repeat(LEVELS - 1, 1)
    given: Any = NORMAL.posterior(x, 1.0, sigma)
    right, late = (follows(method, late / (LEVELS - 1)) for late in (0, 1))

    def mean(target: nn.Module = right, other: int = 0) -> Tensor:
        """Return the mean error; `other` shifts the noise of the target's rows."""
        total = torch.zeros_like(x)
        for x0 in (given.mean + given.std, given.mean - given.std):
            noise = (x - x0) / sigma
            batch = Batch(x0, noise, i, Draws(0, i))
            f, wanted = method.ends({"student": right, "target": target}, batch, i, LEVELS)
            if other:
                nearer = x0 + below * noise.roll(other, 0)
                f, wanted = ends(method.denoiser(right), x, t, method.denoiser(target), nearer, s)
            total += (f - wanted) / 2
        return total

    euler = x + (below - sigma) * (x - given.mean) / sigma
    f = method.denoiser(right)
    expected = f(x, t).x0 - f(euler, s).x0
    return (
        end_of_a_call(method),
        exact(
            "mean error minus Euler's",
            mean() - expected,
            other_noise_in_the_target=mean(other=1) - expected,
            target_of_the_next_level=mean(late) - expected,
            x_t_as_its_own_target=-expected,
        ),
    )
