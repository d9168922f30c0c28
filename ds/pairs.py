"""Pairs (noise, teacher's image): made once, kept in shards, read by index.

A store is a directory. manifest.json says what made it, images-00000.npy and its followers hold the
images of consecutive indices. Noise is not kept: that of pair i is ds.noise(seed, [i], shape), so
a shard is a function of the manifest and its number, whoever writes it and in whatever order.

    write     lock images-00003.npy.tmp, compute, flush, hash, rename to images-00003.npy
    resume    write the shards that are missing
    finish    move the hash of every shard into the manifest; without them a store is not read
    grow      raise the count: the shards there are stay, even a last one that is not full
"""

import fcntl
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ds
from ds.checkpoint import describe, fingerprint
from ds.config import difference, to_json
from ds.files import (
    Interrupted,
    deferred_signals,
    locked,
    read_json,
    replacing,
    sha256,
    sync,
    write_json,
)
from ds.images import to_float, to_uint8
from ds.philox import noise
from ds.sample import Sampler, Teacher, seconds_per_call, uses_engine

FORMAT = "denoising-student/pairs/1"
MANIFEST = "manifest.json"
Quantizer = Literal["round", "floor", "float16", "float32"]
_NEEDED = {
    "teacher", "solver", "grid", "seed", "count", "grown_from", "shape", "quantizer", "shard_size",
}  # fmt: skip
log = logging.getLogger("ds")


def generate_pairs(
    teacher: Teacher,
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 256,
    shard_size: int = 16384,
    quantizer: Quantizer = "round",
    progress: bool = False,
) -> "PairStore":
    """Run the teacher on the noise of the indices 0 .. count - 1 and keep its images in `out`.

    Call it again after an interruption, or from several processes at once, which may come and go:
    finished shards stay and nobody writes the same one. With a larger count a store grows; until
    it is finished again it is not read. Images are uint8 by rounding; "floor" truncates as in 2021,
    "float16" and "float32" keep the teacher's numbers, unclipped, for points and latents. The
    device is that of the teacher's network.

    Raises ValueError for bad arguments or a directory that holds another store, RuntimeError if
    the disk is too small or the teacher returns numbers that are not finite, and Interrupted after
    SIGINT or SIGTERM, when all finished shards are safe.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"generate_pairs: {name} must be at least 1, not {value}")
    if quantizer not in get_args(Quantizer):
        raise ValueError(
            f"generate_pairs: quantizer must be one of {', '.join(get_args(Quantizer))}, "
            f"not {quantizer!r}"
        )
    if quantizer in ("round", "floor") and len(teacher.shape) != 3:
        raise ValueError(
            f"generate_pairs: {quantizer!r} stores images [C, H, W]; samples of the shape "
            f"{list(teacher.shape)} need quantizer='float32'"
        )
    plan = _Plan.open(Path(out), _manifest(teacher, count, seed, shard_size, quantizer))
    if missing := plan.missing():
        sampler = Sampler(teacher, batch_size=batch_size)
        total = sum(len(plan.indices(i)) for i in missing)
        _check_disk(plan, total)
        log.info(_estimate(plan, sampler, total))
        with (
            deferred_signals() as stop,
            tqdm(total=total, unit=" pairs", disable=not progress, smoothing=0.05) as bar,
        ):
            _write_missing(plan, sampler, bar, stop)
    plan.finish()
    return PairStore(out)


def _write_missing(plan: "_Plan", sampler: Sampler, bar: tqdm, stop: Callable[[], bool]) -> None:
    """Write shards until none is missing, leaving those that another process has claimed to it."""
    while missing := plan.missing():
        wrote = False
        for shard in missing:
            with plan.claim(shard) as file:
                if file is not None:
                    plan.write(shard, file, _make(plan, sampler, shard, bar, stop))
                    wrote = True
        if not wrote:
            _stop_if(stop, plan)
            time.sleep(0.1)


def _make(
    plan: "_Plan", sampler: Sampler, shard: int, bar: tqdm, stop: Callable[[], bool]
) -> np.ndarray:
    """Compute one shard; the partial result of an interrupted one is dropped."""
    parts = []
    for x in sampler.batches(plan.manifest["seed"], plan.indices(shard)):
        _stop_if(stop, plan)
        parts.append(_quantize(x, plan.manifest["quantizer"]))
        bar.update(len(x))
    return np.concatenate(parts)


def _quantize(x: Tensor, quantizer: Quantizer) -> np.ndarray:
    """Bring samples [N, *shape] into the stored form: channels last, on the CPU."""
    if not x.isfinite().all():
        raise RuntimeError(
            "generate_pairs: the teacher returned numbers that are not finite; check its weights "
            "and its precision"
        )
    if quantizer in ("round", "floor"):
        return to_uint8(x, quantizer).cpu().numpy()
    return x.movedim(1, -1).to(getattr(torch, quantizer)).cpu().numpy()


def _stop_if(stop: Callable[[], bool], plan: "_Plan") -> None:
    if stop():
        done = plan.shards - len(plan.missing())
        raise Interrupted(
            f"{plan.path}: interrupted, {done} of {plan.shards} shards are safe; run the same "
            f"command again to go on"
        )


def _manifest(
    teacher: Teacher, count: int, seed: int, shard_size: int, quantizer: Quantizer
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": ds.__version__,
        "teacher": {
            "sha256": fingerprint(teacher.denoiser),
            "net": describe(teacher.net),
            "schedule": to_json(teacher.denoiser.schedule),
            "prediction": teacher.denoiser.prediction,
        },
        "engine": uses_engine(teacher.net),  # two ways to round, never in one store
        "solver": to_json(teacher.solver),
        "grid": list(teacher.grid),
        "noise": "philox4x32-10, Box-Muller",
        "seed": seed,
        "count": count,
        "grown_from": [],
        "shape": list(teacher.shape),
        "quantizer": quantizer,
        "shard_size": shard_size,
    }


def _check_disk(plan: "_Plan", pairs: int) -> None:
    needed, free = pairs * plan.bytes_per_pair, shutil.disk_usage(plan.path).free
    if needed > free:
        raise RuntimeError(
            f"{plan.path}: {pairs:,} pairs need {_size(needed)}, the disk has {_size(free)} free; "
            f"make room or ask for fewer"
        )


def _estimate(plan: "_Plan", sampler: Sampler, pairs: int) -> str:
    """Say what the work will cost, from one network call that is timed after a first one."""
    teacher = sampler.model
    indices = plan.indices(0)[: sampler.batch_size]
    z = noise(0, indices, teacher.shape, device=sampler.device)
    seconds = seconds_per_call(teacher.denoiser, z, teacher.grid[0]) * teacher.nfe
    seconds *= pairs / len(indices)
    return (
        f"{plan.path}: {pairs:,} pairs to make, {_size(pairs * plan.bytes_per_pair)}, "
        f"{teacher.nfe} network calls each, about {_duration(seconds)}"
    )


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class PairStore:
    """A finished store of pairs, read by index.

    Raises ValueError for a directory that is no store, is not finished, or lacks a shard. The
    shards are mapped into memory, not read; `verify` reads them all.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        plan = _Plan(self.path, self.manifest)
        if missing := plan.missing():
            raise ValueError(
                f"{self.path}: {len(missing)} of {plan.shards} shards are missing; run the same "
                f"`dstudent pairs` again to write them"
            )
        if None in self.manifest.get("sha256", [None]):
            raise ValueError(f"{self.path}: not finished; run the same `dstudent pairs` again")
        self.shape = tuple(self.manifest["shape"])
        self.seed = self.manifest["seed"]
        self._shards = [_map(plan.file(i), len(plan.indices(i))) for i in range(plan.shards)]
        self._starts = np.array(plan.starts[:-1])

    def __len__(self) -> int:
        return self.manifest["count"]

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the stored images at `indices`: uint8 [N, H, W, C], or floats [N, *shape]."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise ValueError(f"{self.path}: indices must lie in 0 .. {len(self) - 1}")
        shard = np.searchsorted(self._starts, wanted, side="right") - 1
        row = wanted - self._starts[shard]
        first = self._shards[0]
        rows = np.empty((len(wanted), *first.shape[1:]), first.dtype)
        for s in np.unique(shard):
            here = shard == s
            rows[here] = self._shards[s][row[here]]
        return torch.from_numpy(rows)

    def noise(self, indices: Sequence[int] | Tensor, *, device="cpu") -> Tensor:
        """Return the noise the images came from, float32 [N, *shape], made anew from the seed."""
        return noise(self.seed, indices, self.shape, device=device)

    def targets(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the images as floats, about [-1, 1], [N, *shape]."""
        rows = self.images(indices)
        return to_float(rows) if rows.dtype == torch.uint8 else rows.movedim(-1, 1).float()

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which holds those of the teacher and of every shard."""
        return sha256(self.path / MANIFEST)

    def verify(self, teacher: Teacher | None = None, recompute: int = 4) -> None:
        """Hash every shard; with the teacher, also recompute a few pairs spread over the store.

        A recomputed image may differ by one grey level where batching rounds differently. Raises
        ValueError naming the first shard or pair that is wrong.
        """
        plan = _Plan(self.path, self.manifest)
        for i, expected in enumerate(self.manifest["sha256"]):
            if sha256(plan.file(i)) != expected:
                raise ValueError(
                    f"{plan.file(i)}: wrong checksum; delete this file and run the same "
                    f"`dstudent pairs` to write it again"
                )
        if teacher is None:
            return
        if fingerprint(teacher.denoiser) != self.manifest["teacher"]["sha256"]:
            raise ValueError(f"{self.path}: made by another teacher than the one given")
        last = len(self) - 1
        picks = sorted({i * last // max(recompute - 1, 1) for i in range(recompute)})
        (x,) = Sampler(teacher, batch_size=len(picks)).batches(self.seed, picks)
        again = torch.from_numpy(_quantize(x, self.manifest["quantizer"])).float()
        stored = self.images(picks)
        allowed = 1.0 if stored.dtype == torch.uint8 else 1e-3
        errors = (again - stored.float()).flatten(1).abs().amax(1)
        for i, error in zip(picks, errors.tolist(), strict=True):
            if error > allowed:
                raise ValueError(
                    f"{self.path}: pair {i} is not what this teacher makes of its noise "
                    f"(off by {error:g})"
                )


def info(path: str | Path) -> dict[str, Any]:
    """Say what is in the directory of a store, finished or not.

    Raises ValueError for a directory that is no store.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    plan = _Plan(path, manifest)
    missing, grid = len(plan.missing()), manifest["grid"]
    return {
        "pairs": plan.count,
        "grown_from": manifest["grown_from"],
        "shape": manifest["shape"],
        "quantizer": manifest["quantizer"],
        "seed": manifest["seed"],
        "teacher": manifest["teacher"]["sha256"],
        "solver": manifest["solver"],
        "grid": f"{len(grid)} times from {grid[0]} to {grid[-1]}",
        "shards": f"{plan.shards - missing} of {plan.shards}",
        "being_written": len(list(path.glob("images-*.npy.tmp"))),
        "bytes": sum(f.stat().st_size for f in path.glob("images-*.npy")),
        "finished": not missing and None not in manifest.get("sha256", [None]),
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a store, checked for what is needed of it."""
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path}: not a pair store, it has no {MANIFEST}")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST}: not the manifest of a pair store")
    if lost := _NEEDED - {*manifest}:
        raise ValueError(f"{path / MANIFEST}: damaged, it lacks {', '.join(sorted(lost))}")
    return manifest


def _map(path: Path, rows: int) -> np.ndarray:
    """Map a shard into memory after checking its size."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and make it again") from None
    if array.shape[0] != rows:
        raise ValueError(f"{path}: holds {array.shape[0]} pairs, not {rows}; delete it")
    return array


def _is_at(file: Any, path: Path) -> bool:
    """Say whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class _Plan:
    """The files a store consists of, from its manifest, and how one shard comes to be."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        counts = (*manifest["grown_from"], manifest["count"])
        parts = (range(a, b, manifest["shard_size"]) for a, b in pairwise((0, *counts)))
        self.count = manifest["count"]
        self.starts = [*chain.from_iterable(parts), manifest["count"]]  # of the shards, and the end
        self.shards = len(self.starts) - 1

    @classmethod
    def open(cls, path: Path, manifest: dict[str, Any]) -> "_Plan":
        """Create the directory and its manifest, or take those there are, if they are of this plan.

        A manifest that differs in a smaller count only is brought to the new one.
        """
        path.mkdir(parents=True, exist_ok=True)
        with locked(path, wait=True):
            if not (path / MANIFEST).exists():
                if any(path.glob("images-*")):
                    raise ValueError(f"{path}: has shards but no {MANIFEST}; use another name")
                write_json(path / MANIFEST, manifest)
            there = read_json(path / MANIFEST)
            if not isinstance(there, dict):
                raise ValueError(f"{path / MANIFEST}: not the manifest of a pair store")
            grown_from, old = there.get("grown_from", []), there.get("count")
            grows = isinstance(old, int) and old < manifest["count"]
            if grows:
                grown_from = [*grown_from, old]
                there |= {"grown_from": grown_from, "count": manifest["count"]}
            wanted = manifest | {"grown_from": grown_from}
            known = {name: there.get(name) for name in wanted if name != "version"}
            if found := difference(known, {name: wanted[name] for name in known}):
                raise ValueError(
                    f"{path}: holds a store made otherwise ({found}); use another name"
                )
            if grows:
                write_json(path / MANIFEST, there)
        return cls(path, wanted)

    @property
    def bytes_per_pair(self) -> int:
        itemsize = {"float16": 2, "float32": 4}.get(self.manifest["quantizer"], 1)
        return math.prod(self.manifest["shape"]) * itemsize

    def indices(self, shard: int) -> range:
        return range(self.starts[shard], self.starts[shard + 1])

    def file(self, shard: int) -> Path:
        return self.path / f"images-{shard:05d}.npy"

    def missing(self) -> list[int]:
        return [i for i in range(self.shards) if not self.file(i).exists()]

    @contextmanager
    def claim(self, shard: int) -> Iterator[Any]:
        """Yield the shard's temporary file, locked, or None if it is written or being written.

        The lock goes with the process, so a claim cannot outlive whoever made it. A file that was
        renamed or dropped by another between being opened and being locked here is left alone.
        """
        temporary = self.file(shard).with_suffix(".npy.tmp")
        with open(temporary, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not _is_at(file, temporary):
                yield None
                return
            try:
                yield None if self.file(shard).exists() else file
            finally:
                temporary.unlink(missing_ok=True)

    def write(self, shard: int, file: Any, images: np.ndarray) -> None:
        file.truncate(0)
        np.lib.format.write_array(file, images, version=(1, 0), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        digest = sha256(Path(file.name))
        with replacing(self._digest(shard)) as temporary:
            temporary.write_text(digest)
        os.rename(file.name, self.file(shard))
        sync(self.path)

    def finish(self) -> None:
        """Move the hashes of the shards into the manifest, which makes the store readable."""
        with locked(self.path, wait=True):
            manifest = read_json(self.path / MANIFEST)
            hashes = manifest.get("sha256", [])
            hashes += [None] * (self.shards - len(hashes))
            new = {i: f.read_text() for i in range(self.shards) if (f := self._digest(i)).exists()}
            if new:
                hashes = [new.get(i, old) for i, old in enumerate(hashes)]
                write_json(self.path / MANIFEST, {**manifest, "sha256": hashes})
            for i in new:
                self._digest(i).unlink()

    def _digest(self, shard: int) -> Path:
        return self.file(shard).with_suffix(".sha256")
