"""What the residual blocks of a network are told of a time and of conditions: rows of columns."""

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets.blocks import AbstractUNet, ResBlock
from ds.nets.embedding import one_hot
from ds.nets.song import SongUNet


def blocks(net: nn.Module) -> dict[str, ResBlock]:
    """Return the residual blocks by name, in the order of their columns in a row."""
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, ResBlock)}


class Told:
    """The function from times and conditions to rows, computed in one dtype.

    A row holds what each block adds: conv1's bias and its time embedding. For a block that scales
    it holds the scale and the shift; with `folded`, the weight and the bias that norm2 then has.
    """

    def __init__(self, net: AbstractUNet, dtype: torch.dtype, *, folded: bool):
        self._net, self._dtype, self._folded = net, dtype, folded

    @functools.cached_property
    def _projections(self) -> tuple[Tensor, Tensor]:
        """The weight and the bias that make a row of an embedding: as large as the blocks' own."""
        parts = [_projection(block, folded=self._folded) for block in blocks(self._net).values()]
        # Folds are made in float64, so that a row is rounded but once.
        weights, biases = zip(*parts, strict=True)
        return torch.cat(weights).to(self._dtype), torch.cat(biases).to(self._dtype)

    @torch.no_grad()
    def begin(self, t: Tensor) -> Tensor:
        """Return what depends on times t [M] alone, before conditions are added: [M, features]."""
        return self._linear(self._net.temb.dense[0], self._features(t))

    @torch.no_grad()
    def finish(self, begun: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the rows [N, columns] of begun times [N, features] or [1, features]."""
        layers, hidden = self._net.temb, begun
        for name in self._net.config.numbers:
            hidden = hidden + self._linear(layers.conditions[name], self._features(cond[name]))
        before, after = self._labels(cond)
        if before is not None:
            hidden = hidden + F.linear(before, layers.dense[0].weight.to(self._dtype))
        temb = self._linear(layers.dense[1], F.silu(hidden))
        temb = temb if after is None else temb + after
        return F.linear(F.silu(temb), *self._projections)

    def _labels(self, cond: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return what is added before the dense layers, and after them."""
        net, layers, before, after = self._net, self._net.temb, None, None
        if classes := net.config.classes:
            row = one_hot(cond["label"], classes).to(self._dtype)
            if isinstance(net, SongUNet):
                before = self._linear(layers.label, row * math.sqrt(classes))
            else:
                after = self._linear(layers.label, row)
        if "augment" in cond:
            part = self._linear(layers.augment, cond["augment"].to(self._dtype))
            before = part if before is None else before + part
        return before, after

    def _features(self, number: Tensor) -> Tensor:
        return self._net.features(number).to(self._dtype)

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(self._dtype)
        return F.linear(x, layer.weight.to(self._dtype), bias)


@torch.no_grad()
def _projection(block: ResBlock, *, folded: bool) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias, in float64, that make a block's columns of its embedding."""
    weight, bias = block.temb_proj.weight.double(), block.temb_proj.bias.double()
    if not block.scales:
        return weight, block.conv1.bias.double() + bias
    if not folded:
        return weight, bias
    w, b = block.norm2.weight.double(), block.norm2.bias.double()
    (scale, shift), (by, to) = weight.chunk(2), bias.chunk(2)
    return (
        torch.cat([w[:, None] * scale, b[:, None] * scale + shift]),
        torch.cat([w * (1 + by), b * (1 + by) + to]),
    )
