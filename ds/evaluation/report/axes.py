"""Axes of charts: where numbers are on them, and which round ones are named."""

import math
from collections.abc import Iterable
from typing import NamedTuple


class Axis(NamedTuple):
    """The ends of an axis. On a logarithmic one only positive numbers have a place."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, log: bool = False, margin: float = 0.05) -> "Axis":
        """Return the axis of the numbers that have a place on it; linear if none is positive."""
        finite = [v for v in values if math.isfinite(v)]
        log = log and any(v > 0 for v in finite)
        found = [math.log(v) for v in finite if v > 0] if log else finite
        low, high = min(found, default=0.0), max(found, default=1.0)
        if high - low < 1e-9 * max(1.0, abs(high)):  # a single number
            low, high = low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1)
        pad = margin * (high - low)
        ends = low - pad, high + pad
        return cls(math.exp(ends[0]), math.exp(ends[1]), True) if log else cls(*ends)

    def at(self, value: float) -> float:
        """Return where a number is, from 0 to 1; not-a-number if it has no place."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round numbers on the axis, at most so many."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for leading in ((1, 2, 5), (1,)):
                found = [float(f"{d}e{k}") for k in range(first, last + 1) for d in leading]
                found = [v for v in found if self.low <= v <= self.high]
                if 3 <= len(found) <= most:
                    return found
            if len(found) > most:
                return found[:: -(-len(found) // most)]
        step = _step((self.high - self.low) / (most - 1))
        begin, end = math.ceil(self.low / step), math.floor(self.high / step)
        return [float(f"{n * step:.12g}") for n in range(begin, end + 1)]


def _step(least: float) -> float:
    """Return the least of 1, 2, 5, 10, 20, ..., and of their tenths, that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return power * next(d for d in (1, 2, 5, 10) if d * power >= least * (1 - 1e-9))


def number(value: float) -> str:
    """Format a number for people."""
    whole = abs(value) >= 1000 and float(value).is_integer()
    return f"{value:,.0f}" if whole else f"{value:.4g}"
