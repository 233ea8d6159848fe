"""Files on object storage and the like, by their URLs: found, fetched, put. The one user of fsspec.

::

    s3://bucket/cases/a.nii.gz     gs://   abfs://   https://   sftp://user@host/   memory://   file://

A store has no folders, renames or locks to rely on: what it promises is that one file is read as it
was written, once it is there. What a URL holds of a user, a password or a signature opens it and is
shown nowhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from organfast.errors import InputError

__all__ = ["Store", "fetched", "find_urls", "is_url", "shown"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z][A-Za-z0-9+.-]*)*://")
_WEB = ("http://", "https://")
_MAGIC = re.compile(r"[*?[]")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"[?&]\S*")


def is_url(given: object) -> bool:
    """Whether a place is a URL, and no path of this machine's.

    Parameters
    ----------
    given : object
        A string or a path.

    >>> is_url("s3://bucket/cases"), is_url("cases/a.nii.gz")
    (True, False)
    """
    return isinstance(given, str) and _URL.match(given) is not None


def shown(given: object) -> str:
    """A place as it may be shown: a URL without its user, password and query, a path as it is.

    Parameters
    ----------
    given : str or PathLike
        A URL or a path.

    >>> shown("sftp://me:secret@host/a.nii.gz"), shown("https://host/a.nii.gz?sig=x")
    ('sftp://host/a.nii.gz', 'https://host/a.nii.gz')
    """
    text = str(given)
    return _without_query(_USER.sub("", text)) if is_url(given) else text


def fetched(url: str, folder: Path) -> Path:
    """Copy a file of a store into a folder, under its own name.

    Parameters
    ----------
    url : str
        Of the file.
    folder : Path
        Where it goes.

    Returns
    -------
    Path
        The copy.

    Raises
    ------
    InputError
        The file is not there or cannot be read, or the folder has no room for it.
    """
    local = folder / PurePosixPath(_without_query(url)).name
    with _errors_named(url):
        system, path = _opened(url)
        system.get_file(path, os.fspath(local))
    return local


def find_urls(url: str, endings: tuple[str, ...]) -> dict[str, str]:
    """The files of a folder or of a pattern on a store, or the file itself.

    Parameters
    ----------
    url : str
        A file, a folder, searched to the bottom, or a pattern with ``*``, ``?``, ``[...]`` or
        ``**``; with ``http`` no pattern, for there ``?`` begins a query.
    endings : tuple of str
        How files end that are taken from a folder; a URL that ends so is a file, and is not looked
        for yet.

    Returns
    -------
    dict of str to str
        Name -> URL, sorted; the name is the path inside the folder, or from the pattern's first
        ``*`` on.

    Raises
    ------
    InputError
        The store cannot be listed.
    """
    plain = _without_query(url)
    magic = None if url.startswith(_WEB) else _MAGIC.search(url)
    if magic is None and plain.endswith(endings):
        return {PurePosixPath(plain).name: url}
    base = url.rstrip("/") if magic is None else url[: magic.start()].rpartition("/")[0]
    base = f"{base}/" if base.endswith(":/") else base
    with _errors_named(url):
        system, path = _opened(url)
        root = _opened(base)[1].rstrip("/")
        system.invalidate_cache()
        if magic is None:
            files = [file for file in system.find(path) if file.endswith(endings) or file == path]
        else:
            matches = system.glob(path, detail=True)
            files = [name for name, entry in matches.items() if entry["type"] == "file"]
    if files == [path]:
        return {PurePosixPath(plain).name: url}
    inside = sorted(file[len(root) :].lstrip("/") for file in files)
    return {name: f"{base}/{name}" for name in inside}


@dataclass(frozen=True)
class Store:
    """A folder on a store, whose files are named from it on.

    Parameters
    ----------
    url : str
        Of the folder, which need not be there.
    """

    url: str = field(repr=False)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none.

        Raises
        ------
        InputError
            It is there and cannot be read.
        """
        with _errors_named(self.url):
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def read_all(self, folder: str) -> Iterator[bytes]:
        """The content of each file directly in a folder, some at a time.

        Raises
        ------
        InputError
            They cannot be listed or read.
        """
        names = self.names(folder)
        for start in range(0, len(names), _AT_ONCE):
            paths = [self._path(f"{folder}/{name}") for name in names[start : start + _AT_ONCE]]
            with _errors_named(self.url):
                # One that has just been removed is an error of its own, not of all.
                found = self._system.cat(paths, on_error="omit")
            yield from (bytes(found[path]) for path in sorted(found))

    def names(self, folder: str) -> list[str]:
        """Files below a folder, sorted; none where there is no folder.

        Raises
        ------
        InputError
            It cannot be listed.
        """
        path = self._path(folder)
        with _errors_named(self.url):
            self._system.invalidate_cache()
            try:
                files = self._system.find(path)
            except FileNotFoundError:
                return []
        return sorted(file[len(path) :].lstrip("/") for file in files if file != path)

    def write(self, name: str, content: bytes) -> None:
        """Write a file.

        Raises
        ------
        InputError
            It cannot be written.
        """
        path = self._path(name)
        with _errors_named(self.url):
            self._with_folder(path, lambda: self._system.pipe_file(path, content))

    def put(self, file: Path, name: str) -> None:
        """Copy a file of this machine.

        Raises
        ------
        InputError
            It cannot be written.
        """
        path = self._path(name)
        with _errors_named(self.url):
            self._with_folder(path, lambda: self._system.put_file(os.fspath(file), path))

    def get(self, name: str, file: Path) -> bool:
        """Copy a file to this machine; False where there is none.

        Raises
        ------
        InputError
            It is there and cannot be read.
        """
        with _errors_named(self.url):
            try:
                self._system.get_file(self._path(name), os.fspath(file))
            except FileNotFoundError:
                return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is as good.

        Raises
        ------
        InputError
            They cannot be removed.
        """
        for name in names:
            with _errors_named(self.url):
                try:
                    self._system.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        system, path = _opened(self.url)
        return system, path.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._opened[0]

    def _path(self, name: str) -> str:
        with _errors_named(self.url):
            return f"{self._opened[1]}/{name}"

    def _with_folder(self, path: str, write: Callable[[], object]) -> None:
        """Write; where a store has folders of its own, the one to write to is made first."""
        try:
            write()
        except FileNotFoundError:
            # A bucket is not made by a slip of the pen.
            if not self._system.exists(path.split("/")[0] or "/"):
                raise
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            write()


# Small files that are asked for together, and held.
_AT_ONCE = 1000


def _without_query(url: str) -> str:
    return url.partition("?")[0] if url.startswith(_WEB) else url


def _without_secrets(text: str, url: str) -> str:
    """What a store's package says, without what a URL holds of a user, a password, a signature."""
    user = _USER.search(url)
    query = url.partition("?")[2]
    given = [] if user is None else [user[0], *user[0][:-1].split(":", 1)[1:]]
    for secret in filter(None, [*given, *map(unquote, given), query]):
        text = text.replace(secret, "")
    return _QUERY.sub("", _USER.sub("", text))


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's path in it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise _missing(url, "organfast[cluster]") from None
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise _missing(url, _package_of(url, error)) from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        protocol = url.partition(":")[0]
        raise InputError(
            shown(url), f"is of a kind that fsspec does not know ({protocol})", "check the URL"
        ) from None
    return system, str(path)


def _package_of(url: str, error: ImportError) -> str:
    """What pip calls the package that a URL's file system is in, or needs."""
    from fsspec.registry import known_implementations

    home = str(known_implementations[url.partition(":")[0]]["class"]).partition(".")[0]
    needed = getattr(error.__cause__, "name", None)
    return str(needed or home) if home == "fsspec" else home


def _missing(url: str, package: str) -> InputError:
    name = "fsspec" if package.startswith("organfast") else package
    return InputError(
        shown(url), f"needs {name}, which is not installed here", f"pip install '{package}'"
    )


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
    """Whatever a store says, in one line without secrets."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(shown(url), "does not exist", "check the name") from error
    except PermissionError as error:
        remedy = "check the credentials, which its own package reads"
        raise InputError(shown(url), "may not be used like this", remedy) from error
    # Each store's package has errors of its own, with no ancestor but this; no code of ours is
    # within but calls of the store.
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        said = _without_secrets(" ".join(reason.split()), url)[:200]
        problem = f"cannot be used ({said or type(error).__name__})"
        remedy = "check the URL, the network and the credentials"
        raise InputError(shown(url), problem, remedy) from error
