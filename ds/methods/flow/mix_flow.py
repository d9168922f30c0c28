"""MixFlow: a source that depends on the data, mixed with noise, so that paths bend less."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from ds.diffusion.grids import Grid
from ds.diffusion.noise import Draws
from ds.methods import losses
from ds.methods.base import AbstractMethod, Progress, built
from ds.methods.flow.path import rowwise
from ds.methods.flow.rectified_flow import RectifiedFlow
from ds.methods.proof import Check, Trial
from ds.methods.proofs import mix_flow as proof
from ds.models.teacher import Teacher
from ds.nets import AbstractNetConfig, MLPConfig, UNetConfig
from ds.pairs.sources import Batch
from ds.system.config import Count, NotNegative, Positive, check

_MIX = 0x3E8F51D7A0B6249C  # the stream of the shares of a row's own source


@dataclass(frozen=True)
class MixFlow(AbstractMethod):
    """Learn a flow from sources that a small network predicts of each image.

    The predictor maps the image x0 to a mean m and a log-variance. A row draws w from 0 to 1, and
    its source is normal, with the mean w * m and the variance w * var + 1 - w: noise for w = 0, the
    image's own for w = 1. The flow is trained on straight lines from the source to x0, and is not
    told w. The gradient also goes into the predictor, through the point on the line and through its
    velocity, and so does that of kl_weight * KL(N(m, var) || N(0, 1)), a sum over elements. Samples
    start from noise. Nayal et al. 2026, arXiv:2604.09181.

    Beware of a small kl_weight. The divergence alone keeps the sources together near N(0, 1), where
    samples start. With too little of it they move to places of their own: the loss and the bend of
    the paths fall, and the samples get worse. It is a sum over elements beside a mean over
    elements, so its weight depends on their number and on the scale of the data. The paper has 1e-5
    for CIFAR-10 and 5e-5 for faces; points in the plane need about 0.1.
    """

    feeds: ClassVar = "images"

    kl_weight: NotNegative = 1e-5  # holds the sources near noise; too little ruins the samples
    nfe: Count = 10  # network calls of the model that is made
    time_scale: Positive = 999.0  # the network is told this times the time, which is 0 to 1
    student: AbstractNetConfig | None = None  # the network to train; else a copy of the teacher's
    # the predictor, which returns twice the channels; None: a U-Net of 32, 64, 64 and 64 channels
    predictor: AbstractNetConfig | None = None

    def __post_init__(self):
        check(self, "MixFlow: ")

    @cached_property
    def flow(self) -> RectifiedFlow:
        """The flow that is trained, whatever its source is."""
        return RectifiedFlow(
            reflow=0, nfe=self.nfe, time_scale=self.time_scale, student=self.student
        )

    def init(self, teacher: Teacher) -> nn.ModuleDict:
        modules = self.flow.init(teacher)
        modules["predictor"] = built(self.predictor or _predictor(teacher.shape))
        return modules

    def loss(self, modules: nn.ModuleDict, batch: Batch, progress: Progress) -> Tensor:
        mixed, divergence = self.mixed(modules["predictor"], batch, batch.draws.uniform(_MIX))
        error = self.flow.errors(modules["student"], mixed)[0]
        return losses.mean(error, "l2") + self.kl_weight * divergence.mean()

    def mixed(self, predictor: nn.Module, batch: Batch, w: Tensor) -> tuple[Batch, Tensor]:
        """Return a batch with sources in the place of its noise, for shares w [N] of their own.

        Also return the divergence of each row's own source from noise, [N].
        """
        x0 = batch.x0
        out = predictor(x0, x0.new_zeros(len(x0))).to(x0.dtype)
        if out.shape[1] != 2 * x0.shape[1]:
            raise ValueError(
                f"MixFlow: the predictor returns {out.shape[1]} channels of {x0.shape[1]}; it must "
                f"return {2 * x0.shape[1]}, a mean and a log-variance of each (out_channels, or "
                f"out_dim of an MLP)"
            )
        mean, log_var = out.chunk(2, 1)
        var, w = log_var.exp(), rowwise(w, x0).to(x0.dtype)
        source = w * mean + (w * var + 1 - w).sqrt() * batch.noise
        divergence = 0.5 * (mean.square() + var - 1 - log_var).flatten(1).sum(1)
        return batch._replace(noise=source), divergence

    def times(self, nfe: int) -> Grid:
        return self.flow.times(nfe)

    def sample(
        self,
        net: nn.Module,
        z: Tensor,
        *,
        nfe: int = 10,
        cond: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        return self.flow.sample(net, z, nfe=nfe, cond=cond)

    def result(self, net: nn.Module) -> Teacher:
        return self.flow.result(net)

    def trial(self) -> Trial:
        return Trial(
            {"kl_weight": 0.1, "time_scale": 1.0},
            bars={2: 0.25, 4: 0.1, 8: 0.07, 100: 0.07},
            controls={"plain flow": RectifiedFlow(reflow=0, time_scale=1.0)},
            shares={2: 0.5},
        )

    def measure(self, net: nn.Module, z: Tensor) -> tuple[Check, ...]:
        return proof.measure(self, net, z)

    def identity(self) -> tuple[Check, ...]:
        return proof.identity(self)


def _predictor(shape: tuple[int, ...]) -> AbstractNetConfig:
    """Return a small predictor for samples of a shape.

    Of images it is the paper's, whose four levels end at 4 x 4 for images of 32 x 32, with fewer
    levels where images are smaller or cannot be halved.
    """
    if len(shape) == 1:
        return MLPConfig(dim=shape[0], out_dim=2 * shape[0])
    channels, height, width = shape
    levels = 1
    while levels < 4 and not any(side % 2**levels or side >> levels < 4 for side in shape[1:]):
        levels += 1
    return UNetConfig(
        image_size=(height, width),
        in_channels=channels,
        out_channels=2 * channels,
        channels=32,
        channel_mult=(1, 2, 2, 2)[:levels],
        attention_resolutions=(height >> (levels - 1),),
        head_channels=8,
    )
