"""Try an installed wheel: both libraries load, and the files are there that no import asks for."""

import ds
from ds.ops._native import cpu_library, cuda_library
from ds.pairs.sources import digits

cpu_library()  # ImportError where it was not built, or asks for more than this machine has
cuda_library()
images, labels = digits()
assert len(images) == len(labels) == 1797
print(f"denoising-student {ds.__version__} in {ds.__file__}: both libraries load")
