"""A U-Net of ours as anyone would write it in plain PyTorch: the peer of the engine."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets.blocks import AbstractUNet, Attention, Downsample, GroupNorm, ResBlock, Upsample


class Plain(nn.Module):
    """The function of a network, by PyTorch's own operations: plain(x, t, **cond).

    Weights and images are in one memory format, contiguous or channels_last.
    """

    def __init__(self, net: AbstractUNet, memory_format: torch.memory_format):
        super().__init__()
        copied: Any = copy.deepcopy(net)
        self.net = copied.to(memory_format=memory_format)
        self.format = memory_format

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        net, dtype = self.net, self.net.conv_in.weight.dtype
        temb = F.silu(net._embedded(t, cond, dtype))
        aux = x.to(dtype, memory_format=self.format)
        h = conv(net.conv_in, aux)
        skips = [h]
        for i, level in enumerate(net.down):
            for each, attn in zip(level.block, level.attn, strict=True):
                h = attention(attn, block(each, h, temb))
                skips.append(h)
            if i < len(net.down) - 1:
                assert level.residual is None
                h = resample(level.downsample, h, temb)
                skips.append(h)
        h = attention(net.mid.attn_1, block(net.mid.block_1, h, temb))
        h = block(net.mid.block_2, h, temb)
        for i, level in reversed(list(enumerate(net.up))):
            for each, attn in zip(level.block, level.attn, strict=True):
                h = attention(attn, block(each, torch.cat([h, skips.pop()], 1), temb))
            if i > 0:
                h = resample(level.upsample, h, temb)
        return conv(net.conv_out, F.silu(norm(net.norm_out, h))).to(x.dtype)


def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve as PyTorch does, not by the op that the layer calls."""
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)


def norm(layer: GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, layer.groups, layer.weight, layer.bias, layer.eps)


def block(layer: ResBlock, x: Tensor, temb: Tensor) -> Tensor:
    h = F.silu(norm(layer.norm1, x))
    if layer.resample is not None:
        h, x = layer.resample(h), layer.resample(x)
    h = conv(layer.conv1, h)
    told = layer.temb_proj(temb)[:, :, None, None]
    if layer.scales:
        scale, shift = told.chunk(2, 1)
        h = F.silu(torch.addcmul(shift, norm(layer.norm2, h), 1 + scale))
    else:
        h = F.silu(norm(layer.norm2, h + told))
    h = conv(layer.conv2, h)
    if isinstance(layer.nin_shortcut, nn.Conv2d):
        x = conv(layer.nin_shortcut, x)
    return (x + h) * layer.scale if layer.scale != 1 else x + h


def resample(layer: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    if isinstance(layer, ResBlock):
        return block(layer, x, temb)
    if isinstance(layer, Upsample):
        return conv(layer.conv, F.interpolate(x, scale_factor=2.0))
    assert isinstance(layer, Downsample)
    return layer(x)


def attention(layer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(layer, Attention):
        return x
    h = norm(layer.norm, x) if isinstance(layer.norm, GroupNorm) else x
    q, k, v = (_heads(conv(part, h), layer.heads) for part in (layer.q, layer.k, layer.v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
    y = x + conv(layer.proj_out, y)
    return y * layer.scale if layer.scale != 1 else y


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return [N, heads, pixels, channels of a head]."""
    return x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
