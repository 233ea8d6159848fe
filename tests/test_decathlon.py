"""Layouts with a dataset.json: nnU-Net's raw data and the Medical Segmentation Decathlon's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from organfast.anatomy import ClassTable
from organfast.cases import LabelMap
from organfast.errors import InputError
from organfast.layouts import case_labels, dataset_classes, dataset_nuisance, find_cases
from organfast.nifti import Geometry, write_labels, write_volume
from organfast.volume import Volume

DEFAULT = ClassTable.default()
AFFINE = np.diag([1.5, 1.5, 3.0, 1.0])
SHAPE = (3, 4, 6)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def describe(folder: Path, **content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


def put_case(folder: Path, image: str, label_map: str, by_slice: list[int]) -> Volume:
    """A scan whose slices have one label each."""
    hu = np.random.default_rng(0).normal(-100, 300, SHAPE).astype(np.int16)
    volume = Volume(hu, AFFINE)
    touch(folder, image, label_map)
    write_volume(folder / image, volume)
    labels = np.broadcast_to(np.array(by_slice, np.uint8), SHAPE)
    write_labels(folder / label_map, labels, Geometry.of_volume(volume))
    return volume


CT = {"0": "CT"}
LABELS = {"background": 0, "Liver": 1, "Left Kidney": 2}


# --- nnU-Net --------------------------------------------------------------------------------------


def test_nnunet(tmp_path: Path) -> None:
    describe(tmp_path, channel_names=CT, labels=LABELS, numTraining=2, file_ending=".nii.gz")
    volume = put_case(tmp_path, "imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz", [0, 0, 1, 1, 2, 2])
    touch(tmp_path, "imagesTr/a_7_0000.nii.gz", "labelsTr/a_7.nii.gz", "imagesTr/c_0000.nii.gz")
    touch(tmp_path, "imagesTs/d_0000.nii.gz", "imagesTr/._b_0000.nii.gz")
    dataset = find_cases(tmp_path)
    assert dataset.layout == "nnunet"
    assert [case.name for case in dataset.cases] == ["a_7", "b"]
    assert dataset.skipped == ("c",)
    assert dataset.structures == ("kidney_left", "liver")
    assert find_cases(tmp_path, "nnunet") == dataset
    found = case_labels(dataset.cases[1], DEFAULT, volume)
    liver, kidney = DEFAULT.index("liver"), DEFAULT.index("kidney_left")
    by_slice = [255, 255, liver, liver, kidney, kidney]
    np.testing.assert_array_equal(found.labels, np.broadcast_to(by_slice, SHAPE))


def test_of_several_channels_the_ct_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz")
    for names, channel in (
        ({"0": "PET", "1": "CT"}, "0001"),
        ({"0": "ct_venous", "1": "PET"}, "0000"),
    ):
        describe(tmp_path, channel_names=names, labels=LABELS)
        (case,) = find_cases(tmp_path).cases
        assert case.image.name == f"a_{channel}.nii.gz"
    for names in ({"0": "T1", "1": "T2"}, {"0": "CT", "1": "CT_late"}, {"0": "CT"}, None):
        describe(tmp_path, channel_names=names, labels=LABELS)
        if names == CT:
            assert find_cases(tmp_path).cases[0].image.name == "a_0000.nii.gz"
            continue
        with pytest.raises(InputError, match=r"several channels .* not one that is called CT"):
            find_cases(tmp_path)
    describe(tmp_path, channel_names={"0": "PET", "1": "T1", "2": "CT"}, labels=LABELS)
    with pytest.raises(InputError, match="lacks a_0002, the CT of a"):
        find_cases(tmp_path)


def test_a_single_channel_need_not_be_called_ct(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    for names in ({"0": "noNorm"}, None):
        describe(tmp_path, channel_names=names, labels=LABELS)
        assert len(find_cases(tmp_path).cases) == 1


def test_regions_within_each_other(tmp_path: Path) -> None:
    labels = {"background": 0, "kidney_left": [1, 2, 3], "masses": [2, 3], "tumor": 3, "liver": 4}
    describe(tmp_path, channel_names=CT, labels=labels)
    volume = put_case(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", [0, 1, 2, 3, 4, 0])
    dataset = find_cases(tmp_path)
    assert dataset.structures == ("kidney_left", "liver", "masses", "tumor")
    (case,) = dataset.cases
    kidney, liver = DEFAULT.index("kidney_left"), DEFAULT.index("liver")
    found = case_labels(case, DEFAULT, volume, dataset_nuisance(dataset, DEFAULT))
    np.testing.assert_array_equal(found.labels[0, 0], [255, kidney, kidney, kidney, liver, 255])
    own = ClassTable.from_names(["kidney_left", "tumor"])
    found = case_labels(case, own, volume)
    np.testing.assert_array_equal(found.labels[0, 0], [255, 2, 2, 3, 255, 255])


def test_what_is_to_be_ignored_is_never_learned(tmp_path: Path) -> None:
    describe(tmp_path, channel_names=CT, labels={"background": 0, "liver": 1, "ignore": 2})
    volume = put_case(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", [1, 1, 2, 2, 0, 0])
    dataset = find_cases(tmp_path)
    assert dataset.structures == ("liver",)
    for nuisance in (None, {}):
        found = case_labels(dataset.cases[0], DEFAULT, volume, nuisance)
        doubtful, free = found.doubtful, found.unlabelled
        np.testing.assert_array_equal(found.labels[0, 0], [3, 3, doubtful, doubtful, free, free])


BAD_LABELS = {
    "shared": ({"background": 0, "liver": [1, 2], "spleen": [2, 3]}, "label 2 is .*none lies in"),
    "same": ({"a": 1, "b": 1}, "label 1 is a and b, of which none"),
    "ignored": ({"liver": [1, 2], "ignore": 2}, "label 2 is ignore and liver"),
    "no number": ({"liver": "one"}, "invalid literal"),
    "fraction": ({"liver": 1.5}, "no whole number"),
    "negative": ({"liver": -1}, "outside 0"),
    "nothing": ({}, "no rows"),
    "no table": (["liver"], "names no labels"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_labels_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    labels, words = BAD_LABELS[case]
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    describe(tmp_path, channel_names=CT, labels=labels)
    with pytest.raises(InputError, match=words) as caught:
        find_cases(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'dataset.json'}: ")


def test_files_that_are_no_nifti_are_refused_in_words(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nrrd", "labelsTr/a.nrrd")
    describe(tmp_path, channel_names=CT, labels=LABELS, file_ending=".nrrd")
    with pytest.raises(InputError, match=r"files end in .nrrd; convert them"):
        find_cases(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        find_cases(tmp_path)


def test_another_dataset_json_is_no_concern(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[]")
    touch(tmp_path, "a.nii.gz", "a_labels.nii.gz")
    assert find_cases(tmp_path).layout == "pairs"


# --- the Decathlon --------------------------------------------------------------------------------


def listed(*names: str) -> list[dict[str, str]]:
    return [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]


def test_msd(tmp_path: Path) -> None:
    labels = {"0": "background", "1": "liver", "2": "cancer"}
    describe(tmp_path, modality=CT, labels=labels, training=listed("liver_2", "liver_0001"))
    volume = put_case(
        tmp_path, "imagesTr/liver_0001.nii.gz", "labelsTr/liver_0001.nii.gz", [0, 1, 1, 2, 0, 0]
    )
    touch(tmp_path, "imagesTr/liver_2.nii.gz", "labelsTr/liver_2.nii.gz")
    touch(tmp_path, "imagesTr/liver_3.nii.gz", "labelsTr/liver_3.nii.gz", "imagesTs/liver_4.nii.gz")
    dataset = find_cases(tmp_path)
    assert dataset.layout == "msd"
    assert [case.name for case in dataset.cases] == ["liver_0001", "liver_2"]
    assert dataset_classes(dataset).names == ("background", "thorax_abdomen", "liver")
    found = case_labels(dataset.cases[0], DEFAULT, volume)
    np.testing.assert_array_equal(found.labels[0, 0], [255, 3, 3, 255, 255, 255])


def test_nnunets_first_version_lists_images_without_channels(tmp_path: Path) -> None:
    describe(tmp_path, modality=CT, labels={"0": "background", "1": "liver"}, training=listed("a"))
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
    dataset = find_cases(tmp_path)
    assert dataset.layout == "nnunet"
    assert isinstance(dataset.cases[0].labels, LabelMap)
    assert dataset.structures == ("liver",)


def test_msd_lists_that_cannot_be_used(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/b.nii.gz")
    outside = {"image": "/imagesTr/c.nii.gz", "label": "../c.nii.gz"}
    for training, modality, words in (
        (listed("a", "b"), CT, "lists labelsTr/b.nii.gz, which is not there"),
        ([*listed("a"), outside], CT, "imagesTr/c.nii.gz, which is not there"),
        (listed("a", "a"), CT, "lists a twice"),
        (["a"], CT, "list of training cases that cannot be used"),
        (listed("a"), {"0": "CT", "1": "PET"}, "several channels in one file"),
    ):
        describe(tmp_path, modality=modality, labels={"1": "liver"}, training=training)
        with pytest.raises(InputError, match=words):
            find_cases(tmp_path)
    describe(tmp_path, modality=CT, labels={"1": "liver"}, training=listed("z"))
    with pytest.raises(InputError, match="no labelled scan of layout msd"):
        find_cases(tmp_path, "msd")


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nnunet", "msd"])
def test_a_thousand_cases_are_listed_without_opening_one(tmp_path: Path, layout: str) -> None:
    names = [f"case_{n:04d}" for n in range(1000)]
    channel = "_0000" if layout == "nnunet" else ""
    for name in names:
        touch(tmp_path, f"imagesTr/{name}{channel}.nii.gz", f"labelsTr/{name}.nii.gz")
    describe(tmp_path, modality=CT, labels={"1": "liver"}, training=listed(*names))
    dataset = find_cases(tmp_path)  # empty files: to open one would be an error
    assert (dataset.layout, len(dataset.cases)) == (layout, 1000)
