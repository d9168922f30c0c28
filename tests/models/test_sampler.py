"""Sampler and the ways its images are written."""

import math
import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ds
from ds import analytic
from ds.diffusion import grids
from ds.diffusion.solvers import DDIM
from ds.models.images import save, tile
from ds.models.interpolate import great_circle
from ds.models.pretrained import fingerprint
from ds.models.sampler import uses_loop, usual_batch, usual_precision
from ds.nets import UNetConfig
from ds.training import presets
from tests.nets.test_unet import build, relative_rms

FIELD = analytic.GaussianField(size=4)
TEACHER = FIELD.teacher(DDIM(), grids.quadratic(5))
IMAGES = torch.randint(0, 256, (5, 4, 6, 3), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_an_image_depends_on_its_seed_and_index_only(batch_size):
    expected = ds.Sampler(TEACHER)(seed=5, indices=range(10))
    made = ds.Sampler(TEACHER, batch_size=batch_size)(seed=5, indices=[9, 3, 3, 0, 2, 8])
    assert torch.equal(made, expected[[9, 3, 3, 0, 2, 8]])


def test_given_noise_gives_the_images_of_its_indices():
    z = ds.noise(5, range(10), FIELD.shape)
    sampler = ds.Sampler(TEACHER, batch_size=4)
    assert torch.equal(sampler.draw(z), sampler(seed=5, indices=range(10)))


def test_no_indices_give_no_images():
    assert ds.Sampler(TEACHER)(indices=[]).shape == (0, 4, 4, 1)


def test_points_are_no_images():
    points = analytic.GaussianMixture().teacher(DDIM(), grids.quadratic(5))
    with pytest.raises(ValueError, match=r"shape \[2\] are no images"):
        ds.Sampler(points)()


def test_a_compiled_teacher_draws_the_same_images():
    expected = ds.Sampler(TEACHER)(indices=range(4))
    sampler = ds.Sampler(TEACHER, compile=True, batch_size=4)
    assert sampler.cold_start["compile"] > sampler.cold_start["capture"] == 0
    made = sampler(indices=range(4))
    assert (made.int() - expected.int()).abs().max() <= 1  # a pixel may round the other way


# A U-Net, and the ways to run it.


@pytest.fixture
def unet() -> ds.Teacher:
    return ds.Teacher(ds.Denoiser(build(), ds.schedule.LinearBeta()), DDIM(), grids.quadratic(5))


def drawn(model, **options) -> torch.Tensor:
    sampler = ds.Sampler(model, **{"batch_size": 4, **options})
    return torch.cat([*sampler.batches(7, range(6))])


def test_the_loop_draws_what_the_solver_does(unet):
    """The last batch is not full; on CUDA the same step is captured."""
    expected, made = drawn(unet, engine=True), drawn(unet, engine=True, loop=True)
    assert relative_rms(made, expected) < 1e-6
    assert torch.equal(made, drawn(unet, engine=True, loop=True))


@dataclass(frozen=True)
class Clipped(DDIM):
    """A solver that is no recurrence."""

    def step(self, *args):
        x, state = super().step(*args)
        return x.clamp(-1, 1), state


def test_a_loop_is_the_default_on_cuda_of_every_model_that_has_one(unet, caplog):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    heun = replace(unet, solver=ds.solvers.Heun())
    for model in (unet, heun, ds.Student(unet.net, ds.methods.DenoisingStudent())):
        assert uses_loop(model, cuda) and not uses_loop(model, cpu)
    assert not caplog.records
    assert not uses_loop(replace(unet, solver=Clipped()), cuda)
    assert "steps are launched one by one, which is slower: a loop needs" in caplog.text


@pytest.mark.parametrize(
    ("change", "engine", "reason"),
    [({"solver": Clipped()}, True, "linear in the noise"), ({}, False, "needs an engine")],
)
def test_a_loop_that_cannot_be_is_refused(unet, change, engine, reason):
    with pytest.raises(ValueError, match=reason):
        ds.Sampler(replace(unet, **change), engine=engine, loop=True)


@pytest.mark.parametrize("asked", [None, True])
def test_an_engine_that_fails_is_told_and_done_without_unless_it_was_asked_for(
    unet, asked, monkeypatch, caplog
):
    expected = drawn(unet, engine=False)

    def broken(*_, **__):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr("ds.models.sampler.Engine.__init__", broken)
    if asked:
        with pytest.raises(RuntimeError, match="no kernel image"):
            ds.Sampler(unet, engine=True)
        return
    assert torch.equal(drawn(unet), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Sampler: goes on without the engine or its loop, which is slower: no kernel image"
    ]


def test_a_captured_loop_that_fails_leaves_the_engine(unet, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("ds.models.sampler.uses_loop", lambda *_: True)  # as on CUDA
    monkeypatch.setattr("ds.models.sampler.Loop.__init__", broken)
    assert torch.equal(drawn(unet), drawn(unet, loop=False))
    assert "without the engine or its loop" in caplog.text


@pytest.mark.parametrize("engine", [False, True])
def test_bfloat16_runs_in_a_copy_and_is_near(unet, engine):
    before = fingerprint(unet.denoiser)
    expected, made = drawn(unet), drawn(unet, engine=engine, precision="bfloat16")
    assert made.dtype == torch.float32
    assert 1e-4 < relative_rms(made, expected) < 5e-2
    assert fingerprint(unet.denoiser) == before


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tf32_is_allowed_while_it_is_asked_for_and_not_longer(precision, monkeypatch):
    seen = []

    def look(z):
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return z

    monkeypatch.setattr("ds.models.sampler.check_precision", lambda *_: None)  # as on CUDA
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    model = SimpleNamespace(net=TEACHER.net, shape=TEACHER.shape, sample=look)
    ds.Sampler(model, precision=precision)(indices=[0])
    assert seen == [(precision == "tf32",) * 2]
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize(
    ("device", "dtype", "usual"),
    [
        ("cuda", torch.float32, "bfloat16"),
        ("cuda", torch.float64, "float32"),
        ("cpu", torch.float32, "float32"),
    ],
)
def test_a_unet_multiplies_in_bfloat16_on_a_gpu_unless_it_is_asked_otherwise(
    device, dtype, usual, monkeypatch
):
    monkeypatch.setattr("ds.models.sampler.device_of", lambda _: torch.device(device))
    assert usual_precision(build().to(dtype)) == usual
    assert usual_precision(TEACHER.net) == "float32"


@pytest.mark.parametrize("precision", ["fp4", "tf32"])
def test_a_precision_that_is_not_there_is_refused(precision):
    with pytest.raises(ValueError, match=f"precision .*{precision}"):
        ds.Sampler(TEACHER, precision=precision)


@pytest.fixture
def gate(monkeypatch):
    """Open the gate of the experimental precision."""
    monkeypatch.setenv("DS_EXPERIMENTAL", "fp8")


@pytest.mark.parametrize("value", [None, "", "1", "fp4"])
def test_fp8_is_refused_unless_the_environment_names_it(unet, monkeypatch, value):
    monkeypatch.delenv("DS_EXPERIMENTAL", raising=False)
    if value is not None:
        monkeypatch.setenv("DS_EXPERIMENTAL", value)
    with pytest.raises(
        ValueError, match=r"^precision fp8 is an experiment: .*, set DS_EXPERIMENTAL=fp8$"
    ):
        ds.Sampler(unet, precision="fp8")


@pytest.mark.parametrize("loop", [False, True])
def test_fp8_runs_in_the_engine_and_is_further_than_bfloat16(unet, gate, loop):
    before = fingerprint(unet.denoiser)
    expected, near = drawn(unet), drawn(unet, engine=True, precision="bfloat16")
    made = drawn(unet, precision="fp8", loop=loop)
    assert made.dtype == torch.float32
    assert 2 * relative_rms(near, expected) < relative_rms(made, expected) < 0.3
    assert fingerprint(unet.denoiser) == before


@pytest.mark.parametrize("options", [{"engine": False}, {"compile": True}])
def test_fp8_without_an_engine_is_refused(unet, gate, options):
    with pytest.raises(ValueError, match=r"^precision fp8 is for U-Nets in the engine"):
        ds.Sampler(unet, precision="fp8", **options)


def test_fp8_of_another_network_is_refused(gate):
    with pytest.raises(ValueError, match=r"^precision fp8 is for U-Nets in the engine"):
        ds.Sampler(TEACHER, precision="fp8")


def test_for_latency_the_quickest_of_the_ways_is_taken(unet, monkeypatch):
    ways = []

    def timed(work, most):
        ways.append(work)
        return 1.0 if len(ways) == 2 else 2.0

    monkeypatch.setattr("ds.models.sampler.seconds_each", timed)
    sampler = ds.Sampler(unet, latency=True)
    assert sampler.batch_size == 1 and len(ways) == 3
    assert not sampler.model.net.rewrites.winograd
    assert relative_rms(next(sampler.batches(7, [0])), drawn(unet)[:1]) < 1e-5


@pytest.mark.parametrize(
    ("preset", "memory", "batch"),
    [("cifar10", 80, 528), ("celeba", 80, 528), ("lsun_bedroom", 80, 66), ("cifar10", 1, 528)],
)
def test_a_batch_fills_a_gpu_and_fits_it(preset, memory, batch, monkeypatch):
    """Of an H100's 132 multiprocessors: the least that fills them where the memory is small."""
    gpu = SimpleNamespace(total_memory=memory * 2**30, multi_processor_count=132)
    monkeypatch.setattr("ds.models.sampler.device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    with torch.device("meta"):
        net = presets.PRESETS[preset]().net.build()
    assert usual_batch(SimpleNamespace(net=net)) == batch
    assert usual_batch(SimpleNamespace(net=nn.Linear(1, 1))) == 256


def test_a_cold_start_says_what_took_how_long(unet):
    cold = ds.Sampler(unet, engine=True, loop=True).cold_start
    assert cold["plan"] > 0 and cold["capture"] > 0 and cold["compile"] == 0


@pytest.mark.parametrize("between", [0, 1, 9])
def test_a_great_circle_passes_through_its_points_in_even_steps(between):
    z = torch.nn.functional.normalize(torch.randn(3, 20, dtype=torch.float64), dim=1) * 4
    path = great_circle(z, between)
    assert len(path) == 2 * (between + 1) + 1
    torch.testing.assert_close(path[:: between + 1], z)
    torch.testing.assert_close(path.norm(dim=1), torch.full((len(path),), 4.0).double())
    steps = torch.acos((path[1:] * path[:-1]).sum(1) / 16)
    for leg in steps.split(between + 1):
        torch.testing.assert_close(leg, leg[:1].expand_as(leg))


@pytest.mark.parametrize("columns", [None, 2])
def test_a_sheet_is_a_png_with_enlarged_pixels(tmp_path, columns):
    save(IMAGES, tmp_path / "sheet.png", columns=columns, scale=3)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "sheet.png")))
    expected = tile(IMAGES, columns or math.ceil(math.sqrt(5)))
    assert torch.equal(sheet[1::3, 1::3], expected)
    assert torch.equal(sheet[::3, 2::3], expected)


def test_a_directory_has_a_png_for_each_image(tmp_path):
    save(IMAGES, tmp_path / "folder")
    for i, image in enumerate(IMAGES):
        stored = np.array(Image.open(tmp_path / "folder" / f"{i:06d}.png"))
        assert torch.equal(torch.from_numpy(stored), image)


def test_arrays_hold_the_images_as_they_are(tmp_path):
    save(IMAGES, tmp_path / "a.npy")
    save(IMAGES, tmp_path / "a.npz")
    assert (np.load(tmp_path / "a.npy") == IMAGES.numpy()).all()
    assert (np.load(tmp_path / "a.npz")["images"] == IMAGES.numpy()).all()


def test_an_animation_goes_there_and_back(tmp_path):
    grey = (torch.arange(5) * 60).byte().reshape(-1, 1, 1, 1).expand(-1, 4, 4, 1)
    save(grey, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        shades = []
        for frame in range(animation.n_frames):
            animation.seek(frame)
            shades.append(animation.convert("L").getpixel((0, 0)))
    assert shades == [0, 60, 120, 180, 240, 180, 120, 60]


def test_another_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bmp: the name must end in one of \.png, \.gif"):
        save(IMAGES, tmp_path / "new" / "a.bmp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"engine": False}, {"precision": "bfloat16"}], ids=repr)
def test_a_sampler_is_pickled_as_its_model_and_options(options):
    """And so drawn from by the workers of a loader, to the same bits."""
    model = ds.Student(UNetConfig(
        image_size=8, in_channels=1, channels=8, channel_mult=(1,), num_res_blocks=1,
        attention_resolutions=(), norm_groups=4,
    ).build().eval(), ds.methods.DenoisingStudent())  # fmt: skip
    sampler = ds.Sampler(model, batch_size=3, **options)
    again = pickle.loads(pickle.dumps(sampler))
    assert (again.batch_size, again.precision) == (3, sampler.precision)
    assert type(again.model.net) is type(sampler.model.net)
    assert torch.equal(again(0, range(5)), sampler(0, range(5)))
