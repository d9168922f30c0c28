"""The neighbours that are timed beside ours, each optional; where one is missing, why."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.diffusion.schedules import LinearBeta
from ds.models.convert import to_diffusers
from ds.nets import UNet

GroupNormSilu = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Tensor], Tensor]
# A tour goes without, and so do some cases of a CPU.
SLOW = {"diffusers, compiled": "left out, compiling takes longer than 20 s"}


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
        path = write_diffusers(Path(folder) / "twin", net)
        return _Unwrapped(UNet2DModel.from_pretrained(path, low_cpu_mem_usage=False)).eval()


def write_diffusers(path: Path, net: UNet) -> Path:
    """Write a network as diffusers reads it; return the directory to read."""
    to_diffusers(path, net.config, net.state_dict(), LinearBeta(), "eps")
    return path / "unet"


class _Unwrapped(nn.Module):
    """A UNet2DModel that returns a tensor."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t, return_dict=False)[0]


def compiled(call: Call, device: torch.device) -> Call:
    """Compile for inference at one shape; on a CPU with frozen weights."""
    torch._dynamo.reset()
    if device.type == "cuda":
        return torch.compile(call, mode="max-autotune", dynamic=False)
    return torch.compile(call, dynamic=False, options={"freezing": True})


def ddim_loop(net: Call, grid: Sequence[int], spacing: int) -> Loop:
    """Return the loop of DDIMPipeline.__call__, which draws its noise itself, around a network.

    `grid` are the last of its times, which lie `spacing` apart.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(1000 // spacing)

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        x = x.clone()
        for t in grid:
            out = net(x, torch.full((len(x),), t, device=x.device))
            x = scheduler.step(out, t, x, eta=0.0).prev_sample
        return x

    return loop


def consistency_pipeline(net: UNet, t: int) -> Loop:
    """Return diffusers' ConsistencyModelPipeline in one step, as a Denoising Student of the net.

    It makes c_out * output + c_skip * latents; hooks turn that into z - net(z, t). Its images lie
    in [0, 1]. Raises ImportError where diffusers is not installed.
    """
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    unet = diffusers_twin(net).net
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    c = scheduler.config
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(c.sigma_max)
    scale = (c.sigma_max**2 + c.sigma_data**2) ** 0.5 / c.sigma_max

    def before(_: nn.Module, args: tuple) -> tuple:
        z = args[0] * scale
        return z, torch.full((len(z),), t, device=z.device)

    def after(_: nn.Module, args: tuple, outputs: tuple) -> tuple:
        return ((args[0] - outputs[0] - c_skip * c.sigma_max * args[0]) / c_out,)

    unet.register_forward_pre_hook(before)
    unet.register_forward_hook(after)
    pipeline = ConsistencyModelPipeline(unet, scheduler).to(net.conv_in.weight.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)

    def loop(z: Tensor) -> Tensor:
        made = pipeline(
            len(z), num_inference_steps=1, latents=z, output_type="pt", return_dict=False
        )
        return made[0]

    return loop
