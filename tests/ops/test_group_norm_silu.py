"""group_norm_silu against float64, for every backend, data type, layout and direction."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops
from ds.ops import _native

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KERNEL_FLOATS = [torch.bfloat16, torch.float32]
CASES = [
    *[(backend, dtype) for backend in ("reference", "aten") for dtype in FLOATS],
    *[("cpu", dtype) for dtype in KERNEL_FLOATS],
]
BACKENDS = ["reference", "aten", "cpu"]
Sizes = dict[str, float]
LAYOUTS = [torch.contiguous_format, torch.channels_last]

cases = pytest.mark.parametrize(("backend", "dtype"), CASES)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
kernel_floats = pytest.mark.parametrize("dtype", KERNEL_FLOATS)


@pytest.fixture(autouse=True)
def _built(request):
    params = getattr(request.node, "callspec", None)
    if params is None or params.params.get("backend") != "cpu":
        return
    if not _native.build_info()["built"]:
        pytest.skip(f"libds_cpu.so is not built: {_native.build_info()['reason']}")


def forced(backend: str) -> contextlib.AbstractContextManager:
    return ds.ops.use_backend(backend)


def inputs(shape, dtype, layout=torch.contiguous_format, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.5
    weight = 1 + 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64)
    x = x.to(dtype)
    return (
        (x.contiguous(memory_format=layout) if x.dim() == 4 else x),
        weight.to(dtype),
        bias.to(dtype),
    )


def pytorch(x, weight, bias, groups, silu, eps=1e-6) -> Tensor:
    y = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def ours(x, weight, bias, groups, silu, eps=1e-6) -> Tensor:
    function = ds.ops.group_norm_silu if silu else ds.ops.group_norm
    return function(x, weight, bias, groups, eps)


def assert_as_exact(
    actual: Tensor, baseline: Tensor, exact: Tensor, factor: float, terms: float = 0.0
) -> None:
    """Allow `factor` times the error of PyTorch in the same data type, plus two roundings of exact.

    And two float32 roundings of `terms`, the size of what cancels in a sum. For float64 there is no
    more exact answer to compare with, so a few roundings more are allowed.
    """
    assert actual.dtype == baseline.dtype
    if not exact.numel():
        return
    roundings = 16 if actual.dtype == torch.float64 else 2
    floor = roundings * torch.finfo(actual.dtype).eps * exact.abs().max() + 2 * 2**-23 * terms
    error, allowed = (actual.double() - exact).abs().max(), (baseline.double() - exact).abs().max()
    assert error <= factor * allowed + floor, (
        f"{error:.3g} > {factor} * {allowed:.3g} + {floor:.3g}"
    )


def gradient_like(x: Tensor) -> Tensor:
    """Draw a gradient with the strides of x."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return torch.empty_like(x).copy_(drawn)


def gradients(function, values, groups, silu, grad, dtype=None) -> tuple[Tensor, ...]:
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in values]
    y = function(*leaves, groups, silu)
    return torch.autograd.grad(y, leaves, grad.to(dtype or grad.dtype))


def cancelling(backend: str, x: Tensor, weight: Tensor, grad: Tensor, groups: int) -> Sizes:
    """Return, for each gradient of a norm, the size of the terms that cancel in it.

    Where the mean is rounded to float32 before it is subtracted, they grow with x * rstd. The C++
    kernels carry what the rounding took.
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


def check_gradients(backend, x, weight, bias, groups, silu, grad=None) -> None:
    """Compare with float64, allowing three times the error of PyTorch."""
    values = (x, weight, bias)
    grad = gradient_like(x) if grad is None else grad
    with forced(backend):
        actual = gradients(ours, values, groups, silu, grad)
    baseline = gradients(pytorch, values, groups, silu, grad)
    exact = gradients(pytorch, values, groups, silu, grad, torch.float64)
    terms = cancelling(backend, x, weight, grad, groups).values()
    for *results, size in zip(actual, baseline, exact, terms, strict=True):
        assert_as_exact(*results, factor=3, terms=size)


def check_forward(backend, x, weight, bias, groups, silu, eps=1e-6) -> Tensor:
    with forced(backend):
        y = ours(x, weight, bias, groups, silu, eps)
    exact = pytorch(x.double(), weight.double(), bias.double(), groups, silu, eps)
    assert_as_exact(y, pytorch(x, weight, bias, groups, silu, eps), exact, factor=2)
    return y


@cases
@layouts
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 128, 9, 7), 32), ((3, 96, 5, 5), 8), ((2, 30, 3, 11), 10), ((1, 7, 13, 1), 7),
     ((2, 21, 8, 8), 1), ((1, 384, 4, 4), 32), ((2, 5, 1, 1), 1)],
)  # fmt: skip
def test_forward_is_as_exact_as_pytorch(backend, dtype, layout, silu, shape, groups):
    check_forward(backend, *inputs(shape, dtype, layout), groups, silu)


@cases
@layouts
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_are_as_exact_as_pytorchs(backend, dtype, layout, silu):
    check_gradients(backend, *inputs((3, 64, 7, 5), dtype, layout), 16, silu)


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(0, 3),
    groups=st.integers(1, 12),
    per_group=st.integers(1, 13),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    dtype=st.sampled_from(KERNEL_FLOATS),
    view=st.sampled_from(["nchw", "nhwc", "channel slice", "pixel slice", "step", "transposed"]),
    silu=st.booleans(),
    other_grad=st.sampled_from(["as x", "nchw", "nhwc", "expanded"]),
)
@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
def test_any_shape_and_strides(
    backend, images, groups, per_group, size, dtype, view, silu, other_grad
):
    height, width = size
    channels = groups * per_group
    x, weight, bias = inputs((images, channels + 2, height + 1, 2 * width), dtype)
    x = {
        "nchw": lambda: x[:, :channels, :height, :width].contiguous(),
        "nhwc": lambda: x[:, :channels, :height, :width].contiguous(
            memory_format=torch.channels_last
        ),
        "channel slice": lambda: x.contiguous(memory_format=torch.channels_last)[
            :, 1 : 1 + channels
        ],
        "pixel slice": lambda: x[:, :channels, 1:, width:],
        "step": lambda: x[:, :channels, :, ::2],
        "transposed": lambda: x[:, :channels].transpose(2, 3),
    }[view]()
    weight, bias = weight[:channels], bias[1 : 1 + channels]
    y = check_forward(backend, x, weight, bias, groups, silu)
    assert y.shape == x.shape
    for layout in LAYOUTS:
        if x.is_contiguous(memory_format=layout):
            assert y.is_contiguous(memory_format=layout)
    grad = gradient_like(x)
    grad = {
        "as x": lambda: grad,
        "nchw": lambda: grad.contiguous(),
        "nhwc": lambda: grad.contiguous(memory_format=torch.channels_last),
        "expanded": lambda: grad[..., :1, :1].expand_as(x),
    }[other_grad]()
    if images:  # PyTorch's own backward refuses an empty batch
        check_gradients(backend, x, weight, bias, groups, silu, grad)


@cases
@layouts
@pytest.mark.parametrize("silu", [False, True])
def test_constant_groups_give_the_bias(backend, dtype, layout, silu):
    x, weight, bias = inputs((2, 32, 5, 5), dtype, layout)
    x = torch.full_like(x, 3.1)
    with forced(backend):
        y = ours(x, weight, bias, 8, silu)
    expected = (F.silu(bias.double()) if silu else bias.double()).view(1, -1, 1, 1)
    # The mean of equal values may be off by a few roundings, which 1 / sqrt(eps) = 1000 enlarges.
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = 3.1 * 1000 * 4 * torch.finfo(wide).eps + torch.finfo(dtype).eps
    assert (y.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
@layouts
@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda x: x + 2e4, id="mean of 1e4 standard deviations"),
        pytest.param(lambda x: x * 1e-39, id="denormals"),
        pytest.param(lambda x: x * 1e12, id="large"),
        pytest.param(lambda x: x + spike(x), id="outlier"),
        pytest.param(lambda x: x - 2e4, id="negative mean"),
    ],
)
def test_adversarial_values(backend, layout, disturb):
    x, weight, bias = inputs((2, 32, 17, 16), torch.float32, layout)
    x = disturb(x).contiguous(memory_format=layout)
    check_forward(backend, x, weight, bias, 8, True)
    check_gradients(backend, x, weight, bias, 8, True)


def spike(x: Tensor) -> Tensor:
    spike = torch.zeros_like(x)
    spike[:, :, 0, 0] = 1e4
    return spike


@layouts
@pytest.mark.parametrize("backend", ["cpu"])
def test_the_kernel_keeps_its_precision_far_from_zero(backend, layout):
    """The variance is taken about the mean, so an offset costs what rounding x costs, not more."""
    x, weight, bias = inputs((2, 32, 33, 31), torch.float32, layout)
    x = x / 2 + 1e4
    with forced(backend):
        y = ours(x, weight, bias, 8, False)
    exact = pytorch(x.double(), weight.double(), bias.double(), 8, False)
    assert (y - exact).abs().max() < 5e-6
    values, grad = (x, weight, bias), gradient_like(x)
    with forced(backend):
        actual = gradients(ours, values, 8, True, grad)
    exact = gradients(pytorch, values, 8, True, grad, torch.float64)
    for a, b in zip(actual, exact, strict=True):
        assert (a - b).abs().max() < 5e-6 * b.abs().max()


@cases
@layouts
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate_as_in_pytorch(backend, dtype, layout, silu, bad):
    x, weight, bias = inputs((2, 32, 5, 7), dtype, layout)
    x[1, 9, 2, 3] = bad
    bias[1], bias[5], bias[6] = bad, 200, -200
    with forced(backend):
        y = ours(x, weight, bias, 8, silu)
    expected = pytorch(x, weight, bias, 8, silu)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())


@cases
@layouts
@pytest.mark.parametrize("place", ["grad", "x", "bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_are_finite_where_pytorchs_are(backend, dtype, layout, place, bad):
    x, weight, bias = inputs((2, 32, 5, 7), dtype, layout)
    grad = gradient_like(x)
    {"grad": grad[1, 9], "x": x[1, 9], "bias": bias}[place].view(-1)[5] = bad
    with forced(backend):
        actual = gradients(ours, (x, weight, bias), 8, True, grad)
    expected = gradients(pytorch, (x, weight, bias), 8, True, grad)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def gpu_silu_error(z: Tensor) -> Tensor:
    """Return the relative error that a GPU's silu(z) may have, in float64.

    exp(-z) is exp2 of z times log2(e). The constant is off by less than 2**-26 of it and the
    product is rounded by 2**-24, of which exp makes |z| times as much of a small result. What
    remains is three approximations of 2**-22, exp2 and twice the root or once the division, and
    three roundings (PTX ISA, ex2.approx, rsqrt.approx and div.approx).
    """
    return z.double().clamp(max=0).abs() * (2**-24 + 2**-26) + 4 * 2**-22


@pytest.mark.parametrize("backend", ["cpu"])
def test_silu_over_its_whole_range(backend):
    """With a weight of zero the output is silu(bias), whatever x is."""
    bias = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([-3e38, 3e38, 0.0, 1e-40])])
    with forced(backend):
        y = ours(torch.zeros(1, len(bias), 1, 1), torch.zeros_like(bias), bias, 1, True).flatten()
    exact = F.silu(bias.double())
    assert ((y - exact).abs() <= 4e-7 * exact.abs() + 1e-36).all()


@pytest.mark.parametrize("backend", BACKENDS)
@layouts
@pytest.mark.parametrize("scale", [10.0, 100.0, 3e4])
def test_silu_of_what_leaves_the_range_of_the_exponential(backend, layout, scale):
    """Some channels stay within it, others do not, and some only by their bias."""
    x, weight, bias = inputs((2, 64, 5, 3), torch.float32, layout)
    weight[::3] *= scale
    bias[1::5] += 9 * scale
    check_forward(backend, x, weight, bias, 8, True)
    check_gradients(backend, x, weight, bias, 8, True)


@cases
@layouts
def test_every_output_element_is_written(backend, dtype, layout, monkeypatch):
    values = inputs((2, 48, 5, 3), dtype, layout)
    with forced(backend):
        expected = ours(*values, 4, True)
        monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        for result in torch.ops.ds.group_norm_silu(*values, 4, 1e-6, True):
            assert not result.isnan().any()
        assert torch.equal(ours(*values, 4, True), expected)
        for result in gradients(ours, values, 4, True, gradient_like(values[0])):
            assert not result.isnan().any()


def poisoned(allocate):
    return lambda *args, **kwargs: allocate(*args, **kwargs).fill_(float("nan"))


@layouts
@kernel_floats
@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
def test_bits_depend_on_neither_repetition_nor_threads(backend, layout, dtype):
    values = inputs((4, 96, 31, 33), dtype, layout)
    grad = gradient_like(values[0])

    def compute():
        forward = torch.ops.ds.group_norm_silu(*values, 8, 1e-6, True)
        return *forward, *gradients(ours, values, 8, True, grad)

    threads = torch.get_num_threads()
    try:
        with forced(backend):
            torch.set_num_threads(1)
            first, again = compute(), compute()
            torch.set_num_threads(2)
            two = compute()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if backend == "cpu":  # PyTorch's own reductions promise no such thing
        assert all(torch.equal(a, b) for a, b in zip(first, two, strict=True))


@layouts
@kernel_floats
@pytest.mark.parametrize("backend", ["cpu"])
def test_bits_do_not_depend_on_the_batch(backend, layout, dtype):
    x, weight, bias = inputs((6, 60, 9, 11), dtype, layout)
    grad = gradient_like(x)
    with forced(backend):
        batch = ours(x, weight, bias, 5, True)
        batch_grad = gradients(ours, (x, weight, bias), 5, True, grad)[0]
        for i in range(len(x)):
            alone = x[i : i + 1].clone(memory_format=layout)
            assert torch.equal(ours(alone, weight, bias, 5, True)[0], batch[i])
            grads = gradients(ours, (alone, weight, bias), 5, True, grad[i : i + 1])
            assert torch.equal(grads[0][0], batch_grad[i])


@layouts
@kernel_floats
@pytest.mark.parametrize("level", [0, 1, 2], ids=["portable", "avx2", "avx512"])
@pytest.mark.parametrize("backend", ["cpu"])
def test_every_instruction_set_is_as_exact(backend, level, dtype, layout):
    limit = _native.cpu_library().ds_limit_simd
    try:
        if limit(level) != level:
            pytest.skip("this processor does not have the instruction set")
        check_forward(backend, *inputs((2, 84, 7, 9), dtype, layout), 7, True)
        check_gradients(backend, *inputs((2, 84, 7, 9), dtype, layout), 7, True)
    finally:
        limit(2)


@kernel_floats
@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
def test_parameters_may_differ_from_x_in_dtype(backend, dtype):
    x, weight, bias = inputs((2, 32, 5, 5), dtype)
    same = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with forced(backend):
        for other in (same, torch.float64):
            mixed = ours(x, weight.to(other), bias, 8, True)
            exact = pytorch(x.double(), weight.to(other).double(), bias.double(), 8, True)
            assert_as_exact(mixed, exact.to(dtype), exact, factor=2)


@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
@pytest.mark.parametrize("op", ["forward", "backward"])
@layouts
def test_opcheck(backend, op, layout):
    x, weight, bias = inputs((2, 12, 3, 5), torch.float32, layout)
    with forced(backend):
        if op == "forward":
            leaves = [value.requires_grad_() for value in (x, weight, bias)]
            torch.library.opcheck(torch.ops.ds.group_norm_silu.default, (*leaves, 4, 1e-6, True))
        else:
            y, mean, rstd, _ = torch.ops.ds.group_norm_silu(x, weight, bias, 4, 1e-6, True)
            arguments = (y, x, weight, bias, mean, rstd, 4, True, 12)
            torch.library.opcheck(torch.ops.ds.group_norm_silu_backward.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "aten", "cpu"])
def test_compiles_without_graph_breaks(backend):
    leaves = [v.requires_grad_() for v in inputs((2, 16, 6, 6), torch.float32, LAYOUTS[1])]

    def loss(x, weight, bias):
        return ds.ops.group_norm_silu(x * 2, weight, bias, 4).square().sum()

    with forced(backend):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("silu", [False, True])
def test_gradcheck_in_float64(silu):
    leaves = [value.requires_grad_() for value in inputs((2, 6, 3, 2), torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: ours(*args, 3, silu), leaves)


def test_errors_name_what_does_not_fit():
    x, weight, bias = inputs((2, 30, 4, 4), torch.float32)
    message = r"group_norm_silu: channels \(30\) must be a multiple of groups \(32\)"
    with pytest.raises(ValueError, match=message):
        ds.ops.group_norm_silu(x, weight, bias, 32)
    with pytest.raises(ValueError, match=r"group_norm_silu: channels .* groups"):
        ds.ops.group_norm(x, weight, bias, 0)
    with pytest.raises(ValueError, match=r"weight must be \[30\]"):
        ds.ops.group_norm_silu(x, weight[:3], bias, 3)
    with pytest.raises(ValueError, match=r"x must be"):
        ds.ops.group_norm_silu(x[0, 0, 0], weight, bias, 3)
    with pytest.raises(ValueError, match=r"floating point"):
        ds.ops.group_norm_silu(x.int(), weight, bias, 3)


# What the op absorbs, besides the norm: cat(x + shift + residual, skip).

SOURCES = ["shift", "residual", "skip"]
COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(SOURCES, n)]

combinations = pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
Parts = dict[str, Tensor]


def sources(
    names, shape, seam, dtype, layout=torch.channels_last, shift_rows=True
) -> tuple[tuple[Tensor, Tensor, Tensor], Parts]:
    """Return x, weight and bias, and parts: x has the channels up to the seam, skip the others."""
    whole, weight, bias = inputs(shape, dtype, layout)
    if "skip" not in names:
        seam = shape[1]
    generator = torch.Generator().manual_seed(2)
    x = whole[:, :seam].contiguous(memory_format=layout)
    rows = x.shape[:2] if shift_rows else x.shape[1:2]
    parts = {
        "shift": torch.randn(rows, generator=generator).to(dtype),
        "residual": torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator)),
        "skip": whole[:, seam:].contiguous(memory_format=layout),
    }
    return (x, weight, bias), {name: parts[name] for name in names}


def merged_by_pytorch(x, shift=None, residual=None, skip=None) -> Tensor:
    if shift is not None:
        x = (x + shift.view(*shift.shape, 1, 1)).to(x.dtype)
    if residual is not None:
        x = x + residual
    return x if skip is None else torch.cat([x, skip], 1)


def unfused(x, weight, bias, groups, **parts) -> tuple[Tensor, Tensor]:
    merged = merged_by_pytorch(x, **parts)
    return pytorch(merged, weight, bias, groups, True), merged


def merge_alone(x, weight, bias, groups, **parts) -> tuple[Tensor, Tensor]:
    """Return y of the function that hands on nothing, and what it would have, from PyTorch."""
    y = ds.ops.group_norm_silu(x, weight, bias, groups, **parts)
    return y, merged_by_pytorch(x, **parts)


def results(function, values, parts, groups, grads, dtype=None) -> tuple[list[Tensor], Parts]:
    """Return the outputs of a function, and the gradients of its arguments by name."""
    named = dict(zip(("x", "weight", "bias"), values, strict=True)) | parts
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in named.items()}
    outputs = function(groups=groups, **leaves)
    found = torch.autograd.grad(
        outputs, leaves.values(), [g.to(o.dtype) for g, o in grads(outputs)]
    )
    return list(outputs), dict(zip(leaves, found, strict=True))


def some_gradients(outputs) -> list[tuple[Tensor, Tensor]]:
    """Draw gradients that every data type holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(o.shape, generator=generator).bfloat16().to(o.device), o) for o in outputs]


def check_merging(function, values, parts, groups, backend="") -> list[Tensor]:
    """Compare outputs and gradients with float64, allowing as much as for the norm alone.

    What is merged is compared with its sum in float64, the rest with the norm of it as rounded.
    """

    def rounded(x, weight, bias, groups, **parts):
        merged = merged_by_pytorch(x, **parts)
        assert_as_exact(outputs[1], baseline[1], merged.detach(), factor=2)
        merged = merged + (outputs[1].double() - merged).detach()
        return pytorch(merged, weight, bias, groups, True), merged

    outputs, found = results(function, values, parts, groups, some_gradients)
    baseline, found_baseline = results(unfused, values, parts, groups, some_gradients)
    exact, found_exact = results(rounded, values, parts, groups, some_gradients, torch.float64)
    assert_as_exact(outputs[0], baseline[0], exact[0], factor=2)
    x, weight, _ = values
    sizes = cancelling(backend, exact[1], weight, some_gradients(exact)[0][0].to(x.device), groups)
    sizes |= dict.fromkeys(("residual", "skip"), sizes["x"])
    sizes["shift"] = sizes["x"] * len(x) * x[0, 0].numel()
    if "shift" in parts and parts["shift"].dim() == 1:  # its gradient is a sum of rounded rows
        rows = {"shift": parts["shift"].expand(x.shape[:2])}
        _, by_image = results(rounded, values, parts | rows, groups, some_gradients, torch.float64)
        roundings = torch.finfo(parts["shift"].dtype).eps / 2**-23
        sizes["shift"] += by_image["shift"].abs().sum(0).max().item() * roundings
    for name, gradient in found.items():
        assert gradient.dtype == parts.get(name, x).dtype
        others = found_baseline[name], found_exact[name]
        assert_as_exact(gradient, *others, factor=3, terms=sizes[name])
    return outputs


@cases
@combinations
def test_absorbing_is_as_exact_as_pytorch(backend, dtype, names):
    values, parts = sources(names, (2, 36, 5, 3), 14, dtype)  # the second of three groups straddles
    with forced(backend):
        y, merged = check_merging(ds.ops.fused_add_group_norm_silu, values, parts, 3, backend)
        assert torch.equal(check_merging(merge_alone, values, parts, 3, backend)[0], y)
        # What is handed on is what was normalized, to the bit.
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
    (x, *affine), parts = sources(
        names, (images, channels, *size), seam, dtype, torch.contiguous_format, shift_rows
    )
    kinds = dict(zip(("x", "residual", "skip"), views, strict=True))
    values = {
        name: {
            "nchw": lambda value=value: value,
            "nhwc": lambda value=value: value.contiguous(memory_format=torch.channels_last),
            "slice": lambda value=value: F.pad(value, (1, 2))[..., 1:-2],
        }[kinds.get(name, "nchw")]()
        for name, value in {"x": x, **parts}.items()
    }
    x = values.pop("x")
    with forced(backend):
        y, merged = ds.ops.fused_add_group_norm_silu(x, *affine, groups, **values)
        wide = {name: value.float() for name, value in values.items()}
        expected = merged_by_pytorch(x.float(), **wide).to(dtype)
        assert torch.equal(merged, expected)
        assert torch.equal(y, ours(merged, *affine, groups, True))
        formats = [layout for layout in LAYOUTS if x.is_contiguous(memory_format=layout)]
        if len(formats) == 1:  # else x does not say which it wants
            assert y.is_contiguous(memory_format=formats[0])
            assert merged.is_contiguous(memory_format=formats[0])
        if images:  # PyTorch's own backward refuses an empty batch
            check_merging(ds.ops.fused_add_group_norm_silu, (x, *affine), values, groups, backend)


@every_backend
def test_no_images_have_no_gradients(backend):
    values, parts = sources(SOURCES, (0, 12, 3, 3), 5, torch.float32)
    leaves = [value.requires_grad_() for value in (*values, *parts.values())]
    with forced(backend):
        y, merged = ds.ops.fused_add_group_norm_silu(
            *leaves[:3], 3, **dict(zip(parts, leaves[3:], strict=True))
        )
        if backend == "aten":
            return  # PyTorch's own backward refuses an empty batch
        found = torch.autograd.grad((y.sum() + merged.sum()), leaves)
    assert y.shape == merged.shape == (0, 12, 3, 3)
    assert [list(g.shape) for g in found] == [list(leaf.shape) for leaf in leaves]
    assert not any(g.any() for g in found)


@cases
@pytest.mark.parametrize("place", ["shift", "residual", "skip"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_pytorch(backend, dtype, place, bad):
    values, parts = sources(SOURCES, (2, 12, 3, 3), 6, dtype)
    parts[place][1, 1] = bad
    with forced(backend):
        outputs, found = results(ds.ops.fused_add_group_norm_silu, values, parts, 3, some_gradients)
    expected, found_expected = results(unfused, values, parts, 3, some_gradients)
    for a, b in zip(
        [*outputs, *found.values()], [*expected, *found_expected.values()], strict=True
    ):
        assert torch.equal(a.isfinite(), b.isfinite())


@cases
def test_every_element_of_what_is_handed_on_is_written(backend, dtype, monkeypatch):
    values, parts = sources(SOURCES, (2, 12, 5, 3), 5, dtype)
    with forced(backend):
        expected = results(ds.ops.fused_add_group_norm_silu, values, parts, 3, some_gradients)
        monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        again = results(ds.ops.fused_add_group_norm_silu, values, parts, 3, some_gradients)
    for a, b in zip(
        [*again[0], *again[1].values()], [*expected[0], *expected[1].values()], strict=True
    ):
        assert torch.equal(a, b)  # which a NaN is not to itself


@kernel_floats
@pytest.mark.parametrize("backend", ["cpu"])
def test_bits_of_absorbing_do_not_depend_on_the_batch(backend, dtype):
    values, parts = sources(SOURCES, (3, 40, 7, 9), 17, dtype)

    def compute(images):
        some = [values[0][images], *values[1:]]
        own = {name: value[images] for name, value in parts.items()}

        def grads(outputs):
            drawn = some_gradients([torch.empty(3, *o.shape[1:]) for o in outputs])
            return [(g[images], o) for (g, _), o in zip(drawn, outputs, strict=True)]

        outputs, found = results(ds.ops.fused_add_group_norm_silu, some, own, 4, grads)
        return *outputs, *(found[name] for name in ("x", *SOURCES))

    with forced(backend):
        batch = compute(slice(None))
        for i in range(3):
            for alone, together in zip(compute(slice(i, i + 1)), batch, strict=True):
                assert torch.equal(alone, together[i : i + 1])


@every_backend
@pytest.mark.parametrize("keep", [False, True])
def test_opcheck_of_what_is_absorbed(backend, keep):
    values, parts = sources(SOURCES, (2, 12, 3, 5), 5, torch.float32)
    leaves = [value.requires_grad_() for value in (*values, *parts.values())]
    arguments = (*leaves[:3], 3, 1e-6, True, keep, *leaves[3:])
    with forced(backend):
        torch.library.opcheck(torch.ops.ds.group_norm_silu.default, arguments)
        x, weight, bias, *given = (leaf.detach() for leaf in leaves)
        y, mean, rstd, merged = (t.detach() for t in torch.ops.ds.group_norm_silu(*arguments))
        arguments = (y, merged if keep else x, weight, bias, mean, rstd, 3, True, 5)
        given = (y, given[0], None, None) if keep else (None, *given)
        torch.library.opcheck(torch.ops.ds.group_norm_silu_backward.default, (*arguments, *given))


@every_backend
def test_absorbing_compiles_without_graph_breaks(backend):
    values, parts = sources(SOURCES, (2, 16, 6, 6), 7, torch.float32)
    leaves = [value.requires_grad_() for value in (*values, *parts.values())]

    def loss(x, weight, bias, shift, residual, skip):
        y, merged = ds.ops.fused_add_group_norm_silu(
            x * 2, weight, bias, 4, shift=shift[0], residual=residual, skip=skip
        )
        alone = ds.ops.group_norm_silu(x * 2, weight, bias, 4, shift=shift, skip=skip)
        return y.square().sum() + merged.square().sum() + alone.square().sum()

    with forced(backend):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [ds.ops.fused_add_group_norm_silu, merge_alone])
@combinations
def test_gradcheck_of_what_is_absorbed(names, function):
    values, parts = sources(names, (2, 6, 3, 2), 2, torch.float64)
    leaves = [value.requires_grad_() for value in (*values, *parts.values())]

    def of_leaves(x, weight, bias, *rest):
        return function(x, weight, bias, 3, **dict(zip(names, rest, strict=True)))

    assert torch.autograd.gradcheck(of_leaves, leaves)


@every_backend
def test_shift_may_differ_from_x_in_dtype(backend):
    values, parts = sources(["shift", "skip"], (2, 16, 5, 5), 7, torch.bfloat16)
    parts["shift"] = parts["shift"].float() / 3
    with forced(backend):
        check_merging(ds.ops.fused_add_group_norm_silu, values, parts, 4, backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": torch.zeros(7)}, r"shift must be \[2, 8\], not of shape \[2, 7\]"),
        (
            {"shift": torch.zeros(8, dtype=torch.int64)},
            "shift must be floating point .* not torch.int64",
        ),
        (
            {"residual": torch.zeros(2, 8, 4, 3)},
            r"residual must be \[2, 8, 4, 4\]",
        ),
        ({"residual": torch.zeros(2, 8, 4, 4).double()}, "residual must be torch.float32 as x is"),
        (
            {"skip": torch.zeros(2, 8, 4, 3)},
            r"skip must be \[2, 8, 4, 4\], not of shape \[2, 8, 4, 3\]",
        ),
        ({"skip": torch.zeros(2, 8, 4, 4).half()}, "skip must be torch.float32 as x is"),
        ({"skip": torch.zeros(2, 3, 4, 4)}, r"channels \(11\) must be a multiple of groups \(2\)"),
        ({"skip": torch.zeros(2, 8, 4, 4)}, r"weight must be \[16\]"),
        ({}, "needs shift, residual or skip"),
    ],
)
def test_errors_name_the_part_that_does_not_fit(change, message):
    x, weight, bias = inputs((2, 8, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=f"^(fused_add_)?group_norm_silu: .*{message}"):
        ds.ops.fused_add_group_norm_silu(x, weight, bias, 2, **change)


@pytest.mark.parametrize("used", [0, 1])
def test_either_branch_alone_has_its_gradient(used):
    generator = torch.Generator().manual_seed(0)
    x, skip = (torch.randn(2, 4, 3, 3, generator=generator).requires_grad_() for _ in range(2))
    weight, bias = torch.randn(2, 8, generator=generator)
    outputs = ds.ops.fused_add_group_norm_silu(x, weight, bias, 4, skip=skip)
    merged = torch.cat([x, skip], 1)
    exact = torch.nn.functional.silu(torch.nn.functional.group_norm(merged, 4, weight, bias, 1e-6))
    grad = torch.randn(2, 8, 3, 3, generator=generator)
    found = torch.autograd.grad(outputs[used], (x, skip), grad)
    expected = torch.autograd.grad((exact, merged)[used], (x, skip), grad)
    torch.testing.assert_close(found, expected)


def test_gradients_are_the_same_bits_through_the_dispatcher():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 3, generator=generator).requires_grad_()
    weight, bias = torch.randn(2, 8, generator=generator).requires_grad_()
    direct = ds.ops.group_norm_silu(x, weight, bias, 4)
    dispatched = torch.ops.ds.group_norm_silu(x, weight, bias, 4, 1e-6, True)[0]
    grad = torch.randn(2, 8, 3, 3, generator=generator)
    for found, expected in zip(
        torch.autograd.grad(direct, (x, weight, bias), grad),
        torch.autograd.grad(dispatched, (x, weight, bias), grad),
        strict=True,
    ):
        assert torch.equal(found, expected)


# In float8, without a gradient.


def check_float8(y, merged, weight, bias, groups) -> None:
    """Compare with the norm in float64, rounded: half of the last of 4 bits, or of the least."""
    exact = pytorch(merged.double(), weight.double(), bias.double(), groups, True)
    exact = exact.clamp(-448, 448)
    assert y.dtype == torch.float8_e4m3fn
    assert ((y.double() - exact).abs() <= 1.001 * (exact.abs() / 16 + 2**-10)).all()


@layouts
@pytest.mark.parametrize("dtype", KERNEL_FLOATS)
@pytest.mark.parametrize("names", [[], *COMBINATIONS], ids="+".join)
def test_in_float8_it_is_the_norm_rounded_once(layout, dtype, names):
    (x, weight, bias), parts = sources(names, (2, 12, 4, 3), 8, dtype, layout)
    weight[3] = 1e3
    y, merged = ds.ops.group_norm_silu(x, weight, bias, 4, **parts, float8=True), x
    if names:
        again, merged = ds.ops.fused_add_group_norm_silu(x, weight, bias, 4, **parts, float8=True)
        assert torch.equal(y.float(), again.float())
        expected = ds.ops.fused_add_group_norm_silu(x, weight, bias, 4, **parts)[1]
        assert torch.equal(merged, expected)
    check_float8(y, merged, weight, bias, 4)
    assert y.stride() == merged.stride()
    assert y.double().max() == 448


@torch.no_grad()
def test_the_op_in_float8_is_sound():
    (x, *affine), parts = sources(SOURCES, (2, 12, 4, 3), 8, torch.bfloat16)
    for keep in (False, True):
        arguments = x, *affine, 4, 1e-6, keep, parts["shift"], parts["residual"], parts["skip"]
        torch.library.opcheck(
            torch.ops.ds.group_norm_silu_float8.default, arguments,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
