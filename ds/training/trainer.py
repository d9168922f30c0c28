"""The Trainer: it takes the steps of a run. It knows no method by name."""

import faulthandler
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from ds.diffusion.conditions import NAMES, Conditions, labels_of
from ds.diffusion.noise import noise
from ds.methods import AbstractMethod, Progress
from ds.models.images import is_picture, save_png, shown, tile
from ds.models.pretrained import check_finite, fingerprint
from ds.models.teacher import Teacher
from ds.nets import recompute_norms
from ds.nets.base import told
from ds.nets.blocks import AbstractUNet
from ds.pairs.sources import AbstractSource, Batch
from ds.system import distributed
from ds.system.ambient import without_ambient
from ds.system.config import Natural, require, to_json
from ds.system.cost import check_memory
from ds.system.signals import Heard, Interrupted, deferred_signals
from ds.system.staging import locked, replacing, subfolder
from ds.training import loader, parallel
from ds.training.batches import Batches
from ds.training.checkpoint import Checkpoint
from ds.training.config import LOW, RunFields, RunFile, RuntimeConfig, TrainConfig
from ds.training.ema import Averages, write_snapshot
from ds.training.log import RunLog, check_project
from ds.training.optim import TrainState
from ds.training.throughput import Throughput, flops_per_row

COMPILE_STEPS = 5000  # of a run on a GPU that repays a minute or two of compiling: an estimate
log = logging.getLogger("ds")


class Trainer:
    """Train what a method creates, in a directory that can be resumed to the same bits.

    `out` receives run.json (what is run), metrics.jsonl (a line per log and per check), a
    checkpoint and samples/. The method starts from `start` and leaves it as it is. The processes of
    torchrun share every batch, and the first of them writes. `evaluate` makes figures of the
    averaged network, every runtime.evaluate_every steps, in all processes.

    A run can be made longer, finished or not, and told to log or check at other intervals: it goes
    on from its last checkpoint, and the best average is the best of the checks that were made. A
    learning rate that falls to zero follows the new length from there on. With a constant one, the
    weights are those of a run that was as long from its start, to the bit.

    The settings that the method must have, `method.train`, take the place of those of `config`.

    Raises ValueError if the method needs another kind of source, or the student other conditions
    than the rows bring, if `out` holds another run, if norms are to be recomputed that the student
    does not have, if a batch cannot be cut into equal parts, or if `device`, or a single process,
    cannot do what `runtime` asks for.
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
        runtime: RuntimeConfig | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        progress: bool = False,
    ):
        self.method, self.held_out, self.out = method, held_out, Path(out)
        self.device, self.runtime = torch.device(device), runtime or RuntimeConfig()
        self.config = config = config.of(method).on(self.device)
        self.evaluate, self.shape, self.decoder = evaluate, start.shape, start.decoder
        self.progress = progress and distributed.is_first()
        self._check_arguments(source)
        self.batches = Batches(
            source,
            config.batch_size,
            config.seed,
            window=config.shuffle_window,
            part=distributed.share(config.batch_size),
        )
        self.steps = max(1, round(config.epochs * self.batches.per_epoch / len(method.turns)))
        self._check_sizes()
        modules = self._modules(start)
        for rows in (source, held_out):
            _check_conditions(modules["student"], rows.conditions)
        self.called = modules
        if self.runtime.shard:
            self.called = parallel.shard(modules, self.device, LOW[self.runtime.reduce])
        self.averages = Averages(modules["student"], config)
        self.state = TrainState(modules, method.turns, self.averages, config)
        names = "log", "snapshot", "evaluate", "check"
        self.done: dict[str, int] = dict.fromkeys(names, 0)  # the step at which each was last done
        self.checkpoint = Checkpoint(self.out, self.device, sharded=self.runtime.shard)
        self.run = RunFile(self._about(start), self.out, self.checkpoint)

    def _check_arguments(self, source: AbstractSource) -> None:
        method, r = self.method, self.runtime
        if source.feeds != method.feeds:
            raise ValueError(
                f"{type(method).__name__} needs {method.feeds}, the source has {source.feeds}"
            )
        if "student" not in method.turns:
            raise ValueError(f"the turns of a method include the student, not {method.turns} alone")
        r.check(self.config.batch_size, self.device, coupled=method.coupled)
        if r.evaluate_every and self.evaluate is None:
            raise ValueError("runtime.evaluate_every needs an `evaluate` of the Trainer")
        check_project(r.wandb)

    def _check_sizes(self) -> None:
        c, r = self.config, self.runtime
        rows = c.batch_size // distributed.world_size() // r.accumulate
        check_memory(  # for images and noise
            f"train.batch_size {c.batch_size}", 2 * 4 * rows * math.prod(self.shape), self.device
        )
        loader.check(self.batches, r.loader, r.prefetch)
        require("train.epochs", Natural, indices=self._rows(self.steps))
        kept = self.held_out.read(range(1))
        if self.decoder and kept.numel() and kept.dtype == torch.uint8:
            raise ValueError(
                "the network makes latents, and the rows to train on are pictures, uint8; give "
                "latents as floats, such as the pairs that this teacher makes"
            )
        (row,) = self._held_out_batch(range(1)).noise
        if row.shape != self.shape:
            raise ValueError(
                f"the network makes samples of the shape {list(self.shape)}, the rows to train on "
                f"are {list(row.shape)}"
            )

    def _modules(self, start: Teacher) -> nn.ModuleDict:
        """Create the modules; those that learn, and the target, have dropout."""
        modules = self.method.init(start).to(self.device)
        for name, module in modules.items():
            module.train(name == "target" or any(p.requires_grad for p in module.parameters()))
            if module.training and self.config.dropout is not None:
                _set_dropout(module, self.config.dropout, name)
        if self.config.recompute_norms:
            recompute_norms(modules["student"])
        return modules

    def _about(self, start: Teacher) -> RunFields:
        return {
            "format": "denoising-student/run/1",
            "method": to_json(self.method),
            "train": to_json(self.config),
            "start": {
                "sha256": fingerprint(start.denoiser),
                "solver": to_json(start.solver),
                "grid": list(start.grid),
            },
            "source": self.batches.source.fingerprint(),
            "held_out": self.held_out.fingerprint(),
        }

    @property
    def identity(self) -> str:
        """The SHA-256, in hexadecimal, of what makes this run another than others."""
        return self.run.identity

    @property
    def best_loss(self) -> float | None:
        """The held-out loss of the best average; None where the method does not score."""
        return self.averages.best_loss

    def check(self) -> None:
        """Raise ValueError if the directory holds another run, or one that cannot go on so."""
        self.run.check()

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
        with locked(self.out) if first else nullcontext(), deferred_signals() as self.stop:
            self._resume()
            self.losses = self._losses()
            self.log = RunLog(self.out, self.state.step, self.run.fields, wandb=self.runtime.wandb)
            with closing(self.log), closing(self.checkpoint):
                self._train()
        return parallel.whole(self.averages.best)

    def _losses(self) -> dict[str, nn.Module]:
        """Return the loss of each turn, compiled and wrapped as the run asks for."""
        loss = parallel.Loss(self.method, self.called)
        if self._compiles():
            parallel.compiled(loss, self.runtime)
        learns = self.state.learns
        return {turn: parallel.replicated(loss, p, self.runtime) for turn, p in learns.items()}

    def _compiles(self) -> bool:
        """Return whether the loss is compiled; log that it is where nobody asked."""
        if self.runtime.compile != "auto":
            return self.runtime.compile != "no"
        unet = isinstance(self.state.modules["student"], AbstractUNet)
        compiles = unet and self.device.type == "cuda" and self.steps >= COMPILE_STEPS
        if compiles:
            log.info("train: compiled, which pays in %d steps", self.steps)
        return compiles

    def _train(self) -> None:
        c, r, state = self.config, self.runtime, self.state
        bar = tqdm(
            total=self._rows(self.steps),
            initial=self._rows(state.step),
            unit=" images",
            disable=not self.progress,
            smoothing=0.02,
        )
        self.throughput = Throughput(self.device, self._flops(), LOW[c.precision] or torch.float32)
        self.throughput.start(self._rows(state.step))
        if not (self.decoder or is_picture(self.shape)):
            way = "shows each channel in grey, scaled to its range"
            words = way if len(self.shape) == 3 else "is not written"
            log.info("%s: samples %s are no pictures; samples/ %s", self.out, [*self.shape], words)
        begin = state.step * len(self.method.turns)
        self.rows = loader.load(self.batches, begin, self.device, r.loader, r.prefetch)
        with bar, closing(self.rows), _watchdog(r.stall_minutes) as alive:
            try:
                self._act(bar)  # what an interruption left undone
                while state.step < self.steps:
                    self._advance()
                    alive()
                    bar.update(self._rows(1))
                    self._act(bar)
                    if (
                        number := distributed.all_reduce_max(self.stop())
                    ) and state.step < self.steps:
                        raise Heard(number)
            except Heard as heard:
                self._save(parallel.whole(self.averages.ema))
                raise Interrupted(
                    f"{self.out}: interrupted at step {state.step} of {self.steps}, which is "
                    f"saved; run the same command again to go on",
                    heard.number,
                ) from None

    def _act(self, bar: tqdm) -> None:
        """Do what is due after this step and is not done yet."""
        c = self.config
        if self._due("log", c.log_every):
            self._log(bar)
        if self._due("snapshot", c.snapshot_every):
            self._snapshot()
        if self._due("evaluate", self.runtime.evaluate_every):
            self._evaluate()
        if self._due("check", c.check_every):
            self._check()
        if self.state.step in self.done.values():
            self.throughput.start(self._rows(self.state.step))

    def _due(self, name: str, every: int) -> bool:
        step = self.state.step
        due = every and (step % every == 0 or step == self.steps)
        return bool(due) and self.done[name] != step

    def _did(self, name: str) -> None:
        self.done[name] = self.state.step

    def _rows(self, steps: int) -> int:
        """Return how many rows all processes read in so many steps."""
        return steps * len(self.method.turns) * self.config.batch_size

    def _progress(self, turn: str = "student") -> Progress:
        return Progress(self.state.step, self.steps, turn)

    def _may_be_cut(self) -> AbstractContextManager[None]:
        """Return the context of work that a signal may cut short; several processes must agree."""
        return self.stop.at_once() if distributed.world_size() == 1 else nullcontext()

    def _advance(self) -> None:
        """Take one step: every module that has a turn takes an optimiser step."""
        for number, turn in enumerate(self.method.turns):
            self._take(turn, number)
        self.state.step += 1

    def _take(self, turn: str, number: int) -> None:
        """Take a turn, whose number is that within the step, on a batch of its own."""
        state = self.state
        state.zero_grad()
        before = state.losses[turn].clone()
        try:
            # A cut between two turns would save half of a step.
            with self._may_be_cut() if number == 0 else nullcontext():
                self._backward(turn, state.step * len(self.method.turns) + number)
        except Heard:  # the step is not taken
            state.losses[turn].copy_(before)
            raise
        state.update(turn, self._lr(), self.averages.decay(state.step))
        if turn == "student":
            self.averages.follow(state.modules["student"], state.step)
        self.method.after_step(state.modules, self._progress(turn))

    def _backward(self, turn: str, number: int) -> None:
        """Add up the gradients of this process's part of a batch."""
        loss, state, count = self.losses[turn], self.state, self.runtime.accumulate
        with self.throughput.waiting():
            images, indices = next(self.rows)
        draws = self.batches.draws(number, self.device)
        parts = (x.chunk(count) for x in (images, indices, draws.index))
        for i, (images, indices, index) in enumerate(zip(*parts, strict=True)):
            batch = self.batches.source.prepare(images, indices, draws._replace(index=index))
            with parallel.unreduced(loss, i < count - 1):
                part = distributed.rank() * count + i
                seeded, one = self._seeded(number, part), parallel.as_one_graph(self.runtime)
                with seeded, self.config.autocast(self.device), one:
                    found = loss(batch, self._progress(turn)) / count
                state.scaler.scale(found).backward()
            state.losses[turn] += found.detach()

    @contextmanager
    def _seeded(self, number: int, part: int) -> Iterator[None]:
        """Make dropout a function of the batch's number and of its part."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # A CPU's generator takes 32 bits. The golden ratio of them keeps parts far apart.
            torch.manual_seed(self.config.seed + number + part * 0x9E3779B9)
            yield

    def _lr(self) -> float:
        """Rise linearly over the warm-up, then stay or fall as the schedule says."""
        c, step = self.config, self.state.step
        begun = (step + 1) / max(c.warmup_steps, 1)
        after = max(0, step - c.warmup_steps) / max(self.steps - c.warmup_steps, 1)
        fall = {
            "none": 1.0,
            "cosine": 0.5 * (1 + math.cos(math.pi * after)),
            "linear": 1 - after,
            "inverse_sqrt": max(1.0, begun) ** -0.5,
        }
        return c.lr * min(1.0, begun) * fall[c.lr_schedule]

    def _log(self, bar: tqdm) -> None:
        """Log the mean losses since the last log, and what was measured meanwhile."""
        self._pool()
        steps = self.state.step - self.done["log"]
        found: dict[str, float] = {}
        for turn, total in self.state.losses.items():
            mean = total.item() / (steps * self.method.turns.count(turn))
            total.zero_()
            if not math.isfinite(mean):
                raise RuntimeError(
                    f"{self.out}: the loss is {mean} at step {self.state.step}; the last "
                    f"checkpoint is kept, try a smaller train.lr or train.precision float32"
                )
            found["loss" if turn == "student" else f"{turn}_loss"] = mean
        bar.set_postfix(loss=f"{found['loss']:.4g}", refresh=False)
        measured = self.throughput.figures(self._rows(self.state.step))
        self._write(**found, lr=self._lr(), **measured)
        self._did("log")

    def _pool(self) -> None:
        """Give every process the means of the losses that each has summed up."""
        for total in self.state.losses.values():
            total.fill_(distributed.all_reduce_sum(total.item()) / distributed.world_size())

    def _flops(self) -> float:
        """Return the operations per row, the mean over the turns of a step."""
        modules, row = parallel.whole(self.state.modules), self._held_out_batch(range(1))
        flops = {
            t: flops_per_row(self.method, modules, row, self._progress(t)) for t in self.losses
        }
        return sum(flops[turn] for turn in self.method.turns) / len(self.method.turns)

    def _check(self) -> None:
        """Score the average on the held-out rows, keep it if it is the best, draw, save."""
        student = {"student": self.averages.ema}
        modules = parallel.whole(nn.ModuleDict({**dict(self.state.modules), **student}))
        loss = self._score(modules)
        self.averages.keep_best(loss)
        self._did("check")  # it is saved with what it found
        if loss is not None:
            self._write(held_out_loss=loss, best=cast(float, self.best_loss))
        if distributed.is_first():
            self._draw(modules["student"])
        self._save(modules["student"])

    def _score(self, modules: nn.ModuleDict) -> float | None:
        """Return the mean score of the held-out rows; None where the method does not score."""
        size, rows, total, seen = self.config.batch_size, len(self.held_out), 0.0, 0
        autocast = self.config.autocast(self.device)
        with self._may_be_cut(), torch.no_grad(), autocast, _evaluating(modules):
            for number in distributed.share(-(-rows // size)):
                part = range(number * size, min((number + 1) * size, rows))
                score = self.method.score(modules, self._held_out_batch(part), self._progress())
                if score is not None:
                    total, seen = total + score.item() * len(part), seen + len(part)
        total, seen = distributed.all_reduce_sum(total), distributed.all_reduce_sum(seen)
        return total / rows if seen else None

    def _snapshot(self) -> None:
        tracked = parallel.whole(self.averages.tracked)
        if distributed.is_first():
            write_snapshot(self.out, self.state.step, tracked, self.identity)
        self._did("snapshot")

    def _evaluate(self) -> None:
        net = parallel.whole(self.averages.ema)
        with self._may_be_cut():
            assert self.evaluate is not None  # checked with the arguments
            found = self.evaluate(net)
        self._write(**found)
        self._did("evaluate")

    @torch.no_grad()
    def _draw(self, average: nn.Module) -> None:
        """Write a grid of samples of the average, always from the same noise and conditions."""
        if len(self.shape) != 3:
            return
        asked = self.batches.source.conditions.sheet(64)
        z = noise(self.config.seed, range(asked.count), self.shape, device=self.device)
        cond = {name: value.to(self.device) for name, value in asked.cond.items()}
        told: dict[str, Any] = {"cond": cond} if cond else {}
        x = self.method.sample(average, z, **told)
        if not x.isfinite().all():
            raise RuntimeError(
                f"{self.out}: the samples of step {self.state.step} are not finite; the last "
                f"checkpoint is kept, try a smaller train.lr"
            )
        images = shown(x, self.decoder)
        sheet = tile(images, columns=asked.columns)
        file = subfolder(self.out / "samples") / f"step-{self.state.step:07d}.png"
        with replacing(file) as path:
            save_png(sheet, path, scale=max(1, 256 // images.shape[2] // 8))

    def _write(self, **figures: float) -> None:
        self.log.write(self.state.step, **figures)

    def _save(self, average: nn.Module) -> None:
        self._pool()
        check_finite(average.state_dict(), f"{self.out}: step {self.state.step}")
        self.checkpoint.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on from; its tensors are those of the run."""
        parts = self.state.state_dict() | self.averages.state_dict()
        return {"run": self.identity, "done": self.done, **parts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; ValueError if that was another run's."""
        if saved["run"] != self.identity:
            raise ValueError("saved by another run")
        self.done = dict(saved["done"])
        self.state.load_state_dict(saved)
        self.averages.load_state_dict(saved)

    def _resume(self) -> None:
        """Continue the run in `out`, or start it."""
        distributed.broadcast(self.run.claim)
        self.checkpoint.load(self)
        step = self.state.step
        if step > self.steps:
            raise ValueError(
                f"{self.out}: the run is at step {step} already, train.epochs "
                f"{self.config.epochs} ends it at step {self.steps}; give more epochs"
            )
        if step:
            log.info("%s: going on from step %d of %d", self.out, step, self.steps)
        if step != (there := distributed.broadcast(lambda: step)):
            raise RuntimeError(
                f"{self.out}: holds step {step} here and step {there} where the first process "
                f"runs; all processes need the same file system"
            )
        distributed.broadcast(self.run.change)

    def _held_out_batch(self, rows: range) -> Batch:
        return self.held_out.batch(rows, seed=self.config.seed, device=self.device)


def _set_dropout(net: nn.Module, share: float, name: str) -> None:
    """Give a network another dropout. Raise ValueError if a student has none to give it to."""
    found = [module for module in net.modules() if isinstance(module, nn.Dropout)]
    if share and not found and name == "student":
        raise ValueError(
            f"train.dropout must be 0 or left out, not {share}: the student's "
            f"{type(net).__name__} has no dropout"
        )
    for module in found:
        module.p = share


def _check_conditions(student: nn.Module, brought: Conditions) -> None:
    """Raise ValueError unless rows bring the conditions that a network says it takes."""
    said, classes = told(student)
    takes = tuple(name for name in NAMES if name in said)
    says = hasattr(student, "takes") or hasattr(getattr(student, "config", None), "takes")
    if says and takes != brought.names:
        raise ValueError(
            f"the network takes {' and '.join(takes) or 'no condition'}, the rows to train on "
            f"bring {' and '.join(brought.names) or 'none'}; give rows and a network of one kind"
        )
    if takes and brought.classes:
        labels_of("the rows to train on", brought.classes, len(brought.classes), classes)


@contextmanager
def _evaluating(modules: nn.ModuleDict) -> Iterator[None]:
    """Turn dropout off for a while."""
    training = [m for m in modules.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def _watchdog(minutes: float) -> Iterator[Callable[[], None]]:
    """Yield a sign of life to give; without one for so long, print every stack and end."""
    if not minutes:
        yield lambda: None
        return

    def alive() -> None:
        seconds = min(60 * minutes, threading.TIMEOUT_MAX)
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)

    alive()
    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()
