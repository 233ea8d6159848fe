"""Learning a network instead of a forest: from the positions that ``learning`` draws.

Nothing here imports JAX before a network is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from organfast.anatomy import ClassTable
from organfast.augmentation import mirror_partners
from organfast.blocks import Block, Context
from organfast.grid import GridVolume, ModelGrid
from organfast.models.architecture import ARCHITECTURES, architecture
from organfast.progress import Progress

if TYPE_CHECKING:
    from organfast.models.cnn import Cnn
    from organfast.models.training import TrainingOutputs, TrainingSettings

__all__ = ["DrawnCase", "NetworkRecipe", "learned_network", "training_settings"]

# Ends of the window in integers of the grid's HU table: soft tissue on native pixels; air to dense
# bone on a working grid, whose piecewise table spreads soft tissue already.
_WINDOWS = {"identity": (-200.0, 300.0), "piecewise": (-2144.0, 3440.0)}
_SEEN_ON_WORKING_GRID = Block(17, levels=(1, 3, 7), slices=3)
_SEEN_ON_NATIVE_PIXELS = {"towers": Block(33, levels=(1, 8))}


@dataclass(frozen=True)
class NetworkRecipe:
    """What network is learned.

    Parameters
    ----------
    architecture : {"towers", "readme", "readme-pool"}
        Ours, one small tower of convolutions per level of the block; the seed's network; its first.
    window : (low, high) float, optional
        Integers of the grid's HU table that become 0 and 1. By default -200 to 300 HU on native
        pixels and air to dense bone on a working grid.
    standardise : bool
        Bring each block to mean 0 and deviation 1, the seed's way. Such blocks are evaluated one by
        one, for nothing of them can be shared.
    training : TrainingSettings, optional
        How it is trained.
    outputs : TrainingOutputs, optional
        Where checkpoints and the log go.

    Raises
    ------
    ValueError
        There is no such architecture.
    """

    architecture: str = "towers"
    window: tuple[float, float] | None = None
    standardise: bool = False
    training: TrainingSettings | None = None
    outputs: TrainingOutputs | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self.architecture!r} is unknown; use {', '.join(ARCHITECTURES)}"
            )

    def pattern_on(self, grid: ModelGrid, pattern: Block | Context | None) -> Block:
        """The block that the network sees.

        Parameters
        ----------
        grid : ModelGrid
            The grid that the model works on.
        pattern : Block or Context, optional
            By default three levels of three slices on a working grid; on native pixels the seed's
            block, and for ``towers`` the same eight times as wide besides.

        Raises
        ------
        ValueError
            The architecture does not fit the pattern.
        """
        if pattern is None and self.architecture == "towers" and grid.spacing_mm is not None:
            pattern = _SEEN_ON_WORKING_GRID
        pattern = pattern or _SEEN_ON_NATIVE_PIXELS.get(self.architecture, Block(33))
        if not isinstance(pattern, Block):
            raise ValueError("a network sees blocks, not context; give a Block, or learn a forest")
        architecture(self.architecture, pattern)
        return pattern

    def window_on(self, grid: ModelGrid) -> tuple[float, float]:
        """The window, or the default one of a grid.

        Parameters
        ----------
        grid : ModelGrid
            The grid that the model works on.
        """
        return _WINDOWS[grid.hu_table] if self.window is None else self.window


def training_settings(
    options: Mapping[str, Any],
    architecture: str = "towers",
    *,
    checkpoints: PathLike[str] | None = None,
    log: PathLike[str] | None = None,
) -> tuple[TrainingSettings, TrainingOutputs]:
    """How a network is trained and where that is told, without importing JAX before.

    Parameters
    ----------
    options : mapping
        Of ``TrainingSettings``.
    architecture : str
        The seed's networks learn at a third of the usual rate, unless told otherwise.
    checkpoints : path, optional
        Folder of checkpoints.
    log : path, optional
        File of the log.

    Raises
    ------
    ValueError
        JAX is not installed, or an option is out of range.
    """
    with _needing_jax():
        from organfast.models.training import TrainingOutputs, TrainingSettings
    usual = {} if architecture == "towers" else {"learning_rate": 1e-3}
    return TrainingSettings(**{**usual, **options}), TrainingOutputs(
        checkpoints=checkpoints, log=log
    )


@contextmanager
def _needing_jax() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"a network needs {error.name}, which is not installed; "
            "install it with: pip install 'organfast[cnn]'"
        ) from None


@dataclass(frozen=True, eq=False)
class DrawnCase:
    """Positions drawn from a scan, or from an altered copy of one.

    Parameters
    ----------
    patient : str
        Whose it is.
    grid_volume : GridVolume
        The scan on the model grid.
    positions : (n, 3) int32
        (k, i, j) voxels of it.
    labels : (n,) int64
        The label of each.
    """

    patient: str
    grid_volume: GridVolume
    positions: NDArray[np.int32]
    labels: NDArray[np.int64]


def learned_network(
    train: Sequence[DrawnCase],
    validation: Sequence[DrawnCase],
    labels: tuple[ClassTable, Mapping[str, int], float | None],
    recipe: tuple[NetworkRecipe, ModelGrid, Block],
    *,
    progress: Progress,
) -> tuple[Cnn, dict[str, Any]]:
    """A trained network, and the record of its training.

    Parameters
    ----------
    train : sequence of DrawnCase
        What it learns from.
    validation : sequence of DrawnCase
        Other patients, on whom it is decided when to stop; may be empty.
    labels : (ClassTable, mapping of str to int, float or None)
        The classes, the class of each structure that is told apart beside them, and how often the
        context classes are drawn for each time that an organ is; None draws all positions alike.
    recipe : (NetworkRecipe, ModelGrid, Block)
        What to learn, on which grid, from which block.
    progress : callable
        Called with (what, done, total).

    Raises
    ------
    ValueError
        JAX is not installed, or see ``train_network``.
    """
    with _needing_jax():
        from organfast.models.examples import TrainingCase, TrainingData
        from organfast.models.training import NetworkPlan, train_network
    (classes, beside, context_factor), (network, grid, pattern) = labels, recipe
    learned, judged = (
        [TrainingCase(c.patient, c.grid_volume, c.positions, c.labels) for c in cases]
        for cases in (train, validation)
    )
    merge = np.array([*range(len(classes)), *beside.values()], np.int64)
    if context_factor is None:
        drawn = merge[np.concatenate([c.labels for c in learned])]
        weights = np.bincount(drawn, minlength=len(classes)).astype(float).tolist()
    else:
        weights = [context_factor if s.role == "context" else 1.0 for s in classes.structures]
    data = TrainingData(
        learned,
        judged,
        n_classes=len(classes),
        merge=merge,
        class_weights=weights,
        patients_alike=context_factor is not None,
        partners=mirror_partners(classes, tuple(beside)),
    )
    plan = NetworkPlan(
        network.architecture, pattern, network.window_on(grid), standardise=network.standardise
    )
    trained = train_network(
        data,
        plan,
        network.training or training_settings({}, network.architecture)[0],
        outputs=network.outputs,
        progress=progress,
    )
    return trained.classifier, dict(trained.record)
