"""Make the pairs of a store: run a teacher on noise and keep its samples, shard by shard.

claim     take images-00003.npy, unless another process has it
write     compute, hash, write the whole file
resume    write the shards that are missing
finish    move the hash of every shard into the manifest
grow      raise the count: the shards that are there stay
"""

import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ds.diffusion.conditions import Conditions
from ds.models.execution import Execution
from ds.models.model import device_of
from ds.models.sampler import Sampler, least_memory
from ds.models.teacher import Teacher
from ds.pairs import shards
from ds.pairs.manifest import MANIFEST, Manifest, name
from ds.pairs.quantizer import Quantizer, fitting, quantize, row_of
from ds.pairs.storage import AbstractPlace, place
from ds.pairs.store import PairStore
from ds.system import cost
from ds.system.ambient import without_ambient
from ds.system.config import Count, Seed, require
from ds.system.cost import check_memory
from ds.system.signals import Heard, Interrupted, Stop, deferred_signals

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
    quantizer: Quantizer | None = None,
    execution: Execution | None = None,
    conditions: Conditions | None = None,
    price: float = 0.0,
    progress: bool = False,
) -> PairStore:
    """Run the teacher on the noise of the indices 0 .. count - 1 and keep its images in `out`.

    `out` is a directory or an fsspec URL such as s3://bucket/folder. Call again after an
    interruption, or from several processes at once, which may come and go: finished shards stay,
    and no two processes write the same one. A larger count grows a store, which cannot be read
    until it is finished again.

    Pictures, [C, H, W] with 1 or 3 channels, are stored as uint8, by default rounded; "floor"
    truncates as in 2021. "float16" and "float32" keep the teacher's numbers unclipped; "float32" is
    the default for everything else, such as points and latents. The teacher runs on its network's
    device. `execution` says how, by default `Execution.default`; a store keeps the one it was begun
    with. With a `price`, in dollars an hour, the estimate and the progress show the cost.

    A teacher with classes is asked for those of `conditions`, by default for all, equally often.
    The class of a pair, and its guidance scale, depend on (seed, index) alone, as its noise does.
    The store keeps `conditions`, and no column for what they draw.

    Raises ValueError for bad arguments or a place that holds another store, RuntimeError if the
    disk is too small, the execution fails or the teacher returns numbers that are not finite, and
    Interrupted soon after SIGINT, SIGTERM, SIGUSR1 or SIGHUP; finished shards are safe.
    """
    where, asked = place(out), quantizer
    quantizer = fitting(teacher, asked)
    manifest = prepare(
        teacher,
        where,
        count,
        seed=seed,
        batch_size=batch_size,
        shard_size=shard_size,
        quantizer=quantizer,
        execution=execution,
        conditions=conditions,
    )
    manifest = shards.opened(where, manifest)
    if missing := shards.missing(where, manifest):
        sampler = Sampler(
            teacher,
            batch_size=batch_size,
            execution=manifest.execution,
            conditions=manifest.conditions,
        )
        total = manifest.pairs(missing)
        if asked is None and quantizer == "float32":
            log.info(f"{where}: samples {list(teacher.shape)} are no pictures, kept as float32")
        log.info(f"{where}: {estimate(sampler, total, quantizer, price)[0]}")
        with (
            deferred_signals() as stop,
            tqdm(unit=" pairs", disable=not progress, smoothing=0.05) as bar,
        ):
            try:
                _write_missing(where, manifest, sampler, _Shown(bar, sampler.device, price), stop)
            except Heard as heard:
                done = len(manifest.shards) - len(shards.missing(where, manifest))
                raise Interrupted(
                    f"{where}: interrupted, {done} of {len(manifest.shards)} shards are safe; run "
                    f"the same command again to go on",
                    heard.number,
                ) from None
    shards.finish(where, manifest)
    return PairStore(out)


def prepare(
    teacher: Teacher,
    where: AbstractPlace,
    count: int,
    *,
    seed: int,
    batch_size: int | None,
    shard_size: int,
    quantizer: Quantizer | None,
    execution: Execution | None,
    conditions: Conditions | None = None,
) -> Manifest:
    """Raise what generate_pairs raises before its work; write nothing; return the manifest."""
    require("generate_pairs", Count, count=count, shard_size=shard_size)
    require("generate_pairs", Count | None, batch_size=batch_size)
    require("generate_pairs", Seed, seed=seed)
    require("generate_pairs", Execution | None, execution=execution)
    quantizer = fitting(teacher, quantizer)
    check_memory(  # as rows, as one tensor and as the bytes of a file
        "generate_pairs: a shard",
        3 * min(count, shard_size) * row_of(teacher.shape, quantizer).bytes,
    )
    device = device_of(teacher.net)
    if batch_size is not None:
        needed = batch_size * least_memory(teacher)
        check_memory(f"generate_pairs: a batch_size of {batch_size}", needed, device)
    execution = execution or Execution.default(teacher)
    execution.check(teacher, device)
    manifest = Manifest.of(
        teacher,
        execution,
        conditions=teacher.conditions(conditions),
        seed=seed,
        count=count,
        quantizer=quantizer,
        shard_size=shard_size,
    )
    where.check("pair store", MANIFEST)
    there = Manifest.read(where) if MANIFEST in where.names() else None
    wanted = manifest.agreed(there, where)
    _check_disk(where, wanted)
    return manifest


def _check_disk(where: AbstractPlace, manifest: Manifest) -> None:
    pairs = manifest.pairs(shards.missing(where, manifest))
    needed, free = pairs * manifest.row.bytes, where.free()
    if needed > free:
        raise RuntimeError(
            f"{where}: {pairs:,} pairs need {cost.size(needed)}, the disk has {cost.size(free)} "
            f"free; make room or ask for fewer"
        )


def estimate(
    sampler: Sampler, pairs: int, quantizer: Quantizer | None, price: float = 0.0
) -> tuple[str, float]:
    """Estimate the cost of so many pairs from a few network calls; return a line and seconds."""
    bytes_per_pair = row_of(sampler.model.shape, fitting(sampler.model, quantizer)).bytes
    seconds = sampler.seconds_each() * pairs
    return (
        f"{pairs:,} pairs to make, {cost.size(pairs * bytes_per_pair)}, {sampler.model.nfe} "
        f"network calls each, about {cost.cost(seconds, price)}"
    ), seconds


class _Shown:
    """A progress bar that also shows the GPU's utilization and the cost so far."""

    def __init__(self, bar: tqdm, device: torch.device, price: float):
        self.bar, self.device, self.price = bar, device, price
        self.begin = time.monotonic()

    def left(self, pairs: int) -> None:
        """Set how much is left; other processes may have reduced it."""
        self.bar.total = self.bar.n + pairs
        self.bar.refresh()

    def update(self, pairs: int) -> None:
        if not self.bar.disable:
            self.bar.set_postfix(self.facts(), refresh=False)
        self.bar.update(pairs)

    def facts(self) -> dict[str, Any]:
        facts = {}
        if self.device.type == "cuda" and find_spec("pynvml"):
            facts["gpu"] = f"{torch.cuda.utilization(self.device)}%"
        if self.price:
            facts["cost"] = f"${(time.monotonic() - self.begin) / 3600 * self.price:.2f}"
        return facts


def _write_missing(
    where: AbstractPlace, manifest: Manifest, sampler: Sampler, shown: _Shown, stop: Stop
) -> None:
    """Write shards until none is missing, skipping those that other processes have claimed.

    A signal interrupts the computation of a shard, which is dropped, but not its writing.
    """
    while missing := shards.missing(where, manifest):
        shown.left(manifest.pairs(missing))
        wrote = False
        for shard in missing:
            with where.claim(name(shard)) as put:
                if put is not None:
                    with stop.at_once():
                        images = _make(manifest, sampler, shard, shown)
                    shards.write(where, shard, put, images)
                    wrote = True
        if not wrote:
            with stop.at_once():
                time.sleep(where.pause)


def _make(manifest: Manifest, sampler: Sampler, shard: int, shown: _Shown) -> Tensor:
    """Compute the images of a shard."""
    parts = []
    for x in sampler.batches(manifest.seed, manifest.indices(shard)):
        parts.append(quantize(x, manifest.quantizer))
        shown.update(len(x))
    return torch.cat(parts)
