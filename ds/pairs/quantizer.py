"""How the sample of a pair is stored: uint8 for images, floats for points and latents."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ds.models.images import to_float, to_uint8
from ds.pairs.rows import Row

Quantizer = Literal["round", "floor", "float16", "float32"]
IMAGES = ("round", "floor")  # the quantizers that make uint8


def quantize(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Return samples [N, *shape] in the stored form: channels last, contiguous, on the CPU.

    Raises RuntimeError for numbers that are not finite.
    """
    if not x.isfinite().all():
        raise RuntimeError(
            "generate_pairs: the teacher returned numbers that are not finite; check its weights "
            "and its precision"
        )
    if quantizer in IMAGES:
        return to_uint8(x, quantizer).cpu()
    return x.movedim(1, -1).to(_dtype(quantizer)).cpu().contiguous()


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
