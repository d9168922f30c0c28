"""Compile the loss of every method to machine code; its figures beside those of the eager loss.

    python -m tests.compiled
    python -m tests.compiled Shortcut-0 MeanFlow-0

Prints, for each method, the largest difference of the loss and of its gradients, each as a share of
the largest figure of the eager ones, and the seconds that compiling took. Exits with 1 if a share
is above 1e-4.
"""

import sys
import time

import torch
from torch import Tensor

from ds.methods import Progress
from ds.training.parallel import Loss
from tests.methods.runs import RUNS, source, start


def figures(name: str, backend: str) -> list[list[Tensor]]:
    """The losses of all turns and their gradients, eager and then compiled as one graph."""
    torch._dynamo.reset()  # it compiles a function so often and no more
    method = RUNS[name].on(teacher := start())
    modules = method.init(teacher).train()
    eager = Loss(method, modules)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    rows, learns = source(method, 16).batch(range(16)), [*modules.parameters()]
    learns = [p for p in learns if p.requires_grad]
    found = []
    for loss in (eager, compiled):
        made = [loss(rows, Progress(5, 6, turn)) for turn in dict.fromkeys(method.turns)]
        gradients = [torch.autograd.grad(x, learns, allow_unused=True) for x in made]
        found.append([*made, *(g for part in gradients for g in part if g is not None)])
    return found


def share(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()


def main(names: list[str]) -> int:
    worst = 0.0
    for name in names or RUNS:
        begin = time.perf_counter()
        eager, compiled = figures(name, "inductor")
        seconds = time.perf_counter() - begin
        loss, *gradients = map(share, compiled, eager)
        worst = max(worst, loss, *gradients)
        print(f"{name:28} loss {loss:.1e}  gradients {max(gradients):.1e}  {seconds:.0f} s")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
