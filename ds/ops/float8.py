"""Numbers of 8 bits: float8_e4m3fn, with 4 bits of exponent and 3 of mantissa, up to 448.

Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433, section 3.
"""

import torch
from torch import Tensor

from ds.ops.dispatch.op import Unsupported

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


def to_float8(x: Tensor) -> Tensor:
    """Round x to float8_e4m3fn; what is too large, infinity also, becomes 448, and NaN stays NaN.

    That is what a GPU's conversion does. PyTorch's makes NaN of it in some versions.
    """
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


def float8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight [O, ...] in float8_e4m3fn, and the scale of each row, float32 [O].

    A row is its narrow numbers, the largest of which is 448, times its scale.
    """
    largest = weight.float().flatten(1).abs().amax(1)
    scale = largest.where(largest > 0, LARGEST) / LARGEST
    return to_float8(weight.float() / scale.view(-1, *[1] * (weight.dim() - 1))), scale


def check_converts(device: torch.device) -> None:
    """Raise Unsupported for a GPU without instructions for these numbers."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise Unsupported(f"float8 needs sm_89 or later, not sm_{found[0]}{found[1]}")
