"""The rows of a store's shards: mapped when first read, and checked once against their hashes.

Reading a map of a file that has become shorter would end the process, so sizes are checked before
every read. A process may have some 65,000 maps, and a store more shards, so only the maps used last
are kept.
"""

import math
import operator
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ds import ops
from ds.pairs.storage import AbstractPlace
from ds.system.arrays import Header, read_header
from ds.system.files import opened, regular, sha256, unjudged

MAPPED = 4096  # shards at a time
FEW = 256  # shards of which a batch may need every one
_HEADER = range(64, 1025, 64)  # bytes that the header of an .npy file may take


class Row(NamedTuple):
    """The stored form of a row."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The bytes a row takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Rows:
    """The rows of shards in a place: shard i holds those of starts[i] .. starts[i + 1] - 1.

    Unless `check` is off, a shard is hashed before it is first used. Raises ValueError for a shard
    that is not a regular file or has the wrong size. A damaged copy of a bucket's shard is fetched
    again.
    """

    def __init__(
        self,
        where: AbstractPlace,
        hashes: dict[str, str],
        starts: Sequence[int],
        row: Row,
        *,
        check: bool,
    ):
        self._where, self._row, self._check = where, row, check
        self._names, self._hashes = [*hashes], [*hashes.values()]
        self._starts = np.array(starts, np.int64)
        self._counts = np.diff(self._starts)
        self._files = [*map(str, where.local(hashes))]
        self._judged: set[int] = set()  # shards whose hash was right
        self._sizes: dict[int, int] = {}  # bytes of the files that are mapped
        self._all: list[Tensor] = []  # shards, once all of a few have been asked for together
        self.shard = lru_cache(MAPPED)(self._map)
        for number in range(len(self._files)):
            self._check_size(number)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Tensor) -> Tensor:
        """Return the rows [N, *shape] of indices, int64 [N] within the store."""
        if self._all and self._cut(range(len(self._all))) is None:
            return ops.gather_rows(indices, self._all)
        shards = np.searchsorted(self._starts, indices.numpy(), side="right") - 1
        touched = np.bincount(shards).nonzero()[0]
        if not 0 < len(touched) <= MAPPED:
            shape = (len(indices), *self._row.shape)
            rows = torch.empty(shape, dtype=self._row.dtype, device="cpu")
            for group in (touched[i : i + MAPPED] for i in range(0, len(touched), MAPPED)):
                here = torch.from_numpy((shards >= group[0]) & (shards <= group[-1]))
                rows[here] = self.read(indices[here])
            return rows
        parts = self._parts(touched.tolist())
        if len(parts) == len(self._counts):
            self._all = parts if len(parts) <= FEW else []
            return ops.gather_rows(indices, parts)
        counts, moved = self._counts[touched], np.empty(len(self._counts), np.int64)
        moved[touched] = self._starts[touched] - (np.cumsum(counts) - counts)
        return ops.gather_rows(indices - torch.from_numpy(moved[shards]), parts)

    def _parts(self, numbers: list[int]) -> list[Tensor]:
        """Return shards, mapped anew if a file has become shorter than its map."""
        parts = [self.shard(number) for number in numbers]
        while (cut := self._cut(numbers)) is not None:
            self._check_size(cut)  # says so, or brings it back
            self.shard.cache_clear()
            self._all = []
            parts = [self.shard(number) for number in numbers]
        return parts

    def _cut(self, numbers: Iterable[int]) -> int | None:
        """Return a shard whose file has become shorter than its map, if there is one."""
        files, sizes, stat = self._files, self._sizes, os.stat
        return next((n for n in numbers if stat(files[n]).st_size < sizes[n]), None)

    def verify(self) -> None:
        """Hash every shard and its cached copy; raise ValueError naming the first wrong one."""
        for number, (name, digest) in enumerate(zip(self._names, self._hashes, strict=True)):
            if self._where.sha256(name) != digest:
                raise ValueError(self._where.wrong(name))
            if self._where.caches:
                self._judge(number)
            self._judged.add(number)

    def _map(self, number: int) -> Tensor:
        """Map a shard into memory; unlike np.load, keep no file open for it."""
        if self._check and number not in self._judged:
            self._judge(number)
        path, rows = self._files[number], int(self._counts[number])
        shape = (rows, *self._row.shape)
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            found, start = read_header(file, size, path), file.tell()
            if found != Header(shape, False, np.dtype(str(self._row.dtype).removeprefix("torch."))):
                raise ValueError(
                    f"{path}: damaged, it holds {found.dtype} {list(found.shape)}, not "
                    f"{self._row.dtype} {list(shape)} row by row; delete it and run the same "
                    f"`dstudent pairs` to write it again"
                )
            try:
                content = torch.from_file(str(path), size=size, dtype=torch.uint8)
            except RuntimeError as error:
                raise unjudged(path, error) from None
        self._sizes[number] = size
        return content[start:].view(self._row.dtype).view(shape)

    def _judge(self, number: int) -> None:
        if sha256(self._files[number]) != self._hashes[number]:
            self._where.restore(self._names[number], self._hashes[number])
        self._judged.add(number)

    def _check_size(self, number: int) -> None:
        path, rows = self._files[number], int(self._counts[number])
        if (size := regular(path).st_size) - rows * self._row.bytes in _HEADER:
            return
        if not self._where.caches:
            raise ValueError(
                f"{path}: damaged, {size:,} bytes do not hold {rows} pairs; delete it and run the "
                f"same `dstudent pairs` to write it again"
            )
        self._where.restore(self._names[number], self._hashes[number])


def as_indices(what: str, indices: Sequence[int] | Tensor, count: int) -> Tensor:
    """Return whole numbers within 0 .. count - 1 as an int64 tensor [N] on the CPU.

    Raises ValueError for anything else, truth values and fractions included.
    """
    if isinstance(indices, range):
        ends = [*indices[:1], *indices[-1:]]
        _check_within(what, ends, count)
        bounds = indices.start, indices.stop, indices.step
        return torch.arange(*bounds, dtype=torch.int64, device="cpu")
    found = _whole_numbers(what, indices)
    _check_within(what, [int(found.min()), int(found.max())] if found.size else [], count)
    return torch.from_numpy(found.astype(np.int64, copy=False))


def _check_within(what: str, ends: list[int], count: int) -> None:
    for index in ends:
        if not 0 <= index < count:
            raise ValueError(f"{what}: indices must lie in 0 .. {count - 1}, not {index}")


def _whole_numbers(what: str, indices: Any) -> np.ndarray:
    if isinstance(indices, Tensor):
        indices = indices.detach().cpu().numpy()
    elif not isinstance(indices, np.ndarray):
        several = isinstance(indices, Iterable)
        if wrong := [i for i in indices if not _is_whole(i)] if several else [indices]:
            raise ValueError(f"{what}: indices must be whole numbers [N], not {wrong[0]!r}")
        indices = np.array([*map(operator.index, indices)] or np.empty(0, np.int64))
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"{what}: indices must be whole numbers [N], not {indices.dtype} {list(indices.shape)}"
        )
    return indices


def _is_whole(index: object) -> bool:
    return hasattr(index, "__index__") and not isinstance(index, bool | np.bool_)
