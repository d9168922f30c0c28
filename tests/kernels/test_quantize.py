"""The Triton kernel of quantize: the formula to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds import ops
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import quantize as kernels
from ds.ops.quantize import _op
from tests.kernels import DEVICE, DTYPES, NHWC
from tests.ops.test_quantize import ROUNDINGS, border, formula, values

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
both_roundings = pytest.mark.parametrize("rounding", ROUNDINGS)


def run(x, rounding):
    return _op._load("cuda", "triton")(x.to(DEVICE), rounding == "floor").cpu()


@both_roundings
@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=["nchw", "nhwc"])
def test_levels_at_their_borders(rounding, layout):
    x = border(torch.float32).contiguous(memory_format=layout)
    assert torch.equal(run(x, rounding), formula(x, rounding))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 2), st.integers(1, 5), st.integers(0, 40), st.sampled_from([1, 2, 33])
    ),
    dtype=st.sampled_from(DTYPES),
    view=st.sampled_from(["nchw", "nhwc", "channel slice", "transposed", "one dimension"]),
    rounding=st.sampled_from(ROUNDINGS),
)
def test_any_shape_and_strides(shape, dtype, view, rounding):
    images, channels, height, width = shape
    x = values((images, channels + 2, height, width), dtype)
    x = {
        "nchw": lambda: x[:, :channels].contiguous(),
        "nhwc": lambda: x[:, :channels].contiguous(memory_format=NHWC),
        "channel slice": lambda: x.contiguous(memory_format=NHWC)[:, 1 : 1 + channels],
        "transposed": lambda: x[:, :channels].transpose(2, 3),
        "one dimension": lambda: x[:, :channels, :, 0],
    }[view]()
    assert torch.equal(run(x, rounding), formula(x, rounding))


@both_roundings
def test_what_lies_outside_is_clipped_and_nan_is_zero(rounding):
    bad = [torch.nan, -torch.nan, torch.inf, -torch.inf, 6e4, -6e4, 0.0, 1.0, -1.0]
    zero = 128 if rounding == "round" else 127
    levels = run(torch.tensor(bad).view(1, 1, -1), rounding).flatten().tolist()
    assert levels == [0, 0, 255, 0, 255, 0, zero, 255, 0]


def test_every_level_is_written_by_its_own_program():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    x = values((2, 3, 7, 9), torch.float32)
    expected = formula(x, "round")
    levels = (255 - expected).contiguous().to(DEVICE)
    before = levels.cpu().flatten()
    kernels._quantize_kernel[(2,)](
        x.to(DEVICE), levels, 189, 63, 3, PLANES=3, FLOOR=False, BLOCK=64
    )
    assert torch.equal(levels.cpu().flatten()[:128], expected.flatten()[:128])
    assert torch.equal(levels.cpu().flatten()[128:], before[128:])


def test_what_it_does_not_take_it_leaves_to_others():
    with pytest.raises(Unsupported, match=r"not torch.float64"):
        run(torch.zeros(1, 1, dtype=torch.float64), "round")


@pytest.mark.gpu
def test_the_op_runs_it_on_a_gpu():
    x = values((2, 3, 7, 9), torch.float32)
    assert torch.equal(ops.quantize(x.cuda()).cpu(), formula(x, "round"))
