"""The U-Nets of score SDEs as EDM trains them: DDPM++ and NCSN++.

Song et al. 2021, arXiv:2011.13456, appendix H; Karras et al. 2022, arXiv:2206.00364, appendix F. It
is the U-Net of DDPM but for this: sums are multiplied by sqrt(1/2), residual blocks resample, a
level on the way up has attention after its last block alone, classes and augmentation are told
before the first dense layer, and NCSN++ tells every halved level the image itself once more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets.blocks import (
    AbstractUNet,
    AbstractUNetConfig,
    Attention,
    Resample,
    ResBlock,
    doubled,
    halved,
    smoothly_doubled,
    smoothly_halved,
)
from ds.nets.embedding import Frequencies, one_hot, sinusoids
from ds.system.config import Between, Count, Natural, Positive, Share

FILTERS = {(1, 1): (halved, doubled), (1, 3, 3, 1): (smoothly_halved, smoothly_doubled)}


@dataclass(frozen=True, kw_only=True)
class SongConfig(AbstractUNetConfig):
    """The shape of a DDPM++ or NCSN++: channels * channel_mult[i] at the size image_size / 2**i.

    The defaults are DDPM++ for CIFAR-10, without classes and without augmentation.
    """

    tag: ClassVar[str] = "song"

    image_size: Count | tuple[Count, Count] = 32  # pixels a side, or height and width
    in_channels: Count = 3  # 3 for colour, 1 for grey
    channels: Natural = 128  # width of the first convolution
    # width of each level, in units of channels
    channel_mult: tuple[Count | Positive, ...] = (2, 2, 2)
    num_res_blocks: Annotated[int, Between(1, 256)] = 4  # residual blocks a level
    attention_resolutions: tuple[int, ...] = (16,)  # heights at which blocks have attention
    dropout: Share = 0.1  # dropout rate
    classes: Natural = 0  # classes that the network is told the label of; 0: it takes no label
    # numbers that tell how an image was augmented, 9 in EDM; 0: the network takes none
    augment_channels: Natural = 0
    # numbers the network is told beside the time, such as h; "context" is another image
    conditions: tuple[str, ...] = ()
    # sines of fixed frequencies, or of random ones that are saved with the weights
    embedding: Literal["positional", "fourier"] = "positional"
    embed_channels: Count | None = None  # numbers that tell the time; None: channels
    # highest and lowest frequency of a positional embedding; (6, 0.5) for times from 0 to 1
    frequencies: Frequencies = (1.0, 1e-4)
    # residual: each halved level is told the image itself once more
    encoder: Literal["standard", "residual"] = "standard"
    resample_filter: tuple[int, ...] = (1, 1)  # filter that resamples: (1, 1) or (1, 3, 3, 1)

    norm_eps = 1e-6
    heads = 1
    attends_last = True
    resample_proj = True
    residual_scale = math.sqrt(0.5)

    def build(self) -> "SongUNet":
        """Make the network with fresh weights. Raise ValueError if memory cannot hold them."""
        self.check_memory()
        return SongUNet(self)

    @property
    def temb_channels(self) -> int:
        return 4 * self.channels

    @property
    def residual_encoder(self) -> bool:
        return self.encoder == "residual"

    @property
    def may_take(self) -> dict[str, tuple[int, ...]]:
        return {"augment": (self.augment_channels,)} if self.augment_channels else {}

    def groups(self, width: int) -> int:
        return min(32, width // 4)

    def halves(self, level: int) -> Resample:
        return FILTERS[self.resample_filter][0]

    def doubles(self, level: int) -> Resample:
        return FILTERS[self.resample_filter][1]

    def __post_init__(self):
        self.check_shape()
        if self.resample_filter not in FILTERS:
            raise ValueError(
                f"SongConfig: resample_filter must be {' or '.join(map(str, FILTERS))}, not "
                f"{self.resample_filter}"
            )
        for width in (self.channels, *self.widths):
            if width < 4 or width % self.groups(width):
                raise ValueError(
                    f"SongConfig: channels ({width}) must be 4 or more, and a multiple of "
                    f"{self.groups(width) if width >= 4 else 4}, the groups of a norm of theirs"
                )


def ddpmpp(**fields) -> SongConfig:
    """Return EDM's DDPM++ for CIFAR-10, or with other fields: 55.7 million weights."""
    return SongConfig(**{"dropout": 0.13, "augment_channels": 9, **fields})


def ncsnpp(**fields) -> SongConfig:
    """Return EDM's NCSN++ for CIFAR-10, or with other fields: 56.4 million weights."""
    channels = fields.get("channels", SongConfig.channels)
    return ddpmpp(
        **{
            "embedding": "fourier",
            "embed_channels": 2 * channels,
            "encoder": "residual",
            "resample_filter": (1, 3, 3, 1),
            **fields,
        }
    )


class SongUNet(AbstractUNet):
    """A DDPM++ or NCSN++: net(x [N, C, H, W], t [N], **cond) -> [N, C, H, W].

    It may be told `augment` [N, augment_channels], for which zeros stand if it is left out. It
    computes in the dtype of its weights, in channels_last memory, and returns the dtype of x.
    """

    config: SongConfig

    def _told(self) -> nn.Module:
        c, layers = self.config, super()._told()
        if c.embedding == "fourier":
            layers.fourier = Fourier(c.features)
        if c.classes:
            layers.label = nn.Linear(c.classes, c.features)
        if c.augment_channels:
            layers.augment = nn.Linear(c.augment_channels, c.features, bias=False)
        return layers

    @torch.no_grad()
    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in self.modules():  # each residual branch, and the network, starts near zero
            if isinstance(layer, ResBlock):
                layer.conv2.weight *= 1e-5
            elif isinstance(layer, Attention):
                layer.proj_out.weight *= 1e-5
                for part in (layer.q, layer.k, layer.v):
                    # as one layer of three times the outputs, times sqrt(0.2)
                    part.weight *= math.sqrt(0.2 / 2)
        self.conv_out.weight *= 1e-5

    def features(self, t: Tensor) -> Tensor:
        c = self.config
        if c.embedding == "fourier":
            return self.temb.fourier(t)
        return sinusoids(t, c.features, c.frequencies)

    def _embedded(self, t: Tensor, cond: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        c, layers = self.config, self.temb
        told = self.features(t).to(dtype)
        if c.classes:
            row = one_hot(cond["label"], c.classes).to(dtype)
            told = told + layers.label(row * math.sqrt(c.classes))
        if c.augment_channels:  # zeros stand for none, so that the layer always has a gradient
            none = told.new_zeros(1, c.augment_channels)
            told = told + layers.augment(cond.get("augment", none).to(dtype))
        hidden = layers.dense[0](told)
        for name in c.numbers:
            hidden = hidden + layers.conditions[name](self.features(cond[name]).to(dtype))
        return layers.dense[1](F.silu(hidden))


class Fourier(nn.Module):
    """Numbers t [N] as the sines, then cosines of random frequencies, drawn once: [N, features]."""

    def __init__(self, features: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(features // 2, dtype=torch.float32))

    def forward(self, t: Tensor) -> Tensor:
        dtype = torch.promote_types(t.dtype, torch.float32)
        angles = t.to(dtype)[:, None] * (2 * math.pi * self.frequencies).to(dtype)
        return torch.cat([angles.sin(), angles.cos()], 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fourier":
        """Keep the frequencies as they were drawn: rounded, they are those of other features."""
        drawn = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype.itemsize < 4:
            self.frequencies = drawn.to(self.frequencies.device)
        return self
