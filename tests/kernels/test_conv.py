"""The Triton kernel of convolutions against float64, through the backend as ds.ops calls it.

The interpreter cuts float32 off to bfloat16 where a GPU rounds, and multiplies float32 as it is
where a GPU takes three products of TF32.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

import triton
import triton.language as tl

from ds import ops
from ds.engine import Engine, Rewrites
from ds.ops.conv import fused as OPS
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import conv as kernels
from tests.nets.test_unet import build, inputs, relative_rms
from tests.ops.conv.test_fused import (
    GEOMETRIES,
    NHWC,
    case,
    every_geometry,
    narrow,
    norm_of,
    packed,
)
from tests.ops.group_norm_silu.cases import pytorch
from tests.oracle import assert_close, poison, poisoned

# NumPy's, with which the interpreter computes: a GPU says nothing of an infinity.
pytestmark = [
    pytest.mark.each_value,
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("products_of_bfloat16"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONV, NORM = OPS._op._load("cuda", "triton"), OPS._norm_op._load("cuda", "triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """Make tiles so small that every loop has several turns, and a tile none of its images."""
    monkeypatch.setattr(kernels, "_tile", small_tile)


def small_tile(dtype, channels, out, image_rows=0):
    return kernels._Tile(max(32, image_rows), 16, 16, warps=4, stages=1)


@pytest.fixture(params=["in the tile", "from its sums", "apart"])
def place(request, monkeypatch, small_tiles):
    """Force the place where the norm of images of 64 pixels, two tiles, is made."""
    if request.param != "in the tile":
        monkeypatch.setattr(kernels, "TILE_PIXELS", 0)
    if request.param == "from its sums":
        monkeypatch.setattr(kernels, "ONE_PASS_PIXELS", 0)


def values(*shape_geometry_dtype) -> tuple[list[Tensor], int]:
    (x, weight, bias, residual), stride = case(*shape_geometry_dtype)
    weight = packed(weight, shape_geometry_dtype[5])
    return [t.to(DEVICE) for t in (x, weight, bias, residual)], stride


def exact_and_peer(arguments, stride) -> tuple[Tensor, Tensor]:
    """Return the result in float64, and PyTorch's in the dtype of x."""
    x, weight, bias, residual = arguments
    wide = [None if t is None else t.double() for t in arguments]
    peer = OPS._convolve(x, weight, stride)
    peer = peer if bias is None else (peer + bias[..., None, None]).to(x.dtype)
    return OPS.reference(*wide, stride), peer if residual is None else peer + residual


def check(arguments, stride) -> None:
    y = CONV(*arguments, stride)
    exact, peer = exact_and_peer(arguments, stride)
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=NHWC)
    assert_close("y", exact, y, peer)


def norm_values(out, groups, dtype, images=()) -> tuple:
    weight, bias, *settings = norm_of(out, groups, dtype, images)
    return weight.to(DEVICE), bias.to(DEVICE), *settings


def check_norm(arguments, stride, norm, silu=True, op=NORM) -> None:
    """Compare the norm with that of y as rounded, which is compared with what it should be."""
    normed, y = op(*arguments, stride, *norm, silu, True)
    exact, peer = exact_and_peer(arguments, stride)
    assert_close("y", exact, y, peer)
    alone, empty = op(*arguments, stride, *norm, silu, False)
    assert torch.equal(normed, alone)
    assert not len(empty)
    weight, bias, groups, eps = norm
    exact = pytorch(y.double(), weight.double(), bias.double(), groups, silu, eps)
    peer = pytorch(y, weight.to(y.dtype), bias.to(y.dtype), groups, silu, eps)
    assert_close("normed", exact, normed, peer)


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [*((geometry, torch.bfloat16) for geometry in GEOMETRIES), ("3x3", torch.float16)],
    ids=str,
)
def test_it_is_as_exact_as_pytorch(geometry, dtype):
    """Tiles as they are launched: one of each is full, others stick out of every range."""
    check(*values(2, 70, 130, 9, 8, geometry, dtype))


@every_geometry
def test_it_is_as_exact_as_pytorch_in_float32(geometry):
    check(*values(2, 40, 70, 7, 5, geometry, torch.float32))


@settings(max_examples=10, deadline=None)
@given(
    images=st.integers(0, 4),
    channels=st.integers(1, 20),
    out=st.integers(1, 20),
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    geometry=st.sampled_from(list(GEOMETRIES)),
    dtype=st.sampled_from(DTYPES),
    bias_rows=st.sampled_from(["none", "one", "each", "wide"]),
    add=st.booleans(),
)
def test_any_shape_and_strides(images, channels, out, size, geometry, dtype, bias_rows, add):
    (x, weight, bias, residual), stride = values(images, channels, out, *size, geometry, dtype)
    rows = {"none": None, "one": bias.sum(0), "each": bias, "wide": bias.float() / 3}
    x, residual = F.pad(x, (1, 2))[..., 1:-2], residual.contiguous() if add else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(kernels, "_tile", small_tile)
        check([x, weight.contiguous(), rows[bias_rows], residual], stride)


@every_geometry
@pytest.mark.parametrize("tiles", ["as launched", "small"])
@pytest.mark.parametrize("bias_rows", ["none", "one", "each"])
def test_products_of_float8_are_those_of_its_numbers(monkeypatch, geometry, tiles, bias_rows):
    """Products are exact in float32, whose sums are rounded to bfloat16 at the end."""
    if tiles == "small":
        monkeypatch.setattr(kernels, "_tile", lambda *_: kernels._Tile(32, 16, 32, 4, 1))
    arguments, stride = case(2, 70, 20, 9, 8, geometry, torch.float32)
    arguments, scale = narrow(arguments, geometry)
    x, weight, bias, residual = (t.to(DEVICE) for t in arguments)
    bias = {"none": None, "one": bias.sum(0), "each": bias}[bias_rows]
    residual = None if bias_rows == "none" else residual
    found = CONV(x, weight, bias, residual, stride, scale.to(DEVICE))
    wide = None if residual is None else residual.double()
    exact = OPS.reference(x.double(), weight.double(), bias, wide, stride, scale.to(DEVICE))
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=NHWC)
    assert (found - exact).abs().max() <= 2**-7 * exact.abs().max()  # the interpreter cuts off


@pytest.mark.parametrize(
    ("dtype", "silu"), [(DTYPES[0], False), *((dtype, True) for dtype in DTYPES[1:])], ids=str
)
def test_with_a_norm_it_is_as_exact_as_pytorch(place, dtype, silu):
    check_norm(*values(2, 20, 24, 8, 8, "1x1", dtype), norm_values(24, 6, torch.float32), silu)


# Images of 1, 30 and 256 pixels, groups of 1, 3, 8 and 256 channels, of which 3 do not fit a tile.
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((5, 4, 8, 2, 2, "3x3/2"), 8),
        ((3, 4, 8, 5, 6, "1x1"), 1),
        ((1, 4, 16, 16, 16, "1x1"), 2),
        ((2, 4, 12, 5, 6, "3x3"), 4),
        ((2, 4, 256, 2, 3, "1x1"), 1),
        ((2, 4, 8, 3, 4, "doubled"), 2),
    ],
    ids=str,
)
def test_a_norm_of_any_image_and_groups(shape, groups):
    check_norm(*values(*shape, torch.float32), norm_values(shape[2], groups, torch.float32))


def test_a_norm_with_an_affine_of_each_image(place):
    norm = norm_values(8, 2, torch.float32, images=(3,))
    check_norm(*values(3, 4, 8, 5, 6, "1x1", torch.float32), norm)


def test_the_variance_beside_a_large_mean(place):
    """A mean 3000 times the standard deviation, of which a difference of sums would leave noise."""
    (x, weight, bias, _), stride = values(1, 8, 24, 8, 8, "1x1", torch.float32)
    check_norm([x, weight, bias + 3000, None], stride, norm_values(24, 6, torch.float32))


def test_constant_groups_have_no_variance(place):
    (x, weight, bias, _), stride = values(1, 8, 24, 8, 8, "1x1", torch.float32)
    weight, bias = torch.zeros_like(weight), torch.full_like(bias, 0.5)
    norm_weight, norm_bias, *settings = norm_values(24, 6, torch.float32)
    normed, _ = NORM(x, weight, bias, None, stride, norm_weight, norm_bias, *settings, False, True)
    torch.testing.assert_close(normed, norm_bias[:, None, None].expand_as(normed))


@pytest.mark.parametrize(
    ("geometry", "where", "bad"),
    [
        *[(geometry, "x", float("nan")) for geometry in GEOMETRIES],
        *[("1x1", where, bad) for where in ("residual", "bias") for bad in (float("nan"), INF)],
        *[("3x3", "x", bad) for bad in (INF, -INF)],
    ],
)
def test_nan_and_infinity_reach_what_they_are_terms_of(small_tiles, geometry, where, bad):
    arguments, stride = values(2, 7, 12, 6, 4, geometry, torch.float32)
    spoilt = arguments[["x", "weight", "bias", "residual"].index(where)]
    spoilt[(1, 5, 2, 3)[: spoilt.dim()]] = bad
    y, expected = CONV(*arguments, stride), OPS.reference(*arguments, stride)
    assert not expected.isfinite().all()
    for is_so in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(is_so(y), is_so(expected))


def test_a_nan_stays_in_its_group(place):
    arguments, stride = values(1, 8, 24, 8, 8, "1x1", torch.float32)
    arguments[3][0, 9, 3, 3] = float("nan")
    normed, _ = NORM(*arguments, stride, *norm_values(24, 6, torch.float32), True, True)
    expected = torch.zeros_like(normed, dtype=torch.bool)
    expected[0, 8:12] = True
    assert torch.equal(normed.isnan(), expected)


def test_every_element_is_written_with_the_same_bits_twice(place, monkeypatch):
    arguments, stride = values(1, 8, 24, 8, 8, "1x1", torch.float32)
    doubled, _ = values(2, 4, 7, 3, 5, "doubled", torch.float32)
    norm = norm_values(24, 6, torch.float32)

    def run():
        return *NORM(*arguments, stride, *norm, True, True), CONV(*doubled, 1)

    before = run()
    poison(monkeypatch)
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    for a, b in zip(run(), before, strict=True):
        assert torch.equal(a, b)  # which a NaN is not to itself


@every_geometry
def test_bits_depend_on_neither_batch_nor_memory_format(small_tiles, geometry):
    """The third image lies in two tiles but with stride 2; alone it lies in one, contiguous."""
    (x, weight, bias, residual), stride = values(3, 5, 12, 4, 3, geometry, torch.bfloat16)
    norm = *norm_values(12, 3, torch.float32), True, True
    y = CONV(x, weight, bias, residual, stride)
    normed, _ = NORM(x, weight, bias, residual, stride, *norm)
    own = x[2:].contiguous(), weight.contiguous(), bias[2:], residual[2:].contiguous()
    assert torch.equal(CONV(*own, stride), y[2:])
    assert torch.equal(NORM(*own, stride, *norm)[0], normed[2:])


def test_a_program_writes_its_own_tile_and_nothing_else():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    (x, weight, _, _), _ = values(2, 3, 20, 6, 6, "3x3", torch.float32)
    y = torch.full((2, 6, 6, 20), float("nan"), device=DEVICE)
    kernels._conv_kernel[(1,)](
        x.permute(0, 2, 3, 1),
        weight.permute(0, 2, 3, 1),
        None,
        None,
        y,
        None,
        None,
        None,
        None,
        None,
        2,
        6,
        6,
        6,
        6,
        3,
        20,
        0.0,
        KERNEL=3,
        STRIDE=1,
        BIAS_ROWS=False,
        PRECISION="tf32x3",
        PER_GROUP=None,
        SILU=None,
        IMAGE_ROWS=None,
        BLOCK_M=16,
        BLOCK_N=16,
        BLOCK_K=16,
    )
    written = torch.zeros(72, 20, dtype=torch.bool, device=DEVICE)
    written[:16, :16] = True
    assert torch.equal(~y.isnan().view(72, 20), written)


@triton.jit
def _pixels_kernel(ptr, images, pixels, tile, BLOCK_M: tl.constexpr):
    first, image, pixel, valid = kernels._pixels(images, pixels, pixels, tile, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    tl.store(ptr + m, (first + image).to(tl.int64))
    tl.store(ptr + BLOCK_M + m, pixel.to(tl.int64))
    tl.store(ptr + 2 * BLOCK_M + m, valid.to(tl.int64))


def test_pixels_are_counted_beyond_32_bits():
    """100 images short of 2**30, of 7 pixels each: 6 * 10**9 of them come before this tile."""
    images, pixels, tile = 2**30 - 100, 7, 46_976_200
    found = torch.empty(3, 128, dtype=torch.int64, device=DEVICE)
    _pixels_kernel[(1,)](found, images, pixels, tile, BLOCK_M=128)
    row = tile * 128 + torch.arange(128, device=DEVICE)
    assert torch.equal(found[0], row // pixels)
    assert torch.equal(found[1], row % pixels)
    assert torch.equal(found[2], (row // pixels < images).long())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let the ops choose as they do there."""
    for op, kernel in ((OPS._op, CONV), (OPS._norm_op, NORM)):
        monkeypatch.setitem(op._chains, (DEVICE, None), [("triton", kernel)])


@torch.no_grad()
def test_the_ops_are_sound(as_on_a_gpu, small_tiles):
    arguments, stride = values(2, 4, 8, 4, 5, "3x3/2", torch.bfloat16)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.ds.conv.default, (*arguments, stride), test_utils=tests)
    norm = *norm_values(8, 2, torch.float32), True, False
    op = torch.ops.ds.conv_group_norm_silu.default
    torch.library.opcheck(op, (*arguments, stride, *norm), test_utils=tests)


@torch.no_grad()
def test_they_compile_as_one_graph(as_on_a_gpu, small_tiles):
    (x, weight, bias, residual), _ = values(2, 8, 8, 4, 4, "3x3", torch.float32)
    norm = norm_values(8, 2, torch.float32)

    def both(x):
        y = ops.conv(x * 2, weight, bias, residual)
        return ops.conv_group_norm_silu(y, weight, *norm, bias=bias)

    for found, expected in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True
    ):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_an_engine_runs_on_it(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_tile", lambda *_: kernels._Tile(64, 16, 16, warps=4, stages=1))
    net, (x, _) = build(), inputs()
    x, t = x[:1], torch.full((1,), 37)
    engine = Engine(net, [37], rewrites=Rewrites(winograd=False))
    assert relative_rms(engine(x, t), net.double()(x.double(), t)) < 1e-5


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        ((4, 4), torch.float64, "float32, float16, bfloat16 or float8_e4m3fn, not torch.float64"),
        ((2**15, 2**14), torch.bfloat16, "32 bits .* too few for"),
    ],
)
def test_what_it_does_not_take_it_leaves_to_others(size, dtype, reason):
    x, weight = torch.empty(1, 4, *size, dtype=dtype, device="meta"), torch.zeros(8, 4, 1, 1)
    with pytest.raises(Unsupported, match=reason):
        CONV(x, weight, None, None, 1)
    with pytest.raises(Unsupported, match=reason):
        NORM(x, weight, None, None, 1, *norm_values(8, 2, torch.float32), True, True)


@pytest.mark.gpu
def test_the_op_runs_it_on_a_gpu():
    arguments, stride = values(2, 64, 128, 16, 16, "3x3", torch.bfloat16)
    assert torch.equal(ops.conv(*arguments, stride=stride), CONV(*arguments, stride))
