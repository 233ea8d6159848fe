"""The process that segments scans of a batch: one model, scans that come through a pipe.

::

    batch (parent)                 worker
      Job       ───────────────>   load the model, once
                <───────────────   Ready: how much memory it holds
      Task      ───────────────>   claim, compare with the record, read ┐ the next is read
      Task      ───────────────>                     segment            │ and the last is saved
                <───────────────   Outcome           save, record       ┘ meanwhile

A worker ends when its parent does: whatever it was doing is then not in place, and not half so.
"""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping
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
from organfast.errors import InputError
from organfast.ledger import Claim, Ledger, failure, input_digest
from organfast.memory import resident_bytes
from organfast.models.classifier import Model, load_model
from organfast.pipeline import Settings, segment_many
from organfast.results import Result, check_target, saving

__all__ = ["Job", "Outcome", "Outputs", "Ready", "loaded", "serve"]


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
    out : Path
        The output folder.
    model : Path
        A ``.organfast`` file.
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
    """

    out: Path
    model: Path
    digest: str
    device: str
    settings: Settings
    outputs: Outputs
    threads: int

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
        ``kept`` was finished by an earlier run; on ``elsewhere`` another run is at work now.
    error : InputError or None
        Why it failed.
    warnings : tuple of str
        What a reader should check.
    organs_ml : mapping of str to float
        Volumes of the organs that are present.
    seconds : float
        All stages together, the waiting in between left out.
    """

    scan: BatchInput
    status: str
    error: InputError | None = None
    warnings: tuple[str, ...] = ()
    organs_ml: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def loaded(path: Path, device: str = "auto") -> Model:
    """A model of a file, its network to run on a device.

    Parameters
    ----------
    path : Path
        A ``.organfast`` file.
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
        model = loaded(job.model, job.device)
        if model.digest != job.digest:
            raise InputError(job.model, "has changed since the batch began", "start it again")
    except InputError as error:
        connection.send(error)
        return
    _Worker(job, model, connection).run()


class _Worker:
    """Scans on their way through one process."""

    def __init__(self, job: Job, model: Model, connection: Connection) -> None:
        self.job, self.model, self.connection = job, model, connection
        self.ledger = Ledger(job.out)
        self.inbox: SimpleQueue[BatchInput] = SimpleQueue()
        # Read or being read, not yet segmented.
        self.due: deque[tuple[BatchInput, Claim, str]] = deque()
        self.sending = Lock()

    def run(self) -> None:
        Thread(target=self._listen, daemon=True).start()
        self._send(Ready(resident_bytes()))
        with saving() as save:
            results = segment_many(
                self._paths(),
                self.model,
                self.job.settings,
                threads=self.job.threads,
                on_error=self._unusable,
            )
            for result in results:
                due = self.due.popleft()
                # No file holds the confidence: its memory goes to the next scan.
                slim = replace(result, confidence=None)
                save(partial(self._save, due, slim), _no_more)
                # Else they would stay in memory, though written, until the next one is there.
                del result, slim

    def _listen(self) -> None:
        while True:
            try:
                scan = self.connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the parent has gone, or wants no more
            self.inbox.put(scan)

    def _send(self, message: Ready | Outcome) -> None:
        with self.sending:
            self.connection.send(message)

    def _paths(self) -> Iterator[str | None]:
        """Scans to read, or None where those that were read should be segmented first."""
        while True:
            try:
                scan = self.inbox.get(block=not self.due)
            except Empty:
                yield None
                continue
            if self._begin(scan):
                yield scan.path

    def _begin(self, scan: BatchInput) -> bool:
        """Whether a scan is to be segmented here and now."""
        claim = self.ledger.claim(scan.name)
        if claim is None:
            self._send(Outcome(scan, "elsewhere"))
            return False
        try:
            self.job.outputs.check(scan.path)
            digest = input_digest(scan.path)
            record = self.ledger.record(scan.name)
            of_scan = {"input": scan.name, "output": scan.output, "input_sha256": digest}
            wanted = {**of_scan, **self.job.how(), "error": None}
            if (
                record is not None
                and wanted.items() <= record.items()
                and self.ledger.holds(record)
            ):
                self._keep(scan, claim, record)
                return False
            self._check_place(scan, record)
        except InputError as error:
            self._fail(scan, claim, error)
            return False
        self.due.append((scan, claim, digest))
        return True

    def _check_place(self, scan: BatchInput, record: Mapping[str, Any] | None) -> None:
        """Refuse a place that holds anything but what was put there by a batch."""
        place = self.job.out / scan.output
        files = {p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir()}
        if record is None or not files <= {*record["files"], "timings.json"}:
            check_target(place)

    def _keep(self, scan: BatchInput, claim: Claim, record: Mapping[str, Any]) -> None:
        organs = json.loads((self.job.out / scan.output / "organs.json").read_text("utf-8"))
        claim.release()
        volumes = {n: o["volume_ml"] for n, o in organs["organs"].items() if o["present"]}
        self._send(Outcome(scan, "kept", None, tuple(record["warnings"]), volumes))

    def _unusable(self, error: InputError) -> None:
        scan, claim, digest = self.due.popleft()
        self._fail(scan, claim, error, digest)

    def _fail(
        self, scan: BatchInput, claim: Claim, error: InputError, digest: str | None = None
    ) -> None:
        if error.path.startswith(os.fspath(claim.work)):
            error = InputError(self.job.out / scan.output, error.problem, error.remedy)
        text = f"{error.problem}; {error.remedy}".replace(scan.path, scan.name)
        try:
            record = failure(scan.name, scan.output, self.job.how(), text, digest)
            self.ledger.write(claim, record)
        except InputError as unwritten:
            error = InputError(error.path, f"{error.problem}; {unwritten.problem}", error.remedy)
        claim.release()
        self._send(Outcome(scan, "failed", error))

    def _save(self, due: tuple[BatchInput, Claim, str], result: Result) -> None:
        """Write a result and its record, in the thread that writes."""
        scan, claim, digest = due
        folder = claim.work / "result"
        try:
            self.job.outputs.save(result, folder)
            timings = json.loads((folder / "timings.json").read_text("utf-8"))
            files = self.ledger.finish(claim, folder, scan.output)
            record = {
                "input": scan.name,
                "output": scan.output,
                "input_sha256": digest,
                **self.job.how(),
                "files": files,
                "warnings": list(result.warnings),
                "error": None,
            }
            self.ledger.write(claim, record, {"input": scan.name, **timings})
        except InputError as error:
            self._fail(scan, claim, error, digest)
            return
        claim.release()
        seconds = sum(timings["seconds"].values())
        volumes = {
            organ.name: round(organ.volume_ml, 3)
            for organ in result.organs.values()
            if organ.present
        }
        self._send(Outcome(scan, "segmented", None, result.warnings, volumes, seconds))


def _no_more(error: InputError | None) -> None:
    """What became of a result is told by who wrote it, before anybody waits for it."""
