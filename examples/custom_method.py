"""A method of your own in one file: a student that may correct its image by a second call.

Denoising Student draws in one call and has no second one. This method trains both: the second call
sees the first image with half of the noise still on it, and is trained on the same pairs through
the first. One student then draws in one call or in two. It is judged on a mixture of Gaussians in
the plane, where the teacher is exact. This takes about a minute on a CPU core:

    python examples/custom_method.py

The command line takes the file for a method, and then for what its students are:

    dstudent distill digits --method examples/custom_method.py --out runs/two/student
    dstudent sample runs/two/student --code examples/custom_method.py --nfe 2 --out two.png
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

import ds
from ds.analytic import GaussianMixture
from ds.evaluation.scores import scores
from ds.methods import AbstractMethod
from ds.system.config import Between, check

HELD_OUT = 10_000  # pairs


@dataclass(frozen=True)
class DrawAndCorrect(AbstractMethod):
    """Regress the teacher's image in one call, and again in a second that sees the first.

        first  = z - net(z, t)
        second = x - net(x, t_correct)      x = (1 - mix) * first + mix * z

    The loss is the mean squared error of both. The first is trained as if it stood alone: what the
    second learns does not reach it.
    """

    feeds: ClassVar = "pairs"

    t: Annotated[float, Between(0, 999)] = 999  # what the first call is told
    t_correct: Annotated[float, Between(0, 999)] = 500  # what the second call is told
    mix: Annotated[float, Between(0, 1)] = 0.5  # share of the noise in what the second call sees

    def __post_init__(self):
        check(self, "DrawAndCorrect: ")

    def init(self, teacher):
        return nn.ModuleDict({"student": copy.deepcopy(teacher.net).requires_grad_(True)})

    def loss(self, modules, batch, progress):
        first, second = self._calls(modules["student"], batch.noise, 2, batch.cond)
        errors = torch.stack([first - batch.x0, second - batch.x0])
        return errors.square().mean()

    def times(self, nfe):
        if nfe > 2:
            raise ValueError(f"DrawAndCorrect: draws in 1 or 2 network calls, not {nfe}")
        return (self.t, self.t_correct)[:nfe]

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        return self._calls(net, z, nfe, cond)[-1]

    def _calls(self, net: nn.Module, z: Tensor, nfe: int, cond: dict | None) -> list[Tensor]:
        """Return what each call makes of noise z [N, *shape]."""
        x, made = z, []
        for t in self.times(nfe):
            made.append(x - net(x, torch.full((z.shape[0],), t, device=z.device), **(cond or {})))
            x = torch.lerp(made[-1].detach(), z, self.mix)
        return made


def main(out: Path, count: int = 50_000, steps: int = 4000) -> dict[int, dict[str, float]]:
    """Train a student in the directory `out`, print and return its scores by network calls."""
    data = GaussianMixture()
    exact = data.teacher(ds.solvers.DDIM(), ds.grids.quadratic(100))
    store = ds.generate_pairs(
        exact, out / "pairs", count + HELD_OUT, batch_size=8192, quantizer="float32"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = ds.Denoiser(ds.nets.MLPConfig().build(), ds.schedule.LinearBeta())
    batch = 512
    trainer = ds.Trainer(
        DrawAndCorrect(),
        ds.Teacher(fresh, ds.solvers.DDIM(), (999,)),
        ds.Pairs(store, range(HELD_OUT, len(store))),
        ds.Pairs(store, range(HELD_OUT)),
        out / "run",
        ds.TrainConfig(
            batch_size=batch,
            epochs=steps / (count // batch),
            lr=2e-3,
            warmup_steps=100,
            lr_schedule="cosine",
            ema_decay=0.99,
            check_every=1000,
        ),
    )
    net = trainer.fit()

    z, target = store.noise(range(HELD_OUT)), store.targets(range(HELD_OUT))
    found = {}
    for nfe in (1, 2):
        student = ds.Student(net, trainer.method, nfe)
        judged = {row.name: row.value for row in scores(data, z, student.sample(z), target)}
        rms = (student.sample(z) - target).square().mean().sqrt().item()
        found[nfe] = {"error on held-out noise": rms, **judged}
        print(f"{nfe} network call{'s' * (nfe > 1)}")
        for name, value in found[nfe].items():
            print(f"    {name:24}{value:8.4f}")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
