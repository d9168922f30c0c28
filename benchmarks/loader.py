"""Rows of a store, shuffled, as tensors on the device: our loaders and those of others.

Each side reads an epoch of 16,384 images of 32 x 32 in uint8 in batches of 512, with the indices of
their noise, from what the page cache holds. The baseline is torch's DataLoader with a Dataset that
returns one row and its own collation, without workers: with two, on two cores, it is slower. DALI's
reader of WebDataset has archives that `ds.archives.export` makes, as they are, and leaves the noise
in them unread. It shuffles as its default is, 1,024 rows at a time, so that sides are held to have
brought every row once, and the last images with their right indices.
"""

import atexit
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import ds
from benchmarks.harness import Case, Side, Size
from ds.pairs.archives import export
from ds.pairs.sources import Pairs
from ds.training.batches import Batches
from ds.training.loader import Loader, load

BATCH, STEPS = 512, 32
ROWS, SHARD = BATCH * STEPS, 4096


class _Rows(Dataset):
    """One row at a time, as a Dataset has it."""

    def __init__(self, source: Pairs):
        self.source = source

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        shard, place = divmod(int(row), self.source.store.manifest.shard_size)
        return self.source.store.shard(shard)[place].clone(), int(row)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Yield the case; `us` are those of all batches together."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    teacher = ds.analytic.Gaussian(shape=(3, 32, 32)).teacher(ds.solvers.DDIM(), (800,))
    store = ds.generate_pairs(teacher, folder / "store", ROWS, batch_size=BATCH, shard_size=SHARD)
    source = Pairs(store)
    batches = Batches(source, BATCH, seed=0)
    prepares = {"DataLoader": partial(_torch, batches, device)}
    missing = {}
    try:
        _ours("dali", batches, device).close()
        archives = _archives(store, folder / "archives")
        prepares["webdataset by DALI"] = partial(_webdataset, archives, device)
        prepares["DALI"] = partial(_ours, "dali", batches, device)
    except ValueError as error:
        missing |= dict.fromkeys(("webdataset by DALI", "DALI"), str(error))
    kinds = ("resident", "memory_map") if device.type == "cuda" else ("memory_map",)
    prepares |= {kind: partial(_ours, kind, batches, device) for kind in kinds}
    yield Case(
        f"loader uint8 [{BATCH}, 32, 32, 3] x {STEPS}",
        {name: Side(partial(_take, source), prepare) for name, prepare in prepares.items()},
        lambda: (torch.arange(ROWS), torch.zeros(BATCH, 32, 32, 3)),
        bytes=ROWS * (3 * 32 * 32 + 8),
        missing=missing,
    )


def _ours(kind: str, batches: Batches, device: torch.device) -> Loader:
    return load(batches, 0, device, kind)


def _torch(batches: Batches, device: torch.device) -> Loader:
    order = [batches.rows(step)[0].tolist() for step in range(STEPS)]
    rows = DataLoader(_Rows(batches.source), batch_sampler=order)
    return ([x.to(device) for x in step] for step in rows)


def _archives(store: ds.PairStore, folder: Path) -> list[Path]:
    """Export the store, and index the archives with the tool that DALI has for it."""
    paths = export(store, folder, "webdataset", per_archive=SHARD)
    tool = Path(sys.executable).with_name("wds2idx")
    for path in paths:
        command = [sys.executable, tool, path, path.with_suffix(".idx")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return paths


def _webdataset(paths: list[Path], device: torch.device) -> Loader:
    """Read images and the indices that their names begin with: 000000042.image.npy."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=BATCH, num_threads=1, device_id=None)
    with pipeline:
        files = fn.readers.webdataset(
            paths=[*map(str, paths)],
            index_paths=[str(p.with_suffix(".idx")) for p in paths],
            ext=["image.npy"],
            random_shuffle=True,
        )
        names = fn.get_property(files, key="source_info")
        pipeline.set_outputs(fn.decoders.numpy(files), names[-19:-10])
    pipeline.build()
    return _decoded(pipeline, device)


def _decoded(pipeline: Any, device: torch.device) -> Loader:
    while True:
        images, digits = (torch.from_dlpack(x.as_tensor()) for x in pipeline.run())
        indices = (digits - ord("0")).long() @ 10 ** torch.arange(8, -1, -1)
        yield images.to(device), indices.to(device)


def _take(source: Pairs, steps: Loader) -> Iterator[Tensor]:
    """Take an epoch, and drop what was used, as a training does."""
    found = []
    with closing(steps):
        for step in itertools.islice(steps, STEPS):
            found.append(step[1])
    return _seen(source, found, step[0])


def _seen(source: Pairs, indices: list[Tensor], images: Tensor) -> Iterator[Tensor]:
    """Yield all indices, sorted, and what the last images are off by, when the gate asks."""
    yield torch.cat(indices).cpu().sort().values
    yield images.cpu().float() - source.read(indices[-1].cpu())
