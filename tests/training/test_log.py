"""What a run notes of itself, and who else is told."""

import json
import sys
from types import ModuleType

import pytest

from ds.training import log
from ds.training.log import RunLog, check_project
from tests.system.test_reading import NO_FILES, no_file


class Told(list):
    """Stands for TensorBoard's writer and for a run of Weights & Biases."""

    def __init__(self, *args, **options):
        super().__init__([(args, options)])

    def add_scalar(self, *args):
        self.append(args)

    def log(self, figures, step):
        self.append((figures, step))

    def close(self):
        self.append("closed")

    finish = close


def installed(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(log, "find_spec", lambda name: name in names or None)


def test_every_note_is_a_line(tmp_path, monkeypatch):
    installed(monkeypatch)
    run = RunLog(tmp_path, 0, {})
    run.write(5, loss=0.5)
    run.write(10, loss=0.25, lr=1e-3)
    run.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 5, "loss": 0.5},
        {"step": 10, "loss": 0.25, "lr": 1e-3},
    ]


def test_steps_that_are_taken_again_are_noted_again(tmp_path, monkeypatch):
    installed(monkeypatch)
    first = RunLog(tmp_path, 0, {})
    for step in (5, 10, 15):
        first.write(step, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "lo')
    RunLog(tmp_path, 10, {}).write(15, loss=2.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["loss"]) for m in lines] == [(5, 1.0), (10, 1.0), (15, 2.0)]


@pytest.mark.parametrize(
    "line", [b"\0" * 40, b"[]", b"{}", b'{"step": "5"}', b'{"step": 1.0}', b"\xff", b'{"step": 4,']
)
def test_a_damaged_line_is_left_out_and_said(tmp_path, monkeypatch, caplog, line):
    """As a machine that lost its power leaves them."""
    installed(monkeypatch)
    first = RunLog(tmp_path, 0, {})
    first.write(5, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    first.write(10, loss=float("nan"))
    RunLog(tmp_path, 10, {})
    assert f"{tmp_path / 'metrics.jsonl'}: line 2 is damaged, and left out" in caplog.text
    assert [note["step"] for note in log.read_metrics(tmp_path)] == [5, 10]


@no_file
def test_metrics_that_are_no_file_are_said(tmp_path, monkeypatch, kind):
    installed(monkeypatch)
    NO_FILES[kind](tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=f"metrics.jsonl: {kind}"):
        RunLog(tmp_path, 0, {})


def test_tensorboard_is_told_where_it_is_installed(tmp_path, monkeypatch):
    installed(monkeypatch, "tensorboard")
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Told
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run = RunLog(tmp_path, 10, {})
    run.write(15, loss=2.0, lr=0.1)
    run.close()
    made, *told = run.board
    assert made == ((str(tmp_path),), {"purge_step": 11})
    assert told == [("loss", 2.0, 15), ("lr", 0.1, 15), "closed"]


def test_wandb_is_told_where_a_project_is_named_and_goes_on_with_the_same_run(
    tmp_path, monkeypatch
):
    installed(monkeypatch, "wandb")
    module = ModuleType("wandb")
    module.init = Told
    monkeypatch.setitem(sys.modules, "wandb", module)
    runs = [RunLog(tmp_path, step, {"a": 1}, wandb="digits") for step in (0, 10)]
    runs[1].write(15, loss=2.0)
    runs[1].close()
    (_, first), (_, options) = runs[0].project[0], runs[1].project[0]
    assert (options["project"], options["config"], options["resume"]) == (
        "digits",
        {"a": 1},
        "allow",
    )
    assert options["id"] == first["id"]
    assert runs[1].project[1:] == [({"loss": 2.0}, 15), "closed"]
    assert RunLog(tmp_path, 0, {}).project is None


def test_wandb_that_is_asked_for_and_missing_is_named(tmp_path, monkeypatch):
    installed(monkeypatch)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install .*\[wandb\]"):
        check_project("digits")
