"""Processes that begin with everything imported, forked from one that has done nothing else.

A test that kills processes needs many of them, and importing PyTorch takes each of them seconds.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["ds.cli.verb", "torch.distributed.checkpoint.hf_storage", "pytest"])


class Started:
    """A function that runs in a process of its own, to be handled as a subprocess.Popen is."""

    def __init__(self, target: Callable[..., int | None], *args: object, **environment: str):
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self._said = Path(file.name)
        self._process = _forked.Process(target=_run, args=(self._said, environment, target, args))
        self._process.start()

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for its end; return what it wrote to standard error."""
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        said = self._said.read_text() if self._said.exists() else ""
        self._said.unlink(missing_ok=True)
        return None, said

    def kill(self) -> None:
        self._process.kill()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode


class Two:
    """A function in two processes that share its work, to be handled as one is."""

    def __init__(self, target: Callable[..., int | None], *args: object):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        self.both = [Started(target, *args, **meeting, RANK=number) for number in ("0", "1")]

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        return None, "".join(process.communicate(timeout)[1] for process in self.both)

    def kill(self) -> None:
        for process in self.both:
            process.kill()

    @property
    def returncode(self) -> int:
        return max(abs(process.returncode) for process in self.both)


def _run(said: Path, environment: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.update(environment)
    # As in a process of its own: else a tqdm that is killed leaves semaphores to complain of.
    multiprocessing.set_start_method("fork", force=True)
    null = os.open(os.devnull, os.O_RDWR)
    for number, descriptor in enumerate((null, null, os.open(said, os.O_WRONLY))):
        os.dup2(descriptor, number)
    sys.exit(target(*args))
