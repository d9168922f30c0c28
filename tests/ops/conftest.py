"""What the tests of several ops need."""

import pytest

from ds.ops import _native


@pytest.fixture(autouse=True)
def built(request):
    """Skip tests of the backend "cpu" if its library is not built."""
    params = getattr(request.node, "callspec", None)
    if params and params.params.get("backend") == "cpu" and not _native.build_info()["built"]:
        pytest.skip(f"libds_cpu.so is not built: {_native.build_info()['reason']}")


@pytest.fixture(params=[0, 1, 2], ids=["portable", "avx2", "avx512"])
def instructions(request):
    """Limit the C++ kernels to an instruction set, and return its number."""
    limit = _native.cpu_library().ds_limit_simd
    if limit(request.param) != request.param:
        limit(3)
        pytest.skip("this processor does not have the instruction set")
    yield request.param
    limit(3)
