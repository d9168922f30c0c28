"""Write the tables of docs/performance.md from the JSON of results/, between their markers.

    python -m benchmarks.tables

A table stands between <!-- table: MACHINE/CASE --> and <!-- end -->. A test fails when a table is
not what its JSON says.
"""

import json
import re
from typing import Any

from benchmarks.harness import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """Return a page with every table made anew."""
    return MARKED.sub(lambda m: m[1] + table(m[2]) + m[3], page)


def table(name: str) -> str:
    """Return the table of results/<name>.json: a row a case, a column a side, and what was used."""
    saved = json.loads((RESULTS / f"{name}.json").read_text())
    e, calibration = saved["environment"], saved["calibration"]
    names = list(dict.fromkeys(side for row in saved["cases"] for side in row["us"]))
    others = names[:-1]
    head = ["us", *names, *[f"{other} / ours" for other in others], "of a copy"]
    lines = [
        f"{e['device']}, {e['cores']} cores, {e['threads']} thread"
        f"{'s' * (e['threads'] > 1)}, torch {e['torch']}, {e['timing']}, {e['date']}, "
        f"commit {e['commit'][:10]}. Medians; in the same run a copy took "
        f"{calibration['copy_gbs']:.1f} GB/s and a float32 matrix product "
        f"{calibration['matmul_tflops_float32'] * 1e3:.0f} GFLOP/s.",
        "",
        "| " + " | ".join(head) + " |",
        "| --- " + "| ---: " * (len(head) - 1) + "|",
        *(_line(row, names, calibration) for row in saved["cases"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], names: list[str], calibration: dict[str, float]) -> str:
    times = {name: row["us"][name]["median"] for name in row["us"]}
    ours = times[names[-1]]
    cells = [row["case"]]
    cells += [f"{times[name]:,.0f}" if name in times else "" for name in names]
    cells += [f"{times[name] / ours:.2f}" if name in times else "" for name in names[:-1]]
    share = row["bytes"] / 1e3 / ours / calibration["copy_gbs"]
    cells.append(f"{share:.0%}" if row["bytes"] else "")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
