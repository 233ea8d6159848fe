"""Pathology: where lesions and metal lie, what HU they have, what they leave as it was."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from organfast.diseasedscan import DiseasedScan
from organfast.lesions import _Lesion, _relative_radius
from organfast.metal import _paint_rod, _Rod
from organfast.pathology import Pathology, diseased

SPACING = (2.0, 2.0, 2.0)
HEALTHY = Pathology(
    **{f.name: 0.0 for f in fields(Pathology) if isinstance(f.default, float)} | {"texture": 0.7}
)
NAMES = {
    1: "liver",
    2: "spleen",
    3: "kidney_right",
    4: "lung_upper_lobe_left",
    5: "lung_right",
    6: "aorta",
    7: "femur_left",
    8: "vertebrae_L3",
    9: "gallbladder",
    10: "pelvis",
    200: "vertebrae_T3",  # none is there
}
HU = {1: 100, 2: 110, 3: 150, 4: -850, 5: -850, 6: 140, 7: 300, 8: 200, 9: 10, 10: 300}


def _body() -> tuple[np.ndarray, np.ndarray]:
    """(80, 90, 100) int16 HU and uint8 labels: a block for each organ, some noise everywhere."""
    labels = np.zeros((80, 90, 100), np.uint8)
    for label, box in {
        1: np.s_[30:60, 30:75, 55:95],
        2: np.s_[40:60, 20:40, 8:25],
        3: np.s_[28:50, 12:26, 60:76],
        4: np.s_[60:80, 15:80, 8:40],
        5: np.s_[60:80, 15:80, 60:95],
        6: np.s_[5:80, 31:41, 45:55],
        7: np.s_[0:28, 30:46, 8:24],
        8: np.s_[28:44, 8:28, 40:58],
        9: np.s_[24:30, 50:60, 62:72],
        10: np.s_[10:26, 30:46, 70:90],
    }.items():
        labels[box] = label
    table = np.full(256, 0, np.int16)
    table[list(HU)] = list(HU.values())
    noise = np.random.default_rng(0).normal(0, 8, labels.shape)
    return (table[labels] + np.rint(noise)).astype(np.int16), labels


def _only(**on: object) -> Pathology:
    return replace(HEALTHY, **on)


def _changed(pathology: Pathology, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU after, where they changed, labels."""
    hu, labels = _body()
    before, labels_before = hu.copy(), labels.copy()
    after = diseased(hu, labels, NAMES, SPACING, seed, pathology)
    np.testing.assert_array_equal(hu, before)
    np.testing.assert_array_equal(labels, labels_before)
    assert after.dtype == np.int16
    return after, after != before, labels


def test_who_is_healthy_stays_as_he_is() -> None:
    _, changed, _ = _changed(HEALTHY, 1)
    assert not changed.any()


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("lesions", {1, 2, 3}),
        ("lung_nodules", {4, 5}),
        ("consolidations", {4, 5}),
        ("calcifications", {1, 2, 3, 6, 9}),
    ],
)
def test_what_ails_an_organ_stays_in_it(kind: str, where: set[int]) -> None:
    touched: set[int] = set()
    for seed in range(6):
        _, changed, labels = _changed(_only(**{kind: 1.0}), seed)
        touched |= set(labels[changed].tolist())
    assert touched
    assert touched <= where
    assert kind != "lesions" or touched == where


def test_the_same_seed_makes_the_same_bytes_and_a_kind_does_not_depend_on_another() -> None:
    hu, labels = _body()
    everything = Pathology(**{k: 1.0 for k in ("lesions", "bone_metal", "clips", "vessel_metal")})
    one = diseased(hu, labels, NAMES, SPACING, (3, 1), everything)
    np.testing.assert_array_equal(one, diseased(hu, labels, NAMES, SPACING, (3, 1), everything))
    assert (one != diseased(hu, labels, NAMES, SPACING, (3, 2), everything)).any()
    lesions = diseased(hu, labels, NAMES, SPACING, 8, _only(lesions=1.0))
    both = diseased(hu, labels, NAMES, SPACING, 8, _only(lesions=1.0, lung_nodules=1.0))
    np.testing.assert_array_equal(lesions[labels < 4], both[labels < 4])


def test_the_seed_alone_decides_who_is_ill() -> None:
    hu, labels = _body()
    ill = []
    for seed in range(40):
        after = diseased(hu, labels, NAMES, SPACING, seed, _only(lung_nodules=0.5))
        ill.append(bool((after != hu).any()))
    assert 10 < sum(ill) < 30
    shifted = np.roll(labels, 2, axis=2)
    for seed in range(10):
        after = diseased(hu, shifted, NAMES, SPACING, seed, _only(lung_nodules=0.5))
        assert bool((after != hu).any()) == ill[seed]


def _inner(change: np.ndarray) -> np.ndarray:
    from scipy.ndimage import binary_erosion

    return binary_erosion(change, iterations=2)


@pytest.mark.parametrize(
    ("label", "option", "relative"),
    [
        (1, {"lesions": 1.0, "semi_axis_mm": (9.0, 12.0)}, True),
        (5, {"lung_nodules": 1.0, "nodule_mm": (14.0, 15.0)}, False),
        (5, {"consolidations": 1.0, "ground_glass_hu": (-300.0, -200.0)}, False),
    ],
)
def test_lesions_have_the_hu_that_were_asked_for(
    label: int, option: dict[str, object], relative: bool
) -> None:
    """Farther than two voxels from what did not change; three deviations of the noise aside."""
    pathology, n_seen = _only(**option), 0
    hu, labels = _body()
    for seed in range(12):
        after, _, _ = _changed(pathology, seed)
        # The share at which a voxel has visibly left its organ.
        far = np.abs(after.astype(int) - hu) > 10
        values = after[_inner(far & (labels == label))].astype(float)
        n_seen += values.size
        if relative:
            cyst = (values > pathology.cyst_hu[0] - 30) & (values < pathology.cyst_hu[1] + 30)
            low, high = HU[label] + pathology.hypodense_hu[0], HU[label] + 60
            assert (cyst | ((values > low - 30) & (values < high + 30))).all()
        elif "lung_nodules" in option:
            assert ((values > -30) & (values < 60 + 30)).all()
        elif values.size:
            assert -400 < np.median(values) < 60
    assert n_seen > 30


def test_texture_remains_under_a_lesion() -> None:
    big = {"lesions": 1.0, "semi_axis_mm": (25.0, 30.0), "n_lesions": (1, 1)}
    hu, labels = _body()
    without, whole = (
        diseased(hu, labels, NAMES, SPACING, 3, _only(**big, texture=t)).astype(float)
        for t in (0.0, 1.0)
    )
    some = diseased(hu, labels, NAMES, SPACING, 3, _only(**big, texture=0.7)).astype(float)
    core = _inner(_inner((without != hu) & (labels == 1)))
    assert core.sum() > 100
    np.testing.assert_allclose((some - without)[core], 0.7 * (whole - without)[core], atol=1.5)
    assert np.std((whole - without)[core]) == pytest.approx(np.std(hu[labels == 1]), rel=0.1)


def test_metal_reaches_its_peak_and_streaks_both_ways() -> None:
    hu, labels = _body()
    for seed in range(8):
        after = diseased(hu, labels, NAMES, SPACING, seed, _only(bone_metal=1.0))
        assert 2000 <= after.max() <= 3071
        k = int(np.argmax((after > 1500).sum(axis=(1, 2))))
        beside = (after[k].astype(int) - hu[k])[after[k] < 1000]
        assert beside.max() > 25
        assert beside.min() < -25
        assert np.percentile(np.abs(beside), 99) < 500
        # Far from metal nothing happens.
        empty = np.flatnonzero((after > 1500).sum(axis=(1, 2)) == 0)
        assert (after[empty] == hu[empty]).mean() > 0.8


@pytest.mark.parametrize("kind", ["clips", "vessel_metal"])
def test_small_metal_is_small(kind: str) -> None:
    for seed in range(6):
        hu, labels = _body()
        after = diseased(hu, labels, NAMES, SPACING, seed, _only(**{kind: 1.0}))
        metal = after > 500
        assert 1 < metal.sum() < 1500
        if kind == "vessel_metal":
            assert (labels[metal] == 6).mean() > 0.9


def test_a_rod_is_as_the_distance_says() -> None:
    """Voxel by voxel: the share of metal falls over a voxel at the rod's surface."""
    shape, steps = (12, 14, 16), np.array([3.0, 2.0, 1.5])
    hu = np.zeros(shape, np.int16)
    scan = DiseasedScan(hu, np.zeros(shape, np.uint8), {}, steps, [])
    rod = _Rod(np.array([2.0, 3.0, 4.5]), np.array([9.0, 8.0, 10.0]), 3.0)
    _paint_rod(scan, rod, 2500.0)
    a, b = rod.start * steps, rod.stop * steps
    for at in np.ndindex(shape):
        p = np.array(at) * steps
        t = min(max(float((p - a) @ (b - a) / ((b - a) @ (b - a))), 0.0), 1.0)
        away = float(np.linalg.norm(p - a - t * (b - a)))
        share = min(max((3.0 - away) / float(steps.prod() ** (1 / 3)) + 0.5, 0.0), 1.0)
        assert abs(int(hu[at]) - 2500 * share) < 2, at


def test_an_outline_wavers_about_its_ellipsoid() -> None:
    away = [g.astype(np.float32) for g in np.ix_(*[np.arange(-20.0, 21.0)] * 3)]
    distance = np.sqrt(sum(g**2 for g in away))
    lesion = _Lesion((10.0, 10.0, 10.0), 0.0, 0.0, 2.0, waver=0.0)
    smooth = _relative_radius(away, lesion, np.random.default_rng(1))
    np.testing.assert_allclose(smooth, distance / 10, atol=1e-5)
    bumpy = _relative_radius(away, replace(lesion, waver=0.12), np.random.default_rng(1))
    assert (bumpy < 1).sum() == pytest.approx((smooth < 1).sum(), rel=0.5)
    assert bumpy[distance > 15.5].min() > 1
    assert bumpy[distance < 4.5].max() < 1


def test_where_nothing_is_drawn_nothing_happens() -> None:
    always = Pathology(
        lesions=1, lung_nodules=1, consolidations=1, calcifications=1, bone_metal=1, clips=1,
        vessel_metal=1,
    )  # fmt: skip
    hu = np.zeros((6, 7, 8), np.int16)
    empty = np.zeros(hu.shape, np.uint8)
    np.testing.assert_array_equal(diseased(hu, empty, NAMES, SPACING, 1, always), hu)
    for label in NAMES:  # one voxel of an organ, at the corner
        single = empty.copy()
        single[0, 6, 7] = label
        for seed in range(3):
            assert diseased(hu, single, NAMES, SPACING, seed, always).shape == hu.shape
    none = np.zeros((0, 7, 8), np.int16)
    assert diseased(none, none.astype(np.uint8), NAMES, SPACING, 1, always).size == 0


def test_impossible_wishes_are_named() -> None:
    hu, labels = _body()
    for wrong in ({"lesions": 1.2}, {"texture": -0.1}, {"semi_axis_mm": (9, 3)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Pathology(**wrong)
    for wrong in ({"metal_hu": (0, 3071)}, {"n_lesions": (0, 2)}, {"n_lesions": (1.5, 2)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Pathology(**wrong)
    with pytest.raises(ValueError, match="one 3-D shape"):
        diseased(hu, labels[1:], NAMES, SPACING, 1)
    with pytest.raises(ValueError, match="spacing_mm"):
        diseased(hu, labels, NAMES, (2.0, 0.0, 2.0), 1)
    with pytest.raises(ValueError, match="seed"):
        diseased(hu, labels, NAMES, SPACING, -1)
