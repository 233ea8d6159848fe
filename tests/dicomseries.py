"""DICOM series made from a volume, sound or broken in one way."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import DicomDictionary, RepeatersDictionary
from pydicom.uid import ExplicitVRLittleEndian

from organfast.volume import Volume

CT = "1.2.840.10008.5.1.4.1.1.2"
INTERCEPT = -1024
# change(slice's data set, its number): None keeps it, False leaves the slice out.
Change = Callable[[Any, int], bool | None]


def write_series(
    folder: Path,
    volume: Volume,
    change: Change = lambda dataset, n: None,
    syntax: str = ExplicitVRLittleEndian,
    uid: str = "2.25.1000",
) -> Path:
    """A CT series of a volume with axes along the world's, files in an order that means nothing.

    Written here by hand, for the reader's twin: rows run anterior -> posterior, columns
    right -> left, positions are LPS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.clip(volume.working[:, ::-1, ::-1].astype(np.int32) - INTERCEPT, 0, 4095)
    n_slices, rows, cols = stored.shape
    depth, height, width = volume.working_spacing_mm
    for n in range(n_slices):
        x, y, z, _ = volume.working_affine @ (n, rows - 1, cols - 1, 1)
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CT
        dataset.SOPInstanceUID = f"{uid}.{n + 1}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "2.25.1", uid
        dataset.FrameOfReferenceUID = "2.25.2"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SeriesNumber, dataset.InstanceNumber = 3, n + 1
        dataset.PatientID, dataset.PatientName = "", ""
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in (-x, -y, z)]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [height, width]
        dataset.SliceThickness = depth
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, cols, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, INTERCEPT
        dataset.PixelData = stored[n].astype("<u2").tobytes()
        if pydicom.uid.UID(syntax).is_encapsulated:
            dataset.compress(syntax, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = syntax
        if change(dataset, n) is not False:
            dataset.save_as(folder / f"{(n * 7) % n_slices:03d}.dcm", enforce_file_format=True)
    return folder


# Needed to read and refer to the series; everything else is planted.
_KEPT = frozenset(
    {
        *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
        *("FrameOfReferenceUID", "Modality", "ImageType", "PhotometricInterpretation"),
        *("SpecificCharacterSet", "PixelPresentation", "RescaleType", "TransferSyntaxUID"),
        *("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "PresentationLUTShape"),
        "ModalityLUTSequence",
    }
)
_TEXT = frozenset({"PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "CS", "AE"})


def _value(vr: str, number: int) -> Any:
    if vr in _TEXT:
        return f"PLANT{number}X"
    if vr == "UI":
        return f"2.25.4242{number}42"
    if vr in ("DA", "DT"):
        day = (datetime.date(1601, 1, 1) + datetime.timedelta(days=number)).strftime("%Y%m%d")
        return day if vr == "DA" else f"{day}010203.{number:06d}"
    return f"010203.{number:06d}" if vr == "TM" else None


def plant(dataset: Any) -> set[bytes]:
    """Put a value of its own into every tag that can hold text, a date, a time or a UID."""
    planted: set[bytes] = set()

    def put(into: Any, tag: int, vr: str) -> None:
        value = _value(vr, len(planted) + 1)
        if value is not None:
            into.add(pydicom.DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE))
            planted.add(str(value).encode())

    tags = {tag: entry for tag, entry in DicomDictionary.items() if entry[4] not in _KEPT}
    for tag, (vrs, *_) in tags.items():
        group = tag >> 16
        for vr in vrs.split(" or "):
            if group in (0, 2, 4, 6):
                continue
            if vr == "SQ":
                item = pydicom.Dataset()
                for inner, inner_vr in ((0x00100010, "PN"), (0x00400275, "LO"), (0x00081155, "UI")):
                    put(item, inner, inner_vr)
                dataset.add(pydicom.DataElement(tag, "SQ", [item]))
            else:
                put(dataset, tag, vr)
    for mask, (vrs, *_) in RepeatersDictionary.items():  # curves and overlays: 50xx, 60xx
        if mask.startswith(("50xx", "60xx")) and vrs in _TEXT:
            put(dataset, int(mask.replace("xx", "00"), 16), vrs)
    private = dataset.private_block(0x0009, "PLANT PRIVATE", create=True)
    private.add_new(1, "LO", "PLANTprivateX")
    private.add_new(2, "UN", b"PLANTunknownX")
    planted |= {b"PLANT PRIVATE", b"PLANTprivateX", b"PLANTunknownX"}
    dataset.file_meta.SourceApplicationEntityTitle = "PLANTmetaX"
    dataset.file_meta.ImplementationVersionName = "PLANTversionX"
    dataset.preamble = b"PLANTpreambleX".ljust(128, b"\0")
    return planted | {b"PLANTmetaX", b"PLANTversionX", b"PLANTpreambleX"}
