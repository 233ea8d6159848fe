"""Class tables: which structures a model knows, in which order, and what they are called elsewhere.

A class table is data. The default one is the packaged ``data/classes.csv`` (23 classes after the
VISCERAL Anatomy benchmark, ordered by RadLex id); any other table can be read from a CSV with the
same columns, of which only ``name`` is required.

What else people call these structures stands in ``data/aliases.csv``: ``alias,name`` without their
side, words for the sides, and, with a ``note``, structures that stand for another one.
"""

from __future__ import annotations

import colorsys
import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from organfast.errors import InputError
from organfast.files import check_is_file

__all__ = ["ClassTable", "Structure", "canonical_name", "stand_in_notes", "totalsegmentator_names"]

Role = Literal["background", "context", "organ"]

# Distinct hues for structures that come without a colour (golden-angle steps, never random).
_GOLDEN_ANGLE = 0.61803398875
_MOST_NAME_BYTES = 200
_NO_COLOUR = 200


@dataclass(frozen=True)
class Structure:
    """One class: a structure of the body, or what surrounds it.

    Parameters
    ----------
    name : str
        Canonical name; TotalSegmentator's where it has one.
    role : {"background", "context", "organ"}
        Organs are reported; context is what lies between them; background is outside the body.
    radlex : int or None
        RadLex id (VISCERAL's file names carry it).
    side : {"", "R", "L"}
        The patient's side.
    mirror : str
        Name of the partner on the other side, or "".
    snomed : str
        SNOMED CT concept, without side modifier, or "".
    totalsegmentator : tuple of str
        Names of the TotalSegmentator v2 classes that make up this structure.
    rgb : tuple of int
        Display colour, 0..255.
    """

    name: str
    role: Role = "organ"
    radlex: int | None = None
    side: str = ""
    mirror: str = ""
    snomed: str = ""
    totalsegmentator: tuple[str, ...] = ()
    rgb: tuple[int, int, int] = (_NO_COLOUR, _NO_COLOUR, _NO_COLOUR)

    def __post_init__(self) -> None:
        if not self.name or any(c.isspace() or c in "/\\" for c in self.name):
            raise ValueError(
                f"structure name {self.name!r} is empty or holds a space or a slash; "
                "use a name such as kidney_left"
            )
        # It is the name of a file, and is shown in terminals.
        if not self.name.isprintable() or len(self.name.encode()) > _MOST_NAME_BYTES:
            raise ValueError(
                f"structure name {self.name[:40]!r} has more than {_MOST_NAME_BYTES} bytes or "
                "holds what cannot be printed; use a name such as kidney_left"
            )
        if self.role not in ("background", "context", "organ"):
            raise ValueError(f"role {self.role!r} is unknown; use background, context or organ")
        if self.side not in ("", "R", "L"):
            raise ValueError(f"side {self.side!r} is unknown; use R, L or nothing")
        if any(not 0 <= channel <= 255 for channel in self.rgb):
            raise ValueError(f"colour {self.rgb} of {self.name} is outside 0..255")

    @property
    def aliases(self) -> tuple[str, ...]:
        """Names under which a dataset may store the whole of this structure."""
        whole = self.totalsegmentator if len(self.totalsegmentator) == 1 else ()
        radlex = () if self.radlex is None else (str(self.radlex),)
        return (self.name, *whole, *radlex)


@dataclass(frozen=True)
class ClassTable:
    """The ordered classes of a model. The position in the table is the label in a label map.

    Parameters
    ----------
    structures : tuple of Structure
        The first is the background (label 0).

    Raises
    ------
    ValueError
        A name occurs twice, the first class is not the only background, or a mirror partner
        is missing or does not point back.
    """

    structures: tuple[Structure, ...]

    def __post_init__(self) -> None:
        names = [s.name for s in self.structures]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"structure {twice[0]} occurs twice in the class table")
        roles = [s.role for s in self.structures]
        if not roles or roles[0] != "background" or "background" in roles[1:]:
            raise ValueError(
                "the first structure of a class table, and no other, is the background"
            )
        if len(self.structures) > 65_535:
            raise ValueError(f"{len(self.structures)} classes do not fit a uint16 label map")
        for s in self.structures:
            if s.mirror and s.mirror in names and self[s.mirror].mirror != s.name:
                raise ValueError(f"{s.name} mirrors {s.mirror}, which mirrors something else")

    @staticmethod
    def default() -> ClassTable:
        """The 23 classes of the VISCERAL Anatomy benchmark, by ascending RadLex id."""
        return _packaged_table()

    @staticmethod
    def read(path: str | PathLike[str]) -> ClassTable:
        """Read a class table from a CSV with a ``name`` column.

        Optional columns: ``radlex, role, side, mirror, snomed, totalsegmentator`` (names parted by
        spaces), ``red, green, blue``. A background is put first where the file has none.

        Raises
        ------
        InputError
            The file cannot be read or does not describe a class table.
        """
        try:
            check_is_file(path, "give a CSV with a name column")
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                path, f"cannot be read ({error})", "give a CSV of structures"
            ) from None
        try:
            return _parse_table(text)
        except (KeyError, ValueError) as error:
            raise InputError(
                path, f"is not a class table: {error}", "give a CSV with a column `name`"
            ) from None

    @staticmethod
    def from_names(names: Iterable[str]) -> ClassTable:
        """A table of the given structures, completed from the default table where it knows them.

        A background comes first; ``thorax_abdomen`` stands for the rest of the body.
        """
        known = {alias: s for s in ClassTable.default().structures for alias in s.aliases}
        wanted = ["background", "thorax_abdomen", *names]
        found = [
            known.get(canonical_name(name)) or _unknown_structure(name, wanted) for name in wanted
        ]
        return ClassTable(_coloured(dict.fromkeys(found)))

    @staticmethod
    def from_dict(rows: Sequence[Mapping[str, Any]]) -> ClassTable:
        """The inverse of :meth:`to_dict`; raises ValueError on anything else."""
        try:
            return ClassTable(
                tuple(
                    Structure(
                        **{
                            **row,
                            "totalsegmentator": tuple(row["totalsegmentator"]),
                            "rgb": tuple(int(channel) for channel in row["rgb"]),
                        }
                    )
                    for row in rows
                )
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a class table: {error}") from None

    def to_dict(self) -> list[dict[str, Any]]:
        """Rows for JSON, in label order."""
        return [asdict(s) for s in self.structures]

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, name: str) -> Structure:
        return self.structures[self.index(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._labels

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {s.name: label for label, s in enumerate(self.structures)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names in label order."""
        return tuple(s.name for s in self.structures)

    @property
    def organs(self) -> tuple[int, ...]:
        """Labels of the organs, ascending."""
        return tuple(i for i, s in enumerate(self.structures) if s.role == "organ")

    @property
    def context(self) -> int | None:
        """Label that the unlabelled inside of the body gets: the last context class, if any."""
        labels = [i for i, s in enumerate(self.structures) if s.role == "context"]
        return labels[-1] if labels else None

    def index(self, name: str) -> int:
        """Label of a structure by its name.

        Raises
        ------
        ValueError
            The table has no such structure.
        """
        label = self._labels.get(name)
        if label is None:
            raise ValueError(f"no structure {name!r}; this table has {', '.join(self.names)}")
        return label

    def keep(self, names: Iterable[str]) -> ClassTable:
        """The table with only the background and the named structures, order unchanged."""
        kept = set(names)
        structures = [s for s in self.structures if s.role == "background" or s.name in kept]
        return ClassTable(tuple(structures))

    def itksnap_table(self) -> str:
        """Label description file of ITK-SNAP."""
        rows = ['    0     0    0    0        0  0  0    "Clear Label"']
        for label, s in enumerate(self.structures[1:], start=1):
            red, green, blue = s.rgb
            visible = int(s.role == "organ")
            rows.append(
                f"{label:5d} {red:5d} {green:4d} {blue:4d}        {visible}  {visible}  "
                f'{visible}    "{s.name}"'
            )
        return "\n".join(rows) + "\n"

    def slicer_table(self) -> str:
        """Colour table of 3D Slicer (``.ctbl``)."""
        rows = ["# Color table file: label name red green blue opacity"]
        for label, s in enumerate(self.structures):
            opacity = 255 if s.role == "organ" else 0
            rows.append(f"{label} {s.name} {s.rgb[0]} {s.rgb[1]} {s.rgb[2]} {opacity}")
        return "\n".join(rows) + "\n"


@cache
def totalsegmentator_names() -> dict[int, str]:
    """Label -> name of TotalSegmentator v2's ``total`` task, for label maps without a table."""
    return {int(row["id"]): row["name"] for row in csv.DictReader(_data("totalsegmentator.csv"))}


@lru_cache(10_000)  # a thousand cases have the same hundred masks
def canonical_name(name: str) -> str:
    """The name of a structure in the default table or TotalSegmentator's scheme, if it has one.

    Capitals, spaces, hyphens and the place of the side do not matter, and neither does whether a
    RadLex id or a synonym of ``data/aliases.csv`` is given.

    Parameters
    ----------
    name : str
        However a dataset spells it. What is unknown is returned as it is.

    >>> [canonical_name(name) for name in ("LIVER", "L_kidney", "Right Adrenal", "86", "heap")]
    ['liver', 'kidney_left', 'adrenal_gland_right', 'spleen', 'heap']
    """
    return _canonical_names().get(_plain(name), name)


def stand_in_notes() -> dict[str, str]:
    """What a structure that stands for another one is too much or too little, by its name.

    >>> stand_in_notes()["iliopsoas_left"]
    'the iliopsoas holds the iliacus as well'
    """
    noted = {row["alias"]: row["note"] for row in _aliases() if row["note"]}
    return {f"{alias}{side}": note for alias, note in noted.items() for side in _SIDES}


_SIDES = ("", "_left", "_right")


@cache
def _aliases() -> tuple[dict[str, str], ...]:
    return tuple(csv.DictReader(_data("aliases.csv")))


@cache
def _side_words() -> dict[str, str]:
    words = {row["alias"]: row["name"] for row in _aliases() if row["name"] in ("left", "right")}
    return {**words, "left": "left", "right": "right"}


@cache
def _canonical_names() -> dict[str, str]:
    """Every known name, plainly spelled -> the name itself."""
    structures = ClassTable.default().structures
    names = (*(s.name for s in structures), *totalsegmentator_names().values())
    known = {_plain(name): name for name in names}
    known |= {str(s.radlex): s.name for s in structures if s.radlex is not None}
    for row in _aliases():
        for side in _SIDES if not row["note"] else ():
            whole = known.get(_plain(row["name"] + side))
            if whole:
                known.setdefault(_plain(row["alias"] + side), whole)
    return known


def _plain(name: str) -> str:
    """Lower-case words, parted by underscores, the side last."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    words = re.findall(r"[^\W\d_]+\d*|\d+", parted)
    sides = [_side_words()[word] for word in words if word in _side_words()]
    if len(sides) != 1:
        return "_".join(words)
    return "_".join([*(word for word in words if word not in _side_words()), *sides])


def _data(name: str) -> list[str]:
    return (resources.files("organfast") / "data" / name).read_text("utf-8").splitlines()


@cache
def _packaged_table() -> ClassTable:
    return _parse_table("\n".join(_data("classes.csv")))


def _parse_table(text: str) -> ClassTable:
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise ValueError("it has no rows")
    structures = [_parse_row({k: v or "" for k, v in row.items() if k}) for row in rows]
    if structures[0].role != "background":
        structures.insert(0, ClassTable.default().structures[0])
    return ClassTable(_coloured(structures))


def _parse_row(row: Mapping[str, str]) -> Structure:
    def cell(column: str) -> str:
        return row.get(column, "").strip()

    colour = tuple(int(cell(channel) or _NO_COLOUR) for channel in ("red", "green", "blue"))
    return Structure(
        name=row["name"].strip(),
        role=cell("role") or "organ",  # type: ignore[arg-type]  # checked when built
        radlex=int(cell("radlex")) if cell("radlex") else None,
        side=cell("side"),
        mirror=cell("mirror"),
        snomed=cell("snomed"),
        totalsegmentator=tuple(cell("totalsegmentator").split()),
        rgb=colour,  # type: ignore[arg-type]  # three channels by construction
    )


def _unknown_structure(name: str, wanted: Sequence[str]) -> Structure:
    """A structure the default table does not know; ``_left``/``_right`` say its side."""
    for ending, other, side in (("_left", "_right", "L"), ("_right", "_left", "R")):
        if name.endswith(ending):
            partner = name.removesuffix(ending) + other
            mirror = partner if partner in wanted else ""
            return Structure(name, side=side, mirror=mirror, totalsegmentator=(name,))
    return Structure(name, totalsegmentator=(name,))


def _coloured(structures: Iterable[Structure]) -> tuple[Structure, ...]:
    """Give structures that still have the grey of "no colour" a hue of their own."""
    coloured = []
    for position, s in enumerate(structures):
        if s.rgb == (_NO_COLOUR, _NO_COLOUR, _NO_COLOUR):
            hue = (position * _GOLDEN_ANGLE) % 1.0
            red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, 0.9)
            s = replace(s, rgb=(round(red * 255), round(green * 255), round(blue * 255)))
        coloured.append(s)
    return tuple(coloured)
