"""The network of a diffusers directory: a UNet2DModel's fields and the names of its weights.

Reading compares the fields with those that writing would give the same network. So the two cannot
disagree, and an export reads back to the bit.
"""

import re
from pathlib import Path
from typing import Any

from torch import Size

from ds.models.convert.diffusers.fields import check, list_of, load, number, text, whole
from ds.models.convert.imported import naming
from ds.nets.unet import UNetConfig

# The fields of a UNet2DModel that all our networks share.
_SHARED = {
    "_class_name": "UNet2DModel",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
# diffusers' defaults for fields that a file leaves out, where they differ from the values above.
_DEFAULTS = {
    "_class_name": None,
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "block_out_channels": None,
    "down_block_types": None,
    "up_block_types": None,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
_IGNORED = ("num_train_timesteps",)  # of learned time embeddings

# Parts of our names, and diffusers' for them.
_NAMES = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_ATTENTION = {  # ours, theirs, theirs before 2023
    "norm": ("group_norm",),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}


def fields_of(config: UNetConfig) -> dict[str, Any]:
    """Return the fields of the UNet2DModel that computes the same as our network."""
    levels = range(len(config.channel_mult))
    attend = ["Attn" * (config.image_size >> i in config.attention_resolutions) for i in levels]
    return {
        **_SHARED,
        "sample_size": config.image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": [config.channels * mult for mult in config.channel_mult],
        "down_block_types": [f"{attn}DownBlock2D" for attn in attend],
        "up_block_types": [f"{attn}UpBlock2D" for attn in reversed(attend)],
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
    }


def config_of(file: Path, image_size: int | None) -> UNetConfig:
    """Return our network for the fields in a file; ValueError names the first unsupported one."""
    fields = {**_SHARED, **_DEFAULTS, **load(file)}
    if image_size is not None and fields["sample_size"] is None:
        fields["sample_size"] = image_size
    check(fields, "_class_name", ["UNet2DModel"].__contains__, "'UNet2DModel'", file)
    for field in ("sample_size", "in_channels", "layers_per_block", "norm_num_groups"):
        check(fields, field, whole, "a whole number", file)
    for field in ("dropout", "norm_eps"):
        check(fields, field, number, "a number", file)
    check(fields, "block_out_channels", list_of(whole), "a list of whole numbers", file)
    check(fields, "down_block_types", list_of(text), "a list of names", file)

    widths, types = fields["block_out_channels"], fields["down_block_types"]
    size = fields["sample_size"]
    if image_size not in (None, size):
        raise ValueError(f"{file}: its network draws {size} pixels, image_size is {image_size}")
    with naming(file):
        config = UNetConfig(
            image_size=size,
            in_channels=fields["in_channels"],
            channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=fields["layers_per_block"],
            attention_resolutions=tuple(size >> i for i, t in enumerate(types) if "Attn" in t),
            dropout=fields["dropout"],
            norm_groups=fields["norm_num_groups"],
            norm_eps=fields["norm_eps"],
        )
    attended = {width for width, t in zip(widths, types, strict=False) if "Attn" in t}
    ours = fields_of(config)
    alike = {  # other values that say the same
        "time_embedding_dim": [config.temb_channels],
        "attn_norm_num_groups": [config.norm_groups],
        "attention_head_dim": widths[-1:] if attended <= {widths[-1]} else [],
    }
    for field in fields:
        if field in _IGNORED or field.startswith("_"):
            continue
        accepted = [ours.get(field), *alike.get(field, [])]
        words = " or ".join(map(repr, accepted))
        check(fields, field, accepted.__contains__, words, file)
    return config


def spelling(config: UNetConfig, name: str, shape: Size) -> tuple[tuple[str, ...], Size]:
    """Return diffusers' keys for a weight of ours, the current one first, and its shape there."""
    last = len(config.channel_mult) - 1  # diffusers counts the way up from the smallest images
    name = re.sub(r"^up\.(\d+)", lambda level: f"up.{last - int(level[1])}", name)
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    if ".attentions." not in name:
        return (name,), shape
    place, part, end = name.rsplit(".", 2)
    # [:2]: dense layers where ours are 1x1 convolutions
    return tuple(f"{place}.{theirs}.{end}" for theirs in _ATTENTION[part]), shape[:2]
