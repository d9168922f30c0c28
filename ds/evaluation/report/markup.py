"""HTML and SVG from Python calls. Whatever is not markup already is text, and escaped."""

from html import escape

_EMPTY = {"meta", "link", "img", "br"}  # elements without an end


class Markup(str):
    """Text that is HTML already."""


Part = str | None  # Markup, or text to escape; None is left out


def tag(name: str, /, *parts: Part, **attributes: str | float | None) -> Markup:
    """Return an element with its parts and attributes; those that are None are left out.

    An underscore in an attribute's name is a hyphen, and one at its end is dropped: `class_`.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in _EMPTY else f"{start}{join(*parts)}</{name}>")


def join(*parts: Part) -> Markup:
    """Return parts after one another."""
    found = (part for part in parts if part is not None)
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in found))
