"""Triton's interpreter, mended where it does not compute as a GPU does."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch


@contextmanager
def rounding_as_a_gpu():
    """Round float32 to the nearest bfloat16 and float8, and widen factors that are bfloat16.

    The interpreter cuts bfloat16 off, loses the carry of float8, passes its largest number and
    multiplies the bits of bfloat16 as integers. PTX ISA, cvt.rn and cvt.rn.satfinite.e4m3x2.f32.

    Raises:
        RuntimeError: this Triton and this NumPy do not go together.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}, "
            f"which makes no number of an array: pip install 'numpy<2.4'"
        )

    from ds import ops

    convert = interpreter._convert_float
    create_dot = interpreter.InterpreterBuilder.create_dot
    narrow = {
        tl.bfloat16: lambda x: x.to(torch.bfloat16).view(torch.uint16),
        tl.float8e4nv: lambda x: ops.to_float8(x).view(torch.uint8),
    }

    def rounded(x, source, to, mode):
        if source != tl.float32 or to not in narrow:
            return convert(x, source, to, mode)
        return narrow[to](torch.from_numpy(np.ascontiguousarray(x))).numpy().reshape(x.shape)

    def widened(self, a, b, *rest):
        if a.dtype == tl.bfloat16:
            a, b = (self.create_fp_ext(x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_convert_float", rounded)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
        yield
