"""DDIM's whole loop on buffers that stay where they are: one step, replayed while a step counts.

On a GPU the step is captured as a CUDA graph: nothing is launched from Python and nothing waits,
since times and coefficients are rows of tables that the device looks up. Not measured yet.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ds import ops
from ds.engine.run import Engine
from ds.grids import Grid
from ds.schedule import DATA, AbstractSchedule


class DDIMLoop:
    """A DDIM teacher's sampling of batches of one size: loop(z [N, *shape]) -> [N, *shape].

    `images` is that size, the engine's own. The state is float32 (float64 for a float64 engine),
    the network sees a copy in its own dtype, written by the update itself. Coefficients are made in
    float64. The result is the loop's own buffer, which the next call overwrites.

    Song et al. 2020, arXiv:2010.02502, Eq. 12 with sigma_t = 0, which is linear in x and the output
    of the network.
    """

    def __init__(
        self, engine: Engine, schedule: AbstractSchedule, grid: Grid, prediction: str = "eps"
    ):
        place = engine.place
        self.images = place.images
        shape = (self.images, *engine.shape)
        wide = torch.promote_types(place.dtype, torch.float32)
        rows = [_coefficients(schedule, prediction, t, s) for t, s in pairwise((*grid, DATA))]
        self._engine, self._steps = engine, len(grid)
        self._table = torch.tensor(rows, dtype=torch.float64).to(place.device, wide)
        self._times = torch.tensor(grid, device=place.device)
        self._step = torch.zeros(1, dtype=torch.int64, device=place.device)
        empty = torch.empty(shape, dtype=wide, device=place.device)
        self._x = empty.to(memory_format=torch.channels_last)
        self._copy = torch.zeros_like(self._x, dtype=place.dtype)
        self._replay = self._captured() if place.device.type == "cuda" else self._advance

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Integrate noise down to the data.

        Raises:
            ValueError: z is not of the shape that the engine was made for.
        """
        if z.shape != self._x.shape:
            raise ValueError(
                f"DDIMLoop: z must be {list(self._x.shape)}, as the engine's batches, not "
                f"{list(z.shape)}"
            )
        self._x.copy_(z)
        self._copy.copy_(z)
        self._step.zero_()
        for _ in range(self._steps):
            self._replay()
        return self._x

    def _advance(self) -> None:
        """Take the step that the counter is at, and count it up."""
        t = self._times.index_select(0, self._step).expand(len(self._x))
        out = self._engine(self._copy, t)
        ops.solver_update(self._x, [out], self._table, self._step, self._copy)
        self._step += 1

    @torch.no_grad()
    def _captured(self):
        """Capture a step, after two that load and tune what is not loaded and tuned yet."""
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


def _coefficients(
    schedule: AbstractSchedule, prediction: str, t: int, s: int
) -> tuple[float, float]:
    """Return (a, b) with x_s = a x_t + b h for what the network predicts, h."""
    (alpha, sigma), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
    if prediction == "eps":
        return alpha_s / alpha, sigma_s - alpha_s * sigma / alpha
    if prediction == "x0":
        return sigma_s / sigma, alpha_s - sigma_s * alpha / sigma
    return alpha_s * alpha + sigma_s * sigma, sigma_s * alpha - alpha_s * sigma
