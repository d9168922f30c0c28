"""Teachers with the schedulers that people have, against diffusers on the same noise and times."""

import copy
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
from ds.diffusion.solvers import DDIM, Clipped, DDIMToFirst

diffusers = pytest.importorskip("diffusers")

EPS, X0, V = ({"prediction_type": name} for name in ("epsilon", "sample", "v_prediction"))
PLAIN = {"clip_sample": False}
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE, SIGMOID = ({"beta_schedule": name} for name in ("squaredcos_cap_v2", "sigmoid"))
TRAILING, LINSPACE = ({"timestep_spacing": name} for name in ("trailing", "linspace"))
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
