"""The numbers of the 2021 code, and what follows from them."""

import math

import pytest
import torch

from ds.analytic import Gaussian
from ds.diffusion import grids
from ds.diffusion.predictions import Preconditioned
from ds.diffusion.schedules import EDM, Linear, LinearBeta, Trig
from ds.diffusion.solvers import DDIM, Ancestral, Clipped, Heun
from ds.methods import Denoising
from ds.training.presets import PRESETS, SolveConfig

QUADRATIC, UNIFORM = grids.quadratic(100), grids.uniform(50)
BETAS, LSUN_BETAS = (0.9, 0.98), (0.98, 0.999)
COLUMNS = "loss, lr, warm-up, batch, betas, EMA, epochs, pairs, held out, grid"
# fmt: off
PAPER = {
    "cifar10":      ("l1", 2e-4, 5000, 512, BETAS, 0.995, 25, 1_024_000, 51_200, QUADRATIC),
    "celeba":       ("l2", 5e-5, 5000, 512, BETAS, 0.995, 35, 1_024_000, 10_240, QUADRATIC),
    "lsun_bedroom": ("l2", 5e-6, 1000, 32, LSUN_BETAS, 0.9995, 50, 1_024_000, 2_560, UNIFORM),
    "lsun_church":  ("l2", 5e-6, 1000, 32, LSUN_BETAS, 0.9995, 40, 1_024_000, 2_560, UNIFORM),
}
# fmt: on
paper = pytest.mark.parametrize("name", PAPER)


@pytest.mark.parametrize("column", range(10), ids=COLUMNS.split(", "))
@paper
def test_the_paper_s_numbers(name, column):
    p = PRESETS[name]()
    t, (_, grid) = p.train, p.solve.build(LinearBeta())
    found = (
        p.method.loss_type,
        t.lr,
        t.warmup_steps,
        t.batch_size,
        t.betas,
        t.ema_decay,
        t.epochs,
        p.pairs.count,
        p.pairs.held_out,
        grid,
    )
    assert found[column] == PAPER[name][column]


@paper
def test_the_paper_s_optimiser_is_plain_adam(name):
    t = PRESETS[name]().train
    assert (t.optimizer, t.eps, t.lr_schedule) == ("adam", 1e-8, "none")
    assert (t.weight_decay, t.grad_clip_norm) == (0, 0)


@paper
def test_the_paper_s_solver_is_ddim(name):
    assert PRESETS[name]().solve.build(LinearBeta())[0] == DDIM()


@paper
def test_the_paper_s_student_is_asked_at_the_last_time(name):
    schedule = PRESETS[name]().denoising.schedule
    teacher = Gaussian().teacher(DDIM(), (800,), schedule)
    assert PRESETS[name]().method.on(teacher).t == schedule.num_steps - 1 == 999


@pytest.mark.parametrize(
    ("name", "steps", "total"),
    [
        ("cifar10", 2000, 50_000),
        ("celeba", 2000, 70_000),
        ("lsun_bedroom", 32_000, 1_600_000),
        ("lsun_church", 32_000, 1_280_000),
    ],
)
def test_an_epoch_has_the_paper_s_number_of_steps(name, steps, total):
    p = PRESETS[name]()
    per_epoch = p.pairs.count // p.train.batch_size
    assert (per_epoch, per_epoch * p.train.epochs) == (steps, total)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits", (1, 8)),
        ("cifar10", (3, 32)),
        ("celeba", (3, 64)),
        ("lsun_bedroom", (3, 256)),
        ("lsun_church", (3, 256)),
        ("edm_cifar10", (3, 32)),
        ("edm_cifar10_conditional", (3, 32)),
        ("progressive_cifar10", (3, 32)),
        ("imagenet64", (3, 64)),
    ],
)
def test_images_have_the_size_of_the_dataset(name, shape):
    net = PRESETS[name]().net
    assert (net.in_channels, net.image_size) == shape


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_value(name):
    assert PRESETS[name]() == PRESETS[name]() and hash(PRESETS[name]()) == hash(PRESETS[name]())


def test_the_training_of_the_papers_teachers_is_not_told():
    assert not [name for name in PAPER if PRESETS[name]().teach]


EDMS = {
    # weights, steps of a sample, calls, batch, lr, millions of images, of warm-up, of EMA half-life
    "edm_cifar10": (55_732_739, 18, 35, 512, 1e-3, 200, 10, 0.5),
    "edm_cifar10_conditional": (55_734_147, 18, 35, 512, 1e-3, 200, 10, 0.5),
    "imagenet64": (295_899_267, 40, 79, 4096, 1e-4, 2500, 10, 50),
}


@pytest.mark.parametrize("name", EDMS)
def test_the_numbers_of_edm(name):
    """Karras et al. 2022, Tables 1 and 7; without augmentation a network has 1,152 weights less."""
    p = PRESETS[name]()
    weights, steps, calls, batch, lr, millions, warmup, half_life = EDMS[name]
    images = {32: 50_000, 64: 1_281_167}[p.net.image_size]
    with torch.device("meta"):
        assert sum(w.numel() for w in p.net.build().parameters()) == weights
    solver, grid = p.solve.build(EDM())
    assert grid == grids.karras(steps, EDM()) and (grid[0], grid[-1]) == (80, pytest.approx(0.002))
    assert solver == Heun() and solver.nfe(grid) == calls
    t = p.teach
    assert (t.batch_size, t.lr) == (batch, lr)
    assert t.epochs * images / 1e6 == pytest.approx(millions, rel=1e-3)
    assert t.warmup_steps * batch / 1e6 == pytest.approx(warmup, rel=1e-3)
    assert math.log(0.5, t.ema_decay) * batch / 1e6 == pytest.approx(half_life, rel=1e-2)
    assert p.denoising == Denoising(EDM(), "preconditioned", label_dropout=0.0)


def test_the_numbers_of_progressive_distillation_and_of_its_teacher():
    """Salimans & Ho 2022, and the released settings: cifar_base and cifar_distill."""
    p = PRESETS["progressive_cifar10"]()
    net, t = p.net, p.teach
    assert (net.channels, net.channel_mult, net.num_res_blocks) == (256, (1, 1, 1), 3)
    assert (net.attention_resolutions, net.dropout, net.temb_channels) == ((16, 8), 0.2, 1024)
    assert (t.batch_size, t.lr, t.warmup_steps, t.ema_decay) == (128, 2e-4, 1000, 0.9999)
    assert (t.optimizer, t.weight_decay, t.grad_clip_norm) == ("adamw", 1e-3, 1.0)
    assert p.denoising == Denoising(Trig(), "x0", snr_weight=True)
    told = torch.tensor(Trig().noise) * net.frequencies[0]
    assert told.item() == pytest.approx(1000) and net.frequencies[1] == 1e-4 * net.frequencies[0]
    stages = p.method.stages()
    assert [stage.nfe for stage in stages] == [2**k for k in range(12, -1, -1)]
    for stage in stages:
        own = p.train.of(stage)
        assert (own.lr, own.lr_schedule, own.warmup_steps) == (5e-5, "linear", 0)
        assert (own.ema_decay, own.dropout, own.weight_decay, own.grad_clip_norm) == (0, 0, 0, 1)
        assert round(own.epochs * (50_000 // own.batch_size)) == 50_000


@pytest.mark.parametrize("name", EDMS)
def test_a_student_of_edm_takes_its_time_from_its_teacher(name):
    teacher = Gaussian().teacher(Heun(), (80.0, 1.0), EDM(), Preconditioned())
    method = PRESETS[name]().method.on(teacher)
    assert (method.t, method.residual, method.gain) == (math.log(80) / 4, False, 0.5)


@pytest.mark.parametrize("grid", ["quadratic", "uniform", "log_snr", "karras"])
@pytest.mark.parametrize("schedule", [LinearBeta(), EDM(), Linear()], ids=repr)
def test_a_grid_of_the_command_line_exists_on_every_schedule(grid, schedule):
    _, times = SolveConfig(grid=grid, steps=8).build(schedule)
    assert len(times) == 8
    schedule.check(*times)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("steps", [50, 100, 1000, 4000])
def test_a_preset_visits_shares_of_the_steps_of_its_teacher(name, steps):
    schedule = LinearBeta(steps, 0.1 / steps, 0.4 if steps == 50 else 20 / steps)
    solve = PRESETS[name]().solve
    grid = solve.build(schedule)[1]
    uniform = (50 - 1) * (steps // 50)
    assert grid[0] == (uniform if solve.grid == "uniform" else steps * 4 // 5) and grid[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "share", "top"),
    [
        (LinearBeta(), 0.5, 500),
        (LinearBeta(4000, 2.5e-5, 5e-3), 0.5, 2000),
        (LinearBeta(100), 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (LinearBeta(), 1.0, 999),
        (EDM(), 0.5, 40.0),
    ],
    ids=lambda v: f"{v!s:.20}",
)
@pytest.mark.parametrize("grid", ["log_snr", "karras"])
def test_the_top_of_a_grid_is_a_share_of_the_schedule(grid, schedule, share, top):
    assert SolveConfig(grid=grid, top=share).build(schedule)[1][0] == top


@pytest.mark.parametrize(("top", "words"), [(0, "above 0"), (1.5, "at most 1"), (800, "at most 1")])
def test_a_top_that_is_no_share_is_refused(top, words):
    with pytest.raises(ValueError, match=f"solve.top must be {words}, not {top}"):
        SolveConfig(top=top)


def test_trailing_times_start_at_the_last_index():
    solve = SolveConfig(grid="uniform", steps=10, spacing="trailing")
    assert solve.build(LinearBeta())[1] == tuple(range(999, 0, -100))


def test_the_churn_of_edm_is_shared_among_the_steps_of_the_grid():
    published = {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
    solve = SolveConfig(solver="heun", grid="karras", steps=256, **published)
    solver, grid = solve.build(EDM())
    assert len(grid) == 256
    assert solver == Heun(churn=40 / 256, s_min=0.05, s_max=50.0, s_noise=1.003)
    solver, grid = solve.build(LinearBeta())  # where rounded times may be the same
    assert solver.churn == 40 / len(grid)
    with pytest.raises(ValueError, match=r"solve\.churn: is for the solver heun, not for ddim"):
        SolveConfig(churn=1.0)


def test_an_ancestral_sampler_is_asked_for_by_name(caplog):
    solve = SolveConfig(solver="ancestral", variance="large", clip="static")
    teacher = solve.on(Gaussian().teacher(DDIM(), QUADRATIC))
    assert teacher.solver == Clipped(Ancestral("large"))
    assert "ancestral adds fresh noise on its way" in caplog.text
    with pytest.raises(ValueError, match=r"solve\.variance: is for the solver ancestral"):
        SolveConfig(variance="large")
