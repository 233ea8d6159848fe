"""A model: a classifier with all that is needed to use it on a new scan, in one file.

An ``.organfast`` file is a safetensors file: arrays, and in its metadata under ``organfast`` a JSON
header with everything else. It holds no code. A file is not trusted: each value of the header,
each node of a forest and each weight of a network is checked before anything runs on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import resources
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from organfast.adaptation import Adapt, check_adapts
from organfast.anatomy import ClassTable
from organfast.atlas import Atlas
from organfast.blocks import Block, Context, pattern_from_dict, pattern_on
from organfast.calibration import Isotonic, Temperature, calibration_from_dict
from organfast.curve import Curve
from organfast.errors import InputError
from organfast.files import check_is_file, written_whole
from organfast.grid import ModelGrid
from organfast.models.cnn import Cnn
from organfast.models.forest import Forest

__all__ = ["STARTER", "Model", "load_model", "save_model"]

StrPath = str | PathLike[str]

STARTER = "starter"
"""In the place of a path: the model that comes with the package."""

SCHEMA = 1
NATIVE_STRIDE = (1, 4, 4)
MAX_STRIDE = 4096
MAX_CLASSES = 4096

_KEY = "organfast"
_ATLAS = "atlas"
_MAX_HEADER_BYTES = 64 << 20
_MAX_LEVELS = 16
_MAX_QUOTED = 300
_NO_RECORD = {"cases": {}, "n_examples": 0, "spacing_mm": None}
_RETRAIN = "give a model file that `organfast train` wrote"


def _library_versions(classifier: Forest | Cnn) -> dict[str, str]:
    made_by = ("scikit-learn",) if isinstance(classifier, Forest) else ("jax", "flax", "optax")
    names = ("organfast", "numpy", *made_by)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@dataclass(frozen=True, eq=False)
class Model:
    """A classifier, the classes it tells apart, and how it sees a scan.

    Parameters
    ----------
    classifier : Forest or Cnn
        Trained on ``pattern`` and ``classes``.
    classes : ClassTable
        Its classes, in the order of its probabilities.
    pattern : Block or Context
        What it reads around a position.
    grid : ModelGrid
        The grid that a scan is brought to first.
    stride : (k, i, j) int
        Voxels of the model grid between positions, unless a user asks for others.
    training : mapping
        Record of the training, for JSON: ``cases`` (name -> digests), ``n_examples``,
        ``spacing_mm`` (x, y, z, or None) and whatever else tells how the model was made. With
        ``sure`` it also holds when an organ can be trusted: of organs of patients never trained on
        whose mean probability was at least ``confidence``, ``share`` had a Dice of ``dice``.
    scores : mapping
        By use ("validation", "test") the held-out scores, for JSON: ``n_patients``, ``n_blocks``,
        ``block_accuracy``, ``block_accuracy_organs`` and others.
    versions : mapping of str to str
        Library versions that made the model; by default those that are installed.
    calibration : Temperature, Isotonic or None
        What brings the classifier's probabilities to how often they are right.
    presets : Curve or None
        What this model's accuracy costs, measured on labelled scans, and the settings that were
        chosen of it. Advice to who asks the model; no part of what it is, nor of its digest.
    adapt : Adapt or None
        How a scan's own organs correct the classifier, unless a user asks otherwise; None does not.
    atlas : Atlas or None
        Where the organs of ``classes`` lie in a body, for that correction.

    Raises
    ------
    ValueError
        The parts do not fit each other, or a record is not for JSON.
    """

    classifier: Forest | Cnn
    classes: ClassTable
    pattern: Block | Context
    grid: ModelGrid
    stride: tuple[int, int, int] = NATIVE_STRIDE
    training: Mapping[str, Any] = field(default_factory=lambda: dict(_NO_RECORD))
    scores: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    calibration: Temperature | Isotonic | None = None
    presets: Curve | None = None
    adapt: Adapt | None = None
    atlas: Atlas | None = None

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", _library_versions(self.classifier))
        if self.classifier.n_classes != len(self.classes):
            raise ValueError(
                f"the classifier tells {self.classifier.n_classes} classes apart, "
                f"the class table has {len(self.classes)}"
            )
        if not np.array_equal(self.classifier.offsets, self.pattern.offsets):
            raise ValueError("the classifier reads other voxels than the pattern")
        pattern_on(self.grid, self.pattern)
        if self.adapt is not None:
            check_adapts(self.grid)
        if self.atlas is not None and len(self.atlas.shares) != len(self.classes.organs):
            raise ValueError(
                f"the atlas shows {len(self.atlas.shares)} organs, the class table has "
                f"{len(self.classes.organs)}"
            )
        if len(self.stride) != 3 or not all(
            isinstance(s, (int, np.integer)) and 1 <= s <= MAX_STRIDE for s in self.stride
        ):
            raise ValueError(f"stride is {self.stride}; give three numbers from 1 to {MAX_STRIDE}")
        k, i, j = self.stride
        object.__setattr__(self, "stride", (int(k), int(i), int(j)))
        _check_sure(self.training.get("sure"))
        _check_whole(self.training.get("whole_ml", {}))
        calibration_from_dict(self._header["calibration"], len(self.classes))
        if self.presets is not None:
            _check_presets(self.presets, self.classifier)
        _check_header(self._header)

    @property
    def kind(self) -> str:
        """What the classifier is, "forest" or "cnn"."""
        return "forest" if isinstance(self.classifier, Forest) else "cnn"

    @property
    def network(self) -> dict[str, Any] | None:
        """A network's architecture and how it sees blocks, for JSON; None for a forest."""
        return self.classifier.to_dict() if isinstance(self.classifier, Cnn) else None

    @property
    def sure(self) -> float | None:
        """The mean probability from which on an organ was good, as measured; see ``training``."""
        known = self.training.get("sure")
        return None if known is None else float(known["confidence"])

    @property
    def whole_ml(self) -> Mapping[str, float]:
        """Organ -> ml of the smallest whole one that was learned from; see ``Presence``."""
        return {name: float(ml) for name, ml in self.training.get("whole_ml", {}).items()}

    @cached_property
    def _header(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON gives it back."""
        header = {
            "schema": SCHEMA,
            "classifier": self.kind,
            "classes": self.classes.to_dict(),
            "pattern": self.pattern.to_dict(),
            "grid": self.grid.to_dict(),
            "stride": self.stride,
            "training": self.training,
            "scores": self.scores,
            "versions": self.versions,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "presets": None if self.presets is None else self.presets.to_dict(),
        }
        if self.network is not None:
            header["network"] = self.network
        if self.adapt is not None:
            adapt = asdict(self.adapt)
            if self.atlas is None and self.adapt.atlas:
                del adapt["atlas"]  # as before there was any: the same digest
            header["adapt"] = adapt
        if self.atlas is not None:
            header["atlas"], _ = self.atlas.packed
        try:
            text = json.dumps(header, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"the record of a model must be for JSON: {error}") from None
        return dict(json.loads(text))

    @property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """What a file holds beside the header."""
        arrays = dict(self.classifier.arrays())
        if self.atlas is not None:
            _, arrays[_ATLAS] = self.atlas.packed
        return arrays

    @cached_property
    def digest(self) -> str:
        """sha256 of the content but the presets, the same for a model and its file anywhere.

        A model answers alike with presets and without; the settings of a run are recorded by it.
        """
        content = hashlib.sha256(_text({**self._header, "presets": None}).encode())
        for name, array in sorted(self._arrays.items()):
            content.update(f"{name} {array.dtype.name} {array.shape}".encode())
            content.update(array.tobytes())
        return content.hexdigest()


def save_model(model: Model, path: StrPath) -> None:
    """Write a model file, whole or not at all; equal models give equal bytes.

    Parameters
    ----------
    model : Model
        What to write.
    path : path
        Where to. What stands there is replaced once the new file is complete.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    from safetensors.numpy import save

    # One metadata key: safetensors writes several in random order.
    content = save(model._arrays, {_KEY: _text(model._header)})
    with written_whole(path) as beside, open(beside, "xb") as file:
        file.write(content)


def load_model(path: StrPath) -> Model:
    """Read a model file, and check all of it.

    Parameters
    ----------
    path : path
        As :func:`save_model` wrote it; or ``"starter"``, the model that comes with the package
        (``"./starter"`` is a file of that name).

    Returns
    -------
    Model
        Safe to run on any scan, whoever made the file.

    Raises
    ------
    InputError
        The file cannot be read, is no model, is damaged or was tampered with.
    """
    if str(path) == STARTER:
        path = Path(str(resources.files("organfast"))) / "data" / "starter.organfast"
    try:
        check_is_file(path, _RETRAIN, "a model")
        with open(path, "rb") as file:
            header = _read_header(path, file)
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", _RETRAIN) from None
    try:
        _check_header(header)
        classes = ClassTable.from_dict(header["classes"])
        pattern = pattern_from_dict(header["pattern"])
        grid = ModelGrid.from_dict(header["grid"])
        arrays = _read_arrays(content)
        atlas = _atlas(header, arrays.pop(_ATLAS, None))
        return Model(
            classifier=_classifier(header, arrays, pattern, len(classes)),
            classes=classes,
            pattern=pattern,
            grid=grid,
            calibration=calibration_from_dict(header["calibration"], len(classes)),
            presets=None if header["presets"] is None else Curve.from_dict(header["presets"]),
            adapt=None if header.get("adapt") is None else Adapt(**_EARLIER | header["adapt"]),
            atlas=atlas,
            **{name: header[name] for name in ("stride", "training", "scores", "versions")},
        )
    except ValueError as error:
        # It may quote the file: nothing that steers a terminal, and no pages.
        problem = "".join(c if c.isprintable() else " " for c in str(error)[:_MAX_QUOTED])
        raise InputError(path, f"is not a valid model: {problem}", _RETRAIN) from None


# --- the file -------------------------------------------------------------------------------------


def _text(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def _read_header(path: StrPath, file: BinaryIO) -> dict[str, Any]:
    """The JSON header, read before the arrays: another kind of file is not read whole."""
    not_a_model = InputError(path, "is not an organfast model", _RETRAIN)
    n_bytes = int.from_bytes(file.read(8), "little")
    if not 2 <= n_bytes <= _MAX_HEADER_BYTES:
        raise not_a_model
    try:
        outer = json.loads(file.read(n_bytes))
        header = json.loads(
            outer["__metadata__"][_KEY],
            parse_int=_int64,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        raise not_a_model from None
    schema = header.get("schema") if isinstance(header, dict) else None
    if type(schema) is not int or schema < 1:
        raise not_a_model
    if schema > SCHEMA:
        raise InputError(
            path,
            f"was made by a newer organfast (model schema {schema}, this one reads {SCHEMA})",
            "update organfast, or train the model again",
        )
    return dict(header)


def _int64(text: str) -> int:
    if len(text) > 18:
        raise ValueError(f"{text:.20} is too long a number")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


# A forest's arrays: name -> NumPy's dtype and the number of axes.
_FOREST_ARRAYS = {
    "threshold": ("<i2", 1),
    "feature": ("<u2", 1),
    "left": ("<i4", 1),
    "tree_starts": ("<i8", 1),
    "leaf_table": ("<f8", 2),
}
# By safetensors' name, NumPy's.
_DTYPES = {
    "U8": "|u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "I64": "<i8",
    "F32": "<f4",
    "F64": "<f8",
}


def _classifier(
    header: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    pattern: Block | Context,
    n_classes: int,
) -> Forest | Cnn:
    if header["classifier"] == "cnn":
        if not isinstance(pattern, Block):
            raise ValueError("it has a network that sees no block")
        return Cnn.from_arrays(arrays, header.get("network") or {}, pattern, n_classes)
    if set(arrays) != set(_FOREST_ARRAYS):
        raise ValueError(f"it holds the arrays {', '.join(sorted(arrays)) or 'of no forest'}")
    for name, (dtype, n_axes) in _FOREST_ARRAYS.items():
        if arrays[name].dtype != np.dtype(dtype) or arrays[name].ndim != n_axes:
            raise ValueError(f"{name} is {arrays[name].ndim}-D {arrays[name].dtype}")
    return Forest.from_arrays(arrays, pattern.offsets, n_classes)


def _atlas(header: Mapping[str, Any], content: NDArray[Any] | None) -> Atlas | None:
    packed = header.get("atlas")
    if (packed is None) != (content is None):
        raise ValueError("its atlas is there by half")
    return None if packed is None or content is None else Atlas.unpacked(packed, content)


def _read_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError, deserialize

    try:
        stored = dict(deserialize(content))  # type: ignore[no-untyped-call]  # a stub without types
    except SafetensorError as error:
        raise ValueError(f"damaged arrays ({error})") from None
    arrays = {}
    for name, entry in stored.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name:.40} is {entry['dtype']}")
        arrays[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


# --- what a header must be ------------------------------------------------------------------------

# A type; alternatives; [items]; {key: value}, where `str: value` stands for any further keys.
# `object` is any JSON.
_NUMBER = (int, float)
_ADAPT = {
    "own_hu": bool,
    "core": _NUMBER,
    "least_core": int,
    "radius": int,
    "edge_hu": _NUMBER,
}
_EARLIER = {"expected_dice": False, "atlas": True}
"""Models that were written before organs were weighed up go on without; they have no atlas."""
_SHAPE: dict[Any, Any] = {
    "schema": int,
    "classifier": str,
    "network": (
        {"architecture": str, "window": [_NUMBER], "standardise": bool, "precision": str},
        None,
    ),
    "classes": [
        {
            "name": str,
            "role": str,
            "radlex": (int, None),
            "side": str,
            "mirror": str,
            "snomed": str,
            "totalsegmentator": [str],
            "rgb": [int],
        }
    ],
    "pattern": {str: (*_NUMBER, str, [_NUMBER])},
    "grid": {"spacing_mm": ([_NUMBER], None), "hu_table": str},
    "stride": [int],
    "training": {
        "cases": {str: object},
        "n_examples": int,
        "spacing_mm": ([_NUMBER], None),
        str: object,
    },
    "scores": {
        str: {
            "n_patients": int,
            "n_blocks": int,
            "block_accuracy": _NUMBER,
            "block_accuracy_organs": _NUMBER,
            str: object,
        }
    },
    "versions": {str: str},
    "calibration": ({"kind": str, str: object}, None),
    "presets": ({str: object}, None),
    "adapt": (
        {**_ADAPT, "expected_dice": bool, "atlas": bool},
        {**_ADAPT, "expected_dice": bool},
        _ADAPT,
        None,
    ),
    "atlas": ({"shape": [int], "boxes": [[[int]]]}, None),
}


def _check_sure(sure: Any) -> None:
    if sure is None:
        return
    confidence: Any = sure.get("confidence") if isinstance(sure, Mapping) else None
    if type(confidence) not in _NUMBER or not 0 <= confidence <= 1:
        raise ValueError("when it is sure of an organ is told by a confidence from 0 to 1")


def _check_whole(whole_ml: Any) -> None:
    is_right = isinstance(whole_ml, Mapping) and all(
        isinstance(name, str) and type(ml) in _NUMBER and 0 <= ml < float("inf")
        for name, ml in whole_ml.items()
    )
    if not is_right:
        raise ValueError("how large whole organs are is told by a number of ml for each")


def _check_header(header: dict[str, Any]) -> None:
    fault = _fault({"network": None, "adapt": None, "atlas": None, **header}, _SHAPE, "")
    if fault is not None:
        raise ValueError(f"{fault.lstrip('.') or 'its header'} is missing, or not of its kind")
    if header["classifier"] not in ("forest", "cnn"):
        raise ValueError(f"it has a classifier of an unknown kind, {header['classifier']!r:.40}")
    rows = header["classes"]
    if len(rows) > MAX_CLASSES:
        raise ValueError(f"it has {len(rows)} classes; {MAX_CLASSES} are possible")
    for row in rows:
        if not row["name"].isprintable() or len(row["rgb"]) != 3:
            raise ValueError(f"its class {row['name']!r:.40} has no printable name or no colour")
    spacing = header["training"]["spacing_mm"]
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise ValueError("training.spacing_mm is not three lengths")


def _check_presets(presets: Curve, classifier: Forest | Cnn) -> None:
    """Each point must be something that this model can be asked with."""
    most = classifier.n_trees if isinstance(classifier, Forest) else 0
    for point in presets.points:
        if point.settings.pattern is not None or point.settings.max_depth is not None:
            raise ValueError(f"the preset point {point.name!r:.80} is of a model yet to be learned")
        trees = point.settings.trees
        if trees is not None and trees > most:
            raise ValueError(f"the preset point {point.name!r:.80} asks {trees} of {most} trees")


def _fault(value: Any, shape: Any, where: str) -> str | None:
    """Where a value does not have its shape, or None."""
    if shape is object:
        return None if _is_plain(value, _MAX_LEVELS) else where
    if isinstance(shape, tuple):
        return None if any(_fault(value, s, where) is None for s in shape) else where
    if isinstance(shape, list):
        items = enumerate(value) if isinstance(value, list) else [(0, None)]
        faults = (_fault(item, shape[0], f"{where}[{n}]") for n, item in items)
        return next((fault for fault in faults if fault is not None), None)
    if isinstance(shape, dict):
        return _dict_fault(value, shape, where)
    is_right = value is None if shape is None else type(value) is shape
    return None if is_right and _is_plain(value, 0) else where


def _dict_fault(value: Any, shape: dict[Any, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return where
    for key, item in value.items():
        expected = shape.get(key, shape.get(str, False))
        fault = where if expected is False else _fault(item, expected, f"{where}.{key}")
        if fault is not None or not _is_plain(key, 0):
            return fault or where
    absent = [key for key in shape if key is not str and key not in value]
    return f"{where}.{absent[0]}" if absent else None


def _is_plain(value: Any, levels: int) -> bool:
    """No deeper than ``levels``, and no text that cannot be written."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    if isinstance(value, (dict, list)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_is_plain(item, levels - 1) for item in items)
    return True
