"""The U-Net of DDPM and DDIM, one class for all of the paper's networks.

Ho et al. 2020, arXiv:2006.11239, appendix B. Parameters carry the names of the PyTorch ports of
the DDPM and DDIM checkpoints, so those load without a map.
"""

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
from ds.nets.embedding import Frequencies, check_conditions, check_frequencies, sinusoids
from ds.system.config import Between, Count, Natural, Positive, Share, check
from ds.system.cost import check_memory


@dataclass(frozen=True, kw_only=True)
class UNetConfig(AbstractNetConfig):
    """The shape of a U-Net: channels * channel_mult[i] channels at the size image_size / 2**i."""

    tag: ClassVar[str] = "unet"

    image_size: Count = 32  # pixels a side
    in_channels: Count = 3  # 3 for colour, 1 for grey
    channels: Natural = 128  # width of the first convolution
    channel_mult: tuple[Count, ...] = (1, 2, 2, 2)  # width of each level, in units of channels
    num_res_blocks: Annotated[int, Between(1, 256)] = 2  # residual blocks a level
    attention_resolutions: tuple[int, ...] = (16,)  # sizes at which blocks have attention
    conv_shortcut: bool = False  # shortcuts are 3x3, not 1x1, where a block changes the width
    dropout: Share = 0.0  # dropout rate
    norm_groups: Count = 32  # groups of each GroupNorm
    norm_eps: Positive = 1e-6  # epsilon of each GroupNorm; the 2021 files need 1e-3
    conditions: tuple[str, ...] = ()  # numbers the network is told beside the time, such as h
    # highest and lowest frequency of the time embedding; use (6, 0.5) for times from 0 to 1
    frequencies: Frequencies = (1.0, 1e-4)

    def build(self) -> "UNet":
        """Make the network with fresh weights. Raise ValueError if memory cannot hold them."""
        least = 4 * max(self._least_weights(), self.in_channels * self.image_size**2)
        check_memory(f"a U-Net of {self.channels} x {self.channel_mult} channels", least)
        return UNet(self)

    def _least_weights(self) -> int:
        """Return a lower bound on the number of weights, without making any."""
        blocks = 18 * (2 * self.num_res_blocks + 1)
        return blocks * sum((self.channels * mult) ** 2 for mult in self.channel_mult)

    @property
    def temb_channels(self) -> int:
        """The width of the time embedding, four times the base channels."""
        return 4 * self.channels

    def __post_init__(self):
        check(self, "UNetConfig: ")
        if self.channels < 4 or self.channels % 2:  # half sines, half cosines, two of each or more
            raise ValueError(
                f"UNetConfig: channels must be even and 4 or more, not {self.channels}"
            )
        check_frequencies("UNetConfig: ", self.frequencies)
        if not self.channel_mult:
            raise ValueError("UNetConfig: channel_mult needs one level or more, not ()")
        halvings = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % halvings:
            raise ValueError(
                f"UNetConfig: image_size ({self.image_size}) must be a multiple of {halvings}, "
                f"one halving per level after the first"
            )
        sizes = {self.image_size >> level for level in range(len(self.channel_mult))}
        if unreached := set(self.attention_resolutions) - sizes:
            raise ValueError(
                f"UNetConfig: attention_resolutions holds {min(unreached)}, the network has the "
                f"sizes {', '.join(map(str, sorted(sizes)))}"
            )
        for mult in self.channel_mult:
            if self.channels * mult % self.norm_groups:
                raise ValueError(
                    f"UNetConfig: channels ({self.channels * mult}) must be a multiple of "
                    f"norm_groups ({self.norm_groups})"
                )


class UNet(nn.Module):
    """A U-Net: net(x [N, C, H, W], t [N], **cond) -> [N, C, H, W], in channels_last memory.

    It computes in the dtype of its weights and returns the dtype of x.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        widths = [c.channels * mult for mult in c.channel_mult]
        sizes = [c.image_size >> level for level in range(len(widths))]
        last = len(widths) - 1

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList(
            [nn.Linear(c.channels, c.temb_channels), nn.Linear(c.temb_channels, c.temb_channels)]
        )
        if c.conditions:
            self.temb.conditions = nn.ModuleDict(
                {name: nn.Linear(c.channels, c.temb_channels, bias=False) for name in c.conditions}
            )
        self.conv_in = Conv3x3(c.in_channels, c.channels)

        self.down = nn.ModuleList()
        skips = [width := c.channels]
        for i, out in enumerate(widths):
            level = Level(c, sizes[i], [width] + [out] * (c.num_res_blocks - 1), out)
            skips += [out] * c.num_res_blocks
            if i < last:
                level.downsample = Downsample(out)
                skips.append(out)
            self.down.append(level)
            width = out

        self.mid = nn.Module()
        self.mid.block_1 = ResBlock(c, width, width)
        self.mid.attn_1 = Attention(c, width)
        self.mid.block_2 = ResBlock(c, width, width)

        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            out = widths[i]
            inputs = [w + skips.pop() for w in [width] + [out] * c.num_res_blocks]
            level = Level(c, sizes[i], inputs, out)
            if i > 0:
                level.upsample = Upsample(out)
            self.up.insert(0, level)
            width = out

        self.norm_out = GroupNorm(c, width, silu=True)
        self.conv_out = Conv3x3(width, c.in_channels)
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
        return (self.config.in_channels, self.config.image_size, self.config.image_size)

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        dtype = self.conv_in.weight.dtype
        temb = self._embedded(t, cond, dtype)
        h = self.conv_in(x.to(dtype, memory_format=torch.channels_last))
        skips = [h]
        for i, level in enumerate(self.down):
            for block, attn in zip(level.block, level.attn, strict=True):
                h = attn(block(h, temb))
                skips.append(h)
            if i < len(self.down) - 1:
                h = level.downsample(h)
                skips.append(h)

        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)

        for i, level in reversed(list(enumerate(self.up))):
            for block, attn in zip(level.block, level.attn, strict=True):
                h = attn(block(h, temb, skips.pop()))
            if i > 0:
                h = level.upsample(h)

        with _without_autocast(x.device.type):  # what is returned is not rounded
            return self.conv_out(self.norm_out(h.to(dtype))).to(x.dtype)

    def _embedded(self, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the features of the time and the conditions that every block is told."""
        c, layers = self.config, self.temb
        check_conditions(c, cond)
        hidden = layers.dense[0](sinusoids(t, c.channels, c.frequencies).to(dtype))
        for name in c.conditions:  # together, one layer on the embeddings side by side
            part = sinusoids(cond[name], c.channels, c.frequencies).to(dtype)
            hidden = hidden + layers.conditions[name](part)
        return layers.dense[1](F.silu(hidden))


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

    def __init__(self, c: UNetConfig, size: int, inputs: list[int], out: int):
        super().__init__()
        attend = size in c.attention_resolutions
        self.block = nn.ModuleList(ResBlock(c, width, out) for width in inputs)
        self.attn = nn.ModuleList(Attention(c, out) if attend else nn.Identity() for _ in inputs)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time embedding, norm, SiLU, dropout, conv, + shortcut.

    With a skip connection the input is the concatenation of both. If `recompute` is set, forward
    does not keep what the norms return, and backward computes it again.
    """

    recompute = False

    def __init__(self, c: UNetConfig, width: int, out: int):
        super().__init__()
        self.norm1 = GroupNorm(c, width, silu=True)
        self.conv1 = Conv3x3(width, out)
        self.temb_proj = nn.Linear(c.temb_channels, out)
        self.norm2 = GroupNorm(c, out, silu=True)
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
        shift = self.conv1.bias + self.temb_proj(F.silu(temb))
        return self.nin_shortcut(x) + self._run(self._second, h, shift)

    def _first(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return conv1's output without its bias, which norm2 adds, and the block's whole input."""
        if skip is None:
            h = self.norm1(x)
        else:
            h, x = self.norm1.merge(x, skip)
        return ops.conv3x3(h, self.conv1.weight), x

    def _second(self, h: Tensor, shift: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.norm2(h, shift)))

    def _run(self, part: Callable, *args: Tensor | None) -> Any:
        """Call a part of the block, which ends with a convolution.

        Checkpointing stops once it has recomputed what backward needs, the input of that
        convolution. So the convolution itself is not run twice.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)


class Attention(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels, + input."""

    def __init__(self, c: UNetConfig, width: int):
        super().__init__()
        self.norm = GroupNorm(c, width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (pixels(f(h))[:, None] for f in (self.q, self.k, self.v))  # one head
        y = ops.attention_residual(
            q, k, v, self.proj_out.weight.flatten(1), self.proj_out.bias, pixels(x)
        )
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    """View [N, C, H, W] in channels_last memory as [N, H * W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class GroupNorm(nn.Module):
    """The weights of ds.ops.group_norm, or of ds.ops.group_norm_silu."""

    def __init__(self, c: UNetConfig, width: int, *, silu: bool = False):
        super().__init__()
        self.groups, self.eps = c.norm_groups, c.norm_eps
        self.op = ops.group_norm_silu if silu else ops.group_norm
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        if shift is None:
            return self.op(x, self.weight, self.bias, self.groups, self.eps)
        return self.op(x, self.weight, self.bias, self.groups, self.eps, shift=shift)

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
    """A convolution of stride 2 that pads on the right and below only, TensorFlow's SAME."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel doubled in both directions, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = Conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
