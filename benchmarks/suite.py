"""What is measured, and that its values are right before it is timed.

The inputs and the exact values come from the registry that drives the tests (tests/registry.py).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import klfast.reference
import numpy as np
import pytest

from peers import Peer, peers_of
from registry import IDS

THREADS = (1, 2)
# What a plain formula in that precision can hold on unrelated P and Q. Beyond it, a value is wrong.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
# Of near-equal P and Q, what klfast promises.
TOLERANCE_NEAR = {"float32": 1e-6, "float64": 1e-9}
ORACLE_ELEMENTS = 20_000  # of one array, for which exact values are computed


@dataclass(frozen=True)
class Work:
    """One batch of distributions for an entry of the registry; `near` as there.

    `floor` and `aim`: how many times klfast's time the best peer should take, on one thread.
    """

    entry: str
    dtype: str
    items: int
    size: int
    near: float | None = None
    floor: float | None = None
    aim: float | None = None
    covariances: bool = False  # normals from these, not from their factors

    @property
    def function(self) -> str:
        return IDS[self.entry].function

    @property
    def matrices(self) -> bool:
        return IDS[self.entry].core == 2

    @property
    def shape(self) -> str:
        core = IDS[self.entry].core
        return "x".join(str(n) for n in (self.items, *[self.size] * core))

    @property
    def id(self) -> str:
        nearness = "" if self.near is None else f" near {self.near:g}"
        return f"{self.dtype} {self.shape}{' cov' * self.covariances}{nearness}"

    @property
    def name(self) -> str:
        return f"{self.function} {self.id}"

    def inputs(self) -> dict[str, np.ndarray]:
        return _inputs(self)

    def smaller(self) -> Work:
        """Give the same with few items, to see that everything runs."""
        return replace(self, items=max(1, min(self.items, 20_000 // self.size)))

    def peers(self) -> list[Peer]:
        return peers_of(self.function, self.covariances)

    def sample(self) -> slice:
        """Some of the items, evenly spread, as many as the oracle can do in a second."""
        cost = 10 + self.size**3 / (10 if self.near else 2000) if self.matrices else self.size
        return slice(None, None, -(-self.items // max(1, int(ORACLE_ELEMENTS // cost))))


def as_covariances(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give covariances L Lᵀ for the factors."""
    return {
        name.replace("scale_tril", "cov"): (
            np.matmul(a, a.swapaxes(-1, -2), dtype=np.float64).astype(a.dtype)
            if name.startswith("scale_tril")
            else a
        )
        for name, a in arrays.items()
    }


@functools.lru_cache(maxsize=1)
def _inputs(work: Work) -> dict[str, np.ndarray]:
    arrays = IDS[work.entry].inputs(work.dtype, (work.items,), work.size, work.near)
    return as_covariances(arrays) if work.covariances else arrays


@functools.lru_cache(maxsize=1)
def exact(work: Work) -> np.ndarray:
    """Give the values of the sample to the last digit; those of unrelated matrices to 18 digits or
    so, those of rows too long for the oracle by the definition."""
    if not work.matrices and work.size > 10 * ORACLE_ELEMENTS:
        return by_definition(work)[work.sample()]
    arrays = {n: a[work.sample()] for n, a in work.inputs().items()}
    if work.matrices and not work.near:
        return mvn_in_long_double(**arrays)
    return IDS[work.entry].exact(**arrays)[0]


def mvn_in_long_double(loc_p: Any, loc_q: Any, **spreads: Any) -> np.ndarray:
    """kl_mvn by rows, in the longest type that NumPy has."""
    long = {name: np.asarray(a, dtype=np.longdouble) for name, a in spreads.items()}
    p, q = (
        long[f"scale_tril_{side}"]
        if f"scale_tril_{side}" in long
        else cholesky(long[f"cov_{side}"])
        for side in "pq"
    )
    shift = (loc_p.astype(np.longdouble) - loc_q)[..., np.newaxis]
    solved = np.concatenate([np.tril(p), shift], -1)
    for i in range(loc_p.shape[-1]):
        solved[..., i, :] -= (q[..., i, None, :i] @ solved[..., :i, :])[..., 0, :]
        solved[..., i, :] /= q[..., i, i, None]
    ratio = np.diagonal(solved, 0, -2, -1)
    squares = np.square(solved).sum((-2, -1)) - np.square(ratio).sum(-1)
    return ((squares + (np.square(ratio) - 1 - 2 * np.log(ratio)).sum(-1)) / 2).astype(np.float64)


def cholesky(cov: np.ndarray) -> np.ndarray:
    factor = np.zeros_like(cov)
    for j in range(cov.shape[-1]):
        column = cov[..., j:, j] - (factor[..., j:, :j] @ factor[..., j, :j, None])[..., 0]
        factor[..., j:, j] = column / np.sqrt(column[..., :1])
    return factor


@functools.lru_cache(maxsize=1)
def by_definition(work: Work) -> np.ndarray:
    """Give the values of all items by klfast.reference in float64."""
    double = {name: a.astype(np.float64) for name, a in work.inputs().items()}
    return np.asarray(getattr(klfast.reference, work.function)(**double))


def error_of(work: Work, got: Any) -> float:
    """Give the largest relative error: by the definition, or of near-equal P and Q, where the
    definition cancels, exactly on a sample. Rows that happen to have a far smaller value than the
    others are measured by the median."""
    if work.near is None:
        want = by_definition(work)
    else:
        got, want = np.asarray(got)[work.sample()], exact(work)
    return relative_error(got, want, float(np.median(want)))


def is_wrong(work: Work, error: float) -> bool:
    tolerance = TOLERANCE if work.near is None else TOLERANCE_NEAR
    return not error <= tolerance[work.dtype]


@contextmanager
def quiet_threads(peer: Peer, threads: int) -> Iterator[None]:
    """Keep a peer to this many threads, without its warnings and NumPy's."""
    with peer.library.threads(threads), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
        for peer in work.peers()
        if n == 1 or peer.threaded
    ]
    return pytest.mark.parametrize(("work", "peer", "threads"), cases)
