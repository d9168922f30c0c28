"""The network that runs a plan, in the place of the U-Net it was made of."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ds.engine.calls import Place
from ds.engine.plan import INPUT, Plan, time_rows
from ds.engine.rewrites import Rewrites
from ds.nets import UNet


class Engine(nn.Module):
    """A U-Net for inference at given times: engine(x [N, C, H, W], t [N]) -> [N, C, H, W].

    All images of a call have one time, which is among `times`. On a CPU another is an error; on a
    GPU, which is not waited for, it makes the result NaN. The result has the dtype of x. The
    weights are packed for calls of `images` images, and are the U-Net's at the moment when this is
    made; it has no parameters, and no gradient. `dtype` is float32 on CPUs and bfloat16 on GPUs if
    it is not given; a float64 network keeps float64.

    Raises:
        ValueError: there are no times, or the network is no U-Net of ds.nets.
    """

    def __init__(
        self,
        net: UNet,
        times: Iterable[int],
        *,
        images: int = 256,
        dtype: torch.dtype | None = None,
        rewrites: Rewrites | None = None,
    ):
        super().__init__()
        if not isinstance(net, UNet):
            raise ValueError(f"Engine: net must be a ds.nets.UNet, not {type(net).__name__}")
        weight = net.conv_in.weight
        self.place = Place(weight.device, dtype or _dtype(weight), images)
        self.rewrites = rewrites or Rewrites.good_for(self.place)
        self.plan = Plan.of(net, self.place, self.rewrites)
        self.shape = net.shape
        self._prepared = self.plan.prepare(self.place)
        self._wide = torch.promote_types(self.place.dtype, torch.float32)
        self._times = torch.tensor(sorted(set(times)), device=weight.device)
        if not len(self._times):
            raise ValueError("Engine: times must hold one time or more")
        self._source = [net]  # in a list, or its weights would be this module's
        if self.rewrites.time_table:
            self._table, self._source = time_rows(net, self._times).to(self._wide), []

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        row = self._row(t)
        values = {INPUT: x.to(self.place.dtype).contiguous(memory_format=torch.channels_last)}
        for run, step, last in self._prepared:
            made = run(row, *(values[name] for name in step.inputs))
            values |= zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=True)
            for name in last:  # its memory goes to what comes next
                del values[name]
        (result,) = values.values()
        return result.to(x.dtype)

    def _row(self, t: Tensor) -> Tensor:
        """Return the row of the one time that t [N] holds."""
        known = (self._times[:, None] == t).all(1)
        if t.device.type == "cpu" and not known.any():
            raise ValueError(
                f"Engine: t must hold one of the times of the plan ({len(self._times)} from "
                f"{int(self._times[0])} to {int(self._times[-1])}) for all images, not "
                f"{sorted(set(t.tolist()))[:3]}"
            )
        if self._source:
            row = time_rows(self._source[0], t[:1])[0].to(self._wide)
        else:
            row = self._table.index_select(0, known.int().argmax().view(1))[0]
        return row.where(known.any(), torch.nan)


def _dtype(weight: Tensor) -> torch.dtype:
    if weight.dtype == torch.float64:
        return weight.dtype
    return torch.bfloat16 if weight.is_cuda else torch.float32
