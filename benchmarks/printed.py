"""What a run prints for people: a table of sides for each row, and where ours wins and loses."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import floor

# Sides that are this library's, beside the last of each row. The others are its rivals.
OURS = (
    "dispatcher",
    "engine",
    "net",
    "network",
    "ours",
    "ours, compiled",
    "ours, tuned",
    "reference",
)
WIDTH = 120
Row = dict[str, Any]


def machine(calibration: Mapping[str, float]) -> str:
    """Say what this machine copies and multiplies at its best."""
    products = ", ".join(
        f"{1e3 * rate:,.0f} GFLOP/s in {name.rpartition('_')[2]}"
        for name, rate in calibration.items()
        if "matmul" in name
    )
    return f"This machine copies {calibration['copy_gbs']:.1f} GB/s and multiplies {products}."


def head(case: str) -> str:
    """Return the names of the columns, above the rows of a case."""
    columns = f"{'median':>10}{'20th to 80th percentile':>26}{'off by':>10}{'x ours':>9}"
    return f"\n{case:34}{columns}  of the machine's rate"


def table(row: Row, calibration: Mapping[str, float]) -> str:
    """Lay a row out: its name, then a line for each side, in at most WIDTH columns.

    The last side is ours. Its line ends with the share that it attains of the rate at which this
    machine copies or multiplies.
    """
    lines = [row["case"][:WIDTH]]
    ours = next(reversed(row["us"].values()), None)
    for name, error in row["error"].items():
        taken = row["us"].get(name)
        lines.append(_side(name, taken, error, ours))
    if ours and (least := floor(row, calibration)):
        lines[-1] += f"  {least / ours['median']:.0%}"
    for side, parts in row["phases"].items():
        split = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in parts.items())
        lines.append(f"  {side}: {split}"[:WIDTH])
    lines += [_cut(f"  missing: {name}: {why}") for name, why in row["missing"].items()]
    refused = row["refused"].items()
    lines += [_cut(f"not timed: {row['case']}: {name}: {why}") for name, why in refused]
    return "\n".join(lines)


def _side(name: str, taken: Mapping[str, float] | None, error: float, ours: Any) -> str:
    if taken is None:
        return f"  {name:32}{error:>46.1e}"
    low, high = duration(taken["p20"]), duration(taken["p80"])
    ratio = f"{taken['median'] / ours['median']:.2f}"
    spread = f"{low} to {high}"
    return f"  {name:32}{duration(taken['median']):>10}{spread:>26}{error:>10.1e}{ratio:>9}"


def _cut(text: str) -> str:
    """Return the first line of a text, short enough for a line of the table."""
    first = text.splitlines()[0]
    return first if len(first) <= WIDTH else first[: WIDTH - 3] + "..."


def duration(microseconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.9995 * size:
            return f"{_three(microseconds / size)} {unit}"
    return f"{_three(microseconds)} us"


def _three(number: float) -> str:
    whole = len(str(int(number)))
    return f"{number:,.{max(0, 3 - whole)}f}"


def verdict(measured: Mapping[str, Sequence[Row]]) -> str:
    """Say where ours is faster than the fastest rival, and, row by row, where it is not.

    A row is level where the ranges from the 20th to the 80th percentile overlap.
    """
    faster: dict[str, list[float]] = {}
    lost, level = [], []
    for case, rows in measured.items():
        for row in rows:
            if not (rivals := _rivals(row)):
                continue
            name, best = min(rivals.items(), key=lambda rival: rival[1]["median"])
            ours = next(reversed(row["us"].values()))
            ratio = best["median"] / ours["median"]
            if ours["p80"] < best["p20"]:
                faster.setdefault(case, []).append(ratio)
                continue
            line = f"  {ratio:5.2f}x  {case}: {row['case']}"
            line += f", {name} {duration(best['median'])}, ours {duration(ours['median'])}"
            (lost if best["p80"] < ours["p20"] else level).append(_cut(line))
    if not (faster or lost or level):
        return ""
    lines = ["", "Ours against the fastest other side of each row: its time over ours."]
    if faster:
        lines += ["Faster:", *(_won(case, ratios) for case, ratios in faster.items())]
    for title, named in (("Level, within their spread:", level), ("Slower:", lost)):
        lines += [title, *sorted(named)] if named else []
    return "\n".join(lines if lost else [*lines, "Slower: nowhere."])


def _won(case: str, ratios: list[float]) -> str:
    rows = f"{len(ratios)} row{'s' * (len(ratios) > 1)}"
    reach = f", {min(ratios):.2f}x to {max(ratios):.2f}x" * (len(ratios) > 1)
    return f"  {statistics.median(ratios):5.2f}x  {case}: median of {rows}{reach}"


def _rivals(row: Row) -> dict[str, dict[str, float]]:
    *others, _ = row["us"] or [""]
    return {name: row["us"][name] for name in others if name not in OURS}
