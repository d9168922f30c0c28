"""The result of every reader of foreign checkpoints, and the strict function that fills it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Size, Tensor

from ds.diffusion.grids import Grid
from ds.diffusion.predictions import Prediction
from ds.diffusion.schedules import AbstractTable
from ds.diffusion.solvers import DDIM, AbstractSolver
from ds.nets.unet import UNetConfig
from ds.system.arrays import load_tensors
from ds.system.files import opened, whole

# The three networks of DDPM, DDIM and the 2021 code: CIFAR-10; CelebA; LSUN and CelebA-HQ.
PUBLISHED = (
    UNetConfig(),
    UNetConfig(image_size=64, channel_mult=(1, 2, 2, 2, 4)),
    UNetConfig(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)  # float32 holds each of them exactly
# How a file spells one of our weights: the keys it may have there, and its shape under them.
Spelling = Callable[[str, Size], tuple[tuple[str, ...], Size]]


class Imported(NamedTuple):
    """A network from elsewhere: its configuration, its weights under our names, its meaning.

    `prediction` is "eps", "x0" or "v", and None for a student. `facts` are plain JSON values for
    the provenance: format, file, sha256, and what else the format says. `assumed` are sentences
    about what the file does not say, and `said` about what is done with what it says. `decoder` is
    the folder of the diffusers vae or vqvae whose latents the network draws. `grid` is None for the
    paper's.
    """

    kind: Literal["teacher", "student"]
    config: UNetConfig
    weights: dict[str, Tensor]
    schedule: AbstractTable
    prediction: Prediction | None
    facts: dict[str, Any]
    assumed: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    decoder: Path | None = None
    solver: AbstractSolver = DDIM()
    grid: Grid | None = None


class Options(NamedTuple):
    """What the caller says of a file that does not say it itself; None: nothing."""

    image_size: int | None = None  # pixels a side
    scheduler: Path | None = None  # a scheduler_config.json
    variant: str | None = None  # of the weights of diffusers, such as fp16


@contextmanager
def naming(where: Path) -> Iterator[None]:
    """Make a ValueError about what a file says name that file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def shapes(config: UNetConfig) -> dict[str, Size]:
    """Return the shape of every weight, in the order the network defines them."""
    with torch.device("meta"):
        return {name: w.shape for name, w in config.build().state_dict().items()}


def tensors(path: Path) -> Any:
    """Read the tensors of a safetensors or PyTorch file, whichever its bytes say; run nothing."""
    with opened(path) as file:
        safe = file.read(9)[8:] == b"{"
    if not safe:
        return load_tensors(path)
    with whole(path, "safetensors file"):
        return load_file(path)


def named(value: Any, where: Path) -> dict[str, Tensor]:
    """Return a state dict whose every entry is a tensor under a name; ValueError if it is not.

    Tensors are no larger than what is stored of them.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: holds one {type(value).__name__}, not weights by name")
    for key, w in value.items():
        if not isinstance(key, str) or not isinstance(w, Tensor):
            raise ValueError(
                f"{where}: holds {key!r} of the type {type(w).__name__}, not weights by name"
            )
        if w.layout == torch.strided and w.nbytes > w.untyped_storage().nbytes():
            raise ValueError(
                f"{where}: the weight {key} {list(w.shape)} is larger than what is stored of it"
            )
    return dict(value)


def fit(
    config: UNetConfig, found: Mapping[str, Tensor], spelling: Spelling, where: Path
) -> dict[str, Tensor]:
    """Return the weights of a network under our names, float32; each tensor found is used once.

    Raises ValueError for the first weight that is missing, superfluous, of another shape or dtype,
    or not finite.
    """
    weights, unused = {}, dict(found)
    with naming(where):  # the network may not fit in memory
        needed = shapes(config)
    for name, shape in needed.items():
        keys, stored = spelling(name, shape)
        there = [key for key in keys if key in unused]
        if not there:
            raise ValueError(f"{where}: the weight {keys[0]} {list(stored)} is missing")
        weights[name] = checked(unused.pop(there[0]), there[0], stored, where).reshape(shape)
    if unused:
        key, w = next(iter(unused.items()))
        raise ValueError(f"{where}: the network has no weight {key} {list(w.shape)}")
    return weights


def checked(w: Tensor, key: str, shape: Size, where: Path) -> Tensor:
    """Return a weight as contiguous float32; ValueError for a wrong shape, dtype or value."""
    if w.shape != shape:
        raise ValueError(
            f"{where}: the weight {key} has the shape {list(w.shape)}, the network needs "
            f"{list(shape)}"
        )
    if w.dtype not in DTYPES or w.layout != torch.strided or w.is_meta:
        raise ValueError(
            f"{where}: the weight {key} is {w.dtype}, {w.layout}, on {w.device}; accepted are "
            f"dense float16, bfloat16 and float32"
        )
    if not w.isfinite().all():
        raise ValueError(f"{where}: the weight {key} is not finite; it cannot be used")
    return w.detach().float().contiguous()
