"""The flow: train, segment, locate, against scikit-learn, over storage, threads and strides."""

from __future__ import annotations

import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from test_volume import ORIENTATIONS

from organfast.adaptation import Adapt
from organfast.anatomy import ClassTable
from organfast.atlas import Atlas
from organfast.atlaslearning import Lattice, learned_atlas, rows_of
from organfast.blocks import Block, gather_blocks
from organfast.errors import InputError
from organfast.grid import BlockGrid, ModelGrid, to_model_grid
from organfast.layouts import case_labels, find_cases, write_case
from organfast.learning import Recipe, train
from organfast.metrics import centroid_error_mm, dice_per_class
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.forest import Forest, ForestSettings
from organfast.nifti import read_geometry, read_labels, write_volume
from organfast.organs import measure_organs, organs_json
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom
from organfast.pipeline import Settings, locate, segment, segment_many
from organfast.probability import SliceClassifier, probability_slabs
from organfast.refinement import Refine
from organfast.results import Result
from organfast.sampling import Split
from organfast.scans import as_scan
from organfast.segmentation import Cleaning
from organfast.volume import Volume
from organfast.workers import Workers

FIELD = FieldOfView((72, 72, 40), (5.0, 5.0, 12.0))
GRIDS = {"native": ModelGrid(None), "working": ModelGrid((6.5, 6.0, 10.0), "piecewise")}
FEW_TREES = ForestSettings("extra_trees", n_trees=20)
SPLIT = Split(("p0", "p1"), test=("p2",))


@dataclass(frozen=True, eq=False)
class Patient:
    scan: Volume
    labels: NDArray[Any]


def patient(seed: int) -> Patient:
    anatomy = phantom(FIELD, seed)
    return Patient(paint(anatomy, seed), class_labels(anatomy))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    for n in range(3):
        one = patient(n)
        write_case(folder, f"p{n}", one.scan, one.labels, ClassTable.default())
    return folder


def learn(cases: Path, grid: ModelGrid, **changes: Any) -> Model:
    recipe = Recipe(grid=grid, n_per_class=150, forest=FEW_TREES, split=SPLIT)
    return train(cases, Block(9, levels=(1, 3)), replace(recipe, **changes))


@pytest.fixture(scope="module")
def models(cases: Path) -> dict[str, Model]:
    return {name: learn(cases, grid) for name, grid in GRIDS.items()}


@pytest.fixture(scope="module")
def native(models: dict[str, Model]) -> Model:
    return models["native"]


@pytest.fixture(scope="module")
def unseen() -> Patient:
    return patient(9)


@pytest.fixture(scope="module")
def results(models: dict[str, Model], unseen: Patient) -> dict[str, Result]:
    return {name: segment(unseen.scan, model) for name, model in models.items()}


def assert_same(found: Result, expected: Result) -> None:
    """Everything that a reader gets, but for timings."""
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.confidence, expected.confidence)  # type: ignore[arg-type]
    assert found.organs == expected.organs
    assert organs_json(found.organs) == organs_json(expected.organs)
    assert json.dumps(found.record) == json.dumps(expected.record)


# --- from labelled scans to organs ----------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_an_unseen_patient_s_organs_are_found_where_they_are(
    grid: str, results: dict[str, Result], unseen: Patient
) -> None:
    result, scan, classes = results[grid], unseen.scan, ClassTable.default()
    assert result.labels.shape == result.confidence.shape == scan.hu.shape
    assert result.labels.dtype == result.confidence.dtype == np.uint8
    assert result.classes == classes
    assert list(result.organs) == [classes.names[n] for n in classes.organs]
    # Over five seeds .82 to .92, and at most 16 mm away. The seed found a liver within 38 mm.
    dice = dice_per_class(unseen.labels, result.labels, len(classes))
    truth = measure_organs(scan.orientation.working(unseen.labels), None, scan, classes)
    for name in ("lung_right", "lung_left", "liver"):
        assert dice[classes.index(name)] > 0.7, name
        found, true = result.organs[name], truth[name]
        assert found.present
        assert found.centroid_mm is not None
        assert true.centroid_mm is not None
        assert centroid_error_mm(true.centroid_mm, found.centroid_mm) < 38, name
    for name, organ in result.organs.items():
        for warning in organ.warnings:
            assert any(name in w and warning in w for w in result.warnings)


def test_the_record_of_a_model_says_what_it_was_made_of(native: Model, cases: Path) -> None:
    record = native.training
    assert record["layout"] == "totalsegmentator"
    assert set(record["cases"]) == {"p0", "p1"}
    assert record["split"] == {"train": ("p0", "p1"), "validation": (), "test": ("p2",)}
    assert record["spacing_mm"] == [5.0, 5.0, 12.0]
    assert record["forest"] == asdict(FEW_TREES)
    scores = native.scores["test"]
    assert set(native.scores) == {"test"}
    assert scores["n_patients"] == 1
    assert scores["n_blocks"] == np.sum(scores["confusion"])
    assert 1 / 23 < scores["block_accuracy"] <= 1
    assert record["warnings"] == []
    assert str(cases) not in json.dumps(record)


def test_an_organ_that_a_patient_lacks_is_counted_and_doubts_are_recorded(tmp_path: Path) -> None:
    classes = ClassTable.from_names(["liver", "spleen"])
    for n, found in enumerate((["liver", "spleen"], ["liver"])):
        hu = np.random.default_rng(n).integers(20, 60, (12, 10, 6)).astype(np.int16)
        hu[:2] = -1000
        masks = tmp_path / f"p{n}" / "segmentations"
        masks.mkdir(parents=True)
        # Where the second patient's left is cannot be known.
        image = nibabel.Nifti1Image(hu, None if n else np.diag([4.0, 4, 8, 1]))
        image.header.set_zooms((4, 4, 8))
        nibabel.save(image, tmp_path / f"p{n}" / "ct.nii.gz")
        for where, name in enumerate(found):
            inside = np.zeros(hu.shape, np.uint8)
            inside[3 + 2 * where : 6 + 2 * where] = 1  # they overlap
            label = nibabel.Nifti1Image(inside, nibabel.load(masks.parent / "ct.nii.gz").affine)
            nibabel.save(label, masks / f"{name}.nii.gz")
    recipe = Recipe(ModelGrid(None), 20, forest=FEW_TREES, classes=classes)
    record = train(tmp_path, Block(3), recipe).training
    assert record["n_cases_with"] == {
        "background": 2,
        "thorax_abdomen": 1,
        "liver": 2,
        "spleen": 1,
    }
    assert record["warnings"][0].startswith("p0: spleen.nii.gz: 60 voxels had another label")
    assert record["warnings"][1].startswith("p1: ")
    assert len(record["warnings"]) == 2


def test_a_model_from_a_file_segments_as_it_did_before(
    native: Model, unseen: Patient, results: dict[str, Result], tmp_path: Path
) -> None:
    path = tmp_path / "m.organfast"
    save_model(native, path)
    assert_same(segment(unseen.scan, load_model(path)), results["native"])
    assert_same(segment(unseen.scan, path), results["native"])


def test_training_again_gives_the_same_model_for_any_number_of_threads(
    native: Model, cases: Path
) -> None:
    recipe = Recipe(grid=GRIDS["native"], n_per_class=150, forest=FEW_TREES, split=SPLIT)
    again = train(find_cases(cases), Block(9, levels=(1, 3)), recipe, threads=2)
    assert again.digest == native.digest
    assert learn(cases, GRIDS["native"], seed=1).digest != native.digest


def test_locating_is_segmenting_at_half_as_many_positions(native: Model, unseen: Patient) -> None:
    k, i, j = native.stride
    organs = locate(unseen.scan, native)
    assert organs == segment(unseen.scan, native, Settings((2 * j, 2 * i, 2 * k))).organs
    assert (
        locate(unseen.scan, native, Settings(3)) == segment(unseen.scan, native, Settings(3)).organs
    )


def test_progress_ends_where_it_said_it_would(cases: Path, native: Model, unseen: Patient) -> None:
    said: list[tuple[str, int, int]] = []

    def watch(what: str, done: int, total: int) -> None:
        said.append((what, done, total))

    recipe = Recipe(grid=GRIDS["native"], n_per_class=5, forest=FEW_TREES, split=SPLIT)
    train(cases, Block(3), recipe, progress=watch)
    segment(unseen.scan, native, progress=watch)
    for what in dict.fromkeys(what for what, _, _ in said):
        steps = [(done, total) for other, done, total in said if other == what]
        assert steps == sorted(steps)
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] == steps[-1][1]
    assert {what for what, _, _ in said} == {
        *("reading cases", "training trees", "scoring held-out patients", "segmenting")
    }


# --- one scan, however it is stored ---------------------------------------------------------------


def reoriented(array: NDArray[Any], order: tuple[int, ...], signs: tuple[float, ...]) -> Any:
    """Axis n of the result runs along axis order[n] of the array, backwards where signs[n] < 0."""
    return array.transpose(order)[tuple(slice(None, None, int(s)) for s in signs)]


def stored_as(scan: Volume, order: tuple[int, ...], signs: tuple[float, ...]) -> Volume:
    """The same voxels at the same places in the world."""
    affine = np.eye(4)
    affine[:3, 3] = scan.affine[:3, 3]
    for axis, (old, sign) in enumerate(zip(order, signs, strict=True)):
        affine[:3, axis] = sign * scan.affine[:3, old]
        if sign < 0:
            affine[:3, 3] += (scan.hu.shape[old] - 1) * scan.affine[:3, old]
    return Volume(reoriented(scan.hu, order, signs).copy(), affine)


def oblique(scan: Volume) -> Volume:
    """The scan turned by 10 degrees about z and by 5 about x."""
    z, x = np.deg2rad(10), np.deg2rad(5)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(z), -np.sin(z)], [np.sin(z), np.cos(z)]]
    tip = np.eye(4)
    tip[1:3, 1:3] = [[np.cos(x), -np.sin(x)], [np.sin(x), np.cos(x)]]
    return Volume(scan.hu, turn @ tip @ scan.affine)


MM = ("volume_ml", "box_mm", "centroid_mm", "probability_centroid_mm")
SAME = ("name", "label", "present", "confidence", "n_voxels", "cut_off", "warnings")


@pytest.fixture(scope="module")
def oblique_results(models: dict[str, Model], unseen: Patient) -> dict[str, Result]:
    return {name: segment(oblique(unseen.scan), model) for name, model in models.items()}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_any_orientation_gives_the_same_labels_in_the_world(
    order: tuple[int, ...],
    signs: tuple[float, ...],
    grid: str,
    models: dict[str, Model],
    unseen: Patient,
    oblique_results: dict[str, Result],
) -> None:
    expected = oblique_results[grid]
    found = segment(stored_as(oblique(unseen.scan), order, signs), models[grid])
    np.testing.assert_array_equal(found.labels, reoriented(expected.labels, order, signs))
    np.testing.assert_array_equal(found.confidence, reoriented(expected.confidence, order, signs))
    for name, organ in expected.organs.items():
        for what in SAME:
            assert getattr(found.organs[name], what) == getattr(organ, what), (name, what)
        for what in MM:
            one, other = getattr(found.organs[name], what), getattr(organ, what)
            assert (one is None) == (other is None)
            if other is not None:  # mm are sums of products with the affine's cosines
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_a_probability_map_lies_as_its_scan_is_stored(
    order: tuple[int, ...], native: Model, unseen: Patient, results: dict[str, Result]
) -> None:
    signs = (-1.0, 1.0, -1.0)
    found = segment(stored_as(unseen.scan, order, signs), native).probability("liver")
    expected = reoriented(results["native"].probability("liver"), order, signs)
    np.testing.assert_array_equal(found, expected)


def _mapped(hu: NDArray[np.int16], folder: Path) -> NDArray[np.int16]:
    np.save(folder / "hu.npy", hu)
    return np.load(folder / "hu.npy", mmap_mode="r")


def _read_only(hu: NDArray[np.int16], _: Path) -> NDArray[np.int16]:
    view = hu.copy().view()
    view.flags.writeable = False
    return view


LAYOUTS = {
    "C": lambda hu, _: hu.copy(order="C"),
    "F": lambda hu, _: hu.copy(order="F"),
    "every second": lambda hu, _: np.repeat(np.repeat(hu, 2, 0), 2, 2)[::2, :, 1::2],
    "memory-mapped": _mapped,
    "read-only": _read_only,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_any_memory_gives_the_same_result_and_is_left_as_it_was(
    layout: str,
    grid: str,
    models: dict[str, Model],
    unseen: Patient,
    results: dict[str, Result],
    tmp_path: Path,
) -> None:
    hu = LAYOUTS[layout](unseen.scan.hu, tmp_path)
    result = segment(Volume(hu, unseen.scan.affine), models[grid])
    result.probability("spleen")
    assert_same(result, results[grid])
    np.testing.assert_array_equal(hu, unseen.scan.hu)


def test_whatever_a_user_holds_gives_the_same_result(
    native: Model, unseen: Patient, results: dict[str, Result], tmp_path: Path
) -> None:
    scan, path = unseen.scan, tmp_path / "ct.nii.gz"
    write_volume(path, scan)
    write_volume(tmp_path / "ct.nii", scan)
    image = nibabel.Nifti1Image(scan.hu, scan.affine)
    held: list[Any] = [scan, (scan.hu, scan.affine), image, nibabel.load(path), as_scan(scan)]
    for source in held:
        assert_same(segment(source, native), results["native"])
    digests = set()
    for source in (path, str(path), tmp_path / "ct.nii"):
        found = segment(source, native)
        digests.add(found.record["input"])
        np.testing.assert_array_equal(found.labels, results["native"].labels)
        assert found.organs == results["native"].organs
        assert {**found.record, "input": None} == dict(results["native"].record)
    assert len(digests) == 2
    assert None not in digests


# --- threads, and many scans ----------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("threads", [2, 7])
def test_the_result_does_not_depend_on_threads(
    threads: int,
    grid: str,
    models: dict[str, Model],
    unseen: Patient,
    results: dict[str, Result],
) -> None:
    result = segment(unseen.scan, models[grid], threads=threads)
    assert_same(result, results[grid])
    np.testing.assert_array_equal(result.probability("liver"), results[grid].probability("liver"))
    assert result.timings["threads"] == threads


def test_one_model_segments_several_scans_at_once(
    native: Model, unseen: Patient, results: dict[str, Result]
) -> None:
    others = [Volume(np.roll(unseen.scan.hu, n, axis=2), unseen.scan.affine) for n in (1, 2)]
    alone = [results["native"], *(segment(scan, native) for scan in others)]
    with ThreadPoolExecutor(6) as pool:
        together = pool.map(partial(segment, model=native), [unseen.scan, *others] * 2)
        for found, expected in zip(together, alone * 2, strict=True):
            assert_same(found, expected)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three scans that differ."""
    folder = tmp_path_factory.mktemp("scans")
    paths = [folder / f"s{n}.nii.gz" for n in range(3)]
    for n, path in enumerate(paths):
        write_volume(path, patient(n + 4).scan)
    return paths


def test_many_scans_give_what_each_gives_alone_in_their_order(
    native: Model, files: list[Path]
) -> None:
    settings = Settings(stride=6, keep_context=True)
    alone = [segment(path, native, settings) for path in files]
    many = list(segment_many(iter(files), native, settings, threads=2))
    assert len(many) == 3
    for found, expected in zip(many, alone, strict=True):
        assert_same(found, expected)
    assert list(segment_many([], native)) == []
    (one,) = segment_many(files[2:], native, settings)
    assert_same(one, alone[2])


def test_a_scan_that_cannot_be_used_stops_only_itself(
    native: Model, files: list[Path], tmp_path: Path
) -> None:
    broken = [tmp_path / f"broken{n}.nii.gz" for n in range(4)]
    mixed = [broken[0], files[0], broken[1], broken[2], files[1], broken[3]]
    broken[2].write_bytes(files[2].read_bytes()[:-40])
    reasons: list[InputError] = []
    found = list(segment_many(mixed, native, on_error=reasons.append))
    assert [error.path for error in reasons] == [str(path) for path in broken]
    for result, path in zip(found, files[:2], strict=True):
        assert_same(result, segment(path, native))
    several = segment_many(mixed[1:], native)
    assert_same(next(several), found[0])
    with pytest.raises(InputError, match="broken1"):
        next(several)


def test_a_scan_too_large_for_memory_stops_only_itself(native: Model, files: list[Path]) -> None:
    hu = np.broadcast_to(np.int16(0), (60_000, 60_000, 60_000))  # 400 TB of nothing
    scans = [files[0], Volume(hu, np.eye(4)), files[1]]
    reasons: list[InputError] = []
    found = list(segment_many(scans, native, on_error=reasons.append))
    assert [str(reason) for reason in reasons] == [
        "the given scan: needs more memory than there is; use a machine with more, or crop the scan"
    ]
    for result, path in zip(found, files[:2], strict=True):
        assert_same(result, segment(path, native))
    with pytest.raises(MemoryError):
        list(segment_many(scans[1:], native))


def test_a_result_that_its_taker_drops_is_gone_while_the_next_one_computes(
    native: Model, files: list[Path]
) -> None:
    results = segment_many(files, native)
    labels = weakref.ref(next(results).labels)
    assert labels() is None
    results.close()  # type: ignore[attr-defined]  # a generator


def test_all_scans_of_a_call_share_one_pool(native: Model, files: list[Path]) -> None:
    seen = []
    for _ in segment_many(files, native, threads=2):
        names = {t.name for t in threading.enumerate() if t.name.startswith("organfast")}
        seen.append({name for name in names if not name.startswith("organfast-read")})
        assert len(names) == 3
    assert seen[0] == seen[1] == seen[2]


class Watched(PathLike[str]):
    """A path that tells when it is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_read = path, threading.Event()

    def __fspath__(self) -> str:
        self.is_read.set()
        return str(self.path)


def test_the_next_scan_is_read_while_this_one_is_looked_at_and_no_other(
    native: Model, files: list[Path]
) -> None:
    scans = [Watched(path) for path in files]
    results = segment_many(scans, native)
    assert not scans[0].is_read.is_set()
    next(results)
    assert scans[1].is_read.wait(10)
    assert not scans[2].is_read.is_set()
    next(results)
    assert scans[2].is_read.wait(10)
    results.close()  # type: ignore[attr-defined]  # a generator


def test_a_consumer_may_stop_early(native: Model, files: list[Path]) -> None:
    n_threads = threading.active_count()
    for _ in segment_many(files, native):
        break
    assert threading.active_count() <= n_threads + 1


# --- settings -------------------------------------------------------------------------------------


def test_a_kept_probability_map_is_the_recomputed_one(
    models: dict[str, Model], unseen: Patient, results: dict[str, Result]
) -> None:
    names = ("liver", "thorax_abdomen", "kidney_left")
    for grid, model in models.items():
        kept = segment(unseen.scan, model, Settings(probabilities=names))
        np.testing.assert_array_equal(kept.labels, results[grid].labels)
        for name in names:
            recomputed = results[grid].probability(name)
            assert recomputed.shape == unseen.scan.hu.shape
            np.testing.assert_array_equal(kept.probability(name), recomputed)
    with pytest.raises(ValueError, match="no structure 'lever'"):
        kept.probability("lever")
    with pytest.raises(ValueError, match="no structure 'lever'"):
        segment(unseen.scan, models["native"], Settings(probabilities=("lever",)))


def test_the_label_s_confidence_is_its_probability(native: Model, unseen: Patient) -> None:
    settings = Settings(cleaning=Cleaning("none", fill_holes=False), keep_context=True)
    result = segment(unseen.scan, native, settings)
    maps = np.stack([result.probability(name) for name in native.classes.names])
    found = np.take_along_axis(maps, result.labels[None].astype(np.intp), 0)[0]
    # Both are floor(255 p + 1/2) of one float32 blend.
    np.testing.assert_array_equal(found, result.confidence)
    assert (maps.max(axis=0) == found).all()


def test_only_the_organs_that_were_asked_for_are_given(
    native: Model, unseen: Patient, results: dict[str, Result]
) -> None:
    wanted = ("spleen", "liver")
    few = segment(unseen.scan, native, Settings(organs=wanted))
    everything = results["native"]
    assert list(few.organs) == ["liver", "spleen"]
    for name in wanted:
        assert few.organs[name] == everything.organs[name]
    labels = [native.classes.index(name) for name in wanted]
    kept = np.where(np.isin(everything.labels, labels), everything.labels, 0)
    np.testing.assert_array_equal(few.labels, kept)
    with pytest.raises(ValueError, match="no structure 'lever'"):
        segment(unseen.scan, native, Settings(organs=("lever",)))


def test_context_is_left_out_unless_it_is_kept(
    native: Model, unseen: Patient, results: dict[str, Result]
) -> None:
    context = [n for n, s in enumerate(native.classes.structures) if s.role == "context"]
    whole = segment(unseen.scan, native, Settings(keep_context=True))
    plain = results["native"]
    assert np.isin(context, whole.labels).all()
    assert not np.isin(plain.labels, context).any()
    outside = np.isin(whole.labels, context)
    np.testing.assert_array_equal(np.where(outside, 0, whole.labels), plain.labels)
    np.testing.assert_array_equal(whole.confidence, plain.confidence)
    assert whole.organs == plain.organs


@pytest.mark.parametrize("stride", [4, (4, 4, 1), (2, 3, 5), (99, 1, 40), np.int64(4)])
def test_any_stride_covers_the_scan_and_is_recorded(
    stride: Any, native: Model, unseen: Patient
) -> None:
    settings = Settings(stride, cleaning=Cleaning("none", fill_holes=False), body_mask=False)
    result = segment(unseen.scan, native, settings)
    whole = (int(stride), int(stride), 1) if np.ndim(stride) == 0 else stride
    assert result.record["settings"]["stride"] == whole
    assert (result.confidence > 0).all()


@pytest.mark.parametrize("stride", [0, -1, (4, 4), (4, 4, 0), (4.5, 4, 1), "4", True])
def test_a_stride_that_cannot_be_is_refused_in_the_user_s_order(stride: Any) -> None:
    with pytest.raises(ValueError, match=r"^stride is .*\(cols, rows, slices\)"):
        Settings(stride)


def test_one_name_is_not_a_tuple_of_names() -> None:
    for setting in ({"organs": "liver"}, {"probabilities": "liver"}):
        with pytest.raises(ValueError, match=r"give a tuple of names, \('liver',\)"):
            Settings(**setting)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", GRIDS)
def test_refined_everywhere_it_is_the_full_grid(
    grid: str, models: dict[str, Model], unseen: Patient, results: dict[str, Result]
) -> None:
    found = segment(unseen.scan, models[grid], Settings(refine=Refine(1.5)), threads=2)
    np.testing.assert_array_equal(found.labels, results[grid].labels)
    np.testing.assert_array_equal(found.confidence, results[grid].confidence)
    assert found.organs == results[grid].organs
    assert found.record["positions"] == results[grid].record["positions"]


def test_coarse_to_fine_asks_less_and_says_how_much(
    models: dict[str, Model], unseen: Patient, results: dict[str, Result]
) -> None:
    settings = Settings(refine=Refine(0.1), probabilities=("liver",))
    for grid, model in models.items():
        found = segment(unseen.scan, model, settings)
        assert_same(segment(unseen.scan, model, settings, threads=3), found)
        without = segment(unseen.scan, model, replace(settings, probabilities=()))
        np.testing.assert_array_equal(without.probability("liver"), found.probability("liver"))
        assert found.record["settings"]["refine"] == {"margin": 0.1, "disagreement": True}
        positions = found.record["positions"]
        full = results[grid].record["positions"]
        assert positions["n_inside"] == full["n_inside"] == full["n_asked"]
        assert full["share_asked"] == 1
        assert positions["share_asked"] == positions["n_asked"] / positions["n_inside"] < 0.95
        # These organs are a few positions wide: it is not the shortcut's best case.
        assert 0 < (found.labels != results[grid].labels).mean() < 0.05


ADAPTED = Settings(adapt=True, probabilities=("liver",))


@pytest.fixture(scope="module")
def adapted(models: dict[str, Model], unseen: Patient) -> Result:
    return segment(unseen.scan, models["working"], ADAPTED)


def test_a_scan_s_own_organs_correct_the_labels_and_the_record_says_so(
    adapted: Result, models: dict[str, Model], unseen: Patient, results: dict[str, Result]
) -> None:
    model, plain = models["working"], results["working"]
    assert plain.record["adapted"] is None
    assert plain.record["settings"]["adapt"] is None
    record = json.loads(json.dumps(adapted.record))
    assert record["settings"]["adapt"] == asdict(Adapt())
    told = record["adapted"]
    assert {name: told[name] for name in asdict(Adapt())} == asdict(Adapt())
    organs = {model.classes.names[n] for n in model.classes.organs}
    assert set(told["core_positions"]).isdisjoint(told["abstained"])
    assert set(told["core_positions"]) | set(told["abstained"]) == organs
    assert told["core_positions"]["lung_left"] >= Adapt().least_core
    assert adapted.record["positions"] == plain.record["positions"]
    assert 0 < (adapted.labels != plain.labels).mean() < 0.2
    assert adapted.confidence is not None
    off = segment(unseen.scan, model, Settings(adapt=False))
    assert_same(off, plain)
    # Lungs have HU that nothing beside them has: they come no further from the truth.
    for name in ("lung_left", "lung_right"):
        label = model.classes.index(name)
        dice = [dice_per_class(unseen.labels, r.labels, 23)[label] for r in (plain, adapted)]
        assert dice[1] > dice[0], name


def test_what_is_adapted_depends_on_no_thread_and_is_as_probable_again(
    adapted: Result, models: dict[str, Model], unseen: Patient
) -> None:
    assert_same(segment(unseen.scan, models["working"], ADAPTED, threads=3), adapted)
    again = segment(unseen.scan, models["working"], Settings(adapt=True), threads=2)
    np.testing.assert_array_equal(again.labels, adapted.labels)
    np.testing.assert_array_equal(again.probability("liver"), adapted.probability("liver"))


def test_a_model_s_own_way_to_adapt_holds_unless_asked_otherwise(
    models: dict[str, Model], unseen: Patient, results: dict[str, Result], tmp_path: Path
) -> None:
    own, other = Adapt(least_core=10, edge_hu=50), Adapt(radius=0)
    save_model(replace(models["working"], adapt=own), tmp_path / "m.organfast")
    model = load_model(tmp_path / "m.organfast")
    for wish, expected in ((None, own), (True, own), (other, other), (False, None)):
        assert Settings(adapt=wish).adapts(model) == expected
    assert Settings(adapt=True).adapts(models["working"]) == Adapt()
    few = Volume(unseen.scan.hu[:, :, 8:20], unseen.scan.affine)
    found = segment(few, model)
    assert found.record["settings"]["adapt"] == asdict(own)
    np.testing.assert_array_equal(
        segment(few, models["working"], Settings(adapt=own)).labels, found.labels
    )
    without = segment(unseen.scan, model, Settings(adapt=False))
    np.testing.assert_array_equal(without.labels, results["working"].labels)


def test_organs_are_ruled_out_where_the_atlas_has_none(
    models: dict[str, Model], unseen: Patient, adapted: Result
) -> None:
    """An atlas of the patient himself; another in which the liver is but at the left kidney."""
    model, classes = models["working"], models["working"].classes
    liver = classes.organs.index(classes.index("liver"))
    volume = unseen.scan
    rows = rows_of(classes.organs, len(classes))
    himself = Lattice.of(volume.orientation.working(unseen.labels), volume.working_spacing_mm, rows)
    with Workers(1) as workers:
        atlas = learned_atlas([himself], len(classes.organs), workers)
    assert atlas is not None
    shares = atlas.shares.copy()
    shares[liver] = shares[classes.organs.index(classes.index("kidney_left"))]
    assert adapted.record["adapted"]["in_atlas"] is None
    dice = {}
    for name, found in (("own", atlas), ("moved", Atlas(shares))):
        laid = segment(volume, replace(model, adapt=Adapt(), atlas=found))
        told = json.loads(json.dumps(laid.record))["adapted"]["in_atlas"]
        assert set(told) == {"stretch", "log_p", "ruled_out"}
        assert set(told["ruled_out"]) == {classes.names[n] for n in classes.organs}
        dice[name] = dice_per_class(unseen.labels, laid.labels, 23)
        assert (told["ruled_out"]["liver"] > 0.5) == (name == "moved")
    plain = dice_per_class(unseen.labels, adapted.labels, 23)
    organs = list(classes.organs)
    assert np.nanmean(dice["own"][organs]) > np.nanmean(plain[organs]) - 0.02
    assert dice["moved"][classes.index("liver")] < 0.3 < plain[classes.index("liver")]
    settings = Settings(probabilities=("liver",))
    own = replace(model, adapt=Adapt(), atlas=atlas)
    one = segment(volume, own, settings)
    assert_same(segment(volume, own, settings, threads=3), one)
    again = segment(volume, own)
    np.testing.assert_array_equal(again.probability("liver"), one.probability("liver"))
    finer = segment(volume, own, Settings(stride=(2, 2, 1)))
    assert finer.record["adapted"]["in_atlas"]["stretch"] == pytest.approx(
        one.record["adapted"]["in_atlas"]["stretch"], abs=0.1
    )
    without = segment(volume, replace(model, adapt=Adapt(atlas=False), atlas=Atlas(shares)))
    np.testing.assert_array_equal(without.labels, adapted.labels)


def test_adapting_on_a_scan_s_own_pixels_is_refused(native: Model, unseen: Patient) -> None:
    for settings in (Settings(adapt=True), Settings(adapt=Adapt())):
        with pytest.raises(ValueError, match="needs a model with a working grid"):
            segment(unseen.scan, native, settings)
        with pytest.raises(ValueError, match="needs a model with a working grid"):
            list(segment_many([], native, settings))
    with pytest.raises(ValueError, match="needs a model with a working grid"):
        Recipe(grid=ModelGrid(None), adapt=Adapt())
    with pytest.raises(ValueError, match=r"adapt is 1; give Adapt\(\), True, False or None"):
        Settings(adapt=1)  # type: ignore[arg-type]


ALONE = Settings(1, confidence=False)


def test_labels_alone_are_the_same_labels(native: Model, unseen: Patient, tmp_path: Path) -> None:
    few = Volume(unseen.scan.hu[:, :, 8:20], unseen.scan.affine)
    for settings in (ALONE, replace(ALONE, body_mask=False, keep_context=True)):
        whole = segment(few, native, replace(settings, confidence=True))
        alone = segment(few, native, settings, threads=2)
        np.testing.assert_array_equal(alone.labels, whole.labels)
        assert len(np.unique(alone.labels)) > 5
        assert alone.confidence is None
        assert alone.record["settings"]["confidence"] is False
        assert alone.record["positions"] == whole.record["positions"]
        assert alone.record["cleaned"] == whole.record["cleaned"]
        for name, organ in alone.organs.items():
            expected = whole.organs[name]
            assert organ.confidence is None
            assert organ.probability_centroid_mm is None
            assert (organ.n_voxels, organ.box_mm) == (expected.n_voxels, expected.box_mm)
            assert organ.centroid_mm == expected.centroid_mm
    np.testing.assert_array_equal(alone.probability("liver"), whole.probability("liver"))
    alone.save(tmp_path / "out")
    organs = json.loads((tmp_path / "out" / "organs.json").read_text())["organs"]
    assert {organ["confidence"] for organ in organs.values()} == {None}


def test_labels_alone_are_refused_where_a_label_is_a_blend(
    models: dict[str, Model], unseen: Patient
) -> None:
    native, working = models["native"], models["working"]
    for model, settings, reason in (
        (native, Settings(confidence=False), "the stride is 4,4,1: give 1"),
        (native, Settings((1, 1, 2), confidence=False), "the stride is 1,1,2: give 1"),
        (working, ALONE, r"a grid of 6\.5 x 6 x 10 mm; .*native"),
    ):
        with pytest.raises(ValueError, match=reason):
            segment(unseen.scan, model, settings)
        with pytest.raises(ValueError, match=reason):
            list(segment_many([], model, settings))
    with pytest.raises(ValueError, match=r"refine is True; give Refine\(\), or None"):
        Settings(refine=True)  # type: ignore[arg-type]
    for need in ({"refine": Refine()}, {"probabilities": ("liver",)}):
        with pytest.raises(
            ValueError, match=r"labels alone leave no probabilities for .*; give up"
        ):
            Settings(1, confidence=False, **need)  # type: ignore[arg-type]


def test_a_recipe_takes_at_least_one_position_of_a_class() -> None:
    for recipe in ({"n_per_class": 0}, {"context_factor": 0}, {"n_per_class": 0.5}):
        with pytest.raises(ValueError, match=r"(n_per_class|context_factor) is 0.*; give a whole"):
            Recipe(**recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_are_at_least_one(threads: int, native: Model, unseen: Patient) -> None:
    with pytest.raises(ValueError, match="threads is"):
        segment(unseen.scan, native, threads=threads)


def scaled(scan: Volume, factors: tuple[float, float, float]) -> Volume:
    return Volume(scan.hu, scan.affine @ np.diag([*factors, 1.0]))


def test_a_native_model_warns_of_voxels_that_differ_by_more_than_a_quarter(
    models: dict[str, Model], unseen: Patient
) -> None:
    stride = Settings(stride=(24, 24, 10))
    for factors in ((1.3, 1, 1), (1, 0.75, 1), (1, 1, 1.26)):
        far = segment(scaled(unseen.scan, factors), models["native"], stride)
        (warning,) = far.record["warnings"]
        assert "the model learned on 5.00 x 5.00 x 12.00 mm" in warning
        assert warning in far.warnings
    for factors in ((1, 1, 1), (1.24, 0.81, 1.2)):
        near = segment(scaled(unseen.scan, factors), models["native"], stride)
        assert near.record["warnings"] == []
    far = segment(scaled(unseen.scan, (2, 2, 2)), models["working"], stride)
    assert far.record["warnings"] == []


@pytest.mark.parametrize("grid", GRIDS)
def test_a_scan_without_a_body_has_no_organs_and_says_so(
    grid: str, models: dict[str, Model], unseen: Patient
) -> None:
    foam = np.full(unseen.scan.hu.shape, -1000, np.int16)
    foam[10:60, 10:20] = -700
    result = segment(Volume(foam, unseen.scan.affine), models[grid])
    assert any("no body was found" in warning for warning in result.warnings)
    assert not result.labels.any()
    assert not any(organ.present for organ in result.organs.values())
    assert result.organs["liver"].probability_centroid_mm is None
    assert not result.probability("liver").any()
    json.loads(organs_json(result.organs))


def test_an_absurd_spacing_is_the_scan_s_fault_and_stops_only_it(
    models: dict[str, Model], files: list[Path], tmp_path: Path
) -> None:
    """Centimetres taken for millimetres, say: the working grid would not fit into memory."""
    huge = tmp_path / "huge.nii.gz"
    hu = np.random.default_rng(0).integers(-1000, 1000, (250, 250, 30)).astype(np.int16)
    write_volume(huge, Volume(hu, np.diag([99, 99, 99, 1.0])))
    reasons: list[InputError] = []
    mixed = [huge, files[0]]
    assert len(list(segment_many(mixed, models["working"], on_error=reasons.append))) == 1
    assert [error.path for error in reasons] == [str(huge)]
    assert "mm large, as no patient is; correct its sform" in str(reasons[0])


def test_one_path_is_not_many_scans(native: Model, files: list[Path]) -> None:
    for one in (files[0], str(files[0])):
        with pytest.raises(ValueError, match="scans is one path"):
            list(segment_many(one, native))  # type: ignore[arg-type]


# --- asked at the seed's positions, answered as by scikit-learn ----------------------------------


@dataclass(frozen=True, eq=False)
class Overheard(Forest):
    """A forest that remembers where it was asked, and its answers in float64."""

    asked: list[tuple[NDArray[np.int32], NDArray[np.float64]]] = field(default_factory=list)

    def probabilities(self, slab: Any, positions: Any, out: Any) -> None:
        super().probabilities(slab, positions, out)
        exact = np.empty(out.shape, np.float64)
        super().probabilities(slab, positions, exact)
        self.asked.append((positions.copy(), exact))


def slice_forest(scan: Volume, size: int) -> tuple[Any, Overheard]:
    """scikit-learn's forest on copied blocks of a slice, and ours that reads them in the scan."""
    from sklearn.ensemble import RandomForestClassifier

    hu, rng = scan.working, np.random.default_rng(2)
    spots = np.stack([np.zeros(300, int), *rng.integers(0, 512, (2, 300))], 1)
    # Labels with noise and leaves of several samples: probabilities other than 0 and 1.
    labels = np.digitize(hu[tuple(spots.T)] + rng.normal(0, 300, 300), (-500, 0, 80))
    estimator = RandomForestClassifier(20, min_samples_leaf=3, random_state=0, n_jobs=1)
    estimator.fit(gather_blocks(hu, spots, size).reshape(300, -1), labels)
    forest = Forest.from_sklearn(estimator, Block(size), 4)
    return estimator, Overheard(
        forest.nodes, forest.tree_starts, forest.leaf_table, forest.offsets, forest.n_classes
    )


@pytest.fixture(scope="module")
def slice_512() -> Volume:
    anatomy = phantom(FieldOfView((512, 512, 1), (0.8, 0.8, 5.0)), 3)
    return paint(anatomy, 3)


@pytest.mark.parametrize(("size", "n"), [(33, 16), (63, 8)])
def test_a_stride_as_wide_as_the_block_gives_the_seed_s_positions(
    size: int, n: int, slice_512: Volume
) -> None:
    _, forest = slice_forest(slice_512, size)
    classes = ClassTable.from_names(["liver", "spleen"])
    model = Model(forest, classes, Block(size), ModelGrid(None))
    segment(slice_512, model, Settings(stride=size, body_mask=False))
    ((positions, _),) = forest.asked
    assert len(positions) == n * n in (256, 64)
    centres = size // 2 + size * np.arange(n)
    expected = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1).reshape(-1, 2)
    np.testing.assert_array_equal(positions[:, 1:] - size // 2, expected)  # less the padding


def test_probabilities_are_scikit_learn_s_on_copied_blocks(slice_512: Volume) -> None:
    estimator, forest = slice_forest(slice_512, 33)
    grid_volume = to_model_grid(slice_512, ModelGrid(None))
    block_grid = BlockGrid(grid_volume.shape, (1, 29, 29))
    _, rows, cols = block_grid.centres
    assert rows[0] < 16  # blocks that reach beyond each side
    assert rows[-1] > 511 - 16
    centres = np.stack(np.meshgrid([0], rows, cols, indexing="ij"), -1).reshape(-1, 3)
    copied = gather_blocks(slice_512.working, centres, 33).reshape(len(centres), -1)
    expected = estimator.predict_proba(copied)
    assert len(np.unique(expected)) > 100
    with Workers(1) as workers:
        slices = SliceClassifier(grid_volume, forest, Block(33), block_grid, workers)
        slabs = probability_slabs(slices, None, workers)
        ((_, slab),) = slabs
    ((_, in_float64),) = forest.asked
    np.testing.assert_array_equal(in_float64, expected)
    np.testing.assert_array_equal(slab.reshape(expected.shape), expected.astype(np.float32))


# --- real scans -----------------------------------------------------------------------------------

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def real() -> Path:
    if not DATA.is_dir():
        pytest.skip("no real scans in ../shared/data")
    return DATA


@pytest.fixture(scope="module")
def real_models(real: Path) -> dict[str, Model]:
    """A model for each of the two labelled patients, learned from the other one alone."""
    dataset = find_cases(real / "labelled")
    recipe = Recipe(
        grid=ModelGrid((3.0, 3.0, 3.0), "piecewise"),
        n_per_class=200,
        forest=ForestSettings("extra_trees", n_trees=10),
    )
    return {
        unseen: train(
            dataset,
            Block(17, levels=(1, 3, 9)),
            replace(recipe, split=Split((learned,), test=(unseen,))),
            threads=2,
        )
        for learned, unseen in (("chest", "abdomen"), ("abdomen", "chest"))
    }


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["abdomen", "chest"])
def test_a_real_patient_unlike_the_only_one_known_is_the_right_way_round(
    name: str, real: Path, real_models: dict[str, Model], record_property: Any
) -> None:
    """Agreement with TotalSegmentator is reported; one patient teaches too little to ask for it."""
    model = real_models[name]
    assert set(model.training["cases"]) == {"abdomen", "chest"} - {name}
    (case,) = [c for c in find_cases(real / "labelled").cases if c.name == name]
    result = segment(case.image, model, threads=2)
    geometry = read_geometry(case.image)
    assert result.labels.shape == geometry.shape
    np.testing.assert_array_equal(result.scan.geometry.affine, geometry.affine)

    found = case_labels(case, model.classes, result.scan.volume)
    truth = np.where(found.labels == found.unlabelled, 0, found.labels)
    dice = dice_per_class(truth, result.labels, len(model.classes))
    for organ in result.organs:
        record_property(organ, round(float(dice[model.classes.index(organ)]), 3))
    # Measured .58 and .75, and 150 mm apart or more.
    assert dice[model.classes.index("liver")] > 0.3
    liver, spleen = (result.organs[organ].centroid_mm for organ in ("liver", "spleen"))
    assert liver is not None
    assert spleen is not None
    assert liver[0] > spleen[0] + 50
    assert not any(
        "swapped" in w for o in ("lung_right", "kidney_right") for w in result.organs[o].warnings
    )


@pytest.mark.real_data
def test_a_real_scan_of_another_region_is_segmented(
    real: Path, real_models: dict[str, Model], tmp_path: Path
) -> None:
    neck = real / "unlabelled" / "neck.nii.gz"
    result = segment(neck, real_models["abdomen"], threads=2)
    assert result.labels.shape == read_geometry(neck).shape
    result.save(tmp_path / "neck.nii.gz")
    labels, affine = read_labels(tmp_path / "neck.nii.gz")
    np.testing.assert_array_equal(labels, result.labels)
    np.testing.assert_array_equal(affine, result.scan.volume.affine)


@pytest.mark.real_data
def test_a_real_label_map_is_not_taken_for_a_scan(
    real: Path, real_models: dict[str, Model]
) -> None:
    with pytest.raises(InputError, match=r"labels\.nii\.gz: .*not HU"):
        segment(real / "dicom_slab" / "labels.nii.gz", real_models["chest"])
