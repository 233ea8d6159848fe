"""The slow way equals the definition, and the certificate sees where the fast way does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from networks import network

from organfast.blocks import Block, Context
from organfast.calibration import Temperature
from organfast.certificate import certify
from organfast.cli import run
from organfast.grid import GridVolume, hu_lookup
from organfast.models.classifier import Model, load_model
from organfast.models.forest import Forest
from organfast.pipeline import segment
from organfast.recomputation import copied_features, recomputed_probabilities

PATTERNS = [
    Block(5),
    Block(5, levels=(1, 3, 4), slices=3),
    Context(n=40, widths=(1, 2, 5), reach_mm=(9, 9, 12), spacing_mm=(3, 3, 4)),
]


@pytest.fixture(scope="module")
def model(model_file: Path) -> Model:
    return load_model(model_file)


def volume_of(seed: int = 0) -> GridVolume:
    hu = np.random.default_rng(seed).integers(-2048, 3000, (6, 9, 8)).astype(np.int16)
    return GridVolume(hu, table=hu_lookup("piecewise"), hu_table="piecewise")


@pytest.mark.parametrize("pattern", PATTERNS, ids=["block", "levels", "context"])
def test_copied_features_are_those_of_the_definition(pattern: Any) -> None:
    volume = volume_of()
    plain = naive.through_table(volume.hu, volume.table, volume.air)
    levels = [
        naive.box_level(plain, w, d, volume.air, pattern.reach, (0, 6))
        for w, d in zip(pattern.widths, pattern.depths, strict=True)
    ]
    corners = [(0, 0, 0), (5, 8, 7), (0, 8, 0), (3, 4, 4), (5, 0, 7)]
    expected = naive.gather_features(
        np.stack(levels), pattern.offsets, np.array(corners) + pattern.reach
    )
    np.testing.assert_array_equal(copied_features(volume, pattern, np.array(corners)), expected)


def test_trees_are_walked_as_by_definition(model: Model) -> None:
    forest = model.classifier
    assert isinstance(forest, Forest)
    volume = volume_of(1)
    positions = np.array([(0, 0, 0), (5, 8, 7), (2, 3, 4)], np.int32)
    pattern = model.pattern
    plain = naive.through_table(volume.hu, volume.table, volume.air)
    slab = np.stack(
        [
            naive.box_level(plain, w, d, volume.air, pattern.reach, (0, 6))
            for w, d in zip(pattern.widths, pattern.depths, strict=True)
        ]
    )
    expected = naive.walk_forest(
        forest.nodes,
        forest.tree_starts,
        forest.leaf_table,
        slab,
        forest.offsets,
        positions + np.array(pattern.reach),
    )
    bare = replace(model, calibration=None)
    np.testing.assert_array_equal(recomputed_probabilities(bare, volume, positions), expected)
    warm = replace(model, calibration=Temperature(0.5))
    found = recomputed_probabilities(warm, volume, positions)
    square = np.maximum(expected, 1e-4) ** 2
    np.testing.assert_allclose(found, square / square.sum(axis=1, keepdims=True), rtol=1e-9)
    with pytest.raises(ValueError, match="positions must be rows"):
        recomputed_probabilities(model, volume, np.array([(6, 0, 0)], np.int32))


def test_a_forest_is_certified(model: Model, scan_file: Path) -> None:
    found = certify(scan_file, model, 300, stride_one=False)
    assert found.n_voxels == 300
    assert found.n_positions > 300
    assert found.largest_difference < 1e-6  # float32 beside float64
    assert found.flipped_positions == found.flipped_voxels == 0
    assert found.tied < 15  # eight trees are often of two minds
    assert found.stride == model.stride[::-1]
    assert found == certify(scan_file, model, 300, stride_one=False, threads=2)
    with pytest.raises(ValueError, match="n_voxels is 0"):
        certify(scan_file, model, 0)


def test_stride_one_is_compared(model: Model, scan_file: Path) -> None:
    found = certify(scan_file, model, 20)
    assert found.stride_one is not None
    assert found.stride_one.settings["stride"] == (1, 1, 1)
    assert found.stride_one.share_asked is not None
    assert found.stride_one.share_asked > 10
    assert 0 < found.stride_one.agreement.differing < 0.3


def test_a_network_is_certified(model: Model, scan_file: Path) -> None:
    cnn = network("towers", Block(9))
    classes = replace(model.classes, structures=model.classes.structures[: cnn.n_classes])
    asked = Model(cnn, classes, Block(9), model.grid, (2, 4, 4), calibration=Temperature(0.8))
    found = certify(scan_file, asked, 60, stride_one=False)
    assert found.largest_difference < 1e-5
    assert found.flipped_voxels == 0


class Broken(Forest):
    """One that says another class at every seventh position."""

    def probabilities(self, slab: Any, positions: Any, out: Any) -> None:
        super().probabilities(slab, positions, out)
        out[::7] = np.roll(out[::7], 1, axis=1)


def test_an_error_of_the_fast_way_is_seen(
    model: Model, model_file: Path, scan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = model.classifier
    assert isinstance(forest, Forest)
    broken = Broken(
        forest.nodes, forest.tree_starts, forest.leaf_table, forest.offsets, forest.n_classes
    )
    found = certify(scan_file, replace(model, classifier=broken), 300, stride_one=False)
    assert found.largest_difference > 0.3
    assert found.flipped_positions > 0
    assert found.flipped_voxels > 0
    monkeypatch.setattr(
        "organfast.certificate.load_model", lambda _: replace(model, classifier=broken)
    )
    assert run(["verify", str(scan_file), "-m", str(model_file), "--no-stride-one"]) == 1


def test_a_scan_without_a_body_is_certified_too(model: Model) -> None:
    noise = np.random.default_rng(0).integers(-1024, -900, (40, 40, 20)).astype(np.int16)
    air = (noise, np.diag([5.0, 5, 8, 1]))
    assert not segment(air, model).labels.any()
    found = certify(air, model, 30, stride_one=False)
    assert (found.n_voxels, found.n_positions, found.largest_difference) == (0, 0, 0)


def test_the_command_certifies(
    scan_file: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(scan_file), "-m", str(model_file), "--voxels", "40"]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert "40 voxels recomputed the slow way" in told
    assert "voxels of another label              0" in told
    assert "stride 1 instead of the model's" in told
    assert run([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["flipped_voxels"] == 0
    assert record["stride_one"]["agreement"]["differing"] > 0
