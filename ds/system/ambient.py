"""What a caller of PyTorch has set for its own tensors, and this library's work does without."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_ambient(*, grad: bool = False) -> Iterator[None]:
    """Work outside the caller's autocast, inference mode, grad mode and default device.

    All of those belong to a thread. The default dtype belongs to the process, and is left alone:
    tensors of ours are made with a dtype of their own.
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
