"""The U-Net of DDPM, DDIM and ADM, one class for all of the papers' networks.

Ho et al. 2020, arXiv:2006.11239, appendix B. Parameters carry the names of the PyTorch ports of
the DDPM and DDIM checkpoints, so those load without a map.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ds.nets.blocks import (
    AbstractUNet,
    AbstractUNetConfig,
    Attention,
    Resample,
    ResBlock,
    doubled,
    halved,
)
from ds.nets.embedding import Frequencies, one_hot, sinusoids
from ds.system.config import Between, Count, Natural, Positive, Share


@dataclass(frozen=True, kw_only=True)
class UNetConfig(AbstractUNetConfig):
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
    # numbers the network is told beside the time, such as h; "context" is another image
    conditions: tuple[str, ...] = ()
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
        self.check_memory()
        return UNet(self)

    @property
    def temb_channels(self) -> int:
        """The width of the time embedding."""
        return self.time_channels or 4 * self.channels

    @property
    def outputs(self) -> int:
        """The channels that the network returns."""
        return self.out_channels or self.in_channels

    def embed(self, t: Tensor) -> Tensor:
        """Return numbers t [N], times or conditions, as features [N, features]."""
        return sinusoids(
            t,
            self.features,
            self.frequencies,
            open_ended=self.open_frequencies,
            cosine_first=self.cosine_first,
        )

    def groups(self, width: int) -> int:
        return self.norm_groups

    def halves(self, level: int) -> Resample | None:
        return halved if level in self.resnet_down else None

    def doubles(self, level: int) -> Resample | None:
        return doubled if level in self.resnet_up else None

    def __post_init__(self):
        self.check_shape()
        self._check_levels()
        self._check_widths()

    def _check_levels(self) -> None:
        """Raise ValueError unless the levels that residual blocks resample are there."""
        levels = len(self.channel_mult)
        for field, reached in (("resnet_down", range(levels - 1)), ("resnet_up", range(1, levels))):
            if unreached := {*getattr(self, field)} - {*reached}:
                raise ValueError(
                    f"UNetConfig: {field} holds {min(unreached)}; accepted are "
                    f"{', '.join(map(str, reached)) or 'none, for one level'}"
                )

    def _check_widths(self) -> None:
        """Raise ValueError unless groups and heads divide the channels."""
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


class UNet(AbstractUNet):
    """The U-Net of DDPM and ADM: net(x [N, C, H, W], t [N], **cond) -> [N, C, H, W].

    With a learned variance it returns [N, 2 C, H, W], the mean first. It computes in the dtype of
    its weights, in channels_last memory, and returns the dtype of x.
    """

    config: UNetConfig

    def _told(self) -> nn.Module:
        layers = super()._told()
        if self.config.classes:
            layers.label = nn.Linear(self.config.classes, self.config.temb_channels, bias=False)
        return layers

    def _initialise(self) -> None:
        self.apply(_initialise)
        for layer in self.modules():  # each residual branch, and the network, starts at zero
            if isinstance(layer, ResBlock):
                nn.init.zeros_(layer.conv2.weight)
            elif isinstance(layer, Attention):
                nn.init.zeros_(layer.proj_out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def features(self, t: Tensor) -> Tensor:
        return self.config.embed(t)

    def _embedded(self, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        hidden, classes = super()._embedded(t, cond, dtype), self.config.classes
        if not classes:
            return hidden
        return hidden + self.temb.label(one_hot(cond["label"], classes).to(dtype))


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
