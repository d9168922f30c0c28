"""The Triton kernels against float64, through the backend as ds.ops calls it for a GPU.

The interpreter cuts float32 off to bfloat16 where a GPU rounds. The tolerance of tests/ops, with
two units in the last place of the largest value, has room for that.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds import ops
from ds.ops.dispatch.op import Unsupported
from ds.ops.group_norm_silu import backward, forward, forward_float8
from ds.ops.kernels import group_norm_silu as kernels
from ds.ops.kernels import group_norm_silu_backward, group_norm_tiles
from tests.kernels import DEVICE, DTYPES, NHWC
from tests.ops.group_norm_silu.cases import (
    ADDENDS,
    LAYOUTS,
    adversarial,
    both_silu,
    check_addends,
    check_float8,
    combinations,
    compare_gradients,
    draw_addends,
    gpu_silu_error,
    inputs,
    norm_alone,
    pytorch,
    results,
    some_gradients,
    unfused,
)
from tests.oracle import assert_close, assert_same_bits, gradient_like, poison

# NumPy's, with which the interpreter computes: a GPU says nothing of an infinity.
pytestmark = [
    pytest.mark.each_value,
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]

# The last two do not fit one pass: too many pixels, too wide a group.
SHAPES = [
    ((2, 96, 5, 3), 8),
    ((1, 384, 4, 4), 32),
    ((2, 30, 3, 11), 10),
    ((1, 7, 13, 1), 7),
    ((2, 21, 8, 8), 1),
    ((2, 5, 1, 1), 1),
    ((1, 70, 41, 26), 7),
    ((2, 272, 3, 3), 1),
]
# The tile of a program that takes 3 groups of 3 channels, and 5 pixels.
SLICE = {"PIXELS": 5, "GROUPS": 3, "PER_GROUP": 3, "BLOCK_P": 8, "BLOCK_G": 4, "BLOCK_C": 16}
fused = ops.fused_add_group_norm_silu
every_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(params=["one pass", "two passes"])
def passes(request, monkeypatch):
    """Force two passes, with tiles so small that every loop and every table has several turns."""
    if request.param == "two passes":
        small_tiles(monkeypatch)
    return request.param


def small_tiles(monkeypatch) -> None:
    monkeypatch.setattr(group_norm_tiles, "ONE_PASS_PIXELS", 0)
    monkeypatch.setattr(group_norm_tiles, "TABLE_ROWS", 2)
    monkeypatch.setattr(kernels, "FORWARD_TILES", (128, 128))
    monkeypatch.setattr(group_norm_silu_backward, "BACKWARD_TILES", (64, 64))


def values(shape, dtype, layout=NHWC, seed=0, by_image=False) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(value.to(DEVICE) for value in inputs(shape, dtype, layout, seed, by_image))


def run(x, weight, bias, groups, silu, eps=1e-6) -> tuple[Tensor, Tensor, Tensor]:
    return forward._load("cuda", "triton")(x, weight, bias, groups, eps, silu)[:3]


def run_backward(grad, x, weight, bias, groups, silu) -> tuple[Tensor, Tensor, Tensor]:
    _, mean, rstd = run(x, weight, bias, groups, silu)
    launch = backward._load("cuda", "triton")
    return launch(grad, x, weight, bias, mean, rstd, groups, silu, x.shape[1])[:3]


def check_forward(x, weight, bias, groups, silu) -> None:
    y, mean, rstd = run(x, weight, bias, groups, silu)
    assert y.shape == x.shape
    assert mean.shape == rstd.shape == (len(x), groups)
    exact = pytorch(x.double(), weight.double(), bias.double(), groups, silu)
    assert_close("y", exact, y, pytorch(x, weight, bias, groups, silu))


def check_backward(grad, x, weight, bias, groups, silu) -> None:
    found = run_backward(grad, x, weight, bias, groups, silu)
    compare_gradients("triton", found, x, weight, bias, groups, silu, grad)


@every_shape
@every_dtype
@both_silu
def test_forward_is_as_exact_as_pytorch(shape, groups, dtype, silu):
    check_forward(*values(shape, dtype), groups, silu)


@every_shape
@every_dtype
@both_silu
def test_gradients_are_as_exact_as_pytorchs(shape, groups, dtype, silu):
    x, weight, bias = values(shape, dtype)
    check_backward(gradient_like(x), x, weight, bias, groups, silu)


@pytest.mark.parametrize(("shape", "groups"), SHAPES[:6], ids=str)
@every_dtype
def test_an_affine_of_each_image_is_as_exact_as_pytorchs(shape, groups, dtype):
    x, weight, bias = values((2, *shape[1:]), dtype, by_image=True)
    check_forward(x, weight, bias, groups, True)
    check_backward(gradient_like(x), x, weight, bias, groups, True)


def test_one_row_for_all_images_gives_the_bits_of_a_norm_without_rows(passes):
    """Whether the row is expanded, a few columns of a table, or has its channels apart."""
    x, weight, bias = values((2, 12, 3, 5), torch.float32)
    grad = gradient_like(x)
    expected = *run(x, weight, bias, 4, True), run_backward(grad, x, weight, bias, 4, True)[0]
    table = torch.cat([weight, bias, weight])[None].repeat(2, 1)
    for rows in (
        [p.expand(2, -1) for p in (weight, bias)],
        [table[:, :12], table[:, 12:24]],
        [weight.repeat(2, 1), bias.repeat_interleave(2).view(12, 2).T],
    ):
        d_x, *d_rows = run_backward(grad, x, *rows, 4, True)
        assert_same_bits([*run(x, *rows, 4, True), d_x], expected)
        assert all(d.shape == (2, 12) and d.is_contiguous() for d in d_rows)


def test_rows_of_gradients_are_written_and_depend_on_their_image_alone(passes, monkeypatch):
    x, weight, bias = values((2, 12, 3, 5), torch.float32, by_image=True)
    grad = gradient_like(x)
    expected = run_backward(grad, x, weight, bias, 4, True)
    for i in range(2):
        alone = [t[i : i + 1] for t in (grad, x, weight, bias)]
        assert_same_bits(run_backward(*alone, 4, True), [t[i : i + 1] for t in expected])
    poison(monkeypatch)
    assert_same_bits(run_backward(grad, x, weight, bias, 4, True), expected)


@settings(max_examples=8, deadline=None)
@given(
    images=st.integers(1, 3),
    groups=st.integers(1, 12),
    per_group=st.integers(1, 13),
    size=st.tuples(st.integers(2, 7), st.integers(1, 7)),
    dtype=st.sampled_from(DTYPES),
    view=st.sampled_from(["nchw", "nhwc", "channel slice", "pixel slice", "transposed"]),
    two_passes=st.booleans(),
    by_image=st.booleans(),
)
def test_any_shape_and_strides(images, groups, per_group, size, dtype, view, two_passes, by_image):
    height, width = size
    channels = groups * per_group
    shape = images, channels + 2, height + 1, 2 * width
    x, weight, bias = values(shape, dtype, by_image=by_image)
    x = {
        "nchw": lambda: x[:, :channels, :height, :width].contiguous(),
        "nhwc": lambda: x[:, :channels, :height, :width].contiguous(memory_format=NHWC),
        "channel slice": lambda: x[:, 1 : 1 + channels],
        "pixel slice": lambda: x[:, :channels, 1:, width:],
        "transposed": lambda: x[:, :channels].transpose(2, 3),
    }[view]()
    weight, bias = weight[..., :channels], bias[..., 1 : 1 + channels]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if two_passes:
            small_tiles(monkeypatch)
        check_forward(x, weight, bias, groups, True)
        check_backward(gradient_like(x), x, weight, bias, groups, True)
        y = run(x, weight, bias, groups, True)[0]
    for layout in LAYOUTS:
        if x.is_contiguous(memory_format=layout):
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8), (2, 8, 5), (2, 8, 2, 3, 2)], ids=str)
def test_any_number_of_images_and_dimensions(shape, passes):
    x, weight, bias = values(shape, torch.float32)
    y, _, _ = run(x, weight, bias, 2, True)
    d_x, d_weight, d_bias = run_backward(torch.ones_like(x), x, weight, bias, 2, True)
    assert y.shape == d_x.shape == x.shape
    if len(x):
        check_forward(x, weight, bias, 2, True)
        check_backward(gradient_like(x), x, weight, bias, 2, True)
    else:
        assert not d_weight.any()
        assert not d_bias.any()


@adversarial
def test_adversarial_values(disturb, passes):
    x, weight, bias = values((2, 24, 5, 8), torch.float32)
    check_forward(disturb(x), weight, bias, 6, True)
    check_backward(gradient_like(x), disturb(x), weight, bias, 6, True)


@every_dtype
@both_silu
def test_constant_groups_give_the_bias(dtype, silu, passes):
    x, weight, bias = values((2, 24, 5, 5), dtype)
    y, _, rstd = run(torch.full_like(x, 3.1), weight, bias, 6, silu)
    expected = (F.silu(bias.double()) if silu else bias.double()).view(1, -1, 1, 1)
    # The mean of equal values may be off by a few roundings, which 1 / sqrt(eps) = 1000 enlarges.
    tolerance = 3.1 * 1000 * 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (y.double() - expected).abs().max() <= tolerance
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1000))


@both_silu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate_as_in_pytorch(bad, silu, passes):
    x, weight, bias = values((2, 24, 5, 7), torch.float32)
    x[1, 9, 2, 3] = bad
    bias[1], bias[13], bias[14] = bad, 200, -200
    y, _, _ = run(x, weight, bias, 6, silu)
    expected = pytorch(x, weight, bias, 6, silu)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(expected))
    bias[1] = 0
    d_x, _, _ = run_backward(torch.ones_like(x), x, weight, bias, 6, silu)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, 8:12] = True
    assert torch.equal(d_x.isnan(), expected)


def test_silu_over_its_whole_range(passes):
    """With a weight of zero the output is silu(bias), whatever x is."""
    bias = torch.cat([torch.linspace(-120, 120, 997), torch.tensor([-3e38, 3e38, 0.0])]).to(DEVICE)
    x = torch.zeros(1, len(bias), 1, 1, device=DEVICE)
    y = run(x, torch.zeros_like(bias), bias, 100, True)[0].flatten()
    exact = F.silu(bias.double())
    assert ((y - exact).abs() <= gpu_silu_error(bias) * exact.abs() + 1e-36).all()


def test_every_element_is_written(passes, monkeypatch):
    arguments = values((2, 30, 5, 3), torch.float32)
    expected = [*run(*arguments, 10, True), *run_backward(arguments[0], *arguments, 10, True)]
    poison(monkeypatch)
    again = [*run(*arguments, 10, True), *run_backward(arguments[0], *arguments, 10, True)]
    assert_same_bits(again, expected)


@every_dtype
def test_bits_do_not_depend_on_the_batch(dtype, passes):
    x, weight, bias = values((3, 24, 3, 5), dtype)
    grad = gradient_like(x)
    y, mean, rstd = run(x, weight, bias, 8, True)
    d_x, _, _ = run_backward(grad, x, weight, bias, 8, True)
    for i in range(len(x)):
        one = slice(i, i + 1)
        assert_same_bits(run(x[one], weight, bias, 8, True), [t[one] for t in (y, mean, rstd)])
        assert torch.equal(run_backward(grad[one], x[one], weight, bias, 8, True)[0], d_x[one])


def test_a_program_writes_its_own_slice_and_nothing_else():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    x, weight, bias = torch.randn(1, 5, 24), torch.ones(24), torch.zeros(24)
    y, mean, rstd = (torch.full(s, float("nan")) for s in ((1, 5, 24), (1, 8), (1, 8)))
    x, weight, bias, y, mean, rstd = (t.to(DEVICE) for t in (x, weight, bias, y, mean, rstd))
    kernels._fwd_kernel[(1,)](
        **group_norm_tiles.source_arguments(x, 24),
        **kernels.Norm(weight, bias, 8, 1e-6, True).affine(),
        **{"y_ptr": y, "mean_ptr": mean, "rstd_ptr": rstd, "merged_ptr": None},
        **{"groups": 8, "slices": 3, "eps": 1e-6, "SILU": True},
        **SLICE,
    )
    assert not y[..., :9].isnan().any()
    assert y[..., 9:].isnan().all()
    for statistic in (mean, rstd):
        assert not statistic[:, :3].isnan().any()
        assert statistic[:, 3:].isnan().all()


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_may_differ_from_x_in_dtype(other):
    x, weight, bias = values((2, 32, 5, 5), torch.float16)
    weight, bias = weight.to(other), bias[::2].repeat_interleave(2)[:32]
    y, _, _ = run(x, weight, bias, 8, True)
    exact = pytorch(x.double(), weight.double(), bias.double(), 8, True)
    assert_close("y", exact, y, exact.to(x.dtype))
    _, d_weight, d_bias = run_backward(x, x, weight, bias, 8, True)
    assert (d_weight.dtype, d_bias.dtype) == (other, bias.dtype)


def test_channels_last_memory_is_not_copied(monkeypatch):
    """The kernels see the memory of x itself, and y is the memory they wrote."""
    seen = []

    def note(x, *args, **options):
        seen.append(x)
        return torch.empty_like(x), None, None, None

    x, weight, bias = values((2, 12, 4, 6), torch.float32)
    monkeypatch.setattr(kernels, "group_norm_silu", note)
    run(x, weight, bias, 4, True)
    assert seen[0].shape == (2, 24, 12)
    assert seen[0].data_ptr() == x.data_ptr()


def test_what_it_does_not_take_it_leaves_to_others():
    x, weight, bias = values((2, 8, 3, 3), torch.float32)
    for arguments in [(x.double(), weight, bias), (x[:, :, :0], weight, bias)]:
        with pytest.raises(Unsupported, match="it takes"):
            run(*arguments, 2, True)
        with pytest.raises(Unsupported, match="it takes"):
            launch = backward._load("cuda", "triton")
            launch(arguments[0], *arguments, torch.zeros(2, 2), torch.zeros(2, 2), 2, True, 8)


@pytest.fixture
def chosen(monkeypatch):
    """Let ds.ops choose the kernels, whatever the device of its arguments."""
    choose(monkeypatch)


def choose(monkeypatch) -> None:
    for op in (forward, backward):
        chain = [("triton", op._load("cuda", "triton"))]
        monkeypatch.setitem(op._chains, (DEVICE, None), chain)


def on_device(values, addends):
    return [v.to(DEVICE) for v in values], {name: v.to(DEVICE) for name, v in addends.items()}


@every_dtype
@combinations
def test_with_addends_it_is_as_exact_as_pytorch(dtype, names, chosen):
    # The second of three groups has channels of both.
    values, addends = on_device(*draw_addends(names, (2, 12, 4, 3), 6, dtype))
    y, merged = check_addends(fused, values, addends, 3)
    assert torch.equal(check_addends(norm_alone, values, addends, 3)[0], y)
    # The second result is what was normalized, to the bit.
    assert torch.equal(run(merged, *values[1:], 3, True)[0], y)


@pytest.mark.parametrize("function", [fused, norm_alone])
@pytest.mark.parametrize("names", [("shift",), ("residual", "skip"), ADDENDS], ids="+".join)
def test_with_addends_two_passes_are_as_exact_as_pytorch(names, function, chosen, monkeypatch):
    small_tiles(monkeypatch)
    values, addends = on_device(*draw_addends(names, (2, 12, 4, 3), 6, torch.float32))
    check_addends(function, values, addends, 3)


@pytest.mark.parametrize("names", [("shift",), ("residual", "skip"), ADDENDS], ids="+".join)
def test_with_addends_an_affine_of_each_image_is_as_exact(names, passes, chosen):
    drawn = draw_addends(names, (2, 12, 4, 3), 6, torch.float32, by_image=True)
    values, addends = on_device(*drawn)
    y, merged = check_addends(fused, values, addends, 3)
    assert torch.equal(run(merged, *values[1:], 3, True)[0], y)


@settings(max_examples=12, deadline=None)
@given(
    names=st.sets(st.sampled_from(["shift", "residual"])),
    images=st.integers(1, 3),
    groups=st.integers(1, 5),
    per_group=st.integers(2, 9),
    seam=st.integers(1, 44),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    shift_rows=st.booleans(),
    two_passes=st.booleans(),
)
def test_two_sources_are_their_concatenation(
    names, images, groups, per_group, seam, size, layouts, shift_rows, two_passes
):
    channels = groups * per_group
    names, seam = [*sorted(names), "skip"], 1 + seam % (channels - 1)
    values, addends = draw_addends(
        names, (images, channels, *size), seam, torch.float32, shift_rows=shift_rows
    )
    x, *affine = values
    x = x.contiguous(memory_format=layouts[0])
    for name, layout in zip(("residual", "skip"), layouts[1:], strict=True):
        if name in addends:
            addends[name] = addends[name].contiguous(memory_format=layout)
    values, addends = on_device((x, *affine), addends)
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(monkeypatch)
        if two_passes:
            small_tiles(monkeypatch)
        y, merged = check_addends(fused, values, addends, groups)
        assert torch.equal(merged, unfused(*values, groups, **addends)[1])
        assert torch.equal(y, run(merged, *values[1:], groups, True)[0])


def test_no_images_have_no_gradients(passes, chosen):
    values, addends = on_device(*draw_addends(ADDENDS, (0, 12, 3, 3), 5, torch.float32))
    outputs, found = results(norm_alone, values, addends, 3, some_gradients)
    assert [list(y.shape) for y in outputs] == [[0, 12, 3, 3]] * 2
    for name, value in addends.items():
        assert found[name].shape == value.shape
    assert not found["weight"].any()


@pytest.mark.parametrize("place", ADDENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_pytorch(place, bad, passes, chosen):
    values, addends = on_device(*draw_addends(ADDENDS, (2, 12, 3, 3), 6, torch.float32))
    addends[place][1, 1] = bad
    outputs, found = results(norm_alone, values, addends, 3, some_gradients)
    expected, found_expected = results(unfused, values, addends, 3, some_gradients)
    for a, b in ((outputs, expected), (found.values(), found_expected.values())):
        assert_same_bits([t.isfinite() for t in a], [t.isfinite() for t in b])


@pytest.mark.parametrize("function", [fused, norm_alone])
def test_every_element_is_written_once_and_the_same(function, passes, chosen, monkeypatch):
    values, addends = on_device(*draw_addends(ADDENDS, (2, 12, 4, 3), 5, torch.float32))
    expected = results(function, values, addends, 3, some_gradients)
    poison(monkeypatch)
    again = results(function, values, addends, 3, some_gradients)
    assert_same_bits(again[0], expected[0])
    assert_same_bits(again[1].values(), expected[1].values())


def test_bits_with_addends_do_not_depend_on_the_batch(passes, chosen):
    values, addends = on_device(*draw_addends(ADDENDS, (2, 12, 4, 3), 5, torch.float32))
    grads = [g.to(DEVICE) for g, _ in some_gradients([torch.empty(2, 12, 4, 3)] * 2)]

    def compute(images):
        some = [values[0][images], *values[1:]]
        own = {name: value[images] for name, value in addends.items()}
        drawn = [grad[images] for grad in grads]
        outputs, found = results(fused, some, own, 3, lambda ys: zip(drawn, ys, strict=True))
        return *outputs, *(found[name] for name in ("x", *ADDENDS))

    batch = compute(slice(None))
    for i in range(2):
        assert_same_bits(compute(slice(i, i + 1)), [t[i : i + 1] for t in batch])


def test_a_program_of_two_sources_writes_its_own_slice_and_nothing_else():
    """It has 9 of 24 channels, of which 5 are left of the seam and 4 right of it."""
    nan, x, skip, grad = float("nan"), *(torch.randn(1, 5, c) for c in (5, 19, 24))
    d_x, d_skip, d_shift, rows = [
        torch.full(shape, nan, device=DEVICE)
        for shape in ((1, 5, 5), (1, 5, 19), (1, 5), (1, 2, 24))
    ]
    shift, weight, bias = torch.zeros(1, 5), torch.ones(24), torch.zeros(24)
    mean, rstd = torch.zeros(1, 8), torch.ones(1, 8)
    tensors = [t.to(DEVICE) for t in (grad, x, shift, skip, weight, bias, mean, rstd)]
    grad, x, shift, skip, weight, bias, mean, rstd = tensors
    group_norm_silu_backward._bwd_kernel[(1,)](
        **group_norm_tiles.source_arguments(x, 24, shift, None, skip),
        **group_norm_tiles.affine_arguments(weight, bias),
        **{"grad_ptr": grad, "grad_merged_ptr": None},
        **{"mean_ptr": mean, "rstd_ptr": rstd, "rows_ptr": rows},
        **{"d_x_ptr": d_x, "d_skip_ptr": d_skip, "d_shift_ptr": d_shift},
        **{"groups": 8, "slices": 3, "SILU": True},
        **SLICE,
    )
    assert not d_x.isnan().any() and not d_shift.isnan().any()
    for tensor, own in ((d_skip, 4), (rows, 9)):
        assert not tensor[..., :own].isnan().any()
        assert tensor[..., own:].isnan().all()


@pytest.mark.gpu
def test_the_op_runs_them_on_a_gpu():
    x, weight, bias = values((2, 32, 5, 5), torch.bfloat16)
    assert torch.equal(ops.group_norm_silu(x, weight, bias, 8), run(x, weight, bias, 8, True)[0])


@pytest.mark.usefixtures("rounds_to_float8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("names", "by_image"),
    [([], False), (["shift"], False), (["skip"], False), (ADDENDS, False), (ADDENDS, True)],
    ids=["", "shift", "skip", "all", "all, by image"],
)
def test_in_float8_it_is_the_norm_rounded_once(passes, dtype, names, by_image):
    (x, weight, bias), addends = draw_addends(names, (2, 12, 4, 3), 8, dtype, by_image=by_image)
    weight[..., 3] = 1e3
    launch = forward_float8._load("cuda", "triton")
    tensors = [t.to(DEVICE) for t in (x, weight, bias)]
    given = [addends[name].to(DEVICE) if name in addends else None for name in ADDENDS]
    y, merged = launch(*tensors, 4, 1e-6, True, *given)
    alone, empty = launch(*tensors, 4, 1e-6, False, *given)
    assert torch.equal(y.float(), alone.float())
    assert not len(empty)
    check_float8(y, merged, *tensors[1:], 4)
    assert y.double().max() == 448
