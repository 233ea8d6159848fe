"""What segmenting one scan gives, and how it is written to a folder, whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.errors import InputError
from organfast.nifti import Scan, write_labels, write_probability
from organfast.organs import Organ, organs_csv, organs_json

__all__ = ["Result"]

RUN_RECORD = "run.json"


@dataclass(frozen=True, eq=False)
class Result:
    """One segmented scan.

    Parameters
    ----------
    scan : Scan
        The scan, and the geometry that outputs are written with.
    labels : (n_a, n_b, n_c) uint8 or uint16
        Label map, axes as stored by the scan; a label is a position in the class table.
    confidence : (n_a, n_b, n_c) uint8
        Probability of each voxel's label before cleaning, 255 for certain.
    organs : dict of str to Organ
        Every organ that was looked for, found or not.
    classes : ClassTable
        What the labels mean.
    record : dict
        What ``run.json`` will hold: the same for the same scan, model and settings.
    timings : dict
        Seconds per stage and peak memory, kept apart so that results are reproducible.
    probability_map : callable
        From an organ's name to its full-size map; see :meth:`probability`.
    """

    scan: Scan
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.uint8]
    organs: dict[str, Organ]
    classes: ClassTable
    record: Mapping[str, Any]
    timings: Mapping[str, Any]
    probability_map: Callable[[str], NDArray[np.uint8]]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Everything that a reader should check, about the scan and about its organs."""
        of_organs = (w for organ in self.organs.values() for w in organ.warnings)
        return tuple(dict.fromkeys((*self.record["warnings"], *of_organs)))

    def probability(self, name: str) -> NDArray[np.uint8]:
        """Full-size probability map of one organ.

        Enlarged from the positions kept by ``Settings.probabilities``; for an organ that was not
        kept the classifier runs once more.

        Parameters
        ----------
        name : str
            A structure of the class table.

        Returns
        -------
        (n_a, n_b, n_c) uint8
            255 for certain; axes as stored by the scan.

        Raises
        ------
        ValueError
            The table has no such structure.
        """
        return self.probability_map(name)

    def save(
        self,
        out: str | PathLike[str],
        *,
        preview: bool = True,
        probabilities: Sequence[str] = (),
    ) -> None:
        """Write the result: a folder with everything, or a label map alone.

        The folder holds ``segmentation.nii.gz`` on the scan's own grid, ``organs.json`` and
        ``organs.csv``, label tables for ITK-SNAP, 3D Slicer and JSON, ``run.json``,
        ``timings.json`` and pictures. It appears whole or not at all; the folder of an earlier
        result is replaced, a folder with other content is refused.

        Parameters
        ----------
        out : str or PathLike
            A folder, or a path that ends in ``.nii`` or ``.nii.gz`` for the label map alone.
        preview : bool
            Draw ``overlay.png``, and a picture per probability map.
        probabilities : sequence of str
            Organs whose full-size maps go to ``probabilities/NAME.nii.gz``.

        Raises
        ------
        InputError
            The output cannot be written, or is a folder that holds something else.
        ValueError
            An organ is not in the class table.
        """
        target = Path(out)
        if target.name.endswith((".nii", ".nii.gz")):
            write_labels(target, self.labels, self.scan.geometry)
            return
        for name in probabilities:
            self.classes.index(name)
        _check_target(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.parent / f".{target.name[:40]}.{secrets.token_hex(8)}"
            beside.mkdir()
        except OSError as error:
            raise _unwritable(target, error) from None
        try:
            self._write(beside, preview, probabilities)
            _swap(beside, target)
        except OSError as error:
            raise _unwritable(target, error) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write(self, folder: Path, preview: bool, probabilities: Sequence[str]) -> None:
        write_labels(folder / "segmentation.nii.gz", self.labels, self.scan.geometry)
        texts = {
            "organs.json": organs_json(self.organs),
            "organs.csv": organs_csv(self.organs),
            "labels.json": _json(
                [{"label": n, **row} for n, row in enumerate(self.classes.to_dict())]
            ),
            "labels_itksnap.txt": self.classes.itksnap_table(),
            "labels_slicer.ctbl": self.classes.slicer_table(),
            RUN_RECORD: _json(self.record),
            "timings.json": _json(self.timings),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if preview:
            self._draw(folder / "overlay.png")
        if probabilities:
            (folder / "probabilities").mkdir()
        for name in probabilities:
            self._write_probability(folder / "probabilities", name, preview)

    def _draw(self, path: Path) -> None:
        from organfast.overlay import overlay_views, save_png

        volume = self.scan.volume
        labels = volume.orientation.working(self.labels)
        save_png(overlay_views(volume, labels, self.classes), path)

    def _write_probability(self, folder: Path, name: str, preview: bool) -> None:
        from organfast.overlay import overlay_probability, save_png

        probability = self.probability(name)
        write_probability(folder / f"{name}.nii.gz", probability, self.scan.geometry)
        if preview:
            volume = self.scan.volume
            figure = overlay_probability(volume, volume.orientation.working(probability), name)
            save_png(figure, folder / f"{name}.png")


def _check_target(target: Path) -> None:
    """Refuse to replace what is not an earlier result."""
    if target.is_dir():
        if any(target.iterdir()) and not (target / RUN_RECORD).is_file():
            raise InputError(
                target, "is a folder that holds other files", "give a new or empty folder"
            )
    elif target.exists():
        raise InputError(target, "is a file", "give a folder, or a name that ends in .nii.gz")


def _swap(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an earlier one, which goes last."""
    if not target.is_dir():
        os.rename(new, target)
        return
    old = new.with_name(f"{new.name}.old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def _unwritable(target: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    return InputError(target, f"cannot be written ({reason})", "give a folder you may write to")


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
