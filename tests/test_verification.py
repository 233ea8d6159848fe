"""What a shortcut changes: numbers by hand, and shortcuts that change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.models.classifier import load_model
from organfast.organs import Organ, measure_organs
from organfast.pipeline import Settings, segment
from organfast.refinement import Refine
from organfast.segmentation import Cleaning
from organfast.verification import agreement, verify
from organfast.volume import Volume

CLASSES = ClassTable.from_names(["liver", "spleen", "aorta"])  # 0 background, 1 context, 2, 3, 4
MM = np.diag([2.0, 3, 5, 1])


def segmented(*runs: tuple[int, int]) -> tuple[NDArray[np.uint8], dict[str, Organ]]:
    """A row of voxels, 2 mm apart, from (label, how many), and its organs."""
    labels = np.repeat(*np.array(runs, np.uint8).T)[:, None, None]
    volume = Volume(np.zeros(labels.shape, np.int16), MM)
    working = volume.orientation.working(labels)
    return labels, measure_organs(working, None, volume, CLASSES)


def test_two_segmentations_compared_by_hand() -> None:
    reference = segmented((0, 2), (1, 3), (2, 4), (3, 1))
    other = segmented((0, 1), (1, 4), (2, 1), (1, 1), (2, 2), (0, 1))
    # Differ: the second voxel, one liver voxel that is context, one spleen voxel that is nothing.
    found = agreement(reference, other, CLASSES)
    np.testing.assert_allclose(found.differing, 3 / 10)
    np.testing.assert_allclose(found.differing_in_organs, 2 / 5)
    liver, spleen, aorta = found.organs
    assert (liver.name, spleen.name, aorta.name) == ("liver", "spleen", "aorta")
    np.testing.assert_allclose(liver.dice, 2 * 3 / (4 + 3))
    np.testing.assert_allclose(liver.shift_mm, 2 * abs((5 + 6 + 7 + 8) / 4 - (5 + 7 + 8) / 3))
    np.testing.assert_allclose(liver.volumes_ml, (4 * 0.03, 3 * 0.03))
    assert (spleen.dice, spleen.shift_mm) == (0, None)
    np.testing.assert_allclose(spleen.volumes_ml, (0.03, 0))
    assert (aorta.dice, aorta.shift_mm, aorta.volumes_ml) == (None, None, (0, 0))
    same = agreement(reference, reference, CLASSES)
    assert (same.differing, same.differing_in_organs) == (0, 0)


def test_no_organ_at_all_has_no_share() -> None:
    nothing = segmented((0, 3), (1, 2))
    found = agreement(nothing, segmented((0, 2), (1, 3)), CLASSES)
    np.testing.assert_allclose(found.differing, 0.2)
    assert found.differing_in_organs is None
    assert {organ.dice for organ in found.organs} == {None}


def test_a_shortcut_that_asks_everywhere_changes_nothing(scan_file: Path, model_file: Path) -> None:
    found = verify(scan_file, model_file, Settings(refine=Refine(2)), threads=2)
    assert found.agreement.differing == found.agreement.differing_in_organs == 0
    assert {organ.dice for organ in found.agreement.organs} <= {1, None}
    assert {organ.shift_mm for organ in found.agreement.organs} <= {0, None}
    assert found.share_asked == 1


@pytest.mark.parametrize(
    "shortcut", [{"stride": 5}, {"refine": Refine(0.1)}, {"stride": 2, "refine": Refine()}]
)
def test_a_shortcut_is_compared_with_the_model_s_own_grid(
    shortcut: dict[str, Any], scan_file: Path, model_file: Path
) -> None:
    settings = Settings(**shortcut, cleaning=Cleaning("none", fill_holes=False), organs=("liver",))
    found = verify(scan_file, model_file, settings)
    model = load_model(model_file)
    shown = replace(settings, organs=None, keep_context=True)
    full = segment(scan_file, model, replace(shown, stride=None, refine=None))
    short = segment(scan_file, model, shown)
    differ = full.labels != short.labels
    organ = np.isin(full.labels, model.classes.organs) | np.isin(short.labels, model.classes.organs)
    np.testing.assert_allclose(found.agreement.differing, differ.mean())
    np.testing.assert_allclose(found.agreement.differing_in_organs, differ[organ].mean())
    assert found.asked == tuple(r.record["positions"]["n_asked"] for r in (full, short))
    assert found.share_asked == found.asked[1] / found.asked[0]
    assert len(found.agreement.organs) == len(model.classes.organs)
    assert found.settings == short.record["settings"]
    told = json.loads(json.dumps(found.to_dict()))
    assert told["time_ratio"] == found.seconds[0] / found.seconds[1] > 0
    assert told["agreement"]["organs"][0]["name"] == "liver"
