"""The flow, read from top to bottom: segment a scan, segment many, locate organs."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast import __version__
from organfast.anatomy import ClassTable
from organfast.body import body_mask
from organfast.errors import InputError, is_whole
from organfast.grid import BlockGrid, GridVolume
from organfast.models.classifier import Model, load_model
from organfast.nifti import Scan, as_scan, file_digest
from organfast.organs import Organ, measure_organs
from organfast.probability import (
    Enlargement,
    SliceClassifier,
    Workers,
    label_volume,
    organ_map,
    probability_slabs,
)
from organfast.progress import Progress, silent
from organfast.results import Result
from organfast.sampling import on_model_grid
from organfast.segmentation import Cleaning, clean
from organfast.volume import Volume

FAR_SPACING = 1.25
_END = object()

__all__ = ["Settings", "locate", "segment", "segment_many"]


@dataclass(frozen=True)
class Settings:
    """How a scan is segmented; each of these is recorded in ``run.json``.

    Parameters
    ----------
    stride : int, (cols, rows, slices) or None
        Voxels of the model grid between positions; an int is for columns and rows, with every
        slice visited; None is the model's own.
    organs : tuple of str or None
        Organs to keep in the label map and to report; None keeps all.
    cleaning : Cleaning
        What is done to the label map after the classifier.
    body_mask : bool
        Visit only positions inside the body; the rest is background.
    keep_context : bool
        Leave the context classes in the label map, which otherwise holds organs only.
    probabilities : tuple of str
        Organs whose probabilities are kept, so that ``Result.probability`` need not recompute.

    Raises
    ------
    ValueError
        The stride is not made of whole numbers from 1, or one name stands where a tuple belongs.
    """

    stride: int | tuple[int, int, int] | None = None
    organs: tuple[str, ...] | None = None
    cleaning: Cleaning = field(default_factory=Cleaning)
    body_mask: bool = True
    keep_context: bool = False
    probabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        strides = self.stride if isinstance(self.stride, (tuple, list)) else (self.stride,) * 3
        if self.stride is not None and not (
            len(strides) == 3 and all(is_whole(s, 1) for s in strides)
        ):
            raise ValueError(
                f"stride is {self.stride!r}; give a whole number from 1, or three of them "
                "(cols, rows, slices)"
            )
        for name in ("organs", "probabilities"):
            names = getattr(self, name)
            if isinstance(names, str):
                raise ValueError(f"{name} is {names!r}; give a tuple of names, ({names!r},)")


# --- segmenting -----------------------------------------------------------------------------------


def segment(
    scan: Any,
    model: Model | str | PathLike[str],
    settings: Settings | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Result:
    """Segment one scan and measure its organs. Nothing is written to disk.

    Parameters
    ----------
    scan : path, nibabel image, Volume, Scan or (array, affine)
        The CT scan.
    model : Model or path
        What ``train`` or ``load_model`` returned, or a ``.organfast`` file.
    settings : Settings, optional
        How to segment.
    threads : int
        Threads; the result does not depend on it.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Result
        Label map on the scan's own grid, organs, probabilities on request.

    Raises
    ------
    InputError
        The scan or the model cannot be used.
    ValueError
        The settings do not fit the model.
    """
    model = model if isinstance(model, Model) else load_model(model)
    return _segment(_read(scan), model, settings or Settings(), threads, progress)


def segment_many(
    scans: Iterable[Any],
    model: Model | str | PathLike[str],
    settings: Settings | None = None,
    *,
    threads: int = 1,
    on_error: Callable[[InputError], None] | None = None,
    progress: Progress = silent,
) -> Iterator[Result]:
    """Segment scans one after the other; the next one is read while this one computes.

    Parameters
    ----------
    scans : iterable
        Each as for :func:`segment`.
    model : Model or path
        Loaded once.
    settings : Settings, optional
        How to segment.
    threads : int
        Threads of the computation; one more reads.
    on_error : callable, optional
        Called with the reason when a scan cannot be used; the rest goes on. Without it the
        error is raised.
    progress : callable, optional
        Called with (what, done, total) for each scan.

    Yields
    ------
    Result
        In the order of the scans.

    Raises
    ------
    InputError
        The model cannot be used; or a scan, where ``on_error`` is not given.
    ValueError
        ``scans`` is a single path, or the settings do not fit the model.
    """
    if isinstance(scans, (str, PathLike)):
        raise ValueError(f"scans is one path, {str(scans)!r}; give a list of them")
    model = model if isinstance(model, Model) else load_model(model)
    settings = settings or Settings()
    with ThreadPoolExecutor(1, thread_name_prefix="organfast-read") as reader:
        ahead: deque[Future[_Input]] = deque()
        for source in chain(scans, [_END]):
            if source is not _END:
                ahead.append(reader.submit(_read, source))
            if len(ahead) > 1 or (source is _END and ahead):
                try:
                    yield _segment(ahead.popleft().result(), model, settings, threads, progress)
                except InputError as error:
                    if on_error is None:
                        raise
                    on_error(error)


def locate(
    scan: Any,
    model: Model | str | PathLike[str],
    settings: Settings | None = None,
    *,
    threads: int = 1,
) -> dict[str, Organ]:
    """Find organs without asking for a fine label map: half as many positions along each axis.

    Parameters
    ----------
    scan : path, nibabel image, Volume, Scan or (array, affine)
        The CT scan.
    model : Model or path
        What ``train`` or ``load_model`` returned, or a ``.organfast`` file.
    settings : Settings, optional
        How to segment; a stride given here is used as it is.
    threads : int
        Threads; the result does not depend on it.

    Returns
    -------
    dict of str to Organ
        Presence, centre, box and volume of every organ of the model, by name.

    Raises
    ------
    InputError
        The scan or the model cannot be used.
    """
    model = model if isinstance(model, Model) else load_model(model)
    settings = settings or Settings()
    if settings.stride is None:
        k, i, j = model.stride
        settings = replace(settings, stride=(2 * j, 2 * i, 2 * k))
    return segment(scan, model, settings, threads=threads).organs


@dataclass(frozen=True, eq=False)
class _Input:
    """A scan that has been read, and what its file was."""

    name: str
    scan: Scan
    digest: str | None
    seconds: float


def _read(source: Any) -> _Input:
    start = time.perf_counter()
    is_path = isinstance(source, (str, PathLike))
    digest = file_digest(source) if is_path else None
    name = fspath(source) if is_path else "the given scan"
    return _Input(name, as_scan(source), digest, time.perf_counter() - start)


def _segment(
    given: _Input, model: Model, settings: Settings, threads: int, progress: Progress
) -> Result:
    volume, classes = given.scan.volume, model.classes
    wanted = _wanted_labels(classes, settings)
    kept = [classes.index(name) for name in settings.probabilities]
    seconds = {"read": given.seconds}
    # In working order, whatever the order of the file: the kernels write along memory.
    shape = volume.working.shape
    labels: NDArray[Any] = np.zeros(shape, np.uint8 if len(classes) <= 256 else np.uint16)
    confidence = np.zeros(shape, np.uint8)

    with Workers(threads) as workers:
        with _timed(seconds, "model grid and body"):
            flow = _Flow.prepare(given, model, settings, threads)
        with _timed(seconds, "classify and enlarge"):
            evidence = label_volume(
                flow.slabs(workers, progress),
                flow.enlargement,
                labels,
                workers,
                confidence=confidence,
                keep=kept,
            )
    with _timed(seconds, "clean"):
        cleaned = clean(labels, classes, settings.cleaning, volume.voxel_ml)
    with _timed(seconds, "measure organs"):
        organs = measure_organs(labels, confidence, volume, classes, evidence.position)
        organs = {name: organ for name, organ in organs.items() if organ.label in wanted}
        _clear_unwanted(labels, wanted, classes)
    return Result(
        scan=given.scan,
        labels=volume.orientation.stored(labels),
        confidence=volume.orientation.stored(confidence),
        organs=organs,
        classes=classes,
        record={
            "organfast": __version__,
            "libraries": {"numpy": np.__version__, "python": platform.python_version()},
            "model": model.digest,
            "input": given.digest,
            "settings": {**asdict(settings), "stride": flow.block_grid.stride[::-1]},
            "cleaned": cleaned,
            "warnings": [*given.scan.warnings, *flow.warnings],
        },
        timings={"threads": threads, "seconds": seconds, "peak_memory_mb": _peak_memory_mb()},
        probability_map=lambda name: flow.probability_map(name, evidence.maps, threads),
    )


@dataclass(frozen=True, eq=False)
class _Flow:
    """One scan on its way through one model: everything that the classifier needs of it."""

    volume: Volume
    model: Model
    grid_volume: GridVolume
    block_grid: BlockGrid
    mask: NDArray[np.bool_] | None
    enlargement: Enlargement
    warnings: tuple[str, ...]

    @staticmethod
    def prepare(given: _Input, model: Model, settings: Settings, threads: int) -> _Flow:
        volume = given.scan.volume
        grid_volume = on_model_grid(given.name, volume, model.grid, threads)
        stride = _stride(settings.stride) if settings.stride is not None else model.stride
        block_grid = BlockGrid(grid_volume.shape, stride)
        mask = body_mask(grid_volume, block_grid) if settings.body_mask else None
        warnings = _spacing_warnings(volume, model)
        if mask is not None and not mask.any():
            warnings = (*warnings, "no body was found in this scan, so no organ was looked for")
        enlargement = Enlargement.to_scan(block_grid, grid_volume, volume.working.shape)
        return _Flow(volume, model, grid_volume, block_grid, mask, enlargement, warnings)

    def slabs(
        self, workers: Workers, progress: Progress = silent
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        total = self.block_grid.shape[0]
        slices = SliceClassifier(
            self.grid_volume, self.model.classifier, self.model.pattern, self.block_grid, workers
        )
        for n, slab in probability_slabs(slices, self.mask, workers):
            yield n, slab
            progress("segmenting", n + 1, total)

    def probability_map(
        self, name: str, kept: Mapping[int, NDArray[np.float32]], threads: int
    ) -> NDArray[np.uint8]:
        """One structure at full size; the classifier runs again if its positions were not kept."""
        label = self.model.classes.index(name)
        out = np.zeros(self.enlargement.shape, np.uint8)
        with Workers(threads) as workers:
            coarse = kept.get(label)
            if coarse is None:
                coarse = np.stack([slab[..., label] for _, slab in self.slabs(workers)])
            organ_map(coarse, self.enlargement, out, workers)
        return self.volume.orientation.stored(out)


def _stride(stride: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """A user's stride (cols, rows, slices) as (k, i, j); an int visits every slice."""
    cols, rows, slices = stride if isinstance(stride, (tuple, list)) else (stride, stride, 1)
    return slices, rows, cols


def _wanted_labels(classes: ClassTable, settings: Settings) -> frozenset[int]:
    """Labels that stay in the label map."""
    organs = classes.organs if settings.organs is None else map(classes.index, settings.organs)
    context = (n for n, s in enumerate(classes.structures) if s.role == "context")
    return frozenset(organs) | frozenset(context if settings.keep_context else ())


def _clear_unwanted(
    labels: NDArray[np.unsignedinteger], wanted: frozenset[int], classes: ClassTable
) -> None:
    """Turn every label that was not asked for into background, slice by slice."""
    kept = np.array([n if n in wanted else 0 for n in range(len(classes))], labels.dtype)
    for labels_slice in labels:
        labels_slice[...] = kept[labels_slice]


def _spacing_warnings(volume: Volume, model: Model) -> tuple[str, ...]:
    """A native model knows organs by their size in pixels."""
    learned = model.training.get("spacing_mm")
    if model.grid.spacing_mm is not None or learned is None:
        return ()
    found = volume.working_spacing_mm[::-1]
    if all(1 / FAR_SPACING <= f / t <= FAR_SPACING for f, t in zip(found, learned, strict=True)):
        return ()
    here, there = (" x ".join(f"{s:.2f}" for s in spacing) for spacing in (found, learned))
    return (
        f"voxels are {here} mm, the model learned on {there} mm and works on native pixels; "
        "train with a working grid to segment scans of other spacings",
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far; None where the system does not tell.

    Linux's own count: ``getrusage`` includes what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return None
    peaks = (row.split() for row in status.splitlines() if row.startswith("VmHWM:"))
    return next((int(peak[1]) / 1024 for peak in peaks), None)
