"""Attention with what follows it in a U-Net: the projection of its heads and the residual.

    P = softmax(q k^T / sqrt(D))            of each image and head, over T keys
    y = residual + concat_heads(P v) weight^T + bias

Without a weight the heads are added as they are: the projection is folded into v.

Vaswani et al. 2017, arXiv:1706.03762, Eq. 1.

A U-Net attends over 16, 64 or 256 pixels, so a whole row of scores fits registers. There is no
running maximum and nothing is rescaled; q, k and v are read in slices of BLOCK_D columns.
A program takes BLOCK_M queries of an image. Without a weight they are of one head. With a weight
they are of all heads in turn, since the projection adds the heads up, and each slice of P v goes
from registers into the next product.

Traffic, in elements for each element of q: 5 (q, k, v and residual read, y written). Separate
attention, projection and addition take 9. The blocks of queries of an image read k, v and weight
again, from the L2 cache. FLOPs of an image: 4 T^2 D a head, and 2 T C D a head with a weight. With
256 queries and channels, that is 101 MFLOP on 0.66 MB of bfloat16, or 154 a byte; an H200 offers
about 180. With one head and more than 256 channels, and with several heads, the compiler makes both
halves of a program compute each P v: 25 % more arithmetic at 256 queries of 512 channels.

Registers limit the sizes: 64 rows of 512 sums, or 128 of 256, beside the scores. `refusal` returns
what does not fit. Half precision spills nothing at the sizes of the paper's networks and with heads
of 64 (benchmarks/results/aot.json); float32 spills up to 216 bytes a thread at 256 tokens. GPU
figures: not measured yet.

Contract: all tensors have one type and are on one device. q, k and v [N, heads, T, D] may have any
strides; they are copied only if the last stride is not 1. Scores, softmax and sums are float32; P
and P v are rounded to the type of v before they are multiplied. Products of float32 take three of
TF32, about 22 bits. No atomics: equal arguments give equal bits, and an image gives the bits that
it would give alone. NaN and infinity turn the queries whose scores they reach into NaN.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 256
MAX_CHANNELS = 512  # of a projection; half of that if the scores leave less room
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _tile(
    ptr,
    stride,
    first_row,
    rows,
    first_column,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load a tile of a matrix whose columns are neighbors, with zeros outside of the matrix."""
    r = (first_row + tl.arange(0, BLOCK_R))[:, None]
    c = (first_column + tl.arange(0, BLOCK_C))[None, :]
    return tl.load(ptr + r * stride + c, mask=(r < rows) & (c < columns), other=0.0)


@triton.jit
def _exponentials(
    q_ptr,
    k_ptr,
    q_stride,
    k_stride,
    first_query,
    scale,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return [BLOCK_M, BLOCK_T], proportional to the softmax, and 1 / the sum of each row."""
    scores = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for d in tl.range(0, WIDTH, BLOCK_D):
        q = _tile(q_ptr, q_stride, first_query, TOKENS, d, WIDTH, BLOCK_M, BLOCK_D)
        k = _tile(k_ptr, k_stride, 0, TOKENS, d, WIDTH, BLOCK_T, BLOCK_D)
        scores = tl.dot(q, k.T, scores, input_precision=PRECISION)
    if TOKENS < BLOCK_T:
        scores = tl.where((tl.arange(0, BLOCK_T) < TOKENS)[None, :], scores, -float("inf"))
    # Scale after the subtraction, which is exact near the maximum, however large that is.
    p = tl.exp2((scores - tl.max(scores, 1)[:, None]) * (scale * LOG2_E))
    return p, 1.0 / tl.sum(p, 1)


@triton.jit
def _store_sum(
    y,
    bias_ptr,
    residual_ptr,
    y_ptr,
    image,
    first_query,
    first_column,
    column,
    inside,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Store y + bias + residual, where y is a tile of [TOKENS, CHANNELS] of an image."""
    row = (first_query + tl.arange(0, BLOCK_M))[:, None]
    offset = image * TOKENS * CHANNELS + (row * CHANNELS + first_column + column[None, :])
    mask = (row < TOKENS) & inside[None, :]
    bias = tl.load(bias_ptr + first_column + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, residual + (y + bias[None, :]), mask=mask)


@triton.jit
def _heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    v_image,
    v_head,
    v_token,
    scale,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Without a weight: BLOCK_M queries of one head."""
    blocks: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    first_query = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks % HEADS).to(tl.int64)
    image = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    p, inverse = _exponentials(
        q_ptr + image * q_image + head * q_head,
        k_ptr + image * k_image + head * k_head,
        q_token,
        k_token,
        first_query,
        scale,
        TOKENS,
        WIDTH,
        PRECISION,
        BLOCK_M,
        BLOCK_T,
        BLOCK_D,
    )
    p = p.to(v_ptr.dtype.element_ty)
    v_ptr += image * v_image + head * v_head
    for d in tl.range(0, WIDTH, BLOCK_D):
        v = _tile(v_ptr, v_token, 0, TOKENS, d, WIDTH, BLOCK_T, BLOCK_D)
        o = tl.dot(p, v, input_precision=PRECISION) * inverse[:, None]
        column = d + tl.arange(0, BLOCK_D)
        _store_sum(
            o,
            bias_ptr,
            residual_ptr,
            y_ptr,
            image,
            first_query,
            head * WIDTH,
            column,
            column < WIDTH,
            TOKENS,
            HEADS * WIDTH,
            BLOCK_M,
        )


@triton.jit
def _projected_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    q_image,
    q_head,
    q_token,
    k_image,
    k_head,
    k_token,
    v_image,
    v_head,
    v_token,
    scale,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With a weight [CHANNELS, HEADS * WIDTH]: BLOCK_M queries of all heads, all channels."""
    blocks: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    first_query = tl.program_id(0) % blocks * BLOCK_M
    image = (tl.program_id(0) // blocks).to(tl.int64)
    q_ptr += image * q_image
    k_ptr += image * k_image
    v_ptr += image * v_image
    y = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(HEADS):
        p, inverse = _exponentials(
            q_ptr,
            k_ptr,
            q_token,
            k_token,
            first_query,
            scale,
            TOKENS,
            WIDTH,
            PRECISION,
            BLOCK_M,
            BLOCK_T,
            BLOCK_D,
        )
        p = p.to(v_ptr.dtype.element_ty)
        for d in tl.range(0, WIDTH, BLOCK_D):
            v = _tile(v_ptr, v_token, 0, TOKENS, d, WIDTH, BLOCK_T, BLOCK_D)
            o = tl.dot(p, v, input_precision=PRECISION) * inverse[:, None]
            w = _tile(weight_ptr, HEADS * WIDTH, 0, CHANNELS, d, WIDTH, BLOCK_C, BLOCK_D)
            y = tl.dot(o.to(w.dtype), w.T, y, input_precision=PRECISION)
        q_ptr += q_head
        k_ptr += k_head
        v_ptr += v_head
        weight_ptr += WIDTH
    column = tl.arange(0, BLOCK_C)
    _store_sum(
        y,
        bias_ptr,
        residual_ptr,
        y_ptr,
        image,
        first_query,
        0,
        column,
        column < CHANNELS,
        TOKENS,
        CHANNELS,
        BLOCK_M,
    )


def refusal(q: Tensor, weight: Tensor | None) -> str | None:
    """Return why the kernels do not take these arguments, or None if they do."""
    _, heads, tokens, _ = q.shape
    if q.dtype not in DTYPES:
        return f"it takes float32, float16 or bfloat16, not {q.dtype}"
    if not 1 <= tokens <= MAX_TOKENS:
        return f"it takes 1 to {MAX_TOKENS} tokens, not {tokens}"
    if weight is None:
        return None
    channels = len(weight)
    if channels > MAX_CHANNELS:
        return f"it takes weights of {MAX_CHANNELS} channels or less, not {channels}"
    crowded = q.dtype == torch.float32 or (heads > 1 and tokens > MAX_TOKENS // 4)
    if crowded and channels > MAX_CHANNELS // 2:
        return (
            f"it takes weights of {MAX_CHANNELS // 2} channels or less in float32, and with several"
            f" heads of more than {MAX_TOKENS // 4} tokens, not {channels}"
        )
    return None


def _blocks(q: Tensor, channels: int | None) -> dict[str, int | str]:
    """Return the largest tiles that fit, and constants, for a weight of this many channels or none.

    Slices narrower than D keep a loop around the scores. Without the loop, the compiler takes the
    scores for the first half of a chain of products and computes them twice.
    """
    _, heads, tokens, width = q.shape
    block_t = max(triton.next_power_of_2(tokens), 16)
    if q.dtype == torch.float32:
        block_m, block_d = 16, 32
    elif channels and (heads > 1 or channels > MAX_CHANNELS // 2):
        block_m, block_d = 64, 32
    else:
        block_m, block_d = 128, 64 if width > 64 else 32
    return {
        "TOKENS": tokens,
        "HEADS": heads,
        "WIDTH": width,
        "PRECISION": "tf32x3"
        if q.dtype == torch.float32
        else "tf32",  # no effect on half precision
        "BLOCK_M": min(block_m, block_t),
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
    }


def attention_residual(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor, residual: Tensor
) -> Tensor:
    """Return y [N, T, C] for q, k and v [N, heads, T, D] that `refusal` accepts.

    weight is [C, heads * D], or None if C = heads * D; bias is [C], residual [N, T, C].
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    images, heads, tokens, width = q.shape
    residual = residual.contiguous()
    y = torch.empty_like(residual)
    inputs = {"q": q, "k": k, "v": v}
    common = {
        **{f"{name}_ptr": x for name, x in inputs.items()},
        **{
            f"{name}_{step}": stride
            for name, x in inputs.items()
            for step, stride in zip(("image", "head", "token"), x.stride(), strict=False)
        },
        "bias_ptr": bias.contiguous(),
        "residual_ptr": residual,
        "y_ptr": y,
        "scale": 1 / math.sqrt(width),
    }
    if weight is None:
        blocks = _blocks(q, None)
        _heads_kernel[(images * heads * triton.cdiv(tokens, blocks["BLOCK_M"]),)](
            **common,
            **blocks,
            num_warps=max(blocks["BLOCK_M"] // 16, 4),
            num_stages=2,
        )
    else:
        channels = len(weight)
        blocks = _blocks(q, channels)
        _projected_kernel[(images * triton.cdiv(tokens, blocks["BLOCK_M"]),)](
            **common,
            **blocks,
            weight_ptr=weight.contiguous(),
            CHANNELS=channels,
            BLOCK_C=max(triton.next_power_of_2(channels), 16),
            num_warps=8,
            num_stages=2,
        )
    return y
