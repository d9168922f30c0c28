"""Turn a slow diffusion model into a one-step generator.

The public names below are resolved on first use, so that `import ds` costs nothing and
`dstudent --help` answers at once.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Denoiser": "ds.diffusion.denoiser",
    "Estimate": "ds.diffusion.denoiser",
    "Images": "ds.pairs.sources",
    "PairStore": "ds.pairs.store",
    "Pairs": "ds.pairs.sources",
    "Sampler": "ds.models.sampler",
    "Student": "ds.models.student",
    "Teacher": "ds.models.teacher",
    "TrainConfig": "ds.training.trainer",
    "Trainer": "ds.training.trainer",
    "evaluate": "ds.evaluation.evaluate",
    "from_pretrained": "ds.models.hub",
    "generate_pairs": "ds.pairs.store",
    "load_student": "ds.models.load",
    "load_teacher": "ds.models.load",
    "noise": "ds.diffusion.noise",
    "post_hoc_ema": "ds.training.ema",
    "push_to_hub": "ds.models.hub",
}
_MODULES = {
    "analytic": "ds.analytic",
    "archives": "ds.pairs.archives",
    "export": "ds.models.export",
    "grids": "ds.diffusion.grids",
    "methods": "ds.methods",
    "nets": "ds.nets",
    "ops": "ds.ops",
    "schedule": "ds.diffusion.schedules",
    "solvers": "ds.diffusion.solvers",
}

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
