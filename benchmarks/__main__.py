"""Time this library and its peers on this machine.

    python -m benchmarks                          every case
    python -m benchmarks group_norm_silu          one of them
    python -m benchmarks --size quick             fewer, smaller, narrower, fewer rounds: minutes
    python -m benchmarks teacher_loop --check     how far each side is off, and no times
    python -m benchmarks --against REV ops        how many times as long it takes at another commit
    python -m benchmarks chain --help             the whole chain, teacher to student

Figures are microseconds, the median and the 20th to 80th percentile, and how far a side is off; "x"
is how many times as long it takes as ours, the last. Results go to
benchmarks/results/<machine>/<case>.json, with several threads to a folder of their own, or to the
folder of --out, row by row. What is wrong or cannot run is named, and the others go on.
"""

import argparse
import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from benchmarks import against, harness
from benchmarks.harness import Case

CASES = (
    "ops",
    "group_norm_silu",
    "scale_shift",
    "loader",
    "network",
    "edm",
    "roofline",
    "convs",
    "where",
    "teacher_loop",
    "pairs",
    "student",
    "train_step",
    "cold_start",
    "frontier",
)


def main() -> int:
    """Run the cases that were asked for; return 1 if one failed or a side was refused."""
    if sys.argv[1:2] == ["chain"]:  # which has options of its own
        from benchmarks import chain

        return chain.main(sys.argv[2:])
    options = _options()
    if options.against:
        rest = [f"--threads={options.threads}", f"--device={options.device}"]
        rest.append(f"--size={options.size}")
        against.compare(options.against, [*options.cases, *rest])
        return 0
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    calibration = harness.calibrate(device, options.size)
    print("machine:", ", ".join(f"{name} {value:.3g}" for name, value in calibration.items()))
    failed = False
    for name in options.cases or CASES:
        rows = []
        try:
            for row in harness.run(_cases(name, options), device, options.pace):
                print(harness.line(row, calibration), flush=True)
                failed |= bool(row["refused"])
                rows.append(row)
                if options.out:
                    path = harness.save(name, options.out, rows, calibration, device)
        except Exception as error:  # of one case, such as too little memory; the others go on
            traceback.print_exc()
            print(f"not timed: {name}: {type(error).__name__}: {error}", flush=True)
            failed = True
        if rows and options.out:
            print(f"wrote {path}")
    return int(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument(
        "--size", choices=get_args(harness.Size), default="full", help="of the work"
    )
    parser.add_argument("--only", metavar="REGEX", default="", help="rows whose name has this")
    parser.add_argument("--without", metavar="REGEX", help="sides to leave out, by their names")
    parser.add_argument("--check", action="store_true", help="hold sides to float64, time nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--machine", help="folder of the results; by default the processor's name")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results there instead")
    parser.add_argument("--no-save", action="store_true", help="print, and write nothing")
    parser.add_argument("--against", metavar="REV", help="compare with another commit, built here")
    options = parser.parse_args()
    if unknown := set(options.cases) - {*CASES}:
        parser.error(f"no case {sorted(unknown)[0]!r}; the cases are {', '.join(CASES)}")
    if not (options.no_save or options.out or options.against):
        here = options.machine or harness.machine(options.device, options.threads)
        options.out = harness.RESULTS / here
        if not harness.is_named(harness.commit()):
            parser.error("no commit names this code: commit changes, or pass --out or --no-save")
    if options.size == "tiny":
        options.without = "|".join(filter(None, (options.without, "compiled", "inductor")))
    options.pace = None if options.check else harness.PACES[options.size]
    return options


def _cases(name: str, options: argparse.Namespace) -> Iterator[Case]:
    """Yield what is asked for of a case, with the sides that are."""
    module = importlib.import_module(f"benchmarks.{name}")
    for case in module.cases(torch.device(options.device), options.size):
        if re.search(options.only, case.name):
            yield harness.without(case, options.without) if options.without else case


if __name__ == "__main__":
    sys.exit(main())
