"""What a batch leaves on disk about its scans: records, locks and digests.

::

    OUT/
      deep/a/...                    a result per scan, put in its place by one rename
      batch.jsonl   timings.jsonl   the records of all scans sorted by input; times, apart
      .batch/records/KEY.json       a record per scan, whose rename is when the scan is finished
      .batch/timings/KEY.json
      .batch/work/KEY/              what is being written: of no worth once the lock is free
      .batch/locks/KEY              locked by who works on the scan; freed by the system
      .batch/inputs.json            names of all scans that the last call was given

KEY is made of the scan's name alone. A record and what it tells of can be believed after a crash:
files are forced to disk before the rename that shows them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from organfast.errors import InputError
from organfast.nifti import file_digest
from organfast.results import check_target, swap

__all__ = [
    "RESERVED",
    "Claim",
    "Ledger",
    "as_line",
    "failure",
    "input_digest",
    "key_of",
    "parsed",
    "sorted_records",
    "tree_digests",
    "unwritable",
]

RESERVED = (".batch", "batch.jsonl", "timings.jsonl")
"""Names in the output folder that are no scan's."""
_TIMINGS = "timings.json"


def key_of(name: str) -> str:
    """What the files of a scan's record are called: 32 hexadecimal digits.

    Parameters
    ----------
    name : str
        The scan's, as in its record's ``input``.
    """
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def tree_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but its timings, by name, sorted.

    Parameters
    ----------
    folder : Path
        Of a result.

    Raises
    ------
    InputError
        A file cannot be read.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    return {name: file_digest(folder / name) for name in paths if name != _TIMINGS}


def input_digest(path: str | PathLike[str]) -> str:
    """SHA-256 of a scan's file; of a folder, of the digests of its files, sorted, in a row.

    Parameters
    ----------
    path : str or PathLike
        A file or a folder, or one with ``#N`` for what it holds of several series.

    Raises
    ------
    InputError
        It cannot be read.
    """
    whole = Path(path)
    if not whole.exists() and "#" in whole.name:
        whole = whole.with_name(whole.name.rpartition("#")[0])
    if not whole.is_dir():
        return file_digest(whole)
    digests = sorted(file_digest(file) for file in whole.iterdir() if file.is_file())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def failure(
    name: str, output: str, how: Mapping[str, Any], error: str, digest: str | None = None
) -> dict[str, Any]:
    """The record of a scan that could not be segmented.

    Parameters
    ----------
    name, output : str
        Of the scan and of where its result would be.
    how : mapping
        Version, model and parameters.
    error : str
        Why, in one line.
    digest : str, optional
        Of the scan, where it could be read.
    """
    start = {"input": name, "output": output, "input_sha256": digest}
    return {**start, **how, "files": {}, "warnings": [], "error": error}


def as_line(content: Mapping[str, Any]) -> str:
    """A record as a line of JSON.

    Parameters
    ----------
    content : mapping
        The record.
    """
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def parsed(content: bytes | None) -> Any:
    """The JSON of a file's content; None of none and of what is damaged.

    Parameters
    ----------
    content : bytes or None
        Of the file.
    """
    try:
        return None if content is None else json.loads(content.decode("utf-8", "surrogateescape"))
    except ValueError:
        return None


def sorted_records(contents: Iterable[bytes]) -> list[dict[str, Any]]:
    """Records of the contents of their files, sorted by input; damaged ones left out.

    Parameters
    ----------
    contents : iterable of bytes
        Of the files.
    """
    found = (parsed(content) for content in contents)
    return sorted((r for r in found if isinstance(r, dict)), key=lambda r: str(r["input"]))


def unwritable(path: str | PathLike[str], error: OSError) -> InputError:
    """The error of what could not be written.

    Parameters
    ----------
    path : str or PathLike
        What was to be written.
    error : OSError
        Why not.
    """
    reason = error.strerror or str(error)
    return InputError(path, f"cannot be written ({reason})", "give a folder with room to write in")


@dataclass(frozen=True, eq=False)
class Claim:
    """A scan that this process works on, and no other as long as it is not released.

    Parameters
    ----------
    name : str
        The scan's.
    work : Path
        A folder for what is being written; it need not exist.
    descriptor : int or None
        Of the locked file; None on a store without locks, where another process may have it, too.
    """

    name: str
    work: Path
    descriptor: int | None

    def release(self) -> None:
        """Remove what was not put in its place, and let others work on the scan."""
        shutil.rmtree(self.work, ignore_errors=True)
        if self.descriptor is not None:
            os.close(self.descriptor)


@dataclass(frozen=True)
class Ledger:
    """The records of a batch in its output folder.

    Parameters
    ----------
    out : Path
        The output folder.
    """

    out: Path

    @property
    def folder(self) -> Path:
        """Where everything is that is not a result."""
        return self.out / ".batch"

    @property
    def is_there(self) -> bool:
        """Whether a batch has been here."""
        return self.folder.is_dir()

    def where(self, output: str) -> str:
        """The place of a result, as errors name it."""
        return os.fspath(self.out / output)

    def open(self, names: Iterable[str]) -> None:
        """Make the folders, note what there is to do, and remove what dead processes left.

        Raises
        ------
        InputError
            The output folder cannot be written to.
        """
        try:
            for part in ("records", "timings", "work", "locks"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            for left in (self.folder / "work").iterdir():
                claim = self._claim(left.name, left.name)
                if claim is not None:
                    claim.release()
            with self._turn():
                text = json.dumps(sorted(names), indent=1)
                self._replace(self.folder / "inputs.json", text + "\n")
        except OSError as error:
            raise unwritable(self.out, error) from None

    def claim(self, name: str) -> Claim | None:
        """The right to work on a scan; None where another process has it.

        Raises
        ------
        InputError
            The lock cannot be made.
        """
        try:
            claim = self._claim(key_of(name), name)
        except OSError as error:
            raise unwritable(self.out, error) from None
        if claim is not None:
            shutil.rmtree(claim.work, ignore_errors=True)
        return claim

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a scan; None where there is none that can be read."""
        found = _read(self.folder / "records" / f"{key_of(name)}.json")
        return found if isinstance(found, dict) else None

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the files of a record's result are there, all of them, as they were written."""
        place = self.out / record["output"]
        try:
            return place.is_dir() and bool(tree_digests(place) == record["files"])
        except InputError:
            return False

    def check_place(self, output: str, record: Mapping[str, Any] | None) -> None:
        """Refuse a result's place that holds anything but what a batch has put there.

        Raises
        ------
        InputError
            It does, or cannot be written to.
        """
        place = self.out / output
        files = {path.relative_to(place).as_posix() for path in _files(place)}
        if record is None or not files <= {*record["files"], _TIMINGS}:
            check_target(place)

    def content(self, output: str, name: str) -> bytes:
        """A file of a result.

        Raises
        ------
        InputError
            It cannot be read.
        """
        path = self.out / output / name
        try:
            return path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(path, f"cannot be read ({reason})", "segment it again") from None

    def finish(self, claim: Claim, result: Path, output: str) -> dict[str, str]:
        """Put a result, which lies in the claim's folder, in its place; the digests of its files.

        Raises
        ------
        InputError
            It cannot be put there.
        """
        target = self.out / output
        # A link goes on pointing at the result.
        place = Path(os.path.realpath(target)) if target.is_symlink() else target
        try:
            _settle(result)
            files = tree_digests(result)
            place.parent.mkdir(parents=True, exist_ok=True)
            swap(result, place)
            _sync(place.parent)
        except OSError as error:
            raise unwritable(target, error) from None
        return files

    def write(
        self, claim: Claim, record: Mapping[str, Any], timings: Mapping[str, Any] | None = None
    ) -> None:
        """Write the record of a scan, and apart how long it took.

        Raises
        ------
        InputError
            They cannot be written.
        """
        name = f"{key_of(claim.name)}.json"
        try:
            claim.work.mkdir(exist_ok=True)
            for kind, content in (("timings", timings), ("records", record)):
                path = self.folder / kind / name
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    self._replace(path, as_line(content), claim.work / kind)
        except OSError as error:
            raise unwritable(self.out, error) from None

    def records(self) -> list[dict[str, Any]]:
        """All records that there are, sorted by input."""
        return self._all("records")

    def inputs(self) -> list[str]:
        """Names of the scans that the last call was given."""
        found = _read(self.folder / "inputs.json")
        return found if isinstance(found, list) else []

    def gather(self, records: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Write ``batch.jsonl`` and ``timings.jsonl`` of all records, or of those given.

        Raises
        ------
        InputError
            They cannot be written.
        """
        try:
            # Who comes last has seen every record that was there when the others wrote.
            with self._turn():
                lines = self.records() if records is None else records
                for name, content in (
                    ("batch.jsonl", lines),
                    ("timings.jsonl", self._all("timings")),
                ):
                    self._replace(self.out / name, "".join(map(as_line, content)))
        except OSError as error:
            raise unwritable(self.out, error) from None

    def _claim(self, key: str, name: str) -> Claim | None:
        descriptor = os.open(self.folder / "locks" / key, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        return Claim(name, self.folder / "work" / key, descriptor)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time, for moments; others wait."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, path: Path, text: str, beside: Path | None = None) -> None:
        """Write a file whole or not at all; who calls sees to it that nobody else does."""
        beside = beside or self.folder / f"{path.name}.part"
        try:
            with open(beside, "wb") as file:
                file.write(text.encode("utf-8", "surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            with suppress(OSError):
                beside.unlink()
        _sync(path.parent)

    def _all(self, kind: str) -> list[dict[str, Any]]:
        folder = self.folder / kind
        paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
        found = (_bytes(path) for path in paths)
        return sorted_records(content for content in found if content is not None)


# --- files ----------------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _settle(folder: Path) -> None:
    """Force a folder and everything in it to disk."""
    for path in _files(folder):
        _sync(path)
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> Any:
    """JSON of a file; None where it is not there or damaged, which counts as not finished."""
    return parsed(_bytes(path))


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
