"""Networks of the tests are so small that they are quicker done than shared out."""

import torch

torch.set_num_threads(1)
