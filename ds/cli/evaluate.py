"""dstudent evaluate: compare a model's images with real ones."""

import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from ds.cli.verb import Classes, Code, Guidance, Here, Model, Verb, asked, loaded, say
from ds.evaluation.by_class import COLUMNS, rows
from ds.evaluation.evaluate import CLASSES, check_evaluation, evaluate, image_shape, record, way
from ds.evaluation.features import (
    DIGITS,
    SIDE,
    AbstractExtractor,
    AveragedPixels,
    Digits,
    Inception,
    Pixels,
)
from ds.evaluation.references import Moments, read_reference
from ds.evaluation.report.page import notes, opening, picture, table, write
from ds.evaluation.report.tables import text_table
from ds.models import pretrained
from ds.models.execution import Execution, Mode, Precision
from ds.models.images import save_png, tile
from ds.models.sampler import Sampler
from ds.models.student import Student
from ds.models.teacher import Teacher
from ds.pairs.pictures import Pictures
from ds.pairs.sources import Pairs
from ds.pairs.store import PairStore
from ds.system import targets
from ds.system.config import Count, Seed, check
from ds.system.distributed import is_first
from ds.system.staging import write_json
from ds.training.presets import Machine

log = logging.getLogger("ds")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation: the reference, the features, the number of images."""

    # digits, a directory of images, an array of them, or a file of mu and sigma
    reference: str = "digits"
    # pixels a side: cut the middle square of each picture of the reference, and scale it
    size: Count | None = None
    # what images are compared on; auto: inception if its weights are given, the digits classifier
    # for 8 x 8 digits, else pixels, of large images after averaging down to 16 x 16
    extractor: Literal["auto", "digits", "pixels", "inception"] = "auto"
    inception_weights: Path | None = None  # a file, for --extractor inception
    count: Count = 4096  # number of images to draw
    classes: Classes = None
    guidance: Guidance = None

    def __post_init__(self):
        check(self)

    def idle(self) -> dict[str, str]:
        """Return the options that have no effect, each with the reason."""
        idle = {"size": "on digits"} if self.reference == "digits" else {}
        if self.extractor in ("auto", "inception"):
            return idle
        return idle | {"inception-weights": f"with --extractor {self.extractor}"}

    def files(self) -> list[Path | str | None]:
        """Return the files to be read."""
        named = [] if self.reference == "digits" else [self.reference]
        return [self.inception_weights, *named]

    def build(
        self, model: Teacher | Student, device: torch.device
    ) -> tuple[Pictures | Moments, AbstractExtractor]:
        """Return the reference and the extractor for the pictures of a model.

        Raises ValueError if one is not available, or does not fit the pictures.
        """
        shape = image_shape(model)
        if self.reference == "digits" and shape != DIGITS:
            raise ValueError(
                f"evaluate: the model's pictures are {list(shape)}, and the reference is digits, "
                f"{list(DIGITS)}; give real images such as a folder of them, with --reference "
                f"(of distill: --judge.reference)"
            )
        reference = read_reference(self.reference, size=self.size)
        unnamed = self.extractor == "auto" and self.inception_weights is None
        if isinstance(reference, Moments) and unnamed:
            raise ValueError(
                f"{self.reference}: moments do not say of what features they are; name those with "
                f"--extractor, or give --inception-weights FILE"
            )
        extractor = self._extractor(shape, device)
        check_evaluation(shape, self.count, reference, extractor)
        return reference, extractor

    def _extractor(self, shape: tuple[int, ...], device: torch.device) -> AbstractExtractor:
        name = self.extractor
        if name == "inception" and self.inception_weights is None:
            raise ValueError("evaluate: extractor inception needs --inception-weights FILE")
        found: AbstractExtractor = Pixels()
        if self.inception_weights is not None and name in ("auto", "inception"):
            found = Inception(self.inception_weights, device=device)
        elif name == "digits" or (name == "auto" and self.reference == "digits"):
            found = Digits()
        elif name == "auto" and max(shape[:2]) > SIDE:
            found = AveragedPixels()
        if name == "auto" and is_first():
            log.info("evaluate: features are %s; --extractor takes others", found.name)
        return found


@dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Compare a model's images with real ones, and write the figures and the protocol as JSON."""

    shared: ClassVar = True

    model: Model
    judge: Annotated[EvalConfig, tyro.conf.arg(name="")] = field(default_factory=EvalConfig)
    store: str | None = None  # pairs; the model is also compared with the held-out ones
    held_out: Count = 1024  # number of held-out pairs, the first of the store
    seed: Seed = 1  # of the noise
    nfe: Count | None = None  # network calls of a student or a flow; None: as saved
    batch_size: Count = 256
    precision: Precision | None = None  # None: bfloat16 for U-Nets on GPUs, else float32
    # what runs the network; None: the fastest mode of its device
    mode: Mode | None = None
    # a JSON file; by default the figures go into metrics.json and the card of a MODEL of ours
    out: Path | None = None
    # an HTML page for people: samples, a column for each class, above a table of its figures
    page: Path | None = None
    force: bool = False  # replace the files --out and --page
    code: Code = None
    machine: Here = field(default_factory=Machine)

    def idle(self) -> dict[str, str]:
        pairs = {} if self.store else {"held-out": "without --store"}
        reason = "without --out or --page: figures in MODEL give way to new ones"
        force = {} if self.out or self.page else {"force": reason}
        return self.judge.idle() | pairs | force

    def prepare(self) -> Callable[[], None]:
        if is_first():
            self._target()
            self._page()
        device = self.machine.use()
        plain = loaded(self.model, device, self.code, self.nfe)
        model, conditions = asked(plain, self.judge.classes, self.judge.guidance)
        held_out = self.store and Pairs(PairStore(self.store), range(self.held_out))
        reference, extractor = self.judge.build(model, device)
        options = {
            "n": self.judge.count,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "execution": self._execution(model),
            "held_out": held_out,
            "conditions": conditions,
        }
        judged = partial(evaluate, model, reference, extractor, **options)
        drawing = partial(
            Sampler,
            model,
            batch_size=self.batch_size,
            execution=options["execution"],
            conditions=conditions,
        )
        return partial(self._evaluate, plain, judged, drawing)

    def _execution(self, model: Teacher | Student) -> Execution | None:
        """Return how to run the model, if an option says anything about it."""
        if not (self.precision or self.mode):
            return None
        return Execution.default(model, precision=self.precision, mode=self.mode)

    def _evaluate(
        self,
        model: Teacher | Student,
        judged: Callable[[], dict[str, Any]],
        drawing: Callable[[], Sampler],
    ) -> None:
        result = judged()
        if is_first():
            log.info("evaluate: %s", way(result))
            if classes := result.get(CLASSES):
                names = tuple(model.provenance.get("classes", ()))
                log.info("%s", text_table(COLUMNS, rows(classes, names)))
            say(json.dumps({k: v for k, v in result.items() if k != "protocol"}, indent=2))
            if self.out is not None:
                write_json(self._target(), result, force=self.force)
            elif pretrained.is_ours(self.model):
                record(self.model, model, result)
            if page := self._page():
                self._write_page(page, drawing(), result)

    def _write_page(self, page: Path, sampler: Sampler, result: dict[str, Any]) -> None:
        """Write the page, whose samples have other noise than those that were judged."""
        asked = sampler.conditions.sheet(80)
        images = sampler(self.seed + 1, range(asked.count), asked.cond.get("label"))
        names = tuple(sampler.model.provenance.get("classes", ()))
        n, around = result["protocol"]["n"], result["protocol"]["reference"].get("n")
        whole = {"images": n, **({"reference": around} if around else {}), **result}
        every = [rows({"0": whole}, ("",))[0]._replace(name="all")]
        named = "label" in asked.cond
        sheet = io.BytesIO()
        save_png(tile(images, asked.columns), sheet)
        calls = f"{sampler.model.nfe} network calls a sample."
        kind = sampler.model.kind
        write(
            page,
            f"{kind.capitalize()}: {self.model}",
            opening(kind, str(self.model), calls + " Each column has one class." * named),
            picture(sheet.getvalue(), "Samples" + ", a column for each class" * named),
            table(COLUMNS, every + rows(result.get(CLASSES, {}), names)),
            notes(
                [
                    f"Obtained in {way(result)}.",
                    "A Frechet distance needs more images than features, drawn and real; classes "
                    "with less have none. Kernel distances are unbiased for few images too.",
                ]
            ),
            force=self.force,
        )
        say(f"page: {page}")

    def _page(self) -> Path | None:
        """Return the path for the page, if one is asked for; ValueError if it cannot be written."""
        if self.page is None:
            return None
        read = [self.model, self.store, self.out, *self.judge.files()]
        return targets.file(self.page, force=self.force, apart=read)

    def _target(self) -> Path:
        """Return the path for the figures. Raise ValueError if it cannot be written."""
        if self.out is not None:
            read = [self.model, self.store, *self.judge.files()]
            return targets.file(self.out, force=self.force, apart=read)
        if pretrained.is_ours(self.model):
            pretrained.annotated(self.model)
        return Path(self.model)
