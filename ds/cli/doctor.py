"""dstudent doctor: what runs here, and what a network's plan is."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds.cli import environment
from ds.cli.verb import Verb, say
from ds.engine import Place, Plan
from ds.system.config import Count, Positive
from ds.training.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Report what this machine has and which implementation of each operation runs here."""

    json: bool = False  # for machines
    plan: str = ""  # a preset, whose network's plan is printed instead
    images: Count = 256  # of the plan
    device: str = "cpu"  # of the plan; it need not be here
    multiprocessors: Count = 132  # of a cuda device, as an H100 has them
    tflops: Positive = 989.0  # of the plan's floors; these are of an H100's data sheet, in bfloat16
    gbs: Positive = 3350.0

    def prepare(self) -> Callable[[], None]:
        if self.plan:
            self._check_plan()
            return lambda: say(self._plan())
        return self._report

    def idle(self) -> dict[str, str]:
        if not self.plan:
            of_plans = ("images", "device", "multiprocessors", "tflops", "gbs")
            return dict.fromkeys(of_plans, "without --plan")
        cpu = {} if self.device == "cuda" else {"multiprocessors": "without --device cuda"}
        return {"json": "with --plan", **cpu}

    def _report(self) -> None:
        report = environment.report()
        say(json.dumps(report, indent=2) if self.json else environment.text(report))

    def _check_plan(self) -> None:
        if self.plan not in PRESETS:
            raise ValueError(f"doctor: plan must be one of {', '.join(PRESETS)}, not {self.plan!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"doctor: device must be cpu or cuda, not {self.device!r}")

    def _plan(self) -> str:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        place = Place(torch.device(self.device), dtype, self.images)
        with torch.device("meta"):
            net = PRESETS[self.plan]().net.build()
        plan = Plan.of(net, place)
        text = plan.text(place, tflops=self.tflops, gbs=self.gbs)
        if self.device == "cuda":
            full = plan.full_batch(self.multiprocessors)
            text += f"\nmultiples of {full} images fill {self.multiprocessors} multiprocessors"
        return text
