"""Agreement of labels: kernels against their twins and against peers, then scores by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast import metrics
from organfast.kernels.surfaces import squared_in_planes, weighted_percentile
from organfast.metrics import (
    SCORES,
    BlockScores,
    accuracy,
    block_scores,
    centroid_error_mm,
    confidence_histogram,
    confusion,
    dice_from_confusion,
    dice_per_class,
    label_pair,
    row_shares,
    score_labels,
)
from organfast.surfaces import surface_areas, surface_gaps

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


# --- one pass over a pair of maps -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 3] + [(2, 3, 8), (5, 1, 19)])
def test_one_pass_equals_its_twin(
    dtype: type,
    layout: Callable[[NDArray[Any]], NDArray[Any]],
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth, predicted = pair(shape, 6, dtype)
    expected = naive.pair_statistics(truth, predicted, 7)
    for slab in (1 << 20, 40):
        monkeypatch.setattr(metrics, "_SLAB", slab)
        for one, other in ((layout(truth), layout(predicted)), (layout(truth), predicted)):
            found = label_pair(one, other, 7)
            for have, want in zip((found.counts, found.sums, found.boxes), expected, strict=True):
                np.testing.assert_array_equal(have, want)


def test_rows_of_every_length_and_start_are_read_to_their_end() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        for n in range(1, 40):
            truth, predicted = rng.integers(0, 2, (2, 3, 2, n)).astype(dtype)
            truth[0], predicted[0] = 1, 0  # runs that go on over the ends of rows
            found = label_pair(truth, predicted, 2)
            np.testing.assert_array_equal(
                found.boxes, naive.pair_statistics(truth, predicted, 2)[2]
            )
            # A map that does not begin at a multiple of eight bytes.
            memory = np.zeros(truth.nbytes + 8, np.uint8)
            for offset in (1, 2, 4):
                odd = memory[offset : offset + truth.nbytes].view(dtype).reshape(truth.shape)
                odd[:] = truth
                counts = naive.overlap(truth, predicted, 2)
                np.testing.assert_array_equal(confusion(odd, predicted, 2), counts)


def test_maps_that_one_pass_cannot_read_are_refused() -> None:
    labels = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match="truth has 2 axes"):
        label_pair(labels[0], labels[0], 2)
    with pytest.raises(ValueError, match="24 pairs hold a label of 1 or more"):
        label_pair(labels + 1, labels, 1)
    found = label_pair(labels[:0], labels[:0], 2)
    assert not found.counts.any()
    assert np.isnan(found.centroids).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_confidence_is_counted_as_its_twin_does(
    layout: Callable[[NDArray[Any]], NDArray[Any]],
) -> None:
    truth, predicted = pair((4, 6, 33), 6, np.uint8)
    confidence = np.random.default_rng(1).integers(0, 256, truth.shape, dtype=np.uint8)
    judged = np.array([False, True, True, False, True, True])
    expected = naive.confidence_counts(truth, predicted, confidence, judged)
    found = confidence_histogram(layout(truth), predicted, layout(confidence), judged)
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="does not fit labels"):
        confidence_histogram(truth, predicted, confidence[1:], judged)


# --- blocks ---------------------------------------------------------------------------------------


def test_block_scores_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    truth, predicted = pair((600,), 6, np.int64)
    predicted[truth == 4] = 5
    truth[truth == 4] = 3  # 4 is neither true nor, but by chance, predicted
    predicted[predicted == 4] = 5
    organs = [2, 3, 4, 5]
    found = block_scores(confusion(truth, predicted, 7), organs)
    is_organ = np.isin(truth, organs)
    assert found.n_blocks == 600
    np.testing.assert_allclose(found.accuracy, accuracy_score(truth, predicted))
    np.testing.assert_allclose(found.macro_f1, f1_score(truth, predicted, average="macro"))
    np.testing.assert_allclose(
        found.accuracy_organs, accuracy_score(truth[is_organ], predicted[is_organ])
    )
    np.testing.assert_allclose(
        found.macro_f1_organs,
        f1_score(truth, predicted, labels=[2, 3, 5], average="macro"),
    )
    shares = row_shares(confusion(truth, predicted, 6))
    rows = [0, 1, 2, 3, 5]
    expected = confusion_matrix(truth, predicted, labels=range(6), normalize="true")
    np.testing.assert_allclose(shares[rows], expected[rows])
    assert np.isnan(shares[4]).all()
    nothing = block_scores(np.zeros((3, 3), np.int64), [1])
    assert nothing == BlockScores(0, None, None, None, None)


# --- surfaces -------------------------------------------------------------------------------------

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.9), (2.0, 1.0, 0.5)]


def blobs(shape: tuple[int, ...], seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two masks of smooth noise that differ a little, with islands, holes and cut-off edges."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=shape), 2)
    other = field + 0.3 * ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    return field > field.std() / 2, other > field.std() / 2


def test_corner_codes_and_distances_equal_their_twins() -> None:
    for seed, shape in enumerate([(1, 1, 1), (1, 7, 3), (9, 1, 1), (6, 7, 8)]):
        rng = np.random.default_rng(seed)
        for share in (0.03, 0.5):
            one, other = rng.random((2, *shape)) < share
            one[0, -1, 0] = other[-1, 0, 0] = True
            spacing = (2.5, 0.7, 1.1)
            codes = [naive.corner_codes(mask) for mask in (one, other)]
            areas = surface_areas(spacing)
            found = surface_gaps(one, other, spacing)
            points = [naive.surface_points(c, spacing) for c in codes]
            np.testing.assert_allclose(found.truth_mm, naive.gaps_to(*points), rtol=1e-6)
            np.testing.assert_allclose(found.predicted_mm, naive.gaps_to(*points[::-1]), rtol=1e-6)
            weights = areas[codes[0][(codes[0] > 0) & (codes[0] < 255)]]
            np.testing.assert_allclose(found.truth_area, weights, rtol=1e-6)


def test_planes_equal_their_twin() -> None:
    codes = naive.corner_codes(np.random.default_rng(0).random((5, 8, 9)) < 0.03)
    codes[2] = 0
    squared, passed = np.empty(codes.shape, np.float32), np.empty(len(codes), bool)
    squared_in_planes(codes, 0.7, 1.1, squared, passed)
    expected = naive.squared_in_planes(codes, 0.7, 1.1)
    np.testing.assert_array_equal(passed, np.isfinite(expected).all(axis=(1, 2)))
    assert not passed[2]
    np.testing.assert_allclose(squared[passed], expected[passed], rtol=1e-6)


def test_percentiles_equal_their_twin() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 50, 2000):
        for gaps in (rng.gamma(1, 3, n), np.round(rng.gamma(1, 3, n)), np.zeros(n)):
            # Small whole weights, whose sums are exact in any order.
            gaps, weights = gaps.astype(np.float32), rng.integers(1, 9, n).astype(np.float32)
            for share in (0.0, 0.3, 0.95, 1.0):
                expected = naive.weighted_percentile(gaps, weights, share)
                assert weighted_percentile(gaps, weights, share) == expected
    four = np.arange(4, dtype=np.float32)
    found = [weighted_percentile(four, np.ones(4, np.float32), q) for q in (0.25, 0.5, 0.51, 1)]
    assert found == [0, 1, 2, 3]
    in_one_bin = np.float32([1, 1.0001, 1.0002, 1e4])
    assert weighted_percentile(in_one_bin, np.ones(4, np.float32), 0.5) == in_one_bin[1]


def test_areas_are_those_of_known_surfaces_and_of_any_turned_cube() -> None:
    for a, b, c in SPACINGS:
        areas = surface_areas((a, b, c))
        assert areas[0] == areas[255] == 0
        np.testing.assert_allclose(areas[0b00001111], b * c)  # a plane across the first axis
        np.testing.assert_allclose(areas[0b00110011], a * c)
        one = np.sqrt((a * b) ** 2 + (b * c) ** 2 + (a * c) ** 2) / 8  # a corner cut off
        np.testing.assert_allclose([areas[1 << n] for n in range(8)], one)
        np.testing.assert_allclose(areas, areas[::-1])  # the complement
    unit = surface_areas((1, 1, 1))
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    for turned in (
        bits.reshape(-1, 2, 2, 2).transpose(0, 2, 3, 1),
        bits.reshape(-1, 2, 2, 2).transpose(0, 2, 1, 3)[:, ::-1],
        bits.reshape(-1, 2, 2, 2)[:, ::-1],
    ):
        np.testing.assert_allclose(unit[(turned.reshape(-1, 8) << np.arange(8)).sum(axis=1)], unit)


# It takes functions from where SciPy no longer wants them to be taken from.
@pytest.mark.filterwarnings("ignore:Please import `.*` from the `scipy.ndimage`:DeprecationWarning")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(3))
def test_boundaries_agree_with_surface_distance(
    spacing: tuple[float, float, float], seed: int
) -> None:
    import surface_distance

    truth, predicted = blobs((14, 22, 18), seed)
    ours = surface_gaps(truth, predicted, spacing)
    theirs = surface_distance.compute_surface_distances(truth, predicted, spacing)
    for tolerance in (0.6, 1.3, 2.1):
        expected = surface_distance.compute_surface_dice_at_tolerance(theirs, tolerance)
        np.testing.assert_allclose(ours.nsd(tolerance), expected, rtol=1e-5)
    for percent in (50, 95, 100):
        expected = surface_distance.compute_robust_hausdorff(theirs, percent)
        np.testing.assert_allclose(ours.hausdorff_mm(percent), expected, rtol=1e-5)
    expected = surface_distance.compute_average_surface_distance(theirs)
    np.testing.assert_allclose(ours.directed_mean_mm, expected, rtol=1e-5)


def test_a_distance_of_just_the_tolerance_is_within_it() -> None:
    truth, predicted = np.zeros((2, 4, 4, 30), bool)
    truth[:, :, 0:20] = predicted[:, :, 0:23] = True
    # 3 x 0.7 mm is 2.1 mm, and 2.0999999 in floating point.
    ends = surface_gaps(truth, predicted, (1, 1, 0.7)).nsd(2.1)
    assert ends == 1.0
    assert surface_gaps(truth, predicted, (1, 1, 0.7)).nsd(2.0) < 1


def test_masks_without_a_surface_are_refused() -> None:
    full, empty = np.ones((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    with pytest.raises(ValueError, match="a mask is empty"):
        surface_gaps(full, empty, (1, 1, 1))
    with pytest.raises(ValueError, match="are no pair"):
        surface_gaps(full, full[1:], (1, 1, 1))
    with pytest.raises(ValueError, match="not three lengths"):
        surface_gaps(full, full, (1, 0, 1))


# --- label maps -----------------------------------------------------------------------------------


def test_label_scores_by_hand() -> None:
    truth, predicted = np.zeros((2, 4, 6, 10), np.uint8)
    truth[1:3, 1:5, 2:6] = 1
    predicted[1:3, 1:5, 3:8] = 1  # one voxel on at one end, two at the other
    truth[0, 0, 0] = 2  # missed
    predicted[3, 5, 9] = 3  # false
    truth[3, 0, :3], predicted[3, 0, :3] = 4, 4  # right, but not asked for
    affine = np.diag([3.0, 2.0, 1.5, 1.0])
    found = score_labels(truth, predicted, affine, (7, (1, 2, 3, 5)), 2.0)
    nan = np.nan
    ml = 0.009
    for name, of_one, missed, false in (
        ("truth_ml", 32 * ml, ml, 0),
        ("predicted_ml", 40 * ml, 0, ml),
        ("dice", 2 * 24 / 72, 0, 0),
        ("iou", 24 / 48, 0, 0),
        ("volume_error_ml", 8 * ml, -ml, ml),
        ("volume_error_percent", 25, -100, nan),
        ("centroid_mm", 1.5 * 1.5, nan, nan),
        ("box_iou", 24 / 48, 0, 0),
        ("wall_mm", (1.5 + 3) / 6, nan, nan),
        ("hd95_mm", 3, nan, nan),
    ):
        expected = [nan, of_one, missed, false, nan, 0 if name.endswith("d_ml") else nan, nan]
        if name == "truth_ml":
            expected[5] = 0
        np.testing.assert_allclose(getattr(found, name), expected, err_msg=name)
    box = np.s_[1:3, 1:5, 2:8]
    gaps = surface_gaps(truth[box] == 1, predicted[box] == 1, (3, 2, 1.5))
    np.testing.assert_allclose(found.nsd, [nan, gaps.nsd(2), 0, 0, nan, nan, nan])
    np.testing.assert_allclose(found.surface_mm[1], gaps.mean_mm)
    assert found.counts.sum() == truth.size


def test_scores_know_no_order_of_axes_and_no_threads() -> None:
    truth = np.zeros((9, 12, 14), np.uint8)
    predicted = truth.copy()
    for label in range(1, 5):
        one, other = blobs(truth.shape, label)
        truth[one], predicted[other] = label, label
    affine = np.diag([3.0, 0.8, 0.7, 1.0])
    expected = score_labels(truth, predicted, affine, (5, range(1, 5)))
    axes = (2, 0, 1)
    turned = np.eye(4)
    turned[:3, :3] = affine[:3, :3][:, axes]
    other = score_labels(
        truth.transpose(axes).copy(), predicted.transpose(axes), turned, (5, range(1, 5)), threads=2
    )
    assert 0.2 < np.nanmean(expected.dice) < 0.99
    for name in SCORES:
        np.testing.assert_allclose(getattr(other, name), getattr(expected, name), rtol=1e-6)
    same = score_labels(truth, truth, affine, (5, range(1, 5)))
    for name, perfect in (("dice", 1), ("nsd", 1), ("hd95_mm", 0), ("wall_mm", 0), ("iou", 1)):
        np.testing.assert_array_equal(getattr(same, name)[1:], perfect)


def test_wishes_that_cannot_be_scored_are_refused() -> None:
    labels = np.zeros((2, 2, 2), np.uint8)
    with pytest.raises(ValueError, match="there are only 3"):
        score_labels(labels, labels, np.eye(4), (3, (3,)))
    with pytest.raises(ValueError, match="give 0 mm or more"):
        score_labels(labels, labels, np.eye(4), (3, (1,)), -1)
