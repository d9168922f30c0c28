"""The settings of a run: what is run, how it is run, and run.json, which says what."""

import hashlib
import json
import logging
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

from ds.methods import AbstractMethod
from ds.system import distributed, targets
from ds.system.config import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Share,
    check,
    checked,
    difference,
)
from ds.system.files import present, read_sealed, sealed
from ds.system.staging import write_json
from ds.training.loader import LoaderKind

if TYPE_CHECKING:  # it imports torch.distributed.checkpoint, which is slow, and options need none
    from ds.training.checkpoint import Checkpoint

RUN = "run.json"
# Fields of a TrainConfig that do not move the weights: a run may go on with other values.
CHANGEABLE = ("epochs", "snapshot_every", "recompute_norms", "log_every", "check_every")
FALLING = ("cosine", "linear")  # schedules to zero at the end of a run
LOW = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
OptimizerKind = Literal["adam", "adamw", "radam", "apex_adam", "apex_adamw"]
log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that define a run.

    A check scores the averaged weights, draws a grid of samples and saves a checkpoint. A run may
    go on with other `epochs`, intervals (`log_every`, `check_every`, `snapshot_every`) and
    `recompute_norms`. A change of any other field makes another run.
    """

    batch_size: Count = 512  # rows, over all processes
    epochs: Positive = 25  # passes over the rows
    lr: Positive = 2e-4  # learning rate after the warm-up
    warmup_steps: Natural = 5000  # steps in which the learning rate rises from zero
    # of the learning rate after the warm-up: cosine and linear fall to zero at the end of the run,
    # inverse_sqrt falls as 1 / sqrt(step) from the end of the warm-up on
    lr_schedule: Literal["none", "cosine", "linear", "inverse_sqrt"] = "none"
    betas: tuple[Share, Share] = (0.9, 0.98)  # of Adam
    eps: Positive = 1e-8  # of Adam
    # radam raises its first steps by itself; the last two are NVIDIA apex's
    optimizer: OptimizerKind = "adam"
    weight_decay: NotNegative = 0.0
    grad_clip_norm: NotNegative = (
        0.0  # scale gradients down to this norm; 0 leaves them as they are
    )
    # of the networks that learn, and of their targets; None: as they were built or trained before
    dropout: Share | None = None
    ema_decay: Share = 0.995  # of the averaged weights, at every step
    # above 0: replace ema_decay by a power-function average over a share of the run
    ema_gamma: NotNegative = 0.0
    snapshot_every: Natural = 0  # save snapshots for ds.post_hoc_ema every N steps; 0 saves none
    shuffle_window: Natural = 0  # shuffle this many rows at a time, to spare a disk; 0 is all
    # auto: bfloat16 on GPUs that multiply in it, float32 elsewhere
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    recompute_norms: bool = False  # recompute norms in backward: less memory, the same bits
    log_every: Count = 50  # steps
    check_every: Count = 2000  # steps
    seed: Natural = 0  # of the order of rows, of dropout and of what a method draws

    def __post_init__(self):
        check(self, "train.")

    def of(self, method: AbstractMethod) -> "TrainConfig":
        """Return the settings for a run of a method: its own come first, and its length counts.

        Raises ValueError if it has a setting that it cannot set, or a wrong value of one.
        """
        known = [f.name for f in fields(self) if f.name not in ("batch_size", "epochs")]
        if unknown := sorted({*method.train} - {*known}):
            raise ValueError(
                f"{type(method).__name__}: `train` cannot set {unknown[0]}, only "
                f"{', '.join(known)}; `length` makes a run longer"
            )
        return replace(self, epochs=self.epochs * method.length, **method.train)

    def on(self, device: torch.device) -> "TrainConfig":
        """Return the same settings with the precision that "auto" means on a device."""
        if self.precision != "auto":
            return self
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return replace(self, precision="bfloat16" if bf16 else "float32")

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which a loss of this precision is computed."""
        low = LOW[self.precision]
        return torch.autocast(device.type, low, enabled=low is not None)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings that move results by rounding at most. A run may go on with other values."""

    loader: LoaderKind = "auto"  # how rows reach the device
    prefetch: Natural = 2  # batches to read ahead
    accumulate: Count = 1  # cut each batch into this many parts, to save memory
    # auto: yes for a U-Net on a GPU, where the run is long enough to gain from it
    compile: Literal["auto", "no", "yes", "cuda_graphs"] = "auto"
    compile_cache: str = ""  # a directory for compiled code; else PyTorch's own
    reduce: Literal["float32", "bfloat16"] = "float32"  # dtype of gradients sent between GPUs
    shard: bool = False  # keep a part of every weight, gradient and average in each process
    evaluate_every: Natural = 0  # compare samples with real images every N steps; 0 never does
    stall_minutes: NotNegative = 0.0  # end a process that takes no step for so long; 0 waits
    wandb: str = ""  # a project of Weights & Biases

    def __post_init__(self):
        check(self, "runtime.")
        if self.compile == "cuda_graphs" and self.shard:
            raise ValueError(
                "runtime.compile must be no or yes with runtime.shard, not cuda_graphs: a graph "
                "cannot gather weights"
            )
        if self.compile == "cuda_graphs" and self.accumulate > 1:
            raise ValueError(
                f"runtime.accumulate must be 1 with compile cuda_graphs, not {self.accumulate}: a "
                f"graph writes the gradients of every part to the same place"
            )

    def check(self, batch_size: int, device: torch.device, *, coupled: bool = False) -> None:
        """Raise ValueError if these processes cannot share a batch so on this device.

        The rows that a process has of a `coupled` loss cannot be cut.
        """
        world = distributed.world_size()
        if self.reduce == "bfloat16" and device.type != "cuda":
            raise ValueError(f"runtime.reduce bfloat16 is for GPUs, not for {device.type}")
        if self.shard and world == 1:
            raise ValueError("runtime.shard needs more than one process; start them with torchrun")
        parts = world * self.accumulate
        said = f"{world} processes, runtime.accumulate {self.accumulate}"
        if batch_size % parts:
            raise ValueError(
                f"train.batch_size ({batch_size}) must be a multiple of {parts}: {said}"
            )
        if coupled and self.accumulate > 1:
            raise ValueError(
                f"the loss mixes the rows of a batch, which cannot be cut into {self.accumulate} "
                f"parts; use runtime.accumulate 1"
            )


class RunFields(TypedDict):
    """The fields of run.json."""

    format: Literal["denoising-student/run/1"]
    method: dict[str, Any]
    train: dict[str, Any]
    start: dict[str, Any]
    source: str
    held_out: str


class RunFile:
    """run.json in the directory of a run: what is run, so that nothing else goes on there."""

    def __init__(self, fields: RunFields, out: Path, checkpoint: "Checkpoint"):
        self.fields: dict[str, Any] = {**fields}
        self.out, self.checkpoint = out, checkpoint

    @cached_property
    def identity(self) -> str:
        """The SHA-256, in hexadecimal, of what a run cannot change."""
        return hashlib.sha256(json.dumps(_fixed(self.fields), sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Raise ValueError if the directory holds another run, or one that cannot go on so.

        It must be one that can be written to, and hold a run or nothing. A run that ended before
        its first checkpoint counts as nothing.
        """
        targets.kept(self.out, "run", RUN)
        if not self._started():
            return
        there = self._there()
        if found := difference(_fixed(there), _fixed(self.fields)):
            raise ValueError(f"{self.out}: holds another run ({found}); use another directory")
        if self.fields["train"]["snapshot_every"] and not there["train"].get("snapshot_every"):
            raise ValueError(
                f"{self.out}: train.snapshot_every was 0 when this run began, and its averages "
                f"begin with a run; leave it at 0 or use another directory"
            )

    def claim(self) -> None:
        """Check the directory, and write the file unless the run is there already."""
        self.check()
        if not self._started():
            write_json(self.out / RUN, sealed(self.fields))

    def change(self) -> None:
        """Write the length and the intervals that the run goes on with, if they are others."""
        there = self._there()
        if found := difference(self.fields, there):
            falls = self.fields["train"]["lr_schedule"] in FALLING and "train.epochs" in found
            log.info(
                "%s: goes on otherwise (%s)%s",
                self.out,
                found,
                "; the learning rate falls along the new length from here on" if falls else "",
            )
            write_json(self.out / RUN, sealed(self.fields))

    def _started(self) -> bool:
        return present(self.out / RUN) and self.checkpoint.exists()

    def _there(self) -> dict[str, Any]:
        return checked(read_sealed(self.out / RUN), RunFields, self.out / RUN)


def _fixed(run: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a run cannot change."""
    return {**run, "train": fixed(run["train"])}


def fixed(train: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a TrainConfig, as plain values, that a run cannot change."""
    return {k: v for k, v in train.items() if k not in CHANGEABLE}
