"""A step of a solver that is linear in the outputs of the network: x <- a x + sum_i b_i h_i."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op, Unsupported, same_order, triton_kernels


def solver_update(
    x: Tensor, terms: Sequence[Tensor], table: Tensor, step: Tensor, copy: Tensor | None = None
) -> None:
    """Replace x by a x + sum_i b_i terms[i], and write it to `copy`, rounded to the dtype of that.

    One term, the predicted noise, makes a step of DDIM; multistep solvers have a term for each
    network call that they remember. The coefficients (a, b_1, ...) are row `step` of table [steps,
    1 + len(terms)]. `step` is one int32 or int64, read on the device, so that a CUDA graph of one
    step can be replayed while the step counts; counting it up is the caller's. A step that the
    table lacks makes x NaN.

    The state x is float32 (or float64) and so is the sum; terms and copy have the shape of x and
    any floating dtype. x and copy must not overlap the others. There is no derivative.

    Raises:
        ValueError: a shape or dtype does not fit, or a derivative is asked for.
    """
    _op(x, list(terms), table, step, copy)


def _row(table: Tensor, step: Tensor) -> Tensor:
    """Return the coefficients of a step, or NaN, without waiting for a device to tell the step."""
    step = step.reshape(1)
    known = (step >= 0) & (step < len(table))
    rows = torch.cat([table, table.new_full((1, table.shape[1]), torch.nan)])
    return rows.index_select(0, step.where(known, len(table)))[0]


def reference(
    x: Tensor, terms: list[Tensor], table: Tensor, step: Tensor, copy: Tensor | None
) -> None:
    """Add one term after the other, in the dtype of x."""
    a, *b = _row(table, step).to(x.dtype).unbind()
    total = a * x
    for coefficient, term in zip(b, terms, strict=True):
        total += coefficient * term.to(x.dtype)
    x.copy_(total)
    if copy is not None:
        copy.copy_(total)


def fake(x, terms, table, step, copy):
    return None


_op = Op(
    "solver_update(Tensor(a!) x, Tensor[] terms, Tensor table, Tensor step, Tensor(b!)? copy)"
    " -> ()",
    """
    x [...] float32 or float64
    terms [...] floating
    table [steps, 1 + len(terms)] floating
    step int32 or int64
    step.numel() == 1 : step must be one number, not of shape {list(step.shape)}
    copy [...] floating
    """,
    reference,
    fake,
)


def _in_order_of(x: Tensor, other: Tensor) -> Tensor:
    """Return the other tensor, or a copy of it with the strides of x."""
    if same_order(other, x):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _check_kernels_take(
    dtypes: tuple[torch.dtype, ...],
    x: Tensor,
    terms: list[Tensor],
    table: Tensor,
    copy: Tensor | None,
) -> None:
    if x.dtype != torch.float32 or table.dtype != torch.float32:
        raise Unsupported(f"it takes x and table in float32, not {x.dtype} and {table.dtype}")
    others = [t.dtype for t in (terms if copy is None else [*terms, copy])]
    if any(dtype not in dtypes for dtype in others):
        raise Unsupported(f"it takes terms and copy in {dtypes}, not {others}")
    dense = x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense or not (copy is None or same_order(copy, x)):
        raise Unsupported("it takes x contiguous or channels_last, and copy with its strides")


@_op.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_solver_update

    def launch(x, terms, table, step, copy):
        _check_kernels_take((torch.float32, torch.bfloat16), x, terms, table, copy)
        terms = [_in_order_of(x, term) for term in terms]
        number, count = int(step), len(terms)  # PyTorch's functions take 20 us to find the row
        known = 0 <= number < table.shape[0]
        row = table[number].contiguous() if known else _row(table, step)
        error = kernel(
            x.data_ptr(), None if copy is None else copy.data_ptr(),
            (ctypes.c_void_p * count)(*(term.data_ptr() for term in terms)),
            (ctypes.c_bool * count)(*(term.dtype == torch.bfloat16 for term in terms)),
            row.data_ptr(), x.numel(), count, copy is not None and copy.dtype == torch.bfloat16,
        )  # fmt: skip
        _native.check("solver_update", error)

    return launch


@_op.backend("triton", "cuda")
def _():
    kernels = triton_kernels("solver_update")

    def launch(x, terms, table, step, copy):
        _check_kernels_take((torch.float32, torch.float16, torch.bfloat16), x, terms, table, copy)
        terms = [_in_order_of(x, term) for term in terms]
        with torch.cuda.device_of(x):
            kernels.solver_update(x, terms, table.contiguous(), step, copy)

    return launch
