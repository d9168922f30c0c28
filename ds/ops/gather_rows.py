"""Rows of several tensors by their indices in all of them together."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from ds.ops import _native
from ds.ops.dispatch.op import Op
from ds.ops.dispatch.transforms import is_mapped


def gather_rows(indices: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return torch.cat(parts)[indices] without making the former: [N, *shape] of their dtype.

    indices are int64 [N]; parts are [rows, *shape], and need not have the same number of rows.

    Raises:
        ValueError: there is no part, their shapes or dtypes differ, or an index is outside.
    """
    return _op(indices, [*parts])


def _counts(parts: Sequence[Tensor]) -> list[int]:
    return [part.shape[0] for part in parts]  # len(part) takes four times as long


def reference(indices: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Go through the parts and take from each the rows that lie in it."""
    if is_mapped(indices):
        raise ValueError("gather_rows: indices cannot be mapped by vmap; flatten them to one list")
    for index in map(int, indices.aminmax()) if indices.numel() else ():
        _check_index(index, sum(_counts(parts)))
    rows, start = fake(indices, parts), 0
    for part in filter(len, parts):
        here = (indices >= start) & (indices < start + len(part))
        found = part[(indices - start).clamp(0, len(part) - 1)]
        rows = found.where(here.view(-1, *[1] * (part.dim() - 1)), rows)
        start += len(part)
    return rows


def _check_index(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(f"gather_rows: indices must lie in 0 .. {count - 1}, not {index}")


def fake(indices, parts):
    return parts[0].new_empty(indices.shape[0], *parts[0].shape[1:])


_op = Op(
    "gather_rows(Tensor indices, Tensor[] parts) -> Tensor",
    """
    indices [N] int64
    parts [_, ...] of parts
    len(parts) >= 1 : needs at least one part
    not parts[0].is_quantized : parts must not be quantized
    """,
    reference,
    fake,
)


@_op.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_gather_rows

    def launch(indices, parts):
        indices, parts = indices.contiguous(), [part.contiguous() for part in parts]
        rows, count = fake(indices, parts), len(parts)
        addresses = (ctypes.c_void_p * count)(*(part.data_ptr() for part in parts))
        starts = (ctypes.c_int64 * (count + 1))(0, *accumulate(_counts(parts)))
        row_bytes = rows.element_size() * rows.shape[1:].numel()
        outside = ctypes.c_int64(-1)
        kernel(
            indices.data_ptr(), addresses, starts, rows.data_ptr(), rows.shape[0], count, row_bytes,
            ctypes.byref(outside),
        )  # fmt: skip
        if outside.value >= 0:
            _check_index(int(indices[outside.value]), starts[count])
        return rows

    return launch
