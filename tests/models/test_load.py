"""What `ds.load` makes of other codes' files: meaning, provenance, and the way to our directory."""

import lzma
from dataclasses import dataclass

import pytest
import torch

import ds
from ds.cli.__main__ import main
from ds.diffusion.solvers import DDIM
from ds.methods import DenoisingStudent
from ds.models.convert import to_diffusers
from ds.models.load import load
from ds.nets import UNetConfig
from tests import golden

SMALL = UNetConfig(
    image_size=8, in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), norm_groups=4,
)  # fmt: skip


def relative(made: torch.Tensor, expected: torch.Tensor) -> float:
    return ((made - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two HDF5 files of the 2021 code, unpacked under names that say nothing."""
    folder = tmp_path_factory.mktemp("hdf5")
    for number, name in enumerate(("ddpm_cifar10_c32", "student_cifar10_c32")):
        packed = golden.FOLDER / f"{name}.h5.xz"
        (folder / f"file{number}").write_bytes(lzma.decompress(packed.read_bytes()))
    return folder / "file0", folder / "file1"


@torch.no_grad()
def test_a_teacher_of_2021_computes_what_it_did(files):
    teacher, data = ds.load_teacher(files[0]), golden.arrays("ddpm_cifar10_c32")
    assert relative(teacher.net(data["z"], data["t"]), data["y"]) < 1e-5
    assert teacher.nfe == 96 and teacher.grid[0] == 800


def test_a_student_of_2021_computes_what_it_did(files):
    student, data = ds.load_student(files[1]), golden.arrays("student_cifar10_c32")
    assert relative(student.sample(data["z"]), data["y"]) < 1e-5
    assert student.method == DenoisingStudent(t=999)


def test_the_endpoint_of_2021_is_reached_from_its_file(files):
    student, data = ds.load_student(files[1]), golden.arrays("ddim100_cifar10_c32")
    denoiser = ds.Denoiser(student.net, ds.schedule.LinearBeta())
    teacher = ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(100))
    assert relative(teacher.sample(data["z"]), data["y"]) < 1e-4


def test_where_a_file_came_from_stays_with_the_model(files, tmp_path):
    load(files[1]).save_pretrained(tmp_path / "student", figure=3)
    provenance = load(tmp_path / "student").provenance
    assert provenance["format"] == "denoising-student-2021" and provenance["figure"] == 3
    assert len(provenance["sha256"]) == 64
    assert provenance["sha256"] in (tmp_path / "student" / "README.md").read_text()


def test_the_kind_that_was_asked_for_is_the_kind_that_comes(files):
    with pytest.raises(ValueError, match="file1: expected a teacher, found a student"):
        ds.load_teacher(files[1])
    with pytest.raises(ValueError, match="file0: expected a student, found a teacher"):
        ds.load_student(files[0])


def test_a_teacher_takes_another_grid_and_solver(files):
    assert ds.load_teacher(files[0], grid=(900, 100)).grid == (900, 100)


def test_convert_goes_to_diffusers_and_back(tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SMALL.build()
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    denoiser = ds.Denoiser(net, ds.schedule.LinearBeta())
    ds.Teacher(denoiser, ds.solvers.DDIM(), (5, 1)).save_pretrained(tmp_path / "ours")
    paths = [str(tmp_path / name) for name in ("ours", "theirs", "again")]
    assert main(["convert", *paths[:2], "--to", "diffusers"]) == 0
    assert main(["convert", *paths[1:]]) == 0
    again = ds.load_teacher(paths[2])
    assert again.net.config == SMALL and again.provenance["format"] == "diffusers"
    for a, b in zip(again.net.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_large_network_is_integrated_as_the_paper_did_lsun(tmp_path):
    config = UNetConfig(
        image_size=128, channels=4, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=2,
    )  # fmt: skip
    net = config.build()
    to_diffusers(tmp_path / "large", config, net.state_dict(), ds.schedule.LinearBeta())
    assert ds.load_teacher(tmp_path / "large").grid == ds.grids.uniform(50)


@pytest.mark.parametrize(
    ("to", "message"), [("pt2", "is for students"), ("onnx", "is for students")]
)
def test_a_teacher_becomes_no_one_step_program(files, tmp_path, capsys, to, message):
    assert main(["convert", str(files[0]), str(tmp_path / "out"), "--to", to]) == 2
    assert message in capsys.readouterr().err


@dataclass(frozen=True)
class Halved(DenoisingStudent):
    """A method of one's own."""

    def sample(self, net, z, **options):
        return super().sample(net, z, **options) / 2


@dataclass(frozen=True)
class Slow(DDIM):
    """A solver of one's own."""


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_class_of_one_s_own_is_given_where_it_is_loaded(tmp_path, kind):
    net, path = SMALL.build().eval(), tmp_path / "model"
    if kind == "student":
        model, own = ds.Student(net, Halved()), Halved
    else:
        denoiser = ds.Denoiser(net, ds.schedule.LinearBeta())
        model, own = ds.Teacher(denoiser, Slow(), ds.grids.quadratic(3)), Slow
    model.save_pretrained(path)
    z = ds.noise(0, range(2), model.shape)
    assert torch.equal(load(path, types=[own]).sample(z), model.sample(z))
    with pytest.raises(ValueError, match=f"names the type '{own.__name__.lower()}', which is none"):
        load(path)


def test_a_student_keeps_its_number_of_calls(tmp_path):
    student = ds.Student(SMALL.build().eval(), ds.methods.Denoising(), nfe=3)
    student.save_pretrained(tmp_path / "model")
    assert ds.load_student(tmp_path / "model").nfe == 3
    assert ds.load_student(tmp_path / "model", nfe=2).nfe == 2
    with pytest.raises(ValueError, match="nfe must be at least 1, not 0"):
        ds.load_student(tmp_path / "model", nfe=0)
