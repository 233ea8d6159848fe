"""Agreement of labels: the kernel against its twin and scikit-learn, then what Dice must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast.metrics import (
    accuracy,
    centroid_error_mm,
    confusion,
    dice_from_confusion,
    dice_per_class,
)

SHAPES = [(1,), (17,), (5, 7), (1, 1, 1), (4, 6, 33), (3, 64, 2)]


def pair(shape: tuple[int, ...], n_classes: int, dtype: type) -> list[NDArray[Any]]:
    """Two maps in runs of about four voxels that agree in half of them."""
    rng = np.random.default_rng(5)
    n = int(np.prod(shape))
    truth = rng.integers(0, n_classes, n).repeat(4)[:n]
    predicted = np.where(rng.random(n) < 0.5, truth, rng.integers(0, n_classes, n))
    return [labels.reshape(shape).astype(dtype) for labels in (truth, predicted)]


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


LAYOUTS: list[Callable[[NDArray[Any]], NDArray[Any]]] = [
    np.ascontiguousarray,
    np.asfortranarray,
    read_only,
    lambda a: np.stack([a, a], axis=-1)[..., 0],
    lambda a: np.flip(np.flip(a).copy()),
    lambda a: a.T.copy().T,
]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_confusion_equals_its_twin(
    dtype: type, layout: Callable[[NDArray[Any]], NDArray[Any]], shape: tuple[int, ...]
) -> None:
    truth, predicted = pair(shape, 6, dtype)
    expected = naive.overlap(truth, predicted, 7)
    np.testing.assert_array_equal(confusion(layout(truth), layout(predicted), 7), expected)
    np.testing.assert_array_equal(confusion(layout(truth), predicted, 7), expected)


def test_confusion_is_scikit_learns_with_truth_in_the_rows() -> None:
    from sklearn.metrics import confusion_matrix

    truth, predicted = pair((500,), 5, np.int64)
    counts = confusion(truth, predicted, 5)
    np.testing.assert_array_equal(counts, confusion_matrix(truth, predicted, labels=range(5)))
    # The seed swapped the arguments: three livers taken for spleen stand in the liver's row.
    counts = confusion(np.array([3, 3, 3, 4]), np.array([4, 4, 4, 4]), 5)
    assert counts[3, 4] == 3
    assert counts[4, 3] == 0


def test_confusion_of_uint8_with_uint16_and_of_nothing() -> None:
    truth, predicted = pair((4, 5, 6), 5, np.uint8)
    expected = naive.overlap(truth, predicted, 5)
    np.testing.assert_array_equal(confusion(truth, predicted.astype(np.uint16), 5), expected)
    np.testing.assert_array_equal(confusion(truth[:0], predicted[:0], 2), np.zeros((2, 2)))


def test_inputs_that_are_no_pair_of_label_maps_are_refused() -> None:
    labels = np.array([0, 1, 2], np.uint8)
    with pytest.raises(ValueError, match="are no pair"):
        confusion(labels, labels[:2], 3)
    with pytest.raises(ValueError, match="are no pair"):
        confusion(labels.reshape(1, 1, 1, 3), labels.reshape(1, 1, 1, 3), 3)
    with pytest.raises(ValueError, match="1 pairs hold a label of 2 or more"):
        confusion(labels, labels, 2)
    with pytest.raises(ValueError, match="predicted is float64"):
        confusion(labels, labels.astype(float), 3)
    with pytest.raises(ValueError, match="truth holds labels from -1 to 1"):
        confusion(labels.astype(int) - 1, labels, 3)
    with pytest.raises(ValueError, match="predicted holds labels from 0 to 65536"):
        confusion(labels, labels.astype(int) * 32_768, 3)


def test_dice_scores_no_class_that_is_in_neither_map() -> None:
    truth = np.array([[[0, 0, 1, 1, 1, 3]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 1, 0, 4]]], np.uint8)
    dice = dice_per_class(truth, predicted, 6)
    np.testing.assert_array_equal(dice, [0.5, 2 / 3, np.nan, 0, 0, np.nan])
    assert accuracy(confusion(truth, predicted, 6)) == 0.5
    assert np.isnan(accuracy(np.zeros((2, 2), np.int64)))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_permuting_labels_permutes_the_scores(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 5, (2, 3, 4, 5), dtype=np.uint8)
    renamed = np.array(order, np.uint8)
    counts = confusion(truth, predicted, 5)
    other = confusion(renamed[truth], renamed[predicted], 5)
    np.testing.assert_array_equal(other[np.ix_(order, order)], counts)
    np.testing.assert_array_equal(dice_from_confusion(other)[order], dice_from_confusion(counts))
    # Dice does not know which of the two is the truth; the matrix does.
    np.testing.assert_array_equal(confusion(predicted, truth, 5), counts.T)
    np.testing.assert_array_equal(dice_from_confusion(counts.T), dice_from_confusion(counts))


def test_a_map_agrees_with_itself() -> None:
    truth, _ = pair((4, 6, 33), 6, np.uint8)
    np.testing.assert_array_equal(dice_per_class(truth, truth, 6), np.ones(6))
    assert accuracy(confusion(truth, truth, 6)) == 1.0


def test_centroid_error_is_the_distance_in_mm() -> None:
    assert centroid_error_mm((1, 2, 3), np.array([4.0, 6.0, 3.0])) == 5.0
    with pytest.raises(ValueError, match="are not two points"):
        centroid_error_mm((1, 2, 3), (1, 2, float("nan")))
    with pytest.raises(ValueError, match="are not two points"):
        centroid_error_mm((1, 2), (3, 4))
