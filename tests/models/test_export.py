"""What a student computes elsewhere: the exported program and the ONNX model against eager."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ds
from ds.methods import Denoising, DenoisingStudent
from ds.methods.base import built
from ds.models import export
from ds.models.export import to_onnx, to_program
from ds.nets import MLPConfig, UNetConfig

CONFIG = UNetConfig(
    image_size=8, in_channels=1, channels=16, channel_mult=(1, 2), num_res_blocks=1,
    attention_resolutions=(4,), norm_groups=8,
)  # fmt: skip
BATCHES = (1, 2, 7)


@pytest.fixture(scope="module")
def student() -> ds.Student:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CONFIG.build().eval()
        for p in net.parameters():  # the zeros of a fresh network would hide most of it
            p.data.add_(0.05 * torch.randn_like(p))
    return ds.Student(net, DenoisingStudent())


def noise(n: int) -> torch.Tensor:
    return ds.noise(0, range(n), CONFIG.build().shape)


def assert_same(made: torch.Tensor, eager: torch.Tensor) -> None:
    """Allow what float32 rounds differently when the same operations come in another order."""
    assert (made - eager).abs().max() <= 1e-5 * eager.abs().max()


@pytest.fixture(scope="module")
def program(student, tmp_path_factory) -> Path:
    to_program(student, path := tmp_path_factory.mktemp("program") / "student.pt2")
    return path


def test_the_program_computes_what_the_student_does_for_any_batch(student, program):
    module = torch.export.load(program).module()
    for n in BATCHES:
        assert_same(module(noise(n)), student.sample(noise(n)))


def test_the_program_makes_the_calls_of_the_student(tmp_path):
    several = ds.Student(built(MLPConfig(width=16, depth=2)).eval(), Denoising(), nfe=2)
    to_program(several, tmp_path / "student.pt2")
    z = ds.noise(0, range(3), (2,))
    assert_same(torch.export.load(tmp_path / "student.pt2").module()(z), several.sample(z))


def test_the_program_runs_where_this_library_is_not(student, program, tmp_path):
    torch.save((noise(3), student.sample(noise(3))), tmp_path / "pair.pt")
    code = (
        "import sys, torch\n"
        "z, y = torch.load('pair.pt')\n"
        "made = torch.export.load(sys.argv[1]).module()(z)\n"
        "assert 'ds' not in sys.modules\n"
        "assert (made - y).abs().max() <= 1e-5 * y.abs().max()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def told() -> ds.Student:
    """A student of points that is told a class and a guidance scale."""
    config = MLPConfig(classes=3, conditions=("guidance",), width=16, depth=2)
    return ds.Student(built(config).eval(), DenoisingStudent())


def cond(n: int) -> dict[str, torch.Tensor]:
    return {"label": torch.arange(n) % 4 - 1, "guidance": torch.linspace(1, 3, n)}


def test_the_program_of_a_conditional_student_is_told_what_it_takes(told, tmp_path):
    to_program(told, tmp_path / "told.pt2")
    module = torch.export.load(tmp_path / "told.pt2").module()
    for n in BATCHES:
        z = ds.noise(0, range(n), (2,))
        assert_same(module(z, **cond(n)), told.sample(z, cond=cond(n)))


def test_the_onnx_model_of_a_conditional_student_has_inputs_for_what_it_takes(told, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    to_onnx(told, tmp_path / "told.onnx")
    session = runtime.InferenceSession(tmp_path / "told.onnx")
    assert [found.name for found in session.get_inputs()] == ["noise", "label", "guidance"]
    z = ds.noise(0, range(7), (2,))
    inputs = {name: x.numpy() for name, x in {"noise": z, **cond(7)}.items()}
    (made,) = session.run(["samples"], inputs)
    assert_same(torch.from_numpy(made), told.sample(z, cond=cond(7)))


def test_the_onnx_model_computes_what_the_student_does_for_any_batch(student, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    to_onnx(student, tmp_path / "student.onnx")
    session = runtime.InferenceSession(tmp_path / "student.onnx")
    for n in BATCHES:
        (made,) = session.run(["samples"], {"noise": noise(n).numpy()})
        assert_same(torch.from_numpy(made), student.sample(noise(n)))


def test_onnx_says_what_to_install(student, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"pip install .*\[onnx\]"):
        to_onnx(student, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", [(), (2,)], ids=["one affine", "by image"])
def test_the_norm_of_a_program_is_the_op(rows):
    """As a program has it in place of the op, which an affine of each image would mislead."""
    x, weight, bias = torch.randn(2, 8, 3, 5), torch.randn(*rows, 8), torch.randn(*rows, 8)
    arguments = x, weight, bias, 4, 1e-5, True, True, torch.randn(2, 8)
    expected = torch.ops.ds.group_norm_silu(*arguments)
    for found, y in zip(export._group_norm_silu(*arguments), expected, strict=True):
        torch.testing.assert_close(found.view_as(y), y)
