"""The U-Net of DDPM and DDIM, one class for all of the paper's networks.

Ho et al. 2020, arXiv:2006.11239, appendix B. Parameters carry the names of the PyTorch ports of
the DDPM and DDIM checkpoints, so those load without a map.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds import ops
from ds.nets.base import AbstractNetConfig
from ds.nets.embedding import (
    Frequencies,
    check_conditions,
    check_frequencies,
    one_hot,
    sinusoids,
)
from ds.system.config import Between, Count, Natural, Positive, Share, check
from ds.system.cost import check_memory


@dataclass(frozen=True, kw_only=True)
class UNetConfig(AbstractNetConfig):
    """The shape of a U-Net: channels * channel_mult[i] channels at the size image_size / 2**i.

    The defaults are DDPM's. The fields after `frequencies` say what else diffusers trains.
    """

    tag: ClassVar[str] = "unet"

    image_size: Count | tuple[Count, Count] = 32  # pixels a side, or height and width
    in_channels: Count = 3  # 3 for colour, 1 for grey
    channels: Natural = 128  # width of the first convolution
    # width of each level, in units of channels
    channel_mult: tuple[Count | Positive, ...] = (1, 2, 2, 2)
    num_res_blocks: Annotated[int, Between(1, 256)] = 2  # residual blocks a level
    attention_resolutions: tuple[int, ...] = (16,)  # heights at which blocks have attention
    conv_shortcut: bool = False  # shortcuts are 3x3, not 1x1, where a block changes the width
    dropout: Share = 0.0  # dropout rate
    norm_groups: Count = 32  # groups of each GroupNorm
    norm_eps: Positive = 1e-6  # epsilon of each GroupNorm; the 2021 files need 1e-3
    conditions: tuple[str, ...] = ()  # numbers the network is told beside the time, such as h
    # highest and lowest frequency of the time embedding; use (6, 0.5) for times from 0 to 1
    frequencies: Frequencies = (1.0, 1e-4)
    open_frequencies: bool = False  # the lowest frequency is left out, as in diffusers by default
    time_channels: Count | None = None  # width of the time embedding; None: 4 * channels
    head_channels: Count | None = None  # channels of an attention head; None: one head of all
    mid_attention: bool = True  # attention between the way down and the way up
    # groups of the GroupNorm of that attention; None: norm_groups; 0: it has no norm
    mid_norm_groups: Natural | None = None
    scale_shift: bool = False  # the time scales and shifts what a norm returned, not its input
    pad_all_sides: bool = False  # halving pads all sides; else only the right and below
    resnet_down: tuple[Natural, ...] = ()  # levels, from 0, that a residual block halves
    resnet_up: tuple[Natural, ...] = ()  # levels, from 0, that a residual block doubles
    classes: Natural = 0  # classes that the network is told the label of; 0: it takes no label
    out_channels: Count | None = None  # 2 * in_channels: a learned variance after the mean
    cosine_first: bool = False  # the time is told as cosines, then sines; ADM's order
    embed_channels: Count | None = None  # numbers that tell the time; None: channels
    heads: Count | None = None  # heads of each attention, in place of head_channels

    def build(self) -> "UNet":
        """Make the network with fresh weights. Raise ValueError if memory cannot hold them."""
        least = 4 * max(self._least_weights(), self.in_channels * math.prod(self.size))
        check_memory(f"a U-Net of {self.channels} x {self.channel_mult} channels", least)
        return UNet(self)

    def _least_weights(self) -> int:
        """Return a lower bound on the number of weights, without making any."""
        blocks = 18 * (2 * self.num_res_blocks + 1)
        return self.temb_channels**2 + blocks * sum(width**2 for width in self.widths)

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of an image."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.channels * mult) for mult in self.channel_mult)

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """The levels, from 0, whose blocks have attention."""
        levels = range(len(self.channel_mult))
        return tuple(i for i in levels if self.size[0] >> i in self.attention_resolutions)

    @property
    def temb_channels(self) -> int:
        """The width of the time embedding."""
        return self.time_channels or 4 * self.channels

    @property
    def outputs(self) -> int:
        """The channels that the network returns."""
        return self.out_channels or self.in_channels

    @property
    def features(self) -> int:
        """The numbers that `embed` makes of one."""
        return self.embed_channels or self.channels

    def embed(self, t: Tensor) -> Tensor:
        """Return numbers t [N], times or conditions, as features [N, features]."""
        return sinusoids(
            t,
            self.features,
            self.frequencies,
            open_ended=self.open_frequencies,
            cosine_first=self.cosine_first,
        )

    def __post_init__(self):
        check(self, "UNetConfig: ")
        self._check_sizes()
        self._check_widths()

    def _check_sizes(self) -> None:
        """Raise ValueError unless the images can be halved, at levels that are there."""
        levels = len(self.channel_mult)
        if not levels:
            raise ValueError("UNetConfig: channel_mult needs one level or more, not ()")
        if any(side % 2 ** (levels - 1) for side in self.size):
            raise ValueError(
                f"UNetConfig: image_size ({self.image_size}) must be a multiple of "
                f"{2 ** (levels - 1)}, one halving per level after the first"
            )
        sizes = {self.size[0] >> level for level in range(levels)}
        if unreached := set(self.attention_resolutions) - sizes:
            raise ValueError(
                f"UNetConfig: attention_resolutions holds {min(unreached)}, the network has the "
                f"sizes {', '.join(map(str, sorted(sizes)))}"
            )
        for field, reached in (("resnet_down", range(levels - 1)), ("resnet_up", range(1, levels))):
            if unreached := {*getattr(self, field)} - {*reached}:
                raise ValueError(
                    f"UNetConfig: {field} holds {min(unreached)}; accepted are "
                    f"{', '.join(map(str, reached)) or 'none, for one level'}"
                )

    def _check_widths(self) -> None:
        """Raise ValueError unless groups and heads divide the channels."""
        field = "embed_channels" if self.embed_channels else "channels"
        if self.features < 4 or self.features % 2:  # half sines, half cosines, two of each or more
            raise ValueError(f"UNetConfig: {field} must be even and 4 or more, not {self.features}")
        check_frequencies("UNetConfig: ", self.frequencies)
        if self.outputs not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"UNetConfig: out_channels must be in_channels ({self.in_channels}), or twice as "
                f"many for a learned variance, not {self.out_channels}"
            )
        if self.heads and self.head_channels:
            raise ValueError(
                f"UNetConfig: give heads ({self.heads}) or head_channels ({self.head_channels}), "
                f"not both"
            )
        exact = [self.channels * mult for mult in self.channel_mult]
        if any(width < 1 or abs(width - round(width)) > 1e-6 * width for width in exact):
            raise ValueError(
                f"UNetConfig: channels * channel_mult must be whole numbers, not {exact}"
            )
        middle = self.widths[-1:] if self.mid_attention else ()
        attended = (*(self.widths[level] for level in self.attention_levels), *middle)
        dividers = {
            "norm_groups": (self.norm_groups, (self.channels, *self.widths)),
            "mid_norm_groups": (self.mid_norm_groups, middle),
            "head_channels": (self.head_channels, attended),
            "heads": (self.heads, attended),
        }
        for field, (divider, widths) in dividers.items():
            for width in widths if divider else ():
                if width % divider:
                    raise ValueError(
                        f"UNetConfig: channels ({width}) must be a multiple of {field} ({divider})"
                    )


class UNet(nn.Module):
    """A U-Net: net(x [N, C, H, W], t [N], **cond) -> [N, C, H, W], in channels_last memory.

    With a learned variance it returns [N, 2 C, H, W], the mean first. It computes in the dtype of
    its weights and returns the dtype of x.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        widths, last = c.widths, len(c.widths) - 1

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList(
            [nn.Linear(c.features, c.temb_channels), nn.Linear(c.temb_channels, c.temb_channels)]
        )
        if c.conditions:
            self.temb.conditions = nn.ModuleDict(
                {name: nn.Linear(c.features, c.temb_channels, bias=False) for name in c.conditions}
            )
        if c.classes:
            self.temb.label = nn.Linear(c.classes, c.temb_channels, bias=False)
        self.conv_in = Conv3x3(c.in_channels, c.channels)

        self.down = nn.ModuleList()
        skips = [width := c.channels]
        for i, out in enumerate(widths):
            level = Level(c, i, [width] + [out] * (c.num_res_blocks - 1), out)
            skips += [out] * c.num_res_blocks
            if i < last:
                level.downsample = (
                    ResBlock(c, out, out, halved) if i in c.resnet_down else Downsample(c, out)
                )
                skips.append(out)
            self.down.append(level)
            width = out

        self.mid = nn.Module()
        self.mid.block_1 = ResBlock(c, width, width)
        self.mid.attn_1 = (
            Attention(c, width, c.mid_norm_groups) if c.mid_attention else nn.Identity()
        )
        self.mid.block_2 = ResBlock(c, width, width)

        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            out = widths[i]
            inputs = [w + skips.pop() for w in [width] + [out] * c.num_res_blocks]
            level = Level(c, i, inputs, out)
            if i > 0:
                level.upsample = (
                    ResBlock(c, out, out, doubled) if i in c.resnet_up else Upsample(out)
                )
            self.up.insert(0, level)
            width = out

        self.norm_out = GroupNorm(c, width, silu=True)
        self.conv_out = Conv3x3(width, c.outputs)
        self.apply(_initialise)
        for layer in self.modules():  # each residual branch, and the network, starts at zero
            if isinstance(layer, ResBlock):
                nn.init.zeros_(layer.conv2.weight)
            elif isinstance(layer, Attention):
                nn.init.zeros_(layer.proj_out.weight)
        nn.init.zeros_(self.conv_out.weight)
        for name in c.conditions:  # with the weights of a network without conditions, it is that
            nn.init.zeros_(self.temb.conditions[name].weight)
        self.to(memory_format=torch.channels_last)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        return (self.config.in_channels, *self.config.size)

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        check_conditions(self.config, cond, len(x))
        temb = self._embedded(t, cond, dtype)
        h = self.conv_in(x.to(dtype, memory_format=torch.channels_last))
        skips = [h]
        for i, level in enumerate(self.down):
            for block, attn in zip(level.block, level.attn, strict=True):
                h = attn(block(h, temb))
                skips.append(h)
            if i < len(self.down) - 1:
                h = level.downsample(h, temb)
                skips.append(h)

        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)

        for i, level in reversed(list(enumerate(self.up))):
            for block, attn in zip(level.block, level.attn, strict=True):
                h = attn(block(h, temb, skips.pop()))
            if i > 0:
                h = level.upsample(h, temb)

        with _without_autocast(x.device.type):  # what is returned is not rounded
            return self.conv_out(self.norm_out(h.to(dtype))).to(x.dtype)

    def _embedded(self, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the features of the time and the conditions that every block is told."""
        c, layers = self.config, self.temb
        hidden = layers.dense[0](c.embed(t).to(dtype))
        for name in c.conditions:  # together, one layer on the embeddings side by side
            hidden = hidden + layers.conditions[name](c.embed(cond[name]).to(dtype))
        hidden = layers.dense[1](F.silu(hidden))
        if c.classes:
            hidden = hidden + layers.label(one_hot(cond["label"], c.classes).to(dtype))
        return hidden


def _without_autocast(device: str) -> AbstractContextManager:
    """Return a context without autocast, which the meta device does not know."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def recompute_norms(net: nn.Module) -> None:
    """Make the residual blocks of a network recompute their norms in backward.

    Training takes less memory, and one more pass over the input of each norm. Gradients are the
    same to the bit.

    Raises:
        ValueError: the network has no residual blocks.
    """
    blocks = [layer for layer in net.modules() if isinstance(layer, ResBlock)]
    if not blocks:
        raise ValueError(f"recompute_norms: {type(net).__name__} has no ResBlock")
    for block in blocks:
        block.recompute = True


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where configured."""

    def __init__(self, c: UNetConfig, level: int, inputs: list[int], out: int):
        super().__init__()
        attend = level in c.attention_levels
        self.block = nn.ModuleList(ResBlock(c, width, out) for width in inputs)
        self.attn = nn.ModuleList(Attention(c, out) if attend else nn.Identity() for _ in inputs)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time embedding, norm, SiLU, dropout, conv, + shortcut.

    With c.scale_shift the time embedding scales and shifts what the second norm returns. With a
    skip connection the input is the concatenation of both. `resample` halves or doubles the input
    and what the first norm returns. If `recompute` is set, forward does not keep what the norms
    return, and backward computes it again.
    """

    recompute = False

    def __init__(
        self,
        c: UNetConfig,
        width: int,
        out: int,
        resample: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.scales, self.resample = c.scale_shift, resample
        self.norm1 = GroupNorm(c, width, silu=True)
        self.conv1 = Conv3x3(width, out)
        self.temb_proj = nn.Linear(c.temb_channels, out * (1 + self.scales))
        self.norm2 = GroupNorm(c, out, silu=not self.scales)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = Conv3x3(out, out)
        if width == out:
            self.nin_shortcut = nn.Identity()
        elif c.conv_shortcut:
            self.nin_shortcut = Conv3x3(width, out)
        else:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        h, x = self._run(self._first, x, skip)
        told = self.temb_proj(F.silu(temb))
        if self.scales:
            return self.nin_shortcut(x) + self._run(self._scaled, h, told)
        return self.nin_shortcut(x) + self._run(self._second, h, self.conv1.bias + told)

    def _first(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return conv1's output, without a bias that norm2 adds, and the block's whole input."""
        if skip is None:
            h = self.norm1(x)
        else:
            h, x = self.norm1.merge(x, skip)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        return ops.conv3x3(h, self.conv1.weight, self.conv1.bias if self.scales else None), x

    def _second(self, h: Tensor, shift: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.norm2(h, shift)))

    def _scaled(self, h: Tensor, told: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.norm2.scaled(h, *told.chunk(2, 1))))

    def _run(self, part: Callable, *args: Tensor | None) -> Any:
        """Call a part of the block, which ends with a convolution.

        Checkpointing stops once it has recomputed what backward needs, the input of that
        convolution. So the convolution itself is not run twice.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)


class Attention(nn.Module):
    """Self-attention over all pixels, in c.heads, heads of c.head_channels, or one, + input.

    The norm has `groups`, by default c.norm_groups; with 0 there is none.
    """

    def __init__(self, c: UNetConfig, width: int, groups: int | None = None):
        super().__init__()
        self.heads = c.heads or width // (c.head_channels or width)
        self.norm = nn.Identity() if groups == 0 else GroupNorm(c, width, groups=groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (split(pixels(f(h)), self.heads) for f in (self.q, self.k, self.v))
        y = ops.attention_residual(
            q, k, v, self.proj_out.weight.flatten(1), self.proj_out.bias, pixels(x)
        )
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    """View [N, C, H, W] in channels_last memory as [N, H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def split(x: Tensor, heads: int) -> Tensor:
    """View pixels [N, T, heads * D] as [N, heads, T, D]."""
    return x[:, None] if heads == 1 else x.unflatten(2, (heads, -1)).transpose(1, 2)


def halved(x: Tensor) -> Tensor:
    """Return the mean of each 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Return every pixel doubled in both directions."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class GroupNorm(nn.Module):
    """The weights of ds.ops.group_norm, or of ds.ops.group_norm_silu."""

    def __init__(self, c: UNetConfig, width: int, *, silu: bool = False, groups: int | None = None):
        super().__init__()
        self.groups, self.eps = groups or c.norm_groups, c.norm_eps
        self.op = ops.group_norm_silu if silu else ops.group_norm
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        if shift is None:
            return self.op(x, self.weight, self.bias, self.groups, self.eps)
        return self.op(x, self.weight, self.bias, self.groups, self.eps, shift=shift)

    def scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return SiLU(norm(x) * (1 + scale) + shift) for scale and shift [N, C]."""
        affine = ops.scale_shift(self.weight, self.bias, scale, shift)
        return ops.group_norm_silu(x, *affine, self.groups, self.eps)

    def merge(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of the concatenation of x and skip, with SiLU, and the concatenation."""
        return ops.fused_add_group_norm_silu(
            x, self.weight, self.bias, self.groups, self.eps, skip=skip
        )


class Conv3x3(nn.Conv2d):
    """The weights of ds.ops.conv3x3."""

    def __init__(self, width: int, out: int):
        super().__init__(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv3x3(x, self.weight, self.bias)


class Downsample(nn.Module):
    """A convolution of stride 2 that pads all sides, or as TensorFlow's SAME: right and below."""

    def __init__(self, c: UNetConfig, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=int(c.pad_all_sides))

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Return [N, C, H / 2, W / 2]; the time embedding is for a residual block in its place."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel doubled in both directions, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Return [N, C, 2 H, 2 W]; the time embedding is for a residual block in its place."""
        return self.conv(doubled(x))


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
