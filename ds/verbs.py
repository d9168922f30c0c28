"""What each verb of the command line does. A verb's options are the fields of its dataclass."""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

import ds
from ds import archives, budget, checkpoint, doctor, export, pairs, ranks
from ds.checkpoint import fingerprint
from ds.config import from_json, to_json
from ds.data import AbstractSource, Generated, Images, Pairs, digits
from ds.engine import Place, Plan
from ds.evaluation import Moments, evaluate, figures, read_reference, record
from ds.features import AbstractExtractor, Digits, Inception, Pixels
from ds.frontier import fidelity, fidelity_table, frontier, plan_table
from ds.images import check_name, save
from ds.load import load, load_teacher
from ds.methods import Denoising, DenoisingStudent
from ds.nets import UNet, UNetConfig
from ds.nets.convert import to_diffusers
from ds.pairs import PairStore, generate_pairs
from ds.philox import noise
from ds.presets import PRESETS, Machine, PairsConfig, Preset, SolveConfig
from ds.ranks import is_first, joined
from ds.sample import Precision, Sampler, Student, Teacher, device_of, great_circle
from ds.train import Runtime, TrainConfig, Trainer, autocast

Model = Annotated[Path, tyro.conf.Positional]
Store = Annotated[str, tyro.conf.Positional]  # a directory, or a URL such as s3://bucket/folder
Price = Annotated[float, tyro.conf.arg(help="dollars an hour of all that runs; 0: not known")]
Here = Annotated[Machine, tyro.conf.arg(name="")]  # --device, not --machine.device
log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class Teach:
    """Train a teacher on real images, to have one to distil."""

    out: Path
    net: UNetConfig
    method: Denoising
    train: TrainConfig
    solve: SolveConfig
    seed: int = 0  # of the first weights
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "Teach":
        if p.teach is None:
            raise ValueError(
                f"teach: no images of {name} come with the library; bring a trained teacher and "
                f"start at `dstudent pairs {name} --teacher DIR`"
            )
        return cls(
            out=_home(name) / "teacher", net=p.net, method=p.denoising, train=p.teach,
            solve=p.solve, machine=p.machine,
        )  # fmt: skip

    def run(self) -> None:
        images, _ = digits()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            start = self.method.denoiser(self.net.build())
        net = Trainer(
            self.method, start, Images(images), Images(images, seed=1), _run_folder(self.out),
            self.train, device=self.machine.use(), progress=_watched(),
        ).fit()  # fmt: skip
        solver, grid = self.solve.build(self.method.schedule)
        teacher = Teacher(self.method.denoiser(net), solver, grid)
        teacher.save_pretrained(self.out, version=ds.__version__, commit=doctor.commit())
        _say(f"teacher: {self.out}")


@dataclass(frozen=True, kw_only=True)
class MakePairs:
    """Run the teacher on noise and keep what it makes: the pairs a student learns from.

    Interrupt it when you like, and run it again to go on. Several processes may share one store,
    and come and go. With a larger --pairs.count a store grows. `dstudent pairs info STORE` says
    what is there, `pairs verify STORE` checks it, `pairs export STORE OUT` writes archives.
    """

    teacher: Path
    out: str  # a directory, or a URL such as s3://bucket/folder
    pairs: PairsConfig
    solve: SolveConfig
    plan: bool = False  # make no pairs; measure how many network calls they need
    plan_noises: int = 16  # to measure it on
    price: Price = 0.0
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "MakePairs":
        home = _home(name)
        return cls(
            teacher=home / "teacher", out=str(home / "pairs"), pairs=p.pairs, solve=p.solve,
            machine=p.machine,
        )  # fmt: skip

    def run(self) -> None:
        if self.plan:
            self._plan()
        else:
            self.make(self.pairs.count + self.pairs.held_out)

    def make(self, count: int) -> None:
        """Make the first so many of the pairs."""
        p, teacher = self.pairs, self.solver()
        self._propose(teacher.net)
        store = generate_pairs(
            teacher, self.out, count, seed=p.seed, batch_size=p.batch_size,
            shard_size=p.shard_size, quantizer=p.quantizer, precision=p.precision,
            engine=p.engine, price=self.price, progress=_watched(),
        )  # fmt: skip
        if is_first():
            _say(f"pairs: {self.out}, {len(store):,} of them")

    def _propose(self, net: nn.Module) -> None:
        """Name a batch size that fills the GPU, where there is one and another was chosen."""
        place = Place(device_of(net), torch.bfloat16, 1)
        if place.device.type == "cuda" and isinstance(net, UNet):
            gpu = torch.cuda.get_device_properties(place.device)
            full = Plan.of(net, place).full_batch(gpu.multi_processor_count)
            if self.pairs.batch_size % full:
                log.info("pairs: --pairs.batch-size %d, or a multiple, fills this GPU", full)

    def solver(self) -> Teacher:
        """Return the teacher with the solver that is asked for, on the device."""
        _at_least(0, price=self.price)
        p = self.pairs
        _at_least(1, **{"pairs.count": p.count, "pairs.held_out": p.held_out})
        teacher = load_teacher(self.teacher, device=self.machine.use())
        solver, grid = self.solve.build(teacher.denoiser.schedule)
        return replace(teacher, solver=solver, grid=grid)

    def budget(self) -> str:
        """Say what the pairs that are missing will cost."""
        count = self.pairs.count + self.pairs.held_out
        return f"pairs: {self.estimate(pairs.to_make(self.out, count))[0]}"

    def estimate(self, count: int) -> tuple[str, float]:
        """Say what so many pairs will cost, and how many seconds they take."""
        p = self.pairs
        sampler = Sampler(
            self.solver(), batch_size=p.batch_size, precision=p.precision, engine=p.engine
        )
        return pairs.estimate(sampler, count, p.quantizer, self.price)

    def _plan(self) -> None:
        p, teacher = self.pairs, self.solver()
        _at_least(1, **{"plan-noises": self.plan_noises, "pairs.batch-size": p.batch_size})
        options = {"batch_size": p.batch_size, "precision": p.precision, "engine": p.engine}
        seconds = Sampler(teacher, **options).seconds_each() / teacher.nfe
        z = noise(p.seed, range(self.plan_noises), teacher.shape, device=self.machine.use())
        found = frontier(teacher.denoiser, z, self.solve, progress=_watched())
        _say(plan_table(found, seconds, p.count + p.held_out))
        _say(fidelity_table(fidelity(teacher, p.seed, self.plan_noises), found))


@dataclass(frozen=True, kw_only=True)
class PairsInfo:
    """Say what a store holds and how much of it is written."""

    store: Store

    def run(self) -> None:
        print(json.dumps(pairs.info(self.store), indent=2))


@dataclass(frozen=True, kw_only=True)
class PairsVerify:
    """Hash every shard of a store; with its teacher, also make some of the pairs again."""

    store: Store
    teacher: Path | None = None
    recompute: int = 4  # pairs to make again, spread over the store
    machine: Here = field(default_factory=Machine)

    def run(self) -> None:
        if self.recompute < 1:
            raise ValueError(f"pairs verify: recompute must be at least 1, not {self.recompute}")
        store, teacher = PairStore(self.store), None
        if self.teacher is not None:
            teacher = load_teacher(self.teacher, device=self.machine.use())
            solver, grid = from_json(store.manifest["solver"]), tuple(store.manifest["grid"])
            teacher = replace(teacher, solver=solver, grid=grid)
        store.verify(teacher, self.recompute)
        _say(f"pairs: {self.store}, {len(store):,} of them as they were written")


@dataclass(frozen=True, kw_only=True)
class PairsExport:
    """Write a store, noise and all, as archives for the loaders of other codes."""

    store: Store
    out: Annotated[Path, tyro.conf.Positional]
    to: archives.Form = "webdataset"
    per_archive: int = 4096

    def run(self) -> None:
        paths = archives.export(
            PairStore(self.store), self.out, self.to, per_archive=self.per_archive,
            progress=_watched(),
        )  # fmt: skip
        _say(f"archives: {self.out}, {len(paths)} of them")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What images are compared with, and how."""

    reference: str = "digits"  # or a directory of images, an array of them, mu and sigma
    extractor: Literal["digits", "pixels", "inception"] = "digits"
    inception_weights: Path | None = None
    count: int = 4096  # images to draw

    def build(self, device: torch.device) -> tuple[Tensor | Moments, AbstractExtractor]:
        """Return the reference and the extractor; ValueError where they cannot be had."""
        if self.count < 2:
            raise ValueError(f"evaluate: count must be at least 2, not {self.count}")
        return read_reference(self.reference), self._extractor(device)

    def _extractor(self, device: torch.device) -> AbstractExtractor:
        if self.extractor == "inception":
            if self.inception_weights is None:
                raise ValueError("evaluate: extractor inception needs --inception-weights FILE")
            return Inception(self.inception_weights, device=device)
        return Digits() if self.extractor == "digits" else Pixels()


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train a student that makes in one network call what the teacher makes in many.

    This is the whole recipe: where the store is not finished, its pairs are made first, as
    `dstudent pairs` makes them. What all of it takes is said before it starts.
    """

    teacher: Path
    store: str  # a directory, or a URL such as s3://bucket/folder
    out: Path
    pairs: PairsConfig
    solve: SolveConfig
    method: DenoisingStudent
    train: TrainConfig
    online: bool = False  # keep the held-out pairs only; make the others while training
    reuse: int = 4  # epochs that an online pair serves
    pool: int = 64  # batches of online pairs that are made, and kept, at a time
    price: Price = 0.0
    runtime: Runtime = field(default_factory=Runtime)
    judge: Judge = field(default_factory=Judge)  # of --runtime.evaluate-every
    machine: Here = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, p: Preset) -> "Distill":
        home = _home(name)
        return cls(
            teacher=home / "teacher", store=str(home / "pairs"), out=home / "student",
            pairs=p.pairs, solve=p.solve, method=p.method, train=p.train, machine=p.machine,
        )  # fmt: skip

    def run(self) -> None:
        with joined():
            self._run()

    def _run(self) -> None:
        _at_least(0, price=self.price)
        _at_least(1, held_out=self.pairs.held_out, reuse=self.reuse, pool=self.pool)
        teacher = load_teacher(self.teacher)
        if is_first():
            log.info(self.budget())
        if not pairs.is_finished(self.store):
            self._maker().make(self._kept())
        store = PairStore(self.store)
        if fingerprint(teacher.denoiser) != store.manifest["teacher"]["sha256"]:
            raise ValueError(
                f"{self.store}: was made by another teacher than {self.teacher}; give that one"
            )
        source, train = self._source(store)
        device = self.machine.use()
        trainer = Trainer(
            self.method, teacher.denoiser, source, Pairs(store, range(self.pairs.held_out)),
            _run_folder(self.out), train, device=device, runtime=self.runtime,
            evaluate=self._evaluate(device) if self.runtime.evaluate_every else None,
            progress=_watched(),
        )  # fmt: skip
        student = Student(trainer.fit(), self.method)
        if not is_first():
            return
        student.save_pretrained(
            self.out,
            teacher_sha256=store.manifest["teacher"]["sha256"],
            pairs_sha256=store.sha256,
            pairs=self._pairs_seen(store, trainer.steps),
            teacher_nfe=from_json(store.manifest["solver"]).nfe(store.manifest["grid"]),
            steps=trainer.steps,
            held_out_loss=trainer.best_loss,
            version=ds.__version__,
            commit=doctor.commit(),
        )
        _say(f"student: {self.out}, held-out loss {trainer.best_loss:.4g}")

    def _maker(self) -> MakePairs:
        return MakePairs(
            teacher=self.teacher, out=self.store, pairs=self.pairs, solve=self.solve,
            price=self.price, machine=self.machine,
        )  # fmt: skip

    def _kept(self) -> int:
        """Return how many pairs the store must have."""
        return self.pairs.held_out + (0 if self.online else self.pairs.count)

    def _source(self, store: PairStore) -> tuple[AbstractSource, TrainConfig]:
        """Return what to train on and for how long: for as many steps either way."""
        p, t = self.pairs, self.train
        if not self.online:
            return Pairs(store, range(p.held_out, len(store))), t
        solver, grid = from_json(store.manifest["solver"]), tuple(store.manifest["grid"])
        rows = self.pool * t.batch_size
        source = Generated(
            replace(self._maker().solver(), solver=solver, grid=grid), rows, seed=store.seed,
            first=p.held_out, reuse=self.reuse, batch_size=p.batch_size, precision=p.precision,
            engine=p.engine,
        )  # fmt: skip
        return source, replace(t, epochs=t.epochs * (p.count // t.batch_size) / self.pool)

    def _pairs_seen(self, store: PairStore, steps: int) -> int:
        if not self.online:
            return len(store) - self.pairs.held_out
        return -(-steps // (self.pool * self.reuse)) * self.pool * self.train.batch_size

    def budget(self) -> str:
        """Say what the run will cost, from short measurements on this device."""
        t, p = self.train, self.pairs
        finished = pairs.is_finished(self.store)
        stored = finished and not self.online
        count = pairs.info(self.store)["pairs"] - p.held_out if stored else p.count
        steps = max(1, round(t.epochs * (count // t.batch_size)))
        kept = 0 if finished else pairs.to_make(self.store, self._kept())
        passing = -(-steps // self.reuse) * t.batch_size if self.online else 0
        lines, making = [], 0.0
        if kept + passing:
            line, making = self._maker().estimate(kept + passing)
            lines.append(f"pairs: {line}" + (f"; {kept:,} are kept" if self.online else ""))
        teacher = load_teacher(self.teacher, device=self.machine.use())
        learning = steps * t.batch_size * _training_seconds_each(teacher, self.method, t)
        lines.append(f"train: {steps:,} steps of {t.batch_size}, about {budget.duration(learning)}")
        total = (making + learning) / ranks.world()
        saved = 5 * sum(w.nbytes for w in teacher.net.parameters())
        return "\n".join([
            *lines,
            f"disk:  {budget.size(saved)} for the checkpoint, beside the pairs",
            f"total: about {budget.cost(total, self.price)}, on {ranks.world()} of this device",
        ])  # fmt: skip

    def _evaluate(self, device: torch.device) -> Callable[[nn.Module], dict[str, float]]:
        """Return what makes figures of a network; it knows how the student samples with it."""
        reference, extractor = self.judge.build(device)

        def judge(net: nn.Module) -> dict[str, float]:
            student = Student(net, self.method)
            return figures(evaluate(student, reference, extractor, n=self.judge.count))

        return judge


def _training_seconds_each(teacher: Teacher, method: DenoisingStudent, train: TrainConfig) -> float:
    """Measure how long training takes for an image: forward and backward, without the optimiser."""
    device = next(teacher.net.parameters()).device
    modules = method.init(teacher.denoiser)
    most = max(1, train.batch_size // ranks.world())
    z = noise(0, range(most), teacher.shape, device=device)
    batch = {"x0": z, "noise": z, "index": torch.arange(most, device=device)}

    def work(n: int) -> None:
        with autocast(device, train.precision):
            loss = method.loss(modules, {name: rows[:n] for name, rows in batch.items()}, 0)
        loss.backward()
        loss.item()  # waits for the device

    return budget.seconds_each(work, most)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a teacher or a student, or a path between two of them.

    The name of `out` says what is written: a .png is one sheet, a .gif an animation, an .npy or
    .npz an array, uint8 [N, H, W, C], and a name without a suffix a directory of PNGs.
    """

    model: Model
    out: Path = Path("samples.png")
    seed: int = 0
    indices: str = "0-63"  # of the noise: numbers and ranges, such as 3,7,100-199
    between: int = 0  # images on the way from each index to the next, along a great circle
    scale: int = 0  # pixels of a picture for each of the image; 0 makes small images larger
    batch_size: int = 256
    precision: Precision = "float32"
    machine: Here = field(default_factory=Machine)

    def run(self) -> None:
        indices = _indices(self.indices)
        if self.between < 0:
            raise ValueError(f"sample: between must be at least 0, not {self.between}")
        if self.between and len(indices) < 2:
            raise ValueError("sample: between needs two indices or more, such as --indices 3,7")
        check_name(self.out)
        model = load(self.model, device=self.machine.use())
        sampler = Sampler(model, batch_size=self.batch_size, precision=self.precision)
        if self.between:
            z = noise(self.seed, indices, model.shape)
            images, columns = sampler.draw(great_circle(z, self.between)), self.between + 1
        else:
            images, columns = sampler(self.seed, indices), None
        scale = self.scale or max(1, 64 // images.shape[1])
        save(images, self.out, columns=columns, scale=scale)
        _say(f"samples: {self.out}, {len(images)} images, {model.nfe} network calls each")


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a teacher or a student in another format.

    SOURCE is anything that `dstudent sample` takes. A student can also become a torch.export
    program (pt2) or an ONNX model; a teacher or a student a directory that diffusers loads.
    """

    source: Model
    out: Annotated[Path, tyro.conf.Positional]
    to: Literal["ours", "diffusers", "pt2", "onnx"] = "ours"
    image_size: int = 0  # for a file that does not tell it

    def run(self) -> None:
        size = {"image_size": self.image_size} if self.image_size else {}
        model = load(self.source, **size)
        if self.to == "ours":
            model.save_pretrained(self.out)
        elif self.to == "diffusers":
            self._to_diffusers(model)
        elif isinstance(model, Teacher):
            raise ValueError(f"convert: {self.to} is for students, {self.source} is a teacher")
        else:
            {"pt2": export.to_program, "onnx": export.to_onnx}[self.to](model, self.out)
        _say(f"{model.kind}: {self.out}")

    def _to_diffusers(self, model: Teacher | Student) -> None:
        if isinstance(model, Student):
            raise ValueError("convert: diffusers has no pipeline for a student; try --to pt2")
        denoiser = model.denoiser
        to_diffusers(
            self.out, model.net.config, model.net.state_dict(), denoiser.schedule,
            denoiser.prediction,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Compare a model's images with real ones; write the figures and the protocol as JSON."""

    model: Model
    judge: Annotated[Judge, tyro.conf.arg(name="")] = field(default_factory=Judge)
    store: str | None = None  # pairs whose first `held_out` the model is held against
    held_out: int = 1024
    seed: int = 1
    batch_size: int = 256
    out: Path | None = None  # by default metrics.json and the card of a MODEL of ours
    machine: Here = field(default_factory=Machine)

    def run(self) -> None:
        with joined():
            self._run()

    def _run(self) -> None:
        device = self.machine.use()
        model = load(self.model, device=device)
        held_out = self.store and Pairs(PairStore(self.store), range(self.held_out))
        reference, extractor = self.judge.build(device)
        result = evaluate(
            model, reference, extractor, n=self.judge.count, seed=self.seed,
            batch_size=self.batch_size, held_out=held_out, out=self.out,
        )  # fmt: skip
        if is_first():
            if self.out is None and checkpoint.is_ours(self.model):
                record(self.model, model, result)
            print(json.dumps({k: v for k, v in result.items() if k != "protocol"}, indent=2))


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Report what this machine has and which implementation of each operation runs here."""

    json: bool = False  # for machines
    plan: str = ""  # a preset, whose network's plan is printed instead
    images: int = 256  # of the plan
    device: str = "cpu"  # of the plan; it need not be here
    multiprocessors: int = 132  # of a cuda device, as an H100 has them
    tflops: float = 989.0  # of the plan's floors; these are of an H100's data sheet, in bfloat16
    gbs: float = 3350.0

    def run(self) -> None:
        if self.plan:
            _say(self._plan())
            return
        report = doctor.report()
        print(json.dumps(report, indent=2) if self.json else doctor.text(report))

    def _plan(self) -> str:
        if self.plan not in PRESETS:
            raise ValueError(f"doctor: plan must be one of {', '.join(PRESETS)}, not {self.plan!r}")
        for option in ("images", "multiprocessors", "tflops", "gbs"):
            if not getattr(self, option) > 0:
                raise ValueError(f"doctor: {option} must be above 0, not {getattr(self, option)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"doctor: device must be cpu or cuda, not {self.device!r}")
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


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Teach, make pairs, distil, sample and evaluate on scanned digits; write a report."""

    out: Path = Path("runs/demo")

    def run(self) -> None:
        from ds.demo import demo

        demo(self.out)


PER_PRESET: dict[str, Any] = {"teach": Teach, "pairs": MakePairs, "distill": Distill}
OF_STORES: dict[str, Any] = {"info": PairsInfo, "verify": PairsVerify, "export": PairsExport}
PLAIN: dict[str, Any] = {
    "sample": Sample,
    "evaluate": Evaluate,
    "convert": Convert,
    "doctor": Doctor,
    "demo": Demo,
}


def run(verb: str, args: list[str]) -> None:
    """Parse the options of a verb and do what it says. Errors are ValueErrors of one line."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ds").setLevel(logging.INFO)
    dry = "--dry-run" in args
    args = [arg for arg in args if arg != "--dry-run"]
    if verb == "pairs" and args and args[0] in OF_STORES:
        task = _parse(OF_STORES[args[0]], args[1:], f"dstudent pairs {args[0]}")
    elif verb in PER_PRESET:
        name, args = _preset_name(verb, args)
        default = PER_PRESET[verb].of(name, PRESETS[name]())
        task = _parse(PER_PRESET[verb], args, f"dstudent {verb} {name}", default=default)
    else:
        task = _parse(PLAIN[verb], args, f"dstudent {verb}")
    if dry:
        print(json.dumps(to_json(task), indent=2))
        if isinstance(task, MakePairs | Distill) and task.teacher.exists():
            log.info(task.budget())
    else:
        task.run()


def _preset_name(verb: str, args: list[str]) -> tuple[str, list[str]]:
    known = ", ".join(PRESETS)
    if args and args[0] in PRESETS:
        return args[0], args[1:]
    if args and not args[0].startswith("-"):
        raise ValueError(f"{verb}: no preset {args[0]!r}; the presets are {known}")
    if {"-h", "--help"} & set(args):
        return "digits", args
    raise ValueError(f"{verb}: name a preset first: {known}")


def _parse(task: Any, args: list[str], prog: str, **default: Any) -> Any:
    """Read options into the dataclass; what tyro says about a mistake becomes one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(task, prog=prog, args=args, **default)
    except SystemExit as end:
        if not end.code:
            raise
    boxed = [line.strip("│ ") for line in said.getvalue().splitlines() if line.startswith("│")]
    rules = (i for i, line in enumerate(boxed) if line.startswith(("─", "For full helptext")))
    reason = " ".join(boxed[: next(rules, None)]) or said.getvalue()
    raise ValueError(f"{reason} (see `{prog} --help`)")


def _at_least(least: float, **values: float) -> None:
    for option, value in values.items():
        if not least <= value < float("inf"):
            raise ValueError(f"{option} must be at least {least}, not {value}")


def _home(name: str) -> Path:
    return Path("runs") / name


def _indices(text: str) -> list[int]:
    """Read numbers and ranges: "3,7,100-199" has 102 of them."""
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"indices {text!r}: {part!r} is no number and no range such as 0-63")
        indices += range(int(first), int(last or first) + 1)
    if not indices:
        raise ValueError(f"indices {text!r} are none")
    return indices


def _run_folder(out: Path) -> Path:
    """Return where a run keeps its checkpoints and metrics, beside what it produces."""
    return out.with_name(f"{out.name}-run")


def _watched() -> bool:
    """Say whether somebody looks at standard error, and so at a progress bar."""
    return sys.stderr.isatty()


def _say(line: str) -> None:
    print(line, flush=True)
