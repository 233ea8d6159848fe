"""What lies beside a trunk: where, made of what, and that the trunk stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from organfast.painting import texture_tile
from organfast.surroundings import ARMS, add_arms, add_bedding

STEPS = np.array([4.0, 2.0, 2.0])
NUMBERS = {
    "skin": 11,
    "subcutaneous_fat": 12,
    "muscle": 13,
    "long_bone": 14,
    "foam": 21,
    "cloth": 22,
}
TRUNK = 1
SHOULDER_MM = 440.0


def _trunk() -> np.ndarray:
    """(120, 150, 240) an elliptic trunk of 320 x 200 mm, empty slices at both ends."""
    i, j = np.ogrid[:150, :240]
    inside = ((i - 75) / 50) ** 2 + ((j - 120) / 80) ** 2 <= 1
    tissue = np.zeros((120, 150, 240), np.uint8)
    tissue[2:-3, inside] = TRUNK
    return tissue


def _with_arms(arms: str, seed: int) -> np.ndarray:
    tissue = _trunk()
    random = np.random.default_rng(seed)
    add_arms(tissue, STEPS, NUMBERS, arms, random, shoulder_mm=SHOULDER_MM)
    return tissue


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("arms", ["beside", "folded"])
def test_arms_fill_what_is_empty_and_nothing_else(arms: str, seed: int) -> None:
    before, after = _trunk(), _with_arms(arms, seed)
    np.testing.assert_array_equal(after[before != 0], before[before != 0])
    added = set(np.unique(after[before == 0]).tolist()) - {0}
    assert added == {NUMBERS[name] for name in ("skin", "subcutaneous_fat", "muscle", "long_bone")}


def test_raised_arms_are_out_of_view() -> None:
    np.testing.assert_array_equal(_with_arms("up", 1), _trunk())


@pytest.mark.parametrize("seed", range(6))
def test_arms_lie_on_both_sides_and_weigh_what_arms_weigh(seed: int) -> None:
    after = _with_arms("beside", seed)
    limb = after >= 11
    litres = [limb[..., :120].sum() * 16e-6, limb[..., 120:].sum() * 16e-6]
    # Gordon et al. 1989: upper arm, forearm and hand are some 2 to 5 litres; a few patients show
    # one arm, and what lies beyond the field of view is not there.
    assert max(litres) > 1.0
    assert max(litres) < 6.0
    assert min(litres) == 0 or min(litres) > 0.4 * max(litres)


@pytest.mark.parametrize("seed", range(4))
def test_an_arm_is_bone_in_muscle_in_fat_in_skin(seed: int) -> None:
    after = _with_arms("beside", seed)
    limb = after >= 11
    depth = ndimage.distance_transform_edt(limb, sampling=STEPS)
    of = {name: depth[after == NUMBERS[name]].mean() for name in list(NUMBERS)[:4]}
    assert of["skin"] < of["subcutaneous_fat"] < of["muscle"] < of["long_bone"]
    bone = after == NUMBERS["long_bone"]
    beside_bone = ndimage.binary_dilation(bone) & ~bone & (after != TRUNK)
    assert (after[beside_bone] == NUMBERS["muscle"]).mean() > 0.9


def test_folded_arms_lie_in_front_of_the_trunk_and_straight_ones_do_not() -> None:
    front = (slice(None), slice(126, None), slice(100, 140))
    found = {arms: sum((_with_arms(arms, s)[front] >= 11).sum() for s in range(4)) for arms in ARMS}
    assert found["folded"] > 2000
    assert found["beside"] == found["up"] == 0


def test_arms_of_a_scan_without_shoulders_reach_its_top() -> None:
    tissue = _trunk()
    add_arms(tissue, STEPS, NUMBERS, "beside", np.random.default_rng(2), shoulder_mm=700.0)
    assert (tissue[-1] >= 11).any()
    assert (tissue[60] >= 11).any()


def test_nobody_has_no_arms() -> None:
    tissue = np.zeros((6, 20, 20), np.uint8)
    add_arms(tissue, STEPS, NUMBERS, "beside", np.random.default_rng(0), shoulder_mm=10.0)
    add_bedding(tissue, STEPS, NUMBERS, texture_tile(0), np.random.default_rng(0))
    assert not tissue.any()


def test_unknown_arms_are_refused() -> None:
    with pytest.raises(ValueError, match="arms 'crossed' are unknown; use one of up, beside"):
        _with_arms("crossed", 0)


@pytest.mark.parametrize("seed", range(8))
def test_bedding_lies_around_the_trunk(seed: int) -> None:
    before = _trunk()
    after = before.copy()
    add_bedding(after, STEPS, NUMBERS, texture_tile(3), np.random.default_rng(seed))
    np.testing.assert_array_equal(after[before != 0], before[before != 0])
    away = ndimage.distance_transform_edt(before == 0, sampling=(1e6, 2.0, 2.0))
    foam, cloth = after == NUMBERS["foam"], after == NUMBERS["cloth"]
    assert set(np.unique(after[before == 0]).tolist()) <= {0, 21, 22}
    if foam.any():  # behind, against the back
        rows = np.nonzero(foam)[1]
        assert rows.max() * 2.0 < 75 * 2 + 60
        assert away[foam].min() <= 2.9
        assert away[foam].max() < 100
    if cloth.any():  # in front, as thin as cloth
        runs = ndimage.distance_transform_edt(cloth, sampling=(1e6, 2.0, 2.0))
        assert runs.max() <= 8.0
        assert np.nonzero(cloth)[1].mean() > 75


def test_some_have_a_cushion_some_a_blanket() -> None:
    seen = set()
    for seed in range(16):
        tissue = _trunk()[50:56]
        tissue = np.ascontiguousarray(tissue)
        add_bedding(tissue, STEPS, NUMBERS, texture_tile(3), np.random.default_rng(seed))
        seen.add(((tissue == 21).any().item(), (tissue == 22).any().item()))
    assert seen == {(True, True), (True, False), (False, True), (False, False)}
