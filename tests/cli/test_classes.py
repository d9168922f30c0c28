"""Classes on the command line: from folders of pictures to a student that draws what is asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ds
from ds.cli.__main__ import main
from ds.models.interpolate import great_circle
from tests.cli.chain import NET
from tests.cli.test_own import FEW_STEPS, draw, refused_last

FOLDERS = ("bird", "cat", "dog")
PAIRS = ("--pairs.count", "48", "--held-out", "16", "--solve.steps", "3")


def folders(home: Path, names: tuple[str, ...] = FOLDERS, count: int = 10) -> Path:
    """Pictures of classes: those of the first are the darkest."""
    for k, name in enumerate(names):
        folder = draw(home / "pets" / name, count, mode="L")
        for file in folder.iterdir():
            Image.fromarray(np.asarray(Image.open(file)) // 4 + 64 * k).save(file)
    return home / "pets"


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A teacher of three classes of ten pictures."""
    home = tmp_path_factory.mktemp("classes")
    pets = str(folders(home))
    out = ("--out", str(home / "teacher"))
    assert main(["teach", "--images", pets, "--conditional", *out, *NET, *FEW_STEPS]) == 0
    return home


def test_folders_of_classes_teach_a_network_of_classes_and_keep_their_names(taught):
    teacher = ds.load_teacher(taught / "teacher")
    assert teacher.classes == 3 and teacher.provenance["classes"] == [*FOLDERS]


def test_the_sheet_beside_a_run_has_a_column_for_each_class(taught):
    """16 rows of three columns of the teacher's, and as many of real pictures on their right."""
    with Image.open(taught / "teacher-run" / "samples.png") as picture:
        sheet = np.asarray(picture)[::8, ::8]
    assert sheet.shape == (16 * 10 + 2, 2 * (3 * 10 + 2) + 8)
    right = sheet[:, 40:]
    for k in range(3):
        column = right[2:, 2 + 10 * k : 10 + 10 * k].reshape(16, 10, 8)[:, :8]
        assert column.min() >= 64 * k and column.max() < 64 * (k + 1)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_classes_that_are_not_taught_are_said_and_change_nothing(here, caplog):
    caplog.set_level("INFO", "ds")
    folders(here)
    command = ["teach", "--images", "pets", *NET, "--dry-run"]
    assert main(command) == 0
    assert "teach: the 3 classes are not taught; --conditional teaches them" in caplog.messages
    caplog.clear()
    assert main([*command, "--conditional"]) == 0
    assert "teach: 3 classes are taught" in caplog.messages


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("plain", "--conditional"), "plain: no classes are known, which the network is to be"),
        (
            ("pets", "--net.classes", "2"),
            "pets: has labels up to 2, the network has classes 0 to 1",
        ),
        (("pets", "--method.label-dropout", "0.2"), "no effect without --conditional"),
    ],
    ids=["none are known", "too many", "no labels"],
)
def test_classes_that_cannot_be_taught_are_one_clear_line(here, capsys, options, said):
    folders(here)
    draw(here / "plain", 12)
    assert said in refused_last(capsys, "teach", "--images", *options)


@pytest.fixture(scope="module")
def made(taught) -> Path:
    """A student of all classes, and one of guided pairs of two of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(taught)
        for args in (
            ["pairs", "--teacher", "teacher", *PAIRS, "--guidance", "1-4", "--classes", "cat,dog"],
            ["distill", "--teacher", "teacher", *PAIRS, *FEW_STEPS, "--out", "guided"],
            ["distill", "--teacher", "teacher", *PAIRS, *FEW_STEPS, "--store", "all"],
        ):
            assert main(args) == 0, args
    return taught


@pytest.fixture
def at(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


def test_pairs_draw_their_classes_and_scales_and_the_store_says_of_which(at):
    store = ds.PairStore("pairs")
    assert store.conditions == ds.Conditions((1, 2), (1.0, 4.0))
    assert {*store.labels(range(64)).tolist()} == {1, 2}
    assert ds.PairStore("all").conditions == ds.Conditions((0, 1, 2))
    assert main(["pairs", "verify", "pairs", "--teacher", "teacher"]) == 0


def test_a_student_of_guided_pairs_is_told_its_scale(at, capsys):
    """It is trained without --guidance: the store knows how its pairs were guided."""
    student = ds.load_student("guided")
    assert student.takes == ("label", "guidance") and student.classes == 3
    assert student.provenance["classes"] == [*FOLDERS]
    line = refused_last(capsys, "sample", "guided", "--out", "no.npy")
    assert "give --guidance: this student is told a scale, and learnt those from 1 to 4" in line
    options = ("--guidance", "2.5", "--classes", "dog", "--indices", "0-3", "--force")
    assert main(["sample", "guided", "--out", "guided.npy", *options]) == 0
    asked = ds.Sampler(student, conditions=ds.Conditions((2,), 2.5))
    assert np.array_equal(np.load("guided.npy"), asked(0, range(4)))


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        (("--classes", "cat"), (1,)),
        (("--classes", "0,cat"), (0, 1)),
        (("--classes", "1-2"), (1, 2)),
        (("--classes", "none"), (-1,)),
        ((), ()),
    ],
)
def test_samples_draw_their_classes_of_those_that_are_named(at, tmp_path, options, classes):
    out = tmp_path / "a.npy"
    assert main(["sample", "student", "--out", str(out), "--indices", "0-3", *options]) == 0
    sampler = ds.Sampler(ds.load_student("student"), conditions=ds.Conditions(classes))
    assert np.array_equal(np.load(out), sampler(0, range(4)))


def test_the_class_of_each_image_can_be_given_and_a_sheet_has_a_column_for_each(at, tmp_path):
    for out in ("a.png", "a.npy"):
        options = ("--labels", "dog,0-1", "--indices", "0-8", "--out", str(tmp_path / out))
        assert main(["sample", "student", *options]) == 0
    images = ds.Sampler(ds.load_student("student"))(0, range(9), [2, 0, 1] * 3)
    assert np.array_equal(np.load(tmp_path / "a.npy"), images)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (8 * (3 * 9 + 1),) * 2


def test_an_image_between_two_has_the_class_of_the_nearer(at, tmp_path):
    options = ("--between", "3", "--indices", "5,6", "--labels", "2,0")
    assert main(["sample", "student", *options, "--out", str(tmp_path / "a.npy")]) == 0
    path = great_circle(ds.noise(0, [5, 6], (1, 8, 8)), 3)
    expected = ds.Sampler(ds.load_student("student")).draw(path, [2, 2, 2, 0, 0])
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)


def test_a_teacher_is_guided_as_far_as_is_asked(at, tmp_path, capsys):
    out, teacher = tmp_path / "a.npy", ds.load_teacher("teacher")
    options = ("--indices", "0-3", "--out", str(out), "--force")
    assert main(["sample", "teacher", "--guidance", "2", *options]) == 0
    guided = ds.Teacher(ds.Guided(teacher.denoiser, 2.0), teacher.solver, teacher.grid)
    images = ds.Sampler(guided)(0, range(4))
    assert np.array_equal(np.load(out), images)
    assert f"{2 * teacher.nfe} network calls each" in capsys.readouterr().out
    assert main(["sample", "teacher", "--guidance", "2-2.0", *options]) == 0
    assert np.array_equal(np.load(out), images)


def test_evaluate_tells_the_figures_of_each_class_by_its_name(at, tmp_path, caplog):
    caplog.set_level("INFO", "ds")
    out = tmp_path / "figures.json"
    options = ("--reference", "pets", "--extractor", "pixels", "--count", "40")
    assert main(["evaluate", "student", *options, "--out", str(out), "--classes", "cat,2"]) == 0
    found = json.loads(out.read_text())
    assert [*found["classes"]] == ["1", "2"] and found["protocol"]["reference"]["n"] == 20
    assert found["protocol"]["classes"] == {"of": [1, 2], "drawn": "as often as in the reference"}
    assert any("| 1 cat |" in line for line in caplog.messages)
    page = tmp_path / "page.html"
    options = (*options, "--guidance", "1-2", "--out", str(out), "--force", "--page", str(page))
    assert main(["evaluate", "guided", *options]) == 0
    assert json.loads(out.read_text())["protocol"]["guidance"]["scale"] == [1.0, 2.0]
    shown = page.read_text()
    assert all(f'<th scope="row">{k} {name}</th>' in shown for k, name in enumerate(FOLDERS))
    assert ">all</th><td>40</td><td>30</td>" in shown and "data:image/png;base64," in shown


def test_figures_of_a_model_on_its_way_are_those_of_the_scales_it_learns(at):
    judge = ("--runtime.evaluate-every", "2", "--judge.reference", "pets", "--judge.count", "12")
    command = ["distill", "--teacher", "teacher", *PAIRS, *FEW_STEPS, "--out", "judged", *judge]
    assert main(command) == 0
    lines = (at / "judged-run" / "metrics.jsonl").read_text().splitlines()
    assert any("class_kernel_distance" in line for line in lines)


def test_a_method_that_is_trained_on_images_is_told_their_classes(at):
    command = ["distill", "--teacher", "teacher", "--method", "consistency_distillation"]
    assert main([*command, "--images", "pets", "--out", "new", "--dry-run"]) == 0


REFUSED = {
    "sample student --classes 3": "class 3 does not exist; this student has classes 0 to 2",
    "sample student --classes 0-99999999999": "class 99999999999 does not exist",
    "sample student --classes horse": "'horse' is no class, such as 3 or 0-9; their names are bird",
    "sample student --classes 2-1": "--classes '2-1' are none",
    "sample student --labels 0,5": "--labels '0,5': class 5 does not exist",
    "sample student --labels 0 --classes 1": "--classes has no effect with --labels",
    "sample student --guidance 2": "this student takes no guidance scale; leave guidance (2.0) out",
    "sample teacher --guidance much": "--guidance 'much': is no number and no range",
    "sample teacher --guidance 4-1": "from the lower scale to the higher, not (4.0, 1.0)",
    "sample teacher --guidance nan": "scale must be",
    "sample teacher --between 3 --guidance 1-2": "between needs one --guidance, such as 2",
    "evaluate student --reference pets --classes 7": "class 7 does not exist",
    "pairs --teacher teacher --classes 3 --out new": "class 3 does not exist; this teacher has",
    "distill --teacher teacher --classes 3 --out new": "class 3 does not exist",
    "distill --teacher teacher --classes bird --out new": "finished and has the classes 1, 2",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_a_model_cannot_be_asked_for_is_one_clear_line(at, capsys, command):
    line = refused_last(capsys, *command.split())
    assert REFUSED[command] in line and line.startswith("dstudent: ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sample student --classes 3", "--classes: this student has no classes; leave it out"),
        ("sample student --labels 3", "--labels: this student has no classes; leave it out"),
        ("sample teacher --guidance 2", "this teacher has no classes to be guided to"),
        ("evaluate student --classes 3", "--classes: this student has no classes"),
        ("pairs digits --teacher teacher --out new --classes 3", "this teacher has no classes"),
        ("pairs digits --teacher teacher --out new --guidance 2", "no classes to be guided to"),
        ("distill digits --teacher teacher --store new --classes 3", "this teacher has no classes"),
    ],
)
def test_a_model_without_classes_refuses_them_in_one_line(home, capsys, command, said):
    assert said in refused_last(capsys, *command.split())
