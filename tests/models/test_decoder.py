"""Latents: what decodes them goes with the model, and draws what diffusers draws."""

import copy
import json
import logging
import pickle
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file

import ds
from ds.cli.__main__ import main
from ds.methods import DenoisingStudent
from ds.models import pretrained
from ds.models.execution import Execution
from ds.models.images import to_uint8
from ds.models.load import load
from ds.models.model import Model
from ds.pairs.sources import Images
from ds.training.config import TrainConfig

BLOCKS = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
TIMES = (800, 500, 200, 10)


def unet(channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    ).eval()  # fmt: skip


def vq() -> VQModel:
    return VQModel(**BLOCKS, scaling_factor=0.5, num_vq_embeddings=32).eval()


def kl(**more) -> AutoencoderKL:
    return AutoencoderKL(**BLOCKS, latent_channels=4, **more).eval()


MAKE = {
    "vqvae": vq,
    "vae": kl,
    "vae with a shift": lambda: kl(scaling_factor=0.36, shift_factor=0.12),
    "vae with means": lambda: kl(latents_mean=[0.1, -1, 0, 2], latents_std=[1.0, 2, 3, 0.5]),
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Return pipelines with random weights, and the directories that diffusers writes of them."""
    made = {}
    for name, make in MAKE.items():
        torch.manual_seed(0)
        autoencoder, folder = make(), tmp_path_factory.mktemp("pipeline")
        scheduler = DDIMScheduler(clip_sample=False)
        pipe = LDMPipeline(autoencoder, unet(autoencoder.config.latent_channels), scheduler)
        pipe.save_pretrained(folder)
        if name != "vqvae":  # where pipelines of an AutoencoderKL keep it
            (folder / "vqvae").rename(folder / "vae")
            index = json.loads((folder / "model_index.json").read_text())
            index["vae"] = index.pop("vqvae")
            (folder / "model_index.json").write_text(json.dumps(index))
        made[name] = pipe, folder
    return made


@pytest.fixture(scope="module")
def folder(pipelines):
    return pipelines["vqvae"][1]


@pytest.fixture(scope="module")
def teacher(folder):
    return ds.load_teacher(folder, grid=TIMES)


def unscaled(z, config):
    """Return latents as diffusers' pipelines hand them to the autoencoder."""
    z = z / config.scaling_factor
    if config.get("latents_mean"):
        mean, std = (torch.tensor(config[f"latents_{m}"]).view(4, 1, 1) for m in ("mean", "std"))
        return z * std + mean
    return z + (config.get("shift_factor") or 0)


@torch.no_grad()
def drawn(pipe, z):
    """Draw as LDMPipeline does, on our times."""
    scheduler, x = DDIMScheduler(clip_sample=False), z
    for t, s in zip(TIMES, (*TIMES[1:], None), strict=True):
        out = pipe.unet(x, t).sample
        a, b = (1 if i is None else scheduler.alphas_cumprod[i] for i in (t, s))
        x0 = (x - (1 - a) ** 0.5 * out) / a**0.5
        x = b**0.5 * x0 + (1 - b) ** 0.5 * out
    return pipe.vqvae.decode(unscaled(x, pipe.vqvae.config)).sample


@pytest.mark.parametrize("name", MAKE)
def test_a_latent_teacher_draws_the_pictures_that_diffusers_draws(pipelines, name):
    pipe, folder = pipelines[name]
    ours = ds.load_teacher(folder, grid=TIMES)
    z = ds.noise(3, range(3), ours.shape)
    found, expected = ours.decoded(ours.sample(z)), drawn(pipe, z)
    assert found.shape == expected.shape == (3, *ours.image_shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    images = ds.Sampler(ours, batch_size=2)(seed=3, indices=range(3))
    assert (images.int() - to_uint8(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("clip", [False, True])
def test_a_latent_teacher_draws_what_its_pipeline_draws(pipelines, clip, tmp_path):
    """On the pipeline's own times, with latents clipped on the way or not."""
    pipe, _ = pipelines["vqvae"]
    pipe = LDMPipeline(pipe.vqvae, pipe.unet, DDIMScheduler(clip_sample=clip))
    pipe.save_pretrained(tmp_path / "p")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        batch_size=2, num_inference_steps=4, generator=torch.manual_seed(0), output_type="np"
    ).images
    z = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))
    ours = ds.load_teacher(tmp_path / "p", grid=(750, 500, 250, 0))
    found = (ours.decoded(ours.sample(z)) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(found - theirs).max() < 1e-4


def test_three_channels_of_latents_are_no_picture(teacher):
    assert teacher.shape == (3, 8, 8) and not teacher.makes_pictures
    assert teacher.image_shape == (3, 16, 16)


def test_a_teacher_keeps_its_decoder_whatever_is_made_of_it(teacher):
    grid = teacher.grid
    for made in (
        teacher.using(copy.deepcopy(teacher.net)),
        teacher.engine(2),
        teacher.compile(),
        replace(teacher, grid=grid[:2]),
        ds.Sampler(teacher, batch_size=2).model,
    ):
        assert made.decoder is teacher.decoder
    images = ds.Sampler(teacher, batch_size=2)(indices=range(3))
    again = pickle.loads(pickle.dumps(ds.Sampler(teacher, batch_size=2)))(indices=range(3))
    assert torch.equal(images, again)


def models(teacher):
    return teacher, ds.Student(teacher.net, DenoisingStudent(), decoder=teacher.decoder)


@pytest.mark.parametrize("which", [0, 1], ids=["teacher", "student"])
def test_a_directory_of_ours_holds_the_decoder(teacher, which, tmp_path):
    before: Model = models(teacher)[which]
    before.save_pretrained(tmp_path / "m")
    after = load(tmp_path / "m")
    x = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))
    assert torch.equal(after.decoded(x), before.decoded(x))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Latents of shape [3, 8, 8], decoded to images of 16 x 16 pixels, 3 channels" in card
    theirs = VQModel.from_pretrained(tmp_path / "m" / "decoder")
    with torch.no_grad():
        assert torch.equal(theirs.decode(x / 0.5).sample, before.decoded(x))
    after.save_pretrained(tmp_path / "m", force=True)
    replace(after, decoder=None).save_pretrained(tmp_path / "m", force=True)
    assert not list((tmp_path / "m" / "decoder").glob("*")) and load(tmp_path / "m").decoder is None


def test_decoding_fits_the_memory_or_is_refused(teacher, monkeypatch):
    monkeypatch.setattr("ds.system.cost.free_memory", lambda device: 5e4)
    sampler = ds.Sampler(teacher, batch_size=2, execution=Execution())
    with pytest.raises(ValueError, match=r"decoding 2 at a time needs .* of memory"):
        sampler(indices=range(2))


@pytest.mark.parametrize("lost", [["model_index.json"], ["model_index.json", "scheduler"]])
@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_a_decoder_is_found_where_only_some_folders_were_copied(pipelines, name, lost, tmp_path):
    shutil.copytree(pipelines[name][1], tmp_path / "p", ignore=lambda *_: lost)
    for path in (tmp_path / "p", tmp_path / "p" / "unet"):
        assert ds.load_teacher(path).image_shape == (3, 16, 16)


CONFIGS = {
    "of another kind": ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
    "of other latents": ({"latent_channels": 5}, r"has the shape|reads latents \[5, H, W\]"),
    "that draws RGBA": ({"out_channels": 4}, "has the shape"),
    "that cannot be": ({"block_out_channels": "wide"}, "diffusers builds no VQModel from it"),
    "far too large": ({"block_out_channels": [10**6, 10**6]}, "has the shape"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_decoder_that_does_not_fit_is_named_in_one_line(folder, case, tmp_path):
    change, message = CONFIGS[case]
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p" / "vqvae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as found:
        ds.load_teacher(tmp_path / "p")
    assert "vqvae" in str(found.value) and "\n" not in str(found.value)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


DAMAGE = {
    "weights with a flipped bit": (flip, "diffusion_pytorch_model.safetensors"),
    "weights that are gone": (lambda f: f.unlink(), "diffusion_pytorch_model.safetensors"),
    "a configuration changed": (lambda f: f.write_text("{}"), "config.json"),
    "a configuration that is gone": (lambda f: f.unlink(), "config.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_decoder_of_ours_is_named_in_one_line(teacher, case, tmp_path):
    damage, name = DAMAGE[case]
    teacher.save_pretrained(tmp_path / "m")
    damage(tmp_path / "m" / "decoder" / name)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/m/decoder/{name}: (its|is)"):
        load(tmp_path / "m")


def test_a_folder_of_somebody_s_called_decoder_is_left_alone(teacher, tmp_path):
    replace(teacher, decoder=None).save_pretrained(tmp_path / "m", run="a")
    (tmp_path / "m" / "decoder").mkdir()
    (tmp_path / "m" / "decoder" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=r"holds decoder/config\.json, which is not ours"):
        teacher.save_pretrained(tmp_path / "m", force=True)
    pretrained.annotate(tmp_path / "m", {"run": "a"}, teacher.card, {"protocol": {}})
    replace(teacher, decoder=None).save_pretrained(tmp_path / "m", run="a")
    with pytest.raises(ValueError, match=r"config\.json: another process has written it"):
        teacher.save_pretrained(tmp_path / "m", run="a")
    assert (tmp_path / "m" / "decoder" / "config.json").read_text() == "mine"


def test_figures_of_a_latent_model_leave_its_decoder(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "m")
    pretrained.annotate(tmp_path / "m", {"kid": "3"}, teacher.card, {"protocol": {}})
    assert load(tmp_path / "m").decoder and load(tmp_path / "m").provenance == {"kid": "3"}


def test_decoding_names_the_package_that_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match=r"pip install .*\[latents\]"):
        ds.load_teacher(folder)


def test_a_scaling_that_a_file_does_not_give_is_said(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p" / "vqvae" / "config.json"
    fields = json.loads(file.read_text())
    del fields["scaling_factor"]
    file.write_text(json.dumps(fields))
    ds.load_teacher(tmp_path / "p")
    assert "gives no scaling_factor, so 0.18215 is taken" in caplog.text


def test_old_names_of_attention_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    file = tmp_path / "p" / "vqvae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    ):
        weights = {name.replace(f".{new}.", f".{old}."): w for name, w in weights.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, file)
    x = torch.ones(1, 3, 8, 8)
    assert torch.equal(
        ds.load_teacher(tmp_path / "p").decoded(x), ds.load_teacher(folder).decoded(x)
    )


@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_a_latent_teacher_goes_to_diffusers_and_back_whole(pipelines, name, tmp_path):
    assert main(["convert", str(pipelines[name][1]), str(tmp_path / "d"), "--to", "diffusers"]) == 0
    pipe = LDMPipeline.from_pretrained(tmp_path / "d")
    ours = ds.load_teacher(tmp_path / "d", grid=TIMES)
    x = ds.noise(0, range(2), ours.shape)
    torch.testing.assert_close(ours.decoded(ours.sample(x)), drawn(pipe, x), rtol=0, atol=1e-4)
    args = ["convert", str(pipelines[name][1]), str(tmp_path / "d"), "--to", "diffusers", "--force"]
    assert main(args) == 0


def test_a_decoder_of_other_channels_names_its_folder(pipelines, tmp_path):
    shutil.copytree(pipelines["vqvae"][1], tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "vqvae")
    shutil.copytree(pipelines["vae"][1] / "vae", tmp_path / "p" / "vqvae")
    index = tmp_path / "p" / "model_index.json"
    index.write_text(index.read_text().replace("VQModel", "AutoencoderKL"))
    with pytest.raises(ValueError, match=r"vqvae/config\.json: the decoder reads latents \[4, "):
        ds.load_teacher(tmp_path / "p")


def test_a_latent_pipeline_becomes_a_student_that_draws_pictures(folder, tmp_path, caplog):
    """From a stranger's pipeline to figures, with nothing said of latents on the way."""
    t, store, out = str(folder), str(tmp_path / "store"), tmp_path / "student"
    np.save(tmp_path / "real.npy", np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), "u1"))
    judge = ["--reference", str(tmp_path / "real.npy"), "--extractor", "pixels", "--count", "16"]
    few = ["--pairs.count", "64", "--held-out", "16", "--solve.steps", "2"]
    with caplog.at_level(logging.INFO, "ds"):
        assert main(["pairs", "digits", "--teacher", t, "--out", store, *few]) == 0
    assert "samples [3, 8, 8] are no pictures, kept as float32" in caplog.text
    pairs = ds.PairStore(store)
    assert pairs.manifest.quantizer == "float32" and pairs.targets(range(80)).abs().max() > 1
    train = ["--train.epochs", "1", "--train.batch-size", "32", "--runtime.evaluate-every", "2"]
    train += [f"--judge.{word[2:]}" if word.startswith("--") else word for word in judge]
    args = ["distill", "digits", "--teacher", t, "--store", store, "--out", str(out)]
    assert main([*args, *few, *train]) == 0
    with Image.open(next((tmp_path / "student-run" / "samples").iterdir())) as preview:
        assert preview.mode == "RGB" and preview.size[0] % (8 * 17 + 1) == 0, "decoded"
    assert main(["sample", str(out), "--indices", "0-4", "--out", str(tmp_path / "a.npy")]) == 0
    assert np.load(tmp_path / "a.npy").shape == (5, 16, 16, 3)
    assert main(["evaluate", str(out), *judge, "--store", store, "--held-out", "16"]) == 0
    result, student = json.loads((out / "metrics.json").read_text()), ds.load_student(out)
    about = {"kind": "VQModel", "sha256": student.decoder.fingerprint()}
    assert result["pair_rms"] > 0 and result["protocol"]["decoder"] == about


def test_a_teacher_of_latents_is_not_trained_on_pictures(teacher, tmp_path):
    """Their shapes are the same where an autoencoder has 3 channels of latents."""
    pictures = Images(torch.zeros(8, 8, 8, 3, dtype=torch.uint8))
    options = {"out": tmp_path / "run", "config": TrainConfig(batch_size=4)}
    with pytest.raises(ValueError, match="makes latents, and the rows to train on are pictures"):
        ds.Trainer(ds.methods.Denoising(), teacher, pictures, pictures, **options)
    latents = Images(torch.zeros(8, 8, 8, 3))
    ds.Trainer(ds.methods.Denoising(), teacher, latents, latents, **options)


def test_an_export_of_a_latent_student_says_that_it_writes_latents(teacher, monkeypatch, caplog):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: 1 / 0)  # after it is said
    with pytest.raises(ZeroDivisionError):
        ds.export.to_program(models(teacher)[1], "unwritten.pt2")
    assert "returns latents [3, 8, 8]; decode them" in caplog.text
