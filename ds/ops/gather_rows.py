"""Rows of several tensors by their indices in all of them together."""

import ctypes
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from ds.ops import _native
from ds.ops._op import Op
from ds.ops.noise import check_indices


def gather_rows(indices: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return torch.cat(parts)[indices] without making the former: [N, *shape] of their dtype.

    indices are int64 [N]; parts are [rows, *shape], and need not have the same number of rows.

    Raises:
        ValueError: there is no part, their shapes or dtypes differ, or an index is outside.
    """
    check_indices("gather_rows", indices)
    kinds = {(part.dtype, part.shape[1:]) for part in parts}
    if len(kinds) != 1:
        raise ValueError(
            f"gather_rows: parts must have one dtype and shape of a row, not {len(kinds)} of them"
        )
    last = sum(_counts(parts)) - 1
    for index in map(int, indices.aminmax()) if indices.numel() else ():
        if not 0 <= index <= last:
            raise ValueError(f"gather_rows: indices must lie in 0 .. {last}, not {index}")
    return _op(indices, [*parts])


def _counts(parts: Sequence[Tensor]) -> list[int]:
    return [part.shape[0] for part in parts]  # len(part) takes four times as long


def reference(indices: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Go through the parts and take from each what lies in it."""
    rows, start = fake(indices, parts), 0
    for part in parts:
        here = ((indices >= start) & (indices < start + len(part))).nonzero().squeeze(1)
        rows[here] = part[indices[here] - start]
        start += len(part)
    return rows


def fake(indices, parts):
    return parts[0].new_empty(indices.shape[0], *parts[0].shape[1:])


_op = Op("gather_rows(Tensor indices, Tensor[] parts) -> Tensor", reference, fake)


@_op.backend("cpu", "cpu")
def _():
    kernel = _native.cpu_library().ds_gather_rows

    def launch(indices, parts):
        indices, parts = indices.contiguous(), [part.contiguous() for part in parts]
        rows, count = fake(indices, parts), len(parts)
        addresses = (ctypes.c_void_p * count)(*(part.data_ptr() for part in parts))
        starts = (ctypes.c_int64 * count)(0, *accumulate(_counts(parts[:-1])))
        row_bytes = rows.element_size() * rows.shape[1:].numel()
        kernel(
            indices.data_ptr(), addresses, starts, rows.data_ptr(), rows.shape[0], count, row_bytes
        )
        return rows

    return launch
