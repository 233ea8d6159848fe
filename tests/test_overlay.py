"""Pictures: rendered pixels at known places of the patient, proportions, bytes on disk."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from organfast.anatomy import ClassTable, Structure, totalsegmentator_names
from organfast.errors import InputError
from organfast.overlay import (
    FILL_ALPHA,
    PROBABILITY_ALPHA,
    overlay_probability,
    overlay_views,
    save_png,
)
from organfast.volume import Volume

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = Path(__file__).parents[2] / "shared" / "data" / "labelled"
TABLE = ClassTable.default()
LIVER, SPLEEN, BLADDER = (TABLE.index(n) for n in ("liver", "spleen", "urinary_bladder"))
GREY_HU = 40  # half-way in the window: 0.5


def torso(signs: tuple[float, float, float] = (1, 1, 1)) -> tuple[Volume, NDArray[np.uint8]]:
    """Voxels of 3x3x5 mm: liver right and high, spleen left, bladder low and in front.

    The table of the scanner, 1000 HU, runs behind the patient.
    """
    hu = np.full((30, 60, 80), GREY_HU, np.int16)  # k, i, j
    hu[:, :4] = 1000
    labels = np.full(hu.shape, TABLE.context, np.uint8)
    labels[18:28, 20:40, 50:72] = LIVER
    labels[18:26, 12:24, 8:20] = SPLEEN
    labels[2:8, 40:52, 32:48] = BLADDER
    affine = np.diag([3.0 * signs[0], 3.0 * signs[1], 5.0 * signs[2], 1.0])
    affine[:3, 3] = (-100, 50, -300)
    flips = tuple(slice(None, None, int(sign)) for sign in signs)
    stored = hu.transpose(2, 1, 0)[flips]
    volume = Volume(np.asfortranarray(stored), affine)
    return volume, labels


@lru_cache(maxsize=1)
def rendered(figure: Figure) -> NDArray[np.float64]:
    """(rows, columns, 3) 0..1, row 0 on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def pixel(figure: Figure, panel: int, right: float, down: float) -> NDArray[np.float64]:
    """Colour at a place of a panel, given as shares of its width and height."""
    picture = rendered(figure)
    box = panels(figure)[panel].get_window_extent()
    column = round(box.x0 + right * box.width)
    row = round(picture.shape[0] - box.y1 + down * box.height)
    found: NDArray[np.float64] = picture[row, column]
    return found


def panels(figure: Figure) -> list[Any]:
    """The axes behind the page, in drawing order."""
    return figure.axes[1:]


def filled(label: int, grey: float = 0.5) -> NDArray[np.float64]:
    rgb = np.array(TABLE.structures[label].rgb) / 255
    blend: NDArray[np.float64] = (1 - FILL_ALPHA) * grey + FILL_ALPHA * rgb
    return blend


def at(volume: Volume, k: float, i: float, j: float) -> list[float]:
    affine = volume.working_affine
    return (affine[:3, :3] @ (k, i, j) + affine[:3, 3]).tolist()


SIGNS = [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)]


@pytest.mark.parametrize("signs", SIGNS)
def test_axial_has_the_patients_right_on_the_left_and_the_back_below(
    signs: tuple[float, float, float],
) -> None:
    volume, labels = torso(signs)
    figure = overlay_views(volume, labels, TABLE, at_mm=at(volume, 22, 30, 60))
    # A place of the liver (i 35, j 65) and one of the spleen (i 20, j 10), seen from the feet.
    liver = pixel(figure, 0, right=1 - 65.5 / 80, down=1 - 35.5 / 60)
    spleen = pixel(figure, 0, right=1 - 10.5 / 80, down=1 - 21.5 / 60)
    np.testing.assert_allclose(liver, filled(LIVER), atol=0.01)
    np.testing.assert_allclose(spleen, filled(SPLEEN), atol=0.01)
    np.testing.assert_allclose(pixel(figure, 0, 0.3, 0.98), [1, 1, 1], atol=0.01)
    np.testing.assert_allclose(pixel(figure, 0, 0.3, 0.05), [0.5] * 3, atol=0.01)


@pytest.mark.parametrize("signs", SIGNS[::2])
def test_coronal_and_sagittal_have_the_head_on_top_and_the_front_on_the_left(
    signs: tuple[float, float, float],
) -> None:
    volume, labels = torso(signs)
    figure = overlay_views(volume, labels, TABLE, at_mm=at(volume, 22, 46, 40))
    bladder = pixel(figure, 1, right=1 - 44.5 / 80, down=1 - 4.5 / 30)
    np.testing.assert_allclose(bladder, filled(BLADDER), atol=0.01)
    bladder = pixel(figure, 2, right=1 - 48.5 / 60, down=1 - 3.5 / 30)
    np.testing.assert_allclose(bladder, filled(BLADDER), atol=0.01)
    np.testing.assert_allclose(pixel(figure, 2, 0.98, 0.2), [1, 1, 1], atol=0.01)

    figure = overlay_views(volume, labels, TABLE, at_mm=at(volume, 22, 30, 40))
    liver = pixel(figure, 1, right=1 - 66.5 / 80, down=1 - 20.5 / 30)
    np.testing.assert_allclose(liver, filled(LIVER), atol=0.01)


def test_letters_stand_where_the_patients_sides_are() -> None:
    volume, labels = torso()
    figure = overlay_views(volume, labels, TABLE)
    found = []
    for panel in panels(figure):
        (x0, x1), (y1, y0) = panel.get_xlim(), panel.get_ylim()
        places = {}
        for text in panel.texts:
            x, y = text.get_position()
            if text.get_text() in "RLAPSI":
                places[text.get_text()] = ((x - x0) / (x1 - x0), (y - y0) / (y1 - y0))
        found.append(places)
    for places, (left, right, top, bottom) in zip(found, ("RLAP", "RLSI", "APSI"), strict=True):
        assert places[left][0] < 0.1 < 0.9 < places[right][0]
        assert places[top][1] < 0.2 < 0.8 < places[bottom][1]
        assert len(places) == 4


def test_all_views_share_one_scale_in_mm_and_fit_the_page() -> None:
    volume, labels = torso()
    figure = overlay_views(volume, labels, TABLE)
    assert rendered(figure).shape[1] == 1600
    sizes_mm = [(240, 180), (240, 150), (180, 150)]  # width, height
    scales = []
    for panel, (width, height) in zip(panels(figure), sizes_mm, strict=True):
        box = panel.get_window_extent()
        scales += [box.width / width, box.height / height]
        assert box.x0 >= 0
        assert box.x1 <= 1600
    np.testing.assert_allclose(scales, scales[0], rtol=1e-6)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_page_says_what_it_shows() -> None:
    volume, labels = torso()
    words = texts(overlay_views(volume, labels, TABLE, title="case 7"))
    assert {"case 7", f"{LIVER}  liver", f"{SPLEEN}  spleen", "50 mm"} <= set(words)
    assert any("the patient's right (R) is on the left" in text for text in words)
    assert any("Window -160 to 240 HU" in text for text in words)
    assert not any("thorax" in text or "aorta" in text for text in words)
    assert not any("oblique" in text for text in words)


def test_only_organs_in_sight_are_in_the_legend() -> None:
    volume, labels = torso()
    words = texts(overlay_views(volume, labels, TABLE, at_mm=at(volume, 12, 55, 2)))
    assert "No organ of the class table is in these slices." in words
    assert not any("liver" in text for text in words)


def test_an_oblique_scan_is_said_to_be_oblique() -> None:
    volume, labels = torso()
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    words = texts(overlay_views(Volume(volume.hu, turn @ volume.affine), labels, TABLE))
    assert any("oblique by 17 degrees" in text for text in words)


def test_without_a_point_the_planes_meet_most_organs() -> None:
    volume, labels = torso()
    labels[labels == BLADDER] = TABLE.context or 0
    words = texts(overlay_views(volume, labels, TABLE))
    assert "Axial, slice 19 of 30 from the feet" in words  # first slice with liver and spleen
    assert "Coronal, slice 21 of 60 from the back" in words
    assert "Sagittal, slice 51 of 80 from the left" in words


def test_names_are_text_and_not_mathematics() -> None:
    structures = (*TABLE.structures[:3], Structure("$x^{$_" + "x" * 60))
    volume, labels = torso()
    figure = overlay_views(volume, (labels > 2) * np.uint8(3), ClassTable(structures), title="a$b$")
    rendered(figure)
    assert any(text.startswith("3  $x^{$ xxx") and len(text) < 40 for text in texts(figure))


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 1, 1), (1, 3, 400)])
def test_odd_shapes_are_drawn(shape: tuple[int, int, int]) -> None:
    volume = Volume(np.zeros(shape[::-1], np.int16), np.diag([1.0, 1.0, 5.0, 1.0]))
    assert rendered(overlay_views(volume, np.full(shape, LIVER, np.uint16), TABLE)).shape[1] == 1600
    probability = np.full(shape, 200, np.uint8)
    assert rendered(overlay_probability(volume, probability, "liver")).shape[1] == 1600


def test_arguments_that_do_not_fit_are_refused() -> None:
    volume, labels = torso()
    with pytest.raises(ValueError, match="working order"):
        overlay_views(volume, labels.T, TABLE)
    with pytest.raises(ValueError, match="a label is 22; the class table ends at 4"):
        overlay_views(volume, np.full_like(labels, 22), ClassTable(TABLE.structures[:5]))
    with pytest.raises(ValueError, match="lies outside the scan"):
        overlay_views(volume, labels, TABLE, at_mm=(1000, 0, 0))
    with pytest.raises(ValueError, match="is no point"):
        overlay_views(volume, labels, TABLE, at_mm=(0, 0))
    with pytest.raises(ValueError, match="does not fit"):
        overlay_probability(volume, labels.T, "liver")
    with pytest.raises(ValueError, match="does not fit"):
        overlay_probability(volume, labels / 255, "liver")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k is missing"):
        overlay_probability(volume, labels[0], "liver")
    with pytest.raises(ValueError, match="k 30 is no slice"):
        overlay_probability(volume, labels, "liver", 30)


# --- probabilities --------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", SIGNS[::2])
def test_a_probability_lies_over_its_organ_in_the_slice_where_it_is_largest(
    signs: tuple[float, float, float],
) -> None:
    from matplotlib import colormaps

    volume, labels = torso(signs)
    probability = np.where(labels == LIVER, 204, 10).astype(np.uint8)
    probability[20, 20:40, 50:72] = 255
    figure = overlay_probability(volume, probability, "liver")
    assert texts(figure).count("Axial, slice 21 of 30 from the feet") == 2
    place = {"right": 1 - 65.5 / 80, "down": 1 - 35.5 / 60}
    mapped = np.array(colormaps["plasma"](1.0)[:3])
    blend = (1 - PROBABILITY_ALPHA) * 0.5 + PROBABILITY_ALPHA * mapped
    np.testing.assert_allclose(pixel(figure, 0, **place), [0.5] * 3, atol=0.01)
    np.testing.assert_allclose(pixel(figure, 1, **place), blend, atol=0.015)
    np.testing.assert_allclose(pixel(figure, 1, 0.9, 0.7), [0.5] * 3, atol=0.01)

    of_slice = overlay_probability(volume, probability[20], "liver", k=20)
    np.testing.assert_array_equal(rendered(of_slice), rendered(figure))


def test_the_colour_bar_runs_from_0_to_1_and_names_the_organ() -> None:
    volume, labels = torso()
    words = texts(overlay_probability(volume, labels, "kidney_left"))
    assert {"0", "0.5", "1", "probability of kidney left"} <= set(words)


# --- files ----------------------------------------------------------------------------------------


def test_a_picture_is_the_same_bytes_each_time_and_names_no_software(tmp_path: Path) -> None:
    volume, labels = torso()
    for name in ("one.png", "two.png"):
        save_png(overlay_views(volume, labels, TABLE), tmp_path / name)
    one = (tmp_path / "one.png").read_bytes()
    assert one == (tmp_path / "two.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    assert b"matplotlib" not in one.lower()
    assert b"tEXt" not in one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    volume, labels = torso()
    figure = overlay_views(volume, labels, TABLE)
    with pytest.raises(InputError, match="cannot be written"):
        save_png(figure, tmp_path / "absent" / "one.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_png(figure, tmp_path / "folder")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]


def test_users_settings_turn_no_picture_round_and_pyplot_stays_away(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text(
        "image.origin: lower\nfigure.autolayout: True\nfont.family: monospace\nimage.cmap: jet\n"
    )
    code = (
        "import sys; from test_overlay import *; volume, labels = torso();"
        "figure = overlay_views(volume, labels, TABLE);"
        "save_png(figure, sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    out = tmp_path / "one.png"
    subprocess.run(
        [sys.executable, "-c", code, str(out)],
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "MATPLOTLIBRC": str(tmp_path)},
    )
    volume, labels = torso()
    plain = io.BytesIO()
    overlay_views(volume, labels, TABLE).savefig(plain, metadata={"Software": None})
    assert out.read_bytes() == plain.getvalue()


# --- a real scan ----------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not DATA.exists(), reason="the real CT scans are not beside this checkout")
def test_the_liver_of_a_real_scan_is_green_and_on_the_left_of_the_picture() -> None:
    import nibabel as nib

    image, reference = (nib.load(DATA / f"{n}.nii.gz") for n in ("abdomen", "abdomen_labels"))
    ids = {name: label for label, name in totalsegmentator_names().items()}
    renamed = np.zeros(256, np.uint8)
    renamed[ids["liver"]], renamed[ids["spleen"]] = LIVER, SPLEEN
    volume = Volume(np.asarray(image.dataobj).astype(np.int16), image.affine)
    labels = volume.orientation.working(renamed[np.asarray(reference.dataobj)])
    figure = overlay_views(volume, labels, TABLE, at_mm=(67, 185, 392))
    picture = rendered(figure)
    box = panels(figure)[0].get_window_extent()
    half = int(box.x0 + box.width / 2)
    axial = picture[int(picture.shape[0] - box.y1) : int(picture.shape[0] - box.y0)]
    green = axial[..., 1] - axial[..., 0] > 0.08
    left, right = green[:, int(box.x0) : half], green[:, half : int(box.x1)]
    assert np.count_nonzero(left) > 2 * np.count_nonzero(right) > 1000
