"""conv3x3 against F.conv2d in float64, forward and backward, and which of them it is where."""

import json
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ds import ops
from ds.ops import _native
from ds.ops.conv import winograd
from ds.training.throughput import flop_counter


def rows(least):
    return [[least] * len(winograd.WIDTHS) for _ in winograd.WIDTHS]


@pytest.fixture(autouse=True)
def from_16_tiles_on(monkeypatch):
    """Let ours take what has 16 tiles, whatever was measured."""
    monkeypatch.setattr(winograd, "_LEAST", {way: rows(16) for way in get_args(winograd.Way)})


def case(images=2, channels=16, out=32, h=12, w=12, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, channels, h, w), (out, channels, 3, 3), (out,), (images, out, h, w)
    x, weight, bias, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    last = {"memory_format": torch.channels_last}
    return x.contiguous(**last), (weight / (9 * channels) ** 0.5).contiguous(**last), bias, dy


def results(convolve, x, weight, bias, dy):
    """Return y and the gradients of x, weight and bias."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    y = convolve(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def direct(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def errors(found, exact):
    return [
        float((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30))
        for a, e in zip(found, exact, strict=True)
    ]


def called(x, weight, bias=None):
    """Say whether a call is our op's."""
    with flop_counter() as counter:
        ops.conv3x3(x, weight, bias)
    return torch.ops.ds.conv3x3 in counter.get_flop_counts()["Global"]


sizes = st.integers(1, 13)
channels = st.sampled_from([16, 32, 48])


@pytest.mark.parametrize("missing", ["x", "weight"])
def test_what_is_no_tensor_is_refused_as_pytorch_refuses_it(missing):
    given = {"x": torch.ones(1, 16, 8, 8), "weight": torch.ones(16, 16, 3, 3)} | {missing: None}
    with pytest.raises(TypeError, match="conv2d"):
        ops.conv3x3(**given)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 20), channels, channels, sizes, sizes, st.sampled_from([0, 1, 2]))
def test_it_and_its_gradients_are_near_those_of_float64(images, c, out, h, w, simd):
    args = case(images, c, out, h, w)
    exact = results(direct, *(tensor.double() for tensor in args))
    lib = _native.cpu_library()
    lib.ds_limit_simd(simd)
    try:
        with ops.use_backend("cpu"):
            found = results(ops.conv3x3, *args)
    finally:
        lib.ds_limit_simd(3)
    # Sums of a few products are off by their 36 roundings, and the points cost a digit at most.
    for error, peer in zip(
        errors(found, exact), errors(results(direct, *args), exact), strict=True
    ):
        assert error <= 8 * peer + 8 * torch.finfo(torch.float32).eps


def test_a_sum_over_many_tiles_and_parts_is_near_that_of_float64():
    args = case(25, 48, 16, 33, 31)  # 1,800 tiles, a part of them left over
    exact = results(direct, *(tensor.double() for tensor in args))
    found, peer = (errors(results(f, *args), exact) for f in (ops.conv3x3, direct))
    assert called(*args[:2]) and max(found) < 2e-6, (found, peer)


def test_in_float64_it_is_the_convolution_to_the_bit():
    args = case(dtype=torch.float64)
    for found, exact in zip(results(ops.conv3x3, *args), results(direct, *args), strict=True):
        assert torch.equal(found, exact)


def test_the_gradients_of_the_reference_are_right():
    x, weight, bias, _ = (tensor.requires_grad_() for tensor in case(1, 2, 3, 4, 5, torch.float64))
    assert torch.autograd.gradcheck(torch.ops.ds.conv3x3, (x, weight, bias))


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_threads_nor_a_second_call_move_a_bit(threads):
    args = case(40, 32, 48, 9, 10)
    once = results(ops.conv3x3, *args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = results(ops.conv3x3, *args)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(once[:3], again[:3], strict=True):  # the bias's is a sum of PyTorch's
        assert torch.equal(a, b)


def test_memory_formats_do_not_matter():
    x, weight, bias, dy = case()
    found = results(ops.conv3x3, x, weight, bias, dy.contiguous(memory_format=torch.channels_last))
    spread = torch.zeros(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x)
    other = results(ops.conv3x3, spread, weight.contiguous(), bias, dy.contiguous())
    for a, b in zip(found[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[2].is_contiguous(memory_format=torch.channels_last)


def test_an_image_has_the_bits_that_it_has_among_others():
    x, weight, bias, dy = case(20, 16, 16, 16, 16)
    y, dx, *_ = results(ops.conv3x3, x, weight, bias, dy)
    alone, dx_alone, *_ = results(ops.conv3x3, x[7:8], weight, bias, dy[7:8])
    assert torch.equal(y[7], alone[0]) and torch.equal(dx[7], dx_alone[0])


def test_the_gradient_of_no_images_is_zero():
    x, weight, _, dy = case(0)
    dx, dweight = torch.ops.ds.conv3x3_backward(dy, x, weight, [True, True])
    assert dx.shape == x.shape and torch.equal(dweight, torch.zeros_like(weight))


def test_the_gradient_of_the_weight_alone_is_right_in_types_that_the_kernel_does_not_take():
    x, weight, _, dy = case(dtype=torch.float64)
    _, dweight = torch.ops.ds.conv3x3_backward(dy, x, weight, [False, True])
    _, _, exact, _ = results(direct, x, weight, torch.zeros(len(weight)).double(), dy)
    torch.testing.assert_close(dweight, exact)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_wanted_are_made(frozen):
    leaves = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(case()[:3])]
    ops.conv3x3(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    x, weight, bias, dy = case(1, 16, 16, 16, 16)
    x[0, 3, 2, 2] = value
    y, _, dweight, _ = results(ops.conv3x3, x, weight, bias, dy)
    assert not y[0, :, 1:4, 1:4].isfinite().any() and y[0, :, 5:, 5:].isfinite().all()
    assert not dweight[:, 3].isfinite().any() and dweight[:, 4:].isfinite().all()


def test_it_is_our_kernel_where_that_pays_and_pytorchs_convolution_elsewhere():
    x, weight, bias, _ = case()
    assert called(x, weight, bias)
    assert not called(x.double(), weight.double())
    assert not called(x[:, :, :4, :4], weight)  # two tiles
    assert not called(x[:, :3], weight[:, :3])
    assert not called(x, weight[:20])
    assert not called(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not called(x, weight)
        assert ops.conv3x3(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("faster", [(0,), (1,), (2,), (0, 1, 2), ()])
def test_each_part_is_by_the_kernel_that_is_faster_for_it(faster, monkeypatch):
    """The table says so for the forward, the gradient of x and that of the weight."""
    ways, args = get_args(winograd.Way)[-3:], case()
    least = {way: rows(18 if i in faster else 19) for i, way in enumerate(ways)}
    monkeypatch.setattr(winograd, "_LEAST", least)  # and there are 18 tiles
    with ops.use_backend("cpu"):
        both = [results(direct, *args), *([results(ops.conv3x3, *args)] if faster else [])]
    found = results(ops.conv3x3, *args)
    for i in range(3):
        assert torch.equal(found[i], both[i in faster][i])
    if faster:
        assert not any(torch.equal(a, b) for a, b in zip(both[0][:3], both[1][:3], strict=True))


def test_the_table_has_every_instruction_set_way_and_width():
    table = json.loads(winograd.FASTER.read_text())
    assert set(table) == {*winograd.LEVELS}
    for least in table.values():
        assert tuple(least) == get_args(winograd.Way)
        for row in [row for way in least.values() for row in [way, *way]]:
            assert len(row) == len(winograd.WIDTHS)
        numbers = [n for way in least.values() for row in way for n in row if n is not None]
        assert min(numbers) >= 1 and {type(n) for n in numbers} == {int}


def test_the_nearest_widths_and_the_number_of_tiles_decide(monkeypatch):
    least = [[None if c == 32 else 100 * c + o for o in winograd.WIDTHS] for c in winograd.WIDTHS]
    monkeypatch.setattr(winograd, "_LEAST", {"forward": least})
    for channels, out, number in ((16, 64, 1664), (96, 1024, 13312), (640, 192, 51456)):
        weight = torch.empty(out, channels, 3, 3, device="meta")
        assert winograd.pays("forward", weight, number // 2, 8, 4)
        assert not winograd.pays("forward", weight, number - 1, 4, 1)
    assert not winograd.pays("forward", torch.empty(64, 32, 3, 3, device="meta"), 10**6, 64, 64)
    assert not winograd.pays("forward", torch.empty(64, 8, 3, 3, device="meta"), 10**6, 64, 64)


def test_what_does_not_fit_is_refused_as_pytorch_does():
    x, weight, *_ = case()
    with pytest.raises(RuntimeError, match=r"expected input.* to have 32 channels"):
        ops.conv3x3(x, torch.zeros(16, 32, 3, 3))
    with pytest.raises(RuntimeError, match=r"bias of size \[32\]|bias to be 1-dimensional"):
        ops.conv3x3(x, weight, torch.zeros(3))


def test_the_op_is_sound():
    x, weight, bias, _ = (tensor.requires_grad_() for tensor in case())
    torch.library.opcheck(torch.ops.ds.conv3x3.default, (x, weight, bias))


def compiles(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_it_compiles_as_one_graph_with_its_gradient():
    args = case()
    # PyTorch 2.11 says so of whatever it compiles, and an exported convolution is PyTorch's.
    exports = compiles(lambda x: x + torch.compiler.is_exporting())(torch.zeros(1)).item()
    expected = results(direct if exports else ops.conv3x3, *args)
    found = results(compiles(ops.conv3x3), *args)
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[3], expected[3])


def test_its_flops_are_counted_as_those_of_the_convolution():
    x, weight, bias, _ = (tensor.requires_grad_() for tensor in case())
    counts = []
    for convolve in (ops.conv3x3, direct):
        with flop_counter() as counter:
            convolve(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 2 * 12 * 12 * 9 * 16 * 32


def test_a_weight_without_its_memory_is_named_where_pytorch_convolves():
    x, weight = torch.zeros(1, 3, 4, 4), torch.zeros(5, 3, 3, 3)
    weight.untyped_storage().resize_(0)
    with pytest.raises(
        ValueError, match=r"conv3x3: weight of shape \[5, 3, 3, 3\] needs 540 bytes"
    ):
        ops.conv3x3(x, weight)
