"""Networks to and from other formats: diffusers, the PyTorch ports, the HDF5 files of 2021.

Formats are recognised by content, never by name. Tensors are read; no code is run.
"""

from pathlib import Path

from ds.models.convert import ddpm, diffusers, keras
from ds.models.convert.diffusers import write as to_diffusers
from ds.models.convert.imported import Imported
from ds.system.files import opened

__all__ = ["Imported", "read", "to_diffusers"]

_READERS = {b"\x89HDF": keras.read, b"PK\x03\x04": ddpm.read, b"\x80\x02": ddpm.read}


def read(path: str | Path, *, image_size: int | None = None) -> Imported:
    """Read a teacher or a student of another code from a file or a directory.

    `image_size` [pixels] is needed if the file does not tell it. Raises ValueError, naming the
    file, if something is missing, damaged, of another kind or of another shape.
    """
    path = Path(path)
    if path.is_dir():
        return diffusers.read(path, image_size)
    try:
        with opened(path) as file:
            head = file.read(9)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file or directory") from None
    for signature, reader in _READERS.items():
        if head.startswith(signature):
            return reader(path, image_size)
    if head[8:] == b"{":  # safetensors: the length of a JSON header, then the header
        return ddpm.read(path, image_size)
    raise ValueError(
        f"{path}: not a checkpoint; accepted are PyTorch, safetensors and HDF5 files, and "
        f"diffusers directories"
    )
