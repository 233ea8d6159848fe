"""A CNN as a file that other programs run: ONNX or StableHLO.

::

    blocks (n, L, slices, size, size) int16 --> window --> towers --> head --> softmax
        --> summed over the labels of a class --> probabilities (n, n_classes) float32

A block holds what the pattern reads around a position, of the levels of the model's grid: bringing
a scan to the grid, averaging and cutting stay with whoever calls. Any number of blocks may be given
at once. A file is kept only if it gives what the model gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from organfast import __version__
from organfast.errors import InputError
from organfast.files import written_whole
from organfast.models.architecture import Conv, Dense, Dropout, conv_padding, map_sizes
from organfast.models.cnn import Cnn

if TYPE_CHECKING:
    from organfast.models.classifier import Model
    from organfast.probability import Classifier

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "channels_first",
    "export_cnn",
    "export_model",
    "onnx_file",
    "stablehlo_file",
]

FORMATS = ("onnx", "stablehlo")
TOLERANCE = 1e-5

StrPath = str | PathLike[str]
Runner = Callable[[NDArray[np.int16]], NDArray[np.float32]]

# The oldest that says all that is needed, and the file version that came with it.
_OPSET, _IR_VERSION = 17, 8
_PLATFORMS = ("cpu", "cuda")
_N_CHECKED = 64
_TISSUES_HU = (-1024, -850, -100, 0, 45, 60, 130, 250, 900)


def export_model(model: Model, path: StrPath, to: str = "onnx") -> None:
    """Write the network of a model for other programs, checked against the model.

    The ONNX file says in its metadata what is needed to use it: class names, pattern, window and
    grid.

    Parameters
    ----------
    model : Model
        One that ``organfast train --model cnn`` made.
    path : path
        Where to. What stands there is replaced once the new file has been checked.
    to : {"onnx", "stablehlo"}
        The format; StableHLO as ``jax.export`` writes it.

    Raises
    ------
    ValueError
        The model is a forest, the format is unknown, or a package is not installed.
    InputError
        The file cannot be written, or it gives other probabilities than the model.
    """
    classifier: Classifier = model.classifier
    if not isinstance(classifier, Cnn):
        raise ValueError(
            "the model is a forest, which has no network to export; "
            "give one that `organfast train --model cnn` wrote"
        )
    about = {"class_names": list(model.classes.names), "grid": model.grid.to_dict()}
    export_cnn(classifier, path, to, about=about)


def export_cnn(
    classifier: Cnn, path: StrPath, to: str = "onnx", *, about: Mapping[str, Any] | None = None
) -> None:
    """Write a network for other programs, checked against ours.

    The file computes in float32, whatever the network's precision, and runs on any device that its
    reader knows; StableHLO on CPU and CUDA.

    Parameters
    ----------
    classifier : Cnn
        The network.
    path : path
        Where to. What stands there is replaced once the new file has been checked.
    to : {"onnx", "stablehlo"}
        The format; StableHLO as ``jax.export`` writes it.
    about : mapping, optional
        What else the metadata of an ONNX file shall say, for JSON.

    Raises
    ------
    ValueError
        The format is unknown, or a package is not installed.
    InputError
        The file cannot be written, or it gives other probabilities than the network.
    """
    if to not in FORMATS:
        raise ValueError(f"the format {to!r} is unknown; use {' or '.join(FORMATS)}")
    exact = replace(classifier, precision="float32")
    if to == "onnx":
        content, load = onnx_file(exact, about), _onnx_runner
    else:
        content, load = stablehlo_file(exact), _stablehlo_runner
    with written_whole(path) as beside:
        with open(beside, "xb") as file:
            file.write(content)
        off = _largest_difference(exact, load(beside))
        if not off <= TOLERANCE:
            raise InputError(
                path,
                f"the {to} file gives probabilities that differ from the model's by {off:.1e}",
                "it was not kept; update the packages that read and write it",
            )


# --- ONNX -----------------------------------------------------------------------------------------


class _Graph:
    """Nodes and constants of an ONNX graph, one after the other."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, array: ArrayLike) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        from onnx import helper

        output = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output


def onnx_file(cnn: Cnn, about: Mapping[str, Any] | None = None) -> bytes:
    """The content of an ONNX file, not yet checked against the network.

    Parameters
    ----------
    cnn : Cnn
        The network.
    about : mapping, optional
        What else the metadata shall say, for JSON.

    Raises
    ------
    ValueError
        onnx is not installed.
    """
    try:
        import onnx
        from onnx import TensorProto, helper
    except ImportError:
        raise _missing("onnx", "onnx and onnxruntime") from None
    graph, block = _Graph(), cnn.pattern
    flat = [_onnx_tower(graph, cnn, t) for t in _onnx_levels(graph, cnn)]
    x = graph.node("Concat", *flat, axis=1) if len(flat) > 1 else flat[0]
    x = graph.node("Softmax", _onnx_head(graph, cnn, x), axis=1)
    is_of = (cnn.merge[:, None] == np.arange(cnn.n_classes)).astype(np.float32)
    graph.node("MatMul", x, graph.constant("is_of_class", is_of), name="probabilities")
    shape = ["n", len(block.levels), block.slices, block.size, block.size]
    given = helper.make_tensor_value_info("blocks", TensorProto.INT16, shape)
    found = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", cnn.n_classes])
    made = helper.make_model(
        helper.make_graph(graph.nodes, cnn.architecture.name, [given], [found], graph.constants),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="organfast",
        producer_version=__version__,
    )
    said = {**cnn.to_dict(), "pattern": block.to_dict(), **(about or {})}
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in said.items()}
    helper.set_model_props(made, texts | {"use": "research use only: not a medical device"})
    onnx.checker.check_model(made, full_check=True)
    content: bytes = made.SerializeToString(deterministic=True)
    return content


def _onnx_levels(graph: _Graph, cnn: Cnn) -> Iterator[tuple[int, str]]:
    """Each level of the blocks, scaled: (n, slices, size, size)."""
    low, high = cnn.window
    x = graph.node("Cast", "blocks", to=1)  # float32
    x = graph.node("Sub", x, graph.constant("window_low", np.float32(low)))
    x = graph.node("Mul", x, graph.constant("window_scale", np.float32(1 / (high - low))))
    ends = (graph.constant(f"clip_{name}", np.float32(end)) for end, name in enumerate("01"))
    x = graph.node("Clip", x, *ends)
    if cnn.standardise:
        x = _onnx_standardised(graph, x)
    for t in range(len(cnn.pattern.levels)):
        yield t, graph.node("Gather", x, graph.constant(f"level{t}", np.int64(t)), axis=1)


def _onnx_standardised(graph: _Graph, x: str) -> str:
    """As ``network.scaled`` does it: of one value, a block is 0 and not rounding."""
    own = [1, 2, 3, 4]
    first = [graph.constant(name, np.full(4, v)) for name, v in (("from", 0), ("to", 1))]
    corner = graph.node("Slice", x, *first, graph.constant("own_axes", np.array(own)))
    x = graph.node("Sub", x, corner)
    x = graph.node("Sub", x, graph.node("ReduceMean", x, axes=own, keepdims=1))
    squares = graph.node("Mul", x, x)
    deviation = graph.node("Sqrt", graph.node("ReduceMean", squares, axes=own, keepdims=1))
    least = graph.constant("least_deviation", np.float32(1e-6))
    return graph.node("Div", x, graph.node("Max", deviation, least))


def _onnx_tower(graph: _Graph, cnn: Cnn, level: tuple[int, str]) -> str:
    """(n, channels * rows * cols), for ONNX has the channels first."""
    t, x = level
    sizes = map_sizes(cnn.architecture, t)
    for n, layer in enumerate(cnn.architecture.towers[t]):
        sides = [layer.size, layer.size]
        if not isinstance(layer, Conv):
            x = graph.node("MaxPool", x, kernel_shape=sides, strides=sides)
            continue
        name = f"tower{t}.conv{n}"
        kernel = cnn.params[f"{name}.kernel"].transpose(3, 2, 0, 1)
        before, after = conv_padding(layer, sizes[n])
        x = graph.node(
            "Conv",
            x,
            graph.constant(f"{name}.kernel", kernel),
            graph.constant(f"{name}.bias", cnn.params[f"{name}.bias"]),
            kernel_shape=sides,
            strides=[layer.stride, layer.stride],
            pads=[before, before, after, after],
        )
        x = graph.node("Relu", x)
    return graph.node("Flatten", x, axis=1)


def _onnx_head(graph: _Graph, cnn: Cnn, x: str) -> str:
    """Logits (n, n_labels)."""
    is_first = True
    for n, layer in enumerate((*cnn.architecture.head, Dense(cnn.n_labels))):
        if isinstance(layer, Dropout):
            continue
        kernel = cnn.params[f"dense{n}.kernel"]
        if is_first:
            kernel, is_first = kernel[channels_first(cnn)], False
        x = graph.node(
            "Gemm",
            x,
            graph.constant(f"dense{n}.kernel", kernel),
            graph.constant(f"dense{n}.bias", cnn.params[f"dense{n}.bias"]),
        )
        x = graph.node("Relu", x) if layer.relu else x
    return x


def channels_first(cnn: Cnn) -> NDArray[np.int64]:
    """Our place, channels last, of each flattened value of the towers, channels first.

    Parameters
    ----------
    cnn : Cnn
        Its towers.

    Returns
    -------
    (n_flat,) int64
        Rows of the first dense kernel, for a program whose channels come first.
    """
    places, start = [], 0
    for t, channels in enumerate(cnn.architecture.tower_channels):
        n = map_sizes(cnn.architecture, t)[-1]
        ours = start + np.arange(n * n * channels[-1]).reshape(n, n, channels[-1])
        places.append(ours.transpose(2, 0, 1).ravel())
        start += ours.size
    return np.concatenate(places)


def _onnx_runner(file: Path) -> Runner:
    try:
        import onnxruntime
    except ImportError:
        raise _missing("onnx", "onnx and onnxruntime") from None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(blocks: NDArray[np.int16]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(["probabilities"], {"blocks": blocks})[0]
        return found

    return run


# --- StableHLO ------------------------------------------------------------------------------------


def stablehlo_file(cnn: Cnn) -> bytes:
    """The content of a StableHLO file, not yet checked against the network.

    Parameters
    ----------
    cnn : Cnn
        The network.

    Raises
    ------
    ValueError
        JAX or flatbuffers is not installed.
    """
    try:
        import flatbuffers  # noqa: F401  # what JAX writes the file with
        import jax
        from jax import export
    except ImportError:
        raise _missing("stablehlo", "JAX and flatbuffers") from None
    from organfast.models.dense import Inputs, block_probabilities
    from organfast.models.devices import check_not_forked

    check_not_forked()
    inputs = Inputs(cnn.architecture, cnn.pattern, cnn.window, cnn.standardise, cnn.precision)
    is_of = (cnn.merge[:, None] == np.arange(cnn.n_classes)).astype(np.float32)
    params = dict(cnn.params)

    def probabilities(blocks: jax.Array) -> jax.Array:
        return block_probabilities(inputs, params, is_of, blocks)

    block = cnn.pattern
    shape = export.symbolic_shape(
        f"n, {len(block.levels)}, {block.slices}, {block.size}, {block.size}"
    )
    blocks = jax.ShapeDtypeStruct(shape, np.int16)
    exported = export.export(jax.jit(probabilities), platforms=_PLATFORMS)(blocks)
    return bytes(exported.serialize())


def _stablehlo_runner(file: Path) -> Runner:
    from jax import export

    exported = export.deserialize(bytearray(file.read_bytes()))
    return lambda blocks: np.asarray(exported.call(blocks))


# --- checking -------------------------------------------------------------------------------------


def _missing(to: str, packages: str) -> ValueError:
    return ValueError(f'exporting to {to} needs {packages}; pip install "organfast[cnn,export]"')


def _largest_difference(cnn: Cnn, run: Runner) -> float:
    """Of probabilities, on blocks of noise and of tissues; alone and many at a time."""
    block, worst = cnn.pattern, 0.0
    for slab, positions in _checked_slabs(cnn):
        ours = np.empty((len(positions), cnn.n_classes), np.float32)
        cnn.probabilities(slab, positions, ours)
        level, *offset = block.offsets.T
        k, i, j = (positions[:, a, None] + offset[a] for a in range(3))
        shape = (-1, len(block.levels), block.slices, block.size, block.size)
        blocks = slab[level, k, i, j].reshape(shape)
        theirs = np.concatenate([run(blocks[:1]), run(blocks[1:])])
        if theirs.shape != ours.shape:
            return np.inf
        worst = float(np.maximum(worst, np.abs(theirs - ours).max()))  # not a number stays
    return worst


def _checked_slabs(cnn: Cnn) -> Iterator[tuple[NDArray[np.int16], NDArray[np.int32]]]:
    """Levels and positions: noise around the window, and noisy squares of a tissue each."""
    rng = np.random.default_rng(0)
    reach, extent = np.array(cnn.pattern.reach), np.array([1, 16, 16])
    shape = (len(cnn.pattern.levels), *(2 * reach + extent))
    low, high = cnn.window
    middle, around = (low + high) / 2, high - low
    noise = middle + around * rng.uniform(-1, 1, shape)
    squares = rng.choice(_TISSUES_HU, (*shape[:2], *(1 + np.array(shape[2:]) // 8)))
    tissues = squares.repeat(8, axis=2).repeat(8, axis=3)[:, :, : shape[2], : shape[3]]
    for values in (noise, tissues + rng.normal(0, 20, shape)):
        slab = np.clip(np.rint(values), -32768, 32767).astype(np.int16)
        positions = rng.integers(reach, reach + extent, (_N_CHECKED, 3))
        yield slab, positions.astype(np.int32)
