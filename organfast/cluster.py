"""The scans of a batch on workers of Dask.distributed, on any number of machines.

::

    scans ─> window: two per thread of the cluster ─> scheduler ─> workers: a desk, a scan at a time
                ^                                        │ a worker is lost: elsewhere once more
                │                                        │ so many workers were lost with one scan:
                ├── alone, once more <── KilledWorker <──┘
                └── connection lost, and found again

The same desk as in a process of this machine (``batchworker.py``), so the same records and bytes. A
scan may run twice at the same time, where a worker is only believed to be lost: the ledger's lock
keeps them apart, and the one that comes too late finds the scan finished.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from organfast import __version__
from organfast.batchinputs import BatchInput
from organfast.batchworker import Desk, Job, Outcome, agreed
from organfast.crew import Failing
from organfast.errors import InputError
from organfast.ledger import key_of
from organfast.models.classifier import Model
from organfast.remote import is_url

__all__ = ["Cluster", "check_scheduler", "segment_here"]

_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss|inproc)://\S+")
# Seconds: to reach a scheduler; until its first worker is there, which may just be starting; later
# on without any worker until it is given up; between looks at them.
_REACH = 10.0
_START = 30.0
_PATIENCE = 300.0
_LOOK = 2.0
# A worker has the next scan when it has finished one.
_PER_THREAD = 2
# With KilledWorker scans may be blamed for one beside them: once more, with nothing beside them.
_CHANCES = 2
# Connections to the scheduler that may be lost with a scan.
_LOSSES = 3


def check_scheduler(scheduler: str) -> None:
    """Refuse what is neither an address nor a file, before anything is looked for.

    Parameters
    ----------
    scheduler : str
        ``tcp://host:port``, or a scheduler file.

    Raises
    ------
    ValueError
        It is something else.
    """
    if not _ADDRESS.fullmatch(scheduler) and not scheduler.endswith(".json"):
        raise ValueError(
            f"the scheduler {scheduler} is neither an address nor a file; give such as "
            "tcp://host:8786, or the .json file of dask scheduler --scheduler-file"
        )


# --- on a worker ----------------------------------------------------------------------------------

# Of this process: the last model, for all scans of a batch.
_MODELS: dict[tuple[str, str], Model] = {}
_LOADING = Lock()


def segment_here(job: Job, scan: BatchInput, version: str) -> Outcome:
    """Segment a scan on a worker of Dask, which loads the model with its first.

    Parameters
    ----------
    job : Job
        What all scans have in common.
    scan : BatchInput
        The scan.
    version : str
        Of the software that asks, which must be that of the worker.

    Raises
    ------
    InputError
        The model or the output folder cannot be used here.
    """
    from distributed import get_worker

    worker = get_worker()
    if version != __version__:
        raise InputError(
            worker.address, f"runs organfast {__version__}, not {version}", "install the same"
        )
    key = (job.digest, job.device)
    with _LOADING:
        if key not in _MODELS:
            _MODELS.clear()
            _MODELS[key] = agreed(job)
        model = _MODELS[key]
    outcomes: list[Outcome] = []
    # Is removed by who watches the worker, if that cannot do it any more.
    here = replace(job, scratch=worker.local_directory)
    Desk(here, model, outcomes.append).work([scan])
    return outcomes[0]


# --- from this process ----------------------------------------------------------------------------


class Cluster:
    """The workers of a scheduler.

    Parameters
    ----------
    job : Job
        What they work on.
    scheduler : str
        Its address or its file.
    fail : Failing
        Makes the outcome of a scan that no worker can see to.
    """

    def __init__(self, job: Job, scheduler: str, fail: Failing) -> None:
        self.job = replace(job, out=_absolute(job.out), model=_absolute(job.model))
        self.scheduler, self.fail = scheduler, fail
        self.client: Any = None
        self.is_stopped = False
        # Another run on the same scheduler must not have the same keys.
        self.run = secrets.token_hex(4)
        self.n_submitted = 0
        self.in_flight: dict[Any, BatchInput] = {}
        self.done: SimpleQueue[Any] = SimpleQueue()
        self.queue: deque[BatchInput] = deque()
        self.suspects: deque[BatchInput] = deque()
        self.killed: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.n_threads = 0
        self.looked = self.seen = 0.0
        self.quiet: list[tuple[logging.Logger, int]] = []

    def open(self) -> None:
        """Connect to the scheduler, and see that it has workers.

        Raises
        ------
        InputError
            It cannot be reached, has no workers, or they cannot run this software.
        """
        try:
            from distributed import Client
        except ImportError:
            raise InputError(
                self.scheduler,
                "needs Dask, which is not installed here",
                "pip install 'organfast[cluster]'",
            ) from None
        address = _address_of(self.scheduler)
        # What becomes of workers is told by outcomes, a line each.
        for name in ("distributed", "distributed.client", "distributed.core", "tornado"):
            logger = logging.getLogger(name)
            self.quiet.append((logger, logger.level))
            logger.setLevel(logging.CRITICAL + 1)
        try:
            self.client = Client(address, timeout=_REACH, set_as_default=False, name="organfast")
            self._look()
            until = time.monotonic() + _START
            while not self.n_threads and time.monotonic() < until:
                time.sleep(0.2)
                self._look()
            versions = self.client.run(_version)
        except (OSError, ValueError) as error:
            self.close()
            raise InputError(
                address,
                f"is no scheduler that can be reached ({_first_line(error)})",
                "check that dask scheduler runs there and that its port is open",
            ) from error
        except ImportError as error:
            self.close()
            remedy = "install the same organfast on the scheduler and on its workers"
            raise InputError(address, f"has workers without it ({error})", remedy) from None
        if not self.n_threads:
            self.close()
            raise InputError(address, "has no workers", f"start some: dask worker {address}")
        for worker, version in sorted(versions.items()):
            if version != __version__:
                self.close()
                raise InputError(
                    worker, f"runs organfast {version}, not {__version__}", "install the same"
                )

    def work(self, scans: deque[BatchInput]) -> Iterator[Outcome]:
        """Hand out scans; outcomes as they come.

        Raises
        ------
        InputError
            The scheduler or its workers are gone, or a worker cannot use the model or the output.
        """
        self.queue = scans
        while True:
            self._submit()
            if self.in_flight:
                yield from self._heard(self._next())
            elif self.is_stopped or not (self.queue or self.suspects):
                return

    def stop(self) -> None:
        """Hand out no more; what is in flight still comes."""
        self.is_stopped = True

    def close(self) -> None:
        """Let go of the scheduler: what was begun is finished and recorded, nothing else begins."""
        if self.client is not None:
            self.in_flight.clear()
            self.client.close(timeout=_REACH)
            self.client = None
        for logger, level in self.quiet:
            logger.setLevel(level)
        self.quiet.clear()

    # --- giving -----------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Fill the window: one in for one out."""
        if time.monotonic() - self.looked > _LOOK:
            self._look()
        while not self.is_stopped:
            if self.queue:
                if len(self.in_flight) >= max(1, _PER_THREAD * self.n_threads):
                    return
                scan = self.queue.popleft()
            elif self.suspects and not self.in_flight:
                scan = self.suspects.popleft()
            else:
                return
            self.n_submitted += 1
            future = self.client.submit(
                segment_here,
                self.job,
                replace(scan, path=str(_absolute(scan.path))),
                __version__,
                key=f"organfast-{self.run}-{self.n_submitted}-{key_of(scan.name)}",
                pure=False,
                retries=0,
            )
            self.in_flight[future] = scan
            future.add_done_callback(self.done.put)

    # --- hearing ----------------------------------------------------------------------------------

    def _next(self) -> Any:
        """The next future that is done; waits for it."""
        while True:
            with suppress(Empty):
                return self.done.get(timeout=_LOOK)
            if self.client.status in ("closing", "closed"):
                raise self._gone()
            self._look()
            if time.monotonic() - self.seen > _PATIENCE:
                raise InputError(
                    self.scheduler,
                    f"has had no workers for {_PATIENCE / 60:.0f} minutes",
                    "start some; the same command goes on from here",
                )

    def _look(self) -> None:
        """How many threads the cluster has now."""
        self.looked = time.monotonic()
        # While the connection is lost nobody tells.
        with suppress(OSError):
            self.n_threads = sum(self.client.nthreads().values())
        if self.n_threads:
            self.seen = self.looked

    def _gone(self) -> InputError:
        remedy = "start it; the same command goes on from here"
        return InputError(self.scheduler, "can no longer be reached", remedy)

    def _heard(self, future: Any) -> Iterator[Outcome]:
        from distributed import KilledWorker
        from distributed.client import CancelledError

        scan = self.in_flight.pop(future)
        try:
            yield _as_given(future.result(), scan)
        except CancelledError:
            self._lost(scan)
        except KilledWorker as error:
            yield from self._killed(scan, error)
        except InputError as error:
            raise InputError(
                error.path,
                f"{error.problem}, says a worker",
                f"{error.remedy}; workers must see what is seen here, or be given URLs",
            ) from None
        # Raised in another process, of whatever it is there: of one scan, and told of.
        except Exception as error:
            yield self.fail(
                scan,
                f"could not be segmented by a worker ({_first_line(error)})",
                "see the worker's log, and that its organfast is the same as here",
            )

    def _lost(self, scan: BatchInput) -> None:
        """A scan of which nothing is known any more: a connection was lost, or it was cancelled."""
        until = time.monotonic() + _REACH
        while self.client.status == "connecting" and time.monotonic() < until:
            time.sleep(0.1)
        self.lost[scan.name] += 1
        if self.client.status != "running" or self.lost[scan.name] >= _LOSSES:
            raise self._gone()
        self.queue.appendleft(scan)

    def _killed(self, scan: BatchInput, error: Any) -> Iterator[Outcome]:
        self.killed[scan.name] += 1
        if self.killed[scan.name] < _CHANCES:
            self.suspects.append(scan)
            return
        n = error.allowed_failures + 1
        yield self.fail(
            scan,
            f"ended the workers that segmented it, {n} of them beside others and {n} without",
            "it may need more memory than they have (--memory-limit); crop the scan, or give more",
        )


def _version() -> str:
    from organfast import __version__

    return __version__


def _as_given(outcome: Outcome, scan: BatchInput) -> Outcome:
    """An outcome that names the scan as it was given here."""
    error = outcome.error
    if error is not None and error.path == outcome.scan.path:
        error = InputError(scan.shown, error.problem, error.remedy)
    return replace(outcome, scan=scan, error=error)


def _absolute(place: Path | str) -> Path | str:
    """A path that means the same in another working folder, or a URL as it is."""
    if is_url(place):
        return place
    return type(place)(os.path.abspath(place))


def _address_of(scheduler: str) -> str:
    if not scheduler.endswith(".json"):
        return scheduler
    try:
        found = json.loads(Path(scheduler).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            scheduler,
            f"is no scheduler file that can be read ({_first_line(error)})",
            "give what dask scheduler --scheduler-file wrote",
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("address"), str):
        raise InputError(
            scheduler, "names no address", "give what dask scheduler --scheduler-file wrote"
        )
    return str(found["address"])


def _first_line(error: BaseException) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return next(iter(reason.splitlines()), "") or type(error).__name__
