"""How the sample of a pair is stored: uint8 for images, floats for points and latents."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ds.models.images import to_float, to_uint8
from ds.models.model import Model
from ds.pairs.rows import Row

Quantizer = Literal["round", "floor", "float16", "float32"]
IMAGES = ("round", "floor")  # the quantizers that make uint8


def fitting(model: Model, quantizer: Quantizer | None = None) -> Quantizer:
    """Return the quantizer asked for, or by default the one that fits the samples of a model.

    That is "round" for pictures, [C, H, W] with 1 or 3 channels, and "float32" for everything else,
    which uint8 would clip: latents, points and fields. Raises ValueError for an unknown quantizer,
    and for uint8 where the samples are no pictures.
    """
    if quantizer is None:
        return "round" if model.makes_pictures else "float32"
    if quantizer not in get_args(Quantizer):
        raise ValueError(
            f"generate_pairs: quantizer must be one of {', '.join(get_args(Quantizer))}, "
            f"not {quantizer!r}"
        )
    if quantizer in IMAGES and not model.makes_pictures:
        what = "latents" if model.decoder else "no pictures [C, H, W] of 1 or 3 channels"
        raise ValueError(
            f"generate_pairs: {quantizer!r} stores pictures as uint8; samples of the shape "
            f"{list(model.shape)} are {what} and need quantizer='float32' or 'float16'"
        )
    return quantizer


def quantize(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Return samples [N, *shape] in the stored form: channels last, contiguous, on the CPU.

    Raises RuntimeError for numbers that are not finite, and for those that float16 does not hold.
    """
    if not x.isfinite().all():
        raise RuntimeError(
            "generate_pairs: the teacher returned numbers that are not finite; check its weights "
            "and its precision"
        )
    if quantizer in IMAGES:
        return to_uint8(x, quantizer).cpu()
    rows = x.movedim(1, -1).to(_dtype(quantizer)).cpu().contiguous()
    if not rows.isfinite().all():
        raise RuntimeError(
            f"generate_pairs: samples reach {x.abs().max().item():.4g}, beyond {quantizer}; store "
            f"them with quantizer='float32'"
        )
    return rows


def dequantize(rows: Tensor) -> Tensor:
    """Return stored rows as floats, about [-1, 1], [N, *shape]."""
    return to_float(rows) if rows.dtype == torch.uint8 else rows.movedim(-1, 1).float()


def _dtype(quantizer: Quantizer) -> torch.dtype:
    """Return the dtype of stored samples."""
    return torch.uint8 if quantizer in IMAGES else getattr(torch, quantizer)


def row_of(shape: Sequence[int], quantizer: Quantizer) -> Row:
    """Return the stored form of one sample of a shape."""
    c, *rest = shape
    return Row((*rest, c), _dtype(quantizer))
