"""Directories of weights: exact round trips, and one clear line for every kind of damage."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ds
from ds.diffusion import grids
from ds.diffusion.denoiser import Denoiser
from ds.diffusion.schedules import LinearBeta
from ds.diffusion.solvers import DDIM
from ds.methods import DenoisingStudent
from ds.models import pretrained
from ds.models.load import load
from ds.nets import UNetConfig
from ds.system.files import sha256

NET = UNetConfig(
    image_size=4, in_channels=1, channels=4, channel_mult=(1,), num_res_blocks=1,
    attention_resolutions=(), norm_groups=2,
)  # fmt: skip


def build(seed=0):
    net = NET.build()
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return net


def teacher():
    schedule = LinearBeta(500, 2e-4, 0.03)
    return ds.Teacher(Denoiser(build(), schedule, "v"), DDIM(), grids.uniform(5, schedule))


def student():
    return ds.Student(build(), DenoisingStudent(loss_type="l1", t=9))


def assert_same_weights(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, w in a.state_dict().items():
        assert torch.equal(w, b.state_dict()[name]), name


@pytest.fixture
def folder(tmp_path):
    teacher().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_reading_draws_no_random_numbers_and_finds_large_weights_finite(tmp_path):
    model = student()
    model.net.conv_in.weight.data[0, 0] = torch.finfo(torch.float32).max  # whose sum overflows
    model.save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    assert_same_weights(ds.load_student(tmp_path / "model").net, model.net)
    assert torch.equal(torch.get_rng_state(), before)


def change_config(folder, **entries):
    """Change it by hand, and remove its checksum as one who means it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("checksum", None)
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def drop_from_config(folder, name):
    change_config(folder)
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    """Save other weights and give them a valid hash, as a careless tool would."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    change_config(folder, sha256=sha256(path))


def test_a_teacher_comes_back_the_same(tmp_path):
    before = teacher()
    before.save_pretrained(tmp_path / "t")
    after = ds.load_teacher(tmp_path / "t")
    assert_same_weights(after.net, before.net)
    assert (after.solver, after.grid) == (before.solver, before.grid)
    assert after.denoiser.schedule == before.denoiser.schedule
    assert after.denoiser.prediction == before.denoiser.prediction
    z = ds.noise(0, range(3), before.shape)
    assert torch.equal(after.sample(z), before.sample(z))


def test_a_student_comes_back_the_same(tmp_path):
    before = student()
    before.save_pretrained(tmp_path / "s")
    after = ds.load_student(tmp_path / "s")
    assert_same_weights(after.net, before.net)
    assert after.method == before.method
    z = ds.noise(0, range(3), before.shape)
    assert torch.equal(after.sample(z), before.sample(z))


@pytest.mark.parametrize("model", [teacher(), student()], ids=["teacher", "student"])
def test_load_finds_out_which_of_the_two_it_is(tmp_path, model):
    model.save_pretrained(tmp_path / "m")
    assert type(load(tmp_path / "m")) is type(model)


@pytest.mark.parametrize("model", [teacher(), student()], ids=["teacher", "student"])
def test_a_compiled_model_is_saved_like_any_other(tmp_path, model):
    model.compile().save_pretrained(tmp_path / "m")
    assert_same_weights(load(tmp_path / "m").net, model.net)


def test_a_compiled_denoiser_keeps_its_fingerprint():
    model = teacher()
    compiled = model.compile().denoiser
    assert pretrained.fingerprint(compiled) == pretrained.fingerprint(model.denoiser)


def test_a_loaded_network_does_not_drop_out(folder):
    assert not ds.load_teacher(folder).net.training


def test_overrides_replace_what_the_directory_says(folder):
    assert ds.load_teacher(folder, grid=(3, 1)).grid == (3, 1)


def test_weights_load_in_the_dtype_asked_for(folder):
    weights = ds.load_teacher(folder, dtype=torch.bfloat16).net.parameters()
    assert {w.dtype for w in weights} == {torch.bfloat16}


def test_provenance_is_kept_in_the_configuration_and_the_card(tmp_path):
    student().save_pretrained(tmp_path / "s", teacher_sha256="abc")
    config = json.loads((tmp_path / "s/config.json").read_text())
    assert config["provenance"] == {"teacher_sha256": "abc"}
    assert "| teacher_sha256 | abc |" in (tmp_path / "s/README.md").read_text()


def test_a_model_gives_way_to_another_if_it_must(folder):
    (folder / "metrics.json").write_text('{"protocol": {}}')
    with pytest.raises(ValueError, match=r"holds a model already; .* force"):
        student().save_pretrained(folder)
    student().save_pretrained(folder, force=True)
    assert ds.load_student(folder).kind == "student" and not (folder / "metrics.json").exists()


def test_a_model_of_the_same_run_takes_its_place_beside_what_was_added(folder):
    teacher().save_pretrained(folder.parent / "t", run="a")
    note(folder.parent / "t", "mine")
    for same in (True, False):
        again = teacher()
        if not same:
            again.net.conv_in.bias.data.add_(1)
        again.save_pretrained(folder.parent / "t", run="a")
        assert note(folder.parent / "t") == "mine"
        assert_same_weights(ds.load_teacher(folder.parent / "t").net, again.net)
    with pytest.raises(ValueError, match="holds a model already"):
        teacher().save_pretrained(folder.parent / "t", run="b")


def test_what_was_measured_stays_while_the_weights_do(folder):
    path = folder.parent / "t"
    teacher().save_pretrained(path, run="a")
    pretrained.annotate(path, {"run": "a", "kid": "3"}, teacher().card, {"protocol": {}})
    teacher().save_pretrained(path, run="a", commit="new")
    assert ds.load_teacher(path).provenance == {"run": "a", "kid": "3", "commit": "new"}
    assert "| kid | 3 |" in (path / "README.md").read_text()
    changed = teacher()
    changed.net.conv_in.bias.data.add_(1)
    changed.save_pretrained(path, run="a")
    assert ds.load_teacher(path).provenance == {"run": "a"}
    assert (path / "metrics.json").exists()


def test_a_card_that_somebody_has_written_on_is_left_alone(folder):
    (folder / "README.md").write_text("by hand")
    pretrained.annotate(folder, {"kid": "3"}, teacher().card, {"protocol": {}})
    assert (folder / "README.md").read_text() == "by hand"
    assert ds.load_teacher(folder).provenance == {"kid": "3"}
    with pytest.raises(ValueError, match=r"holds README\.md, which is not ours"):
        teacher().save_pretrained(folder, force=True)


def test_figures_of_somebody_else_are_left_alone(folder):
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by `evaluate`"):
        pretrained.annotated(folder)


def note(folder, text=None):
    if text:
        (folder / "notes").write_text(text)
    return (folder / "notes").read_text()


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("the-pickle-ran",)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def configure(**entries):
    return lambda folder: change_config(folder, **entries)


def weigh(change):
    return lambda folder: change_weights(folder, change)


DAMAGE = {
    "no configuration": (
        remove("config.json"),
        "no network here, neither config.json nor unet/config.json",
    ),
    "configuration cut": (write("config.json", b'{"format": '), "config.json: not valid JSON"),
    "configuration binary": (write("config.json", b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "configuration a list": (write("config.json", b"[]"), "config.json: holds a list"),
    "another kind": (
        configure(format="denoising-student/student/1"),
        "config.json: 'method' must be of the kind Generator",
    ),
    "a later format": (configure(format="denoising-student/teacher/2"), "config.json: expected a"),
    "no network": (lambda f: drop_from_config(f, "net"), "config.json: 'net' must be"),
    "a network that is none": (
        configure(net={"type": "linear_beta"}),
        "config.json: 'net' must be of the kind AbstractNetConfig",
    ),
    "a network outside ds": (
        configure(net={"type": "subprocess.Popen", "args": ["mkdir", "the-pickle-ran"]}),
        "config.json: configuration names the type 'subprocess.Popen'",
    ),
    "no schedule": (lambda f: drop_from_config(f, "schedule"), "config.json: 'schedule' must be"),
    "no solver": (lambda f: drop_from_config(f, "solver"), "config.json: 'solver' must be"),
    "no grid": (lambda f: drop_from_config(f, "grid"), "config.json: 'grid' must be"),
    "a grid that rises": (configure(grid=[1, 2]), "config.json: Teacher: a grid falls"),
    "a time the schedule lacks": (configure(grid=[500, 0]), "config.json: schedule: t = 500"),
    "no prediction": (lambda f: drop_from_config(f, "prediction"), "config.json: 'prediction'"),
    "an unknown prediction": (configure(prediction="u"), "config.json: 'prediction'"),
    "no weights": (remove("model.safetensors"), "model.safetensors: the weights are missing"),
    "weights cut": (truncate, "model.safetensors: not a whole safetensors file"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors: not a whole"),
    "a flipped bit": (flip, "model.safetensors: its SHA-256 is not the one in config.json"),
    "no hash": (lambda f: drop_from_config(f, "sha256"), "model.safetensors: its SHA-256"),
    "a wrong shape": (
        weigh(lambda w: w.update({"conv_in.bias": torch.zeros(5)})),
        "model.safetensors: the weight conv_in.bias has the shape [5], the network needs [4]",
    ),
    "a missing weight": (
        weigh(lambda w: w.pop("conv_in.bias")),
        "model.safetensors: the weight conv_in.bias [4] is missing",
    ),
    "an extra weight": (
        weigh(lambda w: w.update(extra=torch.zeros(1))),
        "model.safetensors: the network has no weight extra",
    ),
    "a weight that is no number": (
        weigh(lambda w: w["conv_in.bias"].fill_(torch.nan)),
        "model.safetensors: the weight conv_in.bias is not finite",
    ),
    "a pickle": (
        write("model.safetensors", pickle.dumps(RunsCode())),
        "model.safetensors: not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_the_file(folder, kind, monkeypatch):
    monkeypatch.chdir(folder.parent)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError) as error:
        ds.load_teacher(folder)
    line = str(error.value)
    assert message in line and str(folder) in line and "\n" not in line
    assert not Path("the-pickle-ran").exists()


@pytest.mark.parametrize("method", [None, {"type": "linear_beta"}, {"type": "os.system"}, "l1"])
def test_a_student_without_a_method_of_ds_is_refused(tmp_path, method):
    student().save_pretrained(tmp_path)
    change_config(tmp_path, method=method)
    with pytest.raises(ValueError, match=r"config\.json: .*(method|type)"):
        ds.load_student(tmp_path)


@pytest.mark.parametrize("read", [ds.load_teacher, ds.load_student, load])
def test_a_directory_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        read(tmp_path / "nowhere")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    broken = teacher()
    broken.net.conv_in.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"conv_in\.bias is not finite"):
        broken.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_network_ds_cannot_rebuild_is_not_saved_over_another(folder):
    net = nn.Linear(1, 1)
    net.shape = (1,)
    foreign = ds.Teacher(Denoiser(net, LinearBeta()), DDIM(), (0,))
    with pytest.raises(ValueError, match="Linear cannot be saved"):
        foreign.save_pretrained(folder)
    assert_same_weights(ds.load_teacher(folder).net, build())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.denoiser.net.conv_in.bias.data[0].add_(1),
        lambda t: object.__setattr__(t.denoiser, "schedule", LinearBeta()),
        lambda t: object.__setattr__(t.denoiser, "prediction", "eps"),
    ],
    ids=["weights", "schedule", "prediction"],
)
def test_the_fingerprint_changes_with_what_a_denoiser_computes(change):
    model = teacher()
    before = pretrained.fingerprint(model.denoiser)
    assert before == pretrained.fingerprint(teacher().denoiser)
    change(model)
    assert pretrained.fingerprint(model.denoiser) != before
