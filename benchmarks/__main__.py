"""Time this library and its peers on this machine.

    python -m benchmarks                        every case
    python -m benchmarks group_norm_silu        one of them
    python -m benchmarks --quick                fewer, smaller, narrower, fewer rounds: minutes
    python -m benchmarks --against REV ops      how many times as long it takes at another commit
    python -m benchmarks chain --help           the whole chain, teacher to student

Figures are microseconds, the median and the 20th to 80th percentile; "x" is how many times as long
a side takes as ours, the last. Results go to benchmarks/results/<machine>/<case>.json.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks import against, harness

CASES = (
    "ops", "group_norm_silu", "loader", "network", "roofline", "where", "teacher_loop", "pairs",
    "student", "train_step", "cold_start", "frontier",
)  # fmt: skip


def main() -> int:
    """Run the cases that were asked for; return 1 if a side was wrong."""
    if sys.argv[1:2] == ["chain"]:  # which has options of its own
        from benchmarks import chain

        return chain.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--machine", help="folder of the results; by default the processor's name")
    parser.add_argument("--no-save", action="store_true", help="print, and write nothing")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, and nothing else")
    parser.add_argument("--against", metavar="REV", help="compare with another commit, built here")
    options = parser.parse_args()
    if unknown := set(options.cases) - {*CASES}:
        parser.error(f"no case {sorted(unknown)[0]!r}; the cases are {', '.join(CASES)}")
    if options.against:
        rest = [f"--threads={options.threads}", f"--device={options.device}"]
        rest += ["--quick"] if options.quick else []
        against.compare(options.against, [*options.cases, *rest])
        return 0
    save = not (options.no_save or options.json)
    if save and harness.dirty():
        parser.error("the checkout has uncommitted changes: commit them, or pass --no-save")

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    calibration = harness.calibrate(device)
    print("machine:", ", ".join(f"{name} {value:.3g}" for name, value in calibration.items()))
    pace = harness.QUICK if options.quick else harness.Pace()
    everything = []
    for name in options.cases or CASES:
        cases = importlib.import_module(f"benchmarks.{name}").cases(device, quick=options.quick)
        rows = []
        try:
            for row in harness.run(cases, device, pace):
                rows.append(row)
                print(harness.line(row, calibration), flush=True)
        except harness.Wrong as error:
            print(f"not timed: {error}", file=sys.stderr)
            return 1
        everything += rows
        if save:
            folder = options.machine or harness.machine(device)
            path = harness.save(name, folder, rows, calibration, device)
            print(f"wrote {path.relative_to(harness.ROOT)}")
    if options.json:
        Path(options.json).write_text(json.dumps(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
