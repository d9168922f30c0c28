"""Numbers of 8 bits: which one a number becomes, and what a weight keeps of itself."""

import pytest
import torch

from ds import ops
from ds.ops.dispatch.op import Unsupported
from ds.ops.float8 import FLOAT8, check_converts

BITS = torch.arange(256, dtype=torch.int16).to(torch.uint8)
FINITE = BITS.view(FLOAT8).double()
FINITE = FINITE[FINITE.isfinite()].unique()  # all there are, sorted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_number_becomes_the_nearest_there_is(dtype):
    spread = torch.logspace(-4, 3.5, 999, 10, dtype=torch.float64)
    x = torch.cat([spread, -spread, FINITE, (FINITE[1:] + FINITE[:-1]) / 2]).to(dtype)
    found = ops.to_float8(x).double()
    distances = (x.double()[:, None] - FINITE).abs()
    torch.testing.assert_close((x.double() - found).abs(), distances.amin(1), rtol=0, atol=0)


def test_what_is_too_large_becomes_the_largest_and_nan_stays():
    inf = float("inf")
    found = ops.to_float8(torch.tensor([449.0, 1e9, inf, -inf, float("nan")])).double()
    assert found[:4].tolist() == [448, 448, 448, -448]
    assert found[4].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_keeps_the_scale_of_each_of_its_rows(dtype):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weight *= torch.logspace(-6, 3, 6, dtype=dtype).view(-1, 1, 1, 1)
    narrow, scale = ops.float8_weight(weight)
    assert (narrow.dtype, scale.dtype) == (FLOAT8, torch.float32)
    assert narrow.double().flatten(1).abs().amax(1).tolist() == [448] * 6
    kept, largest = narrow.double() * scale.double().view(-1, 1, 1, 1), weight.double().abs()
    # half of the last of 4 bits, or of the smallest number there is
    allowed = largest / 16 + largest.amax((1, 2, 3), keepdim=True) / 448 * 2**-10
    assert ((kept - weight.double()).abs() <= 1.001 * allowed).all()


def test_a_row_of_zeros_stays_zero():
    narrow, scale = ops.float8_weight(torch.zeros(2, 3, 1, 1))
    assert narrow.float().eq(0).all()
    assert scale.isfinite().all()


def test_a_gpu_without_such_numbers_is_left_to_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(Unsupported, match=r"needs sm_89 or later, not sm_80"):
        check_converts(torch.device("cuda"))
    check_converts(torch.device("cpu"))
