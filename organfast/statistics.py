"""What a few patients allow one to say: intervals, comparisons of two models, folds.

Everything is counted in patients, for two scans of one person are not two observations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from organfast.errors import is_whole

__all__ = [
    "MeanIntervals",
    "PairedComparison",
    "compare_paired",
    "mean_intervals",
    "patient_folds",
]

Floats = NDArray[np.float64]
Method = Literal["percentile", "bca"]


@dataclass(frozen=True, eq=False)
class MeanIntervals:
    """Means over patients, each with a bootstrap interval.

    Parameters
    ----------
    n : (n_columns,) int64
        Patients with a value.
    mean : (n_columns,) float64
        NaN where there is no patient.
    low, high : (n_columns,) float64
        Ends of the interval; NaN where there are fewer than two patients.
    level : float
        Of the interval, 0.95 for 95 %.
    """

    n: NDArray[np.int64]
    mean: Floats
    low: Floats
    high: Floats
    level: float


def mean_intervals(
    values: Floats,
    seed: int,
    n_resamples: int = 10_000,
    level: float = 0.95,
    method: Method = "percentile",
) -> MeanIntervals:
    """Mean of each column over patients, with a bootstrap interval.

    Patients are drawn with replacement, for all columns the same ones; NaN is left out (Efron and
    Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 14).

    Parameters
    ----------
    values : (n_patients, n_columns) float64
        One row per patient; NaN where a patient has no value.
    seed : int
        Seed of the resampling, not negative.
    n_resamples : int
        How often patients are drawn.
    level : float
        Of the interval, between 0 and 1.
    method : {"percentile", "bca"}
        The quantiles of the resampled means as they are, or corrected for bias and skewness.

    Raises
    ------
    ValueError
        The values are no such table, or an argument is out of range.
    """
    from organfast.kernels.bootstrap import bootstrap_means

    values = np.ascontiguousarray(values, np.float64)
    if values.ndim != 2:
        raise ValueError(f"values have {values.ndim} axes; give (n_patients, n_columns)")
    if not is_whole(seed, 0) or not is_whole(n_resamples, 1):
        raise ValueError(
            f"seed {seed!r} or n_resamples {n_resamples!r} is no whole number from 0 or 1 on"
        )
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; give a share between 0 and 1, such as 0.95")
    if method not in ("percentile", "bca"):
        raise ValueError(f"method {method!r} is unknown; use percentile or bca")
    n = (~np.isnan(values)).sum(axis=0)
    mean = np.full(values.shape[1], np.nan)
    np.divide(np.nansum(values, axis=0), n, out=mean, where=n > 0)
    ends = np.full((2, values.shape[1]), np.nan)
    if len(values):
        means = np.empty((n_resamples, values.shape[1]))
        bootstrap_means(values, int(seed), 0, means)
        shares = (1 - level) / 2, (1 + level) / 2
        for column in np.flatnonzero(n >= 2):
            drawn = means[:, column]
            drawn = drawn[~np.isnan(drawn)]
            wanted = np.array(shares)
            if method == "bca":
                there = values[~np.isnan(values[:, column]), column]
                wanted = _corrected(wanted, drawn, there)
            ends[:, column] = np.quantile(drawn, wanted)
    return MeanIntervals(n, mean, ends[0], ends[1], level)


def _corrected(shares: Floats, drawn: Floats, values: Floats) -> Floats:
    """Shares at which BCa reads the quantiles; unchanged where all values are one."""
    from scipy.special import ndtr, ndtri

    centre = values.mean()
    deviations = centre - (values.sum() - values) / (len(values) - 1)
    spread = (deviations**2).sum()
    if not spread:
        return shares
    below = ((drawn < centre).sum() + (drawn <= centre).sum()) / (2 * len(drawn))
    # A centre beyond all resamples would be corrected infinitely.
    bias = ndtri(np.clip(below, 1 / (2 * len(drawn)), 1 - 1 / (2 * len(drawn))))
    skewness = (deviations**3).sum() / (6 * spread**1.5)
    moved = bias + ndtri(shares)
    corrected: Floats = ndtr(bias + moved / (1 - skewness * moved))
    return corrected


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same patients. What cannot be told is None.

    Parameters
    ----------
    n_patients : int
        Patients with a value of both.
    difference : float or None
        Mean of the second model's value less the first's.
    low, high : float or None
        Ends of its bootstrap interval; from two patients on.
    level : float
        Of the interval.
    p_wilcoxon : float or None
        Two-sided Wilcoxon signed-rank test; patients without a difference are left out, and with
        none left there is no test. With n patients it cannot fall below 2 / 2**n.
    """

    n_patients: int
    difference: float | None
    low: float | None
    high: float | None
    level: float
    p_wilcoxon: float | None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def compare_paired(
    first: Floats, second: Floats, seed: int, n_resamples: int = 10_000, level: float = 0.95
) -> PairedComparison:
    """Compare the scores of two models, patient by patient.

    Parameters
    ----------
    first, second : (n_patients,) float64
        One value per patient, in one order; NaN where there is none.
    seed : int
        Seed of the bootstrap.
    n_resamples : int
        How often patients are drawn.
    level : float
        Of the interval.

    Raises
    ------
    ValueError
        The arrays are no pair, or as for :func:`mean_intervals`.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"scores of shapes {first.shape} and {second.shape} are no pair; "
            "give one value per patient for each"
        )
    differences = second - first
    differences = differences[~np.isnan(differences)]
    found = mean_intervals(differences[:, None], seed, n_resamples, level)
    mean, low, high = (
        None if np.isnan(end[0]) else float(end[0]) for end in (found.mean, found.low, found.high)
    )
    return PairedComparison(len(differences), mean, low, high, level, _wilcoxon(differences))


def _wilcoxon(differences: Floats) -> float | None:
    from scipy.stats import wilcoxon

    # Rounding must not make a difference of two equal scores, nor part ties.
    differences = np.round(differences, 12)
    differences = differences[differences != 0]
    return float(wilcoxon(differences).pvalue) if differences.size else None


def patient_folds(
    patients: Iterable[str], n_folds: int | None, seed: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Deal patients into folds, at random: each is tested in one fold.

    Parameters
    ----------
    patients : iterable of str
        Repeats count once; the order does not matter.
    n_folds : int or None
        Folds; None leaves one patient out at a time.
    seed : int
        Of the shuffle.

    Raises
    ------
    ValueError
        There are fewer than two folds, or fewer patients than folds.

    >>> patient_folds(["c", "a", "b"], None)
    (('a',), ('b',), ('c',))
    >>> [len(fold) for fold in patient_folds("abcdefg", 3)]
    [3, 2, 2]
    """
    everyone = sorted(set(patients))
    if n_folds is None:
        n_folds = len(everyone)
    else:
        order = np.random.default_rng(seed).permutation(len(everyone))
        everyone = [everyone[n] for n in order]
    if not is_whole(n_folds, 2) or n_folds > len(everyone):
        raise ValueError(
            f"{n_folds} folds of {len(everyone)} patients leave nobody to train or to test on; "
            f"give from 2 to {max(len(everyone), 2)} folds"
        )
    return tuple(tuple(sorted(everyone[fold::n_folds])) for fold in range(n_folds))
