"""An affine of its own for each image: weight and bias [N, C], as scale_shift makes them."""

import pytest
import torch
import torch.nn.functional as F

from ds import ops
from tests.ops.group_norm_silu.cases import CASES, both_silu, layouts, ours
from tests.oracle import assert_close, gradient_like


def inputs(shape, dtype, layout=torch.contiguous_format):
    """Draw x, weight and bias, the latter two for each image."""
    generator = torch.Generator().manual_seed(0)
    x, rows = torch.empty(shape), torch.empty(2, *shape[:2])
    x, rows = (v.normal_(generator=generator) for v in (x, rows))
    x = (2 * x + 0.5).to(dtype).contiguous(memory_format=layout)
    return x, *(torch.tensor([[[1.0]], [[0.0]]]) + 0.3 * rows).to(dtype)


def pytorch(x, weight, bias, groups, silu, eps=1e-6):
    """Return PyTorch's norm, scaled and shifted image by image."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    y = F.group_norm(wide, groups, eps=eps) * weight[..., None, None] + bias[..., None, None]
    return (F.silu(y) if silu else y).to(x.dtype)


def gradients(function, values, groups, silu, grad, dtype=None):
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in values]
    y = function(*leaves, groups, silu)
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))


@pytest.mark.parametrize(("backend", "dtype"), [case for case in CASES if case[0] != "cpu"])
@layouts
@both_silu
def test_an_affine_of_each_image_is_as_exact_as_pytorchs(backend, dtype, layout, silu):
    values = inputs((3, 64, 7, 5), dtype, layout)
    grad = gradient_like(values[0])
    with ops.use_backend(backend):
        found = gradients(ours, values, 16, silu, grad)
    exact = gradients(pytorch, values, 16, silu, grad, torch.float64)
    plain = gradients(pytorch, values, 16, silu, grad)
    assert [y.shape for y in found] == [values[0].shape, *(v.shape for v in values)]
    assert found[0].stride() == values[0].stride()
    for name, *results in zip(("y", "d_x", "d_weight", "d_bias"), exact, found, plain, strict=True):
        assert_close(name, *results, factor=3)


def test_scale_shift_makes_the_affine_of_an_adaptive_norm():
    x, scale, shift = inputs((2, 12, 3, 4), torch.float64)
    weight, bias = inputs((1, 12, 1, 1), torch.float64)[1:]
    norm = F.group_norm(x, 3, weight[0], bias[0], 1e-6)
    expected = F.silu(norm * (1 + scale[..., None, None]) + shift[..., None, None])
    affine = ops.scale_shift(weight[0], bias[0], scale, shift)
    torch.testing.assert_close(ops.group_norm_silu(x, *affine, 3), expected)
    narrow = (v.bfloat16() for v in (weight[0], bias[0], scale, shift))
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
