"""Every code block of the documents runs: Python as it stands, commands as far as they parse."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ds.cli.distill import Distill
from ds.cli.pairs import MakePairs
from ds.cli.teach import Teach
from ds.cli.verb import Verb, parse
from ds.training import presets

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NEEDS_A_NETWORK = ("git clone", "cd ", "pip install")


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


@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda p: p.name)
def test_the_commands_of_a_page_exist(page, tmp_path, monkeypatch):
    """A .py file that a command names holds the Python above the command."""
    monkeypatch.chdir(tmp_path)
    python = ""
    for language, code in blocks(page):
        python = code if language == "python" else python
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else []:
            command = line.partition(" #")[0].strip()
            if not command or command.startswith(NEEDS_A_NETWORK):
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
