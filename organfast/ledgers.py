"""The ledger of an output, wherever that lies; and several of them taken together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from organfast.errors import InputError
from organfast.ledger import Ledger
from organfast.remote import is_url, shown
from organfast.remoteledger import RemoteLedger

__all__ = ["Merged", "ledger_of", "merge"]


def ledger_of(
    out: str | PathLike[str], scratch: str | PathLike[str] | None = None
) -> Ledger | RemoteLedger:
    """The records of a batch in its output folder.

    Parameters
    ----------
    out : str or PathLike
        A folder, or the URL of one.
    scratch : str or PathLike, optional
        Where what is on its way to a URL lies meanwhile; the system's temporary folder by default.
    """
    if is_url(out):
        return RemoteLedger(str(out), None if scratch is None else str(scratch))
    return Ledger(Path(out))


@dataclass(frozen=True)
class Merged:
    """What one or several output folders hold, taken together.

    Parameters
    ----------
    records : tuple of dict
        Of each scan once, sorted by input.
    missing : tuple of str
        Scans that a run was given and that have no record, sorted.
    """

    records: tuple[dict[str, Any], ...]
    missing: tuple[str, ...]

    @property
    def failed(self) -> tuple[dict[str, Any], ...]:
        """Records of scans that could not be segmented."""
        return tuple(record for record in self.records if record["error"] is not None)


def merge(folders: Sequence[str | PathLike[str]]) -> Merged:
    """Make one ``batch.jsonl``, sorted by input, of the records of several output folders.

    It is written into the first of them; results stay where they are. Of a scan that failed in one
    folder and not in another, the success counts.

    Parameters
    ----------
    folders : sequence of str or PathLike
        Output folders of batches or their URLs, such as the shards of one; a single one, too.

    Raises
    ------
    InputError
        A folder is none of a batch, two of them have different results of one scan, or the file
        cannot be written.
    """
    found: dict[str, dict[str, Any]] = {}
    given: set[str] = set()
    ledgers = [ledger_of(folder) for folder in folders]
    for folder, ledger in zip(folders, ledgers, strict=True):
        if not ledger.is_there:
            raise InputError(shown(folder), "holds no batch", "give what segment had as -o")
        given.update(ledger.inputs())
        for record in ledger.records():
            name = record["input"]
            earlier = found.get(name)
            if earlier is None or earlier["error"] is not None:
                found[name] = record
            elif record["error"] is None and record != earlier:
                raise InputError(
                    shown(folder),
                    f"holds another result of {name} than an earlier folder",
                    "merge runs of one model and one set of scans",
                )
    records = tuple(found[name] for name in sorted(found))
    ledgers[0].gather(records)
    return Merged(records, tuple(sorted(given - set(found))))
