"""The main job on made-up patients: paint a cohort, learn from it, segment a scan it lacks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.errors import InputError
from organfast.grid import ModelGrid
from organfast.layouts import write_case
from organfast.learning import Recipe, train
from organfast.metrics import centroid_error_mm, dice_per_class
from organfast.models.classifier import save_model
from organfast.models.forest import ForestSettings
from organfast.networklearning import NetworkRecipe, training_settings
from organfast.organs import measure_organs
from organfast.painting import paint
from organfast.phantom import FieldOfView, PhantomCase, class_labels, cohort, phantom
from organfast.pipeline import Settings, segment
from organfast.progress import Progress, silent
from organfast.results import Result

__all__ = ["OrganScore", "run_demo"]

# A patient number that no cohort draws: the cohort's are below 2**31.
_UNSEEN_PATIENT = 2**31 + 1

# Spacing (x, y, z), mm, and pixels along a side; the unseen scan is finer than those learned from.
_COHORT = ((1.6, 1.6, 4.0), 256)
_UNSEEN = ((0.8, 0.8, 3.0), 512)
_N_PER_CLASS, _N_TREES, _N_STEPS = 400, 60, 400


@dataclass(frozen=True)
class OrganScore:
    """How well one organ of the unseen patient was found.

    Parameters
    ----------
    name : str
        The organ.
    volume_ml : float, ml
        Its volume as segmented.
    dice : float
        Overlap with the truth, 0..1; NaN where neither has the organ.
    centre_error_mm : float, mm
        Distance between its centre as located and as painted; NaN where it was not found.
    """

    name: str
    volume_ml: float
    dice: float
    centre_error_mm: float


def run_demo(
    out: str | PathLike[str],
    n_patients: int,
    seed: int,
    *,
    kind: str = "forest",
    threads: int = 1,
    progress: Progress = silent,
) -> list[OrganScore]:
    """Fill a folder with a phantom cohort, a model, and an unseen scan with its segmentation.

    Parameters
    ----------
    out : str or PathLike
        Folder: ``cohort/``, ``phantom.organfast``, ``unseen/ct.nii.gz`` with its true
        ``labels.nii.gz``, ``segmented/`` and ``scores.json``.
    n_patients : int
        Patients to learn from.
    seed : int
        Seed of the patients and of the classifier.
    kind : {"forest", "cnn"}
        What learns.
    threads : int
        Threads; the files do not depend on it.
    progress : callable, optional
        Called with (what, done, total).

    Returns
    -------
    list of OrganScore
        One per organ of the unseen scan.

    Raises
    ------
    InputError
        The folder cannot be written, or holds another demo's cohort.
    """
    folder = Path(out)
    classes = ClassTable.default()
    if (folder / "cohort").exists():
        raise InputError(folder, "holds a demo already", "give a new folder, or delete this one")
    for number, case in enumerate(cohort(n_patients, seed, *_COHORT, threads=threads)):
        progress("painting patients", number, n_patients)
        write_case(folder / "cohort", case.name, case.scan, case.labels, classes)
    progress("painting patients", n_patients, n_patients)

    model = train(
        folder / "cohort",
        recipe=_recipe(kind, seed),
        threads=threads,
        progress=progress,
    )
    save_model(model, folder / "phantom.organfast")

    unseen = _unseen_patient(seed, threads)
    write_case(folder, "unseen", unseen.scan, unseen.labels, classes)
    result = segment(
        folder / "unseen" / "ct.nii.gz",
        model,
        Settings(probabilities=("liver",)),
        threads=threads,
        progress=progress,
    )
    result.save(folder / "segmented", probabilities=("liver",), report=True)
    scores = _scores(result, unseen.labels)
    # JSON has no NaN: what has no number is null.
    rows = [{k: None if v != v else v for k, v in asdict(s).items()} for s in scores]
    text = json.dumps(rows, indent=1, allow_nan=False) + "\n"
    (folder / "scores.json").write_text(text, encoding="utf-8")
    return scores


def _recipe(kind: str, seed: int) -> Recipe:
    if kind not in ("forest", "cnn"):
        raise ValueError(f"kind is {kind!r}; give forest or cnn")
    recipe = Recipe(
        n_per_class=_N_PER_CLASS,
        context_factor=5,
        forest=ForestSettings("extra_trees", n_trees=_N_TREES, seed=seed),
        seed=seed,
    )
    if kind == "forest":
        return recipe
    settings, outputs = training_settings({"seed": seed, "steps": _N_STEPS})
    return replace(
        recipe,
        grid=ModelGrid((3.0, 3.0, 3.0), "piecewise"),
        network=NetworkRecipe(training=settings, outputs=outputs),
    )


def _unseen_patient(seed: int, threads: int) -> PhantomCase:
    """A patient whom no cohort draws, scanned finely from the neck to the hips."""
    patient = _UNSEEN_PATIENT + seed
    anatomy = phantom(FieldOfView.over("trunk", *_UNSEEN), patient, threads=threads)
    scan = paint(anatomy, patient, threads=threads)
    return PhantomCase("unseen", scan, class_labels(anatomy), anatomy)


def _scores(result: Result, truth: NDArray[np.unsignedinteger]) -> list[OrganScore]:
    classes, volume = result.classes, result.scan.volume
    # The model may lack a class of the truth's table, so labels are compared by name.
    known = [classes.index(n) if n in classes else 0 for n in ClassTable.default().names]
    same_table = np.array(known, result.labels.dtype)[truth]
    dice = dice_per_class(same_table, result.labels, len(classes))
    true_organs = measure_organs(volume.orientation.working(same_table), None, volume, classes)
    scores = []
    for name, organ in result.organs.items():
        true_centre, error = true_organs[name].centroid_mm, float("nan")
        if true_centre is not None and organ.centroid_mm is not None:
            error = centroid_error_mm(true_centre, organ.centroid_mm)
        scores.append(OrganScore(name, organ.volume_ml, float(dice[organ.label]), error))
    return scores
