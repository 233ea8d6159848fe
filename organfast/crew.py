"""Processes of this machine that segment the scans of a batch, and may die.

::

    scans ─> in flight, as memory allows ─> worker, worker, ...
                    ^                            │         │ dies
                    └── once more, alone; then failed <────┘
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from organfast.batchinputs import BatchInput
from organfast.batchworker import Job, Outcome, Ready
from organfast.errors import InputError
from organfast.memory import LIBRARIES, resident_bytes, scan_bytes
from organfast.models.classifier import Model
from organfast.remote import shown

__all__ = ["Crew", "Failing"]

Failing = Callable[[BatchInput, str, str], Outcome]
"""From a scan, what is wrong with it and what would do to its outcome, which is recorded."""

# A worker reads a scan, segments one and saves one at the same time.
_DEPTH = 3
_GIB = 1 << 30
# Once for what else may have ended a worker, such as a scan beside it.
_CHANCES = 2


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


class Crew:
    """Workers on this machine, hired as they are needed.

    Parameters
    ----------
    job : Job
        What they work on.
    model : Model
        The job's, for how much memory scans take.
    n_workers : int
        Processes at most.
    max_memory_gb : float or None
        GiB that they and this process should stay within; None does not look.
    fail : Failing
        Makes the outcome of a scan that no worker can see to.
    """

    def __init__(
        self,
        job: Job,
        model: Model,
        n_workers: int,
        max_memory_gb: float | None,
        fail: Failing,
    ) -> None:
        self.job, self.model, self.n_workers, self.fail = job, model, n_workers, fail
        self.queue: deque[BatchInput] = deque()
        # Were in a worker that died: each once more, with nothing beside it.
        self.suspects: deque[BatchInput] = deque()
        self.deaths: Counter[str] = Counter()
        self.is_stopped = False
        self.members: list[_Member] = []
        self.failed_starts = 0
        self.needs: dict[str, int | None] = {}
        self.limit = None if max_memory_gb is None else int(max_memory_gb * _GIB)
        self.own_bytes = resident_bytes()

    def work(self, scans: deque[BatchInput]) -> Iterator[Outcome]:
        """Hand out scans; outcomes as they come.

        Raises
        ------
        InputError
            No worker can begin.
        """
        self.queue = scans
        while True:
            yield from self._give()
            if self._n_in_flight or (self._is_waiting and self.members and not self.is_stopped):
                yield from self._hear()
            elif not self._is_waiting or self.is_stopped:
                return

    def stop(self) -> None:
        """Hand out no more; what is in flight still comes."""
        self.is_stopped = True

    def close(self) -> None:
        """Dismiss all workers."""
        for member in self.members:
            member.dismiss()
        self.members.clear()

    @property
    def _n_in_flight(self) -> int:
        return sum(len(member.scans) for member in self.members)

    @property
    def _is_waiting(self) -> bool:
        return bool(self.queue or self.suspects)

    # --- giving -----------------------------------------------------------------------------------

    def _give(self) -> Iterator[Outcome]:
        """Hand out what may be in flight; tell of what never may."""
        while self._is_waiting and not self.is_stopped:
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
        may_hire = n < (1 if self.suspects else self.n_workers)
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
        given = f"{(self.limit or 0) / _GIB:.3g} GB"
        return self.fail(
            scan,
            f"needs about {gib:.2g} GB of memory beside the program and the model, more than the "
            f"{given} allowed leave it",
            "allow more (--max-memory), or crop the scan",
        )

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
                yield message
            else:
                raise message

    def _buried(self, member: _Member) -> Iterator[Outcome]:
        """Of a worker that has died: its scans once more, or none of them a third time."""
        self.members.remove(member)
        reason = member.dismiss(patience=10)
        if member.bytes is None:
            self.failed_starts += 1
            if self.failed_starts >= _CHANCES:
                raise InputError(
                    shown(self.job.model),
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
            yield self.fail(
                scan,
                f"ended the process that segmented it, twice ({reason})",
                "it may need more memory than there is; use fewer workers, or crop the scan",
            )
