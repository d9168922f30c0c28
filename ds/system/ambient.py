"""Shield this library's work from PyTorch's global and per-thread settings."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_ambient(*, grad: bool = False) -> Iterator[None]:
    """Switch off the caller's autocast, inference mode and default device, and set the grad mode.

    Those settings belong to a thread. The default dtype belongs to the whole process, so it stays:
    every tensor of this library is created with an explicit dtype.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
