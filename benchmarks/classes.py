"""Whether a student draws the class it is asked for as its teacher does: digits, several seeds.

    python -m benchmarks.classes [--seeds 3] [--runs FOLDER]

For each seed a class-conditional teacher is trained on the digits, makes pairs, and is distilled.
Both are evaluated by class. The bar: the classifier of the digits finds the student's images in the
class they were drawn for at most 2 points less often than the teacher's. Writes the figures to
results/classes.json. What is in `runs` already is kept, so that it can be called again; a seed
takes as long as `dstudent demo`.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, git
from benchmarks.seeds import dstudent
from ds.evaluation.evaluate import CLASSES, figures
from ds.system.files import read_json
from ds.system.staging import write_json

PATH, SLACK = RESULTS / "classes.json", 0.02


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=None, help="keep teachers, pairs and students")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [judged(options.runs or Path(folder), seed) for seed in range(options.seeds)]
    write_json(PATH, {"commit": git("rev-parse", "HEAD"), "seeds": found}, force=True)
    for row in found:
        agreed = [row[side]["classifier_agreement"] for side in ("teacher", "student")]
        print(f"seed {row['seed']}: teacher {agreed[0]:.1%}, student {agreed[1]:.1%}")
        if agreed[1] < agreed[0] - SLACK:
            raise SystemExit(f"seed {row['seed']}: the student misses the bar")


def judged(runs: Path, seed: int) -> dict[str, Any]:
    """Return the figures of the teacher and of the student of a seed, by class too."""
    teacher, pairs, student = (runs / f"{name}-{seed}" for name in ("teacher", "pairs", "student"))
    seeds = ("--seed", seed, "--train.seed", seed)
    dstudent("teach", "digits", "--conditional", "--out", teacher, *seeds)
    dstudent("pairs", "digits", "--teacher", teacher, "--out", pairs, "--pairs.seed", seed)
    dstudent(
        "distill", "digits", "--teacher", teacher, "--store", pairs, "--out", student, *seeds[2:]
    )
    found: dict[str, Any] = {"seed": seed}
    for side, model in (("teacher", teacher), ("student", student)):
        dstudent("evaluate", model)
        result = read_json(model / "metrics.json")
        found[side] = {**figures(result), CLASSES: result[CLASSES]}
    return found


if __name__ == "__main__":
    main()
