"""The one exception of bad input: a path, what is wrong, what would do."""

from __future__ import annotations

from numbers import Integral
from os import PathLike, fspath

__all__ = ["InputError", "is_whole"]


class InputError(ValueError):
    """Input that cannot be used, said in one line.

    Parameters
    ----------
    path : str or PathLike
        The file or folder at fault.
    problem : str
        What is wrong with it.
    remedy : str
        What would do instead.
    """

    def __init__(self, path: str | PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path = fspath(path)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.path}: {self.problem}; {self.remedy}"
        return " ".join(line.split())


def is_whole(value: object, least: int | None = None) -> bool:
    """Whether an argument is a whole number (no bool), and not below ``least``.

    Parameters
    ----------
    value : object
        Python's or NumPy's integer, or anything else.
    least : int, optional
        The smallest that will do.

    >>> is_whole(3, 1), is_whole(0, 1), is_whole(True), is_whole(3.0)
    (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return least is None or int(value) >= least
