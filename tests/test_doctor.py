"""The dataset doctor: each fault is planted in a clean phantom cohort, and found."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure, totalsegmentator_names
from organfast.cli import run
from organfast.doctor import KINDS, Checkup, Finding, _odd, _relations, check_dataset
from organfast.layouts import class_of_names, find_cases, write_case
from organfast.nifti import read_labels
from organfast.organs import Organ, measure_organs
from organfast.phantom import cohort
from organfast.volume import Volume

DATA = Path(__file__).parents[2] / "shared" / "data"
DEFAULT = ClassTable.default()
LIVER, SPLEEN, RIGHT, LEFT = (
    DEFAULT.index(n) for n in ("liver", "spleen", "kidney_right", "kidney_left")
)
CASE = "phantom_002"

Array = NDArray[Any]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients, coarsely scanned, with nothing wrong."""
    folder = tmp_path_factory.mktemp("doctor") / "clean"
    for case in cohort(6, 3, (7.0, 7.0, 11.0), 52, threads=2):
        write_case(folder, case.name, case.scan, case.labels, DEFAULT)
    return folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "cases"))


def check(folder: Path, layout: str = "auto", threads: int = 1) -> Checkup:
    return check_dataset(find_cases(folder, layout), threads=threads)


def change(
    folder: Path,
    name: str,
    voxels: Callable[[Array], Array] = lambda v: v,
    affine: Callable[[Array], Array] = lambda a: a,
    case: str = CASE,
) -> None:
    """Write a file of a case again, otherwise."""
    path = folder / case / f"{name}.nii.gz"
    image = nib.load(path)
    changed = voxels(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(changed, affine(image.affine.copy())), path)


def faults(found: Checkup) -> list[Finding]:
    return [finding for finding in found.findings if finding.level == "fault"]


def only_fault(found: Checkup, kind: str, case: str = CASE) -> Finding:
    """The one fault of a cohort in which one was planted."""
    (fault,) = faults(found)
    assert (fault.kind, fault.case) == (kind, case)
    return fault


def note_of(found: Checkup, kind: str, case: str = CASE) -> Finding:
    (note,) = (f for f in found.findings if f.kind == kind and f.case == case)
    assert note.level == "note"
    return note


def swapped(one: int, other: int) -> Callable[[Array], Array]:
    def swap(labels: Array) -> Array:
        table = np.arange(256, dtype=np.uint8)
        table[[one, other]] = other, one
        return table[labels]

    return swap


def without(label: int) -> Callable[[Array], Array]:
    return lambda labels: np.where(labels == label, 0, labels).astype(np.uint8)


# --- nothing wrong --------------------------------------------------------------------------------


def test_a_clean_cohort_has_no_faults(clean: Path) -> None:
    found = check(clean)
    assert found.n_faults == 0
    assert {finding.kind for finding in found.findings} <= {"missing", "volume"}
    assert [exam.name for exam in found.cases] == [f"phantom_{n:03d}" for n in range(6)]
    assert len({exam.digest for exam in found.cases}) == 6
    exam = found.cases[0]
    np.testing.assert_allclose(exam.spacing_mm, (7, 7, 11))
    labels, affine = read_labels(clean / "phantom_000" / "labels.nii.gz")
    ml = np.count_nonzero(labels == LIVER) * abs(np.linalg.det(affine[:3, :3])) / 1000
    np.testing.assert_allclose(exam.volumes_ml["liver"], ml)


def test_threads_change_nothing(clean: Path) -> None:
    assert check(clean, threads=3) == check(clean)


# --- files ----------------------------------------------------------------------------------------


def test_an_unreadable_case_is_one_finding(folder: Path) -> None:
    for name in ("ct", "labels"):
        path = folder / CASE / f"{name}.nii.gz"
        intact = path.read_bytes()
        path.write_bytes(intact[:-100])
        found = check(folder)
        assert "truncated" in only_fault(found, "unreadable").text
        assert sum(f.case == CASE for f in found.findings) == 1
        assert len(found.cases) == 6
        path.write_bytes(intact)


def test_labels_on_another_grid(folder: Path) -> None:
    for make, words in (
        ({"voxels": lambda v: v[:, :, 1:]}, "labels.nii.gz lies on another grid .*×"),
        ({"affine": lambda a: a + np.eye(4)[3] * 9 * (np.arange(4) == 0)[:, None]}, "9 mm apart"),
    ):
        intact = (folder / CASE / "labels.nii.gz").read_bytes()
        change(folder, "labels", **make)
        fault = only_fault(check(folder), "grid")
        assert re.search(words, fault.text)
        (folder / CASE / "labels.nii.gz").write_bytes(intact)


def test_numbers_without_a_name_and_nothing_labelled(folder: Path) -> None:
    change(folder, "labels", lambda v: np.where(v == SPLEEN, 200, v).astype(np.uint8))
    assert only_fault(check(folder), "labels").text.endswith("does not name: 200")
    change(folder, "labels", np.zeros_like)
    assert "no labelled voxel" in only_fault(check(folder), "labels").text


def test_a_header_that_does_not_say_where_it_lies(folder: Path) -> None:
    for name in ("ct", "labels"):
        path = folder / CASE / f"{name}.nii.gz"
        image = nib.load(path)
        image = nib.Nifti1Image(np.asanyarray(image.dataobj).copy(), image.affine, image.header)
        image.set_sform(image.affine, 0)
        image.set_qform(image.affine, 0)
        nib.save(image, path)
    assert "left and right may be swapped" in note_of(check(folder), "header").text


# --- HU -------------------------------------------------------------------------------------------


def grey(hu: Array) -> Array:
    return ((np.clip(hu, -1000, 1000) + 1000) / 2000 * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("voxels", "words"),
    [
        (lambda hu: (np.maximum(hu, -1024) + 1024).astype(np.uint16), "intercept, often -1024"),
        (lambda hu: np.full_like(hu, 7), "value 7 everywhere"),
        (grey, "grey levels"),
        (lambda hu: (hu / 1000).astype(np.float32), "normalised"),
        (lambda hu: np.clip(hu, -160, 240), "display window"),
    ],
)
def test_hu_that_are_none(folder: Path, voxels: Callable[[Array], Array], words: str) -> None:
    change(folder, "ct", voxels)
    found = check(folder)
    assert words in only_fault(found, "hu").text
    assert sum(f.case == CASE for f in found.findings) == 1


@pytest.mark.parametrize("shift", [-1000, 1000])
def test_hu_that_are_shifted_but_look_like_hu(folder: Path, shift: int) -> None:
    change(folder, "ct", lambda hu: np.where(hu < -980, hu, hu + shift).astype(np.int16))
    fault = only_fault(check(folder), "hu")
    assert {"liver", "spleen", "kidney_left", "aorta"} <= set(fault.structures)
    assert re.search(r"the median of liver is -?\d+ HU, not -60 to 250", fault.text)
    assert fault.text.endswith("HU are shifted or scaled, or the labels are of another scan")


def test_a_single_odd_organ_is_a_note(folder: Path) -> None:
    labels = np.asanyarray(nib.load(folder / CASE / "labels.nii.gz").dataobj)
    change(folder, "ct", lambda hu: np.where(labels == SPLEEN, -700, hu).astype(np.int16))
    note = note_of(check(folder), "hu")
    assert note.structures == ("spleen",)
    assert "the median of spleen is -700 HU" in note.text


# --- anatomy --------------------------------------------------------------------------------------


def test_left_and_right_exchanged(folder: Path) -> None:
    change(folder, "labels", swapped(RIGHT, LEFT))
    fault = only_fault(check(folder), "sides")
    assert fault.structures == ("kidney_right",)
    assert fault.text.startswith("kidney_right lies ")
    assert fault.text.endswith("to the left of kidney_left")


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (0, "liver lies .* mm left of spleen"),
        (1, "sternum lies .* mm behind"),
        (2, "mm below"),
    ],
)
def test_a_scan_the_wrong_way_round(folder: Path, axis: int, words: str) -> None:
    mirror = np.diag([-1.0 if n == axis else 1.0 for n in range(4)])
    for name in ("ct", "labels"):
        change(folder, name, affine=lambda a: mirror @ a)
    found = check(folder)
    assert {(f.kind, f.case) for f in faults(found)} == (
        {("order", CASE), ("sides", CASE)} if axis == 0 else {("order", CASE)}
    )
    (order,) = (f for f in faults(found) if f.kind == "order")
    assert re.search(words, order.text), order.text


def test_an_order_that_cannot_be(folder: Path) -> None:
    change(folder, "labels", swapped(LIVER, DEFAULT.index("lung_right")))
    found = check(folder)
    kinds = {f.kind for f in faults(found)}
    assert "order" in kinds
    (order,) = (f for f in faults(found) if f.kind == "order")
    assert {"lung_right", "liver"} <= set(order.structures)


# --- beside the others ----------------------------------------------------------------------------


def test_an_organ_that_others_have(folder: Path) -> None:
    change(folder, "labels", without(SPLEEN))
    found = check(folder)
    assert found.n_faults == 0
    note = note_of(found, "missing")
    assert "spleen" in note.structures
    assert "spleen (5 of 5 others have it)" in note.text


def test_one_scan_under_two_names(folder: Path) -> None:
    shutil.copytree(folder / CASE, folder / "phantom_900")
    # Stored the other way round, it is the same scan still.
    for name in ("ct", "labels"):
        flip = np.diag([-1.0, 1, 1, 1])
        flip[0, 3] = 51
        change(folder, name, lambda v: v[::-1], lambda a, f=flip: a @ f, case="phantom_900")
    found = check(folder)
    fault = only_fault(found, "duplicate", "phantom_900")
    assert fault.text.startswith(f"the same voxels as {CASE}")
    (folder / "patients.csv").write_text(f"case,patient\n{CASE},p\nphantom_900,p\n")
    assert check(folder).n_faults == 0
    note_of(check(folder), "duplicate", "phantom_900")


def test_an_odd_volume(folder: Path) -> None:
    def shrink(labels: Array) -> Array:
        places = np.argwhere(labels == SPLEEN)
        labels[tuple(places[: len(places) * 4 // 5].T)] = 0
        return labels

    change(folder, "labels", shrink)
    note = note_of(check(folder), "volume")
    assert note.structures == ("spleen",)
    assert "(z -" in note.text


def test_an_odd_spacing(folder: Path) -> None:
    for name in ("ct", "labels"):
        change(folder, name, affine=lambda a: a @ np.diag([1, 1, 0.4, 1]))
    note = note_of(check(folder), "spacing")
    assert "4.4 mm along z, where the median is 11" in note.text


def test_scores_are_those_of_iglewicz_and_hoaglin() -> None:
    values = dict(zip("abcdefg", (100.0, 130.0, 80.0, 110.0, 900.0, 90.0, 20.0), strict=True))
    logarithms = [math.log(v) for v in values.values()]
    middle = statistics.median(logarithms)
    mad = statistics.median(abs(x - middle) for x in logarithms)
    expected = {
        case: 0.6745 * (x - middle) / mad for case, x in zip(values, logarithms, strict=True)
    }
    odd = {case: z for case, z, _ in _odd(values)}
    assert odd == pytest.approx({case: z for case, z in expected.items() if abs(z) > 3.5})
    assert set(odd) == {"e", "g"}
    assert _odd({case: values[case] for case in "aeg"}) == []
    alike = dict.fromkeys("abcdef", 1.0)
    assert [case for case, _, _ in _odd({**alike, "g": 1.4})] == ["g"]
    assert _odd({**alike, "g": 1.2}) == []


# --- masks ----------------------------------------------------------------------------------------


@pytest.fixture
def masks(clean: Path, tmp_path: Path) -> Path:
    """Two patients with a mask for each of some structures."""
    folder = tmp_path / "masks"
    for case in (CASE, "phantom_004"):
        image = nib.load(clean / case / "labels.nii.gz")
        labels = np.asanyarray(image.dataobj)
        (folder / case / "segmentations").mkdir(parents=True)
        shutil.copy(clean / case / "ct.nii.gz", folder / case)
        for name in ("liver", "spleen", "kidney_right", "kidney_left", "thorax_abdomen"):
            inside = (labels == DEFAULT.index(name)).astype(np.uint8)
            put_mask(folder, name, inside, image.affine, case)
    return folder


def put_mask(folder: Path, name: str, inside: Array, affine: Array, case: str = CASE) -> None:
    path = folder / case / "segmentations" / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(inside.astype(np.uint8), affine), path)


def mask_of(folder: Path, name: str) -> tuple[Array, Array]:
    image = nib.load(folder / CASE / "segmentations" / f"{name}.nii.gz")
    return np.asanyarray(image.dataobj).copy(), image.affine


def test_masks_that_overlap(masks: Path) -> None:
    assert check(masks).findings == ()
    liver, affine = mask_of(masks, "liver")
    kidney, _ = mask_of(masks, "kidney_right")
    n = np.count_nonzero(kidney)
    put_mask(masks, "liver", liver | kidney, affine)
    fault = only_fault(check(masks), "overlap")
    assert set(fault.structures) == {"kidney_right", "liver"}
    assert f"share {n} voxels (100.0% of the smaller)" in fault.text
    # What is no organ of the table may, and what may lie in one always does.
    put_mask(masks, "liver", liver, affine)
    put_mask(masks, "heart", liver, affine)
    put_mask(masks, "kidney_cyst_right", kidney, affine)
    assert note_of(check(masks), "overlap").structures == ("heart", "liver")


def test_masks_without_a_voxel(masks: Path) -> None:
    spleen, affine = mask_of(masks, "spleen")
    put_mask(masks, "spleen", spleen * 0, affine)
    note = note_of(check(masks), "empty")
    assert (note.text, note.structures) == ("no voxel in the mask of spleen", ("spleen",))
    for path in (masks / CASE / "segmentations").iterdir():
        put_mask(masks, path.name.removesuffix(".nii.gz"), spleen * 0, affine)
    assert "none of its masks has a voxel" in only_fault(check(masks), "labels").text


def test_many_masks_on_another_grid_are_one_finding(masks: Path) -> None:
    for path in (masks / CASE / "segmentations").iterdir():
        name = path.name.removesuffix(".nii.gz")
        inside, affine = mask_of(masks, name)
        put_mask(masks, name, inside[1:], affine)
    fault = only_fault(check(masks), "grid")
    assert len(fault.structures) == 5
    assert "4 more masks" in fault.text


def test_a_mask_with_several_values(masks: Path) -> None:
    spleen, affine = mask_of(masks, "spleen")
    spleen[np.argwhere(spleen)[0][0]] *= 3
    put_mask(masks, "spleen", spleen, affine)
    assert "holds several labels" in only_fault(check(masks), "labels").text


# --- blocks ---------------------------------------------------------------------------------------


def test_block_files_are_looked_through(tmp_path: Path) -> None:
    line = "58" + ",1" * 1088
    for name, last in (("a", "7"), ("b", "7"), ("c", "8"), ("d", "x")):
        (tmp_path / f"{name}.csv").write_text(f"{line},{last}\n")
    found = check(tmp_path)
    assert [(f.kind, f.case) for f in found.findings] == [("unreadable", "d"), ("duplicate", "b")]
    assert "line 1, column 1090" in found.findings[0].text


# --- the command line -----------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_how_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(folder), "--check"]) == 0
    assert "6 cases, 0 faults" in capsys.readouterr().out
    change(folder, "labels", swapped(RIGHT, LEFT))
    assert run(["info", str(folder), "--check", "--threads", "2"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "6 cases, 1 faults" in out
    (line,) = (line for line in out.splitlines() if line.startswith("fault"))
    assert line.split()[:3] == ["fault", "sides", CASE]
    assert f"sides: {KINDS['sides']}" in out
    assert run(["info", str(folder), "--quick"]) == 0
    assert "fault" not in capsys.readouterr().out


def test_the_command_prints_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, "labels", swapped(RIGHT, LEFT))
    assert run(["info", str(folder), "--check", "--json", "--layout", "totalsegmentator"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == "totalsegmentator"
    checked = told["check"]
    assert (checked["faults"], set(checked)) == (1, {"faults", "notes", "findings", "cases"})
    assert checked["findings"][0] == {
        "level": "fault",
        "kind": "sides",
        "case": CASE,
        "text": checked["findings"][0]["text"],
        "structures": ["kidney_right"],
    }
    assert {"name", "patient", "shape", "spacing_mm", "image_sha256", "volumes_ml", "cut_off"} == (
        set(checked["cases"][0])
    )


def test_a_model_is_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(tmp_path / "m.organfast"), "--check"]) == 2
    assert "--check is about a dataset" in capsys.readouterr().err


# --- real scans -----------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not beside this checkout")
def test_the_real_scans_have_no_faults() -> None:
    found = check(DATA / "labelled")
    assert found.findings == ()
    assert [exam.name for exam in found.cases] == ["abdomen", "chest"]
    assert "kidney_left" in found.cases[1].cut_off


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real scans are not beside this checkout")
def test_real_anatomies_lie_as_the_table_of_relations_says() -> None:
    scheme = totalsegmentator_names()
    # One name stands for two numbers, so that the numbers are the names here.
    table = ClassTable((DEFAULT.structures[0], *(Structure(str(number)) for number in scheme)))
    whole_of = class_of_names(DEFAULT)
    tested = 0
    for path in sorted((DATA / "labels_only").glob("*.nii.gz")):
        labels, affine = read_labels(path)
        volume = Volume(np.zeros(labels.shape, np.int16), affine)
        organs = measure_organs(volume.orientation.working(labels), None, volume, table)
        parts: dict[str, list[Organ]] = {}
        for number, organ in organs.items():
            name = scheme[int(number)]
            whole = DEFAULT.names[whole_of[name]] if name in whole_of else name
            parts.setdefault(whole, []).extend([organ] if organ.n_voxels else [])
        where = {
            name: np.average([p.centroid_mm for p in found], 0, [p.n_voxels for p in found])
            for name, found in parts.items()
            if found
        }
        for first, relation, second, margin in _relations():
            if first in where and second in where:
                axis = {"right_of": 0, "in_front_of": 1, "above": 2}[relation]
                apart = where[first][axis] - where[second][axis]
                assert apart > -margin, (path.name, first, second)
                tested += 1
    assert tested > 250
