"""The atlas: slow twins of what it counts and looks up, scans that must find their place, files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from organfast import atlaslearning
from organfast.anatomy import ClassTable
from organfast.atlas import MOST_SIDE, VOXEL_MM, Atlas, Place, _Fit
from organfast.atlaslearning import Lattice, learned_atlas, rows_of
from organfast.grid import BlockGrid, GridVolume
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


# --- how well it fits ----------------------------------------------------------------------------


def test_the_score_is_that_of_one_point_after_the_other() -> None:
    rng = np.random.default_rng(0)
    shares = rng.integers(0, 128, (3, 7, 8, 6), np.uint8)
    points = rng.uniform(-10, 60, (500, 3)).astype(np.float32)
    points[:5] = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30])[:, None]
    rows, weights = rng.integers(0, 4, 500), rng.random(500).astype(np.float32)
    middle, how = np.array([20.0, 25.0, 30.0]), np.array([0.1, -0.05, 0.2, 25.0, 30.0, 20.0])
    fit = _Fit(Atlas(shares), points, rows, weights, middle, middle)
    total, n_inside = 0.0, 0
    for n, (point, row, weight) in enumerate(zip(points, rows, weights, strict=True)):
        mm = np.exp(how[:3]) * (point.astype(float) - middle) + how[3:]
        at = [-1] * 3 if n < 5 else [round(float(x) / VOXEL_MM) for x in mm]
        is_inside = all(0 <= x < m for x, m in zip(at, shares.shape[1:], strict=True))
        n_inside += is_inside
        p = 0.002 if row < 3 else 0.9
        if is_inside:
            share = (shares[(slice(None), *at)] / 255.0) ** 2
            p = 0.002 + (share[row] if row < 3 else max(0, 1 - share.sum()))
        total += float(weight) * np.log(p)
    assert 50 < n_inside < 450
    expected = total / weights.sum() - 0.02 * (how[:3] ** 2).sum() / 0.15**2
    assert fit.score(how) == pytest.approx(expected, abs=0.01)  # no organ is told in 255 steps


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
    assert shown or height == 30
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


def test_a_long_scan_of_which_few_organs_are_known_finds_its_place(atlas: Atlas) -> None:
    """Legs for 80 cm below the trunk; of the atlas the kidneys alone."""
    labels = person((1.05, 1.0, 0.97), (10, 8, -6), seed=80)
    legs = np.zeros((200, *SHAPE[1:]), np.uint8)
    legs[:, 20:40, 25:65] = CONTEXT
    long = np.concatenate([legs, labels])
    kidneys = [RIGHT, LEFT]
    known = Atlas(np.ascontiguousarray(atlas.shares[[n - ORGANS[0] for n in kidneys]]))
    others = np.where(np.isin(long, [*kidneys, BACKGROUND]), long, CONTEXT)
    blocks, volume = scan_of(long)
    coarse = answers(others, blocks)
    place = known.of_scan(coarse, blocks, volume, kidneys)
    assert place is not None
    assert max(known.rule_out(coarse, place, blocks, volume, kidneys, CONTEXT).values()) < 0.02


def test_beyond_the_atlas_nineteen_parts_of_twenty_go(atlas: Atlas) -> None:
    blocks, volume = scan_of(person())
    coarse = np.zeros((*blocks.shape, len(CLASSES)), np.float32)
    coarse[..., LIVER], coarse[..., SPLEEN] = 0.9, 0.1
    far = Place((1 / VOXEL_MM,) * 3, (1000.0,) * 3)
    gone = atlas.rule_out(coarse, far, blocks, volume, ORGANS, CONTEXT)
    assert gone[LIVER] == pytest.approx(0.95)
    np.testing.assert_allclose(coarse[..., LIVER], 0.045, rtol=1e-5)
    np.testing.assert_allclose(coarse[..., CONTEXT], 0.95, rtol=1e-5)


@pytest.mark.parametrize("peak", [255, 25, 8])
def test_where_an_organ_is_at_home_is_what_the_whole_volume_says(peak: int) -> None:
    """A twin without boxes: room of a voxel around each, blurred, looked up one by one."""
    rng = np.random.default_rng(peak)
    shares = np.zeros((3, 30, 26, 28), np.uint8)
    shares[0, 3:9, 20:26, 0:5] = rng.integers(1, peak + 1, (6, 6, 5))
    shares[1, 12:15, 10:14, 11:19] = peak
    blocks = BlockGrid((60, 50, 70), (2, 3, 4))
    volume = GridVolume(np.zeros((60, 50, 70), np.int16), spacing_mm=(4.0, 5.0, 3.5))
    place = Place((0.13, 0.12, 0.125), (-2.0, -1.0, 0.4))
    coarse = rng.random((*blocks.shape, 5)).astype(np.float32)
    expected = coarse.astype(np.float64)
    for organ, label in enumerate((4, 1, 2)):
        p = np.pad((shares[organ] / 255.0) ** 2, 60)
        room = ndimage.gaussian_filter(ndimage.maximum_filter(p, 3), 1.0)
        full = min(0.02, 0.1 * room.max())
        for at in np.ndindex(blocks.shape):
            mm = [c[n] * s for c, n, s in zip(blocks.centres, at, volume.spacing_mm, strict=True)]
            voxel = [round(m * s + t) for m, s, t in zip(mm, place.scale, place.shift, strict=True)]
            home = 1.0 if organ == 2 else room[tuple(v + 60 for v in voxel)] / full
            kept = expected[(*at, label)] * min(max(home, 0.05), 1)
            expected[(*at, 0)] += expected[(*at, label)] - kept
            expected[(*at, label)] = kept
    Atlas(shares).rule_out(coarse, place, blocks, volume, (4, 1, 2), 0)
    np.testing.assert_allclose(coarse, expected, rtol=1e-4)


def test_an_organ_that_few_of_the_scans_show_is_at_home_where_they_do() -> None:
    """One labelled spleen among two hundred scans, far below the others."""
    usual = person()
    usual[usual == SPLEEN] = CONTEXT
    astray = usual.copy()
    astray[8:20, 20:35, 30:50] = SPLEEN
    as_it_lies = Place((1 / VOXEL_MM,) * 3, (0.0,) * 3)
    placed = [(one, as_it_lies) for one in (lattice(astray), *[lattice(usual)] * 199)]
    found = atlaslearning._Sums.of(placed, len(ORGANS)).atlas()
    blocks, volume = scan_of(astray)
    coarse = answers(astray, blocks)
    place = found.of_scan(coarse, blocks, volume, ORGANS)
    assert place is not None
    gone = found.rule_out(coarse, place, blocks, volume, ORGANS, CONTEXT)
    assert gone[SPLEEN] < 0.1


def test_an_organ_that_no_scan_shows_may_be_anywhere(atlas: Atlas) -> None:
    shares = atlas.shares.copy()
    shares[0] = 0
    labels = person()
    blocks, volume = scan_of(labels)
    coarse = answers(labels, blocks)
    unknown = Atlas(shares)
    place = unknown.of_scan(coarse, blocks, volume, ORGANS)
    assert place is not None
    gone = unknown.rule_out(coarse, place, blocks, volume, ORGANS, CONTEXT)
    assert gone[LIVER] == 0
    only_liver = np.where(np.isin(labels, ORGANS), LIVER, labels)
    assert unknown.of_scan(answers(only_liver, blocks), blocks, volume, ORGANS) is None


def test_arrays_that_do_not_fit_are_refused(atlas: Atlas) -> None:
    points, rows = np.zeros((5, 3), np.float32), np.zeros(5, np.int64)
    ones = np.ones(5, np.float32)
    for wrong in ((points[:, :2], rows, ones), (points, rows[:4], ones), (points, rows, ones[:4])):
        with pytest.raises(ValueError, match="do not fit"):
            atlas.place(*wrong)
    for row in (-1, len(ORGANS) + 1):
        with pytest.raises(ValueError, match="rows are"):
            atlas.place(points, np.full(5, row), ones)


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


def test_scans_are_counted_where_they_lie() -> None:
    """A twin that asks each voxel of the sums which voxel of which scan lies there."""
    rng = np.random.default_rng(3)
    placed = []
    for shift in ((0.0, 0.0, 0.0), (2.4, -3.3, 1.2), (-4.0, 1.0, 0.0)):
        labels = rng.integers(0, 4, (6, 7, 5)).astype(np.uint16)
        scale = tuple(rng.uniform(0.11, 0.14, 3).tolist())
        placed.append((Lattice(labels), Place(scale, shift)))
    sums = atlaslearning._Sums.of(placed, 2)
    corners = [atlaslearning._corners(*one, 2) for one in placed]
    low = np.min([c[0] for c in corners if c is not None], axis=0)
    organs, body, covered = (np.zeros_like(x) for x in (sums.organs, sums.body, sums.covered))
    for at in np.ndindex(covered.shape):
        for x, place in placed:
            mm = (np.array(at) + low - place.shift) / place.scale
            voxel = np.rint(mm / VOXEL_MM).astype(int)
            if (voxel < 0).any() or (voxel >= x.labels.shape).any():
                continue
            label = int(x.labels[tuple(voxel)])
            covered[at] += 1
            body[at] += label > 0
            if label in (1, 2):
                organs[(label - 1, *at)] += 1
    for found, expected in ((sums.organs, organs), (sums.body, body), (sums.covered, covered)):
        np.testing.assert_array_equal(found, expected)
    n_of_2 = sum(int((x.labels == 2).sum()) for x, _ in placed)
    assert sums.organs[1].sum() == pytest.approx(n_of_2, rel=0.5)


def test_a_crowd_of_organs_and_a_long_body_stay_within_an_atlas() -> None:
    labels = np.zeros((300, 40, 40), np.uint16)
    labels[:, 5:35, 5:35] = 300
    for n in range(1, 250):
        labels[n : n + 3, 10:13, 10:13] = n
    with Workers(2) as workers:
        found = learned_atlas([Lattice(labels)], 250, workers)
    assert found is not None
    assert (found.shares.reshape(250, -1).max(axis=1) > 0).sum() == 249


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
        ([2, MOST_SIDE + 1, 1, 1], [[[0, 1]] * 3] * 2),
        ([1 << 20, 20, 20, 20], [[[0, 1]] * 3] * (1 << 20)),
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
