"""dstudent convert: write a model in another format."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ds.cli.verb import Code, Model, Verb, classes_in, in_calls, say
from ds.models import export, pretrained
from ds.models.convert import diffusers
from ds.models.load import load
from ds.models.teacher import Teacher
from ds.system import targets
from ds.system.config import Count, Natural


@dataclass(frozen=True, kw_only=True)
class Convert(Verb):
    """Write a teacher or a student in another format.

    SOURCE is anything that `dstudent sample` takes. A teacher can become a directory that diffusers
    loads, and so can a student that takes even steps along a straight path, or a single one. Any
    student can become a torch.export program (pt2) or an ONNX model.
    """

    source: Model
    out: Annotated[Path, tyro.conf.Positional]
    to: Literal["ours", "diffusers", "pt2", "onnx"] = "ours"
    nfe: Count | None = None  # network calls of a student or a flow; None: as saved
    image_size: Natural = 0  # pixels a side, for a file that does not record them
    # a scheduler_config.json, or its folder, for a file that does not tell its schedule
    scheduler: Path | None = None
    variant: str | None = None  # of the weights of a diffusers directory, such as fp16
    # what a state dict of consistency_models is, where a teacher and a student look alike
    kind: Literal["teacher", "student"] | None = None
    head_channels: Natural = 0  # channels of a head of attention, for state dicts of ADM's codes
    # order of the channels of q, k and v in state dicts of ADM's codes; new: q, k, v, then heads
    attention_order: Literal["legacy", "new"] | None = None
    # whether a network of improved-diffusion is told 1000 * t / steps instead of t
    rescale_timesteps: bool | None = None
    force: bool = False  # replace the result of an earlier `convert`
    code: Code = None

    def idle(self) -> dict[str, str]:
        reason = f"on {self.source}, which records its own"
        names = [name.replace("_", "-") for name in _TOLD]
        return dict.fromkeys(names, reason) if pretrained.is_ours(self.source) else {}

    def prepare(self) -> Callable[[], None]:
        _TARGETS[self.to](self.out, force=self.force, apart=[self.source, self.scheduler])
        given = {name: getattr(self, name) for name in _TOLD}
        options: dict[str, Any] = {
            k: v for k, v in given.items() if v is not None and (v or v is False)
        }
        model = load(self.source, types=classes_in(self.code), **options)
        model = in_calls(model, self.source, self.nfe)
        if self.to in ("pt2", "onnx") and isinstance(model, Teacher):
            raise ValueError(f"convert: {self.to} is for students, {self.source} is a teacher")
        if self.to == "diffusers":
            export.check_diffusers(model, self.out)
        return partial(self._write, model)

    def _write(self, model: Any) -> None:  # a Teacher or a Student, as the format needs it
        if self.to == "ours":
            model.save_pretrained(self.out, force=self.force)
        else:
            write = {
                "diffusers": export.to_diffusers,
                "pt2": export.to_program,
                "onnx": export.to_onnx,
            }[self.to]
            write(model, self.out, force=self.force)
        say(f"{model.kind}: {self.out}")


# What says more of a file than the file does.
_TOLD = (
    "image_size", "scheduler", "variant", "kind", "head_channels", "attention_order",
    "rescale_timesteps",
)  # fmt: skip
_TARGETS = {
    "ours": pretrained.target,
    "diffusers": diffusers.target,
    "pt2": targets.file,
    "onnx": targets.file,
}
