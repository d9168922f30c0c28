"""Turn what came back from a GPU into results, the table FASTER, and the tables of the documents.

    python -m benchmarks.gpu_report gpu-results [FOLDER ...] [--commit SHA]

The folders are those that `make gpu-first` and `make gpu-second` wrote, or `python -m benchmarks
--out`, the later ones last. Of rows that are there twice the one with more sides is taken. --commit
is for a tree that had no git and no DS_COMMIT. Refused are results of a CPU, of an emulated GPU,
and of code that no commit names. The tables of verdicts are printed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, tables
from benchmarks.harness import EMULATED, RESULTS, ROOT

FASTER = ROOT / "ds" / "engine" / "faster.json"
BASELINE = "cuDNN"
LOSS = 1.1  # how much longer than cuDNN a kernel of ours may take at another batch size
Saved = dict[str, Any]


def main() -> int:
    """Write results and tables; return 1 if something is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--commit", help="what was measured, where the results do not say it")
    options = parser.parse_args()
    for path in sorted(path for folder in options.folders for path in folder.glob("table-*.txt")):
        print(f"{path}:\n{path.read_text()}")
    try:
        results = collected(options.folders, options.commit)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for (gpu, case), saved in results.items():
        folder = RESULTS / harness.folder_name(gpu)
        folder.mkdir(parents=True, exist_ok=True)
        harness.write(folder / f"{case}.json", saved)
        print(f"{folder.name}/{case}: {len(saved['cases'])} rows")
    write_faster(results, FASTER)
    for page in tables.PAGES:
        page.write_text(tables.filled(page.read_text()))
    return 0


def collected(folders: Iterable[Path], commit: str | None = None) -> dict[tuple[str, str], Saved]:
    """Return the timed results in folders by GPU and case.

    Raises ValueError if there are none, or for results that are not to be kept.
    """
    found: dict[tuple[str, str], Saved] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("**/*.json"))):
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict) or not any(row["us"] for row in saved["cases"]):
            continue
        environment = saved["environment"]
        if environment["commit"] == "unknown" and commit:
            environment["commit"] = commit
        if reason := refusal(environment):
            raise ValueError(f"{path}: {reason}")
        key = environment["device"], path.stem
        found[key] = merged(found[key], saved) if key in found else saved
    if not found:
        raise ValueError("no results with times in these folders")
    return found


def refusal(environment: dict[str, Any]) -> str:
    """Return why results are not to be kept, or nothing."""
    if not environment["timing"].startswith("CUDA"):
        return f"not of a GPU, but of {environment['device']}"
    if EMULATED in environment["device"]:
        return "of an emulated GPU, whose times say nothing"
    if not harness.is_named(environment["commit"]):
        return f"no commit names what was measured ({environment['commit']})"
    return ""


def merged(first: Saved, second: Saved) -> Saved:
    """Return the rows of both, of those of one name the one with more sides, or the later one.

    Environment and calibration are those of the second; a row of another commit says so.
    """
    commit, before = second["environment"]["commit"], first["environment"]["commit"]
    note = {} if commit == before else {"commit": before}
    rows = {row["case"]: {**note, **row} for row in first["cases"]}
    for row in second["cases"]:
        if len(row["us"]) >= len(rows.get(row["case"], {"us": ()})["us"]):
            rows[row["case"]] = row
    return {**second, "cases": [*rows.values()]}


def write_faster(results: dict[tuple[str, str], Saved], path: Path) -> None:
    """Write which convolutions are faster by a kernel of ours, for each GPU that timed them."""
    faster = json.loads(path.read_text())
    for (gpu, case), saved in results.items():
        if case == "convs":
            faster[gpu] = winners(saved["cases"])
            print(f"FASTER: {len(faster[gpu])} of {len(_by_name(saved['cases']))} on {gpu}")
    path.write_text(json.dumps(faster, indent=1, sort_keys=True) + "\n")


def winners(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the backend of ours by the name of each convolution where one is faster than cuDNN.

    It is faster where at the largest batch its 80th percentile lies below cuDNN's 20th, and at no
    other it takes a tenth more than cuDNN. Of several the fastest at the largest batch is taken.
    """
    found = {}
    for name, sizes in _by_name(rows).items():
        largest = max(sizes, key=lambda row: row["images"])["us"]
        cudnn = largest.get(BASELINE, {"p20": 0.0})
        ours = [
            side
            for side, times in largest.items()
            if side != BASELINE
            and times["p80"] < cudnn["p20"]
            and all(_holds(row["us"], side) for row in sizes)
        ]
        if ours:
            found[name] = min(ours, key=lambda side: largest[side]["median"])
    return found


def _holds(us: dict[str, dict[str, float]], side: str) -> bool:
    return {side, BASELINE} <= {*us} and us[side]["median"] <= LOSS * us[BASELINE]["median"]


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a convolution by its name, which "NAME, 264 images" begins with."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"].rpartition(", ")[0], []).append(row)
    return found


if __name__ == "__main__":
    sys.exit(main())
