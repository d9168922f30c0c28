"""quantize and dequantize: the formulas to the bit, for every backend, data type and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds.ops

LAST = torch.channels_last
BACKENDS = ["reference", "cpu"]
ROUNDINGS = ["round", "floor"]
every_case = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *[("reference", d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)],
        *[("cpu", d) for d in (torch.bfloat16, torch.float32)],
    ],
)
both_roundings = pytest.mark.parametrize("rounding", ROUNDINGS)


def values(shape, dtype, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(x: Tensor, rounding: str) -> Tensor:
    """Compute in PyTorch, with its own rounding of product and sum."""
    x = x.double() if x.dtype == torch.float64 else x.float()
    levels = x.clamp(-1, 1) * 127.5 + 127.5
    levels = levels.round() if rounding == "round" else levels.floor()
    return levels.nan_to_num(0).to(torch.uint8).movedim(1, -1)


def border(dtype) -> Tensor:
    """The values where one level gives way to the next, and their neighbors on both sides."""
    middle = ((torch.arange(511, dtype=torch.float64) / 2 - 127.5) / 127.5).to(dtype)
    up, down = torch.tensor(9.0, dtype=dtype), torch.tensor(-9.0, dtype=dtype)
    return torch.cat([middle, middle.nextafter(up), middle.nextafter(down)]).view(1, 3, -1, 1)


@every_case
@both_roundings
def test_levels_at_their_borders(backend, dtype, rounding):
    wide = torch.promote_types(dtype, torch.float32)
    x = border(dtype if dtype != torch.float16 else torch.float32).to(dtype)
    with ds.ops.use_backend(backend):
        levels = ds.ops.quantize(x, rounding)
    assert torch.equal(levels, formula(x.to(wide), rounding))


@pytest.mark.parametrize("backend", ["cpu"])
@both_roundings
def test_every_instruction_set_gives_the_same_levels(backend, rounding, instructions):
    x = torch.cat([border(torch.float32), values((4, 3, 511, 1), torch.float32)])
    for layout in (torch.contiguous_format, LAST):
        laid = x.contiguous(memory_format=layout)
        with ds.ops.use_backend(backend):
            assert torch.equal(ds.ops.quantize(laid, rounding), formula(x, rounding))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 3), st.integers(1, 5), st.integers(0, 40), st.sampled_from([1, 2, 7, 33])
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    view=st.sampled_from(["nchw", "nhwc", "channel slice", "step", "transposed"]),
    rounding=st.sampled_from(ROUNDINGS),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_strides(backend, shape, dtype, view, rounding):
    images, channels, height, width = shape
    x = values((images, channels + 2, height, 2 * width), dtype)
    x = {
        "nchw": lambda: x[:, :channels].contiguous(),
        "nhwc": lambda: x[:, :channels].contiguous(memory_format=LAST),
        "channel slice": lambda: x.contiguous(memory_format=LAST)[:, 1 : 1 + channels],
        "step": lambda: x[:, :channels, :, ::2],
        "transposed": lambda: x[:, :channels].transpose(2, 3),
    }[view]()
    with ds.ops.use_backend(backend):
        levels = ds.ops.quantize(x, rounding)
    assert levels.is_contiguous()
    assert torch.equal(levels, formula(x, rounding))


@every_case
@both_roundings
def test_what_lies_outside_is_clipped_and_nan_is_zero(backend, dtype, rounding):
    bad = [float("nan"), -float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 0.0, 1.0, -1.0]
    x = torch.tensor(bad, dtype=dtype).view(1, 1, -1)
    zero = 128 if rounding == "round" else 127
    with ds.ops.use_backend(backend):
        levels = ds.ops.quantize(x, rounding).flatten().tolist()
    assert levels == [0, 0, 255, 0, 255, 0, zero, 255, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_depend_on_neither_repetition_nor_threads(backend):
    x = values((5, 3, 61, 67), torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, LAST):
                laid = x.contiguous(memory_format=layout)
                with ds.ops.use_backend(backend):
                    assert torch.equal(ds.ops.quantize(laid), formula(x, "round"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_level_is_written_and_nothing_else(backend, monkeypatch):
    """Memory that holds other levels before, and bounds of it that must keep theirs."""
    x = values((2, 3, 11, 7), torch.float32)
    empty = torch.empty
    for before in (1, 254):
        kept = []

        def within(shape, before=before, kept=kept, **kwargs):
            kept.append(empty(2 * 64 + torch.Size(shape).numel(), **kwargs).fill_(before))
            return kept[0][64:-64].view(shape)

        monkeypatch.setattr(torch, "empty", within)
        with ds.ops.use_backend(backend):
            levels = ds.ops.quantize(x)
        monkeypatch.undo()
        assert torch.equal(levels, formula(x, "round"))
        for memory in kept:
            assert (memory[:64] == before).all() and (memory[-64:] == before).all()


def test_every_level_survives_the_round_trip_in_every_shape():
    images = torch.arange(256, dtype=torch.uint8).view(2, 16, 4, 2)
    x = ds.ops.dequantize(images)
    assert x.shape == (2, 2, 16, 4) and x.is_contiguous(memory_format=LAST)
    assert torch.equal(x.double(), (images.movedim(-1, 1).float() / 127.5 - 1).double())
    assert torch.equal(ds.ops.quantize(x), images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    with ds.ops.use_backend(backend):
        for x in (values((2, 3, 5, 4), torch.float32), values((2, 3), torch.bfloat16)):
            torch.library.opcheck(torch.ops.ds.quantize.default, (x, False))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    x = values((2, 3, 5, 4), torch.float32)
    with ds.ops.use_backend(backend):
        compiled = torch.compile(
            lambda x: ds.ops.quantize(x / 2, "floor"), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(x), formula(x / 2, "floor"))


def test_errors_name_what_does_not_fit():
    with pytest.raises(
        ValueError, match="quantize: rounding must be one of round, floor, not 'up'"
    ):
        ds.ops.quantize(torch.zeros(1, 1), "up")
    with pytest.raises(ValueError, match=r"quantize: x must be floating point .* not torch.int64"):
        ds.ops.quantize(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must be \[N, C, ...\], not of shape \[3\]"):
        ds.ops.quantize(torch.zeros(3))
