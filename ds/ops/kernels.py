"""The Triton kernels, imported as ds.ops.kernels.<op>; the source is the top-level folder kernels/.

An installation has that folder as ds/ops/kernels/; a checkout has it beside ds/. The folder has no
__init__.py: as a top-level package it would hide Hugging Face's package of the same name.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed = _here / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _here.parents[1] / "kernels")]
