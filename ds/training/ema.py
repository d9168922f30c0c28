"""Averages of the student's weights: taken while training, or afterwards from snapshots.

A power-function average of exponent gamma at step t weighs the weights of step s by

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),  0 < s <= t.

A sum of snapshots weighs them by the same sum of such functions. Least squares finds the factors
that bring this sum nearest to the function of another average; it takes inner products alone.
Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.
"""

import copy
import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ds.models.pretrained import hash_weight
from ds.system.files import regular, whole
from ds.system.staging import replacing, subfolder
from ds.training.config import TrainConfig
from ds.training.parallel import local

FOLDER = "snapshots"
LENGTHS = (0.05, 0.10)  # of the averages in a snapshot, as shares of the run
SHORTEST, LONGEST = 0.01, 0.25


class Averages:
    """Averages of a student's weights: the one that is kept, its best so far, those of snapshots.

    All are float32, in eval mode, with the student's buffers. The step of an optimiser moves `ema`
    itself, towards the weights that learn.
    """

    def __init__(self, student: nn.Module, config: TrainConfig):
        self.config = config
        self.ema = copy.deepcopy(student).float().requires_grad_(False).eval()
        self.best = copy.deepcopy(self.ema)
        lengths = LENGTHS if config.snapshot_every else ()
        self.tracked = nn.ModuleList(copy.deepcopy(self.ema) for _ in lengths)
        self.best_loss: float | None = None  # none was scored yet

    def decay(self, step: int) -> float:
        """Return the share of `ema` that stays at a step."""
        c = self.config
        return power_decay(step, c.ema_gamma) if c.ema_gamma else c.ema_decay

    def follow(self, student: nn.Module, step: int) -> None:
        """Move what the optimiser does not: the averages of snapshots, and every buffer."""
        for net, length in zip(self.tracked, LENGTHS, strict=False):
            decay = power_decay(step, gamma_of(length))
            average(list(net.parameters()), list(student.parameters()), decay)
        for net in (self.ema, *self.tracked):
            for mean, buffer in zip(net.buffers(), student.buffers(), strict=True):
                mean.copy_(buffer)

    def keep_best(self, loss: float | None) -> None:
        """Keep the average if its held-out loss is the least so far, or if there is no loss."""
        least = math.inf if self.best_loss is None else self.best_loss
        if loss is None or loss < least:
            self.best_loss = loss
            self.best.load_state_dict(self.ema.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on from; the tensors are those in use."""
        nets = {name: getattr(self, name).state_dict() for name in ("ema", "best", "tracked")}
        return {**nets, "best_loss": self.best_loss}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.ema.load_state_dict(saved["ema"])
        self.best.load_state_dict(saved["best"])
        self.best_loss = saved["best_loss"]
        if self.tracked:  # a run may go on without snapshots
            self.tracked.load_state_dict(saved["tracked"])


@torch.no_grad()
def average(averages: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Move averages by 1 - decay towards the first of params."""
    averages = local(averages)
    wide = [p.to(mean.dtype) for p, mean in zip(local(params), averages, strict=False)]
    torch._foreach_lerp_(averages, wide, 1 - decay)


def power_decay(step: int, gamma: float) -> float:
    """Return the decay at a step, from 0, of the average whose weights grow as step**gamma.

    It is (1 - 1/t)**(gamma + 1), with t = step + 1: Karras et al. 2024, arXiv:2312.02696, section
    3.1. Its length is a share of the run, however long that is: about 10 % with gamma = 6.94.
    """
    return (1 - 1 / (step + 1)) ** (gamma + 1)


def gamma_of(length: float) -> float:
    """Return the exponent of an average whose standard deviation in time is a share of the run.

    It solves length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the paper's appendix C. Equal
    weights have the length 0.29. Raises ValueError for a length outside 0.01 .. 0.25.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"length must lie in {SHORTEST} .. {LONGEST} of the run, not {length}")
    squared = length**-2
    return float(np.roots([1, 7, 16 - squared, 12 - squared]).real.max())


def write_snapshot(run: Path, step: int, tracked: Iterable[nn.Module], of: str = "") -> None:
    """Write the averages of LENGTHS after `step` steps, and the identity `of` their run."""
    weights = {
        f"{i}.{name}": w.cpu().contiguous()
        for i, net in enumerate(tracked)
        for name, w in net.state_dict().items()
    }
    about = {"made": f"{_hash(step, weights)} {of}"}
    with replacing(subfolder(run / FOLDER) / f"step-{step:07d}.safetensors") as path:
        path.write_bytes(save(weights, about))


def post_hoc_ema(run: str | Path, length: float) -> dict[str, Tensor]:
    """Return the weights of the student, averaged over a share of the run, as a state_dict.

    `run` is the directory of a Trainer whose config had snapshot_every. `length` is the standard
    deviation of the average in time, 0.01 to 0.25 of the steps up to the last snapshot. With more
    snapshots, the result is nearer to an average that was taken while training. Tensors that are
    not floating are those of the last snapshot.

    Raises ValueError for a length out of range, and for a directory without whole snapshots.
    """
    folder = Path(run) / FOLDER
    files = sorted(folder.glob("step-*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no snapshots are here; train with train.snapshot_every")
    steps = [_step(file) for file in files]
    kept = [(step, gamma_of(tracked)) for step in steps for tracked in LENGTHS]
    factors = _factors(kept, (steps[-1], gamma_of(length))).reshape(len(files), -1)
    total: dict[str, Tensor] = {}
    runs: set[str] = set()
    for file, row in zip(files, factors.tolist(), strict=True):
        regular(file)
        with whole(file, "snapshot"):
            runs.add(_add(total, file, row))
            if len(runs) > 1:
                raise ValueError("it belongs to another run than those before it")
    return {name: w.float() if w.is_floating_point() else w for name, w in total.items()}


def _step(file: Path) -> int:
    if not (number := file.stem.removeprefix("step-")).isdecimal():
        raise ValueError(f"{file}: not the name of a snapshot, which is step-0000001 or the like")
    return int(number)


def _add(total: dict[str, Tensor], file: Path, factors: list[float]) -> str:
    """Add the averages of a snapshot, each times its factor, in float64; return its run."""
    with safe_open(file, "pt") as snapshot:
        weights = {key: snapshot.get_tensor(key) for key in snapshot.keys()}  # noqa: SIM118
        about = snapshot.metadata() or {}
    digest, _, of = about.get("made", "").partition(" ")
    if digest != _hash(_step(file), weights):
        raise ValueError("its checksum is not that of its weights, or it has another step's name")
    names = {key.partition(".")[2] for key in weights}
    if total and names != total.keys():
        raise ValueError("it belongs to another network than those before it")
    for key, w in weights.items():
        number, _, name = key.partition(".")
        if w.is_floating_point():
            w = w.double() * factors[int(number)] + total.get(name, 0)
        total[name] = w
    return of


def _hash(step: int, weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"step {step}".encode())
    for name, w in sorted(weights.items()):
        hash_weight(digest, name, w)
    return digest.hexdigest()


def _factors(kept: list[tuple[int, float]], wanted: tuple[int, float]) -> np.ndarray:
    """Return the factors with which kept averages, (t, gamma) each, come nearest to another."""
    gram = np.array([[_product(a, b) for b in kept] for a in kept])
    right = np.array([_product(a, wanted) for a in kept])
    return np.linalg.lstsq(gram, right, rcond=None)[0]


def _product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Return the integral of the product of two averages' weights."""
    (t, gamma), (later, other) = sorted((a, b))
    share = (gamma + 1) * (other + 1) / (gamma + other + 1)
    return share * (t / later) ** other / later
