"""Exported networks, read by other programs: what they give is what the slow twin gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesClassifier

from organfast.anatomy import ClassTable
from organfast.blocks import Block
from organfast.cli import run
from organfast.grid import ModelGrid
from organfast.models import export
from organfast.models.architecture import architecture
from organfast.models.classifier import Model
from organfast.models.cnn import Cnn
from organfast.models.export import FORMATS, export_cnn, export_model
from organfast.models.forest import Forest

pytest.importorskip("jax")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("flatbuffers")

WINDOW = (-160.0, 240.0)
CLASSES = ClassTable.from_names(("background", "liver", "spleen", "aorta", "rest"))
MERGE = np.array([0, 1, 2, 2, 4])  # class 3 has no label
SMALL = Block(9, (1, 3), 3)
REAL = Path(__file__).parents[2] / "shared" / "data" / "labelled" / "abdomen.nii.gz"


@pytest.fixture(autouse=True, scope="module")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def network(name: str, block: Block) -> Cnn:
    described = architecture(name, block)
    rng = np.random.default_rng(0)
    params = {}
    for key, shape in described.parameter_shapes(len(MERGE)).items():
        scale = 0.3 if key.endswith("bias") else (2 / prod(shape[:-1])) ** 0.5
        params[key] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return Cnn(described, block, WINDOW, params, MERGE, len(CLASSES))


def model(classifier: Cnn) -> Model:
    pattern, grid = classifier.pattern, ModelGrid((3.0, 3.0, 3.0), "piecewise")
    return Model(classifier, CLASSES, pattern, grid)  # type: ignore[arg-type]


def ran(path: Path, blocks: np.ndarray) -> np.ndarray:
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {"blocks": blocks})[0]
    from jax import export as jax_export

    return np.asarray(jax_export.deserialize(bytearray(path.read_bytes())).call(blocks))


def expected(cnn: Cnn, blocks: np.ndarray) -> np.ndarray:
    inputs = naive.cnn_inputs(blocks, cnn.window, cnn.standardise)
    return naive.cnn_probabilities(cnn.architecture, cnn.params, inputs, cnn.merge, cnn.n_classes)


def some_blocks(block: Block, n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (n, len(block.levels), block.slices, block.size, block.size)
    blocks = rng.integers(-400, 400, shape, np.int16)
    blocks[-1] = rng.integers(-32768, 32768, shape[1:])
    return blocks


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "cnn",
    [
        network("readme", Block(17)),  # zeros at the end
        network("readme", Block(15, slices=3)),  # zeros at both ends
        network("readme-pool", Block(13)),
        network("towers", SMALL),
        replace(network("towers", SMALL), standardise=True, window=(-1000.0, 1000.0)),
    ],
    ids=lambda cnn: f"{cnn.architecture.name}-{cnn.pattern.size}-{cnn.standardise}",
)
def test_a_file_gives_what_the_slow_twin_gives(cnn: Cnn, to: str, tmp_path: Path) -> None:
    path = tmp_path / f"network.{to}"
    export_cnn(cnn, path, to)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    blocks = some_blocks(cnn.pattern, 3)
    wanted = expected(cnn, blocks)
    for n in (1, 3):  # any number of blocks
        found = ran(path, blocks[:n])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted[:n], rtol=0, atol=1e-5)
    assert (wanted.max(axis=1) < 0.999).any()  # else a wrong network would show less


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.exists(), reason="no real scan is at hand")
@pytest.mark.parametrize("to", FORMATS)
def test_a_file_gives_the_models_probabilities_of_a_real_scan(to: str, tmp_path: Path) -> None:
    from organfast.grid import to_model_grid
    from organfast.levels import levels_slab
    from organfast.nifti import read_volume

    cnn = network("towers", SMALL)
    volume = to_model_grid(read_volume(REAL), model(cnn).grid)
    slab = levels_slab(volume, SMALL, 40, 41)
    rng = np.random.default_rng(0)
    extent = zip(SMALL.reach, slab.shape[1:], strict=True)
    positions = np.stack([rng.integers(r, n - r, 200) for r, n in extent], 1).astype(np.int32)
    ours = np.empty((200, len(CLASSES)), np.float32)
    cnn.probabilities(slab, positions, ours)
    blocks = naive.blocks_at(slab, SMALL.offsets.tolist(), positions)
    export_cnn(cnn, tmp_path / f"x.{to}", to)
    found = ran(tmp_path / f"x.{to}", blocks.reshape(200, 2, 3, 9, 9).astype(np.int16))
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5)


def test_a_bfloat16_network_is_exported_in_float32(tmp_path: Path) -> None:
    cnn = network("towers", SMALL)
    for name, precision in (("a", "float32"), ("b", "bfloat16")):
        export_cnn(replace(cnn, precision=precision), tmp_path / name, "onnx")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_metadata_say_how_to_use_it(tmp_path: Path) -> None:
    export_model(model(network("towers", SMALL)), tmp_path / "x.onnx")
    read = onnx.load(tmp_path / "x.onnx")
    said = {entry.key: entry.value for entry in read.metadata_props}
    assert "research use only" in said["use"]
    assert json.loads(said["class_names"]) == list(CLASSES.names)
    assert json.loads(said["window"]) == list(WINDOW)
    assert json.loads(said["pattern"]) == SMALL.to_dict()
    assert json.loads(said["grid"])["spacing_mm"] == [3, 3, 3]
    assert said["architecture"] == "towers"


# --- what is not kept -----------------------------------------------------------------------------


def _wrong_weights(cnn: Cnn) -> Cnn:
    shifted = {n: a + np.float32(0.01) if n == "dense0.bias" else a for n, a in cnn.params.items()}
    return replace(cnn, params=shifted)


def _not_a_number(load: Callable[[Path], export.Runner], file: Path) -> export.Runner:
    run_file = load(file)
    return lambda blocks: run_file(blocks) * np.float32(np.nan)


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_gives_something_else_is_not_kept(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cnn, path = network("towers", SMALL), tmp_path / "x"
    path.write_text("an earlier file")
    made = getattr(export, f"{to}_file")
    monkeypatch.setattr(export, f"{to}_file", lambda cnn, *a: made(_wrong_weights(cnn), *a))
    with pytest.raises(ValueError, match=f"the {to} file gives probabilities that differ"):
        export_cnn(cnn, path, to)
    monkeypatch.setattr(export, f"{to}_file", made)
    load = getattr(export, f"_{to}_runner")
    monkeypatch.setattr(export, f"_{to}_runner", lambda file: _not_a_number(load, file))
    with pytest.raises(ValueError, match="differ from the model's by nan"):
        export_cnn(cnn, path, to)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "an earlier file")]


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    cnn = network("towers", SMALL)
    with pytest.raises(ValueError, match="'tflite' is unknown; use onnx or stablehlo"):
        export_cnn(cnn, tmp_path / "x", "tflite")
    with pytest.raises(ValueError, match=r"absent/x: cannot be written \(No such file"):
        export_cnn(cnn, tmp_path / "absent" / "x", "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnx"), ("stablehlo", "flatbuffers")])
def test_a_package_that_lacks_is_named_with_its_extra(
    to: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*organfast\[cnn,export\]"):
        export_cnn(network("towers", SMALL), tmp_path / "x", to)


def test_a_forest_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    learned = ExtraTreesClassifier(2, random_state=0).fit(
        rng.integers(-100, 100, (20, len(SMALL.offsets))), rng.integers(0, len(CLASSES), 20)
    )
    forest = Forest.from_sklearn(learned, SMALL, len(CLASSES))
    grid = ModelGrid((3.0, 3.0, 3.0), "piecewise")
    with pytest.raises(ValueError, match=r"is a forest.*organfast train --model cnn"):
        export_model(Model(forest, CLASSES, SMALL, grid), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from organfast.models import classifier

    found: Any = model(network("towers", SMALL))
    monkeypatch.setattr(classifier, "load_model", lambda path: found)
    assert run(["export", "m.organfast", "--to", "stablehlo", "-o", str(tmp_path / "x")]) == 0
    assert "x: probabilities within 1e-05 of the model's" in capsys.readouterr().out
    assert (tmp_path / "x").exists()
