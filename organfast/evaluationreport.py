"""The report of an evaluation: what ``Evaluation.to_dict`` holds, as a page without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from organfast.charts import Point, Strip, heat_map, reliability_diagram, scatter, strips
from organfast.page import DISCLAIMER, asset, page, picture, table, text

__all__ = ["curve_section", "evaluation_page"]

Pictures = Mapping[tuple[str, int | None, str], bytes]
_ALL = "all organs"
_MOST_CARDS = 12


def evaluation_page(content: Mapping[str, Any], pictures: Pictures) -> str:
    """The report as one HTML page.

    Parameters
    ----------
    content : mapping
        What ``Evaluation.to_dict`` gave, or ``evaluation.json`` holds; with a ``curve`` where one
        was measured.
    pictures : mapping of (case, fold, model) to bytes
        PNGs of where cases are wrong.
    """
    curve = content.get("curve")
    body = "\n".join(
        [
            f"<header><h1>Evaluation on {_count(len(content['patients']), 'patient')}</h1>",
            f'<p class="sub">{_what(content)}</p>',
            f'<p class="disclaimer">{DISCLAIMER}.</p></header><main>',
            _cautions(content),
            _figures(content),
            "<h2>Organs</h2>",
            _organ_table(content),
            "<h2>Overlap, patient by patient</h2>",
            '<p class="note">Each point is a patient, the diamond their mean, the line its '
            f"{_level(content)} interval (bootstrapped over patients).</p>",
            '<div class="pair">',
            f"<figure>{_distribution(content, 'dice', 'Dice', 1.0)}</figure>",
            f"<figure>{_distribution(content, 'nsd', _nsd(content), 1.0)}</figure></div>",
            "<h2>Worst cases first</h2>",
            _worst(content, pictures),
            "<h2>Localisation errors</h2>",
            '<p class="note">Distance between the centres of an organ as found and as labelled, '
            "and mean distance of its box's walls. A missed organ has no distance: see the table."
            "</p>",
            '<div class="pair">',
            f"<figure>{_distribution(content, 'centroid_mm', 'centre off by, mm')}</figure>",
            f"<figure>{_distribution(content, 'wall_mm', 'box walls off by, mm')}</figure></div>",
            "<h2>What is taken for what</h2>",
            _confusions(content),
            "<h2>Calibration</h2>",
            _calibrations(content),
            "" if not curve else curve_section(curve),
            "<h2>Run record</h2>",
            _record(content),
            f"</main><footer>{DISCLAIMER}. Nothing here is fetched from a network.</footer>",
        ]
    )
    return page("organfast evaluation", body, [asset("evaluation.js")], {})


def _what(content: Mapping[str, Any]) -> str:
    how = content["how"]
    tested = (
        f"{len(how['folds'])} folds, each patient segmented by a model that never saw them"
        if "folds" in how
        else f"model {str(how.get('model', '?'))[:12]}…"
    )
    cases = _count(len(content["cases"]), "case")
    return text(f"{cases}; {tested}; organfast {how.get('organfast', '?')}")


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _level(content: Mapping[str, Any]) -> str:
    return f"{float(content['how']['level']):.0%}"


def _nsd(content: Mapping[str, Any]) -> str:
    return f"NSD, {float(content['how']['tolerance_mm']):g} mm"


def _cautions(content: Mapping[str, Any]) -> str:
    lines = [f"{f['case']} could not be scored: {_last_part(f)}" for f in content["failures"]]
    if content["trained_on"]:
        names = ", ".join(content["trained_on"])
        lines.append(f"The model was trained on {names}: scores of these say nothing of new scans.")
    if 0 < len(content["patients"]) < 5:
        lines.append(
            f"{_count(len(content['patients']), 'patient')}: intervals of so few say little."
        )
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>' if items else ""


def _last_part(failure: Mapping[str, str]) -> str:
    """The reason without the path it begins with, which tells of the machine."""
    first, parted, rest = failure["reason"].partition(": ")
    return rest if parted and ("/" in first or "\\" in first) else failure["reason"]


def _figures(content: Mapping[str, Any]) -> str:
    found = [f for f in content["presence"].values()]
    there, missed = sum(f["n_there"] for f in found), sum(f["n_missed"] for f in found)
    absent, false = sum(f["n_absent"] for f in found), sum(f["n_false"] for f in found)
    blocks = content["confusion"]["blocks"]
    figures = [
        (_interval(content, "dice", _ALL, 2), "mean Dice"),
        (_interval(content, "nsd", _ALL, 2), f"mean {_nsd(content)}"),
        (_interval(content, "centroid_mm", _ALL, 1), "mm, mean distance of centres"),
        (f"{missed} of {there}", "organs missed"),
        (f"{false} of {absent}", "organs found that are not there"),
    ]
    if blocks is not None and blocks.get("accuracy") is not None:
        figures.append((f"{blocks['accuracy']:.1%}", "of balanced blocks right"))
    return (
        '<div class="figures">'
        + "".join(f"<div><b>{value}</b>{text(name)}</div>" for value, name in figures)
        + "</div>"
    )


def _interval(content: Mapping[str, Any], score: str, organ: str, decimals: int) -> str:
    entry = content["summary"][score][organ]
    if entry["mean"] is None:
        return "–"
    mean = f"{entry['mean']:.{decimals}f}"
    if entry["low"] is None:
        return mean
    return f"{mean} <small>[{entry['low']:.{decimals}f}, {entry['high']:.{decimals}f}]</small>"


def _organ_table(content: Mapping[str, Any]) -> str:
    shown = {
        "dice": ("Dice", 2),
        "nsd": (_nsd(content), 2),
        "hd95_mm": ("HD95, mm", 1),
        "volume_error_percent": ("volume off, %", 0),
        "centroid_mm": ("centre off, mm", 1),
        "wall_mm": ("walls off, mm", 1),
    }
    heads = ("organ", "patients", *(head for head, _ in shown.values()), "missed", "false")
    rows = []
    for organ in content["organs"]:
        found = content["presence"][organ]
        if not found["n_there"] + found["n_absent"]:
            continue
        rows.append(
            (
                text(_readable(organ)),
                str(content["summary"]["dice"][organ]["n_patients"]),
                *(_interval(content, s, organ, decimals) for s, (_, decimals) in shown.items()),
                f"{found['n_missed']} of {found['n_there']}",
                f"{found['n_false']} of {found['n_absent']}",
            )
        )
    return table(heads, rows, "sortable")


def _distribution(
    content: Mapping[str, Any], score: str, label: str, top: float | None = None
) -> str:
    rows = []
    for n, organ in enumerate(content["organs"]):
        points = _of_patients(content, score, n)
        if points:
            entry = content["summary"][score][organ]
            rows.append(Strip(_readable(organ), points, entry["mean"], entry["low"], entry["high"]))
    return strips(rows, label, top) if rows else f'<p class="note">No {text(label)}.</p>'


def _of_patients(content: Mapping[str, Any], score: str, organ: int) -> list[tuple[float, str]]:
    """Each patient's mean over cases, errors without their sign."""
    values: dict[str, list[float]] = {}
    for case in content["cases"]:
        value = case["scores"][score][organ]
        if value is not None:
            values.setdefault(str(case["patient"]), []).append(abs(value))
    return [(sum(v) / len(v), patient) for patient, v in values.items()]


def _worst(content: Mapping[str, Any], pictures: Pictures) -> str:
    organs = content["organs"]
    judged = []
    for case in content["cases"]:
        dice = [
            (d, organ)
            for d, organ in zip(case["scores"]["dice"], organs, strict=True)
            if d is not None
        ]
        if dice:
            judged.append((sum(d for d, _ in dice) / len(dice), min(dice)[0], case, dice))
    judged.sort(key=lambda entry: (entry[0], str(entry[2]["name"])))
    cards: list[str] = []
    rows: list[tuple[str, ...]] = []
    for mean, _, case, dice in judged:
        # The first of equals, as in the picture.
        least, organ = min(dice, key=lambda pair: pair[0])
        drawn = pictures.get((case["name"], case["fold"], case["model"]))
        name, worst = text(case["name"]), text(_readable(organ))
        if len(cards) < _MOST_CARDS:
            alt = f"{_readable(organ)} of {case['name']}: as segmented and as labelled"
            shown = "" if drawn is None else picture(drawn, alt)
            cards.append(
                f'<div class="card">{shown}<div><b>{name}</b><br>mean Dice {mean:.2f}<br>'
                f"lowest: {worst}, {least:.2f}</div></div>"
            )
        trained = "yes" if case["was_trained_on"] else "no"
        fold = "–" if case["fold"] is None else str(case["fold"])
        rows.append(
            (name, text(case["patient"]), fold, f"{mean:.3f}", worst, f"{least:.3f}", trained)
        )
    if not cards:
        return '<p class="note">No case was scored.</p>'
    heads = ("case", "patient", "fold", "mean Dice", "lowest organ", "its Dice", "trained on")
    return (
        '<p class="note">Each picture is the axial slice with most wrong voxels of the case\'s '
        "lowest organ: filled in blue as segmented, the label an orange line. The patient's left "
        "is at the right.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
        f"<details open><summary>All {len(rows)} cases</summary>{table(heads, rows, 'sortable')}"
        "</details>"
    )


def _confusions(content: Mapping[str, Any]) -> str:
    parts = [
        '<p class="note">Rows are what is true, columns what was said; a figure is the percentage '
        "of its row, darker is more. The diagonal is right.</p>"
    ]
    columns = [_readable(name) for name in content["classes"]]
    for kind, title in (("voxels", "Voxels"), ("blocks", "Balanced blocks")):
        found = content["confusion"][kind]
        if found is not None:
            rows = [_readable(name) for name in found["rows"]]
            drawn = heat_map(rows, columns, found["shares"], found["counts"], f"Confusion, {kind}")
            parts.append(
                f'<h3>{title}</h3><figure class="wide scroll" tabindex="0">{drawn}</figure>'
            )
    return "".join(parts)


def _calibrations(content: Mapping[str, Any]) -> str:
    parts = [
        '<p class="note">On the dashed line, confidence is what it says; below it, the model is '
        'too sure of itself.</p><div class="pair">'
    ]
    names = {"voxels": "Voxels segmented as an organ", "blocks": "Balanced blocks"}
    for kind, title in names.items():
        found = content["calibration"][kind]
        if found is None:
            continue
        drawn = reliability_diagram(
            found["confidence"], found["accuracy"], found["counts"], f"Reliability, {kind}"
        )
        error = found["expected_calibration_error"]
        said = "no prediction" if error is None else f"expected calibration error {error:.3f}"
        if found.get("brier") is not None:
            said += f", Brier score {found['brier']:.3f}, log loss {found['log_loss']:.3f}"
        parts.append(f"<figure><h3>{title}</h3>{drawn}<figcaption>{said}</figcaption></figure>")
    return "".join(parts) + "</div>"


def curve_section(curve: Mapping[str, Any]) -> str:
    """Accuracy against throughput, as markup.

    Parameters
    ----------
    curve : mapping
        ``points`` (``name``, ``scans_per_minute``, ``mean_dice``, ``dice`` and ``centre_mm`` by
        organ, ``on_front``), ``smallest`` and ``presets``.
    """
    points = curve["points"]
    organs = list(dict.fromkeys(organ for p in points for organ in p["dice"]))
    choices = [("", "mean of all organs"), *((organ, _readable(organ)) for organ in organs)]
    options = "".join(f'<option value="{text(v)}">{text(name)}</option>' for v, name in choices)
    figures = []
    for organ, title in choices:
        drawn = _curve(points, organ, title)
        hidden = " hidden" if organ else ""
        figures.append(f'<figure data-curve="{text(organ)}"{hidden}>{drawn}</figure>')
    rows = [
        (
            text(p["name"]),
            f"{p['scans_per_minute']:.3g}",
            _decimal(p["mean_dice"]),
            _decimal(_mean_of(p["centre_mm"]), 1),
            "yes" if p["on_front"] else "–",
        )
        for p in sorted(points, key=lambda p: -p["scans_per_minute"])
    ]
    heads = ("setting", "scans a minute", "mean Dice", "centre off, mm", "not beaten")
    return (
        "<h2>Accuracy and throughput</h2>"
        '<p class="note">No setting beats the filled points in both speed and Dice.</p>'
        f'<p hidden><label>Organ <select id="curve-organ">{options}</select></label></p>'
        f"{''.join(figures)}{table(heads, rows, 'sortable')}{_smallest(curve)}{_presets(curve)}"
    )


def _curve(points: Sequence[Mapping[str, Any]], organ: str, title: str) -> str:
    scored = [
        (p, p["dice"].get(organ) if organ else p["mean_dice"])
        for p in points
        if p["scans_per_minute"] > 0
    ]
    there = [(p, float(dice)) for p, dice in scored if dice is not None and math.isfinite(dice)]
    if not there:
        return f'<p class="note">No Dice of {text(title)}.</p>'
    speeds = [(p["scans_per_minute"], dice) for p, dice in there]
    drawn = [
        Point(
            str(p["name"]),
            p["scans_per_minute"],
            dice,
            _unbeaten((p["scans_per_minute"], dice), speeds) if organ else bool(p["on_front"]),
        )
        for p, dice in there
    ]
    return scatter(drawn, "scans a minute", f"Dice, {title}")


def _unbeaten(one: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    return not any(o[0] >= one[0] and o[1] >= one[1] and o != one for o in others)


def _mean_of(values: Mapping[str, float | None]) -> float | None:
    there = [value for value in values.values() if value is not None]
    return sum(there) / len(there) if there else None


def _smallest(curve: Mapping[str, Any]) -> str:
    found = curve.get("smallest")
    if not found:
        return ""
    rows = [
        (
            text(_readable(organ)),
            *(("–", "–") if entry is None else (str(entry["block_size"]), _decimal(entry["dice"]))),
        )
        for organ, entry in found.items()
    ]
    return "<h3>Smallest block that still recognises an organ</h3>" + table(
        ("organ", "block, px", "Dice"), rows, "sortable"
    )


def _presets(curve: Mapping[str, Any]) -> str:
    found = curve.get("presets")
    if not found:
        return ""
    rows = [(text(name), text(json.dumps(value, default=str))) for name, value in found.items()]
    return "<h3>Presets</h3>" + table(("preset", "settings"), rows, "words")


def _decimal(value: float | None, decimals: int = 3) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _record(content: Mapping[str, Any]) -> str:
    plain = json.dumps(content["how"], indent=1, ensure_ascii=False, default=str)
    lines = "\n".join(text(line) for line in plain.splitlines())
    warned = [
        f"<li>{text(case['name'])}: {text(warning)}</li>"
        for case in content["cases"]
        for warning in case["warnings"]
    ]
    listed = (
        f"<details><summary>{len(warned)} warnings about cases</summary><ul>{''.join(warned)}</ul>"
        "</details>"
        if warned
        else ""
    )
    return f"{listed}<details><summary>How cases were scored</summary><pre>{lines}</pre></details>"


def _readable(name: str) -> str:
    return str(name).replace("_", " ")
