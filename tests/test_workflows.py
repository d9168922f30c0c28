"""The workflows of CI: each can be read, and asks for what there is."""

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="workflows are YAML (pip install pyyaml)")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
JOBS = {
    f"{path.stem}.{name}": job
    for path in sorted(FOLDER.glob("*.yml"))
    for name, job in yaml.safe_load(path.read_text())["jobs"].items()
}
every_job = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


def commands(job: dict) -> str:
    return "\n".join(step["run"] for step in job.get("steps", []) if "run" in step)


def test_every_duty_has_its_job():
    assert {*JOBS} >= {
        "test.lint", "test.docs", "test.test", "nightly.slow", "wheels.wheel", "wheels.archive",
        "release.publish",
    }  # fmt: skip


@every_job
def test_a_job_makes_targets_that_exist(job):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in re.findall(r"^make (.*)", commands(job), re.MULTILINE):
        assert {word for word in line.split() if "=" not in word} <= {*targets}


@every_job
def test_a_job_calls_workflows_that_exist(job):
    if (called := job.get("uses", "")).startswith("./"):
        assert "workflow_call" in yaml.safe_load((ROOT / called).read_text())[True]  # "on" in YAML


@every_job
def test_a_job_pins_the_actions_it_uses(job):
    for step in job.get("steps", []):
        assert re.search(r"@(v\d|release/v\d)", step.get("uses", "@v1"))


def test_the_tests_run_with_the_oldest_and_the_newest_that_are_supported():
    matrix, text = JOBS["test.test"]["strategy"]["matrix"], (ROOT / "pyproject.toml").read_text()
    (least,) = re.findall(r'"torch>=([\d.]+)"', text)
    assert matrix["torch"] == [f"torch=={least}.*", "torch"]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert {matrix["python"][0], matrix["python"][-1]} == {pythons[0], pythons[-1]}
    assert {*matrix["python"]} <= {*pythons}
