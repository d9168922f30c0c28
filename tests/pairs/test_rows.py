"""Rows of shards: whole files alone, as many maps as are allowed, and indices that are indices."""

import copy
import errno
import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

import ds
from ds.pairs import rows
from ds.pairs.sources import Pairs
from ds.pairs.store import info, is_finished
from ds.system.files import sealed
from ds.system.staging import write_json
from tests.pairs.test_store import COUNT, GAUSSIAN, all_images, contents, make
from tests.system.test_reading import NO_FILES, no_file

SHARD = "images-00001.npy"


@pytest.fixture
def store(tmp_path) -> ds.PairStore:
    return make(tmp_path / "s")


def header(descr: object = "|u1", fortran: bool = False, shape: object = (16, 4, 4, 2)) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(117)
    return b"\x93NUMPY\x01\x00" + len(text + "\n").to_bytes(2, "little") + f"{text}\n".encode()


ROWS = 16 * 4 * 4 * 2
WRONG_SHARDS = {
    "fortran order": header(fortran=True),
    "signed": header("|i1"),
    "truth values": header("|b1"),
    "text": header("<U1", shape=(128,)),
    "objects": header("|O", shape=(64,)),
    "fields": header([("a", "|u1"), ("b", "|u1")], shape=(256,)),
    "no shape": header(shape=()),
    "no tuple": header(shape=512),
    "one row too few": header(shape=(15, 4, 4, 2)),
    "10**13 rows": header(shape=(10**13, 4, 4, 2)),
    "a negative number of rows": header(shape=(-16, 4, 4, -2)),
    "channels first": header(shape=(16, 2, 4, 4)),
    "no dict": b"\x93NUMPY\x01\x00v\x00" + b"[1]".ljust(118),
    "calls": b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').mkdir('x')".ljust(118),
    "a later version": b"\x93NUMPY\x09\x00v\x00" + header()[10:],
    "no array": bytes(128),
}


@pytest.mark.parametrize("kind", WRONG_SHARDS)
def test_a_shard_with_another_header_is_damaged(store, kind):
    """Even where nobody looks at its hash."""
    assert len(WRONG_SHARDS[kind]) == 128
    (store.path / SHARD).write_bytes(WRONG_SHARDS[kind] + bytes(ROWS))
    with pytest.raises(ValueError, match=rf"{SHARD}: (damaged|not a whole|an array of)"):
        ds.PairStore(store.path, check=False).images([20])


@no_file
def test_a_shard_that_is_no_file_is_said_when_the_store_is_opened(store, kind):
    (store.path / SHARD).unlink()
    NO_FILES[kind](store.path / SHARD)
    with pytest.raises(ValueError, match=f"{SHARD}: {kind}"):
        ds.PairStore(store.path)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_shard_is_hashed_when_it_is_first_read_unless_it_need_not_be(store):
    flip(store.path / SHARD)
    fresh = ds.PairStore(store.path)
    assert len(fresh.images([0, 39])) == 2
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{SHARD}: wrong checksum; delete it"):
            fresh.images([0, 20])
    assert len(ds.PairStore(store.path, check=False).images(range(COUNT))) == COUNT


def test_a_shard_is_hashed_once(store, monkeypatch):
    hashed = []
    monkeypatch.setattr(rows, "sha256", lambda path: hashed.append(path) or real(path))
    monkeypatch.setattr(rows, "MAPPED", 1)
    fresh = ds.PairStore(store.path)
    for _ in range(3):
        all_images(fresh)
    assert len(hashed) == 3


real = rows.sha256


def test_a_shard_that_is_cut_while_it_is_mapped_does_not_end_the_process(store):
    all_images(store)
    os.truncate(store.path / SHARD, 128)
    with pytest.raises(ValueError, match=f"{SHARD}: damaged, 128 bytes do not hold 16 pairs"):
        store.images([20])
    assert len(store.images([0])) == 1


@pytest.mark.parametrize("mapped", [1, 2, 3])
def test_more_shards_than_may_be_mapped_are_read_in_turn(store, monkeypatch, mapped):
    monkeypatch.setattr(rows, "MAPPED", mapped)
    few, order = ds.PairStore(store.path), torch.randperm(COUNT)
    assert torch.equal(few.images(order), all_images(store)[order])
    assert torch.equal(few.images([39, 1, 39]), all_images(store)[[39, 1, 39]])
    assert few._rows.shard.cache_info().currsize == mapped


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        RuntimeError("unable to mmap 640 bytes from file: Cannot allocate memory (12)"),
    ],
    ids=repr,
)
def test_what_the_machine_cannot_do_is_no_reason_to_delete_a_shard(store, monkeypatch, error):
    def fail(*_, **__):
        raise error

    fresh = ds.PairStore(store.path)
    if isinstance(error, OSError):
        monkeypatch.setattr(os, "open", fail)
    else:
        monkeypatch.setattr(torch, "from_file", fail)
    with pytest.raises((OSError, RuntimeError)) as said:
        fresh.images([20])
    monkeypatch.undo()
    assert error.args[-1] in str(said.value)
    assert "delete" not in str(said.value) and "damaged" not in str(said.value)
    assert len(fresh.images([20])) == 1


def test_no_rows_are_no_rows(store):
    for none in ([], range(0), np.empty(0, np.int64), torch.empty(0, dtype=torch.int64)):
        assert store.images(none).shape == (0, 4, 8, 1)


@pytest.mark.parametrize(
    "good",
    [
        range(5, 35, 10), [5, 15, 25], (5, 15, 25), np.array([5, 15, 25], np.uint8),
        [np.int32(5), torch.tensor(15), 25], torch.tensor([5, 15, 25], dtype=torch.int16),
    ],
    ids=repr,
)  # fmt: skip
def test_any_whole_numbers_are_indices(store, good):
    assert torch.equal(store.images(good), all_images(store)[[5, 15, 25]])


NO_INDICES = [
    [1.5], [1.0], [True], [None], ["1"], [2**70], [-1], [COUNT], [[1]], range(0, -2, -1),
    range(-1, 2), range(10**12), 5, None, "12", np.array([1.0]), np.array([True]), np.array(1),
    np.array(["1"]), np.array([2**63], np.uint64), torch.tensor([1.0]), torch.tensor([True]),
    torch.tensor(1), torch.tensor([[1]]), torch.tensor([-1]), torch.tensor([COUNT]),
]  # fmt: skip
READS: dict[str, Callable] = {
    "images": lambda store, i: store.images(i),
    "noise": lambda store, i: store.noise(i),
    "targets": lambda store, i: store.targets(i),
    "pairs": lambda store, i: Pairs(store).batch(i, i),
}


@pytest.mark.parametrize("read", READS)
def test_what_is_no_index_of_the_store_is_refused(store, read):
    for index in NO_INDICES:
        with pytest.raises(ValueError, match=r"\A\w+: indices must [^\n]*\Z"):
            READS[read](store, index)


def test_rows_of_pairs_are_a_range_and_no_others_are_read(store):
    some = Pairs(store, range(10, 20))
    for wrong in ([-1], [10]):
        with pytest.raises(ValueError, match=r"Pairs: indices must lie in 0 \.\. 9"):
            some.batch(wrong, wrong)
    for rows_ in ([0, 1], range(30, 50), range(50, 30, -1), range(3, -2, -1), range(0)):
        with pytest.raises(ValueError, match="Pairs: "):
            Pairs(store, rows_)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_store_opens_the_same_files(store, copied, monkeypatch):
    monkeypatch.chdir(store.path.parent)
    near = ds.PairStore("s", check=False)
    monkeypatch.chdir("/")
    again, some = copied(near), copied(Pairs(store, range(4, 9)))
    assert len(pickle.dumps(store)) < 500
    assert again.check is False and some.store.check is True
    assert torch.equal(all_images(again), all_images(store))
    assert torch.equal(some.read([1]), store.images([5]))


MANIFESTS = {
    "count must be a whole number": {"count": 256.0},
    "count must be at least 1": {"count": 0},
    "seed must be a whole number": {"seed": None},
    "seed must be a whole number, not 'x'": {"seed": "x"},
    "seed must be at least 0": {"seed": -1},
    "grid must be a list": {"grid": "x"},
    r"grid\[1\] must be a number": {"grid": [3, "x"]},
    r"grid must be at least 1, not \[\]": {"grid": []},
    r"grid must fall, not \[1, 2, 3\]": {"grid": [1, 2, 3]},
    "teacher must be fields": {"teacher": []},
    "teacher.sha256 must be a SHA-256": {"teacher": {"sha256": "../x"}},
    "solver must be fields": {"solver": "ddim"},
    "shape must be a list": {"shape": 3},
    r"shape\[0\] must be at least 1": {"shape": [0, 4, 4]},
    r"shape must be \[C, H, W\]": {"shape": [4, 4]},
    "quantizer must be one of": {"quantizer": "u8"},
    "shard_size must be at least 1": {"shard_size": 0},
    "grown_from must rise to count": {"grown_from": [40]},
    "are 1,000,000,000,000 shards; take larger ones": {"shard_size": 1, "count": 10**12},
    "has 3 hashes for 1 shards": {"shard_size": 1000},
    r"sha256\[0\] must be a SHA-256": {"sha256": ["/etc/passwd"]},
    "'more' is no field": {"more": 1},
    "execution.precision must be one of": {"execution": {"precision": "float31"}},
    "execution.tune must be true or false": {"execution": {"tune": 1}},
    "execution must be fields": {"execution": "eager"},
}


@pytest.mark.parametrize("said", MANIFESTS)
def test_a_manifest_that_cannot_be_is_refused_by_whoever_reads_it(store, said):
    change = dict(MANIFESTS[said])
    if change.get("teacher"):
        change["teacher"] = store.manifest.teacher | change["teacher"]
    file = store.path / "manifest.json"
    write_json(file, sealed(store.manifest.json | change))
    before = contents(store.path)
    for read in (ds.PairStore, info, is_finished, make):
        with pytest.raises(ValueError, match=f"{file}: .*{said}"):
            read(store.path)
    assert contents(store.path) == before


def test_more_shards_than_a_manifest_can_hold_are_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"generate_pairs: .* are 1,000,000 shards; take larger"):
        make(tmp_path / "s", count=10**6, shard_size=1)
    assert not (tmp_path / "s").exists()
    assert GAUSSIAN.nfe == 10
