"""NIfTI files in and out. The only module that imports nibabel.

Reading is one pass with a size budget::

    file ──(gunzip)──> header ──> does the file hold what the header declares? ──> one int16 array
                                  no: refused before memory is allocated          chunk by chunk

A ``.nii`` of native int16 HU is memory-mapped instead, read-only. Other voxels are in memory where
there is plenty of it, else in a file of their own (see :mod:`organfast.room`). Whether a file is
compressed is seen from its first bytes, not from its name. nibabel parses the header; the voxels
are read here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from organfast.errors import InputError
from organfast.files import check_is_file
from organfast.room import roomy
from organfast.volume import AIR_HU, Volume

__all__ = [
    "Geometry",
    "NotHU",
    "Scan",
    "accept_hu",
    "check_extent",
    "check_is_hu",
    "corners_apart_mm",
    "doubts_of_hu",
    "encode_nifti",
    "file_digest",
    "from_array",
    "from_nifti1image",
    "is_mapped",
    "read_geometry",
    "read_labels",
    "read_probability",
    "read_scan",
    "read_volume",
    "write_labels",
    "write_probability",
    "write_volume",
]

StrPath = str | PathLike[str]

# Deflate cannot do better than 258 bytes from 2 bits (zlib's technical notes: 1032:1).
_DEFLATE_RATIO = 1032
_DAMAGED: tuple[type[Exception], ...] = (
    gzip.BadGzipFile,
    isal_zlib.error,  # type: ignore[assignment]  # its stub calls the class an instance
)
_GZIP_MAGIC = b"\x1f\x8b"
# Voxels per chunk: 1 MB of int16 stays in cache between gunzip and the range check.
_CHUNK = 1 << 19
_WRITE_BYTES = 4 << 20
# zlib's way to say: with the header and checksum of gzip.
_GZIP_MEMBER = 31
# isal's level 2 is its trade-off: about the size of gzip -3 at several times the speed.
_GZIP_LEVEL = 2

_INT16 = np.iinfo(np.int16)
_MAX_LABEL = 65_535
# A mask saved with a float32 slope comes back as 0.99999994.
_WHOLE_NUMBER_TOLERANCE = 1e-3

# Thin micro-CT to a scout view; outside of it the header's numbers are not millimetres.
_SPACING_MM = (0.01, 100.0)
_FARTHEST_MM = 1e6
# A whole body with raised arms is 2.5 m long and a bore less than 1 m wide; what a header makes
# larger would fill any memory with the voxels of a working grid.
_LONGEST_MM = 3000.0
_MOST_MM3 = 3e9
# Below, the header may mean cm: 0.05 cm is a voxel of a head.
_LEAST_USUAL_MM = 0.1
# pixdim is rounded in many headers, but not by a hundredth.
_SPACING_TOLERANCE = 0.01
# Cosine of 89 degrees: a tilt that leans a scan of 300 mm by 5 mm.
_SKEW = 0.0175
# Half of the way to where another axis would be the nearest.
_TURN_DEGREES = 22.5
# NIfTI's spatial unit codes: metre, millimetre, micron; 0 (not said) counts as millimetre.
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}

_GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
_GIVE_NIFTI = "give a CT scan as .nii or .nii.gz"


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels of a file lie, as its header says it: outputs are written with it.

    Parameters
    ----------
    shape : tuple of int
        Voxels along the stored axes.
    affine : (4, 4) float64
        Stored voxel index -> RAS+ mm (the sform where its code is set, else the qform).
    version : int
        1 for NIfTI-1, 2 for NIfTI-2.
    fields : mapping of str to float or tuple of float
        The header fields that place the voxels (sform, qform, their codes, pixdim, units),
        verbatim. Free text is never among them.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    version: int
    fields: Mapping[str, Any]

    @staticmethod
    def of_volume(volume: Volume) -> Geometry:
        """Geometry for a volume that comes from no NIfTI file: sform, and qform where it can."""
        return Geometry.of_grid(_three(volume.hu.shape), volume.affine)

    @staticmethod
    def of_grid(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> Geometry:
        """As :meth:`of_volume`, for voxels of any kind."""
        version = 1 if max(shape) <= _INT16.max else 2
        header = _header_class(version)()
        header.set_data_shape(shape)
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        directions = affine[:3, :3] / lengths
        header.set_xyzt_units("mm")
        header.set_zooms(lengths)
        header.set_sform(affine, 1)
        if np.allclose(directions.T @ directions, np.eye(3), atol=1e-6):
            header.set_qform(affine, 1)
        return Geometry(shape, affine, version, _fields(header))


@dataclass(frozen=True, eq=False)
class Scan:
    """A CT scan and what is needed to write results on its own grid.

    Parameters
    ----------
    volume : Volume
        Voxels and affine.
    geometry : Geometry
        Of the file it came from.
    warnings : tuple of str
        What is doubtful in the file, though it can be used.
    """

    volume: Volume
    geometry: Geometry
    warnings: tuple[str, ...] = ()


class NotHU(InputError):
    """A scan whose numbers cannot be HU of a patient.

    Parameters
    ----------
    path, problem, remedy
        As of every input error.
    """


# --- public readers -------------------------------------------------------------------------------


def read_scan(path: StrPath) -> Scan:
    """Read a CT scan from a NIfTI-1 or NIfTI-2 file.

    Any integer or float storage, scaling and byte order; axes stay as stored. Values are rounded to
    whole HU, padding below int16 is clipped to -32768 (and counts as air). A singleton fourth axis
    is dropped. Foreign bytes behind a gzip stream whose checksum is right are left out, and that is
    a warning.

    Parameters
    ----------
    path : str or PathLike
        A ``.nii`` or ``.nii.gz`` file.

    Returns
    -------
    Scan
        ``volume.hu`` is a read-only memory map where the file stores native int16 uncompressed,
        and the map of a temporary file where the voxels are large for the memory that is free.

    Raises
    ------
    InputError
        The file cannot be read, is not one 3-D scalar volume with a usable affine, is damaged,
        holds NaN or infinity, or cannot be in HU (see ``check_is_hu``).
    """
    try:
        return _read_scan(path)
    except _BadGzip:
        end = _sound_end(path)
        if end is None:
            raise
        scan = _read_scan(path, end)
    foreign = f"{os.path.getsize(path) - end} bytes behind the end of its gzip stream are left out"
    return replace(scan, warnings=(*scan.warnings, foreign))


def _read_scan(path: StrPath, end: int | None = None) -> Scan:
    with _opened(path, end) as source:
        header = _read_header(source)
        hu, low, high = _read_voxels(source, header, np.dtype(np.int16), accept_hu)
        check_is_hu(path, hu, low, high)
    warnings = (*header.warnings, *doubts_of_hu(hu, high))
    return Scan(Volume(hu, header.geometry.affine), header.geometry, warnings)


def read_volume(path: StrPath) -> Volume:
    """Read a CT scan; see :func:`read_scan`, which also keeps what outputs need.

    Parameters
    ----------
    path : str or PathLike
        A ``.nii`` or ``.nii.gz`` file.

    Raises
    ------
    InputError
        As :func:`read_scan`.
    """
    return read_scan(path).volume


def read_labels(path: StrPath) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Read a label map or a mask.

    Parameters
    ----------
    path : str or PathLike
        A ``.nii`` or ``.nii.gz`` file of whole numbers 0..65535, in any storage.

    Returns
    -------
    labels : (n_a, n_b, n_c) uint8 or uint16
        Axes as stored; uint8 where it suffices. May be a read-only memory map.
    affine : (4, 4) float64
        Stored voxel index -> RAS+ mm.

    Raises
    ------
    InputError
        As :func:`read_scan`, or a voxel is negative, broken or too large for a label.
    """
    with _opened(path) as source:
        header = _read_header(source)
        narrow = header.dtype.itemsize == 1 and header.scaling is None
        dtype = np.dtype(np.uint8 if narrow else np.uint16)
        labels, _, high = _read_voxels(source, header, dtype, _accept_labels)
    if labels.dtype == np.uint16 and high <= np.iinfo(np.uint8).max:
        labels = labels.astype(np.uint8)
    return labels, header.geometry.affine


def read_probability(path: StrPath) -> NDArray[np.uint8]:
    """Read a map that :func:`write_probability` wrote.

    Parameters
    ----------
    path : str or PathLike
        A ``.nii`` or ``.nii.gz`` file of values from 0 to 1.

    Returns
    -------
    (n_a, n_b, n_c) uint8
        255 for certain; axes as stored.

    Raises
    ------
    InputError
        As :func:`read_scan`, or a value is outside 0..1.
    """
    with _opened(path) as source:
        return _read_voxels(source, _read_header(source), np.dtype(np.uint8), _accept_shares)[0]


def read_geometry(path: StrPath) -> Geometry:
    """Read where the voxels of a NIfTI file lie; the voxels themselves are not read.

    Parameters
    ----------
    path : str or PathLike
        A ``.nii`` or ``.nii.gz`` file.

    Raises
    ------
    InputError
        The header is not that of one 3-D scalar volume, or declares more than the file can hold.
    """
    with _opened(path) as source:
        return _read_header(source).geometry


def is_mapped(path: StrPath) -> bool:
    """Whether :func:`read_scan` uses a file's voxels where they lie, and takes no memory for them.

    Parameters
    ----------
    path : str or PathLike
        A ``.nii`` or ``.nii.gz`` file.

    Raises
    ------
    InputError
        As :func:`read_geometry`.
    """
    with _opened(path) as source:
        return _is_mapped(source, _read_header(source), np.dtype(np.int16))


def from_nifti1image(image: Any) -> Scan:
    """A scan from a nibabel image in memory or just loaded; nothing is copied that is int16.

    Parameters
    ----------
    image : nibabel.spatialimages.SpatialImage
        A 3-D image in HU. Its affine counts, also where it was changed after loading.

    Raises
    ------
    ValueError
        ``image`` is not a nibabel image.
    InputError
        As :func:`read_scan`.
    """
    from nibabel.nifti1 import Nifti1Image
    from nibabel.spatialimages import SpatialImage

    if not isinstance(image, SpatialImage):
        raise ValueError(f"image is a {type(image).__name__}; give a nibabel image")
    path = image.get_filename() or "the given image"
    kind = type(image) if isinstance(image, Nifti1Image) else Nifti1Image
    harmonised = kind(image.dataobj, image.affine, image.header).header
    header = _parse_header(path, harmonised, 2 if harmonised["sizeof_hdr"] == 540 else 1)
    stored, scaling = image.dataobj, None
    if hasattr(stored, "get_unscaled"):
        scaling = _scaling(path, float(stored.slope), float(stored.inter))
        stored = stored.get_unscaled()
    stored = np.asarray(stored).reshape(header.geometry.shape, order="A")
    hu = _hu_of_array(path, stored, scaling)
    warnings = (*header.warnings, *doubts_of_hu(hu, float(hu.max())))
    return Scan(Volume(hu, header.geometry.affine), header.geometry, warnings)


def from_array(array: Any, affine: NDArray[np.float64]) -> Scan:
    """A scan from numbers in memory; nothing is copied that is int16.

    Parameters
    ----------
    array : (n_a, n_b, n_c) array of integers or floats, HU
        The voxels.
    affine : (4, 4) float64
        Voxel index -> RAS+ mm.

    Raises
    ------
    ValueError
        The array is not 3-D or is empty.
    InputError
        As :func:`read_scan`.
    """
    array = np.asarray(array)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"the array has shape {array.shape}; give a 3-D array of HU")
    volume = Volume(_hu_of_array("the given array", array, None), affine)
    return Scan(volume, Geometry.of_volume(volume))


def file_digest(path: StrPath) -> str:
    """SHA-256 of a file's bytes, hexadecimal.

    Parameters
    ----------
    path : str or PathLike
        Any file.

    Raises
    ------
    InputError
        The file cannot be read.
    """
    with _errors_named(path):
        check_is_file(path, _GIVE_NIFTI)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


# --- public writers -------------------------------------------------------------------------------


def write_labels(path: StrPath, labels: NDArray[Any], geometry: Geometry) -> None:
    """Write a label map on the grid of a scan: the same bytes for the same labels, whole or not.

    Parameters
    ----------
    path : str or PathLike
        ``.nii.gz`` or ``.nii``. What stands there is replaced once the new file is complete.
    labels : (n_a, n_b, n_c) uint8 or uint16
        Axes as stored by the scan, any memory order.
    geometry : Geometry
        Of the scan.

    Raises
    ------
    InputError
        The file cannot be written.
    ValueError
        The labels have another dtype or shape.
    """
    if labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"labels are {labels.dtype}; a label map is uint8 or uint16")
    _write(path, labels, geometry, slope=1.0)


def write_probability(path: StrPath, probability: NDArray[np.uint8], geometry: Geometry) -> None:
    """Write one structure's probability map, quantised: the file's slope of 1/255 gives 0..1.

    Parameters
    ----------
    path : str or PathLike
        ``.nii.gz`` or ``.nii``.
    probability : (n_a, n_b, n_c) uint8
        0 is impossible, 255 certain; axes as stored by the scan.
    geometry : Geometry
        Of the scan.

    Raises
    ------
    InputError
        The file cannot be written.
    ValueError
        The map has another dtype or shape.
    """
    if probability.dtype != np.uint8:
        raise ValueError(f"the map is {probability.dtype}; quantise it to uint8, 255 for certain")
    _write(path, probability, geometry, slope=1 / 255)


def write_volume(path: StrPath, volume: Volume) -> None:
    """Write a CT scan as int16 HU.

    Parameters
    ----------
    path : str or PathLike
        ``.nii.gz`` or ``.nii``.
    volume : Volume
        Voxels and affine.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    _write(path, volume.hu, Geometry.of_volume(volume), slope=1.0)


def encode_nifti(voxels: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    """The bytes of a ``.nii.gz``, in memory, as small as they quickly get.

    Parameters
    ----------
    voxels : (n_a, n_b, n_c) uint8, uint16 or int16
        Any memory order.
    affine : (4, 4) float64
        Index of ``voxels`` -> RAS+ mm.
    """
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", 6, buffer, mtime=0) as stream:
        geometry = Geometry.of_grid(_three(voxels.shape), np.asarray(affine, np.float64))
        _write_stream(stream, voxels, geometry, slope=1.0)
    return buffer.getvalue()


# --- the file and its errors ----------------------------------------------------------------------


class _BadGzip(InputError):
    """A gzip stream that ends too early, fails its checksum or goes on as something else."""


@dataclass(frozen=True)
class _Source:
    """An open file: ``stream`` gives NIfTI bytes, whether they are compressed on disk or not."""

    path: StrPath
    stream: BinaryIO
    zipped: bool
    size: int

    def fill(self, array: NDArray[Any]) -> None:
        """Read the array's bytes in full."""
        buffer = array.data.cast("B")
        done = 0
        while done < len(buffer):
            n = self.stream.readinto(buffer[done:])  # type: ignore[attr-defined]
            if not n:
                raise _truncated(self.path)
            done += n

    def skip(self, n_bytes: int) -> None:
        """Move forward, past what stands between header and voxels."""
        while n_bytes > 0:
            n = len(self.stream.read(min(n_bytes, _CHUNK)))
            if not n:
                raise _truncated(self.path)
            n_bytes -= n

    def expect_end(self) -> None:
        """Read to the end of the stream, which is where gzip's checksum is compared."""
        if self.stream.read(1):
            raise _overlong(self.path)


@contextmanager
def _opened(path: StrPath, end: int | None = None) -> Iterator[_Source]:
    """A file to read; of a compressed one the first ``end`` bytes."""
    with _errors_named(path):
        size = check_is_file(path, _GIVE_NIFTI, "a NIfTI file")
        if size == 0:
            raise InputError(path, "is empty", "copy or export it again")
        with open(path, "rb") as file:
            zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            file.seek(0)
            stream = igzip.open(file if end is None else _Until(file, end)) if zipped else file
            yield _Source(path, stream, zipped, size)


class _Until(io.RawIOBase):
    """A file up to a byte."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._left = file, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(min(self._left, len(buffer)))
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)


def _sound_end(path: StrPath) -> int | None:
    """Where the whole and sound gzip members end that a file begins with; None if there are none.

    Only a chunk of what they hold is in memory at a time.
    """
    end, n_read, rest = None, 0, b""
    with open(path, "rb") as file:
        while True:
            member = isal_zlib.decompressobj(wbits=_GZIP_MEMBER)
            try:
                while not member.eof:
                    if not rest:
                        rest = file.read(_CHUNK)
                        n_read += len(rest)
                    n_more = len(member.decompress(rest, _CHUNK))
                    if not (rest or n_more):
                        return end
                    rest = member.unconsumed_tail
            except _DAMAGED:
                return end
            rest = member.unused_data
            end = n_read - len(rest)


@contextmanager
def _errors_named(path: StrPath) -> Iterator[None]:
    """Turn what reading a file can raise into an InputError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the name") from None
    except PermissionError:
        raise InputError(path, "may not be read", "check the permissions of the file") from None
    except EOFError:
        raise _BadGzip(
            path, "is a truncated gzip file, or has foreign bytes at its end", "copy it again"
        ) from None
    except _DAMAGED:
        raise _BadGzip(
            path, "is a damaged gzip file, or has foreign bytes at its end", "copy it again"
        ) from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the disk") from None
    except MemoryError:
        raise InputError(
            path, "needs more memory than there is", "use a machine with more, or crop the scan"
        ) from None


def _truncated(path: StrPath) -> InputError:
    return InputError(
        path, "is truncated: it ends before the voxels its header declares", "copy it again"
    )


def _overlong(path: StrPath) -> InputError:
    return InputError(
        path,
        "goes on after the voxels its header declares, so one of them is wrong",
        "export the scan again",
    )


# --- the header -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """What is needed to read the voxels; ``scaling`` is (slope, intercept), None for none."""

    geometry: Geometry
    dtype: np.dtype[Any]
    offset: int
    scaling: tuple[float, float] | None
    warnings: tuple[str, ...]


def _header_class(version: int) -> Any:
    # 0.2 s: imported only by who reads or writes a file.
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    return Nifti1Header if version == 1 else Nifti2Header


def _read_header(source: _Source) -> _Header:
    """Read and check the header, and leave the stream at the first voxel."""
    block = source.stream.read(348)
    version, byte_order = _identify(source.path, block)
    if version == 2:
        block += source.stream.read(540 - 348)
    if len(block) < 540 and version == 2:
        raise _truncated(source.path)
    raw = _header_class(version)(block, endianness=byte_order, check=False)
    header = _parse_header(source.path, raw, version, source)
    source.skip(header.offset - len(block))
    return header


def _identify(path: StrPath, block: bytes) -> tuple[int, str]:
    """NIfTI version and byte order ("<" or ">") of the first 348 bytes of a file."""
    if block[:2] == _GZIP_MAGIC:
        raise InputError(path, "is compressed twice", "gunzip it once")
    if block[128:132] == b"DICM":
        raise InputError(path, "is a DICOM file", "convert the series to .nii.gz")
    pair = block[344:348] == b"ni1\0" or block[4:8] == b"ni2\0"
    if pair or os.fspath(path).lower().endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        raise InputError(path, "is half of a .hdr/.img pair", "convert the pair to one .nii.gz")
    for byte_order, name in (("<", "little"), (">", "big")):
        length = int.from_bytes(block[:4], name)  # type: ignore[arg-type]  # a Literal
        if length == 348 and block[344:348] == b"n+1\0":
            return 1, byte_order
        if length == 540 and block[4:12] == b"n+2\0\r\n\x1a\n":
            return 2, byte_order
    raise InputError(path, "is not a NIfTI file", _GIVE_NIFTI)


def _parse_header(path: StrPath, raw: Any, version: int, source: _Source | None = None) -> _Header:
    shape, dtype = _shape(path, [int(n) for n in raw["dim"]]), _dtype(path, raw)
    offset, least = float(raw["vox_offset"]), raw.single_vox_offset
    if offset != 0 and not (least <= offset < 2**62 and offset.is_integer()):
        raise InputError(path, f"puts its voxels at byte {offset:g}", "export the scan again")
    first = int(offset) or least
    if source is not None:
        _check_size(source, first + math.prod(shape) * dtype.itemsize)
    affine, warnings = _affine(path, raw, shape)
    geometry = Geometry(shape, affine, version, _fields(raw))
    scaling = _scaling(path, float(raw["scl_slope"]), float(raw["scl_inter"]))
    bits, meant = int(raw["bitpix"]), 8 * dtype.itemsize
    if bits != meant:
        said = f"the header says {bits} bits per voxel, where {dtype.name} has {meant}"
        warnings = (*warnings, f"{said}: the datatype is used")
    return _Header(geometry, dtype, first, scaling, warnings)


def _shape(path: StrPath, dim: list[int]) -> tuple[int, int, int]:
    n_axes, axes = dim[0], dim[1:]
    if not 1 <= n_axes <= 7:
        raise InputError(path, f"declares {n_axes} axes", "export the scan again")
    axes = axes[:n_axes]
    text = "×".join(map(str, axes))
    if min(axes) < 1:
        raise InputError(path, f"holds no voxel: its shape is {text}", "export the scan again")
    if n_axes < 3:
        raise InputError(path, f"is {n_axes}-D ({text})", "give a 3-D scan")
    if math.prod(axes[3:]) > 1:
        raise InputError(
            path,
            f"is {n_axes}-D ({text}): several volumes in one file",
            "split it; give one of them",
        )
    return _three(axes)


def _three(axes: Any) -> tuple[int, int, int]:
    return int(axes[0]), int(axes[1]), int(axes[2])


def _dtype(path: StrPath, raw: Any) -> np.dtype[Any]:
    from nibabel.nifti1 import data_type_codes

    code = int(raw["datatype"])
    names = data_type_codes.label
    # float128 is one number on each kind of processor, and none of them may be the file's.
    is_number = code in names and data_type_codes.dtype[code].kind in "iuf"
    if not is_number or data_type_codes.dtype[code].itemsize > 8:
        problem = f"stores {names[code]} voxels" if code in names else f"has datatype code {code}"
        raise InputError(path, f"{problem}, not numbers in HU", "give a scan of integers or floats")
    dtype: np.dtype[Any] = data_type_codes.dtype[code].newbyteorder(raw.endianness)
    return dtype


def _scaling(path: StrPath, slope: float, inter: float) -> tuple[float, float] | None:
    """NIfTI: slope 0 means no scaling; nibabel writes NaN for the same."""
    if slope == 0 or math.isnan(slope) or (slope, inter) == (1, 0):
        return None
    if slope < 0 or not math.isfinite(slope) or not math.isfinite(inter):
        raise InputError(
            path,
            f"scales its voxels by {slope:g} and adds {inter:g}",
            "correct scl_slope and scl_inter; a CT scan in HU has 1 and 0",
        )
    return slope, inter


def _affine(
    path: StrPath, raw: Any, shape: tuple[int, int, int]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Affine in mm (sform before qform, as nibabel), and what is doubtful about it.

    Of the two, one that is broken does not count where the other one is sound.
    """
    from nibabel.nifti1 import xform_codes

    raw, codes = raw.copy(), xform_codes.code
    if raw["pixdim"][0] not in (-1, 1):
        raw["pixdim"][0] = 1  # the standard: anything else counts as 1
    raw["pixdim"][1:] = np.abs(raw["pixdim"][1:])
    unit = _MM_PER_UNIT.get(int(raw["xyzt_units"]) & 7, 1.0)
    scale = np.diag([unit] * 3 + [1.0])
    said: dict[str, NDArray[np.float64]] = {}
    with np.errstate(all="ignore"):  # what overflows is refused below
        # A code that is none counts as 0, as it does for nibabel.
        if raw["sform_code"] > 0 and int(raw["sform_code"]) in codes:
            said["sform"] = scale @ raw.get_sform()
        if raw["qform_code"] > 0 and int(raw["qform_code"]) in codes:
            said["qform"] = scale @ _qform(raw)
        if not said:
            said["pixdim"] = scale @ raw.get_base_affine()
    faults = {name: _fault(affine, shape) for name, affine in said.items()}
    used = next((name for name, fault in faults.items() if fault is None), next(iter(said)))
    fault = faults[used]
    if fault is not None:
        raise InputError(path, *fault)
    lengths = raw["pixdim"][1:4].astype(np.float64) * unit
    return said[used], (*_disagreement(said, used, lengths, shape), *_doubts(said[used]))


def _disagreement(
    said: Mapping[str, NDArray[np.float64]],
    used: str,
    lengths: NDArray[np.float64],
    shape: tuple[int, int, int],
) -> tuple[str, ...]:
    """What the header says twice, and not alike."""
    if used == "pixdim":
        return (
            "the header says nothing of the orientation (sform and qform code 0): "
            "left and right may be swapped",
        )
    affine, kept = said[used], f"the {used} is used"
    for name, other in said.items():
        if name != used and _fault(other, shape) is not None:
            return (f"the {name} is broken: {kept}",)
        apart = corners_apart_mm(shape, affine, other)
        if apart > np.linalg.norm(affine[:3, :3], axis=0).min():
            return (f"sform and qform disagree by up to {apart:.3g} mm: {kept}",)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if len(said) == 1 and not np.abs(lengths / spacing - 1).max() <= _SPACING_TOLERANCE:
        return (f"pixdim says {_by(lengths)} mm and the {used} {_by(spacing)} mm: {kept}",)
    return ()


def _doubts(affine: NDArray[np.float64]) -> tuple[str, ...]:
    """What can be used, but is unlike a CT scan of a patient."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / spacing
    doubts = []
    skew = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if skew > _SKEW:
        angle = np.degrees(np.arccos(min(1.0, skew)))
        doubts.append(
            f"the voxel axes are not at right angles ({angle:.0f} degrees), as of a tilted gantry: "
            "organs may be misjudged; resample the scan to a straight grid"
        )
    turn = float(np.degrees(np.arccos(min(1.0, np.abs(directions).max(axis=0).min()))))
    if turn > _TURN_DEGREES:
        doubts.append(
            f"the voxel axes are up to {turn:.0f} degrees off the patient's, and the scan is read "
            "along them: organs may be misjudged"
        )
    if spacing.min() < _LEAST_USUAL_MM:
        doubts.append(
            f"voxels of {_by(spacing)} mm are smaller than a clinical CT's: the header may be in cm"
        )
    return tuple(doubts)


def _by(lengths: NDArray[np.float64]) -> str:
    return "×".join(f"{length:.4g}" for length in lengths)


def _qform(raw: Any) -> NDArray[np.float64]:
    """The qform; NaN where its quaternion is longer than 1."""
    from nibabel.spatialimages import HeaderDataError

    try:
        qform: NDArray[np.float64] = np.asarray(raw.get_qform(), np.float64)
    except (ValueError, HeaderDataError):
        return np.full((4, 4), np.nan)
    return qform


def check_extent(path: StrPath, affine: NDArray[np.float64], shape: tuple[int, ...]) -> None:
    """Refuse a volume that no patient fills: on a working grid it could fill any memory.

    Parameters
    ----------
    path : str or PathLike
        Named in the error.
    affine : (4, 4) float64
        Stored voxel index -> RAS+ mm.
    shape : tuple of int
        Voxels along the stored axes.

    Raises
    ------
    InputError
        It is longer than 3 m, or larger than 3 cubic metres.
    """
    problem = _oversize(affine, shape)
    if problem is not None:
        raise InputError(path, problem, "correct its spacing")


def _oversize(affine: NDArray[np.float64], shape: tuple[int, ...]) -> str | None:
    size = np.linalg.norm(affine[:3, :3], axis=0) * shape
    if size.max() <= _LONGEST_MM and size.prod() <= _MOST_MM3:
        return None
    return f"is {_by(np.rint(size))} mm large, as no patient is"


def _fault(affine: NDArray[np.float64], shape: tuple[int, int, int]) -> tuple[str, str] | None:
    """What is wrong with an affine, and what would do."""
    remedy = "correct its sform or qform"
    if not np.isfinite(affine).all():
        return "has an affine that is not finite", remedy
    if np.abs(affine).max() > _FARTHEST_MM:
        return f"has an affine with {np.abs(affine).max():g} mm in it", remedy
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    with np.errstate(all="ignore"):  # pivots of 1e-310
        volume = abs(np.linalg.det(affine[:3, :3]))
    # The same bound as Volume's.
    if volume < 1e-6 * spacing.prod() or spacing.min() == 0:
        return "has a singular affine", remedy
    if spacing.min() < _SPACING_MM[0] or spacing.max() > _SPACING_MM[1]:
        return f"has voxels of {_by(spacing)} mm", f"{remedy} or its units"
    problem = _oversize(affine, shape)
    return None if problem is None else (problem, f"{remedy} or its units")


def corners_apart_mm(
    shape: tuple[int, int, int], first: NDArray[np.float64], second: NDArray[np.float64]
) -> float:
    """How far apart two affines put the same corner of a volume, at most, in mm.

    Parameters
    ----------
    shape : tuple of int
        Voxels along the stored axes.
    first, second : (4, 4) float64
        Stored voxel index -> RAS+ mm.
    """
    corners = np.stack(np.meshgrid(*[(0.0, n - 1.0) for n in shape], indexing="ij"), axis=-1)
    index = np.concatenate([corners.reshape(-1, 3), np.ones((8, 1))], axis=1)
    return float(np.linalg.norm((index @ (first - second).T)[:, :3], axis=1).max())


def _check_size(source: _Source, declared: int) -> None:
    """Refuse a header that declares more than the file can hold, before memory is allocated."""
    if source.zipped:
        if declared > _DEFLATE_RATIO * source.size:
            raise InputError(
                source.path,
                f"declares {declared} bytes, more than {source.size} bytes of gzip can hold",
                "export the scan again",
            )
    elif source.size < declared:
        raise _truncated(source.path)
    elif source.size > declared:
        raise _overlong(source.path)


def _fields(raw: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {name: raw[name].tolist() for name in _GEOMETRY_FIELDS}
    fields["pixdim"] = raw["pixdim"][:4].tolist()
    fields["xyzt_units"] = int(raw["xyzt_units"]) & 7
    return fields


# --- the voxels -----------------------------------------------------------------------------------

# (path, values, least, greatest) -> values that can be stored, or an InputError
_Accept = Callable[[StrPath, NDArray[Any], float, float], NDArray[Any]]


def _read_voxels(
    source: _Source, header: _Header, dtype: np.dtype[Any], accept: _Accept
) -> tuple[NDArray[Any], float, float]:
    """Read all voxels as ``dtype``, Fortran order; also the least and greatest scaled value.

    Where the file stores that dtype, it is mapped (uncompressed) or read in place.
    """
    shape = header.geometry.shape
    n_voxels = math.prod(shape)
    direct = header.dtype == dtype and header.scaling is None
    mapped = _is_mapped(source, header, dtype)
    if mapped:
        voxels = np.asarray(
            np.memmap(source.stream, dtype, mode="r", offset=header.offset, shape=(n_voxels,))
        )
    else:
        voxels = roomy((n_voxels,), dtype)
    stored = None if direct else np.empty(min(_CHUNK, n_voxels), header.dtype)
    extremes = []
    for start in range(0, n_voxels, _CHUNK):
        chunk = voxels[start : start + _CHUNK]
        values = chunk if stored is None else stored[: chunk.size]
        if not mapped:
            source.fill(values)
        values = _scaled(values, header.scaling)
        low, high = values.min(), values.max()
        extremes.append((low, high))
        values = accept(source.path, values, low, high)
        if stored is not None:
            chunk[:] = values
    if source.zipped:
        source.expect_end()
    lows, highs = zip(*extremes, strict=True)
    return voxels.reshape(shape, order="F"), float(min(lows)), float(max(highs))


def _is_mapped(source: _Source, header: _Header, dtype: np.dtype[Any]) -> bool:
    """Whether voxels are used where they lie in the file."""
    direct = header.dtype == dtype and header.scaling is None
    return direct and not source.zipped and header.offset % dtype.itemsize == 0


def _scaled(stored: NDArray[Any], scaling: tuple[float, float] | None) -> NDArray[Any]:
    """Stored numbers in native byte order, scaled in float64, or int32 where that is exact."""
    if scaling is None:
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    slope, inter = scaling
    if slope == 1 and inter.is_integer() and abs(inter) < 2**30 and _is_short(stored.dtype):
        # The commonest scaling of all, an intercept of -1024, at half the cost.
        shifted: NDArray[Any] = stored.astype(np.int32)
        shifted += int(inter)
        return shifted
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused by name below
        values: NDArray[Any] = stored.astype(np.float64)
        values *= slope
        values += inter
    return values


def _is_short(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "iu" and dtype.itemsize <= 2


def accept_hu(path: StrPath, values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """Values that an int16 can hold: whole HU, padding below it clipped.

    Parameters
    ----------
    path : str or PathLike
        Named in the error.
    values : array
        HU, integers or floats.
    low, high : float
        Their extremes.

    Raises
    ------
    NotHU
        A value above 32767.
    InputError
        NaN or infinity.
    """
    _check_finite(path, low, high)
    if high > _INT16.max:
        raise NotHU(path, f"holds the value {high:g}, which is no HU", "give a CT scan in HU")
    if values.dtype == np.int16:
        return values
    if low < _INT16.min:
        values = np.maximum(values, _INT16.min)
    if values.dtype.kind != "f":
        return values
    whole: NDArray[Any] = np.rint(values)
    return whole


def _accept_shares(path: StrPath, values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    if not (low >= 0 and high <= 1 + 1e-6):
        raise InputError(path, "holds values outside 0..1", "give a probability map of organfast")
    quantised: NDArray[np.uint8] = np.rint(values * 255).astype(np.uint8)
    return quantised


def _accept_labels(path: StrPath, values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    _check_finite(path, low, high)
    remedy = f"give whole numbers from 0 to {_MAX_LABEL}"
    if low < -_WHOLE_NUMBER_TOLERANCE:
        raise InputError(path, f"holds the label {low:g}", remedy)
    if high > _MAX_LABEL:
        raise InputError(path, f"holds the label {high:g}", remedy)
    if values.dtype.kind != "f":
        return values
    whole: NDArray[Any] = np.rint(values)
    if np.abs(values - whole).max() > _WHOLE_NUMBER_TOLERANCE:
        raise InputError(path, "holds fractions, so it is no label map", remedy)
    return whole


def _check_finite(path: StrPath, low: float, high: float) -> None:
    # NaN is the minimum of whatever holds one.
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(
            path, "holds NaN or infinite voxels", "replace them, by -1024 outside the field of view"
        )


def _hu_of_array(
    path: StrPath, stored: NDArray[Any], scaling: tuple[float, float] | None
) -> NDArray[np.int16]:
    """int16 HU of numbers in memory; the array itself where it is that already."""
    if stored.dtype.kind not in "iuf":
        raise InputError(path, f"stores {stored.dtype} voxels, not HU", "give integers or floats")
    if stored.dtype == np.int16 and stored.dtype.isnative and scaling is None:
        hu: NDArray[np.int16] = stored
        low, high = float(stored.min()), float(stored.max())
    else:
        hu = np.empty_like(stored, np.int16)
        extremes = []
        for k in range(stored.shape[2]):
            values = _scaled(stored[:, :, k], scaling)
            extremes.append((float(values.min()), float(values.max())))
            hu[:, :, k] = accept_hu(path, values, *extremes[-1])
        low, high = min(e[0] for e in extremes), max(e[1] for e in extremes)
    check_is_hu(path, hu, low, high)
    return hu


# A patient spans fat (-100) to muscle and blood (+50) at the very least; standardised or 0..1
# intensities span less. An 8-bit or unshifted image has nothing in fat's range or below, where
# -30 leaves room for the ringing of an interpolation.
_LEAST_SPAN_HU = 50
_FAT_HU = -30
# A window cuts off air and lung and heaps them up at its lower edge: [-160, 240] puts half of a
# scan there. Noise never puts a tenth of all voxels on one value that is not air.
_WINDOW_HU = -500
_WINDOW_SHARE = 0.1
# The end of 12 bits at an intercept of -1024. Implants fill less than a hundredth of a scan.
_DENSEST_HU = 3071
_DENSE_SHARE = 0.01


def check_is_hu(path: StrPath, hu: NDArray[np.int16], low: float, high: float) -> None:
    """Refuse numbers that cannot be HU of a patient.

    Refused: all voxels equal; a span (above -1024) of less than 50; no voxel in [-1024, -30], where
    fat, lung and air lie; a tenth of all voxels exactly at a minimum above -500, as a window
    leaves them. A slab without any air passes: fat has negative HU and noise spreads it.

    Parameters
    ----------
    path : str or PathLike
        Named in the error.
    hu : int16 array
        Rounded and clipped voxels.
    low, high : float
        Extremes before rounding.

    Raises
    ------
    NotHU
        Any of these.
    """
    if low == high:
        raise NotHU(path, f"holds the value {low:g} everywhere", "give a CT scan in HU")
    if high - max(low, AIR_HU) < _LEAST_SPAN_HU:
        raise NotHU(
            path,
            f"holds values from {low:g} to {high:g}, which look normalised",
            "give the scan in HU, before normalisation",
        )
    if low > _FAT_HU or (low < AIR_HU and not _any_fat_or_air(hu)):
        grey = "they look like grey levels; give the scan in HU"
        shifted = "the intercept, often -1024, may be missing; give the scan in HU"
        raise NotHU(
            path,
            f"holds values up to {high:g} and none from {AIR_HU} to {_FAT_HU}, so they are not HU",
            grey if high <= 255 else shifted,
        )
    if low > _WINDOW_HU and _n_voxels(hu, lambda h: h == round(low)) >= _WINDOW_SHARE * hu.size:
        raise NotHU(
            path,
            f"is cut off at {low:g}, as by a display window, so air and lung are lost",
            "give the scan before windowing",
        )


def doubts_of_hu(hu: NDArray[np.int16], high: float) -> tuple[str, ...]:
    """What is doubtful in numbers that passed ``check_is_hu``: too much of it denser than bone.

    Parameters
    ----------
    hu : int16 array
        Rounded and clipped voxels, stored axes.
    high : float
        The greatest.
    """
    if high <= _DENSEST_HU:
        return ()
    n_dense = _n_voxels(hu, lambda h: h > _DENSEST_HU)
    if n_dense <= _DENSE_SHARE * hu.size:
        return ()
    return (
        f"{n_dense / hu.size:.0%} of its voxels are above {_DENSEST_HU} HU, where only metal is: "
        "its slope may be wrong",
    )


def _n_voxels(
    hu: NDArray[np.int16], of_interest: Callable[[NDArray[np.int16]], NDArray[np.bool_]]
) -> int:
    """Voxels of interest, counted slice by slice: no map of them is as large as the scan."""
    return sum(int(np.count_nonzero(of_interest(hu[:, :, k]))) for k in range(hu.shape[2]))


def _any_fat_or_air(hu: NDArray[np.int16]) -> bool:
    slices = (hu[:, :, k] for k in range(hu.shape[2]))
    return any(bool(((plane >= AIR_HU) & (plane <= _FAT_HU)).any()) for plane in slices)


# --- writing --------------------------------------------------------------------------------------


def _write(path: StrPath, voxels: NDArray[Any], geometry: Geometry, slope: float) -> None:
    if voxels.shape != geometry.shape:
        raise ValueError(f"voxels of shape {voxels.shape} do not fit the grid {geometry.shape}")
    name = os.fspath(path)
    if not name.lower().endswith((".nii", ".nii.gz")):
        raise InputError(path, "is no name for a NIfTI file", "end it in .nii.gz or .nii")
    # Short and its own, so that a name of the greatest length can be written, too.
    beside = Path(path).parent / f".organfast-{secrets.token_hex(8)}.part"
    try:
        with open(beside, "xb") as file:
            if name.lower().endswith(".gz"):
                with igzip.IGzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as stream:
                    _write_stream(stream, voxels, geometry, slope)
            else:
                _write_stream(file, voxels, geometry, slope)
        os.replace(beside, path)
    except OSError as error:
        raise InputError(
            path, f"cannot be written ({error.strerror})", "give a folder with room to write in"
        ) from None
    finally:
        with suppress(OSError):
            beside.unlink()


def _write_stream(stream: Any, voxels: NDArray[Any], geometry: Geometry, slope: float) -> None:
    header = _header_class(geometry.version)()
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    for name, value in geometry.fields.items():
        if name == "pixdim":
            header["pixdim"][:4] = value
        else:
            header[name] = value
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = slope, 0
    stream.write(header.binaryblock + bytes(4))  # four zeros: no extensions
    # Whole slices by number, whatever the memory order: equal voxels give equal bytes.
    n_slices = max(1, _WRITE_BYTES // (voxels[:, :, 0].size * voxels.itemsize))
    for start in range(0, voxels.shape[2], n_slices):
        stream.write(voxels[:, :, start : start + n_slices].tobytes("F"))
