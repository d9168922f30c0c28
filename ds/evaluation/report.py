"""A page a person wants to look at: pictures side by side, the loss, a table."""

import base64
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ds.models.images import tile
from ds.system import targets
from ds.system.staging import replacing
from ds.training.log import read_metrics

_PAPER, _INK, _ACCENT = "#fbfaf7", "#23272e", "#b4442a"


class Row(NamedTuple):
    """A line of the table: a name, and text for each column."""

    name: str
    cells: tuple[str, ...]


def draw(strips: dict[str, Tensor], run: Path, path: Path, *, force: bool = False) -> None:
    """Write a PNG: a strip of uint8 images [N, H, W, 1] under each title, then the loss of a run.

    Strips have the same number of images, and images above one another belong together. Raises
    ValueError if the path cannot be written to or, without `force`, exists.
    """
    where = targets.file(path, force=force)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 10,
        "axes.edgecolor": _INK,
        "text.color": _INK,
        "font.family": "serif",
    }
    with plt.rc_context(style):
        heights = [1.0] * len(strips) + [2.1]
        figure, axes = plt.subplots(
            len(heights), 1, figsize=(9, 1.35 * sum(heights)), height_ratios=heights,
            layout="constrained", facecolor=_PAPER,
        )  # fmt: skip
        for axis, (title, images) in zip(axes, strips.items(), strict=False):
            sheet = tile(255 - images, columns=len(images) // 2)  # ink on paper
            axis.imshow(sheet.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set_title(title, loc="left", fontsize=11)
            axis.set_axis_off()
        _draw_loss(axes[-1], run)
        with replacing(where, force=force) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        plt.close(figure)


def _draw_loss(axis: Any, run: Path) -> None:
    lines = read_metrics(run)
    train = [(m["step"], m["loss"]) for m in lines if "loss" in m]
    held_out = [(m["step"], m["held_out_loss"]) for m in lines if "held_out_loss" in m]
    axis.plot(*zip(*train, strict=True), color=_INK, lw=1, label="training")
    axis.plot(*zip(*held_out, strict=True), "o-", color=_ACCENT, ms=3, lw=1, label="held out, EMA")
    axis.set_yscale("log")
    axis.set_facecolor(_PAPER)
    axis.set_xlabel("step")
    axis.set_title("The student's distance to its teacher's images (loss)", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def write_page(
    path: Path, title: str, lead: str, picture: Path, columns: tuple[str, ...], rows: list[Row],
    notes: list[str], *, alt: str = "Teacher, student and real images side by side",
    force: bool = False,
) -> None:  # fmt: skip
    """Write one HTML file that needs no other: the picture, which `alt` describes, is inside.

    Raises ValueError if the path cannot be written to or, without `force`, exists.
    """
    where = targets.file(path, force=force, apart=[picture])
    image = base64.b64encode(picture.read_bytes()).decode()
    head = "".join(f"<th>{escape(c)}</th>" for c in ("", *columns))
    body = "".join(
        f"<tr><th>{escape(r.name)}</th>{''.join(f'<td>{escape(c)}</td>' for c in r.cells)}</tr>"
        for r in rows
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    html = f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>
body {{ font: 17px/1.5 Georgia, serif; color: {_INK}; background: {_PAPER};
       max-width: 54rem; margin: 3rem auto; padding: 0 1rem; }}
h1 {{ font-weight: normal; margin-bottom: 0; }}
p {{ max-width: 42rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; width: 100%; font-size: 15px; }}
th, td {{ padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #ddd8cc; }}
tr th:first-child {{ text-align: left; font-weight: normal; }}
thead th {{ color: {_ACCENT}; font-weight: normal; vertical-align: bottom; }}
li {{ font-size: 15px; }}
</style>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
<img src="data:image/png;base64,{image}" alt="{escape(alt)}">
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<ul>{items}</ul>
</html>
"""
    with replacing(where, force=force) as temporary:
        temporary.write_text(html)


def text_table(columns: tuple[str, ...], rows: list[Row]) -> str:
    """Lay the table out as Markdown, which reads well in a terminal too."""
    lines = [("", *columns), *((r.name, *r.cells) for r in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]

    def join(line: tuple[str, ...]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = join(("-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])))
    return "\n".join([join(lines[0]), rule, *map(join, lines[1:])])
