"""What an evaluation found: every score of every case and organ, and what they say together.

Scores are kept case by case; means, intervals and comparisons are made of *patients*: those of a
patient with several scans are averaged first. NaN stands for what is not scored, null in JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.calibration import Reliability, reliability_of_histogram
from organfast.curve import Curve
from organfast.metrics import SCORES, block_scores, row_shares
from organfast.statistics import PairedComparison, compare_paired, mean_intervals
from organfast.tables import table

__all__ = [
    "ALL_ORGANS",
    "BlockAnswers",
    "CaseScores",
    "Evaluation",
    "Failure",
    "Presence",
    "compare",
    "comparison_rows",
    "evaluation_csv",
    "summary_rows",
]

SCHEMA = 1
ALL_ORGANS = "all organs"
"""Row of the summary that averages each patient's organs first."""
UNLABELLED = "unlabelled"

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BlockAnswers:
    """How the blocks of a case were named.

    Parameters
    ----------
    counts : (n_classes, n_classes) int64
        Confusion matrix, rows are truth; as many blocks of each class as there are, up to a number.
    reliability : Reliability
        Of the most probable class.
    brier, log_loss : float
        Means over the blocks.
    """

    counts: Counts
    reliability: Reliability
    brier: float
    log_loss: float

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "counts": self.counts.tolist(),
            "reliability": self.reliability.to_dict(),
            "brier": self.brier,
            "log_loss": self.log_loss,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> BlockAnswers:
        """What :meth:`to_dict` described."""
        return BlockAnswers(
            np.array(content["counts"], np.int64),
            Reliability.from_dict(content["reliability"]),
            float(content["brier"]),
            float(content["log_loss"]),
        )


@dataclass(frozen=True, eq=False)
class CaseScores:
    """One case, scored on the grid of its own scan. Arrays of organs follow ``Evaluation.organs``.

    Parameters
    ----------
    name, patient : str
        As the dataset calls them.
    fold : int or None
        The fold that the case was tested in; None where one model was tested on all.
    model : str
        Digest of the model.
    was_trained_on : bool
        Whether the model learned from this very scan: its scores say nothing of new scans.
    annotated : (n_organs,) bool
        Organs that the case annotates and the model has learned: the others are not scored.
    present : (n_organs,) bool
        Organs that the segmentation reports as present, by the rule of ``organs.Presence``.
    truth_ml, predicted_ml : (n_organs,) float64, ml
        Volumes.
    scores : mapping of str to (n_organs,) float64
        By the names of ``metrics.SCORES``.
    voxels : (n_classes + 1, n_classes) int64
        Confusion matrix of the voxels; the last row is what the case does not label.
    confidence : (2, 256) int64
        By confidence / 255 of the voxels segmented as one of these organs: all, and the right ones.
    blocks : BlockAnswers or None
        None where blocks were not asked for.
    warnings : tuple of str
        About the scan, its labels and the segmentation.
    picture : bytes or None
        PNG of the organ with the lowest Dice, where it errs most; never in ``to_dict``.
    """

    name: str
    patient: str
    fold: int | None
    model: str
    was_trained_on: bool
    annotated: NDArray[np.bool_]
    present: NDArray[np.bool_]
    truth_ml: Floats
    predicted_ml: Floats
    scores: Mapping[str, Floats]
    voxels: Counts
    confidence: Counts
    blocks: BlockAnswers | None
    warnings: tuple[str, ...] = ()
    picture: bytes | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it but the picture, for JSON; NaN is null."""
        plain: dict[str, Any] = {}
        for field in fields(self):
            if field.name == "picture":
                continue
            value = getattr(self, field.name)
            plain[field.name] = _plain(value)
        plain["scores"] = {name: _plain(self.scores[name]) for name in SCORES}
        plain["blocks"] = None if self.blocks is None else self.blocks.to_dict()
        return plain

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> CaseScores:
        """What :meth:`to_dict` described."""
        blocks = content["blocks"]
        return CaseScores(
            **{n: content[n] for n in ("name", "patient", "fold", "model", "was_trained_on")},
            annotated=np.array(content["annotated"], bool),
            present=np.array(content["present"], bool),
            truth_ml=_floats(content["truth_ml"]),
            predicted_ml=_floats(content["predicted_ml"]),
            scores={name: _floats(content["scores"][name]) for name in SCORES},
            voxels=np.array(content["voxels"], np.int64),
            confidence=np.array(content["confidence"], np.int64),
            blocks=None if blocks is None else BlockAnswers.from_dict(blocks),
            warnings=tuple(content["warnings"]),
        )


@dataclass(frozen=True)
class Failure:
    """A case that could not be scored.

    Parameters
    ----------
    case : str
        Its name.
    reason : str
        One line.
    """

    case: str
    reason: str


@dataclass(frozen=True)
class Presence:
    """How an organ's presence was told, over the cases that annotate it. A share is None without
    a case to count.

    Parameters
    ----------
    n_there, n_found : int
        Cases that have the organ; those of them in which it was reported.
    n_absent, n_left_out : int
        Cases that lack it; those of them in which it was not reported.
    n_missed, n_false : int
        Cases that have the organ and not one voxel was segmented; that lack it and some were.
    """

    n_there: int
    n_found: int
    n_absent: int
    n_left_out: int
    n_missed: int
    n_false: int

    @property
    def sensitivity(self) -> float | None:
        """Share of the cases with the organ in which it was reported."""
        return self.n_found / self.n_there if self.n_there else None

    @property
    def specificity(self) -> float | None:
        """Share of the cases without it in which it was not reported."""
        return self.n_left_out / self.n_absent if self.n_absent else None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model, or a way to learn one, is worth on labelled scans.

    Parameters
    ----------
    classes : tuple of str
        All classes of the model, in label order.
    organs : tuple of str
        Those of them that are scored.
    cases : tuple of CaseScores
        The cases that could be scored, by name.
    failures : tuple of Failure
        Those that could not.
    how : mapping
        What was evaluated, for JSON: the model or the folds, and how cases were scored
        (``tolerance_mm``, ``level``, ``n_resamples``, ``seed``).
    curve : Curve or None
        What accuracy costs, where that was asked for. Its speeds are the machine's, and differ from
        run to run.
    """

    classes: tuple[str, ...]
    organs: tuple[str, ...]
    cases: tuple[CaseScores, ...]
    failures: tuple[Failure, ...]
    how: Mapping[str, Any]
    curve: Curve | None = None

    @cached_property
    def patients(self) -> tuple[str, ...]:
        """Each patient once, sorted."""
        return tuple(sorted({case.patient for case in self.cases}))

    @property
    def trained_on(self) -> tuple[str, ...]:
        """Cases that their model had learned from."""
        return tuple(case.name for case in self.cases if case.was_trained_on)

    def by_case(self, score: str) -> Floats:
        """(n_cases, n_organs) of one of ``metrics.SCORES``."""
        if score not in SCORES:
            raise ValueError(f"score {score!r} is unknown; use one of {', '.join(SCORES)}")
        rows = [case.scores[score] for case in self.cases]
        return np.array(rows, np.float64).reshape(len(self.cases), len(self.organs))

    def by_patient(self, score: str) -> Floats:
        """(n_patients, n_organs + 1): means over each patient's cases, and last over organs.

        Errors of volume, which have a sign, lose it before anything is averaged.
        """
        values = np.abs(self.by_case(score))
        rows = {patient: n for n, patient in enumerate(self.patients)}
        of_patient = np.array([rows[case.patient] for case in self.cases], np.intp)
        table = np.full((len(rows), len(self.organs) + 1), np.nan)
        for row in range(len(rows)):
            table[row, :-1] = _column_means(values[of_patient == row])
            table[row, -1] = _column_means(table[row, :-1][:, None])[0]
        return table

    def summary(self, score: str) -> dict[str, dict[str, Any]]:
        """Mean over patients with a bootstrap interval, of each organ and of all organs.

        Parameters
        ----------
        score : str
            One of ``metrics.SCORES``.

        Returns
        -------
        dict of str to dict
            Organ, or ``"all organs"`` -> ``n_patients``, ``mean``, ``low``, ``high``; None where
            there is no such number.
        """
        found = mean_intervals(
            self.by_patient(score), self.how["seed"], self.how["n_resamples"], self.how["level"]
        )
        return {
            name: {
                "n_patients": int(found.n[n]),
                "mean": _plain(found.mean[n]),
                "low": _plain(found.low[n]),
                "high": _plain(found.high[n]),
            }
            for n, name in enumerate((*self.organs, ALL_ORGANS))
        }

    @cached_property
    def presence(self) -> dict[str, Presence]:
        """Organ -> how its presence was told."""
        found = {}
        for n, organ in enumerate(self.organs):
            cases = [case for case in self.cases if case.annotated[n]]
            there = [case for case in cases if case.truth_ml[n] > 0]
            absent = [case for case in cases if not case.truth_ml[n] > 0]
            found[organ] = Presence(
                n_there=len(there),
                n_found=sum(bool(case.present[n]) for case in there),
                n_absent=len(absent),
                n_left_out=sum(not case.present[n] for case in absent),
                n_missed=sum(not case.predicted_ml[n] > 0 for case in there),
                n_false=sum(bool(case.predicted_ml[n] > 0) for case in absent),
            )
        return found

    @cached_property
    def voxel_confusion(self) -> Counts:
        """(n_classes + 1, n_classes) int64 over all cases; last is what no case labels."""
        n = len(self.classes)
        empty = np.zeros((n + 1, n), np.int64)
        return sum((case.voxels for case in self.cases), empty)

    @cached_property
    def blocks(self) -> BlockAnswers | None:
        """The blocks of all cases together; None where they were not asked for."""
        of_cases = [case.blocks for case in self.cases if case.blocks is not None]
        if not of_cases:
            return None
        counts = sum((b.counts for b in of_cases), np.zeros_like(of_cases[0].counts))
        diagram = of_cases[0].reliability
        for other in of_cases[1:]:
            diagram = diagram + other.reliability
        n = [int(b.counts.sum()) for b in of_cases]
        total = max(sum(n), 1)
        brier = sum(k * b.brier for k, b in zip(n, of_cases, strict=True)) / total
        loss = sum(k * b.log_loss for k, b in zip(n, of_cases, strict=True)) / total
        return BlockAnswers(counts, diagram, brier, loss)

    @cached_property
    def voxel_reliability(self) -> Reliability:
        """Reliability of the confidence of voxels that were segmented as an organ."""
        empty = np.zeros((2, 256), np.int64)
        return reliability_of_histogram(sum((case.confidence for case in self.cases), empty))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON: the cases, and what they say together (``summary`` and below)."""
        return {
            "schema": SCHEMA,
            "how": dict(self.how),
            "classes": list(self.classes),
            "organs": list(self.organs),
            "patients": list(self.patients),
            "trained_on": list(self.trained_on),
            "cases": [case.to_dict() for case in self.cases],
            "failures": [{"case": f.case, "reason": f.reason} for f in self.failures],
            "summary": {score: self.summary(score) for score in SCORES},
            "presence": {organ: _presence(found) for organ, found in self.presence.items()},
            "confusion": self._confusion(),
            "calibration": self._calibration(),
            "curve": None if self.curve is None else self.curve.to_dict(),
        }

    def report(self, path: str | PathLike[str]) -> None:
        """Write one HTML page with everything that was found, offline.

        Parameters
        ----------
        path : str or PathLike
            File to write, whole or not at all.

        Raises
        ------
        InputError
            The file cannot be written.
        """
        from organfast.evaluationreport import evaluation_page
        from organfast.page import write_page

        pictures = {
            (case.name, case.fold, case.model): case.picture
            for case in self.cases
            if case.picture is not None
        }
        write_page(evaluation_page(self.to_dict(), pictures), path)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Evaluation:
        """What :meth:`to_dict` described; what cases say together is counted anew.

        Raises
        ------
        ValueError
            It is no such description.
        """
        if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
            raise ValueError(f"this is no evaluation of schema {SCHEMA}; evaluate again")
        try:
            return Evaluation(
                classes=tuple(content["classes"]),
                organs=tuple(content["organs"]),
                cases=tuple(CaseScores.from_dict(case) for case in content["cases"]),
                failures=tuple(Failure(f["case"], f["reason"]) for f in content["failures"]),
                how=content["how"],
                curve=None if content.get("curve") is None else Curve.from_dict(content["curve"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the evaluation is damaged ({error}); evaluate again") from None

    def _confusion(self) -> dict[str, Any]:
        voxels = {
            "rows": [*self.classes, UNLABELLED],
            "counts": self.voxel_confusion.tolist(),
            "shares": _plain(row_shares(self.voxel_confusion)),
        }
        if self.blocks is None:
            return {"voxels": voxels, "blocks": None}
        organs = [self.classes.index(organ) for organ in self.organs]
        return {
            "voxels": voxels,
            "blocks": {
                "rows": list(self.classes),
                "counts": self.blocks.counts.tolist(),
                "shares": _plain(row_shares(self.blocks.counts)),
                **vars(block_scores(self.blocks.counts, organs)),
            },
        }

    def _calibration(self) -> dict[str, Any]:
        blocks, voxels = self.blocks, self.voxel_reliability
        return {
            "voxels": _diagram(voxels),
            "blocks": None
            if blocks is None
            else {
                **_diagram(blocks.reliability),
                "brier": _plain(blocks.brier),
                "log_loss": _plain(blocks.log_loss),
            },
        }


def _diagram(found: Reliability) -> dict[str, Any]:
    return {
        "edges": found.edges.tolist(),
        "counts": found.counts.tolist(),
        "confidence": _plain(found.confidence),
        "accuracy": _plain(found.accuracy),
        "expected_calibration_error": _plain(found.expected_error),
    }


def _presence(found: Presence) -> dict[str, Any]:
    return {**vars(found), "sensitivity": found.sensitivity, "specificity": found.specificity}


def compare(first: Evaluation, second: Evaluation, score: str = "dice") -> dict[str, Any]:
    """Compare two models on the patients that both were evaluated on.

    Parameters
    ----------
    first, second : Evaluation
        Of the two models; what both know is compared: cases by name, organs by name. The seed,
        the resamples and the level are the first one's.
    score : str
        One of ``metrics.SCORES``.

    Returns
    -------
    dict of str to PairedComparison
        Organ, or ``"all organs"`` -> how much greater the second model's score is.

    Raises
    ------
    ValueError
        The two have no case or no organ in common.
    """
    organs = [organ for organ in first.organs if organ in second.organs]
    names = {case.name for case in first.cases} & {case.name for case in second.cases}
    if not organs or not names:
        raise ValueError("the two evaluations have no case or no organ in common")
    tables = [_part(evaluation, names, organs).by_patient(score) for evaluation in (first, second)]
    compared: dict[str, PairedComparison] = {}
    how = first.how
    for n, organ in enumerate((*organs, ALL_ORGANS)):
        one, other = (table[:, n] for table in tables)
        compared[organ] = compare_paired(one, other, how["seed"], how["n_resamples"], how["level"])
    return compared


def _part(evaluation: Evaluation, names: set[str], organs: Sequence[str]) -> Evaluation:
    """Some cases and organs of an evaluation; only its scores can be asked for."""
    columns = [evaluation.organs.index(organ) for organ in organs]
    cases = tuple(
        CaseScores(
            **{
                **vars(case),
                "scores": {name: values[columns] for name, values in case.scores.items()},
            }
        )
        for case in evaluation.cases
        if case.name in names
    )
    return Evaluation(evaluation.classes, tuple(organs), cases, (), evaluation.how)


# --- for people and spreadsheets ------------------------------------------------------------------


def evaluation_csv(evaluation: Evaluation) -> str:
    """A row for each case and organ that was scored, units in the column names.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.

    Parameters
    ----------
    evaluation : Evaluation
        What to write.
    """
    head = ("case", "patient", "fold", "organ", "present", "truth_ml", "predicted_ml")
    rows: list[Sequence[Any]] = [(*head, *SCORES)]
    for case in evaluation.cases:
        for n in np.flatnonzero(case.annotated):
            numbers = (case.truth_ml[n], case.predicted_ml[n], *(case.scores[s][n] for s in SCORES))
            row = (case.name, case.patient, case.fold, evaluation.organs[n])
            present = "true" if case.present[n] else "false"
            rows.append(
                (*row, present, *(None if np.isnan(x) else float(f"{x:.6g}") for x in numbers))
            )
    return table(rows)


def summary_rows(evaluation: Evaluation) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the table that people read: means with their intervals.

    Parameters
    ----------
    evaluation : Evaluation
        What to show.
    """
    how = evaluation.how
    shown = {
        "dice": ("Dice", 2),
        "nsd": (f"NSD {how['tolerance_mm']:g} mm", 2),
        "hd95_mm": ("HD95 mm", 1),
        "volume_error_percent": ("volume off %", 0),
        "centroid_mm": ("centre off mm", 1),
    }
    heads = ("organ", "patients", *(head for head, _ in shown.values()), "missed", "false")
    summaries = {score: evaluation.summary(score) for score in shown}
    rows = []
    for organ in (*evaluation.organs, ALL_ORGANS):
        n_patients = summaries["dice"][organ]["n_patients"]
        found = [evaluation.presence[o] for o in evaluation.organs if organ in (o, ALL_ORGANS)]
        missed, there = sum(p.n_missed for p in found), sum(p.n_there for p in found)
        false, absent = sum(p.n_false for p in found), sum(p.n_absent for p in found)
        if not there + absent:
            continue
        cells = [
            _with_interval(summaries[s][organ], decimals) for s, (_, decimals) in shown.items()
        ]
        counts = (f"{missed} of {there}", f"{false} of {absent}")
        rows.append((organ, str(n_patients), *cells, *counts))
    return heads, rows


def comparison_rows(
    compared: Mapping[str, PairedComparison], level: float
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of a comparison of two models, for people to read.

    Parameters
    ----------
    compared : mapping
        What :func:`compare` returned.
    level : float
        Of the intervals.
    """
    heads = ("organ", "patients", f"difference [{100 * level:g} %]", "Wilcoxon p")
    rows: list[tuple[str, ...]] = []
    for organ, found in compared.items():
        if not found.n_patients:
            continue
        entry = {"mean": found.difference, "low": found.low, "high": found.high}
        p = "-" if found.p_wilcoxon is None else f"{found.p_wilcoxon:.3g}"
        rows.append((organ, str(found.n_patients), _with_interval(entry, 3, "+"), p))
    return heads, rows


def _with_interval(entry: Mapping[str, Any], decimals: int, sign: str = "") -> str:
    if entry["mean"] is None:
        return "-"
    mean = f"{entry['mean']:{sign}.{decimals}f}"
    if entry["low"] is None:
        return mean
    return f"{mean} [{entry['low']:{sign}.{decimals}f}, {entry['high']:{sign}.{decimals}f}]"


def _plain(value: Any) -> Any:
    """For JSON: arrays are lists, NaN is None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(value)
    return value


def _floats(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _column_means(values: Floats) -> Floats:
    there = ~np.isnan(values)
    means = np.full(values.shape[1], np.nan)
    np.divide(np.nansum(values, axis=0), there.sum(axis=0), out=means, where=there.any(axis=0))
    return means
