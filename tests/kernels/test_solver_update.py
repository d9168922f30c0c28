"""The Triton kernel of solver_update against float64.

The interpreter cuts float32 off to bfloat16 where a GPU rounds: one unit in the last place.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

from ds import ops
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import solver_update as kernels
from ds.ops.solver_update import _op
from tests.kernels import DEVICE, DTYPES, NHWC
from tests.ops.test_solver_update import NARROW, assert_updated, case

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


def run(x, terms, table, step, copied=None):
    """Return the new state, and its copy of a dtype, leaving x alone."""
    x = x.to(DEVICE, copy=True)
    copy = None if copied is None else torch.full_like(x, torch.nan, dtype=copied)
    terms = [term.to(DEVICE) for term in terms]
    _op._load("cuda", "triton")(x, terms, table.to(DEVICE), torch.tensor(step).to(DEVICE), copy)
    return x.cpu(), None if copy is None else copy.cpu()


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 3), st.integers(1, 4), st.integers(0, 40), st.sampled_from([1, 2, 13])
    ),
    dtypes=st.lists(st.sampled_from(DTYPES), max_size=3),
    layouts=st.tuples(*[st.sampled_from([torch.contiguous_format, NHWC])] * 2),
    step=st.integers(0, 4),
    copied=st.sampled_from([None, *DTYPES]),
)
def test_any_shape_terms_and_strides(shape, dtypes, layouts, step, copied):
    x, terms, table = case(shape, dtypes, layouts[0])
    terms = [term.contiguous(memory_format=layouts[1]) for term in terms]
    after, copy = run(x, terms, table, step, copied)
    assert_updated(after, x, terms, table[step])
    if copy is not None:
        unit = torch.finfo(NARROW).eps if copied == NARROW and DEVICE == "cpu" else 0.0
        exact = after.to(copied).float()
        assert ((copy.float() - exact).abs() <= unit * exact.abs()).all()


@pytest.mark.parametrize("step", [-1, 5, 2**31 - 1])
def test_a_step_that_the_table_lacks_gives_nan(step):
    after, copy = run(*case((2, 3, 4, 5), [NARROW]), step, NARROW)
    assert after.isnan().all() and copy.isnan().all()


def test_nan_and_infinity_stay_where_they_are():
    x, terms, table = case((1, 1, 1, 2500), [NARROW])
    table = table.abs() + 0.5
    x[..., 7], terms[0][..., 9], terms[0][..., 2000] = torch.nan, torch.inf, -torch.inf
    for result in run(x, terms, table, 0, torch.float16):
        assert result.isnan().nonzero()[:, 3].tolist() == [7]
        assert result.isposinf().nonzero()[:, 3].tolist() == [9]
        assert result.isneginf().nonzero()[:, 3].tolist() == [2000]


def test_bits_depend_on_neither_batch_nor_repetition():
    x, terms, table = case((3, 3, 21, 27), [NARROW, torch.float32])
    whole, _ = run(x, terms, table, 3)
    assert torch.equal(run(x, terms, table, 3)[0], whole)
    alone, _ = run(x[1:2], [term[1:2] for term in terms], table, 3)
    assert torch.equal(alone, whole[1:2])


def test_a_program_updates_its_own_tile_and_nothing_else():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    x, terms, table = case((100,), [torch.float32])
    after, copy = x.to(DEVICE, copy=True), torch.full((100,), torch.nan, device=DEVICE)
    kernels._solver_update_kernel[(1,)](
        after,
        (terms[0].to(DEVICE),),
        table.to(DEVICE),
        torch.tensor([1]).to(DEVICE),
        copy,
        100,
        5,
        TERMS=1,
        COPY=True,
        BLOCK=64,
    )
    assert_updated(after[:64].cpu(), x[:64], [terms[0][:64]], table[1])
    assert torch.equal(after[64:].cpu(), x[64:])
    assert torch.equal(copy[:64], after[:64]) and copy[64:].isnan().all()


def test_what_it_does_not_take_it_leaves_to_others():
    x, terms, table = case((2, 3, 4, 10), [torch.float32])
    with pytest.raises(Unsupported, match="in float32"):
        run(x.double(), terms, table, 0)
    with pytest.raises(Unsupported, match="terms and copy in"):
        run(x, [terms[0].double()], table, 0)
    with pytest.raises(Unsupported, match="contiguous or channels_last"):
        launch = _op._load("cuda", "triton")
        launch(x[..., ::2], [terms[0][..., ::2]], table, torch.tensor(0), None)


@pytest.mark.gpu
def test_the_op_runs_it_on_a_gpu_and_a_graph_replays_it():
    x, terms, table = case((2, 3, 8, 8), [NARROW], NHWC)
    state, step = x.cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")
    network, coefficients = terms[0].cuda(), table.cuda()
    copy = torch.zeros_like(state, dtype=NARROW)
    ops.solver_update(state.clone(), [network], coefficients, step, copy)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.solver_update(state, [network], coefficients, step, copy)
        step += 1
    for _ in range(3):
        graph.replay()
    expected = x
    for i in range(3):
        expected, _ = run(expected, terms, table, i)
    assert torch.equal(state.cpu(), expected)
