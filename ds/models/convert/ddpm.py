"""Checkpoints of the DDIM code and of the PyTorch port of DDPM. Our weights have their names.

ermongroup/ddim and the port (pesser/pytorch_diffusion) wrote them; ds.models.convert.weights knows
the containers. Neither describes the network, so it is inferred from the tensors.
"""

from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path

from torch import Size, Tensor

from ds.diffusion.schedules import LinearBeta
from ds.models.convert.diffusers import scheduler
from ds.models.convert.imported import PUBLISHED, Imported, Options, fit, length, naming
from ds.models.convert.weights import Weights
from ds.nets.unet import UNetConfig
from ds.system.files import sha256


def read_file(path: Path, weights: Weights, options: Options) -> Imported:
    """Return the DDPM U-Net with the weights of a file, and the schedule of both codes."""
    config, assumed = _architecture(weights.tensors, options.image_size, path)
    found = Imported(
        kind="teacher",
        config=config,
        weights=fit(config, weights.tensors, _spelling, path),
        schedule=LinearBeta(),
        prediction="eps",
        facts={
            "format": "ddpm",
            "file": path.name,
            "sha256": sha256(path),
            "weights": weights.which,
        },
        assumed=(assumed,),
        said=weights.said,
    )
    return scheduler.given(found, options.scheduler, weights.betas)


def _spelling(name: str, shape: Size) -> tuple[tuple[str, ...], Size]:
    return (name, name.replace("nin_shortcut", "conv_shortcut")), shape  # the latter is 3x3


def _architecture(
    found: Mapping[str, Tensor], image_size: int | None, where: Path
) -> tuple[UNetConfig, str]:
    """Return the configuration of these weights, and what of it is assumed.

    `fit` then checks every weight.
    """
    # Read off biases, so that a weight with its dimensions swapped is left for `fit` to name.
    channels = length(found, "conv_in.bias", where)
    key = "down.{}.block.0.conv2.bias"
    levels = list(_counted(found, "down.{}."))
    widths = [length(found, key.format(i), where) for i in levels]
    for i, width in zip(levels, widths, strict=True):
        if width % channels:
            raise ValueError(
                f"{where}: the weight {key.format(i)} has the shape [{width}], which must be "
                f"a multiple of conv_in.bias [{channels}]"
            )
    mult = tuple(width // channels for width in widths)
    attend = tuple(i for i in levels if _has(found, f"down.{i}.attn."))
    size = image_size or _published_size(mult, attend, where)
    with naming(where):
        config = UNetConfig(
            image_size=size,
            in_channels=length(found, "conv_out.bias", where),
            channels=channels,
            channel_mult=mult,
            num_res_blocks=len(list(_counted(found, "down.0.block.{}."))),
            attention_resolutions=tuple(size >> i for i in attend),
            conv_shortcut=any(".conv_shortcut." in key for key in found),
        )
    assumed = [] if image_size else [f"images of {size} pixels"]
    assumed.append(
        f"{config.norm_groups} groups and an epsilon of {config.norm_eps:g} in each norm"
    )
    option = "" if image_size else "; pass image_size, or convert with --image-size, if it is wrong"
    return config, (
        f"the weights tell no more than their shapes, so {' and '.join(assumed)} are assumed, as "
        f"in the published networks{option}"
    )


def _counted(found: Mapping[str, Tensor], prefix: str) -> Iterator[int]:
    return takewhile(lambda i: _has(found, prefix.format(i)), count())


def _has(found: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in found)


def _published_size(mult: tuple[int, ...], attend: tuple[int, ...], where: Path) -> int:
    """Return the image size of the published network with these levels.

    The weights do not tell it: a convolution fits any image. Raises ValueError for other levels.
    """
    for known in PUBLISHED:
        if (known.channel_mult, known.attention_levels) == (mult, attend):
            return known.size[0]
    raise ValueError(
        f"{where}: the file does not tell the size of its images (levels of {mult} times the "
        f"base channels, attention at levels {attend}); pass image_size"
    )
