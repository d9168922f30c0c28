"""Networks to and from other formats: diffusers, ADM, EDM, the ports of DDPM, the files of 2021.

Formats are recognised by content, never by name. Tensors are read; no code is run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ds.models.convert import adm, ddpm, diffusers, edm, keras
from ds.models.convert.diffusers import write as to_diffusers
from ds.models.convert.diffusers.files import is_index, is_shard
from ds.models.convert.diffusers.parts import scheduler_file
from ds.models.convert.imported import Imported, Options, tensors
from ds.models.convert.weights import ADM, DIFFUSERS, choose
from ds.system.files import opened

__all__ = ["Imported", "read", "to_diffusers"]

# Two of torch.save, the second of which starts with a number of its own, and safetensors.
_TENSORS = re.compile(rb"PK\x03\x04|\x80\x02\x8a\x0a|.{8}\{", re.DOTALL)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_KERAS = b"\x89HDF"


def read(
    path: str | Path,
    *,
    image_size: int | None = None,
    scheduler: str | Path | None = None,
    variant: str | None = None,
    kind: Literal["teacher", "student"] | None = None,
    head_channels: int | None = None,
    attention_order: Literal["legacy", "new"] | None = None,
    rescale_timesteps: bool | None = None,
) -> Imported:
    """Read a teacher or a student of another code from a file or a directory.

    `image_size` [pixels] is needed if the file does not tell it. `scheduler` is a
    scheduler_config.json of diffusers, or the folder that holds it, for a file that does not tell
    its schedule and prediction, or tells wrong ones. `variant` picks weights of diffusers, such as
    "fp16". The others are what state dicts of OpenAI's codes do not tell: which `kind` of model
    they are, the channels of a head of attention, the order of those of q, k and v, and whether
    the network is told 1000 * t / steps instead of t. Raises ValueError, naming the file, if
    something is missing, damaged, of another kind or of another shape.
    """
    path = Path(path)
    given = None if scheduler is None else scheduler_file(Path(scheduler))
    told = (kind, head_channels, attention_order, rescale_timesteps)
    options = Options(image_size, given, variant, *told)
    if path.is_dir() or is_index(path):
        options.check(path, "image_size", "scheduler", "variant")
        return diffusers.read(path, options)
    if is_shard(path):
        raise ValueError(f"{path}: is one of several shards; give their folder, {path.parent}")
    try:
        with opened(path) as file:
            head = file.read(9)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file or directory") from None
    if head.startswith(_KERAS):
        options.check(path, "image_size", "scheduler")
        return keras.read(path, options)
    if _TENSORS.match(head):
        weights = choose(tensors(path), path)
        reader = _reader(weights.tensors)
        own = ("head_channels", "attention_order", "rescale_timesteps") if reader is adm else ()
        options.check(path, "image_size", "scheduler", *own)
        return reader.read_file(path, weights, options)
    if _PICKLE.match(head):
        options.check(path)
        return edm.read(path)
    hint = f"; give its folder, {path.parent}" if path.suffix == ".json" else ""
    raise ValueError(
        f"{path}: not a checkpoint{hint}; accepted are PyTorch, safetensors and HDF5 files, EDM's "
        f"pickles, and diffusers directories"
    )


def _reader(weights: Mapping[str, Tensor]) -> Any:
    """Return the module that reads weights of these names."""
    if ADM[0] in weights:
        return adm
    return diffusers if DIFFUSERS[1] in weights else ddpm
