"""The Triton kernels, imported as ds.kernels.<op>. Their source is the top-level folder kernels/.

Installed, that folder is ds/kernels/; in a checkout it lies beside ds/. As a top-level package it
would hide Hugging Face's of the same name, so it has no __init__.py and this file finds it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_installed = _here / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _here.parent / "kernels")]
