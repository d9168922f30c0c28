"""What is compared: methods with their settings, on digits and in the plane, and controls.

An entry of digits learns on 8 x 8 scanned digits. One of the plane learns on a mixture of Gaussians
whose teacher is exact, with the settings by which `dstudent verify` judges the method.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ds.diffusion.schedules import EDM, Trig
from ds.methods import (
    AbstractMethod,
    ConsistencyDistillation,
    ConsistencyTraining,
    Denoising,
    DenoisingStudent,
    DiscreteMeanFlow,
    Drifting,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    MeanFlow,
    MixFlow,
    PosteriorMeanFlow,
    ProgressiveDistillation,
    RectifiedFlow,
    RegularizedConsistencyModel,
    Shortcut,
    SimplifiedConsistencyModel,
)
from ds.nets import MLPConfig, SongConfig, UNetConfig
from ds.training import presets
from ds.training.config import TrainConfig

CALLS, BUDGET, PLANE_BUDGET = (1, 2, 4), 100_000, 1_000_000
# `make demo`: 40 epochs of a teacher, 12 calls for each of 12,800 pairs, and 7 epochs of a student.
DEMO_BUDGET = 40 * 28 * 64 + 12 * 12_800 + 7 * 12_288
DEMO = presets.digits()
TRAIN = replace(DEMO.train, lr=2e-3, check_every=10**9)  # a check at the end
NET = replace(DEMO.net, channels=16)
SLOW = replace(NET, frequencies=(6.0, 0.5))  # as methods need that differentiate in time
FAST = replace(NET, frequencies=(40.0, 0.5))  # for the times of an arc, which are up to pi / 2
TEACH = replace(TRAIN, epochs=16)
SPREAD = 0.75  # deviation of the digits
LEVELS = Denoising(EDM(), "preconditioned")  # a teacher of EDM's noise levels
SCD = SimplifiedConsistencyModel(sigma_data=SPREAD, warmup=100, converted=True)
FLOW = RectifiedFlow(reflow=0, steps=8)
PLANE_TRAIN = replace(TRAIN, batch_size=256, lr=4e-3, ema_decay=0.99)
LEADERS = (
    "denoising_student",
    "mean_flow",
    "improved_consistency_training",
    "easy_consistency_tuning",
)
SHARES = (0.25, 0.5)  # of BUDGET, which the leaders are given too


@dataclass(frozen=True)
class Entry:
    """A method, the network that it trains, and how; `pairs` for each stage that needs them.

    A control is the teacher itself, a student as it is before it learns, or one that learns from
    pairs in which every noise has the image of another.
    """

    words: str
    method: AbstractMethod
    net: UNetConfig | SongConfig | MLPConfig = NET
    train: TrainConfig = TRAIN
    pairs: int = 2048
    teach: TrainConfig | None = None  # of the teacher in many calls that the method needs
    teacher: Denoising = DEMO.denoising  # which it is
    budget: int = BUDGET
    control: Literal["teacher", "untrained", "shuffled"] | None = None

    @property
    def in_plane(self) -> bool:
        """Whether it learns points in the plane."""
        return isinstance(self.net, MLPConfig)


DIGITS: Mapping[str, Entry] = {
    "denoising_student": Entry("Denoising Student", DEMO.method, pairs=3072, teach=TEACH),
    "rectified_flow": Entry("rectified flow", FLOW),
    "reflow": Entry("... and a reflow", replace(FLOW, reflow=1)),
    "distil": Entry("... and distilled", replace(FLOW, reflow=1, distil=True), pairs=1536),
    # The weight of a sum over 64 elements; CIFAR-10 has 3072, and 1e-5.
    "mix_flow": Entry("MixFlow", MixFlow(2e-3, predictor=replace(NET, channels=8, out_channels=2))),
    # As in its trial: a run is too short for more sizes of steps, and for a slower target.
    "shortcut": Entry(
        "shortcut model",
        Shortcut(steps=32, bootstrap_every=4, target_decay=0.98),
        replace(NET, conditions=("level",)),
    ),
    "mean_flow": Entry("MeanFlow", MeanFlow(), replace(SLOW, conditions=("h",))),
    "discrete_mean_flow": Entry(
        "discrete MeanFlow", DiscreteMeanFlow(), replace(SLOW, conditions=("h",))
    ),
    "posterior_mean_flow": Entry(
        "posterior MeanFlow",
        PosteriorMeanFlow(),
        replace(SLOW, conditions=("h", "outer", "context")),
    ),
    # A velocity, since the loss of the paper's teachers, of x0 weighted by the SNR, needs longer.
    "progressive_distillation": Entry(
        "progressive distillation",
        ProgressiveDistillation(start_steps=8),
        FAST,
        replace(TRAIN, lr=1e-3, warmup_steps=0),
        teach=TEACH,
        teacher=Denoising(Trig(), "v"),
    ),
    "consistency_distillation": Entry(
        "consistency distillation",
        ConsistencyDistillation(),
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    "consistency_training": Entry(
        "consistency training", ConsistencyTraining(sigma_data=SPREAD, end_steps=20), SLOW
    ),
    "improved_consistency_training": Entry(
        "improved consistency training (iCT)",
        ImprovedConsistencyTraining(end_steps=80, sigma_data=SPREAD, huber=0.03),
        SLOW,
    ),
    "easy_consistency_tuning": Entry(
        "easy consistency tuning (ECT)",
        EasyConsistencyTuning(num_stages=4),
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    "scd": Entry(
        "sCM, of a teacher (sCD)",
        SCD,
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    "sct": Entry(
        "sCM, of data (sCT)",
        SimplifiedConsistencyModel(flow="data", sigma_data=SPREAD, warmup=100),
        SLOW,
    ),
    "regularized_consistency_model": Entry(
        "rCM",
        RegularizedConsistencyModel(
            SCD, consistency_weight=10.0, rollout=1, critic_turns=1, critic_log_sigma=(-1.0, 1.4)
        ),
        SLOW,
        teach=TEACH,
        teacher=LEVELS,
    ),
    # As many rows at once as leave enough steps.
    "drifting": Entry("drifting", Drifting(), train=replace(TRAIN, batch_size=256)),
    "denoising_student_demo": Entry(
        "Denoising Student",
        DEMO.method,
        DEMO.net,
        DEMO.train,
        pairs=DEMO.pairs.count,
        teach=DEMO.teach,
        budget=DEMO_BUDGET,
    ),
    "mean_flow_demo": Entry(
        "MeanFlow", MeanFlow(), replace(SLOW, channels=32, conditions=("h",)), budget=DEMO_BUDGET
    ),
}

# As `dstudent verify` trains them, apart from the batches and how many there are.
PLANE: Mapping[str, AbstractMethod] = {
    "denoising_student": DenoisingStudent(),
    "rectified_flow": FLOW,
    "reflow": replace(FLOW, reflow=1),
    "distil": replace(FLOW, reflow=1, distil=True),
    "mix_flow": MixFlow(),
    "shortcut": Shortcut(),
    "mean_flow": MeanFlow(),
    "discrete_mean_flow": DiscreteMeanFlow(),
    "posterior_mean_flow": PosteriorMeanFlow(),
    "progressive_distillation": ProgressiveDistillation(),
    "consistency_distillation": ConsistencyDistillation(),
    "consistency_training": ConsistencyTraining(),
    "improved_consistency_training": ImprovedConsistencyTraining(),
    "easy_consistency_tuning": EasyConsistencyTuning(),
    "scd": SimplifiedConsistencyModel(),
    "sct": SimplifiedConsistencyModel(flow="data"),
    "regularized_consistency_model": RegularizedConsistencyModel(),
    "drifting": Drifting(),
}
CONTROLS: Mapping[str, tuple[str, Literal["teacher", "untrained", "shuffled"]]] = {
    "teacher": ("the teacher itself", "teacher"),
    "untrained": ("a student before it learns", "untrained"),
    "shuffled": ("Denoising Student of shuffled pairs", "shuffled"),
}


def _in_plane(name: str, method: Any) -> Entry:
    """Return an entry of the plane, with the fields that the method's trial sets for points."""
    trial = method.trial()
    net = trial.net or MLPConfig()
    changes = {k: value for k, value in trial.changes.items() if k != "distil"}  # its own entry
    if hasattr(method, "student"):
        changes["student"] = net
    return Entry(
        DIGITS[name].words,
        replace(method, **changes),
        net,
        replace(PLANE_TRAIN, **method.train),
        pairs=8192,
        budget=PLANE_BUDGET,
    )


def _all() -> Iterator[tuple[str, Entry]]:
    """Yield every entry by its name: digits, other budgets for the leaders, the plane, controls."""
    yield from DIGITS.items()
    for share in SHARES:
        for name in LEADERS:
            entry = DIGITS[name]
            teach = entry.teach and replace(entry.teach, epochs=entry.teach.epochs * share)
            budget, pairs = int(share * entry.budget), int(share * entry.pairs)
            less = replace(entry, budget=budget, pairs=pairs, teach=teach)
            yield f"{name}_{budget // 1000}k", less
    plane = {name: _in_plane(name, method) for name, method in PLANE.items()}
    for where, entries in (("", DIGITS), ("plane_", plane)):
        yield from ((where + name, entry) for name, entry in entries.items() if where)
        for name, (words, control) in CONTROLS.items():
            yield where + name, replace(entries["denoising_student"], words=words, control=control)


ENTRIES: Mapping[str, Entry] = dict(_all())
