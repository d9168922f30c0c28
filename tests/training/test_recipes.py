"""Recipes: the numbers that were published, and the networks that they are for."""

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.cli.verb import method_named, parse
from ds.nets import AbstractNetConfig, MLPConfig, SongConfig, UNetConfig
from ds.pairs.sources import Images
from ds.system.config import tag
from ds.training.presets import PRESETS
from ds.training.presets.recipes import RECIPES, settings
from ds.training.throughput import price_of_rows

# lr, warm-up, batch, EMA, steps, optimizer, weight decay, clipping, dropout, millions of weights
PUBLISHED = {
    "cifar10": {
        "rectified_flow": (2e-4, 5000, 128, 0.999999, 1_300_000, "adam", 0, 1, 0.15, 61.8),
        "mean_flow": (6e-4, 10_000, 1024, 0.9999, 800_000, "adam", 0, 0, 0.2, 55.9),
        "c_rectified_flow": (2e-4, 5000, 128, 0.999999, 1_300_000, "adam", 0, 1, 0.15, 61.8),
        "posterior_mean_flow": (6e-4, 10_000, 1024, 0.9995, 800_000, "adam", 0, 0, 0.2, 56.1),
        "mix_flow": (2e-4, 5000, 128, 0.9999, 500_000, "adam", 0, 0, 0.13, 55.7),
        "discrete_mean_flow": (6e-4, 1000, 1024, 0.9999, 96_000, "adam", 0, 0, 0.2, 55.9),
        "shortcut": (1e-4, 5000, 128, 0.999, 400_000, "adamw", 0.1, 0, 0.13, 55.8),
        "consistency_training": (4e-4, 0, 512, 0.9999, 800_000, "radam", 0, 0, 0, 56.4),
        "improved_consistency_training": (1e-4, 0, 1024, 0.99993, 4e5, "radam", 0, 0, 0.3, 56.4),
        "progressive_distillation": (5e-5, 0, 128, 0, 50_000, "adam", 0, 1, 0, 35.7),
        "drifting": (2e-4, 5000, 1024, 0.999, 100_000, "adamw", 0.01, 2, 0, 35.7),
    },
    "edm_cifar10": {
        "rectified_flow": (2e-4, 5000, 512, 0.9999, 800_000, "adam", 0, 0, 0.13, 55.7),
        "consistency_distillation": (4e-4, 0, 512, 0.9999, 800_000, "radam", 0, 0, 0, 55.7),
        "easy_consistency_tuning": (1e-4, 0, 128, 0.9999, 200_000, "radam", 0, 0, 0.2, 55.7),
        "simplified_consistency_model": (1e-4, 0, 512, 0.99929, 400_000, "radam", 0, 0, 0.2, 55.7),
        "regularized_consistency_model": (1e-4, 0, 512, 0.99929, 500_000, "radam", 0, 0, 0.2, 55.7),
    },
    "imagenet64": {
        "consistency_distillation": (8e-6, 0, 2048, 0.999943, 600_000, "radam", 0, 0, 0, 295.9),
        "consistency_training": (1e-4, 0, 2048, 0.999943, 800_000, "radam", 0, 0, 0, 295.9),
        "easy_consistency_tuning": (1e-3, 2000, 128, 0.9999, 200_000, "adam", 0, 0, 0, 295.9),
    },
}
ROWS = {"imagenet64": 1_281_167}


def recipe(name, preset="cifar10") -> Any:
    return settings(preset, PRESETS[preset](), method_named(name)())


def network(method) -> Any:
    """Return the network that a method, or a method in it, trains, if it names one."""
    found = [getattr(method, f.name) for f in fields(method)]
    own = [v for v in found if isinstance(v, SongConfig)]
    inner = [v for v in found if is_dataclass(v) and not isinstance(v, AbstractNetConfig)]
    return own[0] if own else network(inner[0]) if inner else None


@pytest.mark.parametrize(
    ("preset", "name"), [(p, name) for p in PUBLISHED for name in PUBLISHED[p]]
)
def test_the_published_numbers_of_a_method(preset, name):
    p = recipe(name, preset)
    first = p.method.stages()[0]
    t, rows = p.train.of(first), ROWS.get(preset, 50_000)
    rows = p.pairs.count if first.feeds == "pairs" else rows
    net = network(p.method) or p.net
    with torch.device("meta"):
        weights = sum(w.numel() for w in net.build().parameters())
    found = (
        t.lr,
        t.warmup_steps,
        t.batch_size,
        t.ema_decay,
        round(t.epochs * (rows // t.batch_size)),
        t.optimizer,
        t.weight_decay,
        t.grad_clip_norm,
        net.dropout if t.dropout is None else t.dropout,
        round(weights / 1e6, 1),
    )
    assert found == PUBLISHED[preset][name]


@pytest.mark.parametrize(
    ("family", "preset"), [("flow", "cifar10"), ("consistency", "edm_cifar10")]
)
def test_every_method_of_a_family_has_a_recipe(family, preset):
    for name in ds.methods.__all__:
        cls = getattr(ds.methods, name)
        if f".{family}." in cls.__module__:
            p = RECIPES[preset, tag(cls)](PRESETS[preset]())
            assert type(p.method) is cls
            assert p.train.betas[0] == 0.9 and p.net == PRESETS[preset]().net


def test_the_frequencies_of_ict_have_the_published_scale():
    """Those of NCSN++ have the scale 16 for log(sigma) / 4; the paper's 0.02 for the same."""
    method = recipe("improved_consistency_training").method
    told = method.denoiser(torch.nn.Identity()).c_noise(80.0)
    net = method.student
    assert (net.embedding, net.encoder) == ("fourier", "residual")
    assert 16 * told == pytest.approx(0.02 * math.log(80) / 4)


@pytest.mark.parametrize("name", ["consistency_training", "improved_consistency_training"])
def test_a_network_of_its_own_is_told_the_classes_of_its_teacher(name):
    assert network(recipe(name, "edm_cifar10_conditional").method).classes == 10
    assert network(recipe(name, "edm_cifar10").method).classes == 0


def test_mean_flow_s_network_is_told_times_as_published():
    net = recipe("mean_flow").method.student
    assert isinstance(net, SongConfig)
    assert (net.resample_filter, net.embed_channels, net.encoder) == ((1, 3, 3, 1), 256, "standard")
    assert net.frequencies[0] <= 6 and net.conditions == ("h",)  # times from 0 to 1


def test_a_reflow_after_1_rf_has_an_average_of_its_own():
    p = recipe("rectified_flow")
    first, again, last = replace(p.method, reflow=1, distil=True).stages()
    assert [p.train.of(s).ema_decay for s in (first, again, last)] == [0.999999, 0.9999, 0.9999]


def test_two_rectified_flow_pp_reflows_a_million_pairs_of_edm():
    p = recipe("rectified_flow", "edm_cifar10")
    (stage,) = p.method.stages()
    assert (stage.feeds, stage.converted, stage.two_ended) == ("pairs", True, True)
    assert (p.pairs.count, p.solve.solver, p.solve.steps) == (1_000_000, "heun", 18)


def test_only_the_preset_that_a_recipe_is_for_changes():
    assert recipe("mean_flow", "celeba").train == PRESETS["celeba"]().train
    assert recipe("denoising_student").train == PRESETS["cifar10"]().train


def test_a_recipe_is_what_the_command_line_takes_and_a_dry_run_checks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = UNetConfig(channels=4, norm_groups=2, channel_mult=(1,), attention_resolutions=()).build()
    denoiser = ds.Denoiser(net, ds.schedule.LinearBeta())
    ds.Teacher(denoiser, ds.solvers.DDIM(), (999,)).save_pretrained("teacher")
    np.save("images.npy", np.zeros((1100, 32, 32, 3), np.uint8))
    command = ["distill", "cifar10", "--method", "meanflow", "--train.batch-size", "128"]
    task: Any = parse(command[0], command[1:])
    assert task.method == recipe("mean_flow").method and task.train.lr == 6e-4
    monkeypatch.setattr("ds.cli.distill.Distill.budget", lambda self: "")  # trains for a moment
    monkeypatch.setattr("ds.nets.song.SongConfig.build", lambda self: net)
    command += ["--teacher", "teacher", "--images", "images.npy", "--dry-run"]
    assert main(command) == 0


def test_the_price_of_a_run_counts_the_network_that_learns():
    small = MLPConfig().build()
    start = ds.Teacher(ds.Denoiser(small, ds.schedule.LinearBeta()), ds.solvers.DDIM(), (999,))
    own = MLPConfig(width=256, conditions=("h",))
    rows = Images(torch.zeros(8, 2))
    config = ds.TrainConfig(batch_size=4)
    method, cpu = ds.methods.MeanFlow(student=own), torch.device("cpu")
    seconds, weights = price_of_rows(method, start, rows, config, cpu)
    assert seconds > 0 and weights == sum(w.nbytes for w in own.build().parameters())
