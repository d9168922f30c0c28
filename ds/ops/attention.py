"""Scaled dot-product attention: softmax(q k^T / sqrt(D)) v."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ds.ops._op import Op, Unsupported


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each of the T queries to all keys, separately for each image and head.

    q, k and v are [N, heads, T, D] of one dtype; so is the result.

    Vaswani et al. 2017, arXiv:1706.03762, Eq. 1.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    if q.dim() != 4 or q.shape[3] < 1:
        raise ValueError(f"attention: q must be [N, heads, T, D], not of shape {list(q.shape)}")
    if not q.shape == k.shape == v.shape:
        shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        raise ValueError(f"attention: q, k and v must have one shape, not {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        dtypes = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"attention: q, k and v must have one floating dtype, not {dtypes}")
    return torch.ops.ds.attention(q, k, v)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute in float32, or in float64 for float64 inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


# Both backends are made of differentiable PyTorch functions: the op needs no gradient of its own.
_op = Op("attention(Tensor q, Tensor k, Tensor v) -> Tensor", reference)


@_op.backend("sdpa", "cuda")
def _():
    return F.scaled_dot_product_attention


# On CPUs PyTorch 2.13 answers a query that holds a NaN with zeros where no key does. In
# self-attention a NaN of a pixel is in its key as well and so reaches every query.
@_op.backend("sdpa", "cpu")
def _():
    def launch(q, k, v):
        # Its bfloat16 backward took 9.4 ms where the reference took 1.1, at [128, 1, 16, 64] on
        # one Sapphire Rapids core with PyTorch 2.13, November 2026; its forward is the faster one.
        if q.dtype == torch.bfloat16 and torch.is_grad_enabled() and q.requires_grad:
            raise Unsupported("it does not take bfloat16 with a gradient")
        return F.scaled_dot_product_attention(q, k, v)

    return launch
