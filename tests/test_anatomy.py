"""Class tables: the packaged one, tables from files and names, and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from organfast.anatomy import (
    ClassTable,
    Structure,
    canonical_name,
    stand_in_notes,
    totalsegmentator_names,
)
from organfast.errors import InputError
from organfast.torso import STRUCTURES


def test_the_default_table_has_the_23_classes_in_order_of_radlex_id() -> None:
    table = ClassTable.default()
    radlex = [s.radlex for s in table.structures]
    assert len(table) == 23
    assert radlex == sorted(radlex)  # type: ignore[type-var]  # every default class has one
    assert table.names[:4] == ("background", "body_envelope", "thorax_abdomen", "liver")
    assert len(table.organs) == 20
    assert table.context == table.index("thorax_abdomen")


def test_mirror_partners_point_at_each_other_and_have_opposite_sides() -> None:
    table = ClassTable.default()
    paired = [s for s in table.structures if s.mirror]
    assert len(paired) == 10
    for s in paired:
        assert table[s.mirror].mirror == s.name
        assert {s.side, table[s.mirror].side} == {"R", "L"}


def test_every_totalsegmentator_name_of_the_table_is_one_of_its_ids() -> None:
    known = set(totalsegmentator_names().values())
    for s in ClassTable.default().structures:
        assert set(s.totalsegmentator) <= known, s.name
    assert totalsegmentator_names()[5] == "liver"
    assert totalsegmentator_names()[52] == "aorta"


def test_a_table_survives_json() -> None:
    table = ClassTable.default()
    assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_names_become_a_table_with_sides_partners_and_colours() -> None:
    table = ClassTable.from_names(["liver", "tumour_left", "tumour_right", "thigh_left"])
    assert table.names[:3] == ("background", "thorax_abdomen", "liver")
    assert table["tumour_left"].side == "L"
    assert table["tumour_left"].mirror == "tumour_right"
    assert table["thigh_left"].mirror == ""
    assert len({s.rgb for s in table.structures}) == len(table)


def test_a_csv_needs_no_more_than_names(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("name\nheart\nstomach\n")
    table = ClassTable.read(path)
    assert table.names == ("background", "heart", "stomach")
    assert table.organs == (1, 2)


@pytest.mark.parametrize(
    "text",
    ["", "nom\nheart\n", "name\nheart\nheart\n", "name,red,green,blue\nheart,1,2,900\n"],
)
def test_a_csv_that_is_no_table_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"table\.csv: is not a class table") as caught:
        ClassTable.read(path)
    assert "\n" not in str(caught.value)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        ClassTable.read(tmp_path / "none.csv")


def test_tables_that_contradict_themselves_are_refused() -> None:
    background = Structure("background", "background")
    with pytest.raises(ValueError, match="twice"):
        ClassTable((background, Structure("a"), Structure("a")))
    with pytest.raises(ValueError, match="background"):
        ClassTable((Structure("a"),))
    with pytest.raises(ValueError, match="mirrors"):
        ClassTable((background, Structure("a", mirror="b"), Structure("b", mirror="")))
    with pytest.raises(ValueError, match="space"):
        Structure("left kidney")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'hart'.*liver"):
        ClassTable.default().index("hart")


def test_label_tables_carry_every_class_once() -> None:
    table = ClassTable.default()
    itksnap = [row.split('"')[1] for row in table.itksnap_table().splitlines()]
    slicer = [row.split()[1] for row in table.slicer_table().splitlines()[1:]]
    assert itksnap[1:] == list(table.names[1:])
    assert slicer == list(table.names)


# --- names ----------------------------------------------------------------------------------------


def test_every_known_name_is_its_own_canonical_name() -> None:
    """Two that were spelled alike would become one: so none are."""
    default = ClassTable.default().names
    for name in (*default, *totalsegmentator_names().values(), *STRUCTURES):
        assert canonical_name(name) == name


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        *((s, "liver") for s in ("liver", "Liver", "LIVER", " liver ", "58", "hepar")),
        *((s, "kidney_left") for s in ("left kidney", "kidney_left", "L_kidney", "Kidney (L)")),
        *((s, "kidney_left") for s in ("LeftKidney", "kidney-left", "KIDNEY_LT", "29663")),
        *((s, "adrenal_gland_right") for s in ("Right adrenal", "adrenal R", "suprarenal gland r")),
        *((s, "urinary_bladder") for s in ("bladder", "Urinary Bladder", "237")),
        *((s, "vertebrae_L1") for s in ("L1", "vertebra L1", "Vertebrae_L1", "29193")),
        *((s, "lung_upper_lobe_left") for s in ("left upper lobe", "Left Lung Upper Lobe")),
        *((s, "rib_left_3") for s in ("rib left 3", "Left Rib 3", "rib_3_left")),
        ("left thyroid", "left thyroid"),  # no structure of a table
        *((s, s) for s in ("kidney", "kidneys", "lung", "my tumour", "", "肝", "99999")),
    ],
)
def test_a_structure_is_known_however_it_is_spelled(spelled: str, name: str) -> None:
    assert canonical_name(spelled) == name


def test_what_stands_in_is_no_other_name_of_the_same() -> None:
    assert set(stand_in_notes()) >= {"iliopsoas_left", "iliopsoas_right"}
    assert canonical_name("iliopsoas_left") == "iliopsoas_left"
    assert canonical_name("Left Iliopsoas") == "iliopsoas_left"


def test_a_table_of_names_spelled_otherwise() -> None:
    names = ClassTable.from_names(["LIVER", "Kidney_L", "my_tumour"]).names
    assert names == ("background", "thorax_abdomen", "liver", "kidney_left", "my_tumour")
