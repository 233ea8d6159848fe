"""Draw the README's picture of a report: a phantom labelled by its painter, in chromium."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from organfast.anatomy import ClassTable
from organfast.organs import measure_organs
from organfast.page import write_page
from organfast.painting import paint
from organfast.phantom import FieldOfView, class_labels, phantom
from organfast.report import Segmented, scan_page

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "benchmarks" / "results" / "report.png"
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def main() -> None:
    anatomy = phantom(FieldOfView.over("trunk", (2.2, 2.2, 3.0), 180), 7, threads=2)
    volume = paint(anatomy, 7, threads=2)
    classes = ClassTable.default()
    labels = volume.orientation.working(class_labels(anatomy))
    organs = measure_organs(labels, None, volume, classes)
    record = {"warnings": [], "model": "painted", "organfast": "0.1.0"}
    content = scan_page(Segmented("phantom.nii.gz", volume, labels, classes, organs, record))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as browsers:
        path = Path(folder) / "report.html"
        write_page(content, path)
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        page = browser.new_page(viewport={"width": 1060, "height": 800})
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached", timeout=120_000)
        page.click(f"[data-label='{classes.index('liver')}']")
        page.wait_for_timeout(1500)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shot.save(PICTURE, optimize=True)
        browser.close()
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
