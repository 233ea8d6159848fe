"""Painting: twins of the kernels, what a painted scan looks like, made-up bodies, determinism."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from organfast.anatomy import totalsegmentator_names
from organfast.kernels import painting as kernel
from organfast.kernels import phantom as phantom_kernel
from organfast.nifti import read_labels
from organfast.painting import (
    PHASES,
    TISSUES,
    LabelMap,
    Protocol,
    hu_range,
    in_slabs,
    paint,
    texture_tile,
    tissue_of,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTURE = texture_tile(3, 16)


def _blobs(shape: tuple[int, int, int], n: int, seed: int = 0) -> np.ndarray:
    """Tissue numbers 0..n-1 in cubes."""
    coarse = np.random.default_rng(seed).integers(0, n, [s // 3 + 1 for s in shape])
    blobs = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    return np.ascontiguousarray(blobs[: shape[0], : shape[1], : shape[2]].astype(np.uint8))


def _box(names: dict[int, str], shape: tuple[int, int, int] = (40, 40, 12)) -> LabelMap:
    """A body of skin and muscle with side-by-side cuboids of the named tissues in it."""
    labels = np.zeros(shape, np.uint8)
    labels[2:-2, 2:-2] = 200
    labels[4:-4, 4:-4] = 201
    columns = np.linspace(6, shape[0] - 6, len(names) + 1).astype(int)
    for label, low, high in zip(names, columns[:-1], columns[1:], strict=True):
        labels[low:high, 6:-6] = label
    return LabelMap(
        labels, np.diag([1.0, 1.0, 3.0, 1.0]), {**names, 200: "skin", 201: "muscle_of_the_wall"}
    )


# --- twins ----------------------------------------------------------------------------------------


@given(st.tuples(*[st.floats(-50, 50)] * 3))
@settings(max_examples=40, deadline=None)
def test_sample_texture_equals_its_twin(at: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(
        kernel.sample_texture(TEXTURE, *at), naive.sample_texture(TEXTURE, *at), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (6, 1, 4), (5, 22, 25)])
@pytest.mark.parametrize("layout", ["c", "f", "flipped"])
def test_tissue_depth_equals_its_twin(shape: tuple[int, int, int], layout: str) -> None:
    tissue = _blobs(shape, 3)
    if min(shape) == 5:
        tissue[2:] = 1
        tissue[2:, 10, 12] = 2  # around a lone voxel, distances run along diagonals
    if layout == "f":
        tissue = np.asfortranarray(tissue)
    elif layout == "flipped":
        tissue = tissue[::-1, :, ::-1]
    tissue.flags.writeable = False
    steps = np.array([12, 3, 4, 5])
    out = np.empty(shape, np.uint8)
    kernel.tissue_depth(tissue, steps, out)
    np.testing.assert_array_equal(out, naive.tissue_depth(tissue, steps))


def test_depth_counts_from_the_nearest_other_tissue_and_saturates() -> None:
    tissue = np.ones((1, 3, 60), np.uint8)
    tissue[0, :, 30:] = 2
    out = np.empty_like(tissue)
    kernel.tissue_depth(tissue, np.array([9, 9, 10, 13]), out)
    np.testing.assert_array_equal(out[0, 1, 30:33], [10, 20, 30])
    np.testing.assert_array_equal(out[0, 1, 27:30], [30, 20, 10])
    assert out.max() == 255


def test_lumen_ceiling_equals_its_twin() -> None:
    tissue = _blobs((4, 9, 8), 5, seed=2)
    hollow = np.full(256, -1)
    hollow[[2, 4]] = 0, 1
    out = np.empty((2, 4, 8), np.int16)
    kernel.lumen_ceiling(tissue, hollow, out)
    np.testing.assert_array_equal(out, naive.lumen_ceiling(tissue, hollow, 2))


def _table(random: np.random.Generator, n: int) -> np.ndarray:
    """A table of tissues that uses every column."""
    table = np.zeros((n, kernel.N_COLUMNS), np.float32)
    table[:, kernel.CORE_HU] = random.uniform(-100, 300, n)
    table[:, kernel.PATCH_HU], table[:, kernel.PATCH_MM] = 12, 7
    table[:, kernel.SHELL_HU], table[:, kernel.SHELL_MM] = 500, random.uniform(0, 2, n)
    table[:, kernel.INNER_HU], table[:, kernel.INNER_MM] = -40, [0, 2.6] * (n // 2)
    table[:, kernel.VESSEL_HU], table[:, kernel.VESSEL_MM] = 150, 9
    table[:, kernel.VESSEL_WIDTH] = random.uniform(0.3, 0.8, n)
    table[:, kernel.VESSEL_DEEP_MM] = [0, 3] * (n // 2)
    table[:, kernel.BUBBLES], table[:, kernel.FALL_HU] = [0, 0.8] * (n // 2), 0.3
    return table


def test_paint_slice_equals_its_twin() -> None:
    random = np.random.default_rng(5)
    tissue = _blobs((5, 20, 18), 4, seed=4)
    steps = np.array([2.0, 0.9, 1.1])
    depth = np.empty_like(tissue)
    kernel.tissue_depth(tissue, np.array([8, 4, 4, 6]), depth)
    table = _table(random, 4)
    hollow = np.full(256, -1)
    hollow[3] = 0
    levels = random.uniform(0, 20, (1, 18)).astype(np.float32)
    out = np.empty((20, 18), np.float32)
    kernel.paint_slice(tissue[2], depth[2], 2, steps, table, hollow, levels, TEXTURE, out)
    twin = naive.paint_slice(tissue[2], depth[2], 2, steps, table, hollow, levels, TEXTURE)
    assert len(np.unique(np.round(twin))) > 10
    np.testing.assert_allclose(out, twin, atol=2e-2)


@pytest.mark.parametrize("n_taps", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (8, 5)])
def test_blurs_equal_their_twin(n_taps: int, shape: tuple[int, int]) -> None:
    source = np.random.default_rng(1).normal(0, 50, shape).astype(np.float32)
    taps = np.array([0.4, 0.2, 0.07, 0.03], np.float32)[:n_taps]
    out = np.empty(shape, np.float32)
    kernel.blur_rows(source, taps, out)
    if n_taps <= shape[0]:
        np.testing.assert_allclose(out, naive.blur_rows(source, taps), atol=1e-3)
    kernel.blur_columns(source, taps, out)
    if n_taps <= shape[1]:
        np.testing.assert_allclose(out, naive.blur_rows(source.T, taps).T, atol=1e-3)


@pytest.mark.parametrize("circle", [0.0, 5.5])
def test_finish_slice_equals_its_twin(circle: float) -> None:
    random = np.random.default_rng(8)
    base = random.uniform(-1200, 3300, (13, 11)).astype(np.float32)
    tiles = random.normal(0, 1, (3, 16, 16)).astype(np.float32)
    noise = (
        np.array([11, 14], np.float32),
        np.array([0, 4], np.float32),
        random.integers(0, 512, (2, 6)),
        np.array([[6, 5, 5], [5, 6, 4]], np.float32),
    )
    out = np.empty(base.shape, np.int16)
    kernel.finish_slice(base, 1, noise, tiles, circle, out)
    difference = out.astype(int) - naive.finish_slice(base, 1, noise, tiles, circle)
    assert np.abs(difference).max() <= 1  # float32 sums round the other way now and then
    assert (difference != 0).mean() < 0.03


def test_paint_slices_equals_its_twin() -> None:
    random = np.random.default_rng(6)
    tissue = _blobs((5, 20, 18), 4, seed=4)
    steps = np.array([2.0, 0.9, 1.1])
    depth = np.empty_like(tissue)
    kernel.tissue_depth(tissue, np.array([8, 4, 4, 6]), depth)
    hollow = np.full(256, -1)
    hollow[3] = 0
    noise = (
        np.arange(3, 8, dtype=np.float32),
        np.array([0, 4, 0, 2, 1], np.float32),
        random.integers(0, 512, (5, 6)),
        random.uniform(6, 12, (5, 3)).astype(np.float32),
    )
    taps = np.array([0.6, 0.15, 0.05], np.float32)
    tiles = random.normal(0, 1, (3, 32, 32)).astype(np.float32)
    scanner = (steps, np.zeros(5), taps, taps[:1] + np.float32(0.4), 0.2, noise, tiles, 0.0)
    levels = random.uniform(0, 20, (1, 5, 18)).astype(np.float32)
    maps, look = (tissue, depth, levels), (_table(random, 4), hollow, TEXTURE)
    twin = naive.paint_slices(maps, look, scanner)
    for low, high in ((0, 5), (0, 2), (2, 3), (3, 5)):
        out = np.empty((high - low, 20, 18), np.int16)
        scratch = np.full((5, 20, 18), np.nan, np.float32)
        kernel.paint_slices(out, low, maps, look, scanner, scratch)
        assert np.abs(out.astype(int) - twin[low:high]).max() <= 1


def test_outermost_and_fill_gaps_equal_their_twins() -> None:
    tissue = _blobs((6, 17, 15), 3, seed=9)
    wanted = np.zeros(256, np.uint8)
    wanted[2] = 1
    axis = np.random.default_rng(0).uniform(6, 9, (6, 2))
    steps = np.array([3.0, 1.0, 1.2])
    out = np.empty((6, 12), np.float32)
    phantom_kernel.outermost(tissue, wanted, axis, steps, out)
    twin = naive.outermost(tissue, wanted, axis, steps, 12)
    np.testing.assert_allclose(out, twin, atol=1e-4)
    column = np.array([1, 0, 0, 1, 2, 0, 1, 0, 0, 0, 1, 0], np.uint8)[:, None, None]
    filled = np.ascontiguousarray(column)
    phantom_kernel.fill_gaps(filled, 2, 1, 7)
    np.testing.assert_array_equal(filled, naive.fill_gaps(column, 2, 1, 7))
    np.testing.assert_array_equal(filled.ravel(), [1, 7, 7, 1, 2, 7, 1, 0, 0, 0, 1, 0])


# --- what is painted ------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_means_lie_in_the_documented_ranges(phase: str) -> None:
    names = {1: "liver", 2: "spleen", 3: "aorta", 4: "adrenal_gland_left", 5: "thyroid_gland"}
    box = _box(names, (90, 40, 12))
    for seed in range(3):
        protocol = Protocol(phase=phase, noise_hu=6.0)
        scan = paint(box, seed, protocol)
        for label, name in names.items():
            columns = np.flatnonzero((box.labels == label).any((1, 2)))[3:-3]
            low, high = hu_range(tissue_of(name), phase)
            assert low - 4 <= np.median(scan.hu[columns, 10:30]) <= high + 4, (seed, name)


def test_neighbours_overlap_between_patients() -> None:
    # A threshold on HU alone must not tell them apart.
    for phase in PHASES:
        for one, other in (
            ("liver", "spleen"),
            ("muscle", "stomach"),
            ("pancreas", "adrenal"),
            ("small_bowel", "gallbladder"),
        ):
            (a, b), (c, d) = hu_range(one, phase), hu_range(other, phase)
            assert max(a, c) < min(b, d) + 12, (phase, one, other)


def test_air_is_air_and_noise_has_the_protocols_deviation() -> None:
    box = _box({1: "liver"}, (160, 160, 6))
    scan = paint(box, 4, Protocol(noise_hu=15.0, couch=False))
    assert np.median(scan.hu[0, 0]) < -950
    # The liver's own texture adds a few HU, narrow bodies get less noise than wide ones.
    core = scan.hu[40:120, 60:100].astype(float)
    assert 6 < core.std() < 20
    assert 0.2 < np.corrcoef(core[:-1].ravel(), core[1:].ravel())[0, 1] < 0.9
    assert abs(np.corrcoef(core[..., 1].ravel(), core[..., 3].ravel())[0, 1]) < 0.2


def test_the_couch_lies_behind_the_patient_and_the_circle_cuts() -> None:
    box = _box({1: "liver"}, (120, 120, 4))
    labels = np.zeros_like(box.labels)
    labels[:, 40:100] = box.labels[:, 30:90]
    box = LabelMap(labels, box.affine, box.names)
    with_couch = paint(box, 1, Protocol(couch=True)).hu
    without = paint(box, 1, Protocol(couch=False)).hu
    differs = np.flatnonzero((with_couch != without).any((0, 2)))
    assert differs.size
    assert differs.max() < 54  # the mattress rises a little beside the back, which is at 42
    cut = paint(box, 1, Protocol(circle=True)).hu
    np.testing.assert_array_equal(cut[0, 0], -1024)
    np.testing.assert_array_equal(cut[-1, -1], -1024)


def test_beds_differ_and_are_as_bent_as_their_names() -> None:
    labels = np.zeros((200, 150, 3), np.uint8)
    labels[60:140, 60:120] = 1
    box = LabelMap(labels, np.diag([2.0, 2.0, 4.0, 1.0]), {1: "skin"})

    def rise(bed: str) -> float:
        hu = paint(box, 3, Protocol(noise_hu=1.0, bed=bed)).hu[..., 1]  # type: ignore[arg-type]
        shell = np.where((hu > -600) & (labels[..., 1] == 0), np.arange(150), -1).max(axis=1)
        rows = shell[shell >= 0]
        return float(np.ptp(rows))

    assert rise("flat") <= 1
    assert rise("flat") < rise("curved") < rise("cradle")


def test_cushions_look_like_lung_and_lie_behind_the_patient() -> None:
    labels = np.zeros((200, 150, 8), np.uint8)
    labels[60:140, 60:120] = 1
    box = LabelMap(labels, np.diag([2.0, 2.0, 4.0, 1.0]), {1: "skin"})
    plain = Protocol(noise_hu=1.0, couch=False)
    seen = []
    for seed in range(6):
        wrapped = paint(box, seed, replace(plain, bedding=True)).hu
        changed = (wrapped != paint(box, seed, plain).hu) & (labels == 0)
        foam = changed & (wrapped > -960) & (wrapped < -820)
        seen.append(int(foam.sum()))
        if seen[-1] > 5000:
            assert np.nonzero(foam)[1].mean() < 80
    assert max(seen) > 5000


def test_gas_lies_in_front_of_the_fluid() -> None:
    labels = np.full((60, 80, 6), 2, np.uint8)
    labels[10:50, 15:65] = 1
    names = {1: "stomach", 2: "skin"}
    seen = 0
    for seed in range(6):
        hu = paint(LabelMap(labels, np.diag([1.0, 1.0, 4.0, 1.0]), names), seed).hu[14:46, 19:61]
        gas = hu < -600
        if 0.02 < gas.mean() < 0.98:
            seen += 1
            rows = np.broadcast_to(np.arange(gas.shape[1])[None, :, None], gas.shape)
            assert rows[gas].mean() > rows[~gas].mean() + 5
    assert seen >= 2


def test_bone_has_a_cortex() -> None:
    box = _box({1: "femur_left", 2: "urinary_bladder"}, (70, 40, 6))
    hu = paint(box, 2, Protocol(noise_hu=1.0)).hu.astype(float)
    bone = np.flatnonzero((box.labels[:, 20, 3]) == 1)
    assert (
        hu[bone[1], 20, 3] > hu[bone[len(bone) // 2 - 2 : len(bone) // 2 + 2], 20, 3].mean() + 200
    )


def test_every_structure_of_totalsegmentator_has_a_tissue_of_its_kind() -> None:
    found = {name: tissue_of(name) for name in totalsegmentator_names().values()}
    assert "soft" not in found.values()
    assert set(found.values()) <= set(TISSUES)
    assert found["pulmonary_vein"] == "pulmonary"
    assert found["gluteus_maximus_left"] == "muscle"
    assert found["kidney_cyst_left"] == "bladder"
    assert tissue_of("something_new") == "soft"


def test_every_column_of_the_tissue_table_is_a_tissue_or_a_number() -> None:
    for name, tissue in TISSUES.items():
        source = tissue.vessels[0]
        assert not isinstance(source, str) or source in TISSUES, name
        assert all(low <= high for low, high in (*tissue.core, *tissue.shell, tissue.inner))


# --- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 7])
def test_any_number_of_threads_paints_the_same(threads: int) -> None:
    box = _box({1: "liver", 2: "colon"})
    np.testing.assert_array_equal(paint(box, 3).hu, paint(box, 3, threads=threads).hu)


def test_seeds_and_input() -> None:
    box = _box({1: "liver", 2: "colon"})
    box.labels.flags.writeable = False
    before = box.labels.copy()
    one = paint(box, 3)
    np.testing.assert_array_equal(one.hu, paint(box, 3).hu)
    assert (one.hu != paint(box, 4).hu).mean() > 0.5
    np.testing.assert_array_equal(box.labels, before)
    np.testing.assert_array_equal(one.affine, box.affine)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (True, True, True)])
def test_any_storage_paints_the_same_body(
    axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    box = _box({1: "liver", 2: "colon"}, (24, 28, 10))
    stored = box.labels.transpose(axes)
    stored = stored[tuple(slice(None, None, -1 if f else 1) for f in flips)].astype(np.uint16)
    affine = np.zeros((4, 4))
    for column, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[axis, column] = box.affine[axis, axis] * (-1 if flip else 1)
    affine[3, 3] = 1
    scan = paint(LabelMap(stored, affine, box.names), 6)
    assert scan.hu.shape == stored.shape
    np.testing.assert_array_equal(scan.working, paint(box, 6).working)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 3), (7, 1, 2), (5, 6, 1)])
def test_tiny_volumes_are_painted(shape: tuple[int, int, int]) -> None:
    names = {1: "liver", 2: "stomach", 3: "skin"}
    for value in (0, 1, 2, 3):
        labels = np.full(shape, value, np.uint8)
        scan = paint(LabelMap(labels, np.diag([2.0, 2.0, 5.0, 1.0]), names), 0)
        assert scan.hu.shape == shape
        assert scan.hu.min() >= -1024


def test_a_map_without_skin_gets_a_body() -> None:
    labels = np.zeros((90, 80, 10), np.uint8)
    x, y = np.mgrid[:90, :80]
    labels[((x - 45) / 28) ** 2 + ((y - 40) / 22) ** 2 < 1] = 1
    labels[40:50, 22:32] = 2
    labels[40:50, 22:32, 3:5] = 0
    scan = paint(
        LabelMap(labels, np.diag([2.0, 2.0, 4.0, 1.0]), {1: "liver", 2: "vertebrae_L1"}),
        1,
        Protocol(noise_hu=5.0, couch=False),
    )
    body = scan.hu > -400
    assert body[labels > 0].mean() > 0.99
    outside = labels == 0
    fat = outside & (scan.hu > -140) & (scan.hu < -60)
    muscle = outside & (scan.hu > 20) & (scan.hu < 90)
    assert fat.sum() > 2000
    assert muscle.sum() > 2000
    assert not body[0].any()  # there is air around it
    assert 40 < scan.hu[43:47, 25:29, 3:5].mean() < 120  # the gap between vertebrae is a disc


def test_an_empty_map_is_air_on_a_table() -> None:
    labels = np.zeros((12, 12, 3), np.uint8)
    scan = paint(LabelMap(labels, np.eye(4), {}), 0, Protocol(couch=False))
    assert scan.hu.max() < -900


# --- errors ---------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"label 3 has no name"):
        LabelMap(np.full((2, 2, 2), 3, np.uint8), np.eye(4), {1: "liver"})
    with pytest.raises(ValueError, match="uint8 or uint16"):
        LabelMap(np.zeros((2, 2, 2), np.int32), np.eye(4), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="phase 'venous' is unknown"):
        Protocol(phase="venous")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bed 'soft' is unknown; use one of curved, flat, cradle"):
        Protocol(bed="soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="arms 'crossed' is unknown"):
        Protocol(arms="crossed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise_hu -1"):
        Protocol(noise_hu=-1)
    with pytest.raises(ValueError, match="threads is 0"):
        in_slabs(lambda low, high: None, 3, 0)


def test_slabs_cover_every_slice_once() -> None:
    for n_slices, threads in ((1, 4), (7, 3), (8, 8)):
        seen = np.zeros(n_slices, int)

        def work(low: int, high: int, seen: np.ndarray = seen) -> None:
            seen[low:high] += 1

        in_slabs(work, n_slices, threads)
        np.testing.assert_array_equal(seen, 1)


@pytest.mark.real_data
def test_a_real_anatomy_without_a_scan_is_painted() -> None:
    path = DATA / "labels_only" / "s0327.nii.gz"
    if not path.exists():
        pytest.skip("the real scans are not beside this checkout")
    labels, affine = read_labels(path)
    # Every fourth slice of the upper abdomen will do.
    labels, affine = labels[:, :, 190:290:4].astype(np.uint8), affine @ np.diag([1, 1, 4, 1])
    names = totalsegmentator_names()
    scan = paint(LabelMap(labels, affine, names), 2, Protocol("portal_venous", couch=False))
    assert 70 < np.median(scan.hu[labels == 5]) < 130  # liver
    assert np.median(scan.hu[labels == 31]) > 80  # L1
    body = scan.hu > -300
    assert body.sum() > 1.5 * (labels > 0).sum() * 0.9
    assert 0.03 < ((scan.hu > -140) & (scan.hu < -60) & (labels == 0)).mean() < 0.6
