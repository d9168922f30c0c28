"""Break the library on purpose, one small fault at a time, and see whether a test notices.

    make mutants
    python -m tests.mutants ds/diffusion ds/pairs/quantizer.py --count 100 --seed 1

The mutants are drawn from all that the modules can have, by the seed, at most one a line. Each is
met with those fast tests that run its line, as `make coverage` has recorded them: the quickest of
the room first, for half a minute. Every mutant has its own process, which is forked from one that
has imported PyTorch. A fault is noticed if a test fails, or takes far longer than without it.

Results are added to a file, one JSON value a line. Killed at any moment, the same command goes on.
"""

import argparse
import functools
import json
import os
import random
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from tests.mutants.faults import Mutant, mutants
from tests.mutants.trial import failing, prepare

ROOT = Path(__file__).parents[2]
COVERAGE = ROOT / "build/coverage"
MODULES = [
    "ds/diffusion", "ds/analytic", "ds/methods", "ds/pairs", "ds/training/optim.py",
    "ds/training/ema.py", "ds/evaluation/metrics.py", "ds/evaluation/statistics.py",
    *(f"ds/ops/{name}" for name in (
        "dispatch", "_native.py", "adam.py", "gather_rows.py", "noise.py", "prepare_batch.py",
        "quantize.py", "solver_update.py",
    )),
]  # fmt: skip
# Proofs are themselves tests, with bars and controls of their own, and tests/ proves them.
LEFT_OUT = "ds/methods/proof"


def drawn(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """Return so many mutants of modules and folders, at most one a line."""
    found = []
    for module in modules:
        path = ROOT / module
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith(LEFT_OUT):
                found += mutants(name, file.read_text())
    # A lot each, so that a file's mutants are drawn alike whatever else is asked for or changes.
    found.sort(key=lambda m: random.Random(f"{seed} {m.file} {m.start} {m.new}").random())
    one_a_line = {(mutant.file, mutant.line): mutant for mutant in reversed(found)}
    return [mutant for mutant in found if one_a_line[mutant.file, mutant.line] == mutant][:count]


class Tests:
    """Which fast tests run which lines, and how long they take."""

    def __init__(self, seconds: float):
        from coverage import CoverageData

        self.most = seconds  # for a mutant; a file of tests counts for one more, to be imported
        data = CoverageData(str(COVERAGE / "data"))
        data.read()
        self.lines = functools.cache(lambda file: data.contexts_by_lineno(str(ROOT / file)))
        self.seconds, self.of_file = {}, defaultdict(set)
        for case in ET.parse(COVERAGE / "tests.xml").iter("testcase"):
            if not len(case):  # nothing is said of a test that passes
                file = case.attrib["classname"].replace(".", "/") + ".py"
                test = f"{file}::{case.attrib['name']}"
                self.seconds[test] = float(case.attrib["time"])
                self.of_file[file].add(test)

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that meet a mutant."""
        begin, end = mutant.lines
        lines = self.lines(mutant.file)
        contexts = {c for line in range(begin, end + 1) for c in lines.get(line, ())}
        met = {context.rpartition("|")[0] for context in contexts}
        # What a fixture runs, it may run for all tests of the file.
        shared = {c.partition("::")[0] for c in contexts if not c.endswith("|run")}
        met |= {test for file in shared for test in self.of_file[file]}
        room, stem = mutant.file.split("/")[1], Path(mutant.file).stem
        # What a test computes while it is collected, coverage tells of no test.
        own = self.of_file[f"tests/{room}/test_{stem}.py"]
        return self.quickest(met & self.seconds.keys() or own, room)

    def quickest(self, tests: set[str], room: str) -> list[str]:
        """Return the tests that fit into the time: those of the room first, then the quickest."""
        chosen, files, left = [], set(), self.most
        for _, seconds, test in sorted(
            (test.split("/")[1] != room, self.seconds[test], test) for test in tests
        ):
            file = test.partition("::")[0]
            left -= seconds + (file not in files)
            if left < 0 and chosen:
                break
            files.add(file)
            chosen.append(test)
        return chosen


def key(mutant: Mutant) -> str:
    """Name a mutant by its file's content too, so that no result outlives a change of it."""
    source = sha256((ROOT / mutant.file).read_bytes()).hexdigest()[:12]
    return f"{mutant.file}:{mutant.line}:{mutant.start} {source} {mutant.old!r} -> {mutant.new!r}"


def main() -> None:
    """Try the mutants that have no result yet, then tell the score and every survivor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, help="files or folders under ds/")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build/mutants/results.jsonl")
    parser.add_argument("--seconds", type=float, default=10.0, help="of tests for a mutant")
    parser.add_argument("--again", action="store_true", help="try survivors again, as after a test")
    args = parser.parse_args()
    asked = {key(mutant): mutant for mutant in drawn(args.modules, args.count, args.seed)}
    results = known(args.out)
    with args.out.open("a") as file:
        tests = Tests(args.seconds)
        prepare()
        tree = copied(args.out.parent / "tree")
        for i, (name, mutant) in enumerate(asked.items()):
            if name not in results or (args.again and not results[name]["by"]):
                results[name] = {"mutant": name, **tried(tree, mutant, tests, i + 1)}
                file.write(json.dumps(results[name]) + "\n")
                file.flush()
    rows = [results[name] for name in asked]
    by = sorted({row["by"] for row in rows} & tests.seconds.keys())
    innocent = failing(tree, by, sum(map(tests.seconds.get, by)), first=False)
    if not {*by}.issuperset(innocent):
        raise RuntimeError(f"without a fault, the tests end with {innocent}")
    report(rows, set(innocent))


def known(out: Path) -> dict[str, dict]:
    """Return the results of a file, without the last if it was not written to its end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
    whole = out.read_bytes().rpartition(b"\n")[0]
    os.truncate(out, len(whole) + bool(whole))
    return {row["mutant"]: row for row in map(json.loads, whole.splitlines())}


def copied(folder: Path) -> Path:
    """Copy the tree afresh, and what is built in it, to where it may be broken."""
    shutil.rmtree(folder, ignore_errors=True)
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    built = [p.relative_to(ROOT) for p in (ROOT / "ds/ops/lib").iterdir()]
    for name in [*filter(None, names), *built]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def tried(tree: Path, mutant: Mutant, tests: Tests, number: int) -> dict:
    """Break a file of the tree, run the tests that meet it, and mend it again."""
    met = tests.of(mutant)
    if not met:
        return {"by": "", "tests": 0}
    path = tree / mutant.file
    kept, made = path.read_bytes(), path.stat().st_mtime_ns
    try:
        path.write_text(mutant.apply(kept.decode()))
        # Compiled modules are told apart by the second.
        os.utime(path, ns=(made, made + number * 10**9))
        failed = failing(tree, met, sum(map(tests.seconds.get, met)), first=True)
    finally:
        path.write_bytes(kept)
        os.utime(path, ns=(made, made))
    return {"by": failed[0] if failed else "", "tests": len(met)}


def report(rows: list[dict], innocent: set[str]) -> None:
    """Print the score of every room and the survivors."""
    for row in rows:
        row["noticed"] = bool(row["by"]) and row["by"] not in innocent
    for test in sorted(innocent):
        print(f"fails without a fault, and so notices none: {test}")
    for row in rows:
        if not row["noticed"]:
            print(f"survived {row['tests']} tests: {row['mutant']}")
    rooms = defaultdict(list)
    for row in rows:
        rooms[row["mutant"].split("/")[1]].append(row["noticed"])
    for room, noticed in [*sorted(rooms.items()), ("all", [row["noticed"] for row in rows])]:
        print(f"{room:12} {sum(noticed):4} of {len(noticed):4}  {sum(noticed) / len(noticed):.1%}")


if __name__ == "__main__":
    main()
