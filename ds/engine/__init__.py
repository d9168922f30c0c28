"""The fast inference path of a U-Net: a plan made once, and the network that runs it."""

from ds.engine.calls import Target
from ds.engine.loop import Loop, Recurrence, times
from ds.engine.plan import RUNS, Plan, can_run
from ds.engine.rewrites import Rewrites
from ds.engine.run import Engine

__all__ = [
    "RUNS",
    "Engine",
    "Loop",
    "Plan",
    "Recurrence",
    "Rewrites",
    "Target",
    "can_run",
    "times",
]
