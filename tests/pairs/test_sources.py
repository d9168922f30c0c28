"""Sources: what the rows of a batch are."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import ds
from ds.analytic import Gaussian, GaussianMixture
from ds.models.images import to_float
from ds.pairs import sources
from ds.pairs.sources import Generated, Images, Noise, Pairs, digits
from ds.training.batches import Batches

ROWS, BATCH = 23, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    teacher = Gaussian(shape=(1, 2, 2)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(5))
    return ds.generate_pairs(teacher, tmp_path_factory.mktemp("store"), ROWS, shard_size=7)


@pytest.mark.parametrize("rows", [None, range(4, 20), range(3, 23, 4)])
def test_pairs_are_the_stores_own(store, rows):
    source = Pairs(store, rows)
    indices = torch.tensor((rows or range(ROWS))[:3])
    batch = source.batch([0, 1, 2], [7, 8, 9])
    assert torch.equal(batch.noise, ds.noise(0, indices, (1, 2, 2)))
    assert torch.equal(batch.x0, store.targets(indices))
    assert len(source) == len(rows or range(ROWS))


@pytest.mark.parametrize("rows", [range(0), range(ROWS + 1), range(-1, 5), range(30, 40)])
def test_rows_a_store_lacks_are_refused(store, rows):
    with pytest.raises(ValueError, match="is not within the store's 23 pairs"):
        Pairs(store, rows)


def generated(rows=3 * BATCH, **options) -> Generated:
    teacher = Gaussian(shape=(1, 2, 2)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(5))
    return Generated(teacher, rows, **{"seed": 9, "batch_size": 4, **options})


def test_generated_pairs_are_those_of_the_teachers_store(tmp_path):
    source = generated(first=2, reuse=2)
    store = ds.generate_pairs(source._sampler.model, tmp_path / "s", 2 + 3 * len(source), seed=9)
    batches = Batches(source, BATCH, seed=0)
    for step in (0, 7, 17, 1):  # of pools 0, 1, 2 and 0 again
        _, indices = batches.read(step)
        found = batches.at(step)
        expected = Pairs(store).prepare(store.images(indices), indices, found.draws)
        assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_generated_pair_serves_so_many_epochs_and_no_more(reuse):
    batches = Batches(generated(reuse=reuse), BATCH, seed=0)
    steps = 2 * reuse * batches.per_epoch
    seen = torch.cat([batches.read(step)[1] for step in range(steps)])
    assert torch.equal(seen.bincount(), torch.full((2 * len(batches.source),), reuse))


def test_generated_points_are_the_teachers():
    teacher = GaussianMixture().teacher(ds.solvers.DDIM(), ds.grids.quadratic(5))
    batch = Generated(teacher, 6, seed=9).batch([5, 1], [0, 1])
    z = ds.noise(9, [5, 1], (2,))
    assert torch.equal(batch.noise, z)
    torch.testing.assert_close(batch.x0, teacher.sample(z))


def test_processes_share_the_making_of_a_pool(monkeypatch):
    whole = generated()._make(1)
    parts = []
    monkeypatch.setattr(sources.distributed, "world_size", lambda: 3)
    monkeypatch.setattr(sources.distributed, "gather", lambda rows: parts.append(rows) or rows)
    for number in range(3):
        monkeypatch.setattr(sources.distributed, "rank", lambda number=number: number)
        generated()._make(1)
    assert [len(part) for part in parts] == [4, 4, 7]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["rows", "reuse", "batch_size"])
def test_generated_pairs_in_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        generated(**{name: 0})


def test_the_digits_are_those_of_scikit_learn():
    data = load_digits()
    images, labels = digits()
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images[..., 0], np.rint(data.images * (255 / 16)))
    assert np.array_equal(labels, data.target)


def test_an_image_gets_fresh_noise_at_every_draw():
    images, _ = digits()
    source = Images(images, seed=5)
    first, again = source.batch([0, 0], [10, 11]), source.batch([0], [12])
    assert torch.equal(first.x0[0], first.x0[1])
    assert torch.equal(first.noise, ds.noise(5, [10, 11], (1, 8, 8)))
    assert not torch.equal(first.noise[0], first.noise[1])
    assert not torch.equal(first.noise[0], again.noise[0])
    assert torch.equal(first.x0, to_float(images[[0, 0]]))


def test_a_labelled_picture_brings_its_class_into_every_batch():
    """Also a mirrored one, one of some rows only, and one that a shuffle has moved."""
    images, labels = digits()
    kept, plain = torch.tensor([4, 9, 30]), Images(images, seed=5)
    source = Images(images, labels, seed=5, rows=kept, flip=True)
    batch = source.batch([0, 1, 5, 3], [7, 8, 9, 10])
    assert batch.cond["label"].tolist() == labels[[4, 9, 30, 4]].tolist()
    assert torch.equal(batch.noise, plain.batch([0] * 4, [7, 8, 9, 10]).noise)
    assert source.conditions.classes == tuple(sorted({*labels[kept].tolist()}))
    whole = Images(images, labels)
    shuffled = Batches(whole, 32, seed=1).at(3)
    rows, draws = Batches(whole, 32, seed=1).rows(3)
    assert torch.equal(shuffled.cond["label"], labels[rows])
    same = zip(shuffled[:3], Batches(Images(images), 32, seed=1).at(3)[:3], strict=True)
    assert all(torch.equal(a, b) for a, b in same) and torch.equal(shuffled.index, draws_of(draws))
    assert plain.batch([0]).cond == {} and plain.conditions == ds.Conditions()


def draws_of(draws: range) -> torch.Tensor:
    return torch.arange(draws.start, draws.stop)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(4), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, -2, 3]), None],
    ids=["floats", "too few", "below -1", "beyond 31 bits"],
)
def test_labels_that_are_no_classes_are_refused(labels):
    labels = torch.tensor([0, 1, 2, 2**31]) if labels is None else labels
    with pytest.raises(ValueError, match=r"Images: labels must be whole numbers \[4\] from -1"):
        Images(torch.zeros(4, 8, 8, 1, dtype=torch.uint8), labels)


def test_noise_is_fresh_at_every_draw_and_comes_with_no_data():
    batch = Noise(9, (1, 8, 8), seed=5).batch([0, 0], [10, 11])
    assert torch.equal(batch.noise, ds.noise(5, [10, 11], (1, 8, 8)))
    assert batch.x0.shape == (2, 0)
    assert torch.equal(batch.draws.index, torch.tensor([10, 11]))


def test_sources_that_differ_have_different_fingerprints(store):
    images, labels = digits()
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    teachers = [Gaussian(shape=(1, 2, 2)).teacher(ds.solvers.DDIM(), (t,)) for t in (5, 6)]
    sources = [
        *(Generated(teacher, 9, seed=seed) for teacher in teachers for seed in (0, 1)),
        *(Generated(teachers[0], 9, seed=0, **{name: 3}) for name in ("first", "reuse")),
        Pairs(store),
        Pairs(store, range(5)),
        Pairs(store, range(1, 6)),
        *(Noise(*about) for about in ((9, (2,)), (8, (2,)), (9, (3,)))),
        Noise(9, (2,), seed=1),
        Images(images),
        Images(images, seed=1),
        Images(images[1:]),
        Images(other),
        Images(images, labels),
        Images(images, labels.flip(0)),
    ]
    assert len({source.fingerprint() for source in sources}) == len(sources)


def test_the_digits_are_the_scans_with_their_labels():
    images, labels = digits()
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
