"""What comes back from a GPU becomes results, FASTER and tables. All figures here are made up."""

import json
import sys

import pytest

from benchmarks import gpu_report, harness, tables

GPU, COMMIT = "Made-up GPU 1", "a" * 40
ENVIRONMENT = {
    "device": GPU, "cores": 16, "threads": 1, "timing": "CUDA events, cold L2", "torch": "0",
    "date": "never", "commit": COMMIT,
}  # fmt: skip
RATES = {"copy_gbs": 1000.0, "matmul_tflops_float32": 1.0, "matmul_tflops_bfloat16": 2.0}
LOOP = "DDIM bfloat16, 2 steps [264, 3, 32, 32], 128 channels"


def us(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread)}


def row(case: str, images: int = 264, refused: dict | None = None, **sides: float) -> dict:
    times = {name.replace("_", ", "): us(t) for name, t in sides.items()}
    return {
        "case": case, "us": times, "error": dict.fromkeys(times, 0.1), "bytes": 0, "flops": 0,
        "dtype": "bfloat16", "images": images, "wall": False, "missing": {},
        "refused": refused or {}, "phases": {},
    }  # fmt: skip


def write(path, *rows, **environment):
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"environment": {**ENVIRONMENT, **environment}, "calibration": RATES}
    harness.write(path, {**about, "cases": list(rows)})


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with results of its own, a page with tables, and an empty FASTER."""
    for module in (gpu_report, tables, harness):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    page = tmp_path / "page.md"
    names = "teacher_loop", "peers", "convs"
    page.write_text("\n".join(f"<!-- table: {name} -->\n<!-- end -->" for name in names))
    monkeypatch.setattr(tables, "PAGES", [page])
    monkeypatch.setattr(gpu_report, "FASTER", tmp_path / "faster.json")
    (tmp_path / "faster.json").write_text('{"Another GPU": {}}\n')
    return tmp_path


def report(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_report", *map(str, arguments)])
    return gpu_report.main()


def test_results_become_json_tables_and_faster(home, monkeypatch, capsys):
    back = home / "back"
    write(back / "float64" / "teacher_loop.json", row(LOOP))  # a check, without times
    write(back / "loop" / "teacher_loop.json", row(LOOP, net=3e4, engine=2e4, ours=1e4))
    slow = row(LOOP, diffusers_compiled=1.4e4, net=3e4, engine=2e4, ours=1.1e4)
    write(back / "loop_compiled" / "teacher_loop.json", slow)
    write(back / "one_image" / "teacher_loop.json", row("DDIM one", images=1, net=9, ours=3))
    some = row("gemm a, 264 images", cuDNN=2, triton=1)
    every = row("gemm b, 264 images", cuDNN=3, hopper=2, triton=4)
    write(back / "convs" / "convs.json", some, every)
    (back / "verdicts-first.json").write_text("[]")
    (back / "table-first.txt").write_text("tests  failed  FAILED tests/kernels/test_x.py::y\n")
    assert report(monkeypatch, back) == 0
    saved = json.loads((home / "results" / "made-up-gpu-1" / "teacher_loop.json").read_text())
    assert [r["case"] for r in saved["cases"]] == [LOOP, "DDIM one"]
    assert saved["cases"][0] == slow and saved["environment"] == ENVIRONMENT
    faster = json.loads((home / "faster.json").read_text())
    assert faster == {"Another GPU": {}, GPU: {"gemm a": "triton", "gemm b": "hopper"}}
    page = (home / "page.md").read_text()
    times = " | ".join(f"{time} (1.0e-01)" for time in ("14,000", "30,000", "20,000", "11,000"))
    assert f"| {LOOP} | {times} | 1.27 | 2.73 | 1.82 |" in page
    assert "| gemm b, 264 images | 3 | 2 | 4 | 0.75 | 0.50 |" in page
    assert "| diffusers, compiled | 1.27 | Made-up GPU 1 |" in page
    assert "Made-up GPU 1, 16 cores, torch 0" in page
    printed = capsys.readouterr().out
    assert "FAILED tests/kernels/test_x.py::y" in printed and "FASTER: 2 of 2" in printed


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"timing": "process CPU time"}, "not of a GPU, but of Made-up GPU 1"),
        ({"device": GPU + harness.EMULATED}, "of an emulated GPU"),
        ({"commit": "unknown"}, "no commit names what was measured (unknown)"),
        ({"commit": COMMIT + "+"}, "no commit names what was measured"),
    ],
)
def test_what_must_not_be_quoted_is_refused(home, monkeypatch, capsys, environment, message):
    write(home / "back" / "loop" / "teacher_loop.json", row(LOOP, ours=1), **environment)
    assert report(monkeypatch, home / "back") == 1
    assert message in capsys.readouterr().err
    assert not (home / "results").exists()


def test_an_empty_folder_is_refused(home, monkeypatch, capsys):
    assert report(monkeypatch, home / "nothing") == 1
    assert "no results with times" in capsys.readouterr().err


def test_the_commit_of_a_tree_without_git_can_be_said_later(home, monkeypatch):
    write(home / "back" / "teacher_loop.json", row(LOOP, ours=1), commit="unknown")
    assert report(monkeypatch, home / "back", "--commit", COMMIT) == 0
    saved = json.loads((home / "results" / "made-up-gpu-1" / "teacher_loop.json").read_text())
    assert saved["environment"]["commit"] == COMMIT


def test_a_row_of_an_earlier_commit_says_so(home, monkeypatch):
    write(home / "first" / "teacher_loop.json", row(LOOP, net=2, ours=1), commit="b" * 40)
    write(home / "second" / "teacher_loop.json", row("DDIM one", net=2, ours=1))
    assert report(monkeypatch, home / "first", home / "second") == 0
    page = (home / "page.md").read_text()
    assert f"| {LOOP} (commit bbbbbbbbbb) |" in page and "| DDIM one |" in page


def test_a_refused_side_keeps_its_row_out_of_the_tables(home, monkeypatch):
    good = row("DDIM one", net=2, ours=1)
    bad = row(LOOP, refused={"ours": "off by 1"}, net=1)
    write(home / "a" / "teacher_loop.json", good, bad)
    assert report(monkeypatch, home / "a") == 0
    page = (home / "page.md").read_text()
    assert f"Refused in {LOOP}: ours (off by 1)." in page and f"| {LOOP}" not in page


def sizes(**at: dict[str, float]) -> list[dict]:
    return [row(f"gemm a, {n[1:]} images", images=int(n[1:]), **sides) for n, sides in at.items()]


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        (sizes(n264={"cuDNN": 10, "triton": 9}), {"gemm a": "triton"}),
        (sizes(n264={"cuDNN": 10, "triton": 11}), {}),
        (sizes(n264={"cuDNN": 10, "triton": 9.95}), {}),  # within the spread
        (sizes(n264={"cuDNN": 10, "triton": 9, "hopper": 7}), {"gemm a": "hopper"}),
        (sizes(n264={"cuDNN": 10, "triton": 9}, n32={"cuDNN": 4, "triton": 4.3}),
         {"gemm a": "triton"}),
        (sizes(n264={"cuDNN": 10, "triton": 9}, n32={"cuDNN": 4, "triton": 4.5}), {}),
        (sizes(n32={"cuDNN": 4, "triton": 3}, n264={"cuDNN": 10, "triton": 12}), {}),
        (sizes(n264={"cuDNN": 10, "triton": 9}, n32={"cuDNN": 4}), {}),  # refused there
        (sizes(n264={"triton": 9}), {}),  # cuDNN was
    ],
)  # fmt: skip
def test_a_kernel_of_ours_is_faster_where_it_wins_at_the_largest_batch(rows, winner):
    assert gpu_report.winners(rows) == winner
