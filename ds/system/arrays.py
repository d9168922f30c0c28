"""Read arrays and tensors from untrusted files: sizes are checked before memory is allocated."""

import io
import math
import os
import re
import threading
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

from ds.system.files import is_of_the_machine, opened, unjudged, whole

# A zip file may unpack to 1 GiB, or to 32 times its own size if that is more.
UNPACKED, PACKED_BY = 1 << 30, 32
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
    """The header of an .npy file, whose numbers follow it and are all there."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def read_header(file: BinaryIO, size: int, where: Path | str) -> Header:
    """Read the header of an array in a file of `size` bytes, up to its first number.

    Raises ValueError unless the rest of the file is exactly the array's numbers.
    """
    with whole(where, "NumPy array"):
        header = Header(*_HEADERS[np.lib.format.read_magic(file)](file))
        held, shape = size - file.tell(), list(header.shape)
    if header.dtype.kind not in "buifc" or min(shape, default=0) < 0:
        raise ValueError(f"{where}: an array of {header.dtype} {shape}; numbers are needed")
    if (claimed := math.prod(shape) * header.dtype.itemsize) != held:
        raise ValueError(
            f"{where}: damaged, {header.dtype} {shape} are {claimed:,} bytes, it has {held:,}"
        )
    return header


def read_arrays(path: Path, *wanted: str) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name; an .npy file has one array, named "".

    If the file has any of the `wanted` names, only those are read. Raises ValueError naming the
    file if it is damaged or unpacks to far more than its size.
    """
    with opened(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {"": _read(file, os.fstat(file.fileno()).st_size, path)}
        with unpacked(file, path, "zip file") as archive:
            there = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            names = [name for name in wanted if name in there] or there
            return {name: _member(archive, there[name], path) for name in names}


def read_headers(path: Path) -> dict[str, Header | None]:
    """Return the headers of the arrays of an .npz by name; None for what is no array of numbers.

    An .npy file has one array, named "". Raises ValueError as `read_arrays` does.
    """
    with opened(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return {"": read_header(file, os.fstat(file.fileno()).st_size, path)}
        with unpacked(file, path, "zip file") as archive:
            infos = archive.infolist()
            return {info.filename.removesuffix(".npy"): _header(archive, info) for info in infos}


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header | None:
    try:
        with archive.open(info) as member:
            return read_header(cast(BinaryIO, member), info.file_size, "")
    except Exception:  # `read_arrays` tells what is wrong with an array that is wanted
        return None


def map_array(path: Path, header: Header) -> torch.Tensor:
    """Return the uint8 array of an .npy file, which is read from disk as it is needed."""
    size = path.stat().st_size
    content = torch.from_file(str(path), size=size, dtype=torch.uint8)
    return content[size - math.prod(header.shape) :].view(header.shape)


class Inert:
    """Stand in for a value that lies beside tensors and is not read, whatever it was made of."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any):
        pass


# What training code leaves beside its tensors: NumPy's numbers and arrays, options, paths, dates.
_BESIDE = [
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.multiarray.{f}"
        for core in ("core", "_core")
        for f in ("scalar", "_reconstruct")
    ),
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "torch.torch_version.TorchVersion",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
]


_LOADING = threading.Lock()  # what is accepted holds for the process


def load_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read tensors in plain containers that torch.save wrote, without running any code.

    What `_BESIDE` lists, such as values of NumPy, may lie beside them and becomes `Inert`. Raises
    ValueError naming the file for any other content or a wrong checksum. Files written before 2020
    have no checksums.
    """
    kind = "PyTorch file of plain tensors; nothing in it was run"
    with opened(path) as file:
        if file.read(4) == b"PK\x03\x04":
            check_zip(file, path, kind)
        file.seek(0)
        try:
            with _LOADING, torch.serialization.safe_globals([(Inert, n) for n in _BESIDE]):
                return torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # its type depends on the damage
            if is_of_the_machine(error):
                raise unjudged(path, error) from None
            needs = re.search(r"GLOBAL ([\w.]+)", str(error))
            words = f" (it asks for {needs[1]}; save a state dict instead)" if needs else ""
            raise ValueError(f"{path}: not a whole {kind}{words}") from None


def check_zip(file: BinaryIO, where: Path | str, kind: str) -> None:
    """Compare every member of a zip file with its checksum. Raise ValueError if one is damaged."""
    with unpacked(file, where, kind) as archive:
        with whole(where, kind):
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{where}: damaged, {damaged} in it has a wrong checksum")


def unpacked(file: BinaryIO, where: Path | str, kind: str) -> zipfile.ZipFile:
    """Open a zip file. Raise ValueError if it is damaged or would unpack to far too much."""
    with whole(where, kind):
        archive = zipfile.ZipFile(file)
    check_unpacked(sum(info.file_size for info in archive.infolist()), file, where)
    return archive


def check_unpacked(total: int, file: BinaryIO, where: Path | str) -> None:
    """Raise ValueError if a file of its size cannot hold `total` bytes."""
    size = os.fstat(file.fileno()).st_size
    if total > max(UNPACKED, PACKED_BY * size):
        raise ValueError(f"{where}: would unpack from {size:,} to {total:,} bytes; refused")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    where = f"{path}: {info.filename}"
    with whole(where, "zip file"):
        member = archive.open(info)
    with member:
        return _read(cast(BinaryIO, member), info.file_size, where)


def _read(file: BinaryIO, size: int, where: Path | str) -> np.ndarray:
    header = read_header(file, size, where)
    with whole(where, "NumPy array"):
        array = np.empty(header.shape, header.dtype, order="F" if header.fortran else "C")
        left = memoryview(array.reshape(-1, order="A").view(np.uint8).data)
        while left:
            if not (count := cast(io.BufferedIOBase, file).readinto(left)):
                raise EOFError("it ends too early")
            left = left[count:]
        file.read(1)  # reaching the end of a zip member makes zipfile check its checksum
    return array
