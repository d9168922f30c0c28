"""examples/custom_network.py: a network that the library has never seen."""

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.system.config import from_json, to_json
from tests.cli.chain import refused
from tests.examples import EXAMPLES, load

own = load("custom_network")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    student = ds.Student(own.MixerConfig(width=16, depth=2).build(), ds.methods.DenoisingStudent())
    path = tmp_path_factory.mktemp("mixer") / "student"
    student.save_pretrained(path)
    return student, path


def test_a_configuration_comes_back_from_its_json():
    config = own.MixerConfig(image_size=12, patch=3)
    assert from_json(to_json(config), types=[own.MixerConfig]) == config


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"image_size \(8\) must be a multiple of patch \(3\)"):
        own.MixerConfig(patch=3)


def test_every_pixel_and_the_time_reach_every_pixel():
    net = own.MixerConfig(width=16, depth=1).build()
    x, t = torch.randn(1, 1, 8, 8, requires_grad=True), torch.tensor([3.0], requires_grad=True)
    net(x, t)[0, 0, 0, 0].backward()
    assert x.grad.ne(0).all() and t.grad.ne(0).all()


def test_a_saved_student_is_loaded_with_its_class_and_draws_the_same(saved):
    student, path = saved
    with pytest.raises(ValueError, match="mixer_config"):
        ds.load_student(path)
    again = ds.load_student(path, types=[own.MixerConfig])
    z = ds.noise(0, range(4), student.shape)
    assert torch.equal(again.sample(z), student.sample(z))


def test_the_command_line_draws_with_the_file(saved, tmp_path, capsys):
    out = tmp_path / "mixer.png"
    draw = ["sample", str(saved[1]), "--out", str(out), "--indices", "0-3"]
    assert "mixer_config" in refused(capsys, *draw)
    assert main([*draw, "--code", str(EXAMPLES / "custom_network.py")]) == 0
    assert out.exists()


@pytest.mark.slow
def test_the_whole_program_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(own, "HELD_OUT", 32)
    figures = own.main(tmp_path, epochs=0.3, count=64, scored=64)
    assert figures["largest difference of the exported program"] < 1e-5
    assert len(capsys.readouterr().out.splitlines()) == len(figures) == 4
    assert {f.name for f in tmp_path.iterdir()} >= {"teacher", "pairs", "student", "student.pt2"}
