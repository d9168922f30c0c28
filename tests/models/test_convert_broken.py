"""Files that are broken, or not what they seem: each is refused in one clear line."""

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ds.diffusion.schedules import LinearBeta
from ds.models.convert import read, to_diffusers
from ds.nets import UNet
from tests.nets.peers import DIGITS, Port, change, unpacked

h5py = pytest.importorskip("h5py")


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One sound file or directory of each kind."""
    folder = tmp_path_factory.mktemp("samples")
    state = Port(32, (1, 2, 2, 2), 1, num_blocks=1).state_dict()
    torch.save(state, folder / "pt")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safe")
    (folder / "h5").write_bytes(unpacked("ddpm_cifar10_c32"))
    to_diffusers(folder / "dir", DIGITS, UNet(DIGITS).state_dict(), LinearBeta())
    return folder


def replaced(kind, content):
    def make(path):
        path.write_bytes(content)

    return kind, make


def cut(kind, keep):
    def make(path):
        path.write_bytes(path.read_bytes()[:keep])

    return kind, make


def state(edit):
    """A PyTorch file after edit(state dict), which may return another content."""

    def make(path):
        weights = torch.load(path, weights_only=True)
        edited = edit(weights)
        torch.save(weights if edited is None else edited, path)

    return "pt", make


def hdf5(edit):
    def make(path):
        with h5py.File(path, "a") as file:
            edit(file)

    return "h5", make


def unet_fields(**fields):
    return "dir", lambda path: change(path / "unet" / "config.json", fields)


def scheduler_fields(**fields):
    return "dir", lambda path: change(path / "scheduler" / "scheduler_config.json", fields)


def directory(edit):
    return "dir", edit


def unet_state(edit):
    def make(path):
        file = path / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        edit(weights)
        save_file(weights, file)

    return "dir", make


def put(key, change):
    return lambda weights: weights.update({key: change(weights[key])})


def drop(key):
    def edit(weights):
        del weights[key]

    return edit


def poison(w):
    w = w.clone()
    w.view(-1)[3] = float("nan")
    return w


def swap(file, key, array):
    del file[key]
    file[key] = array


CONV = "down.1.block.0.conv1.weight"
WIDTH = "down.2.block.0.conv2.bias"
KERNEL = "conv2d/ddpm__checkpoint__model/conv2d/kernel:0"
BIAS = "conv2d/ddpm__checkpoint__model/conv2d/bias:0"
OUT = "conv2d_1/ddpm__checkpoint__model/conv2d_1/kernel:0"
UNET = "down_blocks.0.resnets.0.conv1.weight"
OLD_KEY = "mid_block.attentions.0.query.weight"
BOMB = "pt", lambda path: torch.save({"conv_in.weight": Bomb(f"{path}-proof")}, path)
OLD_BOMB = (
    "pt",
    lambda path: torch.save(Bomb(f"{path}-proof"), path, _use_new_zipfile_serialization=False),
)


def other_kind(file):
    layer = file["conv2d"]
    names = layer.attrs["weight_names"]
    layer.attrs["weight_names"] = [names[0].replace("kernel", "gamma"), names[1]]
    file.move(KERNEL, KERNEL.replace("kernel", "gamma"))


def shorter(file):
    *names, last = file.attrs["layer_names"]
    file.attrs["layer_names"] = names
    del file[last]


def elsewhere(file):
    shape, dtype = file[KERNEL].shape, file[KERNEL].dtype
    del file[KERNEL]
    file.create_dataset(KERNEL, shape, dtype, external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])


BROKEN = {
    "empty": (*replaced("pt", b""), "not a checkpoint"),
    "text": (*replaced("pt", b"weights: none\n"), "not a checkpoint"),
    "html": (*replaced("h5", b"<!DOCTYPE html><html>"), "not a checkpoint"),
    "zip of something else": (*replaced("pt", b"PK\x05\x06" + bytes(18)), "not a checkpoint"),
    "zip signature only": (*replaced("pt", b"PK\x03\x04" + bytes(99)), "PyTorch file"),
    "half a zip": (*cut("pt", 1_000_000), "PyTorch file"),
    "half a legacy file": (*cut("legacy", 1_000_000), "PyTorch file"),
    "legacy signature only": (*cut("legacy", 40), "PyTorch file"),
    "half a safetensors file": (*cut("safe", 1_000_000), "safetensors file"),
    "pickle bomb": (*BOMB, "PyTorch file of plain tensors; nothing in it was run"),
    "legacy pickle bomb": (*OLD_BOMB, "PyTorch file of plain tensors; nothing in it was run"),
    "other tensors": (*state(lambda w: {"a": w[CONV]}), "conv_in.bias is missing"),
    "nothing": (*state(lambda w: w.clear()), "conv_in.bias is missing"),
    "one tensor": (*state(lambda w: w[CONV]), "holds one Tensor"),
    "list of three": (*state(lambda w: [w, {}, 3]), "holds a list of 3"),
    "number for an EMA": (*state(lambda w: [w, {}, 3, 4, 5]), "holds one int"),
    "number for a weight": (*state(lambda w: {**w, CONV: 3}), f"'{CONV}' of the type int"),
    "number for a key": (*state(lambda w: {**w, 3: w[CONV]}), "holds 3 of the type Tensor"),
    "integers": (*state(put(CONV, lambda w: w.long())), f"{CONV} is torch.int64"),
    "float64": (*state(put(CONV, lambda w: w.double())), f"{CONV} is torch.float64"),
    "sparse": (*state(put(CONV, lambda w: w.to_sparse())), f"{CONV} is torch.float32, torch.sp"),
    "no values": (*state(put(CONV, lambda w: w.to("meta"))), f"{CONV} is torch.float32"),
    "not a number": (*state(put(CONV, poison)), f"{CONV} is not finite"),
    "extra key": (
        *state(lambda w: w.update(logvar=torch.zeros(9))), r"no weight logvar \[9\]",
    ),
    "missing key": (*state(drop(CONV)), rf"{CONV} \[64, 32, 3, 3\] is missing"),
    "swapped shape": (
        *state(put(CONV, lambda w: w.transpose(0, 1))),
        rf"{CONV} has the shape \[32, 64, 3, 3\], the network needs \[64, 32, 3, 3\]",
    ),
    "swapped first shape": (
        *state(put("conv_in.weight", lambda w: w.permute(2, 3, 1, 0))),
        r"conv_in.weight has the shape \[3, 3, 3, 32\], the network needs \[32, 3, 3, 3\]",
    ),
    "flat convolution": (
        *state(put("conv_in.weight", lambda w: w.flatten())),
        r"conv_in.weight has the shape \[864\], the network needs \[32, 3, 3, 3\]",
    ),
    "bias for none": (
        *state(put("conv_in.bias", lambda w: w[:0])), r"conv_in.bias has the shape \[0\]",
    ),
    "missing bias": (*state(drop(WIDTH)), f"{WIDTH} is missing"),
    "uneven width": (*state(put(WIDTH, lambda w: w[:50])), rf"{WIDTH} has the shape \[50\]"),
    "weights of diffusers alone": (
        *state(lambda w: {"time_embedding.linear_1.weight": w[CONV]}), "config.json",
    ),
    "HDF5 signature only": (*cut("h5", 8), "HDF5 file"),
    "half an HDF5 file": (*cut("h5", 1_000_000), "HDF5 file"),
    "HDF5 without lists": (
        *hdf5(lambda f: f.attrs.pop("layer_names")), "not a weights file of Keras",
    ),
    "HDF5 with nothing": (*hdf5(lambda f: f.clear()), "layer conv2d is listed and not there"),
    "HDF5 with a dangling group": (
        *hdf5(lambda f: f.pop("resnet_block_1")), "layer resnet_block_1 is listed and not there",
    ),
    "HDF5 with a dangling link": (
        *hdf5(lambda f: swap(f, "resnet_block_1", h5py.SoftLink("/nowhere"))), "resnet_block_1",
    ),
    "HDF5 with a link outside": (
        *hdf5(lambda f: swap(f, "resnet_block_1", h5py.ExternalLink("a.h5", "/a"))),
        "resnet_block_1",
    ),
    "HDF5 with data outside": (*hdf5(elsewhere), f"{KERNEL} is float32, in another file"),
    "HDF5 without a variable": (*hdf5(lambda f: f.pop(BIAS)), f"{BIAS} is not there"),
    "HDF5 with one more": (
        *hdf5(lambda f: f["conv2d"].create_dataset("a", data=3.0)), "dataset conv2d/a is in no",
    ),
    "HDF5 with a variable listed twice": (
        *hdf5(lambda f: f["conv2d"].attrs.modify("weight_names", [BIAS[7:]] * 2)), "listed twice",
    ),
    "HDF5 without its last layer": (
        *hdf5(shorter), "variable 326 is none; the network has up.3.upsample.conv.weight",
    ),
    "HDF5 with a swapped first shape": (
        *hdf5(lambda f: swap(f, KERNEL, f[KERNEL][()].transpose(0, 1, 3, 2))),
        rf"begins with {KERNEL}, a kernel \[3, 3, 32, 3\]; .* with a kernel \[3, 3, 3, c\]",
    ),
    "HDF5 with a swapped shape": (
        *hdf5(lambda f: swap(f, OUT, f[OUT][()].transpose(0, 1, 3, 2))),
        rf"2 is {OUT}, a kernel \[3, 3, 3, 32\]; .* conv_out.weight, a kernel \[3, 3, 32, 3\]",
    ),
    "HDF5 of another kind": (*hdf5(other_kind), "a gamma .* a kernel"),
    "HDF5 with integers": (*hdf5(lambda f: swap(f, KERNEL, f[KERNEL][()].astype(int))), "int64"),
    "HDF5 with not-a-number": (
        *hdf5(lambda f: swap(f, BIAS, f[BIAS][()] * np.nan)), f"{BIAS} is not finite",
    ),
    "HDF5 with a scalar": (*hdf5(lambda f: swap(f, KERNEL, 1.0)), "begins with conv2d"),
    "directory without a config": (
        *directory(lambda d: (d / "unet" / "config.json").unlink()), "no network here",
    ),
    "directory without weights": (
        *directory(lambda d: (d / "unet" / "diffusion_pytorch_model.safetensors").unlink()),
        "weights are missing",
    ),
    "config that is no JSON": (
        *directory(lambda d: (d / "unet" / "config.json").write_text("{")), "not valid JSON",
    ),
    "config that is a list": (
        *directory(lambda d: (d / "unet" / "config.json").write_text("[1]")), "holds a list",
    ),
    "another model": (*unet_fields(_class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
    "a field of the future": (*unet_fields(gate="tanh"), "gate is 'tanh'; accepted is null"),
    "classes": (*unet_fields(num_class_embeds=10), "class_embedding.weight .* is missing"),
    "classes by a time": (*unet_fields(class_embed_type="timestep"), "class_embed_type is 'times"),
    "pixels from 0 to 1": (*unet_fields(center_input_sample=True), "center_input_sample is True"),
    "random frequencies": (
        *unet_fields(time_embedding_type="fourier"), "is 'fourier'; accepted is 'positional'",
    ),
    "learned times": (*unet_fields(time_embedding_type="learned"), "embedding_type is 'learned'"),
    "other frequencies": (*unet_fields(freq_shift=0.5), "freq_shift is 0.5; accepted is 0 or 1"),
    "another activation": (*unet_fields(act_fn="gelu"), "act_fn is 'gelu'; .* 'silu' or 'swish'"),
    "other padding": (*unet_fields(downsample_padding=2), "downsample_padding is 2; .* is 0 or 1"),
    "other resampling": (*unet_fields(downsample_type="fir"), "'fir'; accepted is 'conv' or 'res"),
    "norms in space": (
        *unet_fields(resnet_time_scale_shift="spatial"), "'spatial'; accepted is 'default' or",
    ),
    "no middle": (*unet_fields(mid_block_type=None), "mid_block_type is None"),
    "a scaled middle": (*unet_fields(mid_block_scale_factor=1.4), "mid_block_scale_factor is 1.4"),
    "heads that do not fit": (
        *unet_fields(attention_head_dim=24), r"attention_head_dim is 24; .* divisor of \[64, 64\]",
    ),
    "a head wider than all": (*unet_fields(attention_head_dim=128), "attention_head_dim is 128"),
    "heads in words": (*unet_fields(attention_head_dim="8"), "attention_head_dim is '8'"),
    "skip blocks": (
        *unet_fields(down_block_types=["SkipDownBlock2D", "AttnDownBlock2D"]),
        "down_block_types is .*SkipDownBlock2D.* accepted is 2 of DownBlock2D, AttnDown",
    ),
    "K blocks": (
        *unet_fields(up_block_types=["AttnUpBlock2D", "KUpBlock2D"]), "up_block_types is .*KUpBl",
    ),
    "attention on the way down alone": (
        *unet_fields(up_block_types=["UpBlock2D", "UpBlock2D"]),
        r"up_block_types have attention at the levels \[\]; accepted is .*, \[1\]",
    ),
    "a block type less": (
        *unet_fields(up_block_types=["AttnUpBlock2D"]), "accepted is 2 of UpBlock2D",
    ),
    "other channels out": (
        *unet_fields(out_channels=3), "out_channels is 3; accepted is 1, or 2 with a learned",
    ),
    "groups that do not fit": (
        *unet_fields(block_out_channels=[32, 44]), r"channels \(44\) .* norm_groups \(8\)",
    ),
    "groups of the middle that do not fit": (
        *unet_fields(attn_norm_num_groups=7), r"channels \(64\) .* mid_norm_groups \(7\)",
    ),
    "odd channels": (*unet_fields(block_out_channels=[31, 64]), "channels must be even"),
    "channels in words": (*unet_fields(block_out_channels="32"), "block_out_channels is '32'"),
    "no size": (*unet_fields(sample_size=None), "sample_size is None; .* give image_size"),
    "three sizes": (*unet_fields(sample_size=[8, 8, 8]), r"sample_size is \[8, 8, 8\]"),
    "odd size": (*unet_fields(sample_size=9), "must be a multiple of 2"),
    "true for a number": (*unet_fields(freq_shift=True), "freq_shift is True; accepted is 0 or 1"),
    "a number for true": (*unet_fields(add_attention=1), "add_attention is 1; accepted is True or"),
    "a time embedding of no machine": (*unet_fields(time_embedding_dim=2**60), "memory"),
    "channels of no machine": (*unet_fields(block_out_channels=[2**40, 2**41]), "memory"),
    "odd width": (*unet_fields(sample_size=[8, 9]), r"image_size \(\(8, 9\)\) must be a multiple"),
    "epsilon in words": (*unet_fields(norm_eps="small"), "norm_eps is 'small'"),
    "a level less": (
        *unet_fields(block_out_channels=[32], down_block_types=["AttnDownBlock2D"],
                     up_block_types=["AttnUpBlock2D"]),
        "is missing",
    ),
    "a schedule we lack": (
        *scheduler_fields(beta_schedule="laplace"),
        "beta_schedule is 'laplace'; accepted is 'linear' or 'scaled_linear' or 'squaredcos_cap_v2'"
        " or 'sigmoid'",
    ),
    "a scheduler without betas": (
        *scheduler_fields(_class_name="ScoreSdeVeScheduler"),
        "_class_name is 'ScoreSdeVeScheduler', whose schedule is not read; accepted are",
    ),
    "a class that is no name": (*scheduler_fields(_class_name=["x"]), r"_class_name is \['x'\]"),
    "a flow": (*scheduler_fields(use_flow_sigmas=True), "use_flow_sigmas is True"),
    "continuous times": (*scheduler_fields(timestep_type="continuous"), "is 'continuous'"),
    "fewer betas than steps": (
        *scheduler_fields(trained_betas=[0.1, 0.2]),
        "trained_betas has 2 numbers; accepted are 1000, its num_train_timesteps",
    ),
    "a beta above 1": (
        *scheduler_fields(trained_betas=[0.1, 1.2], num_train_timesteps=2),
        r"values\[1\] must be",
    ),
    "an odd spacing": (*scheduler_fields(timestep_spacing="log"), "timestep_spacing is 'log'"),
    "an offset beyond the steps": (*scheduler_fields(steps_offset=2000), "t = "),
    "a quantile above 1": (
        *scheduler_fields(thresholding=True, dynamic_thresholding_ratio=2),
        "quantile must be",
    ),
    "a range that is no number": (*scheduler_fields(clip_sample_range="1"), "clip_sample_range"),
    "a flag that is no flag": (*scheduler_fields(thresholding="no"), "thresholding is 'no'"),
    "betas that fall": (*scheduler_fields(beta_start=0.5), "beta_start <= beta_end"),
    "no betas": (*scheduler_fields(beta_start=None), "beta_start is None"),
    "a prediction we lack": (*scheduler_fields(prediction_type="flow"), "prediction_type"),
    "half a learned variance": (*unet_fields(out_channels=2), r"conv_out.weight has .* \[2, 32"),
    "unet: missing key": (*unet_state(drop(UNET)), f"{UNET} .* is missing"),
    "unet: extra key": (
        *unet_state(lambda w: w.update(a=torch.zeros(2))), r"no weight a \[2\]",
    ),
    "unet: both names of a key": (
        *unet_state(lambda w: w.update({OLD_KEY: torch.zeros(64, 64)})), f"no weight {OLD_KEY}",
    ),
    "unet: other shape": (
        *unet_state(put(UNET, lambda w: w[:, :8].contiguous())), r"\[32, 8, 3, 3\]",
    ),
    "unet: not a number": (*unet_state(put(UNET, poison)), f"{UNET} is not finite"),
    "unet: integers": (*unet_state(put(UNET, lambda w: w.int())), f"{UNET} is torch.int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_in_one_line(samples, tmp_path, name):
    kind, edit, message = BROKEN[name]
    path = tmp_path / "given"
    (shutil.copytree if kind == "dir" else shutil.copyfile)(samples / kind, path)
    edit(path)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    assert not (tmp_path / "given-proof").exists()


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="given: there is no such file or directory"):
        read(tmp_path / "given")


@pytest.mark.parametrize("kind", ["h5", "dir"])
def test_an_image_size_against_the_file_is_refused(samples, kind):
    with pytest.raises(ValueError, match=r"image_size|sample_size"):
        read(samples / kind, image_size=128)
