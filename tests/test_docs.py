"""Every code block of the documents is held to something, and none escapes.

Python runs as it stands, commands are parsed, data are read. Text is what a program prints, or a
formula.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from ds.cli import VERBS
from ds.cli.__main__ import main
from ds.cli.distill import Distill
from ds.cli.pairs import MakePairs
from ds.cli.teach import Teach
from ds.cli.verb import Verb, methods, parse
from ds.training import presets

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for parts in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for page in sorted(ROOT.glob(parts))
]
DATA: dict[str, Callable[[str], object]] = {"json": json.loads, "yaml": yaml.safe_load}
LANGUAGES = {"python", "bash", "text", *DATA}
EXTRAS = {*re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)}
PLAIN = {"cd", "curl", "git"}  # of other programs, nothing is checked
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
    tokens = MarkdownIt().parse(page.read_text())
    return [(token.info, token.content) for token in tokens if token.type == "fence"]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if language in {own for own, _ in blocks(page)}]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder as `dstudent demo` and the tutorial leave it, from a few steps of training."""
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
    home.with_name("digits").symlink_to(home)
    return folder


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_the_python_of_a_page_runs(page, trained, monkeypatch):
    monkeypatch.chdir(trained)
    names: dict = {"__name__": "page"}
    for language, code in blocks(page):
        if language == "python":
            # dataclass looks its module up by name
            exec(compile(code, str(page), "exec"), names)


def commands(code: str) -> list[list[str]]:
    """Return the words of each command of a block, without the variables before them."""
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    found: list[list[str]] = [[]]
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(f" {line}".partition(" #")[0], posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        for word in [*words, ";"]:
            if set(word) <= {*";&|"}:
                found.append([])
            elif found[-1] or not re.match(r"\w+=", word):
                found[-1].append(word)
    return [words for words in found if words]


def check_command(program: str, *args: str) -> None:
    """Raise unless a command exists and takes these words. It is not run."""
    module = args[args.index("-m") + 1] if "-m" in args else ""
    if module == "ds.cli":
        program, args = "dstudent", args[args.index("-m") + 2 :]
    if program == "dstudent":
        assert args[0] in VERBS
        with contextlib.suppress(SystemExit):  # of --help
            assert isinstance(parse(args[0], [a for a in args[1:] if a != "--dry-run"]), Verb)
    elif program == "make":
        subprocess.run(["make", "-n", *args], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert {*re.findall(r"\w+", ",".join(re.findall(r"\[(.*?)\]", " ".join(args))))} <= EXTRAS
    elif program == "sbatch":
        assert [a for a in args if a.endswith(".sbatch") and (ROOT / a).exists()]
    elif program.startswith("python"):
        assert importlib.util.find_spec(module) if module else Path(args[0]).exists()
    else:
        assert program in PLAIN


def test_the_page_of_methods_has_a_row_for_each():
    rows = re.findall(r"^\| \[`(\w+)`\]", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert sorted(methods()) == sorted(rows)


def test_the_page_of_one_s_own_images_makes_a_student(tmp_path, monkeypatch):
    """Its first commands run, shortened, on the pictures that its Python draws.

    The others find theirs, and a teacher, where they look for them.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ds.cli.teach.SCORED", 20)
    (_, draw), (_, make), *rest = blocks(OWN)
    exec(compile(draw, OWN.name, "exec"), {})
    ran = commands(make.replace("--count 512", "--count 16"))
    for _, verb, *args in ran:
        assert main([verb, *args, *BRIEF[verb]]) == 0, verb
    assert [verb for _, verb, *_ in ran] == [*BRIEF]
    assert Path("shapes.png").exists() and Path("runs/shapes/student/metrics.json").exists()
    for folder in ("photos", "pets/cat", "pets/dog"):
        shutil.copytree("shapes", folder)
        shutil.copytree("runs/shapes", Path("runs") / folder.partition("/")[0], dirs_exist_ok=True)
    for words in (
        words for language, code in rest if language == "bash" for words in commands(code)
    ):
        check_command(*words)


@pytest.mark.slow
def test_the_tutorial_makes_students(tmp_path, monkeypatch):
    """Its commands run in their order, shortened, and leave what its Python reads."""
    monkeypatch.chdir(tmp_path)
    few, steps = ["--pairs.count", "128", "--held-out", "32"], ["--train.warmup-steps", "1"]
    brief = {
        "teach": [*BRIEF["teach"], *steps],
        "pairs": [*few, "--solve.steps", "2"],
        "distill": ["--held-out", "32", "--train.epochs", "1", *steps],
        "evaluate": ["--count", "64"],
    }
    page = blocks(ROOT / "docs" / "tutorial.md")
    shown = [words for own, code in page if own == "bash" for words in commands(code)]
    for program, verb, *args in shown:
        if program == "dstudent" and verb != "doctor":
            of_images = "mean_flow" in args
            more = ["--train.epochs", "0.1", *steps] if of_images else brief.get(verb, [])
            assert main([verb, *args, *more]) == 0, (verb, args)
    (code,) = (code for own, code in page if own == "python")
    exec(compile(code, "tutorial.md", "exec"), {})
    assert all(Path(made).exists() for made in ("student.png", "four.json", "report.html"))


@pytest.mark.parametrize("page", [p for p in pages_with("bash") if p != OWN], ids=name)
def test_the_commands_of_a_page_exist(page, tmp_path, monkeypatch):
    """A .py file that a command names holds the Python above the command."""
    monkeypatch.chdir(tmp_path)
    python = ""
    for language, code in blocks(page):
        python = code if language == "python" else python
        for words in commands(code) if language == "bash" else []:
            for file in (word for word in words if word.endswith(".py")):
                if not (ROOT / file).exists():
                    Path(file).write_text(python)
            check_command(*words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_of_a_page_says_what_it_is(page):
    """And it is where both Markdowns see it: not indented, and in no list, tab or admonition."""
    text = page.read_text()
    tokens = MarkdownIt().parse(text)
    assert not [token.map for token in tokens if token.type == "code_block"]
    assert {language for language, _ in blocks(page)} <= LANGUAGES
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks(page))
    for language, code in blocks(page):
        DATA.get(language, str)(code)


@pytest.mark.parametrize(
    "command",
    ["dstudent tech digits", "make tset", "pip install 'ds[hubb]'", "rm -r /", "python no.py"],
)
def test_a_command_that_does_not_exist_is_noticed(command):
    with pytest.raises((AssertionError, ValueError, KeyError, subprocess.CalledProcessError)):
        check_command(*commands(command)[0])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
