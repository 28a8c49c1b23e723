"""Time calls against each other, and say on what machine."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from klfast.config import describe

SAMPLE = 5e-4  # seconds; shorter calls are repeated within one sample
ROUNDS = (5, 200)
SLOW, SLOW_ROUNDS = 4, 3  # a call that takes so many times the fastest's time sits out soon
LIBRARIES = ("numpy", "scipy", "torch", "jax", "numba", "numkong", "numexpr")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()  # collecting here takes long: the heap holds all of PyTorch and JAX
    try:
        yield
    finally:
        gc.enable()


@dataclass(frozen=True)
class Contestant:
    call: Callable[[], object]
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


Times = dict[str, list[float]]


def interleave(contestants: dict[str, Contestant], seconds: float) -> Times:
    """Give the times of each call, the calls taking turns for about so many seconds. The n-th times
    of all are of the same turn; slow calls sit out after the first turns."""

    def sample(who: Contestant, repeats: int) -> float:
        with who.within():
            start = time.perf_counter()
            for _ in range(repeats):
                who.call()
            return (time.perf_counter() - start) / repeats

    least, most = ROUNDS
    with no_garbage_collection():
        once = {name: min(sample(c, 1) for _ in range(2)) for name, c in contestants.items()}
        repeats = {name: max(1, round(SAMPLE / t)) for name, t in once.items()}
        slow = {name for name, t in once.items() if t > SLOW * min(once.values())}
        turn = {name: t * repeats[name] for name, t in once.items()}
        left = seconds - SLOW_ROUNDS * sum(turn[name] for name in slow)
        rounds = int(left / sum(turn[name] for name in contestants if name not in slow))
        times: Times = {name: [] for name in contestants}
        for i in range(max(least, min(most, rounds))):
            for name, who in contestants.items():
                if i < SLOW_ROUNDS or name not in slow:
                    times[name].append(sample(who, repeats[name]))
    return times


def ratio(times: Times, name: str, to: str) -> float:
    """The median over the turns of one call's time by another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=False))


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Give processor, cores, instruction set and versions."""
    affinity = getattr(os, "sched_getaffinity", None)
    versions = {"python": platform.python_version(), "klfast": version("klfast")}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    facts = describe()
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "instruction set": facts["isa"],
        "compiler": facts["compiler"],
        "versions": versions,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
    }
