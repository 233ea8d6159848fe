"""Layouts: which cases are found, what their labels become, and what bad datasets get."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure, totalsegmentator_names
from organfast.errors import InputError
from organfast.layouts import (
    LAYOUTS,
    Case,
    LabelMap,
    Masks,
    case_labels,
    check_classes,
    dataset_classes,
    dataset_notes,
    dataset_nuisance,
    find_cases,
    find_scans,
    lies_in,
    write_case,
)
from organfast.nifti import Geometry, read_volume, write_labels, write_volume
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom, phantom_table
from organfast.torso import STRUCTURES
from organfast.volume import Volume

DATA = Path(__file__).parents[2] / "shared" / "data"
AFFINE = np.array([[-1.5, 0, 0, 9.0], [0, 1.5, 0, -12], [0, 0, 3, 7], [0, 0, 0, 1.0]])
SHAPE = (4, 5, 6)
IDS = {name: number for number, name in totalsegmentator_names().items()}
DEFAULT = ClassTable.default()


def volume_of(shape: tuple[int, int, int] = SHAPE) -> Volume:
    hu = np.random.default_rng(0).normal(-100, 300, shape).astype(np.int16)
    return Volume(hu, AFFINE)


def box(start: int, stop: int) -> NDArray[np.bool_]:
    """Slices start..stop of the volume."""
    mask = np.zeros(SHAPE, bool)
    mask[:, :, start:stop] = True
    return mask


def put_image(path: Path, volume: Volume | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, volume or volume_of())
    return path


def put_labels(path: Path, labels: NDArray, affine: NDArray[np.float64] = AFFINE) -> Path:  # type: ignore[type-arg]
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labels.astype(np.uint16 if labels.max() > 255 else np.uint8)
    write_labels(path, labels, Geometry.of_volume(Volume(np.zeros(labels.shape, np.int16), affine)))
    return path


def put_masks(folder: Path, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    for name, mask in masks.items():
        put_labels(folder / f"{name}.nii.gz", mask)


def one_line(error: InputError, path: object) -> str:
    line = str(error)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line


# --- finding --------------------------------------------------------------------------------------


def test_totalsegmentator_with_masks(tmp_path: Path) -> None:
    for subject in ("s0002", "s0001"):
        put_image(tmp_path / subject / "ct.nii.gz")
        put_masks(tmp_path / subject / "segmentations", {"liver": box(0, 2), "heart": box(2, 3)})
    put_image(tmp_path / "s0003" / "ct.nii.gz")
    (tmp_path / "notes").mkdir()
    (tmp_path / "meta.csv").write_text("a;b")
    dataset = find_cases(tmp_path)
    assert dataset.layout == "totalsegmentator"
    assert [case.name for case in dataset.cases] == ["s0001", "s0002"]
    assert dataset.patients == ("s0001", "s0002")
    assert dataset.skipped == ("s0003",)
    assert dataset.structures == ("heart", "liver")
    assert dataset.cases[0].image == tmp_path / "s0001" / "ct.nii.gz"


@pytest.mark.parametrize(
    "name", ["labels", "segmentation", "segmentations", "s1_labels", "ct_seg", "labels.nii"]
)
def test_totalsegmentator_with_one_label_map(tmp_path: Path, name: str) -> None:
    name = name if name.endswith(".nii") else f"{name}.nii.gz"
    put_image(tmp_path / "s1" / "ct.nii")
    put_labels(tmp_path / "s1" / name, box(0, 2) * IDS["liver"])
    put_masks(tmp_path / "s1" / "segmentations", {"heart": box(0, 1)})  # the label map comes first
    (case,) = find_cases(tmp_path).cases
    assert isinstance(case.labels, LabelMap)
    assert case.labels.path.name == name
    assert case.labels.annotated == frozenset(totalsegmentator_names().values())


def test_visceral_names(tmp_path: Path) -> None:
    stems = ["10000100_1_CTce_ThAb", "10000100_2_CT_wb", "10000101_1_CTce_ThAb"]
    for stem in [*stems, "10000102_1_CTce_ThAb", "10000103_1_MRT1_wb"]:
        put_image(tmp_path / "volumes" / f"{stem}.nii.gz")
    for stem in [*stems, "10000103_1_MRT1_wb"]:
        for radlex, annotator in ((58, 4), (86, 12), (86, 7), (86, 9)):
            mask = box(0, 2) if radlex == 58 else box(annotator - 5, annotator - 4)
            put_labels(tmp_path / "segmentations" / f"{stem}_{radlex}_{annotator}.nii.gz", mask)
    dataset = find_cases(tmp_path)
    assert dataset.layout == "visceral"
    assert [case.name for case in dataset.cases] == stems
    assert [case.patient for case in dataset.cases] == ["10000100", "10000100", "10000101"]
    assert dataset.patients == ("10000100", "10000101")
    assert dataset.skipped == ("10000102_1_CTce_ThAb",)
    classes = dataset_classes(dataset)
    assert classes.names == ("background", "thorax_abdomen", "liver", "spleen")
    found = case_labels(dataset.cases[0], classes, volume_of())
    np.testing.assert_array_equal(found.labels == classes.index("liver"), box(0, 2))
    # Annotator 7 of 12, 7 and 9: the lowest number, not first or last in the alphabet.
    np.testing.assert_array_equal(found.labels == classes.index("spleen"), box(2, 3))
    assert ClassTable.from_names(dataset.structures).names == classes.names


def test_pairs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        put_image(tmp_path / f"{name}.nii.gz")
    put_image(tmp_path / "alone.nii.gz")
    put_labels(tmp_path / "a_labels.nii.gz", box(0, 1) * IDS["liver"])
    put_labels(tmp_path / "b_seg.nii", box(0, 1) * IDS["spleen"])
    put_labels(tmp_path / ".hidden_labels.nii.gz", box(0, 1))
    dataset = find_cases(tmp_path)
    assert dataset.layout == "pairs"
    assert [(case.name, case.patient) for case in dataset.cases] == [("a", "a"), ("b", "b")]
    assert dataset.skipped == ("alone",)
    assert find_cases(tmp_path, "pairs") == dataset


def test_pairs_in_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("images/a", "images/b", "images/c", "labels/a", "labels/b_seg", "labels/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "labels" / "labels.csv").write_text("id,name\n1,liver\n")
    dataset = find_cases(tmp_path)
    assert dataset.layout == "pairs"
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[1].image == tmp_path / "images" / "b.nii.gz"
    assert dataset.skipped == ("c",)
    assert dataset.structures == ("liver",)


def test_scans_to_segment_are_all_but_the_labels(tmp_path: Path) -> None:
    scans = {
        "a.nii.gz": "a",
        "b.nii": "b",
        "s1/ct.nii.gz": "s1",
        "s2/chest.nii.gz": "s2/chest",
        "deep/s3/ct.nii": "deep/s3",
        "ct.nii.gz": "ct",
        "1_1_CT_Ab.nii.gz": "1_1_CT_Ab",
    }
    others = ["a_labels.nii.gz", "b_seg.nii", "s1/segmentation.nii.gz", "1_1_CT_Ab_58_1.nii.gz"]
    others += ["s1/segmentations/liver.nii.gz", "s2/notes.txt", ".hidden.nii.gz", "labels.nii.gz"]
    for name in [*scans, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = {name: tmp_path / file for file, name in scans.items()}
    assert find_scans(tmp_path) == expected
    assert list(find_scans(tmp_path)) == sorted(expected)
    assert find_scans(tmp_path / "a.nii.gz") == {"a": tmp_path / "a.nii.gz"}
    assert find_scans(tmp_path / "missing.dat") == {"missing.dat": tmp_path / "missing.dat"}
    (tmp_path / "s1.nii").touch()
    with pytest.raises(InputError, match=r"s1.nii and s1/ct.nii.gz for one scan"):
        find_scans(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no scan"):
        find_scans(tmp_path / "empty")


def test_a_dataset_can_be_sent_to_another_process(tmp_path: Path) -> None:
    put_image(tmp_path / "a.nii.gz")
    put_labels(tmp_path / "a_labels.nii.gz", box(0, 1))
    dataset = find_cases(tmp_path)
    assert pickle.loads(pickle.dumps(dataset)) == dataset


def test_listing_reads_no_voxels(tmp_path: Path) -> None:
    for number in range(300):
        masks = tmp_path / f"s{number:04d}" / "segmentations"
        masks.mkdir(parents=True)
        (masks.parent / "ct.nii.gz").touch()
        for name in ("liver", "spleen"):
            (masks / f"{name}.nii.gz").touch()
    dataset = find_cases(tmp_path)
    assert len(dataset.cases) == 300
    assert dataset_classes(dataset).names == ("background", "thorax_abdomen", "liver", "spleen")


def test_a_dataset_without_cases_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "missing", "cannot be listed"),
        (tmp_path / "file", "cannot be listed"),
        (tmp_path / "empty", "no labelled scan"),
        (tmp_path, "no labelled scan"),
    ):
        for layout in LAYOUTS:
            with pytest.raises(InputError) as caught:
                find_cases(path, layout)
            assert words in one_line(caught.value, path)
    with pytest.raises(ValueError, match="layout 'nifti' is unknown"):
        find_cases(tmp_path, "nifti")


def test_two_layouts_in_one_folder_must_be_told_apart(tmp_path: Path) -> None:
    put_image(tmp_path / "a.nii.gz")
    put_labels(tmp_path / "a_labels.nii.gz", box(0, 1) * 5)
    put_image(tmp_path / "s1" / "ct.nii.gz")
    put_labels(tmp_path / "s1" / "labels.nii.gz", box(0, 1) * 5)
    with pytest.raises(InputError, match="totalsegmentator and pairs"):
        find_cases(tmp_path)
    assert [case.name for case in find_cases(tmp_path, "pairs").cases] == ["a"]
    assert [case.name for case in find_cases(tmp_path, "totalsegmentator").cases] == ["s1"]


@pytest.mark.parametrize(
    "names",
    [
        ("a.nii.gz", "a_labels.nii.gz", "a_seg.nii.gz"),
        ("s1/ct.nii.gz", "s1/labels.nii.gz", "s1/segmentation.nii.gz"),
        ("x/1_1_CT_Ab.nii.gz", "y/1_1_CT_Ab.nii.gz", "1_1_CT_Ab_58_1.nii.gz"),
        ("s1/ct.nii.gz", "s1/segmentations/Liver.nii.gz", "s1/segmentations/liver.nii.gz"),
        ("s1/ct.nii.gz", "s1/segmentations/58.nii.gz", "s1/segmentations/liver.nii.gz"),
    ],
)
def test_two_files_for_one_thing_must_be_told_apart(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="leave one of them"):
        find_cases(tmp_path)


# --- label tables ---------------------------------------------------------------------------------

TABLES = {
    "labels.csv": "id,name\n1,liver\n2, kidney left\n",
    "labels.json": json.dumps({"1": "liver", "2": "kidney left"}),
    "by name/labels.json": json.dumps({"liver": 1, "kidney left": 2}),
    "nested/labels.json": json.dumps({"labels": {"background": 0, "liver": 1, "kidney_left": 2}}),
    "beside a result/labels.json": json.dumps(
        [{"label": 1, "name": "liver", "side": ""}, {"label": 2, "name": "kidney_left"}]
    ),
    "spelled/labels.csv": "id,name\n1,LIVER\n2,L_Kidney\n",
    "radlex/labels.csv": "id,name\n1,58\n2,29663\n",
    "labels.txt": (
        "################\n# ITK-SnAP Label Description File\n################\n"
        '    0     0    0    0        0  0  0    "Clear Label"\n'
        '    1   255    0    0        1  1  1    "Liver"\n'
        '    2     0  255    0     0.35  0  1    "Left Kidney"\n\n'
    ),
    "marked/labels.csv": "﻿id,name,colour\r\n1,liver,red\r\n2,kidney_left,blue\r\n",
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_names_the_labels(tmp_path: Path, table: str, beside: bool) -> None:
    put_image(tmp_path / "s1" / "ct.nii.gz")
    put_labels(tmp_path / "s1" / "labels.nii.gz", box(0, 2) * 1 + box(2, 3) * 2)
    folder = tmp_path / "s1" if beside else tmp_path
    (folder / table.split("/")[-1]).write_text(TABLES[table], encoding="utf-8")
    if beside:
        (tmp_path / "labels.csv").write_text("id,name\n9,spleen\n")
    dataset = find_cases(tmp_path)
    assert dataset.structures == ("kidney_left", "liver")
    classes = dataset_classes(dataset)
    found = case_labels(dataset.cases[0], classes, volume_of())
    np.testing.assert_array_equal(found.labels == classes.index("liver"), box(0, 2))
    np.testing.assert_array_equal(found.labels == classes.index("kidney_left"), box(2, 3))
    np.testing.assert_array_equal(found.labels == found.unlabelled, box(3, 6))


BAD_TABLES = {
    "no rows": ("labels.csv", "id,name\n"),
    "other columns": ("labels.csv", "number,structure\n1,liver\n"),
    "no number": ("labels.csv", "id,name\none,liver\n"),
    "no name": ("labels.csv", "id,name\n1\n"),
    "twice": ("labels.csv", "id,name\n1,liver\n1,spleen\n"),
    "too large": ("labels.csv", "id,name\n70000,liver\n"),
    "negative": ("labels.csv", "id,name\n-1,liver\n"),
    "no JSON": ("labels.json", "{"),
    "list": ("labels.json", "[1, 2]"),
    "regions": ("labels.json", '{"liver": [1, 2]}'),
    "empty": ("labels.json", "{}"),
    "bytes": ("labels.json", "\x00"),
    "fraction": ("labels.json", '{"liver": 1.5}'),
    "rows without names": ("labels.json", '[{"label": 1}]'),
    "prose": ("labels.txt", "These are the labels.\n"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_one_line(tmp_path: Path, name: str) -> None:
    file, text = BAD_TABLES[name]
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "a_labels.nii.gz").touch()
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path)
    assert "is no label table" in one_line(caught.value, tmp_path / file)


# --- classes of a dataset -------------------------------------------------------------------------


def _dataset_of(tmp_path: Path, names: list[str]) -> ClassTable:
    masks = tmp_path / "s1" / "segmentations"
    masks.mkdir(parents=True)
    (tmp_path / "s1" / "ct.nii.gz").touch()
    for name in names:
        (masks / f"{name}.nii.gz").touch()
    return dataset_classes(find_cases(tmp_path))


def test_classes_are_the_default_ones_that_are_annotated(tmp_path: Path) -> None:
    lobes = ["lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right"]
    classes = _dataset_of(tmp_path, [*lobes, "heart", "iliopsoas_left", "liver"])
    expected = ("background", "thorax_abdomen", "liver", "lung_left", "psoas_major_left")
    assert classes.names == expected


def test_a_dataset_of_other_structures_has_classes_of_its_own(tmp_path: Path) -> None:
    classes = _dataset_of(tmp_path, ["tumour", "femur_left", "femur_right"])
    names = ("background", "thorax_abdomen", "femur_left", "femur_right", "tumour")
    assert classes.names == names
    assert classes["femur_left"].mirror == "femur_right"


def test_a_table_of_what_nobody_annotates_is_refused(tmp_path: Path) -> None:
    for case, name in (("s1", "lung_upper_lobe_left"), ("s2", "lung_lower_lobe_left")):
        for file in (f"{case}/ct", f"{case}/segmentations/{name}", f"{case}/segmentations/liver"):
            path = tmp_path / f"{file}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    dataset = find_cases(tmp_path)
    check_classes(ClassTable.from_names(["liver"]), dataset)
    with pytest.raises(ValueError, match=r"names livre, which no case of .* annotates; leave"):
        check_classes(ClassTable.from_names(["liver", "livre"]), dataset)
    with pytest.raises(ValueError, match="names lung_left"):  # half a lung in each case
        check_classes(DEFAULT.keep(["liver", "lung_left"]), dataset)


def test_names_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    names = ["LIVER", "Left Kidney", "r_kidney", "right adrenal gland", "gall-bladder", "L1"]
    classes = _dataset_of(tmp_path, names)
    assert set(classes.names[2:]) == {
        *("liver", "kidney_left", "kidney_right", "adrenal_gland_right", "gallbladder"),
        "vertebrae_L1",
    }
    own = ClassTable((DEFAULT.structures[0], Structure("Liver"), Structure("Right-Kidney")))
    check_classes(own, find_cases(tmp_path))


def test_what_stands_for_a_class_is_noted(tmp_path: Path) -> None:
    lobes = ["lung_upper_lobe_left", "lung_lower_lobe_left"]
    _dataset_of(tmp_path, [*lobes, "iliopsoas_left", "psoas_major_right", "iliopsoas_right"])
    assert dataset_notes(find_cases(tmp_path), DEFAULT) == (
        "lung_lower_lobe_left + lung_upper_lobe_left make up lung_left",
        "iliopsoas_left stands for psoas_major_left: the iliopsoas holds the iliacus as well",
    )


# --- structures beside the table ------------------------------------------------------------------


def _nuisance_of(tmp_path: Path, names: list[str], classes: ClassTable) -> dict[str, str]:
    masks = tmp_path / "s1" / "segmentations"
    masks.mkdir(parents=True)
    (tmp_path / "s1" / "ct.nii.gz").touch()
    for name in names:
        (masks / f"{name}.nii.gz").touch()
    found = dataset_nuisance(find_cases(tmp_path), classes)
    return {name: classes.names[label] for name, label in found.items()}


def test_what_a_table_does_not_name_is_context_by_its_name(tmp_path: Path) -> None:
    names = ["liver", "heart", "rib_left_1", "rib_left_12", "vertebrae_L1", "vertebrae_L2", "86"]
    names += ["lung_vessel_left", "liver_vessel"]
    expected = {
        "heart": "thorax_abdomen",
        "rib_left": "body_envelope",
        "vertebrae_L": "body_envelope",
    }
    assert _nuisance_of(tmp_path / "a", names, DEFAULT) == expected
    # A table of the liver alone: the spleen, by its RadLex id, and the other organs are beside it.
    liver = ClassTable.from_names(["liver"])
    beside = ["heart", "lung_vessel_left", "rib_left", "spleen", "vertebrae_L"]
    assert _nuisance_of(tmp_path / "b", names, liver) == dict.fromkeys(beside, "thorax_abdomen")
    bare = ClassTable(tuple(s for s in liver.structures if s.role != "context"))
    assert set(_nuisance_of(tmp_path / "c", names, bare).values()) == {"background"}


@pytest.mark.parametrize(
    "name",
    [
        *("abdomen", "body", "Bones", "muscle", "thorax_abdomen"),  # may hold an organ
        *("kidney", "lung", "right_kidney", "bladder", "vertebrae", "lungs"),  # may be one
        *("kidney_cyst_left", "liver_segment_4", "lung_vessels", "tumour", "lesions"),  # in one
        *("99999", "left"),
    ],
)
def test_what_may_be_an_organ_is_no_nuisance(tmp_path: Path, name: str) -> None:
    classes = DEFAULT.keep([n for n in DEFAULT.names if n not in ("thorax_abdomen", "aorta")])
    assert _nuisance_of(tmp_path, ["liver", name], classes) == {}


def test_the_other_side_is_no_doubt(tmp_path: Path) -> None:
    classes = ClassTable.from_names(["kidney_left"])
    names = ["kidney_left", "kidney_right", "kidney_cyst_right", "psoas_minor_left"]
    assert set(_nuisance_of(tmp_path, names, classes)) == set(names[1:3]) - {
        "kidney_cyst_right"
    } | {"psoas_minor_left"}


def test_the_wall_of_the_trunk_is_the_phantoms() -> None:
    """One rule for painted cohorts that come with their classes and with all their labels."""
    wall = {name for name in STRUCTURES if lies_in(name, DEFAULT) == DEFAULT.index("body_envelope")}
    assert wall == {name for name, (_, place) in STRUCTURES.items() if place == "wall"}
    scheme = {n for n in IDS if lies_in(n, DEFAULT) == DEFAULT.index("body_envelope")}
    assert {"gluteus_minimus_left", "skull", "vertebrae_C1", "rib_right_12"} <= scheme
    assert not {"heart", "colon", "brain", "esophagus", "liver", "iliac_vena_left"} & scheme


@pytest.mark.parametrize("kind", ["label map", "masks"])
def test_nuisance_gets_labels_after_the_classes(tmp_path: Path, kind: str) -> None:
    names = ["liver", "heart", "rib_left_1", "rib_left_2", "kidney_cyst_left", "abdomen"]
    stored = sum((n + 1) * box(n, n + 1).astype(np.uint8) for n in range(6))
    if kind == "masks":
        put_masks(tmp_path, {name: stored == n for n, name in enumerate(names, 1)})
        form: LabelMap | Masks = Masks({name: tmp_path / f"{name}.nii.gz" for name in names})
    else:
        form = LabelMap(put_labels(tmp_path / "l.nii.gz", stored), dict(enumerate(names, 1)))
    case = _case(tmp_path, form)
    found = case_labels(case, DEFAULT, volume_of(), {"heart": 2, "rib_left": 1})
    by_slice = [DEFAULT.index("liver"), 23, 24, 24, found.doubtful, found.unlabelled]
    np.testing.assert_array_equal(found.labels, np.broadcast_to(by_slice, SHAPE))
    coarse = case_labels(case, DEFAULT, volume_of())
    by_slice[1:5] = [coarse.unlabelled] * 4
    np.testing.assert_array_equal(coarse.labels, np.broadcast_to(by_slice, SHAPE))
    assert coarse.missing == found.missing


def test_a_mask_beside_the_table_never_takes_a_voxel_of_an_organ(tmp_path: Path) -> None:
    masks = {"liver": box(2, 4), "heart": box(0, 5), "liver_cyst": box(3, 6)}
    put_masks(tmp_path, masks)
    case = _case(tmp_path, Masks({name: tmp_path / f"{name}.nii.gz" for name in masks}))
    found = case_labels(case, DEFAULT, volume_of(), {"heart": 2})
    liver, beyond = DEFAULT.index("liver"), found.doubtful
    by_slice = [23, 23, liver, liver, beyond, beyond]
    np.testing.assert_array_equal(found.labels, np.broadcast_to(by_slice, SHAPE))
    assert found.warnings == ()


def test_more_labels_than_a_byte_holds(tmp_path: Path) -> None:
    names = [f"vein_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(300)]
    path = put_labels(tmp_path / "l.nii.gz", box(0, 1) * 1 + box(1, 2) * 300)
    case = _case(tmp_path, LabelMap(path, dict(enumerate(names, 1))))
    found = case_labels(case, DEFAULT, volume_of(), dict.fromkeys(names, 2))
    assert found.labels.dtype == np.uint16
    np.testing.assert_array_equal(found.labels[0, 0, :3], [23, 322, 65_535])


# --- patients -------------------------------------------------------------------------------------


def test_cases_of_one_person_stay_together(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.nii.gz").touch()
        (tmp_path / f"{name}_labels.nii.gz").touch()
    (tmp_path / "alone.nii.gz").touch()
    (tmp_path / "patients.csv").write_text("patient,case\r\np1,a\r\np1, c\r\np2,alone\r\n")
    dataset = find_cases(tmp_path)
    assert [(case.name, case.patient) for case in dataset.cases] == [
        *(("a", "p1"), ("b", "b"), ("c", "p1"))
    ]
    assert dataset.patients == ("b", "p1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("case,patient\nz,p1\n", "names z, which is no case"),
        ("case,patient\na,p1\na,p2\n", "gives a two patients"),
        ("case,patient\na,\n", "a row without case or patient"),
        ("scan;person\na;p1\n", "a row without case or patient"),
        ("\x00\udcff", "cannot be read"),
    ],
)
def test_a_bad_list_of_patients_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    for name in ("a", "a_labels"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "patients.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path)
    assert words in one_line(caught.value, tmp_path / "patients.csv")


# --- labels of a case -----------------------------------------------------------------------------


def _case(tmp_path: Path, labels: LabelMap | Masks) -> Case:
    return Case("s1", "s1", tmp_path / "ct.nii.gz", labels)


def test_lobes_become_a_lung_and_other_structures_are_unlabelled(tmp_path: Path) -> None:
    stored = np.zeros(SHAPE, np.uint8)
    stored[:, :, 0] = IDS["lung_upper_lobe_left"]
    stored[:, :, 1] = IDS["lung_lower_lobe_left"]
    stored[:, :, 2] = IDS["heart"]
    stored[:, :, 3] = IDS["iliopsoas_right"]
    path = put_labels(tmp_path / "l.nii.gz", stored)
    case = _case(tmp_path, LabelMap(path, totalsegmentator_names()))
    found = case_labels(case, DEFAULT, volume_of())
    assert found.labels.dtype == np.uint8
    by_slice = [DEFAULT.index("lung_left")] * 2 + [
        255,
        DEFAULT.index("psoas_major_right"),
        255,
        255,
    ]
    np.testing.assert_array_equal(found.labels, np.broadcast_to(by_slice, SHAPE))
    # Structures of the scheme without a voxel are known to be absent; these are not of the scheme.
    missing = {DEFAULT.names[label] for label in found.missing}
    assert missing == {"body_envelope", "rectus_abdominis_right", "rectus_abdominis_left"}
    assert found.warnings == ()


def test_masks_annotate_only_what_has_a_file(tmp_path: Path) -> None:
    lobes = ("lung_upper_lobe_left", "lung_upper_lobe_right", "lung_lower_lobe_left")
    masks = {name: box(n, n + 1) for n, name in enumerate([*lobes, "spleen", "heart"])}
    masks["liver"] = np.zeros(SHAPE, bool)
    put_masks(tmp_path, masks)
    case = _case(tmp_path, Masks({name: tmp_path / f"{name}.nii.gz" for name in masks}))
    found = case_labels(case, DEFAULT, volume_of())
    left, right, spleen = (DEFAULT.index(n) for n in ("lung_left", "lung_right", "spleen"))
    by_slice = [left, right, left, spleen, 255, 255]
    np.testing.assert_array_equal(found.labels, np.broadcast_to(by_slice, SHAPE))
    annotated = {"background", "thorax_abdomen", "lung_left", "spleen", "liver"}
    assert {DEFAULT.names[n] for n in found.missing} == set(DEFAULT.names) - annotated


def test_of_masks_that_overlap_the_later_class_wins_and_it_is_said(tmp_path: Path) -> None:
    put_masks(tmp_path, {"liver": box(0, 4), "spleen": box(3, 6)})
    case = _case(tmp_path, Masks({n: tmp_path / f"{n}.nii.gz" for n in ("spleen", "liver")}))
    found = case_labels(case, DEFAULT, volume_of())
    assert DEFAULT.index("spleen") > DEFAULT.index("liver")
    np.testing.assert_array_equal(found.labels == DEFAULT.index("spleen"), box(3, 6))
    assert found.warnings == ("spleen.nii.gz: 20 voxels had another label; spleen wins",)


def test_masks_that_touch_parts_of_one_structure_do_not_overlap(tmp_path: Path) -> None:
    lobes = ("lung_upper_lobe_left", "lung_lower_lobe_left")
    put_masks(tmp_path, {name: box(0, 4) for name in lobes})
    case = _case(tmp_path, Masks({name: tmp_path / f"{name}.nii.gz" for name in lobes}))
    assert case_labels(case, DEFAULT, volume_of()).warnings == ()


def test_a_mask_of_255_is_a_mask(tmp_path: Path) -> None:
    path = put_labels(tmp_path / "liver.nii.gz", box(0, 2) * 255)
    found = case_labels(_case(tmp_path, Masks({"liver": path})), DEFAULT, volume_of())
    np.testing.assert_array_equal(found.labels == DEFAULT.index("liver"), box(0, 2))


@pytest.mark.parametrize(
    ("names", "zero"),
    [
        ({0: "background", 1: "liver", 2: "thorax_abdomen"}, 0),
        ({0: "background", 1: "liver", 2: "spleen"}, 255),
        ({0: "background", 1: "liver", 2: "trunk_fat"}, 0),
        ({1: "liver", 2: "thorax_abdomen"}, 255),
    ],
)
def test_zero_is_background_only_where_the_inside_of_the_body_is_labelled(
    tmp_path: Path, names: dict[int, str], zero: int
) -> None:
    path = put_labels(tmp_path / "l.nii.gz", box(0, 2) * 1 + box(2, 3) * 2)
    found = case_labels(_case(tmp_path, LabelMap(path, names)), DEFAULT, volume_of())
    assert set(np.unique(found.labels[:, :, 3:])) == {zero}
    assert found.labels[0, 0, 2] == (DEFAULT.index(names[2]) if names[2] in DEFAULT else 255)


def test_structures_find_their_class_in_a_table_of_ones_own(tmp_path: Path) -> None:
    rows = [Structure("background", "background")]
    rows += [Structure(f"part_{n}", radlex=1000 + n) for n in range(299)]
    classes = ClassTable(tuple(rows))
    path = put_labels(tmp_path / "l.nii.gz", box(0, 1) * 7 + box(1, 2) * 400 + box(2, 3) * 3)
    case = _case(tmp_path, LabelMap(path, {7: "part_298", 400: "1002", 3: "something else"}))
    found = case_labels(case, classes, volume_of())
    assert found.labels.dtype == np.uint16
    assert found.unlabelled == 65_535
    by_slice = [299, 3, 65_535, 65_535, 65_535, 65_535]
    np.testing.assert_array_equal(found.labels, np.broadcast_to(by_slice, SHAPE))
    assert found.missing == frozenset(range(1, 299)) - {3}


@pytest.mark.parametrize(("n_classes", "dtype"), [(254, np.uint8), (255, np.uint16)])
def test_unlabelled_is_never_a_class(tmp_path: Path, n_classes: int, dtype: type) -> None:
    rows = [Structure("background", "background")]
    classes = ClassTable((*rows, *(Structure(f"part_{n}") for n in range(1, n_classes))))
    path = put_labels(tmp_path / "l.nii.gz", box(0, 1) * 1)
    case = _case(tmp_path, LabelMap(path, {1: f"part_{n_classes - 1}"}))
    found = case_labels(case, classes, volume_of())
    assert found.labels.dtype == dtype
    assert found.unlabelled > found.doubtful >= n_classes
    assert found.labels[0, 0, 0] == n_classes - 1


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 999))
def test_permuting_the_ids_of_a_file_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    names = ["liver", "spleen", "heart", "aorta", "pancreas"]
    stored = np.random.default_rng(seed).integers(0, 6, SHAPE)
    stored[0, 0, 0] = 1
    plain = put_labels(folder / "plain.nii.gz", stored)
    numbers = np.array([0, *(10 * n + 7 for n in order)])
    renamed = put_labels(folder / "renamed.nii.gz", numbers[stored])
    tables = [dict(enumerate(names, 1)), {10 * n + 7: names[i] for i, n in enumerate(order)}]
    found = [
        case_labels(_case(folder, LabelMap(path, table)), DEFAULT, volume_of())
        for path, table in zip((plain, renamed), tables, strict=True)
    ]
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    assert found[0].missing == found[1].missing


def test_more_voxels_than_a_chunk(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 8, (130, 128, 140)).astype(np.uint8)  # 2.2 chunks
    volume = Volume(np.zeros(stored.shape, np.int16), AFFINE)
    path = put_labels(tmp_path / "l.nii.gz", stored)
    case = _case(tmp_path, LabelMap(path, totalsegmentator_names()))
    labels = case_labels(case, DEFAULT, volume).labels
    np.testing.assert_array_equal(labels == DEFAULT.index("liver"), stored == IDS["liver"])


# --- bad labels -----------------------------------------------------------------------------------


def _moved(mm: float) -> NDArray[np.float64]:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


@pytest.mark.parametrize("kind", ["label map", "mask"])
def test_labels_on_another_grid_are_one_line(tmp_path: Path, kind: str) -> None:
    cropped = np.ones((4, 5, 5), np.uint8)
    other = {
        "shape": (cropped, AFFINE, "4×5×5 voxels, the image 4×5×6"),
        "place": (box(0, 2), _moved(1.0), "up to 1 mm apart"),
        "orientation": (box(0, 2), AFFINE @ np.diag([-1, 1, 1, 1]), "mm apart"),
    }
    for labels, affine, words in other.values():
        path = put_labels(tmp_path / "liver.nii.gz", labels, affine)
        form = LabelMap(path, {1: "liver"}) if kind == "label map" else Masks({"liver": path})
        with pytest.raises(InputError) as caught:
            case_labels(_case(tmp_path, form), DEFAULT, volume_of())
        assert words in one_line(caught.value, path)
        assert "another grid than its image" in str(caught.value)
    path = put_labels(tmp_path / "liver.nii.gz", box(0, 2), _moved(0.01))
    case_labels(_case(tmp_path, LabelMap(path, {1: "liver"})), DEFAULT, volume_of())


def test_an_unknown_label_is_one_line(tmp_path: Path) -> None:
    path = put_labels(tmp_path / "l.nii.gz", box(0, 2) * 5 + box(2, 3) * 201)
    for names in (totalsegmentator_names(), {5: "liver", 300: "spleen"}):
        with pytest.raises(InputError) as caught:
            case_labels(_case(tmp_path, LabelMap(path, names)), DEFAULT, volume_of())
        assert "holds label 201" in one_line(caught.value, path)
        assert "labels.csv" in str(caught.value)


def test_no_labelled_voxel_is_one_line(tmp_path: Path) -> None:
    nothing = np.zeros(SHAPE, bool)
    path = put_labels(tmp_path / "l.nii.gz", nothing)
    put_masks(tmp_path / "masks", {"liver": nothing, "heart": nothing})
    masks = Masks({n: tmp_path / "masks" / f"{n}.nii.gz" for n in ("liver", "heart")})
    for labels, named in ((LabelMap(path, {1: "liver"}), path), (masks, tmp_path / "masks")):
        with pytest.raises(InputError) as caught:
            case_labels(_case(tmp_path, labels), DEFAULT, volume_of())
        assert "no labelled voxel at all" in one_line(caught.value, named)


def test_a_case_with_none_of_the_organs_is_no_error(tmp_path: Path) -> None:
    path = put_labels(tmp_path / "l.nii.gz", box(0, 2) * IDS["skull"])
    put_masks(tmp_path / "masks", {"liver": np.zeros(SHAPE, bool), "skull": box(0, 2)})
    masks = Masks({n: tmp_path / "masks" / f"{n}.nii.gz" for n in ("liver", "skull")})
    for labels in (LabelMap(path, totalsegmentator_names()), masks):
        found = case_labels(_case(tmp_path, labels), DEFAULT, volume_of())
        assert (found.labels == found.unlabelled).all()


def test_several_labels_in_a_mask_are_one_line(tmp_path: Path) -> None:
    path = put_labels(tmp_path / "liver.nii.gz", box(0, 2) * 1 + box(2, 3) * 2)
    with pytest.raises(InputError, match="holds several labels"):
        case_labels(_case(tmp_path, Masks({"liver": path})), DEFAULT, volume_of())


# --- writing --------------------------------------------------------------------------------------


def test_a_written_case_is_found_again_with_every_voxel_labelled(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    written = {}
    for name in ("p1", "p2"):
        labels = rng.integers(0, len(DEFAULT), SHAPE).astype(np.uint8)
        write_case(tmp_path / "cohort", name, volume_of(), labels, DEFAULT)
        written[name] = labels
    dataset = find_cases(tmp_path / "cohort")
    assert dataset.layout == "totalsegmentator"
    assert dataset_classes(dataset) == DEFAULT
    for case in dataset.cases:
        volume = read_volume(case.image)
        np.testing.assert_array_equal(volume.hu, volume_of().hu)
        found = case_labels(case, DEFAULT, volume)
        np.testing.assert_array_equal(found.labels, written[case.name])
        assert found.missing == frozenset()
    names = sorted(str(p.relative_to(tmp_path / "cohort")) for p in tmp_path.rglob("*.*"))
    files = [f"{p}/{f}.nii.gz" for p in ("p1", "p2") for f in ("ct", "labels")]
    assert names == ["labels.csv", *files]


def test_a_phantom_with_all_its_labels_has_the_classes_it_was_painted_with(tmp_path: Path) -> None:
    anatomy = phantom(FieldOfView((60, 50, 30), (7.0, 7.0, 20.0)), 3)
    write_case(tmp_path, "p0", paint(anatomy, 3), anatomy.labels, phantom_table())
    dataset = find_cases(tmp_path)
    (case,) = dataset.cases
    nuisance = dataset_nuisance(dataset, DEFAULT)
    found = case_labels(case, DEFAULT, read_volume(case.image), nuisance)
    lies_in_class = np.array([*range(len(DEFAULT)), *nuisance.values()])
    np.testing.assert_array_equal(lies_in_class[found.labels], class_labels(anatomy))
    assert found.missing == {DEFAULT.index("body_envelope")}
    fine = {name: label for label, name in anatomy.names.items()}
    heart = found.labels == 23 + list(nuisance).index("heart_myocardium")
    np.testing.assert_array_equal(heart, anatomy.labels == fine["heart_myocardium"])
    assert heart.any()


def test_a_case_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.uint8)
    for name, array, words in (
        ("p1", labels + 23, "not in a table of 23"),
        ("p1", labels[1:], "do not fit"),
        ("../p1", labels, "no name for a folder"),
        ("", labels, "no name for a folder"),
        (".p1", labels, "no name for a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            write_case(tmp_path / "cohort", name, volume_of(), array, DEFAULT)
    assert not (tmp_path / "cohort").exists()
    write_case(tmp_path / "cohort", "p1", volume_of(), labels, DEFAULT)
    with pytest.raises(InputError, match="names other labels"):
        write_case(tmp_path / "cohort", "p2", volume_of(), labels, DEFAULT.keep(["liver"]))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_case(tmp_path / "file", "p1", volume_of(), labels, DEFAULT)


# --- real scans -----------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not beside this checkout")
def test_the_real_pairs(tmp_path: Path) -> None:
    dataset = find_cases(DATA / "labelled")
    assert (dataset.layout, dataset.patients) == ("pairs", ("abdomen", "chest"))
    classes = dataset_classes(dataset)
    assert len(classes) == 20
    volume = read_volume(dataset.cases[0].image)
    found = case_labels(dataset.cases[0], classes, volume)
    assert found.missing == frozenset()
    present = {classes.names[n] for n in np.unique(found.labels) if n != found.unlabelled}
    assert {"liver", "urinary_bladder", "gallbladder", "psoas_major_left"} <= present
    assert not {"thyroid_gland", "trachea", "sternum", "background"} & present
    # The last working axis runs to the patient's right.
    working = volume.orientation.working(found.labels)
    for right, left in (("lung_right", "lung_left"), ("kidney_right", "kidney_left")):
        columns = [np.nonzero(working == classes.index(n))[2].mean() for n in (right, left)]
        assert columns[0] > columns[1]
