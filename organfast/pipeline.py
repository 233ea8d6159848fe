"""The flow, read from top to bottom: segment a scan, segment many, locate organs.

::

    reader, one thread    | read s2    | read s3    |
    pool, ``threads``     | segment s1 | segment s2 | ...      one pool for all scans of a call
    writer, one thread    |            | save s1    |          where ``results.saving`` is used

``threads`` is what computes. The reader (file and gunzip) and the writer (gzip and files) are lanes
of input and output beside it, a scan each, so that at most three scans are in memory. Only two
things have threads of their own: the model grid, made while the pool has nothing to do, and
``Result.probability``, which may be called when the pool is gone.
"""

from __future__ import annotations

import math
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
from organfast.adaptation import Adapt, Adaptation, adapted_slabs, check_adapts
from organfast.anatomy import ClassTable
from organfast.body import body_mask
from organfast.curve import LOSSES
from organfast.dicom import DicomScan, is_dicom
from organfast.errors import InputError, is_whole
from organfast.grid import BlockGrid, GridVolume
from organfast.models.classifier import Model, load_model
from organfast.models.forest import Forest
from organfast.nifti import Scan, file_digest
from organfast.organs import Organ, Presence, drop_small, measure_organs
from organfast.probability import (
    BACKGROUND,
    Classifier,
    Enlargement,
    Slab,
    SliceClassifier,
    label_volume,
    organ_map,
    probability_slabs,
)
from organfast.progress import Progress, silent
from organfast.refinement import Refine, Visits, refined_slabs
from organfast.results import Result, peak_memory_mb, too_large
from organfast.room import roomy
from organfast.sampling import on_model_grid
from organfast.scans import as_scan
from organfast.segmentation import Cleaning, Labels, clean, keep_labels
from organfast.volume import Volume
from organfast.workers import Workers

FAR_SPACING = 1.25
_END = object()

__all__ = ["Settings", "check_settings", "half_as_dense", "locate", "segment", "segment_many"]


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
    refine : Refine or None
        Coarse to fine: ask at every second position along each axis, and at the others only where
        those around them leave a doubt. None asks everywhere. What it changes, ``verify`` tells.
    confidence : bool
        Measure how probable the labels are. Without it each position is asked for its label alone,
        and a forest stops as soon as the trees that are left cannot change it: the same labels
        (unless two classes are as probable to seven digits), sooner. Only on a scan's own pixels,
        at stride 1 and where nothing else needs probabilities; an organ is then present by its
        volume alone.
    trees : int or None
        Ask so many of the forest's trees, the first ones: sooner, and a little less accurate. None
        asks all.
    adapt : Adapt, bool or None
        Let the organs of this scan correct what the classifier said of them, see ``adaptation``.
        True is in the model's way or, where it has none, the usual one; None is as the model has
        it. Only for models with a working grid.
    preset : str or None
        Which preset of the model these settings are, for the record; :meth:`of_preset` says it.

    Raises
    ------
    ValueError
        The stride or the trees are not whole numbers from 1, one name stands where a tuple belongs,
        ``refine`` or ``adapt`` is something else, or labels alone are asked for together with what
        needs probabilities.
    """

    stride: int | tuple[int, int, int] | None = None
    organs: tuple[str, ...] | None = None
    cleaning: Cleaning = field(default_factory=Cleaning)
    body_mask: bool = True
    keep_context: bool = False
    probabilities: tuple[str, ...] = ()
    refine: Refine | None = None
    confidence: bool = True
    trees: int | None = None
    adapt: Adapt | bool | None = None
    preset: str | None = None

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
        if self.trees is not None and not is_whole(self.trees, 1):
            raise ValueError(f"trees is {self.trees!r}; give a whole number from 1, or None")
        if not isinstance(self.adapt, (Adapt, bool, type(None))):
            raise ValueError(f"adapt is {self.adapt!r}; give Adapt(), True, False or None")
        if not isinstance(self.refine, (Refine, type(None))):
            raise ValueError(f"refine is {self.refine!r}; give Refine(), or None")
        if not self.confidence and (self.probabilities or self.refine):
            wish = "probability maps" if self.probabilities else "coarse to fine"
            raise ValueError(f"labels alone leave no probabilities for {wish}; give up one of them")

    def adapts(self, model: Model) -> Adapt | None:
        """How a scan's own organs correct a model: as these settings wish, or as the model does.

        Parameters
        ----------
        model : Model
            What is asked; its own way also holds where these say True.
        """
        if self.adapt is None:
            return model.adapt
        if isinstance(self.adapt, Adapt):
            return self.adapt
        return (model.adapt or Adapt()) if self.adapt else None

    @staticmethod
    def of_preset(model: Model, name: str, settings: Settings | None = None) -> Settings:
        """Settings with the stride, the coarse to fine and the trees of a preset of a model.

        Parameters
        ----------
        model : Model
            With a curve of its own, as ``organfast evaluate --curve --store`` writes it.
        name : {"fast", "balanced", "accurate"}
            The fastest that lost at most 0.05, 0.01 or no mean Dice against the best.
        settings : Settings, optional
            Everything else.

        Raises
        ------
        ValueError
            There is no such preset, the model has none, or it has changed since they were measured.
        """
        if name not in LOSSES:
            raise ValueError(f"preset {name!r} is unknown; use {', '.join(LOSSES)}")
        again = "measure them: organfast evaluate DATASET -m MODEL --curve --store"
        if model.presets is None:
            raise ValueError(f"the model has no presets; {again}")
        if model.presets.model != model.digest:
            raise ValueError(f"the model has changed since its presets were measured; {again}")
        point = model.presets.preset(name).settings
        refine = None if point.margin is None else Refine(point.margin, point.disagreement)
        return replace(
            settings or Settings(),
            stride=point.stride,
            refine=refine,
            trees=point.trees,
            preset=name,
        )


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
    settings = settings or Settings()
    check_settings(settings, model)
    with Workers(threads) as workers:
        return _segment(_read(scan), model, settings, workers, progress)


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

    To save each while the next one computes, see :func:`organfast.results.saving`.

    Parameters
    ----------
    scans : iterable
        Each as for :func:`segment`. None among them says that no more are known yet: those that
        were read are segmented before the iterable is asked again.
    model : Model or path
        Loaded once.
    settings : Settings, optional
        How to segment.
    threads : int
        Threads of the computation, the same for all scans; besides, one reads and one hashes.
    on_error : callable, optional
        Called with the reason when a scan cannot be used or takes more memory than there is; the
        rest goes on. Without it the error is raised.
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
    check_settings(settings, model)
    with (
        Workers(threads) as workers,
        ThreadPoolExecutor(1, thread_name_prefix="organfast-read") as reader,
    ):
        ahead: deque[tuple[Any, Future[_Input]]] = deque()
        for source in chain(scans, [_END]):
            is_scan = source is not None and source is not _END
            if is_scan:
                ahead.append((source, reader.submit(_read, source)))
            if len(ahead) > 1 or (ahead and not is_scan):
                given, reading = ahead.popleft()
                try:
                    # No name is given to the result, which would keep it while the next computes.
                    yield _segment(reading.result(), model, settings, workers, progress)
                except (InputError, MemoryError) as error:
                    if on_error is None:
                        raise
                    on_error(error if isinstance(error, InputError) else too_large(_name(given)))
                del reading


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
    return segment(scan, model, half_as_dense(settings, model), threads=threads).organs


def half_as_dense(settings: Settings | None, model: Model) -> Settings:
    """Settings to locate with: half as many positions along each axis as the model's own.

    Parameters
    ----------
    settings : Settings or None
        A stride given here stays as it is.
    model : Model
        Whose stride is doubled.
    """
    settings = settings or Settings()
    if settings.stride is not None:
        return settings
    k, i, j = model.stride
    return replace(settings, stride=(2 * j, 2 * i, 2 * k))


@dataclass(frozen=True, eq=False)
class _Input:
    """A scan that has been read, and what its file was."""

    name: str
    scan: Scan
    digest: str | None
    seconds: float


def _name(source: Any) -> str:
    return fspath(source) if isinstance(source, (str, PathLike)) else "the given scan"


def _read(source: Any) -> _Input:
    """A scan; its file is hashed while it is inflated, those of a series as they are decoded."""
    start = time.perf_counter()
    if not isinstance(source, (str, PathLike)) or is_dicom(source):
        scan = as_scan(source)
        digest = scan.digest if isinstance(scan, DicomScan) else None
        return _Input(_name(source), scan, digest, time.perf_counter() - start)
    with ThreadPoolExecutor(1, thread_name_prefix="organfast-digest") as beside:
        hashing = beside.submit(file_digest, source)
        scan = as_scan(source)
        return _Input(_name(source), scan, hashing.result(), time.perf_counter() - start)


def _segment(
    given: _Input, model: Model, settings: Settings, workers: Workers, progress: Progress
) -> Result:
    volume, classes = given.scan.volume, model.classes
    wanted = _wanted_labels(classes, settings)
    kept = [classes.index(name) for name in settings.probabilities]
    seconds, threads = {"read": given.seconds}, workers.threads
    # In working order, whatever the order of the file: the kernels write along memory.
    shape = volume.working.shape
    labels: NDArray[Any] = roomy(shape, np.uint8 if len(classes) <= 256 else np.uint16)
    confidence = roomy(shape, np.uint8) if settings.confidence else None

    visits = Visits()
    with _timed(seconds, "model grid and body"):
        flow = _Flow.prepare(given, model, settings, workers)
    with _timed(seconds, "classify and enlarge"):
        if confidence is None:
            evidence = None
            flow.label_alone(labels, workers, visits, progress)
        else:
            evidence = label_volume(
                flow.slabs(workers, visits, progress),
                flow.enlargement,
                labels,
                workers,
                confidence=confidence,
                keep=kept,
            )
    maps = evidence.maps if evidence else {}
    with _timed(seconds, "clean"):
        cleaning = settings.cleaning.settled(in_atlas=flow.is_in_atlas)
        cleaned = clean(labels, classes, cleaning, volume.voxel_ml)
    with _timed(seconds, "measure organs"):
        position = evidence.position if evidence else None
        organs = _organs(labels, confidence, volume, position, model, cleaning)
        organs = {name: organ for name, organ in organs.items() if organ.label in wanted}
        keep_labels(labels, wanted)
    return Result(
        scan=given.scan,
        labels=volume.orientation.stored(labels),
        confidence=None if confidence is None else volume.orientation.stored(confidence),
        organs=organs,
        classes=classes,
        record={
            "organfast": __version__,
            "libraries": {"numpy": np.__version__, "python": platform.python_version()},
            "model": model.digest,
            "input": given.digest,
            "settings": {
                **asdict(settings),
                "stride": flow.block_grid.stride[::-1],
                "adapt": None if flow.adapt is None else asdict(flow.adapt),
            },
            "positions": {**asdict(visits), "share_asked": visits.share},
            "adapted": flow.notes.get("adapted"),
            "cleaned": cleaned,
            "warnings": [*given.scan.warnings, *flow.warnings],
        },
        timings={"threads": threads, "seconds": seconds, "peak_memory_mb": peak_memory_mb()},
        probability_map=lambda name: flow.probability_map(name, maps, threads),
        name=Path(given.name).name,
    )


def _organs(
    labels: Labels,
    confidence: NDArray[np.uint8] | None,
    volume: Volume,
    position: NDArray[np.float64] | None,
    model: Model,
    cleaning: Cleaning,
) -> dict[str, Organ]:
    """Measure the organs; those that are too small leave the map, and the holes that they were."""
    presence = Presence(sure=model.sure, whole_ml=model.whole_ml)
    classes = model.classes
    organs = measure_organs(labels, confidence, volume, classes, position, presence)
    stored = volume.orientation.stored(labels)
    gone = drop_small(stored, organs, classes, volume, presence)
    if not gone:
        return organs
    if cleaning.fill_holes:
        clean(labels, classes, Cleaning(keep="none"), volume.voxel_ml)
    organs = measure_organs(labels, confidence, volume, classes, position, presence)
    return organs | {name: replace(organs[name], warnings=(why,)) for name, why in gone.items()}


@dataclass(frozen=True, eq=False)
class _Flow:
    """One scan on its way through one model: everything that the classifier needs of it."""

    volume: Volume
    model: Model
    settings: Settings
    classifier: Classifier
    grid_volume: GridVolume
    block_grid: BlockGrid
    mask: NDArray[np.bool_] | None
    enlargement: Enlargement
    adapt: Adapt | None
    warnings: tuple[str, ...]
    notes: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def prepare(given: _Input, model: Model, settings: Settings, workers: Workers) -> _Flow:
        volume = given.scan.volume
        grid_volume = on_model_grid(given.name, volume, model.grid, workers)
        stride = _stride(settings.stride) if settings.stride is not None else model.stride
        block_grid = BlockGrid(grid_volume.shape, stride)
        mask = body_mask(grid_volume, block_grid) if settings.body_mask else None
        warnings = _spacing_warnings(volume, model)
        if mask is not None and not mask.any():
            warnings = (*warnings, "no body was found in this scan, so no organ was looked for")
        adapt = settings.adapts(model)
        labelled = block_grid if adapt is None else BlockGrid(grid_volume.shape, (1, 1, 1))
        enlargement = Enlargement.to_scan(labelled, grid_volume, volume.working.shape)
        return _Flow(
            volume,
            model,
            settings,
            _asked(model, settings),
            grid_volume,
            block_grid,
            mask,
            enlargement,
            adapt,
            warnings,
        )

    def slices(self, workers: Workers) -> SliceClassifier:
        """The classifier on this scan."""
        return SliceClassifier(
            self.grid_volume,
            self.classifier,
            self.model.pattern,
            self.block_grid,
            workers,
            self.model.calibration,
        )

    def slabs(
        self, workers: Workers, visits: Visits, progress: Progress = silent
    ) -> Iterator[Slab]:
        """Probabilities where the enlargement wants them, slice after slice."""
        asked = self.asked_slabs(workers, visits, progress)
        if self.adapt is None:
            return asked
        coarse = np.stack([slab for _, slab in asked])
        classes = self.model.classes
        at = self._laid_in_atlas(coarse, self.adapt)
        adaptation = Adaptation.of(coarse, self.block_grid, self.grid_volume, classes, self.adapt)
        self.notes["adapted"] = {**adaptation.record(classes), "in_atlas": at}
        return adapted_slabs(coarse, self.block_grid, self.grid_volume, adaptation, workers)

    def _laid_in_atlas(self, coarse: NDArray[np.float32], adapt: Adapt) -> dict[str, Any] | None:
        """Rule organs out where they cannot be, in place; what is told of that."""
        atlas, classes = self.model.atlas, self.model.classes
        if atlas is None or not adapt.atlas:
            return None
        where = self.block_grid, self.grid_volume
        place = atlas.of_scan(coarse, *where, classes.organs)
        if place is None:
            return None
        rest = BACKGROUND if classes.context is None else classes.context
        gone = atlas.rule_out(coarse, place, *where, classes.organs, rest)
        return {
            "stretch": [round(s, 3) for s in place.stretch],
            "log_p": round(place.log_p, 3),
            "ruled_out": {classes.names[n]: round(share, 3) for n, share in gone.items()},
        }

    @property
    def is_in_atlas(self) -> bool:
        """Whether organs were ruled out by an atlas."""
        return bool(self.notes.get("adapted", {}).get("in_atlas"))

    def asked_slabs(
        self, workers: Workers, visits: Visits, progress: Progress = silent
    ) -> Iterator[Slab]:
        """Probabilities at the positions of the block grid, slice after slice."""
        slices, refine, total = self.slices(workers), self.settings.refine, self.block_grid.shape[0]
        if refine is None:
            self._visit_all(visits)
            slabs = probability_slabs(slices, self.mask, workers)
        else:
            slabs = refined_slabs(slices, self.mask, refine, workers, visits)
        for n, slab in slabs:
            yield n, slab
            progress("segmenting", n + 1, total)

    def label_alone(
        self, labels: NDArray[Any], workers: Workers, visits: Visits, progress: Progress
    ) -> None:
        """Write the label of each voxel, all of which are positions."""
        slices, total = self.slices(workers), self.block_grid.shape[0]
        masks = np.broadcast_to(np.True_, self.block_grid.shape) if self.mask is None else self.mask
        self._visit_all(visits)

        def write(n: int) -> int:
            labels[n][masks[n]] = slices.labels(n, masks[n])
            return n

        for run in slices.runs():
            for n in workers.in_order(write, run):
                progress("segmenting", n + 1, total)

    def _visit_all(self, visits: Visits) -> None:
        n = math.prod(self.block_grid.shape) if self.mask is None else int(self.mask.sum())
        visits.n_inside = visits.n_asked = n

    def probability_map(
        self, name: str, kept: Mapping[int, NDArray[np.float32]], threads: int
    ) -> NDArray[np.uint8]:
        """One structure at full size; the classifier runs again if its positions were not kept."""
        label = self.model.classes.index(name)
        out: NDArray[np.uint8] = roomy(self.enlargement.shape, np.uint8)
        with Workers(threads) as workers:
            coarse = kept.get(label)
            if coarse is None:
                slabs = self.slabs(workers, Visits())
                coarse = np.stack([slab[..., label] for _, slab in slabs])
            organ_map(coarse, self.enlargement, out, workers)
        return self.volume.orientation.stored(out)


def _stride(stride: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """A user's stride (cols, rows, slices) as (k, i, j); an int visits every slice."""
    cols, rows, slices = stride if isinstance(stride, (tuple, list)) else (stride, stride, 1)
    return slices, rows, cols


def check_settings(settings: Settings, model: Model) -> None:
    """Refuse settings that a model cannot segment by, before anything is read.

    Parameters
    ----------
    settings : Settings
        How to segment.
    model : Model
        The model.

    Raises
    ------
    ValueError
        They do not fit the model.
    """
    _check_labels_alone(settings, model)
    if settings.adapts(model) is not None:
        check_adapts(model.grid)
    _asked(model, settings)


def _check_labels_alone(settings: Settings, model: Model) -> None:
    """Refuse labels alone where a voxel's label is not one position's."""
    if settings.confidence:
        return
    stride = _stride(settings.stride) if settings.stride is not None else model.stride
    if model.grid.spacing_mm is not None:
        raise ValueError(
            "labels alone need a model that works on the scan's own pixels, and this one works on "
            "a grid of {} x {} x {} mm; leave the confidence on, or train with native "
            "spacing".format(*(f"{mm:g}" for mm in model.grid.spacing_mm))
        )
    if stride != (1, 1, 1):
        raise ValueError(
            f"labels alone need stride 1,1,1, for between positions a label is a blend of "
            f"probabilities; the stride is {','.join(map(str, stride[::-1]))}: give 1, or leave "
            "the confidence on"
        )
    if not hasattr(model.classifier, "labels"):
        raise ValueError("this model's classifier gives no labels alone; leave the confidence on")
    if model.calibration is not None and not model.calibration.keeps_order:
        raise ValueError(
            "this model's calibration may change which class is the most probable, so labels alone "
            "need its probabilities; leave the confidence on"
        )


def _asked(model: Model, settings: Settings) -> Classifier:
    """The model's classifier, or the first trees of its forest."""
    if settings.trees is None:
        return model.classifier
    if not isinstance(model.classifier, Forest):
        raise ValueError("trees are of a forest, and the model is a network; leave them")
    return model.classifier.first(settings.trees)


def _wanted_labels(classes: ClassTable, settings: Settings) -> frozenset[int]:
    """Labels that stay in the label map."""
    organs = classes.organs if settings.organs is None else map(classes.index, settings.organs)
    context = (n for n, s in enumerate(classes.structures) if s.role == "context")
    return frozenset(organs) | frozenset(context if settings.keep_context else ())


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
