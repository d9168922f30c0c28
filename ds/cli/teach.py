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
    """Train a teacher on real images, to have one to distil."""

    images: str  # the training images; only "digits" come with the library
    out: Path
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
    def choices(cls) -> dict[str, Any]:
        return per_preset(cls)

    def idle(self) -> dict[str, str]:
        return solve_idle(self.solve) | train_idle(self.train)

    def prepare(self) -> Callable[[], None]:
        check_outputs(self.out, force=self.force)
        if self.images != "digits":
            raise ValueError(
                f"teach: no images of {self.images} come with the library; bring a trained teacher "
                f"and start at `dstudent pairs {self.images} --teacher DIR`"
            )
        images, _ = digits()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            denoiser = self.method.denoiser(self.net.build())
        start = Teacher(denoiser, *self.solve.build(denoiser.schedule))
        trainer = Trainer(
            self.method, start, Images(images), Images(images, seed=1), run_folder(self.out),
            self.train, device=self.machine.use(), progress=watched(),
        )  # fmt: skip
        trainer.check()
        pretrained.target(self.out, force=self.force, run=trainer.identity)
        return partial(self._train, trainer, start)

    def _train(self, trainer: Trainer, start: Teacher) -> None:
        teacher = start.using(trainer.fit())
        teacher.save_pretrained(
            self.out, force=self.force, version=ds.__version__, commit=environment.commit(),
            run=trainer.identity,
        )  # fmt: skip
        say(f"teacher: {self.out}")
