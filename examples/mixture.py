"""Distil an exact teacher on a mixture of Gaussians in the plane, and measure the student.

The teacher's network is a formula, so there is nothing to download and nothing to train first. The
same four steps distil a U-Net: a teacher, its pairs, a Trainer, a student.

    python examples/mixture.py
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import ds
from ds.analytic import GaussianMixture
from ds.evaluation.scores import Score, scores, table
from ds.methods import DenoisingStudent

HELD_OUT = 10_000


def make_pairs(out: Path, count: int) -> ds.PairStore:
    """Run the exact teacher for 96 steps on each noise; the first pairs are held out."""
    teacher = GaussianMixture().teacher(ds.solvers.DDIM(), ds.grids.quadratic(100))
    return ds.generate_pairs(
        teacher, out, count + HELD_OUT, batch_size=8192, shard_size=8192, quantizer="float32"
    )


def untrained() -> ds.Denoiser:
    """Return the network to start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ds.Denoiser(ds.nets.MLPConfig().build(), ds.schedule.LinearBeta())


def train(
    store: ds.PairStore, out: Path, steps: int, source: type[ds.Pairs] = ds.Pairs
) -> ds.Student:
    """Train a student on the pairs and return its best average."""
    rows, batch_size = len(store) - HELD_OUT, 512
    trainer = ds.Trainer(
        DenoisingStudent(loss_type="l2"),
        ds.Teacher(untrained(), ds.solvers.DDIM(), (999,)),
        source(store, range(HELD_OUT, len(store))),
        source(store, range(HELD_OUT)),
        out,
        ds.TrainConfig(
            batch_size=batch_size,
            epochs=steps / (rows // batch_size),
            lr=2e-3,
            warmup_steps=100,
            lr_schedule="cosine",
            betas=(0.9, 0.999),
            ema_decay=0.99,
            check_every=1000,
        ),
    )
    return ds.Student(trainer.fit(), trainer.method)


def judge(store: ds.PairStore, generate: Callable[[Tensor], Tensor]) -> list[Score]:
    """Score a map from noise to points on the held-out pairs."""
    z, target = store.noise(range(HELD_OUT)), store.targets(range(HELD_OUT))
    return scores(GaussianMixture(), z, generate(z), target)


def main(out: Path, count: int = 50_000, steps: int = 4000) -> list[Score]:
    """Make pairs, train and judge in the directory `out`."""
    store = make_pairs(out / "pairs", count)
    student = train(store, out / "run", steps)
    return judge(store, student.sample)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(table(main(Path(folder))))
