"""The neighbours that are timed beside ours, each optional; where one is missing, why."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from ds.nets import UNet
from ds.nets.convert import to_diffusers
from ds.schedule import LinearBeta

WHERE = {
    "apex": "not installed (NVIDIA's, built from source with APEX_GROUP_NORM=1)",
    "liger": "not installed (pip install liger-kernel)",
}
MODULES = {"apex": "apex.contrib.group_norm", "liger": "liger_kernel"}


def missing(peer: str) -> tuple[str, str] | None:
    """Return a peer's name and why it cannot run here, or None if it can."""
    try:
        there = find_spec(MODULES[peer]) is not None
    except ModuleNotFoundError:  # PyPI's apex is another project, without such a module
        there = False
    return None if there else (peer, WHERE[peer])


def diffusers_twin(net: UNet) -> nn.Module:
    """Return diffusers' UNet2DModel with the weights of ours, called as ours is.

    Raises ImportError where diffusers is not installed.
    """
    from diffusers import UNet2DModel

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin"
        to_diffusers(path, net.config, net.state_dict(), LinearBeta(), "eps")
        return _Returned(UNet2DModel.from_pretrained(path / "unet")).eval()


class _Returned(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, return_dict=False)[0]
