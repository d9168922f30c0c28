"""What is said of the cost of work before it starts."""

import pytest

from ds.system import cost


@pytest.mark.parametrize(
    ("most", "fixed", "sizes"), [(100, 0.0, [1, 4, 16, 64, 100]), (100, 1.0, [1])]
)
def test_a_measurement_grows_until_it_is_long_enough(monkeypatch, most, fixed, sizes):
    """On a clock that only work moves: a thousandth of a second an item, and what a call costs."""
    now, done = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def work(n):
        now[0] += (10.0 if n not in done else 0.0) + fixed + n / 1000  # slower at first
        done.append(n)

    seconds = cost.seconds_each(work, most)
    assert sorted({*done}) == sizes
    assert seconds == pytest.approx(fixed + 0.001)


@pytest.mark.parametrize(
    ("seconds", "price", "said"),
    [(7, 0, "7 s"), (600, 0, "10 min"), (9000, 2.5, "2.5 h, $6.25"), (30, 1, "30 s, $0.01")],
)
def test_costs_are_said_for_people(seconds, price, said):
    assert cost.cost(seconds, price) == said


@pytest.mark.parametrize(
    ("count", "said"), [(999, "999 bytes"), (1280, "1.28 kB"), (3.3e9, "3.3 GB"), (2e12, "2 TB")]
)
def test_sizes_are_said_for_people(count, said):
    assert cost.size(count) == said
