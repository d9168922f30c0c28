"""Numbers as features: the sines and cosines by which a network is told a time or a condition."""

import math

import torch
from torch import Tensor

from ds.nets.base import AbstractNetConfig
from ds.system.config import Positive

Frequencies = tuple[Positive, Positive]  # the highest and the lowest, in radians a unit of time


def sinusoids(
    t: Tensor, channels: int, frequencies: Frequencies = (1.0, 1e-4), *, open_ended: bool = False
) -> Tensor:
    """Embed numbers t [N] as sines, then cosines: float32 [N, channels], or float64 if t is.

    Frequencies fall geometrically from the highest to the lowest, both of which are used; with
    `open_ended` the lowest is left out, as in diffusers by default. The defaults are DDPM's, for
    indices up to 1000. The derivative by t is as large as the highest frequency, so methods that
    differentiate by time need a low one: about 6 for times up to 1.
    """
    half, (highest, lowest) = channels // 2, frequencies
    dtype = torch.promote_types(t.dtype, torch.float32)
    steps, rate = torch.arange(half, dtype=dtype, device=t.device), -math.log(highest / lowest)
    # In the order of either code: another rounding moves a feature by 1e-5 at t = 1000.
    exponents = rate * steps / half if open_ended else rate * (steps / (half - 1))
    angles = t.to(dtype)[:, None] * (highest * torch.exp(exponents))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_conditions(config: AbstractNetConfig, given: dict[str, Tensor]) -> None:
    """Raise ValueError unless a network is given the conditions that it takes, and no others."""
    if given.keys() != {*config.takes}:
        raise ValueError(
            f"{type(config).__name__.removesuffix('Config')}: takes the conditions "
            f"{', '.join(config.takes) or '(none)'}, not {', '.join(given) or '(none)'}; pass them "
            f"by name, or bind them with denoiser.given(...)"
        )


def check_frequencies(where: str, frequencies: Frequencies) -> None:
    """Raise ValueError unless frequencies are positive and the first is the higher one."""
    highest, lowest = frequencies
    if not 0 < lowest <= highest:
        raise ValueError(
            f"{where}frequencies must fall from the highest to a lowest above 0, not {frequencies}"
        )
