"""The one exception of bad input: a path, what is wrong, what would do."""

from __future__ import annotations

import errno
from numbers import Integral
from os import PathLike, fspath

__all__ = ["InputError", "is_transient", "is_whole"]

# What a file system or a network says in a bad moment; not a full disk, a wrong name or no right.
_PASSING = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
    }
)
# The same from botocore and aiohttp, whose connection errors need not be OSErrors.
_PASSING_NAMES = frozenset({"ConnectionError", "HTTPClientError", "ClientConnectionError"})


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


def is_transient(error: BaseException) -> bool:
    """Whether an error came of a fault that may have passed a moment later.

    Such are an ``OSError`` of a network or a file system that was away (busy, stale, timed out,
    input/output error, connection refused, reset, aborted or lost, host or network down or
    unreachable), and a connection error of botocore or aiohttp.

    Parameters
    ----------
    error : BaseException
        What was raised; what it came of is looked at, too.
    """
    cause: BaseException | None = error
    while cause is not None:
        names = {kind.__name__ for kind in type(cause).__mro__}
        if isinstance(cause, OSError) and (
            cause.errno in _PASSING or isinstance(cause, (ConnectionError, TimeoutError))
        ):
            return True
        if names & _PASSING_NAMES:
            return True
        cause = cause.__cause__ or cause.__context__
    return False
