"""LPIPS: how different two images look, by the features of VGG16.

Zhang et al. 2018, arXiv:1801.03924, Eq. 1, in version 0.1 of the authors' package lpips, with its
network "vgg". Modules have the names that they have there, so its state dict is the file to give:

    torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips.pth")
"""

from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets.base import filled

# The convolutions of VGG16 by slice, each followed by ReLU: name, and channels in and out. All
# slices but the first begin with a pooling, and the features are where a slice ends.
_SLICES = {
    "slice1": {"0": (3, 64), "2": (64, 64)},
    "slice2": {"5": (64, 128), "7": (128, 128)},
    "slice3": {"10": (128, 256), "12": (256, 256), "14": (256, 256)},
    "slice4": {"17": (256, 512), "19": (512, 512), "21": (512, 512)},
    "slice5": {"24": (512, 512), "26": (512, 512), "28": (512, 512)},
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
SIDE, LEAST = 224, 256  # pixels that VGG16 was trained on; images with a shorter side are resized


class LPIPS(nn.Module):
    """The distance of images a and b: lpips(a, b) -> [N]. Weights are random until loaded.

    It is the mean over pixels, summed over the slices, of the weighted squared differences of
    features that have the norm 1 at every pixel. It has a gradient in the images, and none in its
    own weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict()
        for k, (name, convs) in enumerate(_SLICES.items()):
            layers = {i: nn.Conv2d(a, b, 3, padding=1) for i, (a, b) in convs.items()}
            self.net[name] = nn.ModuleDict(layers)
            width = [*convs.values()][-1][1]
            weights = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})
            self.add_module(f"lin{k}", nn.ModuleDict({"model": weights}))
        for name, values in (("shift", _SHIFT), ("scale", _SCALE)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: str | PathLike) -> "LPIPS":
        """Return the network with the weights of a file on disk.

        Nothing in the file is run. Raises ValueError for a file that is not a plain dict of
        tensors, and for a weight that is missing, unknown or of another shape.
        """
        # The package names its last layers twice, and keeps shift and scale beside the weights.
        beside = r"lins\..*|scaling_layer\.(shift|scale)"
        refusal = '{} is not the state dict of lpips.LPIPS(net="vgg")'
        return filled(cls(), path, f"lpips: {refusal}", beside)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances, float32 [N], of images [N, C, H, W] in [-1, 1], grey or RGB.

        Those with a side shorter than 256 are resized to 224 x 224, as in consistency models. Grey
        images are three equal channels. Raises ValueError for other shapes.
        """
        if a.dim() != 4 or a.shape[1] not in (1, 3) or a.shape != b.shape:
            raise ValueError(
                f"lpips: images must be [N, 1 or 3, H, W], as many and as large on both sides, not "
                f"{list(a.shape)} and {list(b.shape)}"
            )
        found = a.new_zeros(len(a), dtype=torch.float32)
        for k, (f, g) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            weights = self.get_submodule(f"lin{k}.model.1").weight
            found = found + ((f - g).square() * weights[0]).sum(1).mean((1, 2))
        return found

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the features of each slice, float32, whose norm is 1 or 0 at every pixel."""
        if min(x.shape[2:]) < LEAST:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear")
        x, found = (x - self.shift) / self.scale, []
        for convs in self.net.values():
            x = F.max_pool2d(x, 2) if found else x
            for conv in convs.values():
                x = F.relu(conv(x))
            found.append(F.normalize(x.float(), dim=1, eps=1e-10))
        return found
