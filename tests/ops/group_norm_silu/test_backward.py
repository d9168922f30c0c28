"""Gradients of group_norm_silu and group_norm, and promises that hold in both directions."""

import pytest
import torch

import ds.ops
from tests.ops.group_norm_silu.cases import (
    LAYOUTS,
    both_silu,
    cases,
    check_gradients,
    cpu,
    every_backend,
    gradients,
    inputs,
    kernel_floats,
    layouts,
    ours,
    pytorch,
)
from tests.oracle import assert_same_bits, gradient_like, poison


@cases
@layouts
@both_silu
def test_gradients_are_as_exact_as_pytorchs(backend, dtype, layout, silu):
    check_gradients(backend, *inputs((3, 64, 7, 5), dtype, layout), 16, silu)


@layouts
@cpu
def test_the_kernel_keeps_its_precision_far_from_zero(backend, layout):
    x, *parameters = inputs((2, 32, 33, 31), torch.float32, layout)
    values = x / 2 + 1e4, *parameters
    grad = gradient_like(x)
    with ds.ops.use_backend(backend):
        found = gradients(ours, values, 8, True, grad)
    exact = gradients(pytorch, values, 8, True, grad, torch.float64)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() < 5e-6 * b.abs().max()


@cases
@layouts
@pytest.mark.parametrize("place", ["grad", "x", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_are_finite_where_pytorchs_are(backend, dtype, layout, place, bad):
    x, weight, bias = inputs((2, 32, 5, 7), dtype, layout)
    grad = gradient_like(x)
    {"grad": grad[1, 9], "x": x[1, 9], "bias": bias}[place].view(-1)[5] = bad
    with ds.ops.use_backend(backend):
        found = gradients(ours, (x, weight, bias), 8, True, grad)
    expected = gradients(pytorch, (x, weight, bias), 8, True, grad)
    assert_same_bits([a.isfinite() for a in found], [b.isfinite() for b in expected])


@cases
@layouts
def test_every_element_of_gradients_is_written(backend, dtype, layout, monkeypatch):
    values = inputs((2, 48, 5, 3), dtype, layout)
    grad = gradient_like(values[0])
    with ds.ops.use_backend(backend):
        expected = gradients(ours, values, 4, True, grad)
        poison(monkeypatch)
        assert_same_bits(gradients(ours, values, 4, True, grad), expected)


@layouts
@kernel_floats
@every_backend
def test_bits_depend_on_neither_repetition_nor_threads(backend, layout, dtype):
    values = inputs((4, 96, 31, 33), dtype, layout)
    grad = gradient_like(values[0])

    def compute():
        forward = torch.ops.ds.group_norm_silu(*values, 8, 1e-6, True)
        return *forward, *gradients(ours, values, 8, True, grad)

    threads = torch.get_num_threads()
    try:
        with ds.ops.use_backend(backend):
            torch.set_num_threads(1)
            first, again = compute(), compute()
            torch.set_num_threads(2)
            two = compute()
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(again, first)
    if backend == "cpu":  # PyTorch's own reductions promise no such thing
        assert_same_bits(two, first)


@layouts
@kernel_floats
@cpu
def test_bits_do_not_depend_on_the_batch(backend, layout, dtype):
    x, weight, bias = inputs((6, 60, 9, 11), dtype, layout)
    grad = gradient_like(x)
    with ds.ops.use_backend(backend):
        batch = ours(x, weight, bias, 5, True)
        d_batch = gradients(ours, (x, weight, bias), 5, True, grad)[0]
        for i in range(len(x)):
            alone = x[i : i + 1].clone(memory_format=layout)
            assert torch.equal(ours(alone, weight, bias, 5, True)[0], batch[i])
            found = gradients(ours, (alone, weight, bias), 5, True, grad[i : i + 1])
            assert torch.equal(found[0][0], d_batch[i])


@pytest.mark.each_value
@every_backend
@layouts
def test_opcheck(backend, layout):
    values = inputs((2, 12, 3, 5), torch.float32, layout)
    with ds.ops.use_backend(backend):
        y, mean, rstd, _ = torch.ops.ds.group_norm_silu(*values, 4, 1e-6, True)
        arguments = (y, *values, mean, rstd, 4, True, 12)
        torch.library.opcheck(torch.ops.ds.group_norm_silu_backward.default, arguments)
        leaves = [value.requires_grad_() for value in values]
        torch.library.opcheck(torch.ops.ds.group_norm_silu.default, (*leaves, 4, 1e-6, True))


@every_backend
def test_compiles_without_graph_breaks(backend):
    leaves = [v.requires_grad_() for v in inputs((2, 16, 6, 6), torch.float32, LAYOUTS[1])]

    def loss(x, weight, bias):
        return ds.ops.group_norm_silu(x * 2, weight, bias, 4).square().sum()

    with ds.ops.use_backend(backend):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@both_silu
def test_gradcheck_in_float64(silu):
    leaves = [value.requires_grad_() for value in inputs((2, 6, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: ours(*args, 3, silu), leaves)


def test_gradients_are_the_same_bits_through_the_dispatcher():
    leaves = [value.requires_grad_() for value in inputs((2, 8, 3, 3), torch.float32)]
    grad = gradient_like(leaves[0])
    direct = ds.ops.group_norm_silu(*leaves, 4)
    dispatched = torch.ops.ds.group_norm_silu(*leaves, 4, 1e-6, True)[0]
    assert_same_bits(
        *(torch.autograd.grad(y, leaves, grad) for y in (direct, dispatched)),
    )
