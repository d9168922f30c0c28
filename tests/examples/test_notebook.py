"""examples/first_student.ipynb: it runs, and is kept small with what it printed."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.examples import EXAMPLES

NOTEBOOK = EXAMPLES / "first_student.ipynb"
BRIEF = """
from pathlib import Path

OUT = Path("runs")
TEACHER_EPOCHS, PAIRS, STUDENT_EPOCHS, FLOW_EPOCHS, SCORED = 0.2, 128, 0.5, 0.2, 128
"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_every_cell_runs(notebook, tmp_path):
    (settings,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    settings.source = BRIEF
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=250, kernel_name="python3", resources=place).execute()
    assert (tmp_path / "runs" / "student" / "config.json").exists()


def test_it_is_kept_with_its_outputs_and_is_small(notebook):
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 4
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_it_names_no_place_of_the_machine_it_ran_on(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in outputs)
    assert said and not re.findall(r"(?<![\w.])/\w+/\w+", said)  # nor an absolute path
