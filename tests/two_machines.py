"""Train on two machines, cut one off for 30 s, then kill it; the run must end as if nothing was.

    sudo python -m tests.two_machines

The machines are two network namespaces of Linux, joined by a virtual cable, with one file system;
each runs a torchrun of its own, which is started again when it fails, as a service would be. First
the student is trained without disturbance. Then it is trained again elsewhere: once a checkpoint
is there the cable is pulled for 30 s and put back, and after that one machine is killed with
SIGKILL and started anew. Exits with 1 if what the two runs leave differs in a bit.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import split

from tests.kill import PAIRS, ROOT, TEACH, files, same, seconds

DISTILL = split("--held-out 64 --train.epochs 30 --train.check-every 50 --train.log-every 10")
PATIENCE = 600  # seconds for a run to get anywhere


@contextmanager
def machines() -> Iterator[list["Machine"]]:
    """Make two namespaces with a cable between them, and take them away at the end."""
    both = [Machine(f"ds-{secrets.token_hex(3)}", f"10.77.0.{n}") for n in (1, 2)]
    try:
        for machine in both:
            ip("netns", "add", machine.name)
        a, b = (machine.name for machine in both)
        ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "cable", "netns", b)
        for machine in both:
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "cable")
            machine.set("lo", "up")
            machine.set("cable", "up")
        yield both
    finally:
        for machine in both:
            machine.kill()
            ip("netns", "delete", machine.name)


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ip {' '.join(args)}: {done.stderr.strip()} (are you root?)")


class Machine:
    """A namespace, and the torchrun in it."""

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address
        self.process: subprocess.Popen | None = None

    def set(self, device: str, state: str) -> None:
        ip("-n", self.name, "link", "set", device, state)

    def start(self, command: list[str], host: "Machine") -> None:
        """Start a torchrun that meets the other one's at the host."""
        meeting = f"is_host={int(self is host)}"
        self.command, self.host = command, host
        self.process = subprocess.Popen(
            [
                "ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run",
                "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host.address}:29400",
                "--rdzv-conf", meeting, "--local-addr", self.address, "-m", "ds.cli", *command,
            ],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
        )  # fmt: skip

    def done(self) -> bool:
        """Say whether the training is over here, and start it again if it failed."""
        if code := self.process.poll():
            print(f"{self.name}: torchrun ended with {code}; started again", flush=True)
            self.start(self.command, self.host)
        return code == 0

    def kill(self) -> None:
        """End every process at once, as when the power fails."""
        if self.process is None:
            return
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for number in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        self.process.wait()


def noted(out: Path) -> int:
    """Return the last step that a run has noted."""
    metrics = out / "student-run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def wait(what: str, condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {PATIENCE} s")
        time.sleep(0.2)


def train(both: list[Machine], command: list[str], out: Path, *, disturb: float = 0) -> None:
    """Train to the end; with `disturb`, cut one machine off for so many seconds, then kill it."""
    begin, (host, other) = time.monotonic(), both
    for machine in both:
        machine.start(command, host)
    if disturb:
        wait("a checkpoint", (out / "student-run" / "checkpoint.pt").exists)
        other.set("cable", "down")
        before = noted(out)
        time.sleep(disturb)
        print(f"cut off at step {before} for {disturb:g} s, step {noted(out)} noted", flush=True)
        other.set("cable", "up")
        time.sleep(3)
        print(f"3 s after it: step {noted(out)} noted; killed", flush=True)
        other.kill()
        other.start(command, host)
    wait("the end", lambda: all([machine.done() for machine in both]))
    print(f"{out.name}: {time.monotonic() - begin:.0f} s, step {noted(out)}", flush=True)


def main(seconds_off: float) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        teacher, store = home / "teacher", home / "pairs"
        seconds("teach", "digits", "--out", teacher, *TEACH)
        seconds("pairs", "digits", "--teacher", teacher, "--out", store, *PAIRS)
        there = ["distill", "digits", "--teacher", teacher, "--store", store, *DISTILL, "--out"]
        with machines() as both:
            for name, disturb in (("whole", 0), ("cut", seconds_off)):
                command = [str(word) for word in (*there, home / name / "student")]
                train(both, command, home / name, disturb=disturb)
        folders = ("student", "student-run", "student-run/samples")
        equal = all([same("cut", f, home / "cut", files(home / "whole" / f)) for f in folders])
    print(f"two machines: {'equal' if equal else 'DIFFERENT'}")
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="to be cut off for")
    sys.exit(0 if main(parser.parse_args().seconds) else 1)
