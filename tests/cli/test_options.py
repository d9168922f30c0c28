"""Help, dry runs, and options that have no effect."""

import json
import re

import pytest

from ds.cli.__main__ import VERBS, main
from ds.training.presets import PRESETS
from tests.cli.chain import (
    DRY,
    PAIRS,
    python,
    refused,
    tree,
)

OPTIONS = {
    "demo": ["--out"],
    "doctor": ["--json", "--plan"],
    "teach": ["--out", "--net.channels", "--train.batch-size", "--solve.steps", "--device"],
    "pairs": ["--teacher", "--out", "--pairs.count", "--solve.grid", "--plan", "--precision"],
    "distill": ["--teacher", "--store", "--out", "--method.loss-type", "--train.lr", "--held-out"],
    "sample": ["--out", "--seed", "--indices", "--batch-size", "--device"],
    "report": ["RUN", "--out", "--force"],
    "verify": ["METHOD", "--json", "--seed", "--steps"],
    "convert": ["--to", "--image-size"],
    "evaluate": ["--reference", "--extractor", "--count", "--seed", "--store", "--out", "--mode"],
}


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert not end.value.code
    said = capsys.readouterr()
    assert not said.err
    return said.out


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_names_its_options(verb, capsys):
    preset = ["digits"] if verb in ("teach", "pairs", "distill") else []
    said = help_of(capsys, verb, *preset)
    for option in OPTIONS[verb]:
        assert option in said, option


def test_the_help_of_a_verb_names_its_presets_and_commands(capsys):
    said = help_of(capsys, "pairs")
    for word in (*PRESETS, "info", "verify", "export", "store its images", "CIFAR-10, 32 x 32"):
        assert word in said, word


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
    "convert": ["--nfe", "2"],
    "report": ["--out", "new.txt"],
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
    ("teach", "--solve.grid uniform", "--solve.top 0.9"),
    ("teach", "--train.ema-gamma 6.9", "--train.ema-decay 0.9"),
    ("pairs", "", "--plan-noises 4"),
    ("pairs", "--solve.grid uniform", "--solve.top=0.9"),
    ("verify of a store", "", "--recompute 2"),
    ("verify of a store", "", "--threads 1"),
    ("sample", "--out x.npy", "--scale 2"),
    ("evaluate", "", "--held-out 8"),
    ("evaluate", "", "--size 8"),
    ("teach", "", "--flip"),
    ("distill", "", "--size 8"),
    ("evaluate", "", "--inception-weights x"),
    ("convert", "", "--image-size 8"),
    ("distill", "", "--reuse 2"),
    ("distill", "", "--pool 2"),
    ("distill", "", "--judge.count 9"),
    (
        "distill",
        "--runtime.evaluate-every 2 --judge.extractor pixels",
        "--judge.inception-weights x",
    ),
    ("distill", "--runtime.loader resident", "--runtime.prefetch 3"),
    ("distill", "--runtime.compile no", "--runtime.compile_cache x"),
    ("distill", "", "--pairs.count 12288"),  # the preset's own
    ("distill", "", "--pairs.seed 9"),
    ("distill", "--online", "--pairs.seed 9"),
    ("distill", "", "--pairs.shard-size 9"),
    ("distill", "", "--pairs.quantizer floor"),
    ("distill", "", "--precision bfloat16"),
    ("distill", "", "--pairs.precision bfloat16"),
    ("distill", "", "--pairs.mode eager"),
    ("distill", "", "--solve.steps 6"),
    ("distill", "", "--solve.solver heun"),
    ("distill", "", "--solve.top 0.7"),
    ("distill", "", "--solve.clip static"),
    ("pairs", "", "--solve.spacing trailing"),
]


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


@pytest.mark.parametrize("argument", ["--help", "--version", "no-such-verb"])
def test_what_needs_no_work_imports_nothing_heavy(argument):
    code = (
        "import sys; from ds.cli.__main__ import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'tyro', 'numpy', 'sklearn'} & {*sys.modules}))"
    )
    assert python(code, argument).stdout.splitlines()[-1] == "[]"
