"""Pairs (noise, teacher's image): made once, kept in shards, read by index.

A store is a directory, or a folder in a bucket (ds.pairs.storage). manifest.json says what made it;
images-00000.npy and its followers hold the images of consecutive indices. The noise is not kept:
that of pair i is ds.noise(seed, [i], shape). So a shard is a function of the manifest and its
number, whichever process writes it and in whatever order. Nor are classes and guidance scales kept:
those of pair i are manifest.conditions.draw(seed, [i]).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ds.diffusion.conditions import Conditions
from ds.diffusion.grids import Grid
from ds.diffusion.guidance import ClassifierFree
from ds.diffusion.noise import noise
from ds.diffusion.solvers import AbstractSolver
from ds.models.pretrained import fingerprint
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.pairs.manifest import MANIFEST, Manifest, name
from ds.pairs.quantizer import dequantize, quantize
from ds.pairs.rows import Rows, as_indices
from ds.pairs.storage import claim_of, place
from ds.system import targets
from ds.system.config import Between, from_json, require, tag


class PairStore:
    """A finished store of pairs, in a directory or at a URL, read by index.

    Shards are mapped into memory when they are first read, and hashed then unless `check` is off;
    `verify` reads them all. Those of a bucket are first copied to this machine; see
    ds.pairs.storage.Bucket. A store is pickled as its path. `types` are classes of the caller's,
    for a store whose solver is one of them.

    Raises ValueError if there is no store, it is not finished, or a shard is missing or has the
    wrong size.
    """

    def __init__(self, path: str | Path, *, check: bool = True, types: Sequence[type] = ()):
        self._where = where = place(path)
        self.path, self.check, self._types = where.path, check, tuple(types)
        self._again = Path(path).absolute() if isinstance(self.path, Path) else path
        self.manifest = manifest = Manifest.read(where)
        if missing := manifest.missing(where.names()):
            raise ValueError(
                f"{where}: {len(missing)} of {len(manifest.shards)} shards are missing; run the "
                f"same `dstudent pairs` again to write them"
            )
        if not manifest.finished:
            raise ValueError(f"{where}: not finished; run the same `dstudent pairs` again")
        self.shape = tuple(manifest.shape)
        self.seed = manifest.seed
        hashes = {name(i): digest for i, digest in enumerate(manifest.sha256) if digest}
        self._rows = Rows(where, hashes, manifest.starts, manifest.row, check=check)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PairStore, check=self.check, types=self._types), (self._again,)

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def solver(self) -> AbstractSolver:
        """The solver that made the images."""
        return from_json(self.manifest.solver, self._types)

    @property
    def grid(self) -> Grid:
        """The times that the solver visited."""
        return tuple(self.manifest.grid)

    @property
    def teacher_sha256(self) -> str:
        """The fingerprint of the denoiser that made the images."""
        return self.manifest.teacher["sha256"]

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which holds those of the teacher and of every shard."""
        return self._where.sha256(MANIFEST)

    @torch.no_grad()  # which lets the op go past PyTorch's dispatcher
    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the stored images at `indices`: uint8 [N, H, W, C], or floats [N, *shape].

        Raises ValueError for an index that is not in the store, and for a damaged shard.
        """
        return self._rows.read(as_indices("images", indices, len(self)))

    def shard(self, number: int) -> Tensor:
        """Return the images of a shard, mapped, as long as its file keeps its size."""
        return self._rows.shard(number)

    def noise(self, indices: Sequence[int] | Tensor, *, device="cpu") -> Tensor:
        """Return the noise that the images came from, float32 [N, *shape], made from the seed."""
        return noise(self.seed, as_indices("noise", indices, len(self)), self.shape, device=device)

    @property
    def conditions(self) -> Conditions:
        """The classes and guidance scales that the teacher was asked for."""
        return self.manifest.conditions

    def labels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the classes of the pairs at `indices`, int64 [N], made from the seed.

        Raises ValueError for a store without classes, and for an index that is not in it.
        """
        if not self.conditions.classes:
            raise ValueError(f"{self._where}: its pairs have no classes")
        return self.cond(indices)["label"]

    def cond(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Return what the teacher was asked for at `indices`, [N] each; see Conditions.draw."""
        index = as_indices("cond", indices, len(self))
        return self.conditions.draw(self.seed, index)

    def made_by(self, teacher: Teacher) -> Teacher:
        """Return a teacher with the solver, the grid and the guidance that the pairs came from.

        A teacher that is guided already keeps its guidance; that by a classifier is not stored.
        """
        about, denoiser = self.manifest.teacher.get("guidance"), teacher.denoiser
        known = isinstance(about, dict) and about.get("type") == tag(ClassifierFree)
        if known and denoiser.guidance is None:
            denoiser = replace(denoiser, guidance=from_json(about))
        return replace(teacher, denoiser=denoiser, solver=self.solver, grid=self.grid)

    def targets(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the images as floats, about [-1, 1], [N, *shape]."""
        return dequantize(self.images(indices))

    def verify(self, teacher: Teacher | None = None, recompute: int = 4) -> None:
        """Hash every shard; with the teacher, also recompute a few pairs spread over the store.

        A recomputed image may differ by one grey level where another batch size rounds otherwise.
        Raises ValueError naming the first shard or pair that is wrong.
        """
        if teacher is not None:
            require(f"{self._where}", Annotated[int, Between(1, len(self))], recompute=recompute)
        self._rows.verify()
        if teacher is None:
            return
        if fingerprint(teacher.denoiser) != self.teacher_sha256:
            raise ValueError(f"{self._where}: made by another teacher than the one given")
        last = len(self) - 1
        picks = sorted({i * last // max(recompute - 1, 1) for i in range(recompute)})
        sampler = Sampler(
            teacher,
            batch_size=len(picks),
            execution=self.manifest.execution,
            conditions=self.conditions,
        )
        (x,) = sampler.batches(self.seed, picks)
        again = quantize(x, self.manifest.quantizer).float()
        stored = self.images(picks)
        allowed = 1.0 if stored.dtype == torch.uint8 else 1e-3 * max(1.0, float(again.abs().max()))
        errors = (again - stored.float()).flatten(1).abs().amax(1)
        for i, error in zip(picks, errors.tolist(), strict=True):
            if error > allowed:
                raise ValueError(
                    f"{self._where}: pair {i} is not what this teacher makes of its noise (off by "
                    f"{error:g})"
                )


def check_target(path: str | Path, *, apart: targets.Inputs = ()) -> None:
    """Raise ValueError for a place where no store can be, or that overlaps with an input."""
    place(path).check("pair store", MANIFEST, apart=apart)


def is_finished(path: str | Path) -> bool:
    """Return whether there is a store that can be read."""
    where = place(path)
    if MANIFEST not in (names := where.names()):
        return False
    manifest = Manifest.read(where)
    return manifest.finished and not manifest.missing(names)


def to_make(path: str | Path, count: int) -> int:
    """Return how many of so many pairs a store, or a place without one, does not have yet."""
    where = place(path)
    if MANIFEST not in (names := where.names()):
        return count
    manifest = Manifest.read(where)
    return max(0, count - manifest.count) + manifest.pairs(manifest.missing(names))


def info(path: str | Path) -> dict[str, Any]:
    """Return what is in a store, finished or not.

    Raises ValueError if there is no store.
    """
    where = place(path)
    manifest, names = Manifest.read(where), where.names()
    missing, grid, files = manifest.missing(names), manifest.grid, {*map(name, manifest.shards)}
    return {
        "pairs": manifest.count,
        "grown_from": manifest.grown_from,
        "shape": manifest.shape,
        "quantizer": manifest.quantizer,
        "seed": manifest.seed,
        "teacher": manifest.teacher["sha256"],
        "solver": manifest.solver,
        "grid": f"{len(grid)} times from {grid[0]} to {grid[-1]}",
        "execution": manifest.json["execution"],
        "dtype": manifest.dtype,
        **({"conditions": manifest.json["conditions"]} if manifest.conditions.names else {}),
        "shards": f"{len(manifest.shards) - len(missing)} of {len(manifest.shards)}",
        "being_written": len(names & {*map(claim_of, files)}),
        "bytes": sum(where.size(file) for file in names & files),
        "finished": manifest.finished and not missing,
    }
