"""Organs of a label map: measures against plain numpy, then sides, presence and text outputs."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure, totalsegmentator_names
from organfast.organs import (
    Organ,
    Presence,
    drop_small,
    measure_organs,
    organs_csv,
    organs_json,
)
from organfast.volume import Volume

TABLE = ClassTable(
    (
        Structure("background", role="background"),
        Structure("inside", role="context"),
        Structure("liver"),
        Structure("kidney_right", side="R", mirror="kidney_left"),
        Structure("kidney_left", side="L", mirror="kidney_right"),
    )
)
LIVER, RIGHT, LEFT = 2, 3, 4
DATA = Path(__file__).parents[2] / "shared" / "data" / "labelled"

OBLIQUE = np.array(
    [[0.8, 0.1, -0.2, -30.0], [-0.1, 0.7, 0.3, 12.0], [0.1, -0.2, 2.5, 7.0], [0, 0, 0, 1]]
)


def scan(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> Volume:
    return Volume(np.zeros(shape, np.int16), affine)


def torso() -> NDArray[np.uint8]:
    """Working order (k, i, j), 1 ml voxels: liver on the right, kidneys beside the spine."""
    labels = np.ones((8, 12, 40), np.uint8)
    labels[2:7, 2:10, 24:37] = LIVER
    labels[1:3, 2:5, 27:30] = RIGHT
    labels[1:3, 2:5, 9:12] = LEFT
    return labels


CUBE = np.diag([10.0, 10.0, 10.0, 1.0])
TURNED = np.array([[0, -10.0, 0, 0], [0, 0, 10.0, 0], [10.0, 0, 0, 0], [0, 0, 0, 1]])


def test_every_measure_is_what_the_mask_says_in_voxels_as_stored_and_in_mm() -> None:
    rng = np.random.default_rng(0)
    stored = np.ones((9, 8, 7), np.uint8)
    stored[2:6, 1:5, 3:5] = rng.choice([1, LIVER], (4, 4, 2), p=[0.3, 0.7])
    certainty = rng.integers(0, 256, stored.shape, dtype=np.uint8)
    affine = OBLIQUE @ np.diag([-1.0, 1.0, -1.0, 1.0])  # first and last axis against the world
    volume = scan(stored.shape, affine)
    working = volume.orientation.working
    position = np.array([4.25, 2.5, 1.0])  # k, i, j
    organ = measure_organs(
        working(stored),
        working(certainty),
        volume,
        TABLE,
        np.stack([np.full(3, np.nan)] * 2 + [position] + [np.full(3, np.nan)] * 2),
    )["liver"]

    where = np.argwhere(stored == LIVER)
    ends = zip(where.min(axis=0) - 0.5, where.max(axis=0) + 0.5, strict=True)
    corners = np.array(list(itertools.product(*ends)))
    assert (organ.label, organ.n_voxels) == (LIVER, len(where))
    np.testing.assert_allclose(organ.volume_ml, len(where) * volume.voxel_ml)
    np.testing.assert_allclose(organ.confidence, certainty[stored == LIVER].mean() / 255)
    np.testing.assert_array_equal(
        organ.box_voxel, np.stack([where.min(axis=0), where.max(axis=0) + 1], axis=1)
    )
    np.testing.assert_allclose(
        organ.box_mm, [volume.to_mm(corners).min(axis=0), volume.to_mm(corners).max(axis=0)]
    )
    np.testing.assert_allclose(organ.centroid_voxel, where.mean(axis=0))
    np.testing.assert_allclose(organ.centroid_mm, volume.to_mm(where.mean(axis=0)))
    as_stored = np.array(volume.orientation.stored_index((4.25, 2.5, 1.0), stored.shape))
    np.testing.assert_allclose(organ.probability_centroid_voxel, as_stored)
    np.testing.assert_allclose(organ.probability_centroid_mm, volume.to_mm(as_stored))


def test_an_absent_organ_is_reported_without_places_or_warnings() -> None:
    labels = np.ones((3, 3, 3), np.uint8)
    organs = measure_organs(labels, None, scan((3, 3, 3), CUBE), TABLE)
    assert list(organs) == ["liver", "kidney_right", "kidney_left"]
    assert organs["liver"] == Organ("liver", LIVER, False, None, 0, 0.0)


@pytest.mark.parametrize(
    ("presence", "confidence", "warning"),
    [
        (Presence(min_ml=9.5), 200, "9.00 ml found, less than the 9.5 ml that count"),
        (Presence(min_ml=9.0), 200, None),
        (Presence(min_confidence=0.3), 76, "mean probability 0.30 is below 0.30"),
        (Presence(min_confidence=0.3), 77, None),
        (None, 50, "mean probability 0.20 is below 0.20"),
        (None, 51, None),
    ],
)
def test_presence_is_a_matter_of_volume_and_confidence(
    presence: Presence | None, confidence: int, warning: str | None
) -> None:
    labels = np.ones((4, 5, 6), np.uint8)
    labels[1, 1:4, 1:4] = LIVER
    certainty = np.full(labels.shape, confidence, np.uint8)
    volume = scan((6, 5, 4), CUBE)
    organ = measure_organs(labels, certainty, volume, TABLE, None, presence)["liver"]
    assert organ.present == (warning is None)
    assert organ.warnings == (() if warning is None else (warning,))
    assert organ.n_voxels == 9
    assert organ.box_voxel == ((1, 4), (1, 4), (1, 2))


def test_presence_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="min_ml -1"):
        Presence(min_ml=-1)
    with pytest.raises(ValueError, match="min_confidence 20"):
        Presence(min_confidence=20)


@pytest.mark.parametrize(
    ("place", "side"),
    [
        (np.s_[3, 3, 0], "left"),
        (np.s_[3, 3, 6], "right"),
        (np.s_[3, 0, 3], "posterior"),
        (np.s_[3, 5, 3], "anterior"),
        (np.s_[0, 3, 3], "inferior"),
        (np.s_[4, 3, 3], "superior"),
    ],
)
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_an_organ_at_the_border_is_cut_off_on_the_patients_side(
    place: tuple[int, int, int], side: str, signs: tuple[int, int, int]
) -> None:
    labels = np.ones((5, 6, 7), np.uint8)
    labels[2:4, 2:4, 2:4] = LIVER
    volume = scan((7, 6, 5), CUBE @ np.diag([*map(float, signs), 1.0]))
    assert measure_organs(labels, None, volume, TABLE)["liver"].cut_off == ()
    labels[place] = LIVER
    assert measure_organs(labels, None, volume, TABLE)["liver"].cut_off == (side,)


def test_an_organ_that_fills_the_scan_is_cut_off_everywhere() -> None:
    labels = np.full((2, 2, 2), LIVER, np.uint8)
    organ = measure_organs(labels, None, scan((2, 2, 2), CUBE), TABLE)["liver"]
    assert organ.cut_off == ("left", "right", "posterior", "anterior", "inferior", "superior")


def test_swapped_sides_are_noticed_and_right_ones_pass() -> None:
    labels = torso()
    volume = scan(labels.shape[::-1], CUBE)
    organs = measure_organs(labels, None, volume, TABLE)
    assert all(organ.warnings == () for organ in organs.values())

    swapped = np.array([0, 1, LIVER, LEFT, RIGHT], np.uint8)[labels]
    organs = measure_organs(swapped, None, volume, TABLE)
    warning = (
        "kidney_right lies 180 mm to the left of kidney_left: left and right may be swapped",
    )
    assert organs["kidney_right"].warnings == organs["kidney_left"].warnings == warning
    assert organs["liver"].warnings == ()

    labels[labels == LEFT] = 1
    labels[1:3, 2:5, 26] = LEFT
    close = scan(labels.shape[::-1], CUBE / 3)
    organs = measure_organs(labels, None, close, TABLE, presence=Presence(min_ml=0))
    assert organs["kidney_left"].warnings == (
        "kidney_right lies only 7 mm to the right of kidney_left: left and right may be swapped",
    )


def test_an_absent_partner_is_no_reason_to_warn() -> None:
    labels = torso()
    labels[labels == RIGHT] = 1
    organs = measure_organs(labels, None, scan(labels.shape[::-1], CUBE), TABLE)
    assert organs["kidney_left"].warnings == ()


@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
)
def test_any_storage_orientation_gives_the_same_organs_in_the_world(
    order: list[int], signs: tuple[float, float, float]
) -> None:
    labels = torso()
    stored = labels.transpose(2, 1, 0)  # x, y, z
    affine = OBLIQUE.copy()
    reference = measure_organs(labels, None, scan(stored.shape, affine), TABLE)

    other = stored.transpose(order)
    turned = np.eye(4)
    turned[:, :3] = affine[:, [*order]]
    turned[:, 3] = affine[:, 3]
    for axis, sign in enumerate(signs):
        if sign < 0:
            other = np.flip(other, axis)
            turned[:3, 3] += turned[:3, axis] * (other.shape[axis] - 1)
            turned[:3, axis] *= -1
    volume = scan(other.shape, turned)
    organs = measure_organs(volume.orientation.working(other), None, volume, TABLE)
    for name, organ in organs.items():
        where = np.argwhere(other == organ.label)
        np.testing.assert_array_equal(np.array(organ.box_voxel)[:, 0], where.min(axis=0))
        np.testing.assert_array_equal(np.array(organ.box_voxel)[:, 1], where.max(axis=0) + 1)
        np.testing.assert_allclose(organ.centroid_voxel, where.mean(axis=0))
        np.testing.assert_allclose(organ.box_mm, reference[name].box_mm, atol=1e-9)
        np.testing.assert_allclose(organ.centroid_mm, reference[name].centroid_mm, atol=1e-9)
        np.testing.assert_allclose(organ.volume_ml, reference[name].volume_ml)
        assert organ.cut_off == reference[name].cut_off


@settings(deadline=None, max_examples=25)
@given(shift=st.tuples(*[st.integers(-500, 500)] * 3))
def test_moving_the_affine_moves_boxes_in_mm_and_nothing_in_voxels(
    shift: tuple[int, int, int],
) -> None:
    labels = torso()
    moved = OBLIQUE.copy()
    moved[:3, 3] += shift
    here = measure_organs(labels, None, scan(labels.shape[::-1], OBLIQUE), TABLE)
    there = measure_organs(labels, None, scan(labels.shape[::-1], moved), TABLE)
    for name, organ in here.items():
        assert there[name].box_voxel == organ.box_voxel
        assert there[name].centroid_voxel == organ.centroid_voxel
        np.testing.assert_allclose(there[name].box_mm, np.add(organ.box_mm, shift))
        np.testing.assert_allclose(there[name].centroid_mm, np.add(organ.centroid_mm, shift))


def test_an_organ_that_is_less_probable_than_the_sure_ones_stays_and_is_doubted() -> None:
    labels = torso()
    volume = scan(labels.shape[::-1], CUBE)
    certainty = np.full(labels.shape, 128, np.uint8)  # 0.50
    calm, doubting = (
        measure_organs(labels, certainty, volume, TABLE, presence=Presence(min_ml=0, sure=sure))
        for sure in (0.5, 0.6)
    )
    for name, organ in calm.items():
        assert not any(w.startswith("not sure") for w in organ.warnings)
        assert doubting[name].present == organ.present
        expected = ("not sure: mean probability 0.50 is below 0.60",) if organ.present else ()
        assert tuple(w for w in doubting[name].warnings if w.startswith("not sure")) == expected
    assert any(organ.present for organ in calm.values())


def test_a_crumb_wholly_in_view_is_no_organ_and_one_that_is_cut_off_may_be() -> None:
    whole = torso()
    liver = np.argwhere(whole == TABLE.index("liver"))[:, 0]
    labels = np.ascontiguousarray(whole[: int(np.median(liver)) + 1])  # through the liver
    volume = scan(labels.shape[::-1], CUBE)
    usual = measure_organs(labels, None, volume, TABLE, presence=Presence(min_ml=0))
    there = {name: organ for name, organ in usual.items() if organ.present}
    in_view = {name for name, organ in there.items() if not organ.cut_off}
    at_side = Presence(min_ml=0, whole_ml={name: 1e6 for name in there}, side_mm=1e4)
    assert measure_organs(labels, None, volume, TABLE, presence=at_side) == usual
    assert in_view
    assert in_view != set(there)
    whole_ml = {name: 5.01 * organ.volume_ml for name, organ in there.items()}
    strict = Presence(min_ml=0, whole_ml=whole_ml, side_mm=0)
    found = measure_organs(labels, None, volume, TABLE, presence=strict)
    assert {name for name, organ in found.items() if organ.present} == set(there) - in_view
    for name in in_view:
        assert "found wholly in view, less than the" in found[name].warnings[0]
        assert found[name].n_voxels == there[name].n_voxels
    for lenient in (replace(strict, least_of_whole=0.19), replace(strict, whole_ml={})):
        assert measure_organs(labels, None, volume, TABLE, presence=lenient) == usual
    with pytest.raises(ValueError, match=r"least_of_whole 1\.2 is outside"):
        Presence(least_of_whole=1.2)


@pytest.mark.parametrize("volume", [scan((40, 12, 8), CUBE), scan((8, 40, 12), TURNED)])
@pytest.mark.parametrize("names", [None, ("liver", "spleen")])
def test_what_is_too_small_is_taken_out(names: tuple[str, ...] | None, volume: Volume) -> None:
    table = TABLE if names is None else ClassTable.from_names(names)
    labels = torso()
    labels[labels >= len(table)] = 0
    least = max(float(np.sum(labels == n) * volume.voxel_ml) for n in table.organs)
    strict = Presence(min_ml=least)
    organs = measure_organs(labels, None, volume, table, presence=strict)
    small = {organ.label: name for name, organ in organs.items() if not organ.present}
    assert small
    expected = np.where(np.isin(labels, list(small)), table.context or 0, labels)
    gone = drop_small(volume.orientation.stored(labels), organs, table, volume, strict)
    np.testing.assert_array_equal(labels, expected)
    assert set(gone) == {name for name in small.values() if organs[name].n_voxels}
    assert all(gone[name] == organs[name].warnings[0] for name in gone)


def test_an_improbable_organ_stays_in_the_map() -> None:
    """Labels alone, without probabilities, must be the same labels."""
    labels = torso()
    volume = scan(labels.shape[::-1], CUBE)
    doubtful = np.full(labels.shape, 20, np.uint8)
    presence = Presence(min_ml=0)
    organs = measure_organs(labels, doubtful, volume, TABLE, presence=presence)
    assert not any(organ.present for organ in organs.values())
    before = labels.copy()
    assert not drop_small(volume.orientation.stored(labels), organs, TABLE, volume, presence)
    np.testing.assert_array_equal(labels, before)


def test_arrays_that_do_not_fit_are_refused() -> None:
    labels = torso()
    volume = scan(labels.shape[::-1], CUBE)
    with pytest.raises(ValueError, match="working order"):
        measure_organs(labels.transpose(2, 1, 0), None, volume, TABLE)
    with pytest.raises(ValueError, match=r"give \(5, 3\)"):
        measure_organs(labels, None, volume, TABLE, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="confidence of shape"):
        measure_organs(labels, np.zeros((1, 1, 1), np.uint8), volume, TABLE)


# --- text -----------------------------------------------------------------------------------------


def measured() -> dict[str, Organ]:
    labels = torso()
    labels[labels == LEFT] = 1
    certainty = np.full(labels.shape, 170, np.uint8)
    affine = np.diag([10.0, 10.0, 10.0, 1.0])
    affine[:3, 3] = (-200.1234, 0.0, -0.001)
    centroids = np.full((5, 3), np.nan)
    centroids[LIVER] = (4, 5.5, 30)
    return measure_organs(labels, certainty, scan(labels.shape[::-1], affine), TABLE, centroids)


def test_json_explains_itself_and_is_rounded() -> None:
    content = json.loads(organs_json(measured()))
    assert content["coordinates"].startswith("mm: RAS+")
    liver = content["organs"]["liver"]
    assert liver == {
        "name": "liver",
        "label": 2,
        "present": True,
        "confidence": 0.6667,
        "n_voxels": 511,
        "volume_ml": 511.0,
        "box_voxel": [[24, 37], [2, 10], [2, 7]],
        "box_mm": [[34.88, 15.0, 15.0], [164.88, 95.0, 65.0]],
        "centroid_voxel": liver["centroid_voxel"],
        "centroid_mm": liver["centroid_mm"],
        "probability_centroid_voxel": [30.0, 5.5, 4.0],
        "probability_centroid_mm": [99.88, 55.0, 40.0],
        "cut_off": [],
        "warnings": [],
    }
    assert content["organs"]["kidney_left"]["box_mm"] is None
    assert content["organs"]["kidney_left"]["confidence"] == 0.0


def test_csv_has_one_row_per_organ_with_units_in_its_columns() -> None:
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(organs_csv(measured())))}
    liver = rows["liver"]
    assert liver["present"] == "true"
    assert liver["volume_ml"] == "511.0"
    assert [liver[f"box_voxel_{axis}_{end}"] for axis in range(3) for end in ("start", "stop")] == [
        *("24", "37", "2", "10", "2", "7")
    ]
    assert (liver["box_x_min_mm"], liver["box_z_max_mm"]) == ("34.88", "65.0")
    assert liver["probability_centroid_x_mm"] == "99.88"
    assert rows["kidney_left"]["present"] == "false"
    assert rows["kidney_left"]["centroid_x_mm"] == ""
    assert all(None not in row and None not in row.values() for row in rows.values())


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r\n="])
def test_csv_text_is_no_formula_and_numbers_stay_numbers(start: str) -> None:
    name = start + 'HYPERLINK("http://x","y")'
    organ = replace(
        measured()["liver"], name=name, warnings=(name,), cut_off=(), centroid_mm=(-12.5, 0.0, 1.0)
    )
    row = next(csv.DictReader(io.StringIO(organs_csv({name: organ}))))
    assert row["name"] == row["warnings"] == "'" + name
    assert row["centroid_x_mm"] == "-12.5"


# --- real anatomy ---------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.exists(), reason="the real CT scans are not beside this checkout")
@pytest.mark.parametrize("case", ["chest", "abdomen"])
def test_reference_labels_have_their_organs_where_anatomy_says(case: str) -> None:
    import nibabel as nib

    image = nib.load(DATA / f"{case}_labels.nii.gz")
    classes = ClassTable.default()
    ids = {name: label for label, name in totalsegmentator_names().items()}
    renamed = np.zeros(256, np.uint8)
    for label, structure in enumerate(classes.structures):
        renamed[[ids[name] for name in structure.totalsegmentator]] = label
    stored = renamed[np.asarray(image.dataobj)]
    volume = Volume(np.zeros(stored.shape, np.int16), image.affine)
    organs = measure_organs(volume.orientation.working(stored), None, volume, classes)

    found = {name: organ for name, organ in organs.items() if organ.present}
    assert all(organ.warnings == () for organ in found.values())
    x = {name: organ.centroid_mm[0] for name, organ in found.items() if organ.centroid_mm}
    assert x["liver"] > x["aorta"] > x["spleen"]
    assert 900 < found["liver"].volume_ml < 2000
    if case == "chest":
        assert found["kidney_right"].cut_off == found["kidney_left"].cut_off == ("inferior",)
        assert not organs["urinary_bladder"].n_voxels
    else:
        assert found["liver"].cut_off == ("superior",)
