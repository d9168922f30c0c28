"""Every UNet2DModel that people train, against diffusers with random weights."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch

import ds
from ds.diffusion.predictions import Eps, LearnedVariance
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
    "classes": {"num_class_embeds": 5},
    "classes with a learned variance": {"num_class_embeds": 5, "out_channels": 6},
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


def inputs(net):
    """Noise, times and conditions for our network, and the conditions as diffusers takes them."""
    x = torch.randn(3, *net.shape, generator=torch.Generator().manual_seed(7))
    label = torch.tensor([4, 0, 2])
    told = ({"label": label}, {"class_labels": label}) if net.config.classes else ({}, {})
    return x, torch.tensor([999, 0, 370]), *told


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_that_people_train_computes_what_diffusers_does(pair, name):
    theirs, ours = pair(name)
    x, t, cond, labels = inputs(ours)
    expected = theirs(x, t, **labels).sample
    assert distance(ours(x, t, **cond), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_what_people_train_runs_fused(pair, name):
    _, ours = pair(name)
    x, _, cond, _ = inputs(ours)
    t, wide = torch.full((3,), 999), copy.deepcopy(ours).double()
    exact = wide(x.double(), t, **cond)
    for rewrites in (None, Rewrites()):
        engine = Engine(wide, [999], rewrites=rewrites)
        assert distance(engine(x.double(), t, **cond), exact) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "diffusers' defaults",
        "heads of 4",
        "no attention",
        "other groups in the middle",
        "learned variance",
        "classes with a learned variance",
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
    x, t, _, labels = inputs(ours)
    with torch.no_grad():
        expected = theirs(x, t, **labels).sample
        assert distance(again(x, t, **labels).sample, expected) < 1e-5


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


def test_a_learned_variance_is_kept_and_the_mean_is_what_it_predicts(tmp_path):
    theirs = saved({"out_channels": 6, "sample_size": 8}, tmp_path)
    teacher = ds.load_teacher(tmp_path)
    assert teacher.denoiser.prediction == LearnedVariance(Eps())
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 500
    with torch.no_grad():
        eps, expected = teacher.denoiser(x, t).eps, theirs(x, t).sample[:, :3]
    assert distance(eps, expected) < 1e-5


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


def test_classes_that_are_told_in_another_way_are_refused(tmp_path):
    for kind in ("timestep", "identity"):
        saved({"class_embed_type": kind}, tmp_path / kind)
        with pytest.raises(ValueError, match=f"class_embed_type is '{kind}'; accepted is null"):
            read(tmp_path / kind)


def test_a_network_of_adm_is_written_with_the_order_of_its_time(tmp_path):
    config = UNetConfig(
        image_size=8, channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8,
        attention_resolutions=(4,), norm_eps=1e-5, open_frequencies=True, cosine_first=True,
        heads=2, classes=5, out_channels=6, mid_attention=False, scale_shift=True,
        resnet_down=(0,), resnet_up=(1,),
    )  # fmt: skip
    net = randomized(config.build()).eval()
    to_diffusers(tmp_path / "out", config, net.state_dict(), LinearBeta())
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert theirs.config.flip_sin_to_cos and theirs.config.attention_head_dim == 16
    x, t, cond, labels = inputs(net)
    with torch.no_grad():
        assert distance(theirs(x, t, **labels).sample, net(x, t, **cond)) < 1e-5


# Pipelines of consistency models.


@pytest.fixture(scope="module")
def consistency(tmp_path_factory):
    """A pipeline of a consistency model with classes, and the student that is read of it."""
    folder = tmp_path_factory.mktemp("consistency")
    unet = randomized(diffusers.UNet2DModel(**{**SMALL, "num_class_embeds": 5, **SCALE}))
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=41, sigma_max=50.0)
    pipeline = diffusers.ConsistencyModelPipeline(unet, scheduler)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, ds.load_student(folder)


def test_a_pipeline_of_a_consistency_model_is_a_student(consistency):
    _, student = consistency
    assert student.method == ds.methods.ConsistencyDistillation(
        num_levels=41, sigma_max=50.0, noise_scale=250.0, clip=True
    )
    assert student.classes == 5 and student.provenance["format"] == "diffusers"


@pytest.mark.parametrize("calls", [1, 2])
def test_a_consistency_model_draws_what_its_pipeline_does(consistency, calls, monkeypatch):
    """diffusers draws the noise of later calls after the first; both are given the same."""
    pipeline, student = consistency
    z, again = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    label = torch.tensor([4, 1, 0])
    module = "diffusers.schedulers.scheduling_consistency_models.randn_tensor"
    monkeypatch.setattr(module, lambda *args, **kwargs: again)
    times = {"timesteps": [20, 0]} if calls == 2 else {"num_inference_steps": 1}
    expected = pipeline(
        3, class_labels=label, latents=z, output_type="pt", return_dict=False, **times
    )[0]
    monkeypatch.setattr("ds.diffusion.solvers.renoise.fresh_noise", lambda *args: again)
    made = replace(student, nfe=calls).sample(z, cond={"label": label})
    assert distance(made / 2 + 0.5, expected) < 1e-5


def test_a_consistency_model_is_no_teacher(consistency, tmp_path):
    consistency[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a teacher, found a student"):
        ds.load_teacher(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    change(file, {"rho": 5.0})
    with pytest.raises(ValueError, match=r"scheduler_config.json: rho is 5.0; accepted is 7"):
        ds.load_student(tmp_path)


def test_a_learned_variance_is_drawn_by_diffusers_as_ddpm_s_own_steps(tmp_path):
    config = UNetConfig(
        image_size=8, channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4,
        attention_resolutions=(), out_channels=6,
    )  # fmt: skip
    denoiser = ds.Denoiser(config.build(), LinearBeta(), LearnedVariance(Eps()))
    to_diffusers(
        tmp_path, config, denoiser.net.state_dict(), denoiser.schedule, denoiser.prediction
    )
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    assert ds.load_teacher(tmp_path).denoiser.prediction == LearnedVariance(Eps())
