"""Presets: a function returns the settings for a data set. A variant states only what differs.

The paper's settings are those of its 2021 code, `get_settings` and `create_dataset.py`.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch

from ds.diffusion import grids
from ds.diffusion.schedules import EDM, MOST, AbstractSchedule, AbstractTable, Trig
from ds.diffusion.solvers import (
    DCW,
    DDIM,
    AbstractSolver,
    Ancestral,
    Clipped,
    DDIMToFirst,
    DPMSolverPP,
    DPMSolverPPSinglestep,
    Heun,
    UniPC,
    bare,
)
from ds.diffusion.solvers.dcw import Strength
from ds.methods import AbstractMethod, Denoising, DenoisingStudent, ProgressiveDistillation
from ds.models.execution import Mode, Precision
from ds.models.teacher import Teacher
from ds.nets import SongConfig, UNetConfig
from ds.nets.adm import adm_imagenet64
from ds.nets.song import ddpmpp
from ds.pairs.quantizer import Quantizer
from ds.system.config import Between, Count, Natural, NotNegative, Positive, Seed, check
from ds.training.config import TrainConfig

log = logging.getLogger("ds")
THREADS = 16  # at most, for each CPU: more only wait, and far too many end the process

try:
    from tyro.conf import arg  # pyright: ignore[reportAssignmentType]
except ImportError:  # only the command line needs the names of options

    def arg(**_: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to compute."""

    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    threads: Natural = 0  # on the CPU; 0 lets PyTorch choose

    def __post_init__(self):
        check(self)
        cpus = os.cpu_count() or 1
        if self.threads > THREADS * cpus:
            raise ValueError(
                f"threads must be at most {THREADS} for each of the {cpus} CPUs here, "
                f"not {self.threads}"
            )

    def use(self) -> torch.device:
        """Set the threads of this process and return the device. Raise ValueError if it fails."""
        if self.threads > 0:
            torch.set_num_threads(self.threads)
        if self.device == "auto":
            # Each process of torchrun has its own GPU.
            gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            return gpu if torch.cuda.is_available() else torch.device("cpu")
        try:
            return torch.empty(0, dtype=torch.uint8, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {self.device!r} cannot be used here: {reason}") from None


@dataclass(frozen=True, kw_only=True)
class SolveConfig:
    """How the teacher is run: its solver and its grid."""

    solver: Literal[
        "ddim", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_3s", "unipc", "ancestral"
    ] = "ddim"
    grid: Literal["quadratic", "uniform", "log_snr", "karras"] = "quadratic"
    steps: Annotated[int, Between(1, MOST)] = 100
    # largest time of the grid, as a share of the teacher's steps; None: 0.8, or later where much
    # signal is left there; a uniform grid has its own
    top: Annotated[float, Between(0, 1, "(]")] | None = None
    spacing: grids.Spacing = "leading"  # of a uniform grid; the words are those of diffusers
    # of predicted images. teacher: as its scheduler says, the end of the last step included;
    # static: to [-1, 1]; dynamic: to the 99.5 % quantile of each
    clip: Literal["teacher", "none", "static", "dynamic"] = "teacher"
    # of a correction after each step, away from the predicted image, for the variance that steps
    # lose (DCW); --plan fits it; 0: none
    dcw: Strength = 0.0
    # of ancestral: the noise of a step; learned is for networks with a learned variance
    variance: Literal["learned", "small", "large"] = "small"
    churn: NotNegative = 0.0  # of heun: noise added over all steps, S_churn of EDM; 0: none
    churn_min: NotNegative = 0.0  # smallest sigma / alpha with churn, S_min
    churn_max: Positive = 1e9  # largest sigma / alpha with churn, S_max
    churn_noise: Positive = 1.0  # standard deviation of the added noise, S_noise

    def __post_init__(self):
        check(self, "solve.")
        if self.churn and self.solver != "heun":
            raise ValueError(f"solve.churn: is for the solver heun, not for {self.solver}")
        if self.variance != "small" and self.solver != "ancestral":
            raise ValueError(f"solve.variance: is for the solver ancestral, not for {self.solver}")

    def build(
        self, schedule: AbstractSchedule, of: AbstractSolver | None = None
    ) -> tuple[AbstractSolver, grids.Grid]:
        """Return the solver and the grid for a teacher whose own solver is `of`, if it has one.

        Raises ValueError if the schedule has no such grid.
        """
        grid = self._grid(schedule)
        return self._solver(of, len(grid)), grid

    def on(self, teacher: Teacher) -> Teacher:
        """Return a teacher with this solver and grid."""
        schedule = teacher.denoiser.schedule
        solver, grid = self.build(schedule, teacher.solver)
        grids.warn_of_signal(schedule, grid, "solve")
        if solver.stochastic:
            log.warning(
                "solve: %s adds fresh noise on its way, so that a sample is no function of its "
                "noise; a student of such pairs learns their mean",
                self.solver,
            )
        if self.solver != "ddim" and isinstance(bare(teacher.solver), DDIMToFirst):
            log.warning(
                "solve: %s steps to the data; the teacher's scheduler ends at index 0's noise, "
                "which ddim does",
                self.solver,
            )
        return replace(teacher, solver=solver, grid=grid)

    def _solver(self, of: AbstractSolver | None, steps: int) -> AbstractSolver:
        solver = self._unclipped(steps)
        if self.clip == "teacher" and self.solver == "ddim" and isinstance(bare(of), DDIMToFirst):
            solver = DDIMToFirst()
        if self.dcw:
            solver = DCW(solver, low=self.dcw)
        clipped = None if self.clip == "none" else _CLIPPED.get(self.clip, of)
        if not isinstance(clipped, Clipped):
            return solver
        # Heun steps along the noise, which must then be that of the clipped prediction.
        return replace(clipped, solver=solver, rederive=self.solver == "heun")

    def _unclipped(self, steps: int) -> AbstractSolver:
        if self.solver == "ancestral":
            return Ancestral(self.variance)
        if self.churn:
            return Heun(self.churn / steps, self.churn_min, self.churn_max, self.churn_noise)
        return SOLVERS[self.solver]

    def _grid(self, schedule: AbstractSchedule) -> grids.Grid:
        if self.grid == "uniform":
            return grids.uniform(self.steps, schedule, spacing=self.spacing)
        make = {
            "quadratic": grids.quadratic,
            "log_snr": grids.log_snr,
            "karras": grids.karras,
        }[self.grid]
        return make(self.steps, schedule, top=self._top(schedule))

    def _top(self, schedule: AbstractSchedule) -> float | None:
        """Return the largest time; None where it is the grid's own."""
        table = isinstance(schedule, AbstractTable)
        if self.top is None:
            return grids.start(schedule) if table else None
        if table:
            return min(round(self.top * schedule.num_steps), schedule.noise)
        return self.top * schedule.noise


SOLVERS: dict[str, AbstractSolver] = {  # without noise of their own
    "ddim": DDIM(),
    "heun": Heun(),
    "dpmpp_2m": DPMSolverPP(order=2),
    "dpmpp_3m": DPMSolverPP(order=3),
    "dpmpp_2s": DPMSolverPPSinglestep(order=2),
    "dpmpp_3s": DPMSolverPPSinglestep(order=3),
    "unipc": UniPC(p=2),
}
_CLIPPED = {
    "static": Clipped(DDIM()),
    "dynamic": Clipped(DDIM(), quantile=0.995, most=100.0),
}


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How many pairs to make, and how to make and store them."""

    count: Count = 1_024_000  # pairs to train on
    # pairs to hold out beside them
    held_out: Annotated[Count, arg(aliases=["--held-out"])] = 51_200
    seed: Seed = 0  # of the noise
    batch_size: Count | None = None  # images at a time; None: 256, or what fills a GPU
    shard_size: Count = 16_384  # pairs in a file
    # how samples are stored: as uint8 (round, floor) or as floats; None: round for pictures,
    # float32 for everything else, such as latents
    quantizer: Quantizer | None = None
    # of the teacher's matrix products; None: bfloat16 on GPUs, float32 on CPUs
    precision: Annotated[Precision | None, arg(aliases=["--precision"])] = None
    mode: Mode | None = None  # what runs the teacher; None: the fastest way its device has
    # classes that a teacher is asked for, such as 3,7 or 0-9, or their names; each pair draws its
    # own of them; None: all that it has
    classes: Annotated[str | None, arg(aliases=["--classes"])] = None
    # how far a teacher with classes draws towards them: 1 is not beyond them, more is more typical
    # and less varied; a number, or a range such as 1-4, for a student that is told its scale
    guidance: Annotated[str | None, arg(aliases=["--guidance"])] = None

    def __post_init__(self):
        check(self, "pairs.")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All settings for a data set; `teach` where how its teacher was trained is known."""

    net: UNetConfig | SongConfig
    solve: SolveConfig
    pairs: PairsConfig
    method: AbstractMethod
    train: TrainConfig
    denoising: Denoising = field(default_factory=Denoising)
    teach: TrainConfig | None = None
    machine: Machine = field(default_factory=Machine)


def cifar10() -> Preset:
    """CIFAR-10, 32 x 32. Paper, section 5."""
    return Preset(
        net=UNetConfig(),
        solve=SolveConfig(),
        pairs=PairsConfig(),
        method=DenoisingStudent(loss_type="l1"),
        train=TrainConfig(),
    )


def celeba() -> Preset:
    """CelebA, 64 x 64."""
    base = cifar10()
    return replace(
        base,
        net=UNetConfig(image_size=64, channel_mult=(1, 2, 2, 2, 4)),
        pairs=replace(base.pairs, held_out=10_240),
        method=DenoisingStudent(loss_type="l2"),
        train=replace(base.train, lr=5e-5, epochs=35),
    )


def lsun_bedroom() -> Preset:
    """LSUN bedroom, 256 x 256."""
    return Preset(
        net=UNetConfig(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
        solve=SolveConfig(grid="uniform", steps=50),
        pairs=PairsConfig(held_out=2_560, shard_size=2_048),
        method=DenoisingStudent(loss_type="l2"),
        train=TrainConfig(
            batch_size=32,
            epochs=50,
            lr=5e-6,
            warmup_steps=1000,
            betas=(0.98, 0.999),
            ema_decay=0.9995,
            check_every=6400,
        ),
    )


def lsun_church() -> Preset:
    """LSUN church, 256 x 256."""
    base = lsun_bedroom()
    return replace(base, train=replace(base.train, epochs=40))


# Without guidance, labels need not be left out.
_EDM = Denoising(EDM(), "preconditioned", label_dropout=0.0)


def edm_cifar10() -> Preset:
    """CIFAR-10, 32 x 32, with a teacher of EDM: DDPM++, and Heun in 35 network calls.

    Karras et al. 2022, arXiv:2206.00364, Tables 1 and 7. They also train on images that are turned
    and scaled, which is not done here.
    """
    return replace(
        cifar10(),
        net=ddpmpp(augment_channels=0),
        solve=SolveConfig(solver="heun", grid="karras", steps=18),
        denoising=_EDM,
        teach=TrainConfig(
            epochs=4000,
            lr=1e-3,
            warmup_steps=19_531,  # 10 million images
            betas=(0.9, 0.999),
            ema_decay=0.99929,  # half of it is of the last half million images
        ),
    )


def edm_cifar10_conditional() -> Preset:
    """CIFAR-10, 32 x 32, with a teacher of EDM that is told the class."""
    base = edm_cifar10()
    return replace(base, net=replace(base.net, classes=10))


def progressive_cifar10() -> Preset:
    """CIFAR-10, 32 x 32, with progressive distillation and its teacher, which predicts x0.

    Salimans & Ho 2022, arXiv:2202.00512, and the released settings. How long the teacher is trained
    is ours; the student's settings are those of a recipe.
    """
    base = cifar10()
    net = UNetConfig(
        channels=256,
        channel_mult=(1, 1, 1),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        dropout=0.2,
        scale_shift=True,
        resnet_down=(0, 1),
        resnet_up=(1, 2),
        frequencies=(1000 / (math.pi / 2), 0.1 / (math.pi / 2)),  # times end at pi / 2
    )
    teach = TrainConfig(
        batch_size=128,
        epochs=800_000 / 390,
        warmup_steps=1000,
        betas=(0.9, 0.999),
        optimizer="adamw",
        weight_decay=1e-3,
        grad_clip_norm=1.0,
        ema_decay=0.9999,
    )
    train = TrainConfig(
        batch_size=128,
        epochs=50_000 / 390,
        lr=5e-5,
        warmup_steps=0,
        betas=(0.9, 0.999),
        grad_clip_norm=1.0,
        dropout=0.0,
    )
    return replace(
        base,
        net=net,
        solve=SolveConfig(grid="uniform", steps=50),
        method=ProgressiveDistillation(start_steps=8192),
        train=train,
        denoising=Denoising(Trig(), "x0", snr_weight=True),
        teach=teach,
    )


def imagenet64() -> Preset:
    """ImageNet, 64 x 64, with ADM's network trained as EDM does: Heun in 79 network calls.

    Karras et al. 2022, arXiv:2206.00364, Tables 1 and 7. The student is trained as on CelebA.
    """
    return replace(
        celeba(),
        net=adm_imagenet64(),
        solve=SolveConfig(solver="heun", grid="karras", steps=40),
        denoising=_EDM,
        teach=TrainConfig(
            batch_size=4096,
            epochs=1951,
            lr=1e-4,
            warmup_steps=2441,  # 10 million images
            betas=(0.9, 0.999),
            ema_decay=0.999943,  # half of it is of the last 50 million images
        ),
    )


def digits() -> Preset:
    """Scanned digits, 8 x 8: the whole chain in minutes on two CPU cores.

    It uses one thread: such small images are faster computed than shared among threads.
    """
    train = TrainConfig(
        batch_size=64,
        epochs=7,
        lr=3e-3,
        warmup_steps=50,
        betas=(0.9, 0.999),
        lr_schedule="cosine",
        ema_decay=0.98,
        check_every=250,
    )
    return Preset(
        net=UNetConfig(
            image_size=8,
            in_channels=1,
            channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            norm_groups=8,
        ),
        solve=SolveConfig(steps=12),
        pairs=PairsConfig(count=12_288, held_out=512, batch_size=512, shard_size=2_048),
        method=DenoisingStudent(loss_type="l1"),
        train=train,
        teach=replace(
            train,
            epochs=40,
            lr=2e-3,
            warmup_steps=100,
            lr_schedule="none",
            ema_decay=0.995,
            check_every=560,
        ),
        machine=Machine(threads=1),
    )


FEW = 5000  # pictures below which a network is small, and a run short


def own(shape: tuple[int, ...], rows: int | None = None) -> Preset:
    """Return settings for samples of a shape, such as `rows` pictures of a person's own.

    Two CPU cores train few pictures in minutes. Unknown ones count as many, and get what the paper
    has for their size. The network is that of `network` for pictures, and any for other samples.
    """
    if rows is not None and rows < FEW:
        return _few(rows)
    side = max(shape[1:], default=1)
    base = cifar10() if side <= 32 else celeba() if side <= 64 else lsun_bedroom()
    batch = max(16, min(128, 2**17 // side**2))
    teach = TrainConfig(
        batch_size=batch,
        epochs=100_000 / ((rows or FEW) // batch),
        warmup_steps=1000,
        betas=(0.9, 0.999),
        grad_clip_norm=1.0,
        ema_decay=0.9999,
        check_every=5000,
    )
    return replace(base, teach=teach, denoising=Denoising(prediction="v"))


def network(shape: tuple[int, int, int], rows: int) -> UNetConfig:
    """Return a network for pictures [C, H, W], of which there are `rows` to train on.

    Raises ValueError for a shape that cannot be halved until attention is affordable.
    """
    c, h, w = shape
    sides = [(h, w)]  # of the levels
    while not (sides[-1][0] % 2 or sides[-1][1] % 2) and (
        min(sides[-1]) > 8 or (len(sides) == 1 and min(h, w) > 2)
    ):
        sides.append((sides[-1][0] // 2, sides[-1][1] // 2))
    if len(sides) < 2 or max(sides[-1]) > 32:
        near = max(8, round(min(h, w) / 8) * 8)
        raise ValueError(
            f"pictures of {w} x {h} fit no network, which halves them to 32 pixels or less; cut "
            f"and scale them, such as with --size {near}"
        )
    few = rows < FEW
    mult = (1, 1, 2, 2, 4, 4, 4)[: len(sides)] if len(sides) > 5 else (1, 2, 4, 4, 4)[: len(sides)]
    attend = [s for s in sides if max(s) <= 16 and not few] or sides[-1:]
    return UNetConfig(
        image_size=h if h == w else (h, w),
        in_channels=c,
        channels=16 if few else 128,
        channel_mult=mult,
        num_res_blocks=1 if few else 2,
        attention_resolutions=tuple(high for high, _ in attend),
        norm_groups=8 if few else 32,
    )


def _few(rows: int) -> Preset:
    batch, steps = min(16, rows), 1400  # of the teacher
    teach = TrainConfig(
        batch_size=batch,
        epochs=steps / (rows // batch),
        lr=2e-3,
        warmup_steps=100,
        betas=(0.9, 0.999),
        lr_schedule="cosine",
        ema_decay=0.99,
        check_every=700,  # which draws 64 samples each time
    )
    return Preset(
        net=UNetConfig(),
        solve=SolveConfig(steps=12),
        pairs=PairsConfig(count=2048, held_out=128, batch_size=64, shard_size=512),
        method=DenoisingStudent(loss_type="l1"),
        train=replace(teach, batch_size=16, epochs=5, lr=1e-3, check_every=128),
        denoising=Denoising(prediction="v"),  # at most noise, an error in eps grows 100-fold
        teach=teach,
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    f.__name__: f
    for f in (
        digits, cifar10, celeba, lsun_bedroom, lsun_church, edm_cifar10, edm_cifar10_conditional,
        progressive_cifar10, imagenet64,
    )
}  # fmt: skip
