"""dstudent pairs: a store is planned, made, checked and exported."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ds.cli.__main__ import main
from ds.diffusion.solvers import DCW, DDIM
from ds.pairs.store import PairStore
from tests.cli.chain import (
    pairs_of,
    refused,
    tree,
)


def test_a_plan_says_how_many_calls_do_and_makes_nothing(home, capsys, monkeypatch):
    monkeypatch.setattr("ds.evaluation.solver_search.CALLS", (6, 12))
    before = tree(home)
    options = ("--plan", "--plan-noises", "2", "--solve.steps", "20", "--solve.top", "0.06")
    assert main(pairs_of(*options)) == 0
    said = capsys.readouterr().out
    *_, answer, precision = said.splitlines()
    assert "18 calls of ddim" in answer
    figure = re.search(r"in float32: bfloat16 (\S+); 18 calls of ddim miss the ODE by", precision)
    assert float(figure[1]) > 0
    dcw = said.splitlines().index(next(li for li in said.splitlines() if "--solve.dcw  " in li))
    assert said.splitlines()[dcw + 1].split()[:4] == ["18", "ddim", "quadratic", "20"]
    assert {line.split()[1] for line in said.splitlines() if line[:5].strip().isdecimal()} == {
        "ddim",
        "heun",
        "dpmpp_2m",
        "dpmpp_3m",
        "unipc",
    }
    assert tree(home) == before


def test_merges_are_planned_from_the_teacher_and_nothing_is_made(home, capsys):
    before = tree(home)
    options = ("--merges", "--plan-noises", "3", "--merge-tau", "0.5")
    assert main(pairs_of(*options)) == 0
    said = capsys.readouterr().out
    assert "Merging 5 steps into one, linear-Gaussian case" in said and "tau = 0.5" in said
    for order in ("all at once", "halving", "from the data", "from the noise", "best for the ODE"):
        assert sum(line.startswith(order) for line in said.splitlines()) == 1
    assert "For the ODE: " in said.splitlines()[-1]
    assert tree(home) == before
    assert main(pairs_of("--merges", "--merge-pictures", "digits")) == 0
    of_digits = capsys.readouterr().out
    assert (
        "Merging 5 steps into one" in of_digits
        and of_digits.splitlines()[3:] != said.splitlines()[3:]
    )
    for words in (
        ("--merges", "--plan"),
        ("--merge-tau", "2"),
        ("--merge-pictures", "digits"),
        ("--merges", "--merge-pictures", "digits", "--plan-noises", "4"),
    ):
        assert "has no effect" in refused(capsys, *pairs_of(*words))
    np.save("wide.npy", np.arange(4 * 16 * 16, dtype=np.uint8).reshape(4, 16, 16, 1))
    line = refused(capsys, *pairs_of("--merges", "--merge-pictures", "wide.npy"))
    assert "wide.npy: pictures [1, 16, 16], the teacher draws [1, 8, 8]" in line
    np.savez("moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    line = refused(capsys, *pairs_of("--merges", "--merge-pictures", "moments.npz"))
    assert "moments have no spectrum; give pictures" in line


def test_pairs_are_made_with_a_correction_that_the_store_remembers(home, capsys):
    options = ("--solve.dcw", "0.02", "--pairs.count", "4", "--pairs.held-out", "1")
    assert main(pairs_of("--out", "with", *options)) == 0
    store = PairStore("with")
    assert store.solver == DCW(DDIM(), low=0.02)
    assert main(["pairs", "verify", "with", "--teacher", "teacher", "--recompute", "3"]) == 0
    line = refused(
        capsys, *pairs_of("--out", "with", "--pairs.count", "4", "--pairs.held-out", "1")
    )
    assert "holds a store made otherwise (solver" in line


@pytest.mark.parametrize("option", ["plan-noises", "pairs.batch-size"])
def test_a_plan_without_noises_is_refused(home, capsys, option):
    line = refused(capsys, *pairs_of("--plan", f"--{option}", "0"))
    assert f"{option.replace('-', '_')} must be at least 1, not 0 (see `dstudent pairs" in line


def test_a_flipped_byte_in_a_store_is_found_by_verify(home, capsys):
    file = Path("pairs/images-00001.npy")
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    line = refused(capsys, "pairs", "verify", "pairs")
    assert "images-00001.npy: wrong checksum; delete it" in line


def test_a_store_is_verified_with_the_teacher_that_made_it(home, capsys):
    assert main(["pairs", "verify", "pairs", "--teacher", "teacher", "--recompute", "3"]) == 0
    assert "160 of them as they were written" in capsys.readouterr().out
    line = refused(capsys, "pairs", "verify", "pairs", "--teacher", "teacher", "--recompute", "0")
    assert "recompute must be at least 1, not 0" in line


def test_a_store_says_what_it_holds_finished_or_not(home, capsys):
    assert main(["pairs", "info", "pairs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == 160
    assert found["shards"] == "4 of 4"
    assert found["finished"]
    Path("pairs/images-00002.npy").unlink()
    assert main(["pairs", "info", "pairs"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shards"] == "3 of 4"
    assert not found["finished"]
    assert "not a pair store" in refused(capsys, "pairs", "info", "teacher")


def test_a_store_is_written_as_archives(home, capsys):
    assert main(["pairs", "export", "pairs", "tars", "--per-archive", "100"]) == 0
    assert sorted(f.name for f in Path("tars").glob("*.tar")) == ["000000.tar", "000001.tar"]
    line = refused(capsys, "pairs", "export", "pairs", "tars", "--to", "fastgen")
    assert "holds archives of something else (form: webdataset, not fastgen)" in line


def test_a_store_made_otherwise_is_refused(home, capsys):
    before = tree(home)
    line = refused(capsys, *pairs_of("--out", "pairs", "--solve.steps", "6"))
    assert "pairs: holds a store made otherwise (grid: [" in line
    assert tree(home) == before


def test_a_disk_too_small_is_refused(home, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert "160 pairs need 10.2 kB, the disk has 100 bytes free" in refused(capsys, *pairs_of())
