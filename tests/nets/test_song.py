"""DDPM++ and NCSN++: their parts, and what they are told."""

import copy
import io
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ds.nets import SongConfig, ddpmpp, fold_attention, recompute_norms
from ds.nets.base import NO_CLASS
from ds.nets.blocks import Attention, HalvingConv, ResBlock, smoothly_doubled, smoothly_halved
from ds.system.config import from_json, to_json
from tests.nets.peers import randomized

TINY = SongConfig(
    image_size=8,
    in_channels=2,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    dropout=0.0,
    classes=5,
    augment_channels=9,
)
NCSNPP = replace(
    TINY,
    embedding="fourier",
    embed_channels=16,
    encoder="residual",
    resample_filter=(1, 3, 3, 1),
)
BOTH = pytest.mark.parametrize("config", [TINY, NCSNPP], ids=["ddpmpp", "ncsnpp"])
TIMES = torch.tensor([-1.5, 0.1, 0.9])
LABELS = torch.tensor([3, 0, 4])


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def augment():
    return torch.randn(3, 9, generator=torch.Generator().manual_seed(2))


def drawn(config, seed=0):
    return randomized(config.build(), seed)


def far(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@BOTH
def test_a_configuration_survives_the_round_trip_through_text(config):
    found = from_json(json.loads(json.dumps(to_json(config))), (SongConfig,))
    assert (
        found == config and found.build().state_dict().keys() == config.build().state_dict().keys()
    )


@torch.no_grad()
@BOTH
def test_without_an_augmentation_it_is_told_zeros(config, x, augment):
    net = drawn(config)
    plain = net(x, TIMES, label=LABELS)
    assert torch.equal(net(x, TIMES, label=LABELS, augment=torch.zeros(3, 9)), plain)
    assert far(net(x, TIMES, label=LABELS, augment=augment), plain) > 1e-3


@torch.no_grad()
def test_no_class_leaves_the_bias_of_the_labels_alone(x):
    """As the source trains it: with a row of zeros."""
    net, plain = drawn(TINY), replace(TINY, classes=0).build().eval()
    state = net.state_dict()
    bias = state["temb.label.bias"]
    layer = "temb.dense.0."  # which the bias reaches in a network without classes
    state[layer + "bias"] = state[layer + "bias"] + state[layer + "weight"] @ bias
    plain.load_state_dict({k: w for k, w in state.items() if "label" not in k})
    nobody = torch.full((3,), NO_CLASS)
    torch.testing.assert_close(net(x, TIMES, label=nobody), plain(x, TIMES), rtol=1e-4, atol=1e-5)
    assert far(net(x, TIMES, label=LABELS), plain(x, TIMES)) > 1e-3


@torch.no_grad()
def test_with_the_weights_of_a_network_without_conditions_it_is_that_network(x):
    net, told = drawn(TINY), replace(TINY, conditions=("h", "guidance")).build().eval()
    missing = told.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert missing == [f"temb.conditions.{name}.weight" for name in ("h", "guidance")]
    found = told(x, TIMES, label=LABELS, h=TIMES, guidance=TIMES)
    assert torch.equal(found, net(x, TIMES, label=LABELS))


@BOTH
def test_times_and_conditions_have_the_derivatives_of_finite_differences(config, x):
    net, x, t = drawn(replace(config, conditions=("h",))).double(), x.double(), TIMES.double()

    def out(t, h):
        return net(x, t, label=LABELS, h=h)

    h, one = t + 0.3, torch.ones_like(t)
    for along in ((one, 0 * one), (0 * one, one)):
        _, found = torch.func.jvp(out, (t, h), along)
        ahead, behind = (out(t + s * along[0], h + s * along[1]) for s in (1e-6, -1e-6))
        torch.testing.assert_close(found, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-6)
        assert found.abs().max() > 1e-3


def test_on_the_way_up_only_the_last_block_of_a_level_attends():
    net = replace(TINY, num_res_blocks=2).build()
    found = {name for name, layer in net.named_modules() if isinstance(layer, Attention)}
    assert found == {"down.1.attn.0", "down.1.attn.1", "mid.attn_1", "up.1.attn.2"}


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_the_smooth_filter_is_one_of_four_taps(size):
    """Against one convolution by the filter itself, and its transpose."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taps = torch.tensor([1, 3, 3, 1], dtype=torch.float64)
    kernel = (taps[:, None] * taps / 64).expand(3, 1, 4, 4)
    down = F.conv2d(x, kernel, stride=2, padding=1, groups=3)
    up = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=3)
    torch.testing.assert_close(smoothly_halved(x), down)
    torch.testing.assert_close(smoothly_doubled(x), up)
    layer = HalvingConv(3, 4, smoothly_halved).double()
    wide = F.conv2d(x, layer.weight, layer.bias, padding=2)
    expected = F.conv2d(wide, kernel[:1].expand(4, 1, 4, 4), stride=2, groups=4)
    torch.testing.assert_close(layer(x), expected)


def test_images_need_not_be_square(augment):
    net = drawn(replace(NCSNPP, image_size=(8, 12)))
    x = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(1))
    assert net.shape == (2, 8, 12)
    assert net(x, TIMES, label=LABELS, augment=augment).shape == x.shape


def test_a_network_compiles_to_one_graph(x, augment):
    net = drawn(replace(NCSNPP, attention_resolutions=()))
    cond = {"label": LABELS, "augment": augment}
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, TIMES, **cond), net(x, TIMES, **cond))


@torch.no_grad()
@BOTH
def test_a_copy_and_a_reading_are_the_network(config, x):
    net = drawn(config)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    read = config.build().eval()
    read.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    expected = net(x, TIMES, label=LABELS)
    for other in (copy.deepcopy(net), read):
        assert torch.equal(other(x, TIMES, label=LABELS), expected)


@torch.no_grad()
@BOTH
def test_it_runs_in_channels_last_and_returns_the_dtype_of_its_input(config, x):
    net, found = drawn(config), []

    def see(layer, args, out):
        found.append(out.is_contiguous(memory_format=torch.channels_last))

    for layer in net.modules():
        if isinstance(layer, ResBlock | Attention | HalvingConv):
            layer.register_forward_hook(see)
    expected = net(x, TIMES, label=LABELS)
    assert found and all(found)
    rounded = copy.deepcopy(net).bfloat16()(x, TIMES, label=LABELS)
    assert rounded.dtype == torch.float32 and far(rounded, expected) < 0.1
    with torch.autocast("cpu"):
        mixed = net(x, TIMES, label=LABELS)
    assert mixed.dtype == torch.float32 and 0 < far(mixed, expected) < 0.1


def test_random_frequencies_are_never_rounded():
    net = drawn(NCSNPP)
    before = net.temb.fourier.frequencies.clone()
    for other in (net.half(), net.float(), net.double().float(), copy.deepcopy(net).bfloat16()):
        found = other.temb.fourier.frequencies
        assert torch.equal(found, before) and found.dtype == torch.float32


def test_random_frequencies_are_drawn_wide_and_saved():
    torch.manual_seed(0)
    net = replace(NCSNPP, embed_channels=4096).build()
    frequencies = net.state_dict()["temb.fourier.frequencies"]
    assert abs(frequencies.std() - 16) < 1 and abs(frequencies.mean()) < 1.5


@torch.no_grad()
def test_a_fresh_network_has_edm_s_weights():
    """Uniform, by Xavier's bound, with the factors of the source."""
    torch.manual_seed(0)
    net = ddpmpp(channels=64, channel_mult=(2,), attention_resolutions=(32,)).build()
    block, attention = net.mid.block_1, net.mid.attn_1
    bound = math.sqrt(6 / (2 * 9 * 128))
    qkv = math.sqrt(0.2) * math.sqrt(6 / (128 + 3 * 128))
    for weight, most in (
        (block.conv1.weight, bound),
        (block.conv2.weight, 1e-5 * bound),
        (attention.q.weight, qkv),
        (attention.proj_out.weight, 1e-5 * math.sqrt(6 / 256)),
        (net.conv_out.weight, 1e-5 * math.sqrt(6 / (9 * (128 + 3)))),
        (net.temb.dense[0].weight, math.sqrt(6 / (64 + 256))),
    ):
        assert 0.95 * most < weight.abs().max() <= most * (1 + 1e-6)
        assert weight.std() == pytest.approx(most / math.sqrt(3), rel=0.05)
    assert not any(p.any() for name, p in net.named_parameters() if "bias" in name)


@BOTH
def test_recomputed_norms_give_the_same_gradients_to_the_bit(config, x, augment):
    gradients = []
    for recompute in (False, True):
        net = drawn(replace(config, dropout=0.3)).requires_grad_().train()
        if recompute:
            recompute_norms(net)
        torch.manual_seed(0)
        net(x, TIMES, label=LABELS, augment=augment).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
@BOTH
def test_folded_attention_is_the_same_function(config, x):
    net = drawn(config).double()
    folded = fold_attention(net)
    kinds = {type(layer).__name__ for layer in folded.modules()}
    assert "FoldedAttention" in kinds and "Attention" not in kinds
    found, expected = (n(x.double(), TIMES, label=LABELS) for n in (folded, net))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_number_that_is_no_layer_s_has_no_gradient(x, augment):
    """Every weight learns, those of the labels named and of the augmentation included."""
    net = drawn(NCSNPP).requires_grad_()
    net(x, TIMES, label=LABELS, augment=augment).square().sum().backward()
    idle = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle
    named = net.temb.label.weight.grad.abs().sum(0).ne(0)
    assert named.tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, r"image_size \(9\) must be a multiple of 2"),
        ({"channels": 0}, "channels must be even and 4 or more, not 0"),
        ({"channels": 134}, r"channels \(134\) must be .*a multiple of 32, the groups"),
        ({"channel_mult": (1, 0.25)}, r"channels \(2\) must be 4 or more"),
        ({"channel_mult": ()}, "channel_mult needs one level or more"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, not 0"),
        ({"attention_resolutions": (5,)}, "attention_resolutions holds 5"),
        ({"embedding": "random"}, "embedding must be .*positional.*fourier"),
        ({"encoder": "skip"}, "encoder must be .*standard.*residual"),
        ({"resample_filter": (1, 2, 1)}, r"must be \(1, 1\) or \(1, 3, 3, 1\), not \(1, 2, 1\)"),
        ({"embed_channels": 5}, "embed_channels must be even and 4 or more, not 5"),
        ({"dropout": 1.5}, "dropout must be below 1, not 1.5"),
        ({"frequencies": (0.5, 6.0)}, "frequencies must fall"),
        ({"classes": -1}, "classes must be at least 0, not -1"),
    ],
)
def test_an_impossible_configuration_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=f"^SongConfig: .*({message})"):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({}, r"takes the conditions label, and may take augment, not \(none\)"),
        ({"label": LABELS, "y": LABELS}, "takes the conditions label, and may take augment, not"),
        ({"label": LABELS.half()}, "label is torch.float16; accepted is torch.int64"),
        (
            {"label": LABELS, "augment": torch.zeros(3, 8)},
            r"augment is \[3, 8\] for 3 images; accepted is \[3, 9\]",
        ),
        (
            {"label": LABELS, "augment": torch.zeros(3, 9, dtype=torch.int64)},
            "augment is torch.int64; accepted is a floating dtype",
        ),
    ],
    ids=["none", "more", "half", "eight", "whole"],
)
def test_wrong_conditions_are_one_clear_error(x, cond, message):
    with pytest.raises(ValueError, match=f"^Song: {message}"):
        TINY.build()(x, TIMES, **cond)


def test_a_network_told_less_takes_less():
    plain = replace(TINY, classes=0, augment_channels=0)
    assert (plain.takes, plain.may_take) == ((), {})
    assert (TINY.takes, TINY.may_take) == (("label",), {"augment": (9,)})
