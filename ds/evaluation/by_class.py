"""Figures of each class: does a model draw what it was asked for, and does that look real?"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds.diffusion.conditions import Conditions
from ds.diffusion.noise import words
from ds.evaluation.metrics import frechet_distance, kernel_distance
from ds.evaluation.report.tables import Row
from ds.evaluation.statistics import Statistics
from ds.pairs.pictures import Pictures
from ds.system.config import Seed, require

log = logging.getLogger("ds")
_AS_REAL = 0x6B90F2E8C517A34D  # the stream of the real pictures whose classes are asked for
COLUMNS = ("images", "real", "agreement", "kernel distance", "Frechet distance")
Classify = Callable[[Tensor], Tensor | None]


class Asked(NamedTuple):
    """The class that each image is drawn for, int64 [N], and how often each was asked for."""

    labels: Tensor
    how: str


def asked_of(conditions: Conditions, real: Pictures | None, n: int, seed: int) -> Asked | None:
    """Return the classes of n images; None where the conditions have none.

    Each image takes that of a real picture, drawn by (seed, index), so that classes are as frequent
    as in the reference. Without its labels all are equally frequent, as in every Sampler.
    """
    require("evaluate", Seed, seed=seed)
    if not conditions.classes:
        return None
    index = torch.arange(n, dtype=torch.int64, device="cpu")
    if real is None or real.labels is None:
        return Asked(conditions.draw(seed, index)["label"], "equally often")
    chosen = words(seed ^ _AS_REAL, index) * len(real.labels) >> 32
    return Asked(real.labels[chosen], "as often as in the reference")


def of_classes(real: Pictures, classes: tuple[int, ...]) -> Pictures:
    """Return the pictures of some classes. Raises ValueError if there are none."""
    assert real.labels is not None
    kept = torch.isin(real.labels, torch.tensor(classes, dtype=torch.int64, device="cpu"))
    if not kept.any():
        raise ValueError(
            f"evaluate: the reference has no picture of the classes that are asked for, "
            f"{', '.join(map(str, classes[:10]))}"
        )
    return real if kept.all() else Pictures(real.images[kept], real.labels[kept], real.names)


def agreement(found: Tensor | None, labels: Tensor | None) -> float | None:
    """Return the share of images that a classifier finds in the class they have, or None."""
    if found is None or labels is None or not (told := labels >= 0).any():
        return None
    return float((found == labels)[told].double().mean())


def by_class(
    made: Statistics,
    asked: Tensor,
    real: Statistics | None,
    labels: Tensor | None,
    *,
    classified: bool,
) -> dict[str, dict[str, Any]]:
    """Return the figures of each class, by its number.

    `images` and `reference` are how many there are. The kernel distance is unbiased, so it means
    something for few images too. A Frechet distance needs covariances of full rank: it is left out
    where a side has no more images of the class than features. Both compare the images that
    `Statistics` keeps. `classifier_agreement` is the share that the classifier finds in the class,
    if it knows the classes.
    """
    figures: dict[str, dict[str, Any]] = {}
    kept = (made.first, real.first) if real is not None and labels is not None else None
    for k in asked[asked >= 0].unique().tolist():
        here = asked == k
        row: dict[str, Any] = {"images": int(here.sum())}
        figures[str(k)] = row
        if classified and made.classes is not None:
            row["classifier_agreement"] = float((made.classes[here] == k).double().mean())
        if kept is not None and labels is not None:
            row["reference"] = int((labels == k).sum())
            row |= _distances(_of(kept[0], asked, k), _of(kept[1], labels, k))
    lacking = sum("frechet_distance" not in row for row in figures.values())
    if kept is not None and lacking:
        log.info(
            "evaluate: a class needs more images than features, drawn and real, for a Frechet "
            "distance of its own; %d of %d have less; see their kernel distances",
            lacking,
            len(figures),
        )
    return figures


def _of(features: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the features of a class."""
    return features[labels[: len(features)] == k]


def _distances(x: Tensor, y: Tensor) -> dict[str, float]:
    found = {}
    if min(len(x), len(y)) >= 2:
        found["kernel_distance"] = kernel_distance(x, y)
    if min(len(x), len(y)) > x.shape[1]:
        found["frechet_distance"] = frechet_distance(x, y)
    return found


def rows(classes: dict[str, dict[str, Any]], names: tuple[str, ...] = ()) -> list[Row]:
    """Return the lines of a table with COLUMNS."""

    def cell(figures: dict[str, Any], name: str, form: str) -> str:
        return format(figures[name], form) if name in figures else ""

    found = []
    for k, f in classes.items():
        title = f"{k} {names[int(k)]}" if int(k) < len(names) else k
        cells = (
            cell(f, "images", ",d"),
            cell(f, "reference", ",d"),
            cell(f, "classifier_agreement", ".1%"),
            cell(f, "kernel_distance", ".4g"),
            cell(f, "frechet_distance", ".4g"),
        )
        found.append(Row(title, cells))
    return found
