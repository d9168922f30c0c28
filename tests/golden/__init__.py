"""Outputs of reference implementations, on weights drawn at random; nothing was trained.

The weights are rounded to multiples of 1/256.

- ddpm_*, student_*, ddim100_*: the 2021 TensorFlow code, with 32 base channels instead of 128.
  GroupNorm's epsilon there is 1e-3.
- edm_ddpmpp: a network snapshot as EDM pickles them, without the source text that its pickles
  hold: EDMPrecond of a DDPM++ of 16 x 16, 32 channels x (1, 2), with 9 augmentation inputs;
  `y` = D(noise * sigma; sigma).
- adm_uncond: a state dict of guided-diffusion's UNetModel of 32 x 32, 64 channels x (1, 2), heads
  of 32 channels in the legacy order, scale-shift norms, 6 output channels; `y` = net(noise, t).
- networks: outputs of networks of EDM and guided-diffusion; the cases are in networks.py beside it.
- openai_unets: UNetModel of improved-diffusion, guided-diffusion (twice; once with the half-wide
  first level of the model for 512 pixels) and consistency_models: the shapes of each state dict,
  and `y` = net(noise, t, label) with the weights that `drawn` makes from their names.
- openai_classifier: the same for guided-diffusion's classifier, EncoderUNetModel.
- edm_snapshots: five networks of EDM's code in its four preconditioners: their settings, the shapes
  of their weights, and `y` = D(noise * sigma; sigma, label), with weights made in the same way.
- samplers: edm*: EDM's `edm_sampler`; k_*: k-diffusion's `sample_heun`; adm_*: guided-diffusion's
  `p_sample_loop`, and ddim_adm_* its `ddim_sample_loop`. All start from `z` and add `noise`, in
  order. `.x` is what each call of the network was given, and the sample last, `.t` its time or
  noise level. The networks are the formulas of tests/diffusion/test_samplers.py. `steps_T_name` is
  guided-diffusion's `space_timesteps(T, name)`.
"""

import json
import lzma
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds.nets import UNet, UNetConfig

FOLDER = Path(__file__).parent
CONFIG = UNetConfig(channels=32, norm_eps=1e-3)


def arrays(name: str) -> dict[str, Tensor]:
    """Read the .npz, images as [N, C, H, W], and make the noise they belong to."""
    with np.load(FOLDER / f"{name}.npz") as file:
        data = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    rng = np.random.default_rng(int(data["seed"]))
    z = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    return {**data, "y": data["y"].movedim(-1, 1), "z": torch.from_numpy(z).movedim(-1, 1)}


def teachers(name: str) -> tuple[bytes, dict[str, Tensor]]:
    """Return the bytes of an EDM or ADM file, and its .npz with the noise [4, 3, R, R] as `z`."""
    (packed,) = FOLDER.glob(f"{name}.*.xz")
    with np.load(FOLDER / f"{name}.npz") as file:
        data = {key: torch.from_numpy(np.asarray(file[key])) for key in file}
    z = np.random.default_rng(int(data["seed"])).normal(size=data["y"][:, :3].shape)
    return lzma.decompress(packed.read_bytes()), {**data, "z": torch.from_numpy(z).float()}


def openai(name: str, file: str = "openai_unets") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dict of a network in a file, and its t, y, noise and perhaps label."""
    shapes, data = _case(file, name, "shapes")
    return {key: drawn(key, shape) for key, shape in shapes.items()}, data


def edm(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return the settings, the weights, and the sigma, y, noise and perhaps label of a snapshot."""
    about, data = _case("edm_snapshots", name, "about")
    return about, {key: drawn(key, shape) for key, shape in about["shapes"].items()}, data


def _case(file: str, name: str, about: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what JSON tells of a case, and its arrays, with the noise [2, 3, 16, 16] as `z`."""
    with np.load(FOLDER / f"{file}.npz") as arrays:
        own = {key.partition(".")[2]: arrays[key] for key in arrays if key.startswith(f"{name}.")}
    told = json.loads(str(own.pop(about)))
    z = np.random.default_rng(16).normal(size=(2, 3, 16, 16))
    data = {key: torch.from_numpy(value) for key, value in own.items()}
    return told, {**data, "z": torch.from_numpy(z).float()}


def drawn(key: str, shape: list[int]) -> Tensor:
    """Return the weight of a name: normal, of a deviation that keeps signals from growing."""
    w = np.random.default_rng(zlib.crc32(key.encode())).normal(size=shape)
    return torch.from_numpy(w * (0.5 / np.prod(shape[1:]) ** 0.5)).float()


def network(name: str) -> UNet:
    """Read a Keras weights file into our U-Net, by the order its variables were created in."""
    import h5py

    with h5py.File(BytesIO(lzma.open(FOLDER / f"{name}.h5.xz").read())) as file:
        tensors = [
            torch.from_numpy(file[layer][weight][()])
            for layer in file.attrs["layer_names"]
            for weight in file[layer].attrs["weight_names"]
        ]
    net = UNet(CONFIG)
    state = net.state_dict()
    names = [f"{layer}.{end}" for layer in _layers() for end in ("weight", "bias")]
    assert sorted(names) == sorted(state) and len(tensors) == len(names)
    for key, w in zip(names, tensors, strict=True):
        if w.dim() == 4:  # kernel: height, width, in, out
            w = w.permute(3, 2, 0, 1)
        elif w.dim() == 2:
            w = w.T
        state[key] = w.reshape(state[key].shape)
    net.load_state_dict(state)
    return net.eval()


def _layers() -> list[str]:
    """The layers of the CIFAR-10 network in the order the reference creates them."""

    def block(name: str, shortcut: bool = False) -> list[str]:
        parts = ["conv1", "conv2", *["nin_shortcut"] * shortcut, "norm1", "norm2", "temb_proj"]
        return [f"{name}.{part}" for part in parts]

    def attention(name: str) -> list[str]:
        return [f"{name}.{part}" for part in ("k", "norm", "proj_out", "q", "v")]

    layers = ["conv_in", "conv_out"]
    for i in range(4):
        if i == 1:
            layers += attention("down.1.attn.0") + attention("down.1.attn.1")
        layers += block(f"down.{i}.block.0", shortcut=i == 1) + block(f"down.{i}.block.1")
        layers += [f"down.{i}.downsample.conv"] * (i < 3)
    layers += attention("mid.attn_1") + block("mid.block_1") + block("mid.block_2")
    layers += ["norm_out", "temb.dense.0", "temb.dense.1"]
    for i in range(4):
        if i == 1:
            layers += [part for j in range(3) for part in attention(f"up.1.attn.{j}")]
        layers += [part for j in range(3) for part in block(f"up.{i}.block.{j}", shortcut=True)]
        layers += [f"up.{i}.upsample.conv"] * (i > 0)
    return layers
