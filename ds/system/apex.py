"""Tell NVIDIA's apex from the unrelated PyPI package of the same name."""

import importlib.metadata
from importlib.util import find_spec
from pathlib import Path


def status() -> str:
    """Return which apex is installed, without importing it. NVIDIA's starts with "NVIDIA's"."""
    spec = find_spec("apex")
    if spec is None:
        return "not installed (optional; NVIDIA's, built from its source)"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "another project of the same name, not NVIDIA's: pip uninstall apex"
    try:
        return f"NVIDIA's, {importlib.metadata.version('apex')}"
    except importlib.metadata.PackageNotFoundError:
        return "NVIDIA's, not installed by pip"
