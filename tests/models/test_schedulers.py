"""Teachers with the schedulers that people have, against diffusers on the same noise and times."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import ds
from ds.diffusion import grids
from ds.diffusion.schedules import (
    Cosine,
    LinearBeta,
    ScaledLinear,
    Sigmoid,
    Table,
    zero_terminal_snr,
)
from ds.diffusion.solvers import DDIM, Clipped, DDIMToFirst, Heun
from ds.engine import Recurrence
from ds.models.convert.diffusers import scheduler
from ds.system.staging import write_json
from ds.training.presets import SolveConfig

diffusers = pytest.importorskip("diffusers")

EPS, X0, V = ({"prediction_type": name} for name in ("epsilon", "sample", "v_prediction"))
PLAIN = {"clip_sample": False}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE, SIGMOID = ({"beta_schedule": name} for name in ("squaredcos_cap_v2", "sigmoid"))
LEADING, TRAILING = ({"timestep_spacing": name} for name in ("leading", "trailing"))
ZERO = {"rescale_betas_zero_snr": True, **TRAILING}
BETAS = {"trained_betas": torch.linspace(1e-3, 0.1, 200).tolist(), "num_train_timesteps": 200}
# A scheduler that is saved, and the schedule and the solver that are read.
CONFIGS = {
    "DDIM as diffusers has it": ("DDIM", {}, LinearBeta(), Clipped(DDIM())),
    "no clipping": ("DDIM", PLAIN, LinearBeta(), DDIM()),
    "a wide clipping": ("DDIM", {"clip_sample_range": 3.0}, LinearBeta(), Clipped(DDIM(), 3.0)),
    "thresholding": (
        "DDIM",
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.5},
        LinearBeta(),
        Clipped(DDIM(), quantile=0.9, most=2.5),
    ),
    "thresholding at its defaults": (
        "DDPM",
        {"thresholding": True, **COSINE},
        Cosine(),
        Clipped(DDIM(), quantile=0.995),
    ),
    "set_alpha_to_one false": (
        "DDIM",
        {"set_alpha_to_one": False, **PLAIN},
        LinearBeta(),
        DDIMToFirst(),
    ),
    "clipping and set_alpha_to_one false": (
        "DDIM",
        {"set_alpha_to_one": False},
        LinearBeta(),
        Clipped(DDIMToFirst()),
    ),
    "DDPM": ("DDPM", {"variance_type": "fixed_large"}, LinearBeta(), Clipped(DDIM())),
    "DDPM, x0": ("DDPM", {**X0, **COSINE}, Cosine(), Clipped(DDIM())),
    "cosine, v": ("DDPM", {**COSINE, **V, **PLAIN}, Cosine(), DDIM()),
    "cosine, eps, clipped": ("DDPM", COSINE, Cosine(), Clipped(DDIM())),
    "sigmoid": ("DDPM", SIGMOID, Sigmoid(), Clipped(DDIM())),
    "scaled_linear, as latent diffusion": (
        "PNDM",
        {**LATENT, "steps_offset": 1, "skip_prk_steps": True},
        ScaledLinear(),
        DDIMToFirst(),
    ),
    "trained_betas": (
        "DDIM",
        {**BETAS, **V},
        Table(tuple(BETAS["trained_betas"])),
        Clipped(DDIM()),
    ),
    "trailing": ("DDIM", {**TRAILING, **V, **PLAIN}, LinearBeta(), DDIM()),
    "an offset": ("DDIM", {"steps_offset": 1}, LinearBeta(), Clipped(DDIM())),
    "zero terminal SNR, v": (
        "DDIM",
        {**ZERO, **V},
        zero_terminal_snr(LinearBeta()),
        Clipped(DDIM()),
    ),
    "zero terminal SNR, x0, scaled": (
        "DDIM",
        {**ZERO, **X0, **PLAIN, **LATENT},
        zero_terminal_snr(ScaledLinear()),
        DDIM(),
    ),
    "4000 steps": (
        "DDIM",
        {"num_train_timesteps": 4000, "beta_start": 2.5e-5, "beta_end": 0.005, **V},
        LinearBeta(4000, 2.5e-5, 0.005),
        Clipped(DDIM()),
    ),
    "50 steps": (
        "DDIM",
        {"num_train_timesteps": 50, "beta_start": 2e-3, "beta_end": 0.4},
        LinearBeta(50, 2e-3, 0.4),
        Clipped(DDIM()),
    ),
    "DPM-Solver": (
        "DPMSolverMultistep",
        {**V, **COSINE, "use_karras_sigmas": True},
        Cosine(),
        DDIM(),
    ),
    "Euler": ("EulerDiscrete", LATENT, ScaledLinear(), DDIM()),
}
every_scheduler = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A pipeline of a random network, which is calm enough that rounding does not grow."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()
    with torch.no_grad():
        for w in (net.conv_out.weight, net.conv_out.bias):
            w.mul_(0.1)
    path = tmp_path_factory.mktemp("pipe")
    net.save_pretrained(path / "unet")
    return path, net


class Same(nn.Module):
    """The network of diffusers itself, so that a difference of steps is one of solvers."""

    shape = (1, 8, 8)

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x.float(), t).sample.to(x.dtype)


def saved(pipe, kind, fields):
    """Write a scheduler beside the network; return diffusers' DDIM with the same fields."""
    theirs = getattr(diffusers, f"{kind}Scheduler")(**fields)
    theirs.save_pretrained(pipe[0] / "scheduler")
    about = dict(theirs.config)
    del about["_use_default_values"]  # for which from_config takes the defaults of DDIM
    if about["beta_schedule"] == "sigmoid":  # which DDIM does not name
        about["trained_betas"] = theirs.betas.tolist()
    return diffusers.DDIMScheduler.from_config({"clip_sample": False, **about})


def noise():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@every_scheduler
def test_a_teacher_draws_what_ddim_of_diffusers_draws_with_its_scheduler(pipe, name):
    kind, fields, schedule, solver = CONFIGS[name]
    theirs = saved(pipe, kind, fields)
    teacher = ds.load_teacher(pipe[0])
    assert teacher.solver == solver
    assert (teacher.denoiser.schedule.betas() - schedule.betas()).abs().max() < 1e-12
    theirs.set_timesteps(10)
    times = tuple(theirs.timesteps.tolist())
    about = theirs.config
    spaced = {"spacing": about.timestep_spacing}
    if about.timestep_spacing == "leading":
        spaced["offset"] = about.steps_offset
    assert grids.uniform(10, teacher.denoiser.schedule, **spaced) == times
    if about.timestep_spacing == "linspace":  # theirs steps to t - 100, whatever time comes next
        times = grids.uniform(10)
    x, net = noise(), Same(pipe[1])
    same = teacher.using(net).denoiser
    exact = copy.copy(theirs)  # diffusers in float64: index 0's sigma has 4 digits in float32
    exact.alphas_cumprod = theirs.betas.double().neg().add(1).cumprod(0)
    if not about.set_alpha_to_one:
        exact.final_alpha_cumprod = exact.alphas_cumprod[0]
    with torch.no_grad():
        for t, s in zip(times, (*times[1:], -1), strict=True):
            wide = x.double()
            step, _ = solver.step(same, wide, t, s, None)
            expected = exact.step(net(wide, t), t, wide).prev_sample
            assert (step - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
            x = theirs.step(net(x, t), t, x).prev_sample
    drawn = replace(teacher, grid=times).sample(noise())
    assert (drawn - x).abs().max() <= 1e-4


def test_a_network_that_predicts_noise_is_refused_where_no_signal_is_left(pipe):
    saved(pipe, "DDIM", ZERO)
    with pytest.raises(ValueError, match=r"alpha is 0 at the first time, t = 999, where Eps\(\)"):
        ds.load_teacher(pipe[0])
    teacher = ds.load_teacher(pipe[0], grid=grids.uniform(20))  # from 950
    assert teacher.sample(noise()).isfinite().all()


SAID = {  # a scheduler, and what is said of it
    "it clips": ("DDIM", {}, r"clipped to \[-1, 1\]; pass solver=ds.solvers.DDIM\(\) or --solve.c"),
    "it thresholds": (
        "DDIM",
        {"thresholding": True},
        "clipped to its 0.995 quantile; pass solver=",
    ),
    "its last step": ("DDIM", {"set_alpha_to_one": False}, "ends at index 0's noise"),
    "its spacing": (
        "DDIM",
        TRAILING,
        "its own grid has 50 times from 999 to 19, trailing; --solve",
    ),
    "its offset": ("DDIM", {"steps_offset": 1}, "its own grid has 50 times from 981 to 1, leading"),
    "its variance": ("DDPM", {"variance_type": "learned"}, "left out: variance_type 'learned'"),
    "its solver": (
        "DPMSolverMultistep",
        {"use_karras_sigmas": True},
        "these fields of DPMSolverMultistepScheduler are left out: .*use_karras_sigmas True",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_scheduler_says_is_followed_or_said_to_be_left_out(pipe, caplog, name):
    kind, fields, words = SAID[name]
    saved(pipe, kind, fields)
    with caplog.at_level("INFO", logger="ds"):
        ds.load_teacher(pipe[0])
    said = [r.getMessage() for r in caplog.records]
    assert sum(re.search(words, line) is not None for line in said) == 1
    assert all(line.startswith(str(pipe[0])) for line in said)


def test_a_scheduler_like_ours_leaves_nothing_to_say(pipe, caplog):
    saved(pipe, "DDIM", PLAIN)
    with caplog.at_level("INFO", logger="ds"):
        teacher = ds.load_teacher(pipe[0])
    assert not caplog.records and teacher.grid == grids.quadratic(100)


GRIDS = {  # a scheduler, and the times of its teacher
    "leading": ({}, grids.quadratic(100)),
    "cosine": (COSINE, grids.quadratic(100, Cosine())),
    "an offset": ({"steps_offset": 1}, tuple(range(981, 0, -20))),
    "trailing": (TRAILING, tuple(range(999, 0, -20))),
    "zero terminal SNR": ({**ZERO, **LEADING, **V}, tuple(range(999, 0, -20))),
    "few steps and an offset": (
        {"num_train_timesteps": 50, "beta_end": 0.4, "steps_offset": 1},
        tuple(range(49, 0, -1)),
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_teacher_visits_the_times_that_its_scheduler_names(pipe, name):
    fields, grid = GRIDS[name]
    saved(pipe, "DDIM", fields)
    assert ds.load_teacher(pipe[0]).grid == grid


UNSAID = {"RePaintScheduler": "leading"}  # the spacing of a class that has no field for it


def test_a_field_that_is_left_out_has_the_default_of_its_class(pipe):
    file = pipe[0] / "scheduler" / scheduler.FILE
    file.parent.mkdir(exist_ok=True)
    for kind in scheduler._CLASSES:
        file.write_text(json.dumps({"_class_name": kind}))
        found = scheduler.read(file)
        try:
            theirs = getattr(diffusers, kind)()
        except ImportError:  # DPMSolverSDEScheduler needs a package of its own
            assert kind == "DPMSolverSDEScheduler"
            continue
        about = {"timestep_spacing": UNSAID.get(kind), **theirs.config}
        assert (found.schedule.betas() - theirs.betas.double()).abs().max() < 1e-7, kind
        clips = isinstance(found.solver, Clipped)
        assert clips == about.get("clip_sample", False), kind
        inner = found.solver.solver if clips else found.solver
        assert (inner == DDIM()) == about.get("set_alpha_to_one", True), kind
        assert (found.grid is None) == (about["timestep_spacing"] == "leading"), kind


EXPORTS = [
    LinearBeta(500, 2e-4, 0.03),
    ScaledLinear(),
    Cosine(100),
    Table((0.1, 0.2, 0.3, 0.4)),
    Table(zero_terminal_snr(ScaledLinear(20)).values),
]


@pytest.mark.parametrize("schedule", EXPORTS, ids=lambda s: f"{s!s:.30}")
@pytest.mark.parametrize(
    "solver",
    [DDIM(), Clipped(DDIM(), 2.0), Clipped(DDIMToFirst(), quantile=0.9, most=3.0), DDIMToFirst()],
    ids=lambda s: f"{s!s:.30}",
)
def test_a_schedule_and_its_clipping_survive_the_way_through_diffusers(tmp_path, schedule, solver):
    grid = grids.uniform(3, schedule, spacing="trailing")
    fields = scheduler.fields(schedule, "v", tmp_path, solver, grid)
    diffusers.DDIMScheduler.from_config(fields).save_pretrained(tmp_path)
    found = scheduler.read(tmp_path / scheduler.FILE)
    assert (found.schedule, found.prediction, found.solver) == (schedule, "v", solver)
    assert found.facts["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("schedule", [Sigmoid(20), Cosine(20, 0.1)], ids=repr)
def test_a_schedule_that_ddim_of_diffusers_does_not_name_is_written_as_its_betas(
    tmp_path, schedule
):
    write_json(tmp_path / scheduler.FILE, scheduler.fields(schedule, "x0", tmp_path))
    assert torch.equal(scheduler.read(tmp_path / scheduler.FILE).schedule.betas(), schedule.betas())


CLIPS = {  # what is asked for, the teacher's solver, and the solver that is run
    "the teacher's": (SolveConfig(), Clipped(DDIM(), 2.0), Clipped(DDIM(), 2.0)),
    "the teacher's last step": (SolveConfig(), Clipped(DDIMToFirst()), Clipped(DDIMToFirst())),
    "a teacher without": (SolveConfig(), DDIM(), DDIM()),
    "the teacher's, of Heun": (
        SolveConfig(solver="heun"),
        Clipped(DDIMToFirst(), 2.0),
        Clipped(Heun(), 2.0, rederive=True),
    ),
    "none": (SolveConfig(clip="none"), Clipped(DDIMToFirst()), DDIM()),
    "static": (SolveConfig(clip="static"), DDIM(), Clipped(DDIM())),
    "dynamic": (
        SolveConfig(clip="dynamic"),
        Clipped(DDIM()),
        Clipped(DDIM(), quantile=0.995, most=100.0),
    ),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_preset_keeps_the_clipping_of_its_teacher_unless_told_otherwise(name):
    asked, own, run = CLIPS[name]
    teacher = ds.analytic.Gaussian().teacher(own, grids.uniform(4))
    assert asked.on(teacher).solver == run


def test_a_solver_that_cannot_end_as_the_teacher_s_scheduler_does_says_so(caplog):
    teacher = ds.analytic.Gaussian().teacher(Clipped(DDIMToFirst()), grids.uniform(4))
    SolveConfig().on(teacher)
    assert not caplog.records
    SolveConfig(solver="unipc").on(teacher)
    assert "unipc steps to the data; the teacher's scheduler ends at index 0's noise" in caplog.text


def test_heun_follows_the_noise_of_the_clipped_prediction():
    data, z = ds.analytic.Gaussian(std=0.5), ds.noise(0, range(8), (1, 8, 8))
    exact = data.teacher(Heun(), grids.quadratic(20)).sample(z)
    wide, narrow = (Clipped(Heun(), limit, rederive=True) for limit in (1e6, 0.3))
    x = data.teacher(wide, grids.quadratic(20)).sample(z)
    assert (x - exact).abs().max() < 1e-4  # rounding, where sigma is small
    x = data.teacher(narrow, grids.quadratic(20)).sample(z)
    assert x.abs().max() == pytest.approx(0.3) and exact.abs().max() > 1


def test_a_clipped_teacher_is_kept_with_its_clipping(pipe, tmp_path):
    saved(pipe, "DDIM", {"thresholding": True, "set_alpha_to_one": False, **TRAILING})
    teacher = ds.load_teacher(pipe[0])
    teacher.save_pretrained(tmp_path / "ours")
    again = ds.load_teacher(tmp_path / "ours")
    assert (again.solver, again.grid) == (teacher.solver, teacher.grid)
    assert torch.equal(again.sample(noise()), teacher.sample(noise()))


@pytest.mark.parametrize("mode", ["engine", "eager"])
def test_a_clipped_teacher_draws_the_same_in_the_engine(pipe, mode):
    saved(pipe, "DDIM", {"thresholding": True, "sample_max_value": 2.0})
    teacher = replace(ds.load_teacher(pipe[0]), grid=grids.uniform(5))
    execution = ds.Execution("float32", mode)
    x = ds.Sampler(teacher, execution=execution, batch_size=2).sample(noise())
    assert (x - teacher.sample(noise())).abs().max() < 1e-4
    with pytest.raises(ValueError, match="a loop needs samples that are linear"):
        Recurrence.of(teacher)


@pytest.mark.parametrize("clipped", [Clipped(DDIM()), Clipped(DDIM(), quantile=0.9)], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_never_hidden_by_clipping(clipped, value):
    x = torch.linspace(-3, 3, 32).reshape(2, 1, 4, 4)
    x[1, 0, 2, 1] = value
    for found in (clipped.clip(x), clipped.clip(x.to(torch.bfloat16))):
        assert not found[1, 0, 2, 1].isfinite()
        assert found[0].abs().max() == 1


def test_a_threshold_is_of_each_sample_alone():
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    clipped = Clipped(DDIM(), quantile=0.9, most=3.0)
    assert torch.equal(clipped.clip(x)[1:2], clipped.clip(x[1:2]))
