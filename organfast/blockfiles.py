"""Blocks that were cut out already: one CSV per patient, without a header.

::

    58,-12,7,31,...      RadLex id, then 33 x 33 or 63 x 63 pixels, row by row
    86,104,99,97,...     as HU, or as grey levels from 0 to 255

A file without any number outside 0..255 holds grey levels. They were made of HU by::

    grey = trunc((clip(hu, -1023, 2976) + 1023) / 3999 * 255)

so that each stands for 15.7 HU; read back it is the middle of these. A file does not say which way
its rows run: they are taken to run as organfast's, posterior to anterior, left to right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, canonical_name
from organfast.cases import BlockFile, Case, list_folder
from organfast.errors import InputError

__all__ = [
    "ROWS_NOTE",
    "Blocks",
    "block_size",
    "classes_in",
    "find_block_files",
    "hu_of_grey",
    "read_blocks",
]

SIZES = (33, 63)
"""Sides of a block, pixels."""
ROWS_NOTE = (
    "block files do not say which way their rows run: they were taken to run posterior to "
    "anterior, left to right; on a scan a model of other rows is worthless"
)

_COLUMNS = {1 + size**2: size for size in SIZES}
_LOWEST, _HIGHEST, _GREYS = -1023, 2976, 255
_LEFT_OUT = -1
# Tables of a dataset that are no blocks.
_TABLES = ("labels.csv", "patients.csv")
_LINES_AT_ONCE = 2048
_FIRST_BYTES = 1 << 16
_REMEDY = "give a RadLex id and 33 x 33 or 63 x 63 pixels in each line"

Lines = list[tuple[int, str]]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one file whose structures a class table has.

    Parameters
    ----------
    hu : (n, size, size) int16, HU
        Pixels, rows first.
    labels : (n,) int64
        Their classes.
    is_grey : bool
        Whether the file holds grey levels.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.int64]
    is_grey: bool

    @property
    def size(self) -> int:
        """Side of a block, pixels."""
        return int(self.hu.shape[1])


def find_block_files(
    folder: Path, *, surely: bool = False
) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """The block files of a folder, one patient each; of a few of them the first line is read.

    Parameters
    ----------
    folder : Path
        Root of the dataset.
    surely : bool
        Take every ``.csv`` for one. Else all of them are where one begins as a block does.

    Returns
    -------
    cases : tuple of Case
        By name.
    skipped : tuple of str
        Always empty.

    Raises
    ------
    InputError
        The folder cannot be listed.
    """
    list_folder(folder)  # names the folder in its error
    names = sorted(n for n in os.listdir(folder) if n.endswith(".csv") and n not in _TABLES)
    paths = [folder / name for name in names if not name.startswith(".")]
    if not (surely or any(map(_begins_with_a_block, paths))):
        return (), ()
    return tuple(Case(p.stem, p.stem, p, BlockFile(p)) for p in paths), ()


def block_size(path: Path) -> int:
    """Side of the blocks of a file, by its first line.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    InputError
        The file cannot be read, holds no block, or one of another size than 33 or 63.
    """
    for lines in _lines(path, 1):
        return _size(path, *lines[0])
    raise InputError(path, "holds no block", _REMEDY)


def hu_of_grey(grey: NDArray[Any]) -> NDArray[np.int16]:
    """The middle of the HU that became a grey level.

    Parameters
    ----------
    grey : array
        0..255.

    Returns
    -------
    int16 array, HU
        Same shape; 255 is 2976, the only HU that became it.

    >>> hu_of_grey(np.array([0, 65, 255])).tolist()
    [-1015, 4, 2976]
    """
    width = (_HIGHEST - _LOWEST) / _GREYS
    middle = _LOWEST + (np.asarray(grey, np.float64) + 0.5) * width
    hu: NDArray[np.int16] = np.rint(np.minimum(middle, _HIGHEST)).astype(np.int16)
    return hu


def classes_in(cases: Sequence[Case]) -> ClassTable:
    """The classes of the default table that the blocks of some files have, and the background.

    Parameters
    ----------
    cases : sequence of Case
        Of ``find_block_files``; of each line the first column is read.

    Raises
    ------
    InputError
        A file cannot be read, or names something else than the table's structures.
    """
    classes = ClassTable.default()
    found: set[str] = set()
    for case in cases:
        for lines in _lines(case.image):
            ids = [_radlex(case.image, number, line.partition(",")[0]) for number, line in lines]
            labels = _labels_of(case.image, ids, [number for number, _ in lines], classes)
            found |= {classes.names[label] for label in set(labels.tolist())}
    return classes.keep(found)


def read_blocks(path: Path, classes: ClassTable) -> Blocks:
    """Read a block file.

    Parameters
    ----------
    path : Path
        The file.
    classes : ClassTable
        Blocks of what it does not have, but the default table has, are left out.

    Raises
    ------
    InputError
        The file cannot be read, holds no block, mixes sizes, or a line is not a RadLex id of a
        known structure and so many pixels. File and line are named.
    """
    hu, labels, size, is_grey = [], [], 0, True
    for lines in _lines(path):
        size = size or _size(path, *lines[0])
        table = _table(path, lines, 1 + size**2)
        ids = [_radlex(path, number, line.partition(",")[0]) for number, line in lines]
        of_lines = _labels_of(path, ids, [number for number, _ in lines], classes)
        is_grey = is_grey and bool((table[:, 1:] >= 0).all() and (table[:, 1:] <= _GREYS).all())
        kept = of_lines != _LEFT_OUT
        hu.append(np.rint(table[kept, 1:]).astype(np.int16).reshape(-1, size, size))
        labels.append(of_lines[kept])
    if not size:
        raise InputError(path, "holds no block", _REMEDY)
    pixels = np.concatenate(hu)
    return Blocks(hu_of_grey(pixels) if is_grey else pixels, np.concatenate(labels), is_grey)


# --- lines ----------------------------------------------------------------------------------------


def _lines(path: Path, n_at_once: int = _LINES_AT_ONCE) -> Iterator[Lines]:
    """Some lines at a time with their numbers, from 1; blank ones are passed over."""
    try:
        with open(path, encoding="ascii") as file:
            numbered = ((n, line) for n, line in enumerate(file, 1) if line.strip())
            while lines := list(islice(numbered, n_at_once)):
                yield lines
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", _REMEDY) from None


def _begins_with_a_block(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            cells = file.readline(_FIRST_BYTES).split(b",")
    except OSError:
        return False
    return len(cells) in _COLUMNS and cells[0].strip().isdigit()


def _size(path: Path, number: int, line: str) -> int:
    n_columns = line.count(",") + 1
    if n_columns not in _COLUMNS:
        raise InputError(
            path,
            f"has {n_columns} columns in line {number}, not {' or '.join(map(str, _COLUMNS))}",
            _REMEDY,
        )
    return _COLUMNS[n_columns]


def _table(path: Path, lines: Lines, n_columns: int) -> NDArray[np.float32]:
    """(n_lines, n_columns) finite numbers that int16 can hold."""
    texts = [line for _, line in lines]
    try:
        table = np.loadtxt(texts, np.float32, comments=None, delimiter=",", ndmin=2)
    except ValueError:
        table = np.empty((0, 0), np.float32)
    if table.shape != (len(lines), n_columns) or not (np.abs(table[:, 1:]) < 2**15).all():
        faults = (_fault(path, *line, n_columns) for line in lines)
        raise next(filter(None, faults), InputError(path, "holds what is no number", _REMEDY))
    return table


def _fault(path: Path, number: int, line: str, n_columns: int) -> InputError | None:
    """What is wrong with a line, if anything is."""
    cells = line.rstrip("\r\n").split(",")
    if len(cells) != n_columns:
        others = "other blocks of the file have"
        problem = f"has {len(cells)} columns in line {number}, where {others} {n_columns}"
        return InputError(path, problem, "leave one size of blocks in a file")
    for column, cell in enumerate(cells, 1):
        where = f"in line {number}, column {column}"
        try:
            value = float(cell)
        except ValueError:
            return InputError(path, f"holds {cell.strip()!r} {where}, which is no number", _REMEDY)
        if not abs(value) < 2**15 and column > 1:
            return InputError(path, f"holds {value:g} {where}, which is no HU", _REMEDY)
    return None


def _radlex(path: Path, number: int, cell: str) -> int:
    try:
        value = float(cell)
        if value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        problem = f"begins line {number} with {cell.strip()[:20]!r}, which is no RadLex id"
        raise InputError(path, problem, _REMEDY) from None
    return int(value)


def _labels_of(
    path: Path, ids: Sequence[int], numbers: Sequence[int], classes: ClassTable
) -> NDArray[np.int64]:
    """Class of each id; what only the default table knows is left out."""
    by_name = {canonical_name(s.name): label for label, s in enumerate(classes.structures)}
    known = {s.radlex: by_name.get(s.name, _LEFT_OUT) for s in ClassTable.default().structures}
    known |= {s.radlex: label for label, s in enumerate(classes.structures) if s.radlex is not None}
    for id_, number in zip(ids, numbers, strict=True):
        if id_ not in known:
            raise InputError(
                path,
                f"begins line {number} with the RadLex id {id_}, of no structure that is known",
                "use the ids of the default class table, or give a table that has it",
            )
    return np.array([known[id_] for id_ in ids], np.int64)
