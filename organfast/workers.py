"""The one pool of threads that a piece of work is shared among."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Workers"]

Item = TypeVar("Item")
Computed = TypeVar("Computed")


class Workers(ThreadPoolExecutor):
    """Threads that compute ahead of the consumer, but never far.

    Parameters
    ----------
    threads : int
        Threads; what they compute does not depend on it.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; use at least one")
        super().__init__(threads, thread_name_prefix="organfast")
        self.threads = threads
        self.window = threads + 2

    def in_order(
        self, function: Callable[[Item], Computed], items: Iterable[Item]
    ) -> Iterator[Computed]:
        """Results in the order of the items; at most ``window`` of them are computed ahead.

        Parameters
        ----------
        function : callable
            Called with one item, in any of the threads.
        items : iterable
            Asked for the next one as the results are taken.
        """
        pending: deque[Future[Computed]] = deque()
        try:
            for item in items:
                if len(pending) == self.window:
                    yield pending.popleft().result()
                pending.append(self.submit(function, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
