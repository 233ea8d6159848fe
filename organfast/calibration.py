"""Probabilities that mean what they say: how far they do, and how to bring them there.

Works on rows of class probabilities, whatever classifier they come from. Fit on patients that the
classifier was not trained on; what is fitted on balanced blocks holds for balanced blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from organfast.errors import is_whole

__all__ = [
    "FITS",
    "Calibration",
    "Isotonic",
    "Reliability",
    "Temperature",
    "brier_score",
    "calibration_from_dict",
    "fit_isotonic",
    "fit_temperature",
    "log_loss",
    "reliability",
    "reliability_of_histogram",
]

Floats = NDArray[np.float64]
Probabilities = NDArray[np.float32] | NDArray[np.float64]

FLOOR = 1e-4
"""The least that a calibrated class gets before its row is made to add up to 1: no vote of a
hundred trees is not impossible, and its logarithm is wanted."""
N_BINS = 15
_KNOTS = 101
_MAX_TEMPERATURE = 100.0
_MAX_CLASSES = 4096


# --- how far --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram: what was said, and what was so. Diagrams add up.

    Parameters
    ----------
    edges : (n_bins + 1,) float64
        Of the bins of confidence, rising from 0 to 1; a bin includes its upper edge.
    counts : (n_bins,) int64
        Predictions in each bin.
    confidence_sums : (n_bins,) float64
        Sums of their confidence.
    right : (n_bins,) int64
        Those that were right.
    """

    edges: Floats
    counts: NDArray[np.int64]
    confidence_sums: Floats
    right: NDArray[np.int64]

    @property
    def confidence(self) -> Floats:
        """(n_bins,) mean confidence; NaN in empty bins."""
        return _means(self.confidence_sums, self.counts)

    @property
    def accuracy(self) -> Floats:
        """(n_bins,) share that was right; NaN in empty bins."""
        return _means(self.right.astype(np.float64), self.counts)

    @property
    def expected_error(self) -> float:
        """Expected calibration error: mean gap of confidence and accuracy, bins by their counts.

        After Naeini, Cooper and Hauskrecht 2015 (AAAI). NaN where there is no prediction.
        """
        n = self.counts.sum()
        return float(np.abs(self.confidence_sums - self.right).sum() / n) if n else float("nan")

    def __add__(self, other: Reliability) -> Reliability:
        if not np.array_equal(self.edges, other.edges):
            raise ValueError("reliability diagrams of other bins do not add up; use equal edges")
        return Reliability(
            self.edges,
            self.counts + other.counts,
            self.confidence_sums + other.confidence_sums,
            self.right + other.right,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "edges": self.edges.tolist(),
            "counts": self.counts.tolist(),
            "confidence_sums": self.confidence_sums.tolist(),
            "right": self.right.tolist(),
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Reliability:
        """The diagram that :meth:`to_dict` described."""
        return Reliability(
            np.array(content["edges"], np.float64),
            np.array(content["counts"], np.int64),
            np.array(content["confidence_sums"], np.float64),
            np.array(content["right"], np.int64),
        )


def reliability(
    probabilities: Probabilities,
    labels: NDArray[np.integer[Any]],
    n_bins: int = N_BINS,
    bins: Literal["equal", "adaptive"] = "equal",
) -> Reliability:
    """Compare the confidence in the most probable class with how often it is right.

    Parameters
    ----------
    probabilities : (n, n_classes) float
        Rows that add up to 1.
    labels : (n,) integer
        Classes that are right.
    n_bins : int
        Bins of confidence.
    bins : {"equal", "adaptive"}
        Bins as wide as each other, or with about as many predictions each (fewer where many are
        equally confident).

    Raises
    ------
    ValueError
        The arrays are no such pair, or the number or kind of bins is unknown.
    """
    _check_pair(probabilities, labels)
    if not is_whole(n_bins, 1) or bins not in ("equal", "adaptive"):
        raise ValueError(f"{n_bins!r} bins, {bins!r}; give a number from 1, equal or adaptive")
    confidence = probabilities.max(axis=1).astype(np.float64) if len(labels) else np.zeros(0)
    right = probabilities.argmax(axis=1) == labels if len(labels) else np.zeros(0, bool)
    edges = np.linspace(0, 1, n_bins + 1)
    if bins == "adaptive" and len(labels):
        inner = np.quantile(confidence, edges[1:-1])
        edges = np.unique(np.concatenate([[0.0], inner, [1.0]]))
    return _binned(edges, confidence, np.ones(len(labels), np.int64), right.astype(np.int64))


def reliability_of_histogram(counts: NDArray[np.int64], n_bins: int = N_BINS) -> Reliability:
    """The reliability diagram of a confidence map, from how often each of its values was right.

    Parameters
    ----------
    counts : (2, 256) int64
        By confidence / 255, all voxels and those that are right.
    n_bins : int
        Bins as wide as each other.
    """
    return _binned(np.linspace(0, 1, n_bins + 1), np.arange(256) / 255, counts[0], counts[1])


def brier_score(probabilities: Probabilities, labels: NDArray[np.integer[Any]]) -> float:
    """Mean over rows of the squared distance from the truth; 0 is best, 2 is worst.

    Parameters
    ----------
    probabilities : (n, n_classes) float
        Rows that add up to 1.
    labels : (n,) integer
        Classes that are right.

    Raises
    ------
    ValueError
        The arrays are no such pair, or are empty.
    """
    _check_pair(probabilities, labels, least=1)
    p = probabilities.astype(np.float64)
    of_truth = p[np.arange(len(labels)), labels]
    return float(((p**2).sum(axis=1) - 2 * of_truth + 1).mean())


def log_loss(probabilities: Probabilities, labels: NDArray[np.integer[Any]]) -> float:
    """Mean negative logarithm of the true class's probability, which counts as at least 1e-4.

    Parameters
    ----------
    probabilities : (n, n_classes) float
        Rows that add up to 1.
    labels : (n,) integer
        Classes that are right.

    Raises
    ------
    ValueError
        The arrays are no such pair, or are empty.
    """
    _check_pair(probabilities, labels, least=1)
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_truth, FLOOR)).mean())


def _binned(
    edges: Floats, confidence: Floats, counts: NDArray[np.int64], right: NDArray[np.int64]
) -> Reliability:
    n = len(edges) - 1
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n - 1)
    return Reliability(
        edges,
        np.bincount(place, counts, minlength=n).astype(np.int64),
        np.bincount(place, counts * confidence, minlength=n).astype(np.float64),
        np.bincount(place, right, minlength=n).astype(np.int64),
    )


def _means(sums: Floats, counts: NDArray[np.int64]) -> Floats:
    means = np.full(len(sums), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


# --- and what to do about it ----------------------------------------------------------------------


class Calibration(Protocol):
    """What brings probabilities to how often they are right."""

    @property
    def keeps_order(self) -> bool:
        """Whether the classes of a row stay in the order of their probabilities."""

    def apply(self, probabilities: Probabilities, out: Probabilities) -> None:
        """Write calibrated rows that add up to 1.

        Parameters
        ----------
        probabilities : (n, n_classes) float32 or float64
            As the classifier gives them.
        out : (n, n_classes) float32 or float64
            Receives the rows; may be ``probabilities`` itself.
        """

    def to_dict(self) -> dict[str, Any]:
        """For the header of a model; ``calibration_from_dict`` reads it."""


@dataclass(frozen=True)
class Temperature:
    """One number for all classes: ``p ** (1 / temperature)``, made to add up to 1.

    It never changes which class is the most probable (Guo et al. 2017, ICML).

    Parameters
    ----------
    temperature : float
        Above 1 where the classifier is too sure.

    Raises
    ------
    ValueError
        It is not between 0.01 and 100.
    """

    temperature: float

    def __post_init__(self) -> None:
        is_number = type(self.temperature) in (int, float)
        if not (is_number and 1 / _MAX_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE):
            raise ValueError(f"temperature is {self.temperature!r}; give a number from 0.01 to 100")

    @property
    def keeps_order(self) -> bool:
        """It does."""
        return True

    def apply(self, probabilities: Probabilities, out: Probabilities) -> None:
        """Write calibrated rows; see :class:`Calibration`."""
        _check_out(probabilities, out)
        np.maximum(probabilities, FLOOR, out=out)
        np.log(out, out=out)
        out *= 1 / self.temperature
        out -= out.max(axis=1, keepdims=True)  # a large exponent would leave nothing of a row
        np.exp(out, out=out)
        out /= out.sum(axis=1, keepdims=True)

    def to_dict(self) -> dict[str, Any]:
        """For the header of a model."""
        return {"kind": "temperature", "temperature": float(self.temperature)}


@dataclass(frozen=True, eq=False)
class Isotonic:
    """A rising curve for each class, one against all others, then rows made to add up to 1.

    It may change which class is the most probable (Zadrozny and Elkan 2002, KDD).

    Parameters
    ----------
    curves : (n_classes, n_knots) float32
        Calibrated probability at ``n_knots`` probabilities evenly from 0 to 1; linear in between.

    Raises
    ------
    ValueError
        A curve falls, or leaves 0..1.
    """

    curves: NDArray[np.float32]

    def __post_init__(self) -> None:
        curves = np.array(self.curves, np.float32)
        if curves.ndim != 2 or curves.shape[1] < 2 or not len(curves):
            raise ValueError(
                f"curves of shape {curves.shape}; give (n_classes, n_knots), 2 knots or more"
            )
        if not ((curves >= 0) & (curves <= 1)).all() or (np.diff(curves, axis=1) < 0).any():
            raise ValueError("a curve falls or leaves 0..1; fit it with fit_isotonic")
        curves.flags.writeable = False
        object.__setattr__(self, "curves", curves)

    @property
    def keeps_order(self) -> bool:
        """It does not."""
        return False

    def apply(self, probabilities: Probabilities, out: Probabilities) -> None:
        """Write calibrated rows; see :class:`Calibration`."""
        _check_out(probabilities, out, len(self.curves))
        n_steps = self.curves.shape[1] - 1
        for label, curve in enumerate(self.curves):
            place: NDArray[Any] = np.clip(probabilities[:, label], 0, 1).astype(np.float32)
            place *= n_steps
            below = np.minimum(place.astype(np.intp), n_steps - 1)
            low = curve[below]
            out[:, label] = low + (place - below) * (curve[below + 1] - low)
        np.maximum(out, FLOOR, out=out)
        out /= out.sum(axis=1, keepdims=True)

    def to_dict(self) -> dict[str, Any]:
        """For the header of a model."""
        # Five digits are more than the fit knows; rounding keeps a curve rising.
        rounded = np.round(self.curves.astype(np.float64), 5)
        return {"kind": "isotonic", "curves": rounded.tolist()}


def calibration_from_dict(
    content: Mapping[str, Any] | None, n_classes: int
) -> Temperature | Isotonic | None:
    """What ``to_dict`` described, all of it checked: a model file is not trusted.

    Parameters
    ----------
    content : mapping or None
        Of a model's header; None is no calibration.
    n_classes : int
        Classes of the model.

    Raises
    ------
    ValueError
        It is no such description, or of another number of classes.
    """
    if content is None:
        return None
    kind = content.get("kind") if isinstance(content, Mapping) else None
    if kind == "temperature" and set(content) == {"kind", "temperature"}:
        return Temperature(content["temperature"])
    if kind == "isotonic" and set(content) == {"kind", "curves"}:
        rows = content["curves"]
        is_table = isinstance(rows, list) and 0 < len(rows) <= _MAX_CLASSES
        if is_table and all(isinstance(r, list) and len(r) == len(rows[0]) for r in rows):
            numbers = [value for row in rows for value in row]
            if all(type(value) in (int, float) for value in numbers) and len(rows) == n_classes:
                return Isotonic(np.array(rows, np.float32))
    raise ValueError(
        f"the calibration is of an unknown kind, damaged, or not of {n_classes} classes"
    )


def fit_temperature(probabilities: Probabilities, labels: NDArray[np.integer[Any]]) -> Temperature:
    """The temperature at which held-out labels are most likely.

    Parameters
    ----------
    probabilities : (n, n_classes) float
        Of positions of patients that the classifier was not trained on.
    labels : (n,) integer
        Classes that are right.

    Raises
    ------
    ValueError
        The arrays are no such pair, or are empty.
    """
    from scipy.optimize import minimize_scalar

    _check_pair(probabilities, labels, least=1)
    logs = np.log(np.maximum(probabilities.astype(np.float64), FLOOR))
    of_truth = logs[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        scaled = logs * scale
        top = scaled.max(axis=1)
        totals = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((totals - scale * of_truth).mean())

    end = np.log(_MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-end, end), method="bounded", options={"xatol": 1e-5})
    return Temperature(float(np.exp(np.clip(found.x, -end, end))))


def fit_isotonic(probabilities: Probabilities, labels: NDArray[np.integer[Any]]) -> Isotonic:
    """Rising curves through how often held-out predictions are right, class by class.

    Probabilities are gathered at 101 evenly placed knots, and their neighbours pooled until the
    shares rise; a class without a label keeps its probabilities.

    Parameters
    ----------
    probabilities : (n, n_classes) float
        Of positions of patients that the classifier was not trained on.
    labels : (n,) integer
        Classes that are right.

    Raises
    ------
    ValueError
        The arrays are no such pair, or are empty.
    """
    _check_pair(probabilities, labels, least=1)
    knots = np.linspace(0, 1, _KNOTS)
    curves = np.tile(knots, (probabilities.shape[1], 1))
    for label, curve in enumerate(curves):
        is_it = labels == label
        if is_it.any():
            curve[:] = _rising(probabilities[:, label].astype(np.float64), is_it, knots)
    return Isotonic(curves.astype(np.float32))


FITS: Mapping[str, Callable[..., Temperature | Isotonic]] = {
    "temperature": fit_temperature,
    "isotonic": fit_isotonic,
}
"""Kind of a calibration -> how it is fitted, to (n, n_classes) probabilities and (n,) labels."""


def _rising(p: Floats, is_it: NDArray[np.bool_], knots: Floats) -> Floats:
    from scipy.optimize import isotonic_regression

    nearest = np.rint(np.clip(p, 0, 1) * (len(knots) - 1)).astype(np.intp)
    n = np.bincount(nearest, minlength=len(knots))
    there = n > 0
    n_right = np.bincount(nearest, is_it, minlength=len(knots))[there]
    at = np.bincount(nearest, p, minlength=len(knots))[there] / n[there]
    fitted = isotonic_regression(n_right / n[there], weights=n[there]).x
    rising: Floats = np.clip(np.interp(knots, at, fitted), 0, 1)
    return rising


def _check_pair(
    probabilities: Probabilities, labels: NDArray[np.integer[Any]], least: int = 0
) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or len(labels) < least:
        raise ValueError(
            f"probabilities of shape {probabilities.shape} and labels of shape {labels.shape} are "
            "no pair; give one row of class probabilities for each label"
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}; give integers")
    if len(labels) and not 0 <= labels.min() <= labels.max() < probabilities.shape[1]:
        raise ValueError(f"a label is not one of the {probabilities.shape[1]} classes")
    if not np.isfinite(probabilities).all():
        raise ValueError("a probability is not finite; give rows that add up to 1")


def _check_out(
    probabilities: Probabilities, out: Probabilities, n_classes: int | None = None
) -> None:
    if out.shape != probabilities.shape or out.ndim != 2 or out.dtype.kind != "f":
        raise ValueError(
            f"out of shape {out.shape}, {out.dtype}, does not fit probabilities of shape "
            f"{probabilities.shape}; give a float array of that shape"
        )
    if n_classes is not None and out.shape[1] != n_classes:
        raise ValueError(f"{out.shape[1]} classes are to be calibrated by curves of {n_classes}")
