"""What segmenting one scan gives, and how it is written to a folder, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.dicom import DicomScan, write_segmentation
from organfast.errors import InputError
from organfast.nifti import Scan, write_labels, write_probability
from organfast.organs import Organ, organs_csv, organs_json

__all__ = [
    "OUTPUT_TYPES",
    "Result",
    "check_file_target",
    "check_target",
    "is_of_results",
    "is_one_file",
    "peak_memory_mb",
    "saving",
    "swap",
    "too_large",
]

RUN_RECORD = "run.json"
REPORT = "report.html"
# How a label map is written: its file in a result's folder.
OUTPUT_TYPES = {"nifti": "segmentation.nii.gz", "dicom_seg": "segmentation.dcm"}
# What a folder may hold to count as an earlier result, and be replaced.
_CONTENT = frozenset(
    {
        *OUTPUT_TYPES.values(),
        *("organs.json", "organs.csv", RUN_RECORD, "timings.json"),
        *("labels.json", "labels_itksnap.txt", "labels_slicer.ctbl"),
        *("overlay.png", "probabilities", REPORT),
    }
)


@dataclass(frozen=True, eq=False)
class Result:
    """One segmented scan.

    Parameters
    ----------
    scan : Scan
        The scan, and the geometry that outputs are written with.
    labels : (n_a, n_b, n_c) uint8 or uint16
        Label map, axes as stored by the scan; a label is a position in the class table.
    confidence : (n_a, n_b, n_c) uint8 or None
        Probability of each voxel's label before cleaning, 255 for certain; None where labels alone
        were asked for.
    organs : dict of str to Organ
        Every organ that was looked for, found or not.
    classes : ClassTable
        What the labels mean.
    record : dict
        What ``run.json`` will hold: the same for the same scan, model and settings.
    timings : dict
        Seconds by the clock for each stage, which in a batch share the machine with the reading of
        the next scan and the saving of the last, and the peak memory of the process so far. Kept
        apart so that results are reproducible.
    probability_map : callable
        From an organ's name to its full-size map; see :meth:`probability`.
    name : str
        What the scan is called in its report: its file's name, without a folder.
    """

    scan: Scan
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.uint8] | None
    organs: dict[str, Organ]
    classes: ClassTable
    record: Mapping[str, Any]
    timings: Mapping[str, Any]
    probability_map: Callable[[str], NDArray[np.uint8]]
    name: str = "the given scan"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything that a reader should check, about the scan and about its organs."""
        of_organs = (
            warning if name in warning else f"{name}: {warning}"
            for name, organ in self.organs.items()
            for warning in organ.warnings
        )
        return tuple(dict.fromkeys((*self.record["warnings"], *of_organs)))

    def probability(self, name: str) -> NDArray[np.uint8]:
        """Full-size probability map of one organ.

        Enlarged from the positions kept by ``Settings.probabilities``; for an organ that was not
        kept the classifier runs once more.

        Parameters
        ----------
        name : str
            A structure of the class table.

        Returns
        -------
        (n_a, n_b, n_c) uint8
            255 for certain; axes as stored by the scan.

        Raises
        ------
        ValueError
            The table has no such structure.
        """
        return self.probability_map(name)

    def report(self, path: str | PathLike[str]) -> None:
        """Write one HTML page that shows the scan and everything found in it, offline.

        It holds the probability maps of the organs kept by ``Settings.probabilities``.

        Parameters
        ----------
        path : str or PathLike
            File to write, whole or not at all.

        Raises
        ------
        InputError
            The file cannot be written.
        """
        from organfast.page import write_page
        from organfast.report import Segmented, scan_page

        volume = self.scan.volume
        working = volume.orientation.working
        kept = self.record["settings"]["probabilities"]
        segmented = Segmented(
            self.name,
            volume,
            working(self.labels),
            self.classes,
            self.organs,
            self.record,
            {organ: working(self.probability(organ)) for organ in kept},
        )
        write_page(scan_page(segmented), path)

    def save(
        self,
        out: str | PathLike[str],
        *,
        preview: bool = True,
        probabilities: Sequence[str] = (),
        report: bool = False,
        types: Sequence[str] = ("nifti",),
    ) -> None:
        """Write the result: a folder with everything, or a label map alone.

        The folder holds ``segmentation.nii.gz`` on the scan's own grid, ``organs.json`` and
        ``organs.csv``, label tables for ITK-SNAP, 3D Slicer and JSON, ``run.json``,
        ``timings.json`` and pictures. It appears whole or not at all; the folder of an earlier
        result is replaced, a folder with other content is refused. Called from any thread.

        Parameters
        ----------
        out : str or PathLike
            A folder, or a path that ends in ``.nii`` or ``.nii.gz`` for the label map alone.
        preview : bool
            Draw ``overlay.png``, and a picture per probability map.
        probabilities : sequence of str
            Organs whose full-size maps go to ``probabilities/NAME.nii.gz``.
        report : bool
            Write ``report.html``, too; see :meth:`report`.
        types : sequence of {"nifti", "dicom_seg"}
            How to write the label map: ``segmentation.nii.gz``, ``segmentation.dcm`` or both. A
            DICOM SEG refers to the DICOM series that was segmented.

        Raises
        ------
        InputError
            The output cannot be written, for want of memory, too, or is a folder that holds
            something else.
        ValueError
            An organ is not in the class table, or its map or a report is to go into one file with
            the labels; a type is unknown, or DICOM SEG is asked for a scan that is no DICOM series.
        """
        target = Path(out)
        for name in probabilities:
            self.classes.index(name)
        if not types or not set(types) <= set(OUTPUT_TYPES):
            raise ValueError(f"types are {types!r}; use {' and '.join(OUTPUT_TYPES)}")
        if "dicom_seg" in types and not isinstance(self.scan, DicomScan):
            raise ValueError("the scan is no DICOM series, which a DICOM SEG has to refer to")
        check_target(target)
        if is_one_file(target):
            if set(types) != {"nifti"}:
                raise ValueError(f"{target} is one NIfTI file; give a folder for DICOM SEG")
            if probabilities:
                raise ValueError(f"{target} is one file; give a folder to hold probabilities, too")
            if report:
                raise ValueError(f"{target} is one file; give a folder to hold a report, too")
            with _memory_for(target):
                write_labels(target, self.labels, self.scan.geometry)
            return
        # A link goes on pointing at the result.
        place = Path(os.path.realpath(target)) if target.is_symlink() else target
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = place.parent / f".organfast-{secrets.token_hex(8)}"
            beside.mkdir()
        except OSError as error:
            raise _unwritable(target, error) from None
        try:
            with _memory_for(target):
                self._write(beside, preview, probabilities, types)
                if report:
                    self.report(beside / REPORT)
            swap(beside, place)
        except InputError as error:  # names the file as long as it lies beside
            raise InputError(target, error.problem, error.remedy) from None
        except OSError as error:
            raise _unwritable(target, error) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write(
        self, folder: Path, preview: bool, probabilities: Sequence[str], types: Sequence[str]
    ) -> None:
        start = time.perf_counter()
        if "nifti" in types:
            write_labels(folder / OUTPUT_TYPES["nifti"], self.labels, self.scan.geometry)
        if "dicom_seg" in types and isinstance(self.scan, DicomScan):
            origin = {"version": self.record["organfast"], "model": self.record["model"]}
            path = folder / OUTPUT_TYPES["dicom_seg"]
            write_segmentation(path, self.labels, self.scan, self.classes, origin)
        texts = {
            "organs.json": organs_json(self.organs),
            "organs.csv": organs_csv(self.organs),
            "labels.json": _json(
                [{"label": n, **row} for n, row in enumerate(self.classes.to_dict())]
            ),
            "labels_itksnap.txt": self.classes.itksnap_table(),
            "labels_slicer.ctbl": self.classes.slicer_table(),
            RUN_RECORD: _json(self.record),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if preview:
            self._draw(folder / "overlay.png")
        if probabilities:
            (folder / "probabilities").mkdir()
        for name in probabilities:
            self._write_probability(folder / "probabilities", name, preview)
        # Last, so that they count what was written.
        seconds = {**self.timings["seconds"], "save": time.perf_counter() - start}
        timings = {**self.timings, "seconds": seconds, "peak_memory_mb": peak_memory_mb()}
        (folder / "timings.json").write_text(_json(timings), encoding="utf-8")

    def _draw(self, path: Path) -> None:
        from organfast.overlay import overlay_views, save_png

        volume = self.scan.volume
        labels = volume.orientation.working(self.labels)
        save_png(overlay_views(volume, labels, self.classes), path)

    def _write_probability(self, folder: Path, name: str, preview: bool) -> None:
        from organfast.overlay import overlay_probability, save_png

        probability = self.probability(name)
        write_probability(folder / f"{name}.nii.gz", probability, self.scan.geometry)
        if preview:
            volume = self.scan.volume
            figure = overlay_probability(volume, volume.orientation.working(probability), name)
            save_png(figure, folder / f"{name}.png")


@contextmanager
def saving() -> Iterator[Callable[[Callable[[], None], Callable[[InputError | None], None]], None]]:
    """Save results in a thread beside the one that makes them, one at a time.

    ::

        with saving() as save:
            for result in segment_many(scans, model):
                save(partial(result.save, out), done)

    ``save(write, done)`` first waits until the write before this one has ended: one result is being
    written and at most one waits for it. ``done`` is called in the caller's thread, in the order of
    the writes, with the reason why one failed, or None: at the next ``save`` or at the end of the
    block, which waits for the last write, after an error in the block, too.

    Raises
    ------
    Exception
        A write failed with anything but an InputError.
    """
    last: list[tuple[Future[None], Callable[[InputError | None], None]]] = []

    def settle() -> None:
        while last:
            writing, done = last.pop()
            failure = None
            try:
                writing.result()
            except InputError as error:
                failure = error
            done(failure)

    def save(write: Callable[[], None], done: Callable[[InputError | None], None]) -> None:
        settle()
        last.append((writer.submit(write), done))

    with ThreadPoolExecutor(1, thread_name_prefix="organfast-write") as writer:
        try:
            yield save
        finally:
            settle()


def peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far, MB; None where the system does not tell.

    Linux's own count: ``getrusage`` includes what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return None
    peaks = (row.split() for row in status.splitlines() if row.startswith("VmHWM:"))
    return next((int(peak[1]) / 1024 for peak in peaks), None)


def too_large(path: str | PathLike[str]) -> InputError:
    """What is said of a scan or an output that there is too little memory for.

    Parameters
    ----------
    path : str or PathLike
        The scan or the output.
    """
    return InputError(
        path, "needs more memory than there is", "use a machine with more, or crop the scan"
    )


@contextmanager
def _memory_for(target: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise too_large(target) from None


def is_one_file(out: str | PathLike[str]) -> bool:
    """Whether an output is a label map alone, by its name, rather than a folder.

    Parameters
    ----------
    out : str or PathLike
        Where a result is to go.
    """
    return Path(out).name.endswith((".nii", ".nii.gz"))


def is_of_results(names: Iterable[str]) -> bool:
    """Whether files or folders are such as lie in a result's folder, by their names.

    Parameters
    ----------
    names : iterable of str
        Of what lies directly in a folder.
    """
    return set(names) <= _CONTENT


def check_target(out: str | PathLike[str]) -> None:
    """Refuse an output that :meth:`Result.save` could not write, before anything is computed.

    Parameters
    ----------
    out : str or PathLike
        Where a result is to go.

    Raises
    ------
    InputError
        The output cannot be written, or is a folder that is no earlier result.
    """
    target = Path(out)
    if is_one_file(target):
        check_file_target(target)
        return
    if target.is_dir():
        _check_replaceable(target)
    elif target.exists():
        raise InputError(target, "is a file", "give a folder, or a name that ends in .nii.gz")
    _check_folder(next(folder for folder in target.absolute().parents if folder.exists()))


def check_file_target(path: str | PathLike[str]) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Parameters
    ----------
    path : str or PathLike
        Where a label map or a model is to go.

    Raises
    ------
    InputError
        It is a folder, or its folder does not exist or cannot be written to.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(target, "is a folder", "give the name of a file")
    _check_folder(target.parent)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(folder, "is no folder", "make it, or give another output")
    if not os.access(folder, os.W_OK):
        raise InputError(folder, "cannot be written to", "give a folder you may write to")


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what is neither empty nor an earlier result and nothing else."""
    content = {entry.name for entry in folder.iterdir()}
    is_result = RUN_RECORD in content and not content.isdisjoint(OUTPUT_TYPES.values())
    if content and not (is_result and is_of_results(content)):
        raise InputError(folder, "is a folder that holds other files", "give a new or empty folder")
    if os.path.ismount(folder) or folder.samefile(Path.cwd()):
        raise InputError(
            folder,
            "is where you stand or a mount point, and cannot be replaced",
            "give the name of a folder inside it",
        )


def swap(new: Path, target: Path) -> None:
    """Put a finished folder in its place by a rename; an earlier one there goes last.

    Parameters
    ----------
    new : Path
        The folder; for a moment the earlier one lies beside it.
    target : Path
        Its place, on the same file system.

    Raises
    ------
    OSError
        It cannot be put there; the earlier one is in its place then.
    """
    if not target.is_dir():
        os.rename(new, target)
        return
    old = new.with_name(f"{new.name}.old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def _unwritable(target: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(target, f"cannot be written ({reason})", "give a folder you may write to")


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
