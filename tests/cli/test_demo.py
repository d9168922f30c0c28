"""dstudent demo: the whole chain, and the page at its end."""

import json
from dataclasses import replace
from functools import partial

import pytest
from PIL import Image

from ds.cli.__main__ import main
from ds.cli.demo import demo
from ds.evaluation.evaluate import evaluate
from ds.evaluation.features import Pixels
from ds.training import presets


@pytest.fixture
def brief(monkeypatch) -> presets.Preset:
    """The settings of a demo of seconds."""
    monkeypatch.setattr("ds.cli.demo.evaluate", partial(evaluate, n=64))
    monkeypatch.setattr("ds.cli.demo.Digits", Pixels)
    p = presets.digits()
    train = replace(p.train, epochs=0.5, check_every=1000)
    return replace(
        p,
        net=replace(p.net, channels=8, norm_groups=4),
        teach=train,
        train=train,
        pairs=replace(p.pairs, count=128, held_out=32),
    )


@pytest.mark.slow
def test_a_demo_ends_with_its_page_and_picture(brief, tmp_path, capsys):
    figures = demo(tmp_path / "demo", brief)
    names = ["teacher, 12 calls", "student, 1 call", "teacher, 1 call", "real digits, 1,500 to 297"]
    assert [*figures] == names
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == figures
    page = (tmp_path / "demo" / "report.html").read_text()
    said = capsys.readouterr().out
    assert all(f"| {name}" in said and f">{name}</th>" in page for name in names)
    assert "The student" in page and "The teacher" in page
    with Image.open(tmp_path / "demo" / "report.png") as picture:
        assert picture.width > 900
    assert main(["report", str(tmp_path / "demo"), "--force"]) == 0
    assert (tmp_path / "demo" / "report.html").read_text() == page
