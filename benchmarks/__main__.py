"""Time this library and its peers on this machine.

    python -m benchmarks                          every case
    python -m benchmarks group_norm_silu          one of them
    python -m benchmarks --size quick             fewer, smaller, narrower, fewer rounds: minutes
    python -m benchmarks teacher_loop --check     how far each side is off, and no times
    python -m benchmarks --against REV ops        how many times as long it takes at another commit
    python -m benchmarks chain --help             the whole chain, teacher to student
    python -m benchmarks methods --help           what the methods give for equal spending

Each row shows its sides, ours last: how long they take, how far they are off, and how many times as
long as ours they take. What is wrong or cannot run is named, and the others go on. The end says
where ours wins and where it loses.

Results go to runs/benchmarks/<machine>/<time>/<case>.json, row by row, with the commit, and a "+"
where the checkout has changes. Those that are to be committed go to benchmarks/results/<machine>
with --commit, which wants the full size and a checkout without changes.
"""

import argparse
import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from typing import get_args

import torch

from benchmarks import against, harness, printed
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
    if (own := sys.argv[1:2]) in (["chain"], ["methods"]):  # which have options of their own
        return importlib.import_module(f"benchmarks.{own[0]}").main(sys.argv[2:])
    options = _options()
    if options.against:
        rest = [f"--threads={options.threads}", f"--device={options.device}"]
        rest.append(f"--size={options.size}")
        against.compare(options.against, [*options.cases, *rest])
        return 0
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    calibration = harness.calibrate(device, options.size)
    print(printed.machine(calibration))
    failed, measured = False, {}
    for name in options.cases or CASES:
        print(printed.head(name))
        rows = measured[name] = []
        try:
            for row in harness.run(_cases(name, options), device, options.pace):
                print(printed.table(row, calibration), flush=True)
                failed |= bool(row["refused"])
                rows.append(row)
                if options.folder:
                    harness.save(name, options.folder, rows, calibration, device)
        except Exception as error:  # of one case, such as too little memory; the others go on
            traceback.print_exc()
            print(f"not timed: {name}: {type(error).__name__}: {error}", flush=True)
            failed = True
    print(printed.verdict(measured))
    if options.folder:
        print(f"Results: {options.folder}")
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
    harness.saving(parser)
    parser.add_argument("--against", metavar="REV", help="compare with another commit, built here")
    options = parser.parse_args()
    if unknown := set(options.cases) - {*CASES}:
        parser.error(f"no case {sorted(unknown)[0]!r}; the cases are {', '.join(CASES)}")
    if options.commit and (options.check or options.size != "full"):
        parser.error("--commit is for what was timed in full: leave out --check and --size")
    try:
        options.folder = harness.folder(options)
    except ValueError as error:
        parser.error(str(error))
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
