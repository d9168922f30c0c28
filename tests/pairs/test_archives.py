"""Archives hold the pairs of a store, all of them once, as their readers expect."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ds
from ds.analytic import Gaussian
from ds.pairs import archives

TEACHER = Gaussian(shape=(1, 4, 8)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(4))


@pytest.fixture(scope="module", params=["round", "float32"])
def store(request, tmp_path_factory) -> ds.PairStore:
    path = tmp_path_factory.mktemp("store") / "s"
    return ds.generate_pairs(TEACHER, path, 70, seed=2, shard_size=32, quantizer=request.param)


def members(paths: list[Path]) -> dict[str, bytes]:
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def test_webdataset_archives_hold_images_and_noise(store, tmp_path):
    paths = archives.export(store, tmp_path / "w", per_archive=30)
    assert [path.name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    found = members(paths)
    assert len(found) == 2 * len(store)
    noise = store.noise(range(len(store)))
    for i, image in enumerate(store.images(range(len(store)))):
        assert np.array_equal(np.load(io.BytesIO(found[f"{i:09d}.image.npy"])), image.numpy())
        assert np.array_equal(np.load(io.BytesIO(found[f"{i:09d}.noise.npy"])), noise[i].numpy())


def test_fastgen_archives_hold_floats_of_both(store, tmp_path):
    found = members(archives.export(store, tmp_path / "f", "fastgen"))
    rows = range(len(store))
    for i, (x0, z) in enumerate(zip(store.targets(rows), store.noise(rows), strict=True)):
        for name, expected in (("latent", x0), ("noise", z)):
            content = found[f"{i:09d}.{name}.pth"]
            assert len(content) < 4096  # of this row alone, not of the batch it was read in
            assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), expected)


@pytest.mark.parametrize("form", ["webdataset", "fastgen"])
def test_what_is_missing_is_written_to_the_same_bytes(store, tmp_path, form):
    paths = archives.export(store, tmp_path / "w", form, per_archive=30)
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    archives.export(store, tmp_path / "w", form, per_archive=30)
    assert [path.read_bytes() for path in paths] == before
    assert [path.stat().st_mtime_ns for path in paths][::2] == times[::2]


def test_archives_of_something_else_are_left_alone(store, tmp_path):
    archives.export(store, tmp_path / "w")
    with pytest.raises(ValueError, match="per_archive: 4096, not 7"):
        archives.export(store, tmp_path / "w", per_archive=7)
    (tmp_path / "w" / archives.SOURCE).unlink()
    with pytest.raises(ValueError, match=r"holds 000000\.tar, and is no directory of archives"):
        archives.export(store, tmp_path / "w")


def test_archives_of_something_else_give_way_if_they_must(store, tmp_path):
    many = archives.export(store, tmp_path / "w", per_archive=7)
    (one,) = archives.export(store, tmp_path / "w", force=True)
    assert len(many) > 1 and [*tmp_path.glob("w/*.tar")] == [one]
    (tmp_path / "w" / "000000.idx").touch()
    archives.export(store, tmp_path / "w", force=True)
    with pytest.raises(ValueError, match=r"holds 000000\.idx, which is not ours"):
        archives.export(store, tmp_path / "w", per_archive=7, force=True)


def test_unknown_forms_and_sizes_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="must be one of webdataset, fastgen, not 'zip'"):
        archives.export(store, tmp_path / "w", "zip")
    with pytest.raises(ValueError, match="per_archive must be at least 1, not 0"):
        archives.export(store, tmp_path / "w", per_archive=0)
    assert not (tmp_path / "w").exists()
