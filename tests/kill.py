"""Kill `dstudent pairs` and `dstudent distill` at random moments; nothing may be lost or differ.

    python -m tests.kill --kills 20
    python -m tests.kill --kills 20 --compiled
    python -m tests.kill --kills 20 --shard
    python -m tests.kill --kills 20 --workers 8

Each command is run once without interruption. Then it is run again elsewhere, killed with SIGKILL
at a random moment, restarted, killed, and so on until it gets to its end, and what it leaves is
compared with the uninterrupted run to the bit; then it starts afresh, until there were that many
kills. With --shard, distill is two processes, which are killed together. With workers, so many
processes share one store of pairs; one of them, drawn at random, is killed and replaced every few
seconds. Exits with 1 if anything differs.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shlex import split
from typing import Any

from ds.cli.__main__ import main
from tests.processes import Started, Two

TEACH = split("--net.channels 8 --net.norm-groups 4 --train.epochs 1 --train.warmup-steps 5")
PAIRS = split(
    "--pairs.count 1472 --pairs.held-out 64 --pairs.shard-size 64 --pairs.batch-size 64 "
    "--solve.steps 10"
)
DISTILL = split("--held-out 64 --train.epochs 4 --train.check-every 9 --train.log-every 5")


def start(*args: str | Path) -> Started:
    return Started(main, [*map(str, args)])


def start_two(*args: str | Path) -> Two:
    return Two(main, [*map(str, args)])


def seconds(*args: str | Path, start: Callable[..., Any] = start) -> float:
    """Run a command to its end; return how long it took."""
    begin = time.perf_counter()
    process = start(*args)
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, args))}: {err}")
    return time.perf_counter() - begin


def files(folder: Path) -> dict[str, bytes]:
    """Return what a directory holds, without locks and times."""
    return {f.name: _timeless(f) for f in sorted(folder.iterdir()) if f.name != ".lock"}


def _timeless(file: Path) -> bytes:
    if file.name == "checkpoint":
        return repr([_timeless(part) for part in sorted(file.iterdir())]).encode()
    if file.is_dir():
        return b""
    # Equal content may be written in more than one way.
    if file.name == "checkpoint.pt":
        import torch

        return repr(_plain(torch.load(file, weights_only=True))).encode()
    if file.parent.name == "checkpoint" and file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return repr(_plain(dict(sorted(load_file(file).items())))).encode()
    if file.suffix != ".jsonl":
        return file.read_bytes()
    from ds.training.log import MEASURED

    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return repr([{k: v for k, v in m.items() if k not in MEASURED} for m in lines]).encode()


def _plain(saved: Any) -> Any:
    """Turn the tensors of a checkpoint into numbers, which print to the bit."""
    if isinstance(saved, dict):
        return {name: _plain(value) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return [_plain(value) for value in saved]
    return saved.tolist() if hasattr(saved, "tolist") else saved


def store_state(folder: Path) -> str:
    return f"{len(list(folder.glob('pairs/images-*.npy')))} shards written"


def run_state(folder: Path) -> str:
    metrics = folder / "student-run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return f"step {json.loads(lines[-1])['step']} noted" if lines else "nothing noted"


def attack(
    name: str, command: Callable[[Path], list], folders: list[str], state: Callable[[Path], str],
    home: Path, kills: int, draw: random.Random, start: Callable[..., Any] = start,
) -> bool:  # fmt: skip
    """Kill one command so many times; say whether every end equals the uninterrupted one."""
    whole, cut = home / f"{name}-whole", home / f"{name}-cut"
    shortest = seconds(*command(whole), "--dry-run", start=start)
    longest = seconds(*command(whole), start=start)
    expected = {folder: files(whole / folder) for folder in folders}
    print(f"{name}: {longest:.1f} s, of which {shortest:.1f} s to start", flush=True)
    done, ends, equal = 0, 0, True
    while done < kills or not ends:
        shutil.rmtree(cut, ignore_errors=True)
        finished = False
        while not finished:
            begin, fresh = time.perf_counter(), not cut.exists()
            process = start(*command(cut))
            moment = draw.uniform(0.9 * shortest, longest) if done < kills else None
            try:
                _, err = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                print(f"{name}: kill {done} after {moment:.2f} s, {state(cut)}", flush=True)
                continue
            if process.returncode:
                print(f"{name}: could not go on: {err}", flush=True)
                return False
            finished = True
            if fresh:  # the machine has become less busy than it was
                longest = min(longest, time.perf_counter() - begin)
        ends += 1
        equal &= all(same(name, folder, cut, expected[folder]) for folder in folders)
    print(f"{name}: {done} kills, {ends} ends, {'equal' if equal else 'DIFFERENT'}", flush=True)
    return equal


def same(name: str, folder: str, home: Path, expected: dict[str, bytes]) -> bool:
    """Say whether a directory holds what is expected, and what differs."""
    found = files(home / folder)
    different = [f for f in sorted(expected.keys() | found) if found.get(f) != expected.get(f)]
    for file in different:
        print(f"{name}: {folder}/{file} differs", flush=True)
    return not different


def swarm(command: list, out: Path, workers: int, kills: int, draw: random.Random) -> None:
    """Run a command in many processes until it is done, and replace one of them `kills` times."""
    running = [start(*command) for _ in range(workers)]
    for done in range(1, kills + 1):
        time.sleep(draw.uniform(2, 5))
        victim = running.pop(draw.randrange(len(running)))
        victim.kill()
        victim.communicate()
        print(f"workers: kill {done}, {store_state(out.parent)}", flush=True)
        running.append(start(*command))
    for process in running:
        _, err = process.communicate()
        if process.returncode:
            sys.exit(f"workers: {err}")


def kill_workers(workers: int, kills: int, seed: int = 0) -> bool:
    """Let workers that are killed and replaced fill one store; say whether it is as from one."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        teacher = home / "teacher"
        seconds("teach", "digits", "--out", teacher, *TEACH)

        def command(out: Path) -> list:
            sizes = ["--pairs.count", 64 * 200 * workers - 64, "--solve.steps", 40]
            return ["pairs", "digits", "--teacher", teacher, "--out", out, *PAIRS, *sizes]

        took = seconds(*command(home / "whole" / "pairs"))
        print(f"workers: {took:.1f} s alone", flush=True)
        swarm(command(home / "cut" / "pairs"), home / "cut" / "pairs", workers, kills,
              random.Random(seed))  # fmt: skip
        equal = same("workers", "pairs", home / "cut", files(home / "whole" / "pairs"))
        print(f"workers: {kills} kills of {workers}, {'equal' if equal else 'DIFFERENT'}")
    return equal


def kill(kills: int, seed: int = 0, *, compiled: bool = False, shard: bool = False) -> bool:
    """Attack both commands; say whether nothing was lost."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        teacher = home / "teacher"
        seconds("teach", "digits", "--out", teacher, *TEACH)
        equal = attack(
            "pairs",
            lambda out: ["pairs", "digits", "--teacher", teacher, "--out", out / "pairs", *PAIRS],
            ["pairs"], store_state, home, kills, draw,
        )  # fmt: skip
        store = home / "pairs-whole" / "pairs"
        there = ["--teacher", teacher, "--store", store]
        if compiled:
            there += ["--runtime.compile", "yes", "--runtime.compile-cache", home / "compiled"]
        if shard:
            there += ["--runtime.shard"]
        equal &= attack(
            "distill",
            lambda out: ["distill", "digits", *there, "--out", out / "student", *DISTILL],
            ["student", "student-run", "student-run/samples"], run_state, home, kills, draw,
            start_two if shard else start,
        )  # fmt: skip
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--workers", type=int, help="share one store among so many processes")
    parser.add_argument("--compiled", action="store_true", help="let distill compile its loss")
    parser.add_argument("--shard", action="store_true", help="let two processes shard distill")
    options = parser.parse_args()
    if options.workers:
        equal = kill_workers(options.workers, options.kills, options.seed)
    else:
        equal = kill(options.kills, options.seed, compiled=options.compiled, shard=options.shard)
    sys.exit(0 if equal else 1)
