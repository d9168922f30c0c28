"""Files of others that are not what they seem: one line, before any of the harm they could do."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ds.diffusion.schedules import LinearBeta
from ds.evaluation.features import Inception
from ds.evaluation.references import Moments, read_reference
from ds.models.convert import read, to_diffusers
from ds.models.load import load
from ds.nets import UNetConfig
from ds.system import files
from tests.system.test_reading import NO_FILES, no_file

NET = UNetConfig(
    image_size=8, channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=()
)
GREY = np.zeros((2, 4, 4, 1), np.uint8)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: w.contiguous() for name, w in NET.build().state_dict().items()}


@pytest.fixture
def pipeline(tmp_path, weights) -> Path:
    to_diffusers(tmp_path / "pipe", NET, weights, LinearBeta())
    return tmp_path / "pipe"


# What is no file, wherever one is read.


@no_file
@pytest.mark.parametrize("use", [load, read_reference, Inception], ids=lambda f: f.__name__)
def test_what_is_no_file_is_no_model_and_no_reference(tmp_path, kind, use):
    path = tmp_path / "given.npy"
    NO_FILES[kind](path)
    with pytest.raises(ValueError, match=r"given\.npy") as error:
        use(str(path))
    assert kind in str(error.value) or kind == "a directory"


@no_file
@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)  # fmt: skip
def test_what_is_no_file_in_a_pipeline_is_said(pipeline, kind, name):
    """A scheduler that could not be read had been ignored, and another schedule taken."""
    (pipeline / name).unlink()
    NO_FILES[kind](pipeline / name)
    with pytest.raises(ValueError, match=f"{Path(name).name}: {kind}"):
        read(pipeline)


@no_file
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_in_a_model_is_said(tmp_path, weights, kind, name):
    load_into(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    NO_FILES[kind](tmp_path / "m" / name)
    with pytest.raises(ValueError, match=f"{name}: {kind}"):
        load(tmp_path / "m")


def load_into(path: Path) -> None:
    import ds

    ds.Student(NET.build(), ds.methods.DenoisingStudent()).save_pretrained(path)


@no_file
def test_what_is_no_file_among_images_is_said(tmp_path, kind):
    Image.fromarray(GREY[0, :, :, 0]).save(tmp_path / "a.png")
    NO_FILES[kind](tmp_path / "b.png")
    with pytest.raises(ValueError, match=f"b.png: {kind}"):
        read_reference(str(tmp_path))


# What claims more than is there.


def npy(shape: object, descr: str = "|u1", content: bytes = b"") -> bytes:
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + content


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def bomb() -> bytes:
    """A small file that would unpack to more than a gigabyte, by what its directory says."""
    content = npz(images=npy((1, 1, 1, 1), content=b"\0"))
    at = content.rindex(b"PK\x01\x02")
    return content[: at + 24] + struct.pack("<I", 3 << 30) + content[at + 28 :]


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + end

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def saved(save, *args) -> bytes:
    file = io.BytesIO()
    save(file, *args)
    return file.getvalue()


EYE = np.eye(3)
REFERENCES = {
    "10**13 images": npy((10**13, 4, 4, 1)),
    "10**13 images in an npz": npz(images=npy((10**13, 4, 4, 1))),
    "a negative number of images": npy((-1, 4, 4, 1)),
    "one image too few": npy((3, 4, 4, 1), content=bytes(32)),
    "one image too many": npy((1, 4, 4, 1), content=bytes(32)),
    "no shape": npy((), content=b"\0"),
    "objects": npy((1,), "|O", bytes(8)),
    "dates": npy((1,), "<M8[s]", bytes(8)),
    "complex": saved(np.save, GREY.astype(complex)),
    "a zip bomb": bomb(),
    "an npz with a wrong checksum": npz(images=npy((1, 1, 1, 1), content=b"\0")).replace(
        struct.pack("<I", zlib.crc32(npy((1, 1, 1, 1), content=b"\0"))), bytes(4)
    ),
    "an npz of nothing": npz(),
    "an npz of text": npz(images=b"text"),
    "mu and sigma of other sizes": npz(mu=saved(np.save, EYE[0]), sigma=saved(np.save, EYE[:2])),
    "mu of two dimensions": npz(mu=saved(np.save, EYE), sigma=saved(np.save, EYE)),
    "complex sigma": npz(mu=saved(np.save, EYE[0]), sigma=saved(np.save, EYE * 1j)),
    "mu that is not finite": npz(mu=saved(np.save, EYE[0] * np.nan), sigma=saved(np.save, EYE)),
    "text for mu": npz(mu=saved(np.save, np.array("x")), sigma=saved(np.save, EYE)),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_reference_that_claims_what_is_not_there_is_one_line(tmp_path, kind):
    path = tmp_path / "reference"
    path.write_bytes(REFERENCES[kind])
    with pytest.raises(ValueError, match=rf"\A{path}: no reference[^\n]*\Z"):
        read_reference(str(path))


def test_moments_are_read_beside_text(tmp_path):
    path = tmp_path / "moments.npz"
    np.savez(path, mu=EYE[0], sigma=EYE.astype(">f4"), names=np.array(["a", "b"]))
    found = read_reference(str(path))
    assert isinstance(found, Moments) and torch.equal(found.covariance, torch.eye(3).double())


PNGS = {
    "900 million pixels": (png(30_000, 30_000), "900000000 pixels"),
    "100 million pixels": (png(10_000, 10_000), "100000000 pixels"),
    "cut": (png(64, 64)[:60], "not a whole image"),
    "no data": (png(64, 64), "not a whole image"),
    "text": (b"text", "not a whole image"),
    "empty": (b"", "not a whole image"),
}


@pytest.mark.parametrize("kind", PNGS)
def test_an_image_that_cannot_be_is_one_line(tmp_path, kind):
    content, said = PNGS[kind]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"\A[^\n]*a.png: not a whole image \([^\n]*\Z") as error:
        read_reference(str(tmp_path))
    assert said in str(error.value)


# Checkpoints.


def expanded(weights: dict, path: Path) -> None:
    torch.save({**weights, "conv_in.bias": torch.zeros(1).expand(10**12)}, path)


CHECKPOINTS = {
    "a tensor of one number, 10**12 times": (expanded, "is larger than what is stored of it"),
    "complex": (
        lambda w, path: torch.save({**w, "conv_in.bias": w["conv_in.bias"] * 1j}, path),
        "conv_in.bias is torch.complex64",
    ),
    "truth values": (
        lambda w, path: torch.save({**w, "conv_in.bias": w["conv_in.bias"] > 0}, path),
        "conv_in.bias is torch.bool",
    ),
    "quantized": (
        lambda w, path: torch.save(
            {**w, "conv_in.bias": torch.quantize_per_tensor(w["conv_in.bias"], 1, 0, torch.qint8)},
            path,
        ),
        "conv_in.bias|plain tensors",
    ),
    "safetensors of integers": (
        lambda w, path: save_file({k: v.int() for k, v in w.items()}, path),
        "is torch.int32",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_is_one_line(tmp_path, weights, kind):
    make, said = CHECKPOINTS[kind]
    make(weights, tmp_path / "given")
    with pytest.raises(ValueError, match=rf"\A{tmp_path / 'given'}: [^\n]*({said})[^\n]*\Z"):
        read(tmp_path / "given", image_size=8)


def test_a_checkpoint_that_unpacks_to_absurdly_much_is_refused(tmp_path):
    (tmp_path / "given").write_bytes(bomb())
    with pytest.raises(ValueError, match=r"given: would unpack from [\d,]+ to 3,221,225,472 bytes"):
        read(tmp_path / "given")


def test_an_hdf5_file_that_claims_absurdly_much_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "given", "w") as file:
        file.attrs["layer_names"] = ["a"]
        group = file.create_group("a")
        group.attrs["weight_names"] = ["kernel:0"]
        group.create_dataset("kernel:0", (3, 3, 3, 32 << 20), "f4", chunks=(3, 3, 3, 1024))
    with pytest.raises(ValueError, match="given: would unpack from"):
        read(tmp_path / "given")


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")], ids=repr)
@pytest.mark.parametrize("how", ["pt", "safetensors", "diffusers", "ours"])
def test_what_the_machine_cannot_do_is_no_damage(tmp_path, weights, monkeypatch, error, how):
    path = tmp_path / "given"
    if how == "pt":
        torch.save(weights, path)
    elif how == "safetensors":
        save_file(weights, path)
    elif how == "diffusers":
        to_diffusers(path, NET, weights, LinearBeta())
    else:
        load_into(path)

    def fail(*_, **__):
        raise error

    for place in (
        "torch.load",
        "ds.models.convert.imported.load_file",
        "ds.models.pretrained.load_file",
    ):
        monkeypatch.setattr(place, fail)
    with pytest.raises(
        RuntimeError, match=r"could not be read .*; nothing was found wrong with it"
    ):
        load(path, image_size=8) if how != "ours" else load(path)


UNETS = {
    "a list of 10,000": {"block_out_channels": ["x"] * 10_000},
    "a number of 100 digits": {"sample_size": 10**100},
}


@pytest.mark.parametrize("kind", UNETS)
def test_a_configuration_of_others_that_cannot_be_is_one_short_line(pipeline, kind):
    file = pipeline / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **UNETS[kind]}))
    with pytest.raises(ValueError, match=r"\A[^\n]{,400}\Z"):
        read(pipeline)


def test_a_file_that_is_denied_is_not_called_damaged(tmp_path, monkeypatch):
    load_into(tmp_path / "m")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", "here")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        load(tmp_path / "m")
    with pytest.raises(PermissionError, match="Permission denied"):
        files.read_json(tmp_path / "m" / "config.json")
