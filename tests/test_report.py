"""Reports as text: what is in them, what is escaped, how much is reduced. See test_browser.py."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as pictures

from organfast.anatomy import ClassTable
from organfast.charts import Point, Strip, heat_map, reliability_diagram, scatter, strips
from organfast.cli import run
from organfast.display import displayed, reduce_image, reduce_labels, reduction
from organfast.errors import InputError
from organfast.evaluation import Scoring, case_pictures, evaluate
from organfast.evaluationreport import curve_section, evaluation_page
from organfast.nifti import Geometry, file_digest, read_probability, write_probability
from organfast.organs import organs_from_json, organs_json
from organfast.page import DISCLAIMER, asset, data_block, niivue, page, text
from organfast.pipeline import Settings, segment
from organfast.results import Result
from organfast.scorebook import Evaluation
from organfast.thumbnail import thumbnail
from organfast.viewing import report_of
from organfast.volume import Volume

NASTY = """<script>alert(1)</script>"'&</script><!--\u202e"""
CURVE = {
    "points": [
        {
            "name": f"{NASTY} {n}",
            "scans_per_minute": 2.0 * 1.7**n,
            "mean_dice": 0.8 - 0.06 * n,
            "dice": {"liver": 0.9 - 0.05 * n, NASTY: None},
            "centre_mm": {"liver": 3.0 + n, NASTY: None},
            "on_front": n % 2 == 0,
            "settings": {},
        }
        for n in range(4)
    ],
    "smallest": {"liver": {"block_size": 17, "dice": 0.8}, NASTY: None},
    "presets": {"fast": {"stride": [6, 6, 4]}},
}


@pytest.fixture(scope="module")
def result(scan_file: Path, model_file: Path) -> Result:
    return segment(scan_file, str(model_file), Settings(probabilities=("liver",)))


@pytest.fixture(scope="module")
def judged(
    cohort_folder: Path, model_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("judged") / "out"
    scoring = Scoring(n_blocks=10, n_resamples=50)
    return evaluate(model_file, cohort_folder, scoring, folder=folder), folder


# --- the page -------------------------------------------------------------------------------------


def test_text_is_never_markup_and_shows_what_cannot_be_seen() -> None:
    assert text('<a href="x">\'&\n\u202e\udc80') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;���"


def test_data_cannot_end_their_block() -> None:
    block = data_block("about", {"name": NASTY})
    assert block.count("<") == 2
    content = block.partition(">")[2].rpartition("<")[0]
    assert json.loads(content) == {"name": NASTY}
    packed = data_block("x", b"\x00<script>").partition(">")[2].rpartition("<")[0]
    assert base64.b64decode(packed) == b"\x00<script>"


def test_the_policy_forbids_all_but_the_pages_own_scripts() -> None:
    content = page("t", "", ["alert(1)"], {})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', content)[1]
    digest = base64.b64encode(hashlib.sha256(b"alert(1)").digest()).decode()
    assert policy.startswith(
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'sha256-"
    )
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_viewer_is_the_file_that_was_vendored() -> None:
    record = json.loads(asset("niivue.json"))
    assert hashlib.sha256(niivue().encode()).hexdigest() == record["sha256"]
    assert "</script" not in niivue().lower()
    assert "Redistributions" in asset("NIIVUE_LICENSE.txt")


# --- reduced for display --------------------------------------------------------------------------


def naive_mean(values: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    shape = [-(-n // f) for n, f in zip(values.shape, factors, strict=True)]
    out = np.empty(shape)
    for at in np.ndindex(*shape):
        cell = tuple(slice(n * f, n * f + f) for n, f in zip(at, factors, strict=True))
        out[at] = values[cell].mean()
    return out


@pytest.mark.parametrize("factors", [(1, 1, 1), (2, 3, 3), (3, 2, 2), (9, 9, 9)])
def test_cells_are_means_in_steps_of_four(factors: tuple[int, int, int]) -> None:
    hu = np.random.default_rng(0).integers(-900, 1800, (7, 8, 5)).astype(np.int16)
    found = reduce_image(hu[::-1].swapaxes(1, 2), factors)
    expected = naive_mean(hu[::-1].swapaxes(1, 2), factors)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.001)
    assert (found % 4 == 0).all()


def test_no_organ_vanishes() -> None:
    labels = np.zeros((9, 9, 9), np.uint8)
    labels[:, :5] = 1
    labels[0, 0, 0] = 2  # in the corner of a cell
    small = reduce_labels(labels, (3, 3, 3))
    assert set(np.unique(small)) == {0, 1, 2}
    assert small[0, 0, 0] == 2
    assert (small[1:, :2] == 1).all()
    assert labels[0, 0, 0] == 2


def test_a_marker_keeps_its_place_in_mm() -> None:
    import nibabel as nib

    hu = np.zeros((300, 300, 200), np.int16)
    hu[100:104, 80:84, 60:64] = 1000
    affine = np.diag([-0.7, 0.7, 1.0, 1.0])
    affine[:3, 3] = 100, -90, -40
    volume = Volume(hu, affine)
    labels = (volume.working > 500).astype(np.uint8)
    shown = displayed(volume, labels, {"it": labels * np.uint8(255)})
    assert shown.factors == reduction(volume.working.shape, volume.working_spacing_mm) != (1, 1, 1)
    true = affine[:3, :3] @ [101.5, 81.5, 61.5] + affine[:3, 3]
    for packed in (shown.image, shown.labels, shown.maps["it"]):
        seen = nib.Nifti1Image.from_bytes(gzip.decompress(packed))
        values = np.asanyarray(seen.dataobj).astype(float)
        weights = values / values.sum()
        index = [
            float((weights.sum(axis=tuple(set(range(3)) - {a})) * np.arange(n)).sum())
            for a, n in enumerate(values.shape)
        ]
        np.testing.assert_allclose(seen.affine[:3, :3] @ index + seen.affine[:3, 3], true, atol=1.0)


def test_a_large_noisy_scan_makes_no_large_page() -> None:
    noise = np.random.default_rng(0).integers(-250, 250, (16, 512, 512)).astype(np.int16)
    volume = Volume(np.tile(noise, (25, 1, 1)).T, np.diag([0.7, 0.7, 1.0, 1.0]))
    shown = displayed(volume, np.zeros(volume.working.shape, np.uint8), {})
    size = len(shown.image) + len(shown.labels) + sum(map(len, shown.maps.values()))
    assert size * 4 / 3 + len(niivue()) < 23e6
    assert shown.factors != (1, 1, 1)


# --- a result -------------------------------------------------------------------------------------


def test_a_report_says_what_it_must_and_no_path(result: Result, tmp_path: Path) -> None:
    result.report(tmp_path / "r.html")
    content = (tmp_path / "r.html").read_text("utf-8")
    assert content.count(DISCLAIMER) == 2
    assert "research use only, not a medical device" in content
    assert "<h1>Segmentation of ct.nii.gz</h1>" in content
    assert str(tmp_path.parent) not in content
    assert "Probability maps of 1 organs" in content
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    result.report(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text("utf-8") == content


def test_names_from_files_are_text(result: Result, tmp_path: Path) -> None:
    record = {**result.record, "warnings": [NASTY]}
    replace(result, name=NASTY, record=record).report(tmp_path / "r.html")
    content = (tmp_path / "r.html").read_text("utf-8")
    assert "alert(1)</script>" not in content
    assert "&lt;script&gt;alert(1)" in content


def test_view_makes_a_report_with_or_without_the_scan(
    result: Result, scan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "a"
    result.save(out, preview=False, probabilities=("liver",))
    assert not (out / "report.html").exists()
    assert run(["view", str(out), "--no-open"]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert "The scan itself is not in this page" in (out / "report.html").read_text("utf-8")
    assert run(["view", str(out), "--no-open", "-i", str(scan_file)]) == 0
    made = (out / "report.html").read_text("utf-8")
    assert "The scan itself" not in made
    assert "Probability maps of 1 organs" in made
    result.save(out, report=True)  # replaces what holds a report
    assert report_of(out) == report_of(out / "report.html") == out / "report.html"
    with pytest.raises(InputError, match=r"holds 1 results: a; give one: .*a$"):
        report_of(tmp_path / "out")


def test_view_refuses_what_is_no_output(result: Result, scan_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no result"):
        report_of(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        report_of(tmp_path / "missing")
    result.save(tmp_path / "out", preview=False)
    other = shutil.copy(scan_file, tmp_path / "other.nii.gz")
    with open(other, "ab") as file:
        file.write(b"more")
    assert file_digest(other) != result.record["input"]
    with pytest.raises(InputError, match="is not the scan"):
        report_of(tmp_path / "out", other)
    (tmp_path / "out" / "organs.json").write_text("[]")
    with pytest.raises(InputError, match="damaged"):
        report_of(tmp_path / "out")


def test_one_file_holds_no_report(result: Result, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold a report"):
        result.save(tmp_path / "x.nii.gz", report=True)


def test_organs_come_back(result: Result) -> None:
    again = organs_from_json(organs_json(result.organs))
    assert organs_json(again) == organs_json(result.organs)
    assert again["liver"].label == result.organs["liver"].label


def test_a_probability_map_comes_back(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(8, 8, 4)
    geometry = Geometry.of_grid((8, 8, 4), np.eye(4))
    write_probability(tmp_path / "p.nii.gz", values, geometry)
    np.testing.assert_array_equal(read_probability(tmp_path / "p.nii.gz"), values)


# --- an evaluation --------------------------------------------------------------------------------


def test_an_evaluation_writes_its_report(judged: tuple[Evaluation, Path], tmp_path: Path) -> None:
    evaluation, folder = judged
    evaluation.report(tmp_path / "r.html")
    content = (tmp_path / "r.html").read_text("utf-8")
    assert content.count(DISCLAIMER) == 2
    assert content.count('<div class="card">') == len(evaluation.cases) == 3
    assert content.count("data:image/png") == 3
    assert "Accuracy and throughput" not in content
    mean = evaluation.summary("dice")["all organs"]["mean"]
    assert f"<b>{mean:.2f} <small>" in content
    worst = [np.nanmean(case.scores["dice"]) for case in evaluation.cases]
    first = re.search(r'class="card">.*?<b>(.*?)</b>', content)[1]
    assert first == evaluation.cases[int(np.argmin(worst))].name
    assert case_pictures(folder) == {(c.name, c.fold, c.model): c.picture for c in evaluation.cases}
    assert "picture" not in evaluation.cases[0].to_dict()


def test_pictures_are_kept_for_a_run_that_goes_on(
    judged: tuple[Evaluation, Path], cohort_folder: Path, model_file: Path
) -> None:
    evaluation, folder = judged
    times = {p: p.stat().st_mtime_ns for p in (folder / "cases").iterdir()}
    scoring = Scoring(n_blocks=10, n_resamples=50)
    again = evaluate(model_file, cohort_folder, scoring, folder=folder)
    assert {p: p.stat().st_mtime_ns for p in (folder / "cases").iterdir()} == times
    assert [c.picture for c in again.cases] == [c.picture for c in evaluation.cases]


def test_names_in_an_evaluation_are_text(judged: tuple[Evaluation, Path]) -> None:
    content = json.loads(json.dumps(judged[0].to_dict()))
    for case in content["cases"]:
        case["name"] = case["patient"] = NASTY
        case["warnings"] = [NASTY]
    content["failures"] = [{"case": NASTY, "reason": f"/home/somebody/x.nii: {NASTY}"}]
    content["curve"] = CURVE
    made = evaluation_page(content, {})
    assert "alert(1)</script>" not in made
    assert "somebody" not in made
    assert "Accuracy and throughput" in made


def test_a_curve_draws_every_organ_and_its_front() -> None:
    drawn = curve_section(CURVE)
    figures = re.findall(r'<figure data-curve="(.*?)"( hidden)?>(.*?)</figure>', drawn)
    assert [(organ, bool(hidden)) for organ, hidden, _ in figures] == [
        ("", False),
        ("liver", True),
        (text(NASTY), True),
    ]
    assert figures[0][2].count("<circle") == 4
    assert figures[0][2].count('fill="#fff"') == 2  # those not on the front
    assert figures[1][2].count('fill="#fff"') == 0  # of the liver, none is beaten
    assert "<circle" not in figures[2][2]


# --- charts ---------------------------------------------------------------------------------------


def places(drawn: str, what: str = "circle") -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(rf'<{what} cx="(.*?)" cy="(.*?)"', drawn)]


def test_points_of_strips_lie_on_their_axis() -> None:
    rows = [Strip("a", [(0.0, "p"), (1.0, "q")], 0.5, 0.25, 0.75), Strip("b", [(0.5, "p")])]
    (x0, y0), (x1, _), (x2, y2) = places(strips(rows, "Dice", 1.0))
    np.testing.assert_allclose(x2, (x0 + x1) / 2)
    assert y2 > y0 + 10


def test_a_reliability_diagram_rises_with_accuracy() -> None:
    drawn = reliability_diagram([0.1, None, 0.9], [0.2, None, 1.0], [5, 0, 9], "x")
    (x0, y0), (x1, y1) = places(drawn)
    np.testing.assert_allclose((x1 - x0) / (y0 - y1), 1, atol=1e-3)


def test_names_beside_points_do_not_overlap() -> None:
    crowd = [Point(f"setting {n}", 10 + n / 50, 0.5, n == 0) for n in range(30)]
    drawn = scatter(crowd, "x", "y")
    assert drawn.count("<circle") == 30
    assert 1 <= len(re.findall(r">setting \d+</text>", drawn)) < 10


def test_a_matrix_writes_shares_of_its_rows() -> None:
    drawn = heat_map(["a", "b"], ["a", "b"], [[0.98, 0.02], [None, None]], [[98, 2], [0, 0]], "m")
    assert re.findall(r'class="(?:light|dark)">(\d+)<', drawn) == ["98"]
    assert "a taken for b: 2, 2.0%" in drawn


# --- thumbnails -----------------------------------------------------------------------------------


def test_a_thumbnail_shows_the_slice_that_is_wrong_with_left_at_the_right() -> None:
    hu = np.full((4, 64, 64), -1000, np.int16)
    volume = Volume(hu.T, np.diag([1.0, 1.0, 3.0, 1.0]))  # x to the right of the patient
    truth, found = np.zeros((2, 4, 64, 64), np.uint8)
    truth[1, 40:50, 8:20] = 3  # low x: the patient's left
    found[3, 10:30, 40:60] = 3  # more wrong voxels, to the right and behind
    seen = pictures.imread(io.BytesIO(thumbnail(volume, truth, found, 3)))[..., :3]
    assert max(seen.shape) == 256
    rows, columns = np.nonzero(seen[..., 2] > seen[..., 0] + 0.1)
    assert columns.max() < 128  # the patient's right at the left
    assert rows.min() > 128  # the back below
    found[3] = 0
    seen = pictures.imread(io.BytesIO(thumbnail(volume, truth, found, 3)))[..., :3]
    rows, columns = np.nonzero(seen[..., 0] > seen[..., 2] + 0.3)
    assert columns.min() > 128
    assert rows.max() < 128


def test_a_thumbnail_is_small() -> None:
    hu = np.random.default_rng(0).integers(-160, 240, (2, 300, 300)).astype(np.int16)
    volume = Volume(hu.T, np.eye(4))
    labels: Any = np.zeros((2, 300, 300), np.uint8)
    assert len(thumbnail(volume, labels, labels, 1)) < 70_000


def test_the_table_of_colours_is_the_class_tables(result: Result, tmp_path: Path) -> None:
    result.report(tmp_path / "r.html")
    content = (tmp_path / "r.html").read_text("utf-8")
    about = json.loads(re.search(r'id="about">(.*?)</script>', content)[1])
    assert about["colours"] == [list(s.rgb) for s in ClassTable.default().structures]


def test_the_command_writes_a_report_beside_the_labels(
    scan_file: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", "-i", str(scan_file), "-m", str(model_file), "--report"]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e6
    assert run([*command, "-o", str(tmp_path / "x.nii.gz")]) == 2
    assert "--report needs a folder" in capsys.readouterr().err
