"""A network of your own as teacher and student: an MLP-Mixer of 8 x 8 digits, trained and exported.

A network is a frozen configuration with `build`, and a module that keeps it as `config`. That is
all the library asks: the module is trained, saved, loaded and exported like its own. Files name the
configuration by its tag, here "mixer_config", and never the code; so whoever loads one gives the
class. This takes about four minutes on a CPU core:

    python examples/custom_network.py runs/mixer

The command line is given this file instead:

    dstudent sample runs/mixer/student --code examples/custom_network.py --out mixer.png
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ds
from ds.evaluation.features import Digits
from ds.nets.base import AbstractNetConfig
from ds.nets.embedding import sinusoids
from ds.pairs.sources import digits
from ds.system.config import Count, check

HELD_OUT = 512  # pairs


@dataclass(frozen=True, kw_only=True)
class MixerConfig(AbstractNetConfig):
    """The shape of a Mixer; the fields are what a directory's config.json holds."""

    image_size: Count = 8
    channels: Count = 1
    patch: Count = 2  # pixels a side of a patch
    width: Count = 96  # numbers that stand for a patch
    depth: Count = 4  # blocks

    def __post_init__(self):
        check(self, "MixerConfig: ")
        if self.image_size % self.patch:
            raise ValueError(
                f"MixerConfig: image_size ({self.image_size}) must be a multiple of patch "
                f"({self.patch})"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def build(self) -> "Mixer":
        return Mixer(self)


class Block(nn.Module):
    """Mix a number of all patches, then all numbers of a patch; the time scales and shifts."""

    def __init__(self, width: int, patches: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.patches, self.numbers = _mlp(patches), _mlp(width)
        self.time = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        by_time = self.time(told)[:, None].chunk(4, -1)
        x = x + self.patches(_scaled(self.norms[0](x), *by_time[:2]).mT).mT
        return x + self.numbers(_scaled(self.norms[1](x), *by_time[2:]))


class Mixer(nn.Module):
    """Patches of an image, mixed: net(x [N, C, H, W], t [N]) -> [N, C, H, W].

    Tolstikhin et al. 2021, "MLP-Mixer", arXiv:2105.01601, with the time as in DiT.
    """

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.config = c = config
        patches = (c.image_size // c.patch) ** 2
        self.cut = nn.Conv2d(c.channels, c.width, c.patch, stride=c.patch)
        self.place = nn.Parameter(0.02 * torch.randn(patches, c.width))
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(c.width, patches) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.paste = nn.ConvTranspose2d(c.width, c.channels, c.patch, stride=c.patch)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image."""
        return self.config.shape

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time(sinusoids(t, self.config.width).to(x.dtype))
        patches = self.cut(x)
        rows = patches.flatten(2).mT + self.place
        for block in self.blocks:
            rows = block(rows, told)
        return self.paste(self.norm(rows).mT.unflatten(2, patches.shape[2:]))


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def teach(out: Path, epochs: float) -> ds.Teacher:
    """Train a Mixer to predict noise, save it, and load it again."""
    images, _ = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = ds.Denoiser(MixerConfig().build(), ds.schedule.LinearBeta())
    start = ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(12))
    config = ds.TrainConfig(batch_size=64, epochs=epochs, lr=2e-3, warmup_steps=100)
    source, held_out = ds.Images(images), ds.Images(images, seed=1)  # other noise
    run = out / "teacher-run"
    net = ds.Trainer(ds.methods.Denoising(), start, source, held_out, run, config).fit()
    start.using(net).save_pretrained(out / "teacher")
    return ds.load_teacher(out / "teacher", types=[MixerConfig])


def distill(teacher: ds.Teacher, out: Path, count: int, epochs: float) -> ds.Student:
    """Make pairs, train a student that starts as the teacher, save it, and load it again."""
    store = ds.generate_pairs(teacher, out / "pairs", count + HELD_OUT)
    train, held_out = ds.Pairs(store, range(HELD_OUT, len(store))), ds.Pairs(store, range(HELD_OUT))
    method = ds.methods.DenoisingStudent(loss_type="l1").on(teacher)
    config = ds.TrainConfig(
        batch_size=64, epochs=epochs, lr=2e-3, warmup_steps=50, lr_schedule="cosine"
    )
    net = ds.Trainer(method, teacher, train, held_out, out / "student-run", config).fit()
    ds.Student(net, method).save_pretrained(out / "student")
    return ds.load_student(out / "student", types=[MixerConfig])


def exported(student: ds.Student, path: Path) -> float:
    """Export a student, and return how far the program's images are from the student's at most."""
    ds.export.to_program(student, path)
    program = torch.export.load(path).module()  # needs PyTorch alone
    z = ds.noise(seed=1, indices=range(16), shape=student.shape)
    return (program(z) - student.sample(z)).abs().max().item()


def main(
    out: Path, epochs: float = 60, count: int = 12_288, scored: int = 4096
) -> dict[str, float]:
    """Do it all in the directory `out`, print and return the figures."""
    teacher = teach(out, epochs)
    student = distill(teacher, out, count, epochs / 6)
    held_out = ds.Pairs(ds.PairStore(out / "pairs"), range(HELD_OUT))
    real, features = digits()[0], Digits()
    of_teacher = ds.evaluate(teacher, real, features, n=scored)
    of_student = ds.evaluate(student, real, features, n=scored, held_out=held_out)
    figures = {
        "Frechet distance, teacher of 12 calls": of_teacher["frechet_distance"],
        "Frechet distance, student of 1 call": of_student["frechet_distance"],
        "R2 of the student on held-out noise": of_student["pair_r2"],
        "largest difference of the exported program": exported(student, out / "student.pt2"),
    }
    for name, value in figures.items():
        print(f"{name:44}{value:.3g}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a directory for everything that is made")
    main(parser.parse_args().out)
