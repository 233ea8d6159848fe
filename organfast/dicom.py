"""DICOM series in, DICOM SEG out. The only module that imports pydicom and highdicom.

::

    folder, zip, file ──> headers, a closed list of tags ──> CT series ──> highdicom: regular?
                                                                │
         int16 HU, (column, row, slice) <── pydicom: decoded, rescaled, slice after slice

**Privacy.** Only the tags of ``_HEADER`` and ``_PIXELS`` are read; those that tell one patient from
another are compared and dropped at once. What a library says of a file (exceptions, warnings, log
lines) may quote a tag and is therefore never passed on: errors are in our words. Numbers of the
geometry and UIDs are the only contents of a tag that reach an output.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure
from organfast.errors import InputError
from organfast.nifti import Geometry, Scan, accept_hu, check_extent, check_is_hu, doubts_of_hu
from organfast.room import roomy
from organfast.volume import AIR_HU, Volume

__all__ = [
    "DicomScan",
    "Series",
    "check_is_dicom",
    "is_dicom",
    "list_series",
    "read_series",
    "write_segmentation",
]

StrPath = str | PathLike[str]

# What is read of each file. Nothing here names a person.
_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
    *("FrameOfReferenceUID", "Modality", "ImageType", "SeriesNumber", "NumberOfFrames"),
    *("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
)
# Compared between files of one place, and forgotten.
_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
_PIXELS = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PlanarConfiguration"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData", "FloatPixelData"),
)
_META_CLASS = "MediaStorageSOPClassUID"
_CT = "1.2.840.10008.5.1.4.1.1.2"
_ENHANCED_CT = {"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}
# Modalities that an error may name (PS3.3 C.7.3.1.1.1): a tag may hold anything.
_MODALITIES = frozenset(
    {
        *("CR", "DOC", "DX", "ES", "KO", "MG", "MR", "NM", "OT", "PR", "PT", "PX", "REG", "RF"),
        *("RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SM", "SR", "US", "XA", "XC"),
    }
)
# Rescale types of spectral CT, which are no HU (PS3.3 C.11.1.1.2).
_NOT_HU = frozenset({"MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT", "OD"})

_ZIP_MAGIC = b"PK\x03\x04"
# A file of single-frame CT is one slice; headers alone are read of what else is there.
_MAX_SLICE_BYTES = 256 << 20
_MAX_SIDE = 8192
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_META_BYTES = 2048
_MAX_MEMBERS = 100_000
_CHUNK = 1 << 20
# A slice has some hundred elements, each read in two or three pieces.
_MOST_READS = 200_000
# Deflate cannot do better (see nifti.py); the other methods of a zip are not for us.
_MAX_RATIO = 1032

# Positions are often rounded to 0.1 mm, which is 5 % of a step of 2 mm.
_STEP_TOLERANCE = 0.05
# Direction cosines are written with six digits or so.
_COSINE_TOLERANCE = 1e-4
# A slice that is farther from its place than this part of a voxel is not where the grid says.
_OFF_GRID = 0.5
# Steps shorter than this part of the usual one are no steps; such slices lie in one place.
_SAME_PLACE = 0.1

_CONVERT = "export the series again, complete, or give it as .nii.gz"
_INSTALL = 'pip install "organfast[dicom]"'
# A SEG must hold dates (type 1); results are the same bytes on any day.
_NO_DATE, _NO_TIME = "19700101", "000000"
_SEG_SERIES_NUMBER = 900
_SIDES = {"R": ("24028007", "Right"), "L": ("7771000", "Left")}
_OWN_SCHEME = "99ORGANFAST"


@dataclass(frozen=True, eq=False)
class Series:
    """What a DICOM SEG says of the CT series that it belongs to.

    Parameters
    ----------
    path : str
        The folder, zip or file as the user gave it.
    headers : tuple of pydicom.Dataset
        One for each slice, in the order of the volume; tags of the geometry and UIDs only.
    """

    path: str
    headers: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class DicomScan(Scan):
    """A scan that was read from a DICOM series; stored axes are column, row, slice.

    Parameters
    ----------
    volume, geometry, warnings
        As of every scan.
    series : Series
        What a DICOM SEG refers to.
    digest : str
        SHA-256, hexadecimal, over those of the series' files in ascending order: names and order of
        the files do not matter.
    """

    series: Series = Series("", ())
    digest: str = ""


# --- what is DICOM --------------------------------------------------------------------------------


def is_dicom(path: StrPath) -> bool:
    """Whether a path is read as DICOM: a folder that directly holds DICOM files, a zip, a file.

    Parameters
    ----------
    path : str or PathLike
        May end in ``#SERIES``; need not exist.
    """
    place, _ = _place_and_choice(path)
    try:
        if os.path.isdir(place):
            return any(_looks_dicom(file) for file in _files_of(Path(place)))
        return os.path.isfile(place) and (_is_zip(place) or _looks_dicom(Path(place)))
    except OSError:
        return False


def check_is_dicom(path: StrPath) -> None:
    """Refuse a scan for which no DICOM SEG can be written, before anything is computed.

    Parameters
    ----------
    path : str or PathLike
        A scan.

    Raises
    ------
    InputError
        The scan is no DICOM series, or lacks UIDs to refer to.
    """
    if os.path.exists(_place_and_choice(path)[0]) and not is_dicom(path):
        raise InputError(
            path,
            "is no DICOM series, which a DICOM SEG has to refer to",
            "give the series itself, or leave -ot dicom_seg",
        )
    if not is_dicom(path) or _place_and_choice(path)[1] is not None:
        return  # of several series that which is meant is looked at when it is read
    with _opened(path) as files:
        for file in files:
            header = _headers(path, [file])[0]
            if _not_ct(header) is None:
                _check_uids(path, header.tags, _pydicom(path))
                return


def list_series(path: StrPath) -> dict[str, str]:
    """The CT series of a folder or zip, by what chooses one of them after a ``#``.

    Parameters
    ----------
    path : str or PathLike
        A folder that directly holds DICOM files, or a zip.

    Returns
    -------
    dict of str to str
        Choice -> what it is (number and size of its slices). A choice is the series number, or
        eight hexadecimal digits from its UID where numbers are missing or shared. Empty where there
        is no CT; what is no CT and localizers are not listed.

    Raises
    ------
    InputError
        It cannot be read, or holds more than one patient.
    """
    with _opened(path) as files:
        series, _ = _ct_series(path, _headers(path, files))
        return {choice: _described(headers) for choice, headers in series.items()}


def _place_and_choice(path: StrPath) -> tuple[str, str | None]:
    """A path, and which of its series is meant: ``FOLDER#3``."""
    text = os.fspath(path)
    place, mark, choice = text.rpartition("#")
    if mark and place and not os.path.exists(text) and os.path.exists(place):
        return place, choice
    return text, None


def _looks_dicom(path: Path) -> bool:
    """By the mark after the preamble; or, where there is none, by a first tag of group 8 or 2."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:] == b"DICM" or (
        head[:2] in (b"\x08\x00", b"\x02\x00") and head[3:4] == b"\0" and len(head) == 132
    )


def _is_zip(path: StrPath) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _files_of(folder: Path) -> Iterator[Path]:
    """Regular files that may be DICOM, sorted; hidden ones and a DICOMDIR are left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file() and not entry.name.startswith(".") and entry.name != "DICOMDIR":
            yield Path(entry.path)


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    name: str
    open: Callable[[], BinaryIO]


@contextmanager
def _opened(path: StrPath) -> Iterator[list[_File]]:
    """The DICOM files of a folder, of a zip, or those beside a file."""
    place = _place_and_choice(path)[0]
    try:
        if os.path.isfile(place) and _is_zip(place):
            with zipfile.ZipFile(place) as archive:
                yield _members(path, archive)
            return
        folder = Path(place) if os.path.isdir(place) else Path(place).parent
        found = [file for file in _files_of(folder) if _looks_dicom(file)]
        if not found:
            raise InputError(path, "holds no DICOM file", "give the folder of a CT series")
        yield [_File(file.name, _opener(file)) for file in found]
    except (zipfile.BadZipFile, EOFError):
        raise InputError(path, "is a damaged zip file", "copy or pack it again") from None
    except OSError as error:
        reason = error.strerror or "it cannot be opened"
        raise InputError(path, f"cannot be read ({reason})", "check its name and rights") from None


def _opener(file: Path) -> Callable[[], BinaryIO]:
    return lambda: open(file, "rb")


def _members(path: StrPath, archive: zipfile.ZipFile) -> list[_File]:
    """The DICOM files of a zip, read in memory, one at a time: none is unpacked to the disk."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > _MAX_MEMBERS:
        raise InputError(path, f"holds {len(infos)} files", "pack one study alone")
    files = []
    for info in infos:
        name = info.filename.rpartition("/")[2]
        if name.startswith(".") or name == "DICOMDIR" or "__MACOSX/" in info.filename:
            continue
        if info.flag_bits & 1:
            raise InputError(path, "is encrypted", "give it unpacked, or without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(path, "is packed by an unusual method", "pack it again, by deflate")
        if info.file_size > _MAX_RATIO * info.compress_size + 1024:
            raise InputError(
                path,
                f"declares a file of {info.file_size} bytes, which it cannot hold",
                "pack it again",
            )
        with archive.open(info) as member:
            head = member.read(132)
        if head[128:] == b"DICM":
            files.append(_File(name, _member_opener(archive, info)))
    if not files:
        raise InputError(path, "holds no DICOM file", "give a zip of a CT series")
    return files


def _member_opener(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], BinaryIO]:
    return lambda: archive.open(info)  # type: ignore[return-value]  # an IO[bytes]


class _FewReads:
    """A file that may be asked for so many pieces, and no more.

    The library takes it element by element. A few MB of elements that hold nothing would keep it
    busy for minutes.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, _MOST_READS

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        self._left -= 1
        if self._left < 0:
            raise _Unreadable
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As a file's."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """As a file's."""
        return self._stream.tell()

    def close(self) -> None:
        """Left to who opened it."""


def _slice_bytes(path: StrPath, file: _File, stream: BinaryIO) -> bytes:
    """A file whole, unless it is larger than any slice of a CT, packed or not."""
    content = stream.read(_MAX_SLICE_BYTES + 1)
    if len(content) > _MAX_SLICE_BYTES:
        raise _oversized(path, file)
    if _DEFLATED in content[:_META_BYTES]:
        # Its data set is inflated whole by the library. Where it begins does not matter here.
        inflated, rest = zlib.decompressobj(-zlib.MAX_WBITS), content[_meta_end(content) :]
        n_bytes = 0
        try:
            while rest and n_bytes <= _MAX_SLICE_BYTES:
                n_bytes += len(inflated.decompress(rest, _CHUNK))
                rest = inflated.unconsumed_tail
        except zlib.error:
            return content  # damaged, which the library tells
        if n_bytes > _MAX_SLICE_BYTES:
            raise _oversized(path, file)
    return content


def _meta_end(content: bytes) -> int:
    """Where the data set begins: behind the file meta information, which says its own length."""
    start = 132 if content[128:132] == b"DICM" else 0
    if content[start : start + 6] != b"\x02\0\0\0UL":
        return start
    return start + 12 + int.from_bytes(content[start + 8 : start + 12], "little")


def _oversized(path: StrPath, file: _File) -> InputError:
    return InputError(
        path,
        f"holds {_shown(file)}, of more than {_MAX_SLICE_BYTES >> 20} MB, as no slice of a CT has",
        "take it away, or give the series alone",
    )


# --- the libraries, kept quiet --------------------------------------------------------------------

_LIBRARY_LOCK = threading.Lock()


class _Unreadable(Exception):
    """A library could not read something; what it said is lost on purpose."""


def _pydicom(path: StrPath) -> Any:
    try:
        import highdicom  # noqa: F401  # so that a series is not read for nothing
        import pydicom
    except ImportError:
        raise InputError(path, "is DICOM, for which packages are missing", _INSTALL) from None
    return pydicom


@contextmanager
def _quiet(pydicom: Any) -> Iterator[None]:
    """Run a library on a file so that no content of a tag gets out.

    Filters of warnings belong to the whole process, hence the lock.
    """
    logger, settings = logging.getLogger("pydicom"), pydicom.config.settings
    with _LIBRARY_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passed_on, mode = logger.propagate, settings.reading_validation_mode
        logger.propagate = False
        settings.reading_validation_mode = pydicom.config.IGNORE
        try:
            yield
        except (MemoryError, InputError):
            raise
        except Exception:
            # Parsers and decoders raise whatever they meet, and quote the file when they do.
            raise _Unreadable from None
        finally:
            logger.propagate, settings.reading_validation_mode = passed_on, mode


# --- series ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """One file: its tags, whose it is (a hash), and how to read it again."""

    file: _File
    tags: Any
    patient: int

    def get(self, keyword: str) -> str:
        return str(self.tags.get(keyword) or "")


def _headers(path: StrPath, files: Sequence[_File]) -> list[_Header]:
    pydicom = _pydicom(path)
    headers = []
    for file in files:
        try:
            with file.open() as stream, _quiet(pydicom):
                source: Any = stream
                is_deflated = _DEFLATED in stream.read(_META_BYTES)
                stream.seek(0)
                if is_deflated:
                    source = io.BytesIO(_slice_bytes(path, file, stream))
                tags = pydicom.dcmread(
                    _FewReads(source),
                    stop_before_pixels=True,
                    force=True,
                    specific_tags=[*_HEADER, *_PATIENT],
                )
                patient = hash(
                    tuple(str(tags.get(keyword) or "").strip("^ ") for keyword in _PATIENT)
                )
                for keyword in (*_PATIENT, "SpecificCharacterSet"):
                    if keyword in tags:
                        del tags[keyword]
                if _is_cut_off(tags):
                    raise _Unreadable
                tags.file_meta = pydicom.dataset.FileMetaDataset()
                for keyword in _HEADER:  # now: a value is only parsed when it is asked for
                    tags.get(keyword)
        except _Unreadable:
            raise InputError(
                path,
                f"holds {_shown(file)}, whose DICOM header cannot be read",
                "copy or export it again, or take it away if it is no part of the series",
            ) from None
        headers.append(_Header(file, tags, patient))
    return headers


def _is_cut_off(tags: Any) -> bool:
    """Whether a file ends before its modality, and may have been a slice of CT.

    A DICOMDIR has no modality either, but says in its meta header what it is. Where a file ends,
    what it says may be cut off as well.
    """
    modality = str(tags.get("Modality") or "")
    kinds = (str(tags.get("SOPClassUID") or ""), str(tags.file_meta.get(_META_CLASS) or ""))
    return modality in ("", "C") and all(
        any(uid.startswith(kind) for uid in (_CT, *_ENHANCED_CT)) for kind in kinds
    )


def _shown(file: _File) -> str:
    return f"the file {file.name}"


def _ct_series(
    path: StrPath, headers: Sequence[_Header]
) -> tuple[dict[str, list[_Header]], tuple[str, ...]]:
    """CT series by what chooses them, and what was left out."""
    by_uid: dict[str, list[_Header]] = {}
    left: Counter[str] = Counter()
    for header in headers:
        reason = _not_ct(header)
        if reason is None:
            by_uid.setdefault(header.get("SeriesInstanceUID"), []).append(header)
        else:
            left[reason] += 1
    patients = {header.patient for found in by_uid.values() for header in found}
    if len(patients) > 1:
        raise InputError(
            path, f"mixes slices of {len(patients)} patients", "give a folder for each of them"
        )
    numbers = {uid: found[0].get("SeriesNumber") for uid, found in by_uid.items()}
    shared = Counter(numbers.values())
    series = {}
    for uid, found in sorted(by_uid.items(), key=lambda item: (_whole(numbers[item[0]]), item[0])):
        number = numbers[uid]
        is_good = _whole(number) < 1_000_000 and shared[number] == 1
        choice = str(int(number)) if is_good else hashlib.sha256(uid.encode()).hexdigest()[:8]
        series[choice] = found
    notes = tuple(f"{n} files beside the series were left out: {why}" for why, n in left.items())
    return series, notes


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 1_000_000


def _not_ct(header: _Header) -> str | None:
    modality, sop_class = header.get("Modality"), header.get("SOPClassUID")
    if modality != "CT":
        return f"no CT, but {modality if modality in _MODALITIES else 'something else'}"
    if "LOCALIZER" in header.get("ImageType"):
        return "a localizer"
    if sop_class not in ("", _CT, *_ENHANCED_CT):
        return "no CT images, though their modality is CT"
    return None


def _described(headers: Sequence[_Header]) -> str:
    first = headers[0].tags
    return f"{len(headers)} slices of {first.get('Columns')}×{first.get('Rows')}"


def _chosen(path: StrPath, headers: Sequence[_Header]) -> tuple[list[_Header], tuple[str, ...]]:
    """The one series that is meant."""
    place, choice = _place_and_choice(path)
    series, notes = _ct_series(path, headers)
    if not series:
        what = "; ".join(note.rpartition(": ")[2] for note in notes)
        raise InputError(path, f"holds no CT series ({what})", "give the folder of a CT series")
    if os.path.isfile(place) and choice is None and not _is_zip(place):
        name = Path(place).name
        for found in series.values():
            if any(header.file.name == name for header in found):
                return found, notes
        raise InputError(path, "is no CT image", "give one slice of a CT series, or its folder")
    if choice is not None:
        for key, found in series.items():
            if choice in (key, found[0].get("SeriesInstanceUID")):
                return found, notes
        raise InputError(path, f"has no CT series {choice}", f"choose from {', '.join(series)}")
    if len(series) > 1:
        listed = ", ".join(f"#{key} ({_described(found)})" for key, found in series.items())
        raise InputError(
            path,
            f"mixes {len(series)} CT series: {listed}",
            f"choose one, such as {place}#{next(iter(series))}",
        )
    return next(iter(series.values())), notes


# --- reading --------------------------------------------------------------------------------------


def read_series(path: StrPath) -> DicomScan:
    """Read a CT series: highdicom puts the slices in order and tells whether they are a volume,
    pydicom decodes and rescales them.

    Padding (PixelPaddingValue) becomes air. HU are rounded to whole numbers.

    Parameters
    ----------
    path : str or PathLike
        A folder that directly holds the series, a zip, or one file of the series. Where there are
        several CT series, ``PATH#N`` is that with the series number N (see :func:`list_series`).

    Returns
    -------
    DicomScan
        Voxels in the order column, row, slice; affine RAS+ mm.

    Raises
    ------
    InputError
        The series cannot be read; is no CT, or not one; mixes patients or frames of reference;
        lacks slices, has two in one place, uneven steps or a tilted gantry; cannot be in HU.
    """
    pydicom = _pydicom(path)
    with _opened(path) as files:
        headers, notes = _chosen(path, _headers(path, files))
        _check_uniform(path, headers)
        headers, geometry = _in_order(path, headers)
        hu, digests, more = _read_voxels(path, headers, pydicom)
    # (slice, row, column) in memory, first axis first: for NIfTI the column is the first one.
    hu = hu.transpose(2, 1, 0)
    affine = np.asarray(geometry.permute_spatial_axes([2, 1, 0]).get_affine("RAH"), np.float64)
    check_extent(path, affine, hu.shape)
    volume = Volume(hu, affine)
    digest = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
    series = Series(os.fspath(path), tuple(header.tags for header in headers))
    return DicomScan(volume, Geometry.of_volume(volume), (*notes, *more), series, digest)


def _check_uniform(path: StrPath, headers: Sequence[_Header]) -> None:
    """What every slice of one volume has in common, and what it must have."""
    enhanced = any(
        h.get("SOPClassUID") in _ENHANCED_CT or h.get("NumberOfFrames") not in ("", "1")
        for h in headers
    )
    if enhanced:
        raise InputError(
            path,
            "is a multi-frame (enhanced) CT, which is not read",
            "convert it to single-frame CT, or to .nii.gz",
        )
    for keyword, what in (
        ("ImagePositionPatient", "a position (ImagePositionPatient)"),
        ("ImageOrientationPatient", "an orientation (ImageOrientationPatient)"),
        ("PixelSpacing", "a pixel spacing (PixelSpacing)"),
        ("Rows", "pixel data"),
        ("Columns", "pixel data"),
    ):
        lacking = sum(header.tags.get(keyword) in (None, "") for header in headers)
        if lacking:
            raise InputError(
                path, f"has {lacking} of {len(headers)} slices without {what}", _CONVERT
            )
    sides = [header.tags.get(key) for header in headers for key in ("Rows", "Columns")]
    if not all(isinstance(side, int) and 1 <= side <= _MAX_SIDE for side in sides):
        raise InputError(path, f"has slices of no pixels or of more than {_MAX_SIDE}", _CONVERT)
    if len(headers) < 2:
        raise InputError(path, "holds a single slice of its series", "give the whole series")
    for keyword, what in (
        ("StudyInstanceUID", "studies"),
        ("FrameOfReferenceUID", "frames of reference"),
        ("Rows", "image sizes"),
        ("Columns", "image sizes"),
        ("PixelSpacing", "pixel spacings"),
    ):
        values = {header.get(keyword) for header in headers}
        if len(values) > 1:
            raise InputError(
                path, f"mixes slices of {len(values)} {what} in one series", "give one series alone"
            )


def _in_order(path: StrPath, headers: Sequence[_Header]) -> tuple[list[_Header], Any]:
    """The slices in the order of the volume, and its geometry (axes slice, row, column)."""
    import highdicom as hd

    tags = [header.tags for header in headers]
    try:
        positions = np.array([t.ImagePositionPatient for t in tags], np.float64)
        cosines = np.array([t.ImageOrientationPatient for t in tags], np.float64)
        pixel = np.array(tags[0].PixelSpacing, np.float64)
        rows, columns = int(tags[0].Rows), int(tags[0].Columns)
        fits = positions.shape[1:] == (3,) and cosines.shape[1:] == (6,) and pixel.shape == (2,)
        if not (fits and np.isfinite(positions).all() and (pixel > 0).all()):
            raise ValueError
        normal = hd.spatial.get_normal_vector(list(cosines[0]))
    except (TypeError, ValueError, AttributeError):
        raise InputError(path, "has a geometry that makes no sense", _CONVERT) from None
    if np.abs(cosines - cosines[0]).max() > _COSINE_TOLERANCE:
        raise InputError(path, "mixes slices of several orientations", "give one series alone")
    spacing, places = hd.spatial.get_volume_positions(positions, cosines[0], rtol=_STEP_TOLERANCE)
    if places is None:
        raise _irregular(path, positions, np.asarray(normal))
    ordered = [headers[n] for n in np.argsort(places)]
    geometry = hd.VolumeGeometry.from_attributes(
        image_position=positions[np.argsort(places)[0]],
        image_orientation=cosines[0],
        rows=rows,
        columns=columns,
        pixel_spacing=pixel,
        spacing_between_slices=spacing,
        number_of_frames=len(tags),
        coordinate_system="PATIENT",
    )
    voxels = np.stack([np.array(places), *2 * [np.zeros(len(places), int)]], axis=1)
    off = np.abs(geometry.map_reference_to_indices(positions) - voxels).max(axis=0)
    if off.max() > _OFF_GRID:
        raise _irregular(path, positions, np.asarray(normal))
    return ordered, geometry


def _irregular(
    path: StrPath, positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> InputError:
    """Why slices at these positions are no volume, the plainest reason first."""
    along = positions @ normal
    order = np.argsort(along)
    steps = np.diff(along[order])
    usual = float(np.median(steps))
    n_slices = len(positions)
    same = int(np.count_nonzero(steps < max(_SAME_PLACE * usual, 1e-3)))
    if same:
        return InputError(
            path,
            f"has {same} of {n_slices} slices in the place of another one",
            "leave one of each; several phases or reconstructions are several series",
        )
    whole = np.rint(steps / usual)
    gaps = np.flatnonzero(whole > 1)
    if gaps.size and np.abs(steps / usual - whole).max() <= _SAME_PLACE:
        missing = int(whole[gaps].sum() - gaps.size)
        where = along[order][gaps[0]] - along[order][0]
        return InputError(
            path,
            f"lacks {missing} of {n_slices + missing} slices, which are {usual:.2f} mm apart; the "
            f"gap begins {where:.1f} mm from one end",
            _CONVERT,
        )
    if steps.max() - steps.min() > _STEP_TOLERANCE * usual:
        return InputError(
            path,
            f"has uneven steps between slices, from {steps.min():.2f} to {steps.max():.2f} mm",
            "give a reconstruction with one slice distance",
        )
    span = positions[order][-1] - positions[order][0]
    tilt = np.degrees(np.arccos(min(1.0, abs(span @ normal) / np.linalg.norm(span))))
    return InputError(
        path,
        f"was taken with a tilted gantry: its slices are stacked {tilt:.1f} degrees off their "
        "normal",
        "resample it to a straight grid first",
    )


def _read_voxels(
    path: StrPath, headers: Sequence[_Header], pydicom: Any
) -> tuple[NDArray[np.int16], list[str], tuple[str, ...]]:
    """(n_slices, rows, cols) int16 HU, the files' digests, and what is doubtful."""
    shape = (len(headers), int(headers[0].tags.Rows), int(headers[0].tags.Columns))
    hu: NDArray[np.int16] | None = None
    digests, extremes, padded, doubtful = [], [], 0, False
    for n, header in enumerate(headers):
        with header.file.open() as stream:
            content = _slice_bytes(path, header.file, stream)
        digests.append(hashlib.sha256(content).hexdigest())
        values, padding, is_hu = _decoded(path, header.file, content, pydicom)
        doubtful |= not is_hu
        if values.shape != shape[1:]:
            raise InputError(
                path,
                f"holds {_shown(header.file)}, whose pixels are not what it declares",
                _CONVERT,
            )
        if hu is None:  # now that a slice has been decoded as it was declared
            hu = roomy(shape, np.int16)
        if padding is not None:
            tissue = padding & (values > AIR_HU)
            padded += int(np.count_nonzero(tissue))
            values[tissue] = AIR_HU
        low, high = float(values.min()), float(values.max())
        extremes.append((low, high))
        hu[n] = accept_hu(path, values, low, high)
    if hu is None:
        raise ValueError("there is no slice to read")
    check_is_hu(path, hu, min(low for low, _ in extremes), max(high for _, high in extremes))
    highest = max(high for _, high in extremes)
    notes = list(doubts_of_hu(hu.transpose(2, 1, 0), highest))
    if padded:
        notes.append(f"{padded} voxels hold the padding value, above air, and count as air")
    if doubtful:
        notes.append("the header does not say that values are HU (RescaleType)")
    return hu, digests, tuple(notes)


def _decoded(
    path: StrPath, file: _File, content: bytes, pydicom: Any
) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None, bool]:
    """One slice in HU, where it is padding, and whether the header says that it is HU."""
    try:
        with _quiet(pydicom):
            image = pydicom.dcmread(
                _FewReads(io.BytesIO(content)), force=True, specific_tags=list(_PIXELS)
            )
            if "TransferSyntaxUID" not in image.file_meta:
                image.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
            syntax = image.file_meta.TransferSyntaxUID
            has_pixels = bool(image.get("PixelData"))
            kind = str(image.get("RescaleType") or "HU")
            decodes = not syntax.is_encapsulated or bool(
                pydicom.pixels.get_decoder(syntax).is_available
            )
    except _Unreadable:
        raise _undecodable(path, file) from None
    if not has_pixels:
        raise InputError(
            path, f"holds {_shown(file)}, which has no pixel data or ends before them", _CONVERT
        )
    if kind in _NOT_HU:
        raise InputError(path, f"holds values of the type {kind}, not HU", "give the CT in HU")
    if not decodes:
        raise InputError(
            path, f"is compressed as {syntax.name}, for which no decoder is here", _decoder(syntax)
        )
    try:
        with _quiet(pydicom):
            stored = image.pixel_array
            values = np.asarray(pydicom.pixels.apply_modality_lut(stored, image), np.float64)
            padding = _padding(image, stored)
    except _Unreadable:
        raise _undecodable(path, file) from None
    if values is stored or values.base is stored or not values.flags.writeable:
        values = values.copy()
    return values, padding, kind == "HU"


def _padding(image: Any, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Stored pixels equal to PixelPaddingValue, or between it and PixelPaddingRangeLimit."""
    value = image.get("PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = image.get("PixelPaddingRangeLimit")
    ends = sorted((int(value), int(value if limit in (None, "") else limit)))
    inside: NDArray[np.bool_] = (stored >= ends[0]) & (stored <= ends[1])
    return inside


def _undecodable(path: StrPath, file: _File) -> InputError:
    return InputError(
        path,
        f"holds {_shown(file)}, whose pixel data are truncated or damaged",
        "copy or export it again",
    )


def _decoder(syntax: Any) -> str:
    """What would read a compression: JPEG 2000 and JPEG-LS come with the extra."""
    if str(syntax).startswith(("1.2.840.10008.1.2.4.8", "1.2.840.10008.1.2.4.9")):
        return _INSTALL
    return "pip install python-gdcm, or decompress it with gdcmconv --raw"


# --- DICOM SEG ------------------------------------------------------------------------------------


def write_segmentation(
    path: StrPath,
    labels: NDArray[Any],
    scan: DicomScan,
    classes: ClassTable,
    origin: Mapping[str, str],
) -> None:
    """Write a label map as DICOM SEG (BINARY: every viewer reads it) that refers to its series.

    Segments are the labels that occur, numbered from 1 in the order of the table, as the standard
    wants it; their SegmentLabel is the structure's name. Where none occurs, the table's first organ
    stands as an empty segment, for a SEG must have one. Patient, study date and everything else
    about the person is empty. The same labels give the same bytes.

    Parameters
    ----------
    path : str or PathLike
        File to write.
    labels : (n_a, n_b, n_c) uint8 or uint16
        Axes as stored by the scan.
    scan : DicomScan
        The series that was segmented.
    classes : ClassTable
        What the labels mean.
    origin : mapping of str to str
        ``version`` of this software and ``model``, the model's digest.

    Raises
    ------
    InputError
        The series lacks UIDs to refer to, or the file cannot be written.
    ValueError
        The labels have another shape than the scan.
    """
    if labels.shape != scan.volume.hu.shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit {scan.volume.hu.shape}")
    import highdicom as hd

    pydicom = _pydicom(path)
    sources = [_source(scan.series.path, tags, pydicom) for tags in scan.series.headers]
    for source in sources:  # asked for by highdicom; the distance of slices is what is known
        source.SliceThickness = round(float(np.linalg.norm(scan.volume.affine[:3, 2])), 6)
    occurring = np.flatnonzero(np.bincount(labels.ravel(order="K"), minlength=len(classes)))
    present = [int(label) for label in occurring if label] or [classes.organs[0]]
    number_of = np.zeros(len(classes), np.uint16 if len(present) > 255 else np.uint8)
    number_of[present] = np.arange(1, len(present) + 1)
    numbers = number_of[labels].transpose(2, 1, 0)  # frames are (slice, row, column)
    algorithm = hd.AlgorithmIdentificationSequence(
        name="organfast",
        family=pydicom.sr.codedict.codes.DCM.ArtificialIntelligence,
        version=origin["version"],
        parameters={"model": origin["model"]},
    )
    content = hashlib.sha256(np.ascontiguousarray(numbers).data).hexdigest()
    seed = [scan.digest, content, *origin.values(), *(classes.names[n] for n in present)]
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=numbers,
        segmentation_type="BINARY",
        segment_descriptions=[
            _segment(number, classes.structures[label], algorithm, pydicom)
            for number, label in enumerate(present, 1)
        ],
        series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["series", *seed]),
        series_number=_SEG_SERIES_NUMBER,
        sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["instance", *seed]),
        instance_number=1,
        manufacturer="organfast",
        manufacturer_model_name="organfast",
        software_versions=origin["version"],
        device_serial_number=origin["model"][:16] or "none",
        content_label="ORGANS",
        content_description="Organs, research use only",
        series_description="organfast, research use only",
        content_date=_NO_DATE,
        content_time=_NO_TIME,
        omit_empty_frames=bool(occurring[-1]),
    )
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        del segmentation[keyword]
    dimensions = pydicom.uid.generate_uid(entropy_srcs=["dimensions", *seed])
    for item in (*segmentation.DimensionOrganizationSequence, *segmentation.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    for item in segmentation.get("ContributingEquipmentSequence", ()):
        item.pop("ContributionDateTime", None)  # the moment of writing; optional (PS3.3 C.12.1)
    try:
        segmentation.save_as(path)
    except OSError as error:
        raise InputError(
            path, f"cannot be written ({error.strerror})", "give a folder with room to write in"
        ) from None


def _check_uids(path: StrPath, tags: Any, pydicom: Any) -> None:
    for keyword in (
        "StudyInstanceUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
    ):
        uid = pydicom.uid.UID(str(tags.get(keyword) or ""), pydicom.config.IGNORE)
        if not uid.is_valid:
            raise InputError(
                path, f"has no {keyword}, which a DICOM SEG refers to", "leave -ot dicom_seg"
            )


def _source(path: str, tags: Any, pydicom: Any) -> Any:
    """A slice as a SEG refers to it: with nothing about the person, though that is asked for."""
    _check_uids(path, tags, pydicom)
    source = pydicom.Dataset()
    source.update({e.tag: e for e in tags if e.keyword in _HEADER})
    source.file_meta = pydicom.dataset.FileMetaDataset()
    source.SOPClassUID = str(tags.get("SOPClassUID") or _CT)  # some anonymisers empty it
    for keyword in (
        *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
        *("StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
    ):
        setattr(source, keyword, "")
    return source


def _segment(number: int, structure: Structure, algorithm: Any, pydicom: Any) -> Any:
    import highdicom as hd

    codes = pydicom.sr.codedict.codes
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=structure.name[:64],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=_concept(structure),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor.from_rgb(*structure.rgb),
    )
    if structure.side:
        value, meaning = _SIDES[structure.side]
        kind = described.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [hd.sr.CodedConcept(value, "SCT", meaning)]
    return described


def _concept(structure: Structure) -> Any:
    """SNOMED CT's code; a private one for structures that the table has no code for."""
    import highdicom as hd

    words = structure.name.removesuffix("_right").removesuffix("_left").replace("_", " ")
    meaning = (words[:1].upper() + words[1:])[:64]
    if structure.snomed:
        return hd.sr.CodedConcept(structure.snomed, "SCT", meaning)
    return hd.sr.CodedConcept(structure.name[:64], _OWN_SCHEME, meaning)
