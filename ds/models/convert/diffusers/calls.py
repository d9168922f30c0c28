"""Models of few network calls, as stock pipelines of diffusers draw them.

A UNet2DModel is told a time alone, by sines and cosines of DDPM's frequencies. What a network of
ours is told in each of its calls, such as a low-frequency time and the length of the step, is the
same for every image. So the first dense layer can be replaced by one that makes of diffusers' times
what ours makes of all that. It then holds for this number of calls.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ds.diffusion import grids
from ds.diffusion.noise import Draws
from ds.diffusion.schedules import LinearBeta
from ds.models.convert.diffusers import put, scheduler
from ds.models.model import Model
from ds.nets.base import CONTEXT
from ds.nets.unet import UNet, UNetConfig

log = logging.getLogger("ds")
_TIMES = 1000  # num_train_timesteps, where ours do not say it
_NEAR = 1e-5  # what a probe finds further away is another formula


class Drawing(NamedTuple):
    """The network and the scheduler with which diffusers draws what a model draws."""

    config: UNetConfig
    weights: dict[str, Tensor]
    scheduler: dict[str, Any]
    calls: int


class _Call(NamedTuple):
    """What a network is told in a call, and the next state: keeps * state + adds * output."""

    told: dict[str, float]
    keeps: float
    adds: float


class _Probe(nn.Module):
    """Stand in for a network: answer with noise, and remember."""

    def __init__(self, config: UNetConfig, shape: tuple[int, ...]):
        super().__init__()
        self.config, self.shape = config, shape
        self.states: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.told: list[dict[str, float]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        out = _normal(x.shape, len(self.outputs) + 1)
        self.states.append(x)
        self.outputs.append(out)
        numbers = {"t": t, **cond}
        self.told.append({name: float(numbers[name][0]) for name in ("t", *self.config.conditions)})
        return out


def _normal(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def write(path: str | Path, model: Model, *, force: bool = False) -> None:
    """Write a pipeline directory that draws, in as many network calls, what a model draws.

    It is a DDPMPipeline for a model that takes even steps along a straight path, and a DDIMPipeline
    for one whose only call returns the image; the log says how to call it. Another number of steps
    draws something else. Raises ValueError as `write` does, and for steps that no scheduler takes.
    """
    path = Path(path)
    config, weights, steps, n = drawing(model, path)
    pipeline = "DDIMPipeline" if steps["_class_name"] == "DDIMScheduler" else "DDPMPipeline"
    decoder = model.decoder.files() if model.decoder else {}
    pipeline = "LDMPipeline" if decoder else pipeline
    put(path, config, weights, steps, pipeline, decoder, force=force)
    draw = f"diffusers.{pipeline}.from_pretrained({str(path)!r})(num_inference_steps={n})"
    log.info("%s: draw with %s, and no other number of steps", path, draw)


def drawing(model: Model, where: Path) -> Drawing:
    """Return how diffusers draws what a model draws.

    The model's steps are found by a probe in the place of its network, so any method will do whose
    steps a scheduler has: FlowMatchEulerDiscreteScheduler has even steps along a straight path, and
    DDIMScheduler has a single call that returns the image. Raises ValueError, naming `where`, for
    other steps, and for a network that no UNet2DModel can be.
    """
    if not isinstance(model.net, UNet):
        name = type(model.net).__name__
        raise ValueError(f"{where}: diffusers has no class for a {name}; accepted is a U-Net")
    config = model.net.config
    if what := _more_than_a_time(model, config):
        raise ValueError(
            f"{where}: the network {what}, for which diffusers has no few-step pipeline"
        )
    calls = _calls(model, config)
    weights = {name: w.detach().cpu().float() for name, w in model.net.state_dict().items()}
    n, adds = len(calls), calls[0].adds if calls else 0.0
    if n and all(_near(call.keeps, 1) and _near(call.adds * n, adds * n) for call in calls):
        gain, fields = -n * adds, _straight(calls)
    elif n == 1 and _near(calls[0].keeps, 0):
        gain, fields = adds, _image(calls[0], where)
    else:
        raise ValueError(
            f"{where}: no pipeline of diffusers takes this {model.kind}'s steps; accepted are even "
            f"ones along a straight path, and a single call that returns the image; --to pt2 takes "
            f"any student"
        )
    if model.decoder and fields["_class_name"] == scheduler.FLOW:
        raise ValueError(
            f"{where}: diffusers' LDMPipeline, which decodes latents, takes no "
            f"{scheduler.FLOW}; --to pt2 writes a student of latents without its decoder"
        )
    if not _near(gain, 1):
        for part in ("weight", "bias"):
            weights[f"conv_out.{part}"] = (gain * weights[f"conv_out.{part}"].double()).float()
    times = _times(fields, n)
    if config.conditions or config.frequencies != UNetConfig.frequencies or _differ(calls, times):
        config, weights = _retimed(config, weights, calls, times, where)
    return Drawing(config, weights, fields, n)


def _more_than_a_time(model: Model, config: UNetConfig) -> str | None:
    """Return what a network takes or gives beside what is the same for every image."""
    if CONTEXT in config.conditions:
        return "is told an image"
    if "guidance" in model.takes:
        return "is told a guidance scale"
    return "has a learned variance" if config.outputs != config.in_channels else None


def _calls(model: Model, config: UNetConfig) -> list[_Call]:
    """Return the calls of a model; none, if its states are no sums of states and outputs."""
    probe, noise = _Probe(config, model.shape), _normal((1, *model.shape), 0)
    draws = Draws(0, torch.zeros(1, dtype=torch.int64, device="cpu"))
    last = model.using(probe).sample(noise, cond=model.plain(noise), draws=draws)
    if not probe.states or not torch.allclose(probe.states[0], noise):
        return []
    states = [*(x.flatten() for x in probe.states), last.double().flatten()]
    calls = []
    for told, out, (x, after) in zip(probe.told, probe.outputs, pairwise(states), strict=True):
        parts = torch.stack([x, out.flatten()], 1)
        found = torch.linalg.lstsq(parts, after[:, None]).solution[:, 0]
        if not torch.allclose(parts @ found, after, rtol=0, atol=_NEAR):
            return []
        calls.append(_Call(told, *found.tolist()))
    return calls


def _near(value: float, wanted: float) -> bool:
    return abs(value - wanted) < _NEAR


def _whole(t: float) -> int | None:
    """Return a number of training steps that diffusers can have: a whole number above 1."""
    return int(t) if t > 1 and t == int(t) else None


def _straight(calls: list[_Call]) -> dict[str, Any]:
    """Return the fields of a scheduler whose times, in so many steps, fall evenly from 1.

    shift_terminal makes them even: without it the last one is 1 / num_train_timesteps.
    """
    n = len(calls)
    return {
        "_class_name": scheduler.FLOW,
        "num_train_timesteps": _whole(calls[0].told["t"]) or _TIMES,
        "shift": 1.0,
        "shift_terminal": 1 / n if n > 1 else None,
        "use_dynamic_shifting": False,
        "stochastic_sampling": False,
    }


def _image(call: _Call, where: Path) -> dict[str, Any]:
    """Return the fields of a scheduler that takes the network's output for the image."""
    table = LinearBeta(_whole(call.told["t"] + 1) or _TIMES)
    grid = grids.uniform(1, table, spacing="trailing")
    return scheduler.fields(table, "x0", where, grid=grid)


def _times(fields: Mapping[str, Any], calls: int) -> Tensor:
    """Return what a pipeline tells its network as the time of each call, float64 [calls]."""
    count = fields["num_train_timesteps"]
    if fields["_class_name"] != scheduler.FLOW:
        return torch.tensor([count - 1], dtype=torch.float64, device="cpu")
    steps = torch.arange(calls, 0, -1, dtype=torch.float64, device="cpu")
    return count * steps / calls


def _differ(calls: list[_Call], times: Tensor) -> bool:
    told = torch.tensor([call.told["t"] for call in calls], dtype=torch.float64, device="cpu")
    return not torch.allclose(told, times, rtol=1e-6)


def _retimed(
    config: UNetConfig, weights: dict[str, Tensor], calls: list[_Call], times: Tensor, where: Path
) -> tuple[UNetConfig, dict[str, Tensor]]:
    """Return a network that is told nothing but `times`, and makes of them what ours is told."""
    layers = {"t": "temb.dense.0"} | {name: f"temb.conditions.{name}" for name in config.conditions}
    wanted = weights["temb.dense.0.bias"].double()
    for name, layer in layers.items():
        numbers = [call.told[name] for call in calls]
        told = config.embed(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
        wanted = wanted + told @ weights[f"{layer}.weight"].double().T
    plain = replace(config, conditions=(), frequencies=UNetConfig.frequencies)
    seen = torch.nn.functional.pad(plain.embed(times), (0, 1), value=1.0)
    both = torch.linalg.pinv(seen) @ wanted  # the least weights, then biases, that do it
    if not torch.allclose(seen @ both, wanted, rtol=1e-6, atol=1e-6):
        raise ValueError(
            f"{where}: a UNet2DModel of {config.channels} channels cannot be told the times of "
            f"{len(calls)} calls; write a model of fewer calls"
        )
    kept = {name: w for name, w in weights.items() if not name.startswith("temb.conditions.")}
    kept["temb.dense.0.weight"] = both[:-1].T.float().contiguous()
    kept["temb.dense.0.bias"] = both[-1].float()
    return plain, kept
