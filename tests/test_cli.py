"""The command line from end to end: what each command writes, and what bad input gets."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from organfast import __version__
from organfast.adaptation import Adapt
from organfast.anatomy import ClassTable
from organfast.cli import run
from organfast.models.classifier import load_model, save_model
from organfast.nifti import write_volume
from organfast.volume import Volume

PNG = b"\x89PNG\r\n\x1a\n"
RESULT = {
    *("segmentation.nii.gz", "organs.json", "organs.csv", "run.json", "timings.json"),
    *("labels.json", "labels_itksnap.txt", "labels_slicer.ctbl"),
}
# What lies beside the results of several scans.
BATCH = {".batch", "batch.jsonl", "timings.jsonl"}
# Small and quick; what is learned does not matter.
QUICK = ("--block-size", "5", "--spacing", "8,8,8", "--trees", "2", "--n-per-class", "20")


@dataclass(frozen=True)
class Ran:
    """What one command gave."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that an error is."""
        assert self.err.endswith("\n")
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith("organfast: ")
        assert self.out == ""
        return self.err.removeprefix("organfast: ").rstrip("\n")


Command = Callable[..., Ran]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return command


@dataclass(frozen=True)
class Crop:
    """A few voxels of a phantom patient, cut out at the liver."""

    hu: np.ndarray
    labels: np.ndarray
    affine: np.ndarray

    def save(self, path: Path, hu: np.ndarray | None = None) -> Path:
        nib.save(nib.Nifti1Image(self.hu if hu is None else hu, self.affine), path)
        return path


@pytest.fixture(scope="module")
def crop(cohort_folder: Path) -> Crop:
    image = nib.load(cohort_folder / "phantom_001" / "ct.nii.gz")
    labels = nib.load(cohort_folder / "phantom_001" / "labels.nii.gz")
    middle = np.argwhere(np.asanyarray(labels.dataobj) == ClassTable.default().index("liver"))
    a, b, c = np.clip(middle.mean(0).astype(int), 12, np.array(image.shape) - 12)
    box = np.s_[a - 12 : a + 12, b - 12 : b + 12, c - 4 : c + 4]
    hu, inside = (np.asanyarray(i.dataobj)[box].copy() for i in (image, labels))
    hu[0, 0, 0] = -1000  # air, as every scan has
    return Crop(hu, inside.astype(np.uint8), image.affine)


@pytest.fixture
def small(crop: Crop, tmp_path: Path) -> Path:
    return crop.save(tmp_path / "small.nii.gz")


def in_process_of_its_own(*arguments: object, code: str = "", **options: Any) -> Ran:
    """Run ``python -m organfast``, or ``code`` with the arguments."""
    start = ["-c", code] if code else ["-m", "organfast"]
    done = subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def assert_names(ran: Ran, path: object, problem: str, code: int = 1) -> None:
    """One line: ``organfast: PATH: problem; remedy``."""
    assert ran.code == code, ran
    start = f"{path}: "
    assert ran.line.startswith(start), ran.line
    what, _, remedy = ran.line.removeprefix(start).partition("; ")
    assert re.search(problem, what), ran.line
    assert remedy, ran.line


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder) if "." in name}


def json_of(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


# --- the program ----------------------------------------------------------------------------------


def test_version(cli: Command) -> None:
    assert cli("--version") == Ran(0, f"organfast {__version__}\n", "")


def test_help_says_what_it_is_not() -> None:
    ran = in_process_of_its_own("--help")
    assert ran.code == 0
    assert ran.err == ""
    assert "not a medical device" in ran.out
    for text in (
        "Exit codes",
        "--debug",
        "demo",
        "train",
        "segment",
        "locate",
        "verify",
        "info",
        "export",
        "bench",
    ):
        assert text in ran.out


@pytest.mark.parametrize(
    "command", ["demo", "train", "segment", "locate", "verify", "info", "export", "bench"]
)
def test_each_command_has_help(cli: Command, command: str) -> None:
    ran = cli(command, "--help")
    assert ran.code == 0
    assert f"organfast {command}" in ran.out


def test_no_arguments_get_the_help(cli: Command) -> None:
    ran = cli()
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err == cli("--help").out


# --- train ----------------------------------------------------------------------------------------


def test_train_holds_a_patient_out(cli: Command, cohort_folder: Path, tmp_path: Path) -> None:
    ran = cli("train", cohort_folder, "-o", tmp_path / "m.organfast", *QUICK)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    assert re.search(r"23 classes, \d+ blocks\ntest: 1 patients", ran.out)
    assert ran.out.endswith(f"wrote {tmp_path / 'm.organfast'}\n")
    split = load_model(tmp_path / "m.organfast").training["split"]
    assert [len(split[use]) for use in ("train", "validation", "test")] == [2, 0, 1]
    assert files_of(tmp_path) == {"m.organfast"}


def test_train_as_told(cli: Command, cohort_folder: Path, tmp_path: Path) -> None:
    names = sorted(p.name for p in cohort_folder.iterdir() if p.is_dir())
    split = {"train": names[2:], "validation": names[:1], "test": names[1:2]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    arguments = ("train", cohort_folder, "-o", tmp_path / "m.organfast", *QUICK, "--json")
    options = ("--forest", "extra_trees", "--levels", "1,3", "--slices", 3, "--seed", 5)
    ran = cli(*arguments, "--split", tmp_path / "split.json", *options)
    assert ran.code == 0, ran.err
    assert ran.err == ""
    told = json.loads(ran.out)
    model = load_model(tmp_path / "m.organfast")
    assert told["model"] == str(tmp_path / "m.organfast")
    assert told["digest"] == model.digest
    assert told["trained on"] == names[2:]
    assert told["pattern"] == {"kind": "block", "size": 5, "levels": [1, 3], "slices": 3}
    assert set(told["scores"]) == {"validation", "test"}
    assert told["stride"] == [3, 3, 2]
    assert dict(model.training["split"]) == split

    again = tmp_path / "again.organfast"
    ran = cli(
        *arguments[:3], again, *arguments[4:], "--split", tmp_path / "split.json", *options,
        "--threads", 1,
    )  # fmt: skip
    assert again.read_bytes() == (tmp_path / "m.organfast").read_bytes()


def test_train_on_the_scans_own_pixels(cli: Command, cohort_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.organfast"
    ran = cli("train", cohort_folder, "-o", model, *QUICK, "--spacing", "native")
    assert ran.code == 0, ran.err
    grid = load_model(model).grid
    assert (grid.spacing_mm, grid.hu_table) == (None, "identity")
    assert load_model(model).stride == (1, 4, 4)


def test_train_on_the_classes_of_the_dataset(
    cli: Command, cohort_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m.organfast"
    assert cli("train", cohort_folder, "-o", model, *QUICK, "--classes", "dataset").code == 0
    assert set(load_model(model).classes.names) == set(ClassTable.default().names)


def test_train_on_a_class_table(cli: Command, cohort_folder: Path, tmp_path: Path) -> None:
    table, model = tmp_path / "t.csv", tmp_path / "m.organfast"
    table.write_text("name,role\nthorax_abdomen,context\nliver,organ\naorta,organ\n")
    assert cli("train", cohort_folder, "-o", model, *QUICK, "--classes", table).code == 0
    names = ("background", "thorax_abdomen", "liver", "aorta")
    assert load_model(model).classes.names == names


def test_train_says_what_it_recognised(cli: Command, cohort_folder: Path, tmp_path: Path) -> None:
    """nnU-Net's layout, its splits, and names that stand for others."""
    folder = tmp_path / "raw"
    names = {"background": 0, "Liver": 3, "Iliopsoas L": 20, "other": list(range(21, 23))}
    names["rest"] = [n for n in range(1, 20) if n != 3]
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for n in range(3):
        case = cohort_folder / f"phantom_00{n}"
        shutil.copy(case / "ct.nii.gz", folder / "imagesTr" / f"p{n}_0000.nii.gz")
        shutil.copy(case / "labels.nii.gz", folder / "labelsTr" / f"p{n}.nii.gz")
    (folder / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": names})
    )
    folds = [{"train": ["p0", "p1"], "val": ["p2"]}, {"train": ["p1", "p2"], "val": ["p0"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    model = tmp_path / "m.organfast"
    split = ("--split", f"{tmp_path / 'splits_final.json'}#1")
    ran = cli("train", folder, "-o", model, *QUICK, *split, "--layout", "auto")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("layout nnunet: 3 cases of 3 patients\n")
    assert "note: iliopsoas_left stands for psoas_major_left: the iliopsoas holds" in ran.err
    assert dict(load_model(model).training["split"]) == {
        "train": ["p1", "p2"],
        "validation": ["p0"],
        "test": [],
    }


def test_train_on_blocks_that_were_cut_out(cli: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for patient in range(3):
        rows = [
            ",".join(map(str, [radlex, *rng.integers(low, low + 60, 33 * 33)]))
            for radlex, low in ((58, 50), (1302, -900))
            for _ in range(5)
        ]
        (tmp_path / f"p{patient}.csv").write_text("\n".join(rows) + "\n")
    model = tmp_path / "m.organfast"
    ran = cli("train", tmp_path, "-o", model, "--block-size", 33, "--trees", 2)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("layout blocks: 3 cases of 3 patients\n")
    assert "test: 1 patients, 10 blocks: 100.0% right" in ran.out
    assert "which way their rows run" in ran.err
    assert load_model(model).grid.spacing_mm is None
    ran = cli("train", tmp_path, "-o", model, "--spacing", "1,1,1")
    assert ran.code == 2
    assert "cannot be brought to a working grid" in ran.line


def test_two_patients_leave_none_to_score(
    cli: Command, cohort_folder: Path, tmp_path: Path
) -> None:
    for name in ("phantom_000", "phantom_001"):
        shutil.copytree(cohort_folder / name, tmp_path / "two" / name)
    shutil.copy(cohort_folder / "labels.csv", tmp_path / "two")
    ran = cli("train", tmp_path / "two", "-o", tmp_path / "m.organfast", *QUICK)
    assert ran.code == 0, ran.err
    assert "no patient was held out" in ran.out


# --- segment: one scan ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmented:
    """One scan, segmented with everything that can be written."""

    folder: Path
    scan: Path
    ran: Ran

    def load(self, name: str) -> Any:
        return nib.load(self.folder / name)


@pytest.fixture(scope="module")
def segmented(
    scan_file: Path, model_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Segmented:
    """A scan stored left to right and oblique, with a name in it, and its result."""
    folder = tmp_path_factory.mktemp("segmented")
    image = nib.load(scan_file)
    turn = np.deg2rad(8)
    affine = image.affine.copy()
    affine[:3, :3] = (
        np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        @ np.diag([-1, 1, 1])
        @ affine[:3, :3]
    )
    affine[:3, 3] = 170, -180, -250
    hu = np.asanyarray(image.dataobj)[::-1]
    turned = nib.Nifti1Image(hu, affine)
    turned.set_sform(affine, 2)
    turned.set_qform(affine, 1)
    turned.header["descrip"] = b"somebody"
    turned.header["aux_file"] = b"somebody"
    nib.save(turned, folder / "scan.nii.gz")
    ran = in_process_of_its_own(
        *("segment", "-i", folder / "scan.nii.gz", "-o", folder / "new" / "out"),
        *("-m", model_file, "--probabilities", "--organs", "liver,lung_left"),
        *("--threads", 1),
    )
    return Segmented(folder / "new" / "out", folder / "scan.nii.gz", ran)


def test_segment_writes_everything_and_nothing_else(segmented: Segmented) -> None:
    assert segmented.ran.code == 0, segmented.ran.err
    organs = ("liver", "lung_left")
    maps = {f"probabilities/{o}.{e}" for o in organs for e in ("nii.gz", "png")}
    assert files_of(segmented.folder) == {*RESULT, "overlay.png", "probabilities", *maps}
    assert {p.name for p in segmented.folder.parent.iterdir()} == {"out"}
    assert re.search(r"organ +volume ml +confidence", segmented.ran.out)
    assert str(segmented.scan) in segmented.ran.out.splitlines()[-1]
    for picture in segmented.folder.rglob("*.png"):
        assert picture.read_bytes().startswith(PNG)
        assert picture.stat().st_size > 10_000


def test_the_label_map_lies_on_the_grid_of_the_scan(segmented: Segmented) -> None:
    scan, labels = nib.load(segmented.scan), segmented.load("segmentation.nii.gz")
    assert labels.shape == scan.shape
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(labels.affine, scan.affine)
    for name in (
        *("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c"),
        *("quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    ):
        np.testing.assert_array_equal(labels.header[name], scan.header[name], name)
    np.testing.assert_array_equal(labels.header["pixdim"][:4], scan.header["pixdim"][:4])


def test_no_free_text_of_the_scan_is_written(segmented: Segmented) -> None:
    import gzip

    for path in segmented.folder.rglob("*.*"):
        content = path.read_bytes()
        assert b"somebody" not in (gzip.decompress(content) if path.suffix == ".gz" else content)


def test_organs_agree_with_the_label_map(segmented: Segmented, model_file: Path) -> None:
    image = segmented.load("segmentation.nii.gz")
    labels = np.asanyarray(image.dataobj)
    ml = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    classes = load_model(model_file).classes
    organs = json_of(segmented.folder / "organs.json")["organs"]
    assert list(organs) == sorted(organs, key=classes.index)
    assert set(organs) == {"liver", "lung_left"}
    assert set(np.unique(labels)) <= {0, *(organ["label"] for organ in organs.values())}
    for name, organ in organs.items():
        where = np.argwhere(labels == classes.index(name))
        assert organ["label"] == classes.index(name)
        assert organ["present"]
        assert organ["n_voxels"] == len(where) > 0
        np.testing.assert_allclose(organ["volume_ml"], len(where) * ml, atol=1e-3)
        box = np.stack([where.min(0), where.max(0) + 1], axis=1)
        np.testing.assert_array_equal(organ["box_voxel"], box)
        centre = nib.affines.apply_affine(image.affine, where.mean(0))
        np.testing.assert_allclose(organ["centroid_mm"], centre, atol=0.01)


def test_organs_are_the_same_as_csv(segmented: Segmented) -> None:
    organs = json_of(segmented.folder / "organs.json")["organs"]
    rows = list(csv.DictReader((segmented.folder / "organs.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == list(organs)
    for row in rows:
        organ = organs[row["name"]]
        assert int(row["label"]) == organ["label"]
        assert float(row["volume_ml"]) == organ["volume_ml"]
        assert int(row["n_voxels"]) == organ["n_voxels"]


def test_label_tables_name_every_label(segmented: Segmented, model_file: Path) -> None:
    classes = load_model(model_file).classes
    table = json_of(segmented.folder / "labels.json")
    assert [(row["label"], row["name"]) for row in table] == list(enumerate(classes.names))
    assert {"radlex", "snomed", "rgb", "side"} <= set(table[0])
    slicer = (segmented.folder / "labels_slicer.ctbl").read_text().splitlines()[1:]
    assert [tuple(row.split()[:2]) for row in slicer] == [
        (str(n), name) for n, name in enumerate(classes.names)
    ]
    itksnap = (segmented.folder / "labels_itksnap.txt").read_text().splitlines()[1:]
    pattern = re.compile(r'\s*(\d+)(?:\s+\d+){3}\s+\S+\s+[01]\s+[01]\s+"(.+)"')
    found = [match.groups() for match in map(pattern.fullmatch, itksnap) if match]
    assert found == [(str(n), name) for n, name in enumerate(classes.names) if n]


def test_probability_maps_are_probabilities_of_the_organ(segmented: Segmented) -> None:
    labels = segmented.load("segmentation.nii.gz")
    organs = json_of(segmented.folder / "organs.json")["organs"]
    for name, organ in organs.items():
        image = segmented.load(f"probabilities/{name}.nii.gz")
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(image.affine, labels.affine)
        probability = image.get_fdata()
        inside = np.asanyarray(labels.dataobj) == organ["label"]
        assert probability.min() == 0
        assert probability.max() <= 1 + 1e-6
        assert probability[inside].mean() > probability[~inside].mean() + 0.2


def test_run_json_tells_how_but_not_where(segmented: Segmented, model_file: Path) -> None:
    from hashlib import sha256

    text = (segmented.folder / "run.json").read_text()
    assert "/" not in text
    record = json.loads(text)
    assert record["organfast"] == __version__
    assert set(record["libraries"]) >= {"numpy", "python"}
    assert record["model"] == load_model(model_file).digest
    assert record["input"] == sha256(segmented.scan.read_bytes()).hexdigest()
    assert record["settings"] == {
        "preset": None,
        "trees": None,
        "adapt": None,
        "stride": [3, 3, 2],
        "organs": ["liver", "lung_left"],
        "cleaning": {"keep": None, "dust_ml": 0.5, "fill_holes": True, "least_part": 0.5},
        "body_mask": True,
        "keep_context": False,
        "probabilities": ["liver", "lung_left"],
        "refine": None,
        "confidence": True,
    }
    assert record["adapted"] is None
    positions = record["positions"]
    assert positions["n_asked"] == positions["n_inside"] > 1000
    assert positions["share_asked"] == 1
    timings = json_of(segmented.folder / "timings.json")
    assert timings["threads"] == 1
    assert {"read", "classify and enlarge", "save"} <= timings["seconds"].keys()
    assert timings["peak_memory_mb"] is None or timings["peak_memory_mb"] > 10


def test_results_do_not_depend_on_threads(
    cli: Command, segmented: Segmented, model_file: Path, tmp_path: Path
) -> None:
    ran = cli(
        *("segment", "-i", segmented.scan, "-o", tmp_path / "out", "-m", model_file),
        *("--probabilities", "--organs", "liver,lung_left", "--threads", 7),
    )
    assert ran.code == 0, ran.err
    first, second = bytes_of(segmented.folder), bytes_of(tmp_path / "out")
    assert first.keys() == second.keys()
    assert first.pop("timings.json") != second.pop("timings.json")
    differ = [name for name in first if first[name] != second[name]]
    assert not differ


def test_settings_are_used_and_recorded(
    cli: Command, scan_file: Path, model_file: Path, tmp_path: Path
) -> None:
    ran = cli(
        *("segment", "-i", scan_file, "-o", tmp_path / "out", "-m", model_file, "--json"),
        *("--stride", "4,5,3", "--keep", "dust", "--no-fill-holes", "--no-body-mask"),
        *("--context", "--no-preview"),
    )
    assert ran.code == 0, ran.err
    assert files_of(tmp_path / "out") == RESULT
    settings = json_of(tmp_path / "out" / "run.json")["settings"]
    assert settings["stride"] == [4, 5, 3]
    assert settings["cleaning"] == {
        "keep": "dust", "dust_ml": 0.5, "fill_holes": False, "least_part": 0.5
    }  # fmt: skip
    assert settings["body_mask"] is False
    assert settings["keep_context"] is True
    labels = np.asanyarray(nib.load(tmp_path / "out" / "segmentation.nii.gz").dataobj)
    assert load_model(model_file).classes.context in labels
    told = json.loads(ran.out)
    assert told["input"] == str(scan_file)
    assert told["output"] == str(tmp_path / "out")
    assert told["organs_ml"]["liver"] > 100


def test_coarse_to_fine_is_used_and_recorded(
    cli: Command, scan_file: Path, model_file: Path, tmp_path: Path
) -> None:
    arguments = ("segment", "-i", scan_file, "-m", model_file, "--no-preview", "-o")
    shares = []
    for name, options in (("a", ()), ("b", ("--margin", 0.1)), ("c", ("--margin", 1.1))):
        ran = cli(*arguments, tmp_path / name, "--coarse-to-fine", *options)
        assert ran.code == 0, ran.err
        record = json_of(tmp_path / name / "run.json")
        assert record["settings"]["refine"]["disagreement"] is True
        shares.append(record["positions"]["share_asked"])
    assert shares[1] < shares[0] < shares[2] == 1
    assert cli(*arguments, tmp_path / "full").code == 0
    everywhere, full = bytes_of(tmp_path / "c"), bytes_of(tmp_path / "full")
    assert [n for n in full if everywhere[n] != full[n]] in (
        ["run.json", "timings.json"],
        ["timings.json", "run.json"],
    )


def test_labels_only(
    cli: Command, cohort_folder: Path, small: Path, model_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "native.organfast"
    options = ("--block-size", 5, "--spacing", "native", "--trees", 9, "--n-per-class", 50)
    assert cli("train", cohort_folder, "-o", model, *options).code == 0
    arguments = ("segment", "-i", small, "-m", model, "--stride", "1", "-o")
    assert cli(*arguments, tmp_path / "whole").code == 0
    ran = cli(*arguments, tmp_path / "alone", "--labels-only")
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()[1:-1]]
    assert rows
    assert {row[2] for row in rows} == {"-"}
    whole, alone = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "alone")
    assert alone.keys() == whole.keys()
    for name in ("segmentation.nii.gz", "overlay.png"):
        assert alone[name] == whole[name]
    organs = list(csv.DictReader((tmp_path / "alone" / "organs.csv").read_text().splitlines()))
    assert {organ["confidence"] for organ in organs} == {""}

    ran = cli(*arguments[:-1], "-o", tmp_path / "no", "--labels-only", "--stride", 2)
    assert ran.code == 2
    assert "the stride is 2,2,1: give 1" in ran.line
    ran = cli(*("segment", "-i", small, "-m", model_file, "-o", tmp_path / "no"), "--labels-only")
    assert ran.code == 2
    assert "works on a grid of 5 x 5 x 8 mm" in ran.line
    assert not (tmp_path / "no").exists()


def test_one_label_map_alone(
    cli: Command, scan_file: Path, model_file: Path, tmp_path: Path
) -> None:
    arguments = ("segment", "-i", scan_file, "-m", model_file, "--no-preview", "-o")
    assert cli(*arguments, tmp_path / "labels.nii.gz").code == 0
    assert cli(*arguments, tmp_path / "labels.nii").code == 0
    assert cli(*arguments, tmp_path / "out").code == 0
    whole = nib.load(tmp_path / "out" / "segmentation.nii.gz")
    for name in ("labels.nii.gz", "labels.nii"):
        alone = nib.load(tmp_path / name)
        np.testing.assert_array_equal(np.asanyarray(alone.dataobj), np.asanyarray(whole.dataobj))
        np.testing.assert_array_equal(alone.affine, whole.affine)
    assert {p.name for p in tmp_path.iterdir()} == {"labels.nii.gz", "labels.nii", "out"}


def test_a_scan_without_a_body_is_a_warning(cli: Command, model_file: Path, tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, -900, (20, 20, 1), np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([5.0, 5, 8, 1])), tmp_path / "air.nii.gz")
    ran = cli("segment", "-i", tmp_path / "air.nii.gz", "-o", tmp_path / "out", "-m", model_file)
    assert ran.code == 0
    warning = f"organfast: {tmp_path / 'air.nii.gz'}: warning: no body was found"
    assert ran.err.startswith(warning)
    assert not np.asanyarray(nib.load(tmp_path / "out" / "segmentation.nii.gz").dataobj).any()
    organs = json_of(tmp_path / "out" / "organs.json")["organs"]
    assert not any(organ["present"] for organ in organs.values())
    assert "no body" in json_of(tmp_path / "out" / "run.json")["warnings"][0]
    assert (tmp_path / "out" / "overlay.png").read_bytes().startswith(PNG)


def test_warnings_of_the_header_are_told(
    cli: Command, crop: Crop, model_file: Path, tmp_path: Path
) -> None:
    image = nib.Nifti1Image(crop.hu, crop.affine)
    image.set_sform(crop.affine, 0)
    image.set_qform(crop.affine, 0)
    nib.save(image, tmp_path / "scan.nii.gz")
    ran = cli(
        *("segment", "-i", tmp_path / "scan.nii.gz", "-o", tmp_path / "out.nii.gz"),
        *("-m", model_file),
    )
    assert ran.code == 0
    assert "warning: the header says nothing of the orientation" in ran.err


# --- segment: where results go --------------------------------------------------------------------


@pytest.fixture
def segment_small(cli: Command, small: Path, model_file: Path) -> Callable[..., Ran]:
    """Segment the small scan into a place."""

    def segment(out: object, *options: object) -> Ran:
        return cli("segment", "-i", small, "-o", out, "-m", model_file, "--no-preview", *options)

    return segment


def test_an_earlier_result_is_replaced(segment_small: Callable[..., Ran], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert segment_small(out, "--probabilities", "--organs", "liver", "--preview").code == 0
    assert (out / "probabilities" / "liver.png").exists()
    assert segment_small(out).code == 0
    assert files_of(out) == RESULT
    assert {p.name for p in tmp_path.iterdir()} == {"out", "small.nii.gz"}


def test_a_link_goes_on_pointing_at_the_result(
    segment_small: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").mkdir()
    for target in (tmp_path / "disk" / "old", tmp_path / "disk" / "new"):
        link = tmp_path / f"{target.name}_link"
        link.symlink_to(target)
        for _ in range(2):
            ran = segment_small(link)
            assert ran.code == 0, ran.err
        assert link.is_symlink()
        assert files_of(target) == RESULT
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"old", "new"}


@pytest.mark.parametrize(
    "content",
    [("notes.txt",), ("run.json",), ("run.json", "segmentation.nii.gz", "corrected.nii.gz")],
)
def test_a_folder_that_holds_other_files_is_left_alone(
    segment_small: Callable[..., Ran], tmp_path: Path, content: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in content:
        (out / name).write_text("mine")
    assert_names(segment_small(out), out, "holds other files")
    assert {p.name: p.read_text() for p in out.iterdir()} == dict.fromkeys(content, "mine")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "small.nii.gz"}


def test_an_output_is_refused_before_the_work(
    cli: Command, model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ran = cli("segment", "-i", tmp_path / "absent.nii.gz", "-o", tmp_path, "-m", model_file)
    assert_names(ran, tmp_path, "holds other files")


def test_the_scan_is_never_overwritten(
    cli: Command, small: Path, model_file: Path, tmp_path: Path
) -> None:
    before = small.read_bytes()
    ran = cli("segment", "-i", small, "-o", tmp_path / "." / "small.nii.gz", "-m", model_file)
    assert ran.code == 2
    assert "is the scan itself" in ran.line
    assert small.read_bytes() == before

    # Nor with the folder of an earlier result that it was moved into.
    out = tmp_path / "out"
    assert cli("segment", "-i", small, "-o", out, "-m", model_file, "--no-preview").code == 0
    inside = small.rename(out / "small.nii.gz")
    assert_names(cli("segment", "-i", inside, "-o", out, "-m", model_file), out, "other files")
    assert inside.read_bytes() == before


def test_outputs_that_cannot_be_written(
    segment_small: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder.nii.gz"
    file.write_text("mine")
    folder.mkdir()
    stand = tmp_path / "stand"
    stand.mkdir()
    monkeypatch.chdir(stand)
    for out, named, problem in (
        (file, file, "is a file"),
        (file / "out", file, "is no folder"),
        (file / "deep" / "out", file, "is no folder"),
        (file / "out.nii.gz", file, "is no folder"),
        (folder, folder, "is a folder"),
        (tmp_path / "absent" / "out.nii.gz", tmp_path / "absent", "is no folder"),
        (".", ".", "is where you stand"),
        ("/", "/", "other files|mount point"),
    ):
        assert_names(segment_small(out), named, problem)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"file", "folder.nii.gz", "stand", "small.nii.gz"}
    assert file.read_text() == "mine"
    assert not list(stand.iterdir())
    assert stand.samefile(Path.cwd())


LIMITED = """
import resource, sys
from organfast.cli import run
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("out", ["out", "labels.nii.gz"])
def test_a_write_that_fails_halfway_leaves_nothing(
    small: Path, model_file: Path, tmp_path: Path, out: str
) -> None:
    ran = in_process_of_its_own(
        *(60, "segment", "-i", small, "-o", tmp_path / out, "-m", model_file), code=LIMITED
    )
    assert_names(ran, tmp_path / out, r"cannot be written \(File too large\)")
    assert {p.name for p in tmp_path.iterdir()} == {"small.nii.gz"}


def test_a_failed_replacement_keeps_the_earlier_result(
    segment_small: Callable[..., Ran], small: Path, model_file: Path, tmp_path: Path
) -> None:
    assert segment_small(tmp_path / "out").code == 0
    before = bytes_of(tmp_path / "out")
    ran = in_process_of_its_own(
        *(2000, "segment", "-i", small, "-o", tmp_path / "out", "-m", model_file), code=LIMITED
    )
    assert_names(ran, tmp_path / "out", "cannot be written")
    assert bytes_of(tmp_path / "out") == before
    assert {p.name for p in tmp_path.iterdir()} == {"small.nii.gz", "out"}


# --- segment: several scans -----------------------------------------------------------------------


@pytest.fixture
def several(crop: Crop, tmp_path: Path) -> Path:
    """A folder of three scans, the second of which is empty."""
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    crop.save(folder / "a.nii.gz")
    (folder / "b.nii.gz").touch()
    crop.save(folder / "deep" / "ct.nii.gz")
    crop.save(folder / "a_seg.nii.gz")  # a label map by its name
    return folder


def test_one_bad_scan_does_not_stop_the_others(
    cli: Command, several: Path, model_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = cli("segment", "-i", several, "-o", out, "-m", model_file, "--no-preview", "--json")
    assert ran.code == 3
    errors = [line for line in ran.err.splitlines() if "warning" not in line]
    assert errors == [f"organfast: {several / 'b.nii.gz'}: is empty; copy or export it again"]
    told = [json.loads(line) for line in ran.out.splitlines()]
    assert [t["input"] for t in told] == [
        str(several / "a.nii.gz"),
        str(several / "deep" / "ct.nii.gz"),
    ]
    assert [t["output"] for t in told] == [str(out / "a"), str(out / "deep")]
    assert {p.name for p in out.iterdir()} == {"a", "deep", *BATCH}
    for name in ("a", "deep"):
        assert files_of(out / name) == RESULT

    # Once more over the same: replaced, and a folder of something else costs one scan.
    shutil.rmtree(out / "a")
    (out / "a").mkdir()
    (out / "a" / "notes.txt").write_text("mine")
    ran = cli("segment", "-i", several, "-o", out, "-m", model_file, "--no-preview")
    assert ran.code == 3
    errors = [line for line in ran.err.splitlines() if "warning" not in line]
    assert [line.split(": ")[1] for line in errors] == [str(out / "a"), str(several / "b.nii.gz")]
    assert (out / "a" / "notes.txt").read_text() == "mine"


def test_results_beside_the_scans_are_no_scans(
    cli: Command, several: Path, model_file: Path
) -> None:
    shutil.rmtree(several / "deep")
    (several / "b.nii.gz").unlink()
    arguments = ("-o", several, "-m", model_file, "--probabilities", "--no-preview")
    for _ in range(2):
        ran = cli("segment", "-i", several, *arguments, "--organs", "liver", "--json")
        assert ran.code == 0, ran.err
        assert len(ran.out.splitlines()) == 1
    assert (several / "a" / "probabilities" / "liver.nii.gz").exists()
    assert {p.name for p in several.iterdir()} == {"a", "a.nii.gz", "a_seg.nii.gz", *BATCH}


def test_several_inputs(
    cli: Command, several: Path, small: Path, model_file: Path, tmp_path: Path
) -> None:
    arguments = ("-o", tmp_path / "out", "-m", model_file, "--no-preview")
    ran = cli("segment", "-i", several / "a.nii.gz", "-i", small, *arguments)
    assert ran.code == 0, ran.err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a", "small", *BATCH}

    absent = tmp_path / "absent.nii.gz"
    ran = cli("segment", "-i", absent, "-i", small, *arguments)
    assert ran.code == 3
    assert f"organfast: {absent}: does not exist; " in ran.err


def test_a_result_that_cannot_be_written_does_not_stop_the_others(
    cli: Command, several: Path, model_file: Path, tmp_path: Path
) -> None:
    """Its target looks writable until it is: a link to where no folder can be made."""
    shutil.copy(several / "a.nii.gz", several / "b.nii.gz")
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "file").touch()
    (out / "b").symlink_to(tmp_path / "file" / "b")
    ran = cli("segment", "-i", several, "-o", out, "-m", model_file, "--no-preview", "--json")
    assert ran.code == 3
    errors = [line for line in ran.err.splitlines() if "warning" not in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"organfast: {out / 'b'}: cannot be written (File exists); ")
    told = [Path(json.loads(line)["output"]) for line in ran.out.splitlines()]
    assert told == [out / "a", out / "deep"]
    assert all(files_of(folder) == RESULT for folder in told)
    assert {p.name for p in out.iterdir()} == {"a", "b", "deep", *BATCH}


CROWDED = """
import resource, sys
from pathlib import Path
from organfast.cli import run
assert run(["segment", "-i", sys.argv[1], *sys.argv[4:], "-o", sys.argv[2] + "/first"]) == 0
status = Path("/proc/self/status").read_text().split()
room = int(status[status.index("VmSize:") + 1]) * 1024 + 450_000_000
resource.setrlimit(resource.RLIMIT_AS, (room, room))
sys.exit(run(["segment", "-i", sys.argv[3], *sys.argv[4:], "-o", sys.argv[2] + "/all"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space")
def test_a_scan_too_large_for_memory_does_not_stop_the_others(
    crop: Crop, small: Path, model_file: Path, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a", "c"):
        shutil.copy(small, scans / f"{name}.nii.gz")
    huge = np.full((800, 800, 360), -1000, np.int16, order="F")
    huge[::100] = 0
    write_volume(scans / "b.nii.gz", Volume(huge, np.diag([0.3, 0.3, 0.3, 1])))
    options = ("-m", model_file, "--no-preview", "--threads", 1)
    ran = in_process_of_its_own(small, tmp_path, scans, *options, code=CROWDED)
    assert ran.code == 3, ran.err
    errors = [line for line in ran.err.splitlines() if "warning" not in line]
    assert errors == [
        f"organfast: {scans / 'b.nii.gz'}: needs more memory than there is; "
        "use a machine with more, or crop the scan"
    ]
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"a", "c", *BATCH}


def test_all_scans_bad_is_an_input_error(
    cli: Command, several: Path, model_file: Path, tmp_path: Path
) -> None:
    bad = several / "b.nii.gz"
    ran = cli("segment", "-i", bad, "-i", tmp_path / "no", "-o", tmp_path / "o", "-m", model_file)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 2
    assert {p.name for p in (tmp_path / "o").iterdir()} == BATCH


def test_scans_that_would_fill_one_folder(
    cli: Command, several: Path, crop: Crop, model_file: Path, tmp_path: Path
) -> None:
    arguments = ("-o", tmp_path / "out", "-m", model_file)
    (tmp_path / "a").mkdir()
    twin = crop.save(tmp_path / "a" / "a.nii.gz")
    ran = cli("segment", "-i", several, "-i", twin, *arguments)
    assert ran.code == 2
    assert "two scans are called a" in ran.line
    crop.save(several / "deep" / "other.nii.gz")
    ran = cli("segment", "-i", several, *arguments)
    assert ran.code == 2
    assert f"{tmp_path / 'out' / 'deep' / 'other'} would lie in" in ran.line
    assert not (tmp_path / "out").exists()


def test_a_folder_without_scans(cli: Command, model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    ran = cli("segment", "-i", tmp_path / "none", "-o", tmp_path / "out", "-m", model_file)
    assert_names(ran, tmp_path / "none", "holds no scan")


# --- locate, verify and info ----------------------------------------------------------------------


def test_locate(cli: Command, scan_file: Path, model_file: Path, cohort_folder: Path) -> None:
    ran = cli("locate", "-i", scan_file, "-m", model_file, "--json")
    assert ran.code == 0
    assert ran.err == ""
    content = json.loads(ran.out)
    assert "coordinates" in content
    classes = load_model(model_file).classes
    assert set(content["organs"]) == {classes.names[n] for n in classes.organs}
    image = nib.load(cohort_folder / "phantom_001" / "labels.nii.gz")
    truth = np.asanyarray(image.dataobj)
    for name in ("lung_right", "lung_left"):
        voxels = np.argwhere(truth == ClassTable.default().index(name))
        centre = nib.affines.apply_affine(image.affine, voxels.mean(0))
        assert np.linalg.norm(content["organs"][name]["centroid_mm"] - centre) < 40

    ran = cli("locate", "-i", scan_file, "-m", model_file, "--stride", 6)
    assert ran.code == 0
    assert len(ran.out.splitlines()) == 1 + len(classes.organs)


def test_locate_warns_as_segment_does(cli: Command, model_file: Path, tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, -900, (20, 20, 1), np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([5.0, 5, 8, 1])), tmp_path / "air.nii.gz")
    ran = cli("locate", "-i", tmp_path / "air.nii.gz", "-m", model_file, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["organs"]["liver"]["present"] is False
    warning = f"organfast: {tmp_path / 'air.nii.gz'}: warning: no body was found"
    assert ran.err.startswith(warning)
    ran = cli("verify", tmp_path / "air.nii.gz", "-m", model_file, "--coarse-to-fine")
    assert ran.code == 0
    assert ran.err.startswith(warning)
    assert "positions asked: 0 of 0, -\n" in ran.out


def test_verify_tells_what_a_shortcut_changes(
    cli: Command, scan_file: Path, model_file: Path
) -> None:
    arguments = ("verify", scan_file, "-m", model_file)
    ran = cli(*arguments, "--coarse-to-fine", "--margin", 0.1, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["settings"]["refine"] == {"margin": 0.1, "disagreement": True}
    assert told["asked"][1] == round(told["share_asked"] * told["asked"][0]) < told["asked"][0]
    assert 0 < told["agreement"]["differing"] < told["agreement"]["differing_in_organs"] < 0.5
    organs = {organ["name"]: organ for organ in told["agreement"]["organs"]}
    assert 0.8 < organs["liver"]["dice"] < 1
    assert 0 < organs["liver"]["shift_mm"] < 5

    ran = cli(*arguments, "--stride", "6,6,4")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].split() == [
        *("organ", "Dice", "centre", "moved", "by", "mm", "full", "grid", "ml", "shortcut", "ml")
    ]
    assert len(lines) == 1 + len(organs) + 4
    assert re.fullmatch(r"labels that differ: \d+\.\d\d% of all voxels,", lines[-4])
    assert re.fullmatch(r"  \d+\.\d\d% of those that are an organ in either", lines[-3])
    assert re.fullmatch(r"positions asked: \d+ of \d+, 1\d\.\d\d%", lines[-2])
    assert re.fullmatch(r"classified in \S+ s instead of \S+ s: \S+x as fast", lines[-1])


def test_a_scan_may_correct_the_labels_wherever_it_is_segmented(
    cli: Command, scan_file: Path, model_file: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    with_it = tmp_path / "adapting.organfast"
    save_model(replace(load_model(model_file), adapt=Adapt()), with_it)
    stride = ("--stride", "4,4,2", "--json")
    asked, own, off, plain = (
        json.loads(cli("locate", "-i", scan_file, "-m", model, *stride, *flag).out)["organs"]
        for model, flag in (
            (model_file, ["--adapt"]), (with_it, []), (with_it, ["--no-adapt"]), (model_file, [])
        )
    )  # fmt: skip
    assert asked == own != plain == off
    refused = cli("segment", "-i", scan_file, "-o", tmp_path / "x", "-m", with_it, "--no-atlas")
    assert refused.code == 2
    assert "--no-atlas leaves nothing out" in refused.err
    ran = cli("verify", scan_file, "-m", model_file, *stride, "--adapt")
    assert ran.code == 0
    assert json.loads(ran.out)["settings"]["adapt"]["core"] == 0.7
    one = tmp_path / "split.json"
    one.write_text('{"train": ["phantom_000"], "test": ["phantom_001"]}')
    scored = []
    for flag in ("--adapt", "--no-adapt"):
        how = ("--split", one, "--blocks", 0, "--json", flag)
        ran = cli("evaluate", cohort_folder, "-m", model_file, *how)
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["how"]["settings"]["adapt"] is (flag == "--adapt")
        scored.append(json.loads(ran.out)["cases"])
    assert len(scored[0]) == len(scored[1]) == 1
    assert scored[0] != scored[1]
    told = json.loads(cli("info", with_it, "--json").out)
    assert told["adapt"] == asdict(Adapt())
    assert json.loads(cli("info", model_file, "--json").out)["adapt"] is None


def test_a_model_on_a_scan_s_own_pixels_does_not_adapt(
    cli: Command, scan_file: Path, cohort_folder: Path, tmp_path: Path
) -> None:
    native = tmp_path / "native.organfast"
    how = ("--block-size", 5, "--spacing", "native", "--trees", 2, "--n-per-class", 10)
    assert cli("train", cohort_folder, "-o", native, *how).code == 0
    for command in (
        ("segment", "-i", scan_file, "-o", tmp_path / "out", "-m", native, "--adapt"),
        ("segment", "-i", cohort_folder, "-o", tmp_path / "out", "-m", native, "--adapt"),
        ("locate", "-i", scan_file, "-m", native, "--adapt"),
        ("verify", scan_file, "-m", native, "--stride", 9, "--adapt"),
        ("evaluate", cohort_folder, "-m", native, "--adapt"),
    ):
        ran = cli(*command)
        assert ran.code == 2
        assert re.match("adapting to a scan needs a model with a working grid", ran.line)
        assert not (tmp_path / "out").exists()


def test_info_of_a_model(cli: Command, model_file: Path) -> None:
    ran = cli("info", model_file, "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    model = load_model(model_file)
    assert told["digest"] == model.digest
    assert told["classes"] == list(model.classes.names)
    assert told["grid"] == {"spacing_mm": [5.0, 5.0, 8.0], "hu_table": "piecewise"}
    assert len(told["trained on"]) == 2
    assert 0 < told["scores"]["test"]["block_accuracy"] <= 1
    assert "scikit-learn" in told["versions"]
    plain = cli("info", model_file)
    assert plain.code == 0
    assert model.digest in plain.out.splitlines()[0]


def test_info_of_a_dataset(cli: Command, cohort_folder: Path) -> None:
    ran = cli("info", cohort_folder, "--json")
    assert ran.code == 0
    told = json.loads(ran.out)
    assert told["layout"] == "totalsegmentator"
    assert told["patients"] == 3
    assert told["cases"] == ["phantom_000", "phantom_001", "phantom_002"]
    assert told["without labels"] == []
    assert set(told["classes"]) == set(ClassTable.default().names)
    assert "phantom_002" in cli("info", cohort_folder).out


# --- bad scans ------------------------------------------------------------------------------------

# Makes a bad file of a good scan (in a folder: a bad dataset of a good one).
Spoil = Callable[[Crop, Path], object]

# Where the fields of a NIfTI-1 header stand.
DIM, SROW_X = 40, 280


def patched(start: int, new: bytes) -> Spoil:
    """An uncompressed scan, some bytes of its header changed."""

    def make(crop: Crop, path: Path) -> None:
        content = bytearray(crop.save(path).read_bytes())
        content[start : start + len(new)] = new
        path.write_bytes(content)

    return make


def put(hu: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda crop, path: crop.save(path, hu(crop.hu))


def truncated(crop: Crop, path: Path) -> None:
    content = crop.save(path).read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])


def broken(crop: Crop, path: Path) -> None:
    content = bytearray(crop.save(path).read_bytes())
    content[-8] ^= 255  # of the checksum
    path.write_bytes(content)


def with_one(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def changed(hu: np.ndarray) -> np.ndarray:
        out = hu.astype(np.float32)
        out[3, 4, 5] = value
        return out

    return changed


def windowed(hu: np.ndarray) -> np.ndarray:
    with_air = hu.copy()
    with_air[:8] = -1000
    return with_air.clip(-160, 240)


def rgb(hu: np.ndarray) -> np.ndarray:
    return np.zeros(hu.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])


BAD_SCANS: dict[str, tuple[str, Spoil, str]] = {
    "missing": ("x.nii.gz", lambda crop, path: None, "does not exist"),
    "empty": ("x.nii.gz", lambda crop, path: path.touch(), "is empty"),
    "text": ("x.nii.gz", lambda crop, path: path.write_text("HU " * 200), "is not a NIfTI"),
    "short": ("x.nii", lambda crop, path: path.write_bytes(b"n+1"), "is not a NIfTI"),
    "dicom": ("x.dcm", lambda crop, path: path.write_bytes(bytes(128) + b"DICM"), "DICOM"),
    "truncated": ("x.nii.gz", truncated, "is a truncated gzip|is truncated"),
    "truncated, plain": ("x.nii", truncated, "is truncated"),
    "checksum": ("x.nii.gz", broken, "is a damaged gzip"),
    "2-D": ("x.nii.gz", put(lambda hu: hu[:, :, 0]), "is 2-D"),
    "4-D": ("x.nii.gz", put(lambda hu: np.stack([hu, hu], axis=3)), "is 4-D .*several volumes"),
    "RGB": ("x.nii.gz", put(rgb), "stores RGB voxels"),
    "complex": ("x.nii.gz", put(lambda hu: hu.astype(np.complex64)), "stores complex64 voxels"),
    "NaN": ("x.nii.gz", put(with_one(np.nan)), "NaN or infinite"),
    "infinity": ("x.nii.gz", put(with_one(-np.inf)), "NaN or infinite"),
    "no slice": (
        "x.nii",
        patched(DIM + 6, struct.pack("<h", 0)),
        "holds no voxel",
    ),
    "negative size": (
        "x.nii",
        patched(DIM + 2, struct.pack("<h", -24)),
        "holds no voxel",
    ),
    "too large": (
        "x.nii",
        patched(DIM + 2, struct.pack("<3h", *[30_000] * 3)),
        "is truncated",
    ),
    "singular affine": (
        "x.nii",
        patched(SROW_X, bytes(16)),
        "singular affine",
    ),
    "affine of NaN": (
        "x.nii",
        patched(SROW_X, struct.pack("<f", np.nan)),
        "not finite",
    ),
    "grey levels": ("x.nii.gz", put(lambda hu: (hu // 16 + 64).clip(0).astype("u1")), "not HU"),
    "no intercept": ("x.nii.gz", put(lambda hu: (hu + 1024).astype(np.int16)), "not HU"),
    "normalised": ("x.nii.gz", put(lambda hu: hu / np.float32(1000)), "look normalised"),
    "windowed": ("x.nii.gz", put(windowed), "display window"),
    "one value": ("x.nii.gz", put(lambda hu: np.full_like(hu, -1000)), "everywhere"),
    "too bright": ("x.nii.gz", put(with_one(1e6)), "which is no HU"),
}


@pytest.mark.parametrize("case", BAD_SCANS)
def test_a_bad_scan_is_one_line(
    cli: Command, crop: Crop, model_file: Path, tmp_path: Path, case: str
) -> None:
    name, make, problem = BAD_SCANS[case]
    scan, out = tmp_path / name, tmp_path / "out"
    make(crop, scan)
    before = {p.name for p in tmp_path.iterdir()}
    assert_names(cli("segment", "-i", scan, "-o", out, "-m", model_file), scan, problem)
    ran = cli("segment", "-i", scan, "-o", tmp_path / "l.nii.gz", "-m", model_file)
    assert_names(ran, scan, problem)
    assert_names(cli("locate", "-i", scan, "-m", model_file, "--json"), scan, problem)
    assert {p.name for p in tmp_path.iterdir()} == before


def test_locate_wants_a_scan_not_a_folder(
    cli: Command, model_file: Path, cohort_folder: Path
) -> None:
    ran = cli("locate", "-i", cohort_folder, "-m", model_file)
    assert_names(ran, cohort_folder, "folder|directory")


# --- bad models -----------------------------------------------------------------------------------


def with_header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A model file, its JSON header changed."""
    n_bytes = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + n_bytes])
    ((key, text),) = outer["__metadata__"].items()
    header = json.loads(text)
    change(header)
    outer["__metadata__"][key] = json.dumps(header)
    new = json.dumps(outer).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + n_bytes :]


def with_arrays(content: bytes, name: str, at: int, new: bytes) -> bytes:
    """A model file, some bytes of one of its arrays changed."""
    n_bytes = int.from_bytes(content[:8], "little")
    begin = 8 + n_bytes + json.loads(content[8 : 8 + n_bytes])[name]["data_offsets"][0] + at
    return content[:begin] + new + content[begin + len(new) :]


BAD_MODELS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda model: b"", "is not an organfast model"),
    "text": (lambda model: b"a model, surely" * 20, "is not an organfast model"),
    "a scan": (lambda model: b"\x5c\x01\x00\x00" + bytes(400), "is not an organfast model"),
    "truncated": (lambda model: model[:-100], "is not a valid model"),
    "newer": (lambda m: with_header(m, lambda h: h.update(schema=99)), "a newer organfast"),
    "another pattern": (
        lambda m: with_header(m, lambda h: h["pattern"].update(size=5)),
        "is not a valid model",
    ),
    "fewer classes": (
        lambda m: with_header(m, lambda h: h["classes"].pop()),
        "is not a valid model",
    ),
    "child out of range": (
        lambda m: with_arrays(m, "left", 0, struct.pack("<i", 2**30)),
        "is not a valid model",
    ),
    "child before its parent": (
        lambda m: with_arrays(m, "left", 0, struct.pack("<i", 0)),
        "is not a valid model",
    ),
    "feature outside the pattern": (
        lambda m: with_arrays(m, "feature", 0, struct.pack("<H", 65_535)),
        "is not a valid model",
    ),
    "probability of NaN": (
        lambda m: with_arrays(m, "leaf_table", 0, struct.pack("<d", np.nan)),
        "is not a valid model",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_one_line(
    cli: Command, small: Path, model_file: Path, tmp_path: Path, case: str
) -> None:
    make, problem = BAD_MODELS[case]
    model, out = tmp_path / "bad.organfast", tmp_path / "out"
    model.write_bytes(make(model_file.read_bytes()))
    assert_names(cli("segment", "-i", small, "-o", out, "-m", model), model, problem)
    assert_names(cli("locate", "-i", small, "-m", model), model, problem)
    assert_names(cli("info", model), model, problem)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.organfast", "small.nii.gz"}


def test_a_model_that_is_not_there(cli: Command, small: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.organfast"
    for model, problem in ((absent, "cannot be read"), (tmp_path, "is a folder, not a model")):
        ran = cli("segment", "-i", small, "-o", tmp_path / "out", "-m", model)
        assert_names(ran, model, problem)
    assert_names(cli("info", tmp_path / "absent"), tmp_path / "absent", "cannot be read")


# --- bad datasets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """What is wrong with a dataset or with what it is to be learned by."""

    named: str
    problem: str
    options: tuple[str, ...] = ()


IMAGE, LABELS = "cases/p1/ct.nii.gz", "cases/p1/labels.nii.gz"


def relabelled(labels: Callable[[np.ndarray], np.ndarray], mm: float = 0) -> Spoil:
    """Other labels for the first patient, moved by some mm."""

    def make(crop: Crop, folder: Path) -> None:
        affine = crop.affine.copy()
        affine[0, 3] += mm
        nib.save(nib.Nifti1Image(labels(crop.labels), affine), folder / LABELS)

    return make


def imaged(make: Spoil) -> Spoil:
    return lambda crop, folder: make(crop, folder / IMAGE)


def written(name: str, text: str) -> Spoil:
    return lambda crop, folder: (folder / name).write_text(text)


def without_cases(crop: Crop, folder: Path) -> None:
    shutil.rmtree(folder / "cases")


def without_labels(crop: Crop, folder: Path) -> None:
    for path in (folder / "cases").glob("*/labels.nii.gz"):
        path.unlink()


def nothing(crop: Crop, folder: Path) -> None:
    """Leave the dataset as it is."""


BAD_DATASETS: dict[str, tuple[Spoil, Bad]] = {
    "no folder": (without_cases, Bad("cases", "cannot be listed")),
    "no labels": (without_labels, Bad("cases", "holds no labelled scan")),
    "truncated image": (imaged(truncated), Bad(IMAGE, "truncated")),
    "image of NaN": (imaged(put(with_one(np.nan))), Bad(IMAGE, "NaN or infinite")),
    "4-D image": (imaged(put(lambda hu: np.stack([hu, hu], 3))), Bad(IMAGE, "is 4-D")),
    "another shape": (relabelled(lambda n: n[:, :, 1:]), Bad(LABELS, "another grid .*×")),
    "another place": (relabelled(lambda n: n, mm=3), Bad(LABELS, "another grid .*3 mm apart")),
    "unknown id": (relabelled(lambda n: n + 100), Bad(LABELS, "holds label 10., which .* name")),
    "no voxel": (relabelled(np.zeros_like), Bad(LABELS, "has no labelled voxel at all")),
    "fractions": (relabelled(lambda n: n + np.float32(0.5)), Bad(LABELS, "holds fractions")),
    "negative": (relabelled(lambda n: n.astype(np.int16) - 9), Bad(LABELS, "holds the label -")),
    "label table": (written("cases/labels.csv", "a,b\n1,2\n"), Bad("cases/labels.csv", "table")),
    "split not there": (
        nothing,
        Bad("split.json", "cannot be read", ("--split", "split.json")),
    ),
    "split no JSON": (
        written("split.json", "p1 p2"),
        Bad("split.json", "cannot be read as JSON", ("--split", "split.json")),
    ),
    "split of strangers": (
        written("split.json", '{"train": ["p1", "p7"]}'),
        Bad("split.json", "names patient p7", ("--split", "split.json")),
    ),
    "split twice": (
        written("split.json", '{"train": ["p1"], "test": ["p1"]}'),
        Bad("split.json", "p1 stands twice", ("--split", "split.json")),
    ),
    "split of nobody": (
        written("split.json", '{"test": ["p1"]}'),
        Bad("split.json", "no patient to train on", ("--split", "split.json")),
    ),
    "classes not there": (nothing, Bad("t.csv", "cannot be read", ("--classes", "t.csv"))),
    "classes no table": (
        written("t.csv", "structure\nliver\n"),
        Bad("t.csv", "is not a class table", ("--classes", "t.csv")),
    ),
    "classes unknown": (
        written("t.csv", "name\nliver\nlivre\n"),
        Bad("t.csv", "names livre, which no case", ("--classes", "t.csv")),
    ),
    "output a folder": (nothing, Bad("cases", "is a folder", ("-o", "cases"))),
    "output nowhere": (nothing, Bad("no", "is no folder", ("-o", "no/m.organfast"))),
    "output in a file": (
        written("file", "mine"),
        Bad("file", "is no folder", ("-o", "file/m.organfast")),
    ),
}


@pytest.mark.parametrize("case", BAD_DATASETS)
def test_a_bad_dataset_is_one_line(
    cli: Command, crop: Crop, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p1", "p2"):
        (tmp_path / "cases" / name).mkdir(parents=True)
        crop.save(tmp_path / "cases" / name / "ct.nii.gz")
        crop.save(tmp_path / "cases" / name / "labels.nii.gz", crop.labels)
    rows = [f"{n},{name}\n" for n, name in enumerate(ClassTable.default().names)]
    (tmp_path / "cases" / "labels.csv").write_text("".join(["id,name\n", *rows]))
    make, bad = BAD_DATASETS[case]
    make(crop, tmp_path)
    before = files_of(tmp_path)
    ran = cli("train", "cases", "-o", "m.organfast", *QUICK, *bad.options)
    assert_names(ran, bad.named, bad.problem)
    assert files_of(tmp_path) == before


def test_info_of_a_bad_dataset(cli: Command, tmp_path: Path) -> None:
    assert_names(cli("info", tmp_path), tmp_path, "holds no labelled scan")


def test_the_demo_wants_a_new_folder(cli: Command, cohort_folder: Path) -> None:
    folder = cohort_folder.parent
    before = files_of(folder)
    assert_names(cli("demo", "-o", folder), folder, "holds a demo already")
    assert files_of(folder) == before


# --- wrong usage ----------------------------------------------------------------------------------

SEGMENT = ("segment", "-i", "SCAN", "-o", "out", "-m", "MODEL")
TRAIN = ("train", "COHORT", "-o", "m.organfast")

USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "no such command": (("segmet",), "No such command .segmet"),
    "no such option": (("info", "--jason", "MODEL"), "--jason"),
    "no option": (("segment", "-i", "SCAN"), "Missing option"),
    "no argument": (("info",), "Missing argument"),
    "no value": (("info", "MODEL", "--json", "x"), "unexpected extra argument"),
    "option without value": ((*SEGMENT, "--organs"), "requires an argument"),
    "no integer": ((*TRAIN, "--block-size", "big"), "--block-size"),
    "threads": ((*SEGMENT, "--threads", "0"), "--threads"),
    "unknown organ": ((*SEGMENT, "--organs", "liver,gizzard"), "no structure 'gizzard'"),
    "no organ": ((*SEGMENT, "--organs", ""), "no structure ''"),
    "stride of words": ((*SEGMENT, "--stride", "wide"), "--stride wide"),
    "stride of two": ((*SEGMENT, "--stride", "2,2"), "--stride 2,2"),
    "stride of zero": ((*SEGMENT, "--stride", "0"), "--stride 0"),
    "keep": ((*SEGMENT, "--keep", "all"), "keep 'all' is unknown"),
    "margin alone": ((*SEGMENT, "--margin", "0.2"), "--margin says where --coarse-to-fine asks"),
    "margin below zero": ((*SEGMENT, "--coarse-to-fine", "--margin", "-1"), "--margin"),
    "margin without end": ((*SEGMENT, "--coarse-to-fine", "--margin", "inf"), "margin is inf"),
    "two shortcuts": ((*SEGMENT, "--coarse-to-fine", "--labels-only"), "labels alone leave no"),
    "maps of labels": ((*SEGMENT, "--probabilities", "--labels-only"), "labels alone leave no"),
    "maps in one file": (
        ("segment", "-i", "SCAN", "-o", "o.nii.gz", "-m", "MODEL", "--probabilities"),
        "--probabilities needs a folder",
    ),
    "scans in one file": (
        ("segment", "-i", "SCAN", "-i", "COHORT", "-o", "o.nii.gz", "-m", "MODEL"),
        "o.nii.gz is one file",
    ),
    "even block": ((*TRAIN, "--block-size", "64"), "block size 64 is even.*63 or 65"),
    "levels": ((*TRAIN, "--block-size", "33", "--levels", "1;9"), "--levels 1;9"),
    "slices": ((*TRAIN, "--block-size", "33", "--slices", "2"), "slices 2 is even"),
    "levels of no block": ((*TRAIN, "--levels", "1,9"), "give --block-size as well"),
    "slices of no block": ((*TRAIN, "--slices", "3"), "give --block-size as well"),
    "spacing": ((*TRAIN, "--spacing", "1.5"), "--spacing 1.5"),
    "spacing of zero": ((*TRAIN, "--spacing", "0,1,1"), "spacing_mm"),
    "forest": ((*TRAIN, "--forest", "jungle"), "'jungle' is unknown"),
    "layout": ((*TRAIN, "--layout", "piles"), "'piles' is unknown"),
    "seed": ((*TRAIN, "--seed", "-1"), "seed is -1"),
    "trees": ((*TRAIN, "--trees", "0"), "--trees"),
    "share": ((*TRAIN, "--least-share", "2"), "least_share is 2.0; give a share"),
    "two shares": (
        (*TRAIN, "--least-share", "0.02", "--context-factor", "3"),
        "--context-factor.*says nothing where --least-share does",
    ),
    "native and adapting": (
        (*TRAIN, "--spacing", "native", "--adapt"),
        "adapting to a scan needs a model with a working grid.*leave adapt off",
    ),
    "native folds and adapting": (
        ("evaluate", "COHORT", "--folds", "2", "--spacing", "native", "--adapt"),
        "adapting to a scan needs a model with a working grid",
    ),
    "adapting a certificate": (
        ("verify", "SCAN", "-m", "MODEL", "--no-adapt"),
        "--no-adapt goes with a shortcut.*give --coarse-to-fine or --stride",
    ),
    "adapting a curve": (
        ("evaluate", "COHORT", "-m", "MODEL", "--curve", "--adapt"),
        "a curve asks models as they were trained; leave it, or --adapt",
    ),
    "labels of what adapts": ((*SEGMENT, "--adapt", "--labels-only"), "labels alone need a model"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_one_line(
    cli: Command,
    scan_file: Path,
    model_file: Path,
    cohort_folder: Path,
    tmp_path: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = USAGE[case]
    stand_for = {"SCAN": scan_file, "MODEL": model_file, "COHORT": cohort_folder}
    ran = cli(*(stand_for.get(a, a) for a in arguments))
    assert ran.code == 2
    assert re.search(message, ran.line), ran.line
    assert not list(tmp_path.iterdir())


def test_a_path_that_no_system_takes(cli: Command) -> None:
    name = "n" * 5000
    assert_names(cli("info", name), name, "cannot be used|cannot be read")


# --- the process ----------------------------------------------------------------------------------


def test_debug_shows_the_traceback(small: Path, model_file: Path, tmp_path: Path) -> None:
    from organfast.errors import InputError

    arguments = ["segment", "-i", str(small), "-o", str(tmp_path / "out"), "-m", str(small)]
    with pytest.raises(InputError, match="is not an organfast model"):
        run([*arguments, "--debug"])
    with pytest.raises(ValueError, match="no structure"):
        run(["--debug", *arguments[:-1], str(model_file), "--organs", "gizzard"])
    ran = in_process_of_its_own(*arguments, "--debug")
    assert ran.code == 1
    assert ran.err.startswith("Traceback")
    assert "organfast.errors.InputError" in ran.err.splitlines()[-1]


def test_exit_codes_reach_the_shell(small: Path, tmp_path: Path) -> None:
    ran = in_process_of_its_own("segment", "-i", small, "-o", tmp_path / "out", "-m", small)
    assert_names(ran, small, "is not an organfast model")
    ran = in_process_of_its_own("segment", "-i", small)
    assert ran.code == 2
    assert "Missing option" in ran.line


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text, and terminals")
def test_output_goes_where_it_was_sent(
    crop: Crop, small: Path, model_file: Path, tmp_path: Path
) -> None:
    """Progress on a terminal, JSON in a pipe; a name that is no text and steers terminals."""
    import pty

    odd = tmp_path / os.fsdecode(b"\xff\x1b[2J\n.nii.gz")
    shutil.copy(small, odd)
    (tmp_path / "bad\n.nii").touch()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "organfast", "segment", "-m", model_file, "--json"),
            *("-i", odd, "-i", tmp_path / "bad\n.nii", "-o", tmp_path / "out", "--no-preview"),
        ],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end was closed
            break
        seen += part
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 3, seen
    (told,) = [json.loads(line) for line in out.decode().splitlines()]
    assert told["input"] == str(odd)
    assert Path(told["output"], "run.json").is_file()
    assert b"scans" in seen
    assert b"is empty; copy or export it again" in seen


def test_a_reader_that_leaves_is_no_trouble(model_file: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "organfast", "info", model_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait(60) == 1
