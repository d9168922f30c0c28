"""dstudent verify: tables, JSON and exit codes, for methods of the library and of a file."""

import json
from pathlib import Path

import pytest

from ds.cli.__main__ import main
from ds.cli.verb import methods
from ds.cli.verify import Verify
from ds.evaluation import verify as evaluation
from tests.cli.chain import refused

# Without bars there is no training.
OWN = """
from dataclasses import dataclass

from ds.methods import RectifiedFlow
from ds.methods.proof import Check, Trial

@dataclass(frozen=True)
class Own(RectifiedFlow):
    def identity(self):
        return (Check("off by", {value}, 1.0, {{"the other way": 7.0}}),)

    def trial(self):
        return Trial(bars={{}})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"right": 0.5, "wrong": 1.5}.items():
        Path(f"{name}.py").write_text(OWN.format(value=value))


def test_a_method_of_a_file_is_verified(folder, capsys):
    assert main(["verify", "right.py"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["Own", "value", "floor", "control", "bar", "verdict"]
    assert said[1].split() == ["off", "by", "0.5", "0", "7", "<", "1", "pass"]


def test_the_exit_code_is_1_if_one_check_of_any_method_fails(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["verify", "right.py", "wrong.py", "--json"])
    assert end.value.code == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["passed"], second["passed"]) == (True, False)
    assert second["checks"][0]["value"] == 1.5
    assert second["checks"][0]["controls"] == {"the other way": 7.0}


def test_without_names_every_method_is_verified_as_the_options_say(monkeypatch):
    called = []

    def verify(method, **options):
        called.append((type(method), options))
        return evaluation.Verification(method, (evaluation.Check("", 0.0),), 0.0)

    monkeypatch.setattr("ds.cli.verify.verify", verify)
    Verify(seed=3, steps=7, controls=False).run()
    assert [cls for cls, _ in called] == [*methods().values()]
    assert all(o == {"seed": 3, "steps": 7, "controls": False} for _, o in called)


def test_a_name_that_no_method_has_is_refused(capsys):
    assert "no method 'meaning'; the methods are " in refused(capsys, "verify", "meaning")
