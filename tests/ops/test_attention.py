"""attention and attention_residual against float64, for every backend and data type."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops
from ds.ops.attention import op, reference_residual
from ds.training.throughput import flop_counter
from tests.oracle import FLOATS, assert_close

backends = pytest.mark.parametrize("backend", ["reference", "sdpa"])


def inputs(shape, dtype, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    ]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def residual_inputs(shape, dtype, seed=0) -> list[Tensor | None]:
    """For shape N, heads, T, D and C: q, k, v, weight, bias and residual; C = 0 is no weight."""
    images, heads, tokens, width, channels = shape
    q, k, v = inputs(shape[:4], dtype, seed)
    weight = inputs((channels, heads * width), dtype, seed + 1)[0] / math.sqrt(heads * width)
    channels = channels or heads * width
    bias = inputs((channels,), dtype, seed + 2)[0]
    residual = inputs((images, tokens, channels), dtype, seed + 3)[0]
    return [q, k, v, weight if len(weight) else None, bias, residual]


def plain_residual(q, k, v, weight, bias, residual) -> Tensor:
    heads = plain(q, k, v).transpose(1, 2).flatten(2)
    return residual + (heads + bias if weight is None else F.linear(heads, weight, bias))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in ("reference", "sdpa", "default")
        for dtype in FLOATS
        if (backend, dtype) != ("sdpa", torch.bfloat16)  # refused, see below
    ],
)
def test_forward_and_gradients_are_as_exact_as_plain_pytorch(backend, dtype):
    values = inputs((2, 3, 17, 8), dtype)
    grad = inputs((2, 3, 17, 8), dtype, seed=1)[0]

    def run(function, dtype):
        leaves = [value.to(dtype).requires_grad_() for value in values]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    forced = ds.ops.use_backend(backend) if backend != "default" else nullcontext()
    with forced:
        actual = run(ds.ops.attention, dtype)
    results = zip(actual, run(plain, dtype), run(plain, torch.float64), strict=True)
    for i, (a, baseline, exact) in enumerate(results):
        assert_close("y", exact, a, baseline, factor=3 if i else 2)


def test_sdpa_on_a_cpu_takes_bfloat16_without_a_gradient_only():
    values = inputs((2, 1, 16, 8), torch.bfloat16)
    with ds.ops.use_backend("sdpa"):
        y = ds.ops.attention(*values)
        assert_close("y", plain(*(v.double() for v in values)), y, plain(*values))
        with pytest.raises(RuntimeError, match="does not take bfloat16 with a gradient"):
            ds.ops.attention(*(v.requires_grad_() for v in values))


in_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no products of bfloat16",
)


@in_bfloat16
@pytest.mark.parametrize("images", [1, 3])
def test_two_products_are_as_exact_as_plain_pytorch_in_bfloat16(images):
    """And the default, for heads of this size, whatever the batch and the layout."""
    values = [x.transpose(1, 2) for x in inputs((3, 128, 2, 128), torch.bfloat16)]
    with ds.ops.use_backend("products"):
        y = ds.ops.attention(*(x[:images] for x in values))
    assert torch.equal(y, ds.ops.attention(*values)[:images])
    exact = plain(*(x.double() for x in values))[:images]
    assert y.shape == (images, 2, 128, 128)
    assert_close("y", exact, y, plain(*values)[:images])


@in_bfloat16
@pytest.mark.parametrize(
    ("shape", "dtype", "gradient", "message"),
    [
        ((1, 1, 128, 128), torch.float32, False, "bfloat16 without a gradient"),
        ((1, 1, 128, 128), torch.bfloat16, True, "bfloat16 without a gradient"),
        ((1, 1, 257, 128), torch.bfloat16, False, "up to 256 tokens"),
        ((1, 1, 127, 128), torch.bfloat16, False, "heads of 16384 numbers or more"),
    ],
)
def test_two_products_take_what_they_are_faster_for(shape, dtype, gradient, message):
    values = [x.requires_grad_(gradient) for x in inputs(shape, dtype)]
    with ds.ops.use_backend("products"), pytest.raises(RuntimeError, match=message):
        ds.ops.attention(*values)
    assert ds.ops.attention(*values).shape == shape  # by another


@backends
@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 33)),
    layout=st.sampled_from(["contiguous", "heads inside", "from one projection", "transposed"]),
)
def test_any_shape_and_strides(backend, shape, layout):
    images, heads, tokens, width = shape
    q, k, v = {
        "contiguous": lambda: inputs(shape, torch.float32),
        "heads inside": lambda: [
            value.transpose(1, 2) for value in inputs((images, tokens, heads, width), torch.float32)
        ],
        "from one projection": lambda: inputs((images, heads, tokens, 3 * width), torch.float32)[
            0
        ].chunk(3, -1),
        "transposed": lambda: [
            value.mT for value in inputs((images, heads, width, tokens), torch.float32)
        ],
    }[layout]()
    with ds.ops.use_backend(backend):
        y = ds.ops.attention(q, k, v)
    exact = plain(q.double(), k.double(), v.double())
    assert y.shape == exact.shape
    assert_close("y", exact, y, plain(q, k, v))


@backends
def test_large_scores_do_not_overflow(backend):
    q, k, v = (100 * value for value in inputs((1, 1, 9, 4), torch.float32))
    with ds.ops.use_backend(backend):
        y = ds.ops.attention(q, k, v)
    torch.testing.assert_close(
        y.double(), plain(q.double(), k.double(), v.double()), rtol=0, atol=0.02
    )


@backends
def test_a_nan_in_a_key_or_value_propagates(backend):
    q, k, v = inputs((1, 2, 5, 4), torch.float32)
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[0, 1, 3, 2] = bad_v[0, 1, 3, 2] = float("nan")
    with ds.ops.use_backend(backend):
        by_key, by_value = ds.ops.attention(q, bad_k, v), ds.ops.attention(q, k, bad_v)
    assert by_key[0, 1].isnan().all()
    assert not by_key[0, 0].isnan().any()
    assert by_value[0, 1, :, 2].isnan().all()
    assert by_value.isnan().sum() == 5


@backends
def test_opcheck_and_compile(backend):
    leaves = [value.requires_grad_() for value in inputs((2, 2, 6, 4), torch.float32)]
    with ds.ops.use_backend(backend):
        torch.library.opcheck(torch.ops.ds.attention.default, tuple(leaves))
        loss = lambda *args: ds.ops.attention(*args).square().sum()  # noqa: E731
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_gradcheck_in_float64(backend):
    leaves = [value.requires_grad_() for value in inputs((1, 2, 4, 3), torch.float64)]
    with ds.ops.use_backend(backend):
        assert torch.autograd.gradcheck(ds.ops.attention, leaves)


def test_errors_name_what_does_not_fit():
    q, k, v = inputs((1, 2, 5, 4), torch.float32)
    with pytest.raises(ValueError, match=r"q must be"):
        ds.ops.attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"k must be \[1, 2, 5, 4\], not of shape \[1, 2, 4, 4\]"):
        ds.ops.attention(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match=r"k must be torch.float32 as q is, not torch.float64"):
        ds.ops.attention(q, k.double(), v)


def test_on_a_gpu_cudnn_comes_first_and_the_callers_order_comes_back():
    """The choice is that of a GPU; a CPU runs it too, with what it has."""
    order = torch._C._get_sdp_priority_order
    before, seen = order(), []
    launch, values = op._load("cuda", "sdpa"), inputs((1, 2, 5, 4), torch.float32)

    def note(*args):
        seen.append(order())
        return attend(*args)

    with pytest.MonkeyPatch.context() as monkeypatch:
        attend = F.scaled_dot_product_attention
        monkeypatch.setattr(F, "scaled_dot_product_attention", note)
        y = launch(*values)
    cudnn, flash, efficient, math_ = (
        int(getattr(torch.nn.attention.SDPBackend, name))
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    )
    assert seen[0][:4] == [cudnn, flash, efficient, math_]
    assert order() == before
    assert_close("y", plain(*(v.double() for v in values)), y, plain(*values))


def test_the_order_for_a_gpu_breaks_no_graph(monkeypatch):
    launch, values = op._load("cuda", "sdpa"), inputs((1, 2, 5, 4), torch.float32)
    monkeypatch.setitem(op._chains, ("cpu", None), [("sdpa", launch)])
    compiled = torch.compile(ds.ops.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), plain(*values))


every_residual = pytest.mark.parametrize("shape", [(2, 3, 9, 4, 5), (2, 3, 9, 4, 0)], ids=str)


@every_residual
@pytest.mark.parametrize("backend", ["reference", "default"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_residual_and_its_gradients_are_as_exact_as_plain_pytorch(shape, backend, dtype):
    values = residual_inputs(shape, dtype)
    grad = inputs(values[-1].shape, dtype, seed=4)[0]

    def run(function, dtype):
        leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in values]
        y = function(*leaves)
        return [
            y.detach(),
            *torch.autograd.grad(y, [x for x in leaves if x is not None], grad.to(dtype)),
        ]

    forced = ds.ops.use_backend(backend) if backend != "default" else nullcontext()
    with forced:
        actual = run(ds.ops.attention_residual, dtype)
    results = zip(
        actual, run(plain_residual, dtype), run(plain_residual, torch.float64), strict=True
    )
    for i, (a, baseline, exact) in enumerate(results):
        assert_close("y", exact, a, baseline, factor=3 if i else 2)


@every_residual
def test_residual_opcheck_and_compile(shape):
    leaves = [x if x is None else x.requires_grad_() for x in residual_inputs(shape, torch.float32)]
    wanted = [x for x in leaves if x is not None]
    torch.library.opcheck(torch.ops.ds.attention_residual.default, tuple(leaves))
    loss = lambda *args: ds.ops.attention_residual(*args).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(*leaves), wanted)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), wanted)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_residual_takes_parameters_of_another_dtype_as_under_autocast():
    *rest, weight, bias, residual = residual_inputs((2, 1, 17, 8, 8), torch.bfloat16)
    y = ds.ops.attention_residual(*rest, weight.float(), bias.float(), residual)
    assert torch.equal(y, ds.ops.attention_residual(*rest, weight, bias, residual))
    with torch.autocast("cpu", torch.bfloat16):
        y = ds.ops.attention_residual(*rest, weight.float(), bias.float(), residual)
    assert y.dtype == torch.bfloat16


def test_residual_errors_name_what_does_not_fit():
    q, k, v, weight, bias, residual = residual_inputs((1, 2, 5, 4, 8), torch.float32)
    with pytest.raises(ValueError, match=r"attention_residual: k must be \[1, 2, 5, 4\]"):
        ds.ops.attention_residual(q, k[:, :, 1:], v, weight, bias, residual)
    with pytest.raises(ValueError, match=r"weight must be \[8, 8\], not of shape \[8, 7\]"):
        ds.ops.attention_residual(q, k, v, weight[:, 1:], bias, residual)
    with pytest.raises(ValueError, match=r"bias must be \[8\], not of shape \[7\]"):
        ds.ops.attention_residual(q, k, v, weight, bias[1:], residual)
    with pytest.raises(ValueError, match=r"residual must be \[1, 5, 8\], not of shape \[1, 4, 8\]"):
        ds.ops.attention_residual(q, k, v, None, bias, residual[:, 1:])
    with pytest.raises(ValueError, match=r"residual must be torch.float32 .* not torch.float64"):
        ds.ops.attention_residual(q, k, v, weight, bias, residual.double())


@pytest.mark.parametrize("weight", [True, False])
def test_the_flops_of_attention_are_counted_through_our_kernel(weight):
    """Which the counter takes as it is; as many as PyTorch's own functions have."""
    images, heads, tokens, width, channels = 2, 2, 6, 8, 16
    q = torch.zeros(images, heads, tokens, width, device="meta")
    w = torch.zeros(channels, heads * width, device="meta") if weight else None
    arguments = q, q, q, w, torch.zeros(channels), torch.zeros(images, tokens, channels)
    arguments = [a if a is None else a.to("meta") for a in arguments]
    counts = []
    for call in (torch.ops.ds.attention_residual_triton, reference_residual):
        with flop_counter() as counter:
            call(*arguments)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_queries_that_share_memory_are_attended_from():
    """PyTorch's kernel gives its result the strides of the queries."""
    numbers = torch.randn(2, 1, 17, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = numbers.as_strided((2, 1, 17, 32), (1, 1, 1, 1)), numbers.flip(2), numbers.roll(1, 2)
    exact = ds.ops.attention(*(x.double().contiguous() for x in (q, k, v)))
    torch.testing.assert_close(ds.ops.attention(q, k, v).double(), exact, rtol=1e-5, atol=1e-6)
