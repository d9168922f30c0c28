"""docs/troubleshooting.md quotes messages as the sources have them."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HEADINGS = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
QUOTED = [said[2] for h in HEADINGS if (said := re.fullmatch(r"(`+) ?(.+?) ?\1", h))]
GAP = "…"


def text_of(node: ast.AST) -> str | None:
    """Return the text of a string, with a gap for what is put into it; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or GAP) + (text_of(node.right) or GAP)
    return None


def strings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if text := text_of(node):
            yield re.sub(r"%(?:\.\d)?[a-z]", GAP, text)


@cache
def messages() -> str:
    """Return every text of the sources, a line each."""
    files = [*(ROOT / "ds").rglob("*.py"), ROOT / "setup.py"]
    python = "\n".join(" ".join(text.split()) for file in files for text in strings(file))
    return f"{python}\n{(ROOT / 'CMakeLists.txt').read_text()}"


def is_said(message: str) -> bool:
    pieces = map(re.escape, message.strip(GAP).split(GAP))
    return re.search(".*".join(pieces), messages()) is not None


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_of_the_page_is_in_the_sources(message):
    assert len(message.replace(GAP, "")) > 15  # else it would be found in many
    assert is_said(message)


def test_a_message_that_nobody_prints_is_noticed():
    assert not is_said("…: the weights are upside down")
    assert not is_said("its file system has no … ink")


def test_no_heading_escapes():
    """A heading quotes us, or says whom it quotes, or is a symptom without a message."""
    others = [h for h in HEADINGS if "`" in h and not re.fullmatch(r"(`+).+\1", h)]
    assert [h for h in others if not re.fullmatch(r"`.+` of \w+", h)] == []
    assert len(HEADINGS) == len(set(HEADINGS))
