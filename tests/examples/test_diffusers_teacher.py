"""examples/diffusers_teacher.py: from a pipeline of diffusers to another."""

import pytest

import ds
from tests.examples import load

example = load("diffusers_teacher")
pytestmark = pytest.mark.slow


def test_a_stock_pipeline_draws_the_student(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "HELD_OUT", 16)
    assert example.main(tmp_path, count=64, epochs=1, steps=3) < 1e-5
    said = capsys.readouterr().out
    assert "images [1, 8, 8], 12 network calls each" in said
    assert (tmp_path / "teacher-above-student.png").exists()
    teacher = ds.load_teacher(tmp_path / "teacher")
    other = ds.Student(teacher.net, ds.methods.DenoisingStudent(gain=-0.9))
    assert example.difference(other, tmp_path / "student") > 1e-3  # of another student
