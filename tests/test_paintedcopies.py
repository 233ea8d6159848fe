"""Painted copies: what is drawn, what stays true of an anatomy, what no chance may change."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from organfast.augmentation import Augmentation
from organfast.paintedcopies import PAINTED_MM, Variety, _thicken, painted_copy
from organfast.painting import LabelMap
from organfast.pathology import Pathology
from organfast.phantom import FieldOfView, phantom

STILL = Variety(
    people=Augmentation.off(),
    thickness_mm=(2, 2),
    view_mm=(900, 900),
    length_mm=(9000, 9000),
    pathology=None,
    arms=(0, 0),
    bedding=0,
)


@cache
def _anatomy() -> LabelMap:
    """A phantom's organs alone: what lies around them is the painter's to make up."""
    whole = phantom(FieldOfView.over("trunk", (4.0, 4.0, 6.0), 96), 6)
    organs = {n: name for n, name in whole.names.items() if name in ORGANS}
    labels = np.where(np.isin(whole.labels, list(organs)), whole.labels, 0)
    return LabelMap(labels.astype(whole.labels.dtype), whole.affine, organs)


ORGANS = ("liver", "spleen", "kidney_right", "kidney_left", "lung_left", "lung_right", "aorta")


def _label(name: str) -> int:
    return next(n for n, named in _anatomy().names.items() if named == name)


def _middle(labels: np.ndarray, name: str) -> np.ndarray:
    return np.mean(np.nonzero(labels == _label(name)), axis=1) * PAINTED_MM


def test_a_still_copy_is_the_anatomy_at_two_millimetres() -> None:
    volume, labels = painted_copy(_anatomy(), 1, STILL)
    source = _anatomy()
    voxel_ml = float(np.prod(source.working_spacing_mm)) / 1000
    for name in ORGANS:
        true = (source.labels == _label(name)).sum() * voxel_ml
        found = (labels == _label(name)).sum() * PAINTED_MM**3 / 1000
        assert found == pytest.approx(true, rel=0.05), name
    assert volume.hu.shape == labels.shape
    np.testing.assert_array_equal(np.diag(volume.affine), [2, 2, 2, 1])


def test_copies_keep_their_sides_and_are_painted_as_tissues() -> None:
    whole = replace(Variety(), length_mm=(9000, 9000), pathology=None)
    volume, labels = painted_copy(_anatomy(), 2, whole)
    right = {name: _middle(labels, name)[0] for name in ORGANS}  # x grows to the right in RAS+
    assert right["kidney_right"] > right["kidney_left"]
    assert right["lung_right"] > right["lung_left"]
    assert right["liver"] > right["spleen"]
    assert 15 < np.median(volume.hu[labels == _label("liver")]) < 130
    assert np.median(volume.hu[labels == _label("lung_left")]) < -700


@pytest.mark.parametrize("arms", [(1, 0), (0, 1)])
def test_arms_are_seen_and_have_no_label(arms: tuple[float, float]) -> None:
    without, _ = painted_copy(_anatomy(), 3, STILL)
    volume, labels = painted_copy(_anatomy(), 3, replace(STILL, arms=arms))
    more = (volume.hu > -300).sum() - (without.hu > -300).sum()
    assert more * PAINTED_MM**3 / 1e6 > 0.5  # litres
    beside = np.ptp(np.nonzero((volume.hu > -300).any((1, 2)))[0])
    trunk = np.ptp(np.nonzero((without.hu > -300).any((1, 2)))[0])
    assert beside > trunk
    assert set(np.unique(labels)) <= {0, *_anatomy().names}


def test_disease_changes_the_look_and_no_label() -> None:
    healthy, labels = painted_copy(_anatomy(), 2, STILL)
    ill, same = painted_copy(_anatomy(), 2, replace(STILL, pathology=Pathology(lesions=1)))
    np.testing.assert_array_equal(labels, same)
    changed = healthy.hu != ill.hu
    assert changed[labels == _label("liver")].any()
    assert changed.mean() < 0.05


def test_the_same_seed_paints_the_same_bytes_in_any_threads() -> None:
    one = painted_copy(_anatomy(), (3, 4), threads=1)
    other = painted_copy(_anatomy(), (3, 4), threads=3)
    np.testing.assert_array_equal(one[0].hu, other[0].hu)
    np.testing.assert_array_equal(one[1], other[1])
    another, _ = painted_copy(_anatomy(), (3, 5))
    assert another.hu.shape != one[0].hu.shape or (another.hu != one[0].hu).any()


def test_the_field_of_view_cuts() -> None:
    seen = [
        painted_copy(_anatomy(), seed, replace(STILL, view_mm=(200, 240), length_mm=(60, 300)))[1]
        for seed in range(4)
    ]
    for labels in seen:
        assert max(labels.shape[:2]) <= 121
    assert len({labels.shape[2] for labels in seen}) > 1


def test_thick_slices_have_the_variance_of_a_box() -> None:
    hu = np.zeros((41, 1, 1), np.int16)
    hu[20] = 10_000
    _thicken(hu, 6.0)
    weight = hu[:, 0, 0] / hu.sum()
    variance = (weight * (np.arange(41) - 20.0) ** 2).sum()
    assert variance == pytest.approx((6.0**2 - 1) / 12, rel=0.05)


def test_impossible_wishes_are_named() -> None:
    with pytest.raises(ValueError, match="thickness_mm"):
        Variety(thickness_mm=(3, 2))
    with pytest.raises(ValueError, match="view_mm"):
        Variety(view_mm=(0, 2))
    with pytest.raises(ValueError, match="length_mm"):
        Variety(length_mm=(0, 1))
    with pytest.raises(ValueError, match="are shares"):
        Variety(arms=(0.7, 0.4))
    with pytest.raises(ValueError, match="are shares"):
        Variety(bedding=1.1)
    with pytest.raises(ValueError, match="seed"):
        painted_copy(_anatomy(), -1)
