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
from ds.diffusion.conditions import Sheet
from ds.diffusion.schedules import AbstractTable
from ds.evaluation import environment
from ds.methods import Denoising
from ds.models import pretrained
from ds.models.images import save_png, tile
from ds.models.sampler import Sampler
from ds.models.teacher import Teacher
from ds.nets import SongConfig, UNetConfig
from ds.pairs.pictures import Pictures, read_pictures, split
from ds.pairs.sources import Images, digits
from ds.system import cost
from ds.system.config import Count, Seed
from ds.system.staging import replacing
from ds.training import presets
from ds.training.config import TrainConfig
from ds.training.presets import Machine, Preset, SolveConfig
from ds.training.throughput import price_of_rows
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
    # teach the classes of the pictures too: samples can then be asked for by class, and guided.
    # Classes are the folders that pictures lie in, the labels beside an array, or the digits
    conditional: bool = False
    out: Path  # a directory for the teacher; its run goes beside it, into OUT-run
    net: UNetConfig | SongConfig
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
        n, h, w, c = pictures_at(images, side).images.shape
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
        idle = solve_idle(self.solve) | train_idle(self.train)
        if not (self.conditional or self.net.classes):
            idle["method.label-dropout"] = "without --conditional: no labels are taught"
        if isinstance(self.method.schedule, AbstractTable):
            idle["method.log-sigma"] = "on a table, whose steps are drawn equally often"
        return idle | dict.fromkeys(names, "with the digits, which are used as they are")

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
            denoiser = self.method.denoiser(replace(self.net, classes=self._classes).build())
        return Teacher(denoiser, *self.solve.build(denoiser.schedule))

    @property
    def _read(self) -> Path | None:
        """The pictures that are read, if they are somewhere."""
        return None if self.images == DIGITS else Path(self.images)

    @property
    def _classes(self) -> int:
        """The number of classes that the network is told; 0: none."""
        if self.net.classes or not self.conditional:
            return self.net.classes
        return max(1, pictures_at(self.images, self.size).classes)

    @property
    def _data(self) -> tuple[Images, Images]:
        return training_images(
            "teach",
            self.images,
            self.size,
            held_out=self.held_out,
            flip=self.flip,
            classes=self._classes,
        )

    def budget(self) -> str:
        """Return how long the training will take, from a short measurement on this device."""
        if self.images == DIGITS:
            return ""
        rows, t, start = self._data[0], self.train, self._start()
        each, _ = price_of_rows(self.method, start, rows, t, self.machine.use())
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
            **self._named(),
        )
        if self.images != DIGITS:
            self._show(teacher)
        say(f"teacher: {self.out}")

    def _named(self) -> dict[str, Any]:
        """Return the names of the classes, if the network is told any that have names."""
        names = pictures_at(self.images, self.size).names if self._classes else ()
        return {"classes": [*names]} if names else {}

    def _show(self, teacher: Teacher) -> None:
        """Write a sheet of the teacher's images, and of as many real ones on its right.

        Where classes are taught, each has a column on either side.
        """
        asked = self._data[0].conditions.sheet(SHOWN)
        drawn = Sampler(teacher)(0, range(asked.count), asked.cond.get("label"))
        real = pictures_at(self.images, self.size)
        chosen = real.images[_spread(len(real.images), real.labels, asked)]
        halves = [tile(x, asked.columns, gap=2) for x in (drawn, chosen)]
        sheet = torch.cat([halves[0], torch.full_like(halves[0][:, :8], 255), halves[1]], 1)
        file = run_folder(self.out) / "samples.png"
        with replacing(file) as path:
            save_png(sheet, path, scale=max(1, 64 // real.images.shape[1]))
        log.info("samples: %s, and real pictures on their right", file)


def _spread(n: int, labels: Tensor | None, asked: Sheet) -> Tensor:
    """Return which of n pictures to show on a sheet: of its classes, from first to last."""
    wanted = asked.cond.get("label")
    if labels is None or wanted is None:
        return _even(n, asked.count)
    found = torch.empty(asked.count, dtype=torch.int64, device="cpu")
    for k in wanted.unique():
        here, rows = wanted == k, (labels == k).nonzero()[:, 0]
        found[here] = rows[_even(len(rows), int(here.sum()))]
    return found


def _even(n: int, count: int) -> Tensor:
    """Return `count` of n rows, spread evenly from the first to the last."""
    return torch.arange(count, dtype=torch.int64, device="cpu") * (n - 1) // max(1, count - 1)


def forget_pictures() -> None:
    """Read pictures anew: another command begins, and they may be others."""
    pictures_at.cache_clear()
    training_images.cache_clear()


@lru_cache(1)
def pictures_at(images: str, size: int | None) -> Pictures:
    """Return pictures, read once a command."""
    return Pictures(*digits()) if images == DIGITS else read_pictures(images, size=size)


@lru_cache(1)
def training_images(
    verb: str,
    images: str,
    size: int | None = None,
    *,
    held_out: int | None = None,
    flip: bool = False,
    classes: int = 0,
    names: tuple[str, ...] = (),
) -> tuple[Images, Images]:
    """Return images to train on, and images to score with: others, but for the digits.

    Those to score with are repeated, each time with other noise, to make a few hundred. A network
    with `classes`, perhaps of some `names`, is told theirs. Raises ValueError if there are none,
    and for pictures without classes, or with others, for such a network.
    """
    if not images or (images in presets.PRESETS and not _comes_along(images)):
        which = f"of {images} come with the library" if images else "are named"
        raise ValueError(
            f"{verb}: no images {which}; give --images with a folder of pictures, an .npy, .npz or "
            f".tar"
        )
    found = pictures_at(images, size).named(names)
    labels = _labels(verb, images, found, classes)
    if images == DIGITS:
        return Images(found.images, labels), Images(found.images, labels, seed=1)
    train, kept = split(len(found.images), held_out)
    log.info("%s: %d pictures to train on, %d held out to score", verb, len(train), len(kept))
    scored = kept.repeat(-(-SCORED // len(kept)))
    return (
        Images(found.images, labels, rows=train, flip=flip),
        Images(found.images, labels, seed=1, rows=scored),
    )


def _comes_along(images: str) -> bool:
    """Return whether a preset's images are there: they come with the library, or a path does."""
    return images == DIGITS or Path(images).exists()


def _labels(verb: str, images: str, found: Pictures, classes: int) -> Tensor | None:
    """Return the labels for a network with so many classes; None for one without any."""
    known = found.classes
    if classes == 0:
        if known and verb == "teach" and images != DIGITS:
            log.info("teach: the %d classes are not taught; --conditional teaches them", known)
        return None
    if not known:
        raise ValueError(
            f"{verb}: {images}: no classes are known, which the network is to be told; put the "
            f"pictures of each class into a folder of their own, or labels beside an array"
        )
    if known > classes:
        raise ValueError(
            f"{verb}: {images}: has labels up to {known - 1}, the network has classes 0 to "
            f"{classes - 1}"
        )
    if images != DIGITS:
        log.info("%s: %d classes are taught", verb, classes)
    return found.labels
