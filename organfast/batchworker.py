"""What a process does with scans of a batch; and the one that gets them through a pipe.

::

    batch (parent)                 worker
      Job       ───────────────>   load the model, once
                <───────────────   Ready: how much memory it holds
      Task      ───────────────>   claim, compare with the record, read ┐ the next is read
      Task      ───────────────>                     segment            │ and the last is saved
                <───────────────   Outcome           save, record       ┘ meanwhile

A worker ends when its parent does: whatever it was doing is then not in place, and not half so.
A worker of Dask (``cluster.py``) has the same desk, and a scan at a time on it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from os import PathLike
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from organfast import __version__
from organfast.batchinputs import BatchInput
from organfast.dicom import check_is_dicom
from organfast.errors import InputError, is_transient
from organfast.ledger import Claim, failure, input_digest
from organfast.ledgers import ledger_of
from organfast.memory import resident_bytes
from organfast.models.classifier import Model, load_model
from organfast.pipeline import Settings, segment_many
from organfast.remote import fetched, is_url, shown
from organfast.results import Result, saving

__all__ = ["Desk", "Job", "Outcome", "Outputs", "Ready", "agreed", "loaded", "serve"]


@dataclass(frozen=True)
class Outputs:
    """What is written of each scan of a batch; see ``Result.save``.

    Parameters
    ----------
    preview : bool
        Draw ``overlay.png``, and a picture per probability map.
    probabilities : tuple of str
        Organs whose full-size maps are written.
    report : bool
        Write ``report.html``.
    types : tuple of {"nifti", "dicom_seg"}
        How the label map is written.
    """

    preview: bool = True
    probabilities: tuple[str, ...] = ()
    report: bool = False
    types: tuple[str, ...] = ("nifti",)

    def check(self, path: str | PathLike[str]) -> None:
        """Raise InputError for a scan that cannot be written like this."""
        if "dicom_seg" in self.types:
            check_is_dicom(path)

    def save(self, result: Result, folder: Path) -> None:
        """Write a result into a folder of its own."""
        result.save(
            folder,
            preview=self.preview,
            probabilities=self.probabilities,
            report=self.report,
            types=self.types,
        )


@dataclass(frozen=True)
class Job:
    """What all scans of a batch have in common.

    Parameters
    ----------
    out : Path or str
        The output folder, or its URL.
    model : Path or str
        A ``.organfast`` file, or its URL.
    digest : str
        The model's, which the file must still have.
    device : str
        Where a network runs.
    settings : Settings
        How scans are segmented.
    outputs : Outputs
        What is written of each.
    threads : int
        Of a worker.
    scratch : str or None
        Where copies of what lies on a store are kept meanwhile; None is the system's temporary
        folder.
    """

    # A URL may hold a password, and Dask logs what it was given.
    out: Path | str = field(repr=False)
    model: Path | str = field(repr=False)
    digest: str
    device: str
    settings: Settings
    outputs: Outputs
    threads: int
    scratch: str | None = None

    def how(self) -> dict[str, Any]:
        """What a record must agree with for a scan to be finished, but for the input."""
        parameters = {**asdict(self.settings), "outputs": asdict(self.outputs)}
        plain: dict[str, Any] = json.loads(json.dumps(parameters))
        return {"organfast": __version__, "model_sha256": self.digest, "parameters": plain}


@dataclass(frozen=True)
class Ready:
    """The model is loaded.

    Parameters
    ----------
    bytes : int
        What the worker holds in memory before its first scan.
    """

    bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of a scan of a batch.

    Parameters
    ----------
    scan : BatchInput
        The scan.
    status : {"segmented", "kept", "failed", "elsewhere"}
        ``kept`` was finished before, by an earlier run or by a worker of Dask that was lost before
        it could tell; on ``elsewhere`` another run is at work now.
    error : InputError or None
        Why it failed.
    warnings : tuple of str
        What a reader should check.
    organs_ml : mapping of str to float
        Volumes of the organs that are present.
    seconds : float
        All stages together, the waiting in between left out.
    is_transient : bool
        Whether it failed of a fault that may have passed a moment later.
    """

    scan: BatchInput
    status: str
    error: InputError | None = None
    warnings: tuple[str, ...] = ()
    organs_ml: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    is_transient: bool = False


def loaded(path: Path | str, device: str = "auto") -> Model:
    """A model of a file, its network to run on a device.

    Parameters
    ----------
    path : Path or str
        A ``.organfast`` file, or the URL of one.
    device : {"auto", "cpu", "gpu"}
        Of a network; a forest runs on the CPU in any case.

    Raises
    ------
    InputError
        The model cannot be used.
    ValueError
        There is no such device.
    """
    from organfast.models.cnn import Cnn
    from organfast.models.devices import find_devices

    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="organfast-") as folder:
            model = load_model(fetched(str(path), Path(folder)))
    else:
        model = load_model(path)
    if not isinstance(model.classifier, Cnn):
        if device == "gpu":
            raise ValueError("the model is a forest, which runs on the CPU; leave --device")
        return model
    find_devices(device)
    return replace(model, classifier=replace(model.classifier, device=device))


def serve(descriptor: int) -> None:
    """Work on what comes through a pipe until its other end is closed.

    Parameters
    ----------
    descriptor : int
        Of a connected socket, inherited from the parent.
    """
    # Of Ctrl-C and the like the parent decides; it may be sent to the whole group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    job: Job = connection.recv()
    try:
        model = agreed(job)
    except InputError as error:
        connection.send(error)
        return
    sending = Lock()

    def send(message: Ready | Outcome) -> None:
        with sending:
            connection.send(message)

    inbox: SimpleQueue[BatchInput] = SimpleQueue()
    Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    send(Ready(resident_bytes()))
    desk = Desk(job, model, send)
    desk.work(_arriving(inbox, desk))


def agreed(job: Job) -> Model:
    """The model of a batch, which must be what it was when the batch began.

    Parameters
    ----------
    job : Job
        Of the batch.

    Raises
    ------
    InputError
        It cannot be used, or is another one.
    """
    model = loaded(job.model, job.device)
    if model.digest != job.digest:
        raise InputError(shown(job.model), "has changed since the batch began", "start it again")
    return model


def _listen(connection: Connection, inbox: SimpleQueue[BatchInput]) -> None:
    while True:
        try:
            scan = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # the parent has gone, or wants no more
        inbox.put(scan)


def _arriving(inbox: SimpleQueue[BatchInput], desk: Desk) -> Iterator[BatchInput | None]:
    """Scans as they come, or None where those on the desk should be segmented first."""
    while True:
        try:
            yield inbox.get(block=desk.is_clear)
        except Empty:
            yield None


@dataclass(frozen=True, eq=False)
class _Begun:
    """A scan that is to be segmented here and now."""

    scan: BatchInput
    claim: Claim
    path: str
    digest: str
    # Where it was fetched to, if it was.
    folder: Path | None

    def release(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.claim.release()


class Desk:
    """Scans on their way through one process: claimed, read, segmented, saved, recorded, told of.

    Parameters
    ----------
    job : Job
        What they have in common.
    model : Model
        The job's.
    tell : callable
        Called with the outcome of each scan, in any thread.
    """

    def __init__(self, job: Job, model: Model, tell: Callable[[Outcome], None]) -> None:
        self.job, self.model, self.tell = job, model, tell
        self.ledger = ledger_of(job.out, job.scratch)
        # Read or being read, not yet segmented.
        self.due: deque[_Begun] = deque()

    @property
    def is_clear(self) -> bool:
        """Whether no scan waits to be segmented."""
        return not self.due

    def work(self, scans: Iterable[BatchInput | None]) -> None:
        """See to scans as they come; None among them says that no more are known yet.

        Raises
        ------
        InputError
            The output folder cannot be used.
        """
        with saving() as save:
            results = segment_many(
                self._paths(scans),
                self.model,
                self.job.settings,
                threads=self.job.threads,
                on_error=self._unusable,
            )
            for result in results:
                begun = self.due.popleft()
                # No file holds the confidence: its memory goes to the next scan.
                slim = replace(result, confidence=None)
                save(partial(self._save, begun, slim), _no_more)
                # Else they would stay in memory, though written, until the next one is there.
                del result, slim

    def _paths(self, scans: Iterable[BatchInput | None]) -> Iterator[str | None]:
        for scan in scans:
            if scan is None:
                yield None
            elif self._begin(scan):
                yield self.due[-1].path

    def _begin(self, scan: BatchInput) -> bool:
        """Whether a scan is to be segmented here and now."""
        try:
            claim = self.ledger.claim(scan.name)
        except InputError as error:
            if not is_transient(error):
                raise
            self.tell(Outcome(scan, "failed", error, is_transient=True))
            return False
        if claim is None:
            self.tell(Outcome(scan, "elsewhere"))
            return False
        begun = _Begun(scan, claim, scan.path, "", None)
        try:
            if is_url(scan.path):
                folder = Path(tempfile.mkdtemp(prefix="organfast-", dir=self.job.scratch))
                begun = replace(begun, folder=folder)
                begun = replace(begun, path=os.fspath(fetched(scan.path, folder)))
            self.job.outputs.check(begun.path)
            begun = replace(begun, digest=input_digest(begun.path))
            record = self.ledger.record(scan.name)
            if record is not None and self._is_finished(begun, record):
                self._keep(begun, record)
                return False
            self.ledger.check_place(scan.output, record)
        except InputError as error:
            self._fail(begun, error)
            return False
        self.due.append(begun)
        return True

    def _is_finished(self, begun: _Begun, record: Mapping[str, Any]) -> bool:
        scan = begun.scan
        of_scan = {"input": scan.name, "output": scan.output, "input_sha256": begun.digest}
        wanted = {**of_scan, **self.job.how(), "error": None}
        return wanted.items() <= record.items() and self.ledger.holds(record)

    def _keep(self, begun: _Begun, record: Mapping[str, Any]) -> None:
        organs = json.loads(self.ledger.content(begun.scan.output, "organs.json"))
        begun.release()
        volumes = {n: o["volume_ml"] for n, o in organs["organs"].items() if o["present"]}
        self.tell(Outcome(begun.scan, "kept", None, tuple(record["warnings"]), volumes))

    def _unusable(self, error: InputError) -> None:
        self._fail(self.due.popleft(), error)

    def _fail(self, begun: _Begun, error: InputError) -> None:
        scan, passing = begun.scan, is_transient(error)
        path = error.path
        if path.startswith(os.fspath(begun.claim.work)):
            path = self.ledger.where(scan.output)
        elif begun.folder is not None and path.startswith(os.fspath(begun.folder)):
            path = scan.shown
        error = InputError(path, error.problem.replace(begun.path, scan.shown), error.remedy)
        text = f"{error.problem}; {error.remedy}".replace(scan.shown, scan.name)
        try:
            record = failure(scan.name, scan.output, self.job.how(), text, begun.digest or None)
            self.ledger.write(begun.claim, record)
        except InputError as unwritten:
            error = InputError(error.path, f"{error.problem}; {unwritten.problem}", error.remedy)
        begun.release()
        self.tell(Outcome(scan, "failed", error, is_transient=passing))

    def _save(self, begun: _Begun, result: Result) -> None:
        """Write a result and its record, in the thread that writes."""
        scan, claim = begun.scan, begun.claim
        folder = claim.work / "result"
        try:
            self.job.outputs.save(result, folder)
            timings = json.loads((folder / "timings.json").read_text("utf-8"))
            files = self.ledger.finish(claim, folder, scan.output)
            record = {
                "input": scan.name,
                "output": scan.output,
                "input_sha256": begun.digest,
                **self.job.how(),
                "files": files,
                "warnings": list(result.warnings),
                "error": None,
            }
            self.ledger.write(claim, record, {"input": scan.name, **timings})
        except InputError as error:
            self._fail(begun, error)
            return
        begun.release()
        seconds = sum(timings["seconds"].values())
        volumes = {
            organ.name: round(organ.volume_ml, 3)
            for organ in result.organs.values()
            if organ.present
        }
        self.tell(Outcome(scan, "segmented", None, result.warnings, volumes, seconds))


def _no_more(error: InputError | None) -> None:
    """What became of a result is told by who wrote it, before anybody waits for it."""
