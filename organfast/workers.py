"""The one pool of threads that a piece of work is shared among; and what a fork must not leave."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

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


def _free_cached_properties() -> None:
    """Locks of Python 3.11's cached properties, which another thread may have held at the fork.

    Without this a child that was forked while threads segment waits for a thread that it has not.
    From 3.12 on cached properties have no lock.
    """
    ours = (m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "organfast")
    for kind in (k for module in ours for k in list(vars(module).values()) if isinstance(k, type)):
        for value in vars(kind).values():
            if isinstance(value, cached_property) and hasattr(value, "lock"):
                lazy: Any = value
                lazy.lock = threading.RLock()


os.register_at_fork(after_in_child=_free_cached_properties)
