"""A folder of one's own pictures, from nothing to a student, without a preset."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ds
from ds.cli.__main__ import main
from ds.cli.teach import Teach
from ds.cli.verb import home_beside, parse
from ds.pairs.pictures import split
from ds.pairs.sources import Images
from ds.training import presets
from tests.cli.chain import refused

FEW_STEPS = ("--train.epochs", "1", "--train.warmup-steps", "1")
PAIRS = ("--pairs.count", "64", "--held-out", "16", "--solve.steps", "3")


def draw(folder: Path, count: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), np.uint8)
    for i, pixels in enumerate(values):
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module", params=["RGB", "L"], ids=["RGB", "grey"])
def chain(request, tmp_path_factory) -> tuple[Path, str]:
    """What the verbs make of forty pictures of a kind."""
    home = tmp_path_factory.mktemp("own")
    pictures = str(draw(home / "my pictures", 40, mode=request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        student = "runs/my-pictures/student"
        for args in (
            ["teach", "--images", pictures, *FEW_STEPS],
            ["pairs", "--teacher", "runs/my-pictures/teacher", *PAIRS],
            ["distill", "--teacher", "runs/my-pictures/teacher", *PAIRS, *FEW_STEPS],
            ["sample", student, "--indices", "0-8"],
            [
                "evaluate",
                student,
                "--reference",
                pictures,
                "--extractor",
                "pixels",
                "--count",
                "32",
            ],
        ):
            assert main(args) == 0, args
    return home, request.param


def test_a_folder_of_pictures_becomes_a_teacher_pairs_and_a_student_without_a_preset(chain):
    home, kind = chain
    made = home / "runs" / "my-pictures"
    teacher, student = ds.load_teacher(made / "teacher"), ds.load_student(made / "student")
    assert teacher.shape == student.shape == (3 if "RGB" in kind else 1, 8, 8)
    assert teacher.provenance["images"] == 32  # a tenth, at least 8, is held out
    assert len(ds.PairStore(made / "pairs")) == 80
    figures = json.loads((made / "student" / "metrics.json").read_text())
    assert figures["protocol"]["reference"]["n"] == 40


def test_the_teacher_s_images_are_shown_beside_real_ones(chain):
    home, kind = chain
    with Image.open(home / "runs/my-pictures/teacher-run/samples.png") as sheet:
        assert sheet.mode == kind
        small = np.asarray(sheet)[::8, ::8]  # a pixel is shown 8 x 8
    with Image.open(home / "my pictures" / "000.png") as real:
        left = small.shape[1] - 8 * 10  # of eight real pictures in a row
        assert np.array_equal(small[2:10, left : left + 8], np.asarray(real))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_teaching_says_how_many_pictures_it_has_and_how_long_it_will_take(here, caplog):
    draw(here / "a", 30)
    caplog.set_level("INFO", "ds")
    assert main(["teach", "--images", "a", "--dry-run"]) == 0
    heard = "\n".join(caplog.messages)
    assert heard.count("a: 30 pictures of 8 x 8, RGB") == 1
    assert "22 pictures to train on, 8 held out" in heard
    assert " weights, 1,400 steps of 16, about" in heard


@pytest.mark.parametrize(("verb", "option"), [("teach", "--images"), ("pairs", "--teacher")])
def test_the_help_of_a_verb_says_what_it_takes_without_a_preset(verb, option, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert option in capsys.readouterr().out


def test_other_pictures_are_another_run(here, capsys):
    draw(here / "a", 20)
    assert main(["teach", "--images", "a", *FEW_STEPS]) == 0
    assert main(["teach", "--images", "a", *FEW_STEPS]) == 0  # it is done already
    draw(here / "a", 21)
    capsys.readouterr()
    assert main(["teach", "--images", "a", *FEW_STEPS]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_pictures_that_fit_no_network_are_refused_with_the_size_that_does(here, capsys):
    draw(here / "wide", 12, (24, 17))
    line = refused_last(capsys, "teach", "--images", "wide")
    assert "24 x 17 fit no network" in line and "--size 16" in line
    assert main(["teach", "--images", "wide", "--size", "16", "--dry-run"]) == 0


def test_pictures_that_are_wide_are_taught_as_they_are(here):
    draw(here / "wide", 12, (24, 16))
    assert main(["teach", "--images", "wide", *FEW_STEPS, "--train.batch-size", "4"]) == 0
    assert ds.load_teacher("runs/wide/teacher").shape == (3, 16, 24)


def test_a_reference_is_cut_and_scaled_as_the_pictures_were(chain, tmp_path):
    home, kind = chain
    other = draw(tmp_path / "large", 40, (20, 16), kind)
    out = tmp_path / "figures.json"
    command = ["evaluate", str(home / "runs/my-pictures/student"), "--reference", str(other)]
    command += ["--count", "8", "--out", str(out)]
    assert main(command) == 2
    assert main([*command, "--size", "8"]) == 0
    assert json.loads(out.read_text())["protocol"]["reference"]["n"] == 40


def refused_last(capsys, *args: str) -> str:
    """Run a command that must fail; return its one line after what the log says."""
    assert main([*args]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("teach", r"name a preset first \(digits, .*\), or give --images FOLDER"),
        ("teach pictures", "no preset 'pictures'; .* or give --images FOLDER"),
        ("pairs", "or give --teacher DIR"),
        ("distill --train.epochs 1", "or give --teacher DIR"),
        ("teach --images nowhere", "nowhere: there is no such file"),
        ("pairs --teacher nowhere", "nowhere"),
        ("teach cifar10", "no images of cifar10 come with the library; give --images"),
        ("teach digits --size 16", "--size has no effect with the digits"),
    ],
)
def test_a_command_without_a_preset_says_what_else_to_give(command, said, here, capsys):
    line = refused(capsys, *command.split())
    assert re.search(said, line), line


def test_a_method_that_is_trained_on_images_asks_for_them(chain, monkeypatch, capsys):
    home, _ = chain
    monkeypatch.chdir(home)
    command = ["distill", "--teacher", "runs/my-pictures/teacher", "--out", "new"]
    command += ["--method", "consistency_distillation", "--dry-run"]
    assert "give --images" in refused_last(capsys, *command)
    assert main([*command, "--images", "my pictures"]) == 0


def test_the_results_go_beside_a_teacher_of_ours_and_into_runs_for_others(here):
    assert home_beside("runs/a/teacher") == Path("runs/a")
    assert home_beside("/data/ddpm-cats.ckpt") == Path("runs/ddpm-cats")
    assert home_beside("hf://google/ddpm-cat-256") == Path("runs/ddpm-cat-256")
    assert home_beside("a/data {000..003}.tar") == Path("runs/data-000")


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("rows", [200, 50_000])
def test_a_network_fits_pictures_of_common_sizes(size, rows):
    net = presets.network((3, size, size), rows)
    assert net.image_size == size and net.attention_resolutions[-1] <= 32
    assert hash(presets.own((3, size, size), rows))


@pytest.mark.parametrize("shape", [(2,), (4, 32, 32), (3, 64, 48), (1, 8)])
def test_a_teacher_of_any_shape_has_settings(shape):
    assert presets.own(shape).pairs and presets.own(shape).method


def test_pictures_are_held_out_by_number_and_no_one_is_in_both():
    train, kept = split(200)
    assert len(kept) == 20 and sorted([*train.tolist(), *kept.tolist()]) == [*range(200)]
    assert torch.equal(split(200)[1], kept)
    with pytest.raises(ValueError, match="9 pictures cannot be split into 8"):
        split(9)


def test_flipped_pictures_are_there_as_often_as_the_others():
    images = torch.arange(4 * 2 * 3).view(4, 2, 3, 1).byte()
    source = Images(images, rows=torch.tensor([1, 3]), flip=True)
    assert len(source) == 4
    expected = torch.cat([images[[1, 3]], images[[1, 3]].flip(2)])
    assert torch.equal(source.read(range(4)), expected)
    prints = {
        Images(images, **o).fingerprint()
        for o in (
            {},
            {"rows": torch.tensor([1, 3])},
            {"flip": True},
            {"rows": torch.tensor([0, 3])},
        )
    }
    assert len(prints) == 4


def test_options_of_one_s_own_pictures_can_be_changed(here):
    draw(here / "a", 30)
    task = parse("teach", ["--images", "a", "--net.channels", "32", "--out", "b", "--flip"])
    assert isinstance(task, Teach)
    assert (task.net.channels, task.out, task.flip) == (32, Path("b"), True)
