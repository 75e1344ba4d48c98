"""Names and values of strangers as text of Markdown that they cannot break out of."""

from __future__ import annotations


def count(value: object) -> str:
    """An integer in groups of three digits."""
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else line(value)


def line(value: object, longest: int = 200) -> str:
    """Anything as one line that cannot end a table cell, a code span or be one of the marks."""
    text = "".join(c if c.isprintable() else " " for c in str(value))[:longest]
    return text.replace("|", "/").replace("`", "'").replace("<!", "< !")
