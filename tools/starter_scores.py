"""How well a starter model does on what it was trained without, and when it can be sure.

Used by ``train_starter.py``; each figure goes to ``benchmarks/results/starter.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starter_strains import strained

from organfast.adaptation import Adapt
from organfast.evaluation import evaluate
from organfast.layouts import case_labels, find_cases
from organfast.metrics import dice_per_class
from organfast.models.classifier import Model
from organfast.nifti import read_scan
from organfast.organs import Presence
from organfast.pipeline import Settings, segment
from organfast.refinement import Refine
from organfast.results import Result
from organfast.scorebook import Evaluation
from organfast.segmentation import Cleaning
from organfast.volume import Volume

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "starter.json"
SIX = ("liver", "spleen", "kidney_right", "kidney_left", "lung_right", "lung_left")
WITHOUT_ATLAS = Settings(adapt=Adapt(atlas=False))
UNCLEAN = Cleaning(keep="none", fill_holes=False)
STEPS = {
    "the classifier alone": Settings(adapt=False, cleaning=UNCLEAN),
    "+ largest component, holes filled": Settings(adapt=False),
    "+ the atlas, and parts": Settings(adapt=Adapt(own_hu=False, radius=0, expected_dice=False)),
    "+ HU of this scan's organs": Settings(adapt=Adapt(radius=0, expected_dice=False)),
    "+ guided filter": Settings(adapt=Adapt(expected_dice=False)),
    "+ doubtful organs weighed up": Settings(),
    "all but the atlas": WITHOUT_ATLAS,
    "all but components and holes": Settings(cleaning=UNCLEAN),
}
STAGES = {
    "every 6 mm": Settings(),
    "every 12 mm, 6 mm where in doubt": Settings(refine=Refine()),
    "every 6 mm, 3 mm where in doubt": Settings(stride=(1, 1, 1), refine=Refine()),
    "every 3 mm": Settings(stride=(1, 1, 1)),
}
GOOD_DICE = 0.7
RISK = 0.1

Answer = tuple[Result, NDArray[Any]]
"""What a model says of a scan, and the true label map as stored."""


def scores(model: Model, dataset: Path, patients: Sequence[str]) -> dict[str, Any]:
    """A row of the results: means over patients."""
    found = evaluate(model, dataset, patients=patients, threads=2)
    row = {score: by_organ(found, score) for score in ("dice", "nsd", "centroid_mm")}
    return {"n_patients": len(found.patients), **row, "means": means(row["dice"])}


def each_step(model: Model, dataset: Path, patients: Sequence[str]) -> dict[str, Any]:
    """Mean Dice as each step after the classifier leaves it."""
    return {step: _mean_of(model, dataset, patients, settings) for step, settings in STEPS.items()}


def each_stage(model: Model, dataset: Path, patients: Sequence[str]) -> dict[str, Any]:
    """Mean Dice where the classifier is asked at other positions, and at which share of them."""
    return {
        stage: _mean_of(model, dataset, patients, settings) for stage, settings in STAGES.items()
    }


def _mean_of(
    model: Model, dataset: Path, patients: Sequence[str], settings: Settings
) -> dict[str, Any]:
    return _summed_up(model, _segmented(model, _scans(model, dataset, patients), settings))


def _summed_up(model: Model, answers: Iterable[Answer]) -> dict[str, Any]:
    """Dice of the six large organs and of all: means over scans, then organs; and what was asked.

    ``presence`` counts organs that are there and of those the missed ones, organs that are not
    there and of those the reported ones. There is what has as many ml as are needed for a report.
    """
    by_scan, shares = [], []
    presence = dict.fromkeys(("there", "missed", "not_there", "reported"), 0)
    for result, truth in answers:
        by_scan.append(_dice_of(result, truth, len(model.classes)))
        shares.append(result.record["positions"]["share_asked"])
        ml = np.bincount(truth.ravel(), minlength=len(model.classes)) * result.scan.volume.voxel_ml
        for organ in result.organs.values():
            if ml[organ.label] >= Presence().min_ml:
                presence["there"] += 1
                presence["missed"] += not organ.present
            elif not ml[organ.label]:
                presence["not_there"] += 1
                presence["reported"] += organ.present
    columns = [(n, np.array(by_scan)[:, n]) for n in model.classes.organs] if by_scan else []
    scored = [(n, column) for n, column in columns if not np.isnan(column).all()]
    dice = {model.classes.names[n]: float(np.nanmean(column)) for n, column in scored}
    asked = round(float(np.mean(shares)), 3) if shares else None
    return {**means(dice), "share_asked": asked, "presence": presence}


def each_strain(
    model: Model, dataset: Path, patient: str, settings: Settings | None = None
) -> dict[str, Any]:
    """Mean Dice, organs missed and reported, where a patient was scanned in other ways."""
    ((volume, truth),) = _scans(model, dataset, [patient])
    return {
        strain: _summed_up(model, _segmented(model, scans, settings or Settings()))
        for strain, scans in strained(volume, truth)
    }


def by_organ(found: Evaluation, score: str) -> dict[str, float]:
    """Means over patients, of the organs that any of them has."""
    values = found.by_patient(score)[:, :-1]
    named = zip(found.organs, values.T, strict=True)
    return {
        organ: round(float(np.nanmean(column)), 3)
        for organ, column in named
        if not np.isnan(column).all()
    }


def means(dice: Mapping[str, float]) -> dict[str, float | None]:
    """Mean Dice of the six large organs, and of all; None where none of them is in view."""
    six = [dice[organ] for organ in SIX if organ in dice]
    return {
        "six": round(float(np.mean(six)), 3) if six else None,
        "all": round(float(np.mean([*dice.values()])), 3) if dice else None,
    }


def reports(model: Model, dataset: Path, patients: Sequence[str]) -> dict[str, Any]:
    """What is said of organs as a whole.

    ``certainties`` are (mean probability, Dice) of each organ that is reported of each patient; for
    ``presence`` see ``_summed_up``.
    """
    certainties: list[list[float]] = []

    def noted() -> Iterator[Answer]:
        for result, truth in _segmented(model, _scans(model, dataset, patients), Settings()):
            dice = _dice_of(result, truth, len(model.classes))
            for organ in result.organs.values():
                if organ.present and organ.confidence is not None:
                    pair = round(organ.confidence, 3), round(float(dice[organ.label]), 3)
                    certainties.append([*pair])
            yield result, truth

    return {"presence": _summed_up(model, noted())["presence"], "certainties": certainties}


def _scans(
    model: Model, dataset: Path, patients: Sequence[str]
) -> Iterator[tuple[Volume, NDArray[Any]]]:
    """The scan of each patient, and the true label map as stored."""
    for case in find_cases(dataset).cases:
        if case.patient in patients:
            volume = read_scan(case.image).volume
            yield volume, case_labels(case, model.classes, volume).labels


def _segmented(
    model: Model, scans: Iterable[tuple[Volume, NDArray[Any]]], settings: Settings
) -> Iterator[Answer]:
    for volume, truth in scans:
        yield segment(volume, model, settings, threads=2), truth


def _dice_of(result: Result, truth: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """(n_classes + 1,): the last of what no class is."""
    return dice_per_class(np.minimum(truth, n_classes), result.labels, n_classes + 1)


def sure_from(rows: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """The least mean probability from which on an organ is good, but for a stated risk.

    Of the organs at least as probable, with one bad one more than there are, a tenth at most has a
    Dice below 0.7: the correction of conformal risk control (Angelopoulos et al. 2022, theorem 1)
    for a risk that is 0 or 1. None where no probability does.
    """
    ordered = sorted((confidence, dice) for confidence, dice in rows)
    for n, (confidence, _) in enumerate(ordered):
        dice = np.array([d for _, d in ordered[n:]])
        if ((dice < GOOD_DICE).sum() + 1) / (len(dice) + 1) <= RISK:
            share = float((dice >= GOOD_DICE).mean())
            return {
                "confidence": confidence,
                "dice": GOOD_DICE,
                "share": round(share, 3),
                "n_organs": len(dice),
                "n_asked": len(ordered),
            }
    return None


def kept(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Write rows beside those that are there; read only now, for others may write meanwhile."""
    results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | dict(rows)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def with_sureness(model: Model, results: Mapping[str, Any]) -> Model:
    """The model with the threshold of all painted patients of anatomies that were left out."""
    rows = [pair for row in results.values() for pair in row.get("certainties", ())]
    return replace(model, training={**model.training, "sure": sure_from(rows)})
