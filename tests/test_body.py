"""Where the patient is, on made-up scans and on real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from organfast.blocks import BlockGrid
from organfast.body import body_mask, body_voxels
from organfast.grid import GridVolume, ModelGrid, hu_lookup, resample_labels, to_model_grid
from organfast.nifti import read_labels, read_volume
from organfast.volume import Volume

DATA = Path(__file__).parents[2] / "shared" / "data"


def ellipse(shape: tuple[int, int], centre: tuple[float, float], axes: tuple[float, float]):
    i, j = np.indices(shape)
    return ((i - centre[0]) / axes[0]) ** 2 + ((j - centre[1]) / axes[1]) ** 2 <= 1


N, MM = 150, 2.0
TRUNK = ellipse((N, N), (80, 75), (45, 60))
ARM = ellipse((N, N), (70, 142), (8, 7))
LUNGS = ellipse((N, N), (85, 50), (28, 17)) | ellipse((N, N), (85, 100), (28, 17))
TABLE_ROWS = slice(22, 24)


def scan(n_slices: int = 6) -> np.ndarray:
    """A trunk with lungs and an arm, on a table, under a sheet; padding around."""
    rng = np.random.default_rng(0)
    plane = np.full((N, N), -1000)
    plane[TRUNK] = 30
    plane[LUNGS] = -850
    plane[ARM] = 30
    plane[TABLE_ROWS, 20:130] = 100  # 4 mm thick
    plane[TABLE_ROWS.start : 35, 20:22] = 100
    plane[TABLE_ROWS.start : 35, 128:130] = 100
    plane[128, 20:130] = -50  # the sheet
    hu = plane + rng.normal(0, 15, (n_slices, N, N))
    hu[:, ~ellipse((N, N), (75, 75), (85, 85))] = -3024
    return hu.astype(np.int16)


def native(hu: np.ndarray, spacing_mm: tuple[float, float, float] = (5.0, MM, MM)) -> GridVolume:
    return GridVolume(hu, table=hu_lookup("identity"), spacing_mm=spacing_mm)


def dilated(mask: np.ndarray, voxels: int) -> np.ndarray:
    from scipy import ndimage

    wide: np.ndarray = ndimage.binary_dilation(mask, iterations=voxels)
    return wide


@pytest.mark.parametrize("n_slices", [1, 2, 6])
def test_lungs_and_arms_are_in_table_and_sheet_are_out(n_slices: int) -> None:
    hu = scan(n_slices)
    before = hu.copy()
    body = body_voxels(native(hu))
    np.testing.assert_array_equal(hu, before)
    assert body.shape == hu.shape
    for plane in body:
        assert plane[TRUNK].mean() > 0.995
        assert plane[ARM].mean() > 0.9
        assert not plane[TABLE_ROWS].any()
        assert not plane[~dilated(TRUNK | ARM, 6)].any()


def test_a_lung_cut_by_the_field_of_view_is_in() -> None:
    hu = scan()[:, :, 50:]  # through the middle of a lung
    body = body_voxels(native(hu))
    assert body[:, LUNGS[:, 50:]].mean() > 0.995
    assert not body[:, TABLE_ROWS].any()


def test_a_patient_who_fills_the_field_of_view_is_all_in() -> None:
    hu = scan()[:, 60:110, 30:120]
    assert body_voxels(native(hu)).all()


@pytest.mark.parametrize("value", [-3024, -1024, -1000, -400])
def test_air_holds_nobody(value: int) -> None:
    assert not body_voxels(native(np.full((3, 20, 20), value, np.int16))).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (2, 3, 2), (9, 1, 1)])
@pytest.mark.parametrize("spacing_mm", [(0.5, 0.5, 0.5), (3.0, 1.0, 1.0), (20.0, 20.0, 20.0)])
def test_the_smallest_volumes(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]
) -> None:
    assert body_voxels(native(np.full(shape, 40, np.int16), spacing_mm)).all()
    assert not body_voxels(native(np.full(shape, -1000, np.int16), spacing_mm)).any()


def test_an_object_thinner_than_a_sheet_is_found_when_it_is_all_there_is() -> None:
    hu = np.full((1, 40, 40), -1000, np.int16)
    hu[0, 20, 10:30] = 40
    body = body_voxels(native(hu, (4.0, 4.0, 4.0)))
    assert body[0, 20, 10:30].all()
    assert not body[0, :15].any()


@pytest.mark.parametrize("hu_table", ["identity", "piecewise"])
def test_the_working_grid_finds_the_same_patient(hu_table: str) -> None:
    volume = Volume(scan().transpose(2, 1, 0), np.diag([MM, MM, 5.0, 1.0]))
    own = native(volume.working)
    working = to_model_grid(volume, ModelGrid((1.5, 1.5, 3.0), hu_table))
    on_working = body_voxels(working)
    index = [
        np.clip(np.round(o + s * np.arange(n)).astype(int), 0, m - 1)
        for o, s, n, m in zip(working.offset, working.step, working.shape, own.shape, strict=True)
    ]
    differ = body_voxels(own)[np.ix_(*index)] != on_working
    assert differ.mean() < 0.03  # the outline is a per cent or two per raster voxel


def test_positions_of_a_block_grid_read_the_voxels_mask() -> None:
    grid_volume = native(scan())
    block_grid = BlockGrid(grid_volume.shape, (2, 4, 7))
    mask = body_mask(grid_volume, block_grid)
    assert mask.shape == block_grid.shape
    assert mask.dtype == np.bool_
    expected = body_voxels(grid_volume)[np.ix_(*block_grid.centres)]
    np.testing.assert_array_equal(mask, expected)


def test_a_block_grid_of_another_volume_is_refused() -> None:
    with pytest.raises(ValueError, match="block_grid is for"):
        body_mask(native(scan()), BlockGrid((6, N, N + 1), (1, 4, 4)))


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["chest", "abdomen"])
@pytest.mark.parametrize("grid", [ModelGrid(), ModelGrid((1.5, 1.5, 3.0), "piecewise")])
def test_every_labelled_voxel_of_a_real_scan_lies_in_the_body(name: str, grid: ModelGrid) -> None:
    path = DATA / "labelled" / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip("no real CT beside this checkout")
    volume = read_volume(path)
    grid_volume = to_model_grid(volume, grid)
    body = body_voxels(grid_volume)
    stored, _ = read_labels(path.with_name(f"{name}_labels.nii.gz"))
    labels = resample_labels(volume.orientation.working(stored), grid_volume)
    assert body[labels > 0].mean() > 0.9999
    assert 0.3 < body.mean() < 0.75
