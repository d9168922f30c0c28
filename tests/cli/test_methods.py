"""dstudent distill --method: by name, from a file, and on what each method needs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.cli.verb import parse
from ds.system.config import tag
from tests.cli.chain import distill_of, refused, tree

OWN = """
import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ds.methods import AbstractMethod


@dataclass(frozen=True)
class Scaled(AbstractMethod):
    '''Regress the image on its noise, scaled.'''

    feeds: ClassVar = "pairs"
    scale: float = 0.5

    def init(self, teacher):
        return nn.ModuleDict({"student": copy.deepcopy(teacher.net).requires_grad_(True)})

    def loss(self, modules, batch, progress):
        return (self.sample(modules["student"], batch.noise) - batch.x0).square().mean()

    def times(self, nfe):
        if nfe > 2:
            raise ValueError(f"Scaled: at most 2 network calls, not {nfe}")
        return (9,) * nfe

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        for t in self.times(nfe):
            z = self.scale * net(z, torch.full((z.shape[0],), t, device=z.device))
        return z
"""


def method_of(*args: str) -> ds.methods.AbstractMethod:
    return parse("distill", ["digits", *args]).method


def test_a_method_by_name_has_its_options():
    assert method_of().loss_type == "l1"  # of the preset
    assert method_of("--method", "denoising_student").loss_type == "l1"
    assert method_of("--method", "denoising", "--method.prediction", "v") == ds.methods.Denoising(
        prediction="v"
    )


@pytest.mark.parametrize("name", ["mean_flow", "meanflow", "mean-flow"])
def test_a_method_s_name_may_lack_its_underscores(name):
    assert method_of("--method", name) == ds.methods.MeanFlow()
    assert method_of("--method", "denoisingstudent").loss_type == "l1"  # of the preset


def test_a_method_s_initials_will_do_where_it_alone_has_them():
    assert type(method_of("--method", "cd")) is ds.methods.ConsistencyDistillation
    assert type(method_of("--method", "dmf")) is ds.methods.DiscreteMeanFlow
    for name in ("mf", "s"):  # two have them; a word has none
        with pytest.raises(ValueError, match=f"no method '{name}'; the methods are "):
            method_of("--method", name)


def test_the_help_lists_the_methods(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    said = capsys.readouterr().out
    for name in ds.methods.__all__:
        cls = getattr(ds.methods, name)
        if issubclass(cls, ds.methods.AbstractMethod) and cls is not ds.methods.AbstractMethod:
            assert re.search(rf"^- {tag(cls)}( \(\w+\))?: ", said, re.MULTILINE)
    assert "- consistency_distillation (cd): " in said and "- mean_flow: " in said


def test_a_method_of_a_file_is_trained_and_its_student_is_used(home, capsys):
    Path("own.py").write_text(OWN)
    own = ("--method", "own.py", "--method.scale", "0.25")
    assert main(distill_of(*own)) == 0
    assert json.loads(Path("new/config.json").read_text())["method"] == {
        "type": "scaled",
        "scale": 0.25,
    }
    capsys.readouterr()
    assert "scaled" in refused(capsys, "sample", "new", "--out", "x.npy")
    code = ("--code", "own.py")
    for nfe in (1, 2):
        assert main(["sample", "new", *code, "--out", f"{nfe}.npy", "--nfe", str(nfe)]) == 0
    assert not np.array_equal(np.load("1.npy"), np.load("2.npy"))
    assert main(["evaluate", "new", *code, "--extractor", "pixels", "--count", "64"]) == 0
    assert main(["convert", "new", "copy", *code]) == 0
    before = tree(home)
    assert "at most 2 network calls, not 3" in refused(
        capsys, "sample", "new", *code, "--nfe", "3", "--out", "3.npy"
    )
    assert tree(home) == before


STAGES = (
    OWN
    + """
    last: bool = False

    @property
    def train(self):
        return {"ema_decay": 0.0, **({"lr_schedule": "linear"} if self.last else {})}

    @property
    def length(self):
        return 0.5 if self.last else 1.0

    def stages(self):
        return replace(self, last=False), replace(self, last=True)

    def result(self, net):
        made = Denoiser(net, Linear(), "x0")
        return super().result(net) if self.last else Teacher(made, DDIM(), (1.0,))
"""
).replace(
    "import torch\n",
    """from dataclasses import replace
import torch
from ds import Denoiser, Teacher
from ds.diffusion.schedules import Linear
from ds.diffusion.solvers import DDIM
""",
    1,
)


def test_what_the_stages_of_a_method_set_is_done_and_what_all_set_is_no_option(
    home, capsys, caplog
):
    Path("own.py").write_text(STAGES)
    line = refused(capsys, *distill_of("--method", "own.py", "--train.ema-decay", "0.9"))
    assert "--train.ema-decay has no effect with --method own.py, which sets it" in line
    few = ("--pairs.count", "128", "--train.lr-schedule", "cosine")
    assert main(distill_of("--method", "own.py", *few)) == 0
    assert "train: 2 stages, 9 steps of 64, about " in caplog.text
    found = [json.loads(Path(f"new-run{part}/run.json").read_text()) for part in ("", "/stage-2")]
    assert [run["train"]["ema_decay"] for run in found] == [0.0, 0.0]
    assert [run["train"]["lr_schedule"] for run in found] == ["cosine", "linear"]


def test_a_method_that_needs_images_takes_those_of_the_preset(home, capsys):
    images = ("--method", "denoising", "--out", "new", "--teacher", "teacher")
    train = ("--train.epochs", "0.1", "--train.batch-size", "512", "--train.warmup-steps", "0")
    assert main(["distill", "digits", *images, *train]) == 0
    teacher = ds.load_teacher("new")
    assert torch.isfinite(teacher.sample(ds.noise(0, range(2), teacher.shape))).all()
    line = refused(capsys, "distill", "cifar10", *images, "--out", "other")
    assert "no images of cifar10 come with the library" in line
    line = refused(capsys, "distill", "digits", *images, "--out", "other", "--online")
    assert "--online has no effect with --method denoising, which is trained on images" in line


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("", "no_such", "no method 'no_such'; the methods are "),
        ("", "absent.py", "absent.py: cannot be imported (FileNotFoundError: "),
        ("1 / 0", "own.py", "own.py: cannot be imported (ZeroDivisionError: division by zero)"),
        ("x = 1", "own.py", "own.py: defines 0 methods; a file must define one"),
        (OWN.replace(" = 0.5", ""), "own.py", "give every field a default"),
    ],
)
def test_a_method_that_cannot_be_had_is_refused(content, name, said, home, capsys):
    Path("own.py").write_text(content)
    before = tree(home)
    assert said in refused(capsys, *distill_of("--method", name))
    assert tree(home) == before
