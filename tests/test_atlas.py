"""The atlas: a slow twin of what it adds up, scans it must find its way in, and its files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.atlas import VOXEL_MM, Atlas, Lattice, learned_atlas, rows_of
from organfast.grid import BlockGrid, GridVolume
from organfast.kernels.atlas import agreement
from organfast.workers import Workers

CLASSES = ClassTable.from_names(
    ["thorax_abdomen", "liver", "spleen", "kidney_right", "kidney_left", "urinary_bladder"]
)
BACKGROUND, CONTEXT, LIVER, SPLEEN, RIGHT, LEFT, BLADDER = range(7)
ORGANS = CLASSES.organs
GRID_MM = (4.0, 4.0, 4.0)
SHAPE = (150, 60, 90)  # 600 x 240 x 360 mm
# Middle and half axes, mm, of the body and of what is in it.
BODY = (300, 120, 180), (400, 100, 160)
INSIDE = {
    LIVER: ((400, 140, 250), (60, 60, 70)),
    SPLEEN: ((410, 90, 90), (50, 35, 30)),
    RIGHT: ((310, 80, 240), (50, 25, 25)),
    LEFT: ((325, 80, 120), (50, 25, 25)),
    BLADDER: ((90, 150, 180), (35, 30, 40)),
}


def person(
    stretch: tuple[float, ...] = (1, 1, 1), shift_mm: tuple[float, ...] = (0, 0, 0), seed: int = 0
) -> NDArray[np.uint8]:
    """A label map of a body; each organ lies some mm from where it usually does."""
    rng = np.random.default_rng(seed)
    mm = np.meshgrid(
        *[np.arange(n) * s for n, s in zip(SHAPE, GRID_MM, strict=True)], indexing="ij"
    )
    centre = np.array(BODY[0])

    def ellipsoid(middle: Any, half: Any) -> NDArray[np.bool_]:
        at = (np.array(middle) - centre) * stretch + centre + shift_mm
        parts = zip(mm, at, half, stretch, strict=True)
        inside: NDArray[np.bool_] = sum(((x - m) / (h * s)) ** 2 for x, m, h, s in parts) <= 1
        return inside

    labels = np.zeros(SHAPE, np.uint8)
    labels[ellipsoid(*BODY)] = CONTEXT
    for label, (middle, half) in INSIDE.items():
        moved = np.array(middle) + (rng.normal(0, 6, 3) if seed else 0)
        labels[ellipsoid(moved, half)] = label
    return labels


def lattice(labels: NDArray[np.uint8]) -> Lattice:
    return Lattice.of(labels, GRID_MM, rows_of(ORGANS, len(CLASSES)))


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    rng = np.random.default_rng(1)
    people = [
        person(tuple(rng.uniform(0.9, 1.1, 3)), tuple(rng.uniform(-20, 20, 3)), seed)
        for seed in range(1, 9)
    ]
    with Workers(2) as workers:
        found = learned_atlas([lattice(p) for p in people], len(ORGANS), workers)
    assert found is not None
    return found


def answers(labels: NDArray[np.uint8], blocks: BlockGrid, p: float = 0.8) -> NDArray[np.float32]:
    """What a classifier would say that is always right, and never certain."""
    at = labels[np.ix_(*blocks.centres)]
    rest = (1 - p) / (len(CLASSES) - 1)
    found = np.full((*at.shape, len(CLASSES)), rest, np.float32)
    np.put_along_axis(found, at[..., None].astype(np.intp), p, axis=-1)
    return found


def scan_of(labels: NDArray[np.uint8]) -> tuple[BlockGrid, GridVolume]:
    volume = GridVolume(np.zeros(labels.shape, np.int16), spacing_mm=GRID_MM)
    return BlockGrid(volume.shape, (2, 2, 2)), volume


# --- the kernel -----------------------------------------------------------------------------------


def test_agreement_is_that_of_one_point_after_the_other() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(5, 6, 7, 4)).astype(np.float32)
    beyond = rng.normal(size=4).astype(np.float32)
    points = rng.uniform(-20, 90, (500, 3)).astype(np.float32)
    labels, weights = rng.integers(-1, 6, 500), rng.random(500).astype(np.float32)
    scale, shift = np.array([0.1, 0.09, 0.11]), np.array([0.3, -1.0, 2.0])
    expected, n_inside = 0.0, 0
    for point, label, weight in zip(points, labels, weights, strict=True):
        if not 0 <= label < 4:
            continue
        at = [round(float(x)) for x in scale * point.astype(np.float64) + shift]
        is_inside = all(0 <= x < n for x, n in zip(at, logs.shape, strict=False))
        n_inside += is_inside
        expected += float(weight * (logs[(*at, label)] if is_inside else beyond[label]))
    assert 50 < n_inside < 450
    found = agreement(logs, beyond, points, labels, weights, scale, shift)
    assert found == pytest.approx(expected, rel=1e-5)


# --- where a scan lies ----------------------------------------------------------------------------


def middle_mm(labels: NDArray[np.uint8], label: int) -> NDArray[np.float64]:
    middle: NDArray[np.float64] = np.argwhere(labels == label).mean(axis=0) * GRID_MM
    return middle


def atlas_middle(atlas: Atlas, organ: int) -> NDArray[np.float64]:
    p = (atlas.shares[organ].astype(float) / 255) ** 2
    where = np.argwhere(p > 0)
    middle: NDArray[np.float64] = np.average(where, axis=0, weights=p[tuple(where.T)])
    return middle


@pytest.mark.parametrize("first", [0, 20, 45, 70])
@pytest.mark.parametrize("height", [150, 60, 30])
def test_a_part_of_a_body_is_found_in_it(atlas: Atlas, first: int, height: int) -> None:
    """A person never seen, larger and elsewhere; whole or a slab of 24 or 12 cm."""
    labels = person((1.08, 0.95, 1.05), (18, -10, 12), seed=77)
    slab = labels[first : first + height]
    shown = [n for n in ORGANS if (slab == n).sum() > 0.7 * (labels == n).sum()]
    blocks, volume = scan_of(slab)
    place = atlas.of_scan(answers(slab, blocks), blocks, volume, ORGANS)
    if not np.isin(slab, ORGANS).any():
        assert place is None
        return
    assert place is not None
    for label in shown:
        found = np.array(place.scale) * middle_mm(slab, label) + place.shift
        off = np.abs(found - atlas_middle(atlas, label - ORGANS[0])) * VOXEL_MM
        assert off.max() < 25, f"{CLASSES.names[label]} is {off} mm off"


def test_an_organ_where_none_can_be_goes_and_the_others_stay(atlas: Atlas) -> None:
    labels = person((0.95, 1.05, 1.0), (-15, 5, 8), seed=78)
    astray = {
        RIGHT: np.s_[20:28, 15:22, 52:60],  # in the pelvis
        BLADDER: np.s_[118:126, 25:35, 40:50],  # in the chest
        SPLEEN: np.s_[100:106, 25:35, 60:66],  # in the liver
    }
    wrong = labels.copy()
    for label, box in astray.items():
        wrong[box] = label
    blocks, volume = scan_of(labels)
    coarse = answers(wrong, blocks)
    before = coarse.copy()
    place = atlas.of_scan(coarse, blocks, volume, ORGANS)
    assert place is not None
    gone = atlas.rule_out(coarse, place, blocks, volume, ORGANS, CONTEXT)
    np.testing.assert_allclose(coarse.sum(axis=-1), before.sum(axis=-1), rtol=1e-5)
    best, true = coarse.argmax(axis=-1), labels[np.ix_(*blocks.centres)]
    is_astray = wrong[np.ix_(*blocks.centres)] != true
    assert is_astray.sum() > 60
    assert (best[is_astray] == CONTEXT).mean() > 0.95
    for label in ORGANS:
        kept = best[(true == label) & ~is_astray] == label
        assert kept.mean() > 0.98, CLASSES.names[label]
        assert gone[label] > 0.01 if label in astray else gone[label] < 0.01


def test_what_is_nobodys_place_keeps_a_little(atlas: Atlas) -> None:
    """Beyond the atlas nothing is certain either: an organ that is all there is can win."""
    labels = person()
    blocks, volume = scan_of(labels)
    place = atlas.of_scan(answers(labels, blocks), blocks, volume, ORGANS)
    assert place is not None
    far = replace(place, shift=tuple(s + 1000 for s in place.shift))
    coarse = answers(labels, blocks)
    gone = atlas.rule_out(coarse, far, blocks, volume, ORGANS, CONTEXT)
    assert all(share == pytest.approx(0.95, abs=1e-3) for share in gone.values())
    assert (coarse[..., LIVER] > 0).all()


def test_an_organ_that_few_of_the_scans_show_is_at_home_where_they_do(atlas: Atlas) -> None:
    """As one that one scan in a hundred labels."""
    shares = atlas.shares.copy()
    shares[0] = np.rint(shares[0] / 10)
    labels = person((1.0, 1.0, 1.0), (5, 5, 5), seed=79)
    blocks, volume = scan_of(labels)
    coarse = answers(labels, blocks)
    seldom = Atlas(shares)
    place = seldom.of_scan(coarse, blocks, volume, ORGANS)
    assert place is not None
    gone = seldom.rule_out(coarse, place, blocks, volume, ORGANS, CONTEXT)
    assert gone[LIVER] < 0.03


def test_a_scan_without_organs_is_nowhere(atlas: Atlas) -> None:
    labels = np.full((20, 20, 20), CONTEXT, np.uint8)
    blocks, volume = scan_of(labels)
    assert atlas.of_scan(answers(labels, blocks), blocks, volume, ORGANS) is None
    empty = np.zeros_like(labels)
    assert atlas.of_scan(answers(empty, blocks), blocks, volume, ORGANS) is None


# --- learning -------------------------------------------------------------------------------------


def test_one_scan_is_its_own_atlas() -> None:
    labels = person()
    with Workers(1) as workers:
        found = learned_atlas([lattice(labels)], len(ORGANS), workers)
    assert found is not None
    blocks, volume = scan_of(labels)
    place = found.of_scan(answers(labels, blocks), blocks, volume, ORGANS)
    assert place is not None
    np.testing.assert_allclose(place.stretch, 1, atol=0.04)
    for label in ORGANS:
        at = np.array(place.scale) * middle_mm(labels, label) + place.shift
        voxel = tuple(np.rint(at).astype(int))
        assert found.shares[(label - ORGANS[0], *voxel)] > 200


def test_it_does_not_depend_on_threads() -> None:
    people = [lattice(person(seed=n)) for n in range(1, 5)]
    shares = []
    for threads in (1, 3):
        with Workers(threads) as workers:
            found = learned_atlas(people, len(ORGANS), workers)
        assert found is not None
        shares.append(found.shares)
    np.testing.assert_array_equal(*shares)


def test_scans_without_organs_make_no_atlas() -> None:
    with Workers(1) as workers:
        empty = lattice(np.full((30, 20, 20), CONTEXT, np.uint8))
        assert learned_atlas([empty], len(ORGANS), workers) is None
        assert learned_atlas([], len(ORGANS), workers) is None


def test_a_lattice_takes_the_nearest_voxels() -> None:
    labels = np.random.default_rng(0).integers(0, 9, (11, 9, 30), np.uint8)
    rows = rows_of(ORGANS, len(CLASSES))
    found = Lattice.of(labels, (3.0, 2.5, 1.5), rows)
    for at in np.ndindex(found.labels.shape):
        mm = np.array(at) * VOXEL_MM
        voxel = tuple(
            min(round(x / s), n - 1)
            for x, s, n in zip(mm, (3, 2.5, 1.5), labels.shape, strict=True)
        )
        label = int(labels[voxel])
        assert found.labels[at] == (rows[label] if label < len(rows) else 0)
    points, of = found.points
    assert (of >= 0).all()
    assert len(points) == (found.labels > 0).sum()


# --- in a file ------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_it_comes_back_from_its_boxes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = np.zeros((rng.integers(1, 4), *rng.integers(1, 7, 3)), np.uint8)
    shares[rng.random(shares.shape) < rng.choice([0, 0.05, 0.5])] = 9
    header, content = Atlas(shares).packed
    np.testing.assert_array_equal(Atlas.unpacked(header, content).shares, shares)


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ([2, 3, 4], [[[0, 1]] * 3] * 2),
        ([0, 3, 4, 5], []),
        ([2, 3, 4, 1 << 40], [[[0, 1]] * 3] * 2),
        ([1, 3, 4, 5], [[[0, 1]] * 3] * 2),
        ([2, 3, 4, 5], [[[0, 4], [0, 1], [0, 1]], [[0, 1]] * 3]),
        ([2, 3, 4, 5], [[[-1, 1], [0, 1], [0, 1]], [[0, 1]] * 3]),
        ([2, 3, 4, 5], [[[2, 1], [0, 1], [0, 1]], [[0, 1]] * 3]),
        ([2, 3, 4, 5], [[[0, 1]] * 2] * 2),
        ([2, 3, 4, 5], [[[0, 2], [0, 1], [0, 1]], [[0, 2], [0, 1], [0, 1]]]),
        ([2, 3, 4, 5], [[[0, 1]] * 3, [[0, 0]] * 3]),
    ],
)
def test_boxes_that_do_not_fit_are_refused(shape: list[int], boxes: list[Any]) -> None:
    with pytest.raises(ValueError, match="atlas"):
        Atlas.unpacked({"shape": shape, "boxes": boxes}, np.ones(2, np.uint8))


@pytest.mark.parametrize(
    "shares", [np.zeros((2, 3, 4)), np.zeros((3, 4, 5), np.uint8), np.zeros((0, 3, 4, 5), np.uint8)]
)
def test_what_is_no_atlas_is_refused(shares: Any) -> None:
    with pytest.raises(ValueError, match="an atlas is a 4-D uint8 array"):
        Atlas(shares)
