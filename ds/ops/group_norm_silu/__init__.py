"""GroupNorm, with SiLU or without: y = f(weight * (x - mean) / sqrt(var + eps) + bias)."""

from torch import Tensor

from ds.ops.dispatch.takes import wide
from ds.ops.group_norm_silu.addends import Addends
from ds.ops.group_norm_silu.op import backward, forward, forward_float8, reference

__all__ = [
    "Addends",
    "backward",
    "forward",
    "forward_float8",
    "fused_add_group_norm_silu",
    "group_norm",
    "group_norm_silu",
    "reference",
    "scale_shift",
]


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    float8: bool = False,
) -> Tensor:
    """Normalize each group of channels, scale and shift each channel, then apply SiLU.

    x is [N, C, ...]; weight and bias are [C], or both [N, C]: their own for each image, as those of
    scale_shift are. Statistics are float32, or float64 for a float64 x. The result has the dtype of
    x. It keeps the memory format of a contiguous or channels_last x, and is contiguous otherwise.

    The additions and the concatenation that precede a norm can be fused into it. The op then
    normalizes cat(x + shift + residual, skip), summed in float32 and rounded to the dtype of x:

        shift     [C] or [N, C]: the bias of a convolution, perhaps with a time embedding
        residual  the shape and dtype of x
        skip      [N, S, ...] in the dtype of x; weight and bias then have C + S channels, and a
                  group may have channels of both

    With `float8` the result is float8_e4m3fn, rounded once as in ds.ops.to_float8. It has no
    derivative.

    Wu & He 2018, arXiv:1803.08494, Eq. 1, 2, 6 and 7.

    Raises:
        ValueError: a shape or dtype does not fit, groups does not divide the channels, or a
            derivative of a float8 result is asked for.
    """
    addends = Addends(_one_row_an_image(x, shift), residual, skip)
    if float8:
        return forward_float8(x, weight, bias, groups, eps, False, *addends)[0]
    return forward(x, weight, bias, groups, eps, True, False, *addends)[0]


def fused_add_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    float8: bool = False,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return group_norm_silu of the same arguments, and cat(x + shift + residual, skip).

    The second result is what was normalized, to the bit, for the branch that bypasses the norm.
    Backward adds the gradients of both results in its one pass. Without `silu` the first result is
    the group_norm of the second.

    Raises:
        ValueError: as group_norm_silu; also if shift, residual and skip are all None, or if float8
            is True and silu is False.
    """
    name = "fused_add_group_norm_silu"
    if shift is residual is skip is None:
        raise ValueError(f"{name}: needs shift, residual or skip; without them use group_norm_silu")
    if float8 and not silu:
        raise ValueError(f"{name}: float8 needs silu=True, not False")
    addends = Addends(_one_row_an_image(x, shift), residual, skip)
    if float8:
        return forward_float8(x, weight, bias, groups, eps, True, *addends)
    y, _, _, merged = forward(x, weight, bias, groups, eps, silu, True, *addends)
    return y, merged


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Normalize each group of channels, scale and shift each channel: no SiLU.

    Arguments, result and errors are those of group_norm_silu.
    """
    return forward(x, weight, bias, groups, eps, False)[0]


def scale_shift(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias with which a norm is norm(x) * (1 + scale) + shift.

    weight and bias are [C], scale and shift [N, C], and so are both results, in float32 or, for a
    float64 weight, float64. With them group_norm_silu is adaptive group normalization and SiLU in
    one pass: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3, with y_s = 1 + scale.
    """
    scale = 1 + scale.to(wide(weight.dtype))
    return weight * scale, bias * scale + shift


def _one_row_an_image(x: Tensor, shift: Tensor | None) -> Tensor | None:
    """Expand a shift of [C] to [N, C]. The op checks the rest."""
    return shift.expand(len(x), -1) if isinstance(shift, Tensor) and shift.dim() == 1 else shift
