"""The page and the picture of `dstudent demo`: a teacher and its student beside real digits."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ds.evaluation.evaluate import SECONDS
from ds.evaluation.report import page
from ds.evaluation.report.chapters import chapter, shown
from ds.evaluation.report.markup import Markup, Part, tag
from ds.evaluation.report.runs import is_number, part, places, read_figures, read_run
from ds.evaluation.report.tables import Row
from ds.models.images import save_png, tile
from ds.models.pretrained import METRICS
from ds.system import targets
from ds.system.staging import replacing

COLUMNS = (
    "network calls",
    "Frechet distance",
    "KID",
    "precision",
    "recall",
    "s / 1,000 images",
    "speed-up",
)
SCALE, MARGIN, TITLE = 6, 18, 30  # pixels: of one of a digit, around strips, of a title
PAPER, INK = "#fbfaf7", "#23272e"


def is_demo(folder: Path) -> bool:
    """Return whether `dstudent demo` made a directory."""
    return targets.marked(folder, "demo") is not None


def rows(figures: dict[str, Any]) -> list[Row]:
    """Return the lines of a table with COLUMNS; others are as many times as fast as the first."""
    slowest = part(figures, next(iter(figures), "")).get(SECONDS)
    found = []
    for name in figures:
        f = part(figures, name)
        seconds = f.get(SECONDS)
        faster = None
        if is_number(slowest) and is_number(seconds) and seconds > 0:
            faster = slowest / seconds
        cells = (
            _text(part(f, "protocol").get("nfe"), ".0f"),
            _text(f.get("frechet_distance"), ".2f"),
            _text(f.get("kernel_distance"), ".4g"),
            _text(f.get("precision"), ".2f"),
            _text(f.get("recall"), ".2f"),
            _text(seconds, ".2f"),
            _text(faster, ".1f", "x"),
        )
        found.append(Row(name, cells))
    return found


def _text(value: Any, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if is_number(value) else ""


def draw(strips: dict[str, Tensor], folder: Path) -> None:
    """Write each strip of uint8 images [N, H, W, 1] into a demo, and all with titles as report.png.

    Strips have the same number of images, and images above one another belong together.
    """
    for title, images in strips.items():
        sheet = tile(255 - images, columns=len(images) // 2)  # ink on paper
        with replacing(_file(folder, title)) as temporary:
            save_png(sheet, temporary)
    targets.mark(folder, "demo", shown=[*strips])
    with replacing(folder / "report.png") as temporary:
        _stacked({title: _file(folder, title) for title in strips}).save(temporary, format="PNG")


def _stacked(files: dict[str, Path]) -> Any:
    """Return pictures below one another, enlarged, each under its title."""
    from PIL import Image, ImageChops, ImageDraw, ImageFont

    sheets = {}
    for title, file in files.items():
        with Image.open(file) as image:
            size = SCALE * image.width, SCALE * image.height
            sheets[title] = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    width = max(sheet.width for sheet in sheets.values()) + 2 * MARGIN
    height = sum(sheet.height + TITLE + MARGIN for sheet in sheets.values()) + MARGIN
    whole, top = Image.new("RGB", (width, height), PAPER), MARGIN
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(19)
    for title, sheet in sheets.items():
        pen.text((MARGIN, top), title, INK, font)
        paper = Image.new("RGB", sheet.size, PAPER)
        whole.paste(ImageChops.multiply(sheet, paper), (MARGIN, top + TITLE))
        top += sheet.height + TITLE + MARGIN
    return whole


def _file(folder: Path, title: str) -> Path:
    """Return the file of the strip under a title."""
    return folder / "samples" / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.png"


def page_of(folder: Path) -> list[Part]:
    """Return the parts of the page of a demo, as far as it has come."""
    remarks: list[str] = []
    strips = _strips(folder, remarks)
    return [
        page.opening(
            "demo",
            "One call instead of many",
            "A diffusion teacher was trained on 1,797 scanned digits and distilled into a student "
            "that makes an image in one network call. All images in a column come from the same "
            "noise, which the student was not trained on.",
        ),
        page.group("stack", *strips),
        *_table(folder, remarks),
        page.notes(remarks),
        *(
            one
            for name in ("student", "teacher")
            if any(places(folder / name))
            for one in chapter(read_run(folder / name), tag("h2", f"The {name}"))
        ),
    ]


def _strips(folder: Path, remarks: list[str]) -> Iterator[Markup]:
    titles = (targets.marked(folder, "demo") or {}).get("shown")
    for title in map(str, titles if isinstance(titles, list) else ()):
        if strip := shown(_file(folder, title), title, title, remarks):
            yield strip


def _table(folder: Path, remarks: list[str]) -> Iterator[Part]:
    """Yield the table of the models' figures, and what they are."""
    try:
        figures = read_figures(folder / METRICS)
    except FileNotFoundError:
        remarks.append("The demo goes on, or broke off: its models are not compared yet.")
        return
    except (ValueError, RuntimeError, OSError) as error:
        remarks.append(str(error))
        return
    yield page.table(COLUMNS, rows(figures))
    judged = [f for name in figures if (f := part(figures, name)).get("protocol")]
    yield page.notes([*_notes(judged)])


def _notes(judged: list[dict[str, Any]]) -> Iterator[str]:
    n = _text(part(judged[0], "protocol").get("n"), ",.0f") if judged else ""
    yield (
        f"Frechet distance, KID, precision and recall compare {n} images with all real digits on "
        f"the features of a small digits classifier. They cannot be compared with distances on "
        f"Inception features."
    )
    yield (
        "The last row compares 1,500 of the real digits with the other 297, the mean of five "
        "splits. It is the floor for sets of this size."
    )
    rms, r2 = (judged[1].get(name) if judged[1:] else None for name in ("pair_rms", "pair_r2"))
    if is_number(rms) and is_number(r2):
        yield (
            f"On held-out noise the student is {rms:.3f} from its teacher (root mean square in "
            f"units of [-1, 1]), R2 = {r2:.3f}."
        )
