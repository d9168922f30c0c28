"""Every UNet2DModel that people train, against diffusers with random weights."""

import copy
import functools
import json

import pytest
import torch

from ds.diffusion.schedules import LinearBeta
from ds.engine import Engine, Rewrites
from ds.models.convert import read, to_diffusers
from ds.models.convert.diffusers import network
from ds.nets import UNetConfig
from ds.nets.embedding import sinusoids
from tests.nets.peers import change, randomized

diffusers = pytest.importorskip("diffusers")
get_timestep_embedding = pytest.importorskip("diffusers.models.embeddings").get_timestep_embedding
EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel

# diffusers' own defaults, which a file of its tutorials has, but for the widths.
SMALL = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def blocks(down, up=None):
    """Block types from letters, the largest images first: a attention, r resnet, - neither."""
    names = {"-": "{}Block2D", "a": "Attn{}Block2D", "r": "Resnet{}sampleBlock2D"}
    return {
        "down_block_types": [names[letter].format("Down") for letter in down],
        "up_block_types": [names[letter].format("Up") for letter in reversed(up or down)],
    }


RESNET = {"downsample_type": "resnet", "upsample_type": "resnet"}
SCALE = {"resnet_time_scale_shift": "scale_shift"}
UNETS = {
    "diffusers' defaults": {},
    "DDPM's": {
        "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0,
        "attention_head_dim": None, "norm_eps": 1e-6,
    },
    "freq_shift 1": {"freq_shift": 1},
    "sines first": {"flip_sin_to_cos": False},
    "padding on the right and below": {"downsample_padding": 0},
    "one head": {"attention_head_dim": None},
    "heads of 4": {"attention_head_dim": 4},
    "one head at one level, two at another": {"attention_head_dim": 16, **blocks("aa")},
    "one head by its width": {"attention_head_dim": 32},
    "no attention": {"add_attention": False, **blocks("--")},
    "no attention in the middle": {"add_attention": False},
    "attention in the middle alone": blocks("--"),
    "attention everywhere": blocks("aa"),
    "other groups in the middle": {"attn_norm_num_groups": 4},
    "learned variance": {"out_channels": 6},
    "grey": {"in_channels": 1, "out_channels": 1},
    "grey with a learned variance": {"in_channels": 1, "out_channels": 2},
    "latents": {"in_channels": 4, "out_channels": 4},
    "widths that are no multiples": {"block_out_channels": [16, 24, 32], **blocks("-aa")},
    "widths of a third": {"block_out_channels": [24, 32]},
    "a narrower level": {"block_out_channels": [32, 16]},
    "three blocks a level": {"layers_per_block": 3},
    "swish": {"act_fn": "swish"},
    "dropout": {"dropout": 0.1},
    "a wide time embedding": {"time_embedding_dim": 48},
    "non-square": {"sample_size": [6, 10]},
    "14 x 10": {"sample_size": [14, 10]},
    "28": {"sample_size": 28, "block_out_channels": [16, 16, 32], **blocks("--a")},
    "7, one level": {"sample_size": 7, "block_out_channels": [16], **blocks("a")},
    "5 x 9, one level": {"sample_size": [5, 9], "block_out_channels": [16], **blocks("a")},
    "a square of two numbers": {"sample_size": [8, 8]},
    "the tutorial's six levels": {
        "sample_size": 32, "layers_per_block": 2, "block_out_channels": [8, 8, 16, 16, 24, 24],
        **blocks("----a-"),
    },
    "scale-shift": {**SCALE, "attn_norm_num_groups": 8},
    "scale-shift, no norm in the middle": SCALE,
    "scale-shift, no attention in the middle": {**SCALE, "add_attention": False},
    "resnet blocks": blocks("rr"),
    "resnet blocks on the way up": {"block_out_channels": [16, 16, 32], **blocks("---", "-r-")},
    "attention resampled by resnets": {**RESNET, **blocks("aa")},
    "a downsample_type without attention": {**RESNET, **blocks("--")},
    "an upsample_type": {"upsample_type": "resnet", **blocks("aa")},
    "guided diffusion's": {
        **SCALE, **RESNET, "block_out_channels": [16, 16, 32], **blocks("raa"),
        "out_channels": 6, "attention_head_dim": 8, "attn_norm_num_groups": 8,
    },
}  # fmt: skip


def saved(fields, path):
    """Save a UNet2DModel with random weights, and return it."""
    net = randomized(diffusers.UNet2DModel(**{**SMALL, **fields}))
    net.save_pretrained(path)
    return net


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A function from a name in UNETS to diffusers' network and ours, which no test changes."""

    @functools.cache
    def make(name):
        path = tmp_path_factory.mktemp("unet")
        theirs, found = saved(UNETS[name], path), read(path)
        ours = found.config.build().eval().requires_grad_(False)
        ours.load_state_dict(found.weights)
        return theirs, ours

    return make


def inputs(shape):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, *shape, generator=generator), torch.tensor([999, 0, 370])


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_that_people_train_computes_what_diffusers_does(pair, name):
    theirs, ours = pair(name)
    x, t = inputs(ours.shape)
    expected = theirs(x, t).sample[:, : x.shape[1]]
    assert distance(ours(x, t), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_what_people_train_runs_fused(pair, name):
    _, ours = pair(name)
    x, _ = inputs(ours.shape)
    t, wide = torch.full((3,), 999), copy.deepcopy(ours).double()
    exact = wide(x.double(), t)
    for rewrites in (None, Rewrites()):
        engine = Engine(wide, [999], rewrites=rewrites)
        assert distance(engine(x.double(), t), exact) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "diffusers' defaults",
        "heads of 4",
        "no attention",
        "other groups in the middle",
        "learned variance",
        "widths of a third",
        "a wide time embedding",
        "14 x 10",
        *list(UNETS)[list(UNETS).index("scale-shift") :],
    ],
)
def test_a_unet_goes_back_to_diffusers_and_is_read_to_the_bit(pair, tmp_path, name):
    theirs, ours = pair(name)
    to_diffusers(tmp_path / "out", ours.config, ours.state_dict(), LinearBeta())
    found = read(tmp_path / "out")
    assert found.config == ours.config
    assert all(torch.equal(found.weights[key], w) for key, w in ours.state_dict().items())
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    x, t = inputs(ours.shape)
    with torch.no_grad():
        expected = theirs(x, t).sample[:, : x.shape[1]]
        assert distance(again(x, t).sample, expected) < 1e-5


def test_the_time_of_a_long_schedule_is_told_to_the_bit():
    """A rounding in another order would be 5e-5 of a feature at the last of 4000 steps."""
    t = torch.tensor([0, 1, 999, 3999])
    expected = get_timestep_embedding(t, 24, downscale_freq_shift=0)
    assert torch.equal(sinusoids(t, 24, open_ended=True), expected)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mid_norm_groups": 0}, "mid_norm_groups 0"),
        ({"channel_mult": (2, 2)}, r"channel_mult \(2, 2\)"),
        ({"attention_resolutions": (8, 4), "channel_mult": (1, 1, 1), "resnet_down": (0,)}, "down"),
        ({"attention_resolutions": (4, 2), "channel_mult": (1, 1, 1), "resnet_up": (1,)}, "up"),
    ],
)
def test_a_network_that_no_unet2dmodel_is_is_not_written(tmp_path, fields, said):
    config = UNetConfig(
        **{"image_size": 8, "channels": 8, "norm_groups": 4, "attention_resolutions": (4,)}
        | {"channel_mult": (1, 1), "num_res_blocks": 1}
        | fields
    )
    with pytest.raises(ValueError, match=f"no UNet2DModel has .*{said}"):
        to_diffusers(tmp_path / "out", config, config.build().state_dict(), LinearBeta())


def test_a_learned_variance_is_left_out_and_that_is_said(tmp_path):
    saved({"out_channels": 6}, tmp_path)
    found = read(tmp_path)
    assert found.facts["variance"] == "learned, left out"
    assert "the variance that it learned is left out" in " ".join(found.said)


def test_a_unet_without_a_size_takes_the_one_given(tmp_path):
    saved({}, tmp_path)
    change(tmp_path / "config.json", {"sample_size": None})
    assert read(tmp_path, image_size=16).config.image_size == 16


def test_the_moving_average_of_a_training_script_is_read(tmp_path):
    """Its file has fields of the average beside those of the network."""
    theirs = randomized(diffusers.UNet2DModel(**SMALL))
    ema = EMAModel(theirs.parameters(), model_cls=diffusers.UNet2DModel, model_config=theirs.config)
    ema.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert torch.equal(found.weights["conv_in.weight"], theirs.conv_in.weight)


def test_block_types_of_2022_are_read(tmp_path):
    saved({}, tmp_path)
    expected = read(tmp_path).config
    names = {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}
    change(tmp_path / "config.json", names)
    assert read(tmp_path).config == expected


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({  # diffusers' notebook and its train_unconditional.py
            "sample_size": 128, "layers_per_block": 2,
            "block_out_channels": [128, 128, 256, 256, 512, 512], **blocks("----a-"),
            "norm_num_groups": 32,
        }, 113_673_219),
        ({}, None),  # what a file leaves out is what diffusers fills in
    ],
)  # fmt: skip
def test_the_unets_of_tutorials_have_their_count_of_weights(tmp_path, fields, parameters):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DModel", "sample_size": 64, **fields})
    )
    net = network.read(tmp_path / "config.json", None)
    with torch.device("meta"):
        ours = net.config.build()
        theirs = diffusers.UNet2DModel(**fields)
    count = sum(w.numel() for w in theirs.parameters())
    assert sum(w.numel() for w in ours.parameters()) == count
    assert parameters in (None, count)
