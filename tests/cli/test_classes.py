"""Classes on the command line: from folders of pictures to a student that draws what is asked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ds
from ds.cli.__main__ import main
from tests.cli.chain import NET
from tests.cli.test_own import FEW_STEPS, draw, refused_last

FOLDERS = ("bird", "cat", "dog")


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
