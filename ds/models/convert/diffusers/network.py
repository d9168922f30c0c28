"""The network of a diffusers directory: our U-Net from a UNet2DModel's fields, and the fields."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ds.models.convert.diffusers.fields import (
    check,
    list_of,
    load,
    number,
    one_of,
    text,
    whole,
)
from ds.models.convert.diffusers.names import LABEL, spelling
from ds.models.convert.imported import fit, multiples, naming
from ds.nets.base import AbstractNetConfig
from ds.nets.unet import UNetConfig

# What UNet2DModel fills in for fields that a file leaves out.
_DEFAULTS = {
    "_class_name": None,
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# Fields that do not change what the network computes: the first is of learned time embeddings, the
# others are of the moving average that training saves with the network.
_IGNORED = {
    "num_train_timesteps",
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
}
# The values that a field may have.
_ACCEPTED: dict[str, list[Any]] = {
    "center_input_sample": [False],
    "time_embedding_type": ["positional"],
    "freq_shift": [0, 1],
    "flip_sin_to_cos": [False, True],
    "mid_block_type": ["UNetMidBlock2D"],
    "mid_block_scale_factor": [1],
    "downsample_padding": [0, 1],
    "downsample_type": ["conv", "resnet", None],
    "upsample_type": ["conv", "resnet", None],
    "act_fn": ["silu", "swish"],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "add_attention": [True, False],
    "class_embed_type": [None],
}
_EMBEDDINGS = "null: classes are told by a table, of num_class_embeds"
_TYPES = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}


class Network(NamedTuple):
    """The network that a file of fields describes, and how its weights differ from ours."""

    config: UNetConfig
    cosines_first: bool  # in the time embedding; ours has the sines first

    def weights(self, found: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
        """Return the weights under our names; ValueError names the first that does not fit."""
        config, found = self.config, dict(found)
        if LABEL in found and found[LABEL].dim() == 2:
            found[LABEL] = found[LABEL].T
        weights = fit(config, found, partial(spelling, config), where)
        if self.cosines_first:
            columns = weights["temb.dense.0.weight"]
            weights["temb.dense.0.weight"] = columns.roll(config.channels // 2, 1)
        return weights


def read(file: Path, image_size: int | None) -> Network:
    """Return the network for the fields in a file; ValueError names the first unsupported one."""
    fields = {**_DEFAULTS, **load(file)}
    if image_size is not None and fields["sample_size"] is None:
        fields["sample_size"] = image_size
    _check(fields, file)
    size = _size(fields["sample_size"])
    if image_size not in (None, size):
        raise ValueError(f"{file}: its network draws {size} pixels, image_size is {image_size}")
    with naming(file):
        config = _config(fields, size)
    return Network(config, fields["flip_sin_to_cos"])


def _check(fields: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError for the first field with a value that no network of ours has."""
    check(fields, "_class_name", one_of(["UNet2DModel"]), "'UNet2DModel'", file)
    for field in fields:
        if field not in _DEFAULTS and field not in _IGNORED and not field.startswith("_"):
            check(fields, field, one_of([None]), "null: it is no field that is read", file)
    for field, accepted in _ACCEPTED.items():
        words = _EMBEDDINGS if "class" in field else " or ".join(map(repr, accepted))
        check(fields, field, one_of(accepted), words, file)
    for field in ("in_channels", "layers_per_block", "norm_num_groups"):
        check(fields, field, whole, "a whole number", file)
    for field in (
        "time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds",
    ):  # fmt: skip
        check(fields, field, _or_none(whole), "a whole number or null", file)
    for field in ("dropout", "norm_eps"):
        check(fields, field, number, "a number", file)
    words = "a whole number or a list of two; give image_size for null"
    check(fields, "sample_size", _is_size, words, file)
    channels = fields["in_channels"]
    words = f"{channels}, or {2 * channels} with a learned variance"
    check(fields, "out_channels", one_of([channels, 2 * channels]), words, file)
    check(fields, "block_out_channels", list_of(whole), "a list of whole numbers", file)
    levels = len(fields["block_out_channels"])
    for field, types in _TYPES.items():
        words = f"{levels} of {', '.join(types)}, one for each of block_out_channels"
        check(fields, field, _blocks(types, levels), words, file)


def _or_none(accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accept(value)


def _is_size(value: Any) -> bool:
    return whole(value) or (list_of(whole)(value) and len(value) == 2)


def _blocks(types: tuple[str, ...], levels: int) -> Callable[[Any], bool]:
    """Return a test for lists of one block type a level."""
    return lambda value: (
        list_of(text)(value) and len(value) == levels and {*map(_current, value)} <= {*types}
    )


def _current(block: str) -> str:
    """Return today's name of a block type."""
    return block.removeprefix("UNetRes")


def _config(fields: Mapping[str, Any], size: int | tuple[int, int]) -> UNetConfig:
    """Return our network for fields that were checked. Raise ValueError if two do not fit."""
    widths, norm_groups = fields["block_out_channels"], fields["norm_num_groups"]
    channels, last = widths[0], len(widths) - 1
    down = [*map(_current, fields["down_block_types"])]
    up = [*map(_current, reversed(fields["up_block_types"]))]
    attend, back = ([i for i, t in enumerate(types) if "Attn" in t] for types in (down, up))
    if attend != back:
        raise ValueError(
            f"up_block_types have attention at the levels {back}; accepted is the same as on the "
            f"way down, {attend}"
        )
    scale_shift = fields["resnet_time_scale_shift"] == "scale_shift"
    middle = fields["add_attention"]
    # Without groups of its own, the middle's attention has those of blocks; with scale_shift, none.
    groups = fields["attn_norm_num_groups"] or (0 if scale_shift else norm_groups)
    return UNetConfig(
        image_size=size,
        in_channels=fields["in_channels"],
        out_channels=_unless(fields["in_channels"], fields["out_channels"]),
        classes=fields["num_class_embeds"] or 0,
        channels=channels,
        channel_mult=multiples(widths, channels),
        num_res_blocks=fields["layers_per_block"],
        attention_resolutions=tuple(
            (size if isinstance(size, int) else size[0]) >> i for i in attend
        ),
        dropout=fields["dropout"],
        norm_groups=norm_groups,
        norm_eps=fields["norm_eps"],
        open_frequencies=fields["freq_shift"] == 0,
        time_channels=_unless(4 * channels, fields["time_embedding_dim"]),
        head_channels=_head(
            fields["attention_head_dim"], [widths[i] for i in attend + [last] * middle]
        ),
        mid_attention=middle,
        mid_norm_groups=_unless(norm_groups, groups) if middle else None,
        scale_shift=scale_shift,
        pad_all_sides=fields["downsample_padding"] == 1,
        resnet_down=tuple(i for i in range(last) if _is_resnet(down[i], fields["downsample_type"])),
        resnet_up=tuple(
            i for i in range(1, last + 1) if _is_resnet(up[i], fields["upsample_type"])
        ),
    )


def _size(value: int | list[int]) -> int | tuple[int, int]:
    """Return our image_size for a sample_size."""
    if isinstance(value, int):
        return value
    height, width = value
    return height if height == width else (height, width)


def _unless(default: int, value: int | None) -> int | None:
    return None if value == default else value


def _head(width: int | None, attended: list[int]) -> int | None:
    """Return the channels of a head, None for one head of all; ValueError if heads do not fit."""
    if width is None or {*attended} <= {width}:
        return None
    if any(channels % width for channels in attended):
        raise ValueError(
            f"attention_head_dim is {width}; accepted is a divisor of {attended}, the "
            f"block_out_channels with attention"
        )
    return width


def _is_resnet(block: str, resampling: str | None) -> bool:
    """Return whether a block resamples by a residual block: the field counts beside attention."""
    return resampling == "resnet" if "Attn" in block else block.startswith("Resnet")


def sayable(config: AbstractNetConfig, where: Path) -> UNetConfig:
    """Return the configuration of a U-Net. Raise ValueError for another, which diffusers lacks."""
    if not isinstance(config, UNetConfig):
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(
            f"{where}: diffusers has no class for a {name} network; accepted are those of the U-Net"
        )
    return config


def fields_of(config: UNetConfig, where: Path) -> dict[str, Any]:
    """Return the fields of the UNet2DModel that computes the same as our network.

    Raises ValueError, naming `where`, for what a UNet2DModel cannot be.
    """
    levels, attend = range(len(config.widths)), config.attention_levels
    halves, doubles = (
        {i: i in chosen for i in reached}
        for chosen, reached in ((config.resnet_down, levels[:-1]), (config.resnet_up, levels[1:]))
    )
    _check_sayable(config, [{*map(way.get, attend)} for way in (halves, doubles)], where)
    return {
        **_DEFAULTS,
        "_class_name": "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.outputs,
        "num_class_embeds": config.classes or None,
        "time_embedding_dim": config.time_channels,
        "freq_shift": int(not config.open_frequencies),
        "flip_sin_to_cos": config.cosine_first,
        "down_block_types": [_block("Down", i in attend, halves.get(i)) for i in levels],
        "up_block_types": [_block("Up", i in attend, doubles.get(i)) for i in reversed(levels)],
        "block_out_channels": [*config.widths],
        "layers_per_block": config.num_res_blocks,
        "downsample_padding": int(config.pad_all_sides),
        "downsample_type": _resampling(halves, attend),
        "upsample_type": _resampling(doubles, attend),
        "dropout": config.dropout,
        "attention_head_dim": next(iter(_head_widths(config)), None),
        "norm_num_groups": config.norm_groups,
        "attn_norm_num_groups": _middle_groups(config),
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.mid_attention,
    }


def _head_widths(config: UNetConfig) -> list[int | None]:
    """Return the channels of a head for each attention; None: one head of all."""
    if not config.heads:
        return [config.head_channels]
    attended = [config.widths[i] for i in config.attention_levels]
    return [w // config.heads for w in (*attended, *config.widths[-1:] * config.mid_attention)]


def _block(way: str, attends: bool, resnet: bool | None) -> str:
    """Return the type of a block; one with attention has a field for how it resamples."""
    if attends:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if resnet else f"{way}Block2D"


def _resampling(resnet: Mapping[int, bool], attend: tuple[int, ...]) -> str:
    """Return how the levels with attention resample, all in the same way."""
    return "resnet" if any(resnet.get(level) for level in attend) else "conv"


def _middle_groups(config: UNetConfig) -> int | None:
    """Return attn_norm_num_groups, whose null means no norm beside scale_shift."""
    if config.mid_norm_groups is None and config.scale_shift and config.mid_attention:
        return config.norm_groups
    return config.mid_norm_groups or None


def _check_sayable(config: UNetConfig, resamples: list[set[bool | None]], where: Path) -> None:
    """Raise ValueError, with the field, for what a UNet2DModel cannot be."""
    unsaid = {
        "conv_shortcut": config.conv_shortcut,
        "conditions": bool(config.conditions),
        "frequencies": config.frequencies != UNetConfig.frequencies,
        "embed_channels": config.features != config.channels,
        "heads": len({*_head_widths(config)}) > 1,
        "channel_mult": config.widths[0] != config.channels,
        "mid_norm_groups": config.mid_norm_groups == 0 and not config.scale_shift,
        "resnet_down": {True, False} <= resamples[0],
        "resnet_up": {True, False} <= resamples[1],
    }
    for field, is_unsaid in unsaid.items():
        if is_unsaid:
            raise ValueError(
                f"{where}: no UNet2DModel has {field} {getattr(config, field)}; "
                f"docs/teachers.md lists what it can be"
            )
