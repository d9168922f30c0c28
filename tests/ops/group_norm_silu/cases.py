"""Arguments for GroupNorm-SiLU, what PyTorch makes of them, and the comparison of gradients."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ds.ops
from tests.oracle import FLOATS, assert_close, gradient_like

KERNEL_FLOATS = [torch.bfloat16, torch.float32]
CASES = [
    *[(backend, dtype) for backend in ("reference", "aten") for dtype in FLOATS],
    *[("cpu", dtype) for dtype in KERNEL_FLOATS],
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ADDENDS = ["shift", "residual", "skip"]
COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(ADDENDS, n)]
Sizes = dict[str, float]
Named = dict[str, Tensor]

cases = pytest.mark.parametrize(("backend", "dtype"), CASES)
every_backend = pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
cpu = pytest.mark.parametrize("backend", ["cpu"])
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
kernel_floats = pytest.mark.parametrize("dtype", KERNEL_FLOATS)
both_silu = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])
combinations = pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
adversarial = pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda x: x + 2e4, id="mean of 1e4 standard deviations"),
        pytest.param(lambda x: x - 2e4, id="negative mean"),
        pytest.param(lambda x: x * 1e-39, id="denormals"),
        pytest.param(lambda x: x * 1e12, id="large"),
        pytest.param(lambda x: x + spike(x), id="outlier"),
    ],
)


def inputs(
    shape, dtype, layout=torch.contiguous_format, seed=0, by_image=False
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, weight and bias [C], or [N, C] by image."""
    affine = shape[:2] if by_image else shape[1:2]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5
    weight = 1 + 0.3 * torch.randn(affine, generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(affine, generator=generator, dtype=torch.float64)
    x = x.to(dtype)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    return x, weight.to(dtype), bias.to(dtype)


def spike(x: Tensor) -> Tensor:
    """Return 10000 in the first pixel of every channel, and 0 elsewhere."""
    spike = torch.zeros_like(x)
    spike[:, :, 0, 0] = 1e4
    return spike


def draw_addends(
    names, shape, seam, dtype, layout=torch.channels_last, shift_rows=True, by_image=False
) -> tuple[tuple[Tensor, Tensor, Tensor], Named]:
    """Return x, weight and bias, and addends: x has the channels up to the seam, skip the rest."""
    whole, weight, bias = inputs(shape, dtype, layout, by_image=by_image)
    if "skip" not in names:
        seam = shape[1]
    generator = torch.Generator().manual_seed(2)
    x = whole[:, :seam].contiguous(memory_format=layout)
    rows = x.shape[:2] if shift_rows else x.shape[1:2]
    addends = {
        "shift": torch.randn(rows, generator=generator).to(dtype),
        "residual": torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator)),
        "skip": whole[:, seam:].contiguous(memory_format=layout),
    }
    return (x, weight, bias), {name: addends[name] for name in names}


def pytorch(x, weight, bias, groups, silu, eps=1e-6) -> Tensor:
    """Return PyTorch's norm; of affines by image, that of one image with the channels of all."""
    if weight.dim() == 2:
        affine = weight.flatten(), bias.flatten()
        y = torch.group_norm(x.reshape(1, -1, *x.shape[2:]), len(x) * groups, *affine, eps)
        y = y.reshape(x.shape)
    else:
        y = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def ours(x, weight, bias, groups, silu, eps=1e-6) -> Tensor:
    """Return our norm."""
    function = ds.ops.group_norm_silu if silu else ds.ops.group_norm
    return function(x, weight, bias, groups, eps)


def merged_by_pytorch(x, shift=None, residual=None, skip=None) -> Tensor:
    """Return cat(x + shift + residual, skip), rounded after each addition."""
    if shift is not None:
        x = (x + shift.view(*shift.shape, 1, 1)).to(x.dtype)
    if residual is not None:
        x = x + residual
    return x if skip is None else torch.cat([x, skip], 1)


def unfused(x, weight, bias, groups, **addends) -> tuple[Tensor, Tensor]:
    """Return PyTorch's norm of the merged x, and the merged x."""
    merged = merged_by_pytorch(x, **addends)
    return pytorch(merged, weight, bias, groups, True), merged


def norm_alone(x, weight, bias, groups, **addends) -> tuple[Tensor, Tensor]:
    """Return y of the function that returns no merged x, and the merged x of PyTorch."""
    y = ds.ops.group_norm_silu(x, weight, bias, groups, **addends)
    return y, merged_by_pytorch(x, **addends)


def gradients(function, values, groups, silu, grad, dtype=None) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight and bias, computed in a dtype."""
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in values]
    y = function(*leaves, groups, silu)
    return torch.autograd.grad(y, leaves, grad.to(dtype or grad.dtype))


def results(function, values, addends, groups, grads, dtype=None) -> tuple[list[Tensor], Named]:
    """Return the outputs of a function, and the gradients of its arguments by name."""
    named = dict(zip(("x", "weight", "bias"), values, strict=True)) | addends
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    outputs = function(groups=groups, **leaves)
    drawn = [grad.to(output.dtype) for grad, output in grads(outputs)]
    found = torch.autograd.grad(outputs, leaves.values(), drawn)
    return list(outputs), dict(zip(leaves, found, strict=True))


def some_gradients(outputs) -> list[tuple[Tensor, Tensor]]:
    """Draw gradients that every data type holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(o.shape, generator=generator).bfloat16().to(o.device), o) for o in outputs]


def cancelling(backend: str, x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> Sizes:
    """Return, for each gradient of a norm, the size of the terms that cancel in it.

    If the mean is rounded to float32 before it is subtracted, they grow with x * rstd. The C++
    kernels carry the rounding error of the mean along.
    """
    x, sizes = x.double(), grad.double().abs()
    rstd = (x.reshape(len(x), groups, -1).var(2, correction=0).min() + 1e-6).rsqrt()
    largest = weight.double().abs().max() * sizes.max() * rstd
    summed = sizes.transpose(0, 1).flatten(1).sum(1).max()
    offset = 1.0 if backend == "cpu" else (x.abs().max() * rstd).clamp(min=1.0)
    return {
        "x": (largest * offset).item(),
        "weight": (summed * offset).item(),
        "bias": summed.item(),
    }


def check_forward(backend, x, weight, bias, groups, silu, eps=1e-6) -> Tensor:
    """Compare our norm with float64; return it."""
    with ds.ops.use_backend(backend):
        y = ours(x, weight, bias, groups, silu, eps)
    exact = pytorch(x.double(), weight.double(), bias.double(), groups, silu, eps)
    assert_close("y", exact, y, pytorch(x, weight, bias, groups, silu, eps))
    return y


def check_gradients(backend, x, weight, bias, groups, silu, grad=None) -> None:
    """Compare the gradients of our norm with float64."""
    grad = gradient_like(x) if grad is None else grad
    with ds.ops.use_backend(backend):
        found = gradients(ours, (x, weight, bias), groups, silu, grad)
    compare_gradients(backend, found, x, weight, bias, groups, silu, grad)


def compare_gradients(backend, found, x, weight, bias, groups, silu, grad) -> None:
    """Compare gradients of x, weight and bias with float64: three times the error of PyTorch."""
    values = x, weight, bias
    plain = gradients(pytorch, values, groups, silu, grad)
    exact = gradients(pytorch, values, groups, silu, grad, torch.float64)
    sizes = cancelling(backend, x, weight, grad, groups).items()
    for (name, terms), *gradient in zip(sizes, exact, found, plain, strict=True):
        assert_close(f"d_{name}", *gradient, factor=3, terms=terms)


def check_addends(function, values, addends, groups, backend="") -> list[Tensor]:
    """Compare outputs and gradients with float64, allowing as much as for the norm alone.

    The merged x is compared with its sum in float64, the rest with the norm of it as rounded.
    """

    def rounded(x, weight, bias, groups, **addends):
        merged = merged_by_pytorch(x, **addends)
        assert_close("merged", merged.detach(), outputs[1], plain[1])
        merged = merged + (outputs[1].double() - merged).detach()
        return pytorch(merged, weight, bias, groups, True), merged

    outputs, found = results(function, values, addends, groups, some_gradients)
    plain, found_plain = results(unfused, values, addends, groups, some_gradients)
    exact, found_exact = results(rounded, values, addends, groups, some_gradients, torch.float64)
    assert_close("y", exact[0], outputs[0], plain[0])
    x, weight, _ = values
    sizes = cancelling(backend, exact[1], weight, some_gradients(exact)[0][0].to(x.device), groups)
    sizes |= dict.fromkeys(("residual", "skip"), sizes["x"])
    sizes["shift"] = sizes["x"] * len(x) * x[0, 0].numel()
    # The gradient of x may be rounded, each element by half of eps, before shift's sums it.
    summed = found_exact["x"].abs().transpose(0, 1).flatten(1).sum(1).max().item()
    sizes["shift"] += summed * torch.finfo(x.dtype).eps / 2 / (2 * 2**-23)
    if "shift" in addends and addends["shift"].dim() == 1:  # its gradient is a sum of rounded rows
        rows = addends | {"shift": addends["shift"].expand(x.shape[:2])}
        _, by_image = results(rounded, values, rows, groups, some_gradients, torch.float64)
        roundings = torch.finfo(addends["shift"].dtype).eps / 2**-23
        sizes["shift"] += by_image["shift"].abs().sum(0).max().item() * roundings
    for name, gradient in found.items():
        assert gradient.dtype == addends.get(name, x).dtype
        others = gradient, found_plain[name]
        assert_close(f"d_{name}", found_exact[name], *others, factor=3, terms=sizes[name])
    return outputs


def check_float8(y, merged, weight, bias, groups) -> None:
    """Compare with the norm in float64, rounded: half of the last of 4 bits, or of the least."""
    exact = pytorch(merged.double(), weight.double(), bias.double(), groups, True)
    exact = exact.clamp(-448, 448)
    assert y.dtype == torch.float8_e4m3fn
    assert ((y.double() - exact).abs() <= 1.001 * (exact.abs() / 16 + 2**-10)).all()


def gpu_silu_error(z: Tensor) -> Tensor:
    """Return the relative error that a GPU's silu(z) may have, in float64.

    exp(-z) is exp2 of z times log2(e). The constant is off by less than 2**-26 of it and the
    product is rounded by 2**-24; exp makes |z| times as much of that in a small result. The rest is
    three approximations of 2**-22, exp2 and either two roots or a division, and three roundings
    (PTX ISA, ex2.approx, rsqrt.approx and div.approx).
    """
    return z.double().clamp(max=0).abs() * (2**-24 + 2**-26) + 4 * 2**-22
