"""The result of every reader of foreign checkpoints, and the strict function that fills it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Size, Tensor

from ds.diffusion.grids import Grid
from ds.diffusion.predictions import AbstractPrediction, Prediction
from ds.diffusion.schedules import EDM, AbstractSchedule
from ds.diffusion.solvers import DDIM, AbstractSolver
from ds.nets import SongConfig, UNetConfig
from ds.nets.base import AbstractNetConfig
from ds.system.arrays import load_tensors
from ds.system.config import Count, require
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
_Orders = Literal["legacy", "new"]
Order = _Orders | Literal["edm"]
# How the channels of a projection to q, k and v are laid out: the sizes of a view, heads given, and
# which of its axes tells q from k and v.
_ORDERS: dict[Order, tuple[Callable[[int], tuple[int, ...]], int]] = {
    "legacy": (lambda heads: (heads, 3, -1), 1),
    "new": (lambda heads: (3, heads, -1), 0),
    "edm": (lambda heads: (heads, -1, 3), 2),
}
Spelling = Callable[[str, Size], tuple[tuple[str, ...], Size]]


class Imported(NamedTuple):
    """A network from elsewhere: its configuration, its weights under our names, its meaning.

    `prediction` is None for a student, `method` the JSON of how a student draws. `facts` are plain
    JSON values for the provenance: format, file, sha256, and what else the format says. `assumed`
    are sentences about what the file does not say, and `said` about what is done with what it says.
    `decoder` is the folder of the diffusers vae or vqvae whose latents the network draws. `grid` is
    None for the paper's.
    """

    kind: Literal["teacher", "student"]
    config: UNetConfig | SongConfig
    weights: dict[str, Tensor]
    schedule: AbstractSchedule
    prediction: AbstractPrediction | Prediction | None
    facts: dict[str, Any]
    assumed: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    decoder: Path | None = None
    solver: AbstractSolver = DDIM()
    grid: Grid | None = None
    method: dict[str, Any] | None = None


NOISE_SCALE = 250.0  # of consistency models: their networks are fed 1000 * log(sigma) / 4


def consistency(found: Imported, **fields: Any) -> Imported:
    """Return a network as a consistency model, with the levels of OpenAI's unless others are given.

    It draws as their code does, whose samples are clipped.
    """
    method = {
        "type": "consistency_distillation", "num_levels": 40, "noise_scale": NOISE_SCALE,
        "clip": True, **fields,
    }  # fmt: skip
    return found._replace(kind="student", schedule=EDM(), prediction=None, method=method)


class Options(NamedTuple):
    """What the caller says of a file that does not say it itself; None: nothing."""

    image_size: int | None = None  # pixels a side
    scheduler: Path | None = None  # a scheduler_config.json
    variant: str | None = None  # of the weights of diffusers, such as fp16
    kind: Literal["teacher", "student"] | None = None
    head_channels: int | None = None  # channels of a head of attention
    attention_order: Order | None = None  # of the channels of q, k and v
    rescale_timesteps: bool | None = None  # the network is told 1000 * t / steps

    def check(self, where: Path, *used: str) -> None:
        """Raise ValueError for an option of a wrong kind, or that this file has no use for."""
        with naming(where):
            require("options", Count | None, head_channels=self.head_channels)
            require("options", _Orders | None, attention_order=self.attention_order)
            require("options", bool | None, rescale_timesteps=self.rescale_timesteps)
        for name, value in self._asdict().items():
            if value is not None and name not in (*used, "kind"):
                raise ValueError(
                    f"{where}: {name}={value!r} has no meaning here; accepted are "
                    f"{', '.join(used) or 'no options'}"
                )


@contextmanager
def naming(where: Path) -> Iterator[None]:
    """Make a ValueError about what a file says name that file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def shapes(config: AbstractNetConfig) -> dict[str, Size]:
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
    config: AbstractNetConfig, found: Mapping[str, Tensor], spelling: Spelling, where: Path
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


def length(found: Mapping[str, Tensor], key: str, where: Path) -> int:
    """Return the length of a bias; ValueError if there is none."""
    width = width_of(found, key, 0, where)
    if found[key].dim() != 1:
        raise ValueError(
            f"{where}: the weight {key} has the shape {list(found[key].shape)}, the network needs "
            f"[channels]"
        )
    return width


def width_of(found: Mapping[str, Tensor], key: str, axis: int, where: Path) -> int:
    """Return a weight's size along an axis; ValueError if it has none, or is not there."""
    if key not in found:
        raise ValueError(f"{where}: the weight {key} is missing")
    shape = found[key].shape
    if axis >= len(shape) or 0 in shape:
        raise ValueError(f"{where}: the weight {key} has the shape {list(shape)}")
    return shape[axis]


def multiples(widths: Sequence[int], channels: int) -> tuple[float, ...]:
    """Return widths in units of `channels`: whole numbers where they are."""
    return tuple(w / channels if w % channels else w // channels for w in widths)


def spelled(
    name: str, shape: Size, places: Mapping[str, str], parts: Mapping[str, str]
) -> tuple[tuple[str, ...], Size]:
    """Return the key of a weight in a code that has other names for blocks and their layers."""
    layer, _, end = name.rpartition(".")
    if layer not in places:
        block, _, part = layer.rpartition(".")
        return (f"{places[block]}.{parts[part]}.{end}",), shape
    return (f"{places[layer]}.{end}",), shape


def separated(
    found: Mapping[str, Tensor], order: Order, heads: Callable[[int], int], where: Path
) -> dict[str, Tensor]:
    """Return weights with q, k and v in place of each qkv, whose channels are in an order.

    `heads` tells the heads of an attention by its channels.
    """
    result = {}
    for key, w in found.items():
        place, _, end = key.rpartition(".")
        if not place.endswith("qkv"):
            result[key] = w
            continue
        width, rest = divmod(width_of(found, key, 0, where), 3)
        count = heads(width)
        if rest or count < 1 or width % count:
            raise ValueError(
                f"{where}: the weight {key} has the shape {list(w.shape)}, the network needs q, k "
                f"and v of {count} heads of the same width"
            )
        sizes, axis = _ORDERS[order]
        parts = checked(w, key, w.shape, where).unflatten(0, sizes(count)).movedim(axis, 0)
        for name, part in zip("qkv", parts, strict=True):
            result[f"{place[:-3]}{name}.{end}"] = part.flatten(0, 1)
    return result
