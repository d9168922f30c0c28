"""What a GPU is asked in its first quarter of an hour, in two runs, the most valuable first.

    make gpu-first GPU_PYTHON=python3       what is right, and the loop beside its peers
    make gpu-second GPU_PYTHON=python3      every convolution, batch 1, training, the sanitizer

Each run takes less than seven minutes. A step is a process of its own with a limit of its own; what
it prints and finds is written as it comes, to <step>/ in the folder that DS_GPU_RESULTS names, or
gpu-results/. The table of verdicts comes last and is kept in table-<run>.txt. Exit status 0 means
that the run reached its end: whether a step failed is in the table. It needs neither git nor a
network nor packages beside PyTorch, Triton and pytest; those that `make gpu-wheels` fetched are
used. `python -m benchmarks.gpu_report` turns the folder into results and tables.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS, PACKAGES = ROOT / "wheels", ROOT / "build" / "wheels"
BUDGET = 410  # seconds of a run
TESTS = "-m pytest -v -rfE --tb=short -p no:cacheprovider -o timeout=60"
SANITIZED = "written or in_place or more_tensors or any_number"


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and what is so in its environment.

    {here} is this interpreter and {python} the command of a step; {work} are the options of a
    benchmark: how large, and where results go. {jobs} are processes of pytest, {some} of its tests
    where a GPU is emulated.
    """

    name: str
    command: str
    limit: int
    environment: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a step."""

    step: str
    verdict: str  # passed, failed, timed out, or no time was left
    seconds: float
    figures: list[str]
    complaint: str  # the first line of what went wrong


START = (
    Step("wheels", "{here} -m benchmarks.gpu wheels", 40),
    Step("build", "{here} -m benchmarks.gpu build", 60),
)
FIRST = (
    *START,
    Step("float64", "{python} -m benchmarks teacher_loop --check {work} --without diffusers", 90),
    Step(
        "tests",
        f"{{python}} {TESTS} {{jobs}} tests/gpu tests/cuda tests/kernels "
        "-k 'not many_normals and not aot and not resources and not interpreted "
        "and not a_case_runs{some}'",
        120,
    ),
    Step(
        "loop",
        "{python} -m benchmarks teacher_loop {work} --only 'bfloat16.*\\[[^1]' --without compiled",
        90,
    ),
    Step(
        "loop_compiled",
        "{python} -m benchmarks teacher_loop {work} --only 'bfloat16.*\\[[^1]'",
        300,
    ),
)
SECOND = (
    *START,
    Step("convs", "{python} -m benchmarks convs {work}", 150),
    Step(
        "one_image",
        "{python} -m benchmarks teacher_loop {work} --only 'bfloat16.*\\[1,' --without compiled",
        60,
    ),
    Step("train_step", "{python} -m benchmarks train_step {work} --only cifar10", 120),
    Step(
        "sanitizer",
        f"compute-sanitizer --error-exitcode 1 {{python}} {TESTS} tests/kernels tests/cuda "
        f"-k '({SANITIZED}) and not interpreted'",
        100,
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
    ),
    Step("student", "{python} -m benchmarks student {work} --without compiled", 60),
)
RUNS = {"first": FIRST, "second": SECOND}


def main() -> int:
    """Do a run, or one of its two preparations; return 1 if a preparation failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*RUNS, "wheels", "build"])
    parser.add_argument("--python", default=sys.executable, help="the command that starts a step")
    parser.add_argument("--size", default="full", help="of the work: full, quick or tiny")
    options = parser.parse_args()
    if options.what == "wheels":
        return wheels()
    if options.what == "build":
        return build()
    results = Path(os.environ.get("DS_GPU_RESULTS") or ROOT / "gpu-results").resolve()
    run(options.what, RUNS[options.what], results, options.python, options.size)
    return 0


def run(name: str, steps: Sequence[Step], results: Path, python: str, size: str) -> list[Verdict]:
    """Do the steps one after another, and print and keep the table of verdicts after each."""
    end = time.monotonic() + BUDGET
    verdicts = []
    for step in steps:
        out = results / step.name
        shutil.rmtree(out, ignore_errors=True)  # of an earlier run
        out.mkdir(parents=True)
        print(f"{step.name} ...", flush=True)
        verdicts.append(do(step, out, min(step.limit, end - time.monotonic()), python, size))
        lines = [asdict(verdict) for verdict in verdicts]
        (results / f"verdicts-{name}.json").write_text(json.dumps(lines, indent=1) + "\n")
        (results / f"table-{name}.txt").write_text(table(verdicts))
        print(table(verdicts[-1:]).partition("\n")[2], end="", flush=True)
    print(f"\n{table(verdicts)}\nWhat was printed and found: {results}")
    return verdicts


def do(step: Step, out: Path, limit: float, python: str, size: str) -> Verdict:
    """Run a step within its limit; return its verdict."""
    if limit < 5:
        return Verdict(step.name, "no time was left", 0.0, [], "")
    command = step.command.format(
        here=sys.executable,
        python=python,
        work=f"--size {size} --device cuda --out {shlex.quote(str(out))}",
        jobs="" if size == "tiny" else "-n 8",
        some=" and (written or with_a_norm or in_float32)" if size == "tiny" else "",
    )
    begin, log = time.monotonic(), out / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            shell=True,
            cwd=ROOT,
            env=environment(step),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status = _waited(process, limit)
    seconds = time.monotonic() - begin
    verdict = {None: "timed out", 0: "passed"}.get(status, "failed")
    text = log.read_text(errors="replace")
    complaint = first_complaint(text) if verdict != "passed" else ""
    return Verdict(step.name, verdict, round(seconds, 1), figures(out, text), complaint)


def _waited(process: subprocess.Popen, limit: float) -> int | None:
    """Return the exit status, or None after the limit: the step may say its last, and is killed."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        for number, patience in ((signal.SIGINT, 5), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        return None


def environment(step: Step) -> dict[str, str]:
    """Return the environment of a step: the packages from wheels, the tools of CUDA, no buffers."""
    paths = [str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    given = dict(item.split("=") for item in step.environment.split())
    return (
        os.environ
        | given
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PATH": os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin",
            "PYTHONUNBUFFERED": "1",
        }
    )


# What tells what went wrong, the best first.
COMPLAINTS = (
    r"^FAILED .*",
    r"^.* FAILED .*",
    r"^not timed: .*",
    r"^.*not found$",
    r"^ERROR .*",
    r"^[\w.]*(?:Error|Exception|Interrupt)\b.*",
    r"^.*(?:error|Fatal|fault).*",
)


def first_complaint(log: str) -> str:
    """Return the line of what a step printed that tells best what went wrong."""
    for pattern in COMPLAINTS:
        if found := re.search(pattern, log, re.MULTILINE):
            return found[0].strip()
    return next(reversed(log.split("\n")[:-1]), "").strip()


def figures(out: Path, log: str) -> list[str]:
    """Sum up what a step found: tests that passed and failed, or sides and how they compare."""
    tests = re.findall(
        r"(?:^\[gw\d+\] \[ *\d+%\] |::.* )(PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE
    )
    if tests:
        return [", ".join(f"{tests.count(word)} {word.lower()}" for word in dict.fromkeys(tests))]
    rows = [row for path in out.glob("*.json") for row in json.loads(path.read_text())["cases"]]
    if len(rows) > 4:
        best = [_fastest(row["us"]) for row in rows if row["us"]]
        counts = (f"{side} the fastest in {best.count(side)}" for side in dict.fromkeys(best))
        return [", ".join([f"{len(rows)} rows", *counts])]
    return [f"{row['dtype']} x {row['images']}: {_sides(row)}" for row in rows]


def _fastest(times: dict[str, dict[str, float]]) -> str:
    return min(times, key=lambda side: times[side]["median"])


def _sides(row: dict) -> str:
    if not row["us"]:
        return ", ".join(f"{side} off by {error:.1e}" for side, error in row["error"].items())
    *others, (last, ours) = row["us"].items()
    ratios = [f"{side} {t['median'] / ours['median']:.2f}x" for side, t in others]
    return ", ".join([f"{last} {ours['median'] / 1e3:,.2f} ms", *ratios])


def table(verdicts: Sequence[Verdict]) -> str:
    """Lay verdicts out, what went wrong below its step."""
    lines = [f"{'step':14} {'verdict':16} {'seconds':>7}  figures"]
    for v in verdicts:
        notes = [*v.figures, *[v.complaint] * bool(v.complaint)] or [""]
        lines.append(f"{v.step:14} {v.verdict:16} {v.seconds:7.0f}  {notes[0]}".rstrip())
        lines += [f"{'':41}{note}" for note in notes[1:]]
    return "\n".join(lines) + "\n"


def wheels() -> int:
    """Install what lies in wheels/, without a network, into a folder that steps find it in."""
    found = sorted(WHEELS.glob("*.whl"))
    options = ["--no-index", "--no-deps", "--disable-pip-version-check", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", PACKAGES, *found]
    return subprocess.run(command).returncode if found else 0


def build() -> int:
    """Build the native libraries, unless they are there and load."""
    loads = "from ds.ops import _native as n; n.cpu_library(); n.cuda_library(); print('built')"
    check = [sys.executable, "-c", loads]
    if subprocess.run(check, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0:
        return 0
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT)
    return subprocess.run(check, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
