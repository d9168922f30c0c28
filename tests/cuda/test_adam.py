"""The step of Adam in CUDA and its reference: against float64, and against torch.optim."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops
from ds.ops import adam
from ds.ops.dispatch.op import Unsupported
from tests.oracle import poison

# Nothing, one element, ragged vectors, chunks of 8192 that end early, and a convolution.
SHAPES = [(0, 4), (), (7,), (5, 3), (8192,), (20001,), (64, 3, 3, 3)]
LISTS = "params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "copies"


@pytest.fixture(scope="module")
def run(device):
    """The kernel of the backend, as ds.ops calls it for a GPU."""
    return adam._op._load("cuda", "cuda")


def state(shapes, device, dtype=torch.float32, grad_dtype=torch.float32) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw():
        return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]

    lists = {name: draw() for name in LISTS}
    lists["grads"] = [grad.to(grad_dtype) for grad in lists["grads"]]
    lists["exp_avg_sqs"] = [v.square() for v in lists["exp_avg_sqs"]]
    lists["copies"] = [copy.bfloat16() for copy in lists["copies"]]
    return lists


def advance(kernel, lists, device, step=3, lr=1e-2, **changed) -> Tensor:
    numbers = {
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "decoupled": False,
        "ema_decay": 0.995,
        "max_norm": math.inf,
    } | changed
    scalars = [torch.tensor(float(value), device=device) for value in (step, lr)]
    return kernel(*scalars, *(lists[name] for name in LISTS), *numbers.values())


def clone(lists, dtype=None) -> dict[str, list[Tensor]]:
    return {
        name: [
            t.clone() if name == "copies" else t.to(dtype or t.dtype, copy=True) for t in tensors
        ]
        for name, tensors in lists.items()
    }


def check(kernel, lists, device, **changed) -> dict[str, list[Tensor]]:
    """Compare with float64: twice the error of PyTorch's functions, and two roundings."""
    exact, baseline, lists = clone(lists, torch.float64), clone(lists), clone(lists)
    norm_exact = advance(adam.reference, exact, device, **changed)
    norm_baseline = advance(adam.reference, baseline, device, **changed)
    norm = advance(kernel, lists, device, **changed)
    allowed = (norm_baseline - norm_exact).abs()
    assert (norm - norm_exact).abs() <= 2 * allowed + 1e-6 * norm_exact
    for name in LISTS:
        for actual, other, e in zip(lists[name], baseline[name], exact[name], strict=True):
            assert actual.dtype == other.dtype
            if name == "copies" or not e.numel():
                continue
            floor = 2 * torch.finfo(actual.dtype).eps * e.abs().max()
            error, allowed = (actual - e).abs().max(), (other - e).abs().max()
            assert error <= 2 * allowed + floor, (name, tuple(e.shape), error, allowed)
    for copy, param in zip(lists["copies"], lists["params"], strict=True):
        assert torch.equal(copy, param.bfloat16())
    return lists


every_rule = pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, id="adam"),
        pytest.param({"weight_decay": 0.1}, id="L2"),
        pytest.param({"weight_decay": 0.1, "decoupled": True}, id="adamw"),
        pytest.param({"max_norm": 2.0}, id="clipped"),
        pytest.param({"max_norm": 1e6}, id="not clipped"),
        pytest.param({"step": 1, "beta1": 0.0, "beta2": 0.0, "ema_decay": 0.0}, id="no memory"),
        pytest.param({"step": 100000, "beta1": 0.3, "ema_decay": 0.2}, id="late"),
    ],
)


@every_rule
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_as_exact_as_pytorchs(run, device, changed, grad_dtype):
    check(run, state(SHAPES, device, grad_dtype=grad_dtype), device, **changed)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40) | st.integers(8185, 8200), max_size=6),
    offset=st.integers(0, 3),
    max_norm=st.sampled_from([math.inf, 1.0]),
)
def test_any_size_and_alignment(run, device, sizes, offset, max_norm):
    lists = state([(size + offset,) for size in sizes], device)
    lists = {name: [tensor[offset:] for tensor in tensors] for name, tensors in lists.items()}
    check_in_place(run, lists, device, max_norm)


def check_in_place(run, lists, device, max_norm):
    expected = check(adam.reference, lists, device, max_norm=max_norm)
    advance(run, lists, device, max_norm=max_norm)
    for name in LISTS:
        for a, b in zip(lists[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if name != "copies" else 1e-2)


def test_more_tensors_than_one_launch_has_room_for(run, device):
    check(run, state([(i % 5, 3) for i in range(130)], device), device, max_norm=3.0)


@pytest.mark.parametrize("count", [0, 3])
def test_averages_and_copies_may_be_those_of_the_first_params(run, device, count):
    lists = state(SHAPES, device)
    expected = check(run, lists, device)
    fewer = {name: lists[name][:count] for name in ("averages", "copies")}
    advance(run, lists := lists | fewer, device)
    for name in ("params", *fewer):
        for a, b in zip(lists[name], expected[name], strict=name == "params"):
            assert torch.equal(a, b)


def test_channels_last_weights_are_stepped_in_place(run, device):
    lists = state([(8, 4, 3, 3)], device)
    nhwc = torch.channels_last
    lists = {
        name: [tensor.contiguous(memory_format=nhwc) for tensor in tensors]
        for name, tensors in lists.items()
    }
    expected = check(run, lists, device)["params"][0]
    lists["grads"] = [lists["grads"][0].contiguous()]
    assert torch.equal(check(run, lists, device)["params"][0], expected)


@pytest.mark.parametrize("max_norm", [math.inf, 2.0])
def test_bits_are_the_same_twice_in_any_order_of_threads(
    run, device, max_norm, in_both_orders, monkeypatch
):
    poison(monkeypatch)
    lists = state(SHAPES, device)

    def compute():
        mine = clone(lists)
        norm = advance(run, mine, device, max_norm=max_norm)
        return [norm, *(tensor for name in LISTS for tensor in mine[name])]

    for a, b in zip(*in_both_orders(compute), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_norm", [math.inf, 2.0])
def test_bad_gradients_spread_as_in_pytorch(run, device, bad, max_norm):
    lists = state([(5,), (6,)], device)
    lists["grads"][1][2] = bad
    ours, theirs = clone(lists), clone(lists)
    norm = advance(run, ours, device, max_norm=max_norm)
    expected = advance(adam.reference, theirs, device, max_norm=max_norm)
    assert torch.equal(norm.isnan(), expected.isnan())
    assert not norm.isfinite()
    for name in LISTS:
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()), name


def test_what_it_does_not_take_it_leaves_to_others(run, device):
    good = state([(4, 6)], device)
    gaps = [tensor[:, ::2] for tensor in good["params"]]
    for changed, reason in [
        ({"grads": [good["grads"][0].half()]}, "float32, or all in bfloat16"),
        ({"params": [good["params"][0].bfloat16()]}, "in float32, not"),
        ({"copies": [good["copies"][0].half()]}, "in bfloat16, not"),
        ({"averages": [good["averages"][0].t().contiguous().t()]}, "strides"),
        (dict.fromkeys(LISTS[:5], gaps) | {"copies": []}, "without gaps"),
    ]:
        with pytest.raises(Unsupported, match=reason):
            advance(run, good | changed, device)


@pytest.mark.gpu
def test_a_captured_step_reads_step_and_rate_anew():
    lists = state(SHAPES, "cuda")
    eager = clone(lists)
    step, rate = torch.zeros((), device="cuda"), torch.tensor(1e-2, device="cuda")

    def advance(lists):
        named = {name: lists[name] for name in ("averages", "copies")}
        ds.ops.adam_step(*(lists[name] for name in LISTS[:4]), step=step, lr=rate, **named)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        advance(clone(lists))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(lists)
    for new_rate in (1e-2, 3e-3):
        rate.fill_(new_rate)
        before = step.item()
        graph.replay()
        step.fill_(before)
        advance(eager)
    for name in LISTS:
        for a, b in zip(lists[name], eager[name], strict=True):
            assert torch.equal(a, b)
