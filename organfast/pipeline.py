"""The flow, read from top to bottom: train a model, segment a scan, locate its organs."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import chain
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast import __version__
from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.body import body_mask
from organfast.errors import InputError
from organfast.grid import BlockGrid, GridVolume, ModelGrid
from organfast.layouts import Case, Dataset, LabelMap, dataset_classes, find_cases
from organfast.metrics import accuracy, confusion
from organfast.models.classifier import Model, load_model
from organfast.models.forest import ForestSettings, train_forest
from organfast.nifti import Scan, as_scan, file_digest
from organfast.organs import Organ, measure_organs
from organfast.probability import (
    Enlargement,
    Workers,
    label_volume,
    organ_map,
    probability_slabs,
)
from organfast.results import Result
from organfast.sampling import (
    Split,
    draw_examples,
    features_at,
    on_model_grid,
    slabs_at,
    split_patients,
)
from organfast.segmentation import Cleaning, clean
from organfast.volume import Volume

NATIVE_STRIDE = (1, 4, 4)
WORKING_STRIDE = (2, 3, 3)
FAR_SPACING = 1.25
_END = object()

__all__ = ["Recipe", "Settings", "locate", "segment", "segment_many", "train"]

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that nobody watches.

    Parameters
    ----------
    what : str
        What is being done.
    done, total : int
        Steps done, steps in all.
    """


@dataclass(frozen=True)
class Recipe:
    """How a model is learned.

    Parameters
    ----------
    grid : ModelGrid
        The working grid, by default 1.5 x 1.5 x 3 mm with the piecewise HU table;
        ``ModelGrid(None)`` is the scan's own pixels.
    n_per_class : int
        Most training positions per class and patient.
    context_factor : int or None
        The context classes get this many times as many: what lies between the organs is more
        varied than any organ, and every organ borders on it. None is 3, but 1 where a single
        patient trains: its context teaches little of the next one's, and displaces the organs.
    forest : ForestSettings
        Kind and size of the forest.
    classes : ClassTable or None
        Structures to learn; None takes those of the default table that the dataset annotates.
    split : Split or None
        Patients to train, validate and test on; None draws one, see ``split_patients``.
    seed : int
        Seed of the split and of the positions; the forest has its own.

    Raises
    ------
    ValueError
        A number is below 1.
    """

    grid: ModelGrid = field(default_factory=lambda: ModelGrid((1.5, 1.5, 3.0), "piecewise"))
    n_per_class: int = 1000
    context_factor: int | None = None
    forest: ForestSettings = field(default_factory=ForestSettings)
    classes: ClassTable | None = None
    split: Split | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_per_class", "context_factor"):
            number = getattr(self, name)
            if not (_is_count(number) or (number is None and name == "context_factor")):
                raise ValueError(f"{name} is {number!r}; give a whole number from 1")

    def n_of_each(self, classes: ClassTable, n_patients: int) -> list[int]:
        """Most training positions of each class, in label order.

        Parameters
        ----------
        classes : ClassTable
            The classes.
        n_patients : int
            Patients who train.
        """
        usual = 1 if n_patients == 1 else 3
        factor = usual if self.context_factor is None else self.context_factor
        roles = (s.role for s in classes.structures)
        return [self.n_per_class * (factor if role == "context" else 1) for role in roles]


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
        if self.stride is not None and not (len(strides) == 3 and all(map(_is_count, strides))):
            raise ValueError(
                f"stride is {self.stride!r}; give a whole number from 1, or three of them "
                "(cols, rows, slices)"
            )
        for name in ("organs", "probabilities"):
            names = getattr(self, name)
            if isinstance(names, str):
                raise ValueError(f"{name} is {names!r}; give a tuple of names, ({names!r},)")


def _is_count(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) >= 1


# --- learning -------------------------------------------------------------------------------------


def train(
    dataset: str | PathLike[str] | Dataset,
    pattern: Block | None = None,
    recipe: Recipe | None = None,
    *,
    threads: int = 1,
    progress: Progress = silent,
) -> Model:
    """Learn a model from labelled scans, and score it on patients that were held out.

    Parameters
    ----------
    dataset : path or Dataset
        A folder in one of the layouts of ``find_cases``, or what that function returned.
    pattern : Block, optional
        What the classifier sees around a position; ``Block(33)`` by default.
    recipe : Recipe, optional
        Everything else that shapes the model.
    threads : int
        Threads of the training; the model does not depend on it.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    Model
        With the training cases' digests, the split and the held-out scores in its record.

    Raises
    ------
    InputError
        A file of the dataset cannot be used.
    ValueError
        The recipe does not fit the dataset.
    """
    pattern, recipe = pattern or Block(33), recipe or Recipe()
    dataset = dataset if isinstance(dataset, Dataset) else find_cases(dataset)
    classes = recipe.classes or dataset_classes(dataset)
    split = recipe.split or split_patients(dataset.patients, recipe.seed)
    split.check(dataset.patients)

    cases = [case for case in dataset.cases if case.patient in split.train]
    features, labels, record = _training_set(cases, classes, pattern, recipe, progress)
    forest = train_forest(
        features, labels, recipe.forest, pattern, len(classes), threads=threads, progress=progress
    )
    record |= {
        "layout": dataset.layout,
        "split": asdict(split),
        "seed": recipe.seed,
        "forest": asdict(recipe.forest),
    }
    model = Model(
        classifier=forest,
        classes=classes,
        pattern=pattern,
        grid=recipe.grid,
        stride=WORKING_STRIDE if recipe.grid.spacing_mm else NATIVE_STRIDE,
        training=record,
        scores={},
    )
    scores = {
        use: _block_scores(model, dataset, patients, recipe, progress)
        for use, patients in (("validation", split.validation), ("test", split.test))
        if patients
    }
    return replace(model, scores={use: score for use, score in scores.items() if score["n_blocks"]})


def _training_set(
    cases: Sequence[Case],
    classes: ClassTable,
    pattern: Block,
    recipe: Recipe,
    progress: Progress,
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[str, Any]]:
    """Features and labels of the training positions, and the record of where they are from."""
    n_of_each = recipe.n_of_each(classes, len({case.patient for case in cases}))
    features, labels, spacings, digests, warnings = [], [], [], {}, []
    for number, case in enumerate(cases):
        progress("reading cases", number, len(cases))
        examples = draw_examples(case, classes, recipe.grid, n_of_each, (recipe.seed, number))
        features.append(features_at(examples.grid_volume, pattern, examples.positions))
        labels.append(examples.labels)
        spacings.append(examples.grid_volume.spacing_mm)
        digests[case.name] = _case_digests(case)
        warnings += [f"{case.name}: {warning}" for warning in examples.warnings]
    progress("reading cases", len(cases), len(cases))
    counts = np.stack([np.bincount(y, minlength=len(classes)) for y in labels])
    record = {
        "cases": digests,
        "n_of_each_class": n_of_each,
        "n_examples": int(counts.sum()),
        "n_cases_with": dict(zip(classes.names, (counts > 0).sum(axis=0).tolist(), strict=True)),
        "spacing_mm": np.median(spacings, axis=0)[::-1].tolist(),
        "warnings": warnings,
    }
    return _stacked(features), np.concatenate(labels), record


def _stacked(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The parts in one array; each is let go once it is copied, for together they fill memory."""
    stacked = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float32)
    end = len(stacked)
    while parts:
        part = parts.pop()
        stacked[end - len(part) : end] = part
        end -= len(part)
    return stacked


def _block_scores(
    model: Model,
    dataset: Dataset,
    patients: Sequence[str],
    recipe: Recipe,
    progress: Progress,
) -> dict[str, Any]:
    """Share of balanced blocks of held-out patients that the model gets right."""
    cases = [case for case in dataset.cases if case.patient in patients]
    n_classes = len(model.classes)
    balanced = [recipe.n_per_class] * n_classes
    counts = np.zeros((n_classes, n_classes), np.int64)
    for number, case in enumerate(cases):
        progress("scoring held-out patients", number, len(cases))
        examples = draw_examples(case, model.classes, model.grid, balanced, (recipe.seed, number))
        found = np.empty((len(examples.labels), n_classes), np.float32)
        for rows, slab, local in slabs_at(examples.grid_volume, model.pattern, examples.positions):
            part = np.empty((len(rows), n_classes), np.float32)
            model.classifier.probabilities(slab, local, part)
            found[rows] = part
        counts += confusion(examples.labels, found.argmax(axis=1), n_classes)
    progress("scoring held-out patients", len(cases), len(cases))
    organs = list(model.classes.organs)
    return {
        "n_patients": len(patients),
        "n_blocks": int(counts.sum()),
        "block_accuracy": accuracy(counts),
        "block_accuracy_organs": float(counts[organs, organs].sum() / max(counts[organs].sum(), 1)),
        "confusion": counts.tolist(),
    }


def _case_digests(case: Case) -> dict[str, str]:
    """What went into the model, without any path or name of a file."""
    labels = [case.labels.path] if isinstance(case.labels, LabelMap) else case.labels.paths.values()
    together = sha256("".join(file_digest(path) for path in labels).encode())
    return {"image": file_digest(case.image), "labels": together.hexdigest()}


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
        for n, slab in probability_slabs(
            self.grid_volume,
            self.model.classifier,
            self.model.pattern,
            self.block_grid,
            self.mask,
            workers,
        ):
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
