"""The report of one segmented scan: a page with a viewer, every organ's measures and the record.

::

    scan, labels, maps --(display: reduced)--> NIfTI in the page --(NiiVue)--> canvas
                       --(overlay)--> a picture, for print and for browsers without WebGL2
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.display import HU_STEP, Display, displayed
from organfast.organs import Organ
from organfast.overlay import overlay_views, png_bytes
from organfast.page import DISCLAIMER, asset, niivue, page, picture, table, text
from organfast.volume import Volume

__all__ = ["Segmented", "scan_page"]

_WINDOWS = {
    "soft tissue": (-160, 240),
    "lung": (-1350, 150),
    "bone": (-450, 1050),
    "all": (-1000, 1000),
}
_VIEWS = (("all three", 3), ("axial", 0), ("coronal", 1), ("sagittal", 2))


@dataclass(frozen=True, eq=False)
class Segmented:
    """What a scan's report is made of.

    Parameters
    ----------
    name : str
        What the scan is called: its file's name, without a folder.
    volume : Volume
        The scan.
    labels : (n_k, n_i, n_j) uint8 or uint16
        Label map in working order.
    classes : ClassTable
        What the labels mean.
    organs : mapping of str to Organ
        Every organ that was looked for.
    record : mapping
        Of ``run.json``.
    maps : mapping of str to (n_k, n_i, n_j) uint8
        Probability maps in working order, of any organs.
    has_image : bool
        Whether the volume's voxels are the scan's; without them the labels are shown alone.
    """

    name: str
    volume: Volume
    labels: NDArray[np.uint8] | NDArray[np.uint16]
    classes: ClassTable
    organs: Mapping[str, Organ]
    record: Mapping[str, Any]
    maps: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    has_image: bool = True


def scan_page(segmented: Segmented) -> str:
    """The report as one HTML page.

    Parameters
    ----------
    segmented : Segmented
        A scan and what was found in it.
    """
    s = segmented
    shown = displayed(s.volume, s.labels, s.maps, s.has_image)
    data: dict[str, Any] = {"image": shown.image, "labels": shown.labels}
    map_ids = {name: f"map-{n}" for n, name in enumerate(shown.maps)}
    data |= {map_ids[name]: content for name, content in shown.maps.items()}
    data["about"] = _about(s, map_ids)
    body = "\n".join(
        [
            f"<header><h1>Segmentation of {text(s.name)}</h1>",
            f'<p class="sub">{_geometry(s.volume)}</p>',
            f'<p class="disclaimer">{DISCLAIMER}.</p></header><main>',
            _warnings(s),
            _viewer(s, shown),
            _pictures(s),
            "<h2>Organs</h2>",
            _organ_table(s, shown),
            "<h2>How to read this page</h2>",
            _guide(s, shown),
            "<h2>Run record</h2>",
            _record(s.record),
            f"</main><footer>{DISCLAIMER}. Nothing on this page is fetched from a network. "
            "Viewer: NiiVue (BSD 2-Clause).</footer>",
        ]
    )
    return page(f"{s.name}: organfast report", body, [niivue(), asset("scan.js")], data)


def _about(s: Segmented, map_ids: Mapping[str, str]) -> dict[str, Any]:
    """What the page's script needs to know."""
    organs = [
        {
            "label": organ.label,
            "title": _readable(organ.name),
            "centre": list(organ.centroid_mm),
            "map": map_ids.get(organ.name),
        }
        for organ in s.organs.values()
        if organ.centroid_mm is not None
    ]
    largest = max(
        (o for o in s.organs.values() if o.centroid_mm), key=lambda o: o.volume_ml, default=None
    )
    return {
        "organs": organs,
        "colours": [list(structure.rgb) for structure in s.classes.structures],
        "has_image": s.has_image,
        "start": None if largest is None else largest.centroid_mm,
    }


def _geometry(volume: Volume) -> str:
    k, i, j = volume.working.shape
    z, y, x = volume.working_spacing_mm
    return f"{j} × {i} × {k} voxels of {x:.2f} × {y:.2f} × {z:.2f} mm (x, y, z)"


def _warnings(s: Segmented) -> str:
    found = [*s.record.get("warnings", ())]
    for organ in s.organs.values():
        found += [w if organ.name in w else f"{organ.name}: {w}" for w in organ.warnings]
    items = "".join(f"<li>{text(warning)}</li>" for warning in dict.fromkeys(map(str, found)))
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>' if items else ""


def _viewer(s: Segmented, shown: Display) -> str:
    views = "".join(
        f'<button type="button" data-view="{number}" aria-pressed="false">{name}</button>'
        for name, number in _VIEWS
    )
    windows = "".join(
        f'<option value="{low},{high}">{name}: {low} to {high} HU</option>'
        for name, (low, high) in _WINDOWS.items()
    )
    window = f'<label>Window <select id="window">{windows}</select></label>'
    if not s.has_image:
        window = window.replace("<label>", "<label hidden>")
    entries = "".join(_list_entry(s.classes, organ) for organ in s.organs.values())
    return f"""
<noscript><p class="warnings">Scripts are off, so the viewer is; the picture below is not.</p>
</noscript>
<p id="no-webgl" class="warnings" hidden>This browser has no WebGL2, which the viewer draws with;
the picture below shows three slices instead.</p>
<section class="viewer" id="viewer" aria-label="Scan viewer">
<div class="stage">
<div class="tools">
<fieldset><legend>View</legend>{views}</fieldset>
{window}
<label>Opacity <input id="opacity" type="range" min="0" max="100" value="50"></label>
<label><input id="alone" type="checkbox"> chosen organ alone</label>
<label><input id="probability" type="checkbox"> probability</label>
<span id="scale" hidden>0 <span class="bar"></span> 1</span>
</div>
<div class="canvas"><canvas id="canvas" tabindex="0" role="img" aria-describedby="where"
aria-label="The scan with its organs; arrow keys move the crosshair"></canvas></div>
<p class="where" id="where" role="status" aria-live="polite"></p>
<p class="where" id="map-note" role="status"></p>
</div>
<div class="organs"><h3 id="list-head">Organs (choose with arrow keys)</h3>
<div class="list" id="list" role="radiogroup" aria-labelledby="list-head">
<button type="button" role="radio" aria-checked="true" data-label="">All organs<span></span>
</button>
{entries}</div></div></section>
<p class="note">The patient's left is at the right of axial and coronal views (radiological
convention, letters at the edges). {_reduced(shown)}</p>"""


def _list_entry(classes: ClassTable, organ: Organ) -> str:
    title = text(_readable(organ.name))
    disabled = "" if organ.centroid_mm else " disabled"
    amount = f"{_ml(organ.volume_ml)} ml" if organ.n_voxels else "absent"
    return (
        f'<button type="button" role="radio" aria-checked="false" tabindex="-1"'
        f' data-label="{organ.label}"{disabled}>{_swatch(classes, organ.label)}'
        f"<span>{title}</span><span>{amount}</span></button>"
    )


def _reduced(shown: Display) -> str:
    k, i, j = shown.factors
    if shown.factors == (1, 1, 1):
        return f"Shown at full resolution, HU in steps of {HU_STEP}."
    return (
        f"Reduced for display: {j} × {i} × {k} voxels (x, y, z) of the scan are one here, their "
        f"mean HU in steps of {HU_STEP}, labels by the middle voxel. All figures below are of the "
        "full scan."
    )


def _pictures(s: Segmented) -> str:
    figure = overlay_views(s.volume, s.labels, s.classes)
    alt = "Axial, coronal and sagittal slice with the organs outlined, the patient's left at right"
    shown = f"<figure>{picture(png_bytes(figure), alt)}</figure>"
    return f'<div id="pictures" class="print">{shown}</div><noscript>{shown}</noscript>'


def _organ_table(s: Segmented, shown: Display) -> str:
    heads = (
        "organ",
        "present",
        "volume, ml",
        "confidence",
        "centre R/L, A/P, S/I, mm",
        "box x · y · z, mm",
        "cut off at",
        "probability map",
        "warnings",
    )
    rows = []
    for organ in s.organs.values():
        stored = "in this page" if organ.name in shown.maps else "–"
        if organ.name in shown.left_out:
            stored = "left out: too large"
        rows.append(
            (
                _swatch(s.classes, organ.label) + text(_readable(organ.name)),
                "yes" if organ.present else '<span class="absent">no</span>',
                _ml(organ.volume_ml) if organ.n_voxels else "–",
                "–"
                if organ.confidence is None or not organ.n_voxels
                else f"{organ.confidence:.2f}",
                _place(organ),
                _extent(organ),
                text(", ".join(organ.cut_off) or "–"),
                stored,
                text("; ".join(organ.warnings) or "–"),
            )
        )
    return table(heads, rows)


def _place(organ: Organ) -> str:
    if organ.centroid_mm is None:
        return "–"
    letters = (("R", "L"), ("A", "P"), ("S", "I"))
    parts = zip(organ.centroid_mm, letters, strict=True)
    return " · ".join(f"{high if mm >= 0 else low} {abs(mm):.0f}" for mm, (high, low) in parts)


def _extent(organ: Organ) -> str:
    if organ.box_mm is None:
        return "–"
    low, high = organ.box_mm
    return " · ".join(f"{b - a:.0f}" for a, b in zip(low, high, strict=True))


def _guide(s: Segmented, shown: Display) -> str:
    source = (
        ""
        if s.has_image
        else (
            "<p><strong>The scan itself is not in this page</strong>: labels are shown alone. "
            "<code>organfast view OUT -i SCAN</code> makes it with the scan.</p>"
        )
    )
    return f"""{source}
<p>Choose an organ: the crosshair goes to its centre and the others fade. Drag or touch to move the
crosshair; the line below names place, HU and organ, so that colours need not be told apart. With
the viewer focused, arrow up and down change the slice (page up and down: five), left and right move
sideways, shift with up and down to front and back. Click the viewer, then the wheel scrolls.</p>
<p><b>Confidence</b> is the mean probability of the organ over its voxels, 0 to 1; low means that
the classifier wavered. <b>Cut off</b> names sides of the field of view that the organ touches: its
volume is then too small. <b>Absent</b> organs had no voxel. Coordinates are millimetres from
the scan's origin to the patient's right (R) or left (L), front (A) or back (P), head (S) or feet
(I).</p>
<p>{_about_maps(shown)}</p>"""


def _about_maps(shown: Display) -> str:
    if shown.maps:
        return (
            f"Probability maps of {len(shown.maps)} organs are in this page, coarser than the "
            "labels; below 0.05 nothing is drawn."
        )
    return "No probability maps are stored; <code>--probabilities</code> of segment stores them."


def _record(record: Mapping[str, Any]) -> str:
    plain = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    lines = "\n".join(text(line) for line in plain.splitlines())
    model = str(record.get("model", ""))[:12]
    return (
        f"<p>organfast {text(record.get('organfast', '?'))}, model {text(model)}…</p>"
        f"<details><summary>Everything that made this result</summary><pre>{lines}</pre></details>"
    )


def _swatch(classes: ClassTable, label: int) -> str:
    red, green, blue = classes.structures[label].rgb
    return (
        '<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">'
        f'<rect width="14" height="14" rx="2" fill="rgb({red},{green},{blue})"/></svg>'
    )


def _ml(volume: float) -> str:
    return f"{volume:,.0f}" if volume >= 10 else f"{volume:.1f}"


def _readable(name: str) -> str:
    return name.replace("_", " ")
