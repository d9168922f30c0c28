"""Network snapshots of EDM's code: what they compute, and what is refused."""

import math
import re

import numpy as np
import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.diffusion import grids
from ds.diffusion.predictions import Eps, LearnedVariance, Preconditioned, Score
from ds.diffusion.schedules import EDM, VP, Cosine
from ds.diffusion.solvers import Heun
from ds.models.convert import pickles
from ds.models.convert.pickles import Stub
from ds.models.load import load
from ds.nets import SongConfig, UNetConfig
from tests import golden
from tests.models.snapshots import SOURCE, Call, snapshot, written
from tests.nets.peers import randomized


def relative(made: torch.Tensor, expected: torch.Tensor) -> float:
    return ((made - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def ddpmpp(tmp_path_factory):
    """A pickle of EDM's own pickler, under a name that says nothing, and its outputs."""
    content, data = golden.teachers("edm_ddpmpp")
    path = tmp_path_factory.mktemp("edm") / "file"
    path.write_bytes(content)
    return path, data


@torch.no_grad()
def test_a_snapshot_of_edm_denoises_as_its_code_does(ddpmpp):
    path, data = ddpmpp
    teacher = ds.load_teacher(path)
    noisy = data["z"] * data["sigma"][:, None, None, None]
    assert relative(teacher.denoiser(noisy, data["sigma"]).x0, data["y"]) < 1e-5
    for i, sigma in enumerate(data["sigma"].tolist()):
        one = teacher.denoiser(noisy[i : i + 1], sigma).x0[0]
        assert relative(one, data["y"][i]) < 1e-5
    assert isinstance(teacher.net.config, SongConfig)


def test_a_snapshot_of_edm_is_sampled_as_edm_samples(ddpmpp):
    teacher = ds.load_teacher(ddpmpp[0])
    assert (teacher.denoiser.schedule, teacher.denoiser.prediction) == (EDM(), Preconditioned(0.5))
    assert (teacher.solver, teacher.grid) == (Heun(), grids.karras(18, EDM()))
    assert teacher.nfe == 35 and teacher.grid[0] == 80
    assert teacher.provenance["preconditioner"] == "EDMPrecond"


CASES = {
    "ncsnpp": (SongConfig, EDM(), Preconditioned(0.5)),
    "adm": (UNetConfig, EDM(), Preconditioned(0.5)),
    "vp": (SongConfig, VP(), Eps()),
    "ve": (SongConfig, EDM(100), Score()),
    "iddpm": (UNetConfig, Cosine(), LearnedVariance(Eps())),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_every_network_and_preconditioner_of_edm_computes_what_it_does_there(tmp_path, name):
    about, weights, data = golden.edm(name)
    (tmp_path / "net.pkl").write_bytes(written({"ema": snapshot(about, weights)}))
    denoiser = ds.load_teacher(tmp_path / "net.pkl").denoiser
    kind, schedule, prediction = CASES[name]
    assert isinstance(denoiser.net.config, kind)
    assert (denoiser.schedule, denoiser.prediction) == (schedule, prediction)
    if "label" in data:
        denoiser = denoiser.given(label=data["label"])
    for sigma in data["sigma"].tolist():
        t = schedule.time(-math.log(sigma))
        if isinstance(schedule, Cosine):
            assert abs(t - round(t)) < 1e-2  # its levels are those of the code's table
            t = round(t)
        x = data["z"] * sigma * schedule.at(t)[0]
        here = data["sigma"] == sigma
        assert relative(denoiser(x, t).x0[here], data["y"][here]) < 2e-5


def test_the_grids_keep_to_the_noise_levels_that_a_network_knows(tmp_path):
    for name, ends in {"ve": (80, 0.02), "vp": (80, 0.002), "iddpm": (80, 0.0064)}.items():
        about, weights, _ = golden.edm(name)
        (tmp_path / name).write_bytes(written(snapshot(about, weights)))  # without a dict
        teacher = ds.load_teacher(tmp_path / name)
        levels = [math.exp(-teacher.denoiser.schedule.lam(t)) for t in teacher.grid]
        assert len(levels) == 18
        assert (levels[0], levels[-1]) == pytest.approx(ends, rel=0.02)


def test_the_source_text_in_a_snapshot_is_never_looked_at(tmp_path):
    about, weights, _ = golden.edm("vp")
    content = written({"ema": snapshot(about, weights)})
    assert content.count(SOURCE.encode()) >= 1
    (tmp_path / "net.pkl").write_bytes(content)
    assert ds.load_teacher(tmp_path / "net.pkl").shape == (3, 16, 16)


def test_augmentation_of_adm_is_left_out_and_that_is_said(tmp_path, caplog):
    about, weights, _ = golden.edm("adm")
    (tmp_path / "net.pkl").write_bytes(written({"ema": snapshot(about, weights)}))
    with caplog.at_level("INFO", "ds"):
        ds.load_teacher(tmp_path / "net.pkl")
    assert "its input for augmentations" in caplog.text


def setting(**fields):
    return lambda net, w: net.state["_modules"]["model"].state["_init_kwargs"].update(fields)


def weight(key, value):
    def edit(net, weights):
        module = net.state["_modules"]["model"]
        *parts, last = key.split(".")
        for part in parts:
            module = module.state["_modules"][part]
        module.state["_parameters"][last] = value

    return edit


def inner(**fields):
    return lambda net, w: net.state["_modules"]["model"].state.update(fields)


def twice(net, weights):
    modules = net.state["_modules"]["model"].state["_modules"]
    modules["dec"] = modules["enc"]


def laughs(net, weights):
    """Modules of two times the module below, forty times over."""
    module = Stub("Part", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(40):
        both = {"_parameters": {}, "_buffers": {}, "_modules": {"a": module, "b": module}}
        module = Stub("Part", both)
    net.state["_modules"]["model"].state["_modules"]["enc"] = module


def shared(net, weights):
    """Every weight of a network is a view of one storage."""
    one = torch.zeros(1 << 15)._typed_storage()
    for module in _modules(net.state["_modules"]["model"]):
        for name, w in module.state["_parameters"].items():
            about = (0, tuple(w.shape), w.stride(), False, {})
            module.state["_parameters"][name] = Call(torch._utils._rebuild_tensor_v2, one, *about)


def _modules(module):
    return [module, *(m for part in module.state["_modules"].values() for m in _modules(part))]


def deep(depth=40):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


BIG = {"model_channels": 1 << 20, "channel_mult": [1] * 60}
HOSTILE = {
    "images of no machine": (setting(img_resolution=1 << 30), "the network has the sizes"),
    "channels of no machine": (setting(**BIG), "memory|multiple"),
    "a setting in words": (setting(num_blocks="2"), "a setting num_blocks of '2'; accepted"),
    "a setting below 0": (setting(augment_dim=-1), "a setting augment_dim of int; accepted"),
    "a setting that is true": (setting(num_blocks=True), "a setting num_blocks of bool"),
    "a setting beyond all numbers": (setting(num_blocks=10**100), "a setting num_blocks of int"),
    "a setting of 2**40 parts": (setting(channel_mult=deep()), "a setting channel_mult of list"),
    "settings that are infinite": (setting(dropout=math.inf), "a setting dropout of float"),
    "a setting that is not read": (setting(act="gelu"), "has the setting 'act', not read"),
    "a list of 10,000 levels": (setting(channel_mult=[1] * 10**4), "channel_mult of list"),
    "a long text": (setting(encoder_type="a" * 10**6), "encoder_type of 'aaaa"),
    "an encoder that is not read": (setting(encoder_type="skip"), "encoder must be"),
    "a decoder that is not read": (setting(decoder_type="skip"), "decoder_type 'skip'; accepted"),
    "no settings": (inner(_init_kwargs=None), "'SongUNet' has no _init_kwargs"),
    "a setting less": (
        lambda n, w: n.state["_modules"]["model"].state["_init_kwargs"].pop("img_resolution"),
        "lacks the setting img_resolution",
    ),
    "no modules": (inner(_modules=[]), "'SongUNet' has no _modules"),
    "a network that is a number": (
        lambda n, w: n.state["_modules"].update(model=3), "its network is int; accepted are Song",
    ),
    "another network": (
        lambda n, w: setattr(n.state["_modules"]["model"], "name", "Generator"),
        "its network is 'Generator'; accepted are SongUNet and DhariwalUNet",
    ),
    "another preconditioner": (
        lambda n, w: setattr(n, "name", "ECMPrecond"), "holds 'ECMPrecond', not a network of EDM's",
    ),
    "a path in words": (lambda n, w: n.state.update(M="1000"), "M is '1000'; accepted is a number"),
    "a path that is not finite": (lambda n, w: n.state.update(beta_d=math.nan), "beta_d"),
    "a weight that is none": (weight("map_layer0.bias", 3), "'map_layer0.bias' is a int"),
    "a weight of integers": (weight("map_layer0.bias", torch.zeros(64).int()), "torch.int32"),
    "a weight of another shape": (
        weight("map_layer0.bias", torch.zeros(65)), r"map_layer0.bias has the shape \[65\]",
    ),
    "a weight that is not a number": (
        weight("map_layer0.bias", torch.full((64,), math.nan)), "map_layer0.bias is not finite",
    ),
    "half a projection": (
        weight("enc.8x8_block0.qkv.weight", torch.zeros(95, 32, 1, 1)), r"qkv.weight has the shape",
    ),
    "a weight too many": (weight("extra", torch.zeros(2)), r"the network has no weight extra"),
    "a weight too few": (
        lambda n, w: n.state["_modules"]["model"].state["_modules"].pop("map_layer1"),
        "the weight map_layer1.weight .* is missing",
    ),
    "a module at two places": (twice, "is at two places"),
    "modules of 2**40 parts": (laughs, "is at two places"),
    "a storage that all weights share": (shared, "its weights share what is stored of them"),
    "a name that is a number": (inner(_parameters={3: torch.zeros(2)}), "has no name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_snapshot_that_is_hostile_or_broken_is_refused_in_one_line(tmp_path, kind):
    edit, message = HOSTILE[kind]
    about, weights, _ = golden.edm("vp")
    net = snapshot(about, weights)
    edit(net, weights)
    path = tmp_path / "net.pkl"
    path.write_bytes(written({"ema": net}))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 400
    assert re.search(message, text), text


NOT_A_NETWORK = {
    "a number": (3, "holds int, not a network"),
    "an empty dict": ({}, "holds dict, not a network"),
    "an average that is a dict": ({"ema": {}}, "holds dict, not a network"),
    "a loss": (Stub("EDMLoss", {"P_mean": -1.2}), "holds 'EDMLoss', not a network of EDM's code"),
    "a state dict": ({"a.weight": torch.zeros(2)}, "holds dict, not a network"),
}


@pytest.mark.parametrize("kind", NOT_A_NETWORK)
def test_a_pickle_that_holds_no_network_says_what_it_holds(tmp_path, kind):
    value, message = NOT_A_NETWORK[kind]
    (tmp_path / "net.pkl").write_bytes(written(value))
    with pytest.raises(ValueError, match=rf"\A{tmp_path / 'net.pkl'}: {message}[^\n]*\Z"):
        load(tmp_path / "net.pkl")


@pytest.mark.parametrize("option", ["image_size", "head_channels", "scheduler", "variant"])
def test_a_snapshot_tells_all_itself(ddpmpp, tmp_path, option):
    (tmp_path / "scheduler_config.json").write_text("{}")
    value = {"scheduler": tmp_path, "variant": "fp16"}.get(option, 16)
    with pytest.raises(ValueError, match=f"{option}=.* has no meaning here; accepted are no opt"):
        load(ddpmpp[0], **{option: value})


def test_numbers_of_numpy_in_a_snapshot_are_plain_numbers(tmp_path):
    path = tmp_path / "net.pkl"
    numbers = [np.float64(0.5), np.float32(0.25), np.int64(-3), np.bool_(True)]
    path.write_bytes(written(numbers))
    assert pickles.load(path) == [0.5, 0.25, -3, True]
    assert [type(n) for n in pickles.load(path)] == [float, float, int, bool]


# Out again.

SMALL = SongConfig(
    image_size=8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,),
    classes=3, augment_channels=9, embedding="fourier", embed_channels=16, encoder="residual",
    resample_filter=(1, 3, 3, 1),
)  # fmt: skip
LEARNED = UNetConfig(
    image_size=8, channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=4,
    attention_resolutions=(), classes=3, out_channels=6,
)  # fmt: skip
TEACHERS = {
    "NCSN++": (SMALL, EDM(), Preconditioned(0.5), None),
    "NCSN++, guided": (SMALL, EDM(), Preconditioned(0.5), 2.5),
    "of the score": (SMALL, EDM(100), Score(), None),
    "of steps without end": (SMALL, VP(), Eps(), None),
    "a learned variance, guided": (LEARNED, Cosine(50), LearnedVariance(Eps()), 1.5),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_of_the_family_comes_back_from_our_directory_as_it_was(tmp_path, name):
    config, schedule, prediction, scale = TEACHERS[name]
    denoiser = ds.Denoiser(randomized(config.build()).eval(), schedule, prediction)
    if scale:
        denoiser = ds.Guided(denoiser, scale)
    teacher = ds.Teacher(denoiser, Heun(), grids.karras(3, schedule))
    teacher.save_pretrained(tmp_path / "t")
    again = ds.load_teacher(tmp_path / "t")
    assert again.net.config == config and again.denoiser.guidance == denoiser.guidance
    cond, z = {"label": torch.tensor([2, 0])}, ds.noise(0, range(2), teacher.shape)
    assert torch.equal(again.sample(z, cond=cond), teacher.sample(z, cond=cond))


def test_diffusers_has_no_class_for_a_song_unet(ddpmpp, tmp_path, capsys):
    command = ["convert", str(ddpmpp[0]), str(tmp_path / "out"), "--to", "diffusers"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "diffusers has no class for a SongUNet" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_convert_makes_a_directory_of_a_snapshot(ddpmpp, tmp_path, capsys):
    assert main(["convert", str(ddpmpp[0]), str(tmp_path / "out")]) == 0
    again, teacher = ds.load_teacher(tmp_path / "out"), ds.load_teacher(ddpmpp[0])
    assert again.provenance["format"] == "edm" and again.grid == teacher.grid
    for a, b in zip(
        again.net.state_dict().values(), teacher.net.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
