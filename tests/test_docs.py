"""Every code block of the documents runs: Python as it stands, commands as far as they parse."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ds.cli.__main__ import main
from ds.cli.distill import Distill
from ds.cli.pairs import MakePairs
from ds.cli.teach import Teach
from ds.cli.verb import Verb, methods, parse
from ds.training import presets

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS_A_NETWORK = ("git clone", "cd ", "pip install")
OWN = ROOT / "docs" / "own-images.md"
# What makes its commands as short as a test: the same steps, and a few of each.
BRIEF = {
    "teach": ("--train.epochs", "0.1", "--net.channels", "8", "--net.norm-groups", "4"),
    "pairs": ("--pairs.count", "32", "--held-out", "8", "--solve.steps", "2"),
    "distill": ("--train.epochs", "1", "--held-out", "8"),
    "sample": ("--indices", "0-3"),
    "evaluate": (),
}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(lang in languages for lang, _ in blocks(page))]


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder that looks as `dstudent demo` leaves it, from a few steps of training."""
    folder = tmp_path_factory.mktemp("docs")
    p = presets.digits()
    quick = replace(p.train, epochs=0.5, check_every=1000)
    p = replace(
        p, teach=quick, train=quick, pairs=replace(p.pairs, count=256, held_out=64), solve=p.solve
    )
    home = folder / "runs" / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        replace(Teach.of("digits", p), out=home / "teacher").run()
        replace(MakePairs.of("digits", p), teacher=home / "teacher", out=str(home / "pairs")).run()
        replace(
            Distill.of("digits", p),
            teacher=home / "teacher",
            store=str(home / "pairs"),
            out=home / "student",
        ).run()
    return folder


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    names: dict = {"__name__": "page"}
    for language, code in blocks(page):
        if language == "python":
            # dataclass looks its module up by name
            exec(compile(code, str(page), "exec"), names)


def commands(code: str) -> list[str]:
    """Return the commands of a block, without their comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.partition(" #")[0].strip())]


def test_the_page_of_methods_has_a_row_for_each():
    rows = re.findall(r"^\| \[`(\w+)`\]", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert sorted(methods()) == sorted(rows)


def test_the_page_of_one_s_own_images_makes_a_student(tmp_path, monkeypatch):
    """Its commands run as they stand, shortened, on the pictures that its Python draws."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ds.cli.teach.SCORED", 20)
    ran = []
    for language, code in blocks(OWN):
        if language == "python":
            exec(compile(code, OWN.name, "exec"), {})
        for command in commands(code) if language == "bash" else []:
            _, verb, *args = shlex.split(command.replace("--count 512", "--count 16"))
            assert main([verb, *args, *BRIEF[verb]]) == 0, command
            ran.append(verb)
    assert ran == [*BRIEF]
    assert Path("shapes.png").exists() and Path("runs/shapes/student/metrics.json").exists()


@pytest.mark.parametrize("page", [p for p in pages_with("bash") if p != OWN], ids=lambda p: p.name)
def test_the_commands_of_a_page_exist(page, tmp_path, monkeypatch):
    """A .py file that a command names holds the Python above the command."""
    monkeypatch.chdir(tmp_path)
    python = ""
    for language, code in blocks(page):
        python = code if language == "python" else python
        for command in commands(code) if language == "bash" else []:
            if command.startswith(NEEDS_A_NETWORK):
                continue
            program, *args = shlex.split(command)
            for file in (arg for arg in args if arg.endswith(".py")):
                Path(file).write_text(python)
            if program == "make":
                subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)
            else:
                assert program == "dstudent", f"{page.name}: {command}"
                assert isinstance(parse(args[0], [a for a in args[1:] if a != "--dry-run"]), Verb)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
