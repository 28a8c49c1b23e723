"""How many threads a call may use.

By default as many as the processors this process may run on (affinity and cgroup quota), lowered
by KLFAST_NUM_THREADS or else OMP_NUM_THREADS. A number asked for in code is obeyed as it is. Small
calls stay on the calling thread whatever the number, and results have the same bits for any number.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klfast import _kernels

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]


def set_num_threads(n: int) -> None:
    """
    Let every later call of this process use up to `n` threads.

    Parameters
    ----------
    n : int
        At least 1. It is obeyed even when it exceeds the number of processors.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or is less than 1.

    Examples
    --------
    >>> import klfast
    >>> klfast.set_num_threads(2)
    >>> klfast.get_num_threads()
    2
    """
    _kernels.set_threads(everybody=_thread_count(n, "n"))


def get_num_threads() -> int:
    """
    Give the number of threads that a call from this thread may use.

    Returns
    -------
    int

    Examples
    --------
    >>> import klfast
    >>> klfast.get_num_threads() >= 1
    True
    """
    return _kernels.get_threads()[0]


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """
    Use up to `n` threads within a ``with`` block, in the calling thread alone.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        `n` is not an integer, or is less than 1.

    Examples
    --------
    >>> import klfast
    >>> with klfast.num_threads(1):
    ...     klfast.get_num_threads()
    1
    """
    here = _thread_count(n, "n")
    before = _kernels.get_threads()[1]
    _kernels.set_threads(here=here)
    try:
        yield
    finally:
        _kernels.set_threads(here=before)


def _thread_count(n: int, name: str) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(n).__name__}") from None
    if not 1 <= count <= 2**15:
        raise ValueError(f"{name} must be between 1 and {2**15}, got {count}")
    return count


def _asked_by_environment() -> int | None:
    """KLFAST_NUM_THREADS, else the outermost level of OMP_NUM_THREADS (which may be a list)."""
    own = os.environ.get("KLFAST_NUM_THREADS")
    if own:
        try:
            return _thread_count(int(own), "KLFAST_NUM_THREADS")
        except ValueError:
            raise ImportError(
                f"the environment's KLFAST_NUM_THREADS must be a positive integer, got {own!r}"
            ) from None
    shared = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(shared) if shared.isdigit() and int(shared) > 0 else None


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cgroup_quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float:
    """The tightest CPU quota of this process's cgroups, in processors. OpenMP knows none of it."""
    quotas = [float("inf")]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return quotas[0]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        unified = controllers == ""
        if not unified and "cpu" not in controllers.split(","):
            continue
        base = root if unified else root / "cpu"
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            quotas.append(_quota_v2(level) if unified else _quota_v1(level))
            if level == base:
                break
    return min(quotas)


def _quota_v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def _quota_v1(folder: Path) -> float:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else float("inf")
    except (OSError, ValueError):
        return float("inf")


def _default() -> int:
    """min(environment, affinity, cgroup quota rounded up)."""
    limits = [_processors()]
    asked = _asked_by_environment()
    if asked is not None:
        limits.append(asked)
    quota = _cgroup_quota()
    if quota != float("inf"):
        limits.append(max(1, int(-(-quota // 1))))
    return min(limits)


_kernels.set_threads(default=_default())
