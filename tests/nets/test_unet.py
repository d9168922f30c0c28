"""The U-Net against the 2021 implementation, the published checkpoints' names, and its parts."""

import copy
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import ds
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.methods import DenoisingStudent
from ds.nets import UNetConfig
from ds.nets.blocks import (
    Attention,
    Downsample,
    GroupNorm,
    ResBlock,
    recompute_norms,
)
from ds.training import presets
from tests import golden

TINY = UNetConfig(
    image_size=8,
    in_channels=2,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
)
# What guided diffusion trains: every part that is not in TINY.
GUIDED = replace(
    TINY,
    head_channels=4,
    mid_norm_groups=2,
    scale_shift=True,
    resnet_down=(0,),
    resnet_up=(1,),
)


def build(config=TINY, seed=0):
    """A network in eval mode, away from the zeros its branches start from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = config.build().eval()
        for p in net.parameters():
            p.data += 0.2 * torch.randn(p.shape)
    return net


def inputs(n=3, config=TINY):
    x = ds.noise(0, range(n), (config.in_channels, *config.size))
    return x, torch.tensor([999, 0, 37, 500])[:n]


def relative_rms(found, expected):
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        (presets.cifar10, 35_746_307),
        (presets.celeba, 78_700_803),
        (presets.lsun_bedroom, 113_673_219),
        (presets.lsun_church, 113_673_219),
    ],
)
def test_the_paper_s_networks_have_their_published_size(preset, count):
    with torch.device("meta"):
        net = preset().net.build()
    assert sum(p.numel() for p in net.parameters()) == count


@torch.no_grad()
def test_the_network_is_that_of_the_2021_code():
    data = golden.arrays("ddpm_cifar10_c32")
    found = golden.network("ddpm_cifar10_c32")(data["z"], data["t"])
    assert (found - data["y"]).abs().max() < 1e-5 * data["y"].abs().max()  # float32, other sums


def test_the_student_is_that_of_the_2021_code():
    data = golden.arrays("student_cifar10_c32")
    student = ds.Student(golden.network("student_cifar10_c32"), DenoisingStudent(t=999))
    found = student.sample(data["z"])
    assert (found - data["y"]).abs().max() < 1e-5 * data["y"].abs().max()


def test_the_sampling_loop_is_that_of_the_2021_code():
    data = golden.arrays("ddim100_cifar10_c32")
    denoiser = Denoiser(golden.network("student_cifar10_c32"), LinearBeta())
    teacher = ds.Teacher(denoiser, DDIM(), ds.grids.quadratic(100))
    # 96 calls in float32, whose tables were float32 there as well
    assert relative_rms(teacher.sample(data["z"]), data["y"]) < 1e-4


def ddpm_names():
    """The weights of the PyTorch port of the CIFAR-10 network, with the channels of each."""
    shapes = {}

    def add(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, width, out):
        add(f"{name}.norm1", width)
        add(f"{name}.conv1", out, width, 3, 3)
        add(f"{name}.temb_proj", out, 512)
        add(f"{name}.norm2", out)
        add(f"{name}.conv2", out, out, 3, 3)
        if width != out:
            add(f"{name}.nin_shortcut", out, width, 1, 1)

    def attention(name, width):
        add(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1, 1)

    add("temb.dense.0", 512, 128)
    add("temb.dense.1", 512, 512)
    add("conv_in", 128, 3, 3, 3)
    for i, widths in enumerate([(128, 128), (128, 256), (256, 256), (256, 256)]):
        out = 128 if i == 0 else 256
        for j, width in enumerate(widths):
            block(f"down.{i}.block.{j}", width, out)
    for i, width in enumerate([128, 256, 256]):
        add(f"down.{i}.downsample.conv", width, width, 3, 3)
    block("mid.block_1", 256, 256)
    attention("mid.attn_1", 256)
    block("mid.block_2", 256, 256)
    ups = [(384, 256, 256), (512, 512, 384), (512, 512, 512), (512, 512, 512)]
    for i, widths in enumerate(ups):
        for j, width in enumerate(widths):
            block(f"up.{i}.block.{j}", width, 128 if i == 0 else 256)
    for i in (1, 2, 3):
        add(f"up.{i}.upsample.conv", 256, 256, 3, 3)
    for name in ("down.1.attn.0", "down.1.attn.1", *(f"up.1.attn.{j}" for j in range(3))):
        attention(name, 256)
    add("norm_out", 128)
    add("conv_out", 3, 128, 3, 3)
    return shapes


def test_cifar10_weights_have_the_names_and_shapes_of_the_ddpm_port():
    with torch.device("meta"):
        state = presets.cifar10().net.build().state_dict()
    assert {name: tuple(w.shape) for name, w in state.items()} == ddpm_names()


def test_downsampling_pads_on_the_right_and_below():
    layer = Downsample(TINY, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 4, 6, generator=generator)
    weight, bias = layer.conv.weight, layer.conv.bias
    expected = torch.zeros(1, 2, 2, 3)
    for i in range(2):
        for j in range(3):
            window = x[0, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]  # cut off at the border
            kernel = weight[:, :, : window.shape[1], : window.shape[2]]
            expected[0, :, i, j] = (kernel * window).sum((1, 2, 3)) + bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)  # sums of 18 in float32


def test_upsampling_doubles_every_pixel():
    layer = next(m for m in build().modules() if hasattr(m, "conv") and m.conv.stride == (1, 1))
    nn.init.dirac_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    x = torch.randn(1, 16, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


CONDITIONAL = replace(TINY, conditions=("h", "d"), frequencies=(6.0, 0.5))


@torch.no_grad()
def test_with_the_weights_of_a_network_without_conditions_it_is_that_network():
    plain, told = build(replace(CONDITIONAL, conditions=())), CONDITIONAL.build().eval()
    missing = told.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"temb.conditions.{name}.weight" for name in "hd"]
    x, t = inputs()[0], torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(told(x, t, h=t, d=1 - t), plain(x, t))


@torch.no_grad()
def test_conditions_are_told_apart_and_reach_the_image():
    net, (x, _) = build(CONDITIONAL), inputs()
    t, h = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.2, 0.7])
    out = net(x, t, h=h, d=t)
    assert (net(x, t, h=t, d=h) - out).abs().max() > 1e-3
    moved = net(x, t, h=h + torch.tensor([0.0, 0.1, 0.0]), d=t)
    assert torch.equal(moved[[0, 2]], out[[0, 2]]) and not torch.equal(moved[1], out[1])


def test_a_condition_has_the_derivative_of_finite_differences():
    net = build(CONDITIONAL).double()
    x, t = inputs()[0].double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def out(h):
        return net(x, t, h=h, d=t)

    _, found = torch.func.jvp(out, (t,), (torch.ones_like(t),))
    with torch.no_grad():
        central = (out(t + 1e-5) - out(t - 1e-5)) / 2e-5
    torch.testing.assert_close(found, central, rtol=1e-6, atol=1e-8)
    assert found.abs().max() > 1e-3


def test_a_network_with_conditions_compiles_to_one_graph():
    net, (x, _) = build(CONDITIONAL), inputs()
    t = torch.tensor([0.1, 0.5, 0.9])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t, h=t, d=t), net(x, t, h=t, d=t))


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_the_norm_s_epsilon_is_the_configured_one(eps):
    norm = GroupNorm(replace(TINY, norm_eps=eps), 8)
    x = 0.01 * torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    grouped = x.double().reshape(4, -1)
    deviation = (grouped.var(1, correction=0, keepdim=True) + eps).sqrt()
    expected = ((grouped - grouped.mean(1, keepdim=True)) / deviation).reshape(x.shape).float()
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)  # float32


def attending(net):
    return {name for name, module in net.named_modules() if isinstance(module, Attention)}


@pytest.mark.parametrize(
    ("resolutions", "expected"),
    [
        ((), set()),
        ((4,), {"down.1.attn.0", "up.1.attn.0", "up.1.attn.1"}),
        ((8,), {"down.0.attn.0", "up.0.attn.0", "up.0.attn.1"}),
    ],
)
def test_attention_is_in_the_middle_and_where_it_is_asked_for(resolutions, expected):
    config = replace(TINY, attention_resolutions=resolutions)
    assert attending(config.build()) == expected | {"mid.attn_1"}
    assert attending(replace(config, mid_attention=False).build()) == expected


def test_attention_lets_every_pixel_see_every_other():
    layer = Attention(TINY, 8)
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nn.init.ones_(layer.proj_out.weight)
    layer(x)[0, 0, 0, 0].backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all()


@pytest.mark.parametrize(("conv_shortcut", "size"), [(False, 1), (True, 3)])
def test_the_shortcut_has_the_configured_size(conv_shortcut, size):
    block = ResBlock(replace(TINY, conv_shortcut=conv_shortcut), 8, 16)
    assert block.nin_shortcut.kernel_size == (size, size)


def test_a_block_that_keeps_its_channels_has_no_shortcut():
    assert not list(ResBlock(TINY, 8, 8).nin_shortcut.parameters())


def test_a_block_starts_as_its_shortcut():
    x, temb = torch.randn(1, 16, 4, 4), torch.randn(1, 32)
    assert torch.equal(TINY.build().mid.block_1(x, temb), x)


def test_a_fresh_network_predicts_nothing():
    assert not TINY.build()(*inputs()).any()


@torch.no_grad()
def test_dropout_drops_in_training():
    net = build(replace(TINY, dropout=0.5)).train()
    assert not torch.equal(net(*inputs()), net(*inputs()))


@torch.no_grad()
def test_dropout_does_nothing_outside_training():
    assert torch.equal(build(replace(TINY, dropout=0.5))(*inputs()), build()(*inputs()))


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch():
    net, (x, t) = build(), inputs(4)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    # A convolution may sum in another order for another batch.
    torch.testing.assert_close(net(x, t), alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_time_changes_the_prediction():
    net, (x, _) = build(), inputs(1)
    assert not torch.allclose(net(x, torch.tensor([10])), net(x, torch.tensor([900])), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_x_whatever_the_weights(dtype):
    net, (x, t) = build().bfloat16(), inputs()
    assert net(x.to(dtype), t).dtype == dtype


@torch.no_grad()
def test_bfloat16_weights_give_nearly_the_same_prediction():
    x, t = inputs()
    # Two dozen layers, each of which rounds to 8 bits: 0.002 each
    assert relative_rms(build().bfloat16()(x, t), build()(x, t)) < 0.03


@torch.no_grad()
def test_the_memory_format_of_x_changes_nothing():
    net, (x, t) = build(), inputs()
    assert torch.equal(net(x.to(memory_format=torch.channels_last), t), net(x.contiguous(), t))


@pytest.mark.parametrize("config", [TINY, GUIDED])
def test_every_weight_learns(config):
    net = build(config)
    net(*inputs()).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all(), name
        # A constant added to every key changes no softmax; its gradient is rounding.
        if not re.search(r"\.k\.bias$", name):
            assert p.grad.abs().max() > 1e-7, name


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, GUIDED])
def test_it_compiles_as_one_graph(config):
    net, (x, t) = build(config), inputs()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), net(x, t), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_end_of_the_network_is_not_rounded_under_autocast():
    """Against float64 from the last block on, and beside that end as autocast would have it."""
    net, (x, t), seen = build(), inputs(), []
    hook = net.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        ours = net(x, t)
        hook.remove()
        theirs = net.conv_out(net.norm_out(seen[0].bfloat16()))
    assert torch.equal(seen[0], seen[0].bfloat16().float()), "the blocks before it are in bfloat16"
    wide = copy.deepcopy(net).double()
    exact = wide.conv_out(wide.norm_out(seen[0].double()))
    print(relative_rms(ours, exact), relative_rms(theirs, exact))
    assert relative_rms(ours, exact) < 1e-6 < 1e-3 < relative_rms(theirs, exact)


def test_it_trains_as_one_graph_under_autocast():
    net, (x, t) = build().train(), inputs()
    weights = list(net.parameters())

    def gradients(function):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, t).square().mean()
        return torch.autograd.grad(loss, weights)

    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(compiled), gradients(net), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
        )


@torch.no_grad()
@pytest.mark.parametrize("conv_shortcut", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_s_norms_absorb_changes_nothing(conv_shortcut, dtype):
    """The block as its docstring says it, each step by itself."""
    net = build(replace(TINY, conv_shortcut=conv_shortcut)).to(dtype)
    block = net.up[0].block[0]
    norm1, norm2 = block.norm1, block.norm2
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, 8, 8), (2, 8, 8, 8), (2, 32)
    x, skip, temb = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    whole = torch.cat([x, skip], 1)
    h = block.conv1(F.silu(F.group_norm(whole, 4, norm1.weight, norm1.bias, norm1.eps)))
    h = h + block.temb_proj(F.silu(temb))[:, :, None, None]
    h = block.conv2(F.silu(F.group_norm(h, 4, norm2.weight, norm2.bias, norm2.eps)))
    expected = block.nin_shortcut(whole) + h
    found = block(x, temb, skip)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert relative_rms(found.float(), expected.float()) < 4 * torch.finfo(dtype).eps


class Living(TorchDispatchMode):
    """Count what ops return: how often each ran, and the bytes of it that are still alive."""

    def __init__(self):
        super().__init__()
        self.runs, self.storages = Counter(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        self.runs[func] += 1
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return outputs

    def alive(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def train_step(recompute, dropout=0.3, precision=torch.float32, config=TINY):
    """The gradients of a network, the bytes kept between its passes, and the ops of backward."""
    net = build(replace(config, channels=32, dropout=dropout)).train()
    if recompute:
        recompute_norms(net)
    torch.manual_seed(0)
    with Living() as forward, torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = net(*inputs()).square().mean()
    kept = forward.alive()
    with Living() as backward:
        loss.backward()
    return [p.grad for p in net.parameters()], kept, backward.runs


@pytest.mark.parametrize("config", [TINY, GUIDED])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputed_norms_give_the_same_gradients_to_the_bit(precision, config):
    steps = (train_step(r, precision=precision, config=config)[0] for r in (False, True))
    pairs = zip(*steps, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_recomputing_norms_keeps_less_and_repeats_no_convolution():
    (_, all_kept, plain), (_, kept, again) = (train_step(r, dropout=0.0) for r in (False, True))
    blocks = [m for m in build().modules() if isinstance(m, ResBlock)]
    norm, conv = torch.ops.ds.group_norm_silu.default, torch.ops.aten.convolution.default
    assert (plain[norm], again[norm]) == (0, 2 * len(blocks))
    assert again[conv] == 0
    assert kept < 0.85 * all_kept


@torch.no_grad()
def test_a_scale_shift_block_scales_shifts_and_activates_in_its_norm():
    net = build(GUIDED)
    blocks = [m for m in net.modules() if isinstance(m, ResBlock)]
    with Living() as forward:
        net(*inputs())
    assert forward.runs[torch.ops.ds.group_norm_silu.default] >= 2 * len(blocks) + 1
    assert forward.runs[torch.ops.aten.silu.default] == 1 + len(blocks)  # of the time embedding


def test_a_network_without_blocks_has_no_norms_to_recompute():
    with pytest.raises(ValueError, match="recompute_norms: Linear has no ResBlock"):
        recompute_norms(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 9}, r"image_size \(9\) must be a multiple of 2"),
        ({"image_size": 0}, "image_size must be at least 1, not 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, not 0"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, not 0"),
        ({"channels": 10}, r"channels \(10\) must be a multiple of norm_groups \(4\)"),
        ({"channels": 7, "norm_groups": 7}, "channels must be even and 4 or more, not 7"),
        ({"channels": 2, "norm_groups": 1}, "channels must be even and 4 or more, not 2"),
        ({"norm_groups": 0}, "norm_groups must be at least 1, not 0"),
        ({"channel_mult": ()}, "channel_mult needs one level or more"),
        ({"channel_mult": (1, 0)}, r"channel_mult\[1\] must be at least 1, not 0"),
        ({"dropout": 1.5}, "dropout must be below 1, not 1.5"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, not 0.0"),
        ({"image_size": (8, 9)}, r"image_size \(\(8, 9\)\) must be a multiple of 2"),
        ({"image_size": (8, 8, 8)}, "image_size must be a whole number or a list"),
        ({"channel_mult": (1, 1.3)}, r"must be whole numbers, not \[8, 10.4\]"),
        ({"head_channels": 3}, r"channels \(16\) must be a multiple of head_channels \(3\)"),
        ({"mid_norm_groups": 5}, r"channels \(16\) must be a multiple of mid_norm_groups \(5\)"),
        ({"resnet_down": (1,)}, "resnet_down holds 1; accepted are 0"),
        ({"resnet_up": (0,)}, "resnet_up holds 0; accepted are 1"),
    ],
)
def test_an_impossible_configuration_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=f"^UNetConfig: .*{message}"):
        replace(TINY, **change)


def test_a_network_has_the_shape_of_its_images():
    assert TINY.build().shape == (2, 8, 8)


def test_the_network_asks_nothing_that_pytorch_2_11_cannot_trace(monkeypatch):
    """Its Dynamo breaks a graph at torch.amp.is_autocast_available, which fullgraph refuses."""

    def untraceable(_):
        raise AssertionError("torch.amp.is_autocast_available was called")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    net, (x, t) = build(), inputs()
    assert net(x, t).shape == x.shape
