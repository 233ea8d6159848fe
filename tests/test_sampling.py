"""Sampling: balanced, seeded, without replacement, patients never on both sides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.errors import InputError
from organfast.grid import GridVolume, ModelGrid
from organfast.layouts import Case, find_cases
from organfast.levels import levels_slab
from organfast.nifti import Geometry, write_labels, write_volume
from organfast.sampling import (
    LabelledScan,
    Split,
    features_at,
    labelled_scan,
    on_model_grid,
    sample_positions,
    slabs_at,
    split_patients,
)
from organfast.volume import Volume


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    n=st.integers(1, 30),
    seed=st.integers(0, 10),
    fortran=st.booleans(),
)
def test_positions_carry_their_label_and_never_repeat(
    shape: tuple[int, int, int], n: int, seed: int, fortran: bool
) -> None:
    labels = np.random.default_rng(seed).integers(0, 5, shape).astype(np.uint8)
    labels = np.asfortranarray(labels) if fortran else labels
    positions, classes = sample_positions(labels, {0: n, 2: n, 4: n}, seed)
    np.testing.assert_array_equal(labels[tuple(positions.T)], classes)
    assert len(np.unique(positions, axis=0)) == len(positions)
    for label in (0, 2, 4):
        assert (classes == label).sum() == min(n, (labels == label).sum())
    assert not np.isin(classes, (1, 3)).any()


def test_every_voxel_of_a_label_is_equally_likely() -> None:
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1:, ::2, 1:4] = 1
    drawn = np.zeros(labels.shape)
    for seed in range(600):
        positions, _ = sample_positions(labels, {1: 3}, seed)
        drawn[tuple(positions.T)] += 1
    expected = 600 * 3 / labels.sum()
    assert drawn[labels == 0].sum() == 0
    # Binomial: a deviation of five standard deviations does not happen by chance.
    np.testing.assert_allclose(drawn[labels == 1], expected, atol=5 * expected**0.5)


def test_the_seed_decides_and_memory_order_does_not() -> None:
    labels = np.random.default_rng(1).integers(0, 3, (4, 20, 20)).astype(np.uint8)
    first, _ = sample_positions(labels, {1: 50, 2: 50}, [3, 1])
    again, _ = sample_positions(np.asfortranarray(labels), {2: 50, 1: 50}, [3, 1])
    other, _ = sample_positions(labels, {1: 50, 2: 50}, [3, 2])
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    n=st.integers(1, 30),
    share=st.floats(0, 1),
    fortran=st.booleans(),
)
def test_weighted_positions_carry_their_label_and_never_repeat(
    shape: tuple[int, int, int], n: int, share: float, fortran: bool
) -> None:
    rng = np.random.default_rng(n)
    labels = rng.integers(0, 3, shape).astype(np.uint8)
    labels = np.asfortranarray(labels) if fortran else labels
    weights = rng.choice([0, 0.2, 1], shape)
    kept = labels.copy(), weights.copy()
    positions, classes = sample_positions(labels, {0: n, 2: n}, 1, weights, share)
    np.testing.assert_array_equal(labels[tuple(positions.T)], classes)
    assert len(np.unique(positions, axis=0)) == len(positions)
    for label in (0, 2):
        assert (classes == label).sum() == min(n, (labels == label).sum())
    np.testing.assert_array_equal(labels, kept[0])
    np.testing.assert_array_equal(weights, kept[1])
    again, _ = sample_positions(np.ascontiguousarray(labels), {0: n, 2: n}, 1, weights, share)
    np.testing.assert_array_equal(positions, again)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_weights_draw_the_hard_and_the_rest_is_even(share: float) -> None:
    labels = np.zeros((4, 50, 50), np.uint8)
    labels[1:3] = 1
    weights = np.zeros(labels.shape, np.float32)
    weights[:, 40:] = 1
    weights[:, 45:] = 3
    weights[3] = 100  # not of this label
    # 200 of 5000: few enough that what is drawn hardly changes what is left.
    drawn = np.zeros(labels.shape)
    for seed in range(40):
        positions, _ = sample_positions(labels, {1: 200}, seed, weights, share)
        drawn[tuple(positions.T)] += 1
    assert drawn[[0, 3]].sum() == 0
    easy, hard, hardest = (drawn[:, s].sum() for s in (slice(40), slice(40, 45), slice(45, 50)))
    n = 40 * 200
    np.testing.assert_allclose(easy, n * (1 - share) * 0.8, atol=150)
    np.testing.assert_allclose(hard, n * ((1 - share) * 0.1 + share * 0.25), atol=250)
    np.testing.assert_allclose(hardest, n * ((1 - share) * 0.1 + share * 0.75), atol=250)


def test_weights_of_nothing_draw_as_none_would() -> None:
    labels = np.ones((2, 9, 9), np.uint8)
    plain, _ = sample_positions(labels, {1: 20}, 7)
    unused, _ = sample_positions(labels, {1: 20}, 7, np.ones(labels.shape), 0.0)
    np.testing.assert_array_equal(plain, unused)
    none, _ = sample_positions(labels, {1: 20}, 7, np.zeros(labels.shape), 1.0)
    assert len(np.unique(none, axis=0)) == 20


def test_weights_that_are_none_are_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    for weights in (np.ones((2, 3, 3)), np.full((2, 3, 4), -1.0), np.full((2, 3, 4), np.nan)):
        with pytest.raises(ValueError, match="weights of shape"):
            sample_positions(labels, {1: 2}, 0, weights)
    for share in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="weighted_share is"):
            sample_positions(labels, {1: 2}, 0, np.ones(labels.shape), share)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), seed=st.integers(0, 5))
def test_no_patient_is_on_both_sides(n: int, seed: int) -> None:
    patients = [f"p{i}" for i in range(n)]
    split = split_patients(patients + patients[:2], seed)
    everyone = [*split.train, *split.validation, *split.test]
    assert sorted(everyone) == sorted(patients)
    assert split == split_patients(patients[::-1], seed)


def test_a_split_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    split = Split(("a", "b"), ("c",), ("d",))
    path.write_text(split.text())
    assert Split.read(path) == split


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[1]",
            '[{"train": ["a"]}]',
            '[{"train": ["a"], "val": "b"}]',
            '[{"train": [], "val": []}]',
        ),
        *("", "[]", '{"train": "a"}', '{"train": []}', '{"train": ["a"], "test": ["a"]}'),
        '{"a": []}',
    ],
)
def test_what_is_no_split_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"split\.json"):
        Split.read(path)


def test_nnunets_splits_are_folds_of_cases(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "b"], "val": ["a"]}]
    path.write_text(json.dumps(folds))
    assert Split.read(path) == Split(("a", "b"), ("c",))
    assert Split.read(f"{path}#1") == Split(("c", "b"), ("a",))
    patients = {"a": "p1", "b": "p1", "c": "p2"}
    assert Split.read(path, patients) == Split(("p1",), ("p2",))
    for name, words in (
        (f"{path}#1", "patient p1 both to train and to validate in fold 1"),
        (f"{path}#2", "has 2 folds"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            Split.read(name, patients)
        assert str(caught.value).startswith(f"{name}: ")


def test_a_file_may_be_called_with_a_number_sign(tmp_path: Path) -> None:
    path = tmp_path / "split#1"
    path.write_text('{"train": ["a"]}')
    assert Split.read(path) == Split(("a",))
    (tmp_path / "split").write_text('{"train": ["a"]}')
    with pytest.raises(InputError, match="has no folds"):
        Split.read(tmp_path / "split#2")


def test_a_split_of_other_patients_is_refused() -> None:
    with pytest.raises(ValueError, match="patient z"):
        Split(("z",)).check(["a", "b"])


# --- positions of a case --------------------------------------------------------------------------

CLASSES = ClassTable.from_names(["liver", "spleen"])
SHAPE = (20, 16, 6)
SPACING_MM = (3.0, 4.0, 5.0)


def label_map() -> np.ndarray:
    """Air, the rest of the body, liver and spleen, stored (x, y, z)."""
    labels = np.full(SHAPE, CLASSES.index("thorax_abdomen"), np.uint8)
    labels[:, :3] = 0
    labels[11:17, 5:12, 1:4] = CLASSES.index("liver")
    labels[3:6, 4:8, 2:5] = CLASSES.index("spleen")
    return labels


def told_by_hu(labels: np.ndarray) -> np.ndarray:
    """HU from which the label can be read: -1000, 0, 100, 200 and up to 40 more."""
    noise = np.random.default_rng(0).integers(0, 41, labels.shape)
    return (np.where(labels == 0, -1000, 100 * (labels - 1.0)) + noise).astype(np.int16)


def case_of(folder: Path, organs: Sequence[str], flip: bool = False) -> Case:
    """A case with a mask per organ, and nothing said of the rest."""
    labels, affine = label_map(), np.diag([*SPACING_MM, 1.0])
    volume = Volume(told_by_hu(labels), affine)
    if flip:  # stored (z, x, y), x backwards
        labels = labels.transpose(2, 0, 1)[:, ::-1]
        turned = affine[:, [2, 0, 1, 3]] * [1, -1, 1, 1]
        turned[0, 3] = (SHAPE[0] - 1) * SPACING_MM[0]
        volume = Volume(volume.hu.transpose(2, 0, 1)[:, ::-1].copy(), turned)
    (folder / "p0" / "segmentations").mkdir(parents=True)
    write_volume(folder / "p0" / "ct.nii.gz", volume)
    for name in organs:
        mask = (labels == CLASSES.index(name)).astype(np.uint8)
        path = folder / "p0" / "segmentations" / f"{name}.nii.gz"
        write_labels(path, mask, Geometry.of_volume(volume))
    (case,) = find_cases(folder).cases
    return case


@dataclass(frozen=True)
class Drawn:
    """Positions of a scan, with their labels and voxels."""

    positions: np.ndarray
    labels: np.ndarray
    hu: np.ndarray


def draw(scan: LabelledScan, n_of_each: Sequence[int], seed: int = 0) -> Drawn:
    positions, labels = sample_positions(scan.labels, dict(enumerate(n_of_each)), seed)
    return Drawn(positions, labels, scan.grid_volume.hu[tuple(positions.T)])


@pytest.mark.parametrize("flip", [False, True])
def test_examples_lie_where_their_label_is(flip: bool, tmp_path: Path) -> None:
    case = case_of(tmp_path, ["liver", "spleen"], flip)
    found = draw(labelled_scan(case, CLASSES, ModelGrid(None)), [5, 30, 10, 10**6])
    organs, outside = found.labels >= 2, found.labels == 0
    np.testing.assert_array_equal(found.hu[organs] // 100 + 1, found.labels[organs])
    assert (found.hu[outside] < -500).all()
    # The rest of the body ends within a raster step of the skin.
    assert (found.hu[found.labels == 1] < 100).all()
    assert found.positions[found.labels == 1, 1].min() >= 2
    n_spleen = int((label_map() == CLASSES.index("spleen")).sum())
    np.testing.assert_array_equal(np.bincount(found.labels), [5, 30, 10, n_spleen])
    assert len(np.unique(found.positions, axis=0)) == len(found.positions)


def test_storage_does_not_change_the_draw(tmp_path: Path) -> None:
    scans = [
        labelled_scan(
            case_of(tmp_path / str(flip), ["liver", "spleen"], flip),
            CLASSES,
            ModelGrid((2.0, 2.0, 5.0)),
        )
        for flip in (False, True)
    ]
    one, other = (draw(scan, [20] * 4) for scan in scans)
    np.testing.assert_array_equal(one.positions, other.positions)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(scans[0].grid_volume.hu, scans[1].grid_volume.hu)


def test_on_a_working_grid_examples_lie_in_their_organ(tmp_path: Path) -> None:
    case = case_of(tmp_path, ["liver", "spleen"])
    scan = labelled_scan(case, CLASSES, ModelGrid((2.0, 2.0, 2.5)))
    examples, volume, labels = (
        draw(scan, [50] * 4),
        scan.grid_volume,
        label_map().transpose(2, 1, 0),
    )
    nearest = np.floor(np.array(volume.offset) + np.array(volume.step) * examples.positions + 0.5)
    found, organs = labels[tuple(nearest.astype(int).T)], examples.labels >= 2
    np.testing.assert_array_equal(found[organs], examples.labels[organs])
    assert (found[~organs] < 2).all()


def test_an_organ_that_nobody_drew_is_not_context(tmp_path: Path) -> None:
    """Without the spleen's mask, voxels of the rest of the body may be spleen."""
    case = case_of(tmp_path, ["liver"])
    found = draw(labelled_scan(case, CLASSES, ModelGrid(None)), [20] * 4)
    np.testing.assert_array_equal(np.bincount(found.labels, minlength=4), [20, 0, 20, 0])
    assert (found.hu[found.labels == 0] < -500).all()


def test_what_was_drawn_is_no_organ_whatever_else_was(tmp_path: Path) -> None:
    """Without a liver, and with a spleen beside the table, there is no context but the spleen."""
    table = ClassTable.from_names(["liver"])
    case = case_of(tmp_path, ["spleen"])
    scan = labelled_scan(case, table, ModelGrid(None), {"spleen": 1})
    spleen = label_map().transpose(2, 1, 0) == CLASSES.index("spleen")
    np.testing.assert_array_equal(scan.labels == len(table), spleen)
    assert set(np.unique(scan.labels)) == {0, len(table), np.iinfo(scan.labels.dtype).max}
    with_liver = labelled_scan(case_of(tmp_path / "2", ["liver", "spleen"]), table, ModelGrid(None))
    assert set(np.unique(with_liver.labels)) == {0, 1, 2}


def test_a_scan_too_large_for_the_grid_is_named(tmp_path: Path) -> None:
    volume = Volume(np.zeros((200, 200, 2), np.int16), np.diag([100.0, 100, 100, 1]))
    with pytest.raises(InputError, match=r"huge\.nii: the model grid would have .*; check the"):
        on_model_grid("huge.nii", volume, ModelGrid((0.1, 0.1, 3.0)))


# --- what is read around them ---------------------------------------------------------------------

PATTERNS = [Block(1), Block(5), Block(3, levels=(1, 3), slices=3), Block(7, levels=(4,))]


@pytest.fixture(scope="module")
def scan() -> GridVolume:
    hu = np.random.default_rng(2).integers(-1200, 800, (5, 9, 11)).astype(np.int16)
    return GridVolume(hu)


def everywhere(scan: GridVolume) -> np.ndarray:
    return np.argwhere(np.ones(scan.shape, bool)).astype(np.int32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_slabs_at_hold_every_position_once_and_its_voxel(pattern: Block, scan: GridVolume) -> None:
    positions = np.random.default_rng(4).permutation(everywhere(scan))[:200]
    positions = np.concatenate([positions, positions[:7]])  # some twice
    seen = np.zeros(len(positions), int)
    for rows, slab, local in slabs_at(scan, pattern, positions):
        seen[rows] += 1
        assert len(np.unique(positions[rows, 0])) == 1
        if pattern.widths[0] == 1:
            voxels = np.maximum(scan.hu[tuple(positions[rows].T)], -1024)
            np.testing.assert_array_equal(slab[(0, *local.T)], voxels)
    np.testing.assert_array_equal(seen, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_features_at_scattered_positions_are_those_of_the_whole_volume(
    pattern: Block, scan: GridVolume
) -> None:
    positions = np.random.default_rng(5).permutation(everywhere(scan))
    whole = levels_slab(scan, pattern, 0, scan.shape[0])
    reach = np.array(pattern.reach, np.int32)
    expected = naive.gather_features(whole, pattern.offsets, positions + reach)
    found = features_at(scan, pattern, positions)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_jittered_features_are_read_at_the_offsets_of_their_slice(scan: GridVolume) -> None:
    pattern = Block(3, slices=3)
    positions = np.random.default_rng(6).permutation(everywhere(scan))[:80]

    def jitter(k: int) -> np.ndarray:
        return pattern.offsets[:: -1 if k % 2 else 1]

    found = features_at(scan, pattern, positions, jitter)
    plain = features_at(scan, pattern, positions)
    odd = positions[:, 0] % 2 == 1
    np.testing.assert_array_equal(found[~odd], plain[~odd])
    np.testing.assert_array_equal(found[odd], plain[odd][:, ::-1])


def test_no_position_has_no_features(scan: GridVolume) -> None:
    none = np.empty((0, 3), np.int32)
    assert features_at(scan, Block(3), none).shape == (0, 9)
    assert list(slabs_at(scan, Block(3), none)) == []
