"""What is measured, and that its values are right before it is timed.

The inputs and the exact values come from the registry that drives the tests (tests/registry.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from peers import Peer, peers_of
from registry import IDS

THREADS = (1, 2)
# What a plain formula in that precision can hold on unrelated P and Q. Beyond it, a value is wrong.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
ORACLE_ELEMENTS = 20_000  # of one array, for which exact values are computed


@dataclass(frozen=True)
class Work:
    """One batch of distributions for an entry of the registry; `near` as there."""

    entry: str
    dtype: str
    items: int
    size: int
    near: float | None = None

    @property
    def function(self) -> str:
        return IDS[self.entry].function

    @property
    def shape(self) -> str:
        core = IDS[self.entry].core
        return "x".join(str(n) for n in (self.items, *[self.size] * core))

    @property
    def id(self) -> str:
        nearness = "" if self.near is None else f" near {self.near:g}"
        return f"{self.dtype} {self.shape}{nearness}"

    def inputs(self) -> dict[str, np.ndarray]:
        return _inputs(self)

    def smaller(self) -> Work:
        """Give the same with few items, to see that everything runs."""
        return replace(self, items=max(1, min(self.items, 20_000 // self.size)))

    def sample(self) -> slice:
        """Some of the items, evenly spread, as many as the oracle can do in a second."""
        cost = self.size if IDS[self.entry].core == 1 else self.size**3 / 10
        return slice(None, None, -(-self.items // max(1, int(ORACLE_ELEMENTS // cost))))


@functools.lru_cache(maxsize=1)
def _inputs(work: Work) -> dict[str, np.ndarray]:
    return IDS[work.entry].inputs(work.dtype, (work.items,), work.size, work.near)


@functools.lru_cache(maxsize=1)
def exact(work: Work) -> np.ndarray:
    """Give the values of the sample to the last digit."""
    return IDS[work.entry].exact(**{n: a[work.sample()] for n, a in work.inputs().items()})[0]


@functools.lru_cache(maxsize=1)
def by_definition(work: Work) -> np.ndarray:
    """Give the values of all items by klfast.reference in float64."""
    double = {name: a.astype(np.float64) for name, a in work.inputs().items()}
    return IDS[work.entry].reference(double)


def error_of(work: Work, got: Any) -> float:
    """Give the largest relative error: by the definition, or of near-equal P and Q, where the
    definition cancels, exactly on a sample. Rows that happen to have a far smaller value than the
    others are measured by the median."""
    if work.near is None:
        want = by_definition(work)
    else:
        got, want = np.asarray(got)[work.sample()], exact(work)
    return relative_error(got, want, float(np.median(want)))


@contextmanager
def quiet_threads(peer: Peer, threads: int) -> Iterator[None]:
    """Keep a peer to this many threads, without NumPy's floating-point warnings."""
    with peer.library.threads(threads), np.errstate(all="ignore"):
        yield


def relative_error(got: Any, want: np.ndarray, least: float = 0.0) -> float:
    """Give the largest error, relative to the value or to `least` if that is more. NaN where a
    number should be counts as infinite."""
    got = np.asarray(got, dtype=np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, want {want.shape}")
    with np.errstate(all="ignore"):
        error = np.abs(got - want) / np.maximum(np.abs(want), least)
    error = np.where(got == want, 0, np.where(np.isnan(error), np.inf, error))
    return float(np.max(error, initial=0))


def why_not(work: Work, peer: Peer) -> str | None:
    """Say why a peer cannot be asked for this work, if so."""
    if not peer.library.installed:
        return f"needs {peer.library.module}"
    if work.items > peer.most_items:
        return f"takes too long for more than {peer.most_items} items"
    return None


def parametrize(works: list[Work]) -> Any:
    """Give each work with every peer and number of threads that makes a difference to it."""
    cases = [
        pytest.param(work, peer, n, id=f"{work.id}-{peer.name}-{n}")
        for work in works
        for n in THREADS
        for peer in peers_of(work.function)
        if n == 1 or peer.threaded
    ]
    return pytest.mark.parametrize(("work", "peer", "threads"), cases)
