"""What the tests of several kernels need."""

import pytest


@pytest.fixture(scope="module")
def products_of_bfloat16():
    """Make the interpreter widen factors of bfloat16, whose bits it would multiply as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        if a.dtype != tl.float8e4nv:  # which it widens itself
            a, b = (self.create_fp_ext(x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
        yield


@pytest.fixture(scope="module")
def rounds_to_float8():
    """Let the interpreter round to float8 as a GPU does; its own carry is lost, and 448 is passed.

    PTX ISA, cvt.rn.satfinite.e4m3x2.f32.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    from ds import ops

    create = interpreter.InterpreterBuilder.create_fp_to_fp

    def rounded(self, x, to, mode):
        if to.scalar != tl.float8e4nv:
            return create(self, x, to, mode)
        narrow = ops.to_float8(torch.from_numpy(np.ascontiguousarray(x.data)))
        return interpreter.TensorHandle(narrow.view(torch.uint8).numpy(), tl.float8e4nv)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", rounded)
        yield
