"""The README's tables of accuracy are what the tool makes of the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import accuracy_table  # noqa: E402  # from tools/, which is no package


def scores(**changed: Any) -> dict[str, Any]:
    usual = {"blocks": 0.5, "dice_of_six": 0.25, "dice": 0.125, "centre_mm_median": 12.3}
    return {**usual, "n_centres": 8, "n_missed": 0, "n_patients": 2, **changed}


def test_a_row_says_what_was_measured_and_on_how_many_patients() -> None:
    rows = {"seed": {"phantoms": scores(), "chest -> abdomen": scores(n_patients=1, n_missed=3)}}
    assert accuracy_table.table(rows, "pattern").splitlines() == [
        "| pattern | phantoms, **2 patients** unseen | chest → abdomen, **1 patient** unseen |",
        "|---|---|---|",
        "| seed | 50 % · .25 / .12 · 12 mm | 50 % · .25 / .12 · 12 mm, 3 of 11 missed |",
    ]


def test_what_was_not_measured_is_not_shown() -> None:
    rows = {"seed": {"phantoms -> real": scores(blocks=None)}}
    assert accuracy_table.table(rows, "pattern").splitlines()[-1] == "| seed | .25 / .12 · 12 mm |"


def test_what_was_timed_is_shown_of_the_phantoms() -> None:
    timed = scores(train_s=90.0, segment_s=2.04, file_mb=1.3)
    rows = {"cnn": {"phantoms": timed, "chest -> abdomen": scores()}}
    head, _, row = accuracy_table.table(rows, "classifier").splitlines()
    assert head.endswith("| learning, a scan, the file |")
    assert row.endswith("| 1.5 min · 2.0 s · 1.3 MB |")


def test_a_text_without_room_for_the_table_is_refused() -> None:
    for text in ("", "<!-- a:end -->\n<!-- a:begin -->\n", "<!-- a:begin -->\n" * 2):
        with pytest.raises(ValueError, match="put <!-- a:begin --> and <!-- a:end -->"):
            accuracy_table.with_table(text, "a", "table\n")


def test_the_readme_shows_the_committed_results() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    results = json.loads(accuracy_table.RESULTS.read_text("utf-8"))
    assert accuracy_table.with_tables(readme, results) == readme
    starter = json.loads(accuracy_table.STARTER.read_text("utf-8"))
    for name, written in accuracy_table.starter_tables(starter).items():
        assert accuracy_table.with_table(readme, name, written) == readme
