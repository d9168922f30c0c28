"""Networks of EDM and guided-diffusion, small, with weights by a formula and the outputs there.

`networks.npz` holds what the public reference networks return, one array a case. They were run on
the weights that `fill` gives ours, under their own names: q, k and v interleaved as each orders
them, the rest one to one.
"""

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds.nets import ClassifierConfig, SongConfig, UNetConfig, ddpmpp, ncsnpp
from ds.nets.base import NO_CLASS

LABELS = [3, NO_CLASS, 0]
SONG: dict[str, Any] = {
    "image_size": 16,
    "channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (8,),
    "augment_channels": 0,
}
ADM: dict[str, Any] = {
    "image_size": 16,
    "channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "norm_eps": 1e-5,
    "open_frequencies": True,
    "cosine_first": True,
    "scale_shift": True,
    "resnet_down": (0,),
    "resnet_up": (1,),
    "head_channels": 16,
}


@dataclass(frozen=True)
class Case:
    """A network and what it is told; `theirs` is the class of the source, and how it was set."""

    config: SongConfig | UNetConfig | ClassifierConfig
    theirs: dict[str, Any] = field(default_factory=dict)
    labels: list[int] | None = None
    augment: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return x [3, 3, 16, 16], t [3] and the conditions."""
        rng = np.random.default_rng(7)
        x = torch.from_numpy(rng.normal(size=(3, 3, 16, 16))).float()
        edm = self.theirs["class"] in ("SongUNet", "DhariwalUNet")
        t = torch.tensor([-1.5, 0.1, 0.9] if edm else [999.0, 0.0, 37.0])
        cond = {}
        if self.labels is not None:
            cond["label"] = torch.tensor(self.labels)
        if self.augment:
            cond["augment"] = torch.from_numpy(rng.normal(size=(3, 9))).float()
        return x, t, cond


SONGS = {"class": "SongUNet"}
CASES = {
    "ddpmpp": Case(ddpmpp(**SONG), SONGS),
    "ddpmpp, told": Case(
        ddpmpp(**{**SONG, "classes": 5, "augment_channels": 9}), SONGS, LABELS, augment=True
    ),
    "ddpmpp, three levels": Case(
        ddpmpp(**{**SONG, "channel_mult": (1, 1, 2), "attention_resolutions": (16, 8)}), SONGS
    ),
    "ncsnpp": Case(ncsnpp(**SONG), SONGS),
    "ncsnpp, told": Case(
        ncsnpp(**{**SONG, "channel_mult": (1, 2, 2), "classes": 5, "augment_channels": 9}),
        SONGS,
        LABELS,
        augment=True,
    ),
    "dhariwal": Case(
        UNetConfig(
            **{**ADM, "channels": 128, "channel_mult": (1, 1), "head_channels": 64, "classes": 5}
        ),
        {"class": "DhariwalUNet"},
        LABELS,
    ),
    "adm, new order": Case(
        UNetConfig(**ADM, classes=5, out_channels=6), {"class": "UNetModel", "new": True}, [3, 4, 0]
    ),
    "adm, legacy order": Case(
        UNetConfig(**{**ADM, "head_channels": None}, heads=4, out_channels=6),
        {"class": "UNetModel", "new": False},
    ),
    "adm, plain": Case(
        UNetConfig(
            **{
                **ADM,
                "scale_shift": False,
                "resnet_down": (),
                "resnet_up": (),
                "pad_all_sides": True,
                "head_channels": None,
            }
        ),
        {"class": "UNetModel", "new": False},
    ),
    "adm, as its network of 512 x 512": Case(
        UNetConfig(
            **{**ADM, "channel_mult": (1, 2, 2), "resnet_down": (0, 1), "resnet_up": (1, 2)},
            embed_channels=64,
            time_channels=256,
        ),
        {"class": "UNetModel", "new": False, "channels": 64, "channel_mult": (0.5, 1, 1)},
    ),
    "classifier": Case(
        ClassifierConfig(
            image_size=16,
            channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(8,),
            head_channels=16,
            num_classes=10,
        ),
        {"class": "EncoderUNetModel"},
    ),
}


@torch.no_grad()
def fill(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fill the weights with whole numbers times a power of 2, by the seed and their names."""
    for name, w in net.state_dict().items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        u = torch.from_numpy(rng.integers(-64, 65, w.shape)).float() / 64
        if name.endswith("frequencies"):
            w.copy_(16 * u)
        elif w.dim() == 1:
            w.copy_(u / 4 + ("norm" in name and name.endswith("weight")))
        else:
            w.copy_(u * 2.0 ** round(math.log2(1.7 / math.sqrt(w[0].numel()))))
    return net.eval()


def outputs() -> dict[str, Tensor]:
    """Return the outputs of their networks, by case: [3, C, 16, 16], logits [3, 10]."""
    with np.load(__file__.replace("networks.py", "networks.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file}
