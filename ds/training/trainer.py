"""The Trainer: optimiser, averaged weights, checkpoints, metrics. It knows no method by name."""

import copy
import faulthandler
import hashlib
import json
import logging
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ds.diffusion.noise import noise
from ds.methods import AbstractMethod, Progress
from ds.models.images import save_png, tile, to_uint8
from ds.models.pretrained import check_finite, fingerprint
from ds.models.teacher import Teacher
from ds.nets import UNet, recompute_norms
from ds.pairs.sources import AbstractSource, Batch
from ds.system import distributed, targets
from ds.system.ambient import without_ambient
from ds.system.config import (
    Count,
    Natural,
    NotNegative,
    Positive,
    Share,
    check,
    checked,
    difference,
    require,
    to_json,
)
from ds.system.cost import check_memory
from ds.system.files import present, read_sealed, sealed
from ds.system.signals import Heard, Interrupted, Stop, deferred_signals
from ds.system.staging import locked, replacing, subfolder, write_json
from ds.training import ema, fsdp, optim
from ds.training import loader as loaders
from ds.training.batches import Batches
from ds.training.checkpoint import Checkpoint
from ds.training.log import Records, check_project
from ds.training.throughput import flops_per_row, matmul_tflops

RUN = "run.json"


class RunFields(TypedDict):
    """What is run, as run.json says it."""

    format: Literal["denoising-student/run/1"]
    method: dict[str, Any]
    train: dict[str, Any]
    start: dict[str, Any]
    source: str
    held_out: str


# What of a TrainConfig leaves the path of the weights as it is: a run may go on with another one.
CHANGEABLE = ("epochs", "snapshot_every", "recompute_norms", "log_every", "check_every")
# What of a note is another in every run.
MEASURED = ("images_per_second", "tflops", "peak_share", "loader_wait", "memory_gb")
_LOW = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is run. A check scores the averaged weights, draws a grid and saves a checkpoint.

    A run may go on with other `epochs`, intervals (`log_every`, `check_every`, `snapshot_every`)
    and `recompute_norms`; whatever else is changed makes another run.
    """

    batch_size: Count = 512
    epochs: Positive = 25
    lr: Positive = 2e-4
    warmup_steps: Natural = 5000
    decay: Literal["none", "cosine"] = "none"  # what follows the warm-up
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Positive = 1e-8
    optimizer: optim.Kind = "adam"
    weight_decay: NotNegative = 0.0
    max_norm: NotNegative = 0.0  # that gradients are scaled down to; 0 leaves them as they are
    ema_decay: Share = 0.995
    # above 0: average over a share of the run instead, by a power function
    ema_gamma: NotNegative = 0.0
    snapshot_every: Natural = 0  # steps; above 0: keep what ds.post_hoc_ema makes other averages of
    shuffle_window: Natural = 0  # rows that are shuffled at a time, for a disk's sake; 0 is all
    # auto: bfloat16 on GPUs that multiply in it, else float32
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    recompute_norms: bool = False  # in backward: less memory, the same bits
    log_every: Count = 50  # steps
    check_every: Count = 2000  # steps
    seed: Natural = 0

    def __post_init__(self):
        check(self, "train.")

    def on(self, device: torch.device) -> "TrainConfig":
        """Return the same with what a device makes of "auto"."""
        if self.precision != "auto":
            return self
        narrow = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return replace(self, precision="bfloat16" if narrow else "float32")


PAYS = 5000  # steps of a run on a GPU that save what compiling takes, a minute or two: not measured


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How it is run, which moves results by rounding at most: a run may go on with another one."""

    loader: loaders.Kind = "auto"
    prefetch: Natural = 2  # steps read ahead
    accumulate: Count = 1  # parts of a step's batch, one after the other, for want of memory
    # auto: yes for a U-Net on a GPU, where the run is long enough to pay for it
    compile: Literal["auto", "no", "yes", "cuda_graphs"] = "auto"
    compile_cache: str = ""  # a directory that keeps what was compiled; else PyTorch's own
    reduce: Literal["float32", "bfloat16"] = "float32"  # gradients on their way between GPUs
    shard: bool = False  # a part of every weight, and of what belongs to it, for each process
    # steps, after which the average's images are compared with real ones
    evaluate_every: Natural = 0
    # without a step, after which the process ends; 0 waits for ever
    stall_minutes: NotNegative = 0.0
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


def check_shares(config: TrainConfig, runtime: Runtime, device: torch.device) -> None:
    """Raise ValueError for what these processes, on this device, cannot do with each batch."""
    if runtime.reduce == "bfloat16" and device.type != "cuda":
        raise ValueError(f"runtime.reduce bfloat16 is for GPUs, not for {device.type}")
    if runtime.shard and distributed.world() == 1:
        raise ValueError("runtime.shard needs more than one process; start them with torchrun")
    if config.batch_size % (parts := distributed.world() * runtime.accumulate):
        raise ValueError(
            f"train.batch_size ({config.batch_size}) must be a multiple of {parts}: "
            f"{distributed.world()} processes, runtime.accumulate {runtime.accumulate}"
        )


class Trainer:
    """Train what a method creates, in a directory that can be resumed to the same bits.

    `out` receives run.json (what is run), metrics.jsonl (a line per log and per check), a
    checkpoint and samples/. `start` gives the network to start from and is left as it is. The
    processes of torchrun share every batch, and the first of them writes. `evaluate` makes figures
    of a network, every runtime.evaluate_every steps, in all processes.

    A run can be made longer, finished or not, and told to log or check at other intervals: it goes
    on from its last checkpoint, and the best average is the best of the checks that were made. A
    decay to zero is that of the new length from there on; where the learning rate is constant, the
    weights are those of a run that was as long from its start, to the bit.

    Raises ValueError if the method needs another kind of source, if `out` holds another run, if
    norms are to be recomputed that the student does not have, if a batch cannot be cut into equal
    parts, or if `device`, or a single process, cannot do what `runtime` asks for.
    """

    @without_ambient(grad=True)
    def __init__(
        self,
        method: AbstractMethod,
        start: Teacher,
        source: AbstractSource,
        held_out: AbstractSource,
        out: str | Path,
        config: TrainConfig,
        *,
        device: torch.device | str = "cpu",
        runtime: Runtime | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        progress: bool = False,
    ):
        if source.feeds != method.feeds:
            raise ValueError(
                f"{type(method).__name__} needs {method.feeds}, the source has {source.feeds}"
            )
        self.device = torch.device(device)
        config = config.on(self.device)
        self.method, self.config, self.out = method, config, Path(out)
        self.runtime, self.held_out = runtime or Runtime(), held_out
        self.progress = progress and distributed.is_first()
        check_shares(config, self.runtime, self.device)
        if self.runtime.evaluate_every and evaluate is None:
            raise ValueError("runtime.evaluate_every needs an `evaluate` of the Trainer")
        self.evaluate = evaluate
        rows = config.batch_size // distributed.world() // self.runtime.accumulate
        check_memory(  # for images and noise
            f"train.batch_size {config.batch_size}",
            2 * 4 * rows * math.prod(start.shape),
            self.device,
        )
        self.batches = Batches(
            source, config.batch_size, config.seed, window=config.shuffle_window,
            part=distributed.share(config.batch_size),
        )  # fmt: skip
        self.steps = max(1, round(config.epochs * self.batches.per_epoch))
        check_project(self.runtime.wandb)
        loaders.check(self.batches, self.runtime.loader, self.runtime.prefetch)
        require("train.epochs", Natural, indices=self.steps * config.batch_size)
        self.shape = start.shape
        self.run = {
            "format": "denoising-student/run/1",
            "method": to_json(method),
            "train": to_json(config),
            "start": {
                "sha256": fingerprint(start.denoiser),
                "solver": to_json(start.solver),
                "grid": list(start.grid),
            },
            "source": source.fingerprint(),
            "held_out": held_out.fingerprint(),
        }
        self._check_shape(start)
        self.modules = method.init(start).to(self.device)
        for module in self.modules.values():  # what does not learn has no dropout either
            module.train(any(p.requires_grad for p in module.parameters()))
        if config.recompute_norms:
            recompute_norms(self.modules["student"])
        self.called = self.modules  # by the loss
        if self.runtime.shard:
            self.called = fsdp.shard(self.modules, self.device, _LOW[self.runtime.reduce])
        self.ema = copy.deepcopy(self.modules["student"]).float().requires_grad_(False).eval()
        self.best = copy.deepcopy(self.ema)
        lengths = ema.LENGTHS if config.snapshot_every else ()
        self.tracked = nn.ModuleList(copy.deepcopy(self.ema) for _ in lengths)
        self.best_loss = float("inf")
        self.step = 0
        self.done = dict.fromkeys(("log", "snapshot", "evaluate", "check"), 0)  # at which step last
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        # The sum of the losses since the last log.
        self.running = torch.zeros((), dtype=torch.float32, device=self.device)
        self.checkpoint = Checkpoint(self.out, self.device, sharded=self.runtime.shard)

    def _check_shape(self, start: Teacher) -> None:
        (row,) = self._held_out_batch(range(1)).noise
        if row.shape != start.shape:
            raise ValueError(
                f"the network makes samples of the shape {list(start.shape)}, the rows to train on "
                f"are {list(row.shape)}"
            )

    @property
    def identity(self) -> str:
        """The hash of what makes this run another than others: SHA-256, in hexadecimal."""
        return hashlib.sha256(json.dumps(_fixed(self.run), sort_keys=True).encode()).hexdigest()

    def _optimizer(self) -> torch.optim.Optimizer:
        c, student = self.config, self.modules["student"]
        both = zip(student.parameters(), self.ema.parameters(), strict=True)
        averaged = {p: mean for p, mean in both if p.requires_grad}
        others = [p for p in self.modules.parameters() if p.requires_grad and p not in averaged]
        return optim.build(
            c.optimizer, [*averaged, *others], [*averaged.values()], lr=c.lr, betas=c.betas,
            eps=c.eps, weight_decay=c.weight_decay, max_norm=c.max_norm or math.inf,
        )  # fmt: skip

    @without_ambient(grad=True)
    def fit(self) -> nn.Module:
        """Train to the end, from the last checkpoint if there is one; return the best average.

        Raises Interrupted after SIGINT, SIGTERM, SIGUSR1 or SIGHUP, when a checkpoint of the last
        whole step is saved, and RuntimeError when the loss or a weight is no longer finite; the
        last good checkpoint stays.
        """
        first = distributed.is_first()
        if first:
            self.check()
            self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out) if first else nullcontext(), deferred_signals() as stop:
            self.stop = stop
            self._resume()
            self.loss = _shared(_Loss(self.method, self.called), self.runtime, self._compiles())
            self.records = first and Records(
                self.out, self.step, self.run, wandb=self.runtime.wandb
            )
            with closing(self.records) if first else nullcontext(), closing(self.checkpoint):
                self._train(stop)
        return fsdp.whole(self.best)

    def _compiles(self) -> bool:
        """Say whether the loss is compiled; where nobody asked for it, the log says that it is."""
        if self.runtime.compile != "auto":
            return self.runtime.compile != "no"
        unet = isinstance(self.modules["student"], UNet)
        pays = unet and self.device.type == "cuda" and self.steps >= PAYS
        if pays:
            log.info("train: compiled, which pays in %d steps", self.steps)
        return pays

    def _train(self, stop: Stop) -> None:
        c, r = self.config, self.runtime
        bar = tqdm(
            total=self.steps * c.batch_size, initial=self.step * c.batch_size, unit=" images",
            disable=not self.progress, smoothing=0.02,
        )  # fmt: skip
        modules = fsdp.whole(self.modules)
        self.flops = flops_per_row(
            self.method, modules, self._held_out_batch(range(1)), self._progress()
        )
        self.peak = self._peak()
        self.rows = loaders.load(self.batches, self.step, self.device, r.loader, r.prefetch)
        self._start_clock()
        with bar, closing(self.rows), _watchdog(r.stall_minutes) as alive:
            try:
                self._act(bar)  # what an interruption left undone
                while self.step < self.steps:
                    self._advance()
                    alive()
                    bar.update(c.batch_size)
                    self._act(bar)
                    if (number := distributed.largest(stop())) and self.step < self.steps:
                        raise Heard(number)
            except Heard as heard:
                self._save(fsdp.whole(self.ema))
                raise Interrupted(
                    f"{self.out}: interrupted at step {self.step} of {self.steps}, which is "
                    f"saved; run the same command again to go on",
                    heard.number,
                ) from None

    def _act(self, bar: tqdm) -> None:
        """Do what is due after this step and is not done yet."""
        c = self.config
        for name, every, act in (
            ("log", c.log_every, lambda: self._log(bar)),
            ("snapshot", c.snapshot_every, self._snapshot),
            ("evaluate", self.runtime.evaluate_every, self._evaluate),
            ("check", c.check_every, self._check),
        ):
            due = every and (self.step % every == 0 or self.step == self.steps)
            if due and self.done[name] != self.step:
                act()
                self.done[name] = self.step
                self._start_clock()

    def _may_be_cut(self) -> AbstractContextManager[None]:
        """Return the context of work that a signal may cut short: of processes, all must agree."""
        return self.stop.at_once() if distributed.world() == 1 else nullcontext()

    def _advance(self) -> None:
        """Take one optimiser step, which moves the average as well."""
        c = self.config
        decay = optim.power_decay(self.step, c.ema_gamma) if c.ema_gamma else c.ema_decay
        for group in self.optimizer.param_groups:
            group["lr"], group["ema_decay"] = self._lr(), decay
        self.optimizer.zero_grad()
        before = self.running.clone()
        try:
            with self._may_be_cut():
                self._backward()
        except Heard:  # the step is not taken
            self.running.copy_(before)
            raise
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._follow()
        self.method.after_step(self.modules, self._progress())
        self.step += 1

    def _progress(self) -> Progress:
        return Progress(self.step, self.steps)

    def _follow(self) -> None:
        """Move the averages for snapshots; buffers of every average are those of the student."""
        student = self.modules["student"]
        for net, length in zip(self.tracked, ema.LENGTHS, strict=False):
            decay = optim.power_decay(self.step, ema.gamma_of(length))
            optim.average(list(net.parameters()), list(student.parameters()), decay)
        for net in (self.ema, *self.tracked):
            for mean, buffer in zip(net.buffers(), student.buffers(), strict=True):
                mean.copy_(buffer)

    def _backward(self) -> None:
        """Add up the gradients of this process's part of the batch."""
        begin = time.perf_counter()
        images, indices = next(self.rows)
        draws = self.batches.draws(self.step, self.device)
        self.waited += time.perf_counter() - begin
        count = self.runtime.accumulate
        parts = (x.chunk(count) for x in (images, indices, draws.index))
        for i, (*kept, index) in enumerate(zip(*parts, strict=True)):
            batch = self.batches.source.prepare(*kept, draws._replace(index=index))
            with _apart(self.loss, i < count - 1):
                with self._seeded(distributed.number() * count + i), self._autocast():
                    loss = self.loss(batch, self._progress()) / count
                self.scaler.scale(loss).backward()
            self.running += loss.detach()

    @contextmanager
    def _seeded(self, part: int) -> Iterator[None]:
        """Make dropout a function of the step and the part of its batch."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # A CPU's generator takes 32 bits: the golden ratio of them keeps parts far apart.
            torch.manual_seed(self.config.seed + self.step + part * 0x9E3779B9)
            yield

    def _lr(self) -> float:
        """Rise linearly over the warm-up, then stay or fall to zero along half a cosine."""
        c = self.config
        rise = min(1.0, (self.step + 1) / max(c.warmup_steps, 1))
        after = max(0, self.step - c.warmup_steps) / max(self.steps - c.warmup_steps, 1)
        fall = 0.5 * (1 + math.cos(math.pi * after)) if c.decay == "cosine" else 1.0
        return c.lr * rise * fall

    def _start_clock(self) -> None:
        """Measure speed from here on: what was done between two steps is no part of it."""
        self.since, self.mark, self.waited = time.perf_counter(), self.step, 0.0

    def _log(self, bar: tqdm) -> None:
        """Note the mean loss since the last log, and what was measured meanwhile."""
        self._pool()
        loss = self.running.item() / (self.step - self.done["log"])
        self.running.zero_()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"{self.out}: the loss is {loss} at step {self.step}; the last checkpoint is "
                f"kept, try a smaller train.lr or train.precision float32"
            )
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        seconds = time.perf_counter() - self.since
        images = (self.step - self.mark) * self.config.batch_size / seconds
        tflops = images * self.flops / distributed.world() / 1e12
        self._note(
            loss=loss, lr=self._lr(), images_per_second=round(images, 1),
            tflops=float(f"{tflops:.4g}"),
            **({"peak_share": round(tflops / self.peak, 4)} if self.peak else {}),
            loader_wait=round(self.waited / seconds, 4), memory_gb=round(self._memory(), 3),
        )  # fmt: skip

    def _peak(self) -> float:
        """Return the TFLOP/s of a GPU's matrix product in the precision of the run, else 0."""
        if self.device.type != "cuda":
            return 0.0
        return matmul_tflops(self.device, _LOW[self.config.precision] or torch.float32)

    def _pool(self) -> None:
        """Give every process the mean of what each has summed up."""
        self.running.fill_(distributed.total(self.running.item()) / distributed.world())

    def _memory(self) -> float:
        """Return the most memory this process has used so far, in GB, a GPU's if it has one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used * (1 if sys.platform == "darwin" else 1024) / 1e9

    def _check(self) -> None:
        """Score the average on the held-out rows, keep it if it is the best, draw, save."""
        modules = fsdp.whole(nn.ModuleDict({**self.modules, "student": self.ema}))
        size, rows, total = self.config.batch_size, len(self.held_out), 0.0
        with self._may_be_cut(), torch.no_grad(), self._autocast():
            for number in distributed.share(-(-rows // size)):
                part = range(number * size, min((number + 1) * size, rows))
                batch = self._held_out_batch(part)
                total += self.method.loss(modules, batch, self._progress()).item() * len(part)
        loss = distributed.total(total) / rows
        if loss < self.best_loss:
            self.best_loss = loss
            self.best.load_state_dict(self.ema.state_dict())
        self.done["check"] = self.step  # it is saved with what it found
        self._note(held_out_loss=loss, best=self.best_loss)
        if distributed.is_first():
            self._draw(modules["student"])
        self._save(modules["student"])

    def _snapshot(self) -> None:
        tracked = fsdp.whole(self.tracked)
        if distributed.is_first():
            ema.write_snapshot(self.out, self.step, tracked, self.identity)

    def _evaluate(self) -> None:
        net = fsdp.whole(self.ema)
        with self._may_be_cut():
            found = self.evaluate(net)
        self._note(**found)

    @torch.no_grad()
    def _draw(self, average: nn.Module) -> None:
        """Write a grid of samples of the average, always from the same noise."""
        if len(self.shape) != 3:
            return
        z = noise(self.config.seed, range(64), self.shape, device=self.device)
        sheet = tile(to_uint8(self.method.sample(average, z)), columns=8)
        with replacing(subfolder(self.out / "samples") / f"step-{self.step:07d}.png") as path:
            save_png(sheet, path, scale=max(1, 256 // self.shape[-1] // 8))

    def _note(self, **figures: float) -> None:
        if distributed.is_first():
            self.records.note(self.step, **figures)

    def _save(self, average: nn.Module) -> None:
        self._pool()
        check_finite(average.state_dict(), f"{self.out}: step {self.step}")
        self.checkpoint.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on from; its tensors are those of the run."""
        return {
            "run": self.identity,
            "step": self.step,
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict(),
            "tracked": self.tracked.state_dict(),
            "best": self.best.state_dict(),
            "best_loss": self.best_loss,
            "running": self.running,
            "done": self.done,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; ValueError if that was another run's."""
        if saved["run"] != self.identity:
            raise ValueError("saved by another run")
        self.step, self.best_loss = saved["step"], saved["best_loss"]
        self.done = dict(saved["done"])
        self.modules.load_state_dict(saved["modules"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.ema.load_state_dict(saved["ema"])
        if self.tracked:  # no longer where snapshots are no longer asked for
            self.tracked.load_state_dict(saved["tracked"])
        self.best.load_state_dict(saved["best"])
        self.running.copy_(saved["running"])

    def _resume(self) -> None:
        """Continue the run in `out`, or start it."""
        distributed.from_first(self._claim)
        self.checkpoint.load(self)
        if self.step > self.steps:
            raise ValueError(
                f"{self.out}: the run is at step {self.step} already, train.epochs "
                f"{self.config.epochs} ends it at step {self.steps}; give more epochs"
            )
        if self.step:
            log.info("%s: going on from step %d of %d", self.out, self.step, self.steps)
        if self.step != (step := distributed.from_first(lambda: self.step)):
            raise RuntimeError(
                f"{self.out}: holds step {self.step} here and step {step} where the first process "
                f"runs; all processes need the same file system"
            )
        distributed.from_first(self._change)

    def _claim(self) -> None:
        """Write what is run, or check that the directory holds the same run."""
        self.check()
        if not (present(self.out / RUN) and self.checkpoint.exists()):
            write_json(self.out / RUN, sealed(self.run))

    def check(self) -> None:
        """Raise ValueError if the directory holds another run, or one that cannot go on so.

        It must be one that can be written to, too, and hold a run or nothing. A run that ended
        before its first checkpoint is nothing.
        """
        targets.kept(self.out, "run", RUN)
        if not (present(self.out / RUN) and self.checkpoint.exists()):
            return
        there = self._there()
        if found := difference(_fixed(there), _fixed(self.run)):
            raise ValueError(f"{self.out}: holds another run ({found}); use another directory")
        if self.tracked and not there["train"].get("snapshot_every"):
            raise ValueError(
                f"{self.out}: train.snapshot_every was 0 when this run began, and its averages "
                f"begin with a run; leave it at 0 or use another directory"
            )

    def _change(self) -> None:
        """Note what the run goes on with, where that is another length or interval."""
        there = self._there()
        if found := difference(self.run, there):
            falls = self.config.decay != "none" and "train.epochs" in found
            log.info(
                "%s: goes on otherwise (%s)%s", self.out, found,
                "; the learning rate falls along the new length from here on" if falls else "",
            )  # fmt: skip
            write_json(self.out / RUN, sealed(self.run))

    def _there(self) -> dict[str, Any]:
        return checked(read_sealed(self.out / RUN), RunFields, self.out / RUN)

    def _held_out_batch(self, rows: range) -> Batch:
        return self.held_out.batch(rows, seed=self.config.seed, device=self.device)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.config.precision)


def _fixed(run: dict[str, Any]) -> dict[str, Any]:
    """Return what a run cannot change on its way."""
    return {**run, "train": {k: v for k, v in run["train"].items() if k not in CHANGEABLE}}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a loss of this precision is computed."""
    low = _LOW[precision]
    return torch.autocast(device.type, low, enabled=low is not None)


class _Loss(nn.Module):
    """The loss of a method as a module, which can be compiled and wrapped."""

    def __init__(self, method: AbstractMethod, modules: nn.ModuleDict):
        super().__init__()
        self.method, self.modules_ = method, modules

    def forward(self, batch: Batch, progress: Progress) -> Tensor:
        return self.method.loss(self.modules_, batch, progress)


def _shared(loss: _Loss, runtime: Runtime, compiles: bool) -> nn.Module:
    """Compile a loss with its networks as one graph, and let processes average its gradients.

    Sharded networks average them by themselves, and are compiled a block at a time. Where nobody
    asked for it, what cannot be compiled may break the graph.
    """
    if compiles:
        if runtime.compile_cache:  # which the compiler looks up in the environment alone
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(runtime.compile_cache).resolve())
        mode = "reduce-overhead" if runtime.compile == "cuda_graphs" else None
        for part in fsdp.blocks(loss) if runtime.shard else [loss]:
            part.compile(fullgraph=runtime.compile != "auto", mode=mode)
    if distributed.world() == 1 or runtime.shard:
        return loss
    shared = DistributedDataParallel(
        loss,
        gradient_as_bucket_view=True,
        static_graph=runtime.accumulate == 1,  # whose first backward may not be apart
    )
    if runtime.reduce == "bfloat16":
        shared.register_comm_hook(None, bf16_compress_hook)
    return shared


@contextmanager
def _apart(loss: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep gradients in this process for a while, if that is wanted."""
    fsdp.reduce_gradients(loss, not wanted)
    shared = isinstance(loss, DistributedDataParallel)
    with loss.no_sync() if shared and wanted else nullcontext():
        yield


@contextmanager
def _watchdog(minutes: float) -> Iterator[Callable[[], None]]:
    """Yield a sign of life to give; without one for so long, print every stack and end."""
    if not minutes:
        yield lambda: None
        return

    def alive() -> None:
        seconds = min(60 * minutes, threading.TIMEOUT_MAX)
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
