"""The documentation site: it has every public name, needs no network, and leads nowhere wrong."""

import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ds

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
# Packages whose names are public, as a program writes them.
PACKAGES = (
    "ds", "ds.analytic", "ds.engine", "ds.methods", "ds.nets", "ds.ops", "ds.schedule",
    "ds.solvers",
)  # fmt: skip
OF_OTHER_HOSTS = re.compile(
    r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//"
)


def attribute(path: str) -> Any:
    """Return what a program means by a path such as ds.solvers.DDIM."""
    value = ds
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


def public() -> list[str]:
    """Return every public name, packages of names aside."""
    names = [f"{package}.{n}" for package in PACKAGES for n in attribute(package).__all__]
    shown = [name for name in names if name not in PACKAGES and not name.endswith("__")]
    assert len(shown) > 100
    return shown


def directive(name: str) -> str:
    """Return the path under which the reference shows a name.

    A function in a module of its own name is shown where it is defined, since the path is the
    module's.
    """
    package, _, last = name.rpartition(".")
    files = pkgutil.iter_modules(getattr(attribute(package), "__path__", ()))
    value = attribute(name)
    if inspect.ismodule(value) or last not in {file.name for file in files}:
        return name
    return f"{value.__module__}.{value.__qualname__}"


def test_the_reference_shows_every_public_name_once():
    text = "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md")))
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert sorted({*map(directive, public())} - {*shown}) == []
    assert len(shown) == len({*shown})


def test_every_page_is_in_the_navigation():
    """But for the notes, which the hook adds."""
    listed = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in ROOT.glob("docs/**/*.md")}
    missing = {p for p in pages - {*listed} if not re.match(r"notes/\d", p)}
    assert not missing
    assert all((ROOT / "docs" / page).exists() or (ROOT / page).exists() for page in listed)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_the_inventory_of_the_site_has_every_public_name(site):
    from mkdocstrings import Inventory

    with (site / "objects.inv").open("rb") as file:
        known = Inventory.parse_sphinx(file)
    assert sorted({*map(directive, public())} - {*known}) == []


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    assert [p.name for p in pages if OF_OTHER_HOSTS.search(p.read_text())] == []


@pytest.mark.slow
def test_the_checker_of_links_finds_a_broken_one(site, tmp_path):
    """What `make docs` relies on: it refuses a wrong page and a wrong anchor, and nothing else."""
    check = [str(Path(sys.executable).with_name("lychee")), "--offline", "--include-fragments"]
    target = tmp_path / "target.md"
    target.write_text("# There\n")
    for link, code in {"target.md#there": 0, "target.md#here": 2, "other.md": 2}.items():
        (tmp_path / "page.md").write_text(f"[link]({link})\n")
        ran = subprocess.run([*check, str(tmp_path / "page.md")], capture_output=True)
        assert ran.returncode == code, link
