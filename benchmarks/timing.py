"""Time calls against each other, and say on what machine."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from klfast.config import describe

SAMPLE = 5e-4  # seconds; shorter calls are repeated within one sample
ROUNDS = (5, 200)
LIBRARIES = ("numpy", "scipy", "torch")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Give the median time of each call, the calls taking turns for about so many seconds."""

    def sample(call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    with no_garbage_collection():
        once = {name: min(sample(call, 1) for _ in range(2)) for name, call in calls.items()}
        repeats = {name: max(1, round(SAMPLE / t)) for name, t in once.items()}
        least, most = ROUNDS
        turn = sum(once[name] * repeats[name] for name in calls)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(max(least, min(most, int(seconds / turn)))):
            for name, call in calls.items():
                times[name].append(sample(call, repeats[name]))
    return {name: statistics.median(samples) for name, samples in times.items()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
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
