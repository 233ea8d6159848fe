"""Learning: labelled scans become a model, scored on patients that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.errors import is_whole
from organfast.grid import ModelGrid
from organfast.layouts import Case, Dataset, LabelMap, dataset_classes, find_cases
from organfast.metrics import accuracy, confusion
from organfast.models.classifier import Model
from organfast.models.forest import ForestSettings, train_forest
from organfast.nifti import file_digest
from organfast.progress import Progress, silent
from organfast.sampling import Split, draw_examples, features_at, slabs_at, split_patients

__all__ = ["Recipe", "train"]

NATIVE_STRIDE = (1, 4, 4)
WORKING_STRIDE = (2, 3, 3)


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
            if not (is_whole(number, 1) or (number is None and name == "context_factor")):
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
