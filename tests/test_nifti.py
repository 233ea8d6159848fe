"""NIfTI in and out: against nibabel, over orientations and storages, and what bad files get."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast.errors import InputError
from organfast.nifti import (
    Geometry,
    corners_apart_mm,
    file_digest,
    from_nifti1image,
    read_geometry,
    read_labels,
    read_scan,
    read_volume,
    write_labels,
    write_probability,
    write_volume,
)
from organfast.scans import as_scan
from organfast.volume import Volume

DATA = Path(__file__).parents[2] / "shared" / "data"
AFFINE = np.array(
    [[-1.5, 0, 0, 90.0], [0, 2.0, 0, -120.5], [0, 0, 3.0, 7.25], [0, 0, 0, 1]], np.float64
)
SHAPE = (5, 6, 7)


def hu_of(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> NDArray[np.int16]:
    """Air, fat, soft tissue and bone, noisy."""
    rng = np.random.default_rng(seed)
    tissue = rng.choice([-1000, -100, 40, 700], size=shape)
    hu = np.maximum(tissue + rng.normal(0, 12, shape), -1024).astype(np.int16)
    hu.flat[:4] = -1000, -100, 40, 700
    return hu


def save(
    path: Path,
    array: NDArray,  # type: ignore[type-arg]
    affine: NDArray[np.float64] = AFFINE,
    change: Callable[[nib.Nifti1Header], None] | None = None,
    version: int = 1,
) -> Path:
    """Write with nibabel; ``change`` sets header fields behind its back."""
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    image = kind(array, affine, dtype=array.dtype)
    content = image.to_bytes()
    if change is not None:
        size = 348 if version == 1 else 540
        header = kind.header_class(content[:size], check=False)
        change(header)
        content = header.binaryblock + content[size:]
    path.write_bytes(gzip.compress(content, 1) if path.name.endswith(".gz") else content)
    return path


def one_line(error: InputError, path: object) -> str:
    """The message: one line, the path first, problem and remedy after it."""
    line = str(error)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    assert "; " in line
    return line


# --- what is read is what nibabel reads -----------------------------------------------------------

STORAGES = ["i2", "u2", "i4", "u4", "i8", "f4", "f8"]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_reads_the_same_hu(
    tmp_path: Path, storage: str, order: str, version: int, ending: str
) -> None:
    hu = hu_of()
    unsigned = storage.startswith("u")
    stored = (hu.astype(np.int32) + (1024 if unsigned else 0)).astype(storage)
    path = tmp_path / f"scan{ending}"
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    header = kind.header_class(endianness=order)
    header.set_data_dtype(storage)
    image = kind(stored, AFFINE, header)
    image.to_filename(path)
    if unsigned:
        content = gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes()
        size = 348 if version == 1 else 540
        raw = kind.header_class(content[:size], endianness=order, check=False)
        raw["scl_slope"], raw["scl_inter"] = 1, -1024
        content = raw.binaryblock + content[size:]
        path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    scan = read_scan(path)
    assert scan.volume.hu.dtype == np.int16
    np.testing.assert_array_equal(scan.volume.hu, hu)
    np.testing.assert_array_equal(scan.volume.hu, nib.load(path).get_fdata())
    np.testing.assert_array_equal(scan.volume.affine, nib.load(path).affine)
    assert scan.warnings == ()


@settings(max_examples=25, deadline=None)
@given(
    slope=st.floats(0.25, 2.0, width=32),
    inter=st.floats(-1200, -900, width=32),
    seed=st.integers(0, 2**16),
)
def test_scaling_is_nibabels_rounded(
    tmp_path_factory: pytest.TempPathFactory, slope: float, inter: float, seed: int
) -> None:
    stored = np.random.default_rng(seed).integers(0, 4096, SHAPE).astype(np.int16)
    stored.flat[0], stored.flat[1] = 0, 4095

    def change(header: nib.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = slope, inter

    path = save(tmp_path_factory.mktemp("scaled") / "scan.nii.gz", stored, change=change)
    np.testing.assert_array_equal(read_volume(path).hu, np.rint(nib.load(path).get_fdata()))


def test_more_voxels_than_a_chunk(tmp_path: Path) -> None:
    hu = hu_of((130, 128, 67))  # 2.1 chunks
    for ending in (".nii", ".nii.gz"):
        np.testing.assert_array_equal(read_volume(save(tmp_path / f"s{ending}", hu)).hu, hu)
        floats = save(tmp_path / f"f{ending}", hu.astype(np.float32) + 0.25)
        np.testing.assert_array_equal(read_volume(floats).hu, hu)


def test_the_name_need_not_say_what_is_compressed(tmp_path: Path) -> None:
    packed = save(tmp_path / "a.nii.gz", hu_of()).rename(tmp_path / "packed.nii")
    plain = save(tmp_path / "a.nii", hu_of()).rename(tmp_path / "plain.nii.gz")
    np.testing.assert_array_equal(read_volume(packed).hu, read_volume(plain).hu)


def test_a_plain_int16_file_is_mapped_and_others_are_not(tmp_path: Path) -> None:
    mapped = read_volume(save(tmp_path / "a.nii", hu_of())).hu
    assert not mapped.flags.writeable
    assert not mapped.flags.owndata
    assert read_volume(save(tmp_path / "a.nii.gz", hu_of())).hu.flags.writeable


def test_voxels_behind_an_extension_are_found(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu_of(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"NAME^OF^PATIENT"))
    for ending in (".nii", ".nii.gz"):
        image.to_filename(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(read_volume(tmp_path / f"a{ending}").hu, hu_of())


def test_an_odd_voxel_offset_is_read_not_mapped(tmp_path: Path) -> None:
    def change(header: nib.Nifti1Header) -> None:
        header["vox_offset"] = 353

    path = save(tmp_path / "a.nii", hu_of(), change=change)
    content = path.read_bytes()
    path.write_bytes(content[:352] + b"\0" + content[352:])
    volume = read_volume(path)
    assert volume.hu.flags.aligned
    np.testing.assert_array_equal(volume.hu, hu_of())


def test_singleton_axes_behind_the_third_are_dropped(tmp_path: Path) -> None:
    for shape in ((*SHAPE, 1), (*SHAPE, 1, 1)):
        path = save(tmp_path / "a.nii.gz", hu_of().reshape(shape))
        assert read_volume(path).hu.shape == SHAPE


def test_padding_below_int16_is_clipped_and_stays_air(tmp_path: Path) -> None:
    stored = hu_of().astype(np.int32)
    stored[0, 0] = -(2**31)
    expected = np.maximum(stored, -32768)
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.nii.gz", stored)).hu, expected)
    floats = save(tmp_path / "b.nii.gz", stored.astype(np.float32))
    np.testing.assert_array_equal(read_volume(floats).hu, expected)


# --- space ----------------------------------------------------------------------------------------

ORIENTATIONS = [
    "".join(side)
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for side in itertools.product(*axes)
]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_each_orientation_is_the_same_scan_in_the_world_and_is_written_back(
    tmp_path: Path, codes: str
) -> None:
    ras = nib.Nifti1Image(hu_of(), np.diag([1.5, 2.0, 3.0, 1.0]))
    change = nib.orientations.ornt_transform(
        nib.io_orientation(ras.affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = ras.as_reoriented(change)
    turned.set_qform(turned.affine, 1)
    turned.to_filename(tmp_path / "a.nii.gz")
    scan = read_scan(tmp_path / "a.nii.gz")
    assert "".join(nib.aff2axcodes(scan.volume.affine)) == codes
    working = np.transpose(hu_of(), (2, 1, 0))
    np.testing.assert_array_equal(scan.volume.working, working)
    np.testing.assert_allclose(scan.volume.working_affine @ [6, 0, 0, 1], [0, 0, 18, 1], atol=1e-4)

    labels = np.empty(scan.volume.hu.shape, np.uint8)
    scan.volume.orientation.working(labels)[...] = working > 0
    write_labels(tmp_path / "l.nii.gz", labels, scan.geometry)
    written = nib.as_closest_canonical(nib.load(tmp_path / "l.nii.gz"))
    np.testing.assert_array_equal(np.asarray(written.dataobj), hu_of() > 0)
    np.testing.assert_allclose(written.affine, ras.affine, atol=1e-4)


def test_geometry_is_written_back_bit_for_bit(tmp_path: Path) -> None:
    turn = nib.eulerangles.euler2mat(0.2, -0.1, 0.3)
    affine = nib.affines.from_matvec(turn @ np.diag([0.7, 0.7, 2.5]), [-120.3, 11.7, 900.1])
    kept = ["sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c"]
    kept += ["quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units"]
    for version, s_code, q_code in itertools.product((1, 2), (0, 1, 4), (0, 1, 3)):
        kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
        image = kind(hu_of(), affine)
        image.set_sform(affine, s_code)
        image.set_qform(affine, q_code)
        image.header.set_xyzt_units("mm")
        image.to_filename(tmp_path / "a.nii.gz")
        scan = read_scan(tmp_path / "a.nii.gz")
        write_labels(tmp_path / "l.nii.gz", (scan.volume.hu > 0).astype(np.uint16), scan.geometry)
        before, after = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "l.nii.gz")
        assert type(after) is type(before)
        for name in kept:
            np.testing.assert_array_equal(after.header[name], before.header[name], name)
        np.testing.assert_array_equal(after.header["pixdim"][:4], before.header["pixdim"][:4])
        np.testing.assert_array_equal(after.affine, before.affine)
        assert after.get_data_dtype() == np.uint16


def test_the_sform_counts_where_the_two_disagree_and_that_is_said(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu_of(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([1.5, 2, 3, 1]), 1)
    image.to_filename(tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_array_equal(scan.volume.affine, AFFINE)
    assert len(scan.warnings) == 1
    assert "sform and qform disagree" in scan.warnings[0]


def test_a_header_without_orientation_is_read_with_a_warning(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu_of(), None)
    image.header.set_zooms((1.5, 2, 3))
    image.to_filename(tmp_path / "a.nii")
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_array_equal(scan.volume.affine, nib.load(tmp_path / "a.nii").affine)
    assert "left and right may be swapped" in scan.warnings[0]


def test_units_of_the_header_become_mm(tmp_path: Path) -> None:
    for code, factor in ((1, 1000.0), (3, 0.001)):

        def change(header: nib.Nifti1Header, code: int = code) -> None:
            header["xyzt_units"] = code + 8  # seconds

        affine = AFFINE.copy()
        affine[:3] /= factor
        scan = read_scan(save(tmp_path / "a.nii.gz", hu_of(), affine, change))
        np.testing.assert_allclose(scan.volume.affine, AFFINE, rtol=1e-6)
        write_labels(tmp_path / "l.nii", np.zeros(SHAPE, np.uint8), scan.geometry)
        np.testing.assert_allclose(read_geometry(tmp_path / "l.nii").affine, AFFINE, rtol=1e-6)


def test_qfac_and_negative_pixdim_read_as_nibabel_reads_them(tmp_path: Path) -> None:
    image = nib.Nifti1Image(hu_of(), AFFINE)
    image.set_sform(AFFINE, 0)
    image.set_qform(AFFINE, 1)
    image.to_filename(tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    for first, third in ((0, 3.0), (-1, -3.0), (1, 3.0)):
        header = nib.Nifti1Header(content[:348], check=False)
        header["pixdim"][0], header["pixdim"][3] = first, third
        (tmp_path / "b.nii").write_bytes(header.binaryblock + content[348:])
        expected = nib.Nifti1Header(header.binaryblock, check=False)
        expected["pixdim"][:4] = first or 1, *abs(expected["pixdim"][1:4])
        np.testing.assert_array_equal(
            read_volume(tmp_path / "b.nii").affine, expected.get_best_affine()
        )


def test_corners_apart_is_the_longest_way_of_a_corner() -> None:
    moved = AFFINE.copy()
    moved[:3, 3] += 3, 0, 4
    assert corners_apart_mm(SHAPE, AFFINE, moved) == pytest.approx(5)
    stretched = AFFINE @ np.diag([1, 1, 1.5, 1])
    assert corners_apart_mm(SHAPE, AFFINE, stretched) == pytest.approx(6 * 1.5)


# --- bad files ------------------------------------------------------------------------------------


def _bad_affine(*rows: tuple[float, float, float, float]) -> Callable[[nib.Nifti1Header], None]:
    def change(header: nib.Nifti1Header) -> None:
        header["sform_code"] = 1
        for name, row in zip(("srow_x", "srow_y", "srow_z"), rows, strict=False):
            header[name] = row

    return change


def _fields(**values: object) -> Callable[[nib.Nifti1Header], None]:
    def change(header: nib.Nifti1Header) -> None:
        for name, value in values.items():
            header[name] = value

    return change


def _dim(*dim: int) -> Callable[[nib.Nifti1Header], None]:
    return _fields(dim=[*dim, *[1] * (8 - len(dim))])


def _hu_with(value: float) -> NDArray[np.float32]:
    hu = hu_of().astype(np.float32)
    hu[2, 2, 2] = value
    return hu


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_HEADERS = {
    "zero dimension": (_dim(3, 5, 0, 7), "holds no voxel"),
    "negative dimension": (_dim(3, -5, 6, 7), "holds no voxel"),
    "2-D": (_dim(2, 5, 42), "is 2-D"),
    "many axes": (_dim(9, 5, 6, 7), "declares 9 axes"),
    "4-D": (_dim(4, 5, 6, 1, 7), "is 4-D"),
    "18 GB declared": (_dim(3, 32767, 32767, 9), ""),
    "more declared": (_dim(3, 5, 6, 8), "truncated"),
    "less declared": (_dim(3, 5, 6, 6), "goes on after"),
    "unknown datatype": (_fields(datatype=99), "datatype code 99"),
    "binary": (_fields(datatype=1), "stores binary voxels"),
    "offset inside the header": (_fields(vox_offset=100), "voxels at byte 100"),
    "offset not a number": (_fields(vox_offset=np.nan), "voxels at byte nan"),
    "offset behind the file": (_fields(vox_offset=1e12), ""),
    "singular": (_bad_affine((1, 0, 0, 0), (1, 0, 0, 0)), "singular"),
    "zero affine": (_bad_affine((0,) * 4, (0,) * 4, (0,) * 4), "singular"),
    "infinite affine": (_bad_affine((np.inf, 0, 0, 0)), "not finite"),
    "nan affine": (_bad_affine((np.nan, 0, 0, 0)), "not finite"),
    "zero pixdim": (_fields(sform_code=0, qform_code=1, pixdim=[1, 0, 2, 3, 0, 0, 0, 0]), "sing"),
    "long quaternion": (_fields(sform_code=0, qform_code=1, quatern_b=2), "not finite"),
    "kilometres": (_bad_affine((1e6, 0, 0, 0)), "voxels of"),
    "nanometres": (_bad_affine((1e-6, 0, 0, 0)), "voxels of"),
    "negative slope": (_fields(scl_slope=-1), "scales its voxels by -1"),
    "infinite slope": (_fields(scl_slope=np.inf), "scales its voxels by inf"),
    "infinite intercept": (_fields(scl_slope=1, scl_inter=np.inf), "adds inf"),
    "huge slope": (_fields(scl_slope=1e30), "no HU"),
    "tiny slope": (_fields(scl_slope=1e-30), "normalised"),
    "wrong magic": (_fields(magic=b"abc"), "is not a NIfTI file"),
    "pair": (_fields(magic=b"ni1"), "half of a .hdr/.img pair"),
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_one_line(tmp_path: Path, name: str, ending: str) -> None:
    change, words = BAD_HEADERS[name]
    path = save(tmp_path / f"a{ending}", hu_of(), change=change)
    with pytest.raises(InputError) as caught:
        read_scan(path)
    assert words in one_line(caught.value, path)


BAD_VOXELS = {
    "nan": (_hu_with(np.nan), "NaN"),
    "inf": (_hu_with(np.inf), "infinite"),
    "minus inf": (_hu_with(-np.inf), "infinite"),
    "too high": (_hu_with(40_000), "no HU"),
    "RGB": (np.zeros(SHAPE, RGB), "RGB"),
    "complex": (np.zeros(SHAPE, np.complex64), "complex"),
    "constant": (np.full(SHAPE, 40, np.int16), "everywhere"),
    "zero to one": (((hu_of() + 1100) / 2000).astype(np.float32), "normalised"),
    "standardised": ((hu_of() / 400).astype(np.float32), "normalised"),
    "grey levels": (((hu_of() + 1100) / 8).astype(np.uint8), "grey levels"),
    "no intercept": ((np.maximum(hu_of(), -1024) + 1024).astype(np.int16), "intercept"),
    "window": (np.clip(hu_of(), -160, 240), "display window"),
    "2-D": (hu_of()[0], "2-D"),
    "4-D": (np.stack([hu_of(), hu_of()], axis=-1), "several volumes"),
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", BAD_VOXELS)
def test_bad_voxels_are_one_line(tmp_path: Path, name: str, ending: str) -> None:
    array, words = BAD_VOXELS[name]
    path = save(tmp_path / f"a{ending}", array)
    with pytest.raises(InputError) as caught:
        read_scan(path)
    assert words in one_line(caught.value, path)


def test_an_unshifted_scan_with_padding_is_not_in_hu(tmp_path: Path) -> None:
    stored = np.maximum(hu_of(), -1024) + 1024
    stored[0] = -2000
    with pytest.raises(InputError, match="intercept"):
        read_scan(save(tmp_path / "a.nii.gz", stored))


def test_a_soft_tissue_slab_without_air_is_in_hu(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    slab = (rng.choice([-100, 40], size=(20, 20, 5)) + rng.normal(0, 10, (20, 20, 5))).astype("i2")
    assert read_volume(save(tmp_path / "a.nii.gz", slab)).hu.min() > -200


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is empty"),
    "text": (lambda content: b"not a scan\n" * 50, "is not a NIfTI file"),
    "short": (lambda content: content[:100], "is not a NIfTI file"),
    "DICOM": (lambda content: bytes(128) + b"DICM" + bytes(500), "is a DICOM file"),
    "header alone": (lambda content: content[:348], "truncated"),
    "truncated": (lambda content: content[:-10], "truncated"),
    "longer": (lambda content: content + b"\0", "goes on after"),
    "gzip truncated": (lambda content: gzip.compress(content)[:-100], "truncated"),
    "gzip without its end": (lambda content: gzip.compress(content)[:-3], "truncated gzip"),
    "gzip of less": (lambda content: gzip.compress(content[:-10]), "truncated"),
    "gzip of more": (lambda content: gzip.compress(content + bytes(9)), "goes on after"),
    "gzip of gzip": (lambda content: gzip.compress(gzip.compress(content)), "compressed twice"),
    "foreign bytes": (lambda content: gzip.compress(content) + b"rubbish", "foreign bytes"),
    "second stream": (lambda content: gzip.compress(content) * 2, "goes on after"),
    "wrong checksum": (
        lambda content: gzip.compress(content)[:-8] + bytes(4) + gzip.compress(content)[-4:],
        "damaged gzip",
    ),
    "wrong length": (lambda content: gzip.compress(content)[:-4] + bytes(4), "damaged gzip"),
    "zeros with a few others": (
        lambda content: gzip.compress(content) + bytes(20) + b"x" * 20,
        "damaged gzip",
    ),
    "corrupt": (
        lambda content: gzip.compress(content)[:60] + b"\xff" * 40 + gzip.compress(content)[100:],
        "",
    ),
    "gzip of nothing": (lambda content: gzip.compress(b""), "is not a NIfTI file"),
    "gzip magic alone": (lambda content: b"\x1f\x8b", "truncated"),
}


FOREIGN_END = ("foreign bytes", "zeros with a few others")


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str) -> None:
    damage, words = BAD_FILES[name]
    path = tmp_path / "a.nii.gz"
    hu = hu_of((20, 20, 20))
    for read, array in ((read_scan, hu), (read_labels, (hu > 0).astype(np.uint8))):
        if read is read_scan and name in FOREIGN_END:
            continue  # a warning: see test_hostile.py
        path.write_bytes(damage(save(tmp_path / "whole.nii", array).read_bytes()))
        with pytest.raises(InputError) as caught:
            read(path)
        assert words in one_line(caught.value, path)


def test_two_gzip_members_are_one_file(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", hu_of()).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]) + bytes(512))
    np.testing.assert_array_equal(read_volume(path).hu, hu_of())


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_lies_costs_no_memory(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a{ending}", hu_of(), change=_dim(3, 32767, 32767, 9))
    tracemalloc.start()
    with pytest.raises(InputError):
        read_scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_reading_needs_the_voxels_and_a_chunk(tmp_path: Path) -> None:
    hu = np.repeat(hu_of((128, 128, 8)), 32, axis=2)  # 8.4 MB
    for stored, chunks in ((hu, 3), (hu.astype(np.float64), 12)):
        path = save(tmp_path / "a.nii.gz", stored)
        read_scan(path)
        tracemalloc.start()
        read_scan(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < hu.nbytes + chunks * (1 << 20)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    fifo, loop = tmp_path / "fifo.nii", tmp_path / "loop.nii"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    dangling = tmp_path / "dangling.nii"
    dangling.symlink_to(tmp_path / "nowhere")
    for path, words in (
        (tmp_path / "missing.nii", "does not exist"),
        (dangling, "does not exist"),
        (tmp_path, "is a folder"),
        (fifo, "not a regular file"),
        (loop, "cannot be read"),
        (tmp_path / ("long" * 100), "cannot be read"),
        (f"{tmp_path}/a\0b.nii", "does not exist"),
    ):
        with pytest.raises(InputError) as caught:
            read_scan(path)
        assert words in one_line(caught.value, path)
    with pytest.raises(InputError, match="does not exist"):
        file_digest(tmp_path / "missing.nii")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", hu_of())
    path.chmod(0)
    with pytest.raises(InputError, match="may not be read"):
        read_scan(path)


def test_names_of_any_script_and_links_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "übung 肝 <b>&=1+1.nii.gz", hu_of())
    link = tmp_path / ("n" * 240 + ".nii.gz")
    link.symlink_to(path)
    np.testing.assert_array_equal(read_volume(link).hu, read_volume(path).hu)


@settings(max_examples=150, deadline=None)
@given(
    position=st.integers(0, 351),
    value=st.integers(0, 255),
    second=st.tuples(st.integers(0, 351), st.integers(0, 255)),
    packed=st.booleans(),
)
def test_a_header_with_changed_bytes_reads_or_is_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    position: int,
    value: int,
    second: tuple[int, int],
    packed: bool,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(save(folder / "a.nii", hu_of()).read_bytes())
    content[position] = value
    content[second[0]] = second[1]
    path = folder / "b.nii"
    path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
    try:
        scan = read_scan(path)
    except InputError as error:
        one_line(error, path)
    else:
        assert np.isfinite(scan.volume.affine).all()
        assert scan.volume.hu.size == 210


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_of_gzip_changes_no_voxel_unseen(
    tmp_path_factory: pytest.TempPathFactory, position: float, flip: int
) -> None:
    path = save(tmp_path_factory.mktemp("flip") / "a.nii.gz", hu_of())
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= flip
    path.write_bytes(content)
    try:
        hu = read_volume(path).hu
    except InputError as error:
        one_line(error, path)
    else:
        np.testing.assert_array_equal(hu, hu_of())


# --- labels ---------------------------------------------------------------------------------------


def labels_of(dtype: str = "u1", top: int = 4) -> NDArray:  # type: ignore[type-arg]
    labels = np.random.default_rng(3).integers(0, top, SHAPE)
    labels.flat[0] = top
    return labels.astype(dtype)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("storage", ["u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_labels_of_every_storage(tmp_path: Path, storage: str, ending: str) -> None:
    for top in (4, 300):
        if np.dtype(storage).itemsize == 1 and top > 127:
            continue
        labels = labels_of(storage, top)
        read, affine = read_labels(save(tmp_path / f"a{top}{ending}", labels))
        assert read.dtype == (np.uint8 if top < 256 else np.uint16)
        np.testing.assert_array_equal(read, labels)
        np.testing.assert_array_equal(affine, AFFINE)


BAD_LABELS = {
    "negative": (np.where(labels_of() == 4, -1, 1).astype(np.int16), "the label -1"),
    "too large": (labels_of("i4", 70_000), "the label 70000"),
    "fraction": (labels_of("f4") / 2 + 0.25, "fractions"),
    "nan": (_hu_with(np.nan), "NaN"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_are_one_line(tmp_path: Path, name: str) -> None:
    array, words = BAD_LABELS[name]
    path = save(tmp_path / "a.nii.gz", array)
    with pytest.raises(InputError) as caught:
        read_labels(path)
    assert words in one_line(caught.value, path)


def test_a_mask_scaled_by_an_inexact_slope_is_whole(tmp_path: Path) -> None:
    def change(header: nib.Nifti1Header) -> None:
        header["scl_slope"] = 1 / 255

    path = save(tmp_path / "a.nii", ((labels_of() > 1) * 255).astype(np.uint8), change=change)
    labels, _ = read_labels(path)
    np.testing.assert_array_equal(labels, labels_of() > 1)


# --- writing --------------------------------------------------------------------------------------


def geometry() -> Geometry:
    return Geometry.of_volume(Volume(hu_of(), AFFINE))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_equal_labels_give_equal_bytes_in_any_memory_order(tmp_path: Path, ending: str) -> None:
    labels = labels_of("u2", 300)
    forms = [labels, np.asfortranarray(labels), np.repeat(labels, 2, axis=1)[:, ::2]]
    forms.append(np.ascontiguousarray(labels[::-1, :, ::-1])[::-1, :, ::-1])
    contents = set()
    for number, form in enumerate(forms):
        form.flags.writeable = False
        path = tmp_path / f"name{number}{ending}"
        write_labels(path, form, geometry())
        contents.add(path.read_bytes())
        np.testing.assert_array_equal(read_labels(path)[0], labels)
    assert len(contents) == 1
    (content,) = contents
    assert b"name" not in content
    if ending == ".nii.gz":
        assert content[4:8] == bytes(4)  # gzip's time stamp
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"name{n}{ending}" for n in range(4)]


def test_several_write_buffers_round_trip(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (300, 200, 90)).astype(np.uint8)  # 5.4 MB
    grid = Geometry.of_volume(Volume(np.zeros(labels.shape, np.int16), AFFINE))
    write_labels(tmp_path / "a.nii.gz", labels, grid)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz")[0], labels)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj), labels)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
)
def test_a_volume_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], seed: int
) -> None:
    if np.prod(shape) < 4:
        shape = (2, 2, shape[2])
    hu = hu_of(shape, seed)
    before = hu.copy()
    path = tmp_path_factory.mktemp("disk") / "a.nii.gz"
    write_volume(path, Volume(hu, AFFINE))
    np.testing.assert_array_equal(read_volume(path).hu, hu)
    np.testing.assert_array_equal(hu, before)
    np.testing.assert_allclose(read_volume(path).affine, AFFINE, rtol=1e-6)


def test_a_probability_map_reads_as_zero_to_one(tmp_path: Path) -> None:
    levels = np.arange(210, dtype=np.uint8).reshape(SHAPE)
    levels.flat[-1] = 255
    write_probability(tmp_path / "p.nii.gz", levels, geometry())
    image = nib.load(tmp_path / "p.nii.gz")
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.get_fdata(), levels / 255, atol=1e-7)


def test_no_text_of_the_input_reaches_an_output(tmp_path: Path) -> None:
    secret = b"DOE^JOHN"
    image = nib.Nifti1Image(hu_of(), AFFINE)
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = secret
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", secret))
    image.to_filename(tmp_path / "a.nii")
    assert secret in (tmp_path / "a.nii").read_bytes()
    scan = read_scan(tmp_path / "a.nii")
    write_labels(tmp_path / "l.nii", labels_of(), scan.geometry)
    assert secret not in (tmp_path / "l.nii").read_bytes()
    assert secret not in pickle.dumps(scan.geometry)


def test_an_unwritable_output_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "nowhere" / "a.nii.gz", "cannot be written"),
        (tmp_path / "file" / "a.nii.gz", "cannot be written"),
        (tmp_path / "folder.nii.gz", "cannot be written"),
        (tmp_path / ("long" * 100 + ".nii"), "cannot be written"),
        (tmp_path / "labels.txt", "no name for a NIfTI file"),
    ):
        with pytest.raises(InputError) as caught:
            write_labels(path, labels_of(), geometry())
        assert words in one_line(caught.value, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.nii.gz"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.nii.gz"
    write_labels(path, labels_of(), geometry())
    before = path.read_bytes()
    real_open = open

    def full(name: object, mode: str) -> object:
        return real_open("/dev/full", "wb", buffering=0) if mode == "xb" else real_open(name, mode)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(InputError, match="No space left"):
        write_labels(path, labels_of("u2", 300), geometry())
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_an_output_has_the_rights_the_user_gives_to_new_files(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.nii.gz", labels_of(), geometry())
    (tmp_path / "other").write_text("")
    assert (tmp_path / "a.nii.gz").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="int16"):
        write_labels("a.nii.gz", labels_of("i2"), geometry())
    with pytest.raises(ValueError, match="do not fit the grid"):
        write_labels("a.nii.gz", labels_of()[1:], geometry())
    with pytest.raises(ValueError, match="quantise"):
        write_probability("a.nii.gz", labels_of("u2"), geometry())


# --- scans in memory ------------------------------------------------------------------------------


def test_an_image_in_memory_is_not_copied() -> None:
    hu = hu_of()
    scan = from_nifti1image(nib.Nifti1Image(hu, AFFINE))
    assert np.shares_memory(scan.volume.hu, hu)
    np.testing.assert_array_equal(scan.volume.affine, AFFINE)


@pytest.mark.parametrize("storage", ["i2", "f4", "f8", "i4"])
def test_an_image_that_was_loaded_equals_the_file(tmp_path: Path, storage: str) -> None:
    def change(header: nib.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = 0.5, -3

    for form in (hu_of(), hu_of()[..., None]):
        path = save(tmp_path / "a.nii.gz", (form * 2 + 6).astype(storage), change=change)
        scan = from_nifti1image(nib.load(path))
        np.testing.assert_array_equal(scan.volume.hu, read_volume(path).hu)
        np.testing.assert_array_equal(scan.volume.hu, hu_of())


def test_an_affine_that_was_changed_after_loading_counts(tmp_path: Path) -> None:
    image = nib.load(save(tmp_path / "a.nii.gz", hu_of()))
    moved = AFFINE.copy()
    moved[:3, 3] += 10
    scan = from_nifti1image(nib.Nifti1Image(image.dataobj, moved, image.header))
    np.testing.assert_array_equal(scan.volume.affine, moved)
    write_labels(tmp_path / "l.nii.gz", labels_of(), scan.geometry)
    np.testing.assert_array_equal(nib.load(tmp_path / "l.nii.gz").affine, moved)


def test_what_users_hold_becomes_a_scan(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", hu_of())
    scan = read_scan(path)
    assert as_scan(scan) is scan
    floats = hu_of().astype(np.float32)
    for source in (path, str(path), scan.volume, nib.load(path), (floats, AFFINE)):
        found = as_scan(source)
        np.testing.assert_array_equal(found.volume.hu, hu_of())
        np.testing.assert_array_equal(found.volume.affine, AFFINE)
        np.testing.assert_allclose(found.geometry.affine, AFFINE)
        assert found.geometry.shape == SHAPE
    with pytest.raises(ValueError, match="give a nibabel image"):
        as_scan(42)
    with pytest.raises(ValueError, match="3-D array"):
        as_scan((floats[0], AFFINE))
    with pytest.raises(InputError, match="NaN"):
        as_scan((_hu_with(np.nan), AFFINE))
    with pytest.raises(InputError, match="complex"):
        as_scan((floats.astype(np.complex64), AFFINE))


def test_a_sheared_volume_is_written_with_its_sform(tmp_path: Path) -> None:
    sheared = AFFINE.copy()
    sheared[0, 2] = 0.5
    write_volume(tmp_path / "a.nii", Volume(hu_of(), sheared))
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_allclose(scan.volume.affine, sheared, rtol=1e-6)
    (warning,) = scan.warnings
    assert "not at right angles" in warning


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf8f01cfea")


# --- real scans -----------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not beside this checkout")
@pytest.mark.parametrize("name", ["labelled/abdomen", "labelled/chest", "unlabelled/neck"])
def test_real_scans_read_as_nibabel_reads_them(name: str) -> None:
    scan, peer = read_scan(DATA / f"{name}.nii.gz"), nib.load(DATA / f"{name}.nii.gz")
    np.testing.assert_array_equal(scan.volume.hu[:, :, -9:], np.rint(peer.dataobj[:, :, -9:]))
    np.testing.assert_array_equal(scan.volume.affine, peer.affine)
    assert scan.warnings == ()


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not beside this checkout")
def test_labels_of_a_real_scan_lie_on_its_grid(tmp_path: Path) -> None:
    scan = read_scan(DATA / "labelled/abdomen.nii.gz")
    labels = (scan.volume.hu > 200).astype(np.uint8)
    write_labels(tmp_path / "l.nii.gz", labels, scan.geometry)
    written = nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(written.affine, scan.volume.affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not beside this checkout")
def test_real_slab_of_soft_tissue_passes_as_hu(tmp_path: Path) -> None:
    hu = read_volume(DATA / "labelled/chest.nii.gz").hu
    inside = np.ascontiguousarray(hu[230:290, 180:240, 10:30])
    write_volume(tmp_path / "a.nii.gz", Volume(inside, AFFINE))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").hu, inside)
