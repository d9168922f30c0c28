"""Turn a slow diffusion model into a one-step generator.

The public names below are resolved on first use, so that `import ds` costs nothing and
`dstudent --help` answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers, which do not run __getattr__
    from ds import analytic as analytic
    from ds import methods as methods
    from ds import nets as nets
    from ds import ops as ops
    from ds.diffusion import grids as grids
    from ds.diffusion import predictions as predictions
    from ds.diffusion import schedules as schedule  # noqa: F401
    from ds.diffusion import solvers as solvers
    from ds.diffusion.conditions import Conditions as Conditions
    from ds.diffusion.denoiser import ClassifierGuided as ClassifierGuided
    from ds.diffusion.denoiser import Denoiser as Denoiser
    from ds.diffusion.denoiser import Guided as Guided
    from ds.diffusion.noise import Draws as Draws
    from ds.diffusion.noise import noise as noise
    from ds.diffusion.predictions import Estimate as Estimate
    from ds.evaluation.evaluate import evaluate as evaluate
    from ds.evaluation.verify import verify as verify
    from ds.models import export as export
    from ds.models.convert.classifier import load_classifier as load_classifier
    from ds.models.execution import Execution as Execution
    from ds.models.hub import from_pretrained as from_pretrained
    from ds.models.hub import push_to_hub as push_to_hub
    from ds.models.load import load_student as load_student
    from ds.models.load import load_teacher as load_teacher
    from ds.models.sampler import Sampler as Sampler
    from ds.models.student import Student as Student
    from ds.models.teacher import Teacher as Teacher
    from ds.pairs import archives as archives
    from ds.pairs.generate import generate_pairs as generate_pairs
    from ds.pairs.sources import Images as Images
    from ds.pairs.sources import Pairs as Pairs
    from ds.pairs.store import PairStore as PairStore
    from ds.training.config import TrainConfig as TrainConfig
    from ds.training.ema import post_hoc_ema as post_hoc_ema
    from ds.training.stages import Stages as Stages
    from ds.training.trainer import Trainer as Trainer

__version__ = "0.2.0"

_PUBLIC = {
    "ClassifierGuided": "ds.diffusion.denoiser",
    "Conditions": "ds.diffusion.conditions",
    "Denoiser": "ds.diffusion.denoiser",
    "Draws": "ds.diffusion.noise",
    "Estimate": "ds.diffusion.predictions",
    "Execution": "ds.models.execution",
    "Guided": "ds.diffusion.denoiser",
    "Images": "ds.pairs.sources",
    "PairStore": "ds.pairs.store",
    "Pairs": "ds.pairs.sources",
    "Sampler": "ds.models.sampler",
    "Stages": "ds.training.stages",
    "Student": "ds.models.student",
    "Teacher": "ds.models.teacher",
    "TrainConfig": "ds.training.config",
    "Trainer": "ds.training.trainer",
    "evaluate": "ds.evaluation.evaluate",
    "from_pretrained": "ds.models.hub",
    "generate_pairs": "ds.pairs.generate",
    "load_student": "ds.models.load",
    "load_classifier": "ds.models.convert.classifier",
    "load_teacher": "ds.models.load",
    "noise": "ds.diffusion.noise",
    "post_hoc_ema": "ds.training.ema",
    "push_to_hub": "ds.models.hub",
    "verify": "ds.evaluation.verify",
}
_MODULES = {
    "analytic": "ds.analytic",
    "archives": "ds.pairs.archives",
    "export": "ds.models.export",
    "grids": "ds.diffusion.grids",
    "methods": "ds.methods",
    "nets": "ds.nets",
    "ops": "ds.ops",
    "predictions": "ds.diffusion.predictions",
    "schedule": "ds.diffusion.schedules",
    "solvers": "ds.diffusion.solvers",
}

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'ds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
