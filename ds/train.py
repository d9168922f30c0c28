"""The Trainer: optimiser, averaged weights, checkpoints, metrics. It knows no method by name."""

import copy
import json
import logging
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from ds.checkpoint import check_finite, fingerprint
from ds.config import difference, to_json
from ds.data import Batch, Batches, Source
from ds.denoiser import Denoiser
from ds.files import Interrupted, deferred_signals, locked, read_json, replacing, write_json
from ds.images import save_png, tile, to_uint8
from ds.methods import AbstractMethod
from ds.nets import recompute_norms
from ds.philox import noise

RUN = "run.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.pt"
# What torch.load and load_state_dict raise for a file that is not a whole checkpoint of this run.
_DAMAGE = (
    RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError,
)  # fmt: skip
log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. A check scores the averaged weights, draws a grid and saves a checkpoint."""

    batch_size: int = 512
    epochs: float = 25
    lr: float = 2e-4
    warmup_steps: int = 5000
    decay: Literal["none", "cosine"] = "none"  # what follows the warm-up
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    ema_decay: float = 0.995
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute_norms: bool = False  # in backward: less memory, the same bits
    log_every: int = 50  # steps
    check_every: int = 2000  # steps
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "epochs", "lr", "log_every", "check_every"):
            if not 0 < getattr(self, name) < math.inf:  # which refuses NaN as well
                raise ValueError(f"train.{name} must be above 0, not {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ValueError(f"train.warmup_steps must be at least 0, not {self.warmup_steps}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must lie in [0, 1), not {self.ema_decay}")


class Trainer:
    """Train what a method creates, in a directory that can be resumed to the same bits.

    `out` receives run.json (what is run), metrics.jsonl (a line per log and per check),
    checkpoint.pt and samples/. `init` gives the network to start from and is left as it is. Raises
    ValueError if the method needs another kind of source, if `out` holds another run, or if norms
    are to be recomputed that the student does not have.
    """

    def __init__(
        self,
        method: AbstractMethod,
        init: Denoiser,
        source: Source,
        held_out: Source,
        out: str | Path,
        config: TrainConfig,
        *,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ):
        if source.feeds != method.feeds:
            raise ValueError(
                f"{type(method).__name__} needs {method.feeds}, the source has {source.feeds}"
            )
        self.method, self.config, self.out = method, config, Path(out)
        self.held_out, self.device, self.progress = held_out, torch.device(device), progress
        self.batches = Batches(source, config.batch_size, config.seed)
        self.steps = max(1, round(config.epochs * self.batches.per_epoch))
        self.shape = init.shape
        self.run = {
            "format": "denoising-student/run/1",
            "method": to_json(method),
            "train": to_json(config),
            "init": fingerprint(init),
            "source": source.fingerprint(),
            "held_out": held_out.fingerprint(),
        }
        self.modules = method.init(init).to(self.device)
        for module in self.modules.values():  # what does not learn has no dropout either
            module.train(any(p.requires_grad for p in module.parameters()))
        if config.recompute_norms:
            recompute_norms(self.modules["student"])
        self.ema = copy.deepcopy(self.modules["student"]).float().requires_grad_(False).eval()
        self.best = copy.deepcopy(self.ema)
        self.best_loss = float("inf")
        self.step = 0
        learning = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            learning, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self.running = torch.zeros((), device=self.device)  # sum of the losses since the last log

    def fit(self) -> nn.Module:
        """Train to the end, from the last checkpoint if there is one; return the best average.

        Raises Interrupted after SIGINT or SIGTERM, when a checkpoint of that step is saved, and
        RuntimeError when the loss or a weight is no longer finite; the last good checkpoint stays.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out), deferred_signals() as stop:
            self._resume()
            self._train(stop)
        return self.best

    def _train(self, stop: Callable[[], bool]) -> None:
        c = self.config
        bar = tqdm(
            total=self.steps * c.batch_size, initial=self.step * c.batch_size, unit=" images",
            disable=not self.progress, smoothing=0.02,
        )  # fmt: skip
        since, mark = time.perf_counter(), self.step
        with bar:
            while self.step < self.steps:
                self._advance()
                bar.update(c.batch_size)
                last = self.step == self.steps
                if self.step % c.log_every == 0 or last:
                    seconds = time.perf_counter() - since
                    rate = (self.step - mark) * c.batch_size / seconds
                    self._log(bar, rate)
                    since, mark = time.perf_counter(), self.step
                if self.step % c.check_every == 0 or last:
                    self._check()
                    since, mark = time.perf_counter(), self.step
                if stop() and not last:
                    self._save()
                    raise Interrupted(
                        f"{self.out}: interrupted at step {self.step} of {self.steps}, which is "
                        f"saved; run the same command again to go on"
                    )

    def _advance(self) -> None:
        """Take one optimiser step and move the average."""
        c = self.config
        batch = self._to_device(self.batches.at(self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        with torch.random.fork_rng(), self._autocast():  # dropout is a function of the step
            torch.manual_seed(c.seed + self.step)
            loss = self.method.loss(self.modules, batch, self.step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.method.after_step(self.modules, self.step)
        student = self.modules["student"]
        with torch.no_grad():
            weights = [p.float() for p in student.parameters()]
            torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - c.ema_decay)
            for average, buffer in zip(self.ema.buffers(), student.buffers(), strict=True):
                average.copy_(buffer)
        self.running += loss.detach()
        self.step += 1

    def _lr(self) -> float:
        """Rise linearly over the warm-up, then stay or fall to zero along half a cosine."""
        c = self.config
        rise = min(1.0, (self.step + 1) / max(c.warmup_steps, 1))
        after = max(0, self.step - c.warmup_steps) / max(self.steps - c.warmup_steps, 1)
        fall = 0.5 * (1 + math.cos(math.pi * after)) if c.decay == "cosine" else 1.0
        return c.lr * rise * fall

    def _log(self, bar: tqdm, rate: float) -> None:
        """Note the mean loss since the last log."""
        count = self.step % self.config.log_every or self.config.log_every
        loss = self.running.item() / count
        self.running.zero_()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"{self.out}: the loss is {loss} at step {self.step}; the last checkpoint is "
                f"kept, try a smaller train.lr or train.precision float32"
            )
        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        self._note(loss=loss, lr=self._lr(), images_per_second=round(rate, 1))

    def _check(self) -> None:
        """Score the average on the held-out rows, keep it if it is the best, draw, save."""
        modules = nn.ModuleDict({**self.modules, "student": self.ema})
        size, rows, total = self.config.batch_size, len(self.held_out), 0.0
        with torch.no_grad(), self._autocast():
            for number, start in enumerate(range(0, rows, size)):
                part = range(start, min(start + size, rows))
                batch = self._to_device(self.held_out.batch(part, part))
                total += self.method.loss(modules, batch, number).item() * len(part)
        loss = total / rows
        if loss < self.best_loss:
            self.best_loss = loss
            self.best.load_state_dict(self.ema.state_dict())
        self._note(held_out_loss=loss, best=self.best_loss)
        self._draw()
        self._save()

    @torch.no_grad()
    def _draw(self) -> None:
        """Write a grid of samples of the average, always from the same noise."""
        if len(self.shape) != 3:
            return
        z = noise(self.config.seed, range(64), self.shape, device=self.device)
        sheet = tile(to_uint8(self.method.sample(self.ema, z)), columns=8)
        (self.out / "samples").mkdir(exist_ok=True)
        with replacing(self.out / "samples" / f"step-{self.step:07d}.png") as path:
            save_png(sheet, path, scale=max(1, 256 // self.shape[-1] // 8))

    def _note(self, **figures: float) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.out / METRICS, "a") as file:
            file.write(json.dumps({"step": self.step, **figures}) + "\n")

    def _save(self) -> None:
        check_finite(self.ema.state_dict(), f"{self.out}: step {self.step}")
        with replacing(self.out / CHECKPOINT) as path:
            torch.save(
                {
                    "step": self.step,
                    "modules": self.modules.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "ema": self.ema.state_dict(),
                    "best": self.best.state_dict(),
                    "best_loss": self.best_loss,
                    "running": self.running,
                },
                path,
            )

    def _resume(self) -> None:
        """Continue the run in `out`, or start it."""
        if (self.out / RUN).exists():
            if found := difference(read_json(self.out / RUN), self.run):
                raise ValueError(f"{self.out}: holds another run ({found}); use another directory")
        else:
            write_json(self.out / RUN, self.run)
        path = self.out / CHECKPOINT
        if path.exists():
            try:
                saved = torch.load(path, map_location=self.device, weights_only=True)
                self.step, self.best_loss = saved["step"], saved["best_loss"]
                self.modules.load_state_dict(saved["modules"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.ema.load_state_dict(saved["ema"])
                self.best.load_state_dict(saved["best"])
                self.running.copy_(saved["running"])
            except _DAMAGE as error:
                raise ValueError(f"{path}: damaged ({error}); delete it to start over") from None
            log.info("%s: going on from step %d of %d", self.out, self.step, self.steps)
        self._trim_metrics()

    def _trim_metrics(self) -> None:
        """Drop the lines noted after the checkpoint: those steps are taken again."""
        path = self.out / METRICS
        if not path.exists():
            return
        whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        with replacing(path) as temporary:
            temporary.write_text(
                "".join(line for line in whole if json.loads(line)["step"] <= self.step)
            )

    def _to_device(self, batch: Batch) -> Batch:
        return {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}

    def _autocast(self) -> torch.autocast:
        bf16 = self.config.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
