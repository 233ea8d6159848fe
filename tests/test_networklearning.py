"""A network through the whole flow: learned, kept, loaded, asked; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load, save

from organfast import probability
from organfast.adaptation import Adapt
from organfast.blocks import Block, Context
from organfast.cli import run
from organfast.errors import InputError
from organfast.grid import ModelGrid
from organfast.models.classifier import load_model
from organfast.models.cnn import Cnn
from organfast.networklearning import NetworkRecipe, training_settings
from organfast.pipeline import Settings, segment

KEY = "organfast"
WORKING = ModelGrid((3.0, 3.0, 3.0), "piecewise")


@pytest.fixture(scope="module")
def network_file(cohort_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned by the command line from two phantoms, in a few steps."""
    folder = tmp_path_factory.mktemp("network")
    split = folder / "split.json"
    split.write_text('{"train": ["phantom_000", "phantom_002"], "validation": ["phantom_001"]}')
    arguments = ("--model", "cnn", "--spacing", "5,5,8", "--block-size", "9", "--levels", "1,3")
    outputs = ("--log", str(folder / "log.jsonl"), "--resume", str(folder / "checkpoints"))
    how = ("--steps", "120", "--split", str(split), "--n-per-class", "200")
    path = folder / "network.organfast"
    code = run(["train", str(cohort_folder), "-o", str(path), *arguments, *outputs, *how])
    assert code == 0
    return path


@pytest.fixture(scope="module")
def truth(cohort_folder: Path) -> np.ndarray:
    return np.asanyarray(nib.load(cohort_folder / "phantom_001" / "labels.nii.gz").dataobj)


def test_it_learns_classes_in_proportion_and_to_adapt(cohort_folder: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.json"
    split.write_text('{"train": ["phantom_000", "phantom_002"], "validation": []}')
    arguments = ("--model", "cnn", "--spacing", "5,5,8", "--block-size", "9", "--levels", "1,3")
    how = ("--steps", "3", "--split", str(split), "--n-per-class", "20", "--least-share", "0.2")
    path = tmp_path / "m.organfast"
    assert run(["train", str(cohort_folder), "-o", str(path), *arguments, *how, "--adapt"]) == 0
    model = load_model(path)
    assert model.adapt == Adapt()
    assert model.atlas is not None  # of the two who train
    assert len(model.atlas.shares) == len(model.classes.organs)
    assert model.training["sampling"]["least_share"] == 0.2
    # At most five times as many of each class as of the rarest, in each of two cases.
    n = len(model.classes)
    assert 2 * 20 * n / 2 < model.training["n_examples"] <= 2 * 20 * (n + 2 * 5)


def test_it_tells_organs_of_a_patient_it_has_not_seen(
    network_file: Path, scan_file: Path, truth: np.ndarray
) -> None:
    model = load_model(network_file)
    assert model.kind == "cnn"
    assert model.training["network"]["n_steps"] == 120
    assert model.scores["validation"]["n_patients"] == 1
    assert model.scores["validation"]["block_accuracy"] > 0.6
    found = segment(scan_file, model).labels
    for name in ("lung_left", "lung_right"):  # a few steps teach no more
        label = model.classes.index(name)
        both = (truth == label) & (found == label)
        assert 2 * both.sum() / ((truth == label).sum() + (found == label).sum()) > 0.6, name


def test_the_command_line_treats_it_as_a_forest(
    network_file: Path, scan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["segment", "-i", str(scan_file), "-o", str(out), "-m", str(network_file)]) == 0
    assert json.loads((out / "organs.json").read_text())
    assert (out / "overlay.png").stat().st_size > 1000
    capsys.readouterr()
    assert run(["locate", "-i", str(scan_file), "-m", str(network_file), "--json"]) == 0
    assert "liver" in capsys.readouterr().out
    assert run(["info", str(network_file)]) == 0
    assert "towers" in capsys.readouterr().out
    refined = ["verify", str(scan_file), "-m", str(network_file), "--coarse-to-fine"]
    assert run(refined) == 0
    log = (network_file.parent / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 120
    assert any(p.is_dir() for p in (network_file.parent / "checkpoints").iterdir())


def test_whole_grids_and_single_positions_give_the_same(
    network_file: Path, scan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(network_file)
    maps = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(probability, "_WHOLE_GRID_FROM", share)
        result = segment(scan_file, model, Settings(stride=4, probabilities=("liver",)))
        maps.append(result.probability("liver").astype(int))
    # 1e-5 apart at most, which may round to the next of 255 steps.
    assert np.abs(maps[0] - maps[1]).max() <= 1
    assert maps[0].max() > 200


def test_the_same_for_any_number_of_threads(network_file: Path, scan_file: Path) -> None:
    model = load_model(network_file)
    one, three = (segment(scan_file, model, Settings(stride=4), threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one.labels, three.labels)
    np.testing.assert_array_equal(one.confidence, three.confidence)


def test_a_loaded_network_is_the_one_that_was_saved(network_file: Path) -> None:
    model = load_model(network_file)
    again = load_model(network_file)
    assert isinstance(again.classifier, Cnn)
    assert again.digest == model.digest
    assert "jax" in model.versions
    other = replace(model.classifier, device="cpu")
    assert replace(model, classifier=other).digest == model.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a: a["dense0.bias"].__setitem__(0, np.nan), "no numbers"),
        (lambda h, a: a.pop("dense0.bias"), "weights are"),
        (lambda h, a: a.update(merge=a["merge"] + 1000), "merge leads to"),
        (lambda h, a: a.update(extra=np.zeros(3, np.float32)), "weights are"),
        (lambda h, a: h["network"].update(architecture="elsewhere"), "elsewhere"),
        (lambda h, a: h["network"].update(window=[1, 0]), "window"),
        (lambda h, a: h.update(network=None), "a CNN is described by"),
        (lambda h, a: h.update(classifier="forest"), "it holds the arrays"),
        (lambda h, a: h["pattern"].update(size=11), "tower|layers"),
    ],
)
def test_a_tampered_network_is_refused(change, message: str, network_file: Path, tmp_path) -> None:
    content = network_file.read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + n])["__metadata__"][KEY])
    arrays = {name: array.copy() for name, array in load(content).items()}
    change(header, arrays)
    path = tmp_path / "tampered.organfast"
    path.write_bytes(save(arrays, {KEY: json.dumps(header)}))
    with pytest.raises(InputError, match=f"is not a valid model: .*({message})"):
        load_model(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "9"), "give --model cnn"),
        (("--model", "mlp"), "use forest or cnn"),
        (("--model", "cnn", "--architecture", "unet"), "unknown"),
        (("--model", "cnn", "--device", "tpu"), "device"),
    ],
)
def test_flags_that_do_not_fit(
    flags: tuple[str, ...], message: str, cohort_folder: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "m.organfast"
    assert run(["train", str(cohort_folder), "-o", str(path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def test_a_gpu_that_is_not_there(network_file: Path, scan_file: Path, model_file, capsys) -> None:
    import jax

    if any(d.platform == "gpu" for d in jax.devices()):
        pytest.skip("there is a GPU")
    for model, message in ((network_file, "finds no gpu"), (model_file, "is a forest")):
        arguments = ["locate", "-i", str(scan_file), "-m", str(model), "--device", "gpu"]
        assert run(arguments) == 2
        assert message in capsys.readouterr().err


def test_default_blocks_follow_the_architecture_and_the_grid() -> None:
    ours, readme = NetworkRecipe(), NetworkRecipe("readme")
    assert ours.pattern_on(WORKING, None) == Block(17, levels=(1, 3, 7), slices=3)
    assert ours.pattern_on(ModelGrid(None), None) == Block(33, levels=(1, 8))
    assert readme.pattern_on(WORKING, None) == Block(33)
    with pytest.raises(ValueError, match="a network sees blocks"):
        ours.pattern_on(WORKING, Context())
    with pytest.raises(ValueError, match="'unet' is unknown"):
        NetworkRecipe("unet")
    settings, outputs = training_settings({"steps": 7}, log=Path("log"))
    assert settings.steps == 7
    assert outputs.log == Path("log")


def test_a_forest_needs_no_jax(model_file: Path, scan_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from organfast.cli import run\n"
        f"code = run(['segment', '-i', {str(scan_file)!r}, '-m', {str(model_file)!r}, "
        f"'-o', {str(tmp_path / 'out')!r}])\n"
        "assert code == 0 and not {'jax', 'flax', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
