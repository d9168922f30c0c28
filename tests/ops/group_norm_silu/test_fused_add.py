"""What the norm takes in, cat(x + shift + residual, skip), and what it returns of it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops
from tests.ops.group_norm_silu.cases import (
    ADDENDS,
    COMBINATIONS,
    KERNEL_FLOATS,
    LAYOUTS,
    cases,
    check_addends,
    check_float8,
    combinations,
    cpu,
    draw_addends,
    every_backend,
    inputs,
    kernel_floats,
    layouts,
    merged_by_pytorch,
    norm_alone,
    ours,
    results,
    some_gradients,
    unfused,
)
from tests.oracle import assert_same_bits, poison

fused = ds.ops.fused_add_group_norm_silu


def leaves_of(values, addends) -> list[Tensor]:
    return [value.requires_grad_() for value in (*values, *addends.values())]


def flat(outputs, found) -> list[Tensor]:
    """Return outputs and gradients in one list."""
    return [*outputs, *found.values()]


@cases
@combinations
def test_it_is_as_exact_as_pytorch(backend, dtype, names):
    values, addends = draw_addends(names, (2, 36, 5, 3), 14, dtype)  # the second group straddles
    with ds.ops.use_backend(backend):
        y, merged = check_addends(fused, values, addends, 3, backend)
        assert torch.equal(check_addends(norm_alone, values, addends, 3, backend)[0], y)
        # The second result is what was normalized, to the bit.
        assert torch.equal(ours(merged, *values[1:], 3, True), y)


@settings(max_examples=40, deadline=None)
@given(
    names=st.sampled_from(COMBINATIONS),
    images=st.integers(0, 3),
    groups=st.integers(1, 5),
    per_group=st.integers(1, 9),
    seam=st.floats(0, 1),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from(KERNEL_FLOATS),
    views=st.lists(st.sampled_from(["nchw", "nhwc", "slice"]), min_size=3, max_size=3),
    shift_rows=st.booleans(),
)
@every_backend
def test_two_sources_are_their_concatenation(
    backend, names, images, groups, per_group, seam, size, dtype, views, shift_rows
):
    """Any seam, any layouts: the bits of the norm of PyTorch's concatenation, and its gradients."""
    channels = groups * per_group
    seam = round(seam * channels)
    if "skip" not in names or not 0 < seam < channels:
        names, seam = [name for name in names if name != "skip"] or ["shift"], channels
    shape = (images, channels, *size)
    (x, *affine), addends = draw_addends(names, shape, seam, dtype, LAYOUTS[0], shift_rows)
    kinds = dict(zip(("x", "residual", "skip"), views, strict=True))
    values = {
        name: {
            "nchw": lambda value=value: value,
            "nhwc": lambda value=value: value.contiguous(memory_format=torch.channels_last),
            "slice": lambda value=value: F.pad(value, (1, 2))[..., 1:-2],
        }[kinds.get(name, "nchw")]()
        for name, value in {"x": x, **addends}.items()
    }
    x = values.pop("x")
    with ds.ops.use_backend(backend):
        y, merged = fused(x, *affine, groups, **values)
        wide = {name: value.float() for name, value in values.items()}
        assert torch.equal(merged, merged_by_pytorch(x.float(), **wide).to(dtype))
        assert torch.equal(y, ours(merged, *affine, groups, True))
        formats = [layout for layout in LAYOUTS if x.is_contiguous(memory_format=layout)]
        if len(formats) == 1:  # else x does not say which it wants
            assert y.is_contiguous(memory_format=formats[0])
            assert merged.is_contiguous(memory_format=formats[0])
        if images:  # PyTorch's own backward refuses an empty batch
            check_addends(fused, (x, *affine), values, groups, backend)


@every_backend
def test_no_images_have_no_gradients(backend):
    values, addends = draw_addends(ADDENDS, (0, 12, 3, 3), 5, torch.float32)
    leaves = leaves_of(values, addends)
    with ds.ops.use_backend(backend):
        y, merged = fused(*leaves[:3], 3, **addends)
        assert y.shape == merged.shape == (0, 12, 3, 3)
        if backend == "aten":
            return  # PyTorch's own backward refuses an empty batch
        found = torch.autograd.grad((y.sum() + merged.sum()), leaves)
    assert [g.shape for g in found] == [leaf.shape for leaf in leaves]
    assert not any(g.any() for g in found)


@cases
@pytest.mark.parametrize("place", ADDENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_pytorch(backend, dtype, place, bad):
    values, addends = draw_addends(ADDENDS, (2, 12, 3, 3), 6, dtype)
    addends[place][1, 1] = bad
    with ds.ops.use_backend(backend):
        found = flat(*results(fused, values, addends, 3, some_gradients))
    expected = flat(*results(unfused, values, addends, 3, some_gradients))
    assert_same_bits([a.isfinite() for a in found], [b.isfinite() for b in expected])


@cases
def test_every_element_is_written(backend, dtype, monkeypatch):
    values, addends = draw_addends(ADDENDS, (2, 12, 5, 3), 5, dtype)
    with ds.ops.use_backend(backend):
        expected = flat(*results(fused, values, addends, 3, some_gradients))
        poison(monkeypatch)
        assert_same_bits(flat(*results(fused, values, addends, 3, some_gradients)), expected)


@kernel_floats
@cpu
def test_bits_do_not_depend_on_the_batch(backend, dtype):
    values, addends = draw_addends(ADDENDS, (3, 40, 7, 9), 17, dtype)
    drawn = [grad for grad, _ in some_gradients([torch.empty(3, 40, 7, 9)] * 2)]

    def compute(images):
        some = [values[0][images], *values[1:]]
        own = {name: value[images] for name, value in addends.items()}
        grads = [grad[images] for grad in drawn]
        outputs, found = results(fused, some, own, 4, lambda ys: zip(grads, ys, strict=True))
        return *outputs, *(found[name] for name in ("x", *ADDENDS))

    with ds.ops.use_backend(backend):
        batch = compute(slice(None))
        for i in range(3):
            assert_same_bits(compute(slice(i, i + 1)), [t[i : i + 1] for t in batch])


@pytest.mark.each_value
@every_backend
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(backend, keep):
    values, addends = draw_addends(ADDENDS, (2, 12, 3, 5), 5, torch.float32)
    leaves = leaves_of(values, addends)
    arguments = (*leaves[:3], 3, 1e-6, True, keep, *leaves[3:])
    with ds.ops.use_backend(backend):
        torch.library.opcheck(torch.ops.ds.group_norm_silu.default, arguments)
        x, weight, bias, *given = (leaf.detach() for leaf in leaves)
        y, mean, rstd, merged = (t.detach() for t in torch.ops.ds.group_norm_silu(*arguments))
        arguments = (y, merged if keep else x, weight, bias, mean, rstd, 3, True, 5)
        given = (y, given[0], None, None) if keep else (None, *given)
        torch.library.opcheck(torch.ops.ds.group_norm_silu_backward.default, (*arguments, *given))


@every_backend
def test_it_compiles_without_graph_breaks(backend):
    leaves = leaves_of(*draw_addends(ADDENDS, (2, 16, 6, 6), 7, torch.float32))

    def loss(x, weight, bias, shift, residual, skip):
        norm = x * 2, weight, bias, 4
        y, merged = fused(*norm, shift=shift[0], residual=residual, skip=skip)
        alone = ds.ops.group_norm_silu(*norm, shift=shift, skip=skip)
        return y.square().sum() + merged.square().sum() + alone.square().sum()

    with ds.ops.use_backend(backend):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@pytest.mark.parametrize("function", [fused, norm_alone])
@combinations
def test_gradcheck(names, function):
    leaves = leaves_of(*draw_addends(names, (2, 6, 3, 2), 2, torch.float64))

    def of_leaves(x, weight, bias, *rest):
        return function(x, weight, bias, 3, **dict(zip(names, rest, strict=True)))

    assert torch.autograd.gradcheck(of_leaves, leaves)


@every_backend
def test_shift_may_differ_from_x_in_dtype(backend):
    values, addends = draw_addends(["shift", "skip"], (2, 16, 5, 5), 7, torch.bfloat16)
    addends["shift"] = addends["shift"].float() / 3
    with ds.ops.use_backend(backend):
        check_addends(fused, values, addends, 4, backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": torch.zeros(7)}, r"shift must be \[2, 8\], not of shape \[2, 7\]"),
        ({"shift": torch.zeros(8).long()}, "shift must be floating point .* not torch.int64"),
        ({"residual": torch.zeros(2, 8, 4, 3)}, r"residual must be \[2, 8, 4, 4\]"),
        ({"residual": torch.zeros(2, 8, 4, 4).double()}, "residual must be torch.float32 as x is"),
        ({"skip": torch.zeros(2, 8, 4, 3)}, r"skip must be \[2, 8, 4, 4\], not .* \[2, 8, 4, 3\]"),
        ({"skip": torch.zeros(2, 8, 4, 4).half()}, "skip must be torch.float32 as x is"),
        ({"skip": torch.zeros(2, 3, 4, 4)}, r"channels \(11\) must be a multiple of groups \(2\)"),
        ({"skip": torch.zeros(2, 8, 4, 4)}, r"weight must be \[16\]"),
        ({}, "needs shift, residual or skip"),
        ({"shift": torch.zeros(8), "float8": True, "silu": False}, "float8 needs silu=True"),
    ],
)
def test_errors_name_the_addend_that_does_not_fit(change, message):
    x, weight, bias = inputs((2, 8, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=f"^(fused_add_)?group_norm_silu: .*{message}"):
        fused(x, weight, bias, 2, **change)


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_alone_has_its_gradient(used):
    (x, weight, bias), addends = draw_addends(["skip"], (2, 8, 3, 3), 4, torch.float32)
    leaves = [x.requires_grad_(), addends["skip"].requires_grad_()]
    ((grad, _),) = some_gradients([torch.empty(2, 8, 3, 3)])
    found, expected = (
        torch.autograd.grad(function(x, weight, bias, groups=4, **addends)[used], leaves, grad)
        for function in (fused, unfused)
    )
    torch.testing.assert_close(found, expected)


@layouts
@kernel_floats
@combinations
def test_in_float8_it_is_the_norm_rounded_once(layout, dtype, names):
    (x, weight, bias), addends = draw_addends(names, (2, 12, 4, 3), 8, dtype, layout)
    weight[3] = 1e3
    y, merged = fused(x, weight, bias, 4, **addends, float8=True)
    alone = ds.ops.group_norm_silu(x, weight, bias, 4, **addends, float8=True)
    assert torch.equal(y.float(), alone.float())
    assert torch.equal(merged, fused(x, weight, bias, 4, **addends)[1])
    check_float8(y, merged, weight, bias, 4)
    assert y.stride() == merged.stride()
    assert y.double().max() == 448


@torch.no_grad()
def test_the_op_in_float8_is_sound():
    (x, *affine), addends = draw_addends(ADDENDS, (2, 12, 4, 3), 8, torch.bfloat16)
    for keep in (False, True):
        torch.library.opcheck(
            torch.ops.ds.group_norm_silu_float8.default,
            (x, *affine, 4, 1e-6, keep, *addends.values()),
            test_utils=("test_schema", "test_faketensor"),
        )
