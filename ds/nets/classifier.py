"""ADM's classifier of noisy images, arXiv:2105.05233, section 4: half a U-Net and one attention.

Its gradient guides a teacher: ds.ClassifierGuided(denoiser, net, scale).
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ds.nets.blocks import (
    AbstractEncoder,
    AbstractUNetConfig,
    Attention,
    GroupNorm,
    Resample,
    ResBlock,
    halved,
    pixels,
    split,
    without_autocast,
)
from ds.nets.embedding import sinusoids
from ds.system.config import Between, Count, Natural, Positive, Share


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(AbstractUNetConfig):
    """The shape of ADM's classifier; the defaults are those for ImageNet 64 x 64."""

    tag: ClassVar[str] = "classifier"

    image_size: Count | tuple[Count, Count] = 64  # pixels a side, or height and width
    in_channels: Count = 3  # 3 for colour, 1 for grey
    num_classes: Count = 1000  # classes that it tells apart
    channels: Natural = 128  # width of the first convolution
    # width of each level, in units of channels
    channel_mult: tuple[Count | Positive, ...] = (1, 2, 3, 4)
    num_res_blocks: Annotated[int, Between(1, 256)] = 4  # residual blocks a level
    attention_resolutions: tuple[int, ...] = (32, 16, 8)  # heights at which blocks have attention
    dropout: Share = 0.0  # dropout rate
    norm_groups: Count = 32  # groups of each GroupNorm
    head_channels: Count = 64  # channels of an attention head
    embed_channels: Count | None = None  # numbers that tell the time; None: channels
    time_channels: Count | None = None  # width of the time embedding; None: 4 * channels

    norm_eps = 1e-5
    frequencies = (1.0, 1e-4)
    scale_shift = True

    def build(self) -> "Classifier":
        """Make the network with fresh weights. Raise ValueError if memory cannot hold them."""
        self.check_memory()
        return Classifier(self)

    @property
    def temb_channels(self) -> int:
        return self.time_channels or 4 * self.channels

    def groups(self, width: int) -> int:
        return self.norm_groups

    def halves(self, level: int) -> Resample:
        return halved

    def doubles(self, level: int) -> None:
        return None

    def __post_init__(self):
        self.check_shape()
        attended = (*(self.widths[level] for level in self.attention_levels), self.widths[-1])
        dividers = (
            ("norm_groups", self.norm_groups, (self.channels, *self.widths)),
            ("head_channels", self.head_channels, attended),
        )
        for field, divider, widths in dividers:
            for width in widths:
                if width % divider:
                    raise ValueError(
                        f"ClassifierConfig: channels ({width}) must be a multiple of {field} "
                        f"({divider})"
                    )


def adm_classifier(image_size: int, **fields) -> ClassifierConfig:
    """Return ADM's classifier for ImageNet of 64, 128, 256 or 512 pixels, or with other fields.

    Raises ValueError for another size.
    """
    published = {
        64: {},
        128: {"channel_mult": (1, 1, 2, 3, 4), "num_res_blocks": 2},
        256: {"channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2},
        512: {
            "channels": 64,
            "channel_mult": (1, 2, 2, 4, 4, 8, 8),
            "num_res_blocks": 2,
            "embed_channels": 128,
            "time_channels": 512,
        },
    }
    if image_size not in published:
        raise ValueError(
            f"adm_classifier: image_size must be 64, 128, 256 or 512, not {image_size}"
        )
    return ClassifierConfig(image_size=image_size, **{**published[image_size], **fields})


class Classifier(AbstractEncoder):
    """ADM's noisy classifier: net(x [N, C, H, W], t [N]) -> logits [N, num_classes].

    It computes in the dtype of its weights and returns the dtype of x.
    """

    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        height, width = (side >> len(config.widths) - 1 for side in config.size)
        channels = config.widths[-1]
        self.norm_out = GroupNorm(config, channels, silu=True)
        heads = channels // config.head_channels
        self.pool = AttentionPool(height * width, channels, heads, config.num_classes)
        for layer in self.modules():  # each residual branch starts at zero
            if isinstance(layer, ResBlock | Attention):
                last = layer.conv2 if isinstance(layer, ResBlock) else layer.proj_out
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        self.to(memory_format=torch.channels_last)

    def features(self, t: Tensor) -> Tensor:
        c = self.config
        return sinusoids(t, c.features, c.frequencies, open_ended=True, cosine_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, *_ = self._descend(x, t, {})
        with without_autocast(x.device.type):
            h = self.norm_out(h.to(self.norm_out.weight.dtype))
            return self.pool(h).to(x.dtype)


class AttentionPool(nn.Module):
    """One query, the mean over all pixels, attends to itself and to every pixel [N, C, H, W]."""

    def __init__(self, count: int, channels: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(channels, count + 1) / math.sqrt(channels))
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        h = pixels(x)
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.positions.T
        q = split(self.q(h[:, :1]), self.heads)
        k, v = (split(layer(h), self.heads) for layer in (self.k, self.v))
        shares = (q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])).softmax(-1)
        return self.proj_out((shares @ v).flatten(1))
