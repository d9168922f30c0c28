"""Averages of the weights of any length, made after a training from its snapshots of two.

A power-function average of exponent gamma at step t weighs the weights of step s by

    p(s) = (gamma + 1) s^gamma / t^(gamma + 1),  0 < s <= t.

A sum of snapshots weighs them by the same sum of such functions. The factors that bring it nearest
to the function of another average, in the least-squares sense, follow from inner products alone.
Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.
"""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ds.models.pretrained import hash_weight
from ds.system.files import regular, whole
from ds.system.staging import replacing, subfolder

FOLDER = "snapshots"
LENGTHS = (0.05, 0.10)  # of the averages that are tracked
SHORTEST, LONGEST = 0.01, 0.25


def gamma_of(length: float) -> float:
    """Return the exponent of the average whose standard deviation in time is a share of the run.

    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) as in the paper's
    appendix C. Raises ValueError for a length outside 0.01 .. 0.25; that of equal weights is 0.29.
    """
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"length must lie in {SHORTEST} .. {LONGEST} of the run, not {length}")
    squared = length**-2
    return float(np.roots([1, 7, 16 - squared, 12 - squared]).real.max())


def write_snapshot(run: Path, step: int, tracked: list[nn.Module], of: str = "") -> None:
    """Write what the averages of LENGTHS are after `step` steps, and of which run they are."""
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

    `run` is the directory of a Trainer whose config had snapshot_every; `length` is the standard
    deviation of the average in time, 0.01 to 0.25 of the steps up to the last snapshot. The more
    snapshots, the nearer to an average that was taken while training. What is not floating is
    that of the last snapshot.

    Raises ValueError for another length, and for a directory without whole snapshots.
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
                raise ValueError("it is of another run than those before it")
    return {name: w.float() if w.is_floating_point() else w for name, w in total.items()}


def _step(file: Path) -> int:
    if not (number := file.stem.removeprefix("step-")).isdecimal():
        raise ValueError(f"{file}: not the name of a snapshot, which is step-0000001 or the like")
    return int(number)


def _add(total: dict[str, Tensor], file: Path, factors: list[float]) -> str:
    """Add the averages of a snapshot, each with its factor, in float64; return what run's it is."""
    with safe_open(file, "pt") as snapshot:
        weights = {key: snapshot.get_tensor(key) for key in snapshot.keys()}  # noqa: SIM118
        about = snapshot.metadata() or {}
    digest, _, of = about.get("made", "").partition(" ")
    if digest != _hash(_step(file), weights):
        raise ValueError("its checksum is not that of its weights, or it has another step's name")
    names = {key.partition(".")[2] for key in weights}
    if total and names != total.keys():
        raise ValueError("it is of another network than those before it")
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
    """Return the factors of the kept averages, (t, gamma) each, that come nearest to another."""
    gram = np.array([[_product(a, b) for b in kept] for a in kept])
    right = np.array([_product(a, wanted) for a in kept])
    return np.linalg.lstsq(gram, right, rcond=None)[0]


def _product(a: tuple[int, float], b: tuple[int, float]) -> float:
    """Return the integral of the product of two averages' weights."""
    (t, gamma), (later, other) = sorted((a, b))
    share = (gamma + 1) * (other + 1) / (gamma + other + 1)
    return share * (t / later) ** other / later
