"""What callers have set for their tensors moves no bit of ours: dtype, device, autocast, modes."""

import ast
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ds
from ds import ops
from ds.evaluation.features import Pixels
from ds.nets import UNetConfig

ROOT = Path(ds.__file__).parent
# What makes tensors of PyTorch's default dtype, or on its default device.
MAKES = {
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
FILES = [*ROOT.rglob("*.py"), *(ROOT.parent / "kernels").glob("*.py")]


def makers(path: Path) -> Iterator[ast.Call]:
    """Yield the calls that make a tensor, but for a network's own, of the dtype it is built in."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    own = {
        inner
        for call in calls
        if ast.unparse(call.func) in ("nn.Parameter", "self.register_buffer")
        for inner in ast.walk(call)
    }
    names = {f"torch.{name}" for name in MAKES}
    yield from (call for call in calls if ast.unparse(call.func) in names and call not in own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tensor_is_made_with_its_dtype_and_device(path):
    for call in makers(path):
        named = {keyword.arg for keyword in call.keywords}
        assert {"dtype", "device"} <= named, f"{path.name}:{call.lineno}: {ast.unparse(call)}"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
}


class Setting:
    """A teacher, a store and a student of it, made in PyTorch's usual state."""

    def __init__(self, folder: Path):
        config = UNetConfig(
            image_size=8, in_channels=1, channels=16, channel_mult=(1, 2), num_res_blocks=1,
            attention_resolutions=(4,), norm_groups=4,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = config.build().eval()
            with torch.no_grad():
                for w in net.parameters():
                    w.add_(0.05 * torch.randn_like(w))
        denoiser = ds.Denoiser(net, ds.schedule.LinearBeta(), "x0")
        self.teacher = ds.Teacher(denoiser, ds.solvers.DDIM(), ds.grids.quadratic(3))
        self.teacher.save_pretrained(folder / "teacher")
        self.store = ds.generate_pairs(self.teacher, folder / "pairs", 32, batch_size=16)
        self.folder, self.made = folder, 0
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, 16, 8, 8, generator=generator)
        self.weight = torch.randn(16, 16, 3, 3, generator=generator)

    def place(self) -> Path:
        self.made += 1
        return self.folder / str(self.made)


def of_ops(s: Setting) -> list[Tensor]:
    w = torch.ones(16, dtype=torch.float32, device="cpu")
    indices = torch.tensor([3, 2**40], dtype=torch.int64, device="cpu")
    tiles = ops.winograd_weight(s.weight).float()
    levels = ops.quantize(s.x)
    return [
        ops.group_norm_silu(s.x, w, w, 4), ops.group_norm(s.x, w, w, 4),
        ops.winograd_conv(s.x, tiles),
        ops.conv(s.x, s.weight, w), *ops.conv_group_norm_silu(s.x, s.weight, w, w, 4), levels,
        ops.dequantize(levels), ops.noise(1, indices, (5,)),
        *ops.prepare_batch(levels, indices, 1),
    ]  # fmt: skip


def of_gradients(s: Setting) -> list[Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        x = s.x.clone().requires_grad_()
        w = torch.ones(16, dtype=torch.float32, device="cpu", requires_grad=True)
        loss = ops.group_norm_silu(x, w, w, 4).square().sum()
        return list(torch.autograd.grad(loss, (x, w)))


def of_a_sampler(s: Setting) -> list[Tensor]:
    engine, plain = (
        ds.Sampler(s.teacher),
        ds.Sampler(s.teacher, execution=ds.Execution(), batch_size=2),
    )
    return [engine(0, range(3)), plain(0, range(3)), next(engine.batches(0, range(2)))]


def of_pairs(s: Setting) -> list[Tensor]:
    store = ds.generate_pairs(s.teacher, s.place(), 20, batch_size=16, shard_size=16)
    return [store.images(range(20)), store.images([3, 1]), store.noise([3, 1])]


def of_a_trainer(s: Setting) -> list[Tensor]:
    train, held_out = ds.Pairs(s.store, range(8, 32)), ds.Pairs(s.store, range(8))
    config = ds.TrainConfig(batch_size=8, epochs=1, lr=1e-3, warmup_steps=1)
    method = ds.methods.DenoisingStudent(loss_type="l1").on(s.teacher)
    net = ds.Trainer(method, s.teacher, train, held_out, s.place(), config).fit()
    return list(net.state_dict().values())


def of_an_evaluation(s: Setting) -> list[Tensor]:
    images = s.store.images(range(32))
    figures = ds.evaluate(s.teacher, reference=images, n=16, extractor=Pixels(), batch_size=16)
    values = [v for k, v in figures.items() if isinstance(v, float) and "second" not in k]
    return [torch.tensor(values, dtype=torch.float64, device="cpu")]


def of_what_is_loaded(s: Setting) -> list[Tensor]:
    return list(ds.load_teacher(s.folder / "teacher").net.state_dict().values())


ENTRIES = [
    of_ops, of_gradients, of_a_sampler, of_pairs, of_a_trainer, of_an_evaluation, of_what_is_loaded,
]  # fmt: skip


def bits(tensors: list[Tensor]) -> list[tuple]:
    """Return what tells tensors from others that have another bit."""
    arrays = [x.detach().cpu().numpy() for x in tensors]
    return [(a.dtype, a.shape, hashlib.sha256(a.tobytes()).hexdigest()) for a in arrays]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("ambient"))


@pytest.fixture(scope="module", params=ENTRIES, ids=lambda entry: entry.__name__)
def entry(request, setting):
    return request.param, bits(request.param(setting))


@pytest.mark.each_value
@pytest.mark.parametrize("ambient", AMBIENT)
def test_no_bit_depends_on_what_the_caller_has_set(entry, ambient, setting):
    make, expected = entry
    with AMBIENT[ambient]():
        found = make(setting)
    assert bits(found) == expected
