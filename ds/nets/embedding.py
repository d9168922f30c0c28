"""Numbers as features: the sines and cosines by which a network is told a time or a condition."""

import math

import torch
from torch import Tensor, nn

from ds.nets.base import CONTEXT, NO_CLASS, AbstractNetConfig
from ds.system.config import Positive

Frequencies = tuple[Positive, Positive]  # the highest and the lowest, in radians a unit of time


def sinusoids(
    t: Tensor,
    channels: int,
    frequencies: Frequencies = (1.0, 1e-4),
    *,
    open_ended: bool = False,
    cosine_first: bool = False,
) -> Tensor:
    """Embed numbers t [N] as sines, then cosines: float32 [N, channels], or float64 if t is.

    With `cosine_first` the cosines come before the sines.

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
    return torch.cat(
        [angles.cos(), angles.sin()] if cosine_first else [angles.sin(), angles.cos()], dim=1
    )


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Return labels [N] as float32 rows of 0 with one 1, [N, classes]; all 0 for NO_CLASS.

    The row of a label that does not exist is NaN: it is no class, and no question to the device.
    """
    row = label[:, None] == torch.arange(classes, dtype=torch.int64, device=label.device)
    outside = (label < NO_CLASS) | (label >= classes)
    return row.float().masked_fill(outside[:, None], math.nan)


def check_conditions(config: AbstractNetConfig, given: dict[str, Tensor], images: int) -> None:
    """Raise ValueError unless a network is given what it takes, for so many images or for one.

    Numbers are floating or whole, [N] each; label is int64 [N]; augment is floating [N, A], and
    context floating [N, *shape].
    """
    name, shapes = type(config).__name__.removesuffix("Config"), config.shapes
    if not {*config.takes} <= given.keys() <= shapes.keys():
        may = f", and may take {', '.join(config.may_take)}" if config.may_take else ""
        raise ValueError(
            f"{name}: takes the conditions {', '.join(config.takes) or '(none)'}{may}, not "
            f"{', '.join(given) or '(none)'}; pass them by name, or bind them with "
            f"denoiser.given(...)"
        )
    for key, value in given.items():
        ends = shapes[key]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name}: {key} is {value!r}; accepted is a tensor {[images, *ends]}, one row for "
                f"each image"
            )
        if value.shape not in ((images, *ends), (1, *ends)):
            raise ValueError(
                f"{name}: {key} is {[*value.shape]} for {images} images; accepted is "
                f"{[images, *ends]}"
            )
        if key == "label" and value.dtype != torch.int64:
            raise ValueError(f"{name}: label is {value.dtype}; accepted is torch.int64")
        if ends and not value.is_floating_point():
            raise ValueError(f"{name}: {key} is {value.dtype}; accepted is a floating dtype")


def beside(x: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Return x [N, C, ...] with the context, where one is told, as further channels."""
    if CONTEXT not in cond:
        return x
    return torch.cat([x, cond[CONTEXT].to(x.dtype).expand(x.shape)], 1)


def check_names(where: str, conditions: tuple[str, ...]) -> None:
    """Raise ValueError unless numbers that a network is told can be passed under their names."""
    for i, name in enumerate(conditions):
        taken = name in ("self", "x", "t", "label", "augment", *conditions[:i])
        if taken or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"{where}conditions holds {name!r}, which is taken or no name; accepted are names "
                f"such as 'h', each once"
            )


def check_frequencies(where: str, frequencies: Frequencies) -> None:
    """Raise ValueError unless frequencies are positive and the first is the higher one."""
    highest, lowest = frequencies
    if not 0 < lowest <= highest:
        raise ValueError(
            f"{where}frequencies must fall from the highest to a lowest above 0, not {frequencies}"
        )
