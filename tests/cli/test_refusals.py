"""One clear line for whatever is wrong, and nothing is written."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.chain import (
    DRY,
    EVALUATE,
    TEACH,
    USES_OF_A_MODEL,
    distill_of,
    pairs_of,
    refused,
    tree,
)

every_use = pytest.mark.parametrize("use", USES_OF_A_MODEL.values(), ids=USES_OF_A_MODEL)


def weights(change) -> None:
    """Change the weights of the teacher and the hash in its configuration, as another tool may."""
    file, config = Path("teacher/model.safetensors"), Path("teacher/config.json")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    about = json.loads(config.read_text())
    about["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    del about["checksum"]
    config.write_text(json.dumps(about))


def damage_missing():
    shutil.rmtree("teacher")


def damage_no_weights():
    Path("teacher/model.safetensors").unlink()


def damage_truncated():
    file = Path("teacher/model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])


def damage_flipped_bit():
    file = Path("teacher/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_wrong_shape():
    weights(lambda tensors: tensors.update({"conv_in.bias": torch.zeros(9)}))


def damage_missing_weight():
    weights(lambda tensors: tensors.pop("conv_in.bias"))


def damage_surplus_weight():
    weights(lambda tensors: tensors.update(surplus=torch.zeros(1)))


def damage_not_finite():
    weights(lambda tensors: tensors["conv_in.bias"].fill_(torch.nan))


def damage_pickle():
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (Path("exploded"),))

    Path("teacher/model.safetensors").write_bytes(pickle.dumps(Bomb()))


def damage_config():
    Path("teacher/config.json").write_text("{")


def damage_type():
    """A configuration that names code to run."""
    config = Path("teacher/config.json")
    about = json.loads(config.read_text())
    about["net"] = {"type": "os.system", "command": "true"}
    del about["checksum"]
    config.write_text(json.dumps(about))


DAMAGE = {
    damage_missing: "dstudent: teacher: ",
    damage_no_weights: "model.safetensors: the weights are missing",
    damage_truncated: "model.safetensors: not a whole safetensors file",
    damage_flipped_bit: "model.safetensors: its SHA-256 is not the one in config.json",
    damage_wrong_shape: "conv_in.bias has the shape [9], the network needs [8]",
    damage_missing_weight: "the weight conv_in.bias [8] is missing",
    damage_surplus_weight: "the network has no weight surplus",
    damage_not_finite: "the weight conv_in.bias is not finite",
    damage_pickle: "model.safetensors: not a whole safetensors file",
    damage_config: "config.json: not valid JSON",
    damage_type: "'os.system'",
}


@every_use
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_a_damaged_checkpoint_is_refused(use, damage, home, capsys):
    damage()
    before = tree(home)
    assert DAMAGE[damage] in refused(capsys, *use)
    assert tree(home) == before
    assert not Path("exploded").exists()


def test_a_student_is_no_teacher(home, capsys):
    assert "expected a teacher" in refused(capsys, *pairs_of("--teacher", "student"))


def test_a_pickled_reference_is_refused_and_runs_no_code(home, capsys):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (Path("exploded"),))

    np.save("bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    line = refused(capsys, "evaluate", "student", *EVALUATE, "--reference", "bomb.npy")
    assert "bomb.npy" in line
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["absent.npy", "text.npy", "empty.npy", "broken.npz", "shape.npy"])
def test_a_reference_that_is_no_set_of_images_is_refused(home, capsys, name):
    Path("text.npy").write_text("hello")
    Path("empty.npy").write_bytes(b"")
    np.savez("broken.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    Path("broken.npz").write_bytes(Path("broken.npz").read_bytes()[:-50])
    np.save("shape.npy", np.zeros((4, 8, 8)))
    refused(capsys, "evaluate", "student", *EVALUATE, "--reference", name)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no-such-verb"], "no verb 'no-such-verb'; the verbs are demo, doctor"),
        (["pairs", "mnist"], "no preset 'mnist'; the presets are digits"),
        (["pairs"], "pairs: name a preset first"),
        (["teach", "cifar10"], "no images of cifar10 come with the library"),
        (pairs_of("--no-such-option", "1"), "--no-such-option"),
        (pairs_of("--pairs.count", "many"), "--pairs.count"),
        (pairs_of("--pairs.quantizer", "int4"), "int4"),
        (["sample"], "model"),
        (["sample", "teacher", "--out", "new.bmp"], "new.bmp"),
        (["sample", "teacher", "--indices", "5-3"], "5-3"),
        (["sample", "teacher", "--indices", "all"], "all"),
        (["sample", "teacher", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (["evaluate", "teacher", "--extractor", "inception"], "--inception-weights"),
        (["evaluate", "teacher", "--store", "pairs", "--held-out", "999"], "160 pairs"),
        (["doctor", "--loud"], "--loud"),
        (pairs_of("--precision", "fp4"), "fp4"),
        (pairs_of("--precision", "fp8"), "set DS_EXPERIMENTAL=fp8"),
        (pairs_of("--precision", "tf32"), "precision tf32 is for CUDA GPUs, not for cpu"),
        (distill_of("--price", "-1"), "price must be at least 0, not -1"),
        (distill_of("--online", "--reuse", "0"), "reuse must be at least 1, not 0"),
    ],
    ids=lambda v: " ".join(v[:2] + v[-2:]) if isinstance(v, list) else "",
)
def test_an_unknown_word_is_refused(home, capsys, args, said):
    assert said in refused(capsys, *args)


@pytest.mark.parametrize("value", ["0", "-3"])
@pytest.mark.parametrize(
    ("use", "option"),
    [
        (pairs_of(), "--pairs.count"),
        (pairs_of(), "--pairs.held-out"),
        (pairs_of(), "--pairs.batch-size"),
        (pairs_of(), "--pairs.shard-size"),
        (pairs_of(), "--solve.steps"),
        (distill_of(), "--held-out"),
        (distill_of(), "--train.batch-size"),
        (distill_of(), "--train.epochs"),
        (["sample", "student"], "--batch-size"),
        (["evaluate", "student", *EVALUATE], "--count"),
        (["evaluate", "student", *EVALUATE], "--batch-size"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else v,
)
def test_a_count_below_one_is_refused(home, capsys, use, option, value):
    before = tree(home)
    assert value in refused(capsys, *use, option, value)
    assert tree(home) == before


ABSURD = [
    ("teach", "--solve.steps 0"),
    ("teach", "--solve.steps 1000000000000"),
    ("teach", "--train.betas 1 1"),
    ("teach", "--train.seed 1180591620717411303424"),
    ("teach", "--net.num-res-blocks 1000000"),
    ("teach", "--net.channels 1000000000"),
    ("teach", "--train.batch-size 1000000000000"),
    ("teach", "--threads 1000000"),
    ("teach", "--train.lr nan"),
    ("teach", "--train.lr 1e300"),
    ("teach", "--seed -1"),
    ("pairs", "--pairs.seed -1"),
    ("pairs", "--pairs.seed 18446744073709551616"),
    ("pairs", "--pairs.count 1000000000000"),
    ("pairs", "--pairs.batch-size 1000000000000"),
    ("pairs", "--pairs.count 4294967296 --pairs.shard-size 4294967296"),
    ("pairs", "--plan --plan-noises 1000000000000"),
    ("pairs", "--price inf"),
    ("distill", "--store none --pairs.seed -1"),
    ("distill", "--runtime.prefetch 1000000000"),
    ("distill", "--store none --runtime.prefetch 1000000000"),
    ("distill", "--store none --online --pool 1000000000"),
    ("distill", "--store none --train.optimizer apex_adam"),
    ("distill", "--store none --runtime.loader dali --runtime.prefetch 1000000000000"),
    ("distill", "--store none --train.batch-size 1000000000000"),
    ("distill", "--store none --runtime.wandb there-is-none"),
    ("distill", "--runtime.accumulate 1000000000000"),
    ("sample", "--indices 0-1000000000000"),
    ("sample", "--indices 0-18446744073709551615"),
    ("sample", "--indices 0-18446744073709551616"),
    ("sample", "--batch-size 1000000000000"),
    ("sample", "--indices 0-999999999,5-1000000000000,0-999999999"),
    ("sample", "--scale 1000000000"),
    ("sample", "--out new.gif --scale 9000"),
    ("sample", "--indices 0,1 --between 1000000000000"),
    ("evaluate", "--count 1000000000000"),
    ("evaluate", "--count 2"),
    ("evaluate", "--batch-size 1000000000000"),
    ("evaluate", "--seed -1"),
    ("evaluate", "--store pairs --held-out 1000000000000"),
    ("verify", "--recompute 1000000000000"),
    ("export", "--per-archive -1"),
    ("convert", "--image-size 1.5"),
    ("doctor", "--plan digits --images 1e300"),
]


@pytest.mark.parametrize(("verb", "options"), ABSURD, ids=map(" ".join, ABSURD))
def test_what_no_machine_can_do_is_refused_before_anything_is_made(
    verb, options, home, capsys, monkeypatch
):
    monkeypatch.setattr("ds.system.cost.free_memory", lambda device="cpu": 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2e10))
    before = tree(home)
    refused(capsys, *DRY[verb], *options.split())
    assert tree(home) == before


@pytest.mark.parametrize(
    "use",
    [["teach", "digits", *TEACH], *USES_OF_A_MODEL.values()],
    ids=["teach", *USES_OF_A_MODEL],
)
def test_a_directory_that_cannot_be_made_is_named(home, capsys, use):
    Path("file").write_text("")
    before = tree(home)
    suffix = ".npy" if use[0] == "sample" else ""  # under a file: root cannot write there either
    assert "file" in refused(capsys, *use, "--out", f"file/new{suffix}")
    assert tree(home) == before


@pytest.mark.parametrize(
    ("use", "t"),
    [
        (pairs_of("--solve.top", "1000"), "1000"),
        (pairs_of("--solve.top", "-5"), "-5"),
        (pairs_of("--solve.grid", "uniform", "--solve.steps", "1001"), "1001"),
        (distill_of("--method.t", "1000"), "1000"),
    ],
)
def test_a_time_that_the_schedule_lacks_is_refused(home, capsys, use, t):
    before = tree(home)
    assert t in refused(capsys, *use)
    assert tree(home) == before


def test_channels_that_the_groups_do_not_divide_are_refused(home, capsys):
    line = refused(capsys, "teach", "digits", "--out", "new", "--net.channels", "30")
    assert "channels (30) must be a multiple of norm_groups (8)" in line
    assert not Path("new").exists()
