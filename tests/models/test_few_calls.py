"""Students and flows as stock pipelines of diffusers draw them, on the same noise."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import ds
from ds.cli.__main__ import main
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import Velocity
from ds.diffusion.schedules import EDM, Linear
from ds.diffusion.solvers import Heun
from ds.methods import (
    AbstractMethod,
    ConsistencyDistillation,
    CRectifiedFlow,
    DenoisingStudent,
    DiscreteMeanFlow,
    MeanFlow,
    MixFlow,
    RectifiedFlow,
    Shortcut,
)
from ds.models.convert.diffusers import calls, scheduler
from ds.models.decoder import Decoder
from ds.nets import SongConfig, UNetConfig
from ds.nets.potential import Potential
from ds.system.staging import write_json
from tests.nets.peers import randomized

diffusers = pytest.importorskip("diffusers")

SMALL = {
    "image_size": 8,
    "in_channels": 1,
    "channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "norm_groups": 8,
}
LOW = {"frequencies": (6.0, 0.5)}
FLOW, TABLE = ("DDPMPipeline", scheduler.FLOW), ("DDIMPipeline", "DDIMScheduler")


@dataclass(frozen=True)
class Shorter(AbstractMethod):
    """Take even steps, told how long each is under another name."""

    feeds: ClassVar = "images"

    def init(self, teacher):
        return nn.ModuleDict()

    def loss(self, modules, batch, progress):
        return batch.x0.sum()

    def times(self, nfe):
        return tuple((nfe - i) / nfe for i in range(nfe))

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        for t in self.times(nfe):
            level = torch.full((len(z),), float(nfe)).log2()
            z = z - net(z, torch.full((len(z),), t), level=level) / nfe
        return z


def student(method, nfe=1, **fields):
    net = randomized(UNetConfig(**SMALL, **fields).build()).eval()
    net.requires_grad_(False)
    for name in ("temb.dense.0.weight", "temb.dense.1.weight", "conv_out.weight"):
        net.get_parameter(name).mul_(3)  # so that the time tells
    for name in net.config.numbers:
        net.get_parameter(f"temb.conditions.{name}.weight").mul_(3)
    return ds.Student(net, method, nfe)


def flow(nfe, time_scale=999.0, kind: Any = RectifiedFlow, **fields):
    net = student(None, **fields).net
    return kind(nfe=nfe, time_scale=time_scale).result(net)


# What draws, and the pipeline and the scheduler that then draw it.
MODELS = {
    "Denoising Student, noise minus output": (student(DenoisingStudent(t=999)), FLOW),
    "Denoising Student of 800 steps": (student(DenoisingStudent(t=800)), FLOW),
    "Denoising Student of a v prediction": (
        student(DenoisingStudent(t=999, residual=False, gain=-1.0)),
        TABLE,
    ),
    "Denoising Student of an EDM teacher": (
        student(DenoisingStudent(t=1.0955, residual=False, gain=0.5)),
        TABLE,
    ),
    "Denoising Student with a gain": (student(DenoisingStudent(t=999, gain=0.5)), FLOW),
    "rectified flow, 1 call": (flow(1), FLOW),
    "rectified flow, 6 calls": (flow(6), FLOW),
    "rectified flow, times from 0 to 1": (flow(4, 1.0, **LOW), FLOW),
    "MeanFlow, 1 call": (student(MeanFlow(), 1, **LOW, conditions=("h",)), FLOW),
    "MeanFlow, 4 calls": (student(MeanFlow(), 4, **LOW, conditions=("h",)), FLOW),
    "rectified flow, 2 distilled steps": (
        flow(2, kind=partial(RectifiedFlow, feeds="pairs", reflow=0, distil=True)),
        FLOW,
    ),
    "MixFlow, 4 calls": (flow(4, kind=MixFlow), FLOW),
    "shortcut, 1 call": (student(Shortcut(), 1, conditions=("level",)), FLOW),
    "shortcut, 4 calls": (student(Shortcut(), 4, conditions=("level",)), FLOW),
    "discrete MeanFlow, 2 calls": (
        student(DiscreteMeanFlow(), 2, **LOW, conditions=("h",)),
        FLOW,
    ),
    "a method of one's own": (student(Shorter(), 2, **LOW, conditions=("level",)), FLOW),
}


@pytest.mark.parametrize("name", MODELS)
def test_stock_diffusers_draws_what_the_model_draws(name, tmp_path):
    model, kinds = MODELS[name]
    calls.write(tmp_path / "pipeline", model)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert kinds == (type(pipeline).__name__, type(pipeline.scheduler).__name__)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = model.sample(noise)
    generator = torch.Generator().manual_seed(5)
    images = pipeline(2, generator, num_inference_steps=model.nfe, output_type="np").images
    ours = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (ours - torch.from_numpy(images)).abs().max() < 2e-6
    # Without the clamp; and the flow-map scheduler, which no stock pipeline of a UNet2DModel takes.
    steps = [pipeline.scheduler]
    if kinds == FLOW:
        count = pipeline.scheduler.config.num_train_timesteps
        steps.append(diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=count))
    for step in steps:
        assert (by_hand(pipeline.unet, step, noise, model.nfe) - expected).abs().max() < 5e-6
    if kinds == FLOW:  # the control: another number of steps is another function
        off = by_hand(pipeline.unet, steps[1], noise, model.nfe + 1) - expected
        assert off.abs().max() > 1e-3


@torch.no_grad()
def by_hand(unet, steps, noise, n, **told):
    x = noise.clone()
    steps.set_timesteps(n)
    for t in steps.timesteps:
        x = steps.step(unet(x, t, **told).sample, t, x).prev_sample
    return x


def test_a_student_with_classes_is_told_them_by_its_unet_alone(tmp_path, caplog):
    model, label = student(MeanFlow(), 2, **LOW, conditions=("h",), classes=3), torch.tensor([2, 0])
    with caplog.at_level(logging.INFO):
        calls.write(tmp_path / "pipeline", model)
    assert "give class_labels to its unet" in caplog.text
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    found = by_hand(pipeline.unet, pipeline.scheduler, noise, 2, class_labels=label)
    assert (found - model.sample(noise, cond={"label": label})).abs().max() < 5e-6


def test_one_step_of_diffusers_is_the_noise_minus_the_network_to_the_bit(tmp_path):
    calls.write(tmp_path / "pipeline", MODELS["Denoising Student, noise minus output"][0])
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = noise - pipeline.unet(noise, 999).sample
    assert torch.equal(by_hand(pipeline.unet, pipeline.scheduler, noise, 1), expected)


@pytest.mark.parametrize("name", ["MeanFlow, 1 call", "rectified flow, 6 calls"])
def test_a_model_is_converted_for_four_calls_on_the_command_line(name, tmp_path, capsys, caplog):
    MODELS[name][0].save_pretrained(tmp_path / "ours")
    command = ["convert", str(tmp_path / "ours"), str(tmp_path / "out"), "--to", "diffusers"]
    with caplog.at_level(logging.INFO):
        assert main([*command, "--nfe", "4"]) == 0
    assert "DDPMPipeline.from_pretrained" in caplog.text
    assert "(num_inference_steps=4)" in caplog.text
    assert main([*command, "--nfe", "2", "--force"]) == 0


def test_a_dry_run_tells_that_no_pipeline_takes_a_student_s_steps(tmp_path, capsys):
    net = student(None).net
    ds.Student(net, ConsistencyDistillation()).save_pretrained(tmp_path / "other")
    command = ["convert", str(tmp_path / "other"), str(tmp_path / "new"), "--to", "diffusers"]
    assert main([*command, "--dry-run"]) == 2
    assert "no pipeline of diffusers takes this student's steps" in capsys.readouterr().err


def test_an_exported_flow_is_read_back_as_the_same_teacher(tmp_path):
    model = flow(4)
    calls.write(tmp_path / "pipeline", model)
    again = ds.load_teacher(tmp_path / "pipeline")
    assert (again.denoiser.schedule, again.denoiser.prediction) == (Linear(), Velocity(999.0))
    assert again.grid == pytest.approx(model.grid)
    noise = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(again.sample(noise), model.sample(noise))


@pytest.mark.parametrize("fields", [{}, {"shift": 3.0}, {"shift_terminal": 0.3}], ids=str)
def test_a_flow_matching_scheduler_gives_its_own_times(fields, tmp_path):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
    theirs.save_pretrained(tmp_path)
    found = scheduler.read(tmp_path / scheduler.FILE)
    assert found.grid and len(found.grid) == 50
    theirs.set_timesteps(50)
    scaled = [found.prediction.time_scale * t for t in found.grid]
    assert scaled == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("use_dynamic_shifting", True), ("shift", 0), ("invert_sigmas", True)]
)
def test_a_flow_matching_scheduler_of_other_steps_is_refused(field, value, tmp_path):
    write_json(tmp_path / scheduler.FILE, {"_class_name": scheduler.FLOW, field: value})
    with pytest.raises(ValueError, match=f"{field} is {value}; accepted is"):
        scheduler.read(tmp_path / scheduler.FILE)


def refused():
    """Return models that no pipeline draws, and what is said of each."""
    net = student(None).net
    edm = Denoiser(net, EDM(), "preconditioned")
    heun = Denoiser(net, Linear(), Velocity(999.0))
    vae = diffusers.AutoencoderKL(latent_channels=1, block_out_channels=(8,), norm_num_groups=2)
    folder = Path("decoder")
    vae.save_pretrained(folder)
    latents = ds.Student(net, DenoisingStudent(), decoder=Decoder.read(folder))
    song = SongConfig(
        image_size=8,
        in_channels=1,
        channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
    ).build()
    told = student(DenoisingStudent(), conditions=("guidance",))
    teacher = ds.Teacher(edm, Heun(), ds.grids.karras(3, EDM()))
    converted = RectifiedFlow(feeds="pairs", converted=True).on(teacher).result(net)
    return {
        "consistency": (ds.Student(net, ConsistencyDistillation()), "this student's steps"),
        "EDM": (teacher, "this teacher's steps"),
        "converted": (converted, "this teacher's steps"),
        "Heun": (ds.Teacher(heun, Heun(), (1.0, 0.5)), "this teacher's steps"),
        "uneven": (ds.Teacher(heun, ds.solvers.DDIM(), (1.0, 0.3)), "this teacher's steps"),
        "latents": (latents, "decodes latents, takes no FlowMatchEulerDiscreteScheduler"),
        "song": (ds.Student(song, DenoisingStudent()), "no class for a SongUNet"),
        "guidance": (told, "is told a guidance scale"),
        "potential": (CRectifiedFlow().result(Potential(net, "quadratic")), "no class for a Pot"),
        "context": (student(MeanFlow(), conditions=("h", "context")), "is told an image"),
        "many calls": (
            student(MeanFlow(), 40, **LOW, conditions=("h",)),
            "cannot be told the times of 40",
        ),
    }


def test_what_no_pipeline_draws_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, said in refused().values():
        with pytest.raises(ValueError, match=said) as error:
            calls.write("out", model)
        assert "\n" not in str(error.value) and str(error.value).startswith("out: ")
    assert not (tmp_path / "out").exists()
