"""DICOM series: the same voxels as the file they were made from, clear refusals, no person."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

from dicomseries import INTERCEPT, plant, write_series  # noqa: E402

from organfast.anatomy import ClassTable  # noqa: E402
from organfast.cli import run  # noqa: E402
from organfast.dicom import (  # noqa: E402
    DicomScan,
    is_dicom,
    list_series,
    read_series,
    write_segmentation,
)
from organfast.errors import InputError  # noqa: E402
from organfast.layouts import find_scans  # noqa: E402
from organfast.nifti import corners_apart_mm, read_labels, read_volume  # noqa: E402
from organfast.pipeline import segment  # noqa: E402
from organfast.scans import as_scan  # noqa: E402
from organfast.volume import Volume  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"
SYNTAXES = {
    "explicit": "1.2.840.10008.1.2.1",
    "implicit": "1.2.840.10008.1.2",
    "deflated": "1.2.840.10008.1.2.1.99",
    "rle": "1.2.840.10008.1.2.5",
    "jpeg-ls": "1.2.840.10008.1.2.4.80",
    "jpeg-2000": "1.2.840.10008.1.2.4.90",
}
Change = Callable[[Any, int], Any]


@pytest.fixture(scope="module")
def volume(scan_file: Path) -> Volume:
    return read_volume(scan_file)


@pytest.fixture(scope="module")
def small() -> Volume:
    """Six slices of noise with negative values, unequal sides."""
    hu = np.random.default_rng(3).integers(-1024, 1500, (37, 34, 6)).astype(np.int16)
    affine = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -40], [0, 0, 3, 7], [0, 0, 0, 1]])
    return Volume(hu, affine)


@pytest.fixture(scope="module")
def series(volume: Volume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("dicom") / "patient", volume)


def assert_same_scan(scan: Any, volume: Volume) -> None:
    np.testing.assert_array_equal(scan.volume.working, volume.working)
    apart = corners_apart_mm(
        volume.working.shape, scan.volume.working_affine, volume.working_affine
    )
    np.testing.assert_allclose(apart, 0, atol=2e-5)  # positions have six decimals


# --- what comes in --------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)
def test_every_syntax_gives_the_voxels_it_was_made_from(
    small: Volume, tmp_path: Path, syntax: str
) -> None:
    scan = read_series(write_series(tmp_path / "s", small, syntax=syntax))
    assert_same_scan(scan, small)
    assert scan.warnings == ()
    assert scan.volume.hu.flags.f_contiguous


def test_slope_and_intercept_are_those_of_each_slice(small: Volume, tmp_path: Path) -> None:
    def change(dataset: Any, n: int) -> None:
        stored = np.frombuffer(dataset.PixelData, "<u2").astype(np.int32) + INTERCEPT
        dataset.RescaleSlope, dataset.RescaleIntercept = (n + 1) / 2, -2000
        dataset.PixelData = np.rint((stored + 2000) * 2 / (n + 1)).astype("<u2").tobytes()
        dataset.BitsStored, dataset.HighBit = 16, 15

    scan = read_series(write_series(tmp_path / "s", small, change))
    # Rounded to a step of half a slope when it was stored, and to whole HU when read.
    off = np.abs(scan.volume.working.astype(int) - small.working)
    assert off.max() <= 2
    assert off[0].max() == off[1].max() == 0


@pytest.mark.parametrize(("value", "limit"), [(0, None), (4000, None), (3990, 4010)])
def test_padding_becomes_air(small: Volume, tmp_path: Path, value: int, limit: int | None) -> None:
    def change(dataset: Any, n: int) -> None:
        stored = np.frombuffer(dataset.PixelData, "<u2").copy()
        stored[:3] = value
        dataset.PixelData = stored.tobytes()
        dataset.add_new("PixelPaddingValue", "US", value)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", "US", limit)

    scan = read_series(write_series(tmp_path / "s", small, change))
    flat = scan.volume.working[:, ::-1, ::-1].reshape(6, -1)
    np.testing.assert_array_equal(flat[:, :3], -1024)
    np.testing.assert_array_equal(flat[:, 3:], small.working[:, ::-1, ::-1].reshape(6, -1)[:, 3:])
    assert any("padding" in warning for warning in scan.warnings) == (value > 0)


def test_names_and_order_of_files_mean_nothing(small: Volume, tmp_path: Path) -> None:
    first = write_series(tmp_path / "a", small)
    second = tmp_path / "b"
    second.mkdir()
    for n, file in enumerate(sorted(first.iterdir(), reverse=True)):
        shutil.copy(file, second / f"IM{n}")
    (second / "notes.txt").write_text("no DICOM")
    one, other = read_series(first), read_series(second)
    np.testing.assert_array_equal(one.volume.hu, other.volume.hu)
    assert one.digest == other.digest
    changed = write_series(tmp_path / "c", small, lambda d, n: setattr(d, "StationName", "x"))
    assert read_series(changed).digest != one.digest


def test_a_folder_a_zip_a_file_are_one_scan(small: Volume, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", small)
    archive = tmp_path / "s.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for n, file in enumerate(folder.iterdir()):
            packed.write(file, f"../../study/{n}")  # a path that leads out is only a name
    digest = read_series(folder).digest
    before = sorted(tmp_path.rglob("*"))
    for source in (folder, archive, folder / "000.dcm", str(folder)):
        assert is_dicom(source)
        scan = as_scan(source)
        assert isinstance(scan, DicomScan)
        assert_same_scan(scan, small)
        assert scan.digest == digest
    assert sorted(tmp_path.rglob("*")) == before
    assert find_scans(archive) == {"s": archive}
    assert find_scans(folder) == {"s": folder}
    assert find_scans(tmp_path) == {"s": folder}


def test_an_anonymised_series_without_class_and_preamble(small: Volume, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", small, lambda d, n: setattr(d, "SOPClassUID", ""))
    assert_same_scan(read_series(folder), small)

    def bare(dataset: Any, n: int) -> bool:
        path = tmp_path / f"bare/{n}"
        path.parent.mkdir(exist_ok=True)
        del dataset.file_meta
        dataset.save_as(path, implicit_vr=True, little_endian=True)
        return False

    with_none = write_series(tmp_path / "none", small, bare, SYNTAXES["explicit"])
    assert not list(with_none.iterdir())
    assert_same_scan(read_series(tmp_path / "bare"), small)


def test_several_series_are_several_scans(small: Volume, tmp_path: Path) -> None:
    folder = tmp_path / "study"

    def numbered(number: int, **tags: Any) -> Change:
        def change(dataset: Any, n: int) -> None:
            dataset.SeriesNumber = number
            for keyword, value in tags.items():
                setattr(dataset, keyword, value)

        return change

    made = [
        (2, {}),
        (5, {}),
        (6, {"Modality": "MR"}),
        (1, {"ImageType": ["ORIGINAL", "LOCALIZER"]}),
    ]
    for number, tags in made:
        part = write_series(
            tmp_path / "part", small, numbered(number, **tags), uid=f"2.25.{number}"
        )
        folder.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.rename(folder / f"{number}-{file.name}")
    assert list(list_series(folder)) == ["2", "5"]
    found = find_scans(folder)
    assert found == {f"study/series_{n}": Path(f"{folder}#{n}") for n in (2, 5)}
    with pytest.raises(InputError, match=r"mixes 2 CT series: #2 \(6 slices of 37×34\), #5"):
        read_series(folder)
    for choice in ("2", "2.25.2"):
        scan = read_series(f"{folder}#{choice}")
        assert_same_scan(scan, small)
        assert {header.SeriesInstanceUID for header in scan.series.headers} == {"2.25.2"}
        assert len([w for w in scan.warnings if "left out" in w]) == 2
    with pytest.raises(InputError, match="has no CT series 7; choose from 2, 5"):
        read_series(f"{folder}#7")
    assert_same_scan(read_series(folder / "5-000.dcm"), small)


def test_series_of_an_archive_are_found_at_depth(small: Volume, tmp_path: Path) -> None:
    deep = [f"p{n}/study/series" for n in (1, 2)] + ["p3/a/b/c/d/e/f/series"]
    for n, inside in enumerate(deep):
        write_series(tmp_path / "archive" / inside, small, uid=f"2.25.{n + 5}")
    archive = tmp_path / "archive"
    (archive / "p1/study/again").symlink_to(archive, target_is_directory=True)
    (archive / "p2/study/here").symlink_to(".", target_is_directory=True)
    (archive / "p1/study/scan.nii.gz").write_bytes(b"")
    expected = {inside: archive / inside for inside in deep}
    assert find_scans(archive) == expected | {"p1/study/scan": archive / "p1/study/scan.nii.gz"}


# --- what is refused ------------------------------------------------------------------------------


def _shift(axis: int, mm: Callable[[int], float]) -> Change:
    def change(dataset: Any, n: int) -> None:
        position = [float(v) for v in dataset.ImagePositionPatient]
        position[axis] += mm(n)
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in position]

    return change


def _set(keyword: str, value: Any, only: int | None = None) -> Change:
    def change(dataset: Any, n: int) -> None:
        if only is None or n == only:
            setattr(dataset, keyword, value)

    return change


def _without(keyword: str) -> Change:
    return lambda dataset, n: dataset.__delattr__(keyword)


def _cut_pixels(dataset: Any, n: int) -> None:
    dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 4 * 2]


BROKEN: dict[str, tuple[Change, str]] = {
    "a slice is missing": (lambda d, n: n != 2, "lacks 1 of 6 slices, which are 3.00 mm apart"),
    "two in one place": (
        _shift(2, lambda n: -3.0 if n == 3 else 0),
        "has 1 of 6 slices in the place",
    ),
    "uneven": (
        _shift(2, lambda n: 0.9 if n > 2 else 0),
        "uneven steps between slices, from 3.00 to 3.90",
    ),
    "drifting": (_shift(2, lambda n: 0.12 * n * n), "uneven steps"),
    "gantry tilt": (
        _shift(1, lambda n: 0.8 * n),
        "tilted gantry: its slices are stacked 14.9 degrees",
    ),
    "slight tilt": (
        _shift(1, lambda n: 0.2 * n),
        "tilted gantry: its slices are stacked 3.8 degrees",
    ),
    "two patients": (_set("PatientID", "7", only=1), "mixes slices of 2 patients"),
    "frames of reference": (_set("FrameOfReferenceUID", "2.25.9", only=1), "2 frames of reference"),
    "orientations": (
        _set("ImageOrientationPatient", [0, 1, 0, -1, 0, 0], only=1),
        "mixes slices of several orientations",
    ),
    "sizes": (_set("PixelSpacing", [1, 1], only=1), "mixes slices of 2 pixel spacings"),
    "MR": (_set("Modality", "MR"), r"holds no CT series \(no CT, but MR\)"),
    "no position": (_without("ImagePositionPatient"), "6 of 6 slices without a position"),
    "no sense": (_set("ImagePositionPatient", [1, 2]), "a geometry that makes no sense"),
    "no pixels": (_without("PixelData"), "which has no pixel data"),
    "no rows": (_without("Rows"), "6 of 6 slices without pixel data"),
    "cut pixels": (_cut_pixels, "whose pixel data are truncated or damaged"),
    "enhanced": (_set("NumberOfFrames", 4), "is a multi-frame"),
    "one slice": (lambda d, n: n == 0, "holds a single slice"),
    "not HU": (_set("RescaleType", "Z_EFF"), "values of the type Z_EFF, not HU"),
    "no rescaling": (_set("RescaleIntercept", 0), "the intercept, often -1024, may be missing"),
}


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_series_is_refused_by_name(
    small: Volume, tmp_path: Path, change: Change, reason: str
) -> None:
    folder = write_series(tmp_path / "series", small, change)
    with pytest.raises(InputError, match=reason) as caught:
        read_series(folder)
    line = str(caught.value)
    assert line.startswith(f"{folder}: ")
    assert "\n" not in line
    assert "; " in line


def test_truncated_and_foreign_files(small: Volume, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", small, syntax=SYNTAXES["jpeg-2000"])
    file = folder / "000.dcm"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - 60])
    with pytest.raises(InputError, match=r"000\.dcm, which has no pixel data or ends before them"):
        read_series(folder)
    # An end slice: nobody would miss it if it were left out.
    modality = whole.index(b"CS\2\0CT")
    for n_bytes in (132, 180, 200, 240, modality - 20, modality, modality + 5):
        file.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match=r"000\.dcm, whose DICOM header cannot"):
            read_series(folder)
    for n_bytes in range(modality + 6, whole.index(b"\xe0\x7f\x10\0"), 7):
        file.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError):
            read_series(folder)
    file.write_bytes(whole)
    directory = pydicom.Dataset()
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "2.25.77"
    directory.file_meta.TransferSyntaxUID = SYNTAXES["explicit"]
    directory.FileSetID = "DISC"
    directory.save_as(folder / "dicomdir", enforce_file_format=True)
    scan = read_series(folder)
    assert_same_scan(scan, small)
    assert scan.warnings == ("1 files beside the series were left out: no CT, but something else",)
    (tmp_path / "e").mkdir()
    assert not is_dicom(tmp_path / "e")
    assert not is_dicom(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no DICOM file"):
        read_series(tmp_path / "e")


def test_zips_that_are_refused(small: Volume, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", small)
    good = tmp_path / "good.zip"
    with zipfile.ZipFile(good, "w") as packed:
        for file in folder.iterdir():
            packed.write(file, file.name)
    cut = tmp_path / "cut.zip"
    cut.write_bytes(good.read_bytes()[:-40])
    with pytest.raises(InputError, match="damaged zip"):
        read_series(cut)
    flipped = bytearray(good.read_bytes())
    flipped[len(flipped) // 3] ^= 255
    cut.write_bytes(flipped)
    with pytest.raises(InputError, match=r"damaged|truncated|cannot be read"):
        read_series(cut)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.dcm", bytes(1000))
        packed.infolist()[0].file_size = 1 << 40
    with pytest.raises(InputError, match=r"declares a file of|damaged"):
        read_series(bomb)
    empty = tmp_path / "none.zip"
    with zipfile.ZipFile(empty, "w") as packed:
        packed.writestr("a.txt", "x")
    with pytest.raises(InputError, match="holds no DICOM file"):
        read_series(empty)


def test_a_missing_decoder_and_missing_packages_have_a_remedy(
    small: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jpeg(dataset: Any, n: int) -> None:
        dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"

    folder = write_series(tmp_path / "s", small, jpeg)
    if not pydicom.pixels.get_decoder("1.2.840.10008.1.2.4.70").is_available:
        with pytest.raises(InputError, match=r"JPEG Lossless.*no decoder.*python-gdcm"):
            read_series(folder)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r'pip install "organfast\[dicom\]"'):
        read_series(folder)


# --- what goes out --------------------------------------------------------------------------------


def _labels_of_seg(path: Path, classes: ClassTable) -> NDArray[np.int64]:
    """(slice, row, column) labels, by the names of the segments; read by highdicom."""
    segmentation = highdicom.seg.segread(path)
    read = segmentation.get_volume(combine_segments=True, allow_missing_positions=True)
    label_of = np.zeros(segmentation.number_of_segments + 1, int)
    for number in segmentation.segment_numbers:
        label_of[number] = classes.index(segmentation.get_segment_description(number).segment_label)
    return read, label_of[read.array]


def _on_grid(path: Path, scan: DicomScan, classes: ClassTable) -> NDArray[np.int64]:
    """Labels of a SEG where the scan stores its voxels."""
    read, labels = _labels_of_seg(path, classes)
    found = np.zeros(scan.volume.hu.shape, int)
    index = np.argwhere(labels)
    mm = index @ read.affine[:3, :3].T + read.affine[:3, 3]
    stored = np.rint(scan.volume.to_index(mm * (-1, -1, 1))).astype(int)
    found[tuple(stored.T)] = labels[tuple(index.T)]
    return found


def test_dicom_seg_is_the_nifti_label_map(
    series: Path, scan_file: Path, model_file: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["segment", "-i", str(series), "-m", str(model_file), "--no-preview"]
    types = ["-ot", "nifti", "-ot", "dicom_seg"]
    assert run([*arguments, "-o", str(tmp_path / "out"), *types]) == 0
    labels, affine = read_labels(tmp_path / "out" / "segmentation.nii.gz")
    scan = read_series(series)
    np.testing.assert_allclose(affine, scan.volume.affine, atol=1e-4)
    classes = ClassTable.from_dict(
        [
            {key: value for key, value in row.items() if key != "label"}
            for row in json.loads((tmp_path / "out" / "labels.json").read_text())
        ]
    )
    seg = tmp_path / "out" / "segmentation.dcm"
    assert len(np.unique(labels)) > 5
    np.testing.assert_array_equal(_on_grid(seg, scan, classes), labels)
    # The phantom from its NIfTI file: the same organs on the same side.
    assert run(["segment", "-i", str(scan_file), "-o", str(tmp_path / "n"), *arguments[3:]]) == 0
    other, other_affine = read_labels(tmp_path / "n" / "segmentation.nii.gz")
    working = scan.volume.orientation.working(labels)
    reference = Volume(np.zeros(other.shape, np.int16), other_affine).orientation.working(other)
    np.testing.assert_array_equal(working, reference)
    # Again: the same bytes; and a SEG alone replaces the earlier result.
    first = seg.read_bytes()
    assert run([*arguments, "-o", str(tmp_path / "out"), "-ot", "dicom_seg"]) == 0
    assert seg.read_bytes() == first
    assert not (tmp_path / "out" / "segmentation.nii.gz").exists()
    capsys.readouterr()
    assert run(["locate", "-i", str(series), "-m", str(model_file), "--json"]) == 0
    assert "liver" in capsys.readouterr().out


def test_what_a_dicom_seg_says(small: Volume, tmp_path: Path) -> None:
    scan = read_series(write_series(tmp_path / "s", small))
    classes = ClassTable.default()
    labels = np.zeros(scan.volume.hu.shape, np.uint8)
    right, rectus = classes.index("kidney_right"), classes.index("rectus_abdominis_left")
    labels[2:4, 3, 1], labels[5, 1:4, 4] = right, rectus
    path = tmp_path / "seg.dcm"
    origin = {"version": "0.1", "model": "abc"}
    write_segmentation(path, labels, scan, classes, origin)
    np.testing.assert_array_equal(_on_grid(path, scan, classes), labels)
    seg = pydicom.dcmread(path)
    assert (seg.SegmentationType, seg.Modality, seg.BitsAllocated) == ("BINARY", "SEG", 1)
    assert seg.StudyInstanceUID == "2.25.1"
    assert seg.FrameOfReferenceUID == "2.25.2"
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == "2.25.1000"
    kidney, muscle = seg.SegmentSequence
    kind = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("64033007", "SCT")
    assert kind.SegmentedPropertyTypeModifierCodeSequence[0].CodeValue == "24028007"
    assert kidney.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
    assert kidney.SegmentAlgorithmType == "AUTOMATIC"
    own = muscle.SegmentedPropertyTypeCodeSequence[0]
    assert own.CodingSchemeDesignator == "99ORGANFAST"
    assert own.LongCodeValue == "rectus_abdominis_left"
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "AccessionNumber"):
        assert not seg[keyword].value
    # Each frame refers to the slice that it lies in.
    place = {h.SOPInstanceUID: h.ImagePositionPatient for h in scan.series.headers}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, place[source], atol=1e-4)
    write_segmentation(path, np.zeros_like(labels), scan, classes, origin)
    assert not _on_grid(path, scan, classes).any()
    with pytest.raises(ValueError, match="do not fit"):
        write_segmentation(path, labels[1:], scan, classes, origin)


def test_dicom_seg_needs_a_series_and_a_folder(
    small: Volume, series: Path, scan_file: Path, model_file: Path, tmp_path: Path, capsys: Any
) -> None:
    common = ["-m", str(model_file), "-ot", "dicom_seg"]
    assert run(["segment", "-i", str(scan_file), "-o", str(tmp_path / "o"), *common]) == 1
    assert "is no DICOM series" in capsys.readouterr().err
    assert run(["segment", "-i", str(series), "-o", str(tmp_path / "o.nii.gz"), *common]) == 2
    assert "needs a folder" in capsys.readouterr().err
    assert run(["segment", "-i", str(series), "-o", str(tmp_path / "o"), *common, "-ot", "x"]) == 2
    assert not list(tmp_path.iterdir())
    bare = write_series(tmp_path / "s", small, _set("StudyInstanceUID", ""))
    assert run(["segment", "-i", str(bare), "-o", str(tmp_path / "o"), *common]) == 1
    assert "s: has no StudyInstanceUID" in capsys.readouterr().err
    result = segment(scan_file, model_file)
    with pytest.raises(ValueError, match="no DICOM series"):
        result.save(tmp_path / "o", types=("dicom_seg",))
    with pytest.raises(ValueError, match="types are"):
        result.save(tmp_path / "o", types=("png",))


def test_a_collection_of_series_and_files(
    small: Volume, series: Path, scan_file: Path, model_file: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(series, tmp_path / "in" / "a")
    shutil.copy(scan_file, tmp_path / "in" / "b.nii.gz")
    write_series(tmp_path / "in" / "c", small, BROKEN["uneven"][0])
    write_series(tmp_path / "in" / "d", small, BROKEN["MR"][0])
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(model_file)]
    assert run(["segment", *arguments, "--no-preview"]) == 3
    results = {path.parent.name for path in (tmp_path / "out").glob("*/run.json")}
    assert results == {"a", "b"}
    assert "in/c: has uneven steps" in capsys.readouterr().err


# --- no person ------------------------------------------------------------------------------------


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            yield path.name, gzip.decompress(content) if path.suffix == ".gz" else content
        yield path.name, path.name.encode()


def _assert_nothing_of(planted: set[bytes], contents: list[tuple[str, bytes]]) -> None:
    for name, content in contents:
        assert b"PLANT" not in content, name
        found = {value for value in planted if b"PLANT" not in value and value in content}
        assert not found, f"{name}: {found}"


def test_no_planted_value_reaches_an_output(
    volume: Volume, model_file: Path, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    planted: set[bytes] = set()
    # Thousands of tags take their time: few slices.
    step = volume.hu.shape[2] // 3
    thick = Volume(volume.hu[:, :, ::step], volume.affine * [1, 1, step, 1])
    folder = write_series(
        tmp_path / "series", thick, lambda dataset, n: planted.update(plant(dataset))
    )
    assert len(planted) > 4000
    whole = (folder / "000.dcm").read_bytes()
    assert sum(value in whole for value in planted) > 4000
    arguments = ["-i", str(folder), "-m", str(model_file), "--json", "--debug"]
    out = ["-o", str(tmp_path / "out"), "-ot", "nifti", "-ot", "dicom_seg", "--probabilities"]
    capfd.readouterr()
    caplog.set_level(0)
    assert run(["segment", *arguments, *out, "--organs", "liver,lung_left"]) == 0
    told = capfd.readouterr()
    said = [("out", told.out.encode()), ("err", told.err.encode()), ("log", caplog.text.encode())]
    contents = list(_contents(tmp_path / "out"))
    assert {"segmentation.dcm", "segmentation.nii.gz", "run.json", "liver.png"} <= {
        n for n, _ in contents
    }
    _assert_nothing_of(planted, [*contents, *said])


QUOTED: dict[str, Change] = {
    **{name: change for name, (change, _) in BROKEN.items() if name != "two patients"},
    "patients": lambda d, n: setattr(d, "PatientName", f"PLANT{n}"),
    "modality": _set("Modality", "PLANTmodality"),
    "image type": _set("ImageType", ["PLANTtype"]),
    "rescale type": _set("RescaleType", "PLANTrescale"),
    "characters": _set("SpecificCharacterSet", "PLANTset"),
    "photometric": _set("PhotometricInterpretation", "PLANTphoto"),
    "instance": _set("SOPInstanceUID", "PLANTuid"),
    "study": _set("StudyInstanceUID", "PLANTuid"),
    "series": _set("SeriesInstanceUID", "PLANTuid"),
    **{
        f"number in {keyword}": (
            lambda d, n, keyword=keyword: d.add(
                pydicom.DataElement(keyword, "LO", "PLANTnumber", validation_mode=0)
            )
        )
        for keyword in (
            *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows"),
            *("RescaleSlope", "RescaleIntercept", "SeriesNumber", "PixelPaddingValue"),
            *("BitsStored", "NumberOfFrames", "PixelRepresentation"),
        )
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("change", QUOTED.values(), ids=QUOTED)
def test_no_error_quotes_a_tag(
    small: Volume, tmp_path: Path, change: Change, monkeypatch: Any, capfd: Any, caplog: Any
) -> None:
    def broken(dataset: Any, n: int) -> Any:
        dataset.PatientName, dataset.PatientID = "PLANTname", "PLANTid"
        dataset.add_new("OtherPatientNames", "PN", "PLANTother")
        return change(dataset, n)

    settings = pydicom.config.settings
    monkeypatch.setattr(settings, "_writing_validation_mode", pydicom.config.IGNORE)
    folder = write_series(tmp_path / "series", small, broken)
    capfd.readouterr()  # what the writing of such files says
    caplog.clear()
    told = ""
    try:
        scan = read_series(folder)
        told = " ".join(scan.warnings)
        labels = np.zeros(scan.volume.hu.shape, np.uint8)
        labels[3, 3, 3] = 3
        origin = {"version": "0", "model": "m"}
        write_segmentation(tmp_path / "out.dcm", labels, scan, ClassTable.default(), origin)
    except InputError as error:
        told = "".join(traceback.format_exception(error))
    output = capfd.readouterr()
    assert "PLANT" not in told + output.out + output.err + caplog.text
    if (tmp_path / "out.dcm").exists():
        assert b"PLANT" not in (tmp_path / "out.dcm").read_bytes()


# --- real series ----------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="no real scans beside this checkout")
def test_real_series_lie_where_their_labels_and_others_say() -> None:
    scan = read_series(DATA / "dicom_slab" / "series")
    labels = read_scan_of_labels(DATA / "dicom_slab" / "labels.nii.gz")
    assert scan.volume.working.shape == labels.working.shape
    apart = corners_apart_mm(
        labels.working.shape, scan.volume.working_affine, labels.working_affine
    )
    np.testing.assert_allclose(apart, 0, atol=0.01)
    # Liver (5) and spleen (1) are of tissue, and the liver is on the right.
    tissue = {id_: scan.volume.working[labels.working == id_] for id_ in (1, 5)}
    assert all(20 < np.median(values) < 180 for values in tissue.values())
    k, i, j = np.nonzero(labels.working == 5)
    liver = scan.volume.working_affine @ (k.mean(), i.mean(), j.mean(), 1)
    k, i, j = np.nonzero(labels.working == 1)
    spleen = scan.volume.working_affine @ (k.mean(), i.mean(), j.mean(), 1)
    assert liver[0] > spleen[0] + 50
    other = read_series(DATA / "dicom_series" / "CRLM-CT-1004")
    assert other.volume.hu.shape == (512, 512, 41)
    np.testing.assert_allclose(other.volume.working_spacing_mm, (5, 0.796875, 0.796875))
    assert other.volume.hu.min() == -3024


def read_scan_of_labels(path: Path) -> Volume:
    labels, affine = read_labels(path)
    return Volume(labels.astype(np.int16), affine)
