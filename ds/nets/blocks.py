"""The parts of the U-Nets, and the way through them.

UNet and SongUNet are made of these in one tree, so what walks one, as the engine does, walks both.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds import ops
from ds.nets.base import AbstractNetConfig
from ds.nets.embedding import (
    Frequencies,
    beside,
    check_conditions,
    check_frequencies,
    check_names,
)
from ds.nets.potential import Potential
from ds.system.config import check
from ds.system.cost import check_memory

Resample = Callable[[Tensor], Tensor]


class AbstractUNetConfig(AbstractNetConfig):
    """The shape of a U-Net: channels * channel_mult[i] channels at the size image_size / 2**i."""

    image_size: int | tuple[int, int]
    in_channels: int
    channels: int
    channel_mult: tuple[int | float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float
    norm_eps: float
    frequencies: Frequencies
    # What some have, and others do not.
    embed_channels: int | None = None
    heads: int | None = None
    head_channels: int | None = None
    mid_attention: bool = True
    mid_norm_groups: int | None = None
    attends_last: bool = False  # on the way up, only the last block of a level has attention
    scale_shift: bool = False
    conv_shortcut: bool = False
    pad_all_sides: bool = False
    resample_proj: bool = False  # a block that resamples has a 1x1 shortcut
    residual_encoder: bool = False  # each halved level is told the image itself once more
    residual_scale: float = 1.0  # every sum of a branch and its input is multiplied by it

    @property
    @abstractmethod
    def temb_channels(self) -> int:
        """The width of the time embedding."""

    @property
    def features(self) -> int:
        """The numbers by which the network is told a time or a condition."""
        return self.embed_channels or self.channels

    @abstractmethod
    def groups(self, width: int) -> int:
        """Return the groups of a GroupNorm of so many channels."""

    @abstractmethod
    def halves(self, level: int) -> Resample | None:
        """Return how a residual block halves a level, None where a convolution does."""

    @abstractmethod
    def doubles(self, level: int) -> Resample | None:
        """Return how a residual block doubles a level, None where a convolution does."""

    @property
    def outputs(self) -> int:
        """The channels that the network returns."""
        return self.in_channels

    @property
    def size(self) -> tuple[int, int]:
        """The height and width of an image."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.in_channels, *self.size)

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
    def skips(self) -> tuple[int, ...]:
        """The channels of the maps that the way up is given, the first last."""
        blocks = self.num_res_blocks
        halved = [width for width in self.widths[:-1] for _ in range(blocks + 1)]
        return (self.channels, *halved, *[self.widths[-1]] * blocks)

    def check_memory(self) -> None:
        """Raise ValueError if memory cannot hold the weights and an image."""
        blocks = 18 * (2 * self.num_res_blocks + 1)
        least = self.temb_channels**2 + blocks * sum(width**2 for width in self.widths)
        told = self.classes + sum(math.prod(shape) for shape in self.may_take.values())
        least += self.features * (self.temb_channels + told)
        least = 4 * max(least, self.in_channels * math.prod(self.size))
        check_memory(f"a U-Net of {self.channels} x {self.channel_mult} channels", least)

    def check_shape(self) -> None:
        """Raise ValueError unless the fields are of their types and the levels can be made."""
        where, levels = f"{type(self).__name__}: ", len(self.channel_mult)
        check(self, where)
        if not levels:
            raise ValueError(f"{where}channel_mult needs one level or more, not ()")
        if any(side % 2 ** (levels - 1) for side in self.size):
            raise ValueError(
                f"{where}image_size ({self.image_size}) must be a multiple of "
                f"{2 ** (levels - 1)}, one halving per level after the first"
            )
        sizes = {self.size[0] >> level for level in range(levels)}
        if unreached := set(self.attention_resolutions) - sizes:
            raise ValueError(
                f"{where}attention_resolutions holds {min(unreached)}, the network has the "
                f"sizes {', '.join(map(str, sorted(sizes)))}"
            )
        field = "embed_channels" if self.embed_channels else "channels"
        if self.features < 4 or self.features % 2:  # half sines, half cosines, two of each or more
            raise ValueError(f"{where}{field} must be even and 4 or more, not {self.features}")
        exact = [self.channels * mult for mult in self.channel_mult]
        if any(width < 1 or abs(width - round(width)) > 1e-6 * width for width in exact):
            raise ValueError(f"{where}channels * channel_mult must be whole numbers, not {exact}")
        check_frequencies(where, self.frequencies)
        check_names(where, self.conditions)


class AbstractEncoder(nn.Module, ABC):
    """The way down of a U-Net, and its middle, in channels_last memory.

    It computes in the dtype of its weights. A subclass says how the network is told the time, and
    from which weights it starts.
    """

    config: Any

    def __init__(self, config: AbstractUNetConfig):
        super().__init__()
        self.config = c = config
        widths, last = c.widths, len(c.widths) - 1
        self.temb = self._told()
        self.conv_in = Conv3x3(c.inputs, c.channels)

        self.down = nn.ModuleList()
        width, aux = c.channels, c.inputs
        for i, out in enumerate(widths):
            level = Level(c, i, [width] + [out] * (c.num_res_blocks - 1), out)
            if i < last:
                how = c.halves(i)
                level.downsample = ResBlock(c, out, out, how) if how else Downsample(c, out)
                if c.residual_encoder:
                    level.residual = HalvingConv(aux, out, how)
                    aux = out
            self.down.append(level)
            width = out

        self.mid = nn.Module()
        self.mid.block_1 = ResBlock(c, width, width)
        self.mid.attn_1 = (
            Attention(c, width, c.mid_norm_groups) if c.mid_attention else nn.Identity()
        )
        self.mid.block_2 = ResBlock(c, width, width)

    def _told(self) -> nn.Module:
        """Make the layers that every network has for the time and for other numbers."""
        c, layers = self.config, nn.Module()
        layers.dense = nn.ModuleList(
            [nn.Linear(c.features, c.temb_channels), nn.Linear(c.temb_channels, c.temb_channels)]
        )
        if c.numbers:
            layers.conditions = nn.ModuleDict(
                {name: nn.Linear(c.features, c.temb_channels, bias=False) for name in c.numbers}
            )
        return layers

    @abstractmethod
    def features(self, t: Tensor) -> Tensor:
        """Return numbers t [N], times or conditions, as features [N, config.features].

        They are float64 for t in float64, else float32.
        """

    def _embedded(self, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the features of the time and the conditions that every block is told."""
        layers = self.temb
        hidden = layers.dense[0](self.features(t).to(dtype))
        for name in self.config.numbers:  # together, one layer on the embeddings side by side
            hidden = hidden + layers.conditions[name](self.features(cond[name]).to(dtype))
        return layers.dense[1](F.silu(hidden))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        return self.config.shape

    def _descend(
        self, x: Tensor, t: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return what the middle returns, what the way up is given, and the time embedding."""
        check_conditions(self.config, cond, x.shape[0])
        dtype = self.conv_in.weight.dtype
        temb = self._embedded(t, cond, dtype)
        aux = beside(x.to(dtype), cond).to(memory_format=torch.channels_last)
        h = self.conv_in(aux)
        skips = [h]
        for i, level in enumerate(self.down):
            for block, attn in zip(level.block, level.attn, strict=True):
                h = attn(block(h, temb))
                skips.append(h)
            if i < len(self.down) - 1:
                h = level.downsample(h, temb)
                if level.residual is not None:
                    h = aux = added(h, level.residual(aux), self.config.residual_scale)
                skips.append(h)
        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        return self.mid.block_2(h, temb), skips, temb


class AbstractUNet(AbstractEncoder):
    """A U-Net: net(x [N, C, H, W], t [N], **cond) -> [N, outputs, H, W].

    It returns the dtype of x.
    """

    def __init__(self, config: AbstractUNetConfig):
        super().__init__(config)
        c, width, skips = config, config.widths[-1], [*config.skips]
        self.up = nn.ModuleList()
        for i in reversed(range(len(c.widths))):
            out = c.widths[i]
            inputs = [w + skips.pop() for w in [width] + [out] * c.num_res_blocks]
            level = Level(c, i, inputs, out, only_last=c.attends_last)
            if i > 0:
                how = c.doubles(i)
                level.upsample = ResBlock(c, out, out, how) if how else Upsample(out)
            self.up.insert(0, level)
            width = out

        self.norm_out = GroupNorm(c, width, silu=True)
        self.conv_out = Conv3x3(width, c.outputs)
        self._initialise()
        for name in c.numbers:  # with the weights of a network without conditions, it is that
            nn.init.zeros_(self.temb.conditions[name].weight)
        self.to(memory_format=torch.channels_last)

    @abstractmethod
    def _initialise(self) -> None:
        """Draw fresh weights."""

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        h, skips, temb = self._descend(x, t, cond)
        for i, level in reversed(list(enumerate(self.up))):
            for block, attn in zip(level.block, level.attn, strict=True):
                h = attn(block(h, temb, skips.pop()))
            if i > 0:
                h = level.upsample(h, temb)
        with without_autocast(x.device.type):  # what is returned is not rounded
            return self.conv_out(self.norm_out(h.to(self.conv_out.weight.dtype))).to(x.dtype)


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context without autocast, which the meta device does not know."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def recompute_norms(net: nn.Module) -> None:
    """Make the residual blocks of a network recompute their norms in backward.

    Training takes less memory, and one more pass over the input of each norm. Gradients are the
    same to the bit.

    Raises:
        ValueError: the network has no residual blocks, or is differentiated by a Potential.
    """
    if any(isinstance(layer, Potential) for layer in net.modules()):
        raise ValueError(
            "recompute_norms: the derivative that a Potential takes needs what this would free; "
            "leave it out"
        )
    blocks = [layer for layer in net.modules() if isinstance(layer, ResBlock)]
    if not blocks:
        raise ValueError(f"recompute_norms: {type(net).__name__} has no ResBlock")
    for block in blocks:
        block.recompute = True


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where configured.

    With `only_last`, of blocks with attention only the last one has it.
    """

    def __init__(
        self,
        c: AbstractUNetConfig,
        level: int,
        inputs: list[int],
        out: int,
        *,
        only_last: bool = False,
    ):
        super().__init__()
        attend, first = level in c.attention_levels, len(inputs) - 1 if only_last else 0
        self.block = nn.ModuleList(ResBlock(c, width, out) for width in inputs)
        self.attn = nn.ModuleList(
            Attention(c, out) if attend and i >= first else nn.Identity()
            for i in range(len(inputs))
        )
        self.register_module("residual", None)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time embedding, norm, SiLU, dropout, conv, + shortcut.

    With c.scale_shift the time embedding scales and shifts what the second norm returns. With a
    skip connection the input is the concatenation of both. `resample` halves or doubles the input
    and what the first norm returns. The sum is multiplied by c.residual_scale. If `recompute` is
    set, forward does not keep what the norms return, and backward computes it again.
    """

    recompute = False

    def __init__(
        self,
        c: AbstractUNetConfig,
        width: int,
        out: int,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.scales, self.resample, self.scale = c.scale_shift, resample, c.residual_scale
        self.norm1 = GroupNorm(c, width, silu=True)
        self.conv1 = Conv3x3(width, out)
        self.temb_proj = nn.Linear(c.temb_channels, out * (1 + self.scales))
        self.norm2 = GroupNorm(c, out, silu=not self.scales)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = Conv3x3(out, out)
        if width == out and not (resample and c.resample_proj):
            self.nin_shortcut = nn.Identity()
        elif c.conv_shortcut:
            self.nin_shortcut = Conv3x3(width, out)
        else:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        h, x = self._run(self._first, x, skip)
        told = self.temb_proj(F.silu(temb))
        if self.scales:
            h = self._run(self._scaled, h, told)
        else:
            h = self._run(self._second, h, self.conv1.bias + told)
        return added(self.nin_shortcut(x), h, self.scale)

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

    The norm has `groups`, by default the configuration's; with 0 there is none. The sum is
    multiplied by c.residual_scale.
    """

    def __init__(self, c: AbstractUNetConfig, width: int, groups: int | None = None):
        super().__init__()
        self.scale = c.residual_scale
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
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return y if self.scale == 1 else y * self.scale


def pixels(x: Tensor) -> Tensor:
    """View [N, C, H, W] in channels_last memory as [N, H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def split(x: Tensor, heads: int) -> Tensor:
    """View pixels [N, T, heads * D] as [N, heads, T, D]."""
    return x[:, None] if heads == 1 else x.unflatten(2, (heads, -1)).transpose(1, 2)


def added(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Return (x + branch) * scale, for the x that a branch was made of."""
    total = x + branch
    return total if scale == 1 else total.mul_(scale)


def halved(x: Tensor) -> Tensor:
    """Return the mean of each 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Return every pixel doubled in both directions."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def smoothly_halved(x: Tensor) -> Tensor:
    """Halve by the filter (1, 3, 3, 1) / 8 in each direction, with zeros around the image."""
    return halved(_smoothed(x, padding=1))


def smoothly_doubled(x: Tensor) -> Tensor:
    """Double by the filter (1, 3, 3, 1) / 4 in each direction, with zeros around the image."""
    return _smoothed(doubled(x), padding=1)


def _smoothed(x: Tensor, padding: int = 0) -> Tensor:
    """Filter by (1, 2, 1) / 4 in each direction: (1, 3, 3, 1) is this and two equal taps."""
    return F.avg_pool2d(F.avg_pool2d(x, 2, 1, padding), 2, 1)


class GroupNorm(nn.Module):
    """The weights of ds.ops.group_norm, or of ds.ops.group_norm_silu."""

    def __init__(
        self,
        c: AbstractUNetConfig,
        width: int,
        *,
        silu: bool = False,
        groups: int | None = None,
    ):
        super().__init__()
        self.groups, self.eps = groups or c.groups(width), c.norm_eps
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


class HalvingConv(Conv3x3):
    """A convolution, then one of the functions that halve.

    One that smooths is given a margin of pixels that the convolution makes of the image and the
    zeros around it.
    """

    def __init__(self, width: int, out: int, how: Resample | None):
        super().__init__(width, out)
        self.smooth = how is smoothly_halved

    def forward(self, x: Tensor) -> Tensor:
        if not self.smooth:
            return halved(super().forward(x))
        return halved(_smoothed(super().forward(F.pad(x, (1, 1, 1, 1)))))


class Downsample(nn.Module):
    """A convolution of stride 2 that pads all sides, or as TensorFlow's SAME: right and below."""

    def __init__(self, c: AbstractUNetConfig, width: int):
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
