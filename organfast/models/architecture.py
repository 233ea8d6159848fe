"""Architectures of the CNN: a description from which the network and its dense program are made.

One tower per level of the block. A level stacked as a channel beside another would be read at
different strides by neighbouring blocks, and nothing could be shared between them. ::

    level 0  (size, size, slices) --tower 0--> (n, n, c) --+
    level 1  (size, size, slices) --tower 1--> (n, n, c) --+-- flatten, concatenate --head--> logits

The last layer of the head, one output per label, is not listed: it follows from the labels. No
import here is heavy, so that names and sizes can be asked for without JAX.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from organfast.blocks import Block, Context

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Conv",
    "Dense",
    "Dropout",
    "Layer",
    "MaxPool",
    "architecture",
    "conv_padding",
    "map_sizes",
    "n_parameters",
]


@dataclass(frozen=True)
class Conv:
    """A square convolution with bias, and relu.

    Parameters
    ----------
    features : int
        Channels of the output.
    size : int
        Taps along each side.
    stride : int
        Voxels between outputs.
    padding : {"VALID", "SAME"}
        None, or zeros such that ``ceil(n / stride)`` outputs come of ``n`` inputs, the odd one of
        them at the end (TensorFlow's and JAX's rule).
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: str = "VALID"


@dataclass(frozen=True)
class MaxPool:
    """The largest of each square of voxels, side by side; what is left at the end is dropped.

    Parameters
    ----------
    size : int
        Voxels along each side.
    """

    size: int = 2


@dataclass(frozen=True)
class Dense:
    """A full connection with bias.

    Parameters
    ----------
    features : int
        Outputs.
    relu : bool
        Whether negative outputs become 0.
    """

    features: int
    relu: bool = False


@dataclass(frozen=True)
class Dropout:
    """In training, a share of the values set to 0 and the others scaled up.

    Parameters
    ----------
    rate : float
        The share.
    """

    rate: float


Layer = Conv | MaxPool | Dense | Dropout


@dataclass(frozen=True)
class Architecture:
    """Layers between a block and its logits.

    Parameters
    ----------
    name : str
        Under which :func:`architecture` gives it.
    size : int
        Voxels along each side of a block.
    channels : int
        Slices of a block.
    towers : tuple of tuple of Conv or MaxPool
        Layers of each tower; tower n reads level n.
    head : tuple of Dense or Dropout
        Layers after the towers' outputs are flattened and joined, but for the last.
    l2 : float
        In training, this times the sum of the squared kernels of the convolutions is added.
    kernel_init : {"he_normal", "glorot_uniform"}
        How kernels begin; biases begin at 0.
    """

    name: str
    size: int
    channels: int
    towers: tuple[tuple[Conv | MaxPool, ...], ...]
    head: tuple[Dense | Dropout, ...]
    l2: float = 0.0
    kernel_init: str = "he_normal"

    @property
    def n_flat(self) -> int:
        """Values that the towers give to the head."""
        return sum(
            map_sizes(self, n)[-1] ** 2 * channels[-1]
            for n, channels in enumerate(self.tower_channels)
        )

    @property
    def tower_channels(self) -> tuple[tuple[int, ...], ...]:
        """Of each tower, the channels before its first layer and after each layer."""
        found = []
        for layers in self.towers:
            channels = [self.channels]
            for layer in layers:
                channels.append(layer.features if isinstance(layer, Conv) else channels[-1])
            found.append(tuple(channels))
        return tuple(found)

    def parameter_shapes(self, n_labels: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of the network with so many labels."""
        shapes: dict[str, tuple[int, ...]] = {}
        for t, (layers, channels) in enumerate(zip(self.towers, self.tower_channels, strict=True)):
            for n, layer in enumerate(layers):
                if isinstance(layer, Conv):
                    taps = (layer.size, layer.size)
                    shapes[f"tower{t}.conv{n}.kernel"] = (*taps, channels[n], layer.features)
                    shapes[f"tower{t}.conv{n}.bias"] = (layer.features,)
        n_in = self.n_flat
        for n, dense in enumerate((*self.head, Dense(n_labels))):
            if isinstance(dense, Dense):
                shapes[f"dense{n}.kernel"] = (n_in, dense.features)
                shapes[f"dense{n}.bias"] = (dense.features,)
                n_in = dense.features
        return shapes


def n_parameters(described: Architecture, n_labels: int) -> int:
    """Numbers that training finds.

    Parameters
    ----------
    described : Architecture
        The layers.
    n_labels : int
        Outputs.

    Returns
    -------
    int

    >>> n_parameters(architecture("readme", Block(33)), 23)
    1801111
    """
    return sum(prod(shape) for shape in described.parameter_shapes(n_labels).values())


def map_sizes(described: Architecture, tower: int) -> tuple[int, ...]:
    """Along one side of a block, the values before a tower's first layer and after each layer.

    Parameters
    ----------
    described : Architecture
        The layers.
    tower : int
        Which tower.

    >>> map_sizes(architecture("readme", Block(63)), 0)
    (63, 31, 16, 8)
    """
    sizes = [described.size]
    for layer in described.towers[tower]:
        n = sizes[-1]
        if isinstance(layer, MaxPool):
            sizes.append(n // layer.size)
        elif layer.padding == "SAME":
            sizes.append(-(-n // layer.stride))
        else:
            sizes.append((n - layer.size) // layer.stride + 1)
    return tuple(sizes)


def conv_padding(layer: Conv, n: int) -> tuple[int, int]:
    """Zeros before the first and after the last of ``n`` inputs.

    Parameters
    ----------
    layer : Conv
        The convolution.
    n : int
        Inputs along one side.

    >>> same = Conv(64, stride=2, padding="SAME")
    >>> conv_padding(same, 16), conv_padding(same, 31)
    ((0, 1), (1, 1))
    """
    if layer.padding == "VALID":
        return 0, 0
    n_out = -(-n // layer.stride)
    total = max(0, (n_out - 1) * layer.stride + layer.size - n)
    return total // 2, total - total // 2


# --- by name --------------------------------------------------------------------------------------

SMALLEST, LARGEST = 9, 97


def _readme(block: Block) -> Architecture:
    """The seed's network. Shapes are those of 33 px, and of 63 px."""
    tower = (  #                                      33 33  1     63 63  1
        Conv(32, stride=2),  #                        16 16 32     31 31 32
        Conv(64, stride=2, padding="SAME"),  #         8  8 64     16 16 64
        Conv(128, stride=2, padding="SAME"),  #        4  4 128     8  8 128
    )  #                                                 2048        8192
    head = (Dense(800), Dropout(0.25), Dense(84))  #      800, 84
    return Architecture("readme", block.size, block.slices, (tower,), head, 1e-3, "glorot_uniform")


def _readme_pool(block: Block) -> Architecture:
    """The seed's first network. Shapes are those of 33 px."""
    tower = (  #                                      33 33  1
        Conv(32),  #                                  31 31 32
        MaxPool(2),  #                                15 15 32
        Conv(64, padding="SAME"),  #                  15 15 64
        MaxPool(2),  #                                 7  7 64
    )  #                                                 3136
    head = (Dense(400), Dense(120), Dense(84))
    return Architecture(
        "readme-pool", block.size, block.slices, (tower,), head, 1e-3, "glorot_uniform"
    )


def _towers(block: Block) -> Architecture:
    """One tower per level down to one voxel, and a small head. ::

        33 px   5x5 /2  15   3x3 /2  7   3x3 /2  3   3x3  1         channels w, 2w, 4w, 4w
        17 px   3x3     15   3x3 /2  7   3x3 /2  3   3x3  1

    Every convolution covers its input to the last voxel, so that a block is seen whole and its
    middle stays the middle. ``w`` is 32, 24, 20, 16 for one, two, three, more levels: 0.25 to 0.35
    million parameters at the sizes above.
    """
    width = (32, 24, 20, 16)[min(len(block.levels), 4) - 1]
    tower = _to_one_voxel(block.size, width)
    head = (Dense(128, relu=True), Dropout(0.25))
    return Architecture("towers", block.size, block.slices, (tower,) * len(block.levels), head)


def _to_one_voxel(size: int, width: int) -> tuple[Conv, ...]:
    layers: list[Conv] = []
    n = size
    while n > 1:
        taps, stride = 3, 1
        if n > 5 and n % 4 == 3:  # n // 2 outputs, an odd number, of all n inputs
            stride = 2
        elif not layers and n > 21:  # the same with five taps, where they are cheap
            taps, stride = 5, 2
        n = (n - taps) // stride + 1
        features = width if n > 12 else 2 * width if n > 5 else 4 * width
        layers.append(Conv(features, taps, stride))
    return tuple(layers)


_MAKERS = {"readme": _readme, "readme-pool": _readme_pool, "towers": _towers}
ARCHITECTURES = tuple(_MAKERS)


def architecture(name: str, pattern: Block | Context) -> Architecture:
    """The architecture of a name, for a block.

    Parameters
    ----------
    name : str
        "readme", the seed's network; "readme-pool", its first; or "towers", one small tower per
        level.
    pattern : Block
        What is seen: its size, levels and slices.

    Raises
    ------
    ValueError
        There is no such name, or it is not for such a block.

    >>> architecture("towers", Block(17, levels=(1, 3, 7), slices=3)).towers[0]
    (Conv(features=20, size=3, stride=1, padding='VALID'), \
Conv(features=40, size=3, stride=2, padding='VALID'), \
Conv(features=80, size=3, stride=2, padding='VALID'), \
Conv(features=80, size=3, stride=1, padding='VALID'))
    """
    if name not in _MAKERS:
        raise ValueError(f"architecture {name!r} is unknown; use {', '.join(ARCHITECTURES)}")
    if not isinstance(pattern, Block):
        raise ValueError("a CNN reads blocks; give a Block, such as Block(33), or train a forest")
    if name == "towers":
        if not SMALLEST <= pattern.size <= LARGEST:
            raise ValueError(
                f"towers are for block sizes from {SMALLEST} to {LARGEST}, not {pattern.size}"
            )
    elif len(pattern.levels) > 1:
        raise ValueError(
            f"{name} reads one level, the block has {pattern.levels}; use the architecture towers"
        )
    made = _MAKERS[name](pattern)
    if min(map_sizes(made, 0)) < 1:
        raise ValueError(
            f"blocks of {pattern.size} voxels are too small for {name}; use a larger size"
        )
    return made
