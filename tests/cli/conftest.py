"""The chain of verbs, run once for all files."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from tests.cli.chain import run_chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """What the verbs leave behind; tests that break something copy it.

    Of several processes that run the tests, the first one runs the chain for all.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    home = base / "chain"
    with (base / "chain.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            made = base / "chain-in-work"
            shutil.rmtree(made, ignore_errors=True)
            run_chain(made)
            made.rename(home)
    return home


@pytest.fixture
def home(chain, tmp_path, monkeypatch) -> Path:
    """A copy of the chain to break, as the working directory."""
    shutil.copytree(chain, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
