"""The starter model: what it is and says of itself, and that it finds organs where they are."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from organfast.anatomy import ClassTable
from organfast.cli import run
from organfast.layouts import case_labels, find_cases
from organfast.metrics import dice_per_class
from organfast.models.classifier import load_model
from organfast.nifti import read_scan
from organfast.pipeline import segment
from organfast.volume import Volume

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import starter_scores  # from tools/, which is no package
from starter_strains import strained

DATA = Path(__file__).parents[2] / "shared" / "data"
NOT_LEARNED = {"body_envelope", "rectus_abdominis_right", "rectus_abdominis_left"}


def test_it_is_small_and_says_what_it_is() -> None:
    path = Path(str(resources.files("organfast"))) / "data" / "starter.organfast"
    assert path.stat().st_size < 10e6
    model = load_model("starter")
    assert set(model.classes.names) == set(ClassTable.default().names) - NOT_LEARNED
    card = model.training["card"]
    assert card["use"] == "research only, not a medical device"
    assert "CC BY 4.0" in card["learned_from"][0]
    held_out = card["held_out"]
    assert set(held_out) >= {"chest, scan", "abdomen, scan"}
    assert all(0 < row["dice"]["liver"] < 1 for row in held_out.values() if "liver" in row["dice"])


def test_a_file_of_that_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("starter").write_bytes(b"nothing")
    assert load_model("starter").kind == "cnn"
    with pytest.raises(Exception, match="not an organfast model"):
        load_model("./starter")


def test_without_a_model_a_scan_is_segmented_and_told_by_what(
    scan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["segment", "-i", str(scan_file), "-o", str(out), "--no-preview"]) == 0
    told = capsys.readouterr().err
    assert "this is the starter model: 18 structures" in told
    assert "for research only" in told
    record = json.loads((out / "run.json").read_text())
    assert record["model"] == load_model("starter").digest
    assert record["adapted"]["in_atlas"]["ruled_out"].keys() >= {"liver", "urinary_bladder"}


def test_it_is_not_laid_over_its_atlas_when_asked_not_to(scan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["segment", "-i", str(scan_file), "-o", str(out), "--no-preview", "--no-atlas"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["adapt"]["atlas"] is False
    assert record["adapted"]["in_atlas"] is None


@pytest.mark.skipif(not DATA.exists(), reason="the public pool lies beside a checkout")
@pytest.mark.parametrize("name", ["chest", "abdomen"])
def test_organs_of_the_pool_are_where_they_are(name: str) -> None:
    """On what it has learned from: that sides, orders and grids are right; it is no score."""
    case = next(c for c in find_cases(DATA / "labelled").cases if c.name == name)
    model = load_model("starter")
    scan = read_scan(case.image)
    truth = case_labels(case, model.classes, scan.volume).labels
    n = len(model.classes)
    found = segment(scan, model, threads=2)
    dice = dice_per_class(np.minimum(truth, n), found.labels, n + 1)
    large = ("liver", "spleen", "lung_right", "lung_left", "kidney_right", "kidney_left")
    in_view = [
        o for o in large if (truth == model.classes.index(o)).sum() * scan.volume.voxel_ml > 50
    ]
    assert {o: d for o in in_view if (d := float(dice[model.classes.index(o)])) < 0.6} == {}


def test_it_is_sure_from_where_nine_of_ten_are_good() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 400)
    dice = np.where(rng.random(400) < confidence, 0.9, 0.3)
    rows = np.stack([confidence, dice], axis=1).round(3).tolist()
    sure = starter_scores.sure_from(rows)
    assert sure is not None
    kept = [d for c, d in rows if c >= sure["confidence"]]
    assert len(kept) == sure["n_organs"]
    assert sure["n_asked"] == 400
    bad = sum(d < 0.7 for d in kept)
    assert (bad + 1) / (len(kept) + 1) <= 0.1
    assert sure["share"] == round(1 - bad / len(kept), 3)
    below = [d for c, d in rows if c >= sure["confidence"] - 0.1]
    assert (sum(d < 0.7 for d in below) + 1) / (len(below) + 1) > 0.1


def test_it_is_never_sure_of_few_or_bad_ones() -> None:
    assert starter_scores.sure_from([[0.9, 0.9]] * 8) is None  # 1 / 9 > 0.1
    assert starter_scores.sure_from([[0.9, 0.5]] * 100) is None


def test_what_it_says_of_its_sureness_is_what_was_measured() -> None:
    results = json.loads(starter_scores.RESULTS.read_text("utf-8"))
    rows = [pair for row in results.values() for pair in row.get("certainties", ())]
    assert load_model("starter").training["sure"] == starter_scores.sure_from(rows)


def test_a_strained_scan_keeps_its_organs_under_their_labels_and_on_their_sides() -> None:
    """An organ of 300 HU at the patient's right, in front, in a scan that is stored L, P, S."""
    labels = np.zeros((120, 110, 90), np.uint8)
    labels[20:40, 20:36, 10:80] = 7  # first stored axis to the left, second to the back
    hu = np.where(labels == 7, 300, -50).astype(np.int16)
    affine = np.array([[-3.0, 0, 0, 0], [0, -3, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])
    found = {strain: list(scans) for strain, scans in strained(Volume(hu, affine), labels)}
    assert len(found) == 8
    assert len(found["slabs of 10 cm"]) == 2
    for strain, scans in found.items():
        for volume, of in scans:
            assert of.shape == volume.hu.shape, strain
            inside, outside = volume.hu[of == 7], volume.hu[of == 0]
            assert np.median(inside) > 250, strain
            assert np.median(outside) < 0, strain
            mm = np.argwhere(of == 7) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
            middle = (np.array(of.shape) - 1) / 2 @ volume.affine[:3, :3].T + volume.affine[:3, 3]
            right, front = (mm.mean(axis=0) - middle)[:2]
            assert right > 20, strain
            assert front > 20, strain
    ml = {
        strain: (scans[0][1] == 7).sum() * scans[0][0].voxel_ml for strain, scans in found.items()
    }
    assert ml["a body of .85 the size"] == pytest.approx(0.85**3 * ml["as it is"])
    for strain in ("slices of about 5 mm", "a sharp kernel, and noise", "turned by 12°"):
        assert ml[strain] == pytest.approx(ml["as it is"], rel=0.03), strain
