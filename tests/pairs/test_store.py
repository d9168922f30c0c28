"""The pair store: right content, whoever writes it, and nothing lost whatever happens."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from ds.pairs import storage as places
from ds.system.config import to_json
from ds.system.files import read_sealed, sealed
from ds.system.staging import write_json

ROOT = Path(__file__).parents[1]
COUNT = 40
GAUSSIAN = Gaussian(mean=0.1, std=0.3, shape=(2, 4, 4)).teacher(
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


@pytest.fixture(scope="module")
def unet() -> ds.Teacher:
    """A small real U-Net that predicts x0, so that its images stay within the grey levels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TINY.build().eval()
        with torch.no_grad():
            for w in net.parameters():
                w.add_(0.05 * torch.randn_like(w))
    denoiser = ds.Denoiser(net, ds.schedule.LinearBeta(), "x0")
    return ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(10))


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "teacher"
    unet.save_pretrained(folder)
    return folder


SHARDS = 40


@pytest.fixture(scope="module")
def whole(unet, tmp_path_factory) -> Path:
    """What one uninterrupted process makes of the U-Net."""
    return make(tmp_path_factory.mktemp("whole") / "s", unet, 16 * SHARDS).path


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
        "shape": [2, 4, 4],
        "quantizer": "round",
        "shard_size": 16,
        "sha256": hashes,
    }
    assert len(hashes) == 3


# The same store from every way of making it.


def test_shard_size_does_not_change_the_images(tmp_path):
    stores = [make(tmp_path / str(size), shard_size=size) for size in (7, 16, 1000)]
    first, *others = map(all_images, stores)
    assert all(torch.equal(first, other) for other in others)


def test_batch_size_does_not_change_a_byte_of_an_elementwise_teacher(tmp_path):
    make(tmp_path / "64", batch_size=64)
    make(tmp_path / "7", batch_size=7)
    assert contents(tmp_path / "64") == contents(tmp_path / "7")


def test_batch_size_moves_a_network_by_float32_rounding_only(tmp_path, unet):
    """A convolution may sum in another order when its batch is of another size.

    Measured on this U-Net with samples of the deviation 0.22: batch 7 differs from batch 64 by at
    most 2.4e-6, batch 1 by 1.3e-5, and no grey level of uint8 differs. One can differ only where a
    sample lies that close to the edge between two levels, about one pixel in 3,000 for batch 7, so
    a few are allowed, by one level. The noise is made from integers and is equal.
    """
    a, b = (make(tmp_path / f"f{n}", unet, 70, batch_size=n, quantizer="float32") for n in (64, 7))
    torch.testing.assert_close(all_images(a), all_images(b), rtol=0, atol=3e-5)
    assert torch.equal(a.noise(range(70)), b.noise(range(70)))
    c, d = (all_images(make(tmp_path / f"u{n}", unet, 70, batch_size=n)).int() for n in (64, 7))
    assert (c - d).abs().max() <= 1
    assert (c != d).float().mean() < 2e-3
    assert len(c.unique()) > 100, "the teacher must make images, not clipped noise"


def command(saved: Path, out: Path, count: int, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "ds.cli", "pairs", "digits", "--teacher", str(saved),
        "--out", str(out),
        "--pairs.count", str(count - 8), "--pairs.held-out", "8", "--pairs.seed", "3",
        "--pairs.batch-size", "16", "--pairs.shard-size", "16", "--solve.steps", "10", *more,
    ]  # fmt: skip


def start(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_on_one_directory_make_what_one_makes(tmp_path, saved, whole):
    # The same batches on the same machine: equal to the bit.
    writers = [start(command(saved, tmp_path / "s", 16 * SHARDS)) for _ in range(2)]
    for writer in writers:
        _, err = writer.communicate(timeout=60)
        assert writer.returncode == 0, err
    assert contents(tmp_path / "s") == contents(whole)


def test_a_shard_claimed_by_another_process_is_left_to_it(tmp_path):
    store = make(tmp_path / "s")
    name, folder = "images-00001.npy", places.Directory(store.path)
    folder.remove(name)
    with folder.claim(name) as mine, folder.claim(name) as theirs:
        assert mine is not None
        assert theirs is None


def test_a_claim_on_a_file_that_was_dropped_meanwhile_is_not_used(tmp_path, monkeypatch):
    """Between opening and locking, the writer before may have dropped its file: same name, gone."""
    store = make(tmp_path / "s")
    name, folder = "images-00001.npy", places.Directory(store.path)
    folder.remove(name)

    def drop_then_lock(file, how):
        (folder.path / places.claim_of(name)).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(places.fcntl, "flock", drop_then_lock)
        with folder.claim(name) as put:
            assert put is None
    assert contents(make(tmp_path / "s").path) == contents(make(tmp_path / "t").path)


# Resuming and checking.


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


# What is refused before any work.


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, r"seed: 3, not 4"),
        ({"count": 39}, r"count: 40, not 39"),
        ({"shard_size": 8}, r"shard_size: 16, not 8"),
        ({"quantizer": "floor"}, r"quantizer: round, not floor"),
        ({"execution": Execution("bfloat16")}, r"execution.precision: float32, not bfloat16"),
        ({"execution": Execution(mode="compile")}, r"execution.mode: eager, not compile"),
        ({"teacher": replace(GAUSSIAN, grid=ds.grids.quadratic(9))}, r"grid: \[800, "),
        (
            {"teacher": Gaussian(shape=(2, 4, 4)).teacher(GAUSSIAN.solver, GAUSSIAN.grid)},
            r"teacher\.sha256: ",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_store_made_otherwise_refuses_and_names_the_difference(tmp_path, change, named):
    make(tmp_path / "s")
    before = contents(tmp_path / "s")
    with pytest.raises(ValueError, match=f"made otherwise \\({named}"):
        make(tmp_path / "s", **change)
    assert contents(tmp_path / "s") == before


def test_shards_without_a_manifest_are_left_alone(tmp_path):
    make(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()
    before = contents(tmp_path / "s")
    with pytest.raises(ValueError, match=r"holds images-00000\.npy, and is no pair store"):
        make(tmp_path / "s", seed=4)
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize("name", ["count", "batch_size", "shard_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused_before_anything_is_written(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not {value}"):
        make(tmp_path / "s", **{name: value})
    assert not (tmp_path / "s").exists()


def test_tf32_is_refused_on_a_cpu_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="precision tf32 is for CUDA GPUs, not for cpu"):
        make(tmp_path / "s", execution=Execution("tf32"))
    assert not (tmp_path / "s").exists()


def test_fp8_is_refused_before_anything_is_written(tmp_path, unet, monkeypatch):
    monkeypatch.delenv("DS_EXPERIMENTAL", raising=False)
    with pytest.raises(ValueError, match="DS_EXPERIMENTAL=fp8"):
        make(tmp_path / "s", unet, execution=Execution("fp8", "engine"))
    monkeypatch.setenv("DS_EXPERIMENTAL", "fp8")
    for teacher, mode in ((unet, "eager"), (GAUSSIAN, "engine")):
        with pytest.raises(ValueError, match="precision fp8 is for U-Nets in the mode engine"):
            make(tmp_path / "s", teacher, execution=Execution("fp8", mode))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("first", "then"), [("fp8", "bfloat16"), ("bfloat16", "fp8")])
def test_fp8_and_bfloat16_never_mix(tmp_path, unet, monkeypatch, first, then):
    """A store with a shard to make refuses another precision, though both are of the engine."""
    monkeypatch.setenv("DS_EXPERIMENTAL", "fp8")
    store = make(tmp_path / "s", unet, execution=Execution(first, "engine"))
    assert store.manifest.execution == Execution(first, "engine")
    store.verify(unet, recompute=COUNT)
    (tmp_path / "s" / "images-00002.npy").unlink()
    before = contents(tmp_path / "s")
    with pytest.raises(ValueError, match=rf"\(execution.precision: {first}, not {then}"):
        make(tmp_path / "s", unet, execution=Execution(then, "engine"))
    assert contents(tmp_path / "s") == before


def test_points_are_not_stored_as_images(tmp_path):
    teacher = GaussianMixture().teacher(ds.solvers.DDIM(), ds.grids.quadratic(10))
    with pytest.raises(ValueError, match="need quantizer='float32'"):
        make(tmp_path / "s", teacher)


def test_a_disk_too_small_is_noticed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=COUNT * 32 - 1))
    monkeypatch.setattr("ds.pairs.generate.estimate", None)  # the first work there is
    with pytest.raises(RuntimeError, match=r"40 pairs need 1\.28 kB, the disk has 1\.28 kB free"):
        make(tmp_path / "s")
    monkeypatch.undo()
    assert len(make(tmp_path / "s")) == COUNT


def test_the_disk_needs_room_for_the_missing_shards_only(tmp_path, monkeypatch):
    make(tmp_path / "s")
    (tmp_path / "s" / "images-00002.npy").unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8 * 32))
    assert len(make(tmp_path / "s")) == COUNT


def test_the_size_and_the_time_are_estimated_before_work(tmp_path, caplog):
    with caplog.at_level("INFO", "ds"):
        make(tmp_path / "s")
    assert "40 pairs to make, 1.28 kB, 10 network calls each, about " in caplog.text


def test_progress_counts_what_is_left_and_says_what_it_costs(tmp_path, monkeypatch):
    made = []

    class Bar(pairs.tqdm):
        def set_postfix(self, facts, refresh):
            made.append((self.n, self.total, facts["cost"]))

    monkeypatch.setattr(pairs, "tqdm", Bar)
    make(tmp_path / "s", progress=True, price=1e9)
    assert [row[:2] for row in made] == [(0, 40), (16, 40), (32, 40)]
    assert all(cost.startswith("$") and float(cost[1:]) > 0 for *_, cost in made)


def test_progress_shows_how_busy_a_gpu_is_where_that_can_be_asked(monkeypatch):
    shown = pairs._Shown(pairs.tqdm(disable=True), torch.device("cuda"), 0.0)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    monkeypatch.setattr(pairs, "find_spec", lambda name: None)
    assert shown.facts() == {}
    monkeypatch.setattr(pairs, "find_spec", lambda name: name)
    assert shown.facts() == {"gpu": "97%"}


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no directory"):
        make(tmp_path / "file" / "s")


class NotFinite(torch.nn.Module):
    shape = (1, 4, 4)

    def forward(self, x, t):
        return torch.full_like(x, torch.nan)


def test_a_teacher_that_returns_nan_leaves_no_shard(tmp_path):
    denoiser = ds.Denoiser(NotFinite(), ds.schedule.LinearBeta())
    with pytest.raises(RuntimeError, match="not finite"):
        make(tmp_path / "s", ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(5)))
    assert not list((tmp_path / "s").glob("images-*"))


# What happens to a process.


def test_a_disk_that_fills_up_costs_one_shard(tmp_path, unet, saved):
    """The limit on the size of a file stands for the disk: the manifest fits, a shard does not."""
    whole, out = tmp_path / "whole", tmp_path / "s"
    make(whole, unet, 160, shard_size=64)
    shutil.copytree(whole, out)
    (out / "images-00001.npy").unlink()
    before = contents(out)
    limited = (
        "import resource, sys; from ds.cli.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); sys.exit(main(sys.argv[1:]))"
    )
    args = command(saved, out, 160, "--pairs.shard-size", "64")
    process = start([args[0], "-c", limited, *args[3:]])
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith("dstudent: ")
    assert "Traceback" not in err
    left = contents(out)
    del left["images-00001.sha256"]  # of the shard that did not fit; the next try replaces it
    assert left == before
    make(out, unet, 160, shard_size=64)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_drops_the_shard_in_work_and_keeps_the_others(
    tmp_path, unet, saved, whole, number, code
):
    out, count = tmp_path / "s", 16 * SHARDS
    process = start(command(saved, out, count))
    deadline = time.monotonic() + 60
    while not (out / "images-00002.npy").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert err.splitlines()[-1].startswith(f"dstudent: {out}: interrupted"), err
    shards = list(out.glob("images-*.npy"))
    assert 3 <= len(shards) < SHARDS
    assert not list(out.glob("*.tmp"))
    assert all(f.read_bytes() == (whole / f.name).read_bytes() for f in shards)
    make(out, unet, count)
    assert contents(out) == contents(whole)
