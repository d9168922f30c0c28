"""What a GPU refuses, the emulated one refuses: each rule is seen to fire, and to let pass.

python -m tests.emulated -m pytest tests/emulated/refusals.py
"""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds import ops
from ds.engine import Engine, Loop, Recurrence
from ds.ops.dispatch.op import triton_kernels
from ds.ops.prepare_batch import _op as prepare_batch
from tests.emulated import launches
from tests.emulated.interpreter import rounding_as_a_gpu
from tests.gpu import teacher

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WAITS = "operation not permitted when stream is capturing"


@pytest.fixture
def captured():
    """Return a function that captures the work of another and returns the graph."""

    def capture(work):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph

    return capture


def test_a_tensor_tells_where_it_is():
    x = torch.arange(6.0).view(2, 3).cuda()
    assert (x.is_cuda, x.device, x.get_device()) == (True, GPU, 0)
    for made in (
        x + 1, x[0], x.new_zeros(2), x.new_tensor([1]), torch.zeros_like(x), x.clone(),
        torch.tensor(1.0, device="cuda"), nn.Linear(2, 2, device="cuda").weight,
        F.pad(x, (1, 1)), x.bfloat16(), x.to("cuda:0"), F.one_hot(x[0].long()),
    ):  # fmt: skip
        assert made.device == GPU
    assert x.to("cuda") is x and x.cpu().device == CPU and x.to("cuda:1").device.index == 1
    assert torch.equal(x.cpu(), torch.arange(6.0).view(2, 3)) and x.tolist()[1] == [3, 4, 5]
    assert torch.empty(2, device="meta").device.type == "meta"
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()


def test_a_module_that_moves_keeps_its_parameters():
    net = nn.Linear(2, 3)
    before = list(net.parameters())
    net.to("cuda")
    assert all(a is b and a.is_cuda for a, b in zip(before, net.parameters(), strict=True))


def test_several_devices_are_refused():
    x = torch.ones(2, device="cuda")
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.full((2,), 2.0)), "but for a number"
    assert x[torch.tensor([0])].is_cuda, "and for indices"
    for wrong in (lambda: x + torch.ones(2), lambda: torch.cat([torch.ones(2), x]),
                  lambda: x + x.to("cuda:1"), lambda: F.linear(x, torch.ones(2, 2)),
                  lambda: torch.ones(2)[x.long()]):  # fmt: skip
        with pytest.raises(RuntimeError, match="on the same device"):
            wrong()


def test_a_generator_of_the_cpu_is_refused():
    seeded = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    a, b = (torch.randn(4, device="cuda", generator=generator) for generator in seeded)
    assert a.is_cuda and torch.equal(a, b)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(4, device="cuda", generator=torch.Generator())


def test_memory_of_the_cpu_is_refused_by_a_launch():
    x, levels = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        triton_kernels("quantize").quantize(x, False)
    launch = prepare_batch._load("cuda", "cuda")
    with pytest.raises(RuntimeError, match=r"ds_cuda_prepare_batch at .* memory of the CPU"):
        launch(levels.cuda(), torch.zeros(2, dtype=torch.int64), 0, torch.float32)
    with pytest.raises(ValueError, match=r"indices must be on cuda:0 as images is, not on cpu"):
        ops.prepare_batch(levels.cuda(), torch.zeros(2, dtype=torch.int64), 0)
    found, _ = ops.prepare_batch(levels.cuda(), torch.zeros(2, dtype=torch.int64).cuda(), 0)
    assert torch.equal(found.cpu(), torch.full((2, 3, 4, 4), -1.0))


def test_memory_of_another_gpu_is_refused_by_a_launch():
    x = torch.zeros(2, 3, 4, 4, device="cuda:1")
    with pytest.raises(RuntimeError, match=r"_quantize_kernel runs on cuda:0 .* cuda:1"):
        triton_kernels("quantize").quantize(x, False)
    assert ops.quantize(x).cpu().eq(128).all(), "ops choose the GPU of their tensors"


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.cpu(), lambda x: x[x > 0],
        lambda x: x.nonzero(), lambda x: x.unique(), lambda x: x.add_(torch.ones(3).cuda()),
        lambda x: x.copy_(torch.ones(3)), lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x[torch.tensor([0])], lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(), lambda x: torch.ones(3).pin_memory(),
        lambda x: torch.cuda.Event().synchronize(), lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_what_waits_is_refused_while_a_graph_is_captured(captured, work):
    x = torch.ones(3, device="cuda")
    work(x.clone())
    with pytest.raises(RuntimeError, match=WAITS):
        captured(lambda: work(x))
    work(x.clone())  # and the capture has ended


def test_a_graph_works_when_it_is_replayed_and_on_the_same_memory(captured):
    x, pinned = torch.ones(3, device="cuda"), torch.full((3,), 5.0).pin_memory()
    outputs = []

    def work():
        y = x * torch.tensor(2.0)
        y += pinned.to("cuda", non_blocking=True)
        outputs.append(y)
        x.add_(1)

    graph = captured(work)
    assert x.cpu().eq(1).all(), "a capture does nothing"
    for n in range(3):
        with launches() as names:
            graph.replay()
        assert outputs[0].cpu().eq(2 * (n + 1) + 5).all()
        assert names == ["mul", "_to_copy", "add_", "add_"]


def test_work_on_another_gpu_is_refused_while_a_graph_is_captured(captured):
    """Without set_device a process captures on the first GPU, and its graph would hold nothing."""
    x = torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="work on cuda:1 while a graph is captured on cuda:0"):
        captured(lambda: x.add_(1))
    with torch.cuda.device(1):
        captured(lambda: x.add_(1)).replay()
    assert x.cpu().eq(2).all()


def test_a_loop_is_captured_where_its_engine_is():
    model = teacher()
    engine = Engine(model.net.to("cuda:1"), model.grid, images=2)
    loop = Loop(engine, Recurrence.of(teacher()))
    assert loop(torch.zeros(2, *engine.shape, device="cuda:1")).isfinite().all()


def test_another_thread_has_the_gpu_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda") * 2))
    thread.start()
    thread.join()
    assert found[0].is_cuda and found[0].cpu().eq(2).all()


def test_autocast_narrows_products_and_nothing_else():
    x = torch.randn(4, 4, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = F.linear(x, x)
        z = F.conv2d(x.view(1, 1, 4, 4), x.view(1, 1, 4, 4))
        assert (y.dtype, z.dtype, (y + y).dtype) == (torch.bfloat16,) * 3
        assert F.mse_loss(y, y).dtype == F.layer_norm(y, [4]).dtype == torch.float32
        assert (x * x).dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_division_by_a_number_is_multiplication():
    levels = torch.arange(256.0)
    assert torch.equal((levels.cuda() / 3).cpu(), levels * (1 / torch.tensor(3.0)))
    assert not torch.equal((levels.cuda() / 3).cpu(), levels / 3)
    assert torch.equal((levels.cuda() / torch.tensor(3.0).cuda()).cpu(), levels / 3)


def test_launches_are_counted():
    x = torch.randn(2, 16, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3, device="cuda")
    one = torch.ones(16, device="cuda")
    with torch.no_grad(), launches() as names:
        x.permute(0, 2, 3, 1).flatten(1)[:, :4].detach()
        torch.empty_like(x)
        assert names == [], "views and memory"
        F.conv2d(x, weight)
        F.conv2d(x, weight, one)
        F.pad(x, (0, 1))
        torch.cat([x, x], 1)
        ops.group_norm_silu(x, one, one, 4)
    assert names == ["convolution"] * 3 + ["constant_pad_nd"] * 2 + ["cat", "_fwd_kernel"]
    with ops.use_backend("cuda"), launches() as names:
        ops.group_norm_silu(x, one, one, 4)
    assert names == ["ds_cuda_group_norm_silu"] * 2, "sums, then the rest"
    unknown = pytest.raises(NotImplementedError, match=r"how many kernels does aten\.cumprod")
    with unknown, launches():
        x.cumprod(0)


def test_a_copy_of_the_state_of_a_run_comes_back(tmp_path):
    state = {"x": torch.ones(2, device="cuda"), "step": 3}
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", map_location="cuda", weights_only=True)
    assert loaded["step"] == 3 and torch.equal(loaded["x"], state["x"])
    assert loaded["x"].device == GPU


def test_a_triton_and_a_numpy_that_do_not_go_together_are_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.4.1")
    with pytest.raises(RuntimeError, match=r"pip install 'numpy<2\.4'"), rounding_as_a_gpu():
        pass
