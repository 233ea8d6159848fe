"""Learning: labelled scans become a model, scored on patients that were held out.

::

    case --(labelled_scan)--> scan and labels on the model grid: classes, and what lies beside them
         --(altered_copy, painted_copy)--> the same and some copies
         --(sample_positions)--> as many positions of each class, half of them where a guide errs
         --(features_at)--> one row each --(train_forest)--> labels told apart, classes summed up
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.adaptation import Adapt, check_adapts
from organfast.anatomy import ClassTable
from organfast.atlas import Atlas
from organfast.atlaslearning import Lattice, learned_atlas, rows_of
from organfast.augmentation import Augmentation, altered_copy, jittered
from organfast.blockfiles import classes_in
from organfast.blocklearning import block_pattern, learned_blocks, score_blocks
from organfast.blocks import Block, Context, pattern_on
from organfast.body import body_mask, body_voxels
from organfast.calibration import FITS, reliability
from organfast.errors import is_whole
from organfast.grid import BlockGrid, GridVolume, ModelGrid, resample_labels, to_model_grid
from organfast.layouts import (
    Case,
    Dataset,
    Masks,
    check_classes,
    dataset_classes,
    dataset_notes,
    dataset_nuisance,
    find_cases,
)
from organfast.metrics import accuracy, confusion
from organfast.models.classifier import Model
from organfast.models.cnn import Cnn
from organfast.models.forest import Forest, ForestSettings, train_forest
from organfast.networklearning import DrawnCase, NetworkRecipe, learned_network
from organfast.nifti import file_digest
from organfast.paintedcopies import painted_copy
from organfast.painting import LabelMap
from organfast.probability import SliceClassifier, probability_slabs
from organfast.progress import Progress, silent
from organfast.sampling import (
    LabelledScan,
    Split,
    features_at,
    label_counts,
    labelled_scan,
    sample_positions,
    slabs_at,
    split_patients,
)
from organfast.workers import Workers

__all__ = ["Recipe", "Sampling", "case_digests", "probabilities_at", "train"]

NATIVE_STRIDE = (1, 4, 4)
WORKING_STRIDE = (2, 3, 3)
APART_MM = (4.5, 4.5, 6.0)
EASIEST = 0.02
"""Weight of a voxel that the guide is certain of, beside 1 for one that it gets wholly wrong."""
GIB = 1 << 30
BACKGROUND = 0
_N_JUDGED = 250
"""Positions of each class and held-out patient on which it is decided when a network is trained."""


@dataclass(frozen=True)
class Sampling:
    """Where training positions come from.

    Parameters
    ----------
    nuisance : bool
        Structures that the dataset labels and the class table does not name (heart, bowel, bones)
        are learned one by one, and their probabilities summed into the class they lie in; see
        ``dataset_nuisance``.
    n_per_nuisance : int or None
        Most positions of each of them and patient, besides those of the classes. None draws as
        many positions of a class as if nothing lay beside it: a structure has as many as its volume
        brings.
    guide : Model or None
        An earlier model of the same classes on the same grid. Positions are drawn where its
        probability maps are wrong: with weight 1 - p(true class).
    guided_share : float
        Share of each class's positions that the guide draws; the others are drawn evenly, so that
        the new model does not forget what the guide knows.
    least_share : float or None
        Each class, and each structure beside them, is drawn in proportion to its voxels inside the
        body, but at least this share as often as the most frequent of them; ``n_per_class`` is then
        what the rarest get, and ``context_factor`` and ``n_per_nuisance`` say nothing. A
        probability is then how often a voxel of a scan is of the class, and not, as of classes
        drawn alike, many times as much for a small organ: organs are no longer drawn too large.
        None draws classes alike.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    nuisance: bool = True
    n_per_nuisance: int | None = None
    guide: Model | None = None
    guided_share: float = 0.5
    least_share: float | None = None

    def __post_init__(self) -> None:
        if self.n_per_nuisance is not None and not is_whole(self.n_per_nuisance, 1):
            raise ValueError(
                f"n_per_nuisance is {self.n_per_nuisance!r}; give a whole number from 1, or None"
            )
        if not 0 <= self.guided_share <= 1:
            raise ValueError(f"guided_share is {self.guided_share!r}; give a share from 0 to 1")
        if self.least_share is not None and not 0.001 <= self.least_share <= 1:
            raise ValueError(
                f"least_share is {self.least_share!r}; give a share from 0.001 to 1, or None"
            )

    def in_proportion(
        self, labels: NDArray[np.unsignedinteger], n_labels: int, n_least: int
    ) -> list[int]:
        """Positions of each label when they are drawn in proportion to its voxels.

        Parameters
        ----------
        labels : (n_k, n_i, n_j) unsigned
            Label map; the background, outside the body, counts for nothing.
        n_labels : int
            Labels that are drawn: the lowest.
        n_least : int
            Positions of the rarest.
        """
        counts = label_counts(labels, n_labels).sum(axis=0)
        share = counts / max(counts[BACKGROUND + 1 :].max(initial=0), 1)
        share[BACKGROUND] = 0
        least = self.least_share or 1.0
        n_of_each = np.rint(n_least / least * np.maximum(share, least))
        return [int(n) for n in n_of_each]

    def most_examples(self, n_of_each: Sequence[int]) -> int:
        """About the most positions of one version of a case, by what :meth:`Recipe.n_of_each` says.

        Parameters
        ----------
        n_of_each : sequence of int
            Positions of each label, or of the rarest.
        """
        # In proportion: the most frequent, about half of a body, and all others as much again.
        common = 0.0 if self.least_share is None else 2 * min(n_of_each) / self.least_share
        return sum(n_of_each) + math.ceil(common)

    def check(self, classes: ClassTable, grid: ModelGrid) -> None:
        """Raise ValueError when the guide knows other classes or works on another grid.

        Parameters
        ----------
        classes : ClassTable
            What is to be learned.
        grid : ModelGrid
            Where.
        """
        if self.guide is None:
            return
        if self.guide.classes.names != classes.names:
            others = set(self.guide.classes.names) ^ set(classes.names)
            differ = f"they differ in {', '.join(sorted(others))}" if others else "in their order"
            raise ValueError(
                f"the guide knows other classes than are to be learned ({differ}); "
                "train it on the same class table"
            )
        if self.guide.grid != grid:
            raise ValueError(
                f"the guide works on the grid {self.guide.grid.to_dict()}, not on "
                f"{grid.to_dict()}; train both on the same"
            )

    def to_dict(self) -> dict[str, Any]:
        """As the record of a model holds it."""
        return {
            "nuisance": self.nuisance,
            "n_per_nuisance": self.n_per_nuisance,
            "guide": None if self.guide is None else self.guide.digest,
            "guided_share": None if self.guide is None else self.guided_share,
            "least_share": self.least_share,
        }


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
    network : NetworkRecipe or None
        The network to learn instead of a forest.
    classes : ClassTable or None
        Structures to learn; None takes those of the default table that the dataset annotates.
    split : Split or None
        Patients to train, validate and test on; None draws one, see ``split_patients``.
    seed : int
        Seed of the split and of the positions; the forest has its own.
    sampling : Sampling
        Where positions come from.
    augmentation : Augmentation or None
        Each case is drawn from as it is, and as often in each of so many altered copies: with 2
        copies there are three times as many positions.
    paint : int
        So many CT scans are painted on altered copies of each case's label map, and drawn from as
        the case is; see ``painted_copy``. Only on a working grid.
    calibration : {"temperature", "isotonic"} or None
        How the probabilities are brought to how often they are right, fitted to blocks of the
        patients who validate, drawn alike or in proportion as those of training; None leaves them
        as the classifier gives them, as does a split in which nobody validates. A model of blocks
        that were cut out is not calibrated.
    adapt : Adapt or None
        How a scan's own organs correct the classifier, unless who segments asks otherwise. The
        model then gets an atlas of the scans, and of their copies, for it.
    max_memory_gb : float or None
        Most memory that what is learned from may take, GiB; None is half of the machine's.

    Raises
    ------
    ValueError
        A number is out of range.
    """

    grid: ModelGrid = field(default_factory=lambda: ModelGrid((1.5, 1.5, 3.0), "piecewise"))
    n_per_class: int = 1000
    context_factor: int | None = None
    forest: ForestSettings = field(default_factory=ForestSettings)
    network: NetworkRecipe | None = None
    classes: ClassTable | None = None
    split: Split | None = None
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    augmentation: Augmentation | None = None
    paint: int = 0
    calibration: str | None = "temperature"
    adapt: Adapt | None = None
    max_memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name in ("n_per_class", "context_factor"):
            number = getattr(self, name)
            if not (is_whole(number, 1) or (number is None and name == "context_factor")):
                raise ValueError(f"{name} is {number!r}; give a whole number from 1")
        if self.calibration is not None and self.calibration not in FITS:
            raise ValueError(
                f"calibration {self.calibration!r} is unknown; use {', '.join(FITS)}, or None"
            )
        if not is_whole(self.paint, 0):
            raise ValueError(f"paint is {self.paint!r}; give a whole number from 0")
        if self.paint and self.grid.spacing_mm is None:
            raise ValueError(
                "copies are painted at 2 mm and need a working grid, such as "
                "ModelGrid((3.0, 3.0, 3.0)); give one, or leave paint"
            )
        if self.adapt is not None:
            check_adapts(self.grid)
        if self.max_memory_gb is not None and not self.max_memory_gb > 0:
            raise ValueError(f"max_memory_gb is {self.max_memory_gb!r}; give GiB above 0, or None")

    @property
    def n_versions(self) -> int:
        """How often a case is drawn from: as it is, and once in each copy."""
        return 1 + (self.augmentation.copies if self.augmentation else 0) + self.paint

    def n_of_each(self, classes: ClassTable, n_nuisance: int, n_patients: int) -> list[int]:
        """Most training positions of each class and of each structure that is drawn by itself.

        Drawn in proportion to their voxels, this is what the rarest get.

        Parameters
        ----------
        classes : ClassTable
            The classes.
        n_nuisance : int
            Structures beside them.
        n_patients : int
            Patients who train.
        """
        if self.sampling.least_share is not None:
            return [self.n_per_class] * (len(classes) + n_nuisance)
        usual = 1 if n_patients == 1 else 3
        factor = usual if self.context_factor is None else self.context_factor
        roles = (s.role for s in classes.structures)
        of_classes = [self.n_per_class * (factor if role == "context" else 1) for role in roles]
        beside = self.sampling.n_per_nuisance
        return of_classes if beside is None else of_classes + [beside] * n_nuisance

    def check_for_blocks(self) -> None:
        """Raise ValueError when this needs the scans that a dataset of blocks does not have."""
        remedies = {
            "be brought to a working grid": (self.grid.spacing_mm, "use ModelGrid(None)"),
            "be asked by a guide": (self.sampling.guide, "leave the guide"),
            "be drawn in proportion to a scan": (self.sampling.least_share, "leave least_share"),
            "be altered": (self.augmentation, "leave the augmentation"),
            "be painted": (self.paint or None, "leave paint"),
            "teach a network": (self.network, "learn a forest"),
        }
        for what, (asked, remedy) in remedies.items():
            if asked is not None:
                raise ValueError(f"blocks that were cut out cannot {what}; {remedy}")

    def check_memory(self, n_examples: int, n_features: int, n_parts: int) -> None:
        """Raise ValueError when the features of the examples would take too much memory.

        Parameters
        ----------
        n_examples : int
            The most that may be drawn.
        n_features : int
            Of the pattern, four bytes each.
        n_parts : int
            Parts that they come in, one by one: the last is there twice when they are stacked.
        """
        allowed = self.max_memory_gb or _machine_memory_gb() / 2
        needed = 4 * n_features * (n_examples + n_examples / max(n_parts, 1)) / GIB
        if needed > allowed:
            raise ValueError(
                f"{n_examples:,} examples of {n_features:,} features take up to {needed:.3g} GiB, "
                f"and {allowed:.3g} GiB are allowed; use a smaller block, fewer positions per "
                "class (n_per_class), fewer patients or fewer altered copies, or allow more "
                "(max_memory_gb)"
            )


@dataclass(frozen=True, eq=False)
class _Fine:
    """The labels that are learned: those of the class table, then structures beside it, if any."""

    classes: ClassTable
    nuisance: Mapping[str, int] | None

    @property
    def beside(self) -> Mapping[str, int]:
        """Structure beside the table -> class it lies in."""
        return self.nuisance or {}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.classes.names, *self.beside)

    @property
    def merge(self) -> NDArray[np.int64]:
        """(n_labels,) class of each label."""
        return np.array([*range(len(self.classes)), *self.beside.values()], np.int64)

    def merged(self, labels: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
        """Labels of the table; what is no label stays as it is."""
        class_of = np.arange(np.iinfo(labels.dtype).max + 1, dtype=labels.dtype)
        class_of[: len(self.merge)] = self.merge
        merged: NDArray[np.unsignedinteger] = class_of[labels]
        return merged


def train(
    dataset: str | PathLike[str] | Dataset,
    pattern: Block | Context | None = None,
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
    pattern : Block or Context, optional
        What the classifier sees around a position; see ``pattern_on`` for the default.
    recipe : Recipe, optional
        Everything else that shapes the model. A dataset of blocks is learned on the scan's own
        pixels, as ``Recipe(grid=ModelGrid(None))`` has it, and without what needs the scan.
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
        The recipe does not fit the dataset, or what is learned from would not fit in memory.
    """
    dataset = dataset if isinstance(dataset, Dataset) else find_cases(dataset)
    if dataset.layout == "blocks":
        recipe = recipe or Recipe(grid=ModelGrid(None))
        return _train_on_blocks(dataset, pattern, recipe, threads=threads, progress=progress)
    recipe = recipe or Recipe()
    classes = recipe.classes or dataset_classes(dataset)
    check_classes(classes, dataset)
    recipe.sampling.check(classes, recipe.grid)
    split = recipe.split or split_patients(dataset.patients, recipe.seed)
    split.check(dataset.patients)
    fine = _Fine(classes, dataset_nuisance(dataset, classes) if recipe.sampling.nuisance else None)

    source = _Source(dataset, fine, recipe, threads, progress)
    classifier: Forest | Cnn
    if recipe.network is None:
        pattern = pattern_on(recipe.grid, pattern)
        classifier, record = _learned_forest(source, split, pattern)
    else:
        pattern = recipe.network.pattern_on(recipe.grid, pattern)
        classifier, record = _learned_network(source, split, pattern, recipe.network)
    record |= {
        "layout": dataset.layout,
        "notes": list(dataset_notes(dataset, classes)),
        "split": asdict(split),
        "seed": recipe.seed,
        "sampling": recipe.sampling.to_dict(),
        "augmentation": None if recipe.augmentation is None else recipe.augmentation.to_dict(),
        "painted_copies": recipe.paint,
    }
    model = Model(
        classifier=classifier,
        classes=classes,
        pattern=pattern,
        grid=recipe.grid,
        stride=_stride(recipe),
        training=record,
        scores={},
        adapt=recipe.adapt,
        atlas=source.atlas(),
    )
    scores: dict[str, Any] = {}
    for use, patients in (("validation", split.validation), ("test", split.test)):
        found, truth = _held_out_answers(model, dataset, patients, (recipe, fine), progress)
        if not len(truth):
            continue
        scores[use] = _block_scores(found, truth, model.classes) | {"n_patients": len(patients)}
        if use == "validation" and recipe.calibration is not None:
            # Fitted before the test patients are asked, and to nobody else.
            if recipe.sampling.least_share is not None:
                found, truth = _held_out_answers(
                    model, dataset, patients, (recipe, fine), progress, in_proportion=True
                )
            model = replace(model, calibration=FITS[recipe.calibration](found, truth))
    return replace(model, scores=scores)


def _stride(recipe: Recipe) -> tuple[int, int, int]:
    """Voxels between positions; a network's, on its coarser grid, are as far apart in mm."""
    spacing_mm = recipe.grid.spacing_mm
    if spacing_mm is None:
        return NATIVE_STRIDE
    if recipe.network is None:
        return WORKING_STRIDE
    x, y, z = (max(1, round(mm / s)) for mm, s in zip(APART_MM, spacing_mm, strict=True))
    return z, y, x


def _train_on_blocks(
    dataset: Dataset,
    pattern: Block | Context | None,
    recipe: Recipe,
    *,
    threads: int,
    progress: Progress,
) -> Model:
    """A model of blocks that were cut out already."""
    recipe.check_for_blocks()
    pattern = block_pattern(dataset.cases, pattern)
    classes = recipe.classes or classes_in(dataset.cases)
    split = recipe.split or split_patients(dataset.patients, recipe.seed)
    split.check(dataset.patients)
    cases = [case for case in dataset.cases if case.patient in split.train]
    n_of_each = recipe.n_of_each(classes, 0, len({case.patient for case in cases}))
    recipe.check_memory(sum(n_of_each) * len(cases), pattern.n_features, 1)
    features, labels, record = learned_blocks(
        cases, classes, recipe.grid, n_of_each, recipe.seed, progress=progress
    )
    forest = train_forest(
        features, labels, recipe.forest, pattern, len(classes), threads=threads, progress=progress
    )
    record |= {
        "layout": dataset.layout,
        "split": asdict(split),
        "seed": recipe.seed,
        "forest": asdict(recipe.forest),
    }
    model = Model(forest, classes, pattern, recipe.grid, NATIVE_STRIDE, record, {})
    scores = {}
    for use, patients in (("validation", split.validation), ("test", split.test)):
        held_out = [case for case in dataset.cases if case.patient in patients]
        if held_out:
            scores[use] = score_blocks(model, held_out, progress=progress)
    return replace(model, scores={use: score for use, score in scores.items() if score["n_blocks"]})


@dataclass(frozen=True, eq=False)
class _Source:
    """Where examples come from."""

    dataset: Dataset
    fine: _Fine
    recipe: Recipe
    threads: int
    progress: Progress
    lattices: list[Lattice] = field(default_factory=list)
    """Of everything that was drawn from, for an atlas."""

    def cases_of(self, patients: Sequence[str]) -> list[Case]:
        return [case for case in self.dataset.cases if case.patient in patients]

    def n_of_each(self, cases: Sequence[Case]) -> list[int]:
        n_patients = len({case.patient for case in cases})
        return self.recipe.n_of_each(self.fine.classes, len(self.fine.beside), n_patients)

    def draw(
        self,
        cases: Sequence[Case],
        take: Callable[[Case, _Version, NDArray[np.int32], NDArray[np.int64]], None],
    ) -> dict[str, Any]:
        """Give the positions of each version of each case, and their labels; the record of it."""
        fine, recipe, n_of_each = self.fine, self.recipe, self.n_of_each(cases)
        spacings, digests, warnings = [], {}, []
        whole_ml: dict[str, float] = {}
        counts = np.zeros((len(cases), len(fine.names)), np.int64)
        for number, case in enumerate(cases):
            self.progress("reading cases", number, len(cases))
            scan = labelled_scan(case, fine.classes, recipe.grid, fine.nuisance)
            for version in _versions(scan, fine, recipe, (recipe.seed, number), self.threads):
                positions, drawn = version.drawn(fine, n_of_each, recipe.sampling, self.threads)
                take(case, version, positions, drawn)
                self._keep_for_atlas(version)
                counts[number] += np.bincount(drawn, minlength=len(fine.names))
            for name, ml in _whole_ml(scan, fine.classes).items():
                whole_ml[name] = min(ml, whole_ml.get(name, ml))
            spacings.append(scan.grid_volume.spacing_mm)
            digests[case.name] = case_digests(case)
            warnings += [f"{case.name}: {warning}" for warning in scan.warnings]
        self.progress("reading cases", len(cases), len(cases))
        return {
            "cases": digests,
            "nuisance": {name: fine.classes.names[n] for name, n in fine.beside.items()},
            "n_of_each_class": n_of_each,
            "n_examples": int(counts.sum()),
            "n_cases_with": dict(zip(fine.names, (counts > 0).sum(axis=0).tolist(), strict=True)),
            "whole_ml": whole_ml,
            "spacing_mm": np.median(spacings, axis=0)[::-1].tolist(),
            "warnings": warnings,
        }

    def _keep_for_atlas(self, version: _Version) -> None:
        """Where a model is to adapt; a mirrored body has its liver on the other side."""
        is_mirrored = version.augmentation is not None and version.augmentation.mirror > 0
        if self.recipe.adapt is not None and not is_mirrored:
            rows = rows_of(self.fine.classes.organs, len(self.fine.names), BACKGROUND)
            scan = version.scan
            self.lattices.append(Lattice.of(scan.labels, scan.grid_volume.spacing_mm, rows))

    def atlas(self) -> Atlas | None:
        """Of what was drawn from, where a model is to adapt to scans."""
        if not self.lattices:
            return None
        with Workers(self.threads) as workers:
            return learned_atlas(self.lattices, len(self.fine.classes.organs), workers)


def _whole_ml(scan: LabelledScan, classes: ClassTable) -> dict[str, float]:
    """Volume, ml, of each organ that touches no side of the field of view."""
    labels, n = scan.labels, len(classes)
    counts = label_counts(labels, n).sum(axis=0)
    for axis in range(3):
        for side in (0, -1):
            face = labels.take([side], axis)
            counts[face[face < n]] = 0
    voxel_ml = float(np.prod(scan.grid_volume.spacing_mm)) / 1000
    return {
        classes.names[label]: round(float(counts[label]) * voxel_ml, 3)
        for label in classes.organs
        if counts[label]
    }


def _learned_forest(
    source: _Source, split: Split, pattern: Block | Context
) -> tuple[Forest, dict[str, Any]]:
    recipe, fine, cases = source.recipe, source.fine, source.cases_of(split.train)
    n_parts = recipe.n_versions * len(cases)
    n_examples = recipe.sampling.most_examples(source.n_of_each(cases))
    recipe.check_memory(n_examples * n_parts, pattern.n_features, n_parts)
    features: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []

    def take(
        case: Case, version: _Version, positions: NDArray[np.int32], drawn: NDArray[np.int64]
    ) -> None:
        jitter = version.jitter(pattern)
        features.append(features_at(version.scan.grid_volume, pattern, positions, jitter))
        labels.append(drawn)

    record = source.draw(cases, take)
    forest = train_forest(
        _stacked(features),
        np.concatenate(labels),
        recipe.forest,
        pattern,
        len(fine.classes),
        fine.merge if fine.beside else None,
        threads=source.threads,
        progress=source.progress,
    )
    return forest, record | {"forest": asdict(recipe.forest)}


def _learned_network(
    source: _Source, split: Split, pattern: Block, network: NetworkRecipe
) -> tuple[Cnn, dict[str, Any]]:
    """Its blocks are turned and scaled on the device: no offsets are jittered."""
    recipe, fine, cases = source.recipe, source.fine, source.cases_of(split.train)
    train: list[DrawnCase] = []

    def take(
        case: Case, version: _Version, positions: NDArray[np.int32], drawn: NDArray[np.int64]
    ) -> None:
        train.append(DrawnCase(case.patient, version.scan.grid_volume, positions, drawn))

    record = source.draw(cases, take)
    held_out = [_judged_case(source, case) for case in source.cases_of(split.validation)]
    factor: float | None = source.n_of_each(cases)[BACKGROUND] / recipe.n_per_class
    if recipe.sampling.least_share is not None:
        factor = None
    classifier, of_network = learned_network(
        train,
        [case for case in held_out if len(case.labels)],
        (fine.classes, fine.beside, factor),
        (network, recipe.grid, pattern),
        progress=source.progress,
    )
    return classifier, record | {"network": of_network}


def _judged_case(source: _Source, case: Case) -> DrawnCase:
    """Balanced positions of a patient who is held out."""
    fine, recipe = source.fine, source.recipe
    scan = labelled_scan(case, fine.classes, recipe.grid, fine.nuisance)
    n_wanted = dict.fromkeys(range(len(fine.classes)), min(recipe.n_per_class, _N_JUDGED))
    positions, _ = sample_positions(fine.merged(scan.labels), n_wanted, recipe.seed)
    labels = scan.labels[tuple(positions.T)].astype(np.int64)
    return DrawnCase(case.patient, scan.grid_volume, positions, labels)


@dataclass(frozen=True, eq=False)
class _Version:
    """A case as it is, or an altered copy of it; the seed is its own."""

    scan: LabelledScan
    seed: tuple[int, ...]
    augmentation: Augmentation | None = None

    def drawn(
        self, fine: _Fine, n_of_each: Sequence[int], sampling: Sampling, threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Positions, and the label that is to be learned of each."""
        labels = self.scan.labels
        by_itself = sampling.n_per_nuisance is not None or sampling.least_share is not None
        if sampling.least_share is not None:
            n_of_each = sampling.in_proportion(labels, len(n_of_each), min(n_of_each))
        positions, drawn = sample_positions(
            labels if by_itself else fine.merged(labels),
            dict(enumerate(n_of_each)),
            self.seed,
            _hardness(self.scan, fine, sampling.guide, threads),
            sampling.guided_share,
        )
        return positions, drawn if by_itself else labels[tuple(positions.T)].astype(np.int64)

    def jitter(self, pattern: Block | Context) -> Callable[[int], NDArray[np.int32]] | None:
        """Offsets to read around the positions of a slice, if not the pattern's."""
        how = self.augmentation
        if how is None or not (how.jitter_deg or how.jitter_scale):
            return None
        # A seed sequence takes missing numbers for zeros, so a slice's never is zero.
        return lambda k: jittered(
            pattern.offsets, np.random.default_rng((*self.seed, k + 1)), how, pattern.reach
        )


def _versions(
    scan: LabelledScan, fine: _Fine, recipe: Recipe, seed: tuple[int, int], threads: int
) -> Iterator[_Version]:
    """A case as it is, then its altered copies, then its painted ones, one by one."""
    yield _Version(scan, seed)
    how, n_altered = recipe.augmentation, recipe.n_versions - recipe.paint
    if how is not None:
        for copy in range(1, n_altered):
            volume, labels = altered_copy(
                scan.grid_volume,
                scan.labels,
                fine.classes,
                how,
                (*seed, copy),
                beside=tuple(fine.beside),
                threads=threads,
            )
            yield _Version(LabelledScan(volume, labels), (*seed, copy), how)
    for copy in range(n_altered, recipe.n_versions):
        painted = _painted(scan, fine, recipe, (*seed, copy), threads)
        yield _Version(painted, (*seed, copy))


def _painted(
    scan: LabelledScan, fine: _Fine, recipe: Recipe, seed: tuple[int, ...], threads: int
) -> LabelledScan:
    """A CT scan painted on an altered copy of a case's structures; the rest is context."""
    classes, labels = fine.classes, scan.labels
    organs = {*classes.organs, *range(len(classes), len(fine.names))}
    lookup = np.zeros(np.iinfo(labels.dtype).max + 1, labels.dtype)
    lookup[list(organs)] = list(organs)
    k, i, j = scan.grid_volume.spacing_mm
    anatomy = LabelMap(
        lookup[labels].T, np.diag([j, i, k, 1.0]), {n: fine.names[n] for n in organs}
    )
    volume, drawn = painted_copy(anatomy, seed, threads=threads)
    with Workers(threads) as workers:
        grid_volume = to_model_grid(volume, recipe.grid, workers)
    found = resample_labels(volume.orientation.working(drawn), grid_volume).astype(labels.dtype)
    if classes.context is not None:
        found[(found == 0) & body_voxels(grid_volume)] = classes.context
    return LabelledScan(grid_volume, found)


def _hardness(
    scan: LabelledScan, fine: _Fine, guide: Model | None, threads: int
) -> NDArray[np.float32] | None:
    """1 - p(true class) at every voxel, (K, R, C): as the guide sees the nearest block position.

    What has no label, and is never drawn, has some number.
    """
    if guide is None:
        return None
    volume = scan.grid_volume
    blocks = BlockGrid(volume.shape, guide.stride)
    k, i, j = (
        np.rint((np.arange(n) - centres[0]) / stride).clip(0, len(centres) - 1).astype(np.intp)
        for n, centres, stride in zip(volume.shape, blocks.centres, blocks.stride, strict=True)
    )
    hardness = np.empty(volume.shape, np.float32)
    with Workers(threads) as workers:
        slices = SliceClassifier(
            volume, guide.classifier, guide.pattern, blocks, workers, guide.calibration
        )
        for n, found in probability_slabs(slices, body_mask(volume, blocks), workers):
            for voxel_slice in np.flatnonzero(k == n):
                true = np.minimum(fine.merged(scan.labels[voxel_slice]), len(fine.classes) - 1)
                p = found[i[:, None], j, true]
                hardness[voxel_slice] = np.maximum(1 - p, EASIEST)
    return hardness


def _stacked(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The parts in one array; each is let go once it is copied, for together they fill memory."""
    stacked = np.empty((sum(map(len, parts)), parts[0].shape[1]), np.float32)
    end = len(stacked)
    while parts:
        part = parts.pop()
        stacked[end - len(part) : end] = part
        end -= len(part)
    return stacked


def probabilities_at(
    model: Model, volume: GridVolume, positions: NDArray[np.int32]
) -> NDArray[np.float32]:
    """What a model says at positions, each by itself: (n, n_classes), calibrated if the model is.

    Parameters
    ----------
    model : Model
        Asked.
    volume : GridVolume
        On the model's grid.
    positions : (n, 3) int32
        (k, i, j) in the volume.
    """
    found = np.empty((len(positions), len(model.classes)), np.float32)
    for rows, slab, local in slabs_at(volume, model.pattern, positions):
        part = np.empty((len(rows), found.shape[1]), np.float32)
        model.classifier.probabilities(slab, local, part)
        found[rows] = part
    if model.calibration is not None:
        model.calibration.apply(found, found)
    return found


def _held_out_answers(
    model: Model,
    dataset: Dataset,
    patients: Sequence[str],
    source: tuple[Recipe, _Fine],
    progress: Progress,
    *,
    in_proportion: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Probabilities of blocks of held-out patients, and what the blocks are.

    As many of each class, or as training draws them where it draws in proportion.
    """
    recipe, fine = source
    cases = [case for case in dataset.cases if case.patient in patients]
    balanced = dict.fromkeys(range(len(model.classes)), recipe.n_per_class)
    found = [np.empty((0, len(model.classes)), np.float32)]
    truths = [np.empty(0, np.int64)]
    for number, case in enumerate(cases):
        progress("scoring held-out patients", number, len(cases))
        scan = labelled_scan(case, model.classes, model.grid, fine.nuisance)
        labels, n_of_each = fine.merged(scan.labels), balanced
        if in_proportion:
            drawn = recipe.sampling.in_proportion(labels, len(balanced), recipe.n_per_class)
            n_of_each = dict(enumerate(drawn))
        positions, truth = sample_positions(labels, n_of_each, (recipe.seed, number))
        found.append(probabilities_at(model, scan.grid_volume, positions))
        truths.append(truth)
    if cases:
        progress("scoring held-out patients", len(cases), len(cases))
    return np.concatenate(found), np.concatenate(truths)


def _block_scores(
    found: NDArray[np.float32], truth: NDArray[np.int64], classes: ClassTable
) -> dict[str, Any]:
    """How many blocks are named right, and how far the confidence in them is from that."""
    counts = confusion(truth, found.argmax(axis=1), len(classes))
    organs = list(classes.organs)
    return {
        "n_blocks": len(truth),
        "block_accuracy": accuracy(counts),
        "block_accuracy_organs": float(counts[organs, organs].sum() / max(counts[organs].sum(), 1)),
        "calibration_error": reliability(found, truth).expected_error,
        "confusion": counts.tolist(),
    }


def case_digests(case: Case) -> dict[str, str]:
    """What a case is, without any path or name of a file: sha256 of its image and of its labels.

    Parameters
    ----------
    case : Case
        Of ``find_cases``.

    Raises
    ------
    InputError
        A file cannot be read.
    """
    labels = case.labels.paths.values() if isinstance(case.labels, Masks) else [case.labels.path]
    together = sha256("".join(file_digest(path) for path in labels).encode())
    return {"image": file_digest(case.image), "labels": together.hexdigest()}


def _machine_memory_gb() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
