"""The names that diffusers gives the weights of a UNet2DModel."""

import re

from torch import Size

from ds.nets.unet import UNetConfig

LABEL = "class_embedding.weight"  # a table of rows, where ours has columns
# Parts of our names, and diffusers' for them.
_NAMES = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^temb\.label\.", "class_embedding."),
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


def spelling(config: UNetConfig, name: str, shape: Size) -> tuple[tuple[str, ...], Size]:
    """Return diffusers' keys for a weight of ours, the current one first, and its shape there."""
    last = len(config.widths) - 1  # diffusers counts the way up from the smallest images
    name = re.sub(r"^up\.(\d+)", lambda level: f"up.{last - int(level[1])}", name)
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    if ".attentions." not in name:
        return (name,), shape
    place, part, end = name.rsplit(".", 2)
    # [:2]: dense layers where ours are 1x1 convolutions
    return tuple(f"{place}.{theirs}.{end}" for theirs in _ATTENTION[part]), shape[:2]
