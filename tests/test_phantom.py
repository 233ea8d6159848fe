"""The phantom: twins of the kernels, plausible anatomy, laws, the cohort."""

from __future__ import annotations

import math
from dataclasses import replace

import naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from organfast.anatomy import ClassTable
from organfast.kernels import phantom as kernel
from organfast.painting import LabelMap, texture_tile, tissue_of
from organfast.phantom import (
    FieldOfView,
    PhantomCase,
    class_labels,
    cohort,
    phantom,
    phantom_names,
)
from organfast.torso import RELIEF_REACH, Part, Shapes, half_space, in_cavity, solid

TABLE = ClassTable.default()
TEXTURE = texture_tile(2, 16)
COARSE = FieldOfView.over("trunk", (3.2, 3.2, 5.0), 128)
SEEDS = (1, 2, 3, 4)
_CACHE: dict[int, LabelMap] = {}

# ml in adults, from the smallest woman to the largest man of the cohort; bladders vary most.
VOLUMES_ML = {
    "liver": (800, 3000),
    "spleen": (60, 450),
    "pancreas": (25, 160),
    "gallbladder": (8, 80),
    "urinary_bladder": (30, 500),
    "aorta": (100, 420),
    "trachea": (18, 70),
    "lung_right": (1000, 4000),
    "lung_left": (900, 3800),
    "sternum": (30, 110),
    "thyroid_gland": (6, 45),
    "vertebrae_L1": (25, 75),
    "kidney_right": (60, 300),
    "kidney_left": (60, 300),
    "adrenal_gland_right": (1.5, 9),
    "adrenal_gland_left": (1.5, 9),
    "psoas_major_right": (120, 480),
    "psoas_major_left": (120, 480),
    "rectus_abdominis_right": (70, 320),
    "rectus_abdominis_left": (70, 320),
}


def _patient(seed: int) -> LabelMap:
    if seed not in _CACHE:
        _CACHE[seed] = phantom(COARSE, seed)
    return _CACHE[seed]


def _centroid(labels: np.ndarray, affine: np.ndarray, label: int) -> np.ndarray:
    index = np.argwhere(labels == label).mean(0)
    return affine[:3, :3] @ index + affine[:3, 3]


# --- twins ----------------------------------------------------------------------------------------


@given(st.floats(-200, 200), st.floats(-200, 200))
@settings(max_examples=60, deadline=None)
def test_quick_angle_is_atan2(y: float, x: float) -> None:
    turn = kernel.quick_angle(y, x)
    assert 0 <= turn < 1
    assume(x != 0 or y != 0)  # the origin has no angle
    off = abs(turn - math.atan2(y, x) / (2 * math.pi) % 1)
    assert min(off, 1 - off) < 4e-5


@given(st.floats(-2, 12), st.floats(0, 0.9999))
@settings(max_examples=60, deadline=None)
def test_polar_radii_equal_their_twin(level: float, turn: float) -> None:
    radii = np.random.default_rng(0).uniform(0, 100, (8, 12, 3)).astype(np.float32)
    found = kernel.polar_radii(radii, level, turn)
    np.testing.assert_allclose(found, naive.polar_radii(radii, level, turn), atol=1e-3)


def _solids(random: np.random.Generator, n: int) -> np.ndarray:
    """Rows of solids that overlap around the origin, every kind and fold."""
    parts: list[Part] = []
    kinds = ("ellipsoid", "block", "drum")
    folds = ("union", "minus", "and")
    for m in range(n):
        at, radii = random.uniform(-6, 6, 3), random.uniform(5, 12, 3)
        turn = random.uniform(-90, 90, 3)
        fold = (folds[m % 3], float(random.uniform(1, 8)))
        parts.append(solid(tuple(at), tuple(radii), tuple(turn), kinds[m % 3], fold))
    rows = np.array([part.row for part in parts], np.float32)
    shapes = Shapes(random)
    ends = random.uniform(-8, 8, (2, 1, 4)) * [1, 1, 1, 0] + [0, 0, 0, 4.0]
    shapes.cones("liver", (ends[0], ends[1] + [0, 0, 0, 2]), squash=(1, 1.3, 0.8))
    return np.vstack([rows, shapes.rows])


@pytest.mark.parametrize("seed", range(4))
def test_solids_equal_their_twins(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = _solids(random, 3)
    for point in random.uniform(-20, 20, (25, 3)):
        for n in range(len(rows)):
            np.testing.assert_allclose(
                kernel.solid_distance(*point, rows, n),
                naive.solid_distance(*point, rows[n]),
                rtol=2e-3,
                atol=2e-3,
            )
        folded = kernel.fold_solids(*point, rows, 0, len(rows))
        np.testing.assert_allclose(folded, naive.fold_solids(*point, rows), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("n_fences", "relief"), [(0, 0.0), (2, 0.0), (2, 1.5), (3, 0.8)])
def test_claim_voxels_equals_its_twin(n_fences: int, relief: float) -> None:
    random = np.random.default_rng(n_fences)
    fences = [half_space((0.3, -1, 0.2), 7.0), in_cavity(2.0), half_space((1, 0, 0), 9.0)]
    rows = np.array([f.row for f in fences[:n_fences]], np.float32).reshape(-1, 18)
    rows = np.vstack([rows, _solids(random, 2)])
    shapes = (
        np.array([[7, 0b101, 0, n_fences, 3]], np.int32),
        np.array([[0, 1, 1, 19, 2, 21]], np.int32),
        np.array([[relief, 6.0, 0.4]], np.float32),
        rows,
    )
    group = np.array([0, 1, 2, *[3] * 253], np.uint8)
    here = random.integers(0, 3, (20, 22)).astype(np.uint8)
    place = random.uniform(-8, 8, (5, 20, 22)).astype(np.float32)
    twin = naive.claim_voxels(here, place, 0, shapes, group, TEXTURE)
    assert (twin == 7).sum() > 15
    kernel.claim_voxels(here, place, 0, shapes, group, TEXTURE)
    np.testing.assert_array_equal(here, twin)


def test_a_shape_of_fences_alone_is_what_they_enclose() -> None:
    shapes = (
        np.array([[9, 1, 0, 2, 0]], np.int32),
        np.array([[0, 1, 0, 8, 0, 8]], np.int32),
        np.array([[0, 1, 0]], np.float32),
        np.array([half_space((1, 0, 0), 3.5).row, half_space((0, -1, 0), -1.5).row], np.float32),
    )
    place = np.zeros((5, 8, 8), np.float32)
    place[0], place[1] = np.arange(8)[None, :], np.arange(8)[:, None]
    here = np.zeros((8, 8), np.uint8)
    kernel.claim_voxels(here, place, 0, shapes, np.zeros(256, np.uint8), TEXTURE)
    expected = np.zeros((8, 8), np.uint8)
    expected[2:, :4] = 9
    np.testing.assert_array_equal(here, expected)


def test_layers_of_the_wall_from_inside_out() -> None:
    bounds, flat = (100.0, 120.0, 140.0), (0.5, -1.0)
    found = [kernel.wall_layer(r, bounds, flat) for r in (50.0, 110.0, 130.0, 139.0, 141.0)]
    assert found == [5, 3, 2, 1, 0]


def test_the_bend_is_linear_between_lattice_points() -> None:
    from scipy.ndimage import map_coordinates

    lattice = np.random.default_rng(0).normal(0, 3, (4, 5, 6, 3)).astype(np.float32)
    page = np.empty((5, 6, 3), np.float32)
    for z, y, x in ((0.0, 0.0, 0.0), (1.3, 2.7, 4.1), (2.99, 3.5, 0.4)):
        kernel.lattice_page(lattice, z, page)
        found = kernel.displacement(page, y, x)
        twin = [map_coordinates(lattice[..., c], [[z], [y], [x]], order=1)[0] for c in range(3)]
        np.testing.assert_allclose(found, twin, atol=2e-2)


def test_the_reach_of_relief_is_one_number() -> None:
    assert RELIEF_REACH == kernel.RELIEF_REACH


# --- anatomy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_trunk_holds_every_class_in_plausible_volumes(seed: int) -> None:
    anatomy = _patient(seed)
    labels = class_labels(anatomy)
    volumes = np.bincount(labels.ravel(), minlength=len(TABLE)) * (3.2 * 3.2 * 5.0) / 1000
    assert (volumes > 0).all(), [n for n, v in zip(TABLE.names, volumes, strict=True) if v == 0]
    for name, (low, high) in VOLUMES_ML.items():
        assert low < volumes[TABLE.index(name)] < high, (name, volumes[TABLE.index(name)])


@pytest.mark.parametrize("seed", SEEDS)
def test_sides_and_relations_are_the_patients(seed: int) -> None:
    anatomy = _patient(seed)
    labels = class_labels(anatomy)
    at = {n: _centroid(labels, anatomy.affine, TABLE.index(n)) for n in VOLUMES_ML}
    for name, structure in ((s.name, s) for s in TABLE.structures if s.side == "R"):
        assert at[name][0] > at[structure.mirror][0] + 15, name  # x grows to the patient's right
    spine = at["vertebrae_L1"]
    assert at["liver"][0] > spine[0] > at["spleen"][0]
    assert at["gallbladder"][0] > spine[0]
    assert at["kidney_right"][2] < at["kidney_left"][2] + 25
    for side in ("right", "left"):
        assert at[f"adrenal_gland_{side}"][2] > at[f"kidney_{side}"][2] + 20
        assert at[f"psoas_major_{side}"][2] < spine[2]
    assert at["aorta"][1] > spine[1]
    assert at["sternum"][1] > at["trachea"][1] > spine[1] - 30
    assert at["thyroid_gland"][2] > at["trachea"][2] > at["liver"][2] > at["urinary_bladder"][2]
    assert at["rectus_abdominis_left"][1] > at["urinary_bladder"][1]
    fine = {name: label for label, name in anatomy.names.items()}
    heart = _centroid(anatomy.labels, anatomy.affine, fine["heart_ventricle_left"])
    cava = _centroid(anatomy.labels, anatomy.affine, fine["inferior_vena_cava"])
    assert heart[0] < spine[0] < cava[0]
    vertebrae = [
        _centroid(anatomy.labels, anatomy.affine, fine[f"vertebrae_{n}"])[2]
        for n in ("L5", "L4", "L3", "L2", "L1", "T12", "T8", "T4", "T1")
    ]
    assert np.all(np.diff(vertebrae) > 10)


def test_organs_are_in_one_piece_and_inside_the_skin() -> None:
    from scipy.ndimage import label as components

    labels = class_labels(_patient(2))
    for name in ("liver", "spleen", "kidney_right", "lung_left", "aorta", "urinary_bladder"):
        pieces, n = components(labels == TABLE.index(name), np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.max() > 0.97 * sizes.sum(), (name, n)
    air = components(labels == 0)[0]
    outside = air == air[0, 0, 0]
    organs = np.isin(labels, TABLE.organs)
    assert not (outside[1:] & organs[:-1]).any()
    assert not (outside[:, 1:] & organs[:, :-1]).any()


def test_patients_differ() -> None:
    volumes = [
        np.bincount(class_labels(_patient(seed)).ravel(), minlength=len(TABLE)) for seed in SEEDS
    ]
    spread = np.std(volumes, axis=0) / np.mean(volumes, axis=0)
    assert spread[TABLE.index("liver")] > 0.05
    assert spread[TABLE.index("urinary_bladder")] > 0.1
    skin = [int((_patient(seed).labels > 0).sum()) for seed in SEEDS]
    assert np.std(skin) / np.mean(skin) > 0.04


def test_fields_of_view_cut_organs_off() -> None:
    chest = class_labels(phantom(FieldOfView.over("chest", (4, 4, 10), 100), 3))
    abdomen = class_labels(phantom(FieldOfView.over("abdomen", (4, 4, 10), 100), 3))
    seen_chest, seen_abdomen = set(np.unique(chest)), set(np.unique(abdomen))
    assert TABLE.index("trachea") in seen_chest
    assert TABLE.index("urinary_bladder") not in seen_chest
    assert TABLE.index("urinary_bladder") in seen_abdomen
    assert TABLE.index("thyroid_gland") not in seen_abdomen
    for labels in (chest, abdomen):
        edge = np.union1d(labels[..., 0], labels[..., -1])
        assert np.isin(TABLE.organs, edge).any()


# --- laws -----------------------------------------------------------------------------------------


def test_a_seed_is_a_patient() -> None:
    view = FieldOfView((40, 40, 20), (10.0, 10.0, 30.0))
    one = phantom(view, 11)
    np.testing.assert_array_equal(one.labels, phantom(view, 11).labels)
    assert (one.labels != phantom(view, 12).labels).mean() > 0.1
    for threads in (2, 7):
        np.testing.assert_array_equal(one.labels, phantom(view, 11, threads=threads).labels)


def test_a_patient_is_the_same_at_any_spacing() -> None:
    volumes = []
    for spacing, size in (((2.4, 2.4, 5.0), 170), ((3.2, 2.8, 7.0), 140)):
        view = FieldOfView.over("trunk", spacing, size)
        labels = class_labels(phantom(view, 6))
        volumes.append(np.bincount(labels.ravel(), minlength=len(TABLE)) * math.prod(spacing))
    large = [TABLE.index(n) for n, (low, _) in VOLUMES_ML.items() if low >= 60]
    ratio = volumes[1][large] / volumes[0][large]
    np.testing.assert_allclose(ratio, 1.0, atol=0.04)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 9), (1, 30, 2), (7, 8, 1)])
def test_any_size_is_labelled(shape: tuple[int, int, int]) -> None:
    anatomy = phantom(FieldOfView(shape, (7.0, 7.0, 30.0)), 0)
    assert anatomy.labels.shape == shape
    assert set(np.unique(anatomy.labels)) <= {0, *phantom_names()}


def test_part_of_a_field_of_view_is_part_of_the_patient() -> None:
    whole = phantom(FieldOfView((60, 60, 9), (6.0, 6.0, 10.0), 0.0), 5).labels
    middle = phantom(FieldOfView((60, 60, 3), (6.0, 6.0, 10.0), 0.0), 5).labels
    np.testing.assert_array_equal(whole[..., 3:6], middle)


# --- class labels and cohort ----------------------------------------------------------------------


def test_every_structure_has_a_tissue_and_a_class() -> None:
    names = phantom_names()
    assert len(names) < 256
    unknown = [n for n in names.values() if tissue_of(n) == "soft"]
    assert not unknown
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    labels[labels > len(names)] = 0
    found = class_labels(LabelMap(labels, np.eye(4), names)).ravel()
    of = {name: TABLE.names[found[label]] for label, name in names.items()}
    assert of["lung_vessel_left"] == "lung_left"
    assert of["liver_vessel"] == "liver"
    assert of["rib_right_7"] == of["skin"] == of["vertebrae_L2"] == "body_envelope"
    assert of["stomach"] == of["heart_myocardium"] == of["trunk_fat"] == "thorax_abdomen"
    assert set(of.values()) == set(TABLE.names) - {"background"}


def test_other_class_tables_take_what_they_name() -> None:
    table = ClassTable.from_names(["stomach", "heart_myocardium", "vertebrae_T12"])
    labels = class_labels(_patient(1), table)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
    fine = {name: label for label, name in phantom_names().items()}
    stomach = labels == table.index("stomach")
    np.testing.assert_array_equal(stomach, _patient(1).labels == fine["stomach"])


def test_a_cohort_is_lazy_seeded_and_varied() -> None:
    cases = list(cohort(3, 9, (8.0, 8.0, 20.0), 50))
    again = next(iter(cohort(1_000_000, 9, (8.0, 8.0, 20.0), 50)))
    assert [case.name for case in cases] == [f"phantom_{n:03d}" for n in range(3)]
    np.testing.assert_array_equal(cases[0].scan.hu, again.scan.hu)
    np.testing.assert_array_equal(cases[0].labels, again.labels)
    other = next(cohort(1, 10, (8.0, 8.0, 20.0), 50))
    assert (other.scan.hu != again.scan.hu).mean() > 0.2
    for case in cases:
        assert isinstance(case, PhantomCase)
        assert case.scan.hu.shape == case.labels.shape
        assert case.scan.working_spacing_mm == (20.0, 8.0, 8.0)
        assert np.median(case.scan.hu[case.labels == TABLE.index("lung_right")]) < -700
        liver = case.scan.hu[case.labels == TABLE.index("liver")]
        assert liver.size == 0 or 5 < np.median(liver) < 140
    assert list(cohort(0, 1)) == []


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="region 'head' is unknown"):
        FieldOfView.over("head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        FieldOfView((0, 5, 5), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="spacing_mm"):
        replace(COARSE, spacing_mm=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="n is -1"):
        next(cohort(-1, 0))
    with pytest.raises(ValueError, match="threads is 0"):
        phantom(FieldOfView((4, 4, 2), (50.0, 50.0, 50.0)), 1, threads=0)
