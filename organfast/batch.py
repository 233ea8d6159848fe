"""Many scans, overnight: segmented by processes that may die, recorded one by one, resumed.

::

    find_inputs ─> this shard's ─> in flight, as memory allows ─> worker, worker, ...
                                        ^                            │         │ dies
                                        └── once more, alone; then failed <────┘
    batch.jsonl <── sorted <── a record per scan, written last <─────┘

The parent computes nothing and holds no scan; what is finished is known from records and digests on
disk alone (see :mod:`organfast.ledger`), so that a run may end at any instant.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from os import PathLike
from pathlib import Path

from organfast.batchinputs import BatchInput, find_inputs, is_in_shard
from organfast.batchworker import Job, Outcome, Outputs, Ready, loaded
from organfast.errors import InputError, is_whole
from organfast.ledger import Ledger, failure
from organfast.memory import LIBRARIES, resident_bytes, scan_bytes
from organfast.models.classifier import Model
from organfast.pipeline import Settings, check_settings
from organfast.progress import Progress, silent

__all__ = ["BatchPlan", "segment_batch"]

Paths = str | PathLike[str] | Iterable[str | PathLike[str]]

# A worker reads a scan, segments one and saves one at the same time.
_DEPTH = 3
_GIB = 1 << 30
# Once for what else may have ended a worker, such as a scan beside it.
_CHANCES = 2


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is run; what it writes does not depend on it.

    Parameters
    ----------
    workers : int
        Processes that segment, each with a model of its own.
    max_memory_gb : float or None
        GiB that all processes together should stay within: fewer scans are in flight, and one that
        does not fit alone is refused. None does not look.
    shard : (i, N)
        Segment only the i-th of N parts, from 1, by the scans' names; see ``is_in_shard``.
    device : {"auto", "cpu", "gpu"}
        Where a network runs.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    workers: int = 1
    max_memory_gb: float | None = None
    shard: tuple[int, int] = (1, 1)
    device: str = "auto"

    def __post_init__(self) -> None:
        if not is_whole(self.workers, 1):
            raise ValueError(f"workers is {self.workers!r}; give a whole number from 1")
        if self.max_memory_gb is not None and not self.max_memory_gb > 0:
            raise ValueError(f"max_memory_gb is {self.max_memory_gb!r}; give GiB above 0, or None")
        if len(self.shard) != 2 or not all(is_whole(n, 1) for n in self.shard):
            raise ValueError(f"shard is {self.shard!r}; give (i, N), whole numbers from 1")
        if self.shard[0] > self.shard[1]:
            raise ValueError(f"shard is {self.shard!r}; i is from 1 to N")


def segment_batch(
    scans: Paths | tuple[BatchInput, ...],
    out: str | PathLike[str],
    model: str | PathLike[str],
    settings: Settings | None = None,
    outputs: Outputs | None = None,
    plan: BatchPlan | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Generator[Outcome, None, None]:
    """Segment many scans into one output folder, which mirrors the input's, and tell of each.

    What an earlier run has finished with the same scan, model and settings is kept: the same call
    goes on where one was interrupted. Runs at the same time share the work. A scan that cannot be
    segmented is one outcome, and the rest goes on. At the end ``out/batch.jsonl`` has a record of
    each scan, sorted by input.

    Parameters
    ----------
    scans : path or iterable of paths
        Folders, ``.txt`` lists, patterns and scans, or what ``find_inputs`` made of them.
    out : str or PathLike
        The output folder.
    model : str or PathLike
        A ``.organfast`` file, which each worker loads once.
    settings : Settings, optional
        How to segment.
    outputs : Outputs, optional
        What to write of each scan.
    plan : BatchPlan, optional
        Workers, memory and shard.
    threads : int
        Of all workers together, each of which has at least one.
    progress : callable, optional
        Called with (what, done, total) for each scan.

    Yields
    ------
    Outcome
        As scans end, in no certain order. Nothing happens unless they are asked for; who stops
        asking ends the workers.

    Raises
    ------
    InputError
        The inputs, the model or the output folder cannot be used, or the disk is full: what was
        finished until then stays.
    ValueError
        The settings do not fit the model, or results would get into each other's way.
    """
    settings, outputs, plan = settings or Settings(), outputs or Outputs(), plan or BatchPlan()
    if not is_whole(threads, 1):
        raise ValueError(f"threads is {threads!r}; use at least one")
    inputs = scans if _are_found(scans) else find_inputs(scans, out)  # type: ignore[arg-type]
    used = loaded(Path(model), plan.device)
    check_settings(settings, used)
    for name in outputs.probabilities:
        used.classes.index(name)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(folder, "is a file", "give a folder")
    share = max(1, threads // plan.workers)
    job = Job(folder, Path(model), used.digest, plan.device, settings, outputs, share)
    return _Batch(job, used, plan, tuple(inputs)).run(progress)  # type: ignore[arg-type]


def _are_found(scans: object) -> bool:
    return isinstance(scans, tuple) and all(isinstance(scan, BatchInput) for scan in scans)


@dataclass(eq=False)
class _Member:
    """A worker, and what it was given and has not told of yet."""

    process: subprocess.Popen[bytes]
    connection: Connection
    bytes: int | None = None
    scans: dict[str, BatchInput] = field(default_factory=dict)

    @staticmethod
    def hired(job: Job) -> _Member:
        ours, theirs = socket.socketpair()
        with theirs:
            # Neither a fork of this process, whose threads would be lost, nor its main module.
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                f"from organfast.batchworker import serve; serve({theirs.fileno()})"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        member = _Member(process, Connection(ours.detach()))
        member.send(job)
        return member

    def send(self, message: Job | BatchInput) -> None:
        with suppress(OSError):  # it has died, which is seen when it is waited for
            self.connection.send(message)

    def dismiss(self, patience: float = 0.2) -> str:
        """End the process, which ends by itself now; how it ended."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class _Batch:
    """The scans of a run: queued, in flight, told of."""

    def __init__(
        self, job: Job, model: Model, plan: BatchPlan, inputs: tuple[BatchInput, ...]
    ) -> None:
        self.job, self.model, self.plan = job, model, plan
        self.ledger = Ledger(job.out)
        self.names = [scan.name for scan in inputs]
        self.queue = deque(scan for scan in inputs if is_in_shard(scan.name, plan.shard))
        self.total = len(self.queue)
        # Were in a worker that died: each once more, with nothing beside it.
        self.suspects: deque[BatchInput] = deque()
        self.deaths: Counter[str] = Counter()
        # In another run's hands when they were met; looked at once more at the end.
        self.elsewhere: list[BatchInput] = []
        self.is_last_look = False
        self.is_full = False
        self.members: list[_Member] = []
        self.failed_starts = 0
        self.needs: dict[str, int | None] = {}
        gib = plan.max_memory_gb
        self.limit = None if gib is None else int(gib * _GIB)
        self.own_bytes = resident_bytes()

    def run(self, progress: Progress) -> Generator[Outcome, None, None]:
        self.ledger.open(self.names)
        done = 0
        try:
            for outcome in self._outcomes():
                done += 1
                progress("scans", done, self.total)
                yield outcome
        finally:
            for member in self.members:
                member.dismiss()
            # On a full disk what is there from before stays.
            with suppress(InputError):
                self.ledger.gather()
        if self.is_full:
            raise InputError(
                self.job.out, "is on a full disk", "make room; the same command goes on from here"
            )

    def _outcomes(self) -> Iterator[Outcome]:
        while True:
            yield from self._give()
            if self._n_in_flight or (self._is_waiting and self.members and not self.is_full):
                yield from self._hear()
            elif self.elsewhere and not self.is_last_look and not self.is_full:
                self.is_last_look = True
                self.queue.extend(self.elsewhere)
                self.elsewhere.clear()
            elif not self._is_waiting or self.is_full:
                return

    @property
    def _n_in_flight(self) -> int:
        return sum(len(member.scans) for member in self.members)

    @property
    def _is_waiting(self) -> bool:
        return bool(self.queue or self.suspects)

    # --- giving -----------------------------------------------------------------------------------

    def _give(self) -> Iterator[Outcome]:
        """Hand out what may be in flight; tell of what never may."""
        while self._is_waiting and not self.is_full:
            if self.suspects and self._n_in_flight:
                return
            if self.limit is not None and self._base is None:
                # How much a worker holds is measured, not guessed.
                if not self.members:
                    self.members.append(_Member.hired(self.job))
                return
            line = self.suspects or self.queue
            scan = line[0]
            if self._is_too_large(scan):
                line.popleft()
                yield self._refused(scan)
                continue
            member = self._free(scan)
            if member is None:
                return
            line.popleft()
            member.scans[scan.name] = scan
            member.send(scan)

    @property
    def _base(self) -> int | None:
        return max((m.bytes for m in self.members if m.bytes is not None), default=None)

    def _bytes_of(self, scan: BatchInput) -> int | None:
        if scan.name not in self.needs:
            self.needs[scan.name] = scan_bytes(scan.path, self.model, self.job.settings)
        return self.needs[scan.name]

    def _is_too_large(self, scan: BatchInput) -> bool:
        if self.limit is None:
            return False
        alone = self.own_bytes + (self._base or 0) + (self._bytes_of(scan) or 0)
        return alone > self.limit

    def _free(self, scan: BatchInput) -> _Member | None:
        """A worker for a scan, a new one if there may be more; None while there is none."""
        in_flight = [s for member in self.members for s in member.scans.values()]
        if self.limit is not None and not self._fits(scan, in_flight, len(self.members)):
            if in_flight:
                return None
            # Alone it fits: without the workers that have nothing to do.
            for member in self.members[1:]:
                member.dismiss()
            del self.members[1:]
        least = min(self.members, key=lambda m: len(m.scans), default=None)
        n = len(self.members)
        may_hire = n < (1 if self.suspects else self.plan.workers)
        if least is None or (least.scans and may_hire and self._fits(scan, in_flight, n + 1)):
            self.members.append(_Member.hired(self.job))
            return self.members[-1]
        return least if len(least.scans) < _DEPTH else None

    def _fits(self, scan: BatchInput, in_flight: list[BatchInput], n_workers: int) -> bool:
        if self.limit is None:
            return True
        needs = [self._bytes_of(s) for s in (*in_flight, scan)]
        if in_flight and None in needs:
            return False  # nobody knows how large: alone
        held = self.own_bytes + n_workers * (self._base or 0)
        return held + sum(n or 0 for n in needs) <= self.limit

    def _refused(self, scan: BatchInput) -> Outcome:
        gib = (self._bytes_of(scan) or 0) / _GIB
        given = f"{self.plan.max_memory_gb:.3g} GB"
        return self._failed(
            scan,
            f"needs about {gib:.2g} GB of memory beside the program and the model, more than the "
            f"{given} allowed leave it",
            "allow more (--max-memory), or crop the scan",
        )

    def _failed(self, scan: BatchInput, problem: str, remedy: str) -> Outcome:
        claim = self.ledger.claim(scan.name)
        record = failure(scan.name, scan.output, self.job.how(), f"{problem}; {remedy}")
        if claim is not None:
            with suppress(InputError):  # told of all the same
                self.ledger.write(claim, record)
            claim.release()
        return Outcome(scan, "failed", InputError(scan.path, problem, remedy))

    # --- hearing ----------------------------------------------------------------------------------

    def _hear(self) -> Iterator[Outcome]:
        """Wait until a worker says something or dies."""
        waited = wait([member.connection for member in self.members])
        for member in [m for m in self.members if m.connection in waited]:
            try:
                message = member.connection.recv()
            except (EOFError, OSError):
                yield from self._buried(member)
                continue
            if isinstance(message, Ready):
                member.bytes = message.bytes + LIBRARIES
            elif isinstance(message, Outcome):
                del member.scans[message.scan.name]
                yield from self._told(message)
            else:
                raise message

    def _told(self, outcome: Outcome) -> Iterator[Outcome]:
        if outcome.status == "elsewhere" and not self.is_last_look:
            self.elsewhere.append(outcome.scan)
            return
        if outcome.error is not None and _is_full(outcome.error):
            self.is_full = True
        yield outcome

    def _buried(self, member: _Member) -> Iterator[Outcome]:
        """Of a worker that has died: its scans once more, or none of them a third time."""
        self.members.remove(member)
        reason = member.dismiss(patience=10)
        if member.bytes is None:
            self.failed_starts += 1
            if self.failed_starts >= _CHANCES:
                raise InputError(
                    self.job.model,
                    f"is loaded by a worker that ends before its first scan ({reason})",
                    "allow more memory, or use fewer workers",
                )
            for scan in reversed(member.scans.values()):
                (self.suspects if self.deaths[scan.name] else self.queue).appendleft(scan)
            return
        for scan in member.scans.values():
            self.deaths[scan.name] += 1
            if self.deaths[scan.name] < _CHANCES:
                self.suspects.append(scan)
                continue
            yield self._failed(
                scan,
                f"ended the process that segmented it, twice ({reason})",
                "it may need more memory than there is; use fewer workers, or crop the scan",
            )


def _is_full(error: InputError) -> bool:
    return any(os.strerror(number) in error.problem for number in (errno.ENOSPC, errno.EDQUOT))
