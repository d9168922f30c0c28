"""Pair stores as tar archives that other codes' loaders read, noise and all.

    webdataset    42.image.npy   uint8 [H, W, C], or floats    42.noise.npy   float32 [C, H, W]
    fastgen       42.latent.pth  float32 [C, H, W]             42.noise.pth   float32 [C, H, W]

Keys have nine digits. A FastGen loader finds them with key_map = {"real": "latent.pth", "noise":
"noise.pth"}. Such pairs take 5 and 8 times the space of a store, which keeps no noise.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ds.config import difference
from ds.files import locked, read_json, replacing, write_json
from ds.pairs import PairStore

SOURCE = "source.json"
BATCH = 256  # pairs in memory at a time
Form = Literal["webdataset", "fastgen"]
Column = tuple[Tensor, Callable[[Tensor], bytes]]  # rows, and how one becomes a file


def export(
    store: PairStore,
    out: str | Path,
    form: Form = "webdataset",
    *,
    per_archive: int = 4096,
    progress: bool = False,
) -> list[Path]:
    """Write the archives 000000.tar, 000001.tar, ... of so many pairs each into `out`.

    Called again after an interruption, it writes those that are missing. Raises ValueError for
    another form, or a directory that holds the archives of something else.
    """
    if form not in get_args(Form):
        raise ValueError(f"export: the form must be webdataset or fastgen, not {form!r}")
    if per_archive < 1:
        raise ValueError(f"export: per_archive must be at least 1, not {per_archive}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _claim(out, {"form": form, "store": store.sha256, "per_archive": per_archive})
        starts = range(0, len(store), per_archive)
        paths = [out / f"{number:06d}.tar" for number in range(len(starts))]
        for path, start in tqdm([*zip(paths, starts, strict=True)], disable=not progress):
            if not path.exists():
                rows = range(start, min(start + per_archive, len(store)))
                with replacing(path) as temporary:
                    _write(store, rows, temporary, _MEMBERS[form])
    return paths


def _claim(out: Path, source: dict) -> None:
    """Note in a directory what its archives are of, or check that it is this."""
    if not (out / SOURCE).exists():
        if any(out.glob("*.tar")):
            raise ValueError(f"{out}: has archives but no {SOURCE}; use another name")
        write_json(out / SOURCE, source)
    elif found := difference(read_json(out / SOURCE), source):
        raise ValueError(f"{out}: holds archives of something else ({found}); use another name")


def _write(store: PairStore, rows: range, path: Path, members: Callable) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for first in range(rows.start, rows.stop, BATCH):
            part = range(first, min(first + BATCH, rows.stop))
            columns = members(store, part)
            for i, row in enumerate(part):
                for name, (tensor, dump) in columns.items():
                    content = dump(tensor[i])
                    member = tarfile.TarInfo(f"{row:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _webdataset(store: PairStore, rows: range) -> dict[str, Column]:
    return {"image.npy": (store.images(rows), _npy), "noise.npy": (store.noise(rows), _npy)}


def _fastgen(store: PairStore, rows: range) -> dict[str, Column]:
    return {"latent.pth": (store.targets(rows), _pth), "noise.pth": (store.noise(rows), _pth)}


_MEMBERS = {"webdataset": _webdataset, "fastgen": _fastgen}


def _npy(x: Tensor) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x.numpy(), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _pth(x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(x.clone(memory_format=torch.contiguous_format), file)
    return file.getvalue()
