"""What a few patients allow one to say, beside SciPy and by hand."""

from __future__ import annotations

import naive
import numpy as np
import pytest

from organfast.kernels.bootstrap import bootstrap_means
from organfast.statistics import compare_paired, mean_intervals, patient_folds


def scores(n: int, seed: int = 0) -> np.ndarray:
    """Skewed scores of two organs and of one that a third of the patients lack."""
    values = np.random.default_rng(seed).beta(5, 1.5, (n, 3))
    values[::3, 2] = np.nan
    return values


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_resampling_equals_its_twin_and_can_be_shared_out(n: int) -> None:
    values = scores(n)
    found = np.empty((40, 3))
    bootstrap_means(values, 5, 0, found)
    np.testing.assert_allclose(found, naive.bootstrap_means(values, 5, 0, 40), rtol=1e-12)
    rest = np.empty((15, 3))
    bootstrap_means(values, 5, 25, rest)
    np.testing.assert_array_equal(rest, found[25:])


def test_every_patient_is_drawn_as_often() -> None:
    means = np.empty((20_000, 8))
    bootstrap_means(np.eye(8), 1, 0, means)
    np.testing.assert_allclose(means.mean(axis=0), 1 / 8, atol=0.002)
    # Drawn n times with replacement: a binomial variance.
    np.testing.assert_allclose(means.var(axis=0), 1 / 8 * 7 / 8 / 8, rtol=0.05)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_are_scipys(method: str) -> None:
    from scipy import stats

    values = scores(20)
    found = mean_intervals(values, 3, 20_000, 0.9, method)  # type: ignore[arg-type]
    for column in range(3):
        there = values[~np.isnan(values[:, column]), column]
        np.testing.assert_allclose(found.mean[column], there.mean())
        assert found.n[column] == len(there)
        if column == 2:
            continue  # SciPy draws from those who are there, we draw patients
        expected = stats.bootstrap(
            (there,),
            np.mean,
            n_resamples=20_000,
            confidence_level=0.9,
            method=method,
            rng=np.random.default_rng(0),
        ).confidence_interval
        ends = found.low[column], found.high[column]
        np.testing.assert_allclose(ends, (expected.low, expected.high), atol=0.003)


def test_intervals_repeat_and_know_their_seed() -> None:
    values = scores(10)
    one, same, other = (mean_intervals(values, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.low, same.low)
    assert (one.low != other.low).any()
    assert (one.low < one.mean).all()
    assert (one.mean < one.high).all()


def test_one_patient_or_none_has_no_interval() -> None:
    values = np.array([[0.5, np.nan, 0.7, 0.2], [np.nan, np.nan, 0.7, 0.4]])
    for method in ("percentile", "bca"):
        found = mean_intervals(values, 0, 500, method=method)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.n, [1, 0, 2, 2])
        np.testing.assert_allclose(found.mean, [0.5, np.nan, 0.7, 0.3])
        np.testing.assert_allclose(found.low[:3], [np.nan, np.nan, 0.7])
        np.testing.assert_allclose(found.high[:3], [np.nan, np.nan, 0.7])
        assert 0.2 <= found.low[3] <= found.high[3] <= 0.4
    nobody = mean_intervals(np.empty((0, 2)), 0)
    assert np.isnan(nobody.mean).all()
    assert np.isnan(nobody.low).all()


def test_two_models_are_compared_patient_by_patient() -> None:
    from scipy import stats

    first = scores(12)[:, 0]
    second = first + np.random.default_rng(1).normal(0.03, 0.02, 12)
    second[4] = np.nan
    found = compare_paired(first, second, seed=0)
    there = ~np.isnan(second)
    assert found.n_patients == 11
    np.testing.assert_allclose(found.difference, (second - first)[there].mean())
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.difference < found.high  # type: ignore[operator]
    expected = stats.wilcoxon(second[there], first[there]).pvalue
    np.testing.assert_allclose(found.p_wilcoxon, expected)
    back = compare_paired(second, first, seed=0)
    np.testing.assert_allclose([back.low, back.high], [-found.high, -found.low], rtol=1e-9)
    assert back.p_wilcoxon == found.p_wilcoxon


def test_comparisons_that_tell_nothing() -> None:
    same = compare_paired(np.ones(4), np.ones(4), 0)
    assert (same.n_patients, same.difference, same.low, same.p_wilcoxon) == (4, 0, 0, None)
    single = compare_paired(np.array([0.5, np.nan]), np.array([0.75, 1]), 0)
    assert (single.n_patients, single.difference, single.low) == (1, 0.25, None)
    assert single.p_wilcoxon == 1
    nobody = compare_paired(np.array([np.nan]), np.ones(1), 0).to_dict()
    assert (nobody["n_patients"], nobody["difference"], nobody["p_wilcoxon"]) == (0, None, None)


def test_folds_test_each_patient_once_and_know_their_seed() -> None:
    patients = [f"p{n}" for n in range(10)]
    folds = patient_folds(patients, 4, seed=3)
    assert sorted(p for fold in folds for p in fold) == patients
    assert [len(fold) for fold in folds] == [3, 3, 2, 2]
    assert folds == patient_folds([*reversed(patients), "p3"], 4, seed=3)
    assert folds != patient_folds(patients, 4, seed=4)
    assert patient_folds(patients, None) == tuple((p,) for p in patients)


def test_arguments_that_do_not_fit_are_refused() -> None:
    values = scores(4)
    for wrong, message in (
        ({"values": values[0]}, "1 axes"),
        ({"seed": -1}, "whole number"),
        ({"n_resamples": 0}, "whole number"),
        ({"level": 1.0}, "between 0 and 1"),
        ({"method": "magic"}, "use percentile or bca"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_intervals(**{"values": values, "seed": 0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are no pair"):
        compare_paired(np.ones(3), np.ones(4), 0)
    for n in (1, 4):
        with pytest.raises(ValueError, match="leave nobody to train or to test on"):
            patient_folds("abc", n)
    with pytest.raises(ValueError, match="leave nobody"):
        patient_folds("a", None)
