"""dstudent teach: train a teacher."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ds
from ds.cli import environment
from ds.cli.verb import (
    Here,
    Verb,
    check_outputs,
    home_of,
    per_preset,
    run_folder,
    say,
    solve_idle,
    train_idle,
    watched,
)
from ds.methods import Denoising
from ds.models import pretrained
from ds.models.teacher import Teacher
from ds.nets import UNetConfig
from ds.pairs.sources import Images, digits
from ds.system.config import Seed
from ds.training.config import TrainConfig
from ds.training.presets import Machine, Preset, SolveConfig
from ds.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Teach(Verb):
    """Train a teacher on real images."""

    images: str  # to train on; only "digits" come with the library
    out: Path  # a directory for the teacher; its run goes beside it, into OUT-run
    net: UNetConfig
    method: Denoising
    train: TrainConfig
    solve: SolveConfig
    seed: Seed = 0  # of the initial weights
    force: bool = False  # replace a teacher that another run made
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "Teach":
        return cls(
            images=name,
            out=home_of(name) / "teacher",
            net=p.net,
            method=p.denoising,
            train=p.teach or p.train,
            solve=p.solve,
            machine=p.machine,
        )

    @classmethod
    def choices(cls, args: list[str]) -> dict[str, Any]:
        return per_preset(cls)

    def idle(self) -> dict[str, str]:
        return solve_idle(self.solve) | train_idle(self.train)

    def prepare(self) -> Callable[[], None]:
        check_outputs(self.out, force=self.force)
        images = training_images("teach", self.images)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            denoiser = self.method.denoiser(self.net.build())
        start = Teacher(denoiser, *self.solve.build(denoiser.schedule))
        trainer = Trainer(
            self.method,
            start,
            *images,
            run_folder(self.out),
            self.train,
            device=self.machine.use(),
            progress=watched(),
        )
        trainer.check()
        pretrained.target(self.out, force=self.force, run=trainer.identity)
        return partial(self._train, trainer, start)

    def _train(self, trainer: Trainer, start: Teacher) -> None:
        teacher = start.using(trainer.fit())
        teacher.save_pretrained(
            self.out,
            force=self.force,
            version=ds.__version__,
            commit=environment.commit(),
            run=trainer.identity,
        )
        say(f"teacher: {self.out}")


def training_images(verb: str, name: str) -> tuple[Images, Images]:
    """Return a data set to train on, and the same images with other noise to score with.

    Raises ValueError for a data set that does not come with the library.
    """
    if name != "digits":
        raise ValueError(
            f"{verb}: no images of {name} come with the library; bring a trained teacher and start "
            f"at `dstudent pairs {name} --teacher DIR`"
        )
    images, _ = digits()
    return Images(images), Images(images, seed=1)
