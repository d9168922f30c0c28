"""The whole chain of verbs, and what each leaves behind."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ds
from ds.cli.__main__ import main
from ds.evaluation.features import Pixels
from ds.pairs.sources import digits
from ds.system.machine import device_name
from ds.training.trainer import Trainer
from tests.cli.chain import (
    distill_of,
    pairs_of,
    run_chain,
    tree,
)


def teacher_of(home: Path, steps: int) -> ds.Teacher:
    return ds.load_teacher(home / "teacher", grid=ds.grids.quadratic(steps))


def test_the_chain_leaves_models_that_load(chain):
    teacher, student = ds.load_teacher(chain / "teacher"), ds.load_student(chain / "student")
    store = ds.PairStore(chain / "pairs")
    store.verify(teacher_of(chain, steps=5))
    assert (teacher.nfe, student.nfe, len(store)) == (12, 1, 160)
    about = json.loads((chain / "student" / "config.json").read_text())["provenance"]
    assert about["teacher_sha256"] == store.teacher_sha256
    assert about["pairs_sha256"] == store.sha256
    assert (about["pairs"], about["steps"]) == (128, 6)


def test_the_student_has_learnt_something(chain):
    notes = (chain / "student-run" / "metrics.jsonl").read_text().splitlines()
    losses = [m["held_out_loss"] for m in map(json.loads, notes) if "held_out_loss" in m]
    assert losses[-1] < losses[0]


def test_sample_writes_the_images_of_its_seed(chain):
    expected = ds.Sampler(ds.load_teacher(chain / "teacher"))(4, range(5))
    assert np.array_equal(np.load(chain / "images.npy"), expected.numpy())


def test_sample_writes_a_sheet_that_shows_the_images(chain):
    images = ds.Sampler(ds.load_student(chain / "student"))(0, range(9)).squeeze(-1)
    with Image.open(chain / "sheet.png") as picture:
        sheet = np.asarray(picture.convert("L"))[::8, ::8]  # a pixel is shown 8 x 8
    assert sheet.shape == (28, 28)
    for i, image in enumerate(images):
        top, left = 1 + 9 * (i // 3), 1 + 9 * (i % 3)
        assert np.array_equal(sheet[top : top + 8, left : left + 8], image.numpy()), i


def test_evaluate_writes_the_figures_with_their_protocol(chain):
    found = json.loads((chain / "student" / "metrics.json").read_text())
    names = {"frechet_distance", "kernel_distance", "precision", "recall", "pair_rms", "pair_r2"}
    assert names <= found.keys()
    p = found["protocol"]
    assert (p["n"], p["nfe"], p["seed"], p["batch_size"]) == (128, 1, 1, 256)
    assert p["quantizer"] == "round"
    assert p["version"] == ds.__version__
    assert p["extractor"]["name"] == "pixels"
    assert p["extractor"]["dim"] == 64
    assert p["reference"]["n"] == 1797
    real = digits()[0].numpy().tobytes()
    assert p["reference"]["sha256"] == hashlib.sha256(real).hexdigest()
    assert p["held_out"]["n"] == 32 and "0, 32" in p["held_out"]["fingerprint"]


def test_evaluate_runs_a_model_as_it_is_told_and_says_how(chain, tmp_path, caplog):
    out = tmp_path / "figures.json"
    options = ("--precision", "bfloat16", "--mode", "eager", "--out", str(out))
    few = ("--extractor", "pixels", "--count", "8")
    assert main(["evaluate", str(chain / "student"), *few, *options]) == 0
    execution = json.loads(out.read_text())["protocol"]["execution"]
    assert (execution["precision"], execution["mode"]) == ("bfloat16", "eager")
    name = device_name("cpu")
    said = f"evaluate: bfloat16, mode eager, on cpu ({name}), pixels features of 8 images"
    assert said in caplog.messages


def test_distill_compares_images_of_the_average_with_real_ones_on_its_way(chain):
    notes = (chain / "student-run" / "metrics.jsonl").read_text().splitlines()
    found = {m["step"]: m for m in map(json.loads, notes) if "frechet_distance" in m}
    assert list(found) == [4, 6]
    net = ds.load_student(chain / "student")
    last = torch.load(chain / "student-run" / "checkpoint.pt", weights_only=True)
    net.net.load_state_dict(last["ema"])
    expected = ds.evaluate(net, digits()[0], Pixels(), n=64)
    assert found[6]["frechet_distance"] == pytest.approx(expected["frechet_distance"])


def test_a_second_chain_reuses_what_is_there(home, monkeypatch):
    def work(*_):
        raise AssertionError("a finished step was done again")

    def stable():
        return {k: v for k, v in tree(home).items() if not k.endswith(("metrics.json", ".jsonl"))}

    before = stable()
    monkeypatch.setattr(Trainer, "_advance", work)
    monkeypatch.setattr("ds.pairs.generate._make", work)
    run_chain(home)
    assert stable() == before


def test_another_solver_makes_pairs_and_its_calls_are_counted(home):
    solver = ("--solve.solver", "heun", "--solve.grid", "log_snr")
    assert main(pairs_of(*solver)) == 0
    assert ds.PairStore("new").solver == ds.solvers.Heun()
    assert main([*distill_of("--store", "new", "--out", "other")]) == 0
    about = json.loads(Path("other/config.json").read_text())["provenance"]
    assert about["teacher_nfe"] == 9
