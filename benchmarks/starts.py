"""Where a student starts and what it learns, from teachers that predict the noise, x0 or v.

    python -m benchmarks.starts [--seeds 3]

For each seed and prediction it trains a teacher of digits, makes its pairs, and trains a student in
the form that `DenoisingStudent.on` takes and, beside it, in the paper's. Writes to
results/starts.json. With --runs, what is there already is kept, so that it can be called again.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

import ds
from benchmarks.harness import RESULTS, commit
from ds.diffusion.predictions import Prediction
from ds.methods import Denoising, DenoisingStudent
from ds.methods.base import built
from ds.methods.denoising_student import PAPER
from ds.models.teacher import Teacher
from ds.pairs.sources import Batch, Images, Pairs, digits
from ds.system.staging import write_json
from ds.training import presets
from ds.training.trainer import Trainer

PATH = RESULTS / "starts.json"
PRESET = presets.digits()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=None, help="keep teachers, pairs and students")
    options = parser.parse_args()
    PRESET.machine.use()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for prediction in get_args(Prediction):
                runs = (options.runs or Path(folder)) / f"{prediction}-{seed}"
                found.append(compare(runs, prediction, seed))
                print(found[-1], flush=True)
    write_json(PATH, {"commit": commit(), "starts": found})


def compare(runs: Path, prediction: Prediction, seed: int) -> dict[str, Any]:
    """Train a teacher and its students; return the errors at the start and the held-out losses."""
    teacher = _teacher(runs / "teacher", prediction, seed)
    p = PRESET.pairs
    count = p.count + p.held_out
    options = {"seed": seed, "batch_size": p.batch_size, "shard_size": p.shard_size}
    store = ds.generate_pairs(teacher, runs / "pairs", count, **options)
    held_out, rest = Pairs(store, range(p.held_out)), Pairs(store, range(p.held_out, count))
    own = DenoisingStudent(loss_type="l1").on(teacher)
    forms = {"paper": replace(own, residual=PAPER.residual, gain=PAPER.gain)}
    if own != forms["paper"]:
        forms["own"] = own
    row: dict[str, Any] = {"prediction": prediction, "seed": seed, "rms": {}, "loss": {}}
    for name, method in forms.items():
        batch = held_out.batch(range(len(held_out)))
        row["rms"][name] = _start_error(method, teacher, batch)
        config = replace(PRESET.train, seed=seed)
        trainer = Trainer(method, teacher, rest, held_out, runs / name, config)
        trainer.fit()
        row["loss"][name] = trainer.best_loss
    return row


def _teacher(run: Path, prediction: Prediction, seed: int) -> Teacher:
    method = Denoising(prediction=prediction)
    net, rows = built(PRESET.net, seed), digits()[0]
    start = Teacher(method.denoiser(net), *PRESET.solve.build(method.schedule))
    assert PRESET.teach
    config = replace(PRESET.teach, seed=seed)
    trainer = Trainer(method, start, Images(rows), Images(rows, seed=1), run, config)
    return start.using(trainer.fit())


@torch.no_grad()
def _start_error(method: DenoisingStudent, teacher: Teacher, batch: Batch) -> float:
    """Return the root mean square error of the untrained student, in units of [-1, 1]."""
    error = method.sample(teacher.net, batch.noise) - batch.x0
    return float(error.square().mean().sqrt())


if __name__ == "__main__":
    main()
