"""Painting: a label map becomes a CT scan that could have had these labels.

Each tissue gets an HU drawn for this patient from the range of its contrast phase, and what a
scanner would see of it: walls, cortex and marrow, vessels, bowel contents with gas, marbled muscle.
The slice is then blurred as by a reconstruction kernel and noise of that kernel's texture is added.
Where a label map knows organs only, the body around them (wall muscle, fat, skin) is made up.

Random numbers depend on the seed, the slice and the position alone, so that any number of threads
paints the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from organfast.surroundings import ARMS, Arms, add_arms, add_bedding
from organfast.volume import Orientation, Volume

__all__ = [
    "BEDS",
    "PHASES",
    "THINGS",
    "TISSUES",
    "Bed",
    "LabelMap",
    "Phase",
    "Protocol",
    "Tissue",
    "hu_range",
    "in_slabs",
    "paint",
    "texture_tile",
    "tissue_of",
]

Phase = Literal["native", "arterial", "portal_venous"]
PHASES: tuple[Phase, ...] = ("native", "arterial", "portal_venous")
Bed = Literal["curved", "flat", "cradle"]
BEDS: tuple[Bed, ...] = ("curved", "flat", "cradle")

Range = tuple[float, float]
Ranges = tuple[Range, Range, Range]  # by phase, in the order of PHASES

_ANGLES = 96
_MAX_TISSUES = 255


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Labelled anatomy: which structure lies where.

    Parameters
    ----------
    labels : (n_a, n_b, n_c) uint8 or uint16
        Label of each voxel, 0 = unlabelled; axes as stored by a file, any memory order.
    affine : (4, 4) float64
        Stored voxel index -> RAS+ mm.
    names : mapping of int to str
        Name of each label; TotalSegmentator's where it has one.

    Raises
    ------
    ValueError
        ``labels`` is not a 3-D map of unsigned integers, or a label in it has no name.
    """

    labels: NDArray[np.uint8] | NDArray[np.uint16]
    affine: NDArray[np.float64]
    names: Mapping[int, str]

    def __post_init__(self) -> None:
        if self.labels.ndim != 3 or self.labels.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"a label map is a 3-D uint8 or uint16 array, not {self.labels.ndim}-D "
                f"{self.labels.dtype}; convert it first"
            )
        unknown = [n for n in self.present() if n not in self.names]
        if unknown:
            raise ValueError(
                f"label {unknown[0]} has no name; names are given for {len(self.names)} labels"
            )

    def present(self) -> tuple[int, ...]:
        """The labels that occur, ascending, without 0."""
        counts = np.zeros(1 << (8 * self.labels.itemsize), bool)
        for page in self.working:  # slice by slice: counting needs 8 bytes a voxel
            counts |= np.bincount(page.ravel(order="K"), minlength=counts.size) > 0
        return tuple(n for n in np.flatnonzero(counts).tolist() if n)

    @property
    def working(self) -> NDArray[Any]:
        """(n_k, n_i, n_j) view of the labels in working order."""
        return Orientation.of_affine(self.affine).working(self.labels)

    @property
    def working_spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along (k, i, j), mm."""
        axes = Orientation.of_affine(self.affine).axes
        lengths = np.linalg.norm(np.asarray(self.affine, np.float64)[:3, :3], axis=0)
        return float(lengths[axes[0]]), float(lengths[axes[1]]), float(lengths[axes[2]])


@dataclass(frozen=True)
class Protocol:
    """How a scan is taken.

    Parameters
    ----------
    phase : {"native", "arterial", "portal_venous"}
        Contrast phase.
    noise_hu : float
        Standard deviation of the noise in the middle of an average abdomen, HU.
    sharpness_mm : float
        Standard deviation of the in-plane blur, mm (0.5 sharp .. 1.0 soft).
    couch : bool
        The patient lies on a table.
    circle : bool
        Only a disc of each slice is reconstructed; outside it is -1024.
    bed : {"curved", "flat", "cradle"}
        The table's top: shallow under a thin mattress, flat (of radiotherapy), or deep.
    bedding : bool
        A cushion behind the patient, a blanket in front, both, or at times neither.
    arms : {"up", "beside", "folded"}
        Where a patient whose skin is made up has the arms: raised out of view, along the trunk, or
        folded over the belly.
    """

    phase: Phase = "portal_venous"
    noise_hu: float = 14.0
    sharpness_mm: float = 0.6
    couch: bool = True
    circle: bool = False
    bed: Bed = "curved"
    bedding: bool = False
    arms: Arms = "up"

    def __post_init__(self) -> None:
        for name, known in (("phase", PHASES), ("bed", BEDS), ("arms", ARMS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
        if not self.noise_hu >= 0 or not self.sharpness_mm > 0:
            raise ValueError(
                f"noise_hu {self.noise_hu} must not be negative, and sharpness_mm "
                f"{self.sharpness_mm} must be positive"
            )

    @staticmethod
    def draw(seed: int) -> Protocol:
        """A plausible protocol: any phase (half of them portal venous), 10..24 HU of noise."""
        random = np.random.default_rng([seed, 71])
        return Protocol(
            phase=PHASES[int(random.choice(3, p=[0.25, 0.25, 0.5]))],
            noise_hu=float(random.uniform(10, 24)),
            sharpness_mm=float(random.uniform(0.5, 0.8)),
            circle=bool(random.random() < 0.4),
        )


@dataclass(frozen=True)
class Tissue:
    """What a tissue looks like on CT. HU ranges are those of patients' means, by phase.

    Parameters
    ----------
    core : three (low, high) pairs, HU
        Native, arterial, portal venous.
    shell, shell_mm : three pairs, mm
        Wall or cortex, and its thickness; thickness 0 = none.
    inner, inner_mm : (low, high), mm
        What lies deeper than ``inner_mm``; 0 = nothing.
    patch : (HU, mm)
        Deviation and grain of the texture.
    vessels : (HU or name, spacing mm, width, depth mm)
        Tubes through the tissue: a number, or the tissue whose HU they share; relative width 0 =
        none; they reach their width at the given depth (0 = everywhere).
    gas : float
        How much gas gathers at the front of the lumen, 0 = none.
    bubbles : float
        Share of the contents that is gas bubbles, as a number of texture deviations; 0 = none.
    fall : float
        HU per mm from front to back (the lung's own weight).
    """

    core: Ranges
    shell: Ranges = ((0, 0), (0, 0), (0, 0))
    shell_mm: float = 0.0
    inner: Range = (0, 0)
    inner_mm: float = 0.0
    patch: tuple[float, float] = (0.0, 1.0)
    vessels: tuple[float | str, float, float, float] = (0.0, 1.0, 0.0, 0.0)
    gas: float = 0.0
    bubbles: float = 0.0
    fall: float = 0.0


def _same(low: float, high: float) -> Ranges:
    return (low, high), (low, high), (low, high)


# Ranges of patients' means as radiology texts give them; neighbours overlap on purpose. A range is
# wide where patients differ (fatty livers, cardiac output, the second of the arterial phase).
_WALL: Ranges = ((28, 48), (55, 95), (60, 105))
_ARTERY: Ranges = ((34, 50), (220, 400), (120, 180))
_SPONGY: Ranges = _same(95, 230)
TISSUES: dict[str, Tissue] = {
    "skin": Tissue(_same(0, 40)),
    "subcutaneous_fat": Tissue(_same(-114, -96), patch=(5, 9), vessels=(-20.0, 30, 0.12, 0)),
    "intermuscular_fat": Tissue(_same(-100, -70), patch=(10, 6)),
    "trunk_fat": Tissue(_same(-112, -92), patch=(7, 9), vessels=("vein", 20, 0.17, 0)),
    "muscle": Tissue(((42, 62), (45, 66), (50, 72)), patch=(5, 7), vessels=(-50.0, 13, 0.12, 0)),
    "spongy_bone": Tissue(_SPONGY, _same(330, 620), 1.7, patch=(38, 3.5)),
    "flat_bone": Tissue(_same(60, 220), _same(380, 700), 1.6, patch=(40, 3)),
    "long_bone": Tissue(_same(20, 160), _same(550, 1000), 2.6, patch=(45, 5)),
    "cartilage": Tissue(_same(70, 130), patch=(25, 5)),
    "disc": Tissue(_same(55, 100), patch=(8, 5)),
    "cord": Tissue(_same(18, 42), _same(-20, 15), 1.6),
    "lung": Tissue(_same(-895, -825), patch=(14, 6), vessels=("pulmonary", 16, 0.2, 25), fall=0.35),
    "airway": Tissue(_same(-1000, -985), _same(-60, 20), 0.9),
    "liver": Tissue(
        ((18, 66), (45, 85), (75, 125)), patch=(3.5, 9), vessels=("liver_vein", 26, 0.12, 18)
    ),
    "liver_vein": Tissue(((30, 45), (55, 110), (125, 185))),
    "spleen": Tissue(((38, 56), (85, 160), (95, 140)), patch=(6, 8)),
    "pancreas": Tissue(((25, 48), (75, 130), (70, 115)), patch=(9, 6), vessels=(-45.0, 9, 0.22, 0)),
    "gallbladder": Tissue(_same(0, 22), ((20, 45), (30, 60), (40, 80)), 1.6),
    "bladder": Tissue(_same(-2, 16), ((22, 42), (30, 60), (35, 70)), 3.2),
    "kidney": Tissue(
        ((22, 42), (60, 120), (135, 205)),
        ((25, 42), (140, 230), (150, 215)),
        6.5,
        (-45, 15),
        17.0,
        patch=(9, 10),
    ),
    "adrenal": Tissue(((5, 36), (55, 105), (50, 95)), patch=(5, 5)),
    "thyroid": Tissue(((75, 120), (140, 230), (110, 175)), patch=(12, 6)),
    "artery": Tissue(_ARTERY, patch=(4, 8)),
    "pulmonary": Tissue(((34, 50), (170, 380), (110, 170)), patch=(5, 10)),
    "upper_vein": Tissue(((34, 50), (80, 380), (105, 165)), patch=(18, 12)),
    "vein": Tissue(((34, 50), (45, 120), (95, 160)), patch=(8, 14)),
    "lower_vein": Tissue(((34, 50), (34, 55), (65, 140)), patch=(6, 14)),
    "portal_vein": Tissue(((34, 50), (60, 170), (135, 195)), patch=(4, 8)),
    "heart": Tissue(
        ((34, 50), (190, 380), (110, 170)), ((36, 52), (80, 140), (85, 130)), 9.0, patch=(9, 18)
    ),
    "myocardium": Tissue(((36, 52), (80, 140), (85, 130)), patch=(5, 9)),
    "right_heart": Tissue(((34, 50), (120, 350), (105, 160)), patch=(14, 20)),
    "oesophagus": Tissue(_same(-10, 45), _WALL, 3.2, patch=(12, 6), gas=0.25),
    "stomach": Tissue(_same(0, 60), _WALL, 3.2, patch=(14, 7), gas=0.8),
    "small_bowel": Tissue(_same(2, 42), _WALL, 2.2, patch=(12, 6), gas=0.35),
    "colon": Tissue(_same(-40, 55), _WALL, 2.2, patch=(48, 6), gas=0.8, bubbles=1.25),
    "pelvic_organ": Tissue(((32, 50), (50, 95), (60, 110)), patch=(9, 9)),
    "breast": Tissue(((5, 42), (10, 55), (15, 60)), patch=(22, 7)),
    "brain": Tissue(_same(28, 40), patch=(4, 9)),
    "soft": Tissue(((25, 60), (35, 90), (40, 100)), patch=(6, 8)),
}
THINGS: dict[str, Tissue] = {
    # Cushions and beads are mostly air: what a lung is, in HU.
    "foam": Tissue(_same(-980, -840), _same(-700, -350), 1.2, patch=(14, 8)),
    "cloth": Tissue(_same(-650, -150), patch=(60, 8)),
}
"""What lies beside patients, painted as tissues are."""

_TISSUE_OF_NAME: tuple[tuple[str, str], ...] = (
    ("skin", "skin"),
    ("subcutaneous_fat", "subcutaneous_fat"),
    ("intermuscular_fat", "intermuscular_fat"),
    ("*_fat", "trunk_fat"),
    ("vertebrae_*", "spongy_bone"),
    ("sacrum", "spongy_bone"),
    ("rib_*", "flat_bone"),
    ("sternum", "flat_bone"),
    ("scapula_*", "flat_bone"),
    ("clavicula_*", "flat_bone"),
    ("skull", "flat_bone"),
    ("humerus_*", "long_bone"),
    ("femur_*", "long_bone"),
    ("hip_*", "long_bone"),
    ("costal_cartilages", "cartilage"),
    ("intervertebral_discs", "disc"),
    ("spinal_cord", "cord"),
    ("lung_vessel_*", "pulmonary"),
    ("lung_*", "lung"),
    ("trachea", "airway"),
    ("bronchus_*", "airway"),
    ("liver", "liver"),
    ("liver_vessel", "liver_vein"),
    ("spleen", "spleen"),
    ("pancreas", "pancreas"),
    ("gallbladder", "gallbladder"),
    ("urinary_bladder", "bladder"),
    ("kidney_cyst_*", "bladder"),
    ("kidney_*", "kidney"),
    ("adrenal_gland_*", "adrenal"),
    ("thyroid_gland", "thyroid"),
    ("pulmonary_*", "pulmonary"),
    ("atrial_appendage_left", "pulmonary"),
    ("heart_ventricle_left", "pulmonary"),
    ("heart_atrium_left", "pulmonary"),
    ("heart_ventricle_right", "right_heart"),
    ("heart_atrium_right", "right_heart"),
    ("heart_myocardium", "myocardium"),
    ("heart", "heart"),
    ("superior_vena_cava", "upper_vein"),
    ("brachiocephalic_vein_*", "upper_vein"),
    ("jugular_vein_*", "upper_vein"),
    ("portal_vein_*", "portal_vein"),
    ("superior_mesenteric_vein", "portal_vein"),
    ("inferior_vena_cava", "vein"),
    ("renal_vein_*", "vein"),
    ("iliac_vena_*", "lower_vein"),
    ("aorta", "artery"),
    ("brachiocephalic_trunk", "artery"),
    ("*_artery*", "artery"),
    ("esophagus", "oesophagus"),
    ("stomach", "stomach"),
    ("small_bowel", "small_bowel"),
    ("duodenum", "small_bowel"),
    ("colon", "colon"),
    ("prostate", "pelvic_organ"),
    ("uterus", "pelvic_organ"),
    ("breast_*", "breast"),
    ("brain", "brain"),
    ("autochthon_*", "muscle"),
    ("iliopsoas_*", "muscle"),
    ("psoas_*", "muscle"),
    ("gluteus_*", "muscle"),
    ("rectus_abdominis_*", "muscle"),
    ("*muscle*", "muscle"),
    ("diaphragm", "muscle"),
    ("*", "soft"),
)

_NUMBER_OF_TISSUE = {name: n for n, name in enumerate((*TISSUES, *THINGS), start=1)}
_HOLLOW = {"stomach": 0, "small_bowel": 1, "colon": 2, "oesophagus": 3}
_NOT_VISCERAL = (
    *("skin", "subcutaneous_fat", "intermuscular_fat", "trunk_fat", "muscle", "breast", "soft"),
    *("spongy_bone", "flat_bone", "long_bone", "cartilage", "disc", "cord", "brain"),
    *("lower_vein", "pelvic_organ", "thyroid"),
)


def tissue_of(name: str) -> str:
    """The tissue a structure is painted as; ``soft`` where the painter does not know the name.

    Parameters
    ----------
    name : str
        The structure; TotalSegmentator's name where it has one.
    """
    return next(tissue for pattern, tissue in _TISSUE_OF_NAME if fnmatchcase(name, pattern))


def texture_tile(seed: int, n: int = 64) -> NDArray[np.float32]:
    """(n, n, n) float32 periodic Gaussian noise, mean 0, deviation 1, features of about n/8 cells.

    White noise under a Gaussian filter, by FFT.

    Parameters
    ----------
    seed : int
        Seed of the noise.
    n : int
        Cells along each side, a power of two.
    """
    random = np.random.default_rng([seed, 11])
    spectrum = np.fft.rfftn(random.standard_normal((n, n, n)))
    f = np.fft.fftfreq(n)
    f2 = f[:, None, None] ** 2 + f[None, :, None] ** 2 + np.fft.rfftfreq(n)[None, None, :] ** 2
    sigma = n / 27.0
    tile = np.fft.irfftn(spectrum * np.exp(-2 * (np.pi * sigma) ** 2 * f2))
    tile -= tile.mean()
    return np.asarray(tile / tile.std(), np.float32)


def _noise_tiles(
    random: np.random.Generator, spacing_mm: tuple[float, float], sharpness_mm: float
) -> NDArray[np.float32]:
    """(3, 512, 512) float32 noise of deviation 1: two of the reconstruction kernel's, one streaks.

    The noise power spectrum of filtered back-projection rises with the frequency and is cut off by
    the kernel (Riederer, Pelc and Chesler 1978).
    """
    n = 512
    fi = np.fft.fftfreq(n)[:, None] / spacing_mm[0]
    fj = np.fft.rfftfreq(n)[None, :] / spacing_mm[1]
    f = np.hypot(fi, fj)
    cut_off = 0.34 / sharpness_mm  # per mm
    kernel = np.sqrt(f + 0.04 * cut_off) * np.exp(-((f / cut_off) ** 2))
    streaks = np.exp(-((fi / 0.25) ** 2) - (fj / 0.03) ** 2) * np.sqrt(np.abs(fi) + 0.01)
    tiles = np.empty((3, n, n), np.float32)
    for tile, amplitude in zip(tiles, (kernel, kernel, streaks), strict=True):
        white = np.fft.rfft2(random.standard_normal((n, n)))
        noise = np.fft.irfft2(white * amplitude, s=(n, n))
        tile[:] = (noise - noise.mean()) / noise.std()
    return tiles


def hu_range(tissue: str, phase: Phase, part: Literal["core", "shell"] = "core") -> Range:
    """Range of patients' mean HU of a tissue in a contrast phase.

    Parameters
    ----------
    tissue : str
        One of ``TISSUES`` or ``THINGS``.
    phase : {"native", "arterial", "portal_venous"}
        Contrast phase.
    part : {"core", "shell"}
        Inside, or wall, cortex and the like.
    """
    of = TISSUES.get(tissue) or THINGS[tissue]
    low, high = (of.core if part == "core" else of.shell)[PHASES.index(phase)]
    return float(low), float(high)


def _draw_look(seed: int, random: np.random.Generator, phase: Phase) -> NDArray[np.float32]:
    """(n_tissues + 1, columns) float32: one patient's table of tissues, see the kernel."""
    from organfast.kernels import painting as kernel

    table = np.zeros((len(_NUMBER_OF_TISSUE) + 1, kernel.N_COLUMNS), np.float32)
    _draw_rows(random, phase, TISSUES, table)
    _vary(random, table, phase)
    _draw_rows(np.random.default_rng([seed, 34]), phase, THINGS, table)
    return table


def _draw_rows(
    random: np.random.Generator,
    phase: Phase,
    tissues: Mapping[str, Tissue],
    table: NDArray[np.float32],
) -> None:
    """Draw one patient's look of some tissues into their rows of the table."""
    from organfast.kernels import painting as kernel

    patient = random.random()  # well or badly perfused: tissues enhance together, in part
    hu: dict[str, float] = {}
    shells: dict[str, float] = {}
    for name in tissues:
        for part, drawn in (("core", hu), ("shell", shells)):
            low, high = hu_range(name, phase, "core" if part == "core" else "shell")
            drawn[name] = low + (high - low) * (0.35 * patient + 0.65 * random.random())
    for name, tissue in tissues.items():
        row = table[_NUMBER_OF_TISSUE[name]]
        source, spacing, width, deep = tissue.vessels
        row[kernel.CORE_HU] = hu[name]
        row[kernel.SHELL_HU], row[kernel.SHELL_MM] = shells[name], tissue.shell_mm
        row[kernel.INNER_HU] = random.uniform(*tissue.inner)
        row[kernel.INNER_MM] = tissue.inner_mm
        row[kernel.PATCH_HU], row[kernel.PATCH_MM] = tissue.patch
        row[kernel.VESSEL_HU] = hu[source] if isinstance(source, str) else source
        row[kernel.VESSEL_MM], row[kernel.VESSEL_WIDTH] = spacing, width
        row[kernel.VESSEL_DEEP_MM] = deep
        row[kernel.GAS] = tissue.gas * random.uniform(0.2, 1.3)
        row[kernel.BUBBLES] = tissue.bubbles * random.uniform(0.9, 1.4)
        row[kernel.FALL_HU] = tissue.fall


def _vary(random: np.random.Generator, table: NDArray[np.float32], phase: Phase) -> None:
    """What differs between patients beyond the means: marbling, mottled spleens, oral contrast."""
    from organfast.kernels import painting as kernel

    muscle, spleen = _NUMBER_OF_TISSUE["muscle"], _NUMBER_OF_TISSUE["spleen"]
    table[muscle, kernel.VESSEL_WIDTH] *= random.uniform(0.4, 1.9)
    if phase == "arterial":
        table[spleen, kernel.PATCH_HU] = random.uniform(8, 24)
    bowel = [_NUMBER_OF_TISSUE[name] for name in ("stomach", "small_bowel")]
    if random.random() < 0.15:
        table[bowel, kernel.CORE_HU] = random.uniform(120, 320)


def _tissue_map(label_map: LabelMap) -> NDArray[np.uint8]:
    """(K, R, C) uint8 tissue numbers in working order."""
    lookup = np.zeros(1 << (8 * label_map.labels.itemsize), np.uint8)
    for label, name in label_map.names.items():
        if 0 < label < lookup.size:
            lookup[label] = _NUMBER_OF_TISSUE[tissue_of(name)]
    working = label_map.working
    tissue = np.empty(working.shape, np.uint8)
    for page, labels in zip(tissue, working, strict=True):
        np.take(lookup, labels, out=page)
    return tissue


def paint(
    label_map: LabelMap, seed: int, protocol: Protocol | None = None, *, threads: int = 1
) -> Volume:
    """Paint a CT scan on a label map.

    Parameters
    ----------
    label_map : LabelMap
        Any labelled anatomy. If none of its labels is painted as skin, the body around the labels
        is made up: wall muscle, fat and skin.
    seed : int
        Seed of the patient's tissues, of the textures and of the noise.
    protocol : Protocol, optional
        How the scan is taken; drawn from the seed by default.
    threads : int
        Threads to paint with; the result does not depend on it.

    Returns
    -------
    Volume
        HU on the grid of the label map, laid out so that working order runs along memory.
    """
    from organfast.kernels import painting as kernel

    protocol = protocol or Protocol.draw(seed)
    random = np.random.default_rng([seed, 31])
    steps = np.array(label_map.working_spacing_mm)
    texture = texture_tile(seed)
    tissue = _tissue_map(label_map)
    if not (tissue == _NUMBER_OF_TISSUE["skin"]).any():
        _make_up_body(tissue, steps, texture, random)
        if protocol.arms != "up":
            beside, top_mm = np.random.default_rng([seed, 32]), _shoulder_mm(tissue, steps)
            add_arms(tissue, steps, _NUMBER_OF_TISSUE, protocol.arms, beside, shoulder_mm=top_mm)
    if protocol.bedding:
        beside = np.random.default_rng([seed, 33])
        add_bedding(tissue, steps, _NUMBER_OF_TISSUE, texture, beside)

    depth = np.empty_like(tissue)
    diagonal = float(np.hypot(steps[1], steps[2]))
    units = np.rint(np.array([*steps, diagonal]) / kernel.DEPTH_STEP_MM).clip(1, 255)
    kernel.tissue_depth(tissue, units.astype(np.int64), depth)

    table = _draw_look(seed, random, protocol.phase)
    n_k, n_i, n_j = tissue.shape
    table[:, kernel.CORE_HU] += table[:, kernel.FALL_HU] * 0.5 * n_i * steps[1]
    hollow = np.full(256, -1, np.int64)
    for name, number in _HOLLOW.items():
        hollow[_NUMBER_OF_TISSUE[name]] = number
    levels = _gas_levels(random, tissue, steps, hollow, table[:, kernel.GAS])
    scanner = _scanner(seed, random, protocol, tissue, steps)
    look = (table, hollow, texture)

    working = np.empty(tissue.shape, np.int16)

    def paint_slab(low: int, high: int) -> None:
        scratch = np.empty((5, n_i, n_j), np.float32)
        maps = (tissue, depth, levels)
        kernel.paint_slices(working[low:high], low, maps, look, scanner, scratch)

    in_slabs(paint_slab, n_k, threads)
    return Volume(_as_stored(working, label_map.affine), label_map.affine)


def in_slabs(work: Callable[[int, int], None], n_slices: int, threads: int) -> None:
    """Call ``work(low, high)`` on runs of slices that together are all of them, a run a thread.

    Parameters
    ----------
    work : callable
        Called with the first slice of a run and one beyond its last.
    n_slices : int
        Slices in all.
    threads : int
        Runs, at most one per slice.

    Raises
    ------
    ValueError
        ``threads`` is less than 1.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; use 1 or more")
    edges = np.linspace(0, n_slices, min(threads, n_slices) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def _as_stored(working: NDArray[np.int16], affine: NDArray[np.float64]) -> NDArray[np.int16]:
    """The view of a working array whose working order it is."""
    orientation = Orientation.of_affine(affine)
    flipped = working[tuple(slice(None, None, -1 if f else 1) for f in orientation.flips)]
    return flipped.transpose(np.argsort(orientation.axes))


def _gas_levels(
    random: np.random.Generator,
    tissue: NDArray[np.uint8],
    steps: NDArray[np.float64],
    hollow: NDArray[np.int64],
    gas: NDArray[np.float32],
) -> NDArray[np.float32]:
    """(n_maps, K, C) float32: the row above which (towards the front) a lumen holds gas.

    Gas rises to the front of a patient who lies on the back: below the lumen's own ceiling, taken
    over some 3 cm so that the level is flat, it reaches down by an amount that varies smoothly.
    """
    from scipy.ndimage import gaussian_filter, maximum_filter, zoom

    from organfast.kernels import painting as kernel

    n_k, _, n_j = tissue.shape
    ceiling = np.empty((len(_HOLLOW), n_k, n_j), np.int16)
    kernel.lumen_ceiling(tissue, hollow, ceiling)
    sigma = (8.0 / steps[0], 8.0 / steps[2])
    coarse = (max(2, int(n_k * steps[0] / 45) + 2), max(2, int(n_j * steps[2] / 130) + 2))
    levels = np.empty(ceiling.shape, np.float32)
    for name, n in _HOLLOW.items():
        share = float(gas[_NUMBER_OF_TISSUE[name]])
        width = 70.0 if name == "stomach" else 32.0
        size = (int(np.ceil(30.0 / steps[0])) | 1, int(np.ceil(width / steps[2])) | 1)
        amount = random.normal(0.35, 0.9, coarse)
        smooth = zoom(amount, (n_k / coarse[0], n_j / coarse[1]), order=1, grid_mode=False)
        top = maximum_filter(ceiling[n].astype(np.float32), size=size)
        reach = share * 26.0 / steps[1] * smooth[:n_k, :n_j]
        levels[n] = gaussian_filter(top, sigma) - reach
    return levels


def _scanner(
    seed: int,
    random: np.random.Generator,
    protocol: Protocol,
    tissue: NDArray[np.uint8],
    steps: NDArray[np.float64],
) -> tuple[Any, ...]:
    """The scanner's part of a scan, as ``paint_slices`` takes it."""
    n_k, n_i, n_j = tissue.shape
    lung, airway = _NUMBER_OF_TISSUE["lung"], _NUMBER_OF_TISSUE["airway"]
    bones = [_NUMBER_OF_TISSUE[name] for name in ("long_bone", "flat_bone", "spongy_bone")]
    things = [_NUMBER_OF_TISSUE[name] for name in THINGS]
    body = np.empty((n_k, 3), np.float32)
    dense, bone, back = np.zeros(n_k), np.zeros(n_k), n_i
    for k, page in enumerate(tissue):
        counts = np.bincount(page.ravel(), minlength=_MAX_TISSUES + 1)
        dense[k] = n_i * n_j - counts[0] - 0.75 * (counts[lung] + counts[airway])
        dense[k] -= counts[things].sum()
        bone[k] = counts[bones].sum()
        rows, columns = np.flatnonzero(page.any(1)), np.flatnonzero(page.any(0))
        if rows.size:
            back = min(back, int(rows[0]))
            body[k] = rows.mean(), columns.mean(), 0.5 * max(columns.size, 8)
        else:
            body[k] = n_i / 2, n_j / 2, n_j / 2
    pixel = steps[1] * steps[2]
    width = 2 * np.sqrt(dense * pixel / np.pi)
    # The tube current is raised for wide bodies, but not enough (Gies 1999): half the attenuation.
    sigma = protocol.noise_hu * np.exp(0.006 * (width - 270)).clip(0.55, 2.0)
    streak = 0.45 * sigma * ((bone * pixel - 3000) / 3500).clip(0, 1)
    noise = (
        sigma.astype(np.float32),
        streak.astype(np.float32),
        random.integers(0, 512, (n_k, 6)),
        body,
    )
    middle = float(np.median(body[:, 1])) * steps[2] + random.normal(0, 12)
    top = back * steps[1] - random.uniform(4, 9)
    couch = np.array([middle, top, random.uniform(500, 900), random.uniform(190, 225), 240.0, 9.0])
    _change_bed(seed, protocol.bed, couch)
    couch *= protocol.couch
    tiles = _noise_tiles(random, (steps[1], steps[2]), protocol.sharpness_mm)
    taps = [_taps(np.hypot(protocol.sharpness_mm / s, 0.4)) for s in (steps[1], steps[2])]
    circle = 0.5 * min(n_i, n_j) if protocol.circle else 0.0
    return (steps, couch, taps[0], taps[1], random.uniform(0.1, 0.2), noise, tiles, circle)


def _change_bed(seed: int, bed: Bed, couch: NDArray[np.float64]) -> None:
    """Another table than the usual, in place; ``couch`` as ``add_couch`` takes it."""
    random = np.random.default_rng([seed, 35])
    if bed == "flat":
        couch[2:4] = 1e5, random.uniform(200, 270)
        couch[4:] = random.uniform(60, 500), random.uniform(0, 6)
    elif bed == "cradle":
        couch[2:4] = random.uniform(230, 420), random.uniform(150, 215)
        couch[4:] = random.uniform(60, 400), random.uniform(5, 35)
    couch[1] -= max(couch[5] - 9.0, 0.0)  # below a thick mattress, or a pad of air


def _taps(sigma: float) -> NDArray[np.float32]:
    """Centre and one side of a normalised Gaussian of the given deviation in voxels."""
    n = int(np.ceil(2.6 * sigma)) + 1
    half = np.exp(-0.5 * (np.arange(n) / sigma) ** 2)
    return np.asarray(half / (half[0] + 2 * half[1:].sum()), np.float32)


def _shoulder_mm(tissue: NDArray[np.uint8], steps: NDArray[np.float64]) -> float:
    """Height of the shoulders: that of the lungs' tops, or little above what is labelled."""
    lung = np.flatnonzero((tissue == _NUMBER_OF_TISSUE["lung"]).any((1, 2)))
    top = int(lung[-1]) if lung.size else len(tissue)
    beyond = 60.0 if top >= len(tissue) - 1 else -10.0
    return float(top * steps[0] + beyond)


def _make_up_body(
    tissue: NDArray[np.uint8],
    steps: NDArray[np.float64],
    texture: NDArray[np.float32],
    random: np.random.Generator,
) -> None:
    """Fill the unlabelled inside of a body in place: discs, visceral fat, wall, fat, skin.

    The cavity is the hull of the viscera in each slice, the muscles reach beyond the hull of all
    labels, the skin lies a patient's and a direction's fat thickness outside them.
    """
    from scipy.ndimage import gaussian_filter, gaussian_filter1d

    from organfast.kernels import phantom as kernel

    spongy = _NUMBER_OF_TISSUE["spongy_bone"]
    kernel.fill_gaps(tissue, round(float(11 / steps[0])), spongy, _NUMBER_OF_TISSUE["disc"])

    n_k = len(tissue)
    axis = np.zeros((n_k, 2))
    filled = np.array([page.any() for page in tissue])
    if not filled.any():
        return
    for k in np.flatnonzero(filled):
        rows, columns = np.nonzero(tissue[k])
        axis[k] = np.mean([rows.min(), rows.max()]), np.mean([columns.min(), columns.max()])
    inside = np.flatnonzero(filled)
    for n in range(2):
        whole = np.interp(np.arange(n_k), inside, axis[inside, n])
        axis[:, n] = gaussian_filter1d(whole, 20 / steps[0]) * steps[n + 1]

    visceral = np.ones(256, np.uint8)
    visceral[[_NUMBER_OF_TISSUE[name] for name in _NOT_VISCERAL]] = 0
    radii = np.empty((3, n_k, _ANGLES), np.float32)
    for n, wanted in enumerate((visceral, np.ones(256, np.uint8))):
        wanted[0] = 0
        kernel.outermost(tissue, wanted, axis, steps, radii[n])
        radii[n] = gaussian_filter(_hull(radii[n]), (10 / steps[0], 1.0), mode=("nearest", "wrap"))
    front = np.sin(np.arange(_ANGLES) * 2 * np.pi / _ANGLES).clip(-1, 1)
    wall = np.interp(front, [-1, -0.6, -0.2, 1], [4, 8, 15, 11]) * random.uniform(0.8, 1.2)
    radii[0] = np.where(radii[0] > 20, radii[0] + 2, 0)
    radii[1] = np.maximum(radii[1] + 3, radii[0] + wall * (radii[0] > 0))
    radii[2] = radii[1] + _fat_thickness(random, radii[1].shape)
    names = ("skin", "subcutaneous_fat", "muscle", "intermuscular_fat", "trunk_fat")
    layers = np.array([0, *(_NUMBER_OF_TISSUE[name] for name in names)], np.uint8)
    bounds = np.ascontiguousarray(np.moveaxis(radii, 0, 2))
    kernel.fill_body(tissue, axis, bounds, layers, steps, texture)


def _hull(radii: NDArray[np.float32]) -> NDArray[np.float32]:
    """Polar radii of the convex hull of each slice's outline, (K, n_angles), mm.

    Support function h(b) = max over a of r(a) cos(a - b); the hull is min over b of
    h(b) / cos(a - b).
    """
    turn = np.arange(radii.shape[1]) * (2 * np.pi / radii.shape[1])
    cosine = np.cos(turn[:, None] - turn[None, :]).astype(np.float32)
    away = np.where(cosine > 0.05, cosine, np.float32(np.nan))
    hull = np.empty_like(radii)
    for k, r in enumerate(radii):
        support = (r[:, None] * cosine).max(0).clip(0)
        hull[k] = np.nanmin(support[None, :] / away, axis=1)
    return hull


def _fat_thickness(random: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """(K, n_angles) subcutaneous fat, mm: thin at the sides, thicker in front and behind."""
    from scipy.ndimage import gaussian_filter1d

    mean = 4 + 34 * random.random() ** 1.6  # half of them below 15 mm, a tenth above 33
    turn = np.arange(shape[1]) * (2 * np.pi / shape[1])
    ring = 0.85 + 0.3 * np.abs(np.sin(turn)) ** 3
    ripple = gaussian_filter1d(random.standard_normal(shape[1]), 6, mode="wrap")
    ring = ring * (1 + 0.25 * ripple / max(float(ripple.std()), 1e-6)).clip(0.5, 1.6)
    return np.broadcast_to(np.asarray(mean * ring, np.float32), shape)
