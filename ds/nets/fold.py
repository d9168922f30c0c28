"""Attention with two of its four projections multiplied out, for inference."""

import copy

import torch
from torch import Tensor, nn

from ds import ops
from ds.nets.base import Undrawn
from ds.nets.blocks import AbstractUNet, Attention, pixels


def fold_attention(net: AbstractUNet) -> AbstractUNet:
    """Return a copy for inference whose attention layers take a third less arithmetic.

    Layers of several heads stay as they are: folded, each head would be as wide as the channels.
    The function is the same in exact arithmetic, and the products of weights are made in float64.
    The copy can be neither trained nor saved.
    """
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, Attention) and layer.heads == 1:
                setattr(module, name, FoldedAttention(layer))
    return net.to(memory_format=torch.channels_last)


class FoldedAttention(nn.Module):
    """The function of an Attention layer of one head, with the normalized pixels as its keys.

    With rows h of pixels, scores are (h W_q^T + b_q) (h W_k^T + b_k)^T, and a softmax sees only

        (h A + a) h^T    where A = W_q^T W_k and a = b_q W_k,

    since the rest is the same for all keys of a query. The softmax's rows sum to 1, so the
    projection may come before them: values are h (W_o W_v)^T, and the bias is W_o b_v + b_o.
    """

    def __init__(self, layer: Attention):
        super().__init__()
        self.norm, self.scale = layer.norm, layer.scale
        w_q, w_k, w_v, w_o = (
            f.weight.detach().flatten(1).double()
            for f in (layer.q, layer.k, layer.v, layer.proj_out)
        )
        b_q, b_v, b_o = (f.bias.detach().double() for f in (layer.q, layer.v, layer.proj_out))
        self.q = _pointwise(layer.q, w_k.T @ w_q, b_q @ w_k)
        self.v = _pointwise(layer.v, w_o @ w_v)
        self.bias = _constant(w_o @ b_v + b_o, like=layer.proj_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (pixels(each)[:, None] for each in (self.q(h), h, self.v(h)))  # one head
        y = ops.attention_residual(q, k, v, None, self.bias, pixels(x))
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return y if self.scale == 1 else y * self.scale


def _pointwise(layer: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    with Undrawn():
        folded = nn.Conv2d(layer.in_channels, layer.out_channels, 1, bias=bias is not None)
    folded.weight = _constant(weight[:, :, None, None], like=layer.weight)
    if bias is not None:
        folded.bias = _constant(bias, like=layer.bias)
    return folded


def _constant(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
