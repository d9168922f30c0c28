"""State dicts of OpenAI's UNetModel: improved-diffusion, guided-diffusion, consistency_models.

They hold weights alone. What tensors tell is read off them; the rest is that of the published
networks unless the caller says it, and is said to be assumed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ds.diffusion import grids
from ds.diffusion.predictions import Preconditioned
from ds.diffusion.schedules import EDM, AbstractTable, Cosine, LinearBeta
from ds.diffusion.solvers import Heun
from ds.models.convert.diffusers import scheduler
from ds.models.convert.imported import (
    NOISE_SCALE,
    Imported,
    Options,
    Order,
    consistency,
    fit,
    length,
    multiples,
    naming,
    separated,
    spelled,
    width_of,
)
from ds.models.convert.weights import Weights
from ds.nets.unet import UNetConfig
from ds.system.files import sha256

PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "temb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "nin_shortcut": "skip_connection",
    **{part: part for part in ("norm", "q", "k", "v", "proj_out")},
}
_CONV2 = "out_layers.3"
_WIDE_HEADS = {"head_channels": 64}


_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(in_layers|qkv|op|conv)\b")


class _Layout(NamedTuple):
    """What the names and shapes of the tensors tell beside the widths of the levels."""

    code: Literal["improved-diffusion", "guided-diffusion", "consistency_models"]
    levels: int
    blocks: int  # a level
    attended: tuple[int, ...]  # levels
    scale_shift: bool

    @property
    def by_blocks(self) -> bool:
        """Whether residual blocks halve and double."""
        return self.code != "improved-diffusion"

    @property
    def is_long(self) -> bool:
        """Whether the published networks of this kind have 4000 steps."""
        return self.code == "improved-diffusion" and self.scale_shift


def read_file(path: Path, weights: Weights, options: Options) -> Imported:
    """Return the network of a state dict, and what it means to the code that wrote it."""
    found = {key: w[..., None] if w.dim() == 3 else w for key, w in weights.tensors.items()}
    layout = _layout(weights.tensors, path)
    config, assumed = _config(found, layout, options, path)
    order = options.attention_order or _order(layout, config)
    if not options.attention_order and layout.code != "consistency_models":
        assumed.append(f"the {order} order of q, k and v (attention_order)")
    found = separated(found, order, _heads_of(config), path)
    if "label_emb.weight" in found:
        found["label_emb.weight"] = found["label_emb.weight"].T
    facts = {"format": layout.code, "file": path.name, "sha256": sha256(path)}
    imported = Imported(
        kind="teacher",
        config=config,
        weights=fit(config, found, partial(spelled, places=_places(layout), parts=PARTS), path),
        schedule=LinearBeta(),
        prediction="eps",
        facts={**facts, "weights": weights.which},
        assumed=_sentences(assumed, layout),
        said=weights.said,
    )
    if layout.code == "consistency_models":
        return _of_consistency(imported, options, path)
    return _of_steps(imported, layout, weights.betas, options)


def _sentences(assumed: list[str], layout: _Layout) -> tuple[str, ...]:
    if not assumed:
        return ()
    return (
        f"a network of {layout.code}, whose weights do not tell all: assumed are "
        f"{'; '.join(assumed)}; the options in brackets, of Python and of `dstudent convert`, say "
        f"otherwise",
    )


def _of_consistency(found: Imported, options: Options, where: Path) -> Imported:
    """Return a teacher on EDM's path, or a consistency model: their files look alike."""
    if options.scheduler:
        raise ValueError(f"{where}: its times are noise levels, not steps; leave scheduler out")
    if options.kind is None:
        sentence = (
            "teachers (edm_*) and consistency models (cd_*, ct_*) look alike: a teacher is "
            'assumed; for the other pass kind="student", or convert with --kind student'
        )
        found = found._replace(assumed=(*found.assumed, sentence))
    if options.kind == "student":
        return consistency(found)
    if options.kind == "teacher":
        sentence = f"{where}: is read as a teacher (edm_*); a consistency model looks the same"
        found = found._replace(said=(*found.said, sentence))
    schedule = EDM()
    return found._replace(
        schedule=schedule,
        prediction=Preconditioned(noise_scale=NOISE_SCALE),
        solver=Heun(),
        grid=grids.karras(40, schedule),
    )


def _of_steps(found: Imported, layout: _Layout, betas: Tensor | None, options: Options) -> Imported:
    """Return a teacher with the schedule of the published networks, or that of the caller."""
    steps = 4000 if layout.is_long else 1000
    cosine = layout.is_long or max(found.config.size) <= 64
    found = found._replace(schedule=Cosine(steps) if cosine else LinearBeta(steps))
    found = scheduler.given(found, options.scheduler, betas)
    rescaled = options.rescale_timesteps
    if rescaled is None and (rescaled := layout.is_long and not found.config.classes):
        sentence = (
            "the network is assumed to be told 1000 * t / steps, as in the published networks "
            "without classes; else pass rescale_timesteps=False, or --rescale-timesteps False"
        )
        found = found._replace(assumed=(*found.assumed, sentence))
    if rescaled:
        assert isinstance(found.schedule, AbstractTable)
        scale = 1000 / found.schedule.num_steps
        highest, lowest = found.config.frequencies
        config = replace(found.config, frequencies=(scale * highest, scale * lowest))
        found = found._replace(config=config)
    return found


def _layout(found: Mapping[str, Tensor], where: Path) -> _Layout:
    """Return the layout of a network. Raise ValueError for what is no U-Net of these codes."""
    there = {match.groups() for key in found if (match := _BLOCK.match(key))}
    ends = [n for way, n, part, _ in there if way == "output" and part == "0"]
    ups = {n for way, n, part, kind in there if way == "output" and part != "0" and kind != "qkv"}
    levels = len(ups) + 1
    if not ends or len(ends) % levels or len(ends) < 2 * levels:
        words = "; a classifier is read by ds.load_classifier" if not ends else ""
        raise ValueError(
            f"{where}: not a U-Net of guided-diffusion: it has {len(ends)} output_blocks on "
            f"{levels} levels{words}"
        )
    blocks = len(ends) // levels - 1
    attended = (
        i for i in range(levels) if ("input", str(1 + i * (blocks + 1)), "1", "qkv") in there
    )
    halving = {kind for way, n, _, kind in there if way == "input" and n == str(blocks + 1)}
    flat = [w.dim() for key, w in found.items() if key.endswith(".qkv.weight")]
    code = "improved-diffusion" if "op" in halving else "guided-diffusion"
    if flat and min(flat) == 4:
        code = "consistency_models"
    block = "input_blocks.1.0"
    told, width = (length(found, f"{block}.{n}.bias", where) for n in ("emb_layers.1", _CONV2))
    return _Layout(code, levels, blocks, tuple(attended), told == 2 * width)


def _config(
    found: Mapping[str, Tensor], layout: _Layout, options: Options, where: Path
) -> tuple[UNetConfig, list[str]]:
    """Return the configuration of these weights, and what of it is assumed; `fit` checks both."""
    assumed = []
    last = layout.levels - 1
    widths = [
        length(found, f"input_blocks.{1 + i * (layout.blocks + 1)}.0.{_CONV2}.bias", where)
        for i in range(layout.levels)
    ]
    channels = length(found, "input_blocks.0.0.bias", where)
    features = width_of(found, "time_embed.0.weight", 1, where)
    told = length(found, "time_embed.0.bias", where)
    inputs = width_of(found, "input_blocks.0.0.weight", 1, where)
    outputs = length(found, "out.2.bias", where)
    if inputs == outputs == 6:
        raise ValueError(f"{where}: is fed a small image beside the noise; upsamplers are not read")
    size = options.image_size or _size(layout, where)
    if not options.image_size:
        assumed.append(f"images of {size} pixels (image_size)")
    heads = _heads(layout, size, options)
    if options.head_channels is None and layout.attended:
        assumed.append(
            f"attention with {heads.get('heads', 1)} heads (head_channels)"
            if heads is not _WIDE_HEADS
            else "attention with heads of 64 channels (head_channels)"
        )
    label = found.get("label_emb.weight")
    with naming(where):
        return UNetConfig(
            image_size=size,
            in_channels=inputs,
            channels=channels,
            channel_mult=multiples(widths, channels),
            num_res_blocks=layout.blocks,
            attention_resolutions=tuple(size >> i for i in layout.attended),
            norm_eps=1e-5,
            open_frequencies=True,
            cosine_first=True,
            embed_channels=None if features == channels else features,
            time_channels=None if told == 4 * channels else told,
            classes=0 if label is None else len(label),
            out_channels=None if outputs == inputs else outputs,
            scale_shift=layout.scale_shift,
            pad_all_sides=not layout.by_blocks,
            resnet_down=tuple(range(last)) if layout.by_blocks else (),
            resnet_up=tuple(range(1, last + 1)) if layout.by_blocks else (),
            **heads,
        ), assumed


def _size(layout: _Layout, where: Path) -> int:
    """Return the size of images of the published network with attention at these levels."""
    if not layout.attended:
        raise ValueError(f"{where}: does not tell the size of its images; pass image_size")
    largest = 32 if layout.by_blocks else 16  # images with attention
    return largest << layout.attended[0]


def _heads(layout: _Layout, size: int, options: Options) -> dict[str, Any]:
    """Return the fields that tell the heads of attention, of the published networks by default."""
    if options.head_channels:
        return {"head_channels": options.head_channels}
    if layout.code == "improved-diffusion":
        return {"heads": 4} if layout.scale_shift else {}
    return {"heads": 4} if layout.code == "guided-diffusion" and size == 128 else _WIDE_HEADS


def _heads_of(config: UNetConfig) -> Callable[[int], int]:
    """Return a function from the channels of an attention to its heads."""
    return lambda width: config.heads or width // (config.head_channels or width)


def _order(layout: _Layout, config: UNetConfig) -> Order:
    """Return the order of the channels of qkv: new where heads were split last."""
    new = layout.code == "guided-diffusion" and max(config.size) == 64
    return "new" if new or layout.code == "consistency_models" else "legacy"


def _places(layout: _Layout) -> dict[str, str]:
    """Return the names that the codes give the blocks of our network."""
    found = {
        "temb.dense.0": "time_embed.0",
        "temb.dense.1": "time_embed.2",
        "temb.label": "label_emb",
        "conv_in": "input_blocks.0.0",
        "mid.block_1": "middle_block.0",
        "mid.attn_1": "middle_block.1",
        "mid.block_2": "middle_block.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    down, up = count(1), count(0)
    for i in range(layout.levels):
        for j in range(layout.blocks):
            found |= pair("down", i, j, f"input_blocks.{next(down)}")
        if i < layout.levels - 1:
            place = f"input_blocks.{next(down)}.0"
            found |= {f"down.{i}.downsample": place, f"down.{i}.downsample.conv": f"{place}.op"}
    for i in reversed(range(layout.levels)):
        for j in range(layout.blocks + 1):
            place = f"output_blocks.{next(up)}"
            found |= pair("up", i, j, place)
        place = f"{place}.{1 + (i in layout.attended)}"  # beside the last block of the level
        found |= {f"up.{i}.upsample": place, f"up.{i}.upsample.conv": f"{place}.conv"}
    return found


def pair(way: str, level: int, block: int, place: str) -> dict[str, str]:
    """Return the names of a residual block and the attention after it."""
    return {
        f"{way}.{level}.block.{block}": f"{place}.0",
        f"{way}.{level}.attn.{block}": f"{place}.1",
    }
