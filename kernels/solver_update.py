"""One step of a solver: x <- a x + b_1 h_1 + b_2 h_2 + ..., and a copy of it for the network.

The coefficients are a row of a table on the device, and a counter on the device selects the row. So
one CUDA graph of a step serves every step.

Traffic: one pass reads x and the terms once, and writes x and the copy once: 12 bytes an element
with one term and a copy in bfloat16. GPU figures: not measured yet.

Contract: x, terms and copy have one order in memory; x and table are float32, terms and copy
float32, float16 or bfloat16. Sums are float32, term by term. A step outside of the table gives NaN.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program


@triton.jit
def _solver_update_kernel(
    x_ptr,
    terms,
    table_ptr,
    step_ptr,
    copy_ptr,
    size,
    steps,
    TERMS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    step = tl.load(step_ptr).to(tl.int64)
    known = (step >= 0) & (step < steps)
    row_ptr = table_ptr + step * (1 + TERMS)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < size
    x = tl.load(row_ptr, mask=known, other=float("nan")) * tl.load(x_ptr + offset, mask=inside)
    for i in tl.static_range(TERMS):
        b = tl.load(row_ptr + 1 + i, mask=known, other=float("nan"))
        x += b * tl.load(terms[i] + offset, mask=inside).to(tl.float32)
    tl.store(x_ptr + offset, x, mask=inside)
    if COPY:
        tl.store(copy_ptr + offset, x, mask=inside)


def solver_update(
    x: Tensor, terms: list[Tensor], table: Tensor, step: Tensor, copy: Tensor | None
) -> None:
    """Update x, and copy unless that is None, in place; table is contiguous [steps, 1 + terms]."""
    if x.numel():
        _solver_update_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x_ptr=x,
            terms=tuple(terms),
            table_ptr=table,
            step_ptr=step,
            copy_ptr=x if copy is None else copy,
            size=x.numel(),
            steps=len(table),
            TERMS=len(terms),
            COPY=copy is not None,
            BLOCK=BLOCK,
        )
