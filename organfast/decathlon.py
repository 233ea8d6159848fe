"""The layouts that a ``dataset.json`` describes: nnU-Net's raw data and the Medical Segmentation
Decathlon's, from which it came.

::

    nnU-Net   imagesTr/NAME_0000.nii.gz   labelsTr/NAME.nii.gz      NAME_0001 ... are more channels
              "channel_names": {"0": "CT"}   "labels": {"liver": 1, "lungs": [2, 3], "ignore": 4}
    MSD       "training": [{"image": "./imagesTr/NAME.nii.gz", "label": "./labelsTr/NAME.nii.gz"}]
              "modality": {"0": "CT"}   "labels": {"1": "liver"}

A label that several regions of nnU-Net share is the smallest of them, within the others: with
``"kidney": [1, 2], "tumour": 2`` a model of kidneys learns both as kidney. ``ignore`` is never
learned from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from organfast.cases import IGNORED, Case, LabelMap, list_folder, nifti_stem, structure_name
from organfast.errors import InputError
from organfast.labeltables import checked_names, whole_number

__all__ = ["find_msd", "find_nnunet"]

_TABLE = "dataset.json"
_IMAGES, _LABELS = "imagesTr", "labelsTr"
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_CT = re.compile(r"(?<![a-z])ct(?![a-z])", re.IGNORECASE)

_Found = tuple[tuple[Case, ...], tuple[str, ...]]


@dataclass(frozen=True)
class _Description:
    """What a ``dataset.json`` says."""

    path: Path
    content: Mapping[str, Any]

    @staticmethod
    def of(folder: Path) -> _Description | None:
        """That of a folder, if it has one beside images to train on."""
        path = folder / _TABLE
        if _IMAGES not in list_folder(folder)[1]:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                path, f"cannot be read as JSON ({error})", "give that of the dataset"
            ) from None
        if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
            raise InputError(path, "names no labels", 'give "labels": {"liver": 1}')
        return _Description(path, content)

    @cached_property
    def _regions(self) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
        table = self.content["labels"]
        try:
            if all(str(key).strip().isdecimal() for key in table):
                return checked_names(table.items()), {}
            return _narrowest_regions(table)
        except ValueError as error:
            raise InputError(
                self.path, f"has labels that cannot be used: {error}", 'give {"liver": 1, ...}'
            ) from None

    def labels(self, path: Path) -> LabelMap:
        """The label map at a path, its numbers named."""
        return LabelMap(path, *self._regions)

    @property
    def channels(self) -> Mapping[str, Any]:
        """Number -> name, as far as they are named."""
        names = self.content.get("channel_names", self.content.get("modality"))
        return names if isinstance(names, dict) else {}

    def ct_channel(self, n_channels: int) -> str:
        """The number of the CT, four digits: of several that one which is called so."""
        if max(n_channels, len(self.channels)) < 2:
            return "0000"
        ct = [number for number, name in self.channels.items() if _CT.search(str(name))]
        if len(ct) != 1 or not str(ct[0]).isdecimal():
            told = ", ".join(map(str, self.channels.values())) or "no name"
            raise InputError(
                self.path,
                f"has several channels ({told}), and not one that is called CT",
                "name the CT in channel_names",
            )
        return f"{int(ct[0]):04d}"

    def check_ending(self) -> None:
        ending = self.content.get("file_ending", ".nii.gz")
        if not isinstance(ending, str) or nifti_stem(f"x{ending}") != "x":
            raise InputError(
                self.path, f"says that files end in {ending}", "convert them to .nii.gz"
            )


def find_nnunet(folder: Path) -> _Found:
    """Cases of a folder in the layout of nnU-Net's raw data.

    Parameters
    ----------
    folder : Path
        Root of the dataset, that of ``dataset.json``.

    Returns
    -------
    cases : tuple of Case
        By name; empty where the folder has another layout.
    skipped : tuple of str
        Images without labels.

    Raises
    ------
    InputError
        ``dataset.json`` cannot be used, no channel or several are the CT, or one is missing.
    """
    described = _Description.of(folder)
    if described is None:
        return (), ()
    if "file_ending" in described.content:
        described.check_ending()
    channels: dict[str, dict[str, Path]] = {}
    for stem, path in list_folder(folder / _IMAGES)[0].items():
        match = _CHANNEL.fullmatch(stem)
        if match:
            channels.setdefault(match["case"], {})[match["channel"]] = path
    folders = list_folder(folder)[1]
    label_maps = list_folder(folders[_LABELS])[0] if _LABELS in folders else {}
    labelled = sorted(channels.keys() & label_maps.keys())
    if not labelled:
        return (), ()
    ct = described.ct_channel(max(len(channels[name]) for name in labelled))
    lacking = next((name for name in labelled if ct not in channels[name]), None)
    if lacking is not None:
        raise InputError(
            folder / _IMAGES, f"lacks {lacking}_{ct}, the CT of {lacking}", f"correct {_TABLE}"
        )
    cases = (
        Case(name, name, channels[name][ct], described.labels(label_maps[name]))
        for name in labelled
    )
    return tuple(cases), tuple(sorted(channels.keys() - label_maps.keys()))


def find_msd(folder: Path) -> _Found:
    """Cases that a ``dataset.json`` in the manner of the Medical Segmentation Decathlon lists.

    Parameters
    ----------
    folder : Path
        Root of the dataset.

    Returns
    -------
    cases : tuple of Case
        By name; empty where the folder has another layout.
    skipped : tuple of str
        Always empty: what is listed has labels.

    Raises
    ------
    InputError
        ``dataset.json`` cannot be used, or lists a file that is not there.
    """
    described = _Description.of(folder)
    if described is None or not isinstance(described.content.get("training"), list):
        return (), ()
    folders = list_folder(folder)[1].values()
    there = {path for sub in folders for path in list_folder(sub)[0].values()}
    pairs = [_listed(described, entry) for entry in described.content["training"]]
    if not any(image in there for image, _ in pairs):
        return (), ()  # nnU-Net's first version lists images without their channels
    for path in (path for pair in pairs for path in pair if path not in there):
        raise InputError(
            described.path,
            f"lists {os.path.relpath(path, folder)}, which is not there",
            "add it, or take it out",
        )
    if len(described.channels) > 1:
        raise InputError(
            described.path, "has several channels in one file", "write the CT to a file of its own"
        )
    cases = {}
    for image, label_map in pairs:
        name = nifti_stem(image.name) or image.name
        if name in cases:
            raise InputError(described.path, f"lists {name} twice", "leave one of them")
        cases[name] = Case(name, name, image, described.labels(label_map))
    return tuple(cases[name] for name in sorted(cases)), ()


def _listed(described: _Description, entry: Any) -> tuple[Path, Path]:
    keys = ("image", "label")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in keys):
        raise InputError(
            described.path,
            "has a list of training cases that cannot be used",
            'give {"image": "./imagesTr/NAME.nii.gz", "label": "./labelsTr/NAME.nii.gz"}',
        )
    folder = described.path.parent
    image, label_map = (folder / entry[key] for key in keys)
    return image, label_map


def _narrowest_regions(
    table: Mapping[str, Any],
) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
    """Label -> the smallest of the regions that hold it, and label -> the others."""
    regions: dict[str, frozenset[int]] = {}
    for given, ids in table.items():
        name = structure_name(given)
        numbers = ids if isinstance(ids, list) else [ids]
        regions[name] = regions.get(name, frozenset()) | {whole_number(n) for n in numbers}
    names, within = {}, {}
    for number in sorted(frozenset[int]().union(*regions.values())):
        sizes = {name: len(ids) for name, ids in regions.items() if number in ids}
        holding = sorted(sizes, key=lambda name: sizes[name])
        if len(holding) > 1 and (number == 0 or IGNORED in holding):
            raise ValueError(f"label {number} is {' and '.join(holding)}")
        if any(not regions[a] < regions[b] for a, b in pairwise(holding)):
            raise ValueError(
                f"label {number} is {' and '.join(holding)}, of which none lies in the other"
            )
        names[number] = holding[0]
        if holding[1:]:
            within[number] = tuple(holding[1:])
    return checked_names(names.items()), within
