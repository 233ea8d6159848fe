"""Draw a painted patient whose anatomy a model never saw: the truth above, what it found below.

python tools/starter_pictures.py MODEL CASES s0328-painted-000 -o painted.png
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from organfast.layouts import case_labels, find_cases
from organfast.models.classifier import load_model
from organfast.nifti import read_scan
from organfast.overlay import overlay_views, png_bytes
from organfast.pipeline import segment

WIDTH = 1000


def main() -> int:
    """Segment, draw twice, write one picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("cases", type=Path, help="folder of cases, as train_starter.py makes them")
    parser.add_argument("patient")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    model = load_model(given.model)
    case = next(c for c in find_cases(given.cases).cases if c.patient == given.patient)
    scan = read_scan(case.image)
    volume = scan.volume
    truth = np.asarray(case_labels(case, model.classes, volume).labels)
    is_organ = np.isin(truth, model.classes.organs)
    labels = volume.orientation.working(np.where(is_organ, truth, 0).astype(np.uint8))
    found = volume.orientation.working(segment(scan, model, threads=2).labels)
    at_mm = _middle(labels, volume.working_affine)
    pictures = [
        Image.open(io.BytesIO(png_bytes(overlay_views(volume, one, model.classes, at_mm, title))))
        for one, title in ((labels, "truth"), (found, "found by a model that never saw it"))
    ]
    height = sum(p.height for p in pictures)
    page = Image.new("RGB", (max(p.width for p in pictures), height))
    top = 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    page = page.resize((WIDTH, round(page.height * WIDTH / page.width)))
    page.quantize(256).save(given.output, optimize=True)
    return 0


def _middle(labels: NDArray[np.uint8], affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """RAS+ mm of the middle of all organs."""
    middle = np.argwhere(labels > 0).mean(axis=0)
    x, y, z = (affine[:3, :3] @ middle + affine[:3, 3]).tolist()
    return x, y, z


if __name__ == "__main__":
    sys.exit(main())
