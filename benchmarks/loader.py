"""Rows of a store, shuffled, as tensors on the device: our loaders and torch's DataLoader.

Each side reads the same 32 batches of 512 from a store of 32,768 images of 32 x 32 in uint8, which
the page cache holds. The baseline is a Dataset that returns one row, with the DataLoader's own
collation and without workers: with two, on two cores, it is slower.
"""

import atexit
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ds
from benchmarks.harness import Case, Side
from ds.data import Batches, Pairs
from ds.loader import Loader, load

ROWS, BATCH, STEPS = 32_768, 512, 32


class _Rows(Dataset):
    """One row at a time, as a Dataset has it."""

    def __init__(self, source: Pairs):
        self.source = source

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        shard, place = divmod(int(row), self.source.store.manifest["shard_size"])
        return torch.from_numpy(self.source.store._shards[shard][place].copy()), int(row)


def cases(device: torch.device, *, quick: bool) -> Iterator[Case]:
    """Yield the case; `us` are those of all batches together."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    teacher = ds.analytic.Gaussian(shape=(3, 32, 32)).teacher(ds.solvers.DDIM(), (800,))
    source = Pairs(ds.generate_pairs(teacher, folder, ROWS, batch_size=BATCH))
    batches = Batches(source, BATCH, seed=0)
    sides = {
        "DataLoader": _torch(batches, device),
        "DALI": _ours("dali", batches, device),
    }
    missing = {}
    try:
        sides["DALI"].prepare().close()
    except ValueError as error:
        missing["DALI"] = str(error)
        del sides["DALI"]
    kinds = ("resident", "memory_map") if device.type == "cuda" else ("memory_map",)
    sides |= {kind: _ours(kind, batches, device) for kind in kinds}
    yield Case(
        f"loader uint8 [{BATCH}, 32, 32, 3] x {STEPS}", sides,
        lambda: _seen(map(batches.read, range(STEPS))),
        bytes=STEPS * BATCH * (3 * 32 * 32 + 8), missing=missing,
    )  # fmt: skip


def _ours(kind: str, batches: Batches, device: torch.device) -> Side:
    return Side(_take, lambda: load(batches, 0, device, kind))


def _torch(batches: Batches, device: torch.device) -> Side:
    def prepare() -> Loader:
        order = [batches.rows(step)[0].tolist() for step in range(STEPS)]
        rows = DataLoader(_Rows(batches.source), batch_sampler=order)
        return ([x.to(device) for x in step] for step in rows)

    return Side(_take, prepare)


def _take(steps: Loader) -> list[Tensor]:
    with closing(steps):
        return _seen(itertools.islice(steps, STEPS))


def _seen(steps: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Return all indices and the last images; a training, too, drops what it has used."""
    found = []
    for step in steps:
        found.append(step[1])
    return [*found, step[0]]
