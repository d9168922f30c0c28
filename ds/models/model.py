"""Model, the base of teachers and students: a network, sampling with it, a directory on disk."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from ds.diffusion.conditions import NAMES, Conditions, labels_of
from ds.diffusion.noise import Draws
from ds.engine import Engine, times
from ds.models import pretrained
from ds.models.decoder import Decoder
from ds.models.images import is_picture
from ds.nets.base import told

M = TypeVar("M", bound="Model")


class Model(ABC):
    """A network and the way to sample with it: a Teacher or a Student.

    Models are frozen values; the weights are those of the network, which several may share.
    """

    kind: ClassVar[str]
    net: nn.Module
    nfe: int  # network calls per sample
    decoder: Decoder | None = None  # makes pictures of samples that are latents
    provenance: dict[str, Any]  # where it comes from, for people

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, (C, H, W) for images."""
        return tuple(self.net.shape)  # type: ignore[arg-type]

    @property
    def makes_pictures(self) -> bool:
        """Whether the samples themselves are pictures, and not latents, points or fields."""
        return self.decoder is None and is_picture(self.shape)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """The shape (C, H, W) of the pictures that people see, decoded ones; None without any."""
        if self.decoder is not None:
            return self.decoder.image_shape(self.shape)
        return cast(tuple[int, int, int], self.shape) if is_picture(self.shape) else None

    def require_images(self, what: str) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the pictures; ValueError, for `what`, without any."""
        if (shape := self.image_shape) is None:
            raise ValueError(
                f"{what}: samples of shape {list(self.shape)} are no images [C, H, W] of 1 or 3 "
                f"channels, and the model has no decoder; use a Sampler's `batches`, or "
                f"`dstudent sample --out samples.npy`"
            )
        return shape

    def decoded(self, x: Tensor) -> Tensor:
        """Return the pictures of samples [N, *shape]: floats [N, C, H, W], about [-1, 1].

        Without a decoder they are the samples themselves.
        """
        return x if self.decoder is None else self.decoder(x)

    @property
    def classes(self) -> int:
        """The number of classes that a sample can be asked for; 0: it cannot be asked."""
        return told(self.net)[1]

    @property
    def takes(self) -> tuple[str, ...]:
        """What the conditions of a sample must say: "label", "guidance", both or nothing."""
        return tuple(name for name in NAMES if name in self._told())

    def _told(self) -> tuple[str, ...]:
        """Return the names of everything that is told of a sample beside its time."""
        return told(self.net)[0]

    def conditions(self, asked: Conditions | None = None) -> Conditions:
        """Return what samples are asked for: `asked`, and any class if it names none.

        Raises ValueError for what is no Conditions, for classes that the model does not have, for a
        guidance scale that it does not take, and without one that it does.
        """
        asked = Conditions() if asked is None else asked
        if not isinstance(asked, Conditions):
            raise ValueError(f"conditions must be a ds.Conditions or None, not {asked!r}")
        if asked.classes:
            labels_of("conditions", asked.classes, len(asked.classes), self.classes)
        elif self.classes:
            asked = replace(asked, classes=tuple(range(self.classes)))
        elif "label" in self.takes:
            raise ValueError(
                f"conditions: this {self.kind} is asked for a class, and does not say how many "
                f"there are; give its network, or ds.ClassifierGuided, `classes`"
            )
        if "guidance" in self.takes and asked.guidance is None:
            raise ValueError(
                f"conditions: this {self.kind} is told a guidance scale; give one, or a range, as "
                f"in ds.Conditions(guidance=2.0)"
            )
        if asked.guidance is not None and "guidance" not in self.takes:
            raise ValueError(
                f"conditions: this {self.kind} takes no guidance scale; leave guidance "
                f"({asked.guidance}) out"
            )
        return asked

    def unguided(self: M) -> M:
        """Return the same model without guidance: itself, if it has none."""
        return self

    def plain(self, noise: Tensor) -> dict[str, Tensor]:
        """Return conditions for a call whose answer does not matter: class 0 and scale 1."""
        scale = 1.0 if "guidance" in self.takes else None
        asked = Conditions((0,) if self.classes else (), scale)
        index = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
        return asked.draw(0, index)

    def _check(self, cond: Mapping[str, Tensor], noise: Tensor) -> None:
        """Raise ValueError for labels, if they are on the CPU, that the model does not have."""
        label = cond.get("label")
        if label is not None and self.classes and label.device.type == "cpu":
            labels_of(f"{self.kind}.sample", label, len(noise), self.classes)

    @abstractmethod
    def sample(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Turn noise [N, *shape] into samples of the same shape, about [-1, 1], not clipped.

        `cond` holds what the model `takes`: "label", int64 [N], and "guidance", float32 [N]. A
        stochastic model takes the noise that it adds on its way from `draws`.
        """

    @abstractmethod
    def call(self, noise: Tensor) -> Tensor:
        """Make the first network call of `sample`, to measure what one costs."""

    @abstractmethod
    def using(self: M, net: nn.Module) -> M:
        """Return the same model with another network."""

    def compile(self: M) -> M:
        """Return the same model with a compiled network; on a CPU its weights are frozen."""
        options: Any = {"freezing": True} if device_of(self.net).type == "cpu" else None
        return self.using(cast(nn.Module, torch.compile(self.net, options=options)))

    def engine(self: M, images: int, **options: Any) -> M:
        """Return the same model for inference, `images` at a time, with a ds.engine.Engine."""
        options = {"dtype": dtype_of(self.net), **options}
        return self.using(Engine(self.net, times(self), images=images, **options))

    def card(self, name: str, provenance: dict[str, Any] | None = None) -> str:
        """Return the text of a model card for a directory of this name.

        The card lists `provenance`, by default that of the model.
        """
        facts = self.provenance if provenance is None else provenance
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        table = f"\n| where it comes from | |\n| --- | --- |\n{rows}" if rows else ""
        asked = ", conditions=ds.Conditions(guidance=2.0)" if "guidance" in self.takes else ""
        draw, which = f"ds.Sampler(model{asked})", "seed=0, indices=range(64)"
        if self.classes:
            which += ", labels=0"
        if self.image_shape:
            draw = f"images = {draw}({which})"
        else:
            draw = f"samples = [*{draw}.batches({which})]"
        return (
            f"{self._headline()}\n\n```python\nimport ds\n\n"
            f"model = ds.load_{self.kind}({json.dumps(name, ensure_ascii=False)})\n"
            f"{draw}\n```\n{table}"
        )

    def save_pretrained(self, path: str | Path, *, force: bool = False, **provenance: Any) -> None:
        """Write a directory that ds.load_teacher or ds.load_student reads, with a model card.

        `provenance`, such as hashes and figures, goes into config.json and the card. Raises
        ValueError if the path cannot be written to or holds something; `force` replaces another
        model.
        """
        about = {**self._about(), "provenance": self.provenance | provenance}
        parts = self.decoder.files() if self.decoder else {}
        pretrained.write(path, self.kind, about, self.net, self.card, parts, force=force)

    def _check_decoder(self) -> None:
        if self.decoder is not None:
            self.decoder.image_shape(self.shape)

    def _describe(self) -> str:
        """Describe what is drawn in words, for people."""
        if (shape := self.image_shape) is None:
            return f"Samples of shape {list(self.shape)}"
        c, h, w = shape
        images = f"mages of {h} x {w} pixels, {c} channel{'s' * (c > 1)}"
        if self.classes:
            images += f", of {self.classes} classes"
        if self.decoder is None:
            return f"I{images}"
        return f"Latents of shape {list(self.shape)}, decoded to i{images}"

    @abstractmethod
    def _headline(self) -> str:
        """Return the title and the first line of a model card."""

    @abstractmethod
    def _about(self) -> dict[str, Any]:
        """Return what config.json holds beside the network and the provenance."""


def device_of(net: nn.Module, otherwise: torch.device | str = "cpu") -> torch.device:
    """Return the device of a network, or `otherwise` for one without tensors."""
    tensors = (*net.parameters(), *net.buffers())
    return tensors[0].device if tensors else torch.device(otherwise)


def dtype_of(net: nn.Module) -> torch.dtype:
    """Return the dtype of a network's weights, float32 for one without any."""
    if isinstance(net, Engine):  # its weights are packed
        return net.target.dtype
    return next((w.dtype for w in net.parameters()), torch.float32)


def dtype_name(net: nn.Module) -> str:
    """Return the name of the dtype of a network's weights, such as "float16"."""
    return str(dtype_of(net)).removeprefix("torch.")
