"""How much memory is left to this process, as the system tells it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["free_bytes"]

_SYSTEM = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Memory that may still be taken: what the machine has free, and the control group allows.

    Of a group (a container, a job of a cluster) what it only keeps of files counts as free, as it
    does for the machine. None where the system does not tell.
    """
    machine = _row(_SYSTEM, "MemAvailable:")
    if machine is None:
        return None
    free = machine * 1024
    limit, used = _number("memory.max"), _number("memory.current")
    if limit is not None and used is not None:
        files = _row(_GROUP / "memory.stat", "inactive_file") or 0
        free = min(free, max(0, limit - used + files))
    return free


def _row(path: Path, name: str) -> int | None:
    try:
        rows = (line.split() for line in path.read_text("ascii").splitlines())
        return next((int(row[1]) for row in rows if row[0] == name), None)
    except (OSError, ValueError, IndexError):
        return None


def _number(name: str) -> int | None:
    try:
        return int((_GROUP / name).read_text("ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None
