"""The scan in whatever a user holds it: a NIfTI file, DICOM series, image, array."""

from __future__ import annotations

from os import PathLike
from typing import Any

from organfast.dicom import is_dicom, read_series
from organfast.nifti import Geometry, Scan, from_array, from_nifti1image, read_scan
from organfast.volume import Volume

__all__ = ["as_scan"]


def as_scan(source: Any) -> Scan:
    """The scan in whatever a user holds it.

    Parameters
    ----------
    source : path, nibabel image, Scan, Volume or (array, affine)
        A path is that of a ``.nii`` or ``.nii.gz`` file, or of a DICOM series: a folder that holds
        it directly, a zip, or one of its files; ``PATH#N`` is one series of several. An array is
        3-D in HU, its affine leads from voxel index to RAS+ mm.

    Raises
    ------
    ValueError
        ``source`` is none of these.
    InputError
        As :func:`organfast.nifti.read_scan` and :func:`organfast.dicom.read_series`.
    """
    if isinstance(source, Scan):
        return source
    if isinstance(source, (str, PathLike)):
        return read_series(source) if is_dicom(source) else read_scan(source)
    if isinstance(source, Volume):
        return Scan(source, Geometry.of_volume(source))
    if isinstance(source, tuple) and len(source) == 2:
        return from_array(*source)
    return from_nifti1image(source)
