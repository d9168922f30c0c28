"""The JSON fields of diffusers' files, each checked before it is used."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ds.system.config import short
from ds.system.files import by_name, read_json


def load(file: Path, *, finite: bool = True) -> dict[str, Any]:
    """Return the fields of a JSON file."""
    return by_name(read_json(file, finite=finite), file)


def check(
    fields: Mapping[str, Any], field: str, accept: Callable[[Any], bool], words: str, file: Path
) -> None:
    """Raise ValueError unless a field is accepted; `words` describe what is."""
    value = fields.get(field)
    if not accept(value):
        raise ValueError(f"{file}: {field} is {short(repr(value))}; accepted is {words}")


def whole(value: Any) -> bool:
    """Return whether a value is a whole number above 0."""
    return type(value) is int and value > 0


def number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def text(value: Any) -> bool:
    """Return whether a value is a text."""
    return isinstance(value, str)


def list_of(accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a test for lists, not empty, whose values are all accepted."""
    return lambda value: isinstance(value, list) and bool(value) and all(map(accept, value))


def one_of(values: Iterable[Any]) -> Callable[[Any], bool]:
    """Return a test for values that equal one of these, where true is not 1."""
    return lambda value: any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in values
    )
