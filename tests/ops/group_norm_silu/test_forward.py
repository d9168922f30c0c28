"""group_norm_silu and group_norm against float64: every backend, data type, layout."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ds.ops
from ds.ops import _native
from tests.ops.group_norm_silu.cases import (
    KERNEL_FLOATS,
    LAYOUTS,
    adversarial,
    both_silu,
    cases,
    check_float8,
    check_forward,
    check_gradients,
    cpu,
    every_backend,
    inputs,
    kernel_floats,
    layouts,
    ours,
    pytorch,
)
from tests.oracle import assert_close, assert_same_bits, gradient_like, poison


@cases
@layouts
@both_silu
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 128, 9, 7), 32),
        ((3, 96, 5, 5), 8),
        ((2, 30, 3, 11), 10),
        ((1, 7, 13, 1), 7),
        ((2, 21, 8, 8), 1),
        ((1, 384, 4, 4), 32),
        ((2, 5, 1, 1), 1),
    ],
)
def test_it_is_as_exact_as_pytorch(backend, dtype, layout, silu, shape, groups):
    check_forward(backend, *inputs(shape, dtype, layout), groups, silu)


def view_of(x, view, channels, height, width):
    """Return [images, channels, height, width], or its transpose, as a view of x or a copy."""
    part = x[:, :channels, :height, :width]
    return {
        "nchw": lambda: part.contiguous(),
        "nhwc": lambda: part.contiguous(memory_format=torch.channels_last),
        "channel slice": lambda: x.contiguous(memory_format=torch.channels_last)[:, 1:-1],
        "pixel slice": lambda: x[:, :channels, 1:, width:],
        "step": lambda: x[:, :channels, :, ::2],
        "transposed": lambda: x[:, :channels].transpose(2, 3),
    }[view]()


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(0, 3),
    groups=st.integers(1, 12),
    per_group=st.integers(1, 13),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    dtype=st.sampled_from(KERNEL_FLOATS),
    view=st.sampled_from(["nchw", "nhwc", "channel slice", "pixel slice", "step", "transposed"]),
    silu=st.booleans(),
    other_grad=st.sampled_from(["as x", "nchw", "nhwc", "expanded"]),
)
@every_backend
def test_any_shape_and_strides_with_gradients(
    backend, images, groups, per_group, size, dtype, view, silu, other_grad
):
    height, width = size
    channels = groups * per_group
    x, weight, bias = inputs((images, channels + 2, height + 1, 2 * width), dtype)
    x = view_of(x, view, channels, height, width)
    weight, bias = weight[:channels], bias[1 : 1 + channels]
    y = check_forward(backend, x, weight, bias, groups, silu)
    for layout in LAYOUTS:
        if x.is_contiguous(memory_format=layout):
            assert y.is_contiguous(memory_format=layout)
    grad = gradient_like(x)
    if other_grad == "expanded":
        grad = grad[..., :1, :1].expand_as(x)
    elif other_grad != "as x":
        grad = grad.contiguous(memory_format=LAYOUTS[other_grad == "nhwc"])
    if images:  # PyTorch's own backward refuses an empty batch
        check_gradients(backend, x, weight, bias, groups, silu, grad)


@cases
@layouts
@both_silu
def test_constant_groups_give_the_bias(backend, dtype, layout, silu):
    x, weight, bias = inputs((2, 32, 5, 5), dtype, layout)
    x = torch.full_like(x, 3.1)
    with ds.ops.use_backend(backend):
        y = ours(x, weight, bias, 8, silu)
    expected = (F.silu(bias.double()) if silu else bias.double()).view(1, -1, 1, 1)
    # The mean of equal values may be off by a few roundings, which 1 / sqrt(eps) = 1000 enlarges.
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = 3.1 * 1000 * 4 * torch.finfo(wide).eps + torch.finfo(dtype).eps
    assert (y.double() - expected).abs().max() <= tolerance


@every_backend
@layouts
@adversarial
def test_adversarial_values_with_gradients(backend, layout, disturb):
    x, weight, bias = inputs((2, 32, 17, 16), torch.float32, layout)
    x = disturb(x).contiguous(memory_format=layout)
    check_forward(backend, x, weight, bias, 8, True)
    check_gradients(backend, x, weight, bias, 8, True)


@layouts
@cpu
def test_the_kernel_keeps_its_precision_far_from_zero(backend, layout):
    """The variance is taken about the mean, so an offset costs no more than rounding x does."""
    x, weight, bias = inputs((2, 32, 33, 31), torch.float32, layout)
    x = x / 2 + 1e4
    with ds.ops.use_backend(backend):
        y = ours(x, weight, bias, 8, False)
    exact = pytorch(x.double(), weight.double(), bias.double(), 8, False)
    assert (y - exact).abs().max() < 5e-6


@cases
@layouts
@both_silu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate_as_in_pytorch(backend, dtype, layout, silu, bad):
    x, weight, bias = inputs((2, 32, 5, 7), dtype, layout)
    x[1, 9, 2, 3] = bad
    bias[1], bias[5], bias[6] = bad, 200, -200
    with ds.ops.use_backend(backend):
        y = ours(x, weight, bias, 8, silu)
    expected = pytorch(x, weight, bias, 8, silu)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(expected))


@cpu
def test_silu_over_its_whole_range(backend, instructions):
    """With a weight of zero the output is silu(bias), whatever x is."""
    bias = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([-3e38, 3e38, 0.0, 1e-40])])
    with ds.ops.use_backend(backend):
        y = ours(torch.zeros(1, len(bias), 1, 1), torch.zeros_like(bias), bias, 1, True).flatten()
    exact = F.silu(bias.double())
    relative = 4e-7 if instructions else 4e-6  # without fused products
    assert ((y - exact).abs() <= relative * exact.abs() + 1e-36).all()


@every_backend
@layouts
@pytest.mark.parametrize("scale", [10.0, 100.0, 3e4])
def test_silu_beyond_the_range_of_the_exponential_with_gradients(backend, layout, scale):
    """Some channels stay within it, others do not, and some leave it by their bias only."""
    x, weight, bias = inputs((2, 64, 5, 3), torch.float32, layout)
    weight[::3] *= scale
    bias[1::5] += 9 * scale
    check_forward(backend, x, weight, bias, 8, True)
    check_gradients(backend, x, weight, bias, 8, True)


@cases
@layouts
def test_every_output_element_is_written(backend, dtype, layout, monkeypatch):
    values = inputs((2, 48, 5, 3), dtype, layout)
    with ds.ops.use_backend(backend):
        expected = torch.ops.ds.group_norm_silu(*values, 4, 1e-6, True)
        poison(monkeypatch)
        assert_same_bits(torch.ops.ds.group_norm_silu(*values, 4, 1e-6, True), expected)


@layouts
@kernel_floats
@pytest.mark.parametrize("level", [0, 1, 2], ids=["portable", "avx2", "avx512"])
@cpu
def test_every_instruction_set_is_as_exact_with_gradients(backend, level, dtype, layout):
    limit = _native.cpu_library().ds_limit_simd
    try:
        if limit(level) != level:
            pytest.skip("this processor does not have the instruction set")
        check_forward(backend, *inputs((2, 84, 7, 9), dtype, layout), 7, True)
        check_gradients(backend, *inputs((2, 84, 7, 9), dtype, layout), 7, True)
    finally:
        limit(3)


@kernel_floats
@every_backend
def test_parameters_may_differ_from_x_in_dtype(backend, dtype):
    x, weight, bias = inputs((2, 32, 5, 5), dtype)
    narrow = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with ds.ops.use_backend(backend):
        for other in (narrow, torch.float64):
            mixed = ours(x, weight.to(other), bias, 8, True)
            exact = pytorch(x.double(), weight.to(other).double(), bias.double(), 8, True)
            assert_close("y", exact, mixed, exact.to(dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 32}, r"channels \(30\) must be a multiple of groups \(32\)"),
        ({"groups": 0}, "channels .* groups"),
        ({"weight": torch.ones(3)}, r"weight must be \[30\]"),
        ({"x": torch.zeros(4)}, "x must be"),
        ({"x": torch.zeros(2, 30, dtype=torch.int32)}, "floating point"),
    ],
    ids=str,
)
def test_errors_name_what_does_not_fit(change, message):
    arguments = {"x": torch.zeros(2, 30), "weight": torch.ones(30), "bias": torch.ones(30)}
    for function in (ds.ops.group_norm_silu, ds.ops.group_norm):
        with pytest.raises(ValueError, match=f"^group_norm_silu: .*{message}"):
            function(**arguments | {"groups": 3} | change)


@layouts
@kernel_floats
def test_in_float8_it_is_the_norm_rounded_once(layout, dtype):
    x, weight, bias = inputs((2, 12, 4, 3), dtype, layout)
    weight[3] = 1e3
    y = ds.ops.group_norm_silu(x, weight, bias, 4, float8=True)
    check_float8(y, x, weight, bias, 4)
    assert y.stride() == x.stride()
    assert y.double().max() == 448
