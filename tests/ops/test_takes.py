"""What fits an op is checked before any kernel sees it, from wherever the op is called."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import ds.ops
from ds.ops.dispatch import op as dispatch
from tests import fuzz

F32 = torch.float32
MEAN = torch.zeros(2, 4)


def zeros(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


# Of each op, arguments that fit.
FIT = {
    "group_norm_silu": {
        "x": zeros(2, 8, 3, 3), "weight": zeros(16), "bias": zeros(16), "groups": 4, "eps": 1e-6,
        "silu": True, "keep": False, "shift": zeros(2, 8), "residual": zeros(2, 8, 3, 3),
        "skip": zeros(2, 8, 3, 3),
    },
    "group_norm_silu_backward": {
        "grad": zeros(2, 8, 3, 3), "x": zeros(2, 8, 3, 3), "weight": zeros(8), "bias": zeros(8),
        "mean": MEAN, "rstd": MEAN, "groups": 4, "silu": True, "split": 8,
    },
    "group_norm_silu_float8": {
        "x": zeros(2, 8, 3, 3), "weight": zeros(8), "bias": zeros(8), "groups": 4, "eps": 1e-6,
        "keep": False, "shift": None, "residual": None, "skip": None,
    },
    "attention": {name: zeros(1, 2, 3, 4) for name in "qkv"},
    "attention_residual": {
        **{name: zeros(1, 2, 3, 4) for name in "qkv"}, "weight": zeros(5, 8), "bias": zeros(5),
        "residual": zeros(1, 3, 5),
    },
    "conv": {
        "x": zeros(1, 2, 4, 4), "weight": zeros(4, 2, 3, 3), "bias": zeros(4),
        "residual": zeros(1, 4, 4, 4), "stride": 1, "scale": None,
    },
    "conv_group_norm_silu": {
        "x": zeros(1, 2, 4, 4), "weight": zeros(4, 2, 3, 3), "bias": None, "residual": None,
        "stride": 1, "norm_weight": zeros(4), "norm_bias": zeros(4), "groups": 2, "eps": 1e-6,
        "silu": True, "keep": True,
    },
    "conv3x3": {"x": zeros(1, 16, 8, 8), "weight": zeros(16, 16, 3, 3), "bias": zeros(16)},
    "conv3x3_backward": {
        "dy": zeros(1, 16, 8, 8), "x": zeros(1, 16, 8, 8), "weight": zeros(16, 16, 3, 3),
        "wanted": [True, True],
    },
    "winograd_conv": {
        "x": zeros(1, 16, 8, 8), "weight": zeros(36, 1, 16, 16), "bias": zeros(16),
        "residual": zeros(1, 16, 8, 8), "doubled": False,
    },
    "winograd_int16_conv": {
        "x": zeros(1, 16, 8, 8), "weight": zeros(36, 1, 8, 16, 2, dtype=torch.int16),
        "scale": zeros(36, 16), "bias": zeros(16), "residual": zeros(1, 16, 8, 8),
        "doubled": False,
    },
    "noise": {"indices": zeros(3, dtype=torch.int64), "seed": 0, "size": 4, "dtype": F32},
    "prepare_batch": {
        "images": zeros(3, 4, 4, 1, dtype=torch.uint8), "indices": zeros(3, dtype=torch.int64),
        "seed": 0, "dtype": F32,
    },
    "quantize": {"x": zeros(2, 3, 4, 4), "floor": False},
    "gather_rows": {"indices": zeros(2, dtype=torch.int64), "parts": [zeros(3, 2), zeros(1, 2)]},
    "solver_update": {
        "x": zeros(2, 3), "terms": [zeros(2, 3), zeros(2, 3)], "table": zeros(5, 3),
        "step": zeros(dtype=torch.int64), "copy": zeros(2, 3),
    },
    "adam_step": {
        "step": zeros(), "lr": zeros(),
        **{
            name: [zeros(3), zeros(2, 2)]
            for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "copies")
        },
        "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0, "decoupled": False,
        "ema_decay": 0.0, "max_norm": 1.0,
    },
}  # fmt: skip
# What is done to a tensor that no op takes in its place.
WRONG = {
    "another device": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "sparse": lambda x: x.to_sparse(),
    "another rank": lambda x: x[None, None] if x.dim() < 4 else x.flatten(),
    "freed": freed,
    "negated": torch._neg_view,
    "no memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "no tensor": lambda x: x.tolist(),
}
# An op of one tensor runs where that is, and a step may have any dimensions.
ALLOWED = {
    ("noise", "indices", "another device"),
    ("quantize", "x", "another device"),
    ("solver_update", "step", "another rank"),
}
TENSORS = [
    (name, label, i)
    for name, fit in FIT.items()
    for label, value in fit.items()
    for i in (range(len(value)) if isinstance(value, list) and label != "wanted" else [None])
    if isinstance(value, (Tensor, list)) and label != "wanted"
]


@pytest.fixture
def unreached(monkeypatch):
    """Put kernels that must not be called in the place of every backend of every op."""

    def kernel(*args):
        raise AssertionError("a kernel was called")

    for op in dispatch._ops:
        chains = {(device, None): [("kernel", kernel)] for device in ("cpu", "meta", "cuda")}
        monkeypatch.setattr(op, "_chains", chains)


def op_of(name: str) -> dispatch.Op:
    return next(op for op in dispatch._ops if op.name == name)


def test_every_op_is_tried():
    assert set(FIT) == {op.name for op in dispatch._ops}


def test_what_fits_reaches_a_kernel(unreached):
    for name, fit in FIT.items():
        with torch.no_grad(), pytest.raises(AssertionError, match="a kernel was called"):
            op_of(name)(*fit.values())


@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_no_kernel_sees_a_tensor_that_does_not_fit(wrong, unreached):
    for name, label, i in TENSORS:
        value = FIT[name][label]
        if (name, label, wrong) in ALLOWED:
            continue
        if i is None:
            value = WRONG[wrong](value)
        else:
            value = [*value[:i], WRONG[wrong](value[i]), *value[i + 1 :]]
        args = (FIT[name] | {label: value}).values()
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: \w+"):
            op_of(name)(*args)
        if wrong not in ("negated", "no memory", "no tensor"):  # PyTorch makes tensors of those
            with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
                getattr(torch.ops.ds, name)(*args)


# What else does not fit, of each op that has more to it than tensors.
MISFITS = [
    ("group_norm_silu", {"weight": zeros(15)}, r"weight must be \[16\]"),
    ("group_norm_silu", {"groups": 0}, r"multiple of groups \(0\)"),
    ("group_norm_silu", {"groups": 5}, r"multiple of groups \(5\)"),
    ("group_norm_silu", {"groups": -4}, r"multiple of groups \(-4\)"),
    ("group_norm_silu", {"skip": zeros(2, 8, 3, 4)}, r"skip must be \[2, 8, 3, 3\]"),
    ("group_norm_silu_backward", {"mean": zeros(2, 3)}, r"mean must be \[2, 4\]"),
    ("group_norm_silu_backward", {"rstd": MEAN.double()}, "rstd must be torch.float32"),
    ("group_norm_silu_backward", {"split": 9}, "split must be the channels of x"),
    ("group_norm_silu_backward", {"split": -1}, "split must be the channels of x"),
    ("group_norm_silu_backward", {"grad": zeros(1, 8, 3, 3)}, r"grad must be \[2, 8, 3, 3\]"),
    ("attention", {"k": zeros(1, 2, 4, 4)}, r"k must be \[1, 2, 3, 4\]"),
    ("attention_residual", {"weight": zeros(5, 7)}, r"weight must be \[5, 8\]"),
    ("conv", {"weight": zeros(4, 2, 1, 3)}, "weight must be"),
    ("conv", {"stride": 0}, "stride must be 1"),
    ("conv3x3", {"weight": zeros(16, 16, 1, 1)}, r"weight must be \[16, 16, 3, 3\]"),
    ("conv3x3_backward", {"dy": zeros(1, 16, 8, 7)}, r"dy must be \[1, 16, 8, 8\]"),
    ("conv3x3_backward", {"wanted": [True]}, "wanted must be 2 values"),
    ("winograd_conv", {"x": zeros(1, 2, 8, 8)}, "weight must be"),
    ("winograd_conv", {"residual": zeros(1, 16, 8, 7)}, "residual must be"),
    ("winograd_conv", {"bias": zeros(15)}, r"bias must be \[16\]"),
    ("winograd_int16_conv", {"x": zeros(1, 18, 8, 8)}, "x must have 16 channels .*, not 18"),
    ("winograd_int16_conv", {"weight": zeros(36, 1, 8, 16, 2)}, "weight must be int16"),
    ("winograd_int16_conv", {"scale": zeros(36, 15)}, r"scale must be \[36, 16\]"),
    ("noise", {"indices": zeros(3, dtype=torch.int32)}, "indices must be int64"),
    ("noise", {"size": -1}, "size must be 0 or more"),
    ("prepare_batch", {"indices": zeros(2, dtype=torch.int64)}, r"indices must be \[3\]"),
    ("gather_rows", {"parts": []}, "at least one part"),
    ("gather_rows", {"parts": [zeros(3, 2), zeros(3, 1)]}, r"parts\[1\] must be \[_, 2\]"),
    ("gather_rows", {"indices": zeros(2, dtype=torch.bool)}, "indices must be int64"),
    ("solver_update", {"table": zeros(5, 2)}, r"table must be \[5, 3\]"),
    ("solver_update", {"terms": [zeros(2, 3), zeros(2, 2)]}, r"terms\[1\] must be \[2, 3\]"),
    ("solver_update", {"copy": zeros(1, 3).expand(2, 3)}, "copy is written"),
    ("solver_update", {"x": zeros(3).expand(2, 3)}, "x is written"),
    ("solver_update", {"step": zeros(2, dtype=torch.int64)}, "step must be one number"),
    ("adam_step", {"exp_avgs": [zeros(3), zeros(2, 1)]}, r"exp_avgs\[1\] must be \[2, 2\]"),
    ("adam_step", {"exp_avgs": [zeros(3)]}, "1 exp_avgs for 2 params"),
    ("adam_step", {"params": [zeros(3), zeros(1).expand(2, 2)]}, r"params\[1\] is written"),
    ("adam_step", {"beta1": 1.0}, r"betas\[0\] must lie in"),
]


@pytest.mark.parametrize(("name", "change", "message"), MISFITS)
@pytest.mark.parametrize("way", ["direct", "raw", "fake"])
@torch.no_grad()
def test_no_kernel_sees_sizes_that_do_not_fit(name, change, message, way, unreached):
    args = (FIT[name] | change).values()
    call = op_of(name) if way == "direct" else getattr(torch.ops.ds, name)
    if way == "fake":
        written = "is written" in message  # which strides of no memory cannot tell
        if written or name in ("attention", "attention_residual"):
            return
        args = tree_map_only(Tensor, lambda x: x.to("meta"), list(args))
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        call(*args)


def test_what_is_written_is_nobody_elses(unreached):
    x = zeros(2, 3)
    for change in ({"copy": x}, {"terms": [zeros(2, 3), x]}, {"copy": zeros(3, 3)[1:], "x": x}):
        args = (FIT["solver_update"] | {"x": x} | change).values()
        wanted = (
            "must not share memory" if "copy" not in change or change["copy"] is x else "kernel"
        )
        with torch.no_grad(), pytest.raises((ValueError, AssertionError), match=wanted):
            op_of("solver_update")(*args)


@pytest.mark.parametrize("index", [-1, 4, 10**9, -(2**63)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_outside_of_all_parts_are_refused_by_every_backend(index, backend):
    indices, parts = torch.tensor([0, index]), FIT["gather_rows"]["parts"]
    with ds.ops.use_backend(backend):
        for call in (ds.ops.gather_rows, torch.ops.ds.gather_rows):
            with pytest.raises(ValueError, match=rf"indices must lie in 0 .. 3, not {index}"):
                call(indices, parts)


def test_a_step_that_is_not_taken_is_not_counted():
    step = zeros()
    with pytest.raises(ValueError, match="1 grads for 2 params"):
        params = [zeros(3), zeros(2)]
        ds.ops.adam_step(params, params[:1], params, params, step=step, lr=zeros())
    assert step == 0


@torch.no_grad()
def test_numbers_may_be_those_of_numpy():
    x, weight = torch.randn(2, 8, 3, 3), torch.ones(8)
    assert ds.ops.group_norm_silu(x, weight, weight, np.int64(4)).shape == x.shape


def test_a_skip_without_channels_has_its_gradient():
    x, skip = torch.randn(2, 8, 3).requires_grad_(), torch.zeros(2, 0, 3).requires_grad_()
    y = torch.ops.ds.group_norm_silu(
        x, torch.ones(8), torch.ones(8), 4, 1e-6, True, False, None, None, skip
    )
    y[0].sum().backward()
    assert skip.grad.shape == skip.shape


@pytest.mark.parametrize("backend", ["aten", "cpu", "reference"])
def test_parameters_and_shifts_may_have_any_strides(backend):
    x, weight, shift = torch.randn(2, 8), torch.randn(8, 2)[:, 1], torch.randn(2, 8)
    leaves = [t.requires_grad_() for t in (x, shift)]
    found, expected = [], []
    for values, bias in ((found, torch.ones(1).expand(8)), (expected, torch.ones(8))):
        with ds.ops.use_backend("reference" if values is expected else backend):
            y = ds.ops.group_norm_silu(x, weight, bias, 4, 0.1, shift=shift)
            values += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of quantized tensors
def test_calls_of_any_kind_are_refused_or_as_the_reference():
    try:
        for number in range(25 * len(fuzz.OPS)):
            fuzz.attempt(number, seed=1)
    finally:
        fuzz.every_instruction()
