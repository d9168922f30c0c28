"""Tables: a name in each row, and text in each column."""

from typing import NamedTuple


class Row(NamedTuple):
    """A line of a table: a name, and text for each column."""

    name: str
    cells: tuple[str, ...]


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
