"""dstudent demo: the whole chain on scanned digits."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Teach, make pairs, distil, sample and evaluate on scanned digits; write a report."""

    out: Path = Path("runs/demo")

    def run(self) -> None:
        from ds.demo import demo

        demo(self.out)
