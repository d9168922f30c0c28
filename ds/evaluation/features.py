"""Feature extractors, whose features two sets of images are compared on.

A distance means nothing without its extractor, so each has a name and a hash that go into every
report.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds.models.images import GREY_OR_RGB, to_float
from ds.pairs.sources import digits
from ds.system.ambient import without_ambient
from ds.system.files import sha256

SIDE = 16  # pixels that averaged images have at most
DIGITS = (8, 8, 1)  # the shape of a scanned digit


class AbstractExtractor(ABC):
    """Turns uint8 images [N, H, W, C] into features [N, D]."""

    name: str
    sha256: str
    takes: str = "images of any size"  # for people
    classes: int = 0  # that `classify` tells apart

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether images of this shape (H, W, C) are what it takes."""
        return True

    @abstractmethod
    def batch(self, images: Tensor) -> Tensor:
        """Return the features of one batch, float [N, D]."""

    def logits(self, features: Tensor) -> Tensor | None:
        """Return the class logits [N, K] of an Inception Score, or None if there are none."""
        return None

    def classify(self, features: Tensor) -> Tensor | None:
        """Return the class that each image is found in, int64 [N], or None without a classifier."""
        return None

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch_size: int = 256) -> Tensor:
        """Return the features of any number of images, float64 [N, D] on the CPU."""
        return torch.cat([self.batch(part).double().cpu() for part in images.split(batch_size)])


class Pixels(AbstractExtractor):
    """The pixels themselves, in [-1, 1]: crude, but nothing is hidden."""

    name = "pixels"
    sha256 = ""

    def batch(self, images: Tensor) -> Tensor:
        return to_float(images).flatten(1)


class AveragedPixels(AbstractExtractor):
    """The pixels of images made small, no side longer than SIDE, by averaging: cruder still.

    Their covariance fits the memory, whatever the size of the images.
    """

    name = f"pixels-averaged-to-{SIDE}"
    sha256 = ""

    def batch(self, images: Tensor) -> Tensor:
        _, h, w, _ = images.shape
        return F.adaptive_avg_pool2d(to_float(images), (min(h, SIDE), min(w, SIDE))).flatten(1)


class Inception(AbstractExtractor):
    """The pool3 features of the FID standard, from a file of its weights.

    Heusel et al. 2017, arXiv:1706.08500. Raises ValueError if the file is not those weights.
    """

    name = "inception-2015-12-05"
    takes = "grey and RGB images"

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu"):
        from ds.nets.inception import Inception as Network

        self.net = Network.load(path).to(device)
        self.device = device
        self.sha256 = sha256(Path(path))

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[-1] in GREY_OR_RGB

    def batch(self, images: Tensor) -> Tensor:
        if images.shape[-1] == 1:  # grey
            images = images.expand(-1, -1, -1, 3)
        return self.net(images.to(self.device))

    def logits(self, features: Tensor) -> Tensor:
        # The bias of the last layer is left out, as in the score's first implementation.
        return features @ self.net.fc.weight.T.to(features)


class Digits(AbstractExtractor):
    """The 64 features before the last layer of a small classifier of the real digits.

    It is trained on first use, in a few seconds, always from the same seed.
    """

    name = "digits-classifier"
    takes = "grey images of 8 x 8"
    classes = 10

    def __init__(self):
        self.net = _train_classifier()
        digest = hashlib.sha256()
        for w in self.net.state_dict().values():
            digest.update(w.numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def fits(self, shape: Sequence[int]) -> bool:
        return tuple(shape) == DIGITS

    def batch(self, images: Tensor) -> Tensor:
        return self.net.features(to_float(images))

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        return self.net.head(features.float()).argmax(1)


class _Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, dtype=torch.float32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, dtype=torch.float32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, dtype=torch.float32)
        self.dense = nn.Linear(256, 64, dtype=torch.float32)
        self.head = nn.Linear(64, 10, dtype=torch.float32)

    def features(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.silu(self.conv2(F.silu(self.conv1(x)))), 2)
        x = F.avg_pool2d(F.silu(self.conv3(x)), 2)
        return F.silu(self.dense(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@cache
@without_ambient(grad=True)
def _train_classifier(epochs: int = 30, batch_size: int = 64, lr: float = 2e-3) -> _Classifier:
    images, labels = digits()
    x = to_float(images)
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Classifier()
    steps = epochs * (len(x) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=draw, dtype=torch.int64, device="cpu")
        for rows in order.split(batch_size):
            if len(rows) < batch_size:
                continue
            noise = torch.randn(x[rows].shape, generator=draw, dtype=torch.float32, device="cpu")
            noisy = x[rows] + 0.1 * noise
            loss = F.cross_entropy(net(noisy), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()
