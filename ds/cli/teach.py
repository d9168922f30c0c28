"""dstudent teach: train a teacher."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import ds
from ds.cli import environment
from ds.cli.verb import (
    Here,
    Verb,
    check_outputs,
    given,
    home_beside,
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
from ds.models.images import save_png, tile
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.nets import UNetConfig
from ds.pairs.pictures import read_pictures, split
from ds.pairs.sources import Images, digits
from ds.system import cost
from ds.system.config import Count, Seed
from ds.system.staging import replacing
from ds.training import presets
from ds.training.config import TrainConfig
from ds.training.presets import Machine, Preset, SolveConfig
from ds.training.throughput import seconds_per_row
from ds.training.trainer import Trainer

DIGITS = "digits"
SHOWN = 48  # samples on the sheet beside a run, and as many real pictures
SCORED = 256  # rows to score with, at least
log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class Teach(Verb):
    """Train a teacher on real images: on pictures of your own, with --images and no preset.

    The network and the length of the run follow from the size and the number of the pictures.
    Beside the teacher, OUT-run/samples.png shows its images next to real ones.
    """

    instead: ClassVar = "give --images FOLDER for pictures of your own"

    # a folder of pictures, an .npy, .npz or .tar, or "digits", which come with the library
    images: str
    size: Count | None = None  # pixels a side: cut the middle square of each picture and scale it
    # pictures to hold out from training, to pick the best average; None: a tenth, 8 to 1024
    held_out: Count | None = None
    flip: bool = False  # train on the mirror images too
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
        return cls._at(home_of(name), name, p)

    @classmethod
    def own(cls, args: list[str]) -> "Teach | None":
        images, size = given(args, "images", "size").values()
        if not images or images == DIGITS:
            return None
        side = int(size) if size and size.isdecimal() else None
        n, h, w, c = pictures_at(images, side).shape
        rows = len(split(n)[0])
        p = replace(presets.own((c, h, w), rows), net=presets.network((c, h, w), rows))
        return cls._at(home_beside(images), images, p)

    @classmethod
    def _at(cls, home: Path, images: str, p: Preset) -> "Teach":
        return cls(
            images=images,
            out=home / "teacher",
            net=p.net,
            method=p.denoising,
            train=p.teach or p.train,
            solve=p.solve,
            machine=p.machine,
        )

    @classmethod
    def choices(cls, args: list[str]) -> dict[str, Any]:
        forget_pictures()
        return per_preset(cls)

    def idle(self) -> dict[str, str]:
        names = ("size", "held-out", "flip") if self.images == DIGITS else ()
        mine = dict.fromkeys(names, "with the digits, which are used as they are")
        return solve_idle(self.solve) | train_idle(self.train) | mine

    def prepare(self) -> Callable[[], None]:
        check_outputs(self.out, force=self.force, apart=[self._read])
        images, start = self._data, self._start()
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

    def _start(self) -> Teacher:
        """Return a teacher of fresh weights."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            denoiser = self.method.denoiser(self.net.build())
        return Teacher(denoiser, *self.solve.build(denoiser.schedule))

    @property
    def _read(self) -> Path | None:
        """The pictures that are read, if they are somewhere."""
        return None if self.images == DIGITS else Path(self.images)

    @property
    def _data(self) -> tuple[Images, Images]:
        return training_images(
            "teach", self.images, self.size, held_out=self.held_out, flip=self.flip
        )

    def budget(self) -> str:
        """Return how long the training will take, from a short measurement on this device."""
        if self.images == DIGITS:
            return ""
        rows, t, start = self._data[0], self.train, self._start()
        each = seconds_per_row(self.method, start, rows, t, self.machine.use())
        steps = max(1, round(t.epochs * (len(rows) // t.batch_size)))
        weights = sum(w.numel() for w in start.net.parameters())
        took = cost.duration(steps * t.batch_size * each)
        return (
            f"train: {weights:,} weights, {steps:,} steps of {t.batch_size}, about {took} on this "
            f"{self.machine.use().type}"
        )

    def _train(self, trainer: Trainer, start: Teacher) -> None:
        if self.images != DIGITS:
            log.info(self.budget())
        teacher = start.using(trainer.fit())
        teacher.save_pretrained(
            self.out,
            force=self.force,
            version=ds.__version__,
            commit=environment.commit(),
            run=trainer.identity,
            images=len(trainer.batches.source),
        )
        if self.images != DIGITS:
            self._show(teacher)
        say(f"teacher: {self.out}")

    def _show(self, teacher: Teacher) -> None:
        """Write a sheet of the teacher's images, and of as many real ones on its right."""
        real = pictures_at(self.images, self.size)
        chosen = [i * (len(real) - 1) // (SHOWN - 1) for i in range(SHOWN)]
        halves = [tile(x, 8, gap=2) for x in (Sampler(teacher)(0, range(SHOWN)), real[chosen])]
        sheet = torch.cat([halves[0], torch.full_like(halves[0][:, :8], 255), halves[1]], 1)
        file = run_folder(self.out) / "samples.png"
        with replacing(file) as path:
            save_png(sheet, path, scale=max(1, 64 // real.shape[1]))
        log.info("samples: %s, and real pictures on their right", file)


def forget_pictures() -> None:
    """Read pictures anew: another command begins, and they may be others."""
    pictures_at.cache_clear()
    training_images.cache_clear()


@lru_cache(1)
def pictures_at(images: str, size: int | None) -> Tensor:
    """Return pictures, read once a command."""
    return read_pictures(images, size=size).images


@lru_cache(1)
def training_images(
    verb: str,
    images: str,
    size: int | None = None,
    *,
    held_out: int | None = None,
    flip: bool = False,
) -> tuple[Images, Images]:
    """Return images to train on, and images to score with: others, but for the digits.

    Those to score with are repeated, each time with other noise, to make a few hundred. Raises
    ValueError if there are none.
    """
    if images == DIGITS:
        digits_, _ = digits()
        return Images(digits_), Images(digits_, seed=1)
    if not images or (images in presets.PRESETS and not Path(images).exists()):
        which = f"of {images} come with the library" if images else "are named"
        raise ValueError(
            f"{verb}: no images {which}; give --images with a folder of pictures, an .npy, .npz or "
            f".tar"
        )
    found = pictures_at(images, size)
    train, kept = split(len(found), held_out)
    log.info("%s: %d pictures to train on, %d held out to score", verb, len(train), len(kept))
    scored = kept.repeat(-(-SCORED // len(kept)))
    return Images(found, rows=train, flip=flip), Images(found, seed=1, rows=scored)
