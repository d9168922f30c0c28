"""Pages about runs: what is on them, and what is left out."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import ds
from ds.evaluation.evaluate import record
from ds.evaluation.features import Pixels
from ds.evaluation.report import demo
from ds.evaluation.report.comparison import short_names
from ds.evaluation.report.markup import Markup, tag
from ds.evaluation.report.pages import target, write_report
from ds.evaluation.report.runs import read_run
from ds.models.images import save_png
from ds.nets import UNet
from ds.system import targets
from ds.system.files import sealed
from ds.training.config import RuntimeConfig
from tests.training.runs import DATA, TINY

HOSTILE = '<script>alert("x")</script>'
EMPTY = {"meta", "link", "img", "br"}
CONFIG = ds.TrainConfig(batch_size=8, epochs=1, warmup_steps=0, log_every=1, check_every=2)


class Reader(HTMLParser):
    """Reads a page, and notes what is not closed, what it fetches, and its text."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, name, attrs):
        self.names.append(name)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "xlink:href")]
        if name not in EMPTY:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def read(file: Path) -> Reader:
    """Read a page, which must be whole and need nothing beside it."""
    reader, page = Reader(), file.read_text()
    reader.feed(page)
    reader.close()
    assert not reader.open and page.startswith("<!doctype html>")
    assert all(f.startswith("data:image/png;base64,") for f in reader.fetched)
    assert "script" not in reader.names and not re.search(r"@import|url\(", page)
    return reader


def report(*paths: Path, out: Path) -> Reader:
    write_report(paths, out, force=True)
    return read(out)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A student and its run, and another one with a larger learning rate."""
    home = tmp_path_factory.mktemp("runs")
    teacher = DATA.teacher(ds.solvers.DDIM(), (999, 500))
    store = ds.generate_pairs(teacher, home / "pairs", 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = UNet(TINY)
    start = ds.Teacher(ds.Denoiser(net, ds.schedule.LinearBeta()), teacher.solver, teacher.grid)
    rows = ds.Pairs(store, range(8, 32)), ds.Pairs(store, range(8))
    method, judged = ds.methods.DenoisingStudent(), {"frechet_distance": 7.5}
    runtime = RuntimeConfig(evaluate_every=2)
    trainer = ds.Trainer(
        method, start, *rows, home / "a-run", CONFIG, runtime=runtime, evaluate=lambda net: judged
    )
    student = ds.Student(trainer.fit(), method)
    student.save_pretrained(home / "a", steps=trainer.steps, run=trainer.identity)
    result = ds.evaluate(student, ds.Sampler(teacher)(9, range(16)), Pixels(), n=8)
    record(home / "a", student, result)
    for end in ("", "-run"):
        shutil.copytree(home / f"a{end}", home / f"b{end}")
    about = json.loads((home / "b-run" / "run.json").read_text())
    about["train"]["lr"] = 2e-3
    del about["checksum"]
    (home / "b-run" / "run.json").write_text(json.dumps(about))
    lines = [json.loads(line) for line in (home / "b-run" / "metrics.jsonl").open()]
    write_lines(home / "b-run", *(half_of(line) for line in lines))
    return home


def half_of(line: dict) -> dict:
    """A line whose losses are half as large."""
    return {k: v / 2 if k.endswith("loss") else v for k, v in line.items()}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run written by hand: each test spoils another part of it."""
    folder = tmp_path / "net-run"
    (folder / "samples").mkdir(parents=True)
    train = {"batch_size": 64, "lr": 0.001}
    about = {"method": {"type": "mean_flow"}, "train": train, "source": "40 images"}
    (folder / "run.json").write_text(json.dumps(sealed(about)))
    write_lines(folder, *({"step": i, "loss": 1.0 / i, "lr": 0.5} for i in range(1, 9)))
    for step in (2, 4):
        save_png(
            torch.zeros(9, 9, 1, dtype=torch.uint8), folder / "samples" / f"step-{step:07d}.png"
        )
    return folder


def write_lines(folder: Path, *lines: dict) -> None:
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def test_the_page_of_a_run_tells_what_is_known_of_it(home, tmp_path):
    page = report(home / "a", out=tmp_path / "page.html")
    for words in (
        "Denoising Student: learn what a teacher makes of its noise",
        "24 pairs", "Loss by step", "Frechet distance", "Learning rate", "Compared with real",
        "kernel distance (KID)", "pixels features of 8 images", "train.batch_size", "protocol",
    ):  # fmt: skip
        assert words.lower() in page.text.lower(), words
    weights = sum(w.numel() for w in ds.load_student(home / "a").net.state_dict().values())
    assert f"\n{weights:,}\n" in page.text
    assert page.names.count("img") == 3  # the last sheet large, and both on the way


def test_a_run_and_its_model_have_the_same_page(home, tmp_path):
    write_report([home / "a"], tmp_path / "a.html")
    write_report([home / "a-run"], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_nothing_is_unpickled_or_changed(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    before = {f: f.stat().st_mtime_ns for f in home.rglob("*")}
    report(home / "a", home / "b", out=tmp_path / "page.html")
    assert {f: f.stat().st_mtime_ns for f in home.rglob("*")} == before


def test_a_run_without_a_model_says_so(run, tmp_path):
    page = report(run, out=tmp_path / "page.html")
    assert "after step 8: it has made no model yet" in page.text
    assert "40 images" in page.text and "MeanFlow: learn the average velocity" in page.text
    assert "Compared with real images" not in page.text


def test_a_run_is_found_by_the_name_of_the_model_that_it_will_make(run, tmp_path):
    write_report([run], tmp_path / "a.html")
    write_report([run.with_name("net")], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()


def test_distances_on_the_way_are_told_until_there_are_others(run, tmp_path):
    write_lines(run, {"step": 3, "frechet_distance": 8.0}, {"step": 9, "frechet_distance": 7.0})
    page = report(run, out=tmp_path / "page.html")
    assert "7.00 at step 9" in page.text and "lower is better" in page.text


def test_a_run_that_has_just_begun_has_a_page(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    for sheet in (run / "samples").iterdir():
        sheet.unlink()
    page = report(run, out=tmp_path / "page.html")
    assert "Nothing is logged yet." in page.text and not {"svg", "img"} & {*page.names}


def test_a_model_without_its_run_has_a_page(home, tmp_path):
    student = ds.load_student(home / "a")
    student.save_pretrained(tmp_path / "alone")
    page = report(tmp_path / "alone", out=tmp_path / "page.html")
    assert "The directory of its run is not beside it" in page.text
    assert "dstudent evaluate does that" in page.text and "svg" not in page.names


def test_a_loss_that_is_no_number_is_a_gap(run, tmp_path):
    write_lines(run, *({"step": i, "loss": float("nan") if i == 5 else 1.0} for i in range(1, 11)))
    page = report(run, out=tmp_path / "page.html")
    assert page.names.count("polyline") == 2


def test_stages_are_chapters(run, tmp_path):
    (run / "stage-2").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (run / "stage-2" / name).write_bytes((run / name).read_bytes())
    page = report(run, out=tmp_path / "page.html")
    assert "Stage 2" in page.text and page.text.count("Loss by step") == 2


def test_stages_follow_one_another_in_a_comparison(run):
    (run / "stage-2").mkdir()
    (run / "stage-2" / "run.json").write_bytes((run / "run.json").read_bytes())
    write_lines(run / "stage-2", {"step": 3, "loss": 0.5})
    points = read_run(run).along("loss")
    assert points[:8] == [(i, 1 / i) for i in range(1, 9)] and points[9:] == [(11, 0.5)]
    assert points[8][0] == 8 and math.isnan(points[8][1])


DAMAGE = {
    "run.json": b"{",
    "metrics.jsonl": b'{"step": 1, "loss": 2.0}\n{"step": "2"}\n{"step": 3, "loss": 1.0}\n',
    "samples/step-0000004.png": b"no picture",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_left_out_and_named(name, run, tmp_path):
    (run / name).write_bytes(DAMAGE[name])
    page = report(run, out=tmp_path / "page.html")
    assert Path(name).name in page.text and "Loss by step" in page.text


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "model.safetensors"])
def test_what_is_damaged_of_a_model_is_left_out_and_named(name, home, tmp_path):
    for folder in ("a", "a-run"):
        shutil.copytree(home / folder, tmp_path / folder)
    damaged = tmp_path / "a" / name
    damaged.write_bytes(damaged.read_bytes()[:-40])
    page = report(tmp_path / "a-run", out=tmp_path / "page.html")
    assert name in page.text and "Loss by step" in page.text


@pytest.mark.parametrize("classes", [{"x": {}}, {"0": {"images": 1.5}}, {"0": 3}, {"0": None}])
def test_figures_by_class_that_are_damaged_are_left_out(classes, home, tmp_path):
    shutil.copytree(home / "a", tmp_path / "a")
    figures = json.loads((home / "a" / "metrics.json").read_text()) | {"classes": classes}
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(figures))
    assert "They are damaged, and left out." in report(tmp_path / "a", out=tmp_path / "p.html").text


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(run):
    losses = enumerate([float("nan"), float("inf"), 2.0, 1.0, float("-inf")], 1)
    write_lines(run, *({"step": i, "held_out_loss": loss} for i, loss in losses))
    assert read_run(run).best() == (4, 1.0)
    assert read_run(run).points("held_out_loss")[1] == (2, math.inf)


def test_hostile_words_are_text(run, tmp_path):
    about = {"method": {"type": HOSTILE, HOSTILE: HOSTILE}, "train": {}, "source": HOSTILE}
    (run / "run.json").write_text(json.dumps(sealed(about)))
    write_lines(run, {"step": 1, HOSTILE: 2.0, "loss": HOSTILE, f"{HOSTILE}_loss": 3.0})
    page = report(run.rename(tmp_path / "<script>-run"), out=tmp_path / "page.html")
    assert HOSTILE in page.text.replace("\n", "") and "<script>" in page.text


ODD = [
    {"method": 1, "train": [], "source": None},
    {"method": {"type": ["x"]}, "train": {"batch_size": "64", "seed": {}}, "source": {"a": None}},
]


@pytest.mark.parametrize("about", ODD)
def test_fields_of_another_kind_are_shown_as_they_are(about, run, tmp_path):
    (run / "run.json").write_text(json.dumps(sealed(about)))
    assert "Loss by step" in report(run, out=tmp_path / "page.html").text


def test_runs_are_compared_side_by_side(home, tmp_path):
    page = report(home / "a", home / "b", out=tmp_path / "page.html")
    for words in (
        "2 runs side by side",
        "Training loss",
        "Held-out loss of the average",
        "What differs",
    ):
        assert words in page.text, words
    text = (tmp_path / "page.html").read_text()
    assert '<th scope="row">train.lr</th><td>0.0002</td><td>0.002</td>' in text
    assert "train.batch_size" not in page.text  # which they share
    assert "Samples of the same noise" in page.text and page.names.count("img") == 2


def test_the_best_figure_is_marked(home, tmp_path):
    write_report([home / "a", home / "b"], out := tmp_path / "page.html")
    cells = r'<th scope="row">held-out loss</th><td>(.*?)</td><td>(.*?)</td>'
    found = re.search(cells, out.read_text())
    assert found and ["<b>" in cell for cell in found.groups()] == [False, True]


def test_figures_that_were_measured_otherwise_are_not_marked(home, run, tmp_path):
    (tmp_path / "c").mkdir()
    for name in ("config.json", "metrics.json"):
        (tmp_path / "c" / name).write_bytes((home / "a" / name).read_bytes())
    figures = json.loads((tmp_path / "c" / "metrics.json").read_text())
    figures["protocol"]["n"], figures["frechet_distance"] = 9, 0.0
    (tmp_path / "c" / "metrics.json").write_text(json.dumps(figures))
    page = report(home / "a", tmp_path / "c", out=tmp_path / "page.html")
    assert "so no best is marked: Frechet distance" in page.text
    assert not re.search(
        r"Frechet distance</th>(<td>[^<]*</td>)*<td><b>", (tmp_path / "page.html").read_text()
    )


def test_losses_of_different_methods_are_not_compared(home, run, tmp_path):
    page = report(home / "a", run, out=tmp_path / "page.html")
    assert "Losses of different methods, or on different rows, cannot be compared." in page.text


NAMES = [
    (["runs/a/student", "runs/b/student"], ["a", "b"]),
    (["runs/a", "runs/b/c"], ["a", "b/c"]),
    (["a", "b"], ["a", "b"]),
    (["/x/a", "a"], ["/x", "a"]),
]


@pytest.mark.parametrize("paths, names", NAMES)
def test_runs_are_called_by_what_tells_them_apart(paths, names):
    found = short_names(paths)
    assert found == names or (len({*found}) == len(paths) and all(found))


def test_a_directory_without_a_run_is_refused_with_what_it_holds(home, tmp_path):
    with pytest.raises(ValueError, match=r"no run is here; it holds a, b, give one of them"):
        target([home], None)
    with pytest.raises(ValueError, match=r"no run is here; give the directory of a teacher"):
        target([tmp_path], None)
    with pytest.raises(ValueError, match="given twice"):
        target([home / "a", home / "pairs" / ".." / "a"], None)
    with pytest.raises(ValueError, match="given twice"):
        target([home / "a", home / "a-run"], None)


def test_a_page_goes_beside_the_losses(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert target([home / "a"], None) == home / "a-run" / "report.html"
    assert target([home / "a", home / "b"], None) == tmp_path / "report.html"
    with pytest.raises(ValueError, match=r"ends in \.html"):
        target([home / "a"], home / "a-run" / "run.json", force=True)


FIGURES = {
    "teacher, 12 calls": {
        "frechet_distance": 20.0, "kernel_distance": 335.2, "precision": 0.6, "recall": 0.93,
        "seconds_per_1000_images": 2.0, "protocol": {"nfe": 12, "n": 4096},
    },
    "student, 1 call": {
        "frechet_distance": 24.35, "kernel_distance": 441.6, "precision": 0.59, "recall": 0.93,
        "pair_rms": 0.1, "pair_r2": 0.9,
        "seconds_per_1000_images": 0.25, "protocol": {"nfe": 1, "n": 4096},
    },
    "real digits": {"frechet_distance": 13.37},
}  # fmt: skip


@pytest.fixture
def demonstration(tmp_path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    targets.mark(folder, "demo")
    (folder / "metrics.json").write_text(json.dumps(FIGURES))
    demo.draw({name: torch.zeros(4, 8, 8, 1, dtype=torch.uint8) for name in FIGURES}, folder)
    return folder


def test_the_page_of_a_demo_has_its_strips_and_its_table(demonstration, tmp_path):
    page = report(demonstration, out=tmp_path / "page.html")
    assert page.names.count("img") == 3 and all(name in page.text for name in FIGURES)
    assert "8.0x" in page.text and "compare 4,096 images" in page.text
    assert "the student is 0.100 from its teacher" in page.text


def test_a_demo_on_its_way_has_a_page(demonstration, run, tmp_path):
    (demonstration / "metrics.json").unlink()
    run.rename(demonstration / "teacher-run")
    page = report(demonstration, out=tmp_path / "page.html")
    assert "its models are not compared yet" in page.text and "The teacher" in page.text


def test_the_picture_of_a_demo_shows_every_strip_in_ink_on_paper(demonstration):
    from PIL import Image

    with Image.open(demonstration / "report.png") as picture:
        colors = {color for _, color in picture.getcolors(1 << 16)}
        assert picture.getpixel((0, 0)) == (251, 250, 247) and (35, 39, 46) in colors
        assert picture.height > 3 * 2 * 8 * demo.SCALE


def test_text_is_escaped_and_markup_is_not():
    inner = tag("b", "<i>")
    assert (
        tag("p", inner, " & ", None, title='"') == '<p title="&quot;"><b>&lt;i&gt;</b> &amp; </p>'
    )
    assert isinstance(inner, Markup)
