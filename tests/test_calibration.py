"""Calibration: diagrams by hand, and classifiers made wrong on purpose and set right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from organfast.calibration import (
    FLOOR,
    Isotonic,
    Reliability,
    Temperature,
    brier_score,
    calibration_from_dict,
    fit_isotonic,
    fit_temperature,
    log_loss,
    reliability,
    reliability_of_histogram,
)


def overconfident(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Probabilities of four classes, labels drawn by them, and then each made three times surer."""
    rng = np.random.default_rng(seed)
    true = rng.dirichlet(np.ones(4), n)
    labels = (true.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    sharp = true**3
    return (sharp / sharp.sum(axis=1, keepdims=True)).astype(np.float32), labels


def test_a_diagram_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5]])
    found = reliability(p, np.array([0, 1, 1, 0]), 5)
    np.testing.assert_array_equal(found.counts, [0, 0, 1, 2, 1])
    np.testing.assert_array_equal(found.right, [0, 0, 1, 1, 1])
    np.testing.assert_allclose(found.confidence, [np.nan, np.nan, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(found.accuracy, [np.nan, np.nan, 1, 0.5, 1])
    np.testing.assert_allclose(found.expected_error, (0.5 + 2 * 0.25 + 0.1) / 4)
    twice = found + found
    np.testing.assert_array_equal(twice.counts, 2 * found.counts)
    assert twice.expected_error == found.expected_error
    again = Reliability.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    with pytest.raises(ValueError, match="do not add up"):
        found + reliability(p, np.array([0, 1, 1, 0]), 4)
    nothing = reliability(p[:0], np.zeros(0, int))
    assert np.isnan(nothing.expected_error)


def test_adaptive_bins_share_out_the_predictions() -> None:
    p, labels = overconfident(1500, 0)
    found = reliability(p, labels, 15, "adaptive")
    assert found.counts.min() >= 95
    assert found.counts.sum() == 1500
    same = reliability(np.tile([0.75, 0.25], (9, 1)), np.zeros(9, int), 15, "adaptive")
    assert same.counts.sum() == 9


def test_a_confidence_map_gives_the_diagram_of_its_voxels() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.integers(128, 256, 500)
    right = rng.random(500) < 0.6
    counts = np.stack([np.bincount(confidence, minlength=256)] * 2)
    counts[1] = np.bincount(confidence[right], minlength=256)
    found = reliability_of_histogram(counts)
    p = np.stack([confidence / 255, 1 - confidence / 255], axis=1)
    expected = reliability(p, np.where(right, 0, 1))
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.right, expected.right)
    np.testing.assert_allclose(found.expected_error, expected.expected_error)


def test_scores_are_scikit_learns() -> None:
    from sklearn.metrics import log_loss as theirs

    p, labels = overconfident(300, 1)
    p = np.maximum(p.astype(np.float64), 2 * FLOOR)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(log_loss(p, labels), theirs(labels, p, labels=range(4)))
    one_hot = np.eye(4)[labels]
    np.testing.assert_allclose(brier_score(p, labels), ((p - one_hot) ** 2).sum(axis=1).mean())


@pytest.mark.parametrize("fit", [fit_temperature, fit_isotonic])
def test_what_is_fitted_on_some_patients_helps_on_others(fit: Any) -> None:
    calibration = fit(*overconfident(4000, 0))
    p, labels = overconfident(4000, 1)
    better = np.empty_like(p)
    calibration.apply(p, better)
    np.testing.assert_allclose(better.sum(axis=1), 1, rtol=1e-5)
    before, after = (reliability(q, labels).expected_error for q in (p, better))
    assert after < 0.03 < 0.15 < before
    assert brier_score(better, labels) < 0.9 * brier_score(p, labels)
    assert log_loss(better, labels) < 0.8 * log_loss(p, labels)
    calibration.apply(p, p)  # in place
    np.testing.assert_array_equal(p, better)
    again = calibration_from_dict(json.loads(json.dumps(calibration.to_dict())), 4)
    assert again is not None
    told = np.empty_like(p)
    again.apply(overconfident(4000, 1)[0], told)
    np.testing.assert_allclose(told, better, atol=2e-5)


def test_the_temperature_is_the_one_that_was_put_in() -> None:
    found = fit_temperature(*overconfident(20_000, 2))
    np.testing.assert_allclose(found.temperature, 3, rtol=0.05)
    p, _ = overconfident(500, 3)
    out = np.empty(p.shape, np.float64)
    found.apply(p, out)
    sharp = np.maximum(p, FLOOR).astype(np.float64) ** (1 / found.temperature)
    np.testing.assert_allclose(out, sharp / sharp.sum(axis=1, keepdims=True), rtol=1e-5)
    is_clear = np.sort(p, axis=1)[:, -2] < p.max(axis=1)
    np.testing.assert_array_equal(out.argmax(axis=1)[is_clear], p.argmax(axis=1)[is_clear])
    Temperature(0.01).apply(p, p)
    assert np.isfinite(p).all()


def test_isotonic_curves_are_those_of_scikit_learn() -> None:
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(0)
    p = rng.integers(0, 101, 3000) / 100  # at the knots
    labels = np.where(rng.random(3000) < p**2, 1, 0)
    curve = fit_isotonic(np.stack([1 - p, p], axis=1), labels).curves[1]
    theirs = IsotonicRegression().fit(p, labels == 1).predict(np.linspace(0, 1, 101))
    np.testing.assert_allclose(curve, theirs, atol=1e-6)


def test_isotonic_leaves_alone_what_it_has_not_seen_and_no_row_without_a_class() -> None:
    found = fit_isotonic(np.array([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0]]), np.array([1, 1]))
    np.testing.assert_allclose(found.curves[0], np.linspace(0, 1, 101), atol=1e-6)
    out = np.empty((1, 3), np.float32)
    Isotonic(np.zeros((3, 2), np.float32)).apply(np.array([[1, 0, 0]], np.float32), out)
    np.testing.assert_allclose(out, 1 / 3)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"kind": "magic"},
        {"kind": "temperature"},
        {"kind": "temperature", "temperature": 0.0},
        {"kind": "temperature", "temperature": float("nan")},
        {"kind": "temperature", "temperature": "1"},
        {"kind": "temperature", "temperature": 1.0, "more": 1},
        {"kind": "isotonic", "curves": []},
        {"kind": "isotonic", "curves": [[0.0, 1.0]]},
        {"kind": "isotonic", "curves": [[0.0, 1.0], [0.0]]},
        {"kind": "isotonic", "curves": [[0.0, 1.0], [1.0, 0.0]]},
        {"kind": "isotonic", "curves": [[0.0, 2.0], [0.0, 1.0]]},
        {"kind": "isotonic", "curves": [[0.0, "1"], [0.0, 1.0]]},
        {"kind": "isotonic", "curves": [[0.0], [1.0]]},
    ],
)
def test_a_tampered_calibration_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"calibration|temperature|curve"):
        calibration_from_dict(content, 2)


def test_no_calibration_is_none() -> None:
    assert calibration_from_dict(None, 3) is None


def test_arrays_that_do_not_fit_are_refused() -> None:
    p = np.full((3, 2), 0.5)
    with pytest.raises(ValueError, match="are no pair"):
        reliability(p, np.zeros(2, int))
    with pytest.raises(ValueError, match="are no pair"):
        fit_temperature(p[:0], np.zeros(0, int))
    with pytest.raises(ValueError, match="not one of the 2 classes"):
        brier_score(p, np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="give integers"):
        log_loss(p, np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        fit_isotonic(np.full((1, 2), np.nan), np.zeros(1, int))
    with pytest.raises(ValueError, match="does not fit probabilities"):
        Temperature(1.0).apply(p, np.empty((3, 3)))
    with pytest.raises(ValueError, match="2 classes are to be calibrated by curves of 3"):
        Isotonic(np.tile([0.0, 1.0], (3, 1))).apply(p, np.empty((3, 2)))
    with pytest.raises(ValueError, match="from 1, equal or adaptive"):
        reliability(p, np.zeros(3, int), 0)
