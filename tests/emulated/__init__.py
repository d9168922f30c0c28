"""A GPU for machines without one: tensors that report `cuda`, over the CPU's memory.

    python -m tests.emulated [-m module | script] arguments...

runs a program as if two H100 were here. Triton's kernels and those of csrc/cuda run in their
interpreters, PyTorch's on the CPU. What a GPU refuses is refused: operations on several devices,
launches on memory of the CPU or of another GPU, and, while a graph is captured, whatever waits.
docs/notes/0019-an-emulated-gpu.md says what this shows and what it cannot.
"""

from tests.emulated.install import VARIABLE, install
from tests.emulated.launches import launches

__all__ = ["VARIABLE", "install", "launches"]
