"""Configuration is frozen dataclasses; this file turns them into JSON and back.

A value carries the name of its type: {"type": "ds.schedule.LinearBeta", "num_steps": 1000, ...}.
Reading accepts dataclasses inside ds and nothing else, so a file cannot name code to run.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any


def to_json(value: Any) -> Any:
    """Return nested dicts, lists and plain values that describe a configuration."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"configuration holds {value!r}, which JSON cannot")


def from_json(data: Any) -> Any:
    """Rebuild what to_json described; lists come back as tuples.

    Raises ValueError for a type outside ds, an unknown field or a missing one.
    """
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    if not isinstance(data, dict):
        return data
    fields = {name: from_json(v) for name, v in data.items() if name != "type"}
    cls = _dataclass(data.get("type"))
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"configuration of {data['type']}: {error}") from None


def difference(a: Any, b: Any, at: str = "") -> str | None:
    """Name the first place where two JSON values differ, as "path: a, not b"; None if equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            where = f"{at}.{name}" if at else name
            if found := difference(a.get(name), b.get(name), where):
                return found
        return None
    return None if a == b else f"{at}: {_short(a)}, not {_short(b)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dataclass(name: Any) -> type:
    module, _, attribute = str(name).rpartition(".")
    if module.split(".")[0] == "ds":
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            cls = None
        if dataclasses.is_dataclass(cls):
            return cls
    raise ValueError(f"configuration names the type {name!r}, which is no dataclass of ds")
