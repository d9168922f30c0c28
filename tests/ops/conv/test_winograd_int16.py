"""winograd_int16_conv against the convolution in float64, its integers, and its arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ds import ops
from ds.ops import _native

BF16 = torch.bfloat16


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(images, channels, out, h, w, doubled=False):
    x, weight = drawn(images, channels, h, w), drawn(out, channels, 3, 3, seed=1)
    residual = drawn(images, out, h << doubled, w << doubled, seed=2).to(BF16)
    x = x.to(BF16).contiguous(memory_format=torch.channels_last)
    return x, weight / (9 * channels) ** 0.5, drawn(out, seed=3), residual


def direct(x, weight, bias, residual, doubled=False):
    x, weight, bias, residual = (v.double() for v in (x, weight, bias, residual))
    if doubled:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.conv2d(x, weight, bias, padding=1) + residual


def error(found, exact):
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def limited(level, call):
    """Call with the C++ kernels limited to a level of instructions."""
    lib = _native.cpu_library()
    try:
        lib.ds_limit_simd(level)
        with ops.use_backend("cpu"):
            return call()
    finally:
        lib.ds_limit_simd(3)


sizes = st.integers(1, 11)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 5), st.sampled_from([16, 48, 272]), st.sampled_from([16, 32]), sizes, sizes,
    st.booleans(), st.integers(0, 3),
)  # fmt: skip
def test_the_kernel_is_the_convolution_but_for_a_rounding(
    images, channels, out, h, w, doubled, level
):
    x, weight, bias, residual = case(images, channels, out, h, w, doubled)
    packed = ops.winograd_int16_weight(weight)
    found = limited(
        level, lambda: ops.winograd_int16_conv(x, *packed, bias, residual, doubled=doubled)
    )
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == BF16
    if images:
        exact = direct(x, weight, bias, residual, doubled)
        rounded = error(exact.to(BF16), exact)
        assert error(found, exact) <= rounded + 1e-3


def test_integers_round_ten_times_less_than_bfloat16():
    x, weight, bias, residual = case(2, 256, 32, 16, 16)
    exact = direct(x, weight, bias, residual)
    found = ops.winograd_int16_conv(x, *ops.winograd_int16_weight(weight), bias, residual)
    wide = ops.winograd_conv(x, ops.winograd_weight(weight).float(), bias, residual)
    added = (error(found, exact) ** 2 - error(wide, exact) ** 2) ** 0.5
    assert 0 < added < 8e-4 < error(exact.to(BF16), exact)


def test_a_weight_is_what_its_integers_are_worth():
    weight = drawn(32, 48, 3, 3)
    integers, worth = ops.winograd_int16_weight(weight)
    panels = ops.winograd_weight(weight)
    again = integers.transpose(3, 4).flatten(2, 3) * worth.double().unflatten(1, (-1, 1, 16))
    steps = worth.double().unflatten(1, (-1, 1, 16))
    assert ((again - panels).abs() <= 0.51 * steps).all()
    norms = integers.double().square().sum((2, 4)).sqrt()
    assert 60_000 < norms.max() <= 66_032 and integers.abs().max() <= 32767


@pytest.mark.parametrize("level", [0, 3])
def test_no_sum_overflows_where_rows_and_columns_are_parallel(level):
    """Of all inputs these make the largest sums: 32000 times 66000."""
    weight = torch.ones(16, 512, 3, 3)
    x = torch.ones(1, 512, 8, 8, dtype=BF16)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    packed = ops.winograd_int16_weight(weight)
    found = limited(level, lambda: ops.winograd_int16_conv(x, *packed))
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("factor", [0.0, 1e-15, 1e15])
def test_small_and_large_values_keep_their_digits(factor):
    x, weight, *_ = case(1, 16, 16, 8, 8)
    packed, x = ops.winograd_int16_weight(weight), (factor * x).to(BF16)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = limited(3, lambda: ops.winograd_int16_conv(x, *packed)).double()
    assert (found - exact).square().mean() <= 1e-5 * exact.square().mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    x, weight, bias, residual = case(1, 16, 16, 8, 8)
    x[0, 3, 2, 2] = value
    packed = ops.winograd_int16_weight(weight)
    found = limited(3, lambda: ops.winograd_int16_conv(x, *packed, bias, residual))
    assert not found[0, :, 1:4, 1:4].isfinite().any()
    assert found[0, :, 5:, 5:].isfinite().all()


def test_an_image_has_the_bits_that_it_would_have_alone_in_any_memory_format():
    x, weight, bias, residual = case(13, 272, 16, 9, 8)
    packed = ops.winograd_int16_weight(weight)
    found = ops.winograd_int16_conv(x, *packed, bias, residual)
    for i in (0, 7, 12):
        alone = ops.winograd_int16_conv(x[i : i + 1].contiguous(), *packed, bias, residual[i, None])
        assert torch.equal(found[i], alone[0])


def test_the_op_is_sound_and_compiles_as_one_graph():
    x, weight, bias, residual = case(2, 16, 16, 6, 5)
    args = x, *ops.winograd_int16_weight(weight), bias, residual, False
    op = torch.ops.ds.winograd_int16_conv
    torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), op(*args))


@pytest.mark.parametrize("shape", [(4, 2, 1, 1), (4, 3, 3, 3), (4, 2)])
def test_a_weight_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[O, C, 3, 3\].* not of shape \[4, "):
        ops.winograd_int16_weight(torch.zeros(shape))
