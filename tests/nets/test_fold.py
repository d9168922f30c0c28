"""A U-Net with folded attention against the one it was made of."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from ds.engine import Engine
from ds.nets import fold_attention
from ds.nets.blocks import Attention
from ds.nets.fold import FoldedAttention
from tests.nets.test_unet import TINY, attending, build, inputs, relative_rms


def layer(width=32, seed=0):
    """An attention layer whose scores are far from equal."""
    generator = torch.Generator().manual_seed(seed)
    layer = Attention(TINY, width).double()
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / width**0.25
    x = torch.randn(3, width, 4, 4, generator=generator, dtype=torch.float64)
    return layer, x.to(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_folded_layer_is_the_layer(dtype, bound):
    whole, x = layer()
    exact = whole(x) - x
    folded = FoldedAttention(whole.to(dtype))
    found = folded(x.to(dtype)).double() - x.to(dtype)
    assert (found - exact).abs().max() <= bound * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_folding_costs_no_precision_of_narrow_types(dtype):
    """The products of weights are rounded once, as the weights themselves are."""
    narrow, x = layer()
    narrow, x = narrow.to(dtype), x.to(dtype)
    exact = copy.deepcopy(narrow).double()(x.double())
    folded = FoldedAttention(narrow)(x)
    assert folded.dtype == dtype
    assert relative_rms(folded, exact) <= 1.5 * relative_rms(narrow(x), exact)


@torch.no_grad()
def test_every_attention_of_a_network_is_folded_and_nothing_else_changes():
    net = build().double()
    folded = fold_attention(net)
    x, t = inputs()
    expected, found = net(x.double(), t), folded(x.double(), t)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert not attending(folded)
    names = {name for name, m in folded.named_modules() if isinstance(m, FoldedAttention)}
    assert names == attending(net) != set()


@torch.no_grad()
def test_attention_of_several_heads_is_not_folded_where_one_head_is():
    """Of the two widths, 8 has one head and 16 has two."""
    config = replace(TINY, attention_resolutions=(8, 4), head_channels=8)
    net = build(config).double()
    folded = fold_attention(net)
    x, t = inputs()
    expected, found = net(x.double(), t), folded(x.double(), t)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    names = {name for name, m in folded.named_modules() if isinstance(m, FoldedAttention)}
    assert names == {"down.0.attn.0", "up.0.attn.0", "up.0.attn.1"}
    with pytest.raises(ValueError, match="folded attention"):
        Engine(folded)  # it would leave these out


@torch.no_grad()
def test_the_copy_is_apart_from_its_original():
    net, (x, t) = build(), inputs()
    before = net(x, t)
    for p in fold_attention(net).parameters():
        nn.init.zeros_(p)
    assert torch.equal(net(x, t), before)


@torch.no_grad()
def test_a_folded_layer_compiles_as_one_graph():
    whole, x = layer()
    folded = FoldedAttention(whole)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), folded(x))
