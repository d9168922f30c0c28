"""gather_rows: the rows of torch.cat(parts)[indices] to the bit, for every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops

BACKENDS = ["reference", "cpu"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = [torch.uint8, torch.float16, torch.float32, torch.int64]


def parts_of(counts: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Parts whose numbers count up through all of them, modulo what the dtype holds exactly."""
    size = torch.Size(shape).numel()
    numbers = torch.arange(sum(counts) * size).remainder(251).to(dtype)
    return [*numbers.view(-1, *shape).split(counts)]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_parts_rows_and_dtypes(backend, data):
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    shape = data.draw(st.sampled_from([(), (1,), (7,), (3, 2, 5), (65, 3)]))
    parts = parts_of(counts, shape, data.draw(st.sampled_from(DTYPES)))
    one = st.integers(0, sum(counts) - 1)
    wanted = data.draw(st.lists(one, max_size=20)) if sum(counts) else []
    indices = torch.tensor(wanted, dtype=torch.int64)
    with ds.ops.use_backend(backend):
        found = ds.ops.gather_rows(indices, parts)
    expected = torch.cat(parts)[indices]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@both_backends
def test_strided_parts_and_indices(backend):
    parts = [torch.arange(60).view(5, 3, 4).transpose(1, 2), torch.arange(48).view(4, 4, 3)[::2]]
    indices = torch.tensor([6, 0, 4, 1, 5, 3])[::2]
    with ds.ops.use_backend(backend):
        assert torch.equal(ds.ops.gather_rows(indices, parts), torch.cat(parts)[indices])


@both_backends
def test_the_rows_are_a_copy(backend):
    part = torch.zeros(3, 2)
    with ds.ops.use_backend(backend):
        ds.ops.gather_rows(torch.arange(3), [part]).fill_(1)
    assert not part.any()


@both_backends
def test_opcheck(backend):
    arguments = torch.tensor([4, 0, 2]), parts_of([2, 3], (4,), torch.float32)
    with ds.ops.use_backend(backend):
        torch.library.opcheck(torch.ops.ds.gather_rows.default, arguments)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(index):
    parts = parts_of([2, 3], (4,), torch.uint8)
    with pytest.raises(ValueError, match=rf"gather_rows: indices must lie in 0 .. 4, not {index}"):
        ds.ops.gather_rows(torch.tensor([0, index]), parts)


def test_errors_name_what_does_not_fit():
    a, b = parts_of([2, 3], (4,), torch.uint8)
    rows = torch.tensor([0])
    with pytest.raises(ValueError, match=r"gather_rows: indices must be int64, not torch.int32"):
        ds.ops.gather_rows(rows.int(), [a, b])
    with pytest.raises(ValueError, match=r"parts\[1\] must be torch.uint8 as parts\[0\] is"):
        ds.ops.gather_rows(rows, [a, b.float()])
    with pytest.raises(ValueError, match=r"parts\[1\] must be \[_, 4\], not of shape \[3, 3\]"):
        ds.ops.gather_rows(rows, [a, b[:, :3]])
    with pytest.raises(ValueError, match=r"gather_rows: needs at least one part"):
        ds.ops.gather_rows(rows, [])
