"""The shards of a store while they are written, by one process or by several."""

import hashlib
import io
import logging
from dataclasses import replace

import numpy as np
from torch import Tensor

from ds.pairs.manifest import MANIFEST, Manifest, name
from ds.pairs.storage import AbstractPlace, Put, claim_of
from ds.system.config import Sha256, mismatch

log = logging.getLogger("ds")


def opened(where: AbstractPlace, manifest: Manifest) -> Manifest:
    """Write a manifest, or take the one that is there; return it with what has grown into it.

    A manifest that differs only in a smaller count is brought to the new one. Raises ValueError
    if the place holds another store.
    """
    where.prepare()
    with where.locked():
        there = Manifest.read(where) if MANIFEST in where.names() else None
        wanted = manifest.agreed(there, where)
        if there is None:
            manifest.write(where, once=True)
            there = Manifest.read(where)
            wanted = manifest.agreed(there, where)
        if there.count < wanted.count:
            there.grown_to(wanted.count).write(where)
    return wanted


def missing(where: AbstractPlace, manifest: Manifest) -> list[int]:
    """Return the shards that are not written yet."""
    return manifest.missing(where.names())


def write(where: AbstractPlace, shard: int, put: Put, images: Tensor) -> None:
    """Write a shard that `put` claims, after its hash."""
    file = io.BytesIO()
    np.lib.format.write_array(file, images.numpy(), version=(1, 0), allow_pickle=False)
    content = file.getvalue()
    where.write(_digest(shard), hashlib.sha256(content).hexdigest().encode())
    if not put(content):  # another was first, on a machine that may round otherwise
        where.write(_digest(shard), where.sha256(name(shard)).encode())


def finish(where: AbstractPlace, manifest: Manifest) -> None:
    """Move the hashes of the shards into the manifest, which makes the store readable.

    Two processes that do this at once, which no lock may prevent, write the same: hashes are read
    before the manifest that they may have gone to, and removed after it is written.
    """
    with where.locked():
        shards, names = manifest.shards, where.names()
        new = {i: f for i in shards if (f := _digest(i)) in names}
        found = {i: digest for i, f in new.items() if (digest := _read(where, f))}
        there = Manifest.read(where)
        old = [*there.sha256, *[None] * len(shards)]
        hashes = [found.get(i, old[i]) or _lost(where, i, names) for i in shards]
        if hashes != there.sha256:
            replace(there, sha256=hashes).write(where)
        claims = names & {claim_of(name(i)) for i in shards}
        for file in (*new.values(), *claims):  # claims of the dead
            where.remove(file)


def _read(where: AbstractPlace, file: str) -> str | None:
    try:
        digest = where.read(file).decode(errors="replace")
    except FileNotFoundError:
        return None
    return None if mismatch(digest, Sha256) else digest


def _lost(where: AbstractPlace, shard: int, names: set[str]) -> str | None:
    """Hash a shard whose hash is gone; its writer wrote that first."""
    if name(shard) not in names:
        return None
    log.warning(
        "%s/%s: its hash was lost, and it is taken as it is; `dstudent pairs verify --teacher` "
        "makes some of its pairs again",
        where,
        name(shard),
    )
    return where.sha256(name(shard))


def _digest(shard: int) -> str:
    return name(shard).removesuffix(".npy") + ".sha256"
