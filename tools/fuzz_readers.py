"""Throw changed files at what reads them: the NIfTI reader and the reader of models.

    python tools/fuzz_readers.py nifti --seconds 300 [--seed 0]
    python tools/fuzz_readers.py model --seconds 300 --engine atheris

A reader gives a scan, or a model, or raises ``InputError``, the one line that a user sees. Anything
else is a finding: another exception, a warning, more than five seconds of processor time, more than
a gigabyte of memory. Findings are written to ``--findings`` (default ``fuzz-findings``), one file
each, and said by name; the exit code is then 1. ``python tools/fuzz_readers.py nifti FILE...``
reads such files again.

Inputs are small valid files of many kinds, changed: in bytes, in the numbers of a header, cut,
lengthened, joined, packed and unpacked; and in the JSON and the arrays of models, whose lengths are
then right again, for else nothing behind the first check would be reached. The engine ``own`` draws
these at random, each from ``--seed`` and its number. The engine ``atheris`` (``pip install
atheris``) is guided by what the readers' lines have not run yet, and asks both ways: it gives whole
files, and the draws that ``own`` would take at random.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, Protocol

import numpy as np

from organfast.adaptation import Adapt
from organfast.anatomy import ClassTable
from organfast.atlas import Atlas
from organfast.blocks import Block, Context
from organfast.calibration import Temperature
from organfast.errors import InputError
from organfast.grid import ModelGrid
from organfast.models.architecture import architecture
from organfast.models.classifier import Model, load_model, save_model
from organfast.models.cnn import Cnn
from organfast.models.forest import NODE, Forest
from organfast.nifti import read_geometry, read_labels, read_probability, read_scan

MOST_BYTES = 1 << 30
MOST_SECONDS = 5


class Draws(Protocol):
    """Where the numbers come from that decide how an input is made."""

    def randrange(self, n: int) -> int:
        """0 to n - 1."""


class BytesAsDraws:
    """Draws from given bytes, the same for the same bytes; zeros after their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def randrange(self, n: int) -> int:
        """0 to n - 1."""
        size = max(1, ((n - 1).bit_length() + 7) // 8)
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % n


def chosen(draws: Draws, things: Any) -> Any:
    """One of some things."""
    return things[draws.randrange(len(things))]


# --- what is changed ------------------------------------------------------------------------------


@cache
def nifti_seeds() -> tuple[bytes, ...]:
    """Uncompressed files of every version, byte order and storage, with and without scaling."""
    import nibabel as nib

    hu = np.random.default_rng(0).integers(-1000, 400, (5, 4, 3))
    seeds = []
    for storage in ("<i2", ">i2", "<u1", "<i4", "<f4", ">f8", "<u2", "<i8"):
        for kind in (nib.Nifti1Image, nib.Nifti2Image):
            dtype = np.dtype(storage)
            voxels = (hu + 1024 if dtype.kind == "u" else hu).astype(dtype)
            image = kind(voxels, np.diag([-1.5, 1.5, 3, 1]), dtype=dtype)
            header = image.header.as_byteswapped(">" if storage[0] == ">" else "<")
            header["vox_offset"] = header.single_vox_offset
            header["scl_slope"], header["scl_inter"] = 1, -1024 if dtype.kind == "u" else 0
            seeds.append(header.binaryblock + bytes(4) + voxels.tobytes("F"))
    return tuple(seeds)


# Where the numbers of a NIfTI-1 and a NIfTI-2 header begin, and their kind.
_FIELDS = {
    348: {
        "h": (*range(40, 56, 2), 68, 70, 72, 74, 252, 254),
        "f": (*range(76, 124, 4), *range(256, 328, 4)),
        "i": (0,),
        "B": (39, 123, *range(344, 352)),
    },
    540: {
        "q": (*range(16, 80, 8), 168),
        "h": (12, 14),
        "d": (*range(104, 200, 8), *range(352, 496, 8)),
        "i": (0, 344, 348, 500, 504),
        "B": (*range(4, 12), 524, *range(540, 544)),
    },
}
_NUMBERS = (
    *(0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 127, 128, 255, 256, 348, 352, 512, 540, 544, 768, 1024),
    *(2**15 - 1, -(2**15), 2**16, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)),
)
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-3, 1e-30, 1e5, 1e30, 3e38, float("nan"))


def _with_number(content: bytearray, draws: Draws) -> None:
    """A number of the header becomes another."""
    size = 540 if content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else 348
    order = ">" if content[:1] == b"\0" else "<"
    kind = chosen(draws, tuple(_FIELDS[size]))
    at = chosen(draws, _FIELDS[size][kind])
    if kind in "fd":
        value = chosen(draws, (*_REALS, float("inf"), -float("inf")))
        packed = np.float64(value).astype(f"{order}{kind}").tobytes()
    else:
        n_bytes = struct.calcsize(f"<{kind}")
        value = chosen(draws, _NUMBERS) % 256**n_bytes
        packed = value.to_bytes(n_bytes, "big" if order == ">" else "little")
    content[at : at + len(packed)] = packed


def _with_bytes(content: bytearray, draws: Draws) -> None:
    """A byte becomes another, is left out or comes twice; the end is lost, or noise follows."""
    at, how = draws.randrange(max(1, len(content))), draws.randrange(8)
    if how < 4:
        content[at : at + 1] = bytes([draws.randrange(256)])
    elif how == 4:
        del content[at : at + 1 + draws.randrange(16)]
    elif how == 5:
        content[at:at] = content[at : at + 1 + draws.randrange(64)]
    elif how == 6:
        del content[at:]
    else:
        content += bytes(draws.randrange(256) for _ in range(draws.randrange(40)))


def made_nifti(draws: Draws) -> bytes:
    """A changed NIfTI file."""
    content = bytearray(chosen(draws, nifti_seeds()))
    for _ in range(draws.randrange(4)):
        if draws.randrange(4) < 3 and len(content) >= 544:
            _with_number(content, draws)
        else:
            _with_bytes(content, draws)
    if draws.randrange(3):
        return bytes(content)
    for _ in range(1 + (draws.randrange(16) == 0)):  # twice, at times
        content = bytearray(gzip.compress(bytes(content), 1, mtime=0))
    if draws.randrange(2):
        _with_bytes(content, draws)
    if draws.randrange(8) == 0:
        content += gzip.compress(bytes(draws.randrange(400)), 1, mtime=0)
    return bytes(content)


@cache
def model_seeds() -> tuple[bytes, ...]:
    """Forests of blocks and of context, and a network with an atlas."""
    table = ClassTable.default().keep(["liver", "spleen"])
    n, rng = len(table), np.random.default_rng(0)
    tree = np.zeros(7, NODE)
    tree["left"] = (1, 3, 5, ~0, ~1, ~(n - 1), ~n)
    seeds = []
    grid = ModelGrid((1.5, 1.5, 3.0), "piecewise")
    context = Context(n=20, spacing_mm=(1.5, 1.5, 3.0))
    for pattern in (Block(5, (1, 3)), context):
        tree["feature"] = rng.integers(0, pattern.n_features, 7)
        nodes, starts = np.concatenate([tree, tree]), np.array([0, 7, 14])
        forest = Forest(nodes, starts, np.full((1, n), 1 / n), pattern.offsets, n)
        seeds.append(Model(forest, table, pattern, grid, calibration=Temperature(0.8)))
    block = Block(9)
    described = architecture("towers", block)
    params = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in described.parameter_shapes(n).items()
    }
    cnn = Cnn(described, block, (-160.0, 240.0), params, np.arange(n), n)
    shares = np.zeros((len(table.organs), 9, 6, 7), np.uint8)
    shares[0, 2:5, 1:3, 1:], shares[1, 6:, 3:, 2:5] = 200, 120
    seeds.append(Model(cnn, table, block, grid, adapt=Adapt(), atlas=Atlas(shares)))
    contents = []
    with tempfile.TemporaryDirectory() as folder:
        for model in seeds:
            save_model(model, Path(folder) / "m")
            contents.append((Path(folder) / "m").read_bytes())
    return tuple(contents)


_VALUES = (
    *(
        None,
        True,
        "",
        "forest",
        "cnn",
        "\ud800",
        "a" * 500,
        [],
        {},
        [[]],
        0,
        1,
        -1,
        3,
        2**15,
        2**31,
    ),
    *(2**62, 10**17, -(2**62), 0.5, -0.5, 1e-300, 1e300, [1], [1, 1, 1], [0.1, 0.1, 0.1], {"a": 1}),
)


def _with_value(tree: Any, draws: Draws) -> Any:
    """Somewhere in JSON a value becomes another, goes, comes twice, or is where another was."""
    places: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                todo.append(node[key])
    if not places:
        return tree
    node, key = chosen(draws, places)
    how = draws.randrange(6)
    if how < 3:
        node[key] = chosen(draws, _VALUES)
    elif how == 3:
        del node[key]
    elif how == 4 and isinstance(node, list):
        node.append(node[key])
    else:
        other, name = chosen(draws, places)
        node[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else 7
    return tree


def _keys(node: Any) -> Any:
    return node if isinstance(node, dict) else range(len(node))


def made_model(draws: Draws) -> bytes:
    """A changed model file."""
    content = chosen(draws, model_seeds())
    n = int.from_bytes(content[:8], "little")
    outer, arrays = json.loads(content[8 : 8 + n]), bytearray(content[8 + n :])
    for _ in range(draws.randrange(4)):
        how = draws.randrange(8)
        if how < 4:
            header = _with_value(json.loads(outer["__metadata__"]["organfast"]), draws)
            outer["__metadata__"]["organfast"] = json.dumps(header)
        elif how == 4:
            kept = outer["__metadata__"]
            outer = {**_with_value({k: v for k, v in outer.items() if k != "__metadata__"}, draws)}
            outer["__metadata__"] = kept
        elif how == 5 and arrays:
            at = draws.randrange(len(arrays))
            value = chosen(draws, _NUMBERS) % 2**32
            arrays[at : at + 4] = value.to_bytes(4, "little")[: len(arrays) - at]
        else:
            _with_bytes(arrays, draws)
    text = json.dumps(outer).encode("utf-8", "surrogatepass")
    file = bytearray(len(text).to_bytes(8, "little") + text + arrays)
    if draws.randrange(8) == 0:
        _with_bytes(file, draws)
    return bytes(file)


# --- what must hold -------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A reader did not end in time; no ``except Exception`` takes it."""


def read_nifti(path: Path) -> bool:
    """Ask all readers of NIfTI; whether one had an answer."""
    n_read = 0
    for reader in (read_scan, read_labels, read_probability, read_geometry):
        try:
            reader(path)
        except InputError as error:
            check_line(error)
        else:
            n_read += 1
    return n_read > 0


def read_model(path: Path) -> bool:
    """Load a model; one that is accepted answers, and is written as what it is."""
    try:
        model = load_model(path)
    except InputError as error:
        check_line(error)
        return False
    if isinstance(model.classifier, Forest):
        ask(model.classifier)
    if model.atlas is not None:
        lay(model.atlas)
    buffer = path.with_suffix(".again")
    save_model(model, buffer)
    if load_model(buffer).digest != model.digest:
        raise AssertionError("a model that was read is written as another one")
    return True


def lay(atlas: Atlas) -> None:
    """A few points over an atlas."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(atlas.shares) + 1, 20)
    atlas.place(rng.uniform(0, 80, (20, 3)).astype(np.float32), rows, np.ones(20, np.float32))


def ask(forest: Forest) -> None:
    """Two positions of the smallest slab."""
    low, high = forest._extent
    shape = [
        int(high[0]) + 1,
        *(int(h) - int(low_) + 2 for h, low_ in zip(high[1:], low[1:], strict=True)),
    ]
    if np.prod(shape, dtype=np.float64) > 1e7:
        return
    slab = np.zeros(shape, np.int16)
    first = np.maximum(0, -low[1:])
    positions = np.array([first, first + 1], np.int32)
    out = np.full((2, forest.n_classes), np.nan)
    forest.probabilities(slab, positions, out)
    if not np.allclose(out.sum(axis=1), 1):
        raise AssertionError("probabilities do not sum to one")


def check_line(error: InputError) -> None:
    """An error is one short line, in printable characters, and no lack of memory."""
    line = str(error)
    if "needs more memory" in line:
        raise MemoryError(line)
    if "\n" in line or len(line) > 1000 or not line.isprintable():
        raise AssertionError(f"an error is no line: {line[:200]!r}")


READERS: dict[str, tuple[Callable[[Draws], bytes], Callable[[Path], bool]]] = {
    "nifti": (made_nifti, read_nifti),
    "model": (made_model, read_model),
}


class Target:
    """One reader, and where its inputs and its findings are kept."""

    def __init__(self, what: str, folder: Path, findings: Path) -> None:
        self.made, self._read = READERS[what]
        self._path, self._findings = folder / "input", findings
        self.counts: Counter[str] = Counter(inputs=0, accepted=0, refused=0, findings=0)
        self._names: set[str] = set()
        for seed in (nifti_seeds(), model_seeds())[what == "model"]:
            self.one_input(seed)  # what is imported at first use does not count as a reader's
        if self.counts["accepted"] != self.counts["inputs"]:
            raise AssertionError("a file that was not changed is refused")
        warnings.simplefilter("error")
        limit_memory()

    def report(self) -> int:
        """Print what came of it; 1 where something was found."""
        print(*(f"{name} {number:,}" for name, number in self.counts.items()), sep="\n", flush=True)
        return int(self.counts["findings"] > 0)

    def one_input(self, data: bytes) -> None:
        """Let the reader read a file of these bytes, and keep them if that is a finding."""
        self._path.write_bytes(data)
        self.counts["inputs"] += 1
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
        try:
            accepted = self._read(self._path)
        except (Exception, TooSlow) as error:
            self._found(data, error)
        else:
            self.counts["accepted" if accepted else "refused"] += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _found(self, data: bytes, error: BaseException) -> None:
        self.counts["findings"] += 1
        frame = traceback.extract_tb(error.__traceback__)[-1]
        name = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
        if name in self._names:
            return  # one input for each
        self._names.add(name)
        self._findings.mkdir(parents=True, exist_ok=True)
        path = self._findings / hashlib.sha256(data).hexdigest()[:16]
        path.write_bytes(data)
        print(f"{path}: {name}: {error}"[:400], file=sys.stderr, flush=True)


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def limit_memory() -> None:
    """From here on a gigabyte more may be had, and no more."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- engines --------------------------------------------------------------------------------------


def own(target: Target, end: float, seed: int) -> None:
    """Changes at random, until ``end`` of processor time."""
    n = 0
    while time.process_time() < end:
        target.one_input(target.made(random.Random(seed << 40 | n)))
        n += 1


def guided(target: Target, end: float, seed: int) -> None:
    """Changes that lead to lines which have not run yet; ends the process."""
    import atheris

    def one(data: bytes) -> None:
        if time.process_time() > end:
            os._exit(target.report())  # libFuzzer does not give back control
        if data[:1] < b"\x80":
            target.one_input(target.made(BytesAsDraws(data[1:])))
        else:
            target.one_input(data[1:])

    readers = ("organfast.", "nibabel.nifti", "nibabel.analyze", "nibabel.wrapstruct")
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and str(function.__module__).startswith(readers):
            atheris.instrument_func(function)
    with tempfile.TemporaryDirectory(prefix="organfast-seeds-") as folder:
        for n, content in enumerate((*nifti_seeds(), *model_seeds())):
            (Path(folder) / str(n)).write_bytes(b"\xff" + content)
        options = [f"-seed={seed + 1}", "-rss_limit_mb=0", "-max_len=60000", "-timeout=600"]
        atheris.Setup([sys.argv[0], *options, folder], one)
        atheris.Fuzz()


def main() -> int:
    """Fuzz a reader; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("files", nargs="*", type=Path, help="read these alone")
    parser.add_argument("--seconds", type=float, default=60, help="of processor time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["own", "atheris"], default="own")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="organfast-fuzz-") as folder:
        target = Target(given.reader, Path(folder), given.findings)
        signal.signal(signal.SIGVTALRM, _too_slow)
        for path in given.files:
            target.one_input(path.read_bytes())
        if not given.files:
            engine = {"own": own, "atheris": guided}[given.engine]
            engine(target, time.process_time() + given.seconds, given.seed)
        return target.report()


if __name__ == "__main__":
    sys.exit(main())
