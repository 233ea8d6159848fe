"""Write the README's tables of accuracy from the committed results.

Those of ``benchmarks/accuracy.py``, and those of ``tools/train_starter.py --without``.

    python tools/accuracy_table.py

They stand between comments such as ``<!-- patterns:begin -->`` and ``<!-- patterns:end -->``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "accuracy.json"
STARTER = REPOSITORY / "benchmarks" / "results" / "starter.json"
README = REPOSITORY / "README.md"
GROUPS = {"phantoms": "phantoms", "chest -> abdomen": "chest → abdomen"}
GROUPS["abdomen -> chest"] = "abdomen → chest"
GROUPS["phantoms -> real"] = "12 phantoms → real"


def table(rows: Mapping[str, Any], what: str) -> str:
    """Markdown: a line per row, three figures per group of unseen patients.

    Parameters
    ----------
    rows : mapping
        Name -> group -> scores, as ``benchmarks/accuracy.py`` keeps them.
    what : str
        Heading of the first column.
    """
    first = next(iter(rows.values()))
    heads = []
    for group, shown in GROUPS.items():
        if group in first:
            n = first[group]["n_patients"]
            heads.append(f"{shown}, **{n} patient{'s' if n > 1 else ''}** unseen")
    is_timed = "train_s" in first.get("phantoms", {})
    heads += ["learning, a scan, the file"] if is_timed else []
    lines = [f"| {what} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, groups in rows.items():
        cells = [_figures(groups[group]) for group in GROUPS if group in groups]
        cells += [_costs(groups["phantoms"])] if is_timed else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(scores: Mapping[str, Any]) -> str:
    """Blocks, Dice of the six large organs / of all, centre error and organs that were missed."""
    missed = scores["n_missed"]
    organs = scores["n_centres"] + missed
    blocks = "" if scores["blocks"] is None else f"{100 * scores['blocks']:.0f} % · "
    return (
        f"{blocks}{_dice(scores['dice_of_six'])} / "
        f"{_dice(scores['dice'])} · {scores['centre_mm_median']:.0f} mm"
        + (f", {missed} of {organs} missed" if missed else "")
    )


def _costs(scores: Mapping[str, Any]) -> str:
    """Of the phantoms: minutes to learn, seconds to segment one, size of the model file."""
    return (
        f"{scores['train_s'] / 60:.1f} min · {scores['segment_s']:.1f} s · "
        f"{scores['file_mb']:.1f} MB"
    )


def _dice(value: float) -> str:
    return f"{value:.2f}".lstrip("0")


def with_table(text: str, name: str, written: str) -> str:
    """A text with what stands between its two comments replaced.

    Parameters
    ----------
    text : str
        The README.
    name : str
        Of the comments: ``<!-- name:begin -->`` and ``<!-- name:end -->``, each on its own line.
    written : str
        What is to stand between them.

    Raises
    ------
    ValueError
        The comments are not there, each once and in order.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(
            f"put {begin.strip()} and {end.strip()} on lines of their own in README.md"
        )
    before, _, rest = text.partition(begin)
    return before + begin + written + end + rest.partition(end)[2]


def with_tables(readme: str, results: Mapping[str, Any]) -> str:
    """The README with its tables of accuracy replaced.

    Parameters
    ----------
    readme : str
        Its text.
    results : mapping
        Table -> row -> group -> scores.
    """
    heads = {
        "patterns": "what the classifier sees",
        "sampling": "what it is shown",
        "networks": "classifier",
    }
    for name, what in heads.items():
        readme = with_table(readme, name, table(results[name], what))
    return readme


def starter_tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Markdown of what ``tools/train_starter.py`` measured, by the names of the comments.

    Parameters
    ----------
    results : mapping
        "left out, judged" or "left out, judged, what is special of the model" -> scores.
    """
    whole = {name: row for name, row in results.items() if name.count(", ") == 1}
    special = {name: row for name, row in results.items() if name.count(", ") > 1}
    return {
        "starter": _organ_table(whole),
        "starter-steps": _step_table({n: r for n, r in whole.items() if "steps_after" in r}),
        "starter-stages": _stage_table({n: r for n, r in whole.items() if "stages" in r}),
        "starter-strains": _strain_table({n: r for n, r in whole.items() if "strains" in r}),
        "starter-curve": _curve_table(special),
    }


def _organ_table(rows: Mapping[str, Any]) -> str:
    """A line per structure, Dice and centre error per anatomy that was left out."""
    lines = _heads("left out, judged", rows)
    for organ in dict.fromkeys(organ for row in rows.values() for organ in row["dice"]):
        cells = [_starter_cell(row, organ) for row in rows.values()]
        lines.append(f"| {organ} | {' | '.join(cells)} |")
    six = [_dice(row["means"]["six"]) for row in rows.values()]
    lines.append(f"| mean of liver, spleen, kidneys, lungs | {' | '.join(six)} |")
    for what, (failed, of_all) in _PRESENCE.items():
        cells = [_of_all(row.get("presence"), failed, of_all) for row in rows.values()]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_PRESENCE = {
    "organs in view that were missed": ("missed", "there"),
    "organs not in view that were reported": ("reported", "not_there"),
}


def _of_all(presence: Mapping[str, int] | None, failed: str, of_all: str) -> str:
    return "-" if presence is None else f"{presence[failed]} of {presence[of_all]}"


def _heads(first: str, rows: Mapping[str, Any]) -> list[str]:
    heads = [
        f"{name}, **{row['n_patients']} {'patients' if row['n_patients'] > 1 else 'patient'}**"
        for name, row in rows.items()
    ]
    return [f"| {first} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]


def _starter_cell(row: Mapping[str, Any], organ: str) -> str:
    """Dice · NSD · centre error; an organ that is not in view has none, unless it was reported."""
    if organ not in row["dice"]:
        return "-"
    centre = row["centroid_mm"].get(organ)
    if centre is None:
        return "not found, or not there"
    return f"{_dice(row['dice'][organ])} · {_dice(row['nsd'][organ])} · {centre:.0f} mm"


def _step_table(rows: Mapping[str, Any]) -> str:
    """A line per step after the classifier; of the six large organs / of all."""
    lines = _heads("after the classifier", rows)
    for step in next(iter(rows.values()))["steps_after"]:
        cells = [_six_and_all(row["steps_after"][step]) for row in rows.values()]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _stage_table(rows: Mapping[str, Any]) -> str:
    """A line per way to ask the classifier: Dice, and at which share of the positions."""
    lines = _heads("asked", rows)
    for stage in next(iter(rows.values()))["stages"]:
        asked = [row["stages"][stage] for row in rows.values()]
        cells = [f"{_six_and_all(one)}, {100 * one['share_asked']:.0f} %" for one in asked]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _strain_table(rows: Mapping[str, Any]) -> str:
    """A line per way to scan a patient: Dice, organs missed and organs reported; then all ways."""
    lines = _heads("the same patient", rows)
    for strain in next(iter(rows.values()), {"strains": {}})["strains"]:
        cells = [_strain_cell([row["strains"][strain]]) for row in rows.values()]
        lines.append(f"| {strain} | {' | '.join(cells)} |")
    for told, key in (("", "strains"), (", without the atlas", "strains_without_atlas")):
        cells = [_strain_cell([*row[key].values()]) for row in rows.values()]
        lines.append(f"| mean, and sum, of all{told} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _strain_cell(found: Sequence[Mapping[str, Any]]) -> str:
    """Mean Dice of the strains, and how many organs were missed and reported in all of them."""
    dice = {n: sum(one[n] for one in found) / len(found) for n in ("six", "all")}
    counts = {n: sum(one["presence"][n] for one in found) for n in found[0]["presence"]}
    told = [_of_all(counts, *counted) for counted in _PRESENCE.values()]
    return ", ".join([_six_and_all(dice), *told])


def _curve_table(rows: Mapping[str, Any]) -> str:
    """A line per model that learned otherwise, a column per what it is judged by."""
    models: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        left_out, judged, told = name.split(", ", 2)
        models.setdefault(told, {})[f"{left_out}, {judged}"] = row
    lines = _heads("learned from", next(iter(models.values())))
    for told, judged_by in models.items():
        cells = [_six_and_all(row["means"]) for row in judged_by.values()]
        lines.append(f"| {told} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _six_and_all(dice: Mapping[str, float]) -> str:
    return f"{_dice(dice['six'])} / {_dice(dice['all'])}"


if __name__ == "__main__":
    try:
        text = with_tables(README.read_text("utf-8"), json.loads(RESULTS.read_text("utf-8")))
        for name, written in starter_tables(json.loads(STARTER.read_text("utf-8"))).items():
            text = with_table(text, name, written)
    except ValueError as error:
        sys.exit(f"accuracy_table: {error}")
    README.write_text(text, encoding="utf-8")
