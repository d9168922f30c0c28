"""The neighbours that are timed beside ours, each optional; where one is missing, why."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.nets import UNet
from ds.nets.convert import to_diffusers
from ds.schedule import LinearBeta

GroupNormSilu = Callable[[Tensor, Tensor, Tensor], Tensor]


def apex(channels: int, groups: int, eps: float, dtype: torch.dtype) -> GroupNormSilu:
    """Return NVIDIA apex's GroupNorm with its SiLU; ImportError where it was not built."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except ImportError as error:
        raise ImportError("not installed (NVIDIA's, built with APEX_GROUP_NORM=1)") from error
    layer = GroupNorm(groups, channels, eps=eps, act="silu", device="cuda", dtype=dtype)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    return call


def liger(channels: int, groups: int, eps: float, dtype: torch.dtype) -> GroupNormSilu:
    """Return Liger's GroupNorm, which has no SiLU and wants NCHW, followed by PyTorch's SiLU."""
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction
    except ImportError as error:
        raise ImportError("not installed (pip install liger-kernel)") from error

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = LigerGroupNormFunction.apply(x.contiguous(), weight, bias, channels, groups, eps)
        return F.silu(y)

    return call


PEERS: dict[str, Callable[..., GroupNormSilu]] = {"apex": apex, "liger": liger}


def diffusers_twin(net: UNet) -> nn.Module:
    """Return diffusers' UNet2DModel with the weights of ours, called as ours is.

    Raises ImportError where diffusers is not installed.
    """
    from diffusers import UNet2DModel

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin"
        to_diffusers(path, net.config, net.state_dict(), LinearBeta(), "eps")
        return _Unwrapped(UNet2DModel.from_pretrained(path / "unet")).eval()


class _Unwrapped(nn.Module):
    """A UNet2DModel that returns a tensor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, return_dict=False)[0]
