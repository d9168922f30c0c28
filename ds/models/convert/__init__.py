"""Networks to and from other formats: diffusers, the PyTorch ports, the HDF5 files of 2021.

Formats are recognised by content, never by name. Tensors are read; no code is run.
"""

import re
from pathlib import Path

from ds.models.convert import ddpm, diffusers, keras
from ds.models.convert.diffusers import write as to_diffusers
from ds.models.convert.diffusers.files import is_index, is_shard
from ds.models.convert.diffusers.parts import scheduler_file
from ds.models.convert.imported import Imported, Options, tensors
from ds.models.convert.weights import TIMES, choose
from ds.system.files import opened

__all__ = ["Imported", "read", "to_diffusers"]

_TENSORS = re.compile(rb"PK\x03\x04|\x80\x02|.{8}\{", re.DOTALL)  # two of torch.save, safetensors
_KERAS = b"\x89HDF"


def read(
    path: str | Path,
    *,
    image_size: int | None = None,
    scheduler: str | Path | None = None,
    variant: str | None = None,
) -> Imported:
    """Read a teacher or a student of another code from a file or a directory.

    `image_size` [pixels] is needed if the file does not tell it. `scheduler` is a
    scheduler_config.json of diffusers, or the folder that holds it, for a file that does not tell
    its schedule and prediction, or tells wrong ones. `variant` picks weights of diffusers, such as
    "fp16". Raises ValueError, naming the file, if something is missing, damaged, of another kind or
    of another shape.
    """
    path = Path(path)
    given = None if scheduler is None else scheduler_file(Path(scheduler))
    options = Options(image_size, given, variant)
    if path.is_dir() or is_index(path):
        return diffusers.read(path, options)
    if is_shard(path):
        raise ValueError(f"{path}: is one of several shards; give their folder, {path.parent}")
    if variant is not None:
        raise ValueError(f"{path}: is one file; variant={variant!r} is for a directory")
    try:
        with opened(path) as file:
            head = file.read(9)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file or directory") from None
    if head.startswith(_KERAS):
        return keras.read(path, options)
    if _TENSORS.match(head):
        weights = choose(tensors(path), path)
        reader = diffusers if TIMES[1] in weights.tensors else ddpm
        return reader.read_file(path, weights, options)
    hint = f"; give its folder, {path.parent}" if path.suffix == ".json" else ""
    raise ValueError(
        f"{path}: not a checkpoint{hint}; accepted are PyTorch, safetensors and HDF5 files, and "
        f"diffusers directories"
    )
