"""Write the golden files: small inputs and what this version makes of them.

python tools/make_golden.py CASE...     # or `all`; without a case: say what would change

tests/test_golden.py computes the same from the stored inputs and compares. It never writes a golden
file: one that is absent is a failure, and one that changed is a decision, made here and committed
with its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.blocks import Block, gather_blocks
from organfast.grid import GridVolume, ModelGrid, hu_lookup, to_model_grid
from organfast.layouts import write_case
from organfast.learning import Recipe, train
from organfast.levels import levels_slab
from organfast.metrics import confusion
from organfast.models.classifier import load_model, save_model
from organfast.models.forest import Forest, ForestSettings, train_forest
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom, phantom_names
from organfast.pipeline import Settings, segment
from organfast.probability import enlarge
from organfast.segmentation import Cleaning, clean
from organfast.volume import Volume

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MODEL = GOLDEN / "tiny.organfast"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """Inputs that are made once and stored, and what is computed of them each time."""

    inputs: Callable[[], Arrays]
    outputs: Callable[[Arrays], Arrays]


def random_hu(shape: tuple[int, ...], seed: int) -> NDArray[np.int16]:
    """Voxels with padding, extremes and few values, so that files stay small."""
    rng = np.random.default_rng(seed)
    hu = (rng.integers(-8, 9, shape) * 25).astype(np.int16)
    odd = rng.random(shape) < 0.05
    hu[odd] = rng.choice([-32768, -3024, -1025, -1024, -161, 241, 3071, 32767], odd.sum())
    return hu


# --- the kernels ----------------------------------------------------------------------------------

FOREST_BLOCK = Block(5, levels=(1, 3))


def forest_inputs() -> Arrays:
    pk, pr, pc = FOREST_BLOCK.reach
    slab = random_hu((2, 1 + 2 * pk, 16 + 2 * pr, 20 + 2 * pc), 1)
    rng = np.random.default_rng(2)
    low, high = (pk, pr, pc), (pk + 1, pr + 16, pc + 20)
    positions = rng.integers(low, high, (60, 3)).astype(np.int32)
    k, i, j = (positions[:, None] + FOREST_BLOCK.offsets[None, :, 1:]).transpose(2, 0, 1)
    features = slab[FOREST_BLOCK.offsets[:, 0], k, i, j].astype(np.float32)
    labels = np.digitize(features[:, 12] + rng.normal(0, 80, 60), (-60, 60))
    settings = ForestSettings(n_trees=7, min_samples_leaf=2)  # leaves with shares
    forest = train_forest(features, labels, settings, FOREST_BLOCK, 4)
    return {"slab": slab, "positions": positions, **forest.arrays()}


def forest_outputs(given: Arrays) -> Arrays:
    forest = Forest.from_arrays(given, FOREST_BLOCK.offsets, 4)
    probabilities = np.empty((len(given["positions"]), 4))
    forest.probabilities(given["slab"], given["positions"], probabilities)
    return {"probabilities": probabilities}


def enlarge_inputs() -> Arrays:
    votes = np.random.default_rng(3).multinomial(8, np.full(7, 1 / 7), (5, 6))
    return {"probabilities": (votes / 8).astype(np.float32)}


def enlarge_outputs(given: Arrays) -> Arrays:
    labels, confidence = enlarge(given["probabilities"], (37, 52), (7, 9))
    return {"labels": labels, "confidence": confidence}


def gather_inputs() -> Arrays:
    centres = np.array([[0, 0], [2, 36], [20, 18], [39, 0], [39, 36]])
    return {"hu": random_hu((40, 37), 4), "centres": centres}


def gather_outputs(given: Arrays) -> Arrays:
    hu, centres = given["hu"], given["centres"]
    return {
        "raw": gather_blocks(hu, centres, 9),
        "windowed": gather_blocks(hu, centres, 9, (-160, 240)),
        "strided": gather_blocks(hu, 13, 3, (-1000, 1000)),
    }


def levels_inputs() -> Arrays:
    return {"hu": random_hu((4, 11, 13), 5)}


def levels_outputs(given: Arrays) -> Arrays:
    pattern = Block(3, levels=(1, 2, 5), slices=3)
    names = ("identity", "piecewise")
    volumes = {
        name: GridVolume(given["hu"], table=hu_lookup(name), hu_table=name) for name in names
    }
    return {name: levels_slab(volume, pattern, 0, 2) for name, volume in volumes.items()}


def resample_inputs() -> Arrays:
    return {"hu": random_hu((14, 15, 7), 6), "affine": np.diag([-0.9, 0.7, 2.5, 1.0])}


def resample_outputs(given: Arrays) -> Arrays:
    volume = Volume(given["hu"], given["affine"])
    coarse = to_model_grid(volume, ModelGrid((1.5, 1.5, 3.0), "piecewise"))
    fine = to_model_grid(volume, ModelGrid((1.5, 0.5, 2.5), "identity"))
    return {
        "coarse": coarse.hu,
        "fine": fine.hu,
        "steps": np.array([coarse.step, coarse.offset, fine.step, fine.offset]),
    }


def clean_inputs() -> Arrays:
    return {"labels": np.random.default_rng(7).integers(0, 4, (6, 20, 24)).astype(np.uint8)}


def clean_outputs(given: Arrays) -> Arrays:
    classes = ClassTable.from_names(["liver", "spleen"])
    labels = given["labels"].copy()
    clean(labels, classes, Cleaning("dust", dust_ml=0.003), voxel_ml=0.001)
    return {"labels": labels, "confusion": confusion(given["labels"], labels, 4)}


# --- the phantom ----------------------------------------------------------------------------------


def phantom_inputs() -> Arrays:
    return {"shape": np.array([40, 36, 30]), "spacing_mm": np.array([9.5, 9.5, 20.0])}


def phantom_outputs(given: Arrays) -> Arrays:
    """Voxels and mean HU of each structure: which voxel is whose hangs on the last bits of sines
    and cosines, which differ between C libraries."""
    x, y, z = given["shape"].tolist()
    field = FieldOfView((x, y, z), tuple(given["spacing_mm"].tolist()))
    anatomy = phantom(field, 5)
    labels, hu = anatomy.labels.ravel(), paint(anatomy, 5).hu.ravel()
    counts = np.bincount(labels, minlength=max(phantom_names()) + 1)
    sums = np.bincount(labels, hu, minlength=len(counts))
    return {"n_voxels": counts, "mean_hu": sums / np.maximum(counts, 1)}


# --- a scan and a model ---------------------------------------------------------------------------


def scan_inputs() -> Arrays:
    anatomy = phantom(FieldOfView((36, 28, 16), (10.5, 10.5, 34.0)), 1)
    scan = paint(anatomy, 1)
    affine = scan.affine @ np.diag([-1.0, -1.0, 1.0, 1.0])  # stored to the left and to the back
    affine[:2, 3] = -scan.affine[:2, 3]
    return {"hu": scan.hu[::-1, ::-1] // 8 * 8, "affine": affine}


def scan_outputs(given: Arrays) -> Arrays:
    model = load_model(MODEL)
    volume = Volume(given["hu"], given["affine"])
    result = segment(volume, model, Settings(stride=(2, 3, 2)))
    organs = result.organs.values()
    nowhere = (np.nan,) * 3
    return {
        "model": np.array(model.digest),
        "labels": result.labels,
        "confidence": result.confidence,
        "liver": result.probability("liver"),
        "names": np.array(list(result.organs)),
        "n_voxels": np.array([organ.n_voxels for organ in organs]),
        "present": np.array([organ.present for organ in organs]),
        "centroid_mm": np.array([organ.centroid_mm or nowhere for organ in organs]),
        "probability_centroid_mm": np.array(
            [organ.probability_centroid_mm or nowhere for organ in organs]
        ),
    }


def make_model(folder: Path) -> None:
    """A model that is loaded by every later version: small, and good enough to find organs."""
    names = ("thorax_abdomen", "liver", "lung_right", "lung_left", "aorta")
    classes = ClassTable.default().keep(names)
    for n in range(3):
        anatomy = phantom(FieldOfView((48, 44, 24), (8.0, 8.0, 24.0)), n)
        labels = class_labels(anatomy, classes)
        write_case(folder, f"p{n}", paint(anatomy, n), labels, classes)
    recipe = Recipe(
        grid=ModelGrid((8.0, 8.0, 24.0), "piecewise"),
        n_per_class=150,
        forest=ForestSettings(n_trees=4, min_samples_leaf=4),
        classes=classes,
    )
    save_model(train(folder, Block(5, levels=(1, 3), slices=3), recipe), MODEL)


CASES = {
    "forest": Case(forest_inputs, forest_outputs),
    "enlarge": Case(enlarge_inputs, enlarge_outputs),
    "gather": Case(gather_inputs, gather_outputs),
    "levels": Case(levels_inputs, levels_outputs),
    "resample": Case(resample_inputs, resample_outputs),
    "clean": Case(clean_inputs, clean_outputs),
    "phantom": Case(phantom_inputs, phantom_outputs),
    "scan": Case(scan_inputs, scan_outputs),
}


def path_of(name: str) -> Path:
    return GOLDEN / f"{name}.npz"


def read(name: str) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Stored inputs and outputs of a case."""
    with np.load(path_of(name)) as file:
        stored = {key: file[key] for key in file.files}
    inputs = {k.removeprefix("in_"): v for k, v in stored.items() if k.startswith("in_")}
    outputs = {k.removeprefix("out_"): v for k, v in stored.items() if k.startswith("out_")}
    return inputs, outputs


def write(name: str) -> None:
    case = CASES[name]
    inputs = case.inputs()
    outputs = case.outputs(inputs)
    stored = {f"in_{k}": v for k, v in inputs.items()} | {f"out_{k}": v for k, v in outputs.items()}
    np.savez_compressed(path_of(name), **stored)


def changed(name: str) -> list[str]:
    """Outputs of a case that are no longer the stored ones, to the last bit."""
    inputs, expected = read(name)
    found = CASES[name].outputs(inputs)
    return [k for k in found if k not in expected or found[k].tobytes() != expected[k].tobytes()]


def main(arguments: list[str]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    if not arguments:
        for name in CASES:
            state = "absent"
            if path_of(name).exists():
                state = ", ".join(changed(name)) or "unchanged"
            print(f"{name:10} {state}")
        return
    wanted = [*CASES, "model"] if arguments == ["all"] else arguments
    unknown = set(wanted) - {*CASES, "model"}
    if unknown:
        raise SystemExit(f"no case {unknown.pop()}; give model, {', '.join(CASES)} or all")
    if "model" in wanted:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder))
    for name in CASES:
        if name in wanted:
            write(name)
    for path in sorted(GOLDEN.iterdir()):
        print(f"{path.stat().st_size:7,} bytes  {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
