"""Many scans, overnight: segmented by processes that may die, recorded one by one, resumed.

::

    find_inputs ─> this shard's ─> crew.py: processes here, or cluster.py: Dask's workers
                        ^              │
                        └── faults that may pass, a moment later
    batch.jsonl <── sorted <── a record per scan, written last, by the worker

The parent computes nothing and holds no scan; what is finished is known from records and digests on
disk alone (see :mod:`organfast.ledger`), so that a run may end at any instant.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from organfast.batchinputs import BatchInput, find_inputs, is_in_shard
from organfast.batchworker import Job, Outcome, Outputs, loaded
from organfast.cluster import Cluster, check_scheduler
from organfast.crew import Crew
from organfast.errors import InputError, is_whole
from organfast.ledger import failure
from organfast.ledgers import ledger_of
from organfast.models.classifier import Model
from organfast.pipeline import Settings, check_settings
from organfast.progress import Progress, silent
from organfast.remote import is_url, shown

__all__ = ["BatchPlan", "segment_batch"]

Paths = str | PathLike[str] | Iterable[str | PathLike[str]]

# Seconds before what failed of a passing fault is tried once more, and how often: so many times in
# all.
_PAUSES = (1.0, 5.0, 0.0)


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
    scheduler : str or None
        Of Dask, whose workers segment instead of processes of this machine: ``tcp://host:port``, or
        the file that ``dask scheduler --scheduler-file`` wrote. They must see the scans, the model
        and the output folder under the same names.

    Raises
    ------
    ValueError
        A number is out of range, or workers or memory of this machine are given with a scheduler.
    """

    workers: int = 1
    max_memory_gb: float | None = None
    shard: tuple[int, int] = (1, 1)
    device: str = "auto"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.workers, 1):
            raise ValueError(f"workers is {self.workers!r}; give a whole number from 1")
        if self.max_memory_gb is not None and not self.max_memory_gb > 0:
            raise ValueError(f"max_memory_gb is {self.max_memory_gb!r}; give GiB above 0, or None")
        if len(self.shard) != 2 or not all(is_whole(n, 1) for n in self.shard):
            raise ValueError(f"shard is {self.shard!r}; give (i, N), whole numbers from 1")
        if self.shard[0] > self.shard[1]:
            raise ValueError(f"shard is {self.shard!r}; i is from 1 to N")
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
            if self.workers != 1:
                raise ValueError("with a scheduler the workers are Dask's; leave workers")
            if self.max_memory_gb is not None:
                raise ValueError(
                    "with a scheduler memory is the workers'; leave max_memory_gb, and start them "
                    "with --memory-limit"
                )


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
        Folders, ``.txt`` lists, patterns, scans and URLs of these, or what ``find_inputs`` made of
        them.
    out : str or PathLike
        The output folder, or the URL of one on object storage, where runs at the same time do
        not see each other.
    model : str or PathLike
        A ``.organfast`` file, or its URL, which each worker loads once.
    settings : Settings, optional
        How to segment.
    outputs : Outputs, optional
        What to write of each scan.
    plan : BatchPlan, optional
        Workers, memory and shard.
    threads : int
        Of all workers together, each of which has at least one; with a scheduler, of each scan.
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
        finished until then stays. Or the scheduler cannot be reached or has no workers.
    ValueError
        The settings do not fit the model, or results would get into each other's way.
    """
    settings, outputs, plan = settings or Settings(), outputs or Outputs(), plan or BatchPlan()
    if not is_whole(threads, 1):
        raise ValueError(f"threads is {threads!r}; use at least one")
    inputs = scans if _are_found(scans) else find_inputs(scans, out)  # type: ignore[arg-type]
    source = str(model) if is_url(model) else Path(model)
    used = loaded(source, plan.device)
    check_settings(settings, used)
    for name in outputs.probabilities:
        used.classes.index(name)
    folder = str(out) if is_url(out) else Path(out)
    if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
        raise InputError(folder, "is a file", "give a folder")
    share = threads if plan.scheduler else max(1, threads // plan.workers)
    job = Job(folder, source, used.digest, plan.device, settings, outputs, share)
    return _Batch(job, used, plan, tuple(inputs)).run(progress)  # type: ignore[arg-type]


def _are_found(scans: object) -> bool:
    return isinstance(scans, tuple) and all(isinstance(scan, BatchInput) for scan in scans)


class _Batch:
    """The scans of a run: queued, seen to by others, told of."""

    def __init__(
        self, job: Job, model: Model, plan: BatchPlan, inputs: tuple[BatchInput, ...]
    ) -> None:
        self.job, self.model, self.plan = job, model, plan
        self.ledger = ledger_of(job.out)
        self.names = [scan.name for scan in inputs]
        self.queue = deque(scan for scan in inputs if is_in_shard(scan.name, plan.shard))
        self.total = len(self.queue)
        self.is_full = False
        self.is_fetching = is_url(job.out) or any(is_url(scan.path) for scan in inputs)

    def run(self, progress: Progress) -> Generator[Outcome, None, None]:
        done = 0
        with self._hands() as hands:
            self.ledger.open(self.names)
            try:
                for outcome in self._outcomes(hands):
                    done += 1
                    progress("scans", done, self.total)
                    yield outcome
            finally:
                hands.close()
                # On a full disk what is there from before stays.
                with suppress(InputError):
                    self.ledger.gather()
        if self.is_full:
            raise InputError(
                shown(self.job.out),
                "is on a full disk",
                "make room; the same command goes on from here",
            )

    @contextmanager
    def _hands(self) -> Iterator[Crew | Cluster]:
        """Who segments; what they fetched goes with this process, whatever ends a worker."""
        plan = self.plan
        if plan.scheduler is not None:
            with closing(Cluster(self.job, plan.scheduler, self._failed)) as cluster:
                cluster.open()
                yield cluster
            return
        with ExitStack() as stack:
            job = self.job
            if self.is_fetching:
                scratch = tempfile.TemporaryDirectory(prefix="organfast-")
                job = replace(job, scratch=stack.enter_context(scratch))
            crew = Crew(job, self.model, plan.workers, plan.max_memory_gb, self._failed)
            yield stack.enter_context(closing(crew))

    def _outcomes(self, hands: Crew | Cluster) -> Iterator[Outcome]:
        scans = self.queue
        for n, pause in enumerate(_PAUSES):
            again: deque[BatchInput] = deque()
            is_passing = False
            for outcome in hands.work(scans):
                # In another run's hands: looked at once more at the end.
                is_elsewhere = outcome.status == "elsewhere" and n == 0
                if is_elsewhere or (outcome.is_transient and n + 1 < len(_PAUSES)):
                    is_passing |= outcome.is_transient
                    again.append(outcome.scan)
                    continue
                if outcome.error is not None and _is_full(outcome.error):
                    self.is_full = True
                    hands.stop()
                yield outcome
            if not again or self.is_full:
                return
            if is_passing:
                time.sleep(pause)
            scans = again

    def _failed(self, scan: BatchInput, problem: str, remedy: str) -> Outcome:
        claim = self.ledger.claim(scan.name)
        record = failure(scan.name, scan.output, self.job.how(), f"{problem}; {remedy}")
        if claim is not None:
            with suppress(InputError):  # told of all the same
                self.ledger.write(claim, record)
            claim.release()
        return Outcome(scan, "failed", InputError(scan.shown, problem, remedy))


def _is_full(error: InputError) -> bool:
    return any(os.strerror(number) in error.problem for number in (errno.ENOSPC, errno.EDQUOT))
