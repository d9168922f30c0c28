"""Turn a slow diffusion model into a one-step generator.

The public names below are resolved on first use, so that `import ds` costs nothing and
`dstudent --help` answers at once.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Denoiser": "ds.denoiser",
    "Estimate": "ds.denoiser",
    "Images": "ds.data",
    "PairStore": "ds.pairs",
    "Pairs": "ds.data",
    "Sampler": "ds.sample",
    "Student": "ds.sample",
    "Teacher": "ds.sample",
    "TrainConfig": "ds.train",
    "Trainer": "ds.train",
    "evaluate": "ds.evaluation",
    "from_pretrained": "ds.hub",
    "generate_pairs": "ds.pairs",
    "load_student": "ds.load",
    "load_teacher": "ds.load",
    "noise": "ds.philox",
    "post_hoc_ema": "ds.posthoc",
    "push_to_hub": "ds.hub",
}
_MODULES = (
    "analytic",
    "archives",
    "export",
    "grids",
    "methods",
    "nets",
    "ops",
    "schedule",
    "solvers",
)

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"ds.{name}")
    raise AttributeError(f"module 'ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
