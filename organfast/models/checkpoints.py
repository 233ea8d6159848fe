"""Checkpoints of a training by orbax: a run that was killed goes on where it was saved last.

::

    folder/training.json     what the training is; another training is refused here
    folder/<step>/           the two latest checkpoints, each written whole or not at all
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from organfast.errors import InputError

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

__all__ = ["Checkpoints"]

_KEPT = 2
_IDENTITY = "training.json"


class Checkpoints:
    """The checkpoints of one training in a folder.

    Parameters
    ----------
    folder : path
        A new or empty folder, or one that the same training has written to.
    identity : mapping
        What the training is, for JSON: settings, network and the digest of the data.

    Raises
    ------
    InputError
        The folder belongs to another training, or holds something else.
    ValueError
        orbax is not installed.
    """

    def __init__(self, folder: str | PathLike[str], identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder).absolute()
        orbax = _orbax()
        if jax.process_index() == 0:
            _claim(self.folder, folder, json.loads(json.dumps(identity)))
        options = orbax.CheckpointManagerOptions(
            max_to_keep=_KEPT, enable_async_checkpointing=False, create=True
        )
        self._manager: ocp.CheckpointManager = orbax.CheckpointManager(self.folder, options=options)

    def save(self, step: int, tree: Any) -> None:
        """Keep a pytree of arrays.

        Parameters
        ----------
        step : int
            Steps done.
        tree : pytree of array
            Everything that the training goes on from.
        """
        self._manager.save(step, args=_orbax().args.StandardSave(tree))

    def latest(self, like: Any) -> Any | None:
        """What was saved last, or None where nothing was.

        Parameters
        ----------
        like : pytree of array
            The same tree with the shapes, dtypes and places that its arrays shall have.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        return self._manager.restore(step, args=_orbax().args.StandardRestore(abstract))

    def close(self) -> None:
        """Let the folder go."""
        self._manager.close()


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise ValueError(
            "checkpoints need orbax-checkpoint; install organfast[cnn], or train without a "
            "checkpoint folder"
        ) from None
    return orbax.checkpoint


def _claim(folder: Path, given: str | PathLike[str], identity: Any) -> None:
    """Write what the training is, or see that it is the same."""
    remedy = "give a folder of its own, or delete this one to begin anew"
    record = folder / _IDENTITY
    if record.exists():
        try:
            found = json.loads(record.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(given, f"training.json cannot be read ({error})", remedy) from None
        differing = sorted(_differences(found, identity))
        if differing:
            raise InputError(
                given,
                f"holds checkpoints of another training, which differs in {', '.join(differing)}",
                remedy,
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(given, "is not empty and holds no checkpoints", remedy)
    folder.mkdir(parents=True, exist_ok=True)
    beside = record.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    beside.replace(record)


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what differs between two JSON values, by dots."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            difference
            for key in sorted({*a, *b})
            for difference in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if a == b else [name]
