"""What a device is called."""

import platform
import re
from pathlib import Path

import torch


def device_name(device: torch.device | str) -> str:
    """Return the name of a device: that of the GPU, or the processor's and its vectors.

    A processor's name may stand for several kinds of vectors.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine()
    narrow = " with bfloat16" * torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{narrow}"
