"""The Triton kernel of noise: its integers to the bit, its normals against float64.

The interpreter cuts float32 off to bfloat16 where a GPU rounds.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton (pip install --no-deps triton)")

import triton
import triton.language as tl

from ds import ops
from ds.ops.dispatch.op import Unsupported
from ds.ops.kernels import noise as kernels
from ds.ops.noise import _op, philox
from tests.kernels import DEVICE
from tests.ops.test_noise import INDICES, KNOWN, WORDS, assert_normal
from tests.oracle import poison

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)


def run(indices, seed, size, dtype=torch.float32):
    return _op._load("cuda", "triton")(indices.to(DEVICE), seed, size, dtype).cpu()


@triton.jit
def _philox_kernel(words_ptr, BLOCKS: tl.constexpr):
    """Replace each column of words [6, BLOCKS], a counter and a key, by Philox's four words."""
    at = words_ptr + tl.arange(0, BLOCKS)
    c0 = tl.load(at).to(tl.uint32)
    c1 = tl.load(at + BLOCKS).to(tl.uint32)
    c2 = tl.load(at + 2 * BLOCKS).to(tl.uint32)
    c3 = tl.load(at + 3 * BLOCKS).to(tl.uint32)
    k0 = tl.load(at + 4 * BLOCKS).to(tl.uint32)
    k1 = tl.load(at + 5 * BLOCKS).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox_impl(c0, c1, c2, c3, k0, k1)
    tl.store(at, r0.to(tl.int64))
    tl.store(at + BLOCKS, r1.to(tl.int64))
    tl.store(at + 2 * BLOCKS, r2.to(tl.int64))
    tl.store(at + 3 * BLOCKS, r3.to(tl.int64))


def integers(words):
    """Run Philox on int64 words [6, BLOCKS]."""
    words = words.to(DEVICE)
    _philox_kernel[(1,)](words, BLOCKS=words.shape[1])
    return words[:4].cpu()


@pytest.mark.parametrize(("given", "expected"), KNOWN.items(), ids=["zeros", "ones", "pi"])
def test_the_known_answers_of_random123(given, expected):
    assert integers(torch.tensor(given)[:, None].repeat(1, 2))[:, 1].tolist() == list(expected)


def test_the_integers_are_those_of_the_reference():
    words = torch.randint(0, 2**32, (6, 64), generator=torch.Generator().manual_seed(0))
    words[4:] = words[4:, :1]
    expected = torch.stack(philox(tuple(words[:4]), tuple(words[4:, 0].tolist())))
    assert torch.equal(integers(words), expected)


@every_dtype
def test_many_normals_are_those_of_float64(dtype, monkeypatch):
    if DEVICE == "cpu":  # large tiles, with which the interpreter is quick, and a compiler is not
        monkeypatch.setattr(kernels, "BLOCKS", 16384)
    indices = torch.arange(2**40, 2**40 + 2)
    assert_normal(run(indices, -7, 65537, dtype), indices, -7, rounding=1.0)


@settings(max_examples=15, deadline=None)
@given(
    seed=WORDS,
    indices=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=2),
    size=st.one_of(st.integers(0, 40), st.integers(1020, 1030)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    step=st.integers(1, 2),
)
def test_any_seed_index_and_size(seed, indices, size, dtype, step):
    indices = torch.tensor(indices, dtype=torch.int64)[::step]
    seed -= 2**63
    z = run(indices, seed, size, dtype)
    assert z.shape == (len(indices), size)
    if z.numel():
        assert_normal(z, indices, seed, rounding=1.0)


@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32, -1, -(2**63)])
def test_seeds_of_special_bits(seed):
    assert_normal(run(INDICES[2:3], seed, 5), INDICES[2:3], seed)


def test_bits_depend_on_neither_batch_order_size_nor_repetition():
    indices = INDICES[1:4]
    whole = run(indices, 1, 1203)
    assert torch.equal(run(indices, 1, 1203), whole)
    assert torch.equal(run(indices.flip(0), 1, 1023), whole.flip(0)[:, :1023])
    assert torch.equal(run(indices[2:], 1, 1203), whole[2:])


def test_every_element_is_written(monkeypatch):
    expected = run(INDICES[:2], 1, 1031)
    poison(monkeypatch)
    assert torch.equal(run(INDICES[:2], 1, 1031), expected)


def test_a_program_writes_its_own_tile_and_nothing_else():
    """The interpreter runs programs in turn and would hide that one writes into the next one's."""
    z = torch.full((2, 150), torch.nan, device=DEVICE)
    kernels._noise_kernel[(2,)](INDICES.to(DEVICE), z, 150, 3, 1, 0, BLOCKS=16)
    assert not z[0, :128].isnan().any()
    assert z[0, 128:].isnan().all() and z[1].isnan().all()


def test_what_it_does_not_take_it_leaves_to_others():
    with pytest.raises(Unsupported, match=r"not torch.float64"):
        run(INDICES, 1, 5, torch.float64)


@pytest.mark.gpu
def test_the_op_runs_it_on_a_gpu():
    assert torch.equal(ops.noise(1, INDICES.cuda(), (9,)).cpu(), run(INDICES, 1, 9))
