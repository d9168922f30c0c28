"""The mixture check: the whole path from exact teacher to student, and what must fail it.

The bars are those of a student that has learnt the map: R2 and mode agreement on held-out noise of
at least 0.97, sliced W2 of at most 0.07 to exact samples at n = 10,000. Two exact samples of that
size are 0.036 apart in the mean and 0.058 for the two that the score draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ds
from ds.analytic import GaussianMixture
from ds.evaluation.scores import Score, scores, table
from tests.examples import load

pytestmark = pytest.mark.slow


mixture = load("mixture")


@dataclass(frozen=True)
class Verdict:
    r2: bool
    mode_agreement: bool
    sliced_wasserstein: bool


def verdict(rows: list[Score]) -> Verdict:
    print(f"\n{table(rows)}")
    value = {row.name: row.value for row in rows}
    return Verdict(
        value["r2"] >= 0.97, value["mode_agreement"] >= 0.97, value["sliced_wasserstein"] <= 0.07
    )


PASSED = Verdict(True, True, True)
FAILED = Verdict(False, False, False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def store(folder) -> ds.PairStore:
    return mixture.make_pairs(folder / "pairs", 50_000)


def test_a_student_passes(folder, store):
    assert len(store) == 60_000
    assert verdict(mixture.main(folder, steps=1000)) == PASSED


class Shuffled(ds.Pairs):
    """Every noise with the image of its neighbour in the batch."""

    def prepare(self, images, indices, draws):
        pairs = super().prepare(images, indices, draws)
        return pairs._replace(x0=pairs.x0.roll(1, 0))

    def fingerprint(self):
        return f"shuffled {super().fingerprint()}"


def test_a_student_of_wrong_pairs_fails(folder, store):
    student = mixture.train(store, folder / "shuffled", 1000, Shuffled)
    assert first_points(store, student.sample) == FAILED


def first_points(store: ds.PairStore, generate: Callable[[torch.Tensor], torch.Tensor]) -> Verdict:
    """Judge on as many points as show what is far from passing."""
    z, target = store.noise(range(1000)), store.targets(range(1000))
    return verdict(scores(GaussianMixture(), z, generate(z), target))


def test_the_noise_itself_fails(store):
    assert first_points(store, lambda z: z) == FAILED


@torch.no_grad()
def test_an_untrained_network_fails(store):
    student = ds.Student(mixture.untrained().net, mixture.DenoisingStudent())
    assert first_points(store, student.sample) == FAILED
