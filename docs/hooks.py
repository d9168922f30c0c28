"""What the site is made of beside the pages of docs/: mkdocs and griffe call what stands here."""

import ast
import io
import os
import posixpath
import re
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NOTES = ROOT / "docs" / "notes"
# Pages of the root, where people look for them; and the page that stands for the README.
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
README = "index.md"
COMMANDS = "reference/command-line.md"
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"(?<!\[)`(ds(?:\.\w+)+)(?:\([^`\n]*\))?`")
OPTION = re.compile(r"<code>(--[\w.=-]{2,24}(?: [\w.,:-]{1,12})?)</code>")
LINK = re.compile(r"(?<=\]\()(?![a-z+]+:|#)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> None:
    """List the notes, each under its title, behind the page that says what they are."""
    (below,) = (part["How it works"] for part in config.nav or () if "How it works" in part)
    (decisions,) = (part["Decisions"] for part in below if isinstance(part, dict))
    decisions += [f"notes/{note.name}" for note in _notes()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the root, and the files of the checkout that pages link."""
    linked = {_path(link, page) for page in _pages() for link in LINK.findall(page.read_text())}
    outside = (path for path in linked if not path.startswith("docs/") and path != "README.md")
    for path in sorted({*ROOT_PAGES, *outside}):
        if (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))


def on_page_markdown(text: str, page: Page, **_: Any) -> str:
    """Point links where the site has their pages, and write what is made anew at each build."""
    source = page.file.src_uri
    here = ROOT / source if source in ROOT_PAGES else ROOT / "docs" / source
    text = LINK.sub(lambda link: _moved(link[1], here, source), text)
    text = "".join(_named(part) for part in FENCED.split(text))
    if source == "notes/index.md":
        lines = (f"- [{_title(note)}]({note.name})\n" for note in _notes())
        return f"{text}\n{''.join(lines)}"
    return f"{text}\n{''.join(_helps())}" if source == COMMANDS else text


def on_page_content(html: str, **_: Any) -> str:
    """Mark the names of options, which are not to be broken at a hyphen."""
    return OPTION.sub(r'<code class="option">\1</code>', html)


def _named(text: str) -> str:
    """Link the names of the library to their places in the reference, but for those in blocks."""
    if text.startswith("```"):
        return text
    return NAME.sub(r'<autoref identifier="\1" optional>\g<0></autoref>', text)


def _pages() -> Iterator[Path]:
    yield from (ROOT / name for name in ROOT_PAGES)
    yield from sorted(ROOT.glob("docs/**/*.md"))


def _path(link: str, page: Path) -> str:
    """Return where a link of a page leads, from the root of the checkout."""
    folder = page.relative_to(ROOT).parent.as_posix()
    return posixpath.normpath(posixpath.join(folder, link))


def _moved(link: str, page: Path, source: str) -> str:
    """Return a link of a page as the page `source` of the site has it."""
    path = _path(link, page)
    path = README if path == "README.md" else path.removeprefix("docs/")
    return posixpath.relpath(path, posixpath.dirname(source) or ".")


def _notes() -> list[Path]:
    return sorted(NOTES.glob("0*.md"))


def _title(page: Path) -> str:
    return page.read_text().partition("\n")[0].removeprefix("# ")


def _helps() -> Iterator[str]:
    """Yield a section for each verb: what its --help prints, and that of the preset digits."""
    os.environ["COLUMNS"] = "80"
    from ds.cli import VERBS

    for verb, (_, words, does) in VERBS.items():
        yield f"\n## dstudent {verb}\n\n{does[0].upper()}{does[1:]}.\n\n{_help(verb)}"
        if words == "PRESET":
            yield f"\nThe options, with the values of `digits`:\n\n{_help(verb, 'digits')}"
    for part in ("info", "verify", "export"):
        yield f"\n## dstudent pairs {part}\n\n{_help('pairs', part)}"


def _help(*words: str) -> str:
    from ds.cli.__main__ import main

    with redirect_stdout(io.StringIO()) as said:
        try:
            main([*words, "--help"])
        except SystemExit as end:
            assert not end.code, words
    lines = said.getvalue().strip().splitlines()
    wrapped = "\n".join(textwrap.fill(line, 80, break_long_words=False) for line in lines)
    return f"```text\n{wrapped}\n```\n"


class Ours(griffe.Extension):
    """Read the comment of a field as its documentation, and find the methods of ds.methods."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, **_: Any) -> None:
        """Give every field that has a comment, beside it or above, that as its docstring."""
        lines = cls.lines_collection[cls.filepath]
        for field in (part for part in node.body if isinstance(part, ast.AnnAssign)):
            member = cls.members[ast.unparse(field.target)]
            comment = _comment(lines, field.lineno, field.end_lineno or field.lineno)
            if comment and member.docstring is None:
                member.docstring = griffe.Docstring(comment, parent=member)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Let ds.methods have what its files define, as it does when it is imported."""
        methods = pkg["methods"]
        for cls in [*_methods(methods)]:
            methods.set_member(cls.name, griffe.Alias(cls.name, cls))


def _comment(lines: list[str], first: int, last: int) -> str:
    """Return the comment of the field in these lines, counted from 1, as a sentence; or ""."""
    beside = [line.partition("# ")[2] for line in lines[first - 1 : last] if "# " in line]
    above: list[str] = []
    while not beside and (line := lines[first - 2 - len(above)].strip()).startswith("# "):
        above.insert(0, line.removeprefix("# "))
    text = " ".join(beside or above)
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _methods(module: griffe.Module) -> Iterator[griffe.Class]:
    for member in module.members.values():
        if member.is_alias or member.name == "proofs":
            continue
        if isinstance(member, griffe.Module):
            yield from _methods(member)
        elif isinstance(member, griffe.Class) and any(
            str(base) == "AbstractMethod" for base in member.bases
        ):
            yield member
