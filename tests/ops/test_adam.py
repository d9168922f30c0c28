"""adam_step as everybody calls it: the optimisers of torch.optim, its errors, the compiler."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ds.ops
from ds.ops import adam
from tests.cuda import test_adam as kernels

SHAPES = [(3, 5), (16, 3, 3, 3), (), (7,)]


def zeros():
    return [torch.zeros(shape) for shape in SHAPES]


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("max_norm", [math.inf, 3.0], ids=["free", "clipped"])
def test_it_steps_as_torch_optim_does(decoupled, max_norm):
    torch.manual_seed(0)
    params = [torch.randn(shape) for shape in SHAPES]
    averages = [param.clone() for param in params]
    theirs = [param.clone().requires_grad_() for param in params]
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        theirs, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.02
    )
    expected = [param.clone() for param in params]
    state, step, lr = (zeros(), zeros()), torch.zeros(()), torch.tensor(1e-2)
    for _ in range(6):
        grads = [torch.randn(shape) for shape in SHAPES]
        norm = ds.ops.adam_step(
            params,
            grads,
            *state,
            step=step,
            lr=lr,
            betas=(0.9, 0.98),
            weight_decay=0.02,
            decoupled=decoupled,
            averages=averages,
            ema_decay=0.9,
            max_norm=max_norm,
        )
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        optimizer.step()
        torch._foreach_lerp_(expected, [param.detach() for param in theirs], 0.1)
    assert step == 6
    for a, b in zip([*params, *averages], [*theirs, *expected], strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=2e-7)


def test_weights_that_require_a_gradient_are_stepped_without_one():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.sum().backward()
    ds.ops.adam_step(
        [weight],
        [weight.grad],
        [torch.zeros(3)],
        [torch.zeros(3)],
        step=torch.zeros(()),
        lr=torch.tensor(0.1),
    )
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    assert weight.requires_grad and weight.is_leaf


def test_opcheck():
    lists = [[torch.randn(4), torch.randn(2, 3)] for _ in range(5)]
    copies = [torch.zeros(4).bfloat16(), torch.zeros(2, 3).bfloat16()]
    lists[3] = [tensor.square() for tensor in lists[3]]
    numbers = (0.9, 0.98, 1e-8, 0.1, True, 0.9, 1.0)
    arguments = (torch.tensor(1.0), torch.tensor(0.01), *lists, copies, *numbers)
    torch.library.opcheck(torch.ops.ds.adam_step.default, arguments)


def test_compiles_without_graph_breaks():
    def compute(function):
        params, grads = [torch.ones(5)], [torch.arange(5.0)]
        state = [torch.zeros(5)], [torch.zeros(5)]
        norm = function(params, grads, *state, step=torch.zeros(()), lr=torch.tensor(0.1))
        return norm, params[0], state[0][0]

    expected = compute(ds.ops.adam_step)
    compiled = torch.compile(ds.ops.adam_step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compute(compiled), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_weights_have_the_norm_zero():
    assert ds.ops.adam_step([], [], [], [], step=torch.zeros(()), lr=torch.tensor(0.1)) == 0


def test_errors_name_what_does_not_fit():
    def step(params=(4,), grads=(4,), rate=None, **changed):
        tensors = ([torch.zeros(n) for n in sizes] for sizes in (params, grads, params, params))
        rate = torch.tensor(0.1) if rate is None else rate
        ds.ops.adam_step(*tensors, step=torch.zeros(()), lr=rate, **changed)

    with pytest.raises(ValueError, match=r"adam_step: 2 grads for 1 params"):
        step(grads=(4, 4))
    with pytest.raises(ValueError, match=r"adam_step: 2 averages for 1 params"):
        step(averages=[torch.zeros(4), torch.zeros(4)])
    with pytest.raises(
        ValueError, match=r"grads\[1\] must be \[5\] as params\[1\] is, not .*\[4\]"
    ):
        step(params=(4, 5), grads=(4, 4))
    with pytest.raises(ValueError, match=r"averages\[0\] must be on cpu as step is, not on meta"):
        step(averages=[torch.zeros(4, device="meta")])
    with pytest.raises(ValueError, match=r"averages\[0\] must be \[4\]"):
        step(averages=[torch.zeros(3)])
    with pytest.raises(ValueError, match=r"lr must be \[\], not of shape \[1\]"):
        step(rate=torch.zeros(1))
    with pytest.raises(ValueError, match=r"betas\[1\] must lie in \[0, 1\), not 1.0"):
        step(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), not -1"):
        step(ema_decay=-1)
    with pytest.raises(ValueError, match=r"max_norm must be above 0, not nan"):
        step(max_norm=math.nan)


def test_the_reference_serves_float64():
    lists = [[torch.ones(3, dtype=torch.float64)] for _ in range(4)]
    numbers = (0.9, 0.98, 1e-8, 0.0, False, 0.9, math.inf)
    adam.reference(torch.tensor(1.0), torch.tensor(0.1), *lists, [], [], *numbers)
    m, v = 0.9 + 0.1, 0.98 + 0.02
    expected = 1 - 0.1 / 0.1 * m / (math.sqrt(v) / math.sqrt(0.02) + 1e-8)
    torch.testing.assert_close(
        lists[0][0], torch.full((3,), expected, dtype=torch.float64), rtol=1e-7, atol=0
    )


# The kernel for CPUs, held to what the CUDA kernels are held to.


@pytest.fixture
def kernel(instructions):
    return adam._op._load("cpu", "cpu")


@kernels.every_rule
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_as_exact_as_pytorchs(kernel, changed, grad_dtype):
    kernels.check(
        kernel, kernels.state(kernels.SHAPES, "cpu", grad_dtype=grad_dtype), "cpu", **changed
    )


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40) | st.integers(16380, 16390), max_size=6),
    offset=st.integers(0, 3),
    max_norm=st.sampled_from([math.inf, 1.0]),
)
def test_any_size_and_alignment(sizes, offset, max_norm):
    lists = kernels.state([(size + offset,) for size in sizes], "cpu")
    lists = {name: [tensor[offset:] for tensor in tensors] for name, tensors in lists.items()}
    kernels.check_in_place(adam._op._load("cpu", "cpu"), lists, "cpu", max_norm)


def test_the_norm_is_that_of_float64(kernel):
    lists = kernels.state([(300_000,), (7,)], "cpu")
    lists["grads"][0] += 1000
    exact = torch.cat(lists["grads"]).double().norm()
    assert kernels.advance(kernel, lists, "cpu") == exact.float()


@pytest.mark.parametrize("max_norm", [math.inf, 2.0])
def test_threads_move_no_bit(max_norm):
    lists = kernels.state([*kernels.SHAPES, (100_000,)], "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mine = kernels.clone(lists)
            norm = kernels.advance(adam._op._load("cpu", "cpu"), mine, "cpu", max_norm=max_norm)
            results.append([norm, *(tensor for name in kernels.LISTS for tensor in mine[name])])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_gradients_stay_and_may_have_any_layout(kernel):
    lists = kernels.state([(8, 4, 3, 3)], "cpu")
    lists["grads"] = [lists["grads"][0].contiguous(memory_format=torch.channels_last)]
    before = lists["grads"][0].clone()
    kernels.check(kernel, lists, "cpu", max_norm=1.0)
    kernels.advance(kernel, lists, "cpu", max_norm=1.0)
    assert torch.equal(lists["grads"][0], before)


def test_what_the_kernel_does_not_take_it_leaves_to_the_reference():
    kernels.test_what_it_does_not_take_it_leaves_to_others(adam._op._load("cpu", "cpu"), "cpu")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients_spread(kernel, bad):
    kernels.test_bad_gradients_spread_as_in_pytorch(kernel, "cpu", bad, 2.0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_averages_and_copies_may_be_those_of_the_first_params(backend):
    lists = kernels.state([(5,), (6,), (7,)], "cpu")
    full, fewer = kernels.clone(lists), kernels.clone(lists)
    fewer |= {"averages": fewer["averages"][:2], "copies": fewer["copies"][:1]}
    kernel = adam._op._load("cpu", backend)
    for some in (full, fewer):
        kernels.advance(kernel, some, "cpu", max_norm=2.0)
    for name in kernels.LISTS:
        for a, b in zip(fewer[name], full[name], strict=False):
            assert torch.equal(a, b), name
