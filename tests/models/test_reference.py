"""References in the forms people have them, and when a distance may be called FID."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ds.evaluation.evaluate import evaluate
from ds.evaluation.features import AbstractExtractor, Inception, Pixels
from ds.evaluation.metrics import frechet_distance, inception_score
from ds.evaluation.references import Moments, read_reference
from ds.models.images import to_float

IMAGES = torch.randint(0, 256, (40, 4, 5, 3), generator=torch.Generator().manual_seed(0)).byte()


class Named(AbstractExtractor):
    """Pixels under another name, with logits."""

    sha256 = "none"

    def __init__(self, name: str):
        self.name = name

    def batch(self, images: Tensor) -> Tensor:
        return to_float(images).flatten(1)[:, :3]

    def logits(self, features: Tensor) -> Tensor:
        return features * 2


def test_a_directory_of_images_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image.numpy()).save(tmp_path / ("b" if i >= 20 else ".") / f"{i:03}.png")
    (tmp_path / "notes.txt").write_text("no image")
    names = sorted(str(p) for p in tmp_path.rglob("*.png"))
    order = [int(name[-7:-4]) for name in names]
    assert torch.equal(read_reference(str(tmp_path)).images, IMAGES[order])


def test_grey_images_keep_one_channel(tmp_path):
    Image.fromarray(IMAGES[0, ..., 0].numpy()).save(tmp_path / "a.png")
    assert torch.equal(read_reference(str(tmp_path)).images, IMAGES[:1, ..., :1])


def test_images_of_two_sizes_are_refused_by_name(tmp_path):
    Image.fromarray(IMAGES[0].numpy()).save(tmp_path / "a.png")
    Image.fromarray(IMAGES[0, :3].numpy()).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png is 5 x 3 pixels, .*a.png is 5 x 4"):
        read_reference(str(tmp_path))


def test_an_empty_directory_is_no_reference(tmp_path):
    with pytest.raises(ValueError, match=r"no picture is there \(.png"):
        read_reference(str(tmp_path))


def test_saved_moments_give_the_distance_of_the_images_they_came_from(tmp_path):
    real, made = IMAGES[:25], IMAGES[25:]
    features = Pixels()(real)
    np.savez(tmp_path / "ref.npz", mu=features.mean(0), sigma=features.T.cov())
    moments = read_reference(str(tmp_path / "ref.npz"))
    assert isinstance(moments, Moments)
    figures = evaluate(made, moments, Pixels())
    expected = frechet_distance(Pixels()(made), features)
    assert figures["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert "precision" not in figures and figures["protocol"]["reference"]["moments"]


def test_moments_that_do_not_fit_each_other_are_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mu is float64 \[3\], sigma float64 \[2, 2\]"):
        read_reference(str(tmp_path / "ref.npz"))


@pytest.mark.parametrize(
    ("name", "n", "called"),
    [
        (Inception.name, 50_000, "fid"),
        (Inception.name, 49_999, "frechet_distance"),
        ("pixels", 50_000, "frechet_distance"),
    ],
)
def test_only_50_000_images_on_inception_features_make_a_fid(name, n, called):
    images = IMAGES[torch.arange(n) % len(IMAGES), :1, :1]
    moments = Moments(torch.zeros(3), torch.eye(3), "")
    figures = evaluate(images, moments, Named(name), batch_size=10_000)
    assert {"fid", "frechet_distance"} & figures.keys() == {called}


def test_the_inception_score_is_the_mean_of_its_splits():
    logits = torch.randn(103, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = []
    for part in np.array_split(logits.softmax(1).numpy(), 10):
        p = part.mean(0)
        scores.append(math.exp(np.mean([(q * np.log(q / p)).sum() for q in part])))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)


def test_the_inception_score_has_its_known_ends():
    certain = torch.eye(10).repeat(10, 1) * 1000  # every class as often, and never in doubt
    assert inception_score(certain, splits=10) == pytest.approx((10, 0))
    assert inception_score(torch.zeros(100, 10)) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="9 rows cannot make 10 splits"):
        inception_score(torch.zeros(9, 3))
