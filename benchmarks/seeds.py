"""Whether training fast is training as well: students of digits, plain and at full strength.

    python -m benchmarks.seeds [--seeds 5]

Both sides learn from the same pairs, once for each seed: plain is one process, eager, in float32;
fast is two processes of torchrun, compiled, in bfloat16. Writes the Frechet distances of their
images to results/seeds.json. What is there already is kept, so that it can be called again.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import RESULTS, git
from ds.system.files import read_json
from ds.system.staging import write_json

PATH = RESULTS / "seeds.json"
SIDES = {
    "plain": ([sys.executable], []),
    "fast": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["--train.precision", "bfloat16", "--runtime.compile", "yes"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=None, help="keep teacher, pairs and students")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options.runs or Path(folder), options.seeds)


def compare(runs: Path, seeds: int) -> None:
    """Train and score what is missing in `runs`, and write the figures."""
    teacher, pairs = runs / "teacher", runs / "pairs"
    dstudent("teach", "digits", "--out", teacher)
    dstudent("pairs", "digits", "--teacher", teacher, "--out", pairs)
    found: dict[str, list[float]] = {name: [] for name in SIDES}
    for seed in range(seeds):
        for name, (start, options) in SIDES.items():
            out = runs / f"{name}-{seed}"
            dstudent(
                "distill",
                "digits",
                "--teacher",
                teacher,
                "--store",
                pairs,
                "--out",
                out,
                "--train.seed",
                seed,
                *options,
                start=start,
            )
            dstudent("evaluate", out)
            found[name].append(read_json(out / "metrics.json")["frechet_distance"])
            print(name, seed, found[name][-1], flush=True)
    write_json(PATH, {"commit": git("rev-parse", "HEAD"), "frechet_distance": found})


def dstudent(*arguments: object, start: list[str] | None = None) -> None:
    """Run a command; raise CalledProcessError if it fails."""
    command = [*(start or [sys.executable]), "-m", "ds.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
