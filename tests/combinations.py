"""Which combinations of a test's parameters `make test` runs; `make test-slow` runs the others.

A test marked `each_value` is quick in as few combinations as hold every value of every parameter.
Values that one `parametrize` gives together count as one.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Set
from itertools import groupby
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def slow(*values: Any, id: str | None = None) -> Any:
    """Return one of the values of a parametrized test, which takes long."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def covering(combinations: Mapping[T, Set[Hashable]]) -> set[T]:
    """Return few keys, whose combinations together hold every value, and mix them well."""
    left, chosen, uses = set().union(*combinations.values()), set(), Counter()

    def gain(key: T) -> tuple[int, int]:
        return len(left & combinations[key]), -sum(uses[value] for value in combinations[key])

    while left:
        chosen.add(best := max(combinations, key=gain))
        left -= combinations[best]
        uses.update(combinations[best])
    return chosen


def values(item: Any) -> set[Hashable]:
    """Return the values of a test's parameters, by the names that each belongs to."""
    given = item.callspec.params
    together = [mark.args[0] for mark in item.iter_markers("parametrize")]
    together = [names.split(",") if isinstance(names, str) else names for names in together]
    together = [tuple(name.strip() for name in names) for names in together]
    alone = given.keys() - {name for names in together for name in names}
    together += [(name,) for name in alone]  # of a fixture
    return {(names, tuple(id(given[name]) for name in names)) for names in together}


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark as slow, of the tests that are marked `each_value`, the combinations not needed."""
    several = [i for i in items if i.get_closest_marker("each_value") and hasattr(i, "callspec")]
    for _, group in groupby(several, key=lambda item: item.nodeid.partition("[")[0]):
        combinations = {item: values(item) for item in group}
        for item in combinations.keys() - covering(combinations):
            item.add_marker("slow")
