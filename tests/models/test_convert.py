import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.predictions import Velocity
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.models.convert import read, to_diffusers
from ds.models.teacher import Teacher
from ds.nets import UNet, UNetConfig
from tests import golden
from tests.nets.peers import ARCHITECTURES, DIGITS, Port, change, port, randomized, unpacked


def network(imported):
    net = imported.config.build()
    net.load_state_dict(imported.weights)
    return net.eval().requires_grad_(False)


def assert_agree(ours, theirs, size):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, size, size, generator=generator)
    t = torch.tensor([3, 999])
    expected = theirs(x, t)
    error = (ours(x, t) - expected).norm() / expected.norm()
    assert error < 1e-5  # rounding of float32; a wrong wire, padding or epsilon is beyond 1e-4


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for key, w in expected.items():
        assert torch.equal(weights[key], w), key


# --- the PyTorch ports


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_port_computes_the_same(tmp_path, name):
    net, size = port(name), ARCHITECTURES[name][0]
    torch.save(net.state_dict(), tmp_path / "weights")
    imported = read(tmp_path / "weights")
    assert (imported.kind, imported.prediction) == ("teacher", "eps")
    assert imported.schedule == LinearBeta(1000, 1e-4, 0.02)
    assert imported.config.image_size == size
    assert_same(imported.weights, net.state_dict())
    assert_agree(network(imported), net, min(size, 64))


def test_list_of_the_ddim_code_gives_its_ema(tmp_path):
    model, ema = port("celeba").state_dict(), port("celeba", seed=1).state_dict()
    optimizer = {"state": {}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    model = {f"module.{key}": w for key, w in model.items()}
    torch.save([model, optimizer, 3, 400, ema], tmp_path / "ckpt.pth")
    imported = read(tmp_path / "ckpt.pth")
    assert_same(imported.weights, ema)
    assert imported.facts["weights"] == "EMA"
    torch.save([model, optimizer, 3, 400], tmp_path / "ckpt.pth")
    imported = read(tmp_path / "ckpt.pth")
    assert_same(imported.weights, {key.removeprefix("module."): w for key, w in model.items()})
    assert imported.facts["weights"] == "model, without EMA"


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_state_dicts_are_read_whatever_the_file_is_called(tmp_path, form):
    state, path = port("cifar10").state_dict(), tmp_path / "weights.h5"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    imported = read(path)
    assert_same(imported.weights, state)
    assert imported.config == UNetConfig(channels=32)


def test_an_image_size_the_file_does_not_tell_is_asked_for(tmp_path):
    net = randomized(Port(32, (1, 2), 1, num_blocks=3, in_channels=1))
    torch.save(net.state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"small\.pt: .* pass image_size"):
        read(tmp_path / "small.pt")
    assert read(tmp_path / "small.pt", image_size=8).config == UNetConfig(
        image_size=8,
        in_channels=1,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=3,
        attention_resolutions=(4,),
    )


def test_3x3_shortcuts_are_known_by_their_name(tmp_path):
    config = UNetConfig(channels=32, conv_shortcut=True)
    state = randomized(UNet(config)).state_dict()
    theirs = {key.replace("nin_", "conv_"): w.contiguous() for key, w in state.items()}
    torch.save(theirs, tmp_path / "weights.pt")
    imported = read(tmp_path / "weights.pt")
    assert imported.config == config
    assert_same(imported.weights, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    state = {key: w.to(dtype) for key, w in port("cifar10").state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    assert_same(read(tmp_path / "half.pt").weights, {key: w.float() for key, w in state.items()})


# --- diffusers


def peer():
    """Return diffusers; a test that needs it is skipped without."""
    return pytest.importorskip("diffusers")


def unet(name, c=32):
    size, mult, level = ARCHITECTURES[name]
    attend = ["Attn" * (i == level) for i in range(len(mult))]
    return randomized(
        peer().UNet2DModel(
            sample_size=size,
            block_out_channels=tuple(c * m for m in mult),
            down_block_types=tuple(f"{a}DownBlock2D" for a in attend),
            up_block_types=tuple(f"{a}UpBlock2D" for a in attend[::-1]),
            attention_head_dim=None,
            norm_eps=1e-6,
            freq_shift=1,
            flip_sin_to_cos=False,
            downsample_padding=0,
        )
    )


def before_2023(state):
    new = ("to_q", "to_k", "to_v", "to_out.0")
    old = ("query", "key", "value", "proj_attn")
    renamed = {}
    for key, w in state.items():
        for a, b in zip(new, old, strict=True):
            key = key.replace(f".{a}.", f".{b}.")
        renamed[key] = w
    return renamed


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_diffusers_computes_the_same(tmp_path, name):
    net, size = unet(name), ARCHITECTURES[name][0]
    scheduler = peer().DDPMScheduler(beta_end=0.01, prediction_type="v_prediction")
    peer().DDPMPipeline(net, scheduler).save_pretrained(tmp_path)
    imported = read(tmp_path)
    assert imported.config.image_size == size
    assert imported.schedule == LinearBeta(1000, 1e-4, 0.01)
    assert imported.prediction == "v"
    assert imported.facts["timestep_spacing"] == "leading"
    assert_agree(network(imported), lambda x, t: net(x, t).sample, min(size, 64))


def test_the_width_of_cifar10_computes_the_same_and_has_its_count(tmp_path):
    net = unet("cifar10", c=128)
    net.save_pretrained(tmp_path)
    imported = read(tmp_path)
    assert imported.config == UNetConfig()
    assert sum(w.numel() for w in imported.weights.values()) == 35_746_307
    assert "assumed" in imported.facts["schedule"]
    assert_agree(network(imported), lambda x, t: net(x, t).sample, 32)


def test_layouts_and_key_names_of_diffusers_give_the_same_weights(tmp_path):
    net = unet("cifar10")
    peer().DDIMPipeline(net, peer().DDIMScheduler()).save_pretrained(tmp_path / "new")
    expected = read(tmp_path / "new")
    assert_same(read(tmp_path / "new" / "unet").weights, expected.weights)

    old = tmp_path / "old"  # flat, pickled, with fewer fields, as the first ones were published
    old.mkdir()
    fields = json.loads((tmp_path / "new" / "unet" / "config.json").read_text())
    for field in ("mid_block_type", "dropout", "num_train_timesteps", "attn_norm_num_groups"):
        del fields[field]
    (old / "config.json").write_text(json.dumps(fields))
    (old / "scheduler_config.json").write_text(
        '{"_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "linear", '
        '"beta_start": 0.0001, "clip_sample": true, "num_train_timesteps": 1000, '
        '"trained_betas": null, "variance_type": "fixed_large"}'
    )
    state = before_2023(net.state_dict())
    assert "mid_block.attentions.0.query.weight" in state
    torch.save(state, old / "diffusion_pytorch_model.bin")
    imported = read(old)
    assert_same(imported.weights, expected.weights)
    assert imported[1] == expected[1] and imported[3:5] == expected[3:5]


@pytest.mark.parametrize("field", ["attention_head_dim", "time_embedding_dim"])
def test_fields_that_say_the_default_another_way_are_taken(tmp_path, field):
    unet("cifar10").save_pretrained(tmp_path)
    expected = read(tmp_path).config
    width = {"attention_head_dim": 64, "time_embedding_dim": 128}[field]
    change(tmp_path / "config.json", {field: width})
    assert read(tmp_path).config == expected


@pytest.mark.parametrize("config", [DIGITS, UNetConfig(channels=32, norm_eps=1e-3, dropout=0.1)])
def test_round_trip_through_diffusers_is_exact(tmp_path, config):
    state = randomized(UNet(config)).state_dict()
    to_diffusers(tmp_path / "out", config, state, LinearBeta(500, 2e-4, 0.03), "v")
    imported = read(tmp_path / "out")
    assert imported.config == config
    assert_same(imported.weights, state)
    assert (imported.schedule, imported.prediction) == (LinearBeta(500, 2e-4, 0.03), "v")
    again = tmp_path / "again"
    peer().DDIMPipeline.from_pretrained(tmp_path / "out").save_pretrained(again)
    assert read(again).config == config
    assert_same(read(again).weights, state)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_pipeline_draws_our_images(tmp_path, prediction):
    # little noise at the end keeps the images of an untrained network between black and white
    net, schedule = randomized(UNet(DIGITS)), LinearBeta(1000, 1e-4, 2e-3)
    to_diffusers(tmp_path, DIGITS, net.state_dict(), schedule, prediction)
    pipeline = peer().DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline(4, generator, num_inference_steps=20, output_type="np").images
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    teacher = Teacher(Denoiser(net, schedule, prediction), DDIM(), grids.uniform(20))
    ours = (teacher.sample(noise) / 2 + 0.5).clamp(0, 1)
    assert tuple(pipeline.scheduler.timesteps.tolist()) == teacher.grid
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.4
    # the scheduler's table is float32, ours float64
    assert torch.allclose(ours.movedim(1, -1), torch.from_numpy(theirs), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "schedule", "prediction", "message"),
    [
        (UNetConfig(channels=32, conv_shortcut=True), LinearBeta(), "eps", "conv_shortcut"),
        (UNetConfig(channels=32, conditions=("h",)), LinearBeta(), "eps", "conditions"),
        (UNetConfig(channels=32, frequencies=(6.0, 0.5)), LinearBeta(), "eps", "frequencies"),
        (UNetConfig(channels=32), LinearBeta(), "score", "'score'"),
        (UNetConfig(channels=32), LinearBeta(), Velocity(), "Velocity"),
        (UNetConfig(channels=32), None, "eps", "None"),
    ],
)
def test_what_diffusers_cannot_say_is_not_written(tmp_path, config, schedule, prediction, message):
    state = config.build().state_dict()
    with pytest.raises(ValueError, match=message):
        to_diffusers(tmp_path / "out", config, state, schedule, prediction)
    assert not (tmp_path / "out").exists()


# --- the HDF5 files of 2021

# The attributes of the Keras models in the order of their constructors, layer by layer; a layer
# that is appended to a list later stands in its list.
LSUN = """
conv_in conv_out
down.0.block.0 down.0.block.1 down.0.downsample down.1.block.0 down.1.block.1 down.1.downsample
down.2.block.0 down.2.block.1 down.2.downsample down.3.block.0 down.3.block.1 down.3.downsample
down.4.attn.0 down.4.attn.1 down.4.block.0 down.4.block.1 down.4.downsample
down.5.block.0 down.5.block.1
mid.attn_1 mid.block_1 mid.block_2 norm_out temb.dense.0 temb.dense.1
up.0.block.0 up.0.block.1 up.0.block.2
up.1.block.0 up.1.block.1 up.1.block.2 up.1.upsample
up.2.block.0 up.2.block.1 up.2.block.2 up.2.upsample
up.3.block.0 up.3.block.1 up.3.block.2 up.3.upsample
up.4.attn.0 up.4.attn.1 up.4.attn.2 up.4.block.0 up.4.block.1 up.4.block.2 up.4.upsample
up.5.block.0 up.5.block.1 up.5.block.2 up.5.upsample
"""
CELEBA = """
temb.dense.0 temb.dense.1 conv_in
down.0.block.0 down.0.block.1 down.0.downsample down.1.block.0 down.1.block.1 down.1.downsample
down.2.block.0 down.2.block.1 down.2.attn.0 down.2.attn.1 down.2.downsample
down.3.block.0 down.3.block.1 down.3.downsample down.4.block.0 down.4.block.1
mid.block_1 mid.attn_1 mid.block_2
up.0.block.0 up.0.block.1 up.0.block.2
up.1.block.0 up.1.block.1 up.1.block.2 up.1.upsample
up.2.block.0 up.2.block.1 up.2.block.2 up.2.attn.0 up.2.attn.1 up.2.attn.2 up.2.upsample
up.3.block.0 up.3.block.1 up.3.block.2 up.3.upsample
up.4.block.0 up.4.block.1 up.4.block.2 up.4.upsample
norm_out conv_out
"""
KERAS = {"lsun": LSUN, "celeba": CELEBA}
# Our name of a part, and the Keras class whose running number it gets.
PARTS = {
    "lsun": {
        "block": "conv1 conv2 nin_shortcut norm1 norm2 temb_proj",
        "attn": "k norm proj_out q v",
    },
    "celeba": {
        "block": "norm1 conv1 temb_proj norm2 conv2 nin_shortcut",
        "attn": "norm q k v proj_out",
    },
}


def keras_layers(name, state):
    """List (class, [(class, kernel or gamma, bias or beta), ...]) for each layer of a model."""
    layers = []
    for layer in KERAS[name].split():
        kind = next((k for k in ("attn", "block", "downsample", "upsample") if k in layer), None)
        if kind in ("attn", "block"):
            parts = [f"{layer}.{part}" for part in PARTS[name][kind].split()]
        else:
            parts = [f"{layer}.conv" if kind else layer]
        variables = []
        for part in parts:
            if f"{part}.weight" in state:
                weight, bias = state[f"{part}.weight"].numpy(), state[f"{part}.bias"].numpy()
                if weight.ndim == 4:
                    weight = weight.transpose(2, 3, 1, 0)
                    weight = weight[0, 0] if weight.shape[:2] == (1, 1) else weight
                elif weight.ndim == 2:
                    weight = weight.transpose()
                cls = {4: "conv2d", 2: "dense", 1: "group_normalization"}[weight.ndim]
                variables.append((cls, weight, bias))
        cls = {"attn": "attn_block", "block": "resnet_block", None: variables[0][0]}
        layers.append((cls.get(kind, kind), variables))
    return layers


def write_keras(path, layers, *, nested, strings=np.array):
    """Write a Keras weights file whose running numbers say nothing."""
    numbers = iter(random.Random(5).sample(range(1000), 999))
    model = "ddpm__checkpoint__model"
    with pytest.importorskip("h5py").File(path, "w") as file:
        names, inner = [], []
        for cls, variables in layers:
            layer = f"{cls}_{next(numbers)}"
            group = file.require_group(f"{model}_2" if nested else layer)
            listed = []
            for part, *arrays in variables:
                place = f"{model}/{layer}/"
                if cls != part:
                    place += f"{part}_{next(numbers)}/"
                ends = ("gamma:0", "beta:0") if arrays[0].ndim == 1 else ("kernel:0", "bias:0")
                for end, array in zip(ends, arrays, strict=True):
                    group[place + end] = array
                    listed.append(place + end)
            if not nested:
                names.append(layer)
                group.attrs["weight_names"] = strings(listed)
            inner += listed
        if nested:
            names = [f"{model}_2"]
            file[names[0]].attrs["weight_names"] = strings(inner)
            file.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
        else:
            names.insert(1, "dropout_7")
            file.create_group("dropout_7").attrs["weight_names"] = np.zeros(0)
        file.attrs["layer_names"] = strings(names)
        file.attrs["backend"] = "tensorflow"


def as_objects(names):
    return np.array(names, dtype=object)


def as_bytes(names):
    return np.array([name.encode() for name in names])


@pytest.mark.parametrize("strings", [as_objects, as_bytes])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", KERAS)
def test_hdf5_weights_find_their_places(tmp_path, name, nested, strings):
    size, mult, _ = ARCHITECTURES[name]
    state = port(name).state_dict()
    write_keras(tmp_path / "model", keras_layers(name, state), nested=nested, strings=strings)
    imported = read(tmp_path / "model")
    assert_same(imported.weights, state)
    assert imported.config == UNetConfig(
        image_size=size, channels=32, channel_mult=mult, norm_eps=1e-3
    )
    assert imported.kind == ("student" if nested else "teacher")
    assert imported.prediction == (None if nested else "eps")
    assert imported.schedule == LinearBeta()


def test_long_lists_of_names_come_in_pieces(tmp_path):
    state = port("lsun").state_dict()
    write_keras(tmp_path / "model", keras_layers("lsun", state), nested=True, strings=as_bytes)
    with pytest.importorskip("h5py").File(tmp_path / "model", "a") as file:
        attributes = file["ddpm__checkpoint__model_2"].attrs
        for i, piece in enumerate(np.array_split(attributes["weight_names"], 3)):
            attributes[f"weight_names{i}"] = piece
        del attributes["weight_names"]
    assert_same(read(tmp_path / "model").weights, state)


@pytest.mark.parametrize("name", ["ddpm_cifar10_c32", "student_cifar10_c32"])
def test_hdf5_of_2021_computes_what_it_did(tmp_path, name):
    path = tmp_path / "file"
    path.write_bytes(unpacked(name))
    imported = read(path)
    assert imported.config == golden.CONFIG
    assert imported.facts["format"] == "denoising-student-2021"
    data, net = golden.arrays(name), network(imported)
    if imported.kind == "teacher":
        y = net(data["z"], data["t"])
    else:
        y = data["z"] - net(data["z"], torch.tensor([999, 999]))
    assert (y - data["y"]).norm() / data["y"].norm() < 1e-5
