"""A plan against the network it was made of: each rewrite alone, and all of them."""

import math
from dataclasses import fields, replace

import pytest
import torch

import ds
from ds.engine import Engine, Plan, Rewrites, Target, rewrites
from ds.engine.calls import Attend, Norm
from ds.engine.convolutions import Conv, ImplicitGemm, UpsampleConv, Winograd
from ds.methods.base import built
from ds.nets.base import NO_CLASS
from ds.nets.blocks import ResBlock
from ds.nets.song import ddpmpp, ncsnpp
from ds.training import presets
from tests.nets.test_unet import GUIDED, TINY, build, inputs, relative_rms

CPU = Target(torch.device("cpu"), torch.float32, 4)
NAMES = [field.name for field in fields(Rewrites)]
OFF = Rewrites(**dict.fromkeys(NAMES, False))
ON = Rewrites()  # all of them
OWN = replace(ON, winograd=False)  # all convolutions by our own kernel
# What ADM has beside guided diffusion's.
ADM = replace(GUIDED, classes=5, out_channels=4, cosine_first=True, head_channels=None, heads=2)
SONG = {
    "image_size": 8,
    "in_channels": 2,
    "channels": 8,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (4,),
    "classes": 5,
    "augment_channels": 3,
}
DDPMPP, NCSNPP = ddpmpp(**SONG), ncsnpp(**SONG)
ARCHITECTURES = {
    name: replace(preset().net, channels=8, norm_groups=4)
    for name, preset in presets.PRESETS.items()
    # lsun_church has the network of lsun_bedroom; those of EDM and ADM are below
    if name in ("digits", "cifar10", "celeba", "lsun_bedroom")
} | {
    "conv_shortcut": replace(TINY, conv_shortcut=True),
    "guided diffusion's": GUIDED,
    "ADM's": ADM,
    "DDPM++": DDPMPP,
    "NCSN++": NCSNPP,
}


def small(config):
    """The architecture on the smallest image that has its levels and its attention."""
    factor = max(1, min(config.attention_resolutions) // 4)
    return replace(
        config,
        image_size=max(config.image_size // factor, 2 ** (len(config.channel_mult) - 1)),
        attention_resolutions=tuple(size // factor for size in config.attention_resolutions),
    )


def conditions(config):
    """The conditions of a call of three images, which share them or not; one set if it has none."""
    numbers = [0.2, 0.9, 7.0], [0.9] * 3
    values = {"label": ([3, NO_CLASS, 0], [3] * 3), "h": numbers, "d": numbers}
    both = [{name: torch.tensor(values[name][i]) for name in config.takes} for i in (0, 1)]
    if "augment" in config.may_take:
        both[0]["augment"] = torch.tensor([[0.2, -0.1, 3.0], [0.0, 0.0, 0.0], [1.0, 2.0, -3.0]])
    return both if config.takes else [{}]


def at(t, x):
    return torch.full((len(x),), t)


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, replace(ADM, conditions=("h",)), NCSNPP])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_a_rewrite_alone_is_exact(name, config):
    net, (x, _) = build(config).double(), inputs()
    alone = OFF if name is None else replace(OFF, **{name: True})
    engine = Engine(net, [0, 37, 999], rewrites=alone)
    for cond in conditions(config):
        expected, found = (f(x.double(), at(37, x), **cond) for f in (net, engine))
        assert found.dtype == torch.float64
        assert distance(found, expected) < 1e-10


@pytest.mark.parametrize("name", [name for name in NAMES if name != "time_table"])
def test_a_rewrite_changes_the_plan(name):
    net = build(GUIDED if name == "scale_into_norm" else TINY)
    target = Target(torch.device("cpu"), torch.float64, 512)  # so many have tiles enough
    plans = (Plan.of(net, target, chosen) for chosen in (OFF, replace(OFF, **{name: True})))
    plain, changed = ([(step.call.kind, step.inputs) for step in plan.steps] for plan in plans)
    assert plain != changed


@torch.no_grad()
@pytest.mark.parametrize("config", [replace(TINY, conditions=("h", "d"), classes=4), ADM, DDPMPP])
@pytest.mark.parametrize("name", NAMES)
def test_all_but_one_are_exact(name, config):
    net, (x, _) = build(config).double(), inputs()
    engine = Engine(net, [5], rewrites=replace(ON, **{name: False}))
    for cond in conditions(config):
        expected, found = (f(x.double(), at(5, x), **cond) for f in (net, engine))
        assert distance(found, expected) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exact(name):
    config = ARCHITECTURES[name] if "++" in name else small(ARCHITECTURES[name])
    net, (x, _), (cond, *_) = build(config), inputs(3, config), conditions(config)
    narrow = build(config).bfloat16()
    exact = net.double()(x.double(), at(800, x), **cond)
    for chosen in (None, OWN):
        engine = Engine(net, [800], rewrites=chosen)
        assert distance(engine(x.double(), at(800, x), **cond), exact) < 1e-10
    found = Engine(net, [800], dtype=torch.float32)(x, at(800, x), **cond)
    assert relative_rms(found, exact) < 1e-5
    found = Engine(net.float(), [800], dtype=torch.bfloat16)(x, at(800, x), **cond)
    assert relative_rms(found, exact) <= 2 * relative_rms(narrow(x, at(800, x), **cond), exact)


def whole_cifar10():
    net = built(presets.cifar10().net).eval()
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p += 0.02 * torch.randn(p.shape, generator=generator)
    return net


@torch.no_grad()
def test_the_whole_cifar10_network_is_exact():
    net = whole_cifar10()
    x, t = ds.noise(0, range(2), net.shape), torch.full((2,), 500)
    found = Engine(net, [500], images=2)(x, t)
    exact = net.double()(x.double(), t)
    assert relative_rms(found, exact) < 1e-5


def test_our_own_kernel_takes_what_it_was_measured_to_be_faster_at(monkeypatch):
    """And nothing else; a norm goes into a convolution only where that was measured."""
    target = Target(torch.device("cuda"), torch.bfloat16, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")

    def own(**backends):
        monkeypatch.setitem(rewrites.FASTER, "some GPU", backends)
        plan = Plan.of(build(), target)
        return {
            rewrites.choice_name(step, target.dtype, plan.shapes): step.call.backend
            for step in plan.steps
            if isinstance(step.call, ImplicitGemm)
        }

    first = "gemm 3x3+gn 2x8x8 to 8x8x8 bias bfloat16"
    down = "gemm 3x3/2 8x8x8 to 8x4x4 bias bfloat16"
    assert own() == {}
    assert own(**{first: "triton"}) == {first: "triton"}
    found = own(**{down: "other", "gemm 3x3 2x8x8 to 8x8x8 bias float16": "triton"})
    assert found == {down: "other"}


@torch.no_grad()
def test_a_convolution_is_computed_by_the_backend_that_is_named(monkeypatch):
    conv = Conv(torch.randn(8, 4, 3, 3), torch.randn(8))
    x = torch.randn(2, 4, 8, 8)
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    run = ImplicitGemm(conv, backend="reference").prepare(replace(CPU, images=2), (4, 8, 8))
    torch.testing.assert_close(run(torch.empty(0), x), expected)
    run = ImplicitGemm(conv, backend="triton").prepare(replace(CPU, images=2), (4, 8, 8))
    with pytest.raises(RuntimeError, match="'triton' was asked for on cpu"):
        run(torch.empty(0), x)


def test_what_was_not_measured_is_ours_where_it_spares_a_pass_or_a_launch():
    gpu = Target(torch.device("cuda"), torch.bfloat16, 4)
    net = build(replace(TINY, channels=16, image_size=16, attention_resolutions=(8,)))
    plan = Plan.of(net, gpu)
    shapes = plan.shapes
    assert rewrites.FASTER == {}
    for step in plan.steps:
        needless = {launch.kernel for launch in plan.launches(step) if launch.needless}
        assert needless <= {"norm"}
        if isinstance(step.call, ImplicitGemm) and step.call.norm:
            assert math.prod(shapes[step.outputs[0]][1:]) <= rewrites.SMALL_PIXELS
    kinds = {step.call.kind for step in plan.steps}
    assert {"gemm 3x3", "gemm 3x3/2+gn", "gemm 3x3+gn", "conv 3x3", "conv 1x1"} <= kinds
    wide = Plan.of(net.double(), replace(gpu, dtype=torch.float64))
    assert not any(isinstance(step.call, ImplicitGemm) for step in wide.steps)


def test_every_convolution_can_be_forced_to_our_own_kernel():
    """And with it the norms of their results, but those that concatenate."""
    steps = Plan.of(build(), Target(torch.device("cpu"), torch.float32, 4), OWN).steps
    made = {output: step.call for step in steps for output in step.outputs}
    assert not any(isinstance(step.call, Conv | UpsampleConv | Winograd) for step in steps)
    for step in steps:
        if isinstance(step.call, Norm):
            concatenates = len(step.inputs) == 2 + step.call.residual
            assert concatenates or isinstance(made[step.inputs[0]], Attend)
    kept = {step.call.keep for step in steps if getattr(step.call, "norm", None)}
    assert kept == {True, False}


# In float8, which is a precision and not exact.

FLOAT8 = torch.float8_e4m3fn


@torch.no_grad()
@pytest.mark.parametrize("chosen", [None, OFF, ON, OWN])
def test_float8_is_further_from_the_network_than_bfloat16_and_no_more(chosen):
    net, (x, _) = build(), inputs()
    near, found = (
        Engine(net, [37], dtype=dtype, rewrites=chosen)(x, at(37, x))
        for dtype in (torch.bfloat16, FLOAT8)
    )
    exact = net(x, at(37, x))
    assert 2 * relative_rms(near, exact) < relative_rms(found, exact) < 0.1


@pytest.mark.parametrize("chosen", [None, OFF, ON, OWN])
def test_both_convolutions_of_a_block_take_float8_and_no_other(chosen):
    net = build()
    target = Target(torch.device("cpu"), torch.bfloat16, 4, float8=True)
    steps = Plan.of(net, target, chosen).steps
    narrow = {s.outputs[0] for s in steps if isinstance(s.call, Norm) and s.call.float8}
    taken = [s for s in steps if isinstance(s.call, ImplicitGemm) and s.call.float8]
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, ResBlock)}
    assert narrow == {f"{name}.norm{i}" for name in layers for i in (1, 2)}
    assert {s.inputs[0] for s in taken} == narrow
    assert not narrow & {name for s in steps if s not in taken for name in s.inputs}


@torch.no_grad()
def test_float8_moves_the_whole_cifar10_network_by_a_tenth():
    """Of its output, root mean square, with random weights; bfloat16 by a sixtieth."""
    net = whole_cifar10()
    x, t = ds.noise(0, range(2), net.shape), torch.full((2,), 500)
    exact = Engine(net, [500], images=2)(x, t)
    moved = [
        relative_rms(Engine(net, [500], images=2, dtype=dtype)(x, t), exact)
        for dtype in (torch.bfloat16, FLOAT8)
    ]
    assert 0.01 < moved[0] < 0.025
    assert 0.06 < moved[1] < 0.12
