"""Freeze small outputs of the kernels: a later change that moves one of them must say so.

    python tools/make_golden.py       # writes tests/golden/kernels.npz

``tests/test_golden.py`` compares and never writes; a missing file is a failure. Run this only when
a result is meant to change, and tell why in the commit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "kernels.npz"


def slab_of_noise() -> NDArray[np.int16]:
    """(2, 20, 24) int16: HU from padding to bone, the same on every machine."""
    random = np.random.default_rng(20)
    return random.integers(-2048, 1500, (2, 20, 24)).astype(np.int16)


def outputs() -> dict[str, NDArray[np.generic]]:
    """Name -> output of a kernel on a seeded input; exact on every machine.

    The inputs are integers and uniform random numbers: nothing of them goes through a
    transcendental function, whose last bit differs from one C library to the next.
    """
    from organfast.anatomy import ClassTable
    from organfast.blocks import Block, gather_blocks
    from organfast.grid import GridVolume, ModelGrid, levels_slab, to_model_grid
    from organfast.metrics import confusion
    from organfast.models.forest import NODE, Forest
    from organfast.probability import enlarge
    from organfast.segmentation import Cleaning, clean
    from organfast.volume import Volume

    random = np.random.default_rng(21)
    hu = slab_of_noise()
    pattern = Block(5, levels=(1, 3), slices=3)
    grid_volume = GridVolume(hu)
    slab = levels_slab(grid_volume, pattern, 0, 2)
    volume = Volume(np.asfortranarray(hu.transpose(2, 1, 0)), np.diag([0.9, 1.1, 5.0, 1.0]))
    resampled = to_model_grid(volume, ModelGrid((1.5, 1.5, 3.0), "piecewise"))

    nodes = np.zeros(3, NODE)
    nodes["threshold"], nodes["feature"], nodes["left"] = (-100, 0, 0), (7, 0, 0), (1, ~0, ~3)
    starts, table = np.array([0, 3]), np.array([[0.25, 0.125, 0.625]])
    forest = Forest(nodes, starts, table, pattern.offsets, 3)
    k, i, j = np.indices((2, 20, 24)).reshape(3, -1)
    positions = (np.stack([k, i, j], axis=1) + pattern.reach).astype(np.int32)
    probabilities = np.empty((len(positions), 3))
    forest.probabilities(slab, positions, probabilities)

    coarse = random.random((5, 6, 4), np.float32)
    coarse /= np.float32(4)
    labels, confidence = enlarge(coarse, (20, 24), 4)

    classes = ClassTable.from_names(["liver", "spleen"])
    islands = random.integers(0, 4, (6, 20, 24)).astype(np.uint8)
    before = islands.copy()
    clean(islands, classes, Cleaning("dust", dust_ml=0.003), voxel_ml=0.001)
    return {
        "levels": slab,
        "resampled": resampled.hu,
        "gathered": gather_blocks(hu, 7, 5, window=(-160, 240)),
        "forest": probabilities,
        "enlarged_labels": labels,
        "enlarged_confidence": confidence,
        "cleaned": islands,
        "confusion": confusion(before, islands, 4),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **outputs())
    print(f"{GOLDEN.relative_to(ROOT)}: {GOLDEN.stat().st_size} bytes")
