"""The pair store: what is in it, how it grows and resumes, and what of it is not read."""

import copy
import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ds
from ds.analytic import Gaussian, GaussianMixture
from ds.models.execution import Execution
from ds.models.images import to_uint8
from ds.models.pretrained import fingerprint
from ds.nets import UNetConfig
from ds.pairs import generate as pairs
from ds.pairs import shards
from ds.pairs.store import info
from ds.system.config import to_json
from ds.system.files import read_sealed, sealed
from ds.system.staging import write_json

COUNT = 40
GAUSSIAN = Gaussian(mean=0.1, std=0.3, shape=(1, 4, 8)).teacher(
    ds.solvers.DDIM(), ds.grids.quadratic(10)
)
TINY = UNetConfig(
    image_size=8, in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), norm_groups=4,
)  # fmt: skip


def make(out, teacher=GAUSSIAN, count=COUNT, **options):
    options = {"seed": 3, "batch_size": 16, "shard_size": 16, **options}
    return ds.generate_pairs(teacher, out, count, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes of a store, but for the lock."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != ".lock"}


def all_images(store: ds.PairStore) -> torch.Tensor:
    return store.images(range(len(store)))


# What is in a store.


@pytest.mark.parametrize("quantizer", ["round", "floor"])
def test_images_are_what_the_teacher_makes_of_the_noise(tmp_path, quantizer):
    store = make(tmp_path / "s", quantizer=quantizer)
    expected = GAUSSIAN.sample(ds.noise(3, range(COUNT), GAUSSIAN.shape))
    assert torch.equal(all_images(store), to_uint8(expected, quantizer))


@pytest.mark.parametrize("quantizer", ["float16", "float32"])
def test_points_are_kept_unclipped_in_the_precision_asked_for(tmp_path, quantizer):
    teacher = GaussianMixture().teacher(ds.solvers.DDIM(), ds.grids.quadratic(10))
    store = make(tmp_path / "s", teacher, quantizer=quantizer)
    expected = teacher.sample(ds.noise(3, range(COUNT), (2,))).to(getattr(torch, quantizer))
    assert expected.abs().max() > 1
    assert torch.equal(all_images(store), expected)
    assert torch.equal(store.targets(range(COUNT)), expected.float())


def test_float_images_are_stored_channels_last_and_read_channels_first(tmp_path):
    store = make(tmp_path / "s", quantizer="float32")
    expected = GAUSSIAN.sample(ds.noise(3, range(COUNT), GAUSSIAN.shape))
    assert torch.equal(all_images(store), expected.movedim(1, -1))
    assert torch.equal(store.targets(range(COUNT)), expected)


def test_rows_are_read_in_any_order_and_repeated(tmp_path):
    store = make(tmp_path / "s")
    rows = [39, 0, 17, 17, 15, 16]
    assert torch.equal(store.images(rows), all_images(store)[rows])
    assert torch.equal(store.noise(rows), ds.noise(3, rows, GAUSSIAN.shape))


@pytest.mark.parametrize("row", [-1, COUNT])
def test_an_index_outside_the_store_is_refused(tmp_path, row):
    with pytest.raises(ValueError, match=f"0 .. {COUNT - 1}"):
        make(tmp_path / "s").images([0, row])


def test_an_open_store_keeps_no_file_open(tmp_path):
    """A process is often allowed 1,024 of them, and a store may have more shards."""
    before = os.listdir("/dev/fd")
    store = make(tmp_path / "s")
    assert len(all_images(store)) == COUNT
    assert os.listdir("/dev/fd") == before


def test_the_manifest_says_what_made_the_store(tmp_path):
    manifest = make(tmp_path / "s").manifest.json
    hashes = [
        hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted((tmp_path / "s").glob("images-*.npy"))
    ]
    assert manifest == read_sealed(tmp_path / "s" / "manifest.json")
    assert manifest == {
        "format": "denoising-student/pairs/1",
        "version": ds.__version__,
        "teacher": {
            "sha256": fingerprint(GAUSSIAN.denoiser),
            "net": to_json(GAUSSIAN.net.config),
            "schedule": {
                "type": "linear_beta",
                "num_steps": 1000,
                "beta_start": 1e-4,
                "beta_end": 0.02,
            },
            "prediction": {"type": "eps"},
        },
        "execution": {
            "precision": "float32",
            "mode": "eager",
            "tune": False,
            "winograd": True,
        },
        "device": "cpu",
        "solver": {"type": "ddim", "eta": 0.0},
        "grid": list(ds.grids.quadratic(10)),
        "noise": "philox4x32-10, Box-Muller",
        "seed": 3,
        "count": COUNT,
        "grown_from": [],
        "shape": [1, 4, 8],
        "quantizer": "round",
        "shard_size": 16,
        "sha256": hashes,
    }
    assert len(hashes) == 3


# Resuming and checking.


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_store_of_a_teacher_in_another_dtype_says_so(tmp_path, unet, dtype):
    """Its precision "float32" stands for that dtype. One of a float32 teacher is as it was."""
    teacher = unet.using(copy.deepcopy(unet.net).to(getattr(torch, dtype)))
    ds.generate_pairs(teacher, tmp_path / "s", 2)
    assert read_sealed(tmp_path / "s" / "manifest.json")["dtype"] == dtype
    assert info(tmp_path / "s")["dtype"] == ds.PairStore(tmp_path / "s").manifest.dtype == dtype
    ds.generate_pairs(unet, tmp_path / "usual", 2)
    assert "dtype" not in read_sealed(tmp_path / "usual" / "manifest.json")
    assert info(tmp_path / "usual")["dtype"] == "float32"


def test_a_deleted_shard_is_written_again_and_the_others_are_left(tmp_path):
    make(tmp_path / "s")
    before = contents(tmp_path / "s")
    (tmp_path / "s" / "images-00001.npy").unlink()
    kept = (tmp_path / "s" / "images-00000.npy").stat().st_mtime_ns
    make(tmp_path / "s")
    assert contents(tmp_path / "s") == before
    assert (tmp_path / "s" / "images-00000.npy").stat().st_mtime_ns == kept


def test_a_finished_store_is_not_computed_again(tmp_path, monkeypatch):
    make(tmp_path / "s")
    monkeypatch.setattr("ds.pairs.generate.Sampler", None)
    assert len(make(tmp_path / "s")) == COUNT


def test_a_larger_count_adds_shards_and_leaves_the_old_ones(tmp_path, monkeypatch):
    once = make(tmp_path / "once", count=100)
    old = make(tmp_path / "grown", count=40)
    before = {f.name: f.stat().st_mtime_ns for f in old.path.glob("images-*")}
    make(tmp_path / "grown", count=41)
    grown = make(tmp_path / "grown", count=100)
    assert torch.equal(all_images(grown), all_images(once))
    assert [len(grown.shard(i)) for i in range(8)] == [16, 16, 8, 1, 16, 16, 16, 11]
    assert before.items() <= {f.name: f.stat().st_mtime_ns for f in grown.path.iterdir()}.items()
    grown.verify(GAUSSIAN)
    rows = [99, 0, 40, 39, 41, 40]
    assert torch.equal(grown.images(rows), once.images(rows))


def test_overhead_is_linear_in_the_number_of_shards(tmp_path, monkeypatch):
    """Every call is counted, of Python and of C, and every name of a listing as one more."""
    listdir = os.listdir
    images = torch.zeros(1, 4, 4, 2, dtype=torch.uint8)
    monkeypatch.setattr(pairs, "_make", lambda *_: images)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # for time; it would count the same

    def work(shards: int) -> int:
        count = 0

        def called(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        def listed(path):
            nonlocal count
            names = listdir(path)
            count += len(names)
            return names

        monkeypatch.setattr(os, "listdir", listed)
        sys.setprofile(called)
        try:
            for _ in ("write", "find finished"):
                make(tmp_path / str(shards), count=shards, shard_size=1).verify()
        finally:
            sys.setprofile(None)
        return count

    at = {shards: work(shards) for shards in (10, 100, 1000)}
    first, later = (at[100] - at[10]) / 90, (at[1000] - at[100]) / 900
    assert later <= 1.02 * first


def test_a_store_that_grows_is_read_when_it_is_finished_again(tmp_path, monkeypatch):
    make(tmp_path / "s", count=40)

    def stop(*_):
        raise pairs.Interrupted("now")

    with monkeypatch.context() as patch, pytest.raises(pairs.Interrupted):
        patch.setattr(pairs, "_make", stop)
        make(tmp_path / "s", count=60)
    with pytest.raises(ValueError, match="shards are missing"):
        ds.PairStore(tmp_path / "s")
    with pytest.raises(ValueError, match="count: 60, not 40"):
        make(tmp_path / "s", count=40)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not finished"):
        patch.setattr(shards, "finish", lambda *_: None)
        make(tmp_path / "s", count=60)
    assert len(make(tmp_path / "s", count=60)) == 60


@pytest.mark.parametrize("position", [0, 140, -1])
def test_verify_names_the_file_with_a_flipped_byte(tmp_path, position):
    store = make(tmp_path / "s")
    store.verify()
    file = tmp_path / "s" / "images-00001.npy"
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"images-00001\.npy: wrong checksum"):
        store.verify()


def test_verify_refuses_a_teacher_with_other_weights(tmp_path):
    store = make(tmp_path / "s")
    store.verify(GAUSSIAN)
    other = replace(GAUSSIAN.net.config, std=0.31).teacher(GAUSSIAN.solver, GAUSSIAN.grid)
    with pytest.raises(ValueError, match="another teacher"):
        store.verify(other)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_verify_computes_as_the_store_was_computed(tmp_path, unet, precision):
    execution = Execution.default(unet, precision=precision)
    store = make(tmp_path / "s", unet, execution=execution)
    store.verify(unet, recompute=COUNT)


@pytest.mark.parametrize(("recompute", "picks"), [(1, [0]), (2, [0, 39]), (4, [0, 13, 26, 39])])
def test_verify_recomputes_pairs_from_the_first_to_the_last(
    tmp_path, monkeypatch, recompute, picks
):
    store, seen = make(tmp_path / "s"), []

    class Spy(ds.Sampler):
        def batches(self, seed, indices):
            seen.append([*indices])
            return super().batches(seed, indices)

    monkeypatch.setattr("ds.pairs.store.Sampler", Spy)
    store.verify(GAUSSIAN, recompute)
    assert seen == [picks]


def test_the_hash_of_a_store_is_that_of_its_manifest(tmp_path):
    store = make(tmp_path / "s")
    assert store.sha256 == hashlib.sha256((tmp_path / "s/manifest.json").read_bytes()).hexdigest()


def test_verify_finds_images_of_another_teacher_under_right_hashes(tmp_path):
    """Hashes say that a file did not change; only a new computation says that it was right."""
    store = make(tmp_path / "s")
    with pytest.raises(ValueError, match=r"pair \d+ is not what this teacher makes"):
        store.verify(replace(GAUSSIAN, grid=ds.grids.quadratic(3)))


def test_an_unfinished_store_is_not_read(tmp_path):
    make(tmp_path / "s")
    (tmp_path / "s" / "images-00002.npy").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing; run the same"):
        ds.PairStore(tmp_path / "s")


def test_a_store_without_its_hashes_is_not_read(tmp_path):
    store = make(tmp_path / "s")
    write_json(tmp_path / "s" / "manifest.json", sealed({**store.manifest.json, "sha256": []}))
    with pytest.raises(ValueError, match="not finished"):
        ds.PairStore(tmp_path / "s")


@pytest.mark.parametrize("how", ["gone", "cut", "no text"])
def test_a_shard_whose_hash_was_lost_is_taken_as_it_is_and_said(tmp_path, caplog, how):
    """Else the store would be unfinished for ever: the shard is there, so nobody makes it again."""
    manifest = make(tmp_path / "s").manifest
    first, second, third = manifest.sha256
    lost = manifest.json | {"sha256": [first, None, third]}
    write_json(tmp_path / "s" / "manifest.json", sealed(lost))
    if how != "gone":
        content = b"\xff" * 64 if how == "no text" else second[:-1].encode()
        (tmp_path / "s" / "images-00001.sha256").write_bytes(content)
    assert make(tmp_path / "s").manifest == manifest
    assert "images-00001.npy: its hash was lost" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array"])
def test_a_damaged_shard_is_named(tmp_path, content):
    make(tmp_path / "s")
    (tmp_path / "s" / "images-00000.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"images-00000\.npy: damaged"):
        ds.PairStore(tmp_path / "s")


def test_a_truncated_shard_is_named(tmp_path):
    make(tmp_path / "s")
    file = tmp_path / "s" / "images-00000.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"images-00000\.npy: damaged"):
        ds.PairStore(tmp_path / "s")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": "denoising-student/pairs/1"}']
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    make(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(content)
    for use in (ds.PairStore, make):
        with pytest.raises(ValueError, match=r"manifest\.json|made otherwise"):
            use(tmp_path / "s")
