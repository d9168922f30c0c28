"""Load the CPU library that `make asan` built, in the folder DS_SANITIZED: a plugin of pytest."""

import ctypes
import os
from pathlib import Path

from ds.ops import _native

_FOLDER = Path(os.environ["DS_SANITIZED"]).resolve()
_native._load = lambda name: ctypes.CDLL(str(_FOLDER / f"libds_{name}.so"))
_native.cpu_library.cache_clear()  # ds.ops has asked the one of the installation for its level
