"""Weights in the forms in which they lie about: containers, prefixes, variants, shards, halves."""

import argparse
import datetime
import json
import logging
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ds
from ds.diffusion.schedules import LinearBeta, Table
from ds.models.convert import read, to_diffusers
from ds.models.load import load
from ds.nets import UNetConfig

SIZE = 8
NET = UNetConfig(
    image_size=SIZE, in_channels=1, channels=32, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(),
)  # fmt: skip
STEM = "diffusion_pytorch_model"
KEY = "down.0.block.0.conv1.weight"


def state(value: float) -> dict[str, torch.Tensor]:
    """Return a state dict that is known by its value."""
    return {name: torch.full_like(w, value) for name, w in NET.build().state_dict().items()}


BASE = state(0.5)
EMA = {name: w + 1 for name, w in BASE.items()}


def put(prefix: str, weights: dict = BASE) -> dict:
    return {prefix + name: w for name, w in weights.items()}


def value(found) -> float:
    return float(found.weights["conv_in.bias"][0])


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(4.0)}},
             "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}  # fmt: skip
BETAS = LinearBeta(50, 1e-3, 0.1).betas().float()
TABLES = {"betas": BETAS, "alphas_cumprod": (1 - BETAS).cumprod(0), "posterior_variance": BETAS}

# What is saved, and the value of the network that is meant: 0.5, or 1.5 for an average.
FORMS = {
    "a state dict": (BASE, 0.5),
    "an ordered one with its version": (OrderedDict(BASE), 0.5),
    "of DataParallel": (put("module."), 0.5),
    "compiled": (put("_orig_mod."), 0.5),
    "compiled in DDP": (put("module._orig_mod."), 0.5),
    "DDP in compiled": (put("_orig_mod.module."), 0.5),
    "compiled block by block": (
        {k.replace("block.0.", "block.0._orig_mod."): w for k, w in BASE.items()}, 0.5,
    ),
    "a model's net": (put("model.net."), 0.5),
    "a unet": (put("unet."), 0.5),
    "beside numbers": ({**BASE, "epoch": 3, "lr": 0.1, "best": None, "name": "run"}, 0.5),
    "beside numbers of NumPy": ({**BASE, "step": np.int64(4), "loss": np.float32(0.1)}, 0.5),
    "in a container": ({"model": BASE, "epoch": 3, "loss": np.float64(0.1)}, 0.5),
    "beside arrays": ({"model": BASE, "losses": np.arange(5.0), "rng": np.zeros(2, "u8")}, 0.5),
    "beside options, paths and dates": (
        {"model": BASE, "args": argparse.Namespace(lr=0.1), "out": Path("runs/a"),
         "at": datetime.datetime(2024, 1, 1), "torch": torch.__version__}, 0.5,
    ),
    "with the optimizer": ({"state_dict": BASE, "optimizer": OPTIMIZER}, 0.5),
    "with an average": ({"model": BASE, "ema": EMA, "step": 4}, 1.5),
    "with an average of other words": ({"model": BASE, "model_ema": put("module.", EMA)}, 1.5),
    "an average in an average": ({"net": BASE, "ema": {"decay": 0.999, "shadow": EMA}}, 1.5),
    "with an average that has no names": (
        {"model": BASE, "ema": {"decay": 0.99, "shadow_params": [*EMA.values()]}}, 0.5,
    ),
    "an average beside the model": (
        {**put("online_model."), **put("ema_model.", EMA), "step": torch.tensor([4])}, 1.5,
    ),
    "an average of torch": ({"n_averaged": torch.tensor(7), **put("module.", EMA)}, 1.5),
    "the list of DDIM with NumPy": ([BASE, OPTIMIZER, 3, np.int64(400), EMA], 1.5),
    "of Lightning": (
        {"state_dict": put("model."), "epoch": 3, "global_step": 400, "loops": {"fit": {}},
         "pytorch-lightning_version": "2.4.0", "callbacks": {"ModelCheckpoint": {"best": None}},
         "optimizer_states": [OPTIMIZER], "lr_schedulers": [], "hyper_parameters": {"lr": 1e-4}},
        0.5,
    ),
    "of Lightning, compiled, with its average": (
        {"state_dict": {**put("net._orig_mod."), **put("ema.module.", EMA)}}, 1.5,
    ),
    "of latent diffusion's code": (
        {"state_dict": {
            **TABLES, **put("model.diffusion_model."), "model_ema.decay": torch.tensor(0.99),
            **{f"model_ema.diffusion_model{k.replace('.', '')}": w for k, w in EMA.items()},
        }}, 1.5,
    ),
    "with the tables of its schedule": ({**put("denoise_fn."), **TABLES}, 0.5),
    "half precision": ({k: w.half() for k, w in BASE.items()}, 0.5),
    "bfloat16": ({k: w.bfloat16() for k, w in BASE.items()}, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_the_forms_in_which_they_lie_about(tmp_path, form):
    saved, expected = FORMS[form]
    torch.save(saved, tmp_path / "w.pt")
    found = read(tmp_path / "w.pt", image_size=SIZE)
    assert value(found) == expected and found.config == NET
    assert all(w.dtype == torch.float32 for w in found.weights.values())


SAID = {
    "with an average": "the average is read, ema, and not model",
    "the list of DDIM with NumPy": "the average is read, EMA, and not model",
    "with an average that has no names": "not read are the tensors of ema.shadow_params",
    "half precision": "its float16 weights are read as float32",
    "bfloat16": "its bfloat16 weights are read as float32",
}


@pytest.mark.parametrize("form", SAID)
def test_what_is_chosen_of_a_file_is_said(tmp_path, form, caplog):
    torch.save(FORMS[form][0], tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "ds"):
        load(tmp_path / "w.pt", image_size=SIZE)
    assert f"w.pt: {SAID[form]}" in caplog.text


def test_betas_beside_the_weights_are_the_schedule(tmp_path):
    torch.save({**put("denoise_fn."), **TABLES}, tmp_path / "w.pt")
    found = read(tmp_path / "w.pt", image_size=SIZE)
    assert isinstance(found.schedule, Table) and found.schedule.num_steps == 50
    assert torch.equal(found.schedule.betas().float(), BETAS)
    usual = {**put("denoise_fn."), "betas": LinearBeta().betas().float()}
    torch.save(usual, tmp_path / "w.pt")
    assert read(tmp_path / "w.pt", image_size=SIZE).schedule == LinearBeta()


class Bomb:
    def __init__(self, call, target):
        self.call, self.target = call, target

    def __reduce__(self):
        return self.call, (self.target,)


VAE = {"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3), "quant_conv.weight": torch.zeros(4)}
REFUSED = {
    "two networks": ({"a": BASE, "b": EMA}, "holds several networks, a, b"),
    "two averages": ({"ema_0": BASE, "ema": BASE, "m.ema": EMA}, "several networks"),
    "a vae beside it": ({"unet": BASE, "vae": VAE}, r"holds vae\.decoder.*half a model"),
    "a vae's signs beside it": ({"unet": BASE, "first": VAE}, r"quant_conv.*half a model"),
    "a text encoder beside it": (
        {**put("unet."), "text_encoder.embed": torch.zeros(3)}, "text_encoder.*half a model",
    ),
    "another network in the same dict": (
        {**put("net."), "loss.weight": torch.zeros(3, 3)}, r"loss.weight \[3, 3\] beside",
    ),
    "another network alone": (
        {"model": {"patch_embed.weight": torch.zeros(3)}}, r"not a U-Net.*patch_embed",
    ),
    "a weight twice": (
        {**BASE, f"_orig_mod.{KEY}": BASE[KEY]}, f"{KEY} twice",
    ),
    "an average without names": (
        {"decay": 0.99, "shadow_params": [*BASE.values()]}, "of shadow_params have no names",
    ),
    "an array for a weight": ({**BASE, KEY: np.zeros((32, 32))}, f"'{KEY}' of the type Inert"),
    "a weight too many under a prefix": (
        {**put("module."), "module.a.weight": torch.zeros(2)}, r"no weight a.weight \[2\]",
    ),
    "a weight too few under a prefix": (
        {k: w for k, w in put("module.").items() if KEY not in k}, f"{KEY} .* is missing",
    ),
    "a class of a trainer": ({"model": BASE, "cfg": Bomb(os.mkdir, "x")}, r"asks for \w+.mkdir"),
    "an array that would act": (
        {"model": BASE, "a": Bomb(np.fromfile, "x")}, r"nothing in it was run .*fromfile",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_weights_that_are_not_one_network_are_refused_in_one_line(tmp_path, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved, message = REFUSED[form]
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"\A[^\n]*w\.pt: [^\n]*{message}[^\n]*\Z"):
        read(tmp_path / "w.pt", image_size=SIZE)
    assert not (tmp_path / "x").exists()


def test_a_file_that_holds_itself_is_refused(tmp_path):
    saved: dict = {"a": {}}
    saved["a"]["b"] = saved
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: holds 'a'"):
        read(tmp_path / "w.pt")


def test_an_image_size_that_is_a_guess_is_said_with_the_option(tmp_path, caplog):
    config = UNetConfig(
        image_size=128, channels=32, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=1,
        attention_resolutions=(8,),
    )  # fmt: skip
    torch.save(config.build().state_dict(), tmp_path / "w.pt")
    assert load(tmp_path / "w.pt").shape == (3, 256, 256)
    assert "images of 256 pixels" in caplog.text and "--image-size" in caplog.text
    caplog.clear()
    assert load(tmp_path / "w.pt", image_size=128).shape == (3, 128, 128)
    assert "256 pixels" not in caplog.text


# Directories of diffusers.


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "p"
    to_diffusers(folder, NET, BASE, LinearBeta(500, 1e-4, 0.03), "v")
    return folder


@pytest.fixture
def unet(pipeline, tmp_path) -> Path:
    """The network's folder of a pipeline, which a test may change."""
    return shutil.copytree(pipeline, tmp_path / "p") / "unet"


def theirs(unet: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(unet / f"{STEM}.safetensors")


def rename(unet: Path, name: str) -> None:
    (unet / f"{STEM}.safetensors").rename(unet / name)


def shards(unet: Path, kind: str = "safetensors", variant: str = "", edit=None) -> Path:
    """Write the weights in two shards and their index, as diffusers does."""
    weights = theirs(unet)
    (unet / f"{STEM}.safetensors").unlink()
    dot = f".{variant}" if variant else ""
    names = [f"{STEM}{dot}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    keys = sorted(weights)
    parts = [dict.fromkeys(keys[::2], names[0]), dict.fromkeys(keys[1::2], names[1])]
    for name, part in zip(names, parts, strict=True):
        content = {key: weights[key] for key in part}
        save_file(content, unet / name) if kind == "safetensors" else torch.save(
            content, unet / name
        )
    index = {"metadata": {"total_size": 1}, "weight_map": parts[0] | parts[1]}
    if edit:
        edit(index["weight_map"], unet)
    file = unet / f"{STEM}.{kind}.index{dot}.json"
    file.write_text(json.dumps(index))
    return file


LAYOUTS = {
    "a variant alone": lambda u: rename(u, f"{STEM}.fp16.safetensors"),
    "a pickled variant alone": lambda u: (
        torch.save(theirs(u), u / f"{STEM}.non_ema.bin"),
        (u / f"{STEM}.safetensors").unlink(),
    ),
    "a full file beside variants": lambda u: (
        torch.save({"no": 1}, u / f"{STEM}.non_ema.bin"),
        torch.save({"no": 1}, u / f"{STEM}.fp16.bin"),
    ),
    "safetensors beside a pickle": lambda u: torch.save({"no": 1}, u / f"{STEM}.bin"),
    "shards": shards,
    "pickled shards": lambda u: shards(u, "bin"),
    "shards of a variant": lambda u: shards(u, variant="fp16"),
    "names of a compiled network": lambda u: save_file(
        {f"_orig_mod.{k}": w for k, w in theirs(u).items()}, u / f"{STEM}.safetensors"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_diffusers_are_read_in_every_layout(unet, layout):
    LAYOUTS[layout](unet)
    found = read(unet.parent)
    assert value(found) == 0.5 and found.prediction == "v"


def test_a_variant_is_picked_by_name(unet, caplog):
    double = {k: 2 * w for k, w in theirs(unet).items()}
    save_file(double, unet / f"{STEM}.non_ema.safetensors")
    assert value(read(unet)) == 0.5
    assert value(read(unet, variant="non_ema")) == 1
    with pytest.raises(ValueError, match=r"no weights of the variant 'fp16'; .* non_ema"):
        read(unet, variant="fp16")
    (unet / f"{STEM}.safetensors").unlink()
    with caplog.at_level(logging.INFO, "ds"):
        load(unet)
    assert "those of the variant non_ema, all there is" in caplog.text


def test_of_several_variants_none_is_picked(unet):
    rename(unet, f"{STEM}.fp16.safetensors")
    shutil.copy(unet / f"{STEM}.fp16.safetensors", unet / f"{STEM}.ema.safetensors")
    with pytest.raises(ValueError, match=r"variants ema, fp16, and no full .* variant='ema'"):
        read(unet.parent)


def outside(weight_map, unet):
    (unet.parent / "out.safetensors").write_bytes((unet / "config.json").read_bytes())
    weight_map["conv_in.bias"] = "../out.safetensors"


def twice(weight_map, unet):
    first, second = sorted(set(weight_map.values()))
    moved = next(key for key, name in weight_map.items() if name == first)
    weight_map[moved] = second


BROKEN_SHARDS = {
    "a shard that is missing": (
        lambda m, u: (u / f"{STEM}-00002-of-00002.safetensors").unlink(),
        "00002-of-00002.safetensors is listed and is not there",
    ),
    "a shard that is not listed": (
        lambda m, u: shutil.copy(
            u / f"{STEM}-00002-of-00002.safetensors", u / f"{STEM}-00003-of-00003.safetensors"
        ),
        "00003-of-00003.safetensors is there and is not listed",
    ),
    "a path outside": (outside, r"conv_in.bias is in '\.\./out.safetensors', no file"),
    "an absolute path": (lambda m, u: m.update(a="/etc/passwd"), "no file of this folder"),
    "a path of Windows": (lambda m, u: m.update(a="..\\a"), "no file of this folder"),
    "no name": (lambda m, u: m.update(a=3), "the weight a is in 3"),
    "a weight in another shard": (twice, r"(lacks|holds) the weight .*against"),
    "a weight that is nowhere": (
        lambda m, u: m.update(a=f"{STEM}-00001-of-00002.safetensors"), "lacks the weight a",
    ),
    "a list": (lambda m, u: m.clear(), "is there and is not listed|weights are missing|is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_SHARDS)
def test_shards_that_do_not_fit_their_index_are_one_line(unet, kind):
    edit, message = BROKEN_SHARDS[kind]
    shards(unet, edit=edit)
    with pytest.raises(ValueError, match=rf"\A{unet}[^\n]*({message})[^\n]*\Z"):
        read(unet.parent)


def test_a_file_of_diffusers_uses_the_configuration_beside_it(unet):
    for name in (f"{STEM}.safetensors", "ema.pt"):
        torch.save({"ema": theirs(unet)}, unet / "ema.pt")
        found = read(unet / name)
        assert (found.prediction, found.config) == ("v", NET)
    (unet / "config.json").unlink()
    with pytest.raises(ValueError, match=r"need their config\.json"):
        read(unet / "ema.pt")


def test_a_shard_or_an_index_that_is_given_alone(unet):
    index = shards(unet)
    assert value(read(index)) == 0.5
    with pytest.raises(ValueError, match=f"one of several shards; give their folder, {unet}"):
        read(unet / f"{STEM}-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"not a checkpoint; give its folder, {unet};"):
        read(unet / "config.json")


def test_a_file_of_ours_is_its_directory(tmp_path):
    ds.Student(NET.build(), ds.methods.DenoisingStudent(t=7), nfe=1).save_pretrained(tmp_path / "s")
    for name in ("model.safetensors", "config.json"):
        assert ds.load_student(tmp_path / "s" / name).method.t == 7
