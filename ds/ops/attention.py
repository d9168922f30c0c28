"""Scaled dot-product attention, softmax(q k^T / sqrt(D)) v, alone and with what follows it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds.ops.dispatch.op import Op, Unsupported, triton_kernels


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each of the T queries to all keys, separately for each image and head.

    q, k and v are [N, heads, T, D] of one dtype; so is the result.

    Vaswani et al. 2017, arXiv:1706.03762, Eq. 1.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    return op(q, k, v)


def attention_residual(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor, residual: Tensor
) -> Tensor:
    """Attend, project the heads of each query together, and add: a whole residual branch.

    q, k and v are [N, heads, T, D]; weight is [C, heads * D], or None for heads that are added
    as they are, with C = heads * D; bias is [C], residual and the result are [N, T, C]. All are of
    one dtype but weight and bias, which may be of any other.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    return residual_op(q, k, v, weight, bias, residual)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute in float32, or in float64 for float64 inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v.to(wide)).to(q.dtype)


# Both ops are transparent. Their backends are made of differentiable PyTorch functions, or refuse
# arguments that need a gradient.
_TAKES = """
    q [N, heads, T, D] floating
    k [N, heads, T, D] of q
    v [N, heads, T, D] of q
    D >= 1 : q must be [N, heads, T, D] with D of 1 or more, not of shape {list(q.shape)}
"""
op = Op("attention(Tensor q, Tensor k, Tensor v) -> Tensor", _TAKES, reference)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# PyTorch's own order has flash first, and cuDNN's kernels are faster where they take the arguments:
# on a GPU of 2022 or later, up to D = 128 and, in newer versions, 256. Beyond that flash takes up
# to 256, and neither takes float32.
_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@op.backend("sdpa", "cuda")
def _():
    def launch(q, k, v):
        with sdpa_kernel(_PRIORITY, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)

    return launch


# PyTorch's kernel for CPUs multiplies bfloat16 at the rate of float32; its matrix products have the
# processor's instructions. On one Zen 4 core they were 1.4 to 2 times as fast for heads of this
# size, November 2026, and slower for 16 tokens. All scores are in memory at once, and so few.
_MOST_TOKENS, _LEAST_SIZE = 256, 2**14


@op.backend("products", "cpu")
def _():
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise ImportError("this processor or PyTorch has no products of bfloat16")

    def launch(q, k, v):
        images, heads, tokens, width = q.shape
        if q.dtype != torch.bfloat16 or _needs_gradient(q, k, v):
            raise Unsupported("it takes bfloat16 without a gradient")
        if tokens > _MOST_TOKENS or tokens * width < _LEAST_SIZE:
            raise Unsupported(
                f"it takes up to {_MOST_TOKENS} tokens, and heads of {_LEAST_SIZE} numbers or more"
            )
        q, k, v = (x.reshape(images * heads, tokens, width) for x in (q, k, v))
        none, scale = q.new_empty(()), 1 / math.sqrt(width)
        scores = torch.baddbmm(none, q, k.transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(scores.softmax(-1), v).view(images, heads, tokens, width)

    return launch


# On CPUs PyTorch 2.13 answers a query that holds a NaN with zeros where no key does. In
# self-attention a NaN of a pixel is in its key as well and so reaches every query.
@op.backend("sdpa", "cpu")
def _():
    def launch(q, k, v):
        # Its bfloat16 backward took 9.4 ms where the reference took 1.1, at [128, 1, 16, 64] on
        # one Sapphire Rapids core with PyTorch 2.13, November 2026; its forward is the faster one.
        if q.dtype == torch.bfloat16 and _needs_gradient(q):
            raise Unsupported("it does not take bfloat16 with a gradient")
        # Its result has the strides of q, and so is wrong where elements of q share memory.
        if not q.is_contiguous() and _elements_overlap(q):
            raise Unsupported("it does not take queries whose elements share memory")
        return F.scaled_dot_product_attention(q, k, v)

    return launch


def _elements_overlap(x: Tensor) -> bool:
    """Return whether elements may share memory: a stride does not pass the smaller ones' reach."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor bias, Tensor residual) -> Tensor"
)


def reference_residual(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor, residual: Tensor
) -> Tensor:
    """Compute in float32, or in float64 for float64 inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = reference(q.to(wide), k.to(wide), v.to(wide))
    return _with_residual(heads, weight, bias, residual.to(wide)).to(residual.dtype)


def _with_residual(heads: Tensor, weight: Tensor | None, bias: Tensor, residual: Tensor) -> Tensor:
    """Do what follows attention, in the dtype of the heads."""
    together = heads.transpose(1, 2).flatten(2)  # [N, heads, T, D] -> [N, T, heads * D]
    bias = bias.to(heads.dtype)
    if weight is None:
        return together + bias + residual
    return F.linear(together, weight.to(heads.dtype), bias) + residual


_TAKES_RESIDUAL = f"""
    {_TAKES}
    weight [O, heads * D] floating
    C = heads * D if weight is None else O
    bias [C] floating
    residual [N, T, C] of q
"""
residual_op = Op("attention_residual" + _ARGUMENTS, _TAKES_RESIDUAL, reference_residual)


@residual_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("attention")

    def launch(q, k, v, weight, bias, residual):
        if _needs_gradient(q, k, v, weight, bias, residual):
            raise Unsupported("it has no gradient")
        if reason := kernels.refusal(q, weight):
            raise Unsupported(reason)
        weight = None if weight is None else weight.to(q.dtype)
        return torch.ops.ds.attention_residual_triton(q, k, v, weight, bias, residual)

    return launch


# The compiler sees through the op to what its backends call, and takes this call as it is.
@torch.library.custom_op("ds::attention_residual_triton", mutates_args=(), schema=_ARGUMENTS)
def _triton(q, k, v, weight, bias, residual):
    residual_op.check(q, k, v, weight, bias, residual)
    kernels = triton_kernels("attention")
    if reason := kernels.refusal(q, weight):
        raise ValueError(f"attention_residual_triton: {reason}")
    with torch.cuda.device_of(q):
        return kernels.attention_residual(q, k, v, weight, bias, residual)


@_triton.register_fake
def _(q, k, v, weight, bias, residual):
    return residual.new_empty(residual.shape)


@residual_op.backend("sdpa", "cpu", "cuda")
def _():
    def launch(q, k, v, weight, bias, residual):
        return _with_residual(op.compute(q, k, v), weight, bias, residual)

    return launch
