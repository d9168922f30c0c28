"""The walk over a network that writes the steps of its forward pass, one for each layer.

A value may be held divided by a number, its factor: the value of the network is factor * value. So
a residual scale costs nothing. The sum scale * (x + h) is held as x + h, with the factor of x times
scale, where h comes of a convolution whose weight is divided by the factor of x. A norm takes the
factor out again: it divides its epsilon by the square. In exact arithmetic nothing changes.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.engine.calls import (
    Add,
    AddBias,
    Attend,
    Call,
    Cat,
    Halve,
    Norm,
    Scale,
    ScaleShift,
    Smooth,
    Upsample,
    times,
)
from ds.engine.convolutions import Conv
from ds.engine.rewrites import Step
from ds.engine.told import blocks
from ds.nets.blocks import (
    AbstractUNet,
    Attention,
    Downsample,
    GroupNorm,
    HalvingConv,
    Resample,
    ResBlock,
    doubled,
    halved,
)

INPUT = "x"


def walk(net: AbstractUNet) -> list[Step]:
    """Return the steps of the network's forward pass, one for each layer."""
    write = _Writer(net)
    h, aux = write.conv(net.conv_in, INPUT), INPUT
    skips = [h]
    for i, level in enumerate(net.down):
        for block, attn in zip(level.block, level.attn, strict=True):
            h = write.attend(attn, write.block(block, h))
            skips.append(h)
        if i < len(net.down) - 1:
            h = write.resample(level.downsample, h)
            if level.residual is not None:
                h = aux = write.tell_again(level.residual, h, aux, net.config.residual_scale)
            skips.append(h)
    h = write.attend(net.mid.attn_1, write.block(net.mid.block_1, h))
    h = write.block(net.mid.block_2, h)
    for i, level in reversed(list(enumerate(net.up))):
        for block, attn in zip(level.block, level.attn, strict=True):
            skip = skips.pop()
            h = write.block(block, h, skip, wanted=write.factor_of(skips[-1:], attn))
            h = write.attend(attn, h)
        if i > 0:
            h = write.resample(level.upsample, h, wanted=write.factor_of(skips[-1:]))
    write.conv(net.conv_out, write.norm(net.norm_out, h))
    return write.steps


class _Writer:
    """Collects steps; each makes a value named after its layer."""

    def __init__(self, net: nn.Module):
        self.steps: list[Step] = []
        self.factors = {INPUT: 1.0}
        self.names = {layer: name for name, layer in net.named_modules()}
        ends = list(itertools.accumulate(b.temb_proj.out_features for b in blocks(net).values()))
        spans = zip([0, *ends], ends, strict=False)
        self.columns = dict(
            zip(blocks(net).values(), (slice(*span) for span in spans), strict=True)
        )

    def factor_of(self, values: list[str], attn: nn.Module | None = None) -> float:
        """Return the factor that a block must give its result for it to end with that of a value.

        That is after the attention, if any, and 1 if there is no value.
        """
        factor = self.factors[values[0]] if values else 1.0
        return factor / attn.scale if isinstance(attn, Attention) else factor

    def call(self, name: str, call: Call, *inputs: str, factor: float = 1.0) -> str:
        self.steps.append(Step(call, inputs, (name,)))
        self.factors[name] = factor
        return name

    def conv(self, layer: nn.Conv2d, x: str, *, bias: bool = True, factor: float = 1.0) -> str:
        sides = layer.stride[0] == 2 and layer.padding[0] == 1
        call = Conv(
            times(layer.weight, self.factors[x] / factor),
            times(layer.bias, 1 / factor) if bias else None,
            layer.stride[0],
            pad_all_sides=sides,
        )
        return self.call(self.names[layer], call, x, factor=factor)

    def norm(self, layer: nn.Module, x: str) -> str:
        if not isinstance(layer, GroupNorm):
            return x
        return self.call(self.names[layer], Norm(layer, self.factors[x]), x)

    def cat(self, name: str, x: str, skip: str) -> str:
        factor = self.factors[skip]
        if not math.isclose(self.factors[x], factor):
            x = self.call(f"{name}.scaled", Scale(self.factors[x] / factor), x, factor=factor)
        return self.call(f"{name}.cat", Cat(), x, skip, factor=factor)

    def block(
        self, layer: ResBlock, x: str, skip: str | None = None, *, wanted: float = 1.0
    ) -> str:
        """Write a residual block; its result has the wanted factor if it has a shortcut."""
        name = self.names[layer]
        if skip is not None:
            x = self.cat(name, x, skip)
        h = self.norm(layer.norm1, x)
        if layer.resample is not None:
            resample = _resampling(layer.resample)
            h = self.call(f"{name}.resample", resample, h)
            x = self.call(f"{name}.resample_x", resample, x, factor=self.factors[x])
        h = self.conv(layer.conv1, h, bias=layer.scales)
        if not layer.scales:
            h = self.call(f"{name}.shift", AddBias(self.columns[layer]), h)
        if isinstance(layer.nin_shortcut, nn.Conv2d):
            x = self.conv(layer.nin_shortcut, x, factor=wanted / layer.scale)
        h = self.norm(layer.norm2, h)
        if layer.scales:
            h = self.call(f"{name}.scale", ScaleShift(self.columns[layer]), h)
        h = self.conv(layer.conv2, h, factor=self.factors[x])
        return self.call(name, Add(), h, x, factor=self.factors[x] * layer.scale)

    def resample(self, layer: nn.Module, x: str, *, wanted: float = 1.0) -> str:
        if isinstance(layer, ResBlock):
            return self.block(layer, x, wanted=wanted)
        if not isinstance(layer, Downsample):
            x = self.call(self.names[layer], Upsample(), x, factor=self.factors[x])
        return self.conv(layer.conv, x, factor=wanted)

    def tell_again(self, layer: HalvingConv, h: str, aux: str, scale: float) -> str:
        """Write the sum of h and a halving convolution of what h was made of."""
        name, factor = self.names[layer], self.factors[h]
        weight = times(_halving_weight(layer), self.factors[aux] / factor)
        call = Conv(weight, times(layer.bias, 1 / factor), stride=2, pad_all_sides=True)
        part = self.call(f"{name}.conv", call, aux, factor=factor)
        return self.call(name, Add(), part, h, factor=factor * scale)

    def attend(self, layer: nn.Module, x: str) -> str:
        if not isinstance(layer, Attention):
            return x
        h, factor = self.norm(layer.norm, x), self.factors[x]
        heads = [self.conv(projection, h) for projection in (layer.q, layer.k, layer.v)]
        out = (times(p, 1 / factor) for p in (layer.proj_out.weight, layer.proj_out.bias))
        call = Attend(layer, *out, factor)
        return self.call(self.names[layer], call, *heads, x, factor=factor * layer.scale)


def _resampling(how: Resample) -> Call:
    """Return the call that halves or doubles as a residual block does."""
    plain = {halved: Halve(), doubled: Upsample()}
    return plain.get(how) or Smooth(how)


@torch.no_grad()
def _halving_weight(layer: HalvingConv) -> Tensor:
    """Return the weight of a 3x3 convolution and the filter that halves, as one convolution."""
    taps = (1, 3, 3, 1) if layer.smooth else (1, 1)
    taps = torch.tensor(taps, dtype=torch.float64, device=layer.weight.device) / sum(taps)
    each = layer.weight.double().flatten(0, 1)[:, None]
    whole = F.conv2d(each, torch.outer(taps, taps)[None, None], padding=len(taps) - 1)
    return whole.view(*layer.weight.shape[:2], *whole.shape[2:]).to(layer.weight.dtype)
