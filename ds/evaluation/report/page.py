"""One HTML file that needs no other: its style, and the parts that pages are made of."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ds.evaluation.report.markup import Markup, Part, join, tag
from ds.evaluation.report.tables import Row
from ds.system import targets
from ds.system.files import whole
from ds.system.staging import replacing

SHARP = 640  # pixels: pictures up to this width are enlarged without blur
WIDEST = 1280  # pixels: wider pictures are shrunk
LARGEST = 64_000_000  # pixels of a picture that is read at all

STYLE = Path(__file__).with_name("page.css")


def write(path: Path, title: str, *parts: Part, force: bool = False) -> None:
    """Write a page of parts.

    Raises ValueError if the path cannot be written to or, without `force`, exists.
    """
    where = targets.file(path, force=force)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE.read_text())),
    )
    document = tag("html", head, tag("body", tag("main", *parts)), lang="en")
    text = f"<!doctype html>\n{document}\n"
    with replacing(where, force=force) as temporary:
        temporary.write_text(text, "utf-8", errors="backslashreplace")


def opening(kind: str, title: str, lead: str, *parts: Part) -> Markup:
    """Return the top of a page: what it is about, its title, a sentence, and parts below."""
    lines = tag("p", kind, class_="kind"), tag("h1", title), tag("p", lead, class_="lead")
    return tag("header", *lines, *parts)


def picture(content: bytes, alt: str, caption: str = "", *, where: str = "picture") -> Markup:
    """Return a figure with a PNG inside. Raises ValueError naming `where` if it is no whole one."""
    from PIL import Image

    with whole(where, "PNG"), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        width, height = image.size
        if width * height > LARGEST:
            raise ValueError(f"{width} x {height} pixels, of at most {LARGEST:,}")
        if width > WIDEST:
            height, width = round(height * WIDEST / width), WIDEST
            content = png(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        else:
            image.load()
    data = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    sharp = "sharp" if width <= SHARP else None
    image = tag("img", src=data, alt=alt, width=width, height=height, class_=sharp)
    return tag("figure", image, tag("figcaption", caption) if caption else None, class_="picture")


def png(image: object) -> bytes:
    """Return a Pillow image as the content of a PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")  # pyright: ignore[reportAttributeAccessIssue]
    return file.getvalue()


def table(columns: Sequence[str], rows: Iterable[Row], *, words: bool = False) -> Markup:
    """Return a table, of numbers or of `words`, that a narrow screen can move sideways."""
    head = tag("tr", *(tag("th", c, scope="col") for c in ("", *columns)))
    body = (
        tag("tr", tag("th", row.name, scope="row"), *(tag("td", c) for c in row.cells))
        for row in rows
    )
    parts = tag("thead", head) if any(columns) else None, tag("tbody", *body)
    return tag("div", tag("table", *parts, class_="words" if words else None), class_="table")


def facts(found: Iterable[tuple[str, str]]) -> Markup:
    """Return names with what they are."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in found))


def notes(lines: Sequence[str]) -> Markup | None:
    """Return a list of remarks; None for none."""
    return tag("ul", *(tag("li", line) for line in lines), class_="notes") if lines else None


def folded(title: str, values: dict[str, str]) -> Markup:
    """Return a table of names and values that opens on a click."""
    rows = (Row(name, (value,)) for name, value in values.items())
    return tag("details", tag("summary", title), table(("",), rows, words=True))


def group(kind: str, *parts: Part) -> Markup | None:
    """Return parts laid out as a kind of group: charts, strip, stack; None without any."""
    return tag("div", join(*parts), class_=kind) if any(parts) else None
