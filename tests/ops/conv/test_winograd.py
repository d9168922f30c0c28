"""winograd_conv against the convolution in float64, and its arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ds import ops
from ds.ops import _native
from ds.ops.conv import winograd


def case(images, channels, out, h, w, dtype, doubled=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, channels, h, w), (out, channels, 3, 3), (out,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weight = weight / (9 * channels) ** 0.5
    residual = torch.randn(images, out, h << doubled, w << doubled, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), weight, bias, residual


def direct(x, weight, bias, residual, doubled=False):
    if doubled:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(x, weight, bias, padding=1) + residual


def error(found, exact):
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def wide(*tensors):
    return [tensor.double() for tensor in tensors]


sizes = st.integers(1, 11)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), sizes, sizes, sizes, sizes, st.booleans())
def test_the_reference_is_the_convolution(images, channels, out, h, w, doubled):
    x, weight, bias, residual = case(images, channels, out, h, w, torch.float64, doubled)
    found = ops.winograd_conv(x, ops.winograd_weight(weight), bias, residual, doubled=doubled)
    exact = direct(x, weight, bias, residual, doubled)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5), st.sampled_from([16, 48]), st.sampled_from([16, 32]), sizes, sizes,
    st.booleans(), st.sampled_from([0, 1, 2]),
)  # fmt: skip
def test_the_kernel_is_as_exact_as_the_convolution(images, channels, out, h, w, doubled, simd):
    x, weight, bias, residual = case(images, channels, out, h, w, torch.float32, doubled)
    exact = direct(*wide(x, weight, bias, residual), doubled)
    packed = ops.winograd_weight(weight).float()
    lib = _native.cpu_library()
    lib.ds_limit_simd(simd)
    try:
        with ops.use_backend("cpu"):
            found = ops.winograd_conv(x, packed, bias, residual, doubled=doubled)
            alone = ops.winograd_conv(x, packed, doubled=doubled)
    finally:
        lib.ds_limit_simd(3)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if images:
        peer = error(direct(x, weight, bias, residual, doubled), exact)
        # Each pixel is a sum of 36 products: with few channels that is what rounds.
        assert error(found, exact) <= 2 * peer + 4 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(alone + bias[:, None, None] + residual, found, rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.sampled_from([16, 48]), sizes, sizes, st.booleans(),
       st.sampled_from([0, 1, 2]))  # fmt: skip
def test_bfloat16_rounds_the_result_alone(images, channels, h, w, doubled, simd):
    x, weight, bias, residual = case(images, channels, 32, h, w, torch.bfloat16, doubled)
    packed = ops.winograd_weight(weight).float()
    wide = ops.winograd_conv(x.float(), packed, bias.float(), residual.float(), doubled=doubled)
    lib = _native.cpu_library()
    lib.ds_limit_simd(simd)
    try:
        with ops.use_backend("cpu"):
            found = ops.winograd_conv(x, packed, bias.float(), residual, doubled=doubled)
    finally:
        lib.ds_limit_simd(3)
    assert found.dtype == torch.bfloat16
    # A sum near the middle of two neighbours may go either way.
    torch.testing.assert_close(found.float(), wide, rtol=2**-8, atol=1e-5)


def test_many_channels_and_blocks_of_tiles_are_as_exact_as_the_convolution():
    args = case(5, 272, 64, 32, 32, torch.float32)
    exact = direct(*wide(*args))
    x, weight, bias, residual = args
    found = ops.winograd_conv(x, ops.winograd_weight(weight).float(), bias, residual)
    assert error(found, exact) <= 2 * error(direct(*args), exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    x, weight, bias, residual = case(1, 16, 16, 8, 8, torch.float32)
    x[0, 3, 2, 2] = value
    found = ops.winograd_conv(x, ops.winograd_weight(weight).float(), bias, residual)
    assert not found[0, :, 1:4, 1:4].isfinite().any()
    assert found[0, :, 5:, 5:].isfinite().all()


def test_the_same_arguments_give_the_same_bits_in_any_memory_format():
    x, weight, bias, residual = case(3, 16, 32, 8, 12, torch.float32)
    packed = ops.winograd_weight(weight).float()
    found = ops.winograd_conv(x, packed, bias, residual)
    again = ops.winograd_conv(x.contiguous(), packed, bias, residual.contiguous())
    assert torch.equal(found, again)


def test_an_image_has_the_bits_that_it_would_have_alone():
    x, weight, bias, residual = case(13, 272, 16, 9, 8, torch.float32)
    packed = ops.winograd_weight(weight).float()
    found = ops.winograd_conv(x, packed, bias, residual)
    for i in (0, 7, 12):
        alone = ops.winograd_conv(x[i : i + 1], packed, bias, residual[i : i + 1])
        assert torch.equal(found[i], alone[0])


def test_the_op_is_sound():
    x, weight, bias, residual = case(2, 16, 16, 6, 5, torch.float32)
    args = x, ops.winograd_weight(weight).float(), bias, residual, False
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ds.winograd_conv.default, args, test_utils=tests)


@torch.no_grad()
def test_it_compiles_as_one_graph():
    x, weight, bias, residual = case(2, 16, 16, 8, 8, torch.float32)
    packed = ops.winograd_weight(weight).float()
    compiled = torch.compile(ops.winograd_conv, fullgraph=True, backend="aot_eager")
    expected = ops.winograd_conv(x, packed, bias, residual)
    assert torch.equal(compiled(x, packed, bias, residual), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 2, 4)}, r"x must be \[N, C, H, W\]"),
        (
            {"weight": torch.zeros(36, 1, 3, 4)},
            r"weight must be \[36, 1, 2, 4\], not of .*\[36, 1, 3, 4\]",
        ),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\], not of shape \[3\]"),
        ({"residual": torch.zeros(1, 4, 5, 4)}, r"residual must be \[1, 4, 4, 4\]"),
        (
            {"bias": torch.zeros(4).half()},
            "bias must be torch.float32 for x of torch.float32, not ",
        ),
        ({"x": torch.zeros(1, 2, 4, 4).long()}, "x must be floating point .* not torch.int64"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(change, message):
    args = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(36, 1, 2, 4)} | change
    with pytest.raises(ValueError, match=f"^winograd_conv: .*{message}"):
        ops.winograd_conv(**args)


def test_a_weight_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must be \[O, C, 3, 3\], not of shape \[4, 2, 1, 1\]"):
        ops.winograd_weight(torch.zeros(4, 2, 1, 1))


def test_a_weight_is_transformed_in_float64_and_rounded_once():
    _, weight, _, _ = case(1, 32, 48, 4, 4, torch.float32)
    packed, exact = ops.winograd_weight(weight, torch.float32), ops.winograd_weight(weight)
    assert packed.shape == exact.shape == (36, 3, 32, 16)
    assert ((packed.double() - exact).abs() <= 2.0**-24 * exact.abs()).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 4, 16, 24, 25, 64, 512])
def test_tasks_are_spread_over_the_threads(count, threads):
    block, width = winograd.task(count, 256, threads)
    tasks = -(-count // block) * -(-256 // width)
    assert 1 <= block <= 24 and width % 16 == 0 and (count <= 24 or tasks >= min(threads, 2))
    assert tasks in (0, min(threads, 16)) if count <= 24 else tasks * block * width >= count * 256


def test_threads_do_not_move_a_bit():
    x, weight, bias, residual = case(1, 32, 48, 16, 12, torch.float32)
    packed, found, before = ops.winograd_weight(weight).float(), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.winograd_conv(x, packed, bias, residual))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("images", [1, 30])
def test_no_channels_of_the_result_are_none(images):
    assert ops.winograd_conv(torch.zeros(images, 16, 4, 4), torch.zeros(36, 0, 16, 16)).numel() == 0
