"""dstudent demo: the whole chain on scanned digits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ds import targets
from ds.verbs.options import Verb


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Teach, make pairs, distil, sample and evaluate on scanned digits; write a report."""

    out: Path = Path("runs/demo")

    def prepare(self) -> Callable[[], None]:
        from ds.demo import demo

        targets.kept(self.out, "demo", targets.MARK)
        return partial(demo, self.out)
