"""Pair stores as archives that other codes' loaders read, noise and all.

    webdataset    42.image.npy   uint8 [H, W, C], or floats    42.noise.npy   float32 [C, H, W]
    fastgen       42.latent.pth  float32 [C, H, W]             42.noise.pth   float32 [C, H, W]
    tfrecord      image          uint8 [H, W, C], or floats    noise          float32 [C, H, W]

Keys have nine digits. A FastGen loader finds them with key_map = {"real": "latent.pth", "noise":
"noise.pth"}. A record is a tf.train.Example whose features are key and image, as bytes, and noise,
as floats; images that are floats are so too, and floats are float32. NVIDIA DALI's reader wants an
index of each archive beside it, which its tfrecord2idx writes. Such pairs take 5, 8 and 5 times the
space of a store, which keeps no noise.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
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
Form = Literal["webdataset", "fastgen", "tfrecord"]
Column = tuple[Tensor, Callable[[Tensor], bytes]]  # rows, and how one becomes a file


def export(
    store: PairStore,
    out: str | Path,
    form: Form = "webdataset",
    *,
    per_archive: int = 4096,
    force: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Write the archives 000000.tar (or .tfrecord), 000001.tar, ... of so many pairs each.

    Called again after an interruption, it writes those that are missing. Raises ValueError for
    another form, for a place that cannot be written to, that overlaps with the store or holds
    something else, and for archives of something else: with `force`, they give way.
    """
    about = check(store, out, form, per_archive, force=force)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        _claim(out, about)
        starts = range(0, len(store), per_archive)
        suffix, write = _WRITERS[form]
        paths = [out / f"{number:06d}{suffix}" for number in range(len(starts))]
        for path, start in tqdm([*zip(paths, starts, strict=True)], disable=not progress):
            check_plain(path)
            if not path.exists():
                rows = range(start, min(start + per_archive, len(store)))
                with replacing(path) as temporary:
                    write(store, rows, temporary)
    return paths


def check(
    store: PairStore, out: str | Path, form: Form, per_archive: int, *, force: bool = False
) -> dict[str, Any]:
    """Raise what `export` raises before its work; return what is noted of the archives."""
    if form not in get_args(Form):
        raise ValueError(
            f"export: the form must be one of {', '.join(get_args(Form))}, not {form!r}"
        )
    require("export", Count, per_archive=per_archive)
    about = {
        "form": form, "store": store.sha256, "per_archive": per_archive,
        "archives": -(-len(store) // per_archive),
    }  # fmt: skip
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
    """Return what a directory says of its archives, if it does."""
    file = folder / SOURCE
    return read_sealed(file) if present(file) else None


def _ours(folder: Path) -> targets.Ours | None:
    about = _said(folder) or {}
    count, (suffix, _) = about.get("archives"), _WRITERS.get(about.get("form"), ("", None))
    if not isinstance(count, int) or not suffix:
        return None
    return lambda name: name == SOURCE or targets.numbered(name, suffix, count)


def _claim(out: Path, about: dict[str, Any]) -> None:
    """Note in a directory what its archives are of, once those of something else are gone."""
    if _said(out) == about:
        return
    ours = _ours(out) or (lambda name: False)
    for name in filter(ours, {*os.listdir(out)} - {SOURCE}):
        (out / name).unlink()
    write_json(out / SOURCE, sealed(about))


def _parts(rows: range) -> Iterator[range]:
    return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))


def _tar(members: Callable, store: PairStore, rows: range, path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for part in _parts(rows):
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


def _npy(x: Tensor) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, x.numpy(), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def _pth(x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(x.clone(memory_format=torch.contiguous_format), file)
    return file.getvalue()


def _tfrecord(store: PairStore, rows: range, path: Path) -> None:
    """Write records: length, its checksum, tf.train.Example, its checksum, all little-endian."""
    with open(path, "wb") as file:
        for part in _parts(rows):
            images, noise = store.images(part), store.noise(part)
            examples = [
                _example(key=b"%09d" % row, image=image.numpy(), noise=z.numpy())
                for row, image, z in zip(part, images, noise, strict=True)
            ]
            length = np.array([len(examples[0])], "<u8").tobytes()
            head = length + _checksums([length])[0]
            for example, checksum in zip(examples, _checksums(examples), strict=True):
                file.write(head + example + checksum)


def _example(**features: bytes | np.ndarray) -> bytes:
    """Serialize a tf.train.Example, whose length depends on the shapes alone.

    It is Example {1: Features {1: entries of a map {1: name, 2: Feature}}}, a Feature {1: bytes
    {1: content}} or {2: floats {1: packed content}}; everything in it has the wire type of bytes.
    """
    entries = []
    for name, value in features.items():
        floats = isinstance(value, np.ndarray) and value.dtype != np.uint8
        content = value.astype("<f4").tobytes() if floats else bytes(value)
        feature = _field(2 if floats else 1, _field(1, content))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, content: bytes) -> bytes:
    size, length = len(content), []
    while size >= 0x80:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def _checksums(rows: list[bytes]) -> list[bytes]:
    """Return the masked CRC-32C of rows of one length, which are taken together, byte by byte."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1).T.copy():
        crc = _CRC32C[(crc ^ column) & 0xFF] ^ crc >> 8
    crc = ~crc
    return [c.tobytes() for c in ((crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)).astype("<u4")]


def _crc_table(polynomial: int) -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(polynomial)
    return table


_CRC32C = _crc_table(0x82F63B78)
_WRITERS = {
    "webdataset": (".tar", partial(_tar, _webdataset)),
    "fastgen": (".tar", partial(_tar, _fastgen)),
    "tfrecord": (".tfrecord", _tfrecord),
}
