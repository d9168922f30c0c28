"""Noise against published vectors, an implementation of its own in numpy, and statistics."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds import noise, ops
from ds.ops.noise import philox

words = st.integers(0, 2**64 - 1)
PI_WORDS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI_WORDS[:4], PI_WORDS[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_the_known_answers_of_random123(counter, key, expected):
    assert tuple(map(int, philox(counter, key))) == expected


def numpy_philox(counter, key):
    """Philox4x32-10 as in the paper, on arrays of uint64 that hold 32-bit words."""
    low = np.uint64(0xFFFFFFFF)
    x = [np.asarray(c, dtype=np.uint64) for c in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        first, second = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            (second >> np.uint64(32)) ^ x[1] ^ k[0],
            second & low,
            (first >> np.uint64(32)) ^ x[3] ^ k[1],
            first & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return x


def numpy_noise(seed, indices, shape):
    """The whole of ds.noise in float64, one block at a time."""
    size = math.prod(shape)
    rows = []
    for index in indices:
        row = []
        for block in range(-(-size // 4)):
            counter = (block, 0, index & 0xFFFFFFFF, index >> 32)
            r = numpy_philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
            u = [(float(word) + 0.5) / 2**32 for word in r]
            for first, second in (u[:2], u[2:]):
                radius = math.sqrt(-2 * math.log(first))
                row += [radius * math.cos(2 * math.pi * second)]
                row += [radius * math.sin(2 * math.pi * second)]
        rows.append(row[:size])
    return np.array(rows).reshape(len(indices), *shape)


@settings(max_examples=50, deadline=None)
@given(counter=st.tuples(*[st.integers(0, 2**32 - 1)] * 4), key=st.tuples(*[words] * 2))
def test_the_integers_are_those_of_numpy_to_the_bit(counter, key):
    key = tuple(k & 0xFFFFFFFF for k in key)
    assert list(map(int, philox(counter, key))) == list(map(int, numpy_philox(counter, key)))


@settings(max_examples=50, deadline=None)
@given(
    seed=words,
    indices=st.lists(words, min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
)
def test_the_normals_are_those_of_a_float64_box_muller(seed, indices, shape):
    found = noise(seed, indices, shape, dtype=torch.float64)
    # The angle, up to 2 pi, is rounded to 9e-16, and the radius is at most 6.7.
    np.testing.assert_allclose(found, numpy_noise(seed, indices, shape), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_of_the_reference_are_its_float64_normals_rounded_once(dtype):
    wide = noise(3, range(50), (7,), dtype=torch.float64)
    with ops.use_backend("reference"):
        assert torch.equal(noise(3, range(50), (7,), dtype=dtype), wide.to(dtype))


def test_float32_is_the_default():
    assert noise(0, [0], (1,)).dtype == torch.float32


SAMPLE = noise(12, range(64), (4096,), dtype=torch.float64)


@pytest.mark.parametrize(
    ("moment", "expected", "variance"),
    [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)],
    ids=["mean", "variance", "skewness", "kurtosis"],
)
def test_the_moments_are_normal(moment, expected, variance):
    # The raw moment of n normals deviates by sqrt((E z^2m - (E z^m)^2) / n).
    deviation = 5 * math.sqrt(variance / SAMPLE.numel())
    assert float((SAMPLE**moment).mean()) == pytest.approx(expected, abs=deviation)


def test_the_distribution_is_normal():
    assert scipy.stats.kstest(SAMPLE.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("position", range(4))
def test_each_of_a_block_s_four_elements_is_normal(position):
    assert scipy.stats.kstest(SAMPLE[:, position::4].flatten().numpy(), "norm").pvalue > 1e-3


NEIGHBOURS = {
    "indices": (SAMPLE[:-1], SAMPLE[1:]),
    "indices 2**32 apart": (SAMPLE[:8], noise(12, range(2**32, 2**32 + 8), (4096,))),
    "seeds": (SAMPLE, noise(13, range(64), (4096,))),
    "seeds 2**32 apart": (SAMPLE[:8], noise(12 + 2**32, range(8), (4096,))),
    "blocks": (SAMPLE[:, :-4], SAMPLE[:, 4:]),
    "seed and index": (SAMPLE[13], noise(13, [12], (4096,))[0]),
} | {
    f"elements {i} and {j} of a block": (SAMPLE[:, i::4], SAMPLE[:, j::4])
    for i, j in itertools.combinations(range(4), 2)
}


@pytest.mark.parametrize("power", [1, 2], ids=["values", "squares"])
@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_uncorrelated(pair, power):
    a, b = (x.double().flatten() ** power for x in NEIGHBOURS[pair])
    correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(len(a))


INDICES = [5, 0, 2**32 + 1, 3, 2**63, 2**64 - 1, 17]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_split_does_not_change_a_bit(batch, dtype):
    whole = noise(1, INDICES, (3, 5), dtype=dtype)
    parts = [noise(1, INDICES[i : i + batch], (3, 5), dtype=dtype) for i in range(0, 7, batch)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_permutation_of_the_indices_permutes_the_rows():
    assert torch.equal(noise(1, INDICES[::-1], (6,)), noise(1, INDICES, (6,)).flip(0))


def test_a_repeated_index_repeats_its_row():
    rows = noise(1, [4, 9, 4], (6,))
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("index", [2**32, 2**63, 2**64 - 1])
def test_the_high_half_of_an_index_counts(index):
    assert not torch.equal(noise(1, [index], (4,)), noise(1, [index % 2**32], (4,)))


def test_the_high_half_of_the_seed_counts():
    assert not torch.equal(noise(2**32, [0], (4,)), noise(0, [0], (4,)))


def test_a_tensor_of_indices_is_taken_as_its_bits():
    bits = torch.from_numpy(np.array(INDICES, dtype=np.uint64).view(np.int64))
    assert torch.equal(noise(1, bits, (4,)), noise(1, INDICES, (4,)))


@pytest.mark.parametrize("indices", [range(3), (i for i in range(3)), np.arange(3), (0, 1, 2)])
def test_indices_may_be_any_iterable_of_integers(indices):
    assert torch.equal(noise(1, indices, (4,)), noise(1, [0, 1, 2], (4,)))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_an_odd_size_is_the_beginning_of_a_longer_row(size):
    assert torch.equal(noise(1, [3], (size,)), noise(1, [3], (8,))[:, :size])


@pytest.mark.parametrize("shape", [(24,), (2, 3, 4), (1, 24, 1)])
def test_the_shape_only_arranges_the_elements(shape):
    assert torch.equal(noise(1, [3], shape).flatten(), noise(1, [3], (24,)).flatten())


@pytest.mark.parametrize(
    ("indices", "shape"), [([], (3,)), ([], ()), ([1, 2], (0,)), ([1, 2], (3, 0)), ([], (0,))]
)
def test_nothing_asked_is_nothing_drawn(indices, shape):
    assert noise(1, indices, shape).shape == (len(indices), *shape)


@pytest.mark.parametrize("value", [-1, 2**64])
def test_an_index_or_seed_beyond_64_bits_is_named(value):
    with pytest.raises(ValueError, match=rf"seed must lie in 0 .. 2\*\*64 - 1, not {value}"):
        noise(value, [0], (1,))
    with pytest.raises(ValueError, match=rf"index must lie in 0 .. 2\*\*64 - 1, not {value}"):
        noise(0, [value], (1,))


def test_a_fractional_index_is_not_rounded():
    with pytest.raises(TypeError, match="integer"):
        noise(0, [0.5], (1,))


@pytest.mark.parametrize(
    "indices", [torch.zeros(2, dtype=torch.int32), torch.zeros(2), torch.zeros(2, 2).long()]
)
def test_a_tensor_of_another_kind_is_refused(indices):
    with pytest.raises(ValueError, match=r"noise: indices must be (int64|\[N\]), not"):
        noise(0, indices, (1,))
