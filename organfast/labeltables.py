"""Label tables: what the numbers of a label map mean.

Beside a label map, or in the dataset's folder, the first of these that is there::

    labels.csv    columns id,name
    labels.json   {"1": "liver"} or {"liver": 1}, alone or under "labels", or what `segment` writes
    labels.txt    label descriptions of ITK-SNAP

Without any the numbers are those of TotalSegmentator v2. Names become canonical ones where they are
known, see ``anatomy.canonical_name``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from organfast.anatomy import totalsegmentator_names
from organfast.cases import structure_name
from organfast.errors import InputError

__all__ = ["NamesOf", "checked_names", "label_names", "whole_number"]

NamesOf = Callable[[Path], Mapping[int, str]]

_MAX_ID = 65_535


def label_names(dataset: Path) -> NamesOf:
    """Where to look up the names of a label map: beside it, in the dataset, else the scheme.

    Parameters
    ----------
    dataset : Path
        Root of the dataset.

    Returns
    -------
    callable
        Label map -> names of its numbers; each folder is looked into once.
    """
    table = cache(_read_table)

    def names_of(label_map: Path) -> Mapping[int, str]:
        names = table(label_map.parent)
        if names is None:
            names = table(dataset)
        return totalsegmentator_names() if names is None else names

    return names_of


def _read_table(folder: Path) -> Mapping[int, str] | None:
    for name, parse in _PARSERS.items():
        path = folder / name
        try:
            return checked_names(parse(path.read_text(encoding="utf-8-sig")))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise InputError(
                path,
                f"is no label table ({error})",
                "give columns id,name, a JSON object or ITK-SNAP's label descriptions",
            ) from None
    return None


def _parse_csv(text: str) -> list[tuple[Any, Any]]:
    rows = csv.DictReader(text.splitlines())
    if not {"id", "name"}.issubset(rows.fieldnames or ()):
        raise ValueError("it lacks the columns id and name")
    return [(row["id"], row["name"]) for row in rows]


def _parse_json(text: str) -> list[tuple[Any, Any]]:
    table = json.loads(text)
    if isinstance(table, list):  # as organfast writes it beside a segmentation
        return [(_cell(row, "label"), _cell(row, "name")) for row in table]
    if isinstance(table, dict):
        table = table.get("labels", table)
    if not isinstance(table, dict):
        raise ValueError("it is no JSON object")
    if all(str(key).strip().isdecimal() for key in table):
        return list(table.items())
    return [(label, name) for name, label in table.items()]


def _cell(row: Any, key: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise ValueError("it is no JSON object")
    return row[key]


# Index, red, green, blue, opacity, visible, visible as a mesh, "name".
_ITKSNAP = re.compile(r'\s*(\d+)(?:\s+[\d.]+){6}\s+"([^"]*)"\s*')


def _parse_itksnap(text: str) -> list[tuple[Any, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ITKSNAP.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number} is no label description of ITK-SNAP")
        rows.append((match[1], match[2]))
    return rows


_PARSERS: dict[str, Callable[[str], list[tuple[Any, Any]]]] = {
    "labels.csv": _parse_csv,
    "labels.json": _parse_json,
    "labels.txt": _parse_itksnap,
}


def checked_names(rows: Iterable[tuple[Any, Any]]) -> dict[int, str]:
    """Label -> canonical name of the rows of a table.

    Parameters
    ----------
    rows : iterable of (id, name)
        As the table gives them, text or numbers.

    Raises
    ------
    ValueError
        An id is no label or stands twice, a name is missing, or there is no row.
    """
    names: dict[int, str] = {}
    for label_text, name_text in rows:
        label, name = whole_number(label_text), structure_name(name_text)
        if not 0 <= label <= _MAX_ID:
            raise ValueError(f"id {label} is outside 0..{_MAX_ID}")
        if label in names:
            raise ValueError(f"id {label} stands twice")
        if not name:
            raise ValueError(f"id {label} has no name")
        names[label] = name
    if not names:
        raise ValueError("it has no rows")
    return names


def whole_number(value: Any) -> int:
    """A whole number as text, or as JSON has it.

    Parameters
    ----------
    value : str or number
        What stands in a table.

    Raises
    ------
    ValueError
        It is none.
    """
    number = int(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
    if number is None:
        raise ValueError(f"{value!r} is no whole number")
    return number
