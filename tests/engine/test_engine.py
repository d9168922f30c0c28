"""The engine in place of a U-Net: its times, and what draws with it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ds
from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import Heun
from ds.engine import Engine, Plan, Rewrites, Target, calls
from ds.methods import DenoisingStudent
from ds.models.execution import Execution
from ds.nets.adm import adm_imagenet64
from ds.nets.blocks import ResBlock
from ds.nets.fold import fold_attention
from ds.nets.song import ddpmpp, ncsnpp
from ds.ops.dispatch.op import triton_kernels
from ds.training.presets import PRESETS, SOLVERS
from tests.nets.test_unet import GUIDED, TINY, build, inputs, relative_rms

CPU = Target(torch.device("cpu"), torch.float32, 4)


def teacher(net=None):
    # 16 channels and more, or nothing is done in tiles
    net = net or build(replace(TINY, channels=16, image_size=16, attention_resolutions=(8,)))
    return ds.Teacher(Denoiser(net, LinearBeta()), Heun(), grids.quadratic(5))


@torch.no_grad()
@pytest.mark.parametrize("time", [0, 37, 999])
def test_a_time_that_was_not_announced_is_added(time):
    net, (x, _) = build(), inputs()
    engine, t = Engine(net, [0]), torch.full((3,), time)
    for _ in range(2):
        assert relative_rms(engine(x, t), net(x, t)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("time", [0.1, -0.2861, 1e-5, 79.9])
def test_a_time_is_known_but_for_the_rounding_of_float32(time):
    """A GPU must know it: devices round the logarithm that some times are of otherwise."""
    net, (x, _) = build(), inputs()
    engine = Engine(net, [time, time + 0.01, time - 0.01])
    for t in (torch.full((3,), time), torch.full((3,), time) * (1 + 2e-7)):
        assert relative_rms(engine(x, t), net(x, t)) < 1e-5
    assert len(engine._times) == 3
    engine(x, torch.full((3,), time + 0.001))
    assert len(engine._times) == 4


def test_neighbouring_indices_of_the_longest_schedule_are_told_apart():
    net, (x, _) = build(), inputs()
    engine = Engine(net, [999_999])
    engine(x, torch.full((3,), 999_998))
    assert engine._times.tolist() == [999_999, 999_998]


def test_different_times_in_a_call_are_refused():
    with pytest.raises(ValueError, match=r"^Engine: all images .* one time, not \[0, 37, 999\]"):
        Engine(build(), [0, 37, 999])(*inputs())


def test_another_network_is_refused():
    for net in (nn.Linear(1, 1), fold_attention(build())):
        with pytest.raises(ValueError, match=r"^Engine: net must be one of the U-Nets"):
            Engine(net)


TOLD = replace(TINY, conditions=("h",))


@torch.no_grad()
@pytest.mark.parametrize("config", [TOLD, replace(GUIDED, conditions=("h",))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h", [[0.2, 0.9, 0.4], [0.5] * 3, [0.5]])
def test_conditions_may_differ_by_image_and_a_large_batch_is_cut_with_them(
    h, dtype, config, monkeypatch
):
    monkeypatch.setattr("ds.engine.run.CACHE", 1)
    net, (x, _), h = build(config), inputs(), torch.tensor(h)
    t = torch.full((3,), 5)
    exact = build(config).double()(x.double(), t, h=h.double())
    narrow = build(config).to(dtype)(x, t, h=h)
    engine = Engine(net, [5], dtype=dtype)
    assert engine.target.images == 1
    bound = 2 * relative_rms(narrow, exact) + torch.finfo(torch.float32).eps
    assert relative_rms(engine(x, t, h=h), exact) <= bound


def test_images_that_share_their_conditions_are_told_one_row():
    """Then a convolution adds it as its bias, without a pass of its own."""
    engine, t = Engine(build(TOLD), [5]), torch.full((3,), 5)
    told = []
    call, engine.call = engine.call, lambda x, row: told.append(row) or call(x, row)
    for h in ([0.5] * 3, [0.5, 0.5, 0.6]):
        engine(inputs()[0], t, h=torch.tensor(h))
    columns = sum(b.temb_proj.out_features for b in build().modules() if isinstance(b, ResBlock))
    assert [tuple(row.shape) for row in told] == [(columns,), (3, columns)]


def test_conditions_that_a_network_does_not_take_or_that_are_missing_are_refused():
    engine, (x, t) = Engine(build(TOLD), [5]), (inputs()[0], torch.full((3,), 5))
    for cond in ({}, {"label": t}, {"h": t, "label": t}):
        with pytest.raises(ValueError, match=r"^UNet: takes the conditions h"):
            engine(x, t, **cond)
    with pytest.raises(ValueError, match=r"^UNet: h is \[2\] for 3 images"):
        engine(x, t, h=torch.zeros(2))


def test_an_engine_leaves_its_input_alone_and_repeats_itself():
    net, (x, _) = build(), inputs()
    engine, t, z = Engine(net, [5]), torch.full((3,), 5), x.clone()
    assert torch.equal(engine(x, t), engine(x, t))
    assert torch.equal(x, z)


@torch.no_grad()
def test_a_batch_that_no_cache_holds_is_taken_in_parts(monkeypatch):
    net, (x, _) = build(), inputs()
    monkeypatch.setattr("ds.engine.run.CACHE", 1)
    engine = Engine(net, [5])
    assert engine.target.images == 1
    t = torch.full((3,), 5)
    assert torch.equal(engine(x, t)[1:2], engine(x[1:2], t[:1]))
    assert relative_rms(engine(x, t), net(x, t)) < 1e-5


def test_no_images_give_no_images():
    assert Engine(build())(torch.zeros(0, 2, 8, 8), torch.zeros(0)).shape == (0, 2, 8, 8)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_sampler_draws_a_teacher_s_images_with_the_engine(batch_size):
    model, z = teacher(), ds.noise(3, range(7), (2, 16, 16))
    sampler = ds.Sampler(model, batch_size=batch_size)
    assert isinstance(sampler.model.net, Engine)
    found = torch.cat(list(sampler.batches(3, range(7))))
    exact = teacher(build(model.net.config).double()).sample(z.double())
    peer = relative_rms(model.sample(z).double(), exact)
    assert relative_rms(found, exact) <= 2 * peer + torch.finfo(torch.float32).eps


def test_a_sampler_draws_a_student_s_images_with_the_engine():
    model = ds.Student(build(), DenoisingStudent())
    z = ds.noise(3, range(7), model.shape)
    (found,) = ds.Sampler(model, execution=Execution(mode="engine")).batches(3, range(7))
    assert relative_rms(found, model.sample(z)) < 1e-5


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_3s"])
def test_an_engine_is_made_for_the_times_of_its_model(solver):
    """Which a GPU must be told; a student has one, and some solvers go between those of a grid."""
    student = ds.Student(build(), DenoisingStudent(t=7))
    assert student.engine(2).net._times.tolist() == [7]
    model = replace(teacher(), solver=SOLVERS[solver])
    found = model.engine(2).net
    known = len(found._times)
    model.using(found).sample(torch.zeros(1, *model.shape))
    assert len(found._times) == known  # none had to be added


# --- the printed plan


def test_a_plan_counts_the_flops_of_the_network():
    net, (x, t) = build(), inputs(1)
    off = Rewrites(*[False] * len(Rewrites.__dataclass_fields__))
    plan = Plan.of(net, CPU, off)
    # The counter does not know PyTorch's attention on CPUs.
    with (
        torch.no_grad(),
        ds.ops.use_backend("reference"),
        FlopCounterMode(display=False) as counter,
    ):
        net(x, t)
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    time = sum(2 * m.weight.numel() for m in linear)
    assert sum(map(plan.flops, plan.steps)) == counter.get_total_flops() - time


def test_a_plan_s_floor_is_the_larger_of_its_two_times():
    plan = Plan.of(build(), CPU)
    step = plan.steps[0]
    lines = plan.text(CPU, tflops=1e-6, gbs=1e6).splitlines()
    assert len(lines) == len(plan.steps) + 3
    assert float(lines[1].split()[-1]) == pytest.approx(4 * plan.flops(step), rel=1e-3)
    size = plan.bytes(step, CPU)
    assert size == 4 * (4 * (2 + 8) * 64 + math.prod(step.call.weight.shape))


GPU = Target(torch.device("cuda"), torch.bfloat16, 264)


def cifar10_on_a_gpu(**changes):
    with torch.device("meta"):
        net = PRESETS["cifar10"]().net.build()
    return Plan.of(net, GPU, replace(Rewrites.good_for(GPU), **changes))


def test_little_of_what_a_gpu_moves_is_needless():
    """A quarter at most of what PyTorch's passes around cuDNN move for the same network."""
    plain = cifar10_on_a_gpu(add_into_norm=False, norm_into_conv=False, implicit_gemm=False)
    plan = cifar10_on_a_gpu()
    assert plan.needless(GPU) <= plain.needless(GPU) / 4
    kept = [launch for step in plan.steps for launch in plan.launches(step) if launch.needless]
    assert {launch.kernel for launch in kept} == {"norm"}  # those that concatenate
    assert plan.needless(GPU) == 2 * 264 * sum(launch.needless for launch in kept)


def test_a_call_of_264_images_has_a_floor_of_seven_milliseconds_on_an_h100():
    """At 790 TFLOP/s and 3 TB/s, which are rates of products and copies, not of the data sheet."""
    plan = cifar10_on_a_gpu()
    *_, total, _, _ = plan.text(GPU, tflops=790, gbs=3000).splitlines()
    assert 5000 < float(total.split()[-1]) < 7000  # microseconds


def test_the_limits_of_the_kernels_are_those_that_launches_are_counted_by():
    assert calls.ONE_PASS_PIXELS == triton_kernels("group_norm_tiles").ONE_PASS_PIXELS
    assert calls.IN_TILE_PIXELS == triton_kernels("conv").TILE_PIXELS


@pytest.mark.parametrize(
    ("preset", "full"), [("cifar10", 528), ("celeba", 528), ("lsun_bedroom", 66)]
)
def test_a_batch_fills_a_gpu_in_every_layer(preset, full):
    with torch.device("meta"):
        net = PRESETS[preset]().net.build()
    plan = Plan.of(net, Target(torch.device("meta"), torch.bfloat16, 1))
    assert plan.full_batch(132) == full
    programs = min(h * w / 128 * c / 128 for c, h, w in plan.shapes.values() if c >= 128)
    assert full * programs == 132


@pytest.mark.parametrize(
    ("config", "gflop"),
    [(ddpmpp(), 42.0), (ncsnpp(), 42.3), (adm_imagenet64(), 219.3)],
    ids=["ddpmpp", "ncsnpp", "adm_imagenet64"],
)
def test_published_networks_have_plans_without_needless_calls(config, gflop):
    """On a GPU too, and without any weights; a residual scale costs a pass over 64 pixels."""
    with torch.device("meta"):
        net = config.build()
    direct = Plan.of(net, GPU, replace(Rewrites.good_for(GPU), phase_upsample=False))
    assert sum(map(direct.flops, direct.steps)) / 1e9 == pytest.approx(gflop, abs=0.1)
    for target in (CPU, GPU):
        plan = Plan.of(net, target)
        assert len(plan.text(target, tflops=989, gbs=3350).splitlines()) >= len(plan.steps) + 3
        kinds = {step.call.kind for step in plan.steps}
        assert not kinds & {"add", "addbias", "cat", "scaleshift"}
        scaled = [step for step in plan.steps if step.call.kind == "scale"]
        assert [plan.shapes[step.outputs[0]] for step in scaled] == (
            [] if config.residual_scale == 1 else [(256, 8, 8)]
        )


def test_a_plan_knows_how_much_is_alive_at_once():
    """By running it: the values that the engine holds."""
    net, (x, _) = build(), inputs(1)
    engine = Engine(net, [0], dtype=torch.float64)
    most = 0
    held = {"x": x.numel()}
    for _, step, last in engine._prepared:
        held |= {name: math.prod(engine.plan.shapes[name]) for name in step.outputs}
        most = max(most, sum(held.values()))
        for name in last:
            del held[name]
    assert list(held) == [engine.plan.steps[-1].outputs[0]]
    assert engine.plan.peak() == most


def test_in_bfloat16_neither_the_input_nor_the_result_is_rounded():
    net = build(TINY)
    x, t = torch.randn(2, *net.shape), torch.full((2,), 37)
    engine = Engine(net, [37], dtype=torch.bfloat16)
    found = engine(x, t)
    assert not torch.equal(found, found.bfloat16().float())
    assert not torch.equal(found, engine(x.bfloat16().float(), t))
