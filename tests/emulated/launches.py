"""Count the kernels that a piece of code launches on the emulated GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Kernels of PyTorch's operations that are no views and not element by element, by the source of
# ATen's native/cuda. A copy or a fill of memory counts as a kernel. cuDNN's convolution and ATen's
# addition of a bias are two; what a library launches beside one kernel, nobody knows before.
_NONE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
_ONE = {
    "_adaptive_avg_pool2d", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_", "_foreach_mul_",
    "_foreach_norm", "_local_scalar_dense",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_mm", "_softmax", "_to_copy", "addmm",
    "all", "amax", "amin", "any", "arange", "argmax", "argmin", "avg_pool2d", "baddbmm", "bmm",
    "cat", "clone", "convolution_backward", "copy_", "cumsum", "fill", "fill_", "full", "full_like",
    "gather", "index", "index_select", "linalg_vector_norm", "max", "mean", "min", "mm", "mul",
    "native_layer_norm", "new_full", "new_ones", "new_zeros", "normal_", "ones", "ones_like",
    "prod", "rand", "randint", "randn", "random_", "scalar_tensor", "stack", "std", "sum",
    "uniform_", "upsample_nearest2d", "var", "var_mean", "zero_", "zeros", "zeros_like",
}  # fmt: skip
_MORE = {
    "constant_pad_nd": 2,  # it fills what it then copies into
    "native_group_norm": 3,  # moments, scales, and the normalization
}

_counted: list[str] | None = None


@contextmanager
def launches() -> Iterator[list[str]]:
    """Note the name of each kernel that is launched, those of a graph when it is replayed.

    Names are those of ATen's operations, of Triton's kernels and of csrc/cuda's functions, one for
    each kernel. Raises NotImplementedError for an operation whose kernels are not known.
    """
    global _counted
    before, _counted = _counted, []
    try:
        yield _counted
    finally:
        _counted = before


def add(names: Callable[[], list[str]]) -> None:
    """Count kernels, if anybody counts."""
    if _counted is not None:
        _counted.extend(names())


def is_free(func: torch._ops.OpOverload) -> bool:
    """Say whether an operation launches nothing: it takes memory, or returns a view of some."""
    views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return views or func._schema.name.removeprefix("aten::") in _NONE


def kernels(func: torch._ops.OpOverload, args: tuple, result) -> list[str]:
    """Return the name of an operation of PyTorch as often as it launches a kernel."""
    name = func._schema.name.removeprefix("aten::")
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if is_free(func) or (outputs and not any(x.numel() for x in outputs)):
        return []
    if name == "convolution":
        return [name] * (1 if args[2] is None else 2)
    if name in _MORE:
        return [name] * _MORE[name]
    if name in _ONE or torch.Tag.pointwise in func.tags:
        return [name]
    raise NotImplementedError(f"launches: how many kernels does {func} launch?")
