"""dstudent report: the page it writes, and where."""

from pathlib import Path

import pytest

from ds.cli.__main__ import main
from tests.cli.chain import refused, tree


def test_a_report_goes_into_the_directory_of_the_run(home, capsys):
    assert main(["report", "student"]) == 0
    assert capsys.readouterr().out == f"report: {Path('student-run/report.html').resolve()}\n"
    page = Path("student-run/report.html").read_text()
    assert "Loss by step" in page and "Compared with real images" in page
    assert "is there already" in refused(capsys, "report", "student")
    assert main(["report", "student-run", "--force"]) == 0


def test_a_report_does_not_keep_a_run_from_going_on(home):
    from tests.cli.chain import run_chain

    assert main(["report", "student"]) == 0
    run_chain(home)


def test_runs_are_compared_here(home):
    assert main(["report", "teacher", "student"]) == 0
    page = Path("report.html").read_text()
    assert "2 runs side by side" in page and "What differs" in page


@pytest.mark.parametrize("words", [[], ["nowhere"], ["pairs"], ["student", "teacher", "student"]])
def test_a_report_of_no_run_is_refused(words, home, capsys):
    before = tree(home)
    refused(capsys, "report", *words)
    assert tree(home) == before
