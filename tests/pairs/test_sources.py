"""Batches: what a step sees is a function of the seed and the step."""

import pytest
import torch

import ds
from ds.analytic import Gaussian, GaussianMixture
from ds.models.images import to_float
from ds.pairs import sources
from ds.pairs.sources import CHUNKS, AbstractSource, Batches, Generated, Images, Pairs, digits

ROWS, BATCH = 23, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    teacher = Gaussian(shape=(1, 2, 2)).teacher(ds.solvers.DDIM(), ds.grids.quadratic(5))
    return ds.generate_pairs(teacher, tmp_path_factory.mktemp("store"), ROWS, shard_size=7)


class Rows(AbstractSource):
    """A source that answers with the rows and draws it was asked for."""

    feeds = "images"

    def __init__(self, count=ROWS):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, rows):
        return torch.as_tensor(rows)

    def indices(self, rows, draws):
        return torch.as_tensor(draws)

    def prepare(self, images, indices):
        return {"rows": images, "draws": indices}

    def fingerprint(self):
        return "rows"


def epoch(batches: Batches, number: int) -> list[int]:
    steps = range(number * batches.per_epoch, (number + 1) * batches.per_epoch)
    return torch.cat([batches.at(step)["rows"] for step in steps]).tolist()


@pytest.mark.parametrize("number", [0, 1, 7])
def test_an_epoch_sees_no_row_twice_and_leaves_less_than_a_batch(number):
    rows = epoch(Batches(Rows(), BATCH, seed=0), number)
    assert len(rows) == len(set(rows)) == ROWS - ROWS % BATCH
    assert set(rows) <= set(range(ROWS))


def test_an_epoch_whose_rows_fill_its_batches_is_a_permutation():
    assert sorted(epoch(Batches(Rows(20), BATCH, seed=0), 3)) == list(range(20))


def test_the_rows_an_epoch_leaves_over_are_seen_in_others():
    batches = Batches(Rows(), BATCH, seed=0)
    assert {row for e in range(5) for row in epoch(batches, e)} == set(range(ROWS))


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = [epoch(Batches(Rows(), BATCH, seed), e) for seed in (0, 1) for e in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6


def test_a_step_does_not_depend_on_the_steps_before_it():
    steps = [17, 3, 0, 40, 3]
    used = Batches(Rows(), BATCH, seed=1)
    for step in steps:
        fresh = Batches(Rows(), BATCH, seed=1).at(step)
        assert torch.equal(used.at(step)["rows"], fresh["rows"])


def test_no_draw_comes_twice_in_a_run():
    batches = Batches(Rows(), BATCH, seed=0)
    draws = torch.cat([batches.at(step)["draws"] for step in range(30)])
    assert len(draws.unique()) == 30 * BATCH


@pytest.mark.parametrize("window", [0, 5, 16, 100])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_parts_of_all_processes_make_the_batch(window, world):
    whole = Batches(Rows(101), 12, seed=3, window=window)
    parts = [
        Batches(Rows(101), 12, seed=3, window=window, part=range(i, i + 12 // world))
        for i in range(0, 12, 12 // world)
    ]
    for step in range(2 * whole.per_epoch):
        for name, rows in whole.at(step).items():
            assert torch.equal(torch.cat([part.at(step)[name] for part in parts]), rows)


@pytest.mark.parametrize(("rows", "window"), [(10_000, 640), (10_007, 641), (10_007, 1), (9, 100)])
def test_a_window_of_the_order_lies_in_few_places(rows, window):
    batches = Batches(Rows(rows), 1, seed=0, window=window)
    chunk = -(-window // CHUNKS)
    for number in (0, 1):
        order = torch.tensor(epoch(batches, number))
        assert torch.equal(order.sort().values, torch.arange(rows))
        places = [part.div(chunk, rounding_mode="floor").unique() for part in order.split(window)]
        assert max(map(len, places)) <= CHUNKS + 2  # it may begin and end within one


def test_a_window_of_the_order_is_shuffled():
    (order, again) = (torch.tensor(epoch(Batches(Rows(4096), 1, 0, window=512), n)) for n in (0, 1))
    neighbours = (order[1:] - order[:-1] == 1).float().mean()
    assert neighbours < 0.02 and not torch.equal(order, again)


@pytest.mark.parametrize("rows", [None, range(4, 20), range(3, 23, 4)])
def test_pairs_are_the_stores_own(store, rows):
    source = Pairs(store, rows)
    indices = torch.tensor((rows or range(ROWS))[:3])
    batch = source.batch([0, 1, 2], [7, 8, 9])
    assert torch.equal(batch["noise"], ds.noise(0, indices, (1, 2, 2)))
    assert torch.equal(batch["x0"], store.targets(indices))
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
        found, expected = batches.at(step), Pairs(store).prepare(store.images(indices), indices)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    assert torch.equal(batch["noise"], z)
    torch.testing.assert_close(batch["x0"], teacher.sample(z))


def test_processes_share_the_making_of_a_pool(monkeypatch):
    whole = generated()._make(1)
    parts = []
    monkeypatch.setattr(sources.ranks, "world", lambda: 3)
    monkeypatch.setattr(sources.ranks, "gather", lambda rows: parts.append(rows) or rows)
    for number in range(3):
        monkeypatch.setattr(sources.ranks, "number", lambda number=number: number)
        generated()._make(1)
    assert [len(part) for part in parts] == [4, 4, 7]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["rows", "reuse", "batch_size"])
def test_generated_pairs_in_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        generated(**{name: 0})


def test_an_image_gets_fresh_noise_at_every_draw():
    images, _ = digits()
    source = Images(images, seed=5)
    first, again = source.batch([0, 0], [10, 11]), source.batch([0], [12])
    assert torch.equal(first["x0"][0], first["x0"][1])
    assert torch.equal(first["noise"], ds.noise(5, [10, 11], (1, 8, 8)))
    assert not torch.equal(first["noise"][0], first["noise"][1])
    assert not torch.equal(first["noise"][0], again["noise"][0])
    assert torch.equal(first["x0"], to_float(images[[0, 0]]))


def test_sources_that_differ_have_different_fingerprints(store):
    images, _ = digits()
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    teachers = [Gaussian(shape=(1, 2, 2)).teacher(ds.solvers.DDIM(), (t,)) for t in (5, 6)]
    sources = [
        *(Generated(teacher, 9, seed=seed) for teacher in teachers for seed in (0, 1)),
        *(Generated(teachers[0], 9, seed=0, **{name: 3}) for name in ("first", "reuse")),
        Pairs(store), Pairs(store, range(5)), Pairs(store, range(1, 6)),
        Images(images), Images(images, seed=1), Images(images[1:]), Images(other),
    ]  # fmt: skip
    assert len({source.fingerprint() for source in sources}) == len(sources)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {size}"):
        Batches(Rows(), size, seed=0)


def test_a_batch_larger_than_the_source_is_refused():
    with pytest.raises(ValueError, match=r"batch_size \(24\) exceeds the 23 training rows"):
        Batches(Rows(), 24, seed=0)


def test_the_digits_are_the_scans_with_their_labels():
    images, labels = digits()
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images[0, 0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
