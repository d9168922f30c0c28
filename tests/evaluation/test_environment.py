"""The report about a machine: it always prints, and knows a stranger by the name of apex."""

import sys

import pytest

from ds import ops
from ds.evaluation import environment


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "not installed"),
        (["apex/__init__.py"], "another project of the same name"),
        (["apex.py"], "another project of the same name"),
        (["apex/__init__.py", "apex/optimizers/fused_adam.py"], "NVIDIA's"),
    ],
)
def test_apex_is_known_by_its_files_and_never_imported(files, expected, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = environment.report()["apex"]
    assert found.startswith(expected) and "apex" not in sys.modules


def test_a_probe_that_fails_says_why_and_the_rest_is_reported(monkeypatch):
    def broken():
        raise OSError("the driver\nis missing")

    monkeypatch.setattr(ops, "table", broken)
    found = environment.report()
    assert found["ops"] == "failed: OSError: the driver is missing"
    assert found["torch"].startswith("2.")
    assert "ops" in environment.text(found)


def test_the_table_has_a_chosen_backend_for_every_op_on_this_cpu():
    rows = [row for row in environment.report()["ops"] if row["device"] == "cpu"]
    chosen = {row["op"] for row in rows if row["status"] == "chosen"}
    assert chosen == {row["op"] for row in rows} >= {"attention", "group_norm_silu"}
    assert all(row["reason"] for row in rows if row["status"] == "missing")
