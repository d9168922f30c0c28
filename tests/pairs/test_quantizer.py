"""How samples are stored, and that one bad number among many stops them."""

import re
from typing import get_args

import pytest
import torch

from ds.pairs.quantizer import Quantizer, dequantize, quantize, row_of

QUANTIZERS = get_args(Quantizer)
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


@every_quantizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 11, 23])
def test_one_number_that_is_not_finite_stops_a_batch(quantizer, bad, where):
    x = torch.zeros(2, 3, 2, 2)
    x.view(-1)[where] = bad
    with pytest.raises(RuntimeError, match="numbers that are not finite"):
        quantize(x, quantizer)


@pytest.mark.parametrize("value", [65520.0, -1e5])
def test_one_number_beyond_float16_stops_a_batch(value):
    x = torch.zeros(2, 3, 2, 2)
    x[1, 2, 1, 0] = value
    with pytest.raises(RuntimeError, match=re.escape(f"reach {abs(value):.4g}, beyond float16")):
        quantize(x, "float16")
    assert quantize(x, "float32").abs().max() == abs(value)


@every_quantizer
def test_a_stored_row_has_its_channels_last_and_comes_back(quantizer):
    x = torch.arange(-12, 12).view(2, 3, 2, 2) / 16
    rows, row = quantize(x, quantizer), row_of(x.shape[1:], quantizer)
    assert rows.shape[1:] == row.shape == (2, 2, 3)
    assert rows.dtype == row.dtype and rows.is_contiguous()
    levels = {"round": 0.501, "floor": 1.001}.get(quantizer, 0) / 127.5
    assert (dequantize(rows) - x).abs().max() <= levels
