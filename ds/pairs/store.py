"""Pairs (noise, teacher's image): made once, kept in shards, read by index.

A store is a directory, or a folder in a bucket (ds.pairs.storage). manifest.json says what made it,
images-00000.npy and its followers hold the images of consecutive indices. Noise is not kept: that
of pair i is ds.noise(seed, [i], shape), so a shard is a function of the manifest and its number,
whoever writes it and in whatever order.

    write     claim images-00003.npy, compute, hash, write the whole file
    resume    write the shards that are missing
    finish    move the hash of every shard into the manifest; without them a store is not read
    grow      raise the count: the shards there are stay, even a last one that is not full
"""

import hashlib
import io
import logging
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ds
from ds.diffusion.noise import noise
from ds.models.images import to_float, to_uint8
from ds.models.model import device_of
from ds.models.pretrained import describe, fingerprint
from ds.models.sampler import (
    Precision,
    Sampler,
    check_precision,
    least_memory,
    uses_engine,
    uses_loop,
    usual_precision,
)
from ds.models.teacher import Teacher
from ds.pairs.rows import Row, Rows, as_indices
from ds.pairs.storage import AbstractPlace, Put, claim_of, place
from ds.system import cost, targets
from ds.system.ambient import without_ambient
from ds.system.config import (
    Between,
    Count,
    Seed,
    Sha256,
    checked,
    difference,
    mismatch,
    require,
    to_json,
)
from ds.system.cost import check_memory
from ds.system.files import sealed, unsealed
from ds.system.signals import Heard, Interrupted, Stop, deferred_signals

FORMAT = "denoising-student/pairs/1"
MANIFEST = "manifest.json"
Quantizer = Literal["round", "floor", "float16", "float32"]
IMAGES = ("round", "floor")  # the quantizers that make uint8
MOST_SHARDS = 500_000  # whose hashes fit a manifest


class _Teacher(TypedDict):
    sha256: Sha256
    net: Any
    schedule: Any
    prediction: Any


class _Finished(TypedDict, total=False):
    """What a finished store has as well."""

    sha256: list[Sha256 | None]  # of the shards; None for one that is not finished


class Manifest(_Finished):
    """The fields of a manifest."""

    format: Literal["denoising-student/pairs/1"]
    version: str
    teacher: _Teacher
    solver: dict[str, Any]
    grid: Annotated[list[Annotated[int, Between(0)]], Between(1)]
    noise: Literal["philox4x32-10, Box-Muller"]
    seed: Seed
    count: Count
    grown_from: list[Count]
    shape: Annotated[list[Count], Between(1)]
    quantizer: Quantizer
    shard_size: Count
    engine: bool
    loop: bool
    precision: Precision
    device: str


log = logging.getLogger("ds")


@without_ambient()
def generate_pairs(
    teacher: Teacher,
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    shard_size: int = 16384,
    quantizer: Quantizer = "round",
    precision: Precision | None = None,
    engine: bool | None = None,
    price: float = 0.0,
    progress: bool = False,
) -> "PairStore":
    """Run the teacher on the noise of the indices 0 .. count - 1 and keep its images in `out`.

    `out` is a directory or an fsspec URL such as s3://bucket/folder. Call it again after an
    interruption, or from several processes at once, which may come and go: finished shards stay and
    nobody writes the same one. With a larger count a store grows; until it is finished again it is
    not read. Images are uint8 by rounding; "floor" truncates as in 2021, "float16" and "float32"
    keep the teacher's numbers, unclipped, for points and latents. The device is that of the
    teacher's network; `precision` and `engine` are those of ds.Sampler. With a `price`, dollars an
    hour, the estimate and the progress say what it costs.

    Raises ValueError for bad arguments or a directory that holds another store, RuntimeError if
    the disk is too small or the teacher returns numbers that are not finite, and Interrupted at
    once after SIGINT, SIGTERM, SIGUSR1 or SIGHUP; finished shards are safe.
    """
    where = place(out)
    manifest = prepare(
        teacher, where, count, seed=seed, batch_size=batch_size, shard_size=shard_size,
        quantizer=quantizer, precision=precision, engine=engine,
    )  # fmt: skip
    plan = _Plan.open(where, manifest)
    if missing := plan.missing():
        total = sum(len(plan.indices(i)) for i in missing)
        sampler = _sampler(teacher, batch_size, manifest)
        log.info(f"{plan.place}: {estimate(sampler, total, quantizer, price)[0]}")
        with (
            deferred_signals() as stop,
            tqdm(unit=" pairs", disable=not progress, smoothing=0.05) as bar,
        ):
            shown = _Shown(bar, sampler.device, price)
            try:
                _write_missing(plan, sampler, shown, stop)
            except Heard as heard:
                done = plan.shards - len(plan.missing())
                raise Interrupted(
                    f"{plan.place}: interrupted, {done} of {plan.shards} shards are safe; run the "
                    f"same command again to go on",
                    heard.number,
                ) from None
    plan.finish()
    return PairStore(out)


def prepare(
    teacher: Teacher, where: AbstractPlace, count: int, *, seed: int, batch_size: int | None,
    shard_size: int, quantizer: Quantizer, precision: Precision | None, engine: bool | None,
) -> dict[str, Any]:  # fmt: skip
    """Raise what generate_pairs raises before its work, and write nothing; return the manifest."""
    _check(count, seed, batch_size, shard_size, quantizer, engine, teacher.shape)
    check_memory(  # as rows, as one array and as the bytes of a file
        "generate_pairs: a shard",
        3 * min(count, shard_size) * _row(teacher.shape, quantizer).bytes,
    )
    if batch_size is not None:
        check_memory(
            f"generate_pairs: a batch_size of {batch_size}",
            batch_size * least_memory(teacher),
            device_of(teacher.net),
        )
    manifest = _manifest(teacher, count, seed, shard_size, quantizer)
    manifest |= _path(teacher, precision, engine)
    _check_manifest(manifest, "generate_pairs")
    where.check("pair store", MANIFEST)
    there = _read_manifest(where) if MANIFEST in where.names() else None
    plan = _Plan(where, _agreed(where, manifest, there))
    _check_disk(plan, sum(len(plan.indices(i)) for i in plan.missing()))
    return manifest


def _check(
    count: int, seed: int, batch_size: int | None, shard_size: int, quantizer: str,
    engine: bool | None, shape: tuple[int, ...],
) -> None:  # fmt: skip
    require("generate_pairs", Count, count=count, shard_size=shard_size)
    require("generate_pairs", Count | None, batch_size=batch_size)
    require("generate_pairs", Seed, seed=seed)
    require("generate_pairs", bool | None, engine=engine)
    if quantizer not in get_args(Quantizer):
        raise ValueError(
            f"generate_pairs: quantizer must be one of {', '.join(get_args(Quantizer))}, "
            f"not {quantizer!r}"
        )
    if quantizer in IMAGES and len(shape) != 3:
        raise ValueError(
            f"generate_pairs: {quantizer!r} stores images [C, H, W]; samples of the shape "
            f"{list(shape)} need quantizer='float32'"
        )


def _path(teacher: Teacher, precision: Precision | None, engine: bool | None) -> dict[str, Any]:
    """Say in which way numbers are rounded, of which a store has one."""
    device, precision = device_of(teacher.net), precision or usual_precision(teacher.net)
    engine = uses_engine(teacher.net, precision) if engine is None else engine
    check_precision(precision, device, engine)
    loop = engine and uses_loop(teacher, device)
    return {"engine": engine, "loop": loop, "precision": precision, "device": device.type}


def _sampler(teacher: Teacher, batch_size: int | None, path: dict[str, Any]) -> Sampler:
    """Return a sampler that rounds in the way of a store, and in no other that it could go back to.

    Raises RuntimeError where it cannot be had.
    """
    how = {name: path[name] for name in ("engine", "loop", "precision")}
    try:
        return Sampler(teacher, batch_size=batch_size, **how)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        instead = "; engine=False runs the network itself, slower" if path["engine"] else ""
        raise RuntimeError(f"generate_pairs: {how} cannot run here: {reason}{instead}") from error


def estimate(
    sampler: Sampler, pairs: int, quantizer: Quantizer, price: float = 0.0
) -> tuple[str, float]:
    """Say what so many pairs will cost, from a few network calls; return that and the seconds."""
    bytes_per_pair = _row(sampler.model.shape, quantizer).bytes
    seconds = sampler.seconds_each() * pairs
    return (
        f"{pairs:,} pairs to make, {cost.size(pairs * bytes_per_pair)}, {sampler.model.nfe} "
        f"network calls each, about {cost.cost(seconds, price)}"
    ), seconds


def _row(shape: Sequence[int], quantizer: Quantizer) -> Row:
    """Return what is kept of a pair whose sample has a shape."""
    c, *rest = shape
    return Row((*rest, c), torch.uint8 if quantizer in IMAGES else getattr(torch, quantizer))


def check_target(path: str | Path, *, apart: targets.Inputs = ()) -> None:
    """Raise ValueError for a place where no store can be, or that overlaps with an input."""
    place(path).check("pair store", MANIFEST, apart=apart)


def is_finished(path: str | Path) -> bool:
    """Say whether there is a store that can be read."""
    where = place(path)
    if MANIFEST not in where.names():
        return False
    plan = _Plan(where, _read_manifest(where))
    return plan.finished and not plan.missing()


def to_make(path: str | Path, count: int) -> int:
    """Say how many of so many pairs a store, or a place without one, does not have yet."""
    where = place(path)
    if MANIFEST not in where.names():
        return count
    plan = _Plan(where, _read_manifest(where))
    return max(0, count - plan.count) + sum(len(plan.indices(i)) for i in plan.missing())


class _Shown:
    """A progress bar that also says what the GPU does and what it has cost so far."""

    def __init__(self, bar: tqdm, device: torch.device, price: float):
        self.bar, self.device, self.price = bar, device, price
        self.begin = time.monotonic()

    def left(self, pairs: int) -> None:
        """Note how much is left, which other processes may have made less."""
        self.bar.total = self.bar.n + pairs
        self.bar.refresh()

    def update(self, pairs: int) -> None:
        if not self.bar.disable:
            self.bar.set_postfix(self.facts(), refresh=False)
        self.bar.update(pairs)

    def facts(self) -> dict[str, str]:
        facts = {}
        if self.device.type == "cuda" and find_spec("pynvml"):
            facts["gpu"] = f"{torch.cuda.utilization(self.device)}%"
        if self.price:
            facts["cost"] = f"${(time.monotonic() - self.begin) / 3600 * self.price:.2f}"
        return facts


def _write_missing(plan: "_Plan", sampler: Sampler, shown: _Shown, stop: Stop) -> None:
    """Write shards until none is missing, leaving those that another process has claimed to it.

    What a signal interrupts is a shard's computation, which is dropped, not its writing.
    """
    while missing := plan.missing():
        shown.left(sum(len(plan.indices(i)) for i in missing))
        wrote = False
        for shard in missing:
            with plan.place.claim(plan.name(shard)) as put:
                if put is not None:
                    with stop.at_once():
                        images = _make(plan, sampler, shard, shown)
                    plan.write(shard, put, images)
                    wrote = True
        if not wrote:
            with stop.at_once():
                time.sleep(plan.place.pause)


def _make(plan: "_Plan", sampler: Sampler, shard: int, shown: _Shown) -> np.ndarray:
    """Compute one shard."""
    parts = []
    for x in sampler.batches(plan.manifest["seed"], plan.indices(shard)):
        parts.append(quantize(x, plan.manifest["quantizer"]))
        shown.update(len(x))
    return np.concatenate(parts)


def quantize(x: Tensor, quantizer: Quantizer) -> np.ndarray:
    """Bring samples [N, *shape] into the stored form: channels last, on the CPU.

    Raises RuntimeError for numbers that are not finite.
    """
    if not x.isfinite().all():
        raise RuntimeError(
            "generate_pairs: the teacher returned numbers that are not finite; check its weights "
            "and its precision"
        )
    if quantizer in IMAGES:
        return to_uint8(x, quantizer).cpu().numpy()
    return x.movedim(1, -1).to(getattr(torch, quantizer)).cpu().numpy()


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
            "prediction": to_json(teacher.denoiser.prediction),
        },
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
    needed, free = pairs * plan.bytes_per_pair, plan.place.free()
    if needed > free:
        raise RuntimeError(
            f"{plan.place}: {pairs:,} pairs need {cost.size(needed)}, the disk has "
            f"{cost.size(free)} free; make room or ask for fewer"
        )


class PairStore:
    """A finished store of pairs, in a directory or at a URL, read by index.

    Raises ValueError for a place that has no store, or one that is not finished, lacks a shard or
    has one of another size. The shards are mapped into memory when they are first read, and hashed
    then, unless `check` is off; `verify` reads them all. Those of a bucket are copied to this
    machine first; see ds.pairs.storage.Bucket. A store is pickled as its path.
    """

    def __init__(self, path: str | Path, *, check: bool = True):
        where = place(path)
        self.path, self.check = where.path, check
        self._again = Path(path).absolute() if isinstance(self.path, Path) else path
        self.manifest = _read_manifest(where)
        plan = self._plan = _Plan(where, self.manifest)
        if missing := plan.missing():
            raise ValueError(
                f"{where}: {len(missing)} of {plan.shards} shards are missing; run the same "
                f"`dstudent pairs` again to write them"
            )
        if not plan.finished:
            raise ValueError(f"{where}: not finished; run the same `dstudent pairs` again")
        self.shape = tuple(self.manifest["shape"])
        self.seed = self.manifest["seed"]
        names = map(plan.name, range(plan.shards))
        hashes = dict(zip(names, self.manifest["sha256"], strict=True))
        self._rows = Rows(where, hashes, plan.starts, plan.row, check=check)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(PairStore, check=self.check), (self._again,)

    def __len__(self) -> int:
        return self.manifest["count"]

    @torch.no_grad()  # which lets the op go past PyTorch's dispatcher
    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the stored images at `indices`: uint8 [N, H, W, C], or floats [N, *shape].

        Raises ValueError for what is no index of the store, and for a damaged shard.
        """
        return self._rows.read(as_indices("images", indices, len(self)))

    def shard(self, number: int) -> Tensor:
        """Return the images of a shard, mapped, as long as its file keeps its size."""
        return self._rows.shard(number)

    def noise(self, indices: Sequence[int] | Tensor, *, device="cpu") -> Tensor:
        """Return the noise the images came from, float32 [N, *shape], made anew from the seed."""
        return noise(self.seed, as_indices("noise", indices, len(self)), self.shape, device=device)

    def targets(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the images as floats, about [-1, 1], [N, *shape]."""
        rows = self.images(indices)
        return to_float(rows) if rows.dtype == torch.uint8 else rows.movedim(-1, 1).float()

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which holds those of the teacher and of every shard."""
        return self._plan.place.sha256(MANIFEST)

    def verify(self, teacher: Teacher | None = None, recompute: int = 4) -> None:
        """Hash every shard; with the teacher, also recompute a few pairs spread over the store.

        A recomputed image may differ by one grey level where batching rounds differently. Raises
        ValueError naming the first shard or pair that is wrong.
        """
        if teacher is not None:
            most = Annotated[int, Between(1, len(self))]
            require(f"{self._plan.place}", most, recompute=recompute)
        self._rows.verify()
        if teacher is None:
            return
        if fingerprint(teacher.denoiser) != self.manifest["teacher"]["sha256"]:
            raise ValueError(f"{self._plan.place}: made by another teacher than the one given")
        last = len(self) - 1
        picks = sorted({i * last // max(recompute - 1, 1) for i in range(recompute)})
        sampler = _sampler(teacher, len(picks), self.manifest)
        (x,) = sampler.batches(self.seed, picks)
        again = torch.from_numpy(quantize(x, self.manifest["quantizer"])).float()
        stored = self.images(picks)
        allowed = 1.0 if stored.dtype == torch.uint8 else 1e-3
        errors = (again - stored.float()).flatten(1).abs().amax(1)
        for i, error in zip(picks, errors.tolist(), strict=True):
            if error > allowed:
                raise ValueError(
                    f"{self._plan.place}: pair {i} is not what this teacher makes of its noise "
                    f"(off by {error:g})"
                )


def info(path: str | Path) -> dict[str, Any]:
    """Say what is in a store, finished or not.

    Raises ValueError for a place that has no store.
    """
    where = place(path)
    manifest = _read_manifest(where)
    plan = _Plan(where, manifest)
    missing, grid, names = len(plan.missing()), manifest["grid"], where.names()
    shards = [plan.name(i) for i in range(plan.shards)]
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
        "being_written": len(names & {*map(claim_of, shards)}),
        "bytes": sum(where.size(name) for name in names & {*shards}),
        "finished": not missing and plan.finished,
    }


def _read_manifest(where: AbstractPlace) -> dict[str, Any]:
    """Read the manifest of a store, without its seal, checked for all that it must be."""
    try:
        data = where.read_json(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{where}: not a pair store, it has no {MANIFEST}") from None
    file = f"{where}/{MANIFEST}"
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{file}: not the manifest of a pair store")
    return _check_manifest(unsealed(data, file, required=True), file)


def _check_manifest(manifest: dict[str, Any], file: str) -> dict[str, Any]:
    """Return a manifest; ValueError naming its file and the first thing that cannot be."""
    checked(manifest, Manifest, file)
    if any(t <= s for t, s in pairwise(manifest["grid"])):
        raise ValueError(f"{file}: grid must fall, not {manifest['grid']}")
    counts = [0, *manifest["grown_from"], manifest["count"]]
    if any(a >= b for a, b in pairwise(counts)):
        raise ValueError(f"{file}: grown_from must rise to count, not {counts[1:]}")
    shards = sum(-(-(b - a) // manifest["shard_size"]) for a, b in pairwise(counts))
    if shards > MOST_SHARDS:
        raise ValueError(
            f"{file}: {manifest['count']:,} pairs, {manifest['shard_size']:,} a shard, are "
            f"{shards:,} shards; take larger ones or fewer pairs, for {MOST_SHARDS:,} at most"
        )
    if len(hashes := manifest.get("sha256", [])) > shards:
        raise ValueError(f"{file}: has {len(hashes):,} hashes for {shards:,} shards")
    if manifest["quantizer"] in IMAGES and len(manifest["shape"]) != 3:
        raise ValueError(f"{file}: shape must be [C, H, W], not {manifest['shape']}")
    return manifest


def _agreed(
    where: AbstractPlace, manifest: dict[str, Any], there: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a manifest with what has grown into it, by the one that is there.

    Raises ValueError if that is of another store.
    """
    if there is None:
        return manifest
    grown_from, old = there["grown_from"], there["count"]
    if old < manifest["count"]:
        grown_from = [*grown_from, old]
        there = there | {"grown_from": grown_from, "count": manifest["count"]}
    wanted = manifest | {"grown_from": grown_from}
    known = {name: there.get(name) for name in wanted if name != "version"}
    if found := difference(known, {name: wanted[name] for name in known}):
        raise ValueError(f"{where}: holds a store made otherwise ({found}); use another name")
    return wanted


class _Plan:
    """The files a store consists of, from its manifest, and how one shard comes to be."""

    def __init__(self, place: AbstractPlace, manifest: dict[str, Any]):
        self.place = place
        self.manifest = manifest
        counts = (*manifest["grown_from"], manifest["count"])
        parts = (range(a, b, manifest["shard_size"]) for a, b in pairwise((0, *counts)))
        self.count = manifest["count"]
        self.starts = [*chain.from_iterable(parts), manifest["count"]]  # of the shards, and the end
        self.shards = len(self.starts) - 1

    @classmethod
    def open(cls, place: AbstractPlace, manifest: dict[str, Any]) -> "_Plan":
        """Write the manifest, or take the one that is there, if it is of this plan.

        A manifest that differs in a smaller count only is brought to the new one.
        """
        place.prepare()
        with place.locked():
            there = _read_manifest(place) if MANIFEST in place.names() else None
            wanted = _agreed(place, manifest, there)
            if there is None:
                place.write_json(MANIFEST, sealed(manifest), once=True)
                wanted = _agreed(place, manifest, there := _read_manifest(place))
            if there["count"] < wanted["count"]:
                grown = {name: wanted[name] for name in ("count", "grown_from")}
                place.write_json(MANIFEST, sealed(there | grown))
        return cls(place, wanted)

    @property
    def bytes_per_pair(self) -> int:
        return self.row.bytes

    @property
    def row(self) -> Row:
        """What is kept of a pair."""
        return _row(self.manifest["shape"], self.manifest["quantizer"])

    @property
    def finished(self) -> bool:
        """Whether the manifest has the hash of every shard."""
        hashes = self.manifest.get("sha256", [])
        return len(hashes) == self.shards and None not in hashes

    def indices(self, shard: int) -> range:
        return range(self.starts[shard], self.starts[shard + 1])

    def name(self, shard: int) -> str:
        return f"images-{shard:05d}.npy"

    def missing(self) -> list[int]:
        names = self.place.names()
        return [i for i in range(self.shards) if self.name(i) not in names]

    def write(self, shard: int, put: Put, images: np.ndarray) -> None:
        file = io.BytesIO()
        np.lib.format.write_array(file, images, version=(1, 0), allow_pickle=False)
        content = file.getvalue()
        self.place.write(self._digest(shard), hashlib.sha256(content).hexdigest().encode())
        if not put(content):  # another was first, on a machine that may round otherwise
            self.place.write(self._digest(shard), self.place.sha256(self.name(shard)).encode())

    def finish(self) -> None:
        """Move the hashes of the shards into the manifest, which makes the store readable.

        Two that do this at once, which no lock may prevent, write the same: hashes are read before
        the manifest that they may have gone to, and removed after it is written.
        """
        with self.place.locked():
            names = self.place.names()
            new = {i: f for i in range(self.shards) if (f := self._digest(i)) in names}
            found = {i: digest for i, f in new.items() if (digest := self._read(f))}
            manifest = _read_manifest(self.place)
            old = manifest.get("sha256", [])
            hashes = [found.get(i, h) for i, h in enumerate([*old, *[None] * self.shards])]
            hashes = [h or self._lost(i, names) for i, h in enumerate(hashes[: self.shards])]
            if hashes != old:
                self.place.write_json(MANIFEST, sealed({**manifest, "sha256": hashes}))
            claims = names & {claim_of(self.name(i)) for i in range(self.shards)}
            for name in (*new.values(), *claims):  # claims of the dead
                self.place.remove(name)

    def _read(self, name: str) -> str | None:
        try:
            digest = self.place.read(name).decode(errors="replace")
        except FileNotFoundError:
            return None
        return None if mismatch(digest, Sha256) else digest

    def _lost(self, shard: int, names: set[str]) -> str | None:
        """Hash a shard whose hash is gone, which its writer wrote before it."""
        if self.name(shard) not in names:
            return None
        log.warning(
            "%s/%s: its hash was lost, and it is taken as it is; `dstudent pairs verify --teacher` "
            "makes some of its pairs again", self.place, self.name(shard),
        )  # fmt: skip
        return self.place.sha256(self.name(shard))

    def _digest(self, shard: int) -> str:
        return self.name(shard).removesuffix(".npy") + ".sha256"
