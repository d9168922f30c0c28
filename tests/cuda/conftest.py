"""The CUDA kernels run on the CPU, one thread after another, and on the GPU where there is one."""

import pytest

from ds.ops import _native

FORWARDS, BACKWARDS = 1, 2


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)
def device(request):
    if not _native.build_info("cuda")["built"]:
        pytest.skip(f"libds_cuda.so is not built: {_native.build_info('cuda')['reason']}")
    lib = _native.cuda_library()
    lib.ds_cuda_interpret(FORWARDS if request.param == "cpu" else 0)
    yield request.param
    lib.ds_cuda_interpret(0)


@pytest.fixture
def in_both_orders(device):
    """Return a function that calls another twice, the second time with threads the other way."""

    def both(compute):
        first = compute()
        if device == "cuda":
            return first, compute()
        lib = _native.cuda_library()
        lib.ds_cuda_interpret(BACKWARDS)
        try:
            return first, compute()
        finally:
            lib.ds_cuda_interpret(FORWARDS)

    return both
