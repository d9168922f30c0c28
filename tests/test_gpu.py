"""What a machine with a GPU runs works there: in a bare tree, with few packages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.__main__ import CASES

ROOT = Path(__file__).parents[1]
# What a container with PyTorch and Triton lacks.
ABSENT = "tyro", "diffusers", "nvidia.dali", "h5py", "sklearn", "scipy", "matplotlib"
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); "
PYTEST = WITHOUT + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
TESTS = "tests/ops", "tests/kernels", "tests/cuda", "tests/nets", "tests/engine", "tests/gpu"


def test_tests_are_found_without_packages_that_only_some_need():
    command = [sys.executable, "-c", PYTEST, "--collect-only", "-q", *TESTS]
    command += [
        "tests/diffusion/test_grids.py",
        "tests/diffusion/test_solvers.py",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
def test_a_case_without_its_peers_is_measured_alone(tmp_path):
    arguments = ["--check", "--size", "tiny", "--device", "cpu", "--out", tmp_path]
    code = WITHOUT + "from benchmarks.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "network", "student", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "network.json", tmp_path / "student.json"):
        for row in json.loads(path.read_text())["cases"]:
            own = {"network": ["net", "ours"], "student": ["ours"]}[path.stem]
            assert [*row["error"]] == own and "diffusers" in row["missing"]


@pytest.mark.slow
def test_a_test_that_needs_diffusers_is_skipped_without_and_its_neighbours_run():
    command = [sys.executable, "-c", PYTEST, "-rs", "-q", "tests/diffusion/test_grids.py"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "could not import 'diffusers'" in done.stdout
    assert re.search(r"\d+ passed, \d+ skipped", done.stdout)


# --- the runs of benchmarks/gpu.py


@pytest.fixture
def run(tmp_path):
    """Return what runs commands as steps, with results in tmp_path, and returns their verdicts."""

    def run(limit: int, **commands: str) -> dict[str, gpu.Verdict]:
        steps = [gpu.Step(name, command, limit) for name, command in commands.items()]
        return {v.step: v for v in gpu.run("first", steps, tmp_path, sys.executable, "tiny")}

    return run


def test_a_run_goes_on_after_what_fails_hangs_or_is_missing(run, tmp_path, capsys):
    pid = tmp_path / "pid"
    verdicts = run(
        6,
        right="{python} -c 'print(1)'",
        wrong="{python} -c 'import benchmarks.nowhere'",
        hangs=f"echo 2; sleep 60 & echo $! > {pid}; wait",
        absent="no-such-program",
        last="{python} -c 'import sys; print(sys.executable)'",
    )
    found = [v.verdict for v in verdicts.values()]
    assert found == ["passed", "failed", "timed out", "failed", "passed"]
    assert verdicts["wrong"].complaint.startswith("ModuleNotFoundError: No module named")
    assert verdicts["absent"].complaint.endswith("no-such-program: not found")
    assert 6 <= verdicts["hangs"].seconds < 15
    child = Path("/proc", pid.read_text().strip(), "stat")
    assert not child.exists() or ") Z" in child.read_text()  # ended with its step
    assert (tmp_path / "hangs" / "log.txt").read_text().startswith("2\n")  # before it was stopped
    assert (tmp_path / "last" / "log.txt").read_text() == f"{sys.executable}\n"
    table = (tmp_path / "table-first.txt").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == 6
    kept = json.loads((tmp_path / "verdicts-first.json").read_text())
    assert [row["verdict"] for row in kept] == found


def test_a_run_stops_when_its_time_is_over(run, monkeypatch):
    monkeypatch.setattr(gpu, "BUDGET", 6)
    verdicts = run(
        6, long="{python} -c 'import time; time.sleep(2)'", late="{python} -c 'print(1)'"
    )
    assert [v.verdict for v in verdicts.values()] == ["passed", "no time was left"]


LOGS = {
    "[gw0] [ 10%] PASSED tests/a.py::b\n[gw1] [ 20%] FAILED tests/kernels/test_conv.py::c[1 x 1]\n"
    "[gw1] [ 30%] SKIPPED tests/a.py::d\nE   AssertionError\n"
    "FAILED tests/kernels/test_conv.py::c[1 x 1] - AssertionError: 2\n": (
        "1 passed, 1 failed, 1 skipped",
        "FAILED tests/kernels/test_conv.py::c[1 x 1] - AssertionError: 2",
    ),
    "tests/a.py::b[1 x 1] PASSED   [ 50%]\ntests/a.py::c FAILED   [100%]\n": (
        "1 passed, 1 failed",
        "tests/a.py::c FAILED   [100%]",
    ),
    "machine: copy_gbs 1\nnot timed: forward: ours: off by 0.3, 0.1 is allowed\nError: no\n": (
        None,
        "not timed: forward: ours: off by 0.3, 0.1 is allowed",
    ),
    "Traceback:\n  File x\ntriton.compiler.errors.CompilationError: at 3:4\n": (
        None,
        "triton.compiler.errors.CompilationError: at 3:4",
    ),
    "one\ntwo\n": (None, "two"),
    "": (None, ""),
}


@pytest.mark.parametrize("log", LOGS)
def test_what_a_step_found_is_read_off_what_it_printed(log, tmp_path):
    figures, complaint = LOGS[log]
    assert gpu.figures(tmp_path, log) == ([figures] if figures else [])
    assert gpu.first_complaint(log) == complaint


def test_figures_of_a_benchmark_are_those_of_its_rows(tmp_path):
    us = {"peer": {"median": 3000.0}, "ours": {"median": 2000.0}}
    row = {"us": us, "error": {"peer": 0.1}, "dtype": "bfloat16", "images": 264}
    (tmp_path / "a.json").write_text(json.dumps({"cases": [row, {**row, "us": {}}]}))
    assert gpu.figures(tmp_path, "") == [
        "bfloat16 x 264: ours 2.00 ms, peer 1.50x", "bfloat16 x 264: peer off by 1.0e-01"
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"cases": [row] * 5}))
    assert gpu.figures(tmp_path, "") == ["5 rows, ours the fastest in 5"]


@pytest.mark.parametrize("step", dict.fromkeys(gpu.FIRST + gpu.SECOND), ids=lambda step: step.name)
def test_a_step_asks_for_what_there_is(step):
    words = shlex.split(step.command)
    if "benchmarks" in words:
        assert words[words.index("benchmarks") + 1] in CASES
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word).is_dir()
    assert step.limit < gpu.BUDGET <= 7 * 60 - 10
    if "--only" in words:
        pattern = words[words.index("--only") + 1]
        names = [f"DDIM bfloat16, 2 steps [{n}, 3, 32, 32]" for n in (264, 2, 1)]
        matched = [bool(re.search(pattern, name)) for name in names]
        assert matched in ([True, True, False], [False, False, True]) or pattern == "cifar10"


def test_one_command_tests_the_cuda_library_and_sanitizes_without_the_caching_allocator():
    made = subprocess.run(
        ["make", "-n", "gpu-test", "GPU_PYTHON=py"], cwd=ROOT, capture_output=True, text=True
    )
    lines = made.stdout.replace("\\\n", " ").splitlines()
    assert any("-m pytest" in line and "tests/cuda" in line for line in lines)
    (sanitized,) = [line for line in lines if "compute-sanitizer" in line]
    assert sanitized.startswith("PYTORCH_NO_CUDA_MEMORY_CACHING=1 ")
    (step,) = [step for step in gpu.SECOND if step.name == "sanitizer"]
    assert step.environment == "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    assert gpu.SANITIZED in sanitized


@pytest.mark.slow
def test_the_sanitizer_sees_every_kind_of_kernel():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "", "-k"]
    command += [gpu.SANITIZED, "tests/kernels", "tests/cuda", "-p", "no:cacheprovider"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    for file in ("kernels/test_conv", "kernels/test_attention", "kernels/test_group_norm_silu",
                 "cuda/test_adam", "cuda/test_group_norm_silu"):  # fmt: skip
        assert f"tests/{file}.py" in found


@pytest.mark.slow
def test_a_bare_tree_with_a_broken_kernel_names_it_and_goes_on(run, tmp_path, monkeypatch):
    """As a tree arrives on a machine with a GPU: without git."""
    tree = tmp_path / "tree"
    for part in ("ds", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / part, tree / part)
    shutil.copy(ROOT / "pyproject.toml", tree)
    kernel = tree / "kernels" / "quantize.py"
    kernel.write_text(kernel.read_text().replace("* 127.5 + 127.5\n", "* 127.0 + 127.5\n"))
    monkeypatch.setattr(gpu, "ROOT", tree)
    monkeypatch.delenv("DS_COMMIT", raising=False)
    verdicts = run(
        100,
        tests=f"{{python}} {gpu.TESTS} tests/kernels/test_quantize.py -k borders",
        ops="{python} -m benchmarks ops {work} --device cpu --only attention --check",
    )
    assert [v.verdict for v in verdicts.values()] == ["failed", "passed"]
    assert verdicts["tests"].complaint.startswith("FAILED tests/kernels/test_quantize.py::")
    saved = json.loads((tmp_path / "ops" / "ops.json").read_text())
    assert saved["environment"]["commit"] == "unknown"
    assert verdicts["ops"].figures[0].startswith("float32 x 0: eager off by")
