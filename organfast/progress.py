"""How long work tells those who wait for it that it goes on."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that nobody watches.

    Parameters
    ----------
    what : str
        What is being done.
    done, total : int
        Steps done, steps in all.
    """
