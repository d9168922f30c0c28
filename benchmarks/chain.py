"""The whole chain, teacher to student, beside the same chain with diffusers and a plain trainer.

    python -m benchmarks chain --preset digits
    python -m benchmarks chain --preset cifar10 --weights random --pairs 20000
    python -m benchmarks chain --preset digits --share 0.05        a twentieth of epochs and pairs

Each side runs once, in wall-clock seconds by phase. The peer has the same network in diffusers'
modules, the same batches in number and size, the same rates and average, float32 on CPUs, and
keeps its pairs as tensors; it holds nothing out and saves no checkpoint. A side is off by its
student's distance to its own teacher. A row is refused where that is more than a fifth above the
peer's.
"""

import argparse
import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import harness, printed
from benchmarks.network import random_net
from benchmarks.peers import Loop, diffusers_twin
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.noise import Draws, noise
from ds.methods import AbstractMethod, Progress
from ds.models.teacher import Teacher
from ds.nets import UNet
from ds.pairs.generate import generate_pairs
from ds.pairs.sources import Batch, Images, Pairs, digits
from ds.training import ema, presets
from ds.training.config import TrainConfig
from ds.training.presets import Preset
from ds.training.trainer import Trainer

Phases = dict[str, float]
HELD_OUT = 64


def main(arguments: list[str]) -> int:
    """Run both sides, print the split and save it; return 1 if ours is no good."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", default="digits", choices=presets.PRESETS)
    parser.add_argument("--weights", choices=("taught", "random"), default="taught")
    parser.add_argument("--pairs", type=int, help="by default the preset's")
    parser.add_argument("--share", type=float, default=1.0, help="of epochs and pairs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    harness.saving(parser)
    options = parser.parse_args(arguments)
    try:
        folder = harness.folder(options)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    preset = scaled(presets.PRESETS[options.preset](), options.share, options.pairs, device)
    if options.weights == "taught" and preset.teach is None:
        parser.error(f"no images of {options.preset} come with the library: --weights random")
    logging.getLogger("ds").setLevel(logging.WARNING)

    net = random_net(preset.net, device)
    taught = options.weights == "taught"
    row = {
        "case": f"chain {options.preset}, {preset.pairs.count} pairs, share {options.share:g}",
        "us": {},
        "error": {},
        "bytes": 0,
        "flops": 0,
        "dtype": preset.train.precision,
        "images": 0,
        "wall": True,
        "missing": {},
        "refused": {},
        "phases": {},
    }
    for name, side in (("diffusers and plain PyTorch", _peer), ("ours", _ours)):
        try:
            phases, row["error"][name] = side(net, preset, taught)
        except ImportError as error:
            row["missing"][name] = str(error)
            continue
        total = 1e6 * sum(phases.values())
        row["us"][name] = {"median": total, "p20": total, "p80": total}
        row["phases"][name] = phases
    calibration = harness.calibrate(device)
    name = f"chain_{options.preset}"
    print(printed.head(name), printed.table(row, calibration), sep="\n")
    if refused(row["error"]):
        print("not saved: our student is further from its teacher than the peer's")
        return 1
    print(printed.verdict({name: [row]}))
    if folder:
        print(f"Results: {harness.save(name, folder, [row], calibration, device)}")
    return 0


def refused(errors: dict[str, float]) -> bool:
    """Say whether our student is further from its teacher than the peer's, by over a fifth."""
    return any(errors["ours"] > 1.2 * error for error in errors.values())


def scaled(preset: Preset, share: float, pairs: int | None, device: torch.device) -> Preset:
    """Return a preset with a share of its epochs and pairs, in the usual precision of a device."""
    count = max(preset.train.batch_size + HELD_OUT, round(share * (pairs or preset.pairs.count)))
    few = {"check_every": 10**9, "precision": preset.train.on(device).precision}
    teach = preset.teach and replace(
        preset.teach, epochs=max(share * preset.teach.epochs, 1), **few
    )
    return replace(
        preset,
        pairs=replace(preset.pairs, count=count, held_out=HELD_OUT),
        train=replace(preset.train, epochs=max(share * preset.train.epochs, 1), **few),
        teach=teach,
    )


@contextmanager
def _phase(phases: Phases, name: str) -> Iterator[None]:
    begin = harness.settled()
    yield
    phases[name] = harness.settled() - begin


def _ours(net: UNet, preset: Preset, taught: bool) -> tuple[Phases, float]:
    phases: Phases = {}
    device = net.conv_in.weight.device
    denoiser = preset.denoising.denoiser(copy.deepcopy(net))
    teacher = Teacher(denoiser, *preset.solve.build(denoiser.schedule))
    with tempfile.TemporaryDirectory() as folder:
        if taught:
            with _phase(phases, "teach"):
                images = digits()[0]
                sources = Images(images), Images(images[:HELD_OUT], seed=1)
                run = (preset.denoising, teacher, *sources, Path(folder) / "teach", preset.teach)
                teacher = teacher.using(Trainer(*run, device=device).fit())
        with _phase(phases, "pairs"):
            store = generate_pairs(
                teacher,
                Path(folder) / "pairs",
                preset.pairs.count,
                batch_size=preset.pairs.batch_size,
                shard_size=preset.pairs.shard_size,
            )
        with _phase(phases, "distill"):
            sources = Pairs(store, range(HELD_OUT, len(store))), Pairs(store, range(HELD_OUT))
            run = (preset.method, teacher, *sources, Path(folder) / "distill", preset.train)
            student = Trainer(*run, device=device).fit()
    return phases, _distance(teacher.sample, student, preset)


def _peer(net: UNet, preset: Preset, taught: bool) -> tuple[Phases, float]:
    phases: Phases = {}
    device = net.conv_in.weight.device
    twin = diffusers_twin(net).to(device, memory_format=torch.channels_last)
    if taught:
        with _phase(phases, "teach"):
            images = digits()[0].movedim(-1, 1).float() / 127.5 - 1
            twin = _train(twin, preset.denoising, (images,), preset.teach, device)
    schedule = preset.denoising.schedule
    solver, grid = preset.solve.build(schedule)
    twin.shape = net.shape
    teacher = Teacher(Denoiser(twin.requires_grad_(False), schedule), solver, grid)
    with _phase(phases, "pairs"):
        z = torch.randn(preset.pairs.count, *net.shape)
        parts = (teacher.sample(part.to(device)) for part in z.split(preset.pairs.batch_size))
        x0 = torch.cat([x.clamp(-1, 1).cpu() for x in parts])
    with _phase(phases, "distill"):
        tensors = x0[HELD_OUT:], z[HELD_OUT:]
        student = _train(twin, preset.method, tensors, preset.train, device)
    return phases, _distance(teacher.sample, student, preset)


def _train(
    net: nn.Module,
    method: AbstractMethod,
    tensors: tuple[Tensor, ...],
    c: TrainConfig,
    device: torch.device,
) -> nn.Module:
    """Train a copy of a network on x0, and its noise or fresh one, and return its average."""
    net = copy.deepcopy(net).requires_grad_(True).train()
    average = copy.deepcopy(net).requires_grad_(False).eval()
    weights, averages = list(net.parameters()), list(average.parameters())
    optimizer = torch.optim.Adam(weights, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)
    loader = DataLoader(TensorDataset(*tensors), c.batch_size, shuffle=True, drop_last=True)
    steps = max(1, round(c.epochs * len(loader)))
    rise = min(c.warmup_steps, steps // 2) or 1
    rates = [torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rise, total_iters=rise)]
    if c.lr_schedule == "cosine":
        rates.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - rise))
    rate = torch.optim.lr_scheduler.ChainedScheduler(rates)
    step = 0
    while step < steps:
        for x0, *given in loader:
            x0 = x0.to(device)
            z = given[0].to(device) if given else torch.randn_like(x0)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bfloat16"):
                index = torch.arange(len(x0), device=device) + step * len(x0)
                batch = Batch(x0, z, index, Draws(0, index))
                loss = method.loss({"student": net}, batch, Progress(step, steps))
            loss.backward()
            optimizer.step()
            rate.step()
            ema.average(averages, weights, c.ema_decay)
            if (step := step + 1) == steps:
                break
    return average


def _distance(sample: Loop, student: nn.Module, preset: Preset) -> float:
    """Return how far a student is from its teacher, as a share of the images' root mean square."""
    weight = next(student.parameters())
    shape = (preset.net.in_channels, *preset.net.size)
    z = noise(1, range(HELD_OUT), shape, device=weight.device)
    with torch.no_grad():
        exact, made = sample(z), preset.method.sample(student, z)
    return ((made - exact).square().mean() / exact.square().mean()).sqrt().item()
