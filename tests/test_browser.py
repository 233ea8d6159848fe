"""Reports in a real browser: Debian's chromium, headless, drawing WebGL in software."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as pictures

from organfast.anatomy import ClassTable
from organfast.evaluation import Scoring, evaluate
from organfast.evaluationreport import evaluation_page
from organfast.organs import measure_organs
from organfast.page import write_page
from organfast.report import Segmented, scan_page
from organfast.volume import Volume

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
NASTY = """<script>window.hit=1</script>"'</script><img src=x onerror="window.hit=1">"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page, and all that it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, size: tuple[int, int] = (1100, 800)) -> None:
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.page.set_default_timeout(30_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def ready(self) -> Opened:
        self.page.wait_for_selector("html[data-ready=true]", state="attached")
        self.page.wait_for_timeout(300)
        return self

    def canvas(self) -> np.ndarray:
        """(rows, columns, 3) of the viewer as it is on screen."""
        self.page.wait_for_timeout(300)
        shot = self.page.locator("#canvas").screenshot()
        return pictures.imread(io.BytesIO(shot))[..., :3]

    def fits(self) -> bool:
        wide = self.page.evaluate("document.documentElement.scrollWidth")
        return bool(wide <= self.page.viewport_size["width"])


def made_up(stored_right_to_left: bool = False) -> Segmented:
    """Soft tissue with a bright cube and organs: liver on the patient's right, spleen left."""
    hu = np.full((40, 36, 24), -1000, np.int16)  # x, y, z
    hu[4:36, 6:30] = 40
    labels = np.zeros(hu.shape, np.uint8)
    classes = ClassTable.default()
    labels[26:34, 10:20, 8:16] = classes.index("liver")
    labels[6:12, 10:20, 8:16] = classes.index("spleen")
    hu[7:11, 22:27, 10:14] = 1000  # the marker, on the patient's left
    affine = np.diag([5.0, 5.0, 5.0, 1.0])
    affine[:3, 3] = -97.5, -90, -60
    if stored_right_to_left:
        hu, labels = hu[::-1], labels[::-1]
        affine[0, 0], affine[0, 3] = -5.0, 97.5
    volume = Volume(hu, affine)
    working = volume.orientation.working(labels)
    organs = measure_organs(working, None, volume, classes)
    maps = {"liver": np.where(working == classes.index("liver"), 240, 0).astype(np.uint8)}
    record = {"warnings": [NASTY], "model": "m", "organfast": "0"}
    return Segmented(f"{NASTY}.nii.gz", volume, working, classes, organs, record, maps)


@pytest.fixture(scope="module")
def scan_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "report.html"
    write_page(scan_page(made_up()), path)
    return path


@pytest.fixture(scope="module")
def scan(browser: Any, scan_report: Path) -> Opened:
    return Opened(browser, scan_report).ready()


def test_it_opens_without_a_complaint_and_asks_nobody(scan: Opened, scan_report: Path) -> None:
    assert scan.requests == [scan_report.as_uri()]
    assert scan.complaints == []
    assert scan.page.evaluate("window.hit") is None
    assert scan.page.locator("h1").inner_text() == f"Segmentation of {NASTY}.nii.gz"


def test_the_canvas_is_not_blank(scan: Opened) -> None:
    drawn = scan.canvas()
    assert drawn.std() > 0.05
    assert (drawn.max(axis=2) > 0.3).mean() > 0.1


def test_choosing_an_organ_changes_what_is_drawn(scan: Opened) -> None:
    scan.page.click("[data-label='4']")
    spleen = scan.canvas()
    assert scan.page.locator("#where").inner_text().startswith("L ")
    assert "spleen" in scan.page.locator("#where").inner_text()
    scan.page.click("[data-label='3']")
    liver = scan.canvas()
    assert "liver" in scan.page.locator("#where").inner_text()
    assert (np.abs(liver - spleen).max(axis=2) > 0.1).mean() > 0.01
    scan.page.check("#probability")
    mapped = scan.canvas()
    assert "probability 0.9" in scan.page.locator("#where").inner_text()
    assert (np.abs(mapped - liver).max(axis=2) > 0.1).mean() > 0.01
    scan.page.click("[data-label='4']")
    assert "--probabilities" in scan.page.locator("#map-note").inner_text()
    scan.page.uncheck("#probability")


def test_opacity_and_window_change_what_is_drawn(scan: Opened) -> None:
    before = scan.canvas()
    scan.page.locator("#opacity").fill("0")
    plain = scan.canvas()
    assert np.ptp(plain, axis=2).mean() < np.ptp(before, axis=2).mean()  # fewer colours
    scan.page.locator("#window").select_option(index=1)
    assert np.abs(scan.canvas() - plain).mean() > 0.01
    scan.page.locator("#window").select_option(index=0)
    scan.page.locator("#opacity").fill("50")


def test_organs_can_be_chosen_by_keyboard(scan: Opened) -> None:
    scan.page.locator("#list [tabindex='0']").focus()
    scan.page.keyboard.press("Home")
    scan.page.keyboard.press("ArrowDown")
    chosen = scan.page.locator("#list [aria-checked='true']")
    assert chosen.get_attribute("data-label") == "3"
    assert scan.page.evaluate("document.activeElement.dataset.label") == "3"
    assert "liver" in scan.page.locator("#where").inner_text()
    scan.page.locator("#canvas").focus()
    before = scan.page.locator("#where").inner_text()
    scan.page.keyboard.press("ArrowUp")
    scan.page.wait_for_timeout(200)
    assert scan.page.locator("#where").inner_text() != before


@pytest.mark.parametrize("stored_right_to_left", [False, True])
def test_left_is_where_the_page_says(
    browser: Any, tmp_path: Path, stored_right_to_left: bool
) -> None:
    write_page(scan_page(made_up(stored_right_to_left)), tmp_path / "r.html")
    opened = Opened(browser, tmp_path / "r.html").ready()
    assert "The patient's left is at the right" in opened.page.locator("main").inner_text()
    opened.page.click("[data-view='0']")
    opened.page.locator("#opacity").fill("0")
    opened.page.evaluate("document.getElementById('window').selectedIndex = 2")
    opened.page.locator("#window").dispatch_event("change")
    drawn = opened.canvas()
    # White, not the crosshair; letters are smaller than the marker.
    rows, columns = np.nonzero(drawn.min(axis=2) > 0.85)
    assert np.median(columns) > 0.55 * drawn.shape[1]
    assert np.median(rows) < 0.5 * drawn.shape[0]  # the front is on top
    box = opened.page.locator("#canvas").bounding_box()
    x, y = np.median(columns) / drawn.shape[1], np.median(rows) / drawn.shape[0]
    opened.page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
    assert opened.page.locator("#where").inner_text().startswith("L ")
    opened.page.close()


def test_a_phone_scrolls_down_only_and_print_shows_the_picture(
    browser: Any, scan_report: Path
) -> None:
    phone = Opened(browser, scan_report, (390, 844)).ready()
    assert phone.fits()
    assert phone.page.locator("[data-view='0']").get_attribute("aria-pressed") == "true"
    phone.page.emulate_media(media="print")
    assert not phone.page.locator("#viewer").is_visible()
    assert phone.page.locator("#pictures img").is_visible()
    assert phone.page.locator("#pictures img").evaluate("one => one.naturalWidth") == 1600
    phone.page.close()


def test_without_webgl_there_is_a_picture(browser: Any, scan_report: Path) -> None:
    context = browser.new_context()
    context.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page = context.new_page()
    page.goto(scan_report.as_uri())
    assert page.locator("#no-webgl").is_visible()
    assert page.locator("#pictures img").is_visible()
    assert not page.locator("#viewer").is_visible()
    context.close()


def test_without_scripts_there_is_a_picture(browser: Any, scan_report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(scan_report.as_uri())
    assert page.locator("noscript img").is_visible()
    context.close()


def test_an_evaluation_opens_sorts_and_fits_a_phone(
    browser: Any, cohort_folder: Path, model_file: Path, tmp_path: Path
) -> None:
    evaluation = evaluate(model_file, cohort_folder, Scoring(n_blocks=10, n_resamples=50))
    content = evaluation.to_dict()
    content["cases"][0]["name"] = NASTY
    point = {"dice": {"liver": 0.8}, "centre_mm": {"liver": 2.0}, "on_front": True, "settings": {}}
    content["curve"] = {
        "points": [{**point, "name": NASTY, "scans_per_minute": 9.0, "mean_dice": 0.5}]
    }
    write_page(evaluation_page(content, {}), tmp_path / "r.html")
    opened = Opened(browser, tmp_path / "r.html").ready()
    assert opened.requests == [(tmp_path / "r.html").as_uri()]
    assert opened.complaints == []
    assert opened.page.evaluate("window.hit") is None
    table = opened.page.locator("table.sortable").first
    table.get_by_role("button", name="Dice").first.click()
    values = [
        float(t.split()[0]) for t in table.locator("tbody tr td:nth-child(3)").all_inner_texts()
    ]
    assert values == sorted(values)
    opened.page.locator("#curve-organ").select_option("liver")
    assert opened.page.locator("[data-curve='liver']").is_visible()
    assert not opened.page.locator("[data-curve='']").is_visible()
    opened.page.set_viewport_size({"width": 390, "height": 844})
    assert opened.fits()
    opened.page.close()
