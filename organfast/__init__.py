"""organfast: learn organs from a few labelled CT scans, then find and segment them in new ones.

Importing this package loads nothing heavy; each public name is imported when it is first used.
Research use only: not a medical device.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from organfast.anatomy import ClassTable as ClassTable
    from organfast.anatomy import Structure as Structure
    from organfast.errors import InputError as InputError
    from organfast.volume import Volume as Volume

_HOMES = {
    "ClassTable": "organfast.anatomy",
    "InputError": "organfast.errors",
    "Structure": "organfast.anatomy",
    "Volume": "organfast.volume",
}

__version__ = version("organfast")
__all__ = ["ClassTable", "InputError", "Structure", "Volume"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
