"""Evaluation by class: a model must draw what it is asked for."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import ds
from ds.evaluation.by_class import COLUMNS, rows
from ds.evaluation.evaluate import evaluate, figures
from ds.evaluation.features import Digits, Pixels
from ds.evaluation.references import Moments
from ds.evaluation.report.tables import text_table
from ds.models.images import to_float
from ds.pairs.pictures import Pictures
from ds.pairs.sources import digits

IMAGES, LABELS = digits()
REAL = Pictures(IMAGES, LABELS)
COUNTS = LABELS.bincount().tolist()
TRUTH = to_float(IMAGES)


class Told(nn.Module):
    shape, classes, takes = (1, 8, 8), 10, ("label",)


@dataclass(frozen=True)
class Scans:
    """Draw a scanned digit of the class that is asked for, if it listens, or shifted by some."""

    listens: bool = True
    shift: int = 0

    def sample(self, net, z, *, nfe=1, cond=None, draws=None):
        share = 0.5 * torch.erfc(z.flatten(1)[:, 0].double() / math.sqrt(2))
        if not self.listens:
            return TRUTH[(share * len(TRUTH)).long()]
        found = []
        assert cond is not None
        for k, u in zip((cond["label"] + self.shift) % 10, share, strict=True):
            there = TRUTH[k == LABELS]
            found.append(there[int(u * len(there))])
        return torch.stack(found)


def model(names=None, **options) -> ds.Student:
    return ds.Student(Told(), Scans(**options), provenance={"classes": names} if names else {})


@pytest.fixture(scope="module")
def extractor():
    return Digits()


@pytest.fixture(scope="module")
def honest(extractor):
    return evaluate(model(), REAL, extractor, n=1000, seed=3)


def test_a_model_that_draws_what_it_is_asked_for_agrees_as_real_pictures_do(honest, extractor):
    assert honest["reference_agreement"] > 0.99
    assert abs(honest["classifier_agreement"] - honest["reference_agreement"]) < 0.01
    assert abs(honest["class_kernel_distance"]) < 200  # of those below, 34,000 and 76,000
    assert [*honest["classes"]] == [str(k) for k in range(10)]
    assert sum(f["images"] for f in honest["classes"].values()) == 1000
    for k, f in honest["classes"].items():
        assert f["reference"] == COUNTS[int(k)] and f["classifier_agreement"] > 0.95
        assert f["frechet_distance"] < 25 and abs(f["kernel_distance"]) < 1000


def test_a_model_that_draws_another_class_is_found_out(honest, extractor):
    """The figures over all are blind to it: the images are real ones."""
    deaf = evaluate(model(listens=False), REAL, extractor, n=1000, seed=3)
    assert 0.05 < deaf["classifier_agreement"] < 0.15
    swapped = evaluate(model(shift=1), REAL, extractor, n=1000, seed=3)
    assert swapped["classifier_agreement"] < 0.01
    for found in (deaf, swapped):
        assert found["frechet_distance"] < 3 * honest["frechet_distance"] + 1
        assert found["class_kernel_distance"] > 20_000
        assert all(f["kernel_distance"] > 5_000 for f in found["classes"].values())


def test_the_classes_asked_for_are_as_frequent_as_in_the_reference_and_else_equal(extractor):
    rare = torch.cat([(LABELS == 7).nonzero()[:20, 0], (LABELS == 2).nonzero()[:180, 0]])
    skewed = evaluate(model(), Pictures(IMAGES[rare], LABELS[rare]), extractor, n=1000)
    counts = {k: f["images"] for k, f in skewed["classes"].items()}
    assert [*counts] == ["2", "7"] and abs(counts["7"] / 1000 - 0.1) < 4 * 0.0095
    assert skewed["protocol"]["classes"]["drawn"] == "as often as in the reference"
    eye = torch.eye(64, dtype=torch.float64)
    even = evaluate(model(), Moments(eye[0], eye, "0"), extractor, n=1000)
    assert even["protocol"]["classes"] == {"of": [*range(10)], "drawn": "equally often"}
    drawn = ds.Conditions(tuple(range(10))).draw(1, range(1000))["label"]
    assert [f["images"] for f in even["classes"].values()] == drawn.bincount().tolist()
    assert "kernel_distance" not in even["classes"]["0"] and "reference_agreement" not in even


def test_some_classes_are_compared_with_the_real_pictures_of_those_alone(extractor):
    found = evaluate(model(), REAL, extractor, n=100, conditions=ds.Conditions((3, 7)))
    assert [*found["classes"]] == ["3", "7"]
    assert found["protocol"]["reference"]["n"] == COUNTS[3] + COUNTS[7]
    assert found["protocol"]["classes"]["of"] == [3, 7]
    none = Pictures(IMAGES[LABELS < 3], LABELS[LABELS < 3])
    with pytest.raises(ValueError, match=r"the reference has no picture of the classes .* 3, 7"):
        evaluate(model(), none, extractor, n=100, conditions=ds.Conditions((3, 7)))


def test_no_class_can_be_asked_for_and_is_compared_with_all(extractor):
    found = evaluate(model(listens=False), REAL, extractor, n=50, conditions=ds.Conditions((-1,)))
    assert found["protocol"]["reference"]["n"] == len(IMAGES) and "classes" not in found


def test_a_class_of_few_pictures_has_a_kernel_distance_and_no_frechet_distance(extractor, caplog):
    """Its covariance would lack rank, and the distance be mostly bias."""
    caplog.set_level("INFO", "ds")
    found = evaluate(model(), REAL, extractor, n=300)
    assert all("frechet_distance" not in f for f in found["classes"].values())
    assert all("kernel_distance" in f for f in found["classes"].values())
    assert "10 of 10 have less; see their kernel distances" in "\n".join(caplog.messages)


def test_figures_by_class_do_not_depend_on_the_batch(honest, extractor):
    other = evaluate(model(), REAL, extractor, n=1000, seed=3, batch_size=77)
    assert figures(other).keys() == figures(honest).keys()
    for k, f in honest["classes"].items():
        assert other["classes"][k] == pytest.approx(f, abs=1e-6)


def test_pictures_with_labels_are_judged_like_a_model_that_drew_them(extractor):
    found = evaluate(Pictures(IMAGES[:500], LABELS[:500].roll(1)), REAL, extractor)
    assert 0.02 < found["classifier_agreement"] < 0.3
    with pytest.raises(ValueError, match="conditions"):
        evaluate(REAL, REAL, extractor, conditions=ds.Conditions((1,)))


def test_folders_of_classes_are_matched_by_their_names():
    """The reference lacks the first class of the model, so the numbers of its own are others."""
    names = [f"{'abcdefghij'[k]}" for k in range(10)]
    kept = LABELS > 0
    real = Pictures(IMAGES[kept], LABELS[kept] - 1, tuple(names[1:]))
    found = evaluate(model(names), real, Pixels(), n=300)
    assert [*found["classes"]] == [str(k) for k in range(1, 10)]
    assert found["classes"]["4"]["reference"] == COUNTS[4]
    assert "classifier_agreement" not in found  # pixels classify nothing
    with pytest.raises(ValueError, match="'j': it is not among the classes of the model, a, b"):
        evaluate(model(names[:9]), real, Pixels(), n=300)


def test_labels_of_other_classes_than_the_models_are_left_out_and_said(extractor, caplog):
    found = evaluate(model(), Pictures(IMAGES, LABELS + 5), extractor, n=100)
    assert "reference" not in found["classes"]["0"] and "reference_agreement" not in found
    assert "labels up to 14, the model classes 0 to 9" in "\n".join(caplog.messages)


def test_the_table_by_class_names_them_and_says_what_is_known(honest):
    table = text_table(COLUMNS, rows(honest["classes"], ("zero", "one"))).splitlines()
    assert len(table) == 12 and table[2].startswith("| 0 zero |") and table[4].startswith("| 2 ")
    assert "%" in table[2] and table[2].count("|") == 7
