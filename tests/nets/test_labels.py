"""Networks that are told a class: against diffusers, without a class, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from ds.models.convert.diffusers.names import spelling
from ds.nets import UNetConfig
from ds.nets.base import NO_CLASS
from ds.nets.embedding import sinusoids
from tests.nets.peers import randomized

TINY = UNetConfig(
    image_size=8,
    in_channels=2,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
    classes=5,
)
LABELS = torch.tensor([3, 0, 4])
TIMES = torch.tensor([999, 0, 37])


def drawn(config, seed=0):
    return randomized(config.build(), seed)


@pytest.fixture(scope="module")
def net():
    return drawn(TINY)


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_network_with_classes_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = randomized(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=[16, 32],
            down_block_types=["DownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "UpBlock2D"],
            layers_per_block=1,
            norm_num_groups=8,
            out_channels=6,
            num_class_embeds=5,
        )
    )
    config = UNetConfig(
        image_size=8,
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        norm_groups=8,
        norm_eps=1e-5,
        head_channels=8,
        pad_all_sides=True,
        open_frequencies=True,
        cosine_first=True,
        classes=5,
        out_channels=6,
    )
    ours, found = config.build().eval(), theirs.state_dict()
    label = {"temb.label.weight": found.pop("class_embedding.weight").T}
    state = ours.state_dict()
    for key in state.keys() - label:
        (name, *_), _ = spelling(config, key, state[key].shape)
        state[key] = found[name].view_as(state[key])
    ours.load_state_dict(state | label)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = theirs(x, TIMES, LABELS).sample
    assert (ours(x, TIMES, label=LABELS) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_no_class_adds_exactly_nothing(net, x):
    plain = replace(TINY, classes=0).build().eval()
    plain.load_state_dict({k: w for k, w in net.state_dict().items() if "label" not in k})
    nobody = torch.full((3,), NO_CLASS)
    assert torch.equal(net(x, TIMES, label=nobody), plain(x, TIMES))
    some = net(x, TIMES, label=torch.tensor([NO_CLASS, 2, NO_CLASS]))
    changed = (some != plain(x, TIMES)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_the_gradient_reaches_the_classes_that_were_named(net, x):
    net = drawn(TINY).requires_grad_()
    net(x, TIMES, label=torch.tensor([1, NO_CLASS, 1])).square().sum().backward()
    assert net.temb.label.weight.grad.abs().sum(0).ne(0).tolist() == [False, True, *[False] * 3]


def test_a_network_with_classes_compiles_to_one_graph(x):
    small = {"channel_mult": (1,), "attention_resolutions": (), "mid_attention": False}
    net = drawn(replace(TINY, **small))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, TIMES, label=LABELS), net(x, TIMES, label=LABELS))


@torch.no_grad()
def test_a_learned_variance_comes_after_the_mean(net, x):
    both = drawn(replace(TINY, out_channels=4))
    state = both.state_dict()
    for key in ("conv_out.weight", "conv_out.bias"):
        state[key] = state[key][:2]
    net = TINY.build().eval()
    net.load_state_dict(state)
    out = both(x, TIMES, label=LABELS)
    assert both.shape == net.shape == (2, 8, 8) and out.shape == (3, 4, 8, 8)
    torch.testing.assert_close(out[:, :2], net(x, TIMES, label=LABELS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 4])
def test_a_number_of_heads_is_a_width_that_grows_with_the_level(x, heads):
    """The level of 4 x 4 pixels and the middle have 16 channels."""
    by_number = drawn(replace(TINY, heads=heads))
    by_width = drawn(replace(TINY, head_channels=16 // heads))
    assert torch.equal(by_number(x, TIMES, label=LABELS), by_width(x, TIMES, label=LABELS))
    everywhere = replace(TINY, heads=heads, attention_resolutions=(8, 4)).build()
    layers = (everywhere.down[0].attn[0], everywhere.mid.attn_1)
    assert {layer.heads for layer in layers} == {heads}


def test_cosines_come_first_where_they_are_asked_for():
    t = torch.tensor([0.5, 700.0])
    sines, cosines = TINY.embed(t).chunk(2, 1)
    assert torch.equal(replace(TINY, cosine_first=True).embed(t), torch.cat([cosines, sines], 1))


@torch.no_grad()
def test_the_time_may_be_told_by_more_numbers_than_there_are_channels(x):
    wide = replace(TINY, embed_channels=16, conditions=("h",))
    assert torch.equal(wide.embed(TIMES), sinusoids(TIMES, 16))
    net = drawn(wide)
    assert net.temb.dense[0].in_features == net.temb.conditions["h"].in_features == 16
    assert net(x, TIMES, h=TIMES, label=LABELS).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"out_channels": 3},
            r"out_channels must be in_channels \(2\), or twice as many .*, not 3",
        ),
        ({"classes": -1}, "classes must be at least 0, not -1"),
        ({"heads": 3}, r"channels \(16\) must be a multiple of heads \(3\)"),
        ({"heads": 2, "head_channels": 4}, r"give heads \(2\) or head_channels \(4\), not both"),
        ({"embed_channels": 7}, "embed_channels must be even and 4 or more, not 7"),
    ],
)
def test_an_impossible_configuration_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=f"^UNetConfig: .*{message}$"):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({}, r"takes the conditions label, not \(none\)"),
        ({"y": LABELS}, "takes the conditions label, not y"),
        ({"label": LABELS, "h": TIMES}, "takes the conditions label, not label, h"),
        ({"label": LABELS.float()}, r"label is torch.float32; accepted is torch.int64"),
        ({"label": LABELS.int()}, r"label is torch.int32; accepted is torch.int64"),
        ({"label": LABELS[:2]}, r"label is \[2\] for 3 images; accepted is \[3\]"),
        ({"label": LABELS[:, None]}, r"label is \[3, 1\] for 3 images; accepted is \[3\]"),
        ({"label": LABELS[0]}, r"label is \[\] for 3 images; accepted is \[3\]"),
        ({"label": 3}, r"label is 3; accepted is a tensor \[3\], one row for each image"),
        ({"label": [3, 0, 4]}, r"label is \[3, 0, 4\]; accepted is a tensor \[3\]"),
    ],
    ids=["none", "y", "more", "float", "int32", "two", "column", "0d", "number", "list"],
)
def test_wrong_labels_are_one_clear_error(net, x, cond, message):
    with pytest.raises(ValueError, match=f"^UNet: {message}"):
        net(x, TIMES, **cond)
