"""A student: a distilled network, and the method that samples from it in one call or a few."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ds.diffusion.noise import Draws
from ds.models.decoder import Decoder
from ds.models.model import Model
from ds.system.config import Count, require, to_json


@runtime_checkable
class Generator(Protocol):
    """A distillation method, as far as sampling needs it."""

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 1,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Turn noise [N, *shape] into samples with nfe network calls, which are told `cond`."""
        ...


@dataclass(frozen=True, eq=False)
class Student(Model):
    """A distilled network and the method that samples from it with `nfe` network calls.

    A student of a teacher of latents has its decoder. Raises ValueError for an nfe below 1, and
    for a decoder of other latents.
    """

    net: nn.Module
    method: Generator
    nfe: Count = 1
    provenance: dict[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None
    kind: ClassVar[str] = "student"

    def __post_init__(self):
        require("Student", Count, nfe=self.nfe)
        self._check_decoder()

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        self._check(cond := {**(cond or {})}, noise)
        return self.method.sample(self.net, noise, nfe=self.nfe, cond=cond, draws=draws)

    @torch.no_grad()
    def call(self, noise: Tensor) -> Tensor:
        return self.method.sample(self.net, noise, cond=self.plain(noise))

    def using(self, net: nn.Module) -> "Student":
        return replace(self, net=net)

    def _headline(self) -> str:
        steps, calls = ("one", "call") if self.nfe == 1 else (self.nfe, "calls")
        return (
            f"# A {steps}-step generator, distilled by denoising-student\n\n"
            f"{self._describe()}, {steps} network {calls} a sample, "
            f"{sum(p.numel() for p in self.net.parameters()):,} parameters. "
            f"Method: {type(self.method).__name__}."
        )

    def _about(self) -> dict[str, Any]:
        return {"method": to_json(self.method), "nfe": self.nfe}
