"""From an output folder to its report: found, or made of what lies there."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.dicom import is_dicom, read_series
from organfast.errors import InputError
from organfast.evaluation import case_pictures
from organfast.evaluationreport import evaluation_page
from organfast.nifti import (
    file_digest,
    read_geometry,
    read_labels,
    read_probability,
)
from organfast.organs import organs_from_json
from organfast.page import write_page
from organfast.report import Segmented, scan_page
from organfast.results import REPORT, RUN_RECORD
from organfast.scans import as_scan
from organfast.scorebook import Evaluation
from organfast.volume import Volume

__all__ = ["report_of"]

StrPath = str | PathLike[str]
_RESULT = (RUN_RECORD, "segmentation.nii.gz", "organs.json", "labels.json")
_EVALUATION = "evaluation.json"


def report_of(out: StrPath, scan: StrPath | None = None) -> Path:
    """Find the report of a result or of an evaluation; make it where it is missing.

    Parameters
    ----------
    out : path
        A folder that ``Result.save`` or ``save_evaluation`` wrote, or a report.
    scan : path, optional
        The scan of the result: its report is made anew with it. Without it a missing report is
        made of the labels alone, and says so.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    InputError
        There is nothing to report on, several results are there, or the scan is another one.
    """
    out = Path(out)
    if out.is_file() and out.suffix == ".html":
        return out
    if not out.is_dir():
        raise InputError(out, "is no folder and no report", "give an output folder of organfast")
    is_result = all((out / name).is_file() for name in _RESULT)
    if not is_result and not (out / _EVALUATION).is_file() and not (out / REPORT).is_file():
        raise _nothing(out)
    report = out / REPORT
    if report.is_file() and scan is None:
        return report
    try:
        write_page(_result_page(out, scan) if is_result else _scores_page(out), report)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(out, f"is damaged ({error})", "segment or evaluate again") from None
    return report


def _nothing(out: Path) -> InputError:
    inside = sorted(p.name for p in out.iterdir() if (p / RUN_RECORD).is_file())
    if not inside:
        return InputError(
            out, "holds no result and no evaluation", "give a folder that organfast wrote"
        )
    named = ", ".join(inside[:10]) + (", …" if len(inside) > 10 else "")
    return InputError(out, f"holds {len(inside)} results: {named}", f"give one: {out / inside[0]}")


def _scores_page(out: Path) -> str:
    content = json.loads((out / _EVALUATION).read_text("utf-8"))
    Evaluation.from_dict(content)  # which checks it
    return evaluation_page(content, case_pictures(out))


def _result_page(out: Path, scan: StrPath | None) -> str:
    record = json.loads((out / RUN_RECORD).read_text("utf-8"))
    rows = json.loads((out / "labels.json").read_text("utf-8"))
    classes = ClassTable.from_dict([{k: v for k, v in r.items() if k != "label"} for r in rows])
    organs = organs_from_json((out / "organs.json").read_text("utf-8"))
    if not (out / "segmentation.nii.gz").exists():
        raise InputError(
            out, "holds no label map to show but a DICOM SEG", "segment with -ot nifti, too"
        )
    labels, affine = read_labels(out / "segmentation.nii.gz")
    if scan is None:
        volume, name = Volume(np.zeros(labels.shape, np.int16), affine), "a scan (labels alone)"
    else:
        digest = read_series(scan).digest if is_dicom(scan) else file_digest(scan)
        if record["input"] not in (None, digest):
            raise InputError(scan, f"is not the scan that {out} was made of", "give that scan")
        volume, name = as_scan(scan).volume, Path(scan).name
        if volume.hu.shape != labels.shape:
            raise InputError(scan, f"does not fit the labels in {out}", "give the scan of these")
    working = volume.orientation.working
    maps = {
        organ: working(_stored_map(path, labels.shape))
        for organ in organs
        if (path := out / "probabilities" / f"{organ}.nii.gz").is_file()
    }
    return scan_page(
        Segmented(name, volume, working(labels), classes, organs, record, maps, scan is not None)
    )


def _stored_map(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    if read_geometry(path).shape != shape:
        raise InputError(path, "is no map on the grid of the labels", "segment again")
    return read_probability(path)
