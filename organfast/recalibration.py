"""Calibrating a model that is there already, on labelled patients that it has not learned from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from organfast.calibration import FITS, reliability
from organfast.evaluation import block_answers
from organfast.layouts import Dataset
from organfast.learning import case_digests
from organfast.models.classifier import Model

__all__ = ["Calibrated", "calibrated"]


@dataclass(frozen=True)
class Calibrated:
    """A model with a calibration, and what is known of it.

    Parameters
    ----------
    model : Model
        The new one.
    patients : tuple of str
        Whom it was fitted to.
    calibration_error : (float, float or None)
        Expected calibration error of balanced blocks of these patients: of the classifier as it
        is, and where each patient is asked by a calibration that is fitted to the others. None for
        a single patient.
    """

    model: Model
    patients: tuple[str, ...]
    calibration_error: tuple[float, float | None]


def calibrated(
    model: Model,
    dataset: Dataset,
    kind: str = "temperature",
    patients: Iterable[str] | None = None,
    *,
    n_per_class: int = 500,
    seed: int = 0,
) -> Calibrated:
    """Give a model a calibration, in place of what it has.

    Parameters
    ----------
    model : Model
        Left as it is.
    dataset : Dataset
        Of ``find_cases``.
    kind : {"temperature", "isotonic"}
        One number for all classes, or a curve for each.
    patients : iterable of str, optional
        Whom to fit to; by default all from whom the model has not learned, but those of its split
        who are to be tested on.
    n_per_class : int
        Most blocks of each class and case.
    seed : int
        Of the blocks.

    Raises
    ------
    InputError
        A case cannot be used.
    ValueError
        The kind is unknown, there is nobody to fit to, or one of the patients trained the model.
    """
    if kind not in FITS:
        raise ValueError(f"calibration {kind!r} is unknown; use {' or '.join(FITS)}")
    names = _unseen(model, dataset) if patients is None else sorted(set(patients))
    answers = _answers(model, dataset, names, n_per_class, seed)
    if not answers:
        raise ValueError(
            "there is no case to calibrate on; give labelled scans of patients from whom the model "
            "has not learned"
        )
    probabilities, labels = _together(answers.values())
    return Calibrated(
        replace(model, calibration=FITS[kind](probabilities, labels)),
        tuple(answers),
        (reliability(probabilities, labels).expected_error, _left_out_error(answers, kind)),
    )


_Answers = tuple[NDArray[np.float32], NDArray[np.int64]]


def _unseen(model: Model, dataset: Dataset) -> list[str]:
    kept = set(model.training.get("split", {}).get("test", ()))
    cases = {name: [c for c in dataset.cases if c.patient == name] for name in dataset.patients}
    known = _trained_on(model)
    return [
        name
        for name, theirs in cases.items()
        if name not in kept and not any(case_digests(c)["image"] in known for c in theirs)
    ]


def _trained_on(model: Model) -> set[str]:
    return {digests["image"] for digests in model.training["cases"].values() if "image" in digests}


def _answers(
    model: Model, dataset: Dataset, patients: Iterable[str], n_per_class: int, seed: int
) -> dict[str, _Answers]:
    """Patient -> what the classifier alone says of balanced blocks, and what they are."""
    bare, known = replace(model, calibration=None), _trained_on(model)
    answers = {}
    for patient in patients:
        theirs = []
        for case in (case for case in dataset.cases if case.patient == patient):
            if case_digests(case)["image"] in known:
                raise ValueError(
                    f"the model was trained on {case.name}, where it is surer than elsewhere; "
                    "calibrate on held-out patients"
                )
            labels, probabilities = block_answers(bare, case, n_per_class, seed)
            theirs.append((probabilities, labels))
        if sum(len(labels) for _, labels in theirs):
            answers[patient] = _together(theirs)
    return answers


def _left_out_error(answers: dict[str, _Answers], kind: str) -> float | None:
    """Expected calibration error of each patient under a calibration fitted to the others."""
    if len(answers) < 2:
        return None
    asked = []
    for patient, (probabilities, labels) in answers.items():
        others = _together(found for name, found in answers.items() if name != patient)
        out = np.empty_like(probabilities)
        FITS[kind](*others).apply(probabilities, out)
        asked.append(reliability(out, labels))
    return sum(asked[1:], asked[0]).expected_error


def _together(parts: Iterable[_Answers]) -> _Answers:
    probabilities, labels = zip(*parts, strict=True)
    return np.concatenate(probabilities), np.concatenate(labels)
