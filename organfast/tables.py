"""Tables as CSV text, which a spreadsheet may open without harm."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["cell", "table"]

# What a formula begins with, and its full-width twins, which some spreadsheets take for it.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV text; text that a spreadsheet would take for a formula is text.

    Parameters
    ----------
    rows : iterable of sequences
        Text, numbers, or None for an empty cell; the first row holds the names of the columns.

    >>> table([("organ", "ml"), ("=1+1", -1.5)])
    "organ,ml\\n'=1+1,-1.5\\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()


def cell(value: Any) -> Any:
    """A cell; an apostrophe stands before text that begins as a formula does.

    Spaces and what cannot be printed do not count: a spreadsheet may leave them out.

    Parameters
    ----------
    value : object
        Text; anything else is given back.
    """
    if not isinstance(value, str):
        return value
    begin = next((c for c in value if c.isprintable() and not c.isspace()), "")
    return f"'{value}" if begin.startswith(_FORMULA) else value
