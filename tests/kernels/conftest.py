"""What the tests of several kernels need."""

import pytest

from tests.emulated.interpreter import rounding_as_a_gpu


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Let Triton's interpreter, where it runs the kernels, compute as a GPU does."""
    with rounding_as_a_gpu():
        yield


@pytest.fixture
def products_of_bfloat16(interpreter): ...


@pytest.fixture
def rounds_to_float8(interpreter): ...
