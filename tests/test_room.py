"""Room for arrays, and the memory contract: what of a large scan is held in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from organfast.memory import scan_bytes
from organfast.models.classifier import load_model
from organfast.nifti import is_mapped, read_scan, write_volume
from organfast.pipeline import Settings
from organfast.room import free_bytes, roomy
from organfast.volume import Volume

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")


@LINUX
def test_what_is_free_is_less_than_the_machine_has() -> None:
    free = free_bytes()
    assert free is not None
    assert 0 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("free", [None, 1 << 40, 4 * 120, 4 * 120 - 1, 0])
def test_an_array_is_the_same_in_memory_and_in_a_file(
    free: int | None, order: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("organfast.room.free_bytes", lambda: free)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    array = roomy((3, 4, 5), np.int16, order)
    assert (array.shape, array.dtype, array.flags.writeable) == ((3, 4, 5), np.int16, True)
    assert array.flags.c_contiguous == (order == "C")
    assert not array.any()
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    array[...] = values
    np.testing.assert_array_equal(array, values)
    assert array.flags.owndata == (free is None or free >= 4 * 120)
    assert not list(tmp_path.iterdir())


def test_room_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("organfast.room.free_bytes", lambda: 0)
    with pytest.raises(MemoryError, match="neither free in memory nor on disk"):
        roomy((1 << 20, 1 << 20, 1 << 10), np.uint8)


def phantom_like(shape: tuple[int, int, int]) -> Volume:
    """A trunk of noise in air, in the order of a file."""
    hu = np.full(shape, -1000, np.int16, order="F")
    a, b, c = shape
    body = hu[a // 6 : -a // 6, b // 6 : -b // 6]
    body[...] = np.random.default_rng(0).integers(-80, 120, body.shape[:2])[..., None]
    return Volume(hu, np.diag([360 / a, 360 / b, 400 / c, 1.0]))


def test_a_mapped_scan_is_not_counted(model_file: Path, tmp_path: Path) -> None:
    model, volume = load_model(model_file), phantom_like((40, 40, 30))
    write_volume(tmp_path / "a.nii", volume)
    write_volume(tmp_path / "a.nii.gz", volume)
    assert is_mapped(tmp_path / "a.nii")
    assert not is_mapped(tmp_path / "a.nii.gz")
    mapped, unpacked = (
        scan_bytes(tmp_path / f"a.{e}", model, Settings()) for e in ("nii", "nii.gz")
    )
    assert mapped is not None
    assert unpacked == mapped + 2 * volume.hu.size


# A limit of data counts private memory alone: neither a mapped scan nor the file of a large array.
LIMITED = """
import json, resource, sys
from pathlib import Path
import organfast as of
import organfast.room as room
from organfast.pipeline import segment
small, scan, out, model, free, limit = sys.argv[1:]
model = of.load_model(model)
segment(small, model).save(Path(out) / "first", preview=False)  # all that is loaded on the way
if int(free) >= 0:
    room.free_bytes = lambda: int(free)
rows = dict(r.split(":", 1) for r in Path("/proc/self/status").read_text().splitlines())
held = int(rows["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + int(limit),) * 2)
try:
    result = segment(scan, model)
    result.save(Path(out) / "second", preview=False)
    told = "done"
except (MemoryError, of.InputError) as error:
    told = str(error)
sys.stdout.write(json.dumps(told))
"""


@LINUX
def test_a_scan_larger_than_memory_is_segmented(model_file: Path, tmp_path: Path) -> None:
    """82 MB of voxels in 60 MB of private memory, which holds neither them nor their labels; the
    same scan does not fit where arrays insist on memory."""
    volume = phantom_like((320, 320, 400))
    scan, small = tmp_path / "scan.nii", tmp_path / "small.nii"
    write_volume(scan, volume)
    write_volume(small, phantom_like((40, 40, 30)))
    assert not read_scan(scan).volume.hu.flags.owndata

    def ran(out: str, free: int) -> Any:
        arguments = (small, scan, tmp_path / out, model_file, free, 60 << 20)
        finished = subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(finished.stdout)

    assert ran("file", 20 << 20) == "done"
    assert "done" not in ran("memory", -1)
    assert not (tmp_path / "memory" / "second").exists()
