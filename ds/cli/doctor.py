"""dstudent doctor: report what runs on this machine, or the plan of a network."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds.cli.verb import Verb, say
from ds.engine import Plan, Target
from ds.evaluation import environment
from ds.system.config import Count, Positive
from ds.training.presets import PRESETS

PLANS = PRESETS | {"adm_imagenet64": PRESETS["imagenet64"]}  # by its network


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Report what this machine has, and which implementation of each operation runs here."""

    json: bool = False  # print JSON
    # a preset, or adm-imagenet64; print the engine's plan of its network instead of the report
    plan: str = ""
    images: Count = 256  # in a batch of the plan
    device: str = "cpu"  # of the plan, cpu or cuda; this machine need not have it
    multiprocessors: Count = 132  # of a cuda device; an H100 has 132
    # for the plan's floors; the defaults are an H100's data sheet in bfloat16
    tflops: Positive = 989.0
    gbs: Positive = 3350.0  # GB/s of memory

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
        if self._named not in PLANS:
            raise ValueError(f"doctor: plan must be one of {', '.join(PLANS)}, not {self.plan!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"doctor: device must be cpu or cuda, not {self.device!r}")

    @property
    def _named(self) -> str:
        return self.plan.replace("-", "_")

    def _plan(self) -> str:
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        target = Target(torch.device(self.device), dtype, self.images)
        with torch.device("meta"):
            net = PLANS[self._named]().net.build()
        plan = Plan.of(net, target)
        text = plan.text(target, tflops=self.tflops, gbs=self.gbs)
        if self.device == "cuda":
            full = plan.full_batch(self.multiprocessors)
            text += f"\nmultiples of {full} images fill {self.multiprocessors} multiprocessors"
        return text
