"""noise against float64 and against published integers, for every backend and data type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops
from ds.ops import _native
from ds.ops.noise import philox, reference, signed
from tests.oracle import poison

WORDS = st.integers(0, 2**64 - 1)
PI_WORDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
# Counter and key, and the words that Random123 gives for them.
KNOWN = {
    (0,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (2**32 - 1,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    PI_WORDS: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
INDICES = torch.tensor([5, 0, 2**32 + 1, 3, -(2**63), -1, 17])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
both_backends = pytest.mark.parametrize("backend", ["reference", "cpu"])
cpu = pytest.mark.parametrize("backend", ["cpu"])


def assert_normal(z: Tensor, indices: Tensor, seed: int, rounding: float = 0.5) -> None:
    """Allow 4 * 2**-23 of the float64 normals, what those may be off, and a rounding to z's dtype.

    The angle of the float64 normals, up to 2 pi, is rounded to 9e-16, and the radius is at most
    6.7.
    """
    exact = reference(indices, seed, z[0].numel(), torch.float64).view(z.shape)
    relative, absolute = 4 * 2**-23, 1e-14
    if z.dtype != torch.float32:
        relative += rounding * torch.finfo(z.dtype).eps
        absolute += rounding * torch.finfo(z.dtype).smallest_normal * torch.finfo(z.dtype).eps
    assert ((z.double() - exact).abs() <= relative * exact.abs() + absolute).all()


def cpp_philox(counter, key) -> tuple[int, ...]:
    words = torch.tensor([*counter, *key], dtype=torch.uint32)
    _native.cpu_library().ds_philox(words.data_ptr())
    return tuple(words[:4].tolist())


@cpu
@pytest.mark.parametrize(("given", "expected"), KNOWN.items(), ids=["zeros", "ones", "pi"])
def test_the_known_answers_of_random123(backend, given, expected, instructions):
    assert cpp_philox(given[:4], given[4:]) == expected


@cpu
@settings(max_examples=50, deadline=None)
@given(counter=st.tuples(*[st.integers(0, 2**32 - 1)] * 4), key=WORDS)
def test_the_integers_are_those_of_the_reference(backend, counter, key):
    key = key & 0xFFFFFFFF, key >> 32
    assert cpp_philox(counter, key) == tuple(map(int, philox(counter, key)))


@cpu
@every_dtype
def test_a_million_normals_are_those_of_float64(backend, dtype, instructions):
    indices = torch.arange(2**40, 2**40 + 64)
    with ds.ops.use_backend(backend):
        assert_normal(ds.ops.noise(7, indices, (3, 73, 73), dtype), indices, 7)


@cpu
@settings(max_examples=60, deadline=None)
@given(
    seed=WORDS,
    indices=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    size=st.one_of(st.integers(0, 40), st.integers(1020, 1030), st.integers(2040, 2060)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    step=st.integers(1, 2),
)
def test_any_seed_index_and_size(backend, seed, indices, size, dtype, step):
    indices = torch.tensor(indices, dtype=torch.int64)[::step]
    with ds.ops.use_backend(backend):
        z = ds.ops.noise(seed, indices, (size,), dtype)
    assert z.shape == (len(indices), size)
    if z.numel():
        assert_normal(z, indices, seed - 2**64 if seed >= 2**63 else seed)


@cpu
def test_bfloat16_is_the_float32_normal_rounded(backend, instructions):
    with ds.ops.use_backend(backend):
        wide, narrow = (
            ds.ops.noise(1, INDICES, (5, 211), d) for d in (torch.float32, torch.bfloat16)
        )
    assert torch.equal(narrow, wide.bfloat16())


@both_backends
@every_dtype
def test_bits_depend_on_neither_batch_order_size_nor_repetition(backend, dtype):
    with ds.ops.use_backend(backend):
        whole = ds.ops.noise(1, INDICES, (1203,), dtype)
        assert torch.equal(ds.ops.noise(1, INDICES, (1203,), dtype), whole)
        assert torch.equal(ds.ops.noise(1, INDICES.flip(0), (1203,), dtype), whole.flip(0))
        assert torch.equal(ds.ops.noise(1, INDICES, (1023,), dtype), whole[:, :1023])
        for i in range(len(INDICES)):
            alone = ds.ops.noise(1, INDICES[i : i + 1], (1203,), dtype)
            assert torch.equal(alone, whole[i : i + 1])


@cpu
def test_bits_do_not_depend_on_threads(backend):
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            with ds.ops.use_backend(backend):
                results.append(ds.ops.noise(1, torch.arange(16), (3, 50, 50)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@both_backends
@every_dtype
def test_every_element_is_written(backend, dtype, monkeypatch):
    with ds.ops.use_backend(backend):
        expected = ds.ops.noise(1, INDICES, (1031,), dtype)
        poison(monkeypatch)
        assert torch.equal(ds.ops.noise(1, INDICES, (1031,), dtype), expected)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_fall_to_the_reference(backend, dtype):
    z = ds.ops.noise(1, INDICES, (3, 5), dtype)
    assert torch.equal(z, reference(INDICES, 1, 15, dtype).view(7, 3, 5))
    if backend == "cpu":
        with ds.ops.use_backend(backend), pytest.raises(RuntimeError, match="float32 or bfloat16"):
            ds.ops.noise(1, INDICES, (3, 5), dtype)


@both_backends
def test_opcheck(backend):
    with ds.ops.use_backend(backend):
        torch.library.opcheck(torch.ops.ds.noise.default, (INDICES, -3, 9, torch.float32))


@both_backends
def test_compiles_without_graph_breaks(backend):
    def draw(indices):
        return ds.ops.noise(2**63 + 1, indices + 1, (2, 5)) * 2

    with ds.ops.use_backend(backend):
        compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(INDICES), draw(INDICES))


def test_errors_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"noise: seed must lie in 0 .. 2\*\*64 - 1, not -1"):
        ds.ops.noise(-1, INDICES, (1,))
    with pytest.raises(ValueError, match=r"noise: indices must be int64, not torch.int32"):
        ds.ops.noise(1, INDICES.int(), (1,))
    with pytest.raises(ValueError, match=r"noise: dtype must be floating point, not torch.int64"):
        ds.ops.noise(1, INDICES, (1,), torch.int64)


@pytest.mark.parametrize("value", [0, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_keeps_its_64_bits_as_a_signed_number(value):
    found = signed("noise", "seed", value)
    assert found % 2**64 == value and -(2**63) <= found < 2**63
    assert ds.ops.noise(value, torch.tensor([0]), (2,)).isfinite().all()


@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_seed_of_more_than_64_bits_is_refused(value):
    with pytest.raises(ValueError, match=rf"noise: seed must lie in 0 .. 2\*\*64 - 1, not {value}"):
        signed("noise", "seed", value)
