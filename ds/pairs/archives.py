"""Export pair stores as tar archives that other codes' loaders read.

    webdataset    42.image.npy   uint8 [H, W, C], or floats    42.noise.npy   float32 [C, H, W]
    fastgen       42.latent.pth  float32 [C, H, W]             42.noise.pth   float32 [C, H, W]

A store with classes adds 42.cls, the number of the class as text, or 42.label.pth, int64 []. One
with guidance scales adds 42.guidance.npy or 42.guidance.pth, float32 [].

Keys have nine digits. A FastGen loader finds the pairs with key_map = {"real": "latent.pth",
"noise": "noise.pth"}. The archives take 5 and 8 times the space of a store, which keeps no noise.
"""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ds.pairs.store import PairStore
from ds.system import targets
from ds.system.config import Count, difference, require
from ds.system.files import present, read_sealed, sealed
from ds.system.staging import check_plain, locked, replacing, write_json

SOURCE = "source.json"
BATCH = 256  # pairs in memory at a time
Form = Literal["webdataset", "fastgen"]
Column = tuple[Tensor, Callable[[Tensor], bytes]]  # rows, and what writes one as a file


def export(
    store: PairStore,
    out: str | Path,
    form: Form = "webdataset",
    *,
    per_archive: int = 4096,
    force: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Write the archives 000000.tar, 000001.tar, ... of `per_archive` pairs each.

    Called again after an interruption, it writes the missing archives. Raises ValueError for an
    unknown form, and for a directory that cannot be written, overlaps with the store, or holds
    anything else. Archives of another export are replaced with `force`, and refused without.
    """
    about = check(store, out, form, per_archive, force=force)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _claim(out, about)
        starts = range(0, len(store), per_archive)
        paths = [out / f"{number:06d}.tar" for number in range(len(starts))]
        for path, start in tqdm([*zip(paths, starts, strict=True)], disable=not progress):
            check_plain(path)
            if not path.exists():
                rows = range(start, min(start + per_archive, len(store)))
                with replacing(path) as temporary:
                    _write(_MEMBERS[form], store, rows, temporary)
    return paths


def check(
    store: PairStore, out: str | Path, form: Form, per_archive: int, *, force: bool = False
) -> dict[str, Any]:
    """Raise what `export` raises before its work. Return the description of the archives."""
    if form not in get_args(Form):
        raise ValueError(
            f"export: the form must be one of {', '.join(get_args(Form))}, not {form!r}"
        )
    require("export", Count, per_archive=per_archive)
    about = {
        "form": form,
        "store": store.sha256,
        "per_archive": per_archive,
        "archives": -(-len(store) // per_archive),
    }
    where = targets.kept(out, "directory of archives", SOURCE, apart=[store.path])
    if found := difference(_said(where) or about, about):
        if not force:
            raise ValueError(
                f"{out}: holds archives of something else ({found}); use another name, or force "
                f"(--force)"
            )
        targets.directory(out, "directory of archives", _ours, force=True)
    return about


def _said(folder: Path) -> dict[str, Any] | None:
    """Return the description of the archives in a directory, if it has one."""
    file = folder / SOURCE
    return read_sealed(file) if present(file) else None


def _ours(folder: Path) -> targets.Ours | None:
    about = _said(folder) or {}
    count = about.get("archives")
    if not isinstance(count, int) or about.get("form") not in _MEMBERS:
        return None
    return lambda name: name == SOURCE or targets.numbered(name, ".tar", count)


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Remove the archives of another export, and describe the new ones in the directory."""
    if _said(out) == about:
        return
    ours = _ours(out) or (lambda name: False)
    for name in filter(ours, {*os.listdir(out)} - {SOURCE}):
        (out / name).unlink()
    write_json(out / SOURCE, sealed(about))


def _write(members: Callable, store: PairStore, rows: range, path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for part in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
            columns = members(store, part)
            for i, row in enumerate(part):
                for name, (tensor, dump) in columns.items():
                    content = dump(tensor[i])
                    member = tarfile.TarInfo(f"{row:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _webdataset(store: PairStore, rows: range) -> dict[str, Column]:
    columns = {"image.npy": (store.images(rows), _npy), "noise.npy": (store.noise(rows), _npy)}
    files = {"label": ("cls", _text), "guidance": ("guidance.npy", _npy)}
    told = store.cond(rows).items()
    return columns | {files[name][0]: (value, files[name][1]) for name, value in told}


def _fastgen(store: PairStore, rows: range) -> dict[str, Column]:
    columns = {"latent.pth": (store.targets(rows), _pth), "noise.pth": (store.noise(rows), _pth)}
    told = store.cond(rows).items()
    return columns | {f"{name}.pth": (value, _pth) for name, value in told}


def _text(x: Tensor) -> bytes:
    return str(x.item()).encode()


def _npy(x: Tensor) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x.numpy(), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _pth(x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(x.clone(memory_format=torch.contiguous_format), file)
    return file.getvalue()


_MEMBERS = {"webdataset": _webdataset, "fastgen": _fastgen}
