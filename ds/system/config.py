"""Write configuration, which is frozen dataclasses, as JSON, and read and check it.

A value carries the tag of its type: {"type": "linear_beta", "num_steps": 1000, ...}. A tag is the
class's name in snake case, or its own `tag`, so a file can move without changing any JSON. Reading
builds dataclasses of the families below and of the caller, and nothing else: a file cannot name
code to run.

Types say what JSON may hold: the types of a dataclass's fields, or a TypedDict for a whole file.
`mismatch` compares a value with its type.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import torch

from ds.system.files import sha256

# The metadata of a field that is the path of a file: JSON then holds the file's SHA-256, so that it
# names what was used on every machine. A configuration that is read back has it for a path.
BY_CONTENT = {"by_content": True}
# A file may name the dataclasses of these modules.
FAMILIES = (
    "ds.diffusion.schedules",
    "ds.diffusion.predictions",
    "ds.diffusion.guidance",
    "ds.diffusion.solvers",
    "ds.nets",
    "ds.methods",
)


def to_json(value: Any) -> Any:
    """Return a configuration as nested dicts, lists and plain values.

    Of a file that a field names BY_CONTENT, this is the SHA-256.
    """
    if dataclasses.is_dataclass(value):
        fields = {f.name: _field_json(f, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": tag(type(value)), **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"configuration holds {value!r}, which JSON cannot")


def _field_json(field: dataclasses.Field, value: Any) -> Any:
    if value is None or not field.metadata.get("by_content") or not mismatch(str(value), Sha256):
        return to_json(value)
    return sha256(value)


def from_json(data: Any, types: Iterable[type] = ()) -> Any:
    """Rebuild a configuration from what to_json returned. Lists come back as tuples.

    `types` are the caller's own dataclasses, which may be named beside those of ds. Raises
    ValueError for an unknown tag, an unknown or missing field, and a value of the wrong type.
    """
    if isinstance(data, list):
        return tuple(from_json(v, types) for v in data)
    if not isinstance(data, dict):
        return data
    fields = {name: from_json(v, types) for name, v in data.items() if name != "type"}
    cls = _tagged(data.get("type"), types)
    for name, kind in _hints(cls).items():
        if name in fields and (found := mismatch(fields[name], kind, name)):
            raise ValueError(f"configuration of {data['type']}: {found}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"configuration of {data['type']}: {error}") from None


def tag(cls: type) -> str:
    """Return the name of a type in JSON: its own `tag`, or its name in snake case."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__)
    return vars(cls).get("tag", words.lower())


@cache
def known() -> dict[str, type]:
    """Return the dataclasses that any file may name, by tag."""
    modules = (importlib.import_module(name) for name in FAMILIES)
    values = (value for module in modules for value in vars(module).values())
    return {tag(cls): cls for cls in values if _is_config(cls)}


def difference(a: Any, b: Any, at: str = "") -> str | None:
    """Return the first difference of two JSON values, as "path: a, not b"; None if equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            where = f"{at}.{name}" if at else name
            if found := difference(a.get(name), b.get(name), where):
                return found
        return None
    return None if a == b else f"{at}: {short(a)}, not {short(b)}"


class Between(NamedTuple):
    """Annotate a number with its bounds, or a list or text with the bounds of its length.

    A square bracket in `ends` includes the bound, a round one excludes it.
    """

    least: float
    most: float = math.inf
    ends: str = "[]"

    def accepts(self, value: Any) -> bool:
        size = _size(value)
        above = self.least < size if self.ends[0] == "(" else self.least <= size
        return above and (size < self.most if self.ends[1] == ")" else size <= self.most)

    def words(self, value: Any) -> str:
        """Return the bound that a value breaks, in words."""
        if _size(value) > self.least:
            return f"{'below' if self.ends[1] == ')' else 'at most'} {_bound(self.most)}"
        return f"{'above' if self.ends[0] == '(' else 'at least'} {_bound(self.least)}"


def _size(value: Any) -> float:
    return len(value) if isinstance(value, list | tuple | str) else value


def _bound(bound: float) -> str:
    return f"{bound:.3g}" if isinstance(bound, float) else str(bound)


class Matching(NamedTuple):
    """Annotate text with the pattern that all of it must match, and with words for it."""

    pattern: str
    form: str

    def accepts(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def words(self, _: Any) -> str:
        """Return what the text must be, in words."""
        return self.form


# Integers must fit 64 bits, and real numbers float32, in which they are used.
Count = Annotated[int, Between(1, 2**63 - 1)]
Natural = Annotated[int, Between(0, 2**63 - 1)]
Seed = Annotated[int, Between(0, 2**64 - 1)]
Positive = Annotated[float, Between(0, 3.4e38, "(]")]
NotNegative = Annotated[float, Between(0, 3.4e38)]
Share = Annotated[float, Between(0, 1, "[)")]
Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "fields by name",
    Mapping: "fields by name",
}


def checked(data: Any, kind: Any, where: Any) -> Any:
    """Return `data` if it is of a type. Raise ValueError with its place and the first mismatch."""
    if found := mismatch(data, kind):
        raise ValueError(f"{where}: {found}")
    return data


def check(config: Any, at: str = "") -> None:
    """Raise ValueError if a field of a dataclass has the wrong type or is out of bounds.

    The message puts `at` in front of the field's name. In a graph of torch.compile, which could not
    say so, values are made of fields that were checked outside.
    """
    if torch.compiler.is_compiling():
        return
    for name, kind in _hints(type(config)).items():
        if found := mismatch(getattr(config, name), kind, f"{at}{name}"):
            raise ValueError(found)


def require(where: str, kind: Any, **values: Any) -> None:
    """Raise ValueError if an argument has the wrong type or is out of bounds."""
    for name, value in values.items():
        if found := mismatch(value, kind, name):
            raise ValueError(f"{where}: {found}")


def mismatch(value: Any, kind: Any, at: str = "") -> str | None:
    """Return how a value breaks its type, as "path must be a number, not 'x'"; None if it fits.

    A type is a plain type, list, tuple, dict, union, literal, class, or one of them Annotated with
    bounds. It may also be a TypedDict or a dataclass, for a dict with no names but its own. A bool
    is not a number. A whole number is also a real one, and text is also a path.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin is Annotated:
        broken = (rule for rule in args[1:] if isinstance(rule, Between | Matching))
        return mismatch(value, args[0], at) or next(
            (_not(at, rule.words(value), value) for rule in broken if not rule.accepts(value)), None
        )
    if origin in (Union, UnionType):
        found = [mismatch(value, one, at) for one in args]
        if None in found:
            return None
        plain = [get_origin(one) is Annotated and get_args(one)[0] for one in args]
        near = (f for f, one in zip(found, plain, strict=True) if one and not mismatch(value, one))
        return next(near, None) or _not(at, _words(kind), value)
    if origin is Literal:
        fits = any(type(value) is type(one) and value == one for one in args)
        return None if fits else _not(at, _words(kind), value)
    if is_typeddict(kind) or (_is_config(kind) and not isinstance(value, kind)):
        return _fields_mismatch(value, kind, at)
    if not _is_a(value, origin or kind):
        return _not(at, _words(kind), value)
    if origin in (dict, Mapping):
        return _first(mismatch(v, args[1], _join(at, name)) for name, v in value.items())
    if origin in (list, tuple) and args:
        if origin is tuple and args[-1] is not ...:
            if len(value) != len(args):
                return _not(at, f"a list of {len(args)}", value)
            return _first(mismatch(v, a, at) for v, a in zip(value, args, strict=True))
        return _first(mismatch(v, args[0], f"{at}[{i}]") for i, v in enumerate(value))
    return None


def _fields_mismatch(value: Any, kind: Any, at: str) -> str | None:
    if not isinstance(value, dict):
        return _not(at, _WORDS[dict], value)
    hints = _hints(kind)
    for name in sorted(_required(kind) - {*value}):
        return f"{_join(at, name)} is missing"
    for name in value:
        if name not in hints:
            return f"{_join(at, short(repr(name)))} is no field of it"
    return _first(mismatch(v, hints[name], _join(at, name)) for name, v in value.items())


def _required(kind: Any) -> frozenset[str]:
    if is_typeddict(kind):
        return kind.__required_keys__
    free = dataclasses.MISSING
    rules = dataclasses.fields(kind)
    return frozenset(f.name for f in rules if f.default is free and f.default_factory is free)


def _first(found: Any) -> str | None:
    return next((one for one in found if one), None)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _not(at: str, words: str, value: Any) -> str:
    return f"{at} must be {words}, not {short(repr(value))}".lstrip()


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    if get_origin(kind) is Annotated:
        base, *rules = get_args(kind)
        return next((rule.form for rule in rules if isinstance(rule, Matching)), _words(base))
    plain = get_origin(kind) or kind
    return _WORDS.get(plain) or f"a {plain.__name__}"


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, bool):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, (str, Path) if kind is Path else kind)


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    names = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else hints
    return {name: kind for name, kind in hints.items() if name in names}


def short(value: Any) -> str:
    """Return a value as text, cut to 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_config(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value)


def _tagged(name: Any, types: Iterable[type]) -> type:
    found = {**known(), **{tag(cls): cls for cls in types}}
    if not isinstance(name, str) or name not in found:
        raise ValueError(
            f"configuration names the type {name!r}, which is none of {', '.join(sorted(found))}"
        )
    return found[name]
