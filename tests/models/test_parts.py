"""Folders of diffusers: half a model is not a model, and a run's scheduler is found."""

import json
import logging
import shutil
from pathlib import Path

import pytest

import ds
from ds.cli.__main__ import main
from ds.diffusion.schedules import LinearBeta
from ds.models.convert import read, to_diffusers
from ds.models.load import load
from tests.models.test_weights import BASE, EMA, NET, STEM, value
from tests.nets.peers import change

SCHEDULE = LinearBeta(500, 1e-4, 0.03)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A pipeline, whose schedule and prediction are not the usual ones, and a second network."""
    folder = tmp_path_factory.mktemp("parts")
    to_diffusers(folder / "p", NET, BASE, SCHEDULE, "v")
    to_diffusers(folder / "ema", NET, EMA, SCHEDULE, "v")
    return folder


@pytest.fixture
def pipe(made, tmp_path) -> Path:
    return shutil.copytree(made / "p", tmp_path / "p")


@pytest.fixture
def run(made, tmp_path) -> Path:
    """What diffusers' training script leaves: a pipeline, and checkpoints with an average."""
    run = shutil.copytree(made / "p", tmp_path / "run")
    for name, source in (("unet", "p"), ("unet_ema", "ema")):
        shutil.copytree(made / source / "unet", run / "checkpoint-500" / name)
    # what EMAModel.save_pretrained adds to the fields of the network
    more = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 500,
            "power": 0.75, "update_after_step": 0, "use_ema_warmup": True}  # fmt: skip
    change(run / "checkpoint-500" / "unet_ema" / "config.json", more)
    return run


def said_of(path, caplog, **options) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "ds"):
        load(path, **options)
    return caplog.text


# Half a model is not a model.


def with_part(pipe: Path, name: str, kind: str | None, library: str | None = "diffusers") -> None:
    change(pipe / "model_index.json", {name: [library, kind]})


PARTS = {
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModel",
    "class_embedder": "ClassEmbedder",
    "prior": "PriorTransformer",
    "controlnet": "ControlNetModel",
    "movq": "VQModel",
    "transformer": "DiTTransformer2DModel",
    "unet": "UNet2DConditionModel",
    "unet_2": "UNet2DModel",
    "vae": "AutoencoderTiny",
    "vqvae": "AsymmetricAutoencoderKL",
    "safety_checker": "StableDiffusionSafetyChecker",
}
GIVEN = {
    "the pipeline": "",
    "its network": "unet",
    "a file of its network": f"unet/{STEM}.safetensors",
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", PARTS)
def test_a_pipeline_with_a_part_that_is_not_run_is_refused(pipe, name, given):
    with_part(pipe, name, PARTS[name])
    if (name, given) == ("unet", "its network") or (name == "unet" and given):
        change(pipe / "unet" / "config.json", {"_class_name": PARTS[name]})
    words = rf"\A{pipe}[^\n]*{PARTS[name]}[^\n]*\Z"
    with pytest.raises(ValueError, match=words) as error:
        read(pipe / GIVEN[given])
    assert name in str(error.value)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", ["vae", "vqvae", "text_encoder"])
def test_parts_count_without_an_index_too(pipe, name, given):
    (pipe / "model_index.json").unlink()
    shutil.rmtree(pipe / "scheduler")
    (pipe / name).mkdir()
    kind = {"vae": "AutoencoderKL", "vqvae": "VQModel"}.get(name)
    about = {"_class_name": kind} if kind else {"architectures": ["CLIPTextModel"]}
    (pipe / name / "config.json").write_text(json.dumps(about))
    if kind:
        assert read(pipe / GIVEN[given]).decoder == pipe / name
    else:
        with pytest.raises(ValueError, match=r"text_encoder/config.json: the part .*CLIPTextModel"):
            read(pipe / GIVEN[given])


def test_a_part_that_is_null_is_absent(pipe):
    with_part(pipe, "safety_checker", None, None)
    change(pipe / "model_index.json", {"requires_safety_checker": False})
    assert value(read(pipe)) == 0.5


@pytest.mark.parametrize("value", [["diffusers"], ["diffusers", 3], ["a", "b", "c"]])
def test_an_index_that_is_no_index_is_one_line(pipe, value):
    change(pipe / "model_index.json", {"vae": value})
    with pytest.raises(ValueError, match=r"index\.json: the part 'vae' is no library"):
        read(pipe)


@pytest.mark.parametrize("part", ["vae", "vqvae"])
def test_a_decoder_is_found_however_the_path_is_given_or_is_missed(pipe, part):
    with_part(pipe, part, "AutoencoderKL")
    with pytest.raises(ValueError, match=rf"{part}/config.json: is missing, and model_index"):
        read(pipe)
    (pipe / part).mkdir()
    (pipe / part / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    for given in GIVEN.values():
        assert read(pipe / given).decoder == pipe / part
    with pytest.raises(ValueError, match=f"{part}: the weights are missing"):
        load(pipe)


def test_a_decoder_is_no_teacher(pipe):
    (pipe / "unet").rename(pipe / "vqvae")
    change(pipe / "vqvae" / "config.json", {"_class_name": "VQModel"})
    with pytest.raises(ValueError, match=r"vqvae/config.json: _class_name is 'VQModel'"):
        read(pipe / "vqvae")


def test_a_scheduler_that_a_pipeline_names_and_lacks_is_one_line(pipe):
    file = (pipe / "scheduler").rename(pipe.parent / "elsewhere")
    with pytest.raises(ValueError, match=r"scheduler_config.json: is missing, .* scheduler=FILE"):
        read(pipe)
    assert read(pipe, scheduler=file).prediction == "v"


# A run's folders.

OF_A_RUN = {
    "checkpoint-500/unet_ema": 1.5,
    "checkpoint-500/unet": 0.5,
    f"checkpoint-500/unet_ema/{STEM}.safetensors": 1.5,
    "checkpoint-500": 1.5,
    "": 0.5,
}


@pytest.mark.parametrize("given", OF_A_RUN)
@pytest.mark.parametrize("index", [True, False], ids=["with an index", "before it is written"])
def test_a_checkpoint_folder_finds_its_scheduler_two_levels_up(run, given, index, caplog):
    if not index:
        (run / "model_index.json").unlink()
    found = read(run / given)
    assert (found.schedule, found.prediction, value(found)) == (SCHEDULE, "v", OF_A_RUN[given])
    said = said_of(run / given, caplog)
    assert ("its scheduler is" in said) == ("checkpoint" in given)
    assert "assumed" not in said


def test_a_relative_path_finds_its_scheduler_too(run, monkeypatch, caplog):
    monkeypatch.chdir(run / "checkpoint-500" / "unet_ema")
    assert read(".").prediction == "v" and read("../unet").prediction == "v"
    monkeypatch.chdir(run / "unet")
    assert read(".").prediction == "v" and "its scheduler" not in said_of(".", caplog)


def test_a_link_to_a_checkpoint_finds_its_scheduler_too(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "best").symlink_to(run / "checkpoint-500" / "unet_ema")
    assert read(tmp_path / "elsewhere" / "best").prediction == "v"


def test_which_of_two_networks_is_read_is_said(run, caplog):
    said = said_of(run / "checkpoint-500", caplog)
    assert "checkpoint-500: unet_ema is read; for unet give " in said
    shutil.copytree(run / "checkpoint-500" / "unet_ema", run / "unet_ema")
    assert f"unet is read; for unet_ema give {run / 'unet_ema'}" in said_of(run, caplog)
    assert value(read(run / "unet_ema")) == 1.5


def test_a_run_without_its_pipeline_names_its_checkpoints(run):
    shutil.rmtree(run / "unet")
    (run / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"no network here, .* such as checkpoint-500"):
        read(run)


def test_a_part_of_the_run_is_missed_by_its_checkpoints_too(run):
    with_part(run, "text_encoder", "CLIPTextModel")
    with pytest.raises(ValueError, match="the part text_encoder is a CLIPTextModel"):
        read(run / "checkpoint-500" / "unet_ema")


def test_a_scheduler_that_lies_about_is_not_taken(made, tmp_path):
    """Three levels up, or beside a folder that is a pipeline of its own."""
    shutil.copytree(made / "p" / "scheduler", tmp_path / "scheduler")
    shutil.copytree(made / "p" / "unet", tmp_path / "a" / "b" / "unet")
    assert read(tmp_path / "a" / "b" / "unet").prediction == "eps"
    own = shutil.copytree(made / "p", tmp_path / "c")
    shutil.rmtree(own / "scheduler")
    with pytest.raises(ValueError, match="is missing"):
        read(own / "unet")


# What is assumed.


def test_what_is_assumed_is_said_with_the_option(made, tmp_path, caplog):
    bare = shutil.copytree(made / "p" / "unet", tmp_path / "bare")
    found = read(bare)
    assert found.prediction == "eps" and found.schedule == LinearBeta() and found.assumed
    said = said_of(bare, caplog)
    assert caplog.records[-1].levelname == "WARNING"
    for words in ("assumed", "LinearBeta(num_steps=1000", "'eps'", "scheduler=", "--scheduler"):
        assert words in said
    for given in ("scheduler", "scheduler/scheduler_config.json", ""):
        told = read(bare, scheduler=made / "p" / given)
        assert (told.schedule, told.prediction, told.assumed) == (SCHEDULE, "v", ())
    with pytest.raises(ValueError, match=r"bare: no scheduler here; give a scheduler_config.json"):
        read(bare, scheduler=bare)
    with pytest.raises(ValueError, match="nowhere: no scheduler here"):
        read(bare, scheduler=tmp_path / "nowhere")


def test_convert_writes_down_the_scheduler_that_it_is_given(made, tmp_path, caplog):
    bare, out = shutil.copytree(made / "p" / "unet", tmp_path / "bare"), tmp_path / "ours"
    command = ["convert", str(bare), str(out), "--scheduler", str(made / "p" / "scheduler")]
    assert main(command) == 0
    assert "assumed" not in caplog.text
    teacher = ds.load_teacher(out)
    assert teacher.denoiser.schedule == SCHEDULE
    assert main(["convert", str(bare), str(out), "--force"]) == 0
    assert "the prediction is assumed, 'eps'" in caplog.text
    with pytest.raises(ValueError, match="tells what it needs itself; leave scheduler out"):
        load(out, scheduler=made / "p")


def test_a_variant_is_an_option_of_convert(pipe, tmp_path, capfd):
    (pipe / "unet" / f"{STEM}.safetensors").rename(pipe / "unet" / f"{STEM}.fp16.safetensors")
    command = ["convert", str(pipe), str(tmp_path / "out"), "--variant"]
    assert main([*command, "ema"]) == 2
    assert "no weights of the variant 'ema'; there are the variants fp16" in capfd.readouterr().err
    assert main([*command, "fp16"]) == 0
