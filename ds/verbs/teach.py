"""dstudent teach: a teacher of one's own."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

import ds
from ds import doctor
from ds.data import Images, digits
from ds.methods import Denoising
from ds.nets import UNetConfig
from ds.presets import Machine, Preset, SolveConfig
from ds.sample import Teacher
from ds.train import TrainConfig, Trainer
from ds.verbs.options import Here, home_of, run_folder, say, watched


@dataclass(frozen=True, kw_only=True)
class Teach:
    """Train a teacher on real images, to have one to distil."""

    out: Path
    net: UNetConfig
    method: Denoising
    train: TrainConfig
    solve: SolveConfig
    seed: int = 0  # of the first weights
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "Teach":
        if p.teach is None:
            raise ValueError(
                f"teach: no images of {name} come with the library; bring a trained teacher and "
                f"start at `dstudent pairs {name} --teacher DIR`"
            )
        return cls(
            out=home_of(name) / "teacher", net=p.net, method=p.denoising, train=p.teach,
            solve=p.solve, machine=p.machine,
        )  # fmt: skip

    def run(self) -> None:
        images, _ = digits()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            start = self.method.denoiser(self.net.build())
        trainer = Trainer(
            self.method, start, Images(images), Images(images, seed=1), run_folder(self.out),
            self.train, device=self.machine.use(), progress=watched(),
        )  # fmt: skip
        net = trainer.fit()
        solver, grid = self.solve.build(self.method.schedule)
        teacher = Teacher(self.method.denoiser(net), solver, grid)
        teacher.save_pretrained(
            self.out, version=ds.__version__, commit=doctor.commit(), run=trainer.identity
        )
        say(f"teacher: {self.out}")
