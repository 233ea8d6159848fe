"""The one exception of bad input: a path, what is wrong, what would do."""

from __future__ import annotations

from os import PathLike, fspath

__all__ = ["InputError"]


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
