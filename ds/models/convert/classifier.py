"""Guided-diffusion's classifiers of noisy images, from their state dicts."""

from collections.abc import Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Size, Tensor

from ds.models.convert.adm import PARTS, pair
from ds.models.convert.imported import fit, named, separated, spelled, tensors, width_of
from ds.nets import Classifier, ClassifierConfig, adm_classifier

_POOL = "out.2"
_ENDS = ("weight", "bias")
_POOLS = {  # the names of the attention at the end
    "pool.positions": f"{_POOL}.positional_embedding",
    **{f"pool.{part}.{end}": f"{_POOL}.{part}.{end}" for part in "qkv" for end in _ENDS},
    **{f"pool.proj_out.{end}": f"{_POOL}.c_proj.{end}" for end in _ENDS},
}


def load_classifier(
    path: str | Path,
    *,
    config: ClassifierConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Classifier:
    """Read one of guided-diffusion's classifiers of noisy images, such as 64x64_classifier.pt.

    The file is a state dict. It does not tell its configuration: without `config` that is the
    published one of as many blocks. No code is run. The network is in eval mode, without gradients
    for its weights: ds.ClassifierGuided(denoiser, network, scale).

    Raises:
        ValueError: a weight is missing, superfluous, of another shape, or not finite.
    """
    path = Path(path)
    try:
        found = named(tensors(path), path)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    config = config or _published(found, path)
    found = {key: w[..., None] if w.dim() == 3 else w for key, w in found.items()}
    width = config.head_channels
    found = separated(_with_pool(found, path), "legacy", lambda channels: channels // width, path)
    net = config.build().eval().requires_grad_(False)
    net.load_state_dict(fit(cast(Any, config), found, partial(_spelled, _places(config)), path))
    return net.to(device=device, dtype=dtype)


def _published(found: Mapping[str, Tensor], where: Path) -> ClassifierConfig:
    """Return the published configuration of as many blocks. Raise ValueError if there is none."""
    blocks = {key.split(".")[1] for key in found if key.startswith("input_blocks.")}
    for config in map(adm_classifier, (64, 128, 256, 512)):
        levels = len(config.channel_mult)
        if len(blocks) == levels * (config.num_res_blocks + 1):
            return config
    raise ValueError(
        f"{where}: has {len(blocks)} input_blocks, which is none of guided-diffusion's published "
        f"classifiers; pass config=ds.nets.ClassifierConfig(...)"
    )


def _with_pool(found: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Return the weights with q, k and v of the attention at the end apart."""
    found = dict(found)
    for end in _ENDS:
        key = f"{_POOL}.qkv_proj.{end}"
        width_of(found, key, 0, where)
        whole = found.pop(key)
        if whole.dim() > 1:
            whole = whole.flatten(1)
        for part, w in zip("qkv", whole.chunk(3), strict=False):
            found[f"{_POOL}.{part}.{end}"] = w
    return found


def _spelled(places: Mapping[str, str], name: str, shape: Size) -> tuple[tuple[str, ...], Size]:
    if name not in _POOLS:
        return spelled(name, shape, places, PARTS)
    stored = Size((*shape, 1, 1)) if name == "pool.proj_out.weight" else shape
    return (_POOLS[name],), stored


def _places(config: ClassifierConfig) -> dict[str, str]:
    """Return the names that guided-diffusion gives the blocks of our network."""
    found = {
        "temb.dense.0": "time_embed.0",
        "temb.dense.1": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "mid.block_1": "middle_block.0",
        "mid.attn_1": "middle_block.1",
        "mid.block_2": "middle_block.2",
        "norm_out": "out.0",
    }
    place, levels = count(1), len(config.channel_mult)
    for i in range(levels):
        for j in range(config.num_res_blocks):
            found |= pair("down", i, j, f"input_blocks.{next(place)}")
        if i < levels - 1:
            found[f"down.{i}.downsample"] = f"input_blocks.{next(place)}.0"
    return found
