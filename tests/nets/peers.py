"""The network of the PyTorch ports of DDPM, written for the tests of ds.nets.convert."""

import json
import lzma
import math

import torch
import torch.nn.functional as F
from torch import nn

from ds.nets import UNetConfig
from tests import golden

DIGITS = UNetConfig(
    image_size=8,
    in_channels=1,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=8,
)


# image size, multipliers, the level with attention: appendix B of DDPM and the DDIM code's configs
ARCHITECTURES = {
    "cifar10": (32, (1, 2, 2, 2), 1),
    "celeba": (64, (1, 2, 2, 2, 4), 2),
    "lsun": (256, (1, 1, 2, 2, 4, 4), 4),
}


class Port(nn.Module):
    """The network of the PyTorch ports of DDPM, with their names, written for these tests."""

    def __init__(self, c, mult, level, num_blocks=2, in_channels=3):
        super().__init__()
        self.c, self.num_blocks = c, num_blocks
        widths = [c * m for m in mult]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(c, 4 * c), nn.Linear(4 * c, 4 * c)])
        self.conv_in = nn.Conv2d(in_channels, c, 3, padding=1)
        self.down, self.up, self.mid = nn.ModuleList(), nn.ModuleList(), nn.Module()
        skips = [c]
        for i, width in enumerate(widths):
            stage = nn.Module()
            before = skips[-1]
            stage.block = nn.ModuleList(
                PortBlock(before if j == 0 else width, width, 4 * c) for j in range(num_blocks)
            )
            skips += [width] * num_blocks
            stage.attn = nn.ModuleList(
                PortAttention(width) for _ in range(num_blocks * (i == level))
            )
            if i < len(widths) - 1:
                stage.downsample = nn.Module()
                stage.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
                skips.append(width)
            self.down.append(stage)
        self.mid.block_1 = PortBlock(width, width, 4 * c)
        self.mid.attn_1 = PortAttention(width)
        self.mid.block_2 = PortBlock(width, width, 4 * c)
        h, stages = width, []
        for i in reversed(range(len(widths))):
            width, stage = widths[i], nn.Module()
            stage.block, stage.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_blocks + 1):
                stage.block.append(PortBlock(h + skips.pop(), width, 4 * c))
                if i == level:
                    stage.attn.append(PortAttention(width))
                h = width
            if i > 0:
                stage.upsample = nn.Module()
                stage.upsample.conv = nn.Conv2d(width, width, 3, padding=1)
            stages.append(stage)
        self.up = nn.ModuleList(stages[::-1])
        self.norm_out = nn.GroupNorm(32, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, in_channels, 3, padding=1)

    def forward(self, x, t):
        half = self.c // 2
        frequencies = 10000 ** (-torch.arange(half) / (half - 1))
        angles = t[:, None].float() * frequencies
        temb = torch.cat([angles.sin(), angles.cos()], dim=1)
        temb = F.silu(self.temb.dense[1](F.silu(self.temb.dense[0](temb))))
        hs = [self.conv_in(x)]
        for stage in self.down:
            for j, block in enumerate(stage.block):
                h = block(hs[-1], temb)
                hs.append(stage.attn[j](h) if len(stage.attn) else h)
            if "downsample" in stage._modules:
                hs.append(stage.downsample.conv(F.pad(hs[-1], (0, 1, 0, 1))))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for stage in reversed(self.up):
            for j, block in enumerate(stage.block):
                h = block(torch.cat([h, hs.pop()], dim=1), temb)
                h = stage.attn[j](h) if len(stage.attn) else h
            if "upsample" in stage._modules:
                h = stage.upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv_out(F.silu(self.norm_out(h)))


class PortBlock(nn.Module):
    def __init__(self, before, after, temb):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.temb_proj = nn.Linear(temb, after)
        self.norm2 = nn.GroupNorm(32, after, eps=1e-6)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(temb)[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if "nin_shortcut" in self._modules else x)


class PortAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        p = torch.einsum("ncq,nck->nqk", q, k).div(math.sqrt(x.shape[1])).softmax(dim=2)
        return x + self.proj_out(torch.einsum("nqk,nck->ncq", p, v).reshape(x.shape))


def randomized(net, seed=0):
    """Draw every weight at random, at a scale that keeps the signal's."""
    generator = torch.Generator().manual_seed(seed)
    for w in net.parameters():
        noise = torch.randn(w.shape, generator=generator)
        if w.dim() > 1:
            w.data = noise / w[0].numel() ** 0.5
        else:
            w.data = 0.1 * noise
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.weight.data += 1
    return net.requires_grad_(False).eval()


def port(name, c=32, seed=0):
    _, mult, level = ARCHITECTURES[name]
    return randomized(Port(c, mult, level), seed)


def change(path, fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def unpacked(name):
    return lzma.decompress((golden.FOLDER / f"{name}.h5.xz").read_bytes())
