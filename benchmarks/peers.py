"""What klfast is measured beside: one entry for every way to compute a divergence.

A `Library` knows how to take NumPy arrays, how to give one back and how to keep to a number of
threads; a `Peer` is one function of it, written as a competent user of that library would write
it. Each takes the arguments of the klfast function it stands beside, by the same names.

A new peer is one decorated function. For torch.compile or jax.jit, `compile` of a new library
wraps what is decorated.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

# PyTorch brings an OpenMP runtime of its own; imported first, klfast shares it.
if importlib.util.find_spec("torch"):
    import torch
    import torch.nn.functional as F
    from torch.distributions import MultivariateNormal, Normal, kl_divergence

import klfast
import klfast.reference
import numpy as np

if importlib.util.find_spec("scipy"):
    from scipy.linalg import solve_triangular
    from scipy.special import log_softmax, rel_entr
    from scipy.stats import entropy


@contextlib.contextmanager
def blas_threads(n: int) -> Iterator[None]:
    """Keep NumPy's and SciPy's linear algebra to n threads; nothing else of theirs has any."""
    if importlib.util.find_spec("threadpoolctl") is None:
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(n, user_api="blas"):
        yield


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Library:
    name: str
    module: str
    threads: Callable[[int], AbstractContextManager[Any]]
    convert: Callable[[np.ndarray], Any] = lambda a: a
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


@dataclass(frozen=True)
class Peer:
    library: Library
    name: str
    function: str  # the name of the klfast function it stands beside
    call: Callable[..., Any]
    threaded: bool  # whether a second thread can change anything
    most_items: int  # of a batch; more would take it minutes

    def prepare(self, arrays: dict[str, np.ndarray]) -> Callable[[], Any]:
        """Give a call without arguments; the arrays are converted here, outside the time."""
        mine = {name: self.library.convert(a) for name, a in arrays.items()}
        compiled = self.library.compile(self.call)
        return lambda: compiled(**mine)


PEERS: list[Peer] = []


def peer(
    library: Library,
    function: str,
    *,
    name: str | None = None,
    threaded: bool = False,
    most_items: int = 10**9,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of a library as a peer of a klfast function."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        PEERS.append(Peer(library, name or library.name, function, call, threaded, most_items))
        return call

    return register


def peers_of(function: str) -> list[Peer]:
    """Give klfast itself, then its peers."""
    return [peer for peer in PEERS if peer.function == function]


KLFAST = Library("klfast", "klfast", klfast.num_threads)
REFERENCE = Library("reference", "klfast", blas_threads)
NUMPY = Library("NumPy", "numpy", blas_threads)
SCIPY = Library("SciPy", "scipy", blas_threads)
TORCH = Library("PyTorch", "torch", torch_threads, convert=lambda a: torch.from_numpy(a))

for function_name in ("kl_discrete", "kl_categorical", "kl_normal", "kl_mvn"):
    peer(KLFAST, function_name, threaded=True)(getattr(klfast, function_name))
    peer(REFERENCE, function_name)(getattr(klfast.reference, function_name))


# kl_discrete: probabilities


@peer(NUMPY, "kl_discrete")
def numpy_discrete(p, q):
    log_ratio = np.divide(p, q)
    np.log(log_ratio, out=log_ratio)
    return np.vecdot(p, log_ratio)


@peer(SCIPY, "kl_discrete")
def scipy_discrete(p, q):
    return rel_entr(p, q).sum(-1)


@peer(SCIPY, "kl_discrete", name="SciPy entropy")
def scipy_entropy(p, q):
    return entropy(p, q, axis=-1)


@peer(TORCH, "kl_discrete", threaded=True)
def torch_discrete(p, q):
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


# kl_categorical: logits


@peer(NUMPY, "kl_categorical")
def numpy_categorical(logits_p, logits_q):
    peak_p, peak_q = (x.max(-1, keepdims=True) for x in (logits_p, logits_q))
    weights, other = logits_p - peak_p, logits_q - peak_q
    np.exp(weights, out=weights)
    np.exp(other, out=other)
    total_p, total_q = weights.sum(-1), other.sum(-1)
    mean_difference = np.vecdot(weights, np.subtract(logits_p, logits_q, out=other)) / total_p
    return mean_difference - (peak_p - peak_q)[..., 0] - np.log(total_p / total_q)


@peer(SCIPY, "kl_categorical")
def scipy_categorical(logits_p, logits_q):
    log_p, log_q = log_softmax(logits_p, axis=-1), log_softmax(logits_q, axis=-1)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@peer(TORCH, "kl_categorical", threaded=True)
def torch_categorical(logits_p, logits_q):
    log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


# kl_normal: means and standard deviations


@peer(NUMPY, "kl_normal")
def numpy_normal(loc_p, scale_p, loc_q, scale_q):
    ratio = np.square(scale_p / scale_q)
    shift = np.square((loc_p - loc_q) / scale_q)
    return 0.5 * (ratio + shift - 1 - np.log(ratio)).sum(-1)


@peer(TORCH, "kl_normal", threaded=True)
def torch_normal(loc_p, scale_p, loc_q, scale_q):
    p, q = Normal(loc_p, scale_p, validate_args=False), Normal(loc_q, scale_q, validate_args=False)
    return kl_divergence(p, q).sum(-1)


# kl_mvn: means and lower Cholesky factors


def _divergence_from(ratio, shift):
    """The formula, from L_q⁻¹ L_p and L_q⁻¹ (μ_p − μ_q)."""
    size = ratio.shape[-1]
    squares = np.square(ratio).sum((-2, -1)) + np.square(shift).sum(-1)
    return 0.5 * (squares - size) - np.log(np.diagonal(ratio, 0, -2, -1)).sum(-1)


@peer(NUMPY, "kl_mvn", threaded=True)
def numpy_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    both = np.concatenate([scale_tril_p, (loc_p - loc_q)[..., np.newaxis]], -1)
    solved = np.linalg.solve(scale_tril_q, both)
    return _divergence_from(solved[..., :-1], solved[..., -1])


@peer(SCIPY, "kl_mvn", most_items=10_000)
def scipy_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    both = np.concatenate([scale_tril_p, (loc_p - loc_q)[..., np.newaxis]], -1)
    solved = np.empty_like(both)
    for i in range(len(both)):
        solved[i] = solve_triangular(scale_tril_q[i], both[i], lower=True, check_finite=False)
    return _divergence_from(solved[..., :-1], solved[..., -1])


@peer(TORCH, "kl_mvn", threaded=True)
def torch_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    p = MultivariateNormal(loc_p, scale_tril=scale_tril_p, validate_args=False)
    q = MultivariateNormal(loc_q, scale_tril=scale_tril_q, validate_args=False)
    return kl_divergence(p, q)
