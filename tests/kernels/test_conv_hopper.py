"""The convolution of sm_90 against float64, with its tiles as they are launched.

The interpreter cuts float32 off to bfloat16 where a GPU rounds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds import ops
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import conv_hopper as kernels
from tests.kernels.test_conv import (
    CONV,
    DEVICE,
    NHWC,
    OPS,
    check_norm,
    exact_and_peer,
    norm_values,
    values,
)
from tests.oracle import assert_close, poisoned

SM_90 = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.each_value,
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
    pytest.mark.usefixtures("products_of_bfloat16"),
    pytest.mark.skipif(not SM_90, reason="needs sm_90"),
]

HOPPER, NORM = OPS._op._load("cuda", "hopper"), OPS._norm_op._load("cuda", "hopper")
GEOMETRIES = "3x3", "1x1", "doubled"
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Let every program take several tiles, of 256 pixels."""
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 2)


def check(arguments: list[Tensor | None]) -> None:
    y = HOPPER(*arguments, 1)
    exact, peer = exact_and_peer(arguments, 1)
    assert y.shape == exact.shape
    assert y.is_contiguous(memory_format=NHWC)
    assert_close("y", exact, y, peer)


# A box of many images, the last of them missing; of four; of a part of one; and what sticks out.
@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [*((geometry, torch.bfloat16) for geometry in GEOMETRIES), ("3x3", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(17, 4, 4), (5, 8, 8), (1, 32, 32), (2, 19, 5)], ids=str)
def test_it_is_as_exact_as_pytorch(geometry, dtype, shape):
    images, *size = shape
    check(values(images, 128, 128, *size, geometry, dtype)[0])


@settings(max_examples=10, deadline=None)
@given(
    images=st.integers(0, 7),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    channels=st.sampled_from([64, 192]),
    out=st.sampled_from([128, 256]),
    geometry=st.sampled_from(GEOMETRIES),
    bias_rows=st.sampled_from(["none", "one", "each", "wide"]),
    add=st.booleans(),
    programs=st.sampled_from([1, 3, 1000]),
)
def test_any_shape_and_strides(images, size, channels, out, geometry, bias_rows, add, programs):
    (x, weight, bias, residual), _ = values(images, channels, out, *size, geometry, torch.float16)
    rows = {"none": None, "one": bias.sum(0), "each": bias, "wide": bias.float() / 3}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(kernels, "_multiprocessors", lambda device: programs)
        check([x.contiguous(), weight, rows[bias_rows], residual if add else None])


def test_memory_may_begin_anywhere():
    (x, weight, bias, residual), _ = values(1, 64, 128, 3, 3, "3x3", torch.bfloat16)

    def moved(t):
        """Return t one element further on in memory, where no box may begin."""
        memory = t.permute(0, 2, 3, 1)
        own = memory.new_empty(memory.numel() + 1)[1:].view(memory.shape).copy_(memory)
        return own.permute(0, 3, 1, 2)

    y = HOPPER(moved(x), moved(weight), bias, moved(residual), 1)
    assert torch.equal(y, HOPPER(x, weight, bias, residual, 1))


def test_the_border_sees_zeros():
    """All ones: a pixel's sum counts the channels of the taps that see one."""
    x, weight = (
        torch.ones(shape, device=DEVICE).half() for shape in ((3, 64, 6, 5), (128, 64, 3, 3))
    )
    down, right = (torch.tensor([2, *[3] * (size - 2), 2], device=DEVICE) for size in (6, 5))
    expected = (64 * down[:, None] * right).half().expand(3, 128, 6, 5)
    assert torch.equal(HOPPER(x, weight, None, None, 1), expected)


@every_geometry
def test_a_nan_stays_in_its_image_where_it_is_seen(geometry):
    """Sixteen images of 4 x 4 pixels share a box."""
    (x, weight, bias, residual), _ = values(16, 64, 128, 4, 4, geometry, torch.float16)
    x[3, 7, 0, 2] = torch.nan
    y, expected = (f(x, weight, bias, residual, 1) for f in (HOPPER, OPS.reference))
    assert expected.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())


@every_geometry
@pytest.mark.parametrize("bad", ["bias", "residual"])
def test_an_infinity_reaches_what_it_is_added_to(geometry, bad):
    arguments, _ = values(5, 64, 128, 4, 4, geometry, torch.float16)
    spoilt = arguments[["x", "weight", "bias", "residual"].index(bad)]
    spoilt[(4, 5, 2, 3)[: spoilt.dim()]] = float("inf")
    y, expected = (f(*arguments, 1) for f in (HOPPER, OPS.reference))
    assert torch.equal(y.isinf(), expected.isinf())
    assert y.isinf().any()


@every_geometry
def test_every_element_is_written_once_and_nothing_behind(geometry, monkeypatch):
    """The same bits twice; the second time in poisoned memory with more of it behind."""
    arguments, _ = values(5, 64, 256, 6, 7, geometry, torch.bfloat16)
    expected, behind, new_empty = HOPPER(*arguments, 1), [], poisoned(Tensor.new_empty)

    def longer(t, shape, **settings):
        if settings:  # the interpreter's own
            return new_empty(t, shape, **settings)
        result, rest = new_empty(t, (2, *shape))
        behind.append(rest)
        return result

    monkeypatch.setattr(Tensor, "new_empty", longer)
    y = HOPPER(*arguments, 1)
    assert torch.equal(y, expected)  # which a NaN is not to itself
    rests = [rest for rest in behind if rest.numel() == y.numel()]
    assert rests and all(rest.isnan().all() for rest in rests)


@every_geometry
def test_an_image_has_the_bits_that_it_has_alone(geometry, monkeypatch):
    """In a box of several; and in tiles of 256 pixels as in those of 128 that many programs get."""
    (x, weight, bias, residual), _ = values(5, 128, 128, 8, 8, geometry, torch.bfloat16)
    y = HOPPER(x, weight, bias, residual, 1)
    own = x[4:].contiguous(), weight, bias[4:], residual[4:].contiguous()
    assert torch.equal(HOPPER(*own, 1), y[4:])
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1000)
    assert torch.equal(HOPPER(x, weight, bias, residual, 1), y)


# From the sums of tiles; of an image that boxes do not cover exactly; in one pass; of phases.
@pytest.mark.parametrize(
    ("size", "geometry"),
    [((32, 64), "3x3"), ((33, 64), "1x1"), ((16, 16), "1x1"), ((16, 36), "doubled")],
    ids=str,
)
@pytest.mark.parametrize("silu", [True, False])
def test_with_a_norm_it_is_as_exact_as_pytorch(size, geometry, silu):
    arguments, _ = values(2, 64, 128, *size, geometry, torch.bfloat16)
    check_norm(arguments, 1, norm_values(128, 32, torch.float32), silu, NORM)


def test_sums_are_those_of_the_result(monkeypatch):
    """Means far from 0, of which a difference of squares would leave noise."""
    (x, weight, bias, residual), _ = values(2, 64, 128, 32, 64, "1x1", torch.float16)
    tables = []
    finish = kernels.norm_from_sums
    monkeypatch.setattr(
        kernels, "norm_from_sums", lambda y, *rest: tables.append((y, rest[1])) or finish(y, *rest)
    )
    norm = norm_values(128, 32, torch.float32)
    NORM(x, weight, bias + 100, residual, 1, *norm, True, True)
    ((y, table),) = tables
    boxes = y.view(2, 8, 4, 64, 128).double().flatten(2, 3)  # 4 rows of 64 pixels
    mean, squares = boxes.mean(2), boxes.var(2, correction=0) * 256
    torch.testing.assert_close(table[:, :, 0].double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(table[:, :, 1].double(), squares, rtol=1e-5, atol=0)


def test_boxes_are_as_wide_as_images_and_halves_are_boxes():
    sizes = {(256, 256): (1, 4, 64), (32, 32): (1, 8, 32), (8, 8): (4, 8, 8), (1, 1): (256, 1, 1)}
    for (height, width), box in sizes.items():
        assert kernels._Box.of(256, height, width) == box
    assert kernels._Box.of(128, 5, 70) == (1, 2, 64)
    assert kernels._Box(1, 2, 64).half() == [1, 1, 1, 64]
    assert kernels._Box(4, 8, 8).half() == [2, 8, 1, 8]
    assert kernels._Box(1, 2, 64).count(3, 5, 70) == 18


@pytest.mark.parametrize(
    ("shape", "geometry", "dtype", "reason"),
    [
        ((1, 64, 128, 4, 4), "3x3/2", torch.float16, "stride 1, not 2"),
        ((1, 64, 128, 4, 4), "3x3", torch.float32, "not torch.float32"),
        ((1, 96, 128, 4, 4), "3x3", torch.float16, "not 96 to 128"),
        ((1, 64, 64, 4, 4), "doubled", torch.float16, "not 64 to 64"),
    ],
)
def test_what_it_does_not_take_it_leaves_to_others(shape, geometry, dtype, reason):
    arguments, stride = values(*shape, geometry, dtype)
    with pytest.raises(Unsupported, match=reason):
        HOPPER(*arguments, stride)
    with pytest.raises(Unsupported, match=reason):
        NORM(*arguments, stride, *norm_values(shape[2], 2, torch.float32), True, True)


def test_it_runs_only_where_it_is_asked_for():
    for op in ("conv", "conv_group_norm_silu"):
        rows = [row.backend for row in ops.table() if (row.op, row.device) == (op, "cuda")]
        assert rows == ["triton", "hopper", "reference"]


@pytest.mark.gpu
@every_geometry
def test_the_op_runs_it_on_a_gpu(geometry):
    arguments, _ = values(40, 128, 256, 16, 16, geometry, torch.bfloat16)
    with ops.use_backend("hopper"):
        y = ops.conv(*arguments)
    assert torch.equal(y, HOPPER(*arguments, 1))
    exact, _ = exact_and_peer(arguments, 1)
    assert_close("y", exact, y, CONV(*arguments, 1), factor=1.1)
