"""solver_update against float64, for every backend, number of terms, data type and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops

LAST = torch.channels_last
NARROW = torch.bfloat16
BACKENDS = ["reference", "cpu"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def drawn(shape, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(shape, dtypes, layout=torch.contiguous_format) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return a state, terms of the dtypes, and a table of five steps."""
    x = drawn(shape).contiguous(memory_format=layout)
    terms = [
        drawn(shape, dtype, 1 + i).contiguous(memory_format=layout)
        for i, dtype in enumerate(dtypes)
    ]
    return x, terms, drawn((5, 1 + len(dtypes)), seed=9)


def assert_updated(x: Tensor, before: Tensor, terms: list[Tensor], row: Tensor) -> None:
    """Allow a float32 rounding of each product and of each sum."""
    products = [
        b * h.double() for b, h in zip(row.double().tolist(), [before, *terms], strict=True)
    ]
    sizes = sum(product.abs() for product in products)
    assert ((x.double() - sum(products)).abs() <= len(products) * 2**-23 * sizes).all()


@both_backends
@pytest.mark.parametrize("step", [0, 4], ids=["first", "last"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("copied", [None, torch.float32, NARROW], ids=str)
def test_the_state_and_its_copy(backend, step, layout, copied):
    x, terms, table = case((3, 5, 21, 17), [NARROW, torch.float32], layout)
    before = x.clone()
    copy = None if copied is None else torch.full_like(x, torch.nan, dtype=copied)
    with ds.ops.use_backend(backend):
        ds.ops.solver_update(x, terms, table, torch.tensor(step), copy)
    assert_updated(x, before, terms, table[step])
    if copy is not None:
        assert torch.equal(copy, x.to(copied))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 3), st.integers(1, 4), st.integers(0, 40), st.sampled_from([1, 2, 13])
    ),
    dtypes=st.lists(st.sampled_from([torch.float32, NARROW]), max_size=4),
    layouts=st.tuples(*[st.sampled_from([torch.contiguous_format, LAST])] * 2),
    step=st.tuples(st.integers(0, 4), st.sampled_from([torch.int32, torch.int64])),
    copied=st.sampled_from([None, torch.float32, NARROW]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_terms_and_strides(backend, shape, dtypes, layouts, step, copied):
    """Terms may lie in another order than x, or be a part of something larger."""
    x, terms, table = case(shape, dtypes, layouts[0])
    terms = [term.contiguous(memory_format=layouts[1]) for term in terms]
    terms[:1] = [torch.cat([term, term], 1)[:, : shape[1]] for term in terms[:1]]
    before = x.clone()
    copy = None if copied is None else torch.full_like(x, torch.nan, dtype=copied)
    with ds.ops.use_backend(backend):
        ds.ops.solver_update(x, terms, table, torch.tensor([step[0]], dtype=step[1]), copy)
    assert_updated(x, before, terms, table[step[0]])
    if copy is not None:
        assert torch.equal(copy, x.to(copied))


@pytest.mark.parametrize("backend", ["cpu"])
def test_every_instruction_set_is_as_exact(backend, instructions):
    x, terms, table = case((2, 3, 41, 29), [NARROW])
    before, copy = x.clone(), torch.empty_like(x, dtype=NARROW)
    with ds.ops.use_backend(backend):
        ds.ops.solver_update(x, terms, table, torch.tensor(2), copy)
    assert_updated(x, before, terms, table[2])
    assert torch.equal(copy, x.to(NARROW))


@both_backends
def test_a_state_and_table_in_float64_keep_their_precision(backend):
    x, terms, table = case((2, 3, 4, 5), [torch.float64])
    x, table = x.double(), table.double()
    expected = table[1, 0] * x + table[1, 1] * terms[0]
    ds.ops.solver_update(x, terms, table, torch.tensor(1))
    torch.testing.assert_close(x, expected, rtol=1e-15, atol=1e-15)
    if backend == "cpu":
        with ds.ops.use_backend(backend), pytest.raises(RuntimeError, match="in float32"):
            ds.ops.solver_update(x, terms, table, torch.tensor(1))


@both_backends
def test_a_state_without_an_order_of_its_own(backend):
    """The default serves it; the kernel says that it does not."""
    wide, terms, table = case((2, 3, 4, 10), [torch.float32])
    before, x = wide.clone(), wide[..., ::2]
    arguments = [terms[0][..., ::2]], table, torch.tensor(1)
    ds.ops.solver_update(x, *arguments)
    assert_updated(x, before[..., ::2], arguments[0], table[1])
    assert torch.equal(wide[..., 1::2], before[..., 1::2])
    if backend == "cpu":
        with ds.ops.use_backend(backend), pytest.raises(RuntimeError, match="channels_last"):
            ds.ops.solver_update(x, *arguments)


@both_backends
@pytest.mark.parametrize("step", [-1, 5, 2**31 - 1])
def test_a_step_that_the_table_lacks_gives_nan(backend, step):
    x, terms, table = case((2, 3, 4, 5), [NARROW])
    copy = torch.zeros_like(x, dtype=NARROW)
    with ds.ops.use_backend(backend):
        ds.ops.solver_update(x, terms, table, torch.tensor(step), copy)
    assert x.isnan().all() and copy.isnan().all()


@both_backends
def test_nan_and_infinity_stay_where_they_are(backend):
    x, terms, table = case((1, 1, 1, 2500), [NARROW])
    before, table = x.clone(), table.abs() + 0.5
    x[..., 7], terms[0][..., 9], terms[0][..., 2000] = torch.nan, torch.inf, -torch.inf
    copy = torch.zeros_like(x, dtype=NARROW)
    with ds.ops.use_backend(backend):
        ds.ops.solver_update(x, terms, table, torch.tensor(0), copy)
    for result in (x, copy):
        assert result.isnan().nonzero()[:, 3].tolist() == [7]
        assert result.isposinf().nonzero()[:, 3].tolist() == [9]
        assert result.isneginf().nonzero()[:, 3].tolist() == [2000]
    keep = before[..., 10:2000]
    assert_updated(x[..., 10:2000], keep, [terms[0][..., 10:2000]], table[0])


@both_backends
def test_bits_depend_on_neither_batch_repetition_nor_threads(backend):
    x, terms, table = case((6, 3, 61, 47), [NARROW, torch.float32])
    step, results = torch.tensor(3), []
    threads = torch.get_num_threads()
    try:
        with ds.ops.use_backend(backend):
            for count in (1, 2, 2):
                torch.set_num_threads(count)
                results.append(x.clone())
                ds.ops.solver_update(results[-1], terms, table, step)
            alone = x[2:3].clone()
            ds.ops.solver_update(alone, [term[2:3] for term in terms], table, step)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(alone, results[0][2:3])


@both_backends
@pytest.mark.parametrize("copied", [True, False], ids=["copy", "no copy"])
def test_opcheck(backend, copied):
    x, terms, table = case((2, 3, 4, 5), [NARROW, torch.float32])
    copy = torch.zeros_like(x, dtype=NARROW) if copied else None
    with ds.ops.use_backend(backend):
        arguments = x, terms, table, torch.tensor(1), copy
        torch.library.opcheck(torch.ops.ds.solver_update.default, arguments)


@both_backends
def test_compiles_without_graph_breaks(backend):
    x, terms, table = case((2, 3, 4, 5), [NARROW])

    def three_steps(x, copy):
        x = x + 1
        for step in range(3):
            ds.ops.solver_update(x, terms, table, torch.tensor(step), copy)
        return x * 2

    copies = torch.zeros_like(x, dtype=NARROW), torch.zeros_like(x, dtype=NARROW)
    with ds.ops.use_backend(backend):
        compiled = torch.compile(three_steps, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, copies[0]), three_steps(x, copies[1]))
    assert torch.equal(*copies) and copies[0].any()


def test_errors_name_what_does_not_fit():
    x, terms, table = case((2, 3, 4, 5), [NARROW])
    step = torch.tensor(0)
    with pytest.raises(ValueError, match=r"x must be float32 or float64, not torch.bfloat16"):
        ds.ops.solver_update(x.bfloat16(), terms, table, step)
    with pytest.raises(ValueError, match=r"terms\[0\] must be \[2, 3, 4, 5\], not .*20"):
        ds.ops.solver_update(x, [terms[0].flatten(2)], table, step)
    with pytest.raises(ValueError, match=r"table must be \[5, 3\], not of shape \[5, 2\]"):
        ds.ops.solver_update(x, [*terms, *terms], table, step)
    with pytest.raises(ValueError, match=r"step must be int32 or int64, not torch.float32"):
        ds.ops.solver_update(x, terms, table, step.float())
    with pytest.raises(ValueError, match=r"terms needs a derivative, and there is none"):
        ds.ops.solver_update(x, [terms[0].requires_grad_()], table, step)
