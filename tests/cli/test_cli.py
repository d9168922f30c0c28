"""The command line: the whole chain, and one clear line for whatever is wrong."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ds
from ds.cli import environment
from ds.cli.__main__ import VERBS, main
from ds.evaluation.features import Pixels
from ds.pairs.sources import digits
from ds.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
NET = ("--net.channels", "8", "--net.norm-groups", "4")
TEACH = (*NET, "--train.epochs", "1", "--train.check-every", "10", "--train.warmup-steps", "5")
PAIRS = (
    "--pairs.count", "128", "--pairs.held-out", "32", "--pairs.shard-size", "50",
    "--pairs.batch-size", "32", "--solve.steps", "5",
)  # fmt: skip
DISTILL = ("--held-out", "32", "--train.epochs", "3", "--train.check-every", "2")
JUDGE = ("--runtime.evaluate-every", "4", "--judge.extractor", "pixels", "--judge.count", "64")
EVALUATE = ("--count", "128", "--extractor", "pixels")


def run_chain(home: Path) -> None:
    teacher, store, student = (str(home / name) for name in ("teacher", "pairs", "student"))
    for args in (
        ("teach", "digits", "--out", teacher, *TEACH),
        ("pairs", "digits", "--teacher", teacher, "--out", store, *PAIRS),
        (
            "distill",
            "digits",
            "--teacher",
            teacher,
            "--store",
            store,
            "--out",
            student,
            *DISTILL,
            *JUDGE,
        ),
        ("sample", student, "--out", str(home / "sheet.png"), "--indices", "0-8", "--force"),
        (
            "sample",
            teacher,
            "--out",
            str(home / "images.npy"),
            "--indices",
            "0-4",
            "--seed",
            "4",
            "--force",
        ),
        ("evaluate", student, "--store", store, "--held-out", "32", *EVALUATE),
    ):
        assert main([*args]) == 0, args


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """What the verbs leave behind; tests that break something copy it."""
    home = tmp_path_factory.mktemp("chain")
    run_chain(home)
    return home


@pytest.fixture
def home(chain, tmp_path, monkeypatch) -> Path:
    """A copy of the chain to break, as the working directory."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(home: Path) -> dict[str, str]:
    """The hash of every file, but for locks and the lines that tell the time."""
    return {
        str(f.relative_to(home)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(home.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


def refused(capsys, *args: str) -> str:
    """Run a command that must fail with one line on standard error; return the line."""
    assert main([*args]) == 2, args
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("dstudent: ")
    assert "Traceback" not in err
    return lines[0]


# The chain.


def test_the_chain_leaves_models_that_load(chain):
    teacher, student = ds.load_teacher(chain / "teacher"), ds.load_student(chain / "student")
    store = ds.PairStore(chain / "pairs")
    store.verify(teacher_of(chain, steps=5))
    assert (teacher.nfe, student.nfe, len(store)) == (12, 1, 160)
    about = json.loads((chain / "student" / "config.json").read_text())["provenance"]
    assert about["teacher_sha256"] == store.manifest["teacher"]["sha256"]
    assert about["pairs_sha256"] == store.sha256
    assert (about["pairs"], about["steps"]) == (128, 6)


def teacher_of(home: Path, steps: int) -> ds.Teacher:
    return ds.load_teacher(home / "teacher", grid=ds.grids.quadratic(steps))


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
    assert "0, 32" in p["held_out"]


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
    monkeypatch.setattr("ds.pairs.store._make", work)
    run_chain(home)
    assert stable() == before


def test_a_plan_says_how_many_calls_do_and_makes_nothing(home, capsys, monkeypatch):
    monkeypatch.setattr("ds.evaluation.solver_search.CALLS", (6, 12))
    before = tree(home)
    options = ("--plan", "--plan-noises", "2", "--solve.steps", "20", "--solve.top", "60")
    assert main(pairs_of(*options)) == 0
    said = capsys.readouterr().out
    *_, answer, precision = said.splitlines()
    assert "18 calls of ddim" in answer
    figure = re.search(r"in float32: bfloat16 (\S+); 18 calls of ddim miss the ODE by", precision)
    assert float(figure[1]) > 0
    assert {line.split()[1] for line in said.splitlines() if line[:5].strip().isdecimal()} == {
        "ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc"
    }  # fmt: skip
    assert tree(home) == before


@pytest.mark.parametrize("option", ["plan-noises", "pairs.batch-size"])
def test_a_plan_without_noises_is_refused(home, capsys, option):
    line = refused(capsys, *pairs_of("--plan", f"--{option}", "0"))
    assert f"{option.replace('-', '_')} must be at least 1, not 0 (see `dstudent pairs" in line


def test_another_solver_makes_pairs_and_its_calls_are_counted(home):
    solver = ("--solve.solver", "heun", "--solve.grid", "log_snr")
    assert main(pairs_of(*solver)) == 0
    assert ds.PairStore("new").manifest["solver"] == {"type": "heun"}
    assert main([*distill_of("--store", "new", "--out", "other")]) == 0
    about = json.loads(Path("other/config.json").read_text())["provenance"]
    assert about["teacher_nfe"] == 9


# Help and dry runs.


def commands(home: str = "x") -> dict[str, list[str]]:
    first = {verb: [verb] for verb in VERBS}
    first |= {verb: [verb, "digits"] for verb in ("teach", "pairs", "distill")}
    first |= {verb: [verb, home] for verb in ("sample", "evaluate")}
    return first | {"convert": ["convert", home, "y"]}


OPTIONS = {
    "demo": ["--out"],
    "doctor": ["--json", "--plan"],
    "teach": ["--out", "--net.channels", "--train.batch-size", "--solve.steps", "--device"],
    "pairs": ["--teacher", "--out", "--pairs.count", "--solve.grid", "--plan", "--precision"],
    "distill": ["--teacher", "--store", "--out", "--method.loss-type", "--train.lr", "--held-out"],
    "sample": ["--out", "--seed", "--indices", "--batch-size", "--device"],
    "convert": ["--to", "--image-size"],
    "evaluate": ["--reference", "--extractor", "--count", "--seed", "--store", "--out"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_names_its_options(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert not end.value.code
    said = capsys.readouterr()
    assert not said.err
    for option in OPTIONS[verb]:
        assert option in said.out, option


DRY = {
    "demo": ["demo", "--out", "new"],
    "doctor": ["doctor"],
    "teach": ["teach", "digits", "--out", "new"],
    "pairs": ["pairs", "digits", "--teacher", "teacher", "--out", "new"],
    "info": ["pairs", "info", "pairs"],
    "verify": ["pairs", "verify", "pairs", "--teacher", "teacher"],
    "export": ["pairs", "export", "pairs", "new"],
    "distill": ["distill", "digits", "--teacher", "teacher", "--store", "pairs", "--out", "new",
                "--held-out", "32"],
    "sample": ["sample", "teacher", "--out", "new.png"],
    "evaluate": ["evaluate", "student", "--extractor", "pixels", "--out", "new.json"],
    "convert": ["convert", "student", "new"],
}  # fmt: skip


@pytest.mark.parametrize("command", DRY.values(), ids=DRY)
def test_a_dry_run_prints_json_and_does_nothing(command, capsys, home):
    before = tree(home)
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["type"]
    assert tree(home) == before


WRONG = {  # what a run of it finds wrong before its work
    "teach": ["--net.image-size", "16"],
    "pairs": ["--teacher", "nowhere"],
    "info": ["nowhere"],
    "verify": ["--teacher", "nowhere"],
    "export": ["--per-archive", "0"],
    "distill": ["--method.t", "1000"],
    "sample": ["--out", "new.bmp"],
    "evaluate": ["--reference", "nowhere"],
    "convert": ["--to", "diffusers"],
}


@pytest.mark.parametrize("verb", WRONG)
def test_a_dry_run_says_what_a_run_would_find_wrong(verb, capsys, home):
    command = DRY[verb][: 2 if verb == "info" else None]
    before, lines = tree(home), []
    for dry in ([], ["--dry-run"]):
        lines.append(refused(capsys, *command, *WRONG[verb], *dry))
    assert lines[0] == lines[1]
    assert tree(home) == before


IDLE = [  # a verb, what is set beside the option, the option and a value
    ("doctor", "", "--images 4"),
    ("doctor", "", "--device cuda"),
    ("doctor", "", "--tflops 1"),
    ("doctor", "--plan cifar10", "--multiprocessors 8"),
    ("doctor", "--plan cifar10", "--json"),
    ("teach", "--solve.grid uniform", "--solve.top 9"),
    ("teach", "--train.ema-gamma 6.9", "--train.ema-decay 0.9"),
    ("pairs", "", "--plan-noises 4"),
    ("pairs", "--solve.grid uniform", "--solve.top=9"),
    ("verify of a store", "", "--recompute 2"),
    ("verify of a store", "", "--threads 1"),
    ("sample", "--out x.npy", "--scale 2"),
    ("evaluate", "", "--held-out 8"),
    ("evaluate", "", "--inception-weights x"),
    ("convert", "", "--image-size 8"),
    ("distill", "", "--reuse 2"),
    ("distill", "", "--pool 2"),
    ("distill", "", "--judge.count 9"),
    ("distill", "--runtime.evaluate-every 2", "--judge.inception-weights x"),
    ("distill", "--runtime.loader resident", "--runtime.prefetch 3"),
    ("distill", "--runtime.compile no", "--runtime.compile_cache x"),
    ("distill", "", "--pairs.count 12288"),  # the preset's own
    ("distill", "", "--pairs.seed 9"),
    ("distill", "--online", "--pairs.seed 9"),
    ("distill", "", "--pairs.shard-size 9"),
    ("distill", "", "--pairs.quantizer floor"),
    ("distill", "", "--precision bfloat16"),
    ("distill", "", "--pairs.precision bfloat16"),
    ("distill", "", "--pairs.engine False"),
    ("distill", "", "--solve.steps 6"),
    ("distill", "", "--solve.solver heun"),
    ("distill", "", "--solve.top 700"),
]
DRY["verify of a store"] = ["pairs", "verify", "pairs"]


@pytest.mark.parametrize(("verb", "beside", "option"), IDLE, ids=map(" ".join, IDLE))
def test_an_option_that_cannot_take_effect_is_refused(verb, beside, option, home, capsys):
    before = tree(home)
    line = refused(capsys, *DRY[verb], *beside.split(), *option.split())
    assert "has no effect" in line
    assert re.split("[ =]", option)[0].replace("_", "-").replace("--no-", "--") in line
    assert tree(home) == before


def test_options_that_are_those_of_a_finished_store_are_accepted(home):
    same = ("--pairs.seed", "0", "--pairs.quantizer", "round", "--precision", "float32")
    assert main([*DRY["distill"], *PAIRS, *same, "--dry-run"]) == 0


def test_a_dry_run_shows_the_options_in_force(home, capsys):
    there = ("--teacher", "teacher", "--store", "none", "--out", "new")
    options = ("--train.batch-size", "256", "--pairs.count", "512", "--threads", "1")
    assert main(["distill", "cifar10", *there, *options, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["train"]["batch_size"], shown["train"]["lr"]) == (256, 2e-4)
    assert shown["method"]["loss_type"] == "l1"


def test_every_verb_is_in_the_usage(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"dstudent {verb} " in said for verb in VERBS)


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, text=True, capture_output=True, timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


@pytest.mark.parametrize("argument", ["--help", "--version", "no-such-verb"])
def test_what_needs_no_work_imports_nothing_heavy(argument):
    code = (
        "import sys; from ds.cli.__main__ import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'tyro', 'numpy', 'sklearn'} & {*sys.modules}))"
    )
    assert python(code, argument).stdout.splitlines()[-1] == "[]"


# Doctor.


def test_doctor_shows_every_op_with_its_backends(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("python", "torch", "gpu", "triton", "dali", "apex", "extension", "backend"):
        assert word in said, word
    table = [line.split() for line in said.splitlines() if line.startswith("group_norm_silu ")]
    assert {"reference"} <= {row[2] for row in table}
    assert {row[1] for row in table} == {"cpu", "cuda"}


def test_doctor_prints_json_for_machines(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == ds.__version__
    assert {"op", "device", "backend", "status", "reason"} == report["ops"][0].keys()


def test_doctor_prints_the_plan_of_a_network(capsys):
    assert main(["doctor", "--plan", "cifar10", "--images", "264", "--device", "cuda"]) == 0
    first, *rows, total, about, launches, full = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"110 launches, [\d.]+ MB moved needlessly", launches)
    assert full == "multiples of 528 images fill 132 multiprocessors"
    assert first.split() == ["call", "makes", "shape", "MB", "GFLOP", "floor,", "us"]
    assert total.split()[0] == str(len(rows))
    assert any(row.startswith("gemm 2x2      up.1.upsample.conv") for row in rows)
    assert sum(float(row.split()[-2]) for row in rows) == pytest.approx(264 * 11.217, rel=1e-3)
    assert about.startswith("264 images, bfloat16, ")


@pytest.mark.parametrize("probe", ["torch", "gpu", "extension", "ops"])
def test_doctor_reports_a_broken_probe_and_goes_on(probe, capsys, monkeypatch):
    def broken():
        raise OSError("libcudart.so: cannot open\nshared object file")

    monkeypatch.setitem(environment._PROBES, probe, broken)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "failed: OSError: libcudart.so: cannot open shared object file" in said
    assert "numpy" in said


def test_doctor_prints_where_torch_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    code = "import sys; from ds.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = python(code, "doctor", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    assert "failed: ImportError: libtorch_cpu.so: cannot open" in done.stdout
    assert f"version       {ds.__version__}" in done.stdout
    assert done.stderr.startswith("dstudent: libtorch_cpu.so: cannot open")
    assert len(done.stderr.splitlines()) == 1


# Bad input, in the order of the words of the specification.


def pairs_of(*more: str) -> list[str]:
    return ["pairs", "digits", "--teacher", "teacher", "--out", "new", *PAIRS, *more]


def distill_of(*more: str) -> list[str]:
    there = ("--teacher", "teacher", "--store", "pairs", "--out", "new")
    return ["distill", "digits", *there, *DISTILL, *more]


USES_OF_A_MODEL = {
    "pairs": pairs_of(),
    "distill": distill_of(),
    "sample": ["sample", "teacher", "--out", "new.npy"],
    "evaluate": ["evaluate", "teacher", "--out", "new.json", *EVALUATE],
}
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


def test_a_flipped_byte_in_a_store_is_found_by_verify(home, capsys):
    file = Path("pairs/images-00001.npy")
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    line = refused(capsys, "pairs", "verify", "pairs")
    assert "images-00001.npy: wrong checksum; delete it" in line


def test_a_store_is_verified_with_the_teacher_that_made_it(home, capsys):
    assert main(["pairs", "verify", "pairs", "--teacher", "teacher", "--recompute", "3"]) == 0
    assert "160 of them as they were written" in capsys.readouterr().out
    line = refused(capsys, "pairs", "verify", "pairs", "--teacher", "teacher", "--recompute", "0")
    assert "recompute must be at least 1, not 0" in line


def test_a_store_says_what_it_holds_finished_or_not(home, capsys):
    assert main(["pairs", "info", "pairs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 160
    assert found["shards"] == "4 of 4"
    assert found["finished"]
    Path("pairs/images-00002.npy").unlink()
    assert main(["pairs", "info", "pairs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shards"] == "3 of 4"
    assert not found["finished"]
    assert "not a pair store" in refused(capsys, "pairs", "info", "teacher")


def test_a_store_is_written_as_archives(home, capsys):
    assert main(["pairs", "export", "pairs", "tars", "--per-archive", "100"]) == 0
    assert sorted(f.name for f in Path("tars").glob("*.tar")) == ["000000.tar", "000001.tar"]
    line = refused(capsys, "pairs", "export", "pairs", "tars", "--to", "fastgen")
    assert "holds archives of something else (form: webdataset, not fastgen)" in line


def recipe_of(*more: str) -> list[str]:
    return distill_of(*PAIRS, *more)


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
        if self.step == 3 and not Path("stopped").exists():
            Path("stopped").touch()
            raise RuntimeError("stopped")
        advance(self)

    monkeypatch.setattr(Trainer, "_advance", stop_at_four)
    assert main([*online, "--out", "again"]) == 2
    assert main([*online, "--out", "again"]) == 0  # from step 2, in the middle of no pool's life
    again = Path("again/model.safetensors").read_bytes()
    assert again == Path("new/model.safetensors").read_bytes()


def test_a_store_made_otherwise_is_refused(home, capsys):
    before = tree(home)
    line = refused(capsys, *pairs_of("--out", "pairs", "--solve.steps", "6"))
    assert "pairs: holds a store made otherwise (grid: [" in line
    assert tree(home) == before


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
    ("teach", "--solve.steps 0"), ("teach", "--solve.steps 1000000000000"),
    ("teach", "--train.betas 1 1"), ("teach", "--train.seed 1180591620717411303424"),
    ("teach", "--net.num-res-blocks 1000000"), ("teach", "--net.channels 1000000000"),
    ("teach", "--train.batch-size 1000000000000"), ("teach", "--threads 1000000"),
    ("teach", "--train.lr nan"), ("teach", "--train.lr 1e300"), ("teach", "--seed -1"),
    ("pairs", "--pairs.seed -1"), ("pairs", "--pairs.seed 18446744073709551616"),
    ("pairs", "--pairs.count 1000000000000"), ("pairs", "--pairs.batch-size 1000000000000"),
    ("pairs", "--pairs.count 4294967296 --pairs.shard-size 4294967296"),
    ("pairs", "--plan --plan-noises 1000000000000"), ("pairs", "--price inf"),
    ("distill", "--store none --pairs.seed -1"), ("distill", "--runtime.prefetch 1000000000"),
    ("distill", "--store none --runtime.prefetch 1000000000"),
    ("distill", "--store none --online --pool 1000000000"),
    ("distill", "--store none --train.optimizer apex_adam"),
    ("distill", "--store none --runtime.loader dali --runtime.prefetch 1000000000000"),
    ("distill", "--store none --train.batch-size 1000000000000"),
    ("distill", "--store none --runtime.wandb there-is-none"),
    ("distill", "--runtime.accumulate 1000000000000"),
    ("sample", "--indices 0-1000000000000"), ("sample", "--indices 0-18446744073709551615"),
    ("sample", "--indices 0-18446744073709551616"), ("sample", "--batch-size 1000000000000"),
    ("sample", "--indices 0-999999999,5-1000000000000,0-999999999"),
    ("sample", "--scale 1000000000"), ("sample", "--out new.gif --scale 9000"),
    ("sample", "--indices 0,1 --between 1000000000000"),
    ("evaluate", "--count 1000000000000"), ("evaluate", "--count 2"),
    ("evaluate", "--batch-size 1000000000000"), ("evaluate", "--seed -1"),
    ("evaluate", "--store pairs --held-out 1000000000000"),
    ("verify", "--recompute 1000000000000"), ("export", "--per-archive -1"),
    ("convert", "--image-size 1.5"), ("doctor", "--plan digits --images 1e300"),
]  # fmt: skip


@pytest.mark.parametrize(("verb", "options"), ABSURD, ids=map(" ".join, ABSURD))
def test_what_no_machine_can_do_is_refused_before_anything_is_made(
    verb, options, home, capsys, monkeypatch
):
    monkeypatch.setattr("ds.system.cost.free_memory", lambda device="cpu": 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2e10))
    before = tree(home)
    refused(capsys, *DRY[verb], *options.split())
    assert tree(home) == before


def test_a_disk_too_small_is_refused(home, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert "160 pairs need 10.2 kB, the disk has 100 bytes free" in refused(capsys, *pairs_of())


LIMITED = (
    "import resource, sys; from ds.cli.__main__ import main; b = int(sys.argv[1]);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (b, b)); sys.exit(main(sys.argv[2:]))"
)


@pytest.mark.parametrize("out", ["student", "new"], ids=["at the student", "at a checkpoint"])
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


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 2), ("SIGTERM", 0)])
def test_an_interrupted_training_says_how_to_go_on_and_resumes(
    home, capsys, monkeypatch, name, code
):
    import signal

    advance = Trainer._advance

    def signal_at_three(self):
        advance(self)
        if self.step == 3:
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
