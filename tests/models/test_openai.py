"""State dicts of OpenAI's codes: improved-diffusion, guided-diffusion and consistency_models."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.diffusion.predictions import Eps, LearnedVariance, Preconditioned
from ds.diffusion.schedules import EDM, Cosine, LinearBeta, Table
from ds.diffusion.solvers import Heun
from ds.methods import ConsistencyDistillation
from ds.models.convert import adm as adm_file
from ds.models.convert.imported import Options, spelled
from ds.models.load import load
from ds.nets import UNetConfig
from ds.nets import adm as published
from tests import golden


def relative(made: torch.Tensor, expected: torch.Tensor) -> float:
    return ((made - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """The state dict of guided-diffusion, in a file whose name says nothing, and its outputs."""
    content, data = golden.teachers("adm_uncond")
    path = tmp_path_factory.mktemp("adm") / "file"
    path.write_bytes(content)
    return path, data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function from a name in openai_unets to its state dict in a file."""
    folder = tmp_path_factory.mktemp("openai")

    def write(name: str, edit=None):
        path = folder / f"{name}.pt"
        state, data = golden.openai(name)
        torch.save(edit(state) if edit else state, path)
        return path, data

    return write


@torch.no_grad()
def test_a_state_dict_of_guided_diffusion_computes_what_its_code_does(adm):
    path, data = adm
    teacher = ds.load_teacher(path, head_channels=32, attention_order="legacy")
    y = teacher.net(data["z"], data["t"])
    assert y.shape[1] == 6 and relative(y, data["y"]) < 1e-5
    assert teacher.denoiser.prediction == LearnedVariance(Eps())


@torch.no_grad()
def test_the_legacy_order_read_as_the_new_one_is_another_network(adm):
    path, data = adm
    teacher = ds.load_teacher(path, head_channels=32, attention_order="new")
    assert relative(teacher.net(data["z"], data["t"]), data["y"]) > 1e-3


OPTIONS = {
    "improved": {"rescale_timesteps": False},
    "guided": {"head_channels": 16, "attention_order": "new"},
    "guided_512": {"head_channels": 16},
    "consistency": {"head_channels": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_every_unet_of_openai_computes_what_its_code_does(written, name):
    path, data = written(name)
    teacher = ds.load_teacher(path, image_size=16, **OPTIONS[name])
    cond = {"label": data["label"]} if "label" in data else {}
    assert relative(teacher.net(data["z"], data["t"], **cond), data["y"]) < 1e-5


CASES = {  # of the state dict, an edit: what is assumed of it
    "improved": (None, Cosine(4000), {"image_size": 32, "heads": 4, "classes": 10}),
    "guided": (None, Cosine(1000), {"image_size": 64, "head_channels": 64, "out_channels": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_state_dict_does_not_tell_is_that_of_the_published_networks(written, name, caplog):
    edit, schedule, fields = CASES[name]
    teacher = ds.load_teacher(written(name, edit)[0])
    assert teacher.denoiser.schedule == schedule
    assert {field: getattr(teacher.net.config, field) for field in fields} == fields
    for words in (f"images of {fields['image_size']} pixels (image_size)", "(head_channels)"):
        assert words in caplog.text
    assert "order of q, k and v (attention_order)" in caplog.text


def test_the_128_pixel_network_has_four_heads_and_the_legacy_order(written, caplog):
    teacher = ds.load_teacher(written("guided")[0], image_size=128)
    assert teacher.net.config.heads == 4 and teacher.denoiser.schedule == LinearBeta()
    assert "the legacy order" in caplog.text and "image_size)" not in caplog.text


@torch.no_grad()
def test_the_time_of_4000_steps_is_told_in_thousandths(written, caplog):
    def without_classes(state):
        return {key: w for key, w in state.items() if key != "label_emb.weight"}

    path, data = written("improved", without_classes)
    z, t = data["z"], torch.tensor([400, 3600])
    plain = ds.load_teacher(path, rescale_timesteps=False)
    assert "told 1000 * t / steps" not in caplog.text
    scaled = ds.load_teacher(path)
    assert "told 1000 * t / steps" in caplog.text
    assert relative(scaled.net(z, t), plain.net(z, t // 4)) < 1e-4
    assert relative(scaled.net(z, t), plain.net(z, t)) > 1e-3


def test_a_scheduler_of_diffusers_says_the_schedule_of_a_state_dict(written, tmp_path):
    betas = torch.linspace(1e-3, 0.1, 50).tolist()
    fields = {"num_train_timesteps": 50, "trained_betas": betas, "clip_sample": False}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(fields))
    teacher = ds.load_teacher(written("guided")[0], scheduler=tmp_path, image_size=16)
    assert isinstance(teacher.denoiser.schedule, Table)
    assert teacher.denoiser.prediction == LearnedVariance(Eps())  # 6 channels stay 6


@torch.no_grad()
def test_labels_are_bound_to_a_teacher_of_classes(written):
    path, data = written("guided")
    teacher = ds.load_teacher(path, image_size=16, **OPTIONS["guided"])
    assert teacher.classes == 10
    x0 = teacher.denoiser.given(label=data["label"])(data["z"], 500).x0
    other = teacher.denoiser.given(label=data["label"] + 1)(data["z"], 500).x0
    assert x0.shape == data["z"].shape and relative(x0, other) > 1e-3


def of_published(config: UNetConfig, flat: bool) -> dict[str, torch.Tensor]:
    """The state dict of a published network, without numbers; `flat`: as consistency_models."""
    last = len(config.channel_mult) - 1
    code = "guided-diffusion" if config.resnet_down else "improved-diffusion"
    layout = adm_file._Layout(
        code, last + 1, config.num_res_blocks, config.attention_levels, config.scale_shift
    )
    places, found = adm_file._places(layout), {}
    with torch.device("meta"):
        own = config.build().state_dict()
    for name, w in own.items():
        (key,), _ = spelled(name, w.shape, places, adm_file.PARTS)
        place, _, end = key.rpartition(".")
        if place.endswith((".k", ".v")):
            continue
        if place.endswith(".q"):
            key, w = f"{place[:-1]}qkv.{end}", torch.cat([w] * 3)
            w = w[..., 0] if w.dim() == 4 and not flat else w
        found[key] = w.T if name == "temb.label.weight" else w
    return found


PUBLISHED = {
    "guided-diffusion, 64": (published.adm_imagenet64(classes=1000, out_channels=6), "new"),
    "guided-diffusion, 128": (published.adm_imagenet128(classes=1000), "legacy"),
    "guided-diffusion, 256": (published.adm_imagenet256(classes=1000), "legacy"),
    "guided-diffusion, 256, no classes": (published.adm_imagenet256(classes=0), "legacy"),
    "guided-diffusion, 512": (published.adm_imagenet512(classes=1000), "legacy"),
    "consistency_models, 64": (published.adm_imagenet64(classes=1000), "new"),
    "consistency_models, 256": (published.adm_lsun(scale_shift=False, out_channels=None), "new"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_needs_no_option(name):
    """Its configuration, from the shapes alone, is that of its authors' flags."""
    config, order = PUBLISHED[name]
    flat = name.startswith("consistency")
    found, where = of_published(config, flat), Path(name)
    layout = adm_file._layout(found, where)
    read, _ = adm_file._config(found, layout, Options(), where)
    assert read == replace(config, dropout=0.0)
    assert adm_file._order(layout, read) == order and layout.code == name.split(",")[0]


NESTED = {
    "with its average": lambda s, ema: {"model": s, "ema": ema, "step": 4},
    "in DataParallel, with its average": lambda s, ema: {
        "state_dict": {f"module.{k}": w for k, w in s.items()}, "ema": ema,
    },
    "of another code": lambda s, ema: {
        "state_dict": {f"model.diffusion_model.{k}": w for k, w in ema.items()}
    },
}  # fmt: skip


@pytest.mark.parametrize("form", NESTED)
def test_the_average_of_an_adm_network_is_found_where_trainers_put_it(tmp_path, form):
    state, _ = golden.openai("guided")
    torch.save(NESTED[form](state, {k: w + 1 for k, w in state.items()}), tmp_path / "w.pt")
    net = ds.load_teacher(tmp_path / "w.pt", image_size=16, **OPTIONS["guided"]).net
    assert torch.equal(net.conv_in.bias, state["input_blocks.0.0.bias"] + 1)


# Consistency models.


def test_a_file_of_consistency_models_is_a_teacher_or_a_student_as_it_is_asked_for(written, caplog):
    caplog.set_level("INFO", "ds")
    path, _ = written("consistency")
    teacher = ds.load_teacher(path, head_channels=16)
    assert "look alike" not in caplog.text and "looks the same" in caplog.text
    assert teacher.denoiser.prediction == Preconditioned(0.5, 250.0)
    assert (teacher.denoiser.schedule, teacher.solver, teacher.nfe) == (EDM(), Heun(), 79)
    student = ds.load_student(path, head_channels=16)
    assert student.method == ConsistencyDistillation(num_levels=40, noise_scale=250.0, clip=True)
    assert load(path, head_channels=16).kind == "teacher"
    assert 'pass kind="student", or convert with --kind student' in caplog.text
    assert load(path, kind="student", head_channels=16).kind == "student"


@torch.no_grad()
def test_a_consistency_model_draws_as_openai_s_code_does(written):
    """f(x, sigma) with the weights of Song et al. 2023, appendix C, is the sample of one call."""
    path, data = written("consistency", lambda s: s | {"out.2.weight": 8 * s["out.2.weight"]})
    student = ds.load_student(path, image_size=16, head_channels=16)
    z, sigma = data["z"], 80.0
    skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
    out = (sigma - 0.002) * 0.5 / (sigma**2 + 0.25) ** 0.5
    told = torch.full((2,), 1000 * math.log(sigma) / 4)
    x = sigma * z
    f = skip * x + out * student.net(x / (sigma**2 + 0.25) ** 0.5, told)
    assert relative(student.sample(z), f.clamp(-1, 1)) < 1e-5
    assert relative(f.clamp(-1, 1), f) > 1e-3  # clipping shows


REFUSED = {
    "a scheduler for noise levels": ("consistency", None, {"scheduler": "."}, "leave scheduler"),
    "an order that is none": ("guided", None, {"attention_order": "old"}, "order must be"),
    "heads that do not fit": ("guided", None, {"head_channels": 48}, r"head_channels \(48"),
    "no channels in a head": ("guided", None, {"head_channels": 0}, "head_channels must be"),
    "an odd image size": ("guided", None, {"image_size": 15}, "must be a multiple of 2"),
    "a variant": ("guided", None, {"variant": "fp16"}, "variant='fp16' has no meaning here"),
    "a classifier": (
        "guided", lambda s: {k: w for k, w in s.items() if "output" not in k}, {},
        "0 output_blocks .* a classifier is read by ds.load_classifier",
    ),
    "an upsampler": (
        "guided", lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, {},
        "upsamplers are not read",
    ),
    "no attention and no size": (
        "guided", lambda s: {k: w for k, w in s.items() if ".1.qkv" not in k}, {},
        "does not tell the size of its images; pass image_size",
    ),
    "a block less": (
        "guided", lambda s: {k: w for k, w in s.items() if "output_blocks.3." not in k}, {},
        "it has 3 output_blocks",
    ),
    "a weight less": (
        "guided", lambda s: {k: w for k, w in s.items() if k != "out.0.bias"}, {},
        "the weight out.0.bias .* is missing",
    ),
    "a weight too many": ("guided", lambda s: s | {"a.b": torch.zeros(2)}, {}, r"no weight a.b"),
    "half a projection": (
        "guided", lambda s: s | {"middle_block.1.qkv.weight": torch.zeros(100, 64, 1)}, {},
        r"middle_block.1.qkv.weight has the shape \[100, 64, 1",
    ),
    "not a number": (
        "guided", lambda s: s | {"middle_block.1.qkv.bias": torch.full((192,), torch.nan)}, {},
        "middle_block.1.qkv.bias is not finite",
    ),
    "integers": ("guided", lambda s: s | {"out.2.bias": torch.zeros(6).int()}, {}, "torch.int32"),
    "no such kind": ("guided", None, {"kind": "critic"}, "kind must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_state_dict_that_is_no_network_of_openai_s_is_refused_in_one_line(
    written, tmp_path, kind
):
    name, edit, options, message = REFUSED[kind]
    options = {k: tmp_path if v == "." else v for k, v in options.items()}
    (tmp_path / "scheduler_config.json").write_text("{}")
    path, _ = written(name, edit)
    with pytest.raises(ValueError, match=rf"\A{path}: [^\n]*{message}[^\n]*\Z"):
        load(path, **{"attention_order": "new", "head_channels": 16, **options})


def test_convert_takes_what_a_state_dict_does_not_tell(adm, tmp_path, capsys):
    options = ["--head-channels", "32", "--attention-order", "legacy", "--image-size", "32"]
    assert main(["convert", str(adm[0]), str(tmp_path / "out"), *options]) == 0
    config = ds.load_teacher(tmp_path / "out").net.config
    assert (config.image_size, config.head_channels) == (32, 32)
    again = ["convert", str(tmp_path / "out"), str(tmp_path / "next"), "--head-channels", "16"]
    assert main(again) == 2
    assert "--head-channels has no effect" in capsys.readouterr().err


def test_convert_makes_a_student_of_a_consistency_model(written, tmp_path, capsys):
    path, options = written("consistency")[0], ["--kind", "student", "--head-channels", "16"]
    assert main(["convert", str(path), str(tmp_path / "out"), *options]) == 0
    assert ds.load_student(tmp_path / "out").method.clip


def test_convert_takes_how_the_time_is_told(written, tmp_path, capsys):
    path = written("improved")[0]
    for word, scale in (("True", 0.25), ("False", 1.0)):
        out = tmp_path / word
        assert main(["convert", str(path), str(out), "--rescale-timesteps", word]) == 0
        assert ds.load_teacher(out).net.config.frequencies[0] == scale
