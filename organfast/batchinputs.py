"""The scans that a batch is given, as folders, lists and patterns, each under a name of its own.

::

    archive/         archive/b/ct.nii.gz     input b/ct.nii.gz     output b
    archive/*/ct.*   archive/b/ct.nii.gz     input b/ct.nii.gz     output b
    scans.txt        ../far/b/x.nii.gz       input x.nii.gz        output x   (below what all share)
    x.nii.gz                                 input x.nii.gz        output x
    s3://bucket/archive                      as archive/ above, NIfTI files and zips of DICOM

A name is relative and never leads out of the output folder; two scans never have one.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path, PurePosixPath

from organfast.errors import InputError, is_whole
from organfast.files import check_is_file
from organfast.layouts import find_scans, is_no_scan, scan_name
from organfast.ledger import RESERVED, key_of
from organfast.remote import find_urls, is_url, shown

__all__ = ["BatchInput", "find_inputs", "is_in_shard", "parse_shard"]

_MAGIC = re.compile(r"[*?[]")
# What is a scan on a store: a file. A folder of DICOM files is many.
_ENDINGS = (".nii", ".nii.gz", ".zip")


@dataclass(frozen=True)
class BatchInput:
    """A scan of a batch.

    Parameters
    ----------
    name : str
        Its path inside what was given, with ``/``; records are known and sorted by it.
    output : str
        Where its result goes, inside the output folder.
    path : str
        Where it is read: a path or a URL.
    """

    name: str
    output: str
    # A URL may hold a password, and Dask logs what it was given.
    path: str = field(repr=False)

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.output).parts
        if not parts or self.output.startswith("/") or ".." in parts or parts[0] in RESERVED:
            raise InputError(
                self.shown, f"has no usable name ({self.output!r})", "rename it, or give its folder"
            )

    @property
    def shown(self) -> str:
        """Where it is read, as it may be shown."""
        return shown(self.path)


def find_inputs(
    given: Iterable[str | PathLike[str]] | str | PathLike[str], out: str | PathLike[str]
) -> tuple[BatchInput, ...]:
    """The scans of folders, lists, patterns and files, sorted by name.

    Parameters
    ----------
    given : path or iterable of paths
        A folder, searched with all its sub-folders; a ``.txt`` file with a path on each line,
        relative to the list, empty lines and those that begin with ``#`` left out; a pattern with
        ``*``, ``?``, ``[...]`` or ``**``; or a scan. A folder and a pattern leave out hidden files
        and label maps, masks and results by their names. A URL may be of any of
        these but a list, which may hold URLs.
    out : str or PathLike
        The output folder, which the errors name.

    Raises
    ------
    InputError
        A folder or a list cannot be read or names no scan, a pattern matches none, a name cannot be
        used.
    ValueError
        Two scans would have one result, or one result would lie in another.
    """
    each = [given] if isinstance(given, (str, PathLike)) else list(given)
    inputs = [found for one in each for found in _find(fspath(one))]
    _check_apart(inputs, shown(out))
    return tuple(sorted(inputs, key=lambda found: found.name))


def parse_shard(text: str) -> tuple[int, int]:
    """The i and N of ``i/N``.

    Parameters
    ----------
    text : str
        Such as ``2/8``: the second of eight.

    Raises
    ------
    ValueError
        It is something else, or i is not from 1 to N.

    >>> parse_shard("2/8")
    (2, 8)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = (int(match[1]), int(match[2])) if match else None
    if shard is None or not is_whole(shard[0], 1) or shard[0] > shard[1]:
        raise ValueError(f"the shard {text} is not i/N with i from 1 to N; give such as 1/4")
    return shard


def is_in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether a scan belongs to a shard: by its name alone, whatever other scans there are.

    Parameters
    ----------
    name : str
        The scan's.
    shard : (i, N)
        The i-th of N, from 1: SHA-256 of the name in UTF-8, its first 32 hexadecimal digits as a
        number, modulo N is i - 1.
    """
    i, n = shard
    return int(key_of(name), 16) % n == i - 1


def _find(given: str) -> list[BatchInput]:
    if is_url(given):
        return _at_url(given)
    path = Path(given)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() == ".txt":
        return _in_list(path)
    if _MAGIC.search(given) and not path.exists():
        return _matching(given)
    return [BatchInput(Path(file).name, name, str(file)) for name, file in find_scans(path).items()]


def _in_folder(folder: Path) -> list[BatchInput]:
    found = []
    for name, file in find_scans(folder).items():
        is_inside = file != folder and file.is_relative_to(folder)
        inside = file.relative_to(folder).as_posix() if is_inside else name
        found.append(BatchInput(inside, name, str(file)))
    return found


def _in_list(path: Path) -> list[BatchInput]:
    try:
        check_is_file(path, "give a list", "a list")
        lines = path.read_text("utf-8", errors="surrogateescape").splitlines()
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the name") from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "give a list") from None
    names = [line.strip() for line in lines]
    urls = [name for name in names if is_url(name)]
    if urls:
        return _below_one_url(path, urls, [n for n in names if n and not n.startswith("#")])
    paths = [path.parent / name for name in names if name and not name.startswith("#")]
    if not paths:
        raise InputError(path, "names no scan", "give a path on each line")
    return _below_one([p for given in paths for p in find_scans(given).values()], path.parent)


def _at_url(url: str) -> list[BatchInput]:
    found = []
    for name, file in find_urls(url, _ENDINGS).items():
        inside = PurePosixPath(name)
        is_ours = not any(part.startswith(".") for part in inside.parts)
        if file == url or (is_ours and not is_no_scan(inside)):
            found.append(BatchInput(name, _output(inside), file))
    if not found:
        kinds = ", ".join(_ENDINGS)
        raise InputError(
            shown(url), "holds no scan", f"give files that end in {kinds}, or a pattern in quotes"
        )
    return found


def _below_one_url(path: Path, urls: Sequence[str], names: Sequence[str]) -> list[BatchInput]:
    """URLs of a list, named from the folder on that all of them share."""
    if len(urls) < len(names):
        raise InputError(path, "names paths and URLs", "make a list of each")
    base = os.path.commonpath([PurePosixPath(shown(url)).parent for url in urls])
    found = []
    for url in urls:
        inside = PurePosixPath(shown(url)).relative_to(base)
        found.append(BatchInput(inside.as_posix(), _output(inside), url))
    return found


def _output(inside: PurePosixPath) -> str:
    return scan_name(inside.with_suffix("") if inside.suffix == ".zip" else inside)


def _matching(pattern: str) -> list[BatchInput]:
    fixed = Path(pattern[: _MAGIC.search(pattern).start()] + "x").parent  # type: ignore[union-attr]
    seen: dict[str, Path] = {}
    for match in sorted(glob.glob(pattern, recursive=True), key=lambda m: (len(m), m)):
        file = Path(match)
        if not (file.is_file() and is_no_scan(file)):
            seen.setdefault(os.path.realpath(file), file)  # ** follows links, also in circles
    if not seen:
        raise InputError(pattern, "matches no scan", "check the pattern, and put it in quotes")
    files = [p for match in seen.values() for p in find_scans(match).values()]
    return _below_one(list(dict.fromkeys(files)), fixed)


def _below_one(paths: Sequence[Path], folder: Path) -> list[BatchInput]:
    """Named from a folder on, or, where some lie outside of it, from the one that all share."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    base = Path(os.path.abspath(folder))
    if not all(path.is_relative_to(base) for path in absolute):
        base = Path(os.path.commonpath([path.parent for path in absolute]))
    found = []
    for path, whole in zip(paths, absolute, strict=True):
        inside = whole.relative_to(base)
        found.append(BatchInput(inside.as_posix(), scan_name(inside), str(path)))
    return found


def _check_apart(inputs: Sequence[BatchInput], out: str) -> None:
    taken: dict[PurePosixPath, str] = {}
    for one in inputs:
        if PurePosixPath(one.output) in taken:
            raise ValueError(f"two scans are called {one.output}; segment them into two folders")
        taken[PurePosixPath(one.output)] = one.shown
    for output in taken:
        around = next((folder for folder in output.parents if folder in taken), None)
        if around is not None:
            raise ValueError(f"the result {out}/{output} would lie in that of {taken[around]}")
    known: dict[str, str] = {}
    for one in inputs:
        if one.name in known:
            raise ValueError(f"two scans are called {one.name}; segment them into two folders")
        known[one.name] = one.shown
