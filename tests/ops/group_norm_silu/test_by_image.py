"""An affine of its own for each image: weight and bias [N, C], as scale_shift makes them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ds import ops
from tests.ops.group_norm_silu.cases import (
    ADDENDS,
    COMBINATIONS,
    KERNEL_FLOATS,
    both_silu,
    cases,
    check_addends,
    check_float8,
    check_forward,
    check_gradients,
    cpu,
    draw_addends,
    every_backend,
    gradients,
    inputs,
    kernel_floats,
    layouts,
    norm_alone,
    ours,
    results,
    some_gradients,
)
from tests.oracle import assert_same_bits, gradient_like, poison

fused = ops.fused_add_group_norm_silu


def compute(backend, values, groups, grad):
    """Return y, and the gradients of x, weight and bias."""
    with ops.use_backend(backend):
        return ours(*values, groups, True), *gradients(ours, values, groups, True, grad)


@cases
@layouts
@both_silu
def test_an_affine_of_each_image_is_as_exact_as_pytorchs(backend, dtype, layout, silu):
    values = inputs((3, 64, 7, 5), dtype, layout, by_image=True)
    check_forward(backend, *values, 16, silu)
    check_gradients(backend, *values, 16, silu)


@cases
@pytest.mark.parametrize("names", [("shift",), ("residual", "skip"), ADDENDS], ids="+".join)
@pytest.mark.parametrize("function", [fused, norm_alone])
def test_with_addends_an_affine_of_each_image_is_as_exact(backend, dtype, names, function):
    values, addends = draw_addends(names, (2, 36, 5, 3), 14, dtype, by_image=True)
    with ops.use_backend(backend):
        check_addends(function, values, addends, 3, backend)


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(1, 4),
    groups=st.integers(1, 9),
    per_group=st.integers(1, 23),
    size=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(KERNEL_FLOATS),
    names=st.sampled_from([(), *COMBINATIONS]),
    seed=st.integers(0, 9),
)
@every_backend
def test_any_number_of_images_groups_and_pixels(
    backend, images, groups, per_group, size, dtype, names, seed
):
    shape = (images, groups * per_group, *size)
    if len(size) == 2 and names and shape[1] > 1:
        seam = 1 + seed % (shape[1] - 1)
        values, addends = draw_addends(names, shape, seam, dtype, by_image=True)
        with ops.use_backend(backend):
            check_addends(fused, values, addends, groups, backend)
        return
    values = inputs(shape, dtype, seed=seed, by_image=True)
    check_forward(backend, *values, groups, True)
    check_gradients(backend, *values, groups, True)


@every_backend
@kernel_floats
@layouts
def test_one_row_for_all_images_gives_the_bits_of_a_norm_without_rows(backend, dtype, layout):
    """Whether the row is repeated in memory, expanded, or a few columns of a table."""
    x, weight, bias = inputs((3, 48, 7, 5), dtype, layout)
    grad = gradient_like(x)
    y, d_x, d_weight, d_bias = compute(backend, (x, weight, bias), 8, grad)
    table = torch.cat([weight, bias, weight])[None].repeat(3, 1)
    for rows in (
        [p.repeat(3, 1) for p in (weight, bias)],
        [p.expand(3, -1) for p in (weight, bias)],
        [table[:, :48], table[:, 48:96]],
        [weight.repeat(3, 1), bias.repeat_interleave(3).view(48, 3).T],
    ):
        by_image = compute(backend, (x, *rows), 8, grad)
        if backend == "aten":  # PyTorch's kernel folds an affine into its own factors
            torch.testing.assert_close(by_image[:2], (y, d_x))
        else:
            assert_same_bits(by_image[:2], (y, d_x))
        sums = [d.float().sum(0).to(dtype) for d in by_image[2:]]
        torch.testing.assert_close(sums, [d_weight, d_bias], atol=0.02, rtol=0.02)


@every_backend
@kernel_floats
@layouts
def test_bits_of_an_image_are_those_it_has_alone_and_again(backend, dtype, layout):
    """Of its gradients of weight and bias too, on any number of threads."""
    values = inputs((4, 60, 9, 11), dtype, layout, by_image=True)
    grad = gradient_like(values[0])
    batch = compute(backend, values, 5, grad)
    assert_same_bits(compute(backend, values, 5, grad), batch)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads)
        again = compute(backend, values, 5, grad)
    finally:
        torch.set_num_threads(threads)
    if backend != "cpu":  # others promise no such thing
        return
    assert_same_bits(again, batch)
    for i in range(4):
        alone = [value[i : i + 1].clone(memory_format=torch.preserve_format) for value in values]
        found = compute(backend, alone, 5, grad[i : i + 1])
        assert_same_bits(found, [value[i : i + 1] for value in batch])


@cases
@layouts
def test_every_element_of_rows_of_gradients_is_written(backend, dtype, layout, monkeypatch):
    values = inputs((2, 48, 5, 3), dtype, layout, by_image=True)
    grad = gradient_like(values[0])
    expected = compute(backend, values, 4, grad)
    poison(monkeypatch)
    assert_same_bits(compute(backend, values, 4, grad), expected)


@cpu
@layouts
def test_an_affine_too_large_for_the_fast_exponential_is_exact(backend, layout):
    """Of one image alone: what is small is asked of the row, not of the first one."""
    x, weight, bias = inputs((2, 32, 6, 8), torch.float32, layout, by_image=True)
    bias[1, 3], weight[1, 30] = -300.0, 400.0
    check_forward(backend, x, weight, bias, 8, True)
    check_gradients(backend, x, weight, bias, 8, True)


@cpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image(backend, bad):
    values = inputs((3, 12, 4, 5), torch.float32, torch.channels_last, by_image=True)
    grad = gradient_like(values[0])
    clean = compute(backend, values, 3, grad)
    values[1][1, 4] = bad
    for found, expected in zip(compute(backend, values, 3, grad), clean, strict=True):
        assert_same_bits([found[::2]], [expected[::2]])


@every_backend
def test_opcheck(backend):
    values, addends = draw_addends(ADDENDS, (2, 12, 3, 5), 5, torch.float32, by_image=True)
    leaves = [value.requires_grad_() for value in (*values, *addends.values())]
    arguments = (*leaves[:3], 3, 1e-6, True, False, *leaves[3:])
    with ops.use_backend(backend):
        torch.library.opcheck(torch.ops.ds.group_norm_silu.default, arguments)
        x, weight, bias, *given = (leaf.detach() for leaf in leaves)
        y, mean, rstd, _ = (t.detach() for t in torch.ops.ds.group_norm_silu(*arguments))
        arguments = (y, x, weight, bias, mean, rstd, 3, True, 5, None, *given)
        torch.library.opcheck(torch.ops.ds.group_norm_silu_backward.default, arguments)


@every_backend
def test_it_compiles_without_graph_breaks(backend):
    x, scale, shift = inputs((2, 16, 6, 6), torch.float32, by_image=True)
    weight, bias = inputs((1, 16, 1), torch.float32)[1:]
    leaves = [value.requires_grad_() for value in (x, weight, bias, scale, shift)]

    def loss(x, *affine):
        return ops.group_norm_silu(x * 2, *ops.scale_shift(*affine), 4).square().sum()

    with ops.use_backend(backend):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@kernel_floats
@pytest.mark.parametrize("names", [(), ("skip",), ADDENDS], ids="+".join)
def test_in_float8_it_is_the_norm_rounded_once(dtype, names):
    (x, weight, bias), addends = draw_addends(names, (2, 12, 4, 3), 8, dtype, by_image=True)
    weight[1, 3] = 1e3
    y = ops.group_norm_silu(x, weight, bias, 4, **addends, float8=True)
    merged = fused(x, weight, bias, 4, **addends)[1] if names else x
    check_float8(y, merged, weight, bias, 4)
    assert y.double().max() == 448


@every_backend
def test_no_images_have_no_rows(backend):
    values, addends = draw_addends(ADDENDS, (0, 12, 3, 3), 5, torch.float32, by_image=True)
    with ops.use_backend(backend):
        assert fused(*values, 3, **addends)[0].shape == (0, 12, 3, 3)
        _, found = results(fused, values, addends, 3, some_gradients)
    assert found["weight"].shape == found["bias"].shape == (0, 12)


def test_rows_may_differ_from_x_in_dtype():
    x, weight, bias = inputs((2, 16, 5, 5), torch.bfloat16, by_image=True)
    values, grad = (x, weight.double(), bias.double()), gradient_like(x)
    for backend in ("reference", "aten", "cpu"):
        found = compute(backend, values, 4, grad)
        assert [t.dtype for t in found] == [x.dtype, *(value.dtype for value in values)]
        exact = compute(backend, [v.float() for v in values], 4, grad.float())
        for a, b in zip(found, exact, strict=True):
            assert (a - b).abs().max() < 5e-3 * b.abs().max()


def test_scale_shift_makes_the_affine_of_an_adaptive_norm():
    x, scale, shift = inputs((2, 12, 3, 4), torch.float64, by_image=True)
    weight, bias = inputs((1, 12, 1), torch.float64)[1:]
    norm = F.group_norm(x, 3, weight, bias, 1e-6)
    expected = F.silu(norm * (1 + scale[..., None, None]) + shift[..., None, None])
    affine = ops.scale_shift(weight, bias, scale, shift)
    torch.testing.assert_close(ops.group_norm_silu(x, *affine, 3), expected)
    narrow = (v.bfloat16() for v in (weight, bias, scale, shift))
    assert {v.dtype for v in ops.scale_shift(*narrow)} == {torch.float32}


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ((3, 8), (3, 8), r"weight must be \[8\] or \[2, 8\], not of shape \[3, 8\]"),
        ((2, 7), (2, 7), r"weight must be \[8\] or \[2, 8\], not of shape \[2, 7\]"),
        ((2, 8, 1), (2, 8, 1), r"weight must be \[8\] or \[2, 8\], not of shape \[2, 8, 1\]"),
        ((8,), (2, 8), r"weight and bias must have one shape, not \[8\] and \[2, 8\]"),
        ((2, 8), (8,), r"weight and bias must have one shape, not \[2, 8\] and \[8\]"),
    ],
)
def test_an_affine_that_does_not_fit_the_images_is_one_clear_error(weight, bias, message):
    with pytest.raises(ValueError, match=f"^group_norm_silu: {message}"):
        ops.group_norm_silu(torch.zeros(2, 8, 3, 3), torch.zeros(weight), torch.zeros(bias), 2)
