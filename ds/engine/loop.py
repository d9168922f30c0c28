"""A model's whole loop on fixed buffers: one step with a counter, replayed for all steps.

On a GPU the step is captured as a CUDA graph. Python then launches nothing and waits for nothing:
the device itself looks up the rows of times and coefficients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ds import ops
from ds.diffusion.noise import Draws
from ds.engine.run import Engine
from ds.nets.base import CONTEXT, told
from ds.nets.embedding import check_conditions

# Relative error that float64 leaves in coefficients found by least squares.
TOLERANCE = 1e-9


class Sampled(Protocol):
    """A teacher or a student: it makes samples from noise by calling a network."""

    @property
    def net(self) -> nn.Module:
        """The network."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        ...

    def using(self, net: nn.Module) -> "Sampled":
        """Return the same model with another network."""
        ...

    def unguided(self) -> "Sampled":
        """Return the same model without guidance: itself, if it has none."""
        ...

    def plain(self, noise: Tensor) -> dict[str, Tensor]:
        """Return conditions for a call whose answer does not matter."""
        ...

    def sample(
        self,
        noise: Tensor,
        *,
        cond: Mapping[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Turn noise [N, *shape] into samples, which are told `cond`."""
        ...


class _Recorder(nn.Module):
    """A network that records its inputs and answers with the next of some outputs.

    Zeros follow for what its network returns beside, such as a learned variance.
    """

    def __init__(self, model: Sampled, outputs: Tensor | None = None):
        super().__init__()
        self.shape, self.outputs = model.shape, outputs
        self.config: Any = getattr(model.net, "config", None)
        self.parts = getattr(self.config, "outputs", model.shape[0]) // model.shape[0]
        self.inputs: list[Tensor] = []
        self.times: list[float] = []
        self.cond: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        call = len(self.times)
        self.inputs.append(x)
        self.times.append(t[0].item())
        self.cond.append(cond)
        out = torch.zeros_like(x) if self.outputs is None else self.outputs[call : call + 1]
        return torch.cat([out, *[torch.zeros_like(out)] * (self.parts - 1)], 1)


def _recorded(model: Sampled, z: Tensor, outputs: Tensor | None = None) -> tuple[_Recorder, Tensor]:
    """Sample from noise z [1, ...] with a recorder for the network; return it and the sample."""
    recorder = _Recorder(model, outputs)
    draws = Draws(0, torch.zeros(1, dtype=torch.int64, device="cpu"))
    return recorder, model.using(recorder).sample(z, cond=model.plain(z), draws=draws)


def times(model: Sampled) -> tuple[float, ...]:
    """Return the times that a model feeds its network, in order; guidance does not change them."""
    z = torch.zeros(1, *model.shape, dtype=torch.float64, device="cpu")
    return tuple(_recorded(model.unguided(), z)[0].times)


@dataclass(frozen=True, eq=False)
class Recurrence:
    """A model as a recurrence in the inputs and outputs of its network.

    With x_i the input of the network at times[i], h_i its output, x_n the sample, and a memory of m

        x_0 = scale * noise
        x_{i+1} = table[i] @ (x_i, h_i, x_{i-1}, h_{i-1}, ..., x_{i-m+1}, h_{i-m+1})

    Every deterministic solver on a fixed grid has this form, however it is written. So do methods
    that end in a weighted sum. The table is float64 [n, 2 m]. `cond` are the conditions that the
    model itself tells its network in each call, [n, ...] each; all others are the caller's.
    """

    times: tuple[float, ...]
    table: Tensor
    scale: float = 1.0
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def memory(self) -> int:
        """The number of calls that a step looks back to."""
        return self.table.shape[1] // 2

    @classmethod
    def of(cls, model: Sampled) -> "Recurrence":
        """Find the recurrence of a model by sampling in float64 with recorders for its network.

        Raises:
            ValueError: the sample is not linear in the noise and the outputs; a stochastic one is
                not, and a guided one calls its network for more than the sample. Or the network is
                told an image.
        """
        if model.unguided() is not model:
            raise ValueError(
                "a loop needs one network call for a sample and step; this model is guided, which "
                "takes more"
            )
        if CONTEXT in told(model.net)[0]:
            raise ValueError("a loop tells its network numbers; this one is told an image, context")
        z = torch.zeros(1, *model.shape, dtype=torch.float64, device="cpu")
        recorder, _ = _recorded(model, z)
        cond, visited = _own_conditions(recorder, model.plain(z)), tuple(recorder.times)
        count = len(visited)
        # Each unit vector stands for the noise or an output, so what comes out are coefficients.
        x = _states(model, torch.eye(count + 1, dtype=torch.float64, device="cpu"))
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(count + 1, 64, generator=generator, dtype=torch.float64, device="cpu")
        drawn *= 1e3  # large, so that clipping would show
        if not _near(_states(model, drawn), x @ drawn):
            raise ValueError(
                "a loop needs samples that are linear in the noise and in what the network "
                "returns; this model does something else with them"
            )
        h = torch.eye(count + 1, dtype=torch.float64, device="cpu")[1:]
        memories = range(1, count + 1)  # the last of them always suffices
        tables = ([_coefficients(x, h, i, m) for i in range(count)] for m in memories)
        table = next(rows for rows in tables if all(row is not None for row in rows))
        return cls(visited, torch.stack(table), x[0, 0].item(), cond)


def _own_conditions(recorder: _Recorder, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model told the recorder in each call beside what is given: [n, ...] each."""
    names = recorder.cond[0].keys() - given.keys()
    for name in names:
        if any(len(cond[name]) != 1 for cond in recorder.cond):
            raise ValueError(
                f"a loop needs conditions that are given to each sample; {name} is bound to more "
                f"than one row"
            )
    return {name: torch.cat([cond[name] for cond in recorder.cond]) for name in names}


def _states(model: Sampled, drawn: Tensor) -> Tensor:
    """Return all x_i [n + 1, K] of a model, given the noise and then the outputs, [n + 1, K].

    The samples have as many dimensions as the model's, and K elements.
    """
    drawn = drawn.view(*drawn.shape, *[1] * (len(model.shape) - 1))
    recorder, sample = _recorded(model, drawn[:1], drawn[1:])
    return torch.cat([*recorder.inputs, sample]).flatten(1)


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


def _coefficients(x: Tensor, h: Tensor, i: int, memory: int) -> Tensor | None:
    """Solve for row i of the table; return None if the memory is too short."""
    known = [v[k] for k in range(i, max(i - memory, -1), -1) for v in (x, h)]
    columns = torch.stack(known, 1)
    row = torch.linalg.lstsq(columns, x[i + 1], driver="gelsd").solution
    if not _near(columns @ row, x[i + 1]):
        return None
    return torch.cat([row, row.new_zeros(2 * memory - len(row))])


class Loop:
    """The sampling of batches of one size, on an engine: loop(z, **cond) -> x, [N, *shape] both.

    The size is the engine's own. The conditions are [N, ...] each. The state is float32 (float64
    for a float64 engine), the network sees a copy in its own dtype, written by the update itself.
    The result is the loop's own buffer, which the next call overwrites.
    """

    def __init__(self, engine: Engine, recurrence: Recurrence):
        target = engine.target
        self.images = target.images
        self._engine, self._steps, self._scale = engine, len(recurrence.times), recurrence.scale
        self._begun = engine.begin(recurrence.times)
        self._table = recurrence.table.to(target.device, target.wide)
        self._step = torch.zeros(1, dtype=torch.int64, device=target.device)
        self._own = {name: v.to(target.device) for name, v in recurrence.cond.items()}
        self._given = _buffers(engine, self.images, self._own)
        state = torch.zeros(self.images, *engine.shape, dtype=target.wide, device=target.device)
        self._x = state.to(memory_format=torch.channels_last)
        self._copy = torch.zeros_like(self._x, dtype=target.dtype)
        # x and h of the last call, x and h of the one before, and so on.
        pair = self._x, self._copy
        self._past = [torch.zeros_like(y) for y in pair * (recurrence.memory - 1)]
        self._replay = self._captured() if target.device.type == "cuda" else self._advance

    @torch.no_grad()
    def __call__(self, z: Tensor, **cond: Tensor) -> Tensor:
        """Turn noise into samples.

        Raises:
            ValueError: z is not of the shape that the engine was made for, or the conditions are
                not those of the network that the model does not tell it itself.
        """
        config, images = self._engine.config, len(self._x)
        own = {name: value[:1] for name, value in self._own.items()}
        check_conditions(config, own | cond, images)
        if z.shape != self._x.shape:
            raise ValueError(
                f"Loop: z must be {list(self._x.shape)}, as the engine's batches, not "
                f"{list(z.shape)}"
            )
        with torch.cuda.device_of(self._x):
            for name, buffer in self._given.items():  # one that may be left out is 0
                buffer.copy_(cond[name]) if name in cond else buffer.zero_()
            self._x.copy_(z).mul_(self._scale)
            self._copy.copy_(self._x)
            for part in self._past:  # the first coefficients are 0, but 0 * NaN is NaN
                part.zero_()
            self.start()
            for _ in range(self._steps - 1):
                self._replay()
        return self._x

    def start(self) -> Tensor:
        """Take the first step on the buffer's content, to measure a step; return the buffer."""
        with torch.cuda.device_of(self._x):
            self._step.zero_()
            self._replay()
        return self._x

    def _advance(self) -> None:
        """Take the step that the counter names, and increment it."""
        begun = self._begun.index_select(0, self._step)[0]
        own = {name: v.index_select(0, self._step) for name, v in self._own.items()}
        out = self._engine.call(self._copy, self._engine.row(begun, self._given | own))
        if out.shape != self._x.shape:  # a learned variance follows, which is not used
            out = torch.empty_like(self._copy).copy_(out[:, : self._x.shape[1]])
        now = [self._x.clone(), out] if self._past else []
        ops.solver_update(self._x, [out, *self._past], self._table, self._step, self._copy)
        for older, newer in list(zip(self._past, [*now, *self._past], strict=False))[::-1]:
            older.copy_(newer)
        self._step += 1

    @torch.no_grad()
    def _captured(self):
        """Capture a step, after two steps that load and tune kernels."""
        with torch.cuda.device(self._x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step.zero_()
                    self._advance()
            torch.cuda.current_stream().wait_stream(stream)
            self._step.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._advance()
        return graph.replay


def _buffers(engine: Engine, images: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a buffer for each condition that a caller gives or may give."""
    target, shapes, buffers = engine.target, engine.config.shapes, {}
    for name in shapes.keys() - own.keys():
        dtype = torch.int64 if name == "label" else target.wide
        buffers[name] = torch.zeros(images, *shapes[name], dtype=dtype, device=target.device)
    return buffers
