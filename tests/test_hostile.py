"""Hostile input: whatever comes in, the answer is right or is one line that says what would do.

::

    good scan ── one lie, damage or odd name ──> organfast segment ──> Same      its labels
                                                                       Usable    own grid, warned
                                                                       Refused   one line, no output

Each row of the tables is one input. All of them go through the command line, most of them in this
process, under a limit of time and of memory. ``pytest tests/test_hostile.py --collect-only -q``
counts them.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.cli import run
from organfast.models.classifier import load_model
from organfast.pipeline import segment
from organfast.tables import cell, table
from organfast.volume import Volume

SECONDS = 120  # of a busy machine; most take a tenth of one
MEGABYTES = 80


# --- the good scan, and what may become of a bad one ----------------------------------------------


@dataclass(frozen=True)
class Good:
    """A few voxels of a phantom patient around the liver, and what the model makes of them."""

    hu: NDArray[np.int16]
    affine: NDArray[np.float64]
    labels: NDArray[np.uint8]
    model: Path

    def image(self, hu: NDArray[Any] | None = None, version: int = 1) -> Any:
        kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
        hu = self.hu if hu is None else hu
        image = kind(hu, self.affine, dtype=hu.dtype)
        image.set_sform(self.affine, 1)
        image.set_qform(self.affine, 1)
        image.header.set_xyzt_units("mm")
        return image

    def content(self, hu: NDArray[Any] | None = None, version: int = 1) -> bytes:
        content: bytes = self.image(hu, version).to_bytes()
        return content


@dataclass(frozen=True)
class Same:
    """Segmented, with the labels of the good scan; ``warning`` says what was doubtful."""

    warning: str = ""


@dataclass(frozen=True)
class Usable:
    """Segmented on its own grid, with a warning."""

    warning: str


@dataclass(frozen=True)
class Refused:
    """One line with these words, and no output."""

    words: str


Outcome = Same | Usable | Refused


@pytest.fixture(scope="module")
def good(cohort_folder: Path, model_file: Path) -> Good:
    import highdicom  # noqa: F401  # large; loaded before memory is measured

    image = nib.load(cohort_folder / "phantom_001" / "ct.nii.gz")
    labels = nib.load(cohort_folder / "phantom_001" / "labels.nii.gz")
    liver = np.argwhere(np.asanyarray(labels.dataobj) == ClassTable.default().index("liver"))
    a, b, c = np.clip(liver.mean(0).astype(int), 14, np.array(image.shape) - 14)
    hu = np.asanyarray(image.dataobj)[a - 14 : a + 14, b - 12 : b + 12, c - 5 : c + 5].copy()
    hu[:3] = -1000  # air, as every scan has
    found = segment((hu, image.affine), load_model(model_file)).labels
    assert len(np.unique(found)) > 3
    return Good(hu, image.affine, np.asarray(found), model_file)


@pytest.fixture
def limited() -> Iterator[None]:
    """A hang is a failure, and so is memory beyond what such a scan takes."""

    def too_slow(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    before = _peak_kb(reset=True)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, earlier)
    assert _peak_kb() - before < MEGABYTES * 1024


def _peak_kb(reset: bool = False) -> int:
    """Largest resident memory since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


@dataclass(frozen=True)
class Judge:
    """Segments a file and compares what happened with what has to happen."""

    good: Good
    capsys: pytest.CaptureFixture[str]

    def __call__(self, scan: Path | str, outcome: Outcome, out: Path, *options: object) -> None:
        around = _listing(out.parent)
        self.capsys.readouterr()
        arguments = ("segment", "-i", scan, "-o", out, "-m", self.good.model, "--threads", 1)
        code = run([str(a) for a in (*arguments, "--no-preview", *options)])
        told = self.capsys.readouterr()
        if isinstance(outcome, Refused):
            assert_refused(code, told.out, told.err, scan, outcome)
            assert _listing(out.parent) == around
            return
        assert code == 0, told.err
        assert all(line.isprintable() for line in (told.out + told.err).split("\n"))
        self.assert_result(scan, out, outcome, told.err)

    def assert_result(self, scan: Path | str, out: Path, outcome: Same | Usable, err: str) -> None:
        """The labels, and the warning both on standard error and in the record."""
        labels = nib.load(out / "segmentation.nii.gz")
        assert labels.get_data_dtype() == np.uint8
        voxels = np.asanyarray(labels.dataobj)
        if isinstance(outcome, Same):
            np.testing.assert_array_equal(voxels, self.good.labels)
        np.testing.assert_array_equal(labels.affine, affine_by_nibabel(Path(scan)))
        recorded = json.loads((out / "run.json").read_text("utf-8"))["warnings"]
        told = [line.partition("warning: ")[2] for line in err.splitlines()]
        assert set(recorded) <= set(told)
        # Of so few voxels, organs are cut off and centres odd: that is no matter here.
        if outcome.warning:
            assert any(re.search(outcome.warning, line) for line in recorded), recorded
        else:
            assert recorded == []


def affine_by_nibabel(scan: Path) -> NDArray[np.float64]:
    """Of the header, wherever it is: nibabel's own loader wants names that end as they should."""
    content = scan.read_bytes()
    if content[:2] == b"\x1f\x8b":
        unpacked = b""
        while content and len(unpacked) < 540:
            member = zlib.decompressobj(wbits=31)
            unpacked += member.decompress(content, 540)
            content = member.unused_data
        content = unpacked.ljust(540)
    is_first = 348 in (int.from_bytes(content[:4], order) for order in ("little", "big"))
    kind, size = (nib.Nifti1Header, 348) if is_first else (nib.Nifti2Header, 540)
    header = kind(content[:size], check=False)
    for name in ("sform_code", "qform_code"):
        header[name] = header[name] if header[name] in range(6) else 0
    header["pixdim"][0] = 1 if header["pixdim"][0] not in (-1, 1) else header["pixdim"][0]
    header["pixdim"][1:] = abs(header["pixdim"][1:])
    found: NDArray[np.float64] = header.get_best_affine()
    return found


def assert_refused(code: int, out: str, err: str, path: object, outcome: Refused) -> None:
    """``organfast: PATH: what is wrong; what would do``, alone."""
    assert code == 1, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    named = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(str(path).split())
    )
    assert err.startswith(f"organfast: {named}: "), err
    line = err.removeprefix(f"organfast: {named}: ")
    assert re.search(outcome.words, line), err
    assert line.partition("; ")[2].strip(), err


def _listing(folder: Path) -> set[str]:
    return {
        os.path.join(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


@pytest.fixture
def judge(good: Good, capsys: pytest.CaptureFixture[str], limited: None) -> Judge:
    return Judge(good, capsys)


# --- headers that lie -----------------------------------------------------------------------------

Change = Callable[[Any], None]


def fields(**values: object) -> Change:
    def change(header: Any) -> None:
        for name, value in values.items():
            header[name] = value

    return change


def dim(*numbers: int) -> Change:
    return fields(dim=[*numbers, *[1] * (8 - len(numbers))])


def affine(*rows: tuple[float, float, float, float], **others: object) -> Change:
    named = dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=False))
    return fields(sform_code=1, qform_code=0, **named, **others)


def pixdim(*lengths: float, **others: object) -> Change:
    def change(header: Any) -> None:
        header["pixdim"][1:4] = lengths
        fields(**others)(header)

    return change


def changed(content: bytes, change: Change) -> bytes:
    size = 348 if content[:4] == struct.pack("<i", 348) else 540
    kind = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    header = kind(content[:size], check=False)
    change(header)
    block: bytes = header.binaryblock
    return block + content[size:]


NO_MM = "correct its sform or qform"
HEADERS: dict[str, tuple[Change, Outcome]] = {
    "18 GB": (dim(3, 32767, 32767, 9), Refused("truncated|more than .* of gzip can hold")),
    "2 PB": (dim(7, *[32767] * 7), Refused("several volumes")),
    "no axes": (dim(0), Refused("declares 0 axes")),
    "axes beyond the field": (dim(32767, 28, 24, 10), Refused("declares 32767 axes")),
    "negative axes": (dim(-3, 28, 24, 10), Refused("declares -3 axes")),
    "zero rows": (dim(3, 28, 0, 10), Refused("holds no voxel")),
    "negative rows": (dim(3, 28, -24, 10), Refused("holds no voxel")),
    "two negative axes": (dim(3, -28, -24, 10), Refused("holds no voxel")),
    "most negative": (dim(3, -32768, 24, 10), Refused("holds no voxel")),
    "one slice more": (dim(3, 28, 24, 11), Refused("truncated")),
    "one slice less": (dim(3, 28, 24, 9), Refused("goes on after the voxels")),
    "other axes": (dim(3, 24, 28, 10), Usable("")),
    "offset beyond the end": (fields(vox_offset=1e6), Refused("truncated|gzip can hold")),
    "offset far beyond": (fields(vox_offset=1e18), Refused("truncated|gzip can hold")),
    "offset of infinity": (fields(vox_offset=np.inf), Refused("at byte inf")),
    "offset NaN": (fields(vox_offset=np.nan), Refused("at byte nan")),
    "offset negative": (fields(vox_offset=-352), Refused("at byte -352")),
    "offset in the header": (fields(vox_offset=100), Refused("at byte 100")),
    "offset with a fraction": (fields(vox_offset=352.5), Refused("at byte 352.5")),
    "offset not given": (fields(vox_offset=0), Same()),
    "bitpix 8": (fields(bitpix=8), Same("8 bits .* 16")),
    "bitpix 0": (fields(bitpix=0), Same("0 bits .* 16")),
    "bitpix negative": (fields(bitpix=-16), Same("-16 bits .* 16")),
    "datatype 8 bits": (fields(datatype=2), Refused("goes on after the voxels")),
    "datatype 64 bits": (fields(datatype=64), Refused("truncated")),
    "datatype float128": (fields(datatype=1536), Refused("stores float128")),
    "datatype none": (fields(datatype=0), Refused("stores none|datatype code 0")),
    "datatype unknown": (fields(datatype=-7), Refused("datatype code -7")),
    "magic wrong": (fields(magic=b"n+2"), Refused("is not a NIfTI file")),
    "magic empty": (fields(magic=b""), Refused("is not a NIfTI file")),
    "magic of a pair": (fields(magic=b"ni1"), Refused("half of a .hdr/.img pair")),
    "header size wrong": (fields(sizeof_hdr=349), Refused("is not a NIfTI file")),
    "slope 0": (fields(scl_slope=0, scl_inter=5), Same()),
    "slope NaN": (fields(scl_slope=np.nan, scl_inter=5), Same()),
    "slope infinite": (fields(scl_slope=np.inf), Refused("scales its voxels by inf")),
    "slope 1e30": (fields(scl_slope=1e30), Refused("no HU")),
    "slope 1e-30": (fields(scl_slope=1e-30), Refused("normalised|everywhere")),
    "slope negative": (fields(scl_slope=-1), Refused("scales its voxels by -1")),
    "slope 20": (fields(scl_slope=20), Usable("above 3071 HU")),
    "intercept 1e9": (fields(scl_slope=1, scl_inter=1e9), Refused("no HU")),
    "intercept -1e9": (fields(scl_slope=1, scl_inter=-1e9), Refused("HU|normalised|everywhere")),
    "intercept NaN": (fields(scl_slope=1, scl_inter=np.nan), Refused("adds nan")),
    "intercept infinite": (fields(scl_slope=1, scl_inter=-np.inf), Refused("adds -inf")),
    "intercept twice": (fields(scl_slope=1, scl_inter=-1024), Usable("no body was found")),
    "intercept lost": (fields(scl_slope=1, scl_inter=1024), Refused("intercept")),
    "both codes 0": (fields(sform_code=0, qform_code=0), Usable("left and right may be swapped")),
    "codes negative": (fields(sform_code=-1, qform_code=-1), Usable("left and right may be")),
    "codes unknown": (fields(sform_code=99, qform_code=99), Usable("left and right may be")),
    "one code unknown": (fields(sform_code=99), Same()),
    "qform elsewhere": (fields(qoffset_x=500), Same("sform and qform disagree")),
    "qform turned": (fields(quatern_b=0.5, quatern_c=0.5), Same("sform and qform disagree")),
    "qform broken": (fields(quatern_b=9), Same("qform is broken: the sform is used")),
    "qform NaN": (fields(quatern_b=np.nan), Same("qform is broken: the sform is used")),
    "qform alone, broken": (fields(sform_code=0, quatern_b=9), Refused("not finite")),
    "sform singular": (affine((5, 0, 0, 0), (5, 0, 0, 0)), Refused("singular")),
    "sform zero": (affine((0,) * 4, (0,) * 4, (0,) * 4), Refused("singular")),
    "sform NaN": (affine((np.nan, 0, 0, 0)), Refused("not finite")),
    "sform infinite": (affine((5, 0, 0, np.inf)), Refused("not finite")),
    "sform far away": (affine((5, 0, 0, 1e9)), Refused("has an affine with 1e\\+09 mm")),
    "sform broken, qform sound": (
        fields(srow_x=(np.nan,) * 4),
        Same("sform is broken: the qform is used"),
    ),
    "sform singular, qform sound": (
        fields(srow_x=(0,) * 4),
        Same("sform is broken: the qform is used"),
    ),
    "sheared": (affine((5, 3, 0, 0)), Usable("not at right angles")),
    "sheared slices": (affine((5, 0, 4, 0)), Usable("not at right angles")),
    "oblique by 45 degrees": (
        affine((3.54, -3.54, 0, 0), (3.54, 3.54, 0, 0), (0, 0, 8, 0)),
        Usable("45 degrees"),
    ),
    "pixdim 0": (pixdim(0, 0, 0, qform_code=0), Same("pixdim .*: the sform is used")),
    "pixdim negative": (pixdim(-5, -5, -8, qform_code=0), Same("")),
    "pixdim NaN": (pixdim(np.nan, 5, 8, qform_code=0), Same("pixdim .*: the sform is used")),
    "pixdim another": (pixdim(1, 1, 1, qform_code=0), Same("pixdim .*: the sform is used")),
    "pixdim 0, qform too": (pixdim(0, 5, 8), Same("qform is broken: the sform is used")),
    "pixdim NaN, qform alone": (pixdim(np.nan, 5, 8, sform_code=0), Refused("not finite")),
    "pixdim 0, qform alone": (pixdim(0, 5, 8, sform_code=0), Refused("singular")),
    "microns": (fields(xyzt_units=3), Refused(r"voxels of .* mm")),
    "metres": (fields(xyzt_units=1), Refused(r"voxels of .* mm")),
    "units unknown": (fields(xyzt_units=0), Same()),
    "units of nothing": (fields(xyzt_units=7), Same()),
    "voxels of a micron": (affine((1e-3, 0, 0, 0), (0, 1e-3, 0, 0)), Refused("voxels of 0.001")),
    "voxels of 100 mm": (
        affine((100, 0, 0, 0), (0, 100, 0, 0), (0, 0, 100, 0)),
        Refused("2800×2400×1000 mm large, as no patient is"),
    ),
    "voxels of 0.02 mm": (
        affine((0.02, 0, 0, 0), (0, 0.02, 0, 0), (0, 0, 0.02, 0)),
        Usable("smaller than a clinical"),
    ),
    "extension flagged": (fields(), Same()),
    "text in every field": (
        fields(
            descrip=b"<script>alert(1)</script>",
            aux_file=b"=cmd|' /C calc'!A0",
            intent_name=b"../../etc/pass",
            db_name=b"\x1b[31mred\x00\xff",
        ),
        Same(),
    ),
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(judge: Judge, tmp_path: Path, name: str, ending: str) -> None:
    change, outcome = HEADERS[name]
    content = changed(judge.good.content(), change)
    scan = tmp_path / f"scan{ending}"
    scan.write_bytes(gzip.compress(content, 1) if ending == ".nii.gz" else content)
    judge(scan, outcome, tmp_path / "out")


# --- voxels that are no CT, and storages of every kind --------------------------------------------

Make = Callable[[Good], bytes]


def stored(kind: str, *, order: str = "<", version: int = 1) -> Make:
    """The good scan in another storage, with an intercept where it has no sign."""

    def make(good: Good) -> bytes:
        unsigned = kind.startswith("u")
        voxels = (good.hu.astype(np.int32) + (1024 if unsigned else 0)).astype(kind)
        image = good.image(version=version)
        header = type(image.header)(endianness=order)
        for name in ("srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "xyzt_units"):
            header[name] = image.header[name]
        for name in ("pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y"):
            header[name] = image.header[name]
        header["qoffset_z"] = image.header["qoffset_z"]
        header.set_data_shape(voxels.shape)
        header.set_data_dtype(kind)
        header["vox_offset"] = header.single_vox_offset
        header["scl_slope"], header["scl_inter"] = 1, -1024 if unsigned else 0
        block: bytes = header.binaryblock
        return block + bytes(4) + voxels.astype(np.dtype(kind).newbyteorder(order)).tobytes("F")

    return make


def voxels(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Make:
    return lambda good: good.content(change(good.hu.copy()))


def put(value: float, kind: str = "i2", where: Any = np.s_[4:8, 4:8, 4:8]) -> Make:
    def change(hu: NDArray[Any]) -> NDArray[Any]:
        hu = hu.astype(kind)
        hu[where] = value
        return hu

    return voxels(change)


def eight_bits(hu: NDArray[Any]) -> NDArray[Any]:
    return np.clip((hu + 160) / 400 * 255, 0, 255).astype(np.uint8)


def checkered(hu: NDArray[Any]) -> NDArray[Any]:
    hu[::2], hu[1::2] = -32768, 32767
    return hu


RGB, RGBA = ([(c, "u1") for c in names] for names in ("RGB", "RGBA"))
VOXELS: dict[str, tuple[Make, Outcome]] = {
    **{
        f"{kind}, {order}, NIfTI-{version}": (stored(kind, order=order, version=version), Same())
        for kind in ("i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
        for order in "<>"
        for version in (1, 2)
    },
    "8 bits with a slope": (
        lambda good: changed(
            good.content(((good.hu.clip(-1024, 1015) + 1024) // 8).astype(np.uint8)),
            fields(scl_slope=8, scl_inter=-1024),
        ),
        Usable(""),
    ),
    "complex64": (voxels(lambda hu: hu.astype("c8")), Refused("stores complex64 voxels")),
    "complex128": (voxels(lambda hu: hu.astype("c16")), Refused("stores complex128 voxels")),
    "float128": (
        lambda good: changed(
            good.content() + bytes(good.hu.size * 14), fields(datatype=1536, bitpix=128)
        ),
        Refused("stores float128 voxels"),
    ),
    "complex256": (
        lambda good: changed(
            good.content() + bytes(good.hu.size * 30), fields(datatype=2048, bitpix=256)
        ),
        Refused("stores complex256 voxels"),
    ),
    "RGB": (voxels(lambda hu: np.zeros(hu.shape, RGB)), Refused("stores RGB voxels")),
    "RGBA": (voxels(lambda hu: np.zeros(hu.shape, RGBA)), Refused("stores RGBA voxels")),
    "bits": (
        lambda good: changed(good.content(), fields(datatype=1, bitpix=1)),
        Refused("stores binary voxels"),
    ),
    "4-D of one volume": (voxels(lambda hu: hu[..., None]), Same()),
    "5-D of one volume": (voxels(lambda hu: hu[..., None, None]), Same()),
    "7-D of one volume": (voxels(lambda hu: hu.reshape(*hu.shape, 1, 1, 1, 1)), Same()),
    "two volumes": (voxels(lambda hu: np.stack([hu, hu], 3)), Refused("is 4-D .*several volumes")),
    "vectors": (
        voxels(lambda hu: np.stack([hu] * 3, 3)[:, :, :, None]),
        Refused("is 5-D .*several volumes"),
    ),
    "2-D": (voxels(lambda hu: hu[:, :, 0]), Refused("is 2-D")),
    "1-D": (voxels(lambda hu: hu[:, 0, 0]), Refused("is 1-D")),
    "one slice": (voxels(lambda hu: hu[:, :, 4:5]), Usable("")),
    "one row": (voxels(lambda hu: hu[:, 12:13]), Usable("")),
    "one line": (voxels(lambda hu: hu[:, 12:13, 4:5]), Usable("")),
    "2 × 2 × 2": (voxels(lambda hu: hu[2:4, 10:12, 4:6]), Usable("")),
    "one voxel": (voxels(lambda hu: hu[10:11, 10:11, 4:5]), Refused("everywhere")),
    "air everywhere": (voxels(lambda hu: hu * 0 - 1000), Refused("everywhere")),
    "zero everywhere": (voxels(lambda hu: hu * 0), Refused("everywhere")),
    "NaN everywhere": (voxels(lambda hu: hu * np.float32("nan")), Refused("NaN or infinite")),
    "one NaN": (put(np.nan, "f4", np.s_[3, 3, 3]), Refused("NaN or infinite")),
    "one infinity": (put(np.inf, "f8", np.s_[3, 3, 3]), Refused("NaN or infinite")),
    "minus infinity": (put(-np.inf, "f4"), Refused("NaN or infinite")),
    "float maximum": (put(np.finfo("f8").max, "f8"), Refused("no HU")),
    "float minimum": (put(-np.finfo("f8").max, "f8"), Usable("")),
    "int64 maximum": (put(2**63 - 1, "i8"), Refused("no HU")),
    "int64 minimum": (put(-(2**63), "i8"), Usable("")),
    "denormal": (put(1e-310, "f8"), Usable("")),
    "minus zero": (put(-0.0, "f4"), Usable("")),
    "padding of -3024": (put(-3024, where=np.s_[:3]), Usable("")),
    "padding of -32768": (put(-32768, where=np.s_[:3]), Usable("")),
    "metal": (put(30_000, where=np.s_[9:11, 9:11, 4:5]), Usable("")),
    "much metal": (put(30_000, where=np.s_[9:20, 9:20, 2:6]), Usable("above 3071 HU")),
    "checkered": (voxels(checkered), Refused("not HU")),
    "8 bits of a window": (voxels(eight_bits), Refused("grey levels")),
    "12 bits, no intercept": (voxels(lambda hu: (hu + 1024).astype("u2")), Refused("intercept")),
    "windowed": (voxels(lambda hu: hu.clip(-160, 240)), Refused("display window")),
    "0 to 1": (voxels(lambda hu: (hu / 2000 + 0.5).astype("f4")), Refused("normalised")),
    "standardised": (voxels(lambda hu: (hu / 400).astype("f4")), Refused("normalised")),
    "a label map": (voxels(lambda hu: (hu > 0).astype("u1")), Refused("normalised|not HU")),
    "noise of 16 bits": (
        voxels(lambda hu: np.random.default_rng(0).integers(-32768, 32767, hu.shape, "i2")),
        Usable("above 3071 HU"),
    ),
}


@pytest.mark.parametrize("name", VOXELS)
def test_voxels_of_any_kind(judge: Judge, tmp_path: Path, name: str) -> None:
    make, outcome = VOXELS[name]
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(gzip.compress(make(judge.good), 1))
    judge(scan, outcome, tmp_path / "out")


# --- files that are damaged, wrapped or something else --------------------------------------------


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, 1)


def parted(content: bytes, n: int) -> bytes:
    edges = [len(content) * part // n for part in range(n + 1)]
    return b"".join(zipped(content[a:b]) for a, b in itertools.pairwise(edges))


def bomb(content: bytes) -> bytes:
    """A few hundred kB that unpack to 100 MB more than the header declares."""
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed) as stream:
        stream.write(content)
        for _ in range(100):
            stream.write(bytes(1 << 20))
    return packed.getvalue()


def named_member(content: bytes) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile("../../../etc/passwd", "wb", 1, packed) as stream:
        stream.write(content)
    return packed.getvalue()


def with_extension(size: int, padding: int = 16) -> Callable[[bytes], bytes]:
    def make(content: bytes) -> bytes:
        block = changed(content[:348], fields(vox_offset=352 + padding))
        declared = struct.pack("<ii", size, 6).ljust(padding, b"<")
        return block + b"\1\0\0\0" + declared + content[352:]

    return make


def as_zip(content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../scan.nii", content)
    return packed.getvalue()


def cut(content: bytes, eighths: int) -> bytes:
    return content[: len(content) * eighths // 8]


FOREIGN = "bytes behind the end of its gzip stream are left out"
FILES: dict[str, tuple[str, Callable[[bytes], bytes], Outcome]] = {
    "empty": ("a.nii.gz", lambda c: b"", Refused("is empty")),
    "one byte": ("a.nii.gz", lambda c: b"\x1f", Refused("is not a NIfTI file")),
    "gzip's mark alone": ("a.nii.gz", lambda c: b"\x1f\x8b", Refused("truncated gzip")),
    "gzip of nothing": ("a.nii.gz", lambda c: zipped(b""), Refused("is not a NIfTI file")),
    "not gzip by its name": ("a.nii.gz", lambda c: c, Same()),
    "gzip against its name": ("a.nii", zipped, Same()),
    "no ending": ("scan", lambda c: c, Same()),
    "another ending": ("scan.img.txt.exe", lambda c: c, Same()),
    "gzip twice": ("a.nii.gz", lambda c: zipped(zipped(c)), Refused("compressed twice")),
    "gzip four times": (
        "a.nii.gz",
        lambda c: zipped(zipped(zipped(zipped(c)))),
        Refused("compressed twice"),
    ),
    "two members": ("a.nii.gz", lambda c: parted(c, 2), Same()),
    "a thousand members": ("a.nii.gz", lambda c: parted(c, 1000), Same()),
    "empty members at the end": ("a.nii.gz", lambda c: zipped(c) + zipped(b"") * 99, Same()),
    "the scan twice": ("a.nii.gz", lambda c: zipped(c) * 2, Refused("goes on after the voxels")),
    "zeros at the end": ("a.nii.gz", lambda c: zipped(c) + bytes(5000), Same()),
    "a byte at the end": ("a.nii.gz", lambda c: zipped(c) + b"x", Same(f"^1 {FOREIGN}")),
    "text at the end": ("a.nii.gz", lambda c: zipped(c) + b"garbage" * 99, Same(FOREIGN)),
    "gzip's mark at the end": ("a.nii.gz", lambda c: zipped(c) + b"\x1f\x8b", Same(FOREIGN)),
    "a broken member at the end": (
        "a.nii.gz",
        lambda c: zipped(c) + zipped(c)[:40] + b"\xff" * 40,
        Same(FOREIGN),
    ),
    "bytes between members": (
        "a.nii.gz",
        lambda c: zipped(c[:9000]) + b"garbage" + zipped(c[9000:]),
        Refused("truncated"),
    ),
    "bytes at the end of a .nii": ("a.nii", lambda c: c + b"garbage", Refused("goes on after")),
    "bomb": ("a.nii.gz", bomb, Refused("goes on after the voxels")),
    "bomb in a bomb": ("a.nii.gz", lambda c: zipped(bomb(c)), Refused("compressed twice")),
    "bomb of members": (
        "a.nii.gz",
        lambda c: zipped(c) + zipped(bytes(1 << 22)) * 25,
        Refused("goes on after the voxels"),
    ),
    "a path in gzip's header": ("a.nii.gz", named_member, Same()),
    "checksum": (
        "a.nii.gz",
        lambda c: zipped(c)[:-8] + b"1234" + zipped(c)[-4:],
        Refused("damaged gzip"),
    ),
    "length": ("a.nii.gz", lambda c: zipped(c)[:-4] + b"1234", Refused("damaged gzip")),
    "method of gzip": ("a.nii.gz", lambda c: b"\x1f\x8b\x07" + zipped(c)[3:], Refused("gzip")),
    "zip": ("a.nii.gz", as_zip, Refused("holds no DICOM file|is not a NIfTI file")),
    "PNG": ("a.nii.gz", lambda c: b"\x89PNG\r\n\x1a\n" + bytes(900), Refused("not a NIfTI")),
    "text": ("a.nii", lambda c: b"HU\n" * 999, Refused("not a NIfTI file")),
    "HTML": ("a.nii", lambda c: b"<script>alert(1)</script>" * 99, Refused("not a NIfTI file")),
    "zeros": ("a.nii", lambda c: bytes(9000), Refused("not a NIfTI file")),
    "ones": ("a.nii", lambda c: b"\xff" * 9000, Refused("not a NIfTI file")),
    "DICOM's mark": ("a.nii", lambda c: bytes(128) + b"DICM" + bytes(900), Refused("DICOM")),
    "header of a pair": ("a.hdr", lambda c: c[:348], Refused("half of a .hdr/.img pair")),
    "voxels of a pair": ("a.img", lambda c: c[352:], Refused("half of a .hdr/.img pair")),
    "extension": ("a.nii.gz", lambda c: zipped(with_extension(16)(c)), Same()),
    "extension of 2 GB": ("a.nii", with_extension(2**31 - 1), Same()),
    "extension of less than nothing": ("a.nii", with_extension(-16), Same()),
    "extension of a megabyte": ("a.nii", with_extension(1 << 20, 1 << 20), Same()),
    "extension without room": (
        "a.nii",
        lambda c: c[:348] + b"\1\0\0\0" + c[352:],
        Same(),
    ),
    **{
        f"{n} eighths of a .nii": ("a.nii", lambda c, n=n: cut(c, n), Refused("is truncated"))
        for n in range(1, 8)
    },
    **{
        f"{n} eighths of a .nii.gz": (
            "a.nii.gz",
            lambda c, n=n: cut(zipped(c), n),
            Refused("truncated"),
        )
        for n in range(1, 8)
    },
    **{
        f"a .nii.gz without its last {n} bytes": (
            "a.nii.gz",
            lambda c, n=n: zipped(c)[:-n],
            Refused("truncated"),
        )
        for n in (1, 4, 8, 9)
    },
    **{
        f"{n} bytes of a .nii": (
            "a.nii",
            lambda c, n=n: c[:n],
            Refused("not a NIfTI|truncated"),
        )
        for n in (1, 4, 40, 347, 348, 351, 352, 353)
    },
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_any_kind(judge: Judge, tmp_path: Path, name: str) -> None:
    file, make, outcome = FILES[name]
    scan = tmp_path / file
    scan.write_bytes(make(judge.good.content()))
    judge(scan, outcome, tmp_path / "out")


def test_a_scan_larger_than_the_memory_that_is_free(
    judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes into a file that has no name; where the disk has no room either, that is said."""
    monkeypatch.setattr("organfast.room.free_bytes", lambda: 1000)
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(zipped(judge.good.content()))
    judge(scan, Same(), tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.posix_fallocate", full)
    judge(scan, Refused("needs more memory than there is"), tmp_path / "again")


# --- names ----------------------------------------------------------------------------------------

UMLAUT = "\u00fcbung \u809d"
NAMES = {
    "NFC": unicodedata.normalize("NFC", UMLAUT),
    "NFD": unicodedata.normalize("NFD", UMLAUT),
    "emoji": "\U0001fac1\U0001f469\u200d\u2695\ufe0f",
    "right to left": "\u202efdp.nacs",
    "line separator": "a\u2028b",
    "newline": "two\nlines\r\n",
    "tab": "\tcolumn",
    "spaces": "  a  b  ",
    "terminal": "\x1b[31mred\x1b]0;title\x07",
    "dash": "-o",
    "two dashes": "--help",
    "quotes": 'it\'s "quoted" `ls`',
    "shell": "$(touch owned);& | > owned",
    "markup": "<img src=x onerror=alert(1)>",
    "script": "<script>alert('1')<!--",
    "formula": "=cmd|' !C calc'!A0",
    "at": "@SUM(1+1)",
    "plus": "+1",
    "percent": "%s%n{0}{}",
    "pattern": "*",
    "range": "[a-z]?",
    "series": "scan#3",
    "dots": "..",
    "hidden": ".hidden",
    "only the ending": "",
    "backslash": "..\\..\\x",
    "ending twice": "a.nii",
    "list": "a.txt",
    "not text": "\udcff\udcfe",
    "255 bytes": "n" * 248,
    "255 bytes of two": "\u00fc" * 124,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_any_kind(
    judge: Judge, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read where they are, and as a name in the folder one stands in."""
    name = NAMES[kind] + ".nii.gz"
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / name).write_bytes(zipped(judge.good.content()))
    monkeypatch.chdir(tmp_path / "scans")
    if kind == "dots":  # as a folder's name it would lead out of the output
        judge(name, Refused("has no usable name"), tmp_path / "out")
        return
    if kind in ("NFC", "markup", "script", "not text", "terminal"):
        judge(tmp_path / "scans" / name, Same(), tmp_path / "out", "--report")
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert "<img src=x" not in page
        assert "<script>alert" not in page
    judge(name, Same(), tmp_path / "again", "--json")


def test_a_batch_of_all_names(
    good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a result of its own, inside the output folder; records are JSON, a line each."""
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    # Hidden files are no scans of a folder, and a name must be one of a folder, too.
    names = [name for name in NAMES.values() if name and not name.startswith(".")]
    for name in names:
        (scans / f"{name}.nii.gz").write_bytes(zipped(good.content()))
    (scans / "bad.nii.gz").write_bytes(b"bad")
    arguments = ["segment", "-i", scans, "-o", out, "-m", good.model, "--no-preview"]
    assert run([str(a) for a in arguments]) == 3
    told = capsys.readouterr()
    errors = [line for line in told.err.splitlines() if ": warning: " not in line]
    assert errors == [
        f"organfast: {scans / 'bad.nii.gz'}: is not a NIfTI file; give a CT scan as .nii or .nii.gz"
    ]
    assert all(line.isprintable() for line in (told.out + told.err).split("\n"))
    assert {p.name for p in tmp_path.iterdir()} == {"scans", "out"}
    lines = (out / "batch.jsonl").read_bytes().split(b"\n")
    records = [json.loads(line.decode("utf-8", "surrogateescape")) for line in lines if line]
    assert len(records) == len(names) + 1
    for record in records:
        if record["error"] is None:
            assert (out / record["output"]).resolve().is_relative_to(out.resolve())
            labels = nib.load(out / record["output"] / "segmentation.nii.gz")
            np.testing.assert_array_equal(np.asanyarray(labels.dataobj), good.labels)


# --- what is no file, and outputs that cannot be written ------------------------------------------


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "holds no scan"),
    "a pipe": (a_pipe, "is not a regular file"),
    "a socket": (a_socket, "is not a regular file"),
    "an endless device": (link_to("/dev/zero"), "is not a regular file"),
    "an empty device": (link_to("/dev/null"), "is not a regular file"),
    "a terminal": (link_to("/dev/tty"), "is not a regular file|cannot be read|does not exist"),
    "a file without a size": (link_to("/proc/self/maps"), "is empty"),
    "a file that cannot be read": (link_to("/proc/self/mem"), "is empty|cannot be read"),
    "a link to nowhere": (link_to("nowhere"), "does not exist"),
    "a link to itself": (link_to("scan.nii.gz"), "cannot be read"),
    "a link to the root's link": (link_to("/proc/self/root/nowhere"), "does not exist"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_places_that_hold_no_scan(
    judge: Judge, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = PLACES[kind]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scans"
    folder.mkdir()
    make(folder / "scan.nii.gz")
    judge(folder / "scan.nii.gz", Refused(words), tmp_path / "out")


def test_places_that_hold_no_scan_cost_themselves_alone(
    good: Good,
    tmp_path: Path,
    limited: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a list, and, with a link to their own folder, where a folder is searched."""
    monkeypatch.chdir(tmp_path)
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    problems = {}
    for n, (kind, (make, words)) in enumerate(PLACES.items()):
        if kind not in ("a folder", "a link to itself"):
            make(folder / f"{n}.nii.gz")
            problems[folder / f"{n}.nii.gz"] = words
    (folder / "good.nii.gz").write_bytes(zipped(good.content()))
    (folder / "around").symlink_to(".")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(map(str, [folder / "good.nii.gz", *problems])))
    for given in (listed, folder):
        arguments = ("segment", "-i", given, "-o", out, "-m", good.model, "--no-preview")
        code = run([str(a) for a in arguments])
        told = capsys.readouterr()
        assert code == 3
        errors = [line for line in told.err.splitlines() if ": warning: " not in line]
        for line in errors:
            path, _, problem = line.removeprefix("organfast: ").partition(": ")
            assert re.search(problems[Path(path)], problem), line
        assert len(errors) >= len(problems) - 1  # a folder's listing shows no scan that is missing
        (file,) = out.glob("**/good/segmentation.nii.gz")
        labels = nib.load(file)
        np.testing.assert_array_equal(np.asanyarray(labels.dataobj), good.labels)
        shutil.rmtree(out)


@pytest.mark.parametrize("option", ["-m", "-i"])
def test_models_and_lists_that_never_end(
    good: Good, tmp_path: Path, option: str, limited: None, capsys: pytest.CaptureFixture[str]
) -> None:
    scan, odd = tmp_path / "scan.nii.gz", tmp_path / "odd.txt"
    scan.write_bytes(zipped(good.content()))
    for make, words in ((a_pipe, "regular file"), (link_to("/dev/zero"), "regular file|model")):
        make(odd)
        given = {"-i": scan, "-m": good.model, "-o": tmp_path / "out", option: odd}
        code = run(["segment", *(str(a) for pair in given.items() for a in pair)])
        told = capsys.readouterr()
        assert_refused(code, told.out, told.err, odd, Refused(words))
        odd.unlink()


OUTPUTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file": ("out", lambda path: path.write_text("mine"), "is a file"),
    "in a file": ("file/out", lambda path: path.parent.write_text("mine"), "is no folder"),
    "a pipe": ("out", a_pipe, "is a file"),
    "a device": ("out", link_to("/dev/null"), "is a file"),
    "a label map in no folder": ("no/l.nii.gz", lambda path: None, "is no folder"),
    "a folder with a label map's name": ("l.nii.gz", lambda path: path.mkdir(), "is a folder"),
    "another's folder": ("out", lambda path: (path / "mine").mkdir(parents=True), "other files"),
    "a link to itself": ("out", link_to("out"), "cannot be|is a file|no folder"),
    "a name of 300 bytes": ("n" * 300, lambda path: None, "cannot be used"),
    "a label map of 300 bytes": ("n" * 300 + ".nii.gz", lambda path: None, "cannot be used"),
    "kernel's files": ("out", link_to("/proc/self/out"), "cannot be written"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_cannot_be(
    good: Good,
    tmp_path: Path,
    kind: str,
    limited: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, make, words = OUTPUTS[kind]
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    (tmp_path / "scan.nii.gz").write_bytes(zipped(good.content()))
    before = _listing(tmp_path)
    code = run(["segment", "-i", "scan.nii.gz", "-o", name, "-m", str(good.model)])
    told = capsys.readouterr()
    assert code == 1, told
    assert len(told.err.splitlines()) == 1, told.err
    named = rf"({re.escape(str(tmp_path))}/)?{re.escape(name[:2])}"
    assert re.fullmatch(rf"organfast: {named}.*: .*({words}).*; .+\n", told.err), told
    assert _listing(tmp_path) == before


# --- processes in odd surroundings ----------------------------------------------------------------

# Root may do anything; without these two it is like others towards files that are its own.
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def as_others() -> list[str]:
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may read and write everything, and setpriv is not here")
    return AS_OTHERS


def process(
    *arguments: object, start: list[str] | None = None, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    options.setdefault("env", dict(os.environ))
    options["env"]["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run(
        [*(start or []), sys.executable, "-m", "organfast", *map(os.fsencode, map(str, arguments))],
        capture_output=True,
        timeout=120,
        check=False,
        **options,
    )


def test_files_and_folders_that_may_not_be_used(good: Good, tmp_path: Path) -> None:
    start = as_others()
    scan, closed = tmp_path / "scan.nii.gz", tmp_path / "closed.nii.gz"
    for path in (scan, closed):
        path.write_bytes(zipped(good.content()))
    closed.chmod(0)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for given, out, named, words in (
        (closed, tmp_path / "out", closed, "may not be read"),
        (scan, locked / "out", locked, "cannot be written to"),
        (scan, locked / "l.nii.gz", locked, "cannot be written to"),
    ):
        ran = process("segment", "-i", given, "-o", out, "-m", good.model, start=start)
        told = (ran.returncode, ran.stdout.decode(), ran.stderr.decode())
        assert_refused(*told, named, Refused(words))
    assert _listing(tmp_path) == {str(p) for p in (scan, closed, locked)}


def test_a_process_without_home_locale_and_folder_for_temporary_files(
    good: Good, tmp_path: Path
) -> None:
    """Pictures and report all the same, and not a word from a library."""
    scans, home = tmp_path / "scans", tmp_path / "home"
    scans.mkdir()
    scan = scans / f"{UMLAUT}.nii.gz"
    scan.write_bytes(zipped(good.content()))
    home.mkdir(mode=0o555)
    bare = {"LC_ALL": "C", "TMPDIR": "/nowhere"}
    # Python takes names for UTF-8 in this locale, unless it is told not to.
    strict = {**bare, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HOME": str(home)}
    for n, (given, env) in enumerate(((scan, bare), (scans, strict))):
        out = tmp_path / f"out{n}"
        ran = process(
            *("segment", "-i", given, "-o", out, "-m", good.model, "--report", "--threads", 1),
            start=as_others(),
            env=env,
        )
        assert ran.returncode == 0, ran.stderr
        assert all(line.startswith(b"organfast: ") for line in ran.stderr.splitlines()), ran.stderr
        folder = out if n == 0 else out / UMLAUT
        labels = nib.load(folder / "segmentation.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(labels.dataobj), good.labels)
        assert (folder / "overlay.png").stat().st_size > 5000
        assert (folder / "report.html").is_file()
    assert UMLAUT in (tmp_path / "out0" / "report.html").read_text("utf-8")
    record = json.loads((tmp_path / "out1" / "batch.jsonl").read_text("utf-8"))
    assert record["input"] == f"{UMLAUT}.nii.gz"
    assert not list(home.iterdir())


def test_a_process_that_nobody_listens_to(good: Good, tmp_path: Path) -> None:
    """Closed streams, and a working folder that is gone."""
    scan, gone = tmp_path / "scan.nii.gz", tmp_path / "gone"
    scan.write_bytes(zipped(good.content()))
    gone.mkdir()
    command = f"{sys.executable} -m organfast segment -i {scan} -m {good.model} --no-preview -o "
    for n, (before, after) in enumerate((("", "<&- >&- 2>&-"), (f"cd {gone}; rmdir {gone};", ""))):
        out = tmp_path / f"out{n}"
        ran = subprocess.run(
            ["sh", "-c", f"{before} {command} {out} {after}"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert b"Traceback" not in ran.stderr
        assert (out / "segmentation.nii.gz").is_file(), ran.stderr


def test_a_disk_that_is_full(good: Good, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(zipped(good.content()))
    try:
        for out in (disk / "out", disk / "deep" / "er" / "out"):
            ran = process("segment", "-i", scan, "-o", out, "-m", good.model)
            told = (ran.returncode, ran.stdout.decode(), ran.stderr.decode())
            assert_refused(*told, out, Refused("No space left on device"))
            assert not [p for p in disk.rglob("*") if p.is_file() or p.name.startswith(".")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- DICOM ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series(good: Good, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a series of the good scan."""
    from dicomseries import write_series

    volume = Volume(good.hu, good.affine)
    folder = write_series(tmp_path_factory.mktemp("dicom") / "series", volume)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


Files = dict[str, bytes]


def packed(path: Path, files: Files) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tagged(content: bytes, **tags: Any) -> bytes:
    """A slice with other tags, or of another transfer syntax."""
    import pydicom

    image = pydicom.dcmread(io.BytesIO(content))
    image.file_meta.TransferSyntaxUID = tags.pop("syntax", image.file_meta.TransferSyntaxUID)
    for keyword, value in tags.items():
        setattr(image, keyword, value)
    written = io.BytesIO()
    image.save_as(written, enforce_file_format=True)
    return written.getvalue()


def every(files: Files, **tags: Any) -> Files:
    return {name: tagged(content, **tags) for name, content in files.items()}


def deflated_bomb(files: Files) -> Files:
    """A slice of some hundred kB whose data set inflates to 20 MB."""
    name, content = next(iter(files.items()))
    syntax = "1.2.840.10008.1.2.1.99"
    bloated = tagged(content, syntax=syntax, PixelData=bytes(20 << 20))
    return {**files, name: bloated}


SERIES: dict[str, tuple[Callable[[Files], Files], Outcome]] = {
    "as it is": (lambda files: files, Same()),
    "paths that lead out": (
        lambda files: {f"../../../tmp/owned/{name}": c for name, c in files.items()},
        Same(),
    ),
    "paths from the root": (
        lambda files: {f"/etc/{name}": c for name, c in files.items()},
        Same(),
    ),
    "names that steer": (
        lambda files: {f"\x1b[31m\n<b>{name}": c for name, c in files.items()},
        Same(),
    ),
    "a bomb beside it": (lambda files: {**files, "bomb.txt": bytes(20 << 20)}, Same()),
    "a bomb that says DICOM": (
        lambda files: {**files, "bomb.dcm": bytes(128) + b"DICM" + bytes(20 << 20)},
        Refused("DICOM header cannot be read|something else|MB"),
    ),
    "a slice and a million elements of nothing": (
        lambda files: {name: c + bytes(7 << 20) for name, c in files.items()},
        Refused("truncated or damaged"),
    ),
    "a slice of 20 MB": (
        lambda files: {
            name: content + (bytes(20 << 20) if n == 2 else b"")
            for n, (name, content) in enumerate(files.items())
        },
        Refused("more than 8 MB"),
    ),
    "a deflated bomb": (deflated_bomb, Refused("more than 8 MB")),
    "65535 rows": (
        lambda files: every(files, Rows=65535, Columns=65535),
        Refused("more than 8192"),
    ),
    "8000 rows": (lambda files: every(files, Rows=8000), Refused("pixel data are|not what it")),
    "no rows": (lambda files: every(files, Rows=0), Refused("no pixels|without pixel data")),
    "a slope of 1e30": (lambda files: every(files, RescaleSlope="1e30"), Refused("no HU|NaN")),
    "a slope of 0": (lambda files: every(files, RescaleSlope=0), Refused("everywhere")),
    "pixels of 1 m": (lambda files: every(files, PixelSpacing=[1000, 1000]), Refused("as no pat")),
    "pixels of nothing": (lambda files: every(files, PixelSpacing=[0, 0]), Refused("no sense")),
    "half a slice": (
        lambda files: {n: c[: len(c) // 2] if n == min(files) else c for n, c in files.items()},
        Refused("truncated or damaged|ends before|cannot be read"),
    ),
    "one slice": (lambda files: dict(list(files.items())[:1]), Refused("single slice")),
    "nothing of it": (lambda files: {"readme.txt": b"x"}, Refused("holds no DICOM file")),
}


@pytest.mark.parametrize("kind", SERIES)
def test_zips_of_dicom(
    judge: Judge, series: Files, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("organfast.dicom._MAX_SLICE_BYTES", 8 << 20)  # of 256: bombs take time
    make, outcome = SERIES[kind]
    scan = tmp_path / "series.zip"
    packed(scan, make(series))
    code = run(
        ["segment", "-i", str(scan), "-o", str(tmp_path / "out"), "-m", str(judge.good.model)]
    )
    told = judge.capsys.readouterr()
    if isinstance(outcome, Refused):
        assert_refused(code, told.out, told.err, scan, outcome)
        assert _listing(tmp_path) == {str(scan)}
        return
    assert code == 0, told.err
    assert {p.name for p in tmp_path.iterdir()} == {"series.zip", "out"}
    assert not Path("/tmp/owned").exists()
    # The series is stored right to left and front to back.
    labels = nib.as_closest_canonical(nib.load(tmp_path / "out" / "segmentation.nii.gz"))
    np.testing.assert_array_equal(np.asanyarray(labels.dataobj), judge.good.labels)


def test_a_tar_is_no_scan(judge: Judge, series: Files, tmp_path: Path) -> None:
    scan = tmp_path / "series.tar"
    with tarfile.open(scan, "w") as archive:
        for name, content in series.items():
            member = tarfile.TarInfo(f"../../{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    judge(scan, Refused("is not a NIfTI file"), tmp_path / "out")


# --- text in tables -------------------------------------------------------------------------------

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\x00=1", "\u200b=1", "\uff1d1")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_a_table_is_a_formula(text: str) -> None:
    assert cell(text) == f"'{text}"
    assert table([["name"], [text]]).splitlines()[1].strip('"').startswith("'")


@pytest.mark.parametrize("value", ["liver", "a=b", "1-2", "", 1, -1.5, None, "肝"])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert cell(value) == value


def test_every_table_makes_its_cells_harmless() -> None:
    """Whoever writes a table asks ``tables.cell`` for its text."""
    package = Path(__file__).parents[1] / "organfast"
    writers = {p.name for p in package.rglob("*.py") if "csv.writer" in p.read_text("utf-8")}
    assert writers == {"tables.py"}


def test_an_installation_that_nobody_may_write_to_compiles_all_the_same(tmp_path: Path) -> None:
    """Numba refuses to compile where it cannot keep what it has compiled."""
    package = Path(__file__).parents[1] / "organfast"
    shutil.copytree(package, tmp_path / "organfast", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (tmp_path / "organfast", *(tmp_path / "organfast").rglob("*")):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    ran = subprocess.run(
        [
            *as_others(),
            *(sys.executable, "-c"),
            "import organfast.kernels.rates as kernel, os\n"
            "print(kernel.__file__, os.environ['NUMBA_CACHE_DIR'])",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path / "organfast")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    used, kept = ran.stdout.split()
    assert used.startswith(str(tmp_path))
    assert not Path(kept).exists()
