"""dstudent distill: the pairs it lacks are made, and a run that was stopped goes on."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.training.trainer import Trainer
from tests.cli.chain import DISTILL, distill_of, pairs_of, python, recipe_of, refused, tree
from tests.combinations import slow


def test_a_store_that_is_not_there_is_made_and_the_student_is_the_same(home, capsys, caplog):
    assert main([*recipe_of("--store", "made", "--price", "3600")]) == 0
    assert "pairs: made, 160 of them" in capsys.readouterr().out
    assert ds.PairStore("made").sha256 == ds.PairStore("pairs").sha256
    expected = Path("student/model.safetensors").read_bytes()
    assert Path("new/model.safetensors").read_bytes() == expected
    lines = caplog.messages[0].splitlines()
    for line, said in zip(
        lines,
        (
            r"pairs: 160 pairs to make, 10\.2 kB, 5 network calls each, about \d+ s, \$",
            r"train: 6 steps of 64, about \d+ s",
            r"disk:  \d+ kB for the checkpoint",
            r"total: about \d+ s, \$\d+\.\d\d, on 1 of this device",
        ),
        strict=True,
    ):
        assert re.match(said, line), line


def test_a_store_that_is_not_finished_is_finished_first(home):
    before = {k: v for k, v in tree(home).items() if k.startswith("pairs/")}
    Path("pairs/images-00003.npy").unlink()
    assert main(recipe_of()) == 0
    assert {k: v for k, v in tree(home).items() if k.startswith("pairs/")} == before


def test_a_store_that_is_not_finished_is_not_finished_otherwise(home, capsys):
    Path("pairs/images-00003.npy").unlink()
    assert "holds a store made otherwise (grid: [" in refused(capsys, *distill_of())


def test_a_dry_run_says_what_it_will_cost(home, caplog):
    before = tree(home)
    assert main([*recipe_of("--store", "made", "--dry-run")]) == 0
    assert "160 pairs to make" in caplog.text and "train: 6 steps" in caplog.text
    caplog.clear()
    assert main([*pairs_of("--dry-run", "--price", "1")]) == 0
    assert "160 pairs to make" in caplog.text and "$0.00" in caplog.text
    assert tree(home) == before


def test_pairs_are_made_while_training_and_not_kept(home, caplog, monkeypatch):
    online = recipe_of("--store", "few", "--online", "--pool", "1", "--reuse", "2")
    assert main([*online]) == 0
    assert len(ds.PairStore("few")) == 32
    assert caplog.messages[0].startswith("pairs: 224 pairs to make, ")
    assert "; 32 are kept\n" in caplog.messages[0]
    about = json.loads(Path("new/config.json").read_text())["provenance"]
    assert (about["pairs"], about["steps"]) == (192, 6)
    advance = Trainer._advance

    def stop_at_four(self):
        if self.state.step == 3 and not Path("stopped").exists():
            Path("stopped").touch()
            raise RuntimeError("stopped")
        advance(self)

    monkeypatch.setattr(Trainer, "_advance", stop_at_four)
    assert main([*online, "--out", "again"]) == 2
    assert main([*online, "--out", "again"]) == 0  # from step 2, in the middle of no pool's life
    again = Path("again/model.safetensors").read_bytes()
    assert again == Path("new/model.safetensors").read_bytes()


LIMITED = (
    "import resource, sys; from ds.cli.__main__ import main; b = int(sys.argv[1]);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (b, b)); sys.exit(main(sys.argv[2:]))"
)


@pytest.mark.parametrize(
    "out", [slow("student", id="at the student"), pytest.param("new", id="at a checkpoint")]
)
def test_a_disk_that_fills_up_costs_nothing_that_was_there(home, out):
    """The limit on the size of a file stands for the disk: no weights fit, small files do."""
    before = tree(home)
    there = ("--teacher", home / "teacher", "--store", home / "pairs", "--out", home / out)
    done = python(LIMITED, "8000", "distill", "digits", *map(str, there), *DISTILL)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("dstudent: ")
    assert "Traceback" not in done.stderr
    assert tree(home).items() >= before.items()
    assert main(["distill", "digits", *map(str, there), *DISTILL]) == 0
    again = ds.load_student(home / out).net.state_dict()
    for name, w in ds.load_student(home / "student").net.state_dict().items():
        assert torch.equal(again[name], w)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 2), ("SIGTERM", 0)])
def test_an_interrupted_training_says_how_to_go_on_and_resumes(
    home, capsys, monkeypatch, name, code
):
    import signal

    advance = Trainer._advance

    def signal_at_three(self):
        advance(self)
        if self.state.step == 3:
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(Trainer, "_advance", signal_at_three)
    assert main([*distill_of()]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert "interrupted at step 3 of 6, which is saved; run the same command again" in line
    assert not Path("new").exists()
    monkeypatch.setattr(Trainer, "_advance", advance)
    assert main(distill_of()) == 0
    expected = Path("student/model.safetensors").read_bytes()
    assert Path("new/model.safetensors").read_bytes() == expected


def test_another_run_in_the_directory_is_refused(home, capsys):
    before = tree(home)
    line = refused(capsys, *distill_of("--out", "student", "--train.lr", "0.1"))
    assert "student-run: holds another run (train.lr: 0.003, not 0.1)" in line
    assert tree(home) == before


def test_a_damaged_training_checkpoint_is_refused(home, capsys):
    Path("student-run/checkpoint.pt").write_bytes(b"PK\x03\x04")
    line = refused(capsys, *distill_of("--out", "student"))
    assert "checkpoint.pt: damaged" in line
    assert "delete it to start over" in line


def test_a_loss_that_is_not_finite_is_reported(home, capsys):
    line = refused(capsys, *distill_of("--train.lr", "1e38", "--train.log-every", "1"))
    assert "not finite" in line or "the loss is" in line
    assert not Path("new").exists()
