"""GroupNorm-SiLU in CUDA against float64: the cluster, and the two passes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds.ops.dispatch.op import Unsupported
from ds.ops.group_norm_silu import forward
from tests.ops.group_norm_silu.cases import gpu_silu_error, inputs, pytorch, spike
from tests.oracle import assert_close, poison

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last
# Images of 2 to 8 tiles; groups of 1, 3, 4, 8 and 12 channels; slices that end early, and those of
# 16 bytes a pixel.
SHAPES = [
    ((1, 32, 33, 32), 8),
    ((2, 96, 41, 29), 8),
    ((1, 40, 48, 48), 40),
    ((1, 24, 71, 61), 8),
    ((2, 8, 33, 37), 1),
    ((1, 144, 35, 31), 48),
]
every_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
both_silu = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])


@pytest.fixture(scope="module", params=["cluster", "cuda"])
def run(request, device):
    """The kernel of a backend, as ds.ops calls it for a GPU."""
    return forward._load("cuda", request.param)


def values(shape, dtype, device, layout=NHWC, by_image=False) -> tuple[Tensor, ...]:
    drawn = inputs(shape, dtype, layout, by_image=by_image)
    return tuple(value.to(device) for value in drawn)


def check(run, x, weight, bias, groups, silu) -> None:
    y, mean, rstd, _ = run(x, weight, bias, groups, 1e-6, silu)
    assert y.shape == x.shape
    assert mean.shape == rstd.shape == (len(x), groups)
    exact = pytorch(x.double(), weight.double(), bias.double(), groups, silu)
    assert_close("y", exact, y, pytorch(x, weight, bias, groups, silu))
    grouped = x.double().reshape(len(x), groups, -1)
    torch.testing.assert_close(mean.double(), grouped.mean(2), rtol=1e-6, atol=1e-6)
    std = (grouped.var(2, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(rstd.double(), 1 / std, rtol=2e-6, atol=0)


@every_shape
@every_dtype
@both_silu
def test_forward_is_as_exact_as_pytorch(run, device, shape, groups, dtype, silu):
    check(run, *values(shape, dtype, device), groups, silu)


@pytest.mark.parametrize(("shape", "groups"), SHAPES[:2], ids=str)
@every_dtype
def test_an_affine_of_each_image_is_as_exact_as_pytorchs(run, device, shape, groups, dtype):
    check(run, *values((3, *shape[1:]), dtype, device, by_image=True), groups, True)


def test_one_row_for_all_images_gives_the_bits_of_a_norm_without_rows(run, device):
    """Whether the row is expanded or a few columns of a table."""
    x, weight, bias = values((2, 40, 41, 29), torch.bfloat16, device)
    expected = run(x, weight, bias, 5, 1e-6, True)[0]
    table = torch.cat([weight, bias])[None].repeat(2, 1)
    for rows in ([weight.expand(2, -1), bias.repeat(2, 1)], [table[:, :40], table[:, 40:]]):
        assert torch.equal(run(x, *rows, 5, 1e-6, True)[0], expected)


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4, 8, 12]),
    per_group=st.sampled_from([1, 2, 3, 4, 6, 8, 20]),
    size=st.tuples(st.integers(33, 39), st.integers(32, 41)),
    dtype=st.sampled_from(DTYPES),
    view=st.sampled_from(["nchw", "nhwc", "channel slice", "pixel slice", "transposed"]),
)
def test_any_shape_and_strides(run, device, images, groups, per_group, size, dtype, view):
    height, width = size
    channels = groups * per_group
    x, weight, bias = values((images, channels + 2, height + 1, width + 1), dtype, device)
    x = {
        "nchw": lambda: x[:, :channels, :height, :width].contiguous(),
        "nhwc": lambda: x[:, :channels, :height, :width].contiguous(memory_format=NHWC),
        "channel slice": lambda: x[:, 1 : 1 + channels],
        "pixel slice": lambda: x[:, :channels, 1:, 1:],
        "transposed": lambda: x[:, :channels].transpose(2, 3),
    }[view]()
    weight, bias = weight[:channels], bias[1 : 1 + channels]
    if channels * x.itemsize % 16:
        with pytest.raises(Unsupported, match="it cannot cut"):
            run(x, weight, bias, groups, 1e-6, True)
        return
    check(run, x, weight, bias, groups, True)
    y = run(x, weight, bias, groups, 1e-6, True)[0]
    for layout in (torch.contiguous_format, NHWC):
        if x.is_contiguous(memory_format=layout):
            assert y.is_contiguous(memory_format=layout)


def test_no_images_give_none(run, device):
    y, mean, *_ = run(*values((0, 8, 40, 40), torch.float32, device), 2, 1e-6, True)
    assert (y.shape, mean.shape) == ((0, 8, 40, 40), (0, 2))


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda x: x + 2e4, id="mean of 1e4 standard deviations"),
        pytest.param(lambda x: x - 2e4, id="negative mean"),
        pytest.param(lambda x: x * 1e-39, id="denormals"),
        pytest.param(lambda x: x * 1e12, id="large"),
        pytest.param(lambda x: x + spike(x), id="outlier"),
    ],
)
def test_adversarial_values(run, device, disturb):
    x, weight, bias = values((2, 24, 35, 40), torch.float32, device)
    x = disturb(x)
    y = run(x, weight, bias, 6, 1e-6, True)[0]
    exact = pytorch(x.double(), weight.double(), bias.double(), 6, True)
    assert_close("y", exact, y, pytorch(x, weight, bias, 6, True))


@every_dtype
def test_constant_groups_give_the_bias(run, device, dtype):
    x, weight, bias = values((2, 24, 40, 35), dtype, device)
    y, _, rstd, _ = run(torch.full_like(x, 3.1), weight, bias, 6, 1e-6, False)
    # The mean of equal values may be off by a few roundings, which 1 / sqrt(eps) = 1000 enlarges.
    tolerance = 3.1 * 1000 * 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (y.double() - bias.double().view(1, -1, 1, 1)).abs().max() <= tolerance
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1000))


@both_silu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate_as_in_pytorch(run, device, bad, silu):
    x, weight, bias = values((2, 24, 35, 37), torch.float32, device)
    x[1, 9, 20, 3] = bad
    bias[1], bias[13], bias[14] = bad, 200, -200
    y = run(x, weight, bias, 6, 1e-6, silu)[0]
    expected = pytorch(x, weight, bias, 6, silu)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


def test_silu_over_its_whole_range(run, device):
    """With a weight of zero the output is silu(bias), whatever x is."""
    bias = torch.cat([torch.linspace(-120, 120, 125), torch.tensor([-3e38, 3e38, 0.0])]).to(device)
    x = torch.zeros(1, len(bias), 33, 32, device=device)
    y = run(x, torch.zeros_like(bias), bias, 32, 1e-6, True)[0]
    exact = F.silu(bias.double())
    bound = gpu_silu_error(bias) * exact.abs() + 1e-36
    assert ((y - exact.view(1, -1, 1, 1)).abs() <= bound.view(1, -1, 1, 1)).all()


@every_dtype
def test_every_element_is_written_in_any_order_of_threads(
    run, device, dtype, in_both_orders, monkeypatch
):
    arguments = values((2, 40, 41, 29), dtype, device)
    poison(monkeypatch)
    first, second = in_both_orders(lambda: run(*arguments, 5, 1e-6, True))
    for a, b in zip(first, second, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a, b)


@every_dtype
def test_bits_do_not_depend_on_the_batch(run, device, dtype):
    x, weight, bias = values((3, 24, 33, 35), dtype, device)
    batch = run(x, weight, bias, 8, 1e-6, True)
    for i in range(len(x)):
        alone = run(x[i : i + 1], weight, bias, 8, 1e-6, True)
        for a, b in zip(alone, batch, strict=True):
            assert torch.equal(a, b[i : i + 1])


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_may_differ_from_x_in_dtype(run, device, other):
    x, weight, bias = values((2, 32, 33, 35), torch.float16, device)
    weight, bias = weight.to(other), bias[::2].repeat_interleave(2)[:32]
    y = run(x, weight, bias, 8, 1e-6, True)[0]
    exact = pytorch(x.double(), weight.double(), bias.double(), 8, True)
    assert_close("y", exact, y, exact.to(x.dtype))


def test_the_caller_is_not_handed_what_the_kernels_cannot_read(run, device):
    x, weight, bias = values((1, 8, 40, 40), torch.float32, device)
    memory = torch.empty(x.numel() + 1, device=device)[1:]
    shifted = memory.view(1, 40, 40, 8).permute(0, 3, 1, 2).copy_(x)
    wide = x.repeat(1, 33, 1, 1)
    for arguments, groups, reason in [
        ((x.double(), weight, bias), 2, "float32, float16 or bfloat16"),
        ((x[:, :, :0], weight, bias), 2, "without pixels|more than 1024"),
        ((x[:, :6], weight[:6], bias[:6]), 2, "6 channels"),
        ((wide, weight.repeat(33), bias.repeat(33)), 1, "264 channels"),
        ((shifted, weight, bias), 2, "multiple of 16 bytes"),
    ]:
        with pytest.raises(Unsupported, match=reason):
            run(*arguments, groups, 1e-6, True)


def test_a_cluster_leaves_the_images_that_do_not_fit_it(device):
    weight = torch.ones(32, dtype=torch.bfloat16, device=device)
    x = torch.zeros(1, 32, 256, 256, dtype=torch.bfloat16, device=device)
    with pytest.raises(Unsupported, match="cannot cut 65536 pixels"):
        forward._load("cuda", "cluster")(
            x.contiguous(memory_format=NHWC), weight, weight, 8, 1e-6, True
        )
