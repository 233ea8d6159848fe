"""Adaptation: a slow twin of it, its laws, who abstains, and a scan whose organ it corrects."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from organfast import adaptation as module
from organfast.adaptation import Adapt, Adaptation, adapted_slabs, check_adapts
from organfast.anatomy import ClassTable
from organfast.grid import BlockGrid, GridVolume, ModelGrid, hu_lookup
from organfast.workers import Workers

CLASSES = ClassTable.from_names(["thorax_abdomen", "liver", "kidney_right", "kidney_left"])
BACKGROUND, CONTEXT, LIVER, RIGHT, LEFT = range(5)
USUAL_HU = np.array([-1000, -100, 110, 30, 40])
SHAPE, STRIDE = (37, 20, 23), (2, 3, 3)
PLAIN = Adapt(own_hu=False, radius=0, expected_dice=False)


# --- the slow twin: the whole volume, explicit means ----------------------------------------------


def naive_bins(volume: GridVolume) -> NDArray[np.int64]:
    """Three HU of soft tissue to a bin, from air on."""
    table = hu_lookup(volume.hu_table).astype(np.int64)
    units = volume.hu.astype(np.int64) if volume.table is None else table[volume.hu + 32768]
    wide = {"identity": 3, "piecewise": 24}[volume.hu_table]
    bins: NDArray[np.int64] = np.clip((units - table[-1024 + 32768]) // wide, 0, 511)
    return bins


def naive_mean(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Of the box around each voxel; beyond the volume its end voxels are repeated."""
    padded, side = np.pad(values, radius, mode="edge"), range(2 * radius + 1)
    n_k, n_i, n_j = values.shape
    parts = [padded[a : a + n_k, b : b + n_i, c : c + n_j] for a, b, c in product(side, repeat=3)]
    mean: NDArray[np.float64] = np.mean(parts, axis=0)
    return mean


def naive_enlarged(coarse: NDArray[np.floating], blocks: BlockGrid) -> NDArray[np.float64]:
    out = coarse.astype(np.float64)
    for axis, (n, centres) in enumerate(zip(blocks.volume_shape, blocks.centres, strict=True)):
        shape = [-1 if a == axis else 1 for a in range(out.ndim)]
        place = np.interp(np.arange(n), centres, np.arange(len(centres)))
        before = place.astype(np.int64)
        after, share = np.minimum(before + 1, len(centres) - 1), (place - before).reshape(shape)
        out = np.take(out, before, axis) * (1 - share) + np.take(out, after, axis) * share
    return out


def naive_adapted(
    coarse: NDArray[np.float32], blocks: BlockGrid, volume: GridVolume, adaptation: Adaptation
) -> NDArray[np.float64]:
    """(K, R, C, n_classes)."""
    is_there = (coarse >= 0.01) | (coarse == coarse.max(axis=-1, keepdims=True))
    weighed = np.where(is_there, coarse, 0) * gains(adaptation, coarse.shape)
    p = naive_enlarged(weighed, blocks)
    p *= np.moveaxis(adaptation.likelihood[:, naive_bins(volume)], 0, -1)
    p /= p.sum(axis=-1, keepdims=True)
    radius = adaptation.how.radius
    if radius:
        table = hu_lookup(volume.hu_table).astype(np.float64)
        hu = volume.hu if volume.table is None else table[volume.hu.astype(np.int64) + 32768]
        guide = hu / adaptation.how.edge_hu / {"identity": 1, "piecewise": 8}[volume.hu_table]
        mean = naive_mean(guide, radius)
        spread = naive_mean(guide**2, radius) - mean**2
        for label in range(p.shape[-1]):
            own = p[..., label]
            together = naive_mean(guide * own, radius) - mean * naive_mean(own, radius)
            slope = together / (spread + 1)
            rest = naive_mean(own, radius) - slope * mean
            p[..., label] = naive_mean(slope, radius) * guide + naive_mean(rest, radius)
    p = np.maximum(p, 0)
    p /= p.sum(axis=-1, keepdims=True)
    return p


def naive_counts(
    coarse: NDArray[np.float32], blocks: BlockGrid, volume: GridVolume, core: float
) -> NDArray[np.int64]:
    """(n_classes, 512): HU of sure positions, one position after the other."""
    counts, bins = np.zeros((coarse.shape[-1], 512), np.int64), naive_bins(volume)
    for at in np.ndindex(coarse.shape[:3]):
        label = int(coarse[at].argmax())
        if coarse[at][label] >= core:
            voxel = tuple(int(c[n]) for c, n in zip(blocks.centres, at, strict=True))
            counts[label, bins[voxel]] += 1
    return counts


def naive_weighed_up(
    coarse: NDArray[np.float32], blocks: BlockGrid, volume: GridVolume, found: Adaptation
) -> NDArray[np.float64]:
    """(n_k, n_i, n_j, n_classes): every threshold is tried, components grow voxel by voxel."""
    bins = naive_bins(volume)[np.ix_(*blocks.centres)]
    p = coarse * np.moveaxis(found.likelihood[:, bins], 0, -1)
    p = p / p.sum(axis=-1, keepdims=True)
    gain = np.ones(p.shape)
    for label in CLASSES.organs:
        own = p[..., label].astype(np.float64)
        likely = own[own >= 0.02]
        dice = [
            2 * likely[likely >= t].sum() / ((likely >= t).sum() + likely.sum()) for t in likely
        ]
        if not dice or max(dice) < 0.3:
            continue
        threshold = max(dice) / 2
        if 1 / threshold - 1 < 1.1:
            continue
        left = {tuple(at) for at in np.argwhere(own >= threshold).tolist()}
        parts = []
        while left:
            part = edge = {left.pop()}
            while edge:
                near = {
                    (k + a, i + b, j + c)
                    for k, i, j in edge
                    for a, b, c in product((-1, 0, 1), repeat=3)
                }
                edge = near & left
                part, left = part | edge, left - edge
            parts.append(part)
        won = [sum(own[at] >= 0.5 for at in part) for part in parts]
        mass = [sum(own[at] for at in part) for part in parts]
        most = parts[int(np.argmax(won if any(won) else mass))]
        for k, i, j in most:
            near = np.s_[max(0, k - 1) : k + 2, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            gain[(*near, label)] = min(1 / threshold - 1, 2)
    return gain


def gains(found: Adaptation, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The gain of every class at every position."""
    gain = np.ones(shape)
    for label, organ in found.weighed_up.items():
        gain[(*organ.box, label)][organ.belongs] = organ.gain
    return gain


# --- a scan and what a classifier said of it ------------------------------------------------------


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    rough = rng.normal(size=shape)
    return np.stack([naive_mean(rough[..., n], 2) for n in range(shape[-1])], axis=-1)


def world(
    table: str = "piecewise", seed: int = 0, *, is_applied: bool = True
) -> tuple[NDArray[np.float32], BlockGrid, GridVolume]:
    """Probabilities that come and go over the scan, many of them tiny; HU that roughly fit."""
    rng = np.random.default_rng(seed)
    blocks = BlockGrid(SHAPE, STRIDE)
    scores = 14 * smooth(rng, (*blocks.shape, 5)) + [0, 1, 0, 0, 0]
    for nowhere in (np.s_[:, :, 4:, LEFT], np.s_[:, :, :4, RIGHT], np.s_[:, 4:, :, LIVER]):
        scores[nowhere] -= 20
    scores[12:, ..., RIGHT] -= 20
    coarse = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    where = naive_enlarged(coarse, blocks).argmax(axis=-1)
    hu = np.rint(USUAL_HU[where] + rng.normal(0, 25, SHAPE)).astype(np.int16)
    hu[0, 0, :2] = [-3024, 3071]  # padding and metal
    lookup = hu_lookup(table)
    if is_applied:
        volume = GridVolume(lookup[hu.astype(np.int32) + 32768], hu_table=table)
    else:
        volume = GridVolume(hu, table=lookup, hu_table=table)
    return coarse.astype(np.float32), blocks, volume


World = tuple[NDArray[np.float32], BlockGrid, GridVolume]


def adapted(given: World, how: Adapt, threads: int = 1) -> NDArray[np.float32]:
    """(K, R, C, n_classes)."""
    found = Adaptation.of(*given, CLASSES, how)
    with Workers(threads) as workers:
        slabs = list(adapted_slabs(*given, found, workers))
    assert [n for n, _ in slabs] == list(range(given[2].shape[0]))
    for _, slab in slabs:
        assert slab.dtype == np.float32
        assert slab.flags.c_contiguous
    return np.stack([slab for _, slab in slabs])


# --- twins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["identity", "piecewise"])
@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("own_hu", [True, False])
def test_it_is_what_the_slow_twin_says(table: str, radius: int, own_hu: bool) -> None:
    given, how = world(table), Adapt(own_hu=own_hu, least_core=5, radius=radius)
    before = [a.copy() for a in (given[0], given[2].hu)]
    found = Adaptation.of(*given, CLASSES, how)
    assert bool(found.abstains[LIVER]) is not own_hu
    assert found.weighed_up
    expected = naive_weighed_up(*given, found)
    np.testing.assert_allclose(gains(found, given[0].shape), expected, rtol=1e-4)
    expected = naive_adapted(*given, found)
    np.testing.assert_allclose(adapted(given, how), expected, atol=2e-4)
    for array, copy in zip((given[0], given[2].hu), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("stride", [(1, 1, 1), (5, 2, 9), (80, 80, 80)])
def test_any_stride_is_as_the_twin_says(stride: tuple[int, int, int]) -> None:
    _, _, volume = world()
    blocks = BlockGrid(SHAPE, stride)
    rng = np.random.default_rng(3)
    coarse = rng.dirichlet([0.3] * 5, blocks.shape).astype(np.float32)
    how = Adapt(core=0.5, least_core=1, edge_hu=60)
    given = coarse, blocks, volume
    found = Adaptation.of(*given, CLASSES, how)
    np.testing.assert_allclose(adapted(given, how), naive_adapted(*given, found), atol=2e-4)


@pytest.mark.parametrize("table", ["identity", "piecewise"])
def test_a_class_looks_like_the_hu_of_its_core(table: str) -> None:
    """Counted position by position; each row is likelihoods, smooth and nowhere 0."""
    given, how = world(table), Adapt(least_core=5)
    found = Adaptation.of(*given, CLASSES, how)
    counts = naive_counts(*given, how.core)
    both = counts[RIGHT] + counts[LEFT]
    assert counts[[RIGHT, LEFT]].sum(axis=1).min() > 0
    assert found.n_core.tolist() == [
        counts[0].sum(), counts[1].sum(), counts[2].sum(), both.sum(), both.sum()
    ]  # fmt: skip
    np.testing.assert_allclose(found.likelihood.sum(axis=1), 1, atol=1e-5)
    assert found.likelihood.min() > 0.1 / 512 * 0.99
    offsets = np.arange(512)[:, None] - np.arange(512)
    # Two bins wide, as SciPy has it: cut off at four deviations.
    bell = np.exp(-0.5 * (offsets / 2.0) ** 2) * (abs(offsets) <= 8)
    for label, own in ((CONTEXT, counts[CONTEXT]), (LIVER, counts[LIVER]), (LEFT, both)):
        middle = own.copy()
        middle[[*range(10), *range(500, 512)]] = 0
        assert middle.sum() == own.sum()  # else the ends would count more
        dense = bell @ own / (bell @ own).sum()
        np.testing.assert_allclose(found.likelihood[label], 0.9 * dense + 0.1 / 512, atol=1e-6)


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Adapt(least_core=5), Adapt(least_core=5, radius=3), PLAIN])
def test_probabilities_are_probabilities(how: Adapt) -> None:
    found = adapted(world(seed=1), how)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)


def test_threads_change_nothing() -> None:
    given, how = world(), Adapt(least_core=5)
    np.testing.assert_array_equal(adapted(given, how, 3), adapted(given, how))


@pytest.mark.parametrize("n_slices", [1, 5, 100])
def test_nor_do_the_slices_that_are_corrected_together(
    n_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class may be met in one run of slices and not in the next: no seam shows between them."""
    given, how = world(), Adapt(least_core=5, radius=2)
    expected = adapted(given, how)
    monkeypatch.setattr(module, "_N_SLICES", n_slices)
    np.testing.assert_allclose(adapted(given, how), expected, atol=2e-5)


def test_with_nothing_to_correct_by_it_is_the_plain_enlargement() -> None:
    coarse, blocks, volume = world()
    coarse = np.where(coarse < 0.01, 0, coarse)  # which is not there
    coarse /= coarse.sum(axis=-1, keepdims=True)
    found = adapted((coarse, blocks, volume), PLAIN)
    for label in range(5):
        plain = naive_enlarged(coarse[..., label], blocks)
        np.testing.assert_allclose(found[..., label], plain, atol=1e-6)


def test_the_best_class_of_a_position_is_there_however_improbable() -> None:
    """Of more than a hundred classes all may be below a hundredth."""
    blocks = BlockGrid((6, 6, 6), (2, 2, 2))
    coarse = np.full((*blocks.shape, 121), 0.99 / 120, np.float32)
    coarse[..., 7] = 0.01 - 1e-4
    volume = GridVolume(np.zeros((6, 6, 6), np.int16))
    classes = ClassTable.from_names([f"organ_{n}" for n in range(119)])
    with Workers(1) as workers:
        how = Adaptation.of(coarse, blocks, volume, classes, Adapt())
        for _, slab in adapted_slabs(coarse, blocks, volume, how, workers):
            np.testing.assert_allclose(slab[..., 7], 1, atol=1e-6)


@pytest.mark.parametrize("table", ["identity", "piecewise"])
def test_a_table_still_to_be_applied_is_as_one_that_was(table: str) -> None:
    how = Adapt(least_core=5)
    before, after = (world(table, is_applied=is_applied) for is_applied in (False, True))
    np.testing.assert_array_equal(adapted(before, how), adapted(after, how))


# --- who abstains ---------------------------------------------------------------------------------


def test_a_small_core_abstains_and_is_as_likely_as_context() -> None:
    given = world()
    n_core = Adaptation.of(*given, CLASSES, Adapt()).n_core
    least = int(n_core[LIVER]) + 1
    found = Adaptation.of(*given, CLASSES, Adapt(least_core=least))
    assert found.abstains[LIVER]
    assert not Adaptation.of(*given, CLASSES, Adapt(least_core=least - 1)).abstains[LIVER]
    np.testing.assert_array_equal(found.likelihood[LIVER], found.likelihood[CONTEXT])
    assert not found.abstains[BACKGROUND]  # what surrounds the patient looks like itself


def test_a_small_kidney_looks_like_the_other_one() -> None:
    """Ten sure positions of one and a hundred of the other: both have a core of 110."""
    blocks = BlockGrid((10, 22, 23), (1, 1, 1))
    hu = np.full(blocks.volume_shape, -100, np.int16)
    coarse = np.zeros((*blocks.shape, 5), np.float32)
    coarse[..., CONTEXT] = 1
    for label, box, value in ((RIGHT, np.s_[:, 5:7, 3:8], 180), (LEFT, np.s_[:1, 5:7, 15:20], 60)):
        coarse[box], hu[box] = np.eye(5, dtype=np.float32)[label], value
    found = Adaptation.of(coarse, blocks, GridVolume(hu), CLASSES, Adapt(least_core=50))
    assert found.n_core[[RIGHT, LEFT]].tolist() == [110, 110]
    assert not found.abstains[[RIGHT, LEFT]].any()
    np.testing.assert_array_equal(found.likelihood[RIGHT], found.likelihood[LEFT])
    assert found.likelihood[LEFT].argmax() == (180 + 1024) // 3


def test_the_record_is_json_and_says_who_was_adapted() -> None:
    given = world()
    found = Adaptation.of(*given, CLASSES, Adapt(least_core=5))
    record = json.loads(json.dumps(found.record(CLASSES)))
    kidneys = int(found.n_core[LEFT])
    assert record == {
        "own_hu": True, "core": 0.7, "least_core": 5, "radius": 1, "edge_hu": 20.0,
        "expected_dice": True, "atlas": True,
        "core_positions": {
            "liver": int(found.n_core[LIVER]), "kidney_right": kidneys, "kidney_left": kidneys
        },
        "abstained": [],
        "weighed_up": {
            CLASSES.names[n]: round(float(o.gain), 2) for n, o in found.weighed_up.items()
        },
    }  # fmt: skip
    nobody = Adaptation.of(*given, CLASSES, PLAIN).record(CLASSES)
    assert nobody["core_positions"] == nobody["weighed_up"] == {}
    assert nobody["abstained"] == ["liver", "kidney_right", "kidney_left"]


# --- who is weighed up ----------------------------------------------------------------------------


def one_organ(p: NDArray[np.float64]) -> World:
    """Positions in a row, each a voxel: liver with these probabilities, else context."""
    blocks = BlockGrid((1, 1, len(p)), (1, 1, 1))
    coarse = np.zeros((*blocks.shape, 5), np.float32)
    coarse[0, 0, :, LIVER], coarse[0, 0, :, CONTEXT] = p, 1 - p
    return coarse, blocks, GridVolume(np.zeros((1, 1, len(p)), np.int16))


@pytest.mark.parametrize("seed", range(5))
def test_the_voxels_an_organ_wins_have_the_greatest_expected_dice_of_all_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = np.sort(rng.uniform(0.35, 0.75, 10))
    given = one_organ(p)
    won = adapted(given, replace(PLAIN, expected_dice=True))[0, 0, :, LIVER] > 0.5
    sets = np.array(list(product([False, True], repeat=10)))
    expected = 2 * (sets * p).sum(axis=1) / (sets.sum(axis=1) + p.sum())
    best = sets[expected.argmax()]
    mine = 2 * p[won].sum() / (won.sum() + p.sum())
    assert mine == pytest.approx(expected.max(), rel=0.01)
    assert best.sum() - 1 <= won.sum() <= best.sum() + 1
    assert mine >= 2 * p[p > 0.5].sum() / ((p > 0.5).sum() + p.sum())


def test_an_organ_that_is_sure_and_one_out_of_view_are_not_weighed_up() -> None:
    how = replace(PLAIN, expected_dice=True)
    sure = one_organ(np.repeat([0.99, 0.001], 200))
    assert not Adaptation.of(*sure, CLASSES, how).weighed_up
    nowhere = one_organ(np.full(400, 0.08))
    assert not Adaptation.of(*nowhere, CLASSES, how).weighed_up
    doubtful = one_organ(np.repeat([0.4, 0.001], 200))
    assert Adaptation.of(*doubtful, CLASSES, how).weighed_up[LIVER].gain == 2
    assert not Adaptation.of(*doubtful, CLASSES, PLAIN).weighed_up


def test_it_is_weighed_up_where_most_of_it_lies_and_not_elsewhere() -> None:
    """A large part that is doubtful and a small one, surer, away from it."""
    p = np.repeat([0.4, 0.0, 0.45, 0.0], [60, 20, 10, 10])
    given = one_organ(p)
    how = replace(PLAIN, expected_dice=True)
    organ = Adaptation.of(*given, CLASSES, how).weighed_up[LIVER]
    assert organ.box == (slice(0, 1), slice(0, 1), slice(0, 61))
    assert organ.belongs.all()
    found = adapted(given, how)[0, 0, :, LIVER]
    assert (found[:60] > 0.5).all()
    np.testing.assert_allclose(found[60:], p[60:], atol=1e-6)
    p[80:90] = 0.55  # where it wins it is, however much there is elsewhere
    organ = Adaptation.of(*one_organ(p), CLASSES, how).weighed_up[LIVER]
    assert organ.box[2] == slice(79, 91)


# --- what it is for -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [Adapt(), Adapt(radius=0)])
def test_an_organ_that_was_drawn_too_large_comes_nearer_to_its_edge(how: Adapt) -> None:
    """A liver of HU that no other has, in fat; the classifier drew it larger by a position."""
    shape, stride = (30, 40, 40), 2
    grids = np.ogrid[tuple(slice(0, n) for n in shape)]
    away = np.sqrt(sum((g - (n - 1) / 2) ** 2 for g, n in zip(grids, shape, strict=True)))
    truth = away < 9
    noise = np.random.default_rng(0).normal(0, 15, shape)
    hu = np.rint(np.where(truth, 45, -100) + noise).astype(np.int16)
    blocks = BlockGrid(shape, (stride,) * 3)
    drawn = 9 + stride - away[np.ix_(*blocks.centres)]
    inside = np.clip(drawn / (3 * stride) + 0.5, 0, 1)
    coarse = np.zeros((*blocks.shape, 5), np.float32)
    coarse[..., LIVER], coarse[..., CONTEXT] = inside, 1 - inside
    given = coarse, blocks, GridVolume(hu)

    def dice(one: Adapt) -> float:
        found = adapted(given, one).argmax(axis=-1) == LIVER
        return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))

    assert dice(PLAIN) < 0.8
    assert dice(how) > 0.95


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"own_hu": 1}, "own_hu is 1"),
        ({"expected_dice": None}, "expected_dice is None"),
        ({"core": 0}, "core is 0"),
        ({"core": 1.1}, r"core is 1\.1"),
        ({"core": float("nan")}, "core is nan"),
        ({"least_core": 0}, "least_core is 0"),
        ({"least_core": 2.5}, r"least_core is 2\.5"),
        ({"radius": -1}, "radius is -1"),
        ({"radius": 9}, "radius is 9"),
        ({"radius": True}, "radius is True"),
        ({"edge_hu": 0.5}, r"edge_hu is 0\.5"),
        ({"edge_hu": float("inf")}, "edge_hu is inf"),
    ],
)
def test_numbers_out_of_range_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words}; give"):
        replace(Adapt(), **wrong)


def test_nothing_is_adapted_on_a_scan_s_own_pixels() -> None:
    check_adapts(ModelGrid((3.0, 3.0, 3.0)))
    with pytest.raises(ValueError, match=r"needs a model with a working grid, .*; leave adapt off"):
        check_adapts(ModelGrid(None))
