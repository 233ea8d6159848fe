"""What the seed of this project fell into, each a behaviour that must not come back.

The patients here are boxes of known HU at known places, so that what is right is known without a
model of anatomy.
"""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_pipeline import stored_as

from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.errors import InputError
from organfast.grid import ModelGrid
from organfast.layouts import find_cases, write_case
from organfast.learning import Recipe, train
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.forest import ForestSettings
from organfast.nifti import Geometry, write_labels, write_volume
from organfast.pipeline import Settings, segment
from organfast.sampling import Split, split_patients
from organfast.segmentation import Cleaning
from organfast.volume import Volume

PACKAGE = Path(__file__).parents[1] / "organfast"
CLASSES = ClassTable.from_names(["liver", "spleen", "sternum"])
SPACING_MM = (3.0, 4.0, 6.0)
RAW = Settings(
    stride=(1, 1, 1),
    cleaning=Cleaning("none", fill_holes=False),
    body_mask=False,
    keep_context=True,
)
# Extra trees see every sample, and grow until each leaf is pure.
MEMORY = ForestSettings("extra_trees", n_trees=4)
EVERY_VOXEL = 10**6

# Class -> HU, and a box of voxels (x, y, z), RAS: the liver lies to the right and in front.
HU = {"background": -1000, "thorax_abdomen": 40, "liver": 110, "spleen": 170, "sternum": 600}
BOXES = {
    "liver": ((12, 18), (8, 15), (2, 6)),
    "spleen": ((3, 7), (3, 8), (4, 7)),
    "sternum": ((8, 11), (12, 16), (1, 8)),
}
SHAPE = (21, 17, 8)


def patient(
    seed: int, boxes: dict[str, Any] | None = None, hu: dict[str, int] | None = None
) -> tuple[Volume, NDArray[np.uint8]]:
    """A scan stored (x, y, z) with its labels: air, a body that fills rows 2 on, boxes in it."""
    labels = np.full(SHAPE, CLASSES.index("thorax_abdomen"), np.uint8)
    labels[:, :2] = 0
    for name, ((x0, x1), (y0, y1), (z0, z1)) in (boxes or BOXES).items():
        labels[x0:x1, y0:y1, z0:z1] = CLASSES.index(name)
    values = np.array([{**HU, **(hu or {})}[name] for name in CLASSES.names])
    noise = np.random.default_rng(seed).integers(-25, 26, SHAPE)
    affine = np.diag([*SPACING_MM, 1.0])
    affine[:3, 3] = (-30.0, -120.0, 50.0)
    return Volume((values[labels] + noise).astype(np.int16), affine), labels


def write(folder: Path, name: str, *made: Any, **changes: Any) -> None:
    write_case(folder, name, *patient(*made, **changes), CLASSES)


def learned(folder: Path, pattern: Block | None = None, **recipe: Any) -> Model:
    options: dict[str, Any] = {"grid": ModelGrid(None), "n_per_class": 60, "forest": MEMORY}
    return train(folder, pattern or Block(3), Recipe(**{**options, **recipe}))


# --- axes read as Z,Y,X from an X,Y,Z array -------------------------------------------------------


@pytest.mark.parametrize("grid", [ModelGrid(None), ModelGrid((2.0, 2.0, 3.0), "piecewise")])
@pytest.mark.parametrize(
    ("order", "signs"), [((0, 1, 2), (1, 1, 1)), ((0, 1, 2), (-1, -1, 1)), ((2, 0, 1), (1, -1, 1))]
)
def test_organs_are_found_at_their_place_in_the_patient(
    order: tuple[int, ...], signs: tuple[float, ...], grid: ModelGrid, tmp_path: Path
) -> None:
    """Three axes of different length and spacing: none can stand for another."""
    write(tmp_path / "cases", "p0", 0)
    model = learned(tmp_path / "cases", grid=grid)
    scan, _ = patient(1)
    write_volume(tmp_path / "ct.nii.gz", stored_as(scan, order, signs))
    result = segment(tmp_path / "ct.nii.gz", model, Settings(stride=(1, 1, 1)))
    assert result.labels.shape == tuple(SHAPE[axis] for axis in order)
    for name, box in BOXES.items():
        middle = [(low + high - 1) / 2 for low, high in box]
        expected = scan.to_mm(np.array(middle))
        organ = result.organs[name]
        assert organ.centroid_mm is not None
        # Half a voxel: a row of an organ's edge may be taken for what lies beside it.
        difference = np.abs(np.array(organ.centroid_mm) - expected)
        assert (difference <= 0.5 * np.array(SPACING_MM)).all(), (name, difference)


# --- the arguments of confusion_matrix swapped ----------------------------------------------------


def test_rows_of_the_confusion_are_the_truth(tmp_path: Path) -> None:
    """The test patient's spleen looks like a liver: spleens are taken for livers, never back."""
    write(tmp_path, "p0", 0)
    write(tmp_path, "p1", 1, hu={"spleen": HU["liver"]})
    model = learned(tmp_path, Block(1), split=Split(("p0",), test=("p1",)))
    scores = model.scores["test"]
    counts = np.array(scores["confusion"])
    liver, spleen = CLASSES.index("liver"), CLASSES.index("spleen")
    assert counts[spleen, liver] > 40
    assert counts[liver, spleen] < 10
    _, labels = patient(1)
    n_voxels = np.bincount(labels.ravel(), minlength=len(CLASSES))
    np.testing.assert_array_equal(counts.sum(axis=1), np.minimum(n_voxels, 60))
    np.testing.assert_allclose(scores["block_accuracy"], counts.trace() / counts.sum())


# --- the class order from a Python set ------------------------------------------------------------


def test_the_order_of_classes_does_not_depend_on_the_process(tmp_path: Path) -> None:
    """Python hashes text differently in every process."""
    names = ["liver", "spleen", "kidney_left", "tumour", "kidney_right", "aorta", "node"]
    for known, chosen in (("known", names), ("own", ["tumour", "node", "stent", "clip"])):
        labels = np.arange(len(chosen), dtype=np.uint8).reshape(-1, 1, 1) + 1
        volume = Volume(np.zeros(labels.shape, np.int16), np.diag([3.0, 3, 3, 1]))
        folder = tmp_path / known / "p0"
        (folder / "segmentations").mkdir(parents=True)
        write_volume(folder / "ct.nii.gz", volume)
        for label, name in enumerate(chosen, start=1):
            mask = (labels == label).astype(np.uint8)
            write_labels(
                folder / "segmentations" / f"{name}.nii.gz", mask, Geometry.of_volume(volume)
            )
    code = (
        "import sys; from organfast.layouts import dataset_classes, find_cases\n"
        "for folder in sys.argv[1:]: print(*dataset_classes(find_cases(folder)).names)"
    )
    folders = [str(tmp_path / "known"), str(tmp_path / "own")]
    said = {
        subprocess.run(
            [sys.executable, "-c", code, *folders],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (0, 1, 2)
    }
    (lists,) = said
    known, own = (line.split() for line in lists.splitlines())
    by_radlex = [name for name in ClassTable.default().names if name in known]
    assert (
        known
        == by_radlex
        == [
            *(
                "background",
                "thorax_abdomen",
                "liver",
                "spleen",
                "aorta",
                "kidney_right",
                "kidney_left",
            )
        ]
    )
    assert own == ["background", "thorax_abdomen", "clip", "node", "stent", "tumour"]


# --- the enlargement aligned to corners instead of block centres ----------------------------------


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tells dark from bright by a single voxel."""
    folder = tmp_path_factory.mktemp("halves")
    write(folder, "p0", 0)
    return learned(folder, Block(1), n_per_class=EVERY_VOXEL)


@pytest.mark.parametrize("edge", [40, 256, 470])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_is_found_half_way_between_two_blocks(
    edge: int, axis: int, half_model: Model
) -> None:
    """Side-by-side blocks of 33 in 512 pixels; blocks spread from corner to corner would miss the
    edge by up to half a block."""
    hu = np.full((512, 512, 1), HU["thorax_abdomen"], np.int16)
    np.moveaxis(hu, axis, 0)[edge:] = HU["liver"]
    scan = Volume(hu, np.diag([0.8, 0.8, 3.0, 1.0]))
    settings = Settings(33, cleaning=RAW.cleaning, body_mask=False, keep_context=True)
    labels = np.moveaxis(segment(scan, half_model, settings).labels, axis, 0)[:, 250, 0]
    centres = 16 + 33 * np.arange(16)
    before, after = centres[centres < edge].max(), centres[centres >= edge].min()
    expected = np.where(np.arange(512) <= (before + after) // 2, "thorax_abdomen", "liver")
    found = np.array(CLASSES.names)[labels]
    np.testing.assert_array_equal(found, expected)


def test_at_a_block_s_centre_stands_what_the_classifier_said(half_model: Model) -> None:
    rng = np.random.default_rng(3)
    hu = rng.choice(list(HU.values()), (40, 52, 7)).astype(np.int16)
    scan = Volume(hu, np.diag([2.0, 2.0, 4.0, 1.0]))
    dense = segment(scan, half_model, RAW)
    sparse = segment(scan, half_model, Settings((5, 9, 2), body_mask=False))
    centres = np.ix_(np.arange(2, 40, 5), np.arange(4, 52, 9), np.arange(1, 7, 2))
    for name in CLASSES.names:
        at_voxels, enlarged = dense.probability(name), sparse.probability(name)
        np.testing.assert_array_equal(enlarged[centres], at_voxels[centres])


# --- different HU scaling in training and in inference, and a scaling that wraps ------------------


@pytest.mark.parametrize(
    ("grid", "stride"),
    [
        (ModelGrid(None), 1),
        (ModelGrid(SPACING_MM, "piecewise"), 1),
        # Three model voxels to one of the scan, whose middles are those of every third.
        (ModelGrid(tuple(s / 3 for s in SPACING_MM), "piecewise"), 3),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize("pattern", [Block(3), Block(5, levels=(1, 3)), Block(3, slices=3)])
def test_a_forest_that_has_learned_every_voxel_repeats_every_label(
    grid: ModelGrid, stride: int, pattern: Block, tmp_path: Path
) -> None:
    """So training and inference read the same numbers at the same places, up to every edge."""
    write(tmp_path, "p0", 0)
    model = learned(tmp_path, pattern, grid=grid, n_per_class=EVERY_VOXEL)
    scan, labels = patient(0)
    settings = Settings((stride, stride, stride), cleaning=RAW.cleaning, body_mask=False)
    result = segment(scan, model, settings)
    organs = np.isin(labels, CLASSES.organs)
    np.testing.assert_array_equal(result.labels, np.where(organs, labels, 0))
    if stride == 1:
        np.testing.assert_array_equal(result.confidence, 255)


@pytest.mark.parametrize("table", ["identity", "piecewise"])
def test_hu_that_eight_bits_would_confuse_are_told_apart(table: str, tmp_path: Path) -> None:
    """2008 HU apart the seed's scaling wraps to the same grey level; 12 HU apart it may be one."""
    twins = {"liver": 40, "thorax_abdomen": 52, "spleen": 40 + 2008, "sternum": 52 + 2008}
    values = np.array([{**HU, **twins}[name] for name in CLASSES.names])
    _, labels = patient(0)
    scan = Volume(values[labels].astype(np.int16), np.diag([*SPACING_MM, 1.0]))
    write_case(tmp_path, "p0", scan, labels, CLASSES)
    model = learned(tmp_path, Block(1), grid=ModelGrid(SPACING_MM, table))
    np.testing.assert_array_equal(segment(scan, model, RAW).labels, labels)


# --- no prediction near the slice edge ------------------------------------------------------------


@pytest.mark.parametrize("pattern", [Block(1), Block(9), Block(33, levels=(1, 3))])
@pytest.mark.parametrize("stride", [(1, 1, 1), (4, 4, 1), (33, 33, 3), (63, 63, 40)])
def test_every_voxel_of_a_scan_gets_a_prediction(
    pattern: Block, stride: tuple[int, int, int], tmp_path: Path
) -> None:
    """Also the corners of a slice, with blocks wider than the slice."""
    write(tmp_path, "p0", 0)
    model = learned(tmp_path, pattern, n_per_class=10)
    settings = Settings(stride, cleaning=RAW.cleaning, body_mask=False)
    result = segment(patient(1)[0], model, settings)
    assert (result.confidence > 0).all()
    sums = sum(result.probability(name).astype(int) for name in CLASSES.names)
    # Five classes, each rounded to 1/255.
    np.testing.assert_allclose(sums, 255, atol=2.5)


@pytest.mark.parametrize("side", range(3))
@pytest.mark.parametrize("end", [0, 1])
def test_an_organ_at_the_edge_of_a_scan_is_found_up_to_the_edge(
    side: int, end: int, tmp_path: Path
) -> None:
    box = [(8, 13), (5, 10), (3, 6)]
    box[side] = (SHAPE[side] - 4, SHAPE[side]) if end else (0, 4)
    boxes = {**BOXES, "spleen": tuple(box)}
    for n in range(2):
        write(tmp_path, f"p{n}", n, boxes)
    model = learned(tmp_path, Block(5), n_per_class=EVERY_VOXEL)
    result = segment(patient(0, boxes)[0], model, RAW)
    rim = np.take(result.labels, -end, axis=side) == CLASSES.index("spleen")
    assert rim.sum() == np.prod([high - low for low, high in np.delete(box, side, axis=0)])
    names = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
    assert result.organs["spleen"].cut_off == (names[side][end],)


# --- blocks of one patient on both sides of a split -----------------------------------------------


@pytest.fixture
def visceral(tmp_path: Path) -> Path:
    """Four patients with two scans each."""
    for number in range(8):
        scan, labels = patient(number)
        name = f"1000010{number // 2}_{1 + number % 2}_CTce_ThAb"
        write_volume(tmp_path / f"{name}.nii.gz", scan)
        for radlex, organ in ((58, "liver"), (86, "spleen")):
            mask = (labels == CLASSES.index(organ)).astype(np.uint8)
            write_labels(tmp_path / f"{name}_{radlex}_4.nii.gz", mask, Geometry.of_volume(scan))
    return tmp_path


@pytest.mark.parametrize("seed", range(3))
def test_all_scans_of_a_patient_are_on_one_side(seed: int, visceral: Path) -> None:
    dataset = find_cases(visceral)
    assert len(dataset.cases) == 8
    assert len(dataset.patients) == 4
    model = learned(visceral, n_per_class=5, seed=seed)
    split = model.training["split"]
    patients = [case.patient for case in dataset.cases if case.name in model.training["cases"]]
    assert len(patients) == 2 * len(split["train"])
    assert set(patients) == set(split["train"])
    assert set(split["test"]).isdisjoint(patients)
    assert model.scores["test"]["n_patients"] == len(split["test"]) == 1
    n_classes = len(model.classes)
    # Two scans of the one test patient, at most 5 blocks of a class in each.
    assert model.scores["test"]["n_blocks"] == 2 * 5 * n_classes


def test_a_patient_on_both_sides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patient a stands twice"):
        Split(("a", "b"), test=("a",))
    with pytest.raises(ValueError, match="patient a stands twice"):
        Split(("a",), validation=("a",))
    split = split_patients(["a", "b", "c", "a", "b", "c"])
    assert sorted((*split.train, *split.validation, *split.test)) == ["a", "b", "c"]


# --- weights carried from fold to fold ------------------------------------------------------------


def test_a_fold_knows_nothing_of_the_fold_before(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path, f"p{n}", n)
    alone = learned(tmp_path, split=Split(("p0", "p1"), test=("p2",)))
    before = learned(tmp_path, split=Split(("p1", "p2"), test=("p0",)))
    after = learned(tmp_path, split=Split(("p0", "p1"), test=("p2",)))
    assert before.digest != alone.digest
    assert after.digest == alone.digest
    assert after.scores == alone.scores


# --- pickled models -------------------------------------------------------------------------------


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_a_model_file_holds_no_code_and_a_pickle_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "cases", "p0", 0)
    path = tmp_path / "m.organfast"
    save_model(learned(tmp_path / "cases"), path)
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")  # safetensors: a length, JSON, raw arrays
    assert content[8:9] == b"{"
    assert content[8 : 8 + n].rstrip().endswith(b"}")
    for code in (b"sklearn.", b"cnumpy", b"builtins"):
        assert code not in content

    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    pickle.loads(bomb)
    assert trace.exists()  # it works
    trace.unlink()
    for tampered in (bomb, content[:8] + bomb + content[8:], content + bomb):
        path.write_bytes(tampered)
        with pytest.raises(InputError, match=r"m\.organfast"):
            load_model(path)
    assert not trace.exists()


def test_nothing_in_the_package_unpickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            loaders = {"pickle", "joblib", "cloudpickle", "dill", "shelve", "marshal"}
            assert not {m.split(".")[0] for m in modules} & loaders, path.name
            if isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", path.name
