"""conv and conv_group_norm_silu against float64, their arguments, and what they promise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds import ops
from tests.oracle import FLOATS, assert_close

NHWC = torch.channels_last
# Height and width of the weight, and stride; 2 is that of phase_weight.
GEOMETRIES = {"3x3": (3, 1), "1x1": (1, 1), "3x3/2": (3, 2), "doubled": (2, 1)}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)
sizes = st.integers(1, 9)


def result_shape(images, out, h, w, geometry) -> tuple[int, ...]:
    kernel, stride = GEOMETRIES[geometry]
    return (images, out, 2 * h, 2 * w) if kernel == 2 else (images, out, h // stride, w // stride)


def case(images, channels, out, h, w, geometry, dtype, seed=0) -> tuple[list[Tensor], int]:
    """Return x, weight as a network has it, bias of each image, and residual; and the stride."""
    generator = torch.Generator().manual_seed(seed)
    kernel, stride = GEOMETRIES[geometry]
    kernel = 3 if kernel == 2 else kernel
    shapes = (
        (images, channels, h, w), (out, channels, kernel, kernel), (images, out),
        result_shape(images, out, h, w, geometry),
    )  # fmt: skip
    x, weight, *rest = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    weight = weight / (kernel**2 * channels) ** 0.5
    x, weight = (t.contiguous(memory_format=NHWC) for t in (x, weight))
    return [x, weight, *rest], stride


def packed(weight: Tensor, geometry: str) -> Tensor:
    if geometry != "doubled":
        return weight
    return ops.phase_weight(weight).to(weight.dtype).contiguous(memory_format=NHWC)


def direct(x, weight, bias, residual, geometry) -> Tensor:
    """Compute as a network does."""
    if geometry == "doubled":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if geometry == "3x3/2":
        y = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)
    else:
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    y = y if bias is None else y + bias[..., None, None]
    return y if residual is None else y + residual


def norm_of(out, groups, dtype, images=()) -> tuple:
    """Return arguments of a norm; with (N,) for images, its weight and bias are [N, out]."""
    generator = torch.Generator().manual_seed(9)
    weight, bias = (torch.randn(*images, out, generator=generator).to(dtype) for _ in range(2))
    return weight, bias, groups, 1e-6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 3), sizes, sizes, st.integers(2, 9), st.integers(2, 9),
    st.sampled_from(list(GEOMETRIES)), st.sampled_from(["none", "one", "each"]), st.booleans(),
)  # fmt: skip
def test_it_is_the_convolution(images, channels, out, h, w, geometry, bias_rows, add):
    (x, weight, bias, residual), stride = case(images, channels, out, h, w, geometry, torch.float64)
    bias = {"none": None, "one": bias.sum(0), "each": bias}[bias_rows]
    residual = residual if add else None
    found = ops.conv(x, packed(weight, geometry), bias, residual, stride=stride)
    assert found.shape == result_shape(images, out, h, w, geometry)
    assert found.is_contiguous(memory_format=NHWC)
    exact = direct(x, weight, bias, residual, geometry)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@every_geometry
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_it_is_as_exact_as_pytorch(geometry, dtype):
    arguments, stride = case(2, 20, 12, 6, 5, geometry, dtype)
    wide = [t.double() for t in arguments]
    weight = ops.phase_weight(wide[1]) if geometry == "doubled" else wide[1]
    found = ops.conv(
        wide[0].to(dtype), weight.to(dtype), *arguments[2:], stride=stride
    )  # fmt: skip
    assert_close("found", direct(*wide, geometry), found, direct(*arguments, geometry))


@every_geometry
@pytest.mark.parametrize(("silu", "images"), [(True, ()), (False, ()), (True, (3,))])
def test_with_a_norm_it_is_the_norm_of_the_convolution(geometry, silu, images):
    (x, weight, bias, residual), stride = case(3, 8, 12, 6, 4, geometry, torch.bfloat16)
    weight, norm = packed(weight, geometry), norm_of(12, 3, torch.float32, images)
    added = {"bias": bias.float(), "residual": residual, "stride": stride}
    with ops.use_backend("reference"):
        y = ops.conv(x, weight, **added)
        expected = (ops.group_norm_silu if silu else ops.group_norm)(y, *norm)
        normed, kept = ops.conv_group_norm_silu(x, weight, *norm, **added, silu=silu)
        alone, nothing = ops.conv_group_norm_silu(x, weight, *norm, **added, silu=silu, keep=False)
    assert torch.equal(kept, y)
    assert torch.equal(normed, expected)
    assert torch.equal(alone, expected)
    assert nothing is None


def narrow(arguments, geometry) -> tuple[list[Tensor], Tensor]:
    """Return x and weight in float8, bias, and residual in bfloat16; and the weight's scale."""
    x, weight, bias, residual = arguments
    weight, scale = ops.float8_weight(packed(weight, geometry))
    weight = weight.contiguous(memory_format=NHWC)
    return [ops.to_float8(x), weight, bias, residual.bfloat16()], scale


@every_geometry
def test_products_of_float8_are_those_of_its_numbers(geometry):
    arguments, stride = case(2, 20, 12, 6, 5, geometry, torch.float32)
    (x, weight, bias, residual), scale = narrow(arguments, geometry)
    found = ops.conv(x, weight, bias, residual, stride=stride, scale=scale)
    weight = weight.double() * scale.double().view(-1, 1, 1, 1)
    exact = ops.conv(x.double(), weight, bias, residual.double(), stride=stride)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=NHWC)
    assert (found - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding


@pytest.mark.parametrize("geometry", ["3x3", "doubled"])
@torch.no_grad()
def test_the_ops_are_sound(geometry):
    (x, weight, bias, residual), stride = case(2, 4, 8, 6, 5, geometry, torch.float32)
    arguments = x, packed(weight, geometry), bias, residual, stride
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.ds.conv.default, arguments, test_utils=tests)
    float8, scale = narrow(case(2, 4, 8, 6, 5, geometry, torch.float32)[0], geometry)
    torch.library.opcheck(
        torch.ops.ds.conv.default, (*float8, stride, scale), test_utils=tests[1:]
    )  # opcheck itself multiplies arguments for the other, which PyTorch does not in float8
    arguments = (*arguments, *norm_of(8, 2, torch.float32), True, geometry == "3x3")
    op = torch.ops.ds.conv_group_norm_silu.default
    torch.library.opcheck(op, arguments, test_utils=tests)


@torch.no_grad()
def test_they_compile_as_one_graph():
    (x, weight, bias, residual), stride = case(2, 4, 8, 6, 5, "3x3/2", torch.float32)
    norm = norm_of(8, 2, torch.float32)

    def both(x):
        y = ops.conv(x * 2, weight, bias, residual, stride=stride)
        return ops.conv_group_norm_silu(y, weight[:, :1].expand(8, 8, 3, 3), *norm)

    for found, expected in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 2, 3, 1)}, r"weight must be .*, not of shape \[4, 2, 3, 1\]"),
        ({"weight": torch.zeros(6, 2, 2, 2)}, "rows of a 2x2 weight must be 4 O, not 6"),
        ({"x": torch.zeros(1, 3, 4, 4)}, r"x must be .* weight's 2 channels, not .*\[1, 3, 4, 4\]"),
        ({"x": torch.zeros(1, 2, 4)}, r"x must be \[N, C, H, W\]"),
        ({"x": torch.zeros(1, 2, 0, 4)}, "at least 1 x 1 pixels"),
        ({"x": torch.zeros(1, 2, 1, 4), "stride": 2}, "at least 2 x 2 pixels"),
        ({"stride": 3}, "stride must be 1, or 2 for a 3x3 weight, not 3 for 3x3"),
        ({"stride": 2, "weight": torch.zeros(4, 2, 1, 1)}, "not 2 for 1x1"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\] or \[1, 4\], not of shape \[3\]"),
        ({"bias": torch.zeros(4).int()}, "floating point .* not torch.int32"),
        ({"residual": torch.zeros(1, 4, 5, 4)}, r"residual must be \[1, 4, 4, 4\]"),
        (
            {"x": torch.zeros(1, 2, 4, 4).half()},
            "weight must be torch.float16 as x is, not torch.float32",
        ),
        ({"groups": 3}, r"channels \(4\) must be a multiple of groups \(3\)"),
        ({"norm_weight": torch.zeros(3)}, r"weight must be \[4\]"),
        ({"norm_bias": torch.zeros(1, 4)}, r"must have one shape, not \[4\] and \[1, 4\]"),
        ({"norm_bias": torch.zeros(4).int()}, "floating point .* not torch.int32"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(change, message):
    plain = {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(4, 2, 3, 3)}
    norm = {"norm_weight": torch.ones(4), "norm_bias": torch.zeros(4), "groups": 2}
    with pytest.raises(ValueError, match=f"^conv_group_norm_silu: .*{message}"):
        ops.conv_group_norm_silu(**plain | norm | change)
    if not change.keys() & norm.keys():
        with pytest.raises(ValueError, match=f"^conv: .*{message}"):
            ops.conv(**plain | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, r"scale must be \[4\] for x of torch.float8_e4m3fn"),
        ({"scale": torch.ones(3)}, r"scale must be \[4\], not of shape \[3\]"),
        ({"scale": torch.ones(4).int()}, "floating point .* not torch.int32"),
        ({"x": torch.zeros(1, 2, 4, 4)}, "weight must be torch.float32 as x is, not torch.float8"),
        ({"residual": torch.zeros(1, 4, 4, 4)}, "residual must be torch.bfloat16 .*float32"),
        (
            {"x": torch.zeros(1, 2, 4, 4), "weight": torch.zeros(4, 2, 3, 3)},
            "scale is for x of torch.float8_e4m3fn only, not for torch.float32",
        ),
    ],
)
def test_what_does_not_fit_float8_is_one_clear_error(change, message):
    x, (weight, scale) = torch.zeros(1, 2, 4, 4), ops.float8_weight(torch.zeros(4, 2, 3, 3))
    plain = {"x": ops.to_float8(x), "weight": weight, "scale": scale}
    ops.conv(**plain)
    with pytest.raises(ValueError, match=f"^conv: .*{message}"):
        ops.conv(**plain | change)


def test_a_norm_is_not_made_of_products_of_float8():
    weight, _ = ops.float8_weight(torch.zeros(4, 2, 3, 3))
    with pytest.raises(
        ValueError, match=r"^conv_group_norm_silu: x must be .* not .*float8_e4m3fn"
    ):
        ops.conv_group_norm_silu(
            ops.to_float8(torch.zeros(1, 2, 4, 4)), weight, *norm_of(4, 2, torch.float32)
        )


def test_phase_weight_takes_3x3_only():
    with pytest.raises(ValueError, match=r"must be \[O, C, 3, 3\], not of shape \[4, 2, 1, 1\]"):
        ops.phase_weight(torch.zeros(4, 2, 1, 1))
