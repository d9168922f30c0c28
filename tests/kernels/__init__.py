"""Tests of the Triton kernels: interpreted on a CPU, compiled where there is a GPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last
