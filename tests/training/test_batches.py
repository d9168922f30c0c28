"""Batches: what a step sees is a function of the seed and the step."""

import pytest
import torch

from ds.pairs.sources import AbstractSource
from ds.training.batches import CHUNKS, Batches

ROWS, BATCH = 23, 5


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

    def prepare(self, images, indices, draws):
        assert torch.equal(indices, draws.index)
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


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {size}"):
        Batches(Rows(), size, seed=0)


def test_a_batch_larger_than_the_source_is_refused():
    with pytest.raises(ValueError, match=r"batch_size \(24\) exceeds the 23 training rows"):
        Batches(Rows(), 24, seed=0)
