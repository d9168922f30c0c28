"""The network that runs a plan, in place of the U-Net it was made of."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from ds.engine.calls import InFloat32, Target, values
from ds.engine.plan import RUNS, Plan, can_run
from ds.engine.rewrites import Rewrites
from ds.engine.told import Told
from ds.engine.walk import INPUT
from ds.nets.base import CONTEXT
from ds.nets.embedding import beside, check_conditions

# Bytes of the largest tensor of a call on a CPU, which takes larger batches a part at a time: about
# what its last cache keeps until the next call of the plan reads it.
CACHE = 16 * 2**20
# Part of 1 + |t| by which a time may differ from a known one: a few roundings of float32, and less
# than the distance of two indices of the longest schedule.
ROUNDING = 2.0**-21


class Engine(nn.Module):
    """A U-Net for inference: engine(x [N, C, H, W], t [N], **cond), with one time for all.

    The conditions are those that the network takes, [N, ...] each. The result is the network's,
    [N, C, H, W].

    The embeddings of `times` are computed ahead, up to where conditions are added. A time is known
    if it is one of them but for float32 rounding. On a CPU, an unknown time is added when it first
    comes, and a call with different times raises ValueError. A GPU would have to be waited for, so
    there both give NaN. A CPU runs images that share their conditions as it runs those without.

    The result has the dtype of x. The weights are packed for batches of `images`; on a CPU for as
    many of them as fit its cache, and larger batches are cut. Weights that need no packing are
    shared with the network, which must not change any more. An engine has no parameters and no
    gradient.

    `dtype` is by default float32 on CPUs and bfloat16 on GPUs; a float64 network keeps float64. The
    experimental float8_e4m3fn is bfloat16 except for the convolutions that can multiply in it
    (ds.engine.rewrites.in_float8). With `tune`, cuDNN times its algorithms for each convolution and
    takes the fastest; another process may choose others, so results differ by rounding.

    Raises:
        ValueError: the engine cannot run the network, or it is on a GPU and has no times.
    """

    def __init__(
        self,
        net: nn.Module,
        times: Iterable[float] = (),
        *,
        images: int = 256,
        dtype: torch.dtype | None = None,
        rewrites: Rewrites | None = None,
        tune: bool = False,
    ):
        super().__init__()
        self.tune = tune
        if not can_run(net):
            raise ValueError(f"Engine: net must be one of the {RUNS}, not {type(net).__name__}")
        weight = net.conv_in.weight
        float8 = dtype == torch.float8_e4m3fn
        dtype = torch.bfloat16 if float8 else dtype or _dtype(weight)
        self.target = Target(weight.device, dtype, images, float8)
        self.rewrites = rewrites or Rewrites.good_for(self.target)
        self.plan = Plan.of(net, self.target, self.rewrites)
        if weight.device.type == "cpu":
            largest = max(values((shape,)) for shape in self.plan.shapes.values())
            fit = max(1, CACHE // (largest * self.target.dtype.itemsize))
            self.target = replace(self.target, images=min(images, fit))
            self.plan = Plan.of(net, self.target, self.rewrites)
        self.shape, self.config = net.shape, net.config
        self._prepared = self.plan.prepare(self.target)
        wide = isinstance(self.plan.steps[0].call, InFloat32)
        self._takes = self.target.wide if wide else self.target.dtype
        known = sorted(set(times))
        if weight.is_cuda and not known:
            raise ValueError("Engine: on a GPU it needs the times of its calls")
        self._source = [net]  # in a list, or its weights would be this module's
        self._told = self._told_in(self.target.wide) if net.config.takes else None
        self._times = torch.tensor(known, dtype=torch.float64, device=weight.device)
        self._table = self.begin(known)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        check_conditions(self.config, cond, len(x))
        if not len(x):
            return x.new_empty(0, *self.plan.shapes[self.plan.steps[-1].outputs[0]])
        x, numbers = beside(x, cond), {k: v for k, v in cond.items() if k != CONTEXT}
        row, parts = self.row(self._begun(t), _shared(numbers)), (x,)
        if x.device.type == "cpu":
            parts = x.chunk(-(-len(x) // self.target.images))
        rows = [row] * len(parts) if row.dim() == 1 else row.split([len(part) for part in parts])
        made = [self.call(*each) for each in zip(parts, rows, strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def call(self, x: Tensor, row: Tensor) -> Tensor:
        """Run the plan for images that are told a row, [columns] for all or [N, columns]."""
        made = {INPUT: x.to(self._takes).contiguous(memory_format=torch.channels_last)}
        with _cudnn_tunes(self.tune):
            for run, step, last in self._prepared:
                out = run(row, *(made[name] for name in step.inputs))
                made |= zip(step.outputs, out if isinstance(out, tuple) else (out,), strict=True)
                for name in last:  # its memory goes to what comes next
                    del made[name]
        (result,) = made.values()
        return result.to(x.dtype)

    def begin(self, times: Sequence[float] | Tensor) -> Tensor:
        """Return what depends on the time alone, on the device: [M, features], one of which `row`
        takes. Without conditions these are the rows themselves.
        """
        if not isinstance(times, Tensor):
            whole = all(isinstance(t, Integral) for t in times)
            times = torch.tensor(times, dtype=torch.int64 if whole else torch.float64, device="cpu")
        told = self._told_in(torch.float64)
        begun = told.begin(times.to(self.target.device))
        return (begun if self._told else told.finish(begun, {})).to(self.target.wide)

    def row(self, begun: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the row that a call takes, of what `begin` made of its time, [features].

        It is [columns] for conditions of one image, or without any, and [N, columns] for more.
        """
        if self._told is None:
            return begun
        rows = self._told.finish(begun[None], cond)
        return rows[0] if len(rows) == 1 else rows

    def _told_in(self, dtype: torch.dtype) -> Told:
        return Told(self._source[0], dtype, folded=self.rewrites.scale_into_norm)

    def _begun(self, t: Tensor) -> Tensor:
        """Return what was begun of the one time that t [N] holds."""
        if not self.rewrites.time_table:
            return self.begin(t[:1])[0]
        distance = (self._times[:, None] - t).abs().amax(1)  # to the farthest of t
        known = distance <= ROUNDING * (1 + self._times.abs())
        if t.device.type == "cpu" and not known.any():
            self._add(t)
            return self._begun(t)
        nearest = distance.where(known, torch.inf).argmin().view(1)
        return self._table.index_select(0, nearest)[0].where(known.any(), torch.nan)

    def _add(self, t: Tensor) -> None:
        """Add the one time that t [N] holds to the table."""
        time = t.unique()
        if len(time) != 1:
            raise ValueError(f"Engine: all images of a call have one time, not {time.tolist()[:3]}")
        self._table = torch.cat([self._table, self.begin(time)])
        self._times = torch.cat([self._times, time])


def _shared(cond: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return conditions [N, ...], or on a CPU [1, ...] where all images share all of them."""
    if any(value.is_cuda or not (value == value[:1]).all() for value in cond.values()):
        return cond
    return {name: value[:1] for name, value in cond.items()}


@contextmanager
def _cudnn_tunes(tune: bool) -> Iterator[None]:
    """Let cuDNN try its algorithms, or not, whatever the process has it do elsewhere."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = tune
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _dtype(weight: Tensor) -> torch.dtype:
    if weight.dtype == torch.float64:
        return weight.dtype
    return torch.bfloat16 if weight.is_cuda else torch.float32
