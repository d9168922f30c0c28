"""What a verb is: how its options are read, how it runs, and how it talks to people."""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass, replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, cast

import torch
import tyro

import ds.methods
from ds.cli import VERBS
from ds.diffusion import grids
from ds.diffusion.conditions import Conditions
from ds.diffusion.denoiser import Guided
from ds.diffusion.schedules import Linear
from ds.methods import AbstractMethod
from ds.models import pretrained
from ds.models.load import load, load_teacher
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.nets.base import NO_CLASS
from ds.system import targets
from ds.system.config import NotNegative, check, tag, to_json
from ds.system.distributed import is_first, joined
from ds.system.files import first_line, redacted
from ds.training import presets
from ds.training.config import RUN, TrainConfig
from ds.training.presets import PRESETS, Machine, Preset, SolveConfig

# Text on the command line: a Path would spoil hf://owner/name.
MODEL = tyro.conf.arg(metavar="MODEL", help="the model's directory or file, or hf://owner/name")
Source = Annotated[str | Path, MODEL]
Model = Annotated[Source, tyro.conf.Positional]
Store = Annotated[str, tyro.conf.Positional]  # a directory, or a URL such as s3://bucket/folder
Price = Annotated[NotNegative, tyro.conf.arg(help="dollars an hour for all devices; 0: unknown")]
log = logging.getLogger("ds")
AnyModel = TypeVar("AnyModel", bound=Teacher | Student)
Here = Annotated[Machine, tyro.conf.arg(name="")]  # --device, not --machine.device
Code = Annotated[
    Path | None, tyro.conf.arg(help="a .py file with your own method or network, for such a model")
]

GUIDANCE = (
    "how far samples are drawn towards their class: 1 is not beyond it, more is more typical and "
    "less varied; a number, or a range such as 1-4, in which each draws its own"
)
Guidance = Annotated[str | None, tyro.conf.arg(help=f"{GUIDANCE}; None: as the model says")]
Classes = Annotated[
    str | None,
    tyro.conf.arg(
        help="classes to ask for, such as 3,7 or 0-9, or their names, or none; each sample draws "
        "its own of them, by its seed and index; None: all that the model has"
    ),
]


class Verb(ABC):
    """One verb of the command line. Its fields are its options."""

    shared: ClassVar[bool] = False  # whether the processes that torchrun starts share the work
    instead: ClassVar[str] = ""  # what can be given instead of a preset

    def __post_init__(self):
        check(self)

    @classmethod
    def choices(cls, args: list[str]) -> dict[str, Any]:
        """Return the words that may follow the verb, each as a type for tyro; {} for none."""
        return {}

    @classmethod
    def own(cls, args: list[str]) -> "Verb | None":
        """Return the defaults for what the options name, where no preset does; None for nothing."""
        return None

    @classmethod
    def about(cls) -> str:
        """Return the text above the options in the help of a verb with choices."""
        return inspect.getdoc(cls) or ""

    @abstractmethod
    def prepare(self) -> Callable[[], Any]:
        """Check everything that can be checked before the work, and write nothing.

        Returns the work.
        """

    def run(self, *, dry: bool = False) -> None:
        """Do the work; with `dry`, only check everything and print the cost."""
        with joined() if self.shared else contextlib.nullcontext():
            work = self.prepare()
            if not dry:
                work()
            elif is_first() and (cost := self.budget()):
                log.info(cost)

    def budget(self) -> str:
        """Return what the work will cost, or "" for a verb that is quick."""
        return ""

    def idle(self) -> dict[str, str]:
        """Return the options that have no effect beside the others, each with the reason."""
        return {}

    def refuse_idle(self, given: Iterable[str]) -> None:
        """Raise ValueError for an option that was given and has no effect."""
        for option, reason in self.idle().items():
            if option in given:
                raise ValueError(f"--{option} has no effect {reason}; leave it out")


def run(verb: str, args: list[str]) -> None:
    """Parse a verb's options and run it. Raise ValueError, of one line, for a mistake in them."""
    logging.raiseExceptions = False  # a closed standard error must not end the work
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ds").setLevel(logging.INFO)
    dry = "--dry-run" in args
    args = [arg for arg in args if arg != "--dry-run"]
    task = parse(verb, args)
    if dry:
        say(json.dumps(to_json(task), indent=2))
    if given := {_option(arg) for arg in args if arg.startswith("--")}:
        task.refuse_idle(given)
    task.run(dry=dry)


def parse(verb: str, args: list[str]) -> Verb:
    """Return a verb with its options."""
    cls = getattr(importlib.import_module(f"ds.cli.{verb}"), VERBS[verb][0])
    choices = cls.choices(args)
    if not choices:
        return _parse(cls, args, f"dstudent {verb}")
    if args and args[0] not in choices and (default := cls.own(args)):
        return _parse(cls, args, f"dstudent {verb}", default=default)
    _check_choice(verb, args, choices, cls.instead)
    kinds = Union[tuple(choices.values())]  # noqa: UP007 their number is not known here
    return _parse(kinds, args, f"dstudent {verb}", args[0], description=cls.about())


def per_preset(cls: Any, change: Callable[[str, Preset], Preset] | None = None) -> dict[str, Any]:
    """Return the presets as choices of a verb, whose `of` makes it from one that is changed."""
    kinds = {}
    for name, make in PRESETS.items():
        default = cls.of(name, change(name, make()) if change else make())
        line = (make.__doc__ or "").partition("\n")[0]
        kinds[name] = Annotated[cls, tyro.conf.subcommand(name, default=default, description=line)]
    return kinds


def classes_in(file: Path | None) -> tuple[type, ...]:
    """Run a Python file that the user named, and return the dataclasses that it defines.

    Returns () for None. Raises ValueError if the file cannot be imported.
    """
    if file is None:
        return ()
    name = f"ds_code_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: is no Python file; give the name of a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{file}: cannot be imported ({reason})") from None
    own = (value for value in vars(module).values() if isinstance(value, type))
    return tuple(c for c in own if c.__module__ == name and is_dataclass(c))


def loaded(
    path: str | Path, device: torch.device, code: Path | None, nfe: int | None
) -> Teacher | Student:
    """Load a teacher or a student, with the network calls that are asked for.

    Raises ValueError for what `load` refuses, and for calls that the student cannot do.
    """
    return in_calls(load(path, device=device, types=classes_in(code)), path, nfe)


def in_calls(model: Teacher | Student, path: str | Path, nfe: int | None) -> Teacher | Student:
    """Return a model of a path with the network calls that are asked for; None: its own.

    A flow on the straight path then takes as many even steps. Raises ValueError for another
    teacher, and for calls that the model cannot do.
    """
    if nfe is None:
        return model
    if isinstance(model, Teacher):
        schedule = model.denoiser.schedule
        even = isinstance(schedule, Linear)
        flow = replace(model, grid=grids.uniform(nfe, schedule)) if even else model
        if flow.nfe != nfe:
            raise ValueError(
                f"nfe is for students and for flows on the straight path; {path} is a teacher that "
                f"makes {model.nfe} network calls"
            )
        return flow
    cast(AbstractMethod, model.method).times(nfe)
    return replace(model, nfe=nfe)


def asked(
    model: AnyModel, classes: str | None, guidance: str | None
) -> tuple[AnyModel, Conditions]:
    """Return a model and what it is asked for, from the words of --classes and --guidance.

    A teacher with classes is guided by its own network. Raises ValueError for what the model cannot
    be asked for.
    """
    scale = _scale(guidance)
    if scale is not None and isinstance(model, Teacher):
        model, scale = cast(Any, _guided(model, scale)), scale if isinstance(scale, tuple) else None
    if "guidance" in model.takes and scale is None:
        learnt = model.provenance.get("guidance")
        raise ValueError(
            f"give --guidance: this {model.kind} is told a scale"
            + (f", and learnt those from {learnt[0]:g} to {learnt[1]:g}" if learnt else "")
        )
    named = () if classes is None else tuple(labels_in("classes", classes, model))
    return model, model.conditions(Conditions(named, scale))


def labels_in(option: str, text: str, model: Teacher | Student) -> list[int]:
    """Return the classes of a model that are listed: "3,7", "0-9", "cat,dog", "none".

    Raises ValueError for classes that it does not have.
    """
    if not model.classes:
        raise ValueError(f"--{option}: this {model.kind} has no classes; leave it out")
    names, found = [*model.provenance.get("classes", ())], []
    for part in map(str.strip, text.split(",")):
        first, dash, last = part.partition("-")
        if part in names:
            found.append(names.index(part))
        elif part == "none":
            found.append(NO_CLASS)
        elif not first.isdecimal() or (dash and not last.isdecimal()):
            known = f"; their names are {', '.join(names[:10])}" if names else ""
            raise ValueError(f"--{option} {text!r}: {part!r} is no class, such as 3 or 0-9{known}")
        elif len(last or first) > 9 or int(last or first) >= model.classes:
            raise ValueError(
                f"--{option} {text!r}: class {last or first} does not exist; this {model.kind} has "
                f"classes 0 to {model.classes - 1}"
            )
        else:
            found += range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError(f"--{option} {text!r} are none")
    return found


def _scale(text: str | None) -> float | tuple[float, float] | None:
    """Read a number or a range: "1.5", "1-4"."""
    if text is None:
        return None
    number = r"\d+\.?\d*|\.\d+"
    if both := re.fullmatch(f"({number})-({number})", text.strip()):
        return float(both[1]), float(both[2])
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--guidance {text!r}: is no number and no range, such as 1.5 or 1-4"
        ) from None


def _guided(teacher: Teacher, scale: float | tuple[float, float]) -> Teacher:
    """Return a teacher that is guided by a scale, or by that of each sample for a range."""
    if not teacher.classes:
        raise ValueError("--guidance: this teacher has no classes to be guided to; leave it out")
    fixed, denoiser = None if isinstance(scale, tuple) else scale, teacher.denoiser
    if denoiser.guidance is None:
        denoiser = Guided(denoiser, fixed)
    else:
        denoiser = replace(denoiser, guidance=replace(cast(Any, denoiser.guidance), scale=fixed))
    return replace(teacher, denoiser=denoiser)


def methods() -> dict[str, type[AbstractMethod]]:
    """Return the methods of the library by tag."""
    found = [cls for cls in vars(ds.methods).values() if ds.methods.is_method(cls)]
    return {tag(cls): cls for cls in sorted(found, key=tag)}


def method_named(name: str) -> type[AbstractMethod]:
    """Return the method of a tag, or the one that a file, whose name ends in .py, defines.

    A tag may be written without its underscores, with hyphens in their place, or as its initials
    where it alone has them.
    """
    known = methods()
    for own, method in known.items():
        if re.sub("[-_]", "", name) == own.replace("_", "") or name == initials(own):
            return method
    if not name.endswith(".py"):
        raise ValueError(f"no method {name!r}; the methods are {', '.join(known)}, or a FILE.py")
    found = [cls for cls in classes_in(Path(name)) if ds.methods.is_method(cls)]
    if len(found) != 1:
        raise ValueError(
            f"{name}: defines {len(found)} methods; a file must define one, a frozen dataclass "
            f"derived from ds.methods.AbstractMethod"
        )
    return found[0]


def initials(name: str) -> str:
    """Return the initials of a tag; "" where it is one word, or another method has them."""
    have = ["".join(word[0] for word in own.split("_")) for own in methods()]
    short = "".join(word[0] for word in name.split("_"))
    return short if len(short) > 1 and have.count(short) == 1 else ""


def solve_idle(solve: SolveConfig) -> dict[str, str]:
    """Return the options of a grid that have no effect."""
    if solve.grid == "uniform":
        return {"solve.top": "with --solve.grid uniform, which has a first time of its own"}
    return {"solve.spacing": f"with --solve.grid {solve.grid}, which is not evenly spaced"}


def train_idle(train: TrainConfig) -> dict[str, str]:
    """Return the options of training that have no effect."""
    return {"train.ema-decay": "with --train.ema-gamma"} if train.ema_gamma else {}


def home_of(name: str) -> Path:
    """Return the directory where a preset's results go by default."""
    return Path("runs") / name


def home_beside(path: str) -> Path:
    """Return the directory for the results of a person's own pictures or teacher, by default.

    It is the one that a directory called teacher lies in, and runs/NAME for anything else.
    """
    where = Path(path).absolute()
    if where.name == "teacher":
        return Path(path).parent
    name = where.name if where.is_dir() else where.name.partition(".")[0]
    return home_of(re.sub(r"[^\w.-]+", "-", name).strip("-.") or "own")


def given(args: list[str], *names: str) -> dict[str, str | None]:
    """Return the values of options, before the others are read; None for those not given."""
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        words.add_argument(f"--{name}", nargs="?")
    return vars(words.parse_known_args(args)[0])


def preset_of(teacher: str) -> Preset:
    """Return the settings for a person's own teacher, by its shape and by what it was taught on."""
    level = log.level
    log.setLevel(logging.ERROR)  # what is said of a teacher is said once, when it is used
    try:
        model = load_teacher(teacher)
    finally:
        log.setLevel(level)
    rows = model.provenance.get("images")
    return presets.own(model.shape, rows if isinstance(rows, int) else None)


def check_outputs(out: Path, *, force: bool = False, apart: targets.Inputs = ()) -> None:
    """Raise ValueError if a model, or the run that makes it, cannot be written.

    An existing model must come from the run beside it. The Trainer compares that run later.
    """
    run = targets.kept(run_folder(out), "run", RUN, apart=apart)
    model = pretrained.is_ours(out) and (run / RUN).exists()
    pretrained.target(out, force=force, run=pretrained.run_of(out) if model else None, apart=apart)


def run_folder(out: Path) -> Path:
    """Return the directory of a run's checkpoints and metrics, beside the model it makes."""
    return out.with_name(f"{out.name}-run")


def watched() -> bool:
    """Return whether standard error is a terminal, where a progress bar is of use."""
    return sys.stderr.isatty()


def say(line: str) -> None:
    """Print a line at once, with the passwords of its URLs removed."""
    try:
        print(redacted(line), flush=True)
    except OSError as error:
        raise RuntimeError(f"standard output: {error.strerror}") from None


def _option(arg: str) -> str:
    """Return an option's name as Verb.idle has it: "--no-online" is "online"."""
    return arg.partition("=")[0].replace("_", "-").removeprefix("--").removeprefix("no-")


def _check_choice(verb: str, args: list[str], choices: Iterable[str], instead: str) -> None:
    """Raise ValueError unless a preset, or another choice, comes first."""
    first = args[0] if args else ""
    if first in choices or {"-h", "--help"} & {*args}:
        return
    names = ", ".join(PRESETS)
    if first and not first.startswith("-"):
        raise ValueError(f"{verb}: no preset {first!r}; the presets are {names}; or {instead}")
    raise ValueError(f"{verb}: name a preset first ({names}), or {instead}")


def _parse(kind: Any, args: list[str], prog: str, choice: str = "", **options: Any) -> Verb:
    """Read options into a dataclass. An error of tyro's becomes a ValueError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind, prog=prog, args=args, config=(tyro.conf.AvoidSubcommands,), **options
            )
    except SystemExit as end:
        if not end.code:
            raise
    see = f"{prog} {choice}".strip()
    raise ValueError(f"{_reason(said.getvalue())} (see `{see} --help`)")


def _reason(said: str) -> str:
    """Return the first paragraph of tyro's error, without its title and the frame around it."""
    has_words = re.compile(r"\w").search
    _title, *lines = (line.strip("│| ") for line in said.splitlines())
    text = " ".join(takewhile(has_words, dropwhile(lambda line: not has_words(line), lines)))
    return re.sub(r"^Error parsing (?!--)\S+: |For full helptext.*", "", text)
