"""Archives hold the pairs of a store, all of them once, as their readers expect."""

import io
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import ds
from ds.analytic import Gaussian
from ds.pairs import archives

TEACHER = Gaussian(shape=(2, 4, 4)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(4))


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


def read_with_dali(paths: list[Path], floats: bool) -> list[dict[str, np.ndarray]]:
    """All records, in order, as DALI's reader finds them with the index that its tool writes."""
    from nvidia.dali import pipeline_def, tfrecord
    from nvidia.dali.fn.readers import tfrecord as reader

    indexes = [path.with_suffix(".idx") for path in paths]
    for path, index in zip(paths, indexes, strict=True):
        tool = Path(sys.executable).with_name("tfrecord2idx")
        subprocess.run([sys.executable, tool, path, index], check=True)
    many = tfrecord.VarLenFeature([], tfrecord.float32, 0.0)
    text = tfrecord.FixedLenFeature([], tfrecord.string, "")
    features = {"key": text, "image": many if floats else text, "noise": many}
    count = sum(len(index.read_text().splitlines()) for index in indexes)

    @pipeline_def(batch_size=count, num_threads=1, device_id=None)
    def pipeline():
        found = reader(path=[*map(str, paths)], index_path=[*map(str, indexes)], features=features)
        return tuple(found[name] for name in features)

    pipe = pipeline()
    pipe.build()
    columns = [[np.array(x) for x in column] for column in pipe.run()]
    return [dict(zip(features, row, strict=True)) for row in zip(*columns, strict=True)]


def test_dali_reads_the_records(store, tmp_path):
    paths = archives.export(store, tmp_path / "t", "tfrecord", per_archive=30)
    assert [path.name for path in paths] == [f"00000{i}.tfrecord" for i in range(3)]
    rows = range(len(store))
    images, noise = store.images(rows), store.noise(rows)
    found = read_with_dali(paths, images.is_floating_point())
    assert [row["key"].tobytes() for row in found] == [b"%09d" % i for i in rows]
    for i, row in enumerate(found):
        assert np.array_equal(row["image"], images[i].numpy().ravel())
        assert np.array_equal(row["noise"], noise[i].numpy().ravel())


def test_records_carry_masked_checksums():
    """DALI reads over them. The sums are those of RFC 3720, B.4, and of the catalogue's check."""
    known = {bytes(32): 0x8A9136AA, bytes(range(32)): 0x46DD794E, b"123456789": 0xE3069283}
    for row, crc in known.items():
        (found, again) = archives._checksums([row, row])
        turned = (crc >> 15 | crc << 17) & 0xFFFFFFFF
        assert found == again == struct.pack("<I", (turned + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.mark.parametrize("form", ["webdataset", "tfrecord"])
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
    with pytest.raises(ValueError, match="must be one of webdataset, fastgen, tfrecord, not 'zip'"):
        archives.export(store, tmp_path / "w", "zip")
    with pytest.raises(ValueError, match="per_archive must be at least 1, not 0"):
        archives.export(store, tmp_path / "w", per_archive=0)
    assert not (tmp_path / "w").exists()
