"""The Inception-v3 network of the FID standard, the TensorFlow graph of 2015-12-05.

Frechet distances can be compared across papers only if all use this network, its weights and its
resizing. It differs from the published Inception-v3 (Szegedy et al. 2015,
arXiv:1512.00567) in its pooling: averages leave the padding out, and the last block takes a
maximum. Modules have the names of the public port of the weights, one file: pytorch-fid
distributes it as `pt_inception-2015-12-05-6726825d.pth` and torch-fidelity, by the same hash, as
`weights-inception-2015-12-05-6726825d.pth`.
"""

from functools import partial
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets.base import filled

_COUNTERS = r".*\.num_batches_tracked"
_average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_shrink = partial(F.max_pool2d, kernel_size=3, stride=2)

# A block is a set of chains over the same input. A chain is a list of convolutions (channels,
# kernel) or (channels, kernel, stride); a list in the place of a convolution is a fork, whose
# ends are concatenated. Only strides shrink the image. The chain branch_pool sees the pooled input.
_WIDE, _TALL = (1, 7), (7, 1)
_FORK = [(384, (1, 3)), (384, (3, 1))]


def _a(pooled: int) -> dict[str, list]:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pooled, 1)],
    }


def _c(inner: int) -> dict[str, list]:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(inner, 1), (inner, _WIDE), (192, _TALL)],
        "branch7x7dbl": [
            (inner, 1),
            (inner, _TALL),
            (inner, _WIDE),
            (inner, _TALL),
            (192, _WIDE),
        ],
        "branch_pool": [(192, 1)],
    }


_B = {
    "branch3x3": [(384, 3, 2)],
    "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
    "branch_pool": [],
}
_D = {
    "branch3x3": [(192, 1), (320, 3, 2)],
    "branch7x7x3": [(192, 1), (192, _WIDE), (192, _TALL), (192, 3, 2)],
    "branch_pool": [],
}
_E = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), _FORK],
    "branch3x3dbl": [(448, 1), (384, 3), _FORK],
    "branch_pool": [(192, 1)],
}
_MIXED = {  # name: input channels, pooling, chains
    "Mixed_5b": (192, _average, _a(32)),
    "Mixed_5c": (256, _average, _a(64)),
    "Mixed_5d": (288, _average, _a(64)),
    "Mixed_6a": (288, _shrink, _B),
    "Mixed_6b": (768, _average, _c(128)),
    "Mixed_6c": (768, _average, _c(160)),
    "Mixed_6d": (768, _average, _c(160)),
    "Mixed_6e": (768, _average, _c(192)),
    "Mixed_7a": (768, _shrink, _D),
    "Mixed_7b": (1280, _average, _E),
    "Mixed_7c": (2048, _maximum, _E),
}


class Inception(nn.Module):
    """Map images to the pool3 features of the FID standard. Weights are random until loaded."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        for name, (channels, pool, chains) in _MIXED.items():
            self.add_module(name, _Block(channels, pool, chains))
        self.fc = nn.Linear(2048, 1008)  # in the file, but after the features
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | PathLike) -> "Inception":
        """Return the network with the weights of a file on disk.

        Nothing in the file is run. Raises ValueError for a file that is not a plain dict of
        tensors, and for a weight that is missing, unknown or of another shape.
        """
        # Some copies carry the step counters of batch normalization, which inference never reads.
        return filled(cls(), path, "inception: {} is not the network of 2015-12-05", _COUNTERS)

    def forward(self, images: Tensor) -> Tensor:
        """Return features, float32 [N, 2048], of uint8 images [N, H, W, 3].

        Images of any size are resized to 299 x 299 as TensorFlow 1 did; larger ones are sampled,
        not averaged. Raises ValueError for another dtype or layout.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
            raise ValueError(
                f"inception: images must be uint8 [N, H, W, 3], not {images.dtype} "
                f"{tuple(images.shape)}"
            )
        x = images.permute(0, 3, 1, 2).float()
        for dim in (3, 2):
            x = _resize(x, dim, 299)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_shrink(x)))
        x = _shrink(x)
        for name in _MIXED:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


class _Block(nn.Module):
    """Chains of convolutions over one input, concatenated in the order of the table."""

    def __init__(self, channels: int, pool: partial, chains: dict[str, list]):
        super().__init__()
        self.pool = pool
        self.chains: dict[str, list[list[str]]] = {}  # names of the submodules, step by step
        for name, chain in chains.items():
            self.chains[name] = []
            width = channels
            for number, step in enumerate(chain, 1):
                fork = step if isinstance(step, list) else [step]
                names = [f"{name}_{number}" if len(chain) > 1 else name]
                if len(fork) > 1:
                    names = [names[0] + letter for letter in "ab"]
                for key, (out, kernel, *stride) in zip(names, fork, strict=True):
                    padding = 0 if stride else "same"
                    self.add_module(key, _Conv(width, out, kernel, *stride, padding=padding))
                self.chains[name].append(names)
                width = sum(out for out, *_ in fork)

    def forward(self, x: Tensor) -> Tensor:
        ends = []
        for name, chain in self.chains.items():
            y = self.pool(x) if name == "branch_pool" else x
            for names in chain:
                y = torch.cat([getattr(self, key)(y) for key in names], 1)
            ends.append(y)
        return torch.cat(ends, 1)


class _Conv(nn.Module):
    """Convolution without bias, normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = _Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Norm(nn.Module):
    """Batch normalization by stored statistics, in training mode too: a feature is a fixed map."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3
        )


def _resize(x: Tensor, dim: int, size: int) -> Tensor:
    """Interpolate linearly along one dimension with pixel i at i * length / size.

    This is tf.image.resize_bilinear of TensorFlow 1 with align_corners=False: no half-pixel
    centres, so an image shifts when it is resized. Float32 throughout, as there.
    """
    step = torch.tensor(x.shape[dim] / size, dtype=x.dtype, device=x.device)
    position = torch.arange(size, dtype=x.dtype, device=x.device) * step
    low = position.long()
    high = (low + 1).clamp_max(x.shape[dim] - 1)
    weight = (position - low).reshape([-1, *[1] * (x.dim() - 1 - dim)])
    start = x.index_select(dim, low)
    return start + (x.index_select(dim, high) - start) * weight
