"""What the tests of several kernels need."""

import pytest


@pytest.fixture(scope="module")
def products_of_bfloat16():
    """Make the interpreter widen factors of bfloat16, whose bits it would multiply as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) for x in (a, b))
        return create_dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
        yield
