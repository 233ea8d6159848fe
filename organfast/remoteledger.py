"""What a batch leaves on object storage about its scans: the records of a ledger, by another order.

::

    URL/
      deep/a/...                    files of a result, put one after the other
      batch.jsonl   timings.jsonl   as in a folder
      .batch/records/KEY.json       put last: with it, and if its digests hold, a scan is finished
      .batch/timings/KEY.json
      .batch/inputs.json

A store has no rename of a folder and no lock. So the record of an earlier result goes first, the
files come, and the new record is last: whatever ends the work in between leaves a scan without a
record, or one whose digests do not hold, and it is done again. Two runs at the same time do not see
each other: both segment the scan. Runs with the same model and settings put the same bytes; of runs
with different ones the digests of neither may hold, and the next run sets that right.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from organfast.errors import InputError
from organfast.ledger import Claim, as_line, key_of, parsed, sorted_records, tree_digests
from organfast.remote import Store, shown
from organfast.results import is_of_results

__all__ = ["RemoteLedger"]

_TIMINGS = "timings.json"


@dataclass(frozen=True)
class RemoteLedger:
    """The records of a batch in its output folder on a store; see ``organfast.ledger.Ledger``.

    Parameters
    ----------
    url : str
        Of the output folder.
    scratch : str or None
        Where what is on its way lies meanwhile; None is the system's temporary folder.
    """

    url: str = field(repr=False)
    scratch: str | None = None

    @cached_property
    def _store(self) -> Store:
        return Store(self.url)

    @property
    def is_there(self) -> bool:
        """Whether a batch has been here."""
        return self._store.read(".batch/inputs.json") is not None

    def where(self, output: str) -> str:
        """The place of a result, as errors name it."""
        return f"{shown(self.url).rstrip('/')}/{output}"

    def open(self, names: Iterable[str]) -> None:
        """Note what there is to do.

        Raises
        ------
        InputError
            The output cannot be written to.
        """
        text = json.dumps(sorted(names), indent=1)
        self._write("inputs.json", text + "\n")

    def claim(self, name: str) -> Claim:
        """A folder to work on a scan in."""
        return Claim(name, Path(tempfile.mkdtemp(prefix="organfast-", dir=self.scratch)), None)

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a scan; None where there is none that can be read."""
        found = parsed(self._store.read(f".batch/records/{key_of(name)}.json"))
        return found if isinstance(found, dict) else None

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether the files of a record's result are there, all of them, as they were written."""
        output = record["output"]
        if set(self._store.names(output)) - {_TIMINGS} != set(record["files"]):
            return False
        with tempfile.TemporaryDirectory(prefix="organfast-", dir=self.scratch) as folder:
            for name in record["files"]:
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                if not self._store.get(f"{output}/{name}", file):
                    return False
            return bool(tree_digests(Path(folder)) == record["files"])

    def check_place(self, output: str, record: Mapping[str, Any] | None) -> None:
        """Refuse a result's place that holds anything but what a batch has put there.

        Raises
        ------
        InputError
            It does, or cannot be listed.
        """
        files = set(self._store.names(output))
        known = {_TIMINGS} if record is None else {*record["files"], _TIMINGS}
        # Without a record they may be what an interrupted run has put.
        if not is_of_results(PurePosixPath(name).parts[0] for name in files - known):
            raise InputError(
                self.where(output), "is a folder that holds other files", "give a new or empty one"
            )

    def content(self, output: str, name: str) -> bytes:
        """A file of a result.

        Raises
        ------
        InputError
            It is not there or cannot be read.
        """
        found = self._store.read(f"{output}/{name}")
        if found is None:
            raise InputError(f"{self.where(output)}/{name}", "does not exist", "segment it again")
        return found

    def finish(self, claim: Claim, result: Path, output: str) -> dict[str, str]:
        """Put the files of a result in their place; their digests.

        Raises
        ------
        InputError
            They cannot be put there.
        """
        files = tree_digests(result)
        earlier = set(self._store.names(output))
        self._store.remove([f".batch/records/{key_of(claim.name)}.json"])
        for name in sorted({*files, _TIMINGS}):
            if (result / name).exists():
                self._store.put(result / name, f"{output}/{name}")
        self._store.remove(f"{output}/{name}" for name in earlier - {*files, _TIMINGS})
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
        if timings is None:
            self._store.remove([f".batch/timings/{name}"])
        else:
            self._write(f"timings/{name}", as_line(timings))
        self._write(f"records/{name}", as_line(record))

    def records(self) -> list[dict[str, Any]]:
        """All records that there are, sorted by input."""
        return sorted_records(self._store.read_all(".batch/records"))

    def inputs(self) -> list[str]:
        """Names of the scans that the last call was given."""
        found = parsed(self._store.read(".batch/inputs.json"))
        return found if isinstance(found, list) else []

    def gather(self, records: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Write ``batch.jsonl`` and ``timings.jsonl`` of all records, or of those given.

        Raises
        ------
        InputError
            They cannot be written.
        """
        lines = self.records() if records is None else records
        timings = sorted_records(self._store.read_all(".batch/timings"))
        for name, content in (("batch.jsonl", lines), ("timings.jsonl", timings)):
            text = "".join(map(as_line, content))
            self._store.write(name, text.encode("utf-8", "surrogateescape"))

    def _write(self, name: str, text: str) -> None:
        self._store.write(f".batch/{name}", text.encode("utf-8", "surrogateescape"))
