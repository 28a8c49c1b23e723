"""What klfast is measured beside: one entry for every way to compute a divergence.

A `Library` knows how to take NumPy arrays, how to compile a function, when a result is there and
how to keep to a number of threads; a `Peer` is one function of it, written as a competent user of
that library would write it for full speed. Each takes the arguments of the klfast function it
stands beside, by the same names. A new peer is one decorated function.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# PyTorch brings an OpenMP runtime of its own; imported first, klfast shares it.
if importlib.util.find_spec("torch"):
    import torch
    import torch.nn.functional as F
    from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

import klfast
import klfast.reference
import numpy as np

if importlib.util.find_spec("scipy"):
    from scipy.linalg import solve_triangular
    from scipy.special import log_softmax, rel_entr
    from scipy.stats import entropy
if importlib.util.find_spec("jax"):
    import jax
    import jax.numpy as jnp
    from jax.scipy.linalg import solve_triangular as jax_solve_triangular

    jax.config.update("jax_enable_x64", True)
if importlib.util.find_spec("numba"):
    from math import exp, log, sqrt

    import numba
    from numba import get_num_threads, njit, prange
if importlib.util.find_spec("numexpr"):
    import numexpr
if importlib.util.find_spec("numkong"):
    import numkong


# Threads


@functools.cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def blas_threads(n: int) -> AbstractContextManager[Any]:
    """Keep NumPy's and SciPy's linear algebra to n threads; nothing else of theirs has any."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return contextlib.nullcontext()
    return _controller().limit(limits=n, user_api="blas")


def limited(get: Callable[[], int], set_to: Callable[[int], Any]) -> Callable[[int], Any]:
    """Make a context of a library's two functions for its number of threads."""

    @contextlib.contextmanager
    def threads(n: int) -> Iterator[None]:
        before = get()
        set_to(n)
        try:
            yield
        finally:
            set_to(before)

    return threads


@contextlib.contextmanager
def xla_threads(n: int) -> Iterator[None]:
    """XLA's pool has NPROC threads, or one a processor, for the life of the process. Where that is
    more than n, all threads of the process share n processors."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if int(os.environ.get("NPROC", len(mine))) <= n:
        yield
        return
    _processors_of_all_threads(set(sorted(mine)[:n]))
    try:
        yield
    finally:
        _processors_of_all_threads(mine)


def _processors_of_all_threads(processors: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), processors)


# Libraries


@dataclass(frozen=True)
class Library:
    name: str
    module: str
    threads: Callable[[int], AbstractContextManager[Any]]
    convert: Callable[[np.ndarray], Any] = lambda a: a
    compile: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f
    finish: Callable[[Any], Any] = lambda x: x  # wait for a result

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


@dataclass(frozen=True)
class Peer:
    library: Library
    name: str
    function: str  # the name of the klfast function it stands beside
    covariances: bool  # kl_mvn: from these, not from their factors
    call: Callable[..., Any]
    threaded: bool  # whether a second thread can change anything
    rows: bool  # needs a batch of rows, one axis
    most_items: int  # of a batch; more would take it minutes

    def prepare(self, arrays: dict[str, np.ndarray]) -> Callable[[], Any]:
        """Give a call without arguments; the arrays are converted here, outside the time. What is
        compiled is compiled for the number of threads that holds here and at the first call."""
        mine = {name: self.library.convert(a) for name, a in arrays.items()}
        compiled, finish = self.library.compile(self.call), self.library.finish
        return lambda: finish(compiled(**mine))


PEERS: list[Peer] = []


def peer(
    library: Library,
    function: str,
    *,
    name: str | None = None,
    covariances: bool = False,
    threaded: bool = False,
    rows: bool = False,
    most_items: int = 10**9,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of a library as a peer of a klfast function."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        named = name or library.name
        PEERS.append(Peer(library, named, function, covariances, call, threaded, rows, most_items))
        return call

    return register


def also_from_covariances(
    library: Library, cholesky: Callable[[Any], Any], **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of means and factors, and the same after the library's Cholesky."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        def factorised(loc_p: Any, cov_p: Any, loc_q: Any, cov_q: Any) -> Any:
            return call(loc_p, cholesky(cov_p), loc_q, cholesky(cov_q))

        peer(library, "kl_mvn", **options)(call)
        peer(library, "kl_mvn", covariances=True, **options)(factorised)
        return call

    return register


def peers_of(function: str, covariances: bool = False) -> list[Peer]:
    """Give klfast itself, then its peers."""
    return [p for p in PEERS if (p.function, p.covariances) == (function, covariances)]


def torch_compile(call: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for each shape alone, and for as many as are asked for: PyTorch would stop after
    eight."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(call, dynamic=False, fullgraph=True)


def _torch_threads(n: int) -> AbstractContextManager[Any]:
    return limited(torch.get_num_threads, torch.set_num_threads)(n)


def _numba_threads(n: int) -> AbstractContextManager[Any]:
    return limited(numba.get_num_threads, numba.set_num_threads)(n)


def _numexpr_threads(n: int) -> AbstractContextManager[Any]:
    return limited(lambda: numexpr.nthreads, numexpr.set_num_threads)(n)


def _from_numpy(a: np.ndarray) -> Any:
    return torch.from_numpy(a)


KLFAST = Library("klfast", "klfast", klfast.num_threads)
REFERENCE = Library("reference", "klfast", blas_threads)
NUMPY = Library("NumPy", "numpy", blas_threads)
NUMEXPR = Library("numexpr", "numexpr", _numexpr_threads)
SCIPY = Library("SciPy", "scipy", blas_threads)
TORCH = Library("PyTorch", "torch", _torch_threads, _from_numpy)
COMPILED = Library("torch.compile", "torch", _torch_threads, _from_numpy, torch_compile)
DISTRIBUTIONS = Library("torch.distributions", "torch", _torch_threads, _from_numpy)
JAX = Library(
    "jax.jit",
    "jax",
    xla_threads,
    convert=lambda a: jnp.asarray(a),
    compile=lambda f: jax.jit(f),
    finish=lambda x: x.block_until_ready(),
)
NUMBA = Library("numba", "numba", _numba_threads)
NUMKONG = Library("NumKong", "numkong", lambda n: contextlib.nullcontext())
LIBRARIES = (NUMPY, SCIPY, TORCH, COMPILED, DISTRIBUTIONS, JAX, NUMBA, NUMKONG, NUMEXPR)

for function_name in ("kl_discrete", "kl_categorical", "kl_normal", "kl_mvn"):
    for from_covariances in (False, True)[: 1 + (function_name == "kl_mvn")]:
        options = {"covariances": from_covariances}
        peer(KLFAST, function_name, threaded=True, **options)(getattr(klfast, function_name))
        peer(REFERENCE, function_name, **options)(getattr(klfast.reference, function_name))


def numba_kernel(function: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile with numba for all threads it may use, and register."""

    def register(call: Callable[..., Any]) -> Any:
        if not NUMBA.installed:
            return call
        compiled = njit(parallel=True, fastmath=True, cache=True)(call)
        return peer(NUMBA, function, threaded=True, rows=True)(compiled)

    return register


# kl_discrete: probabilities


@peer(NUMPY, "kl_discrete")
def numpy_discrete(p, q):
    log_ratio = np.divide(p, q)
    np.log(log_ratio, out=log_ratio)
    return np.vecdot(p, log_ratio)


@peer(NUMEXPR, "kl_discrete", threaded=True)
def numexpr_discrete(p, q):
    return np.vecdot(p, numexpr.evaluate("log(p / q)"))


@peer(SCIPY, "kl_discrete")
def scipy_discrete(p, q):
    return rel_entr(p, q).sum(-1)


@peer(SCIPY, "kl_discrete", name="SciPy entropy")
def scipy_entropy(p, q):
    return entropy(p, q, axis=-1)


@peer(TORCH, "kl_discrete", threaded=True)
def torch_discrete(p, q):
    return (p / q).log_().mul_(p).sum(-1)


@peer(TORCH, "kl_discrete", name="PyTorch kl_div", threaded=True)
def torch_kl_div(p, q):
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


@peer(COMPILED, "kl_discrete", threaded=True)
def compiled_discrete(p, q):
    return (p * (p / q).log()).sum(-1)


@peer(DISTRIBUTIONS, "kl_discrete", threaded=True)
def distributions_discrete(p, q):
    return kl_divergence(Categorical(p, validate_args=False), Categorical(q, validate_args=False))


@peer(JAX, "kl_discrete", threaded=True)
def jax_discrete(p, q):
    return (p * jnp.log(p / q)).sum(-1)


@numba_kernel("kl_discrete")
def numba_discrete(p, q):
    result = np.empty(len(p), p.dtype)
    for i in prange(len(p)):
        total = p.dtype.type(0)
        for j in range(p.shape[1]):
            total += p[i, j] * log(p[i, j] / q[i, j])
        result[i] = total
    return result


@peer(NUMKONG, "kl_discrete")
def numkong_discrete(p, q):
    return numkong.kld(p, q)


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


@peer(NUMEXPR, "kl_categorical", threaded=True)
def numexpr_categorical(logits_p, logits_q):
    peak_p, peak_q = (x.max(-1, keepdims=True) for x in (logits_p, logits_q))
    weights = numexpr.evaluate("exp(logits_p - peak_p)")
    other = numexpr.evaluate("exp(logits_q - peak_q)")
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
    return (log_p - log_q).mul_(log_p.exp_()).sum(-1)


@peer(TORCH, "kl_categorical", name="PyTorch kl_div", threaded=True)
def torch_categorical_kl_div(logits_p, logits_q):
    log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@peer(COMPILED, "kl_categorical", threaded=True)
def compiled_categorical(logits_p, logits_q):
    log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@peer(DISTRIBUTIONS, "kl_categorical", threaded=True)
def distributions_categorical(logits_p, logits_q):
    p, q = (Categorical(logits=x, validate_args=False) for x in (logits_p, logits_q))
    return kl_divergence(p, q)


@peer(JAX, "kl_categorical", threaded=True)
def jax_categorical(logits_p, logits_q):
    log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


@numba_kernel("kl_categorical")
def numba_categorical(logits_p, logits_q):
    result = np.empty(len(logits_p), logits_p.dtype)
    zero = logits_p.dtype.type(0)
    for i in prange(len(logits_p)):
        peak_p, peak_q = logits_p[i].max(), logits_q[i].max()
        total_p, total_q, mean = zero, zero, zero
        for j in range(logits_p.shape[1]):
            weight = exp(logits_p[i, j] - peak_p)
            total_p += weight
            total_q += exp(logits_q[i, j] - peak_q)
            mean += weight * (logits_p[i, j] - logits_q[i, j])
        result[i] = mean / total_p - (peak_p - peak_q) - log(total_p / total_q)
    return result


# kl_normal: means and standard deviations


@peer(NUMPY, "kl_normal")
def numpy_normal(loc_p, scale_p, loc_q, scale_q):
    ratio = np.square(scale_p / scale_q)
    shift = np.square((loc_p - loc_q) / scale_q)
    return 0.5 * (ratio + shift - 1 - np.log(ratio)).sum(-1)


@peer(NUMEXPR, "kl_normal", threaded=True)
def numexpr_normal(loc_p, scale_p, loc_q, scale_q):
    ratio = numexpr.evaluate("scale_p / scale_q")
    formula = "ratio ** 2 - 1 + ((loc_p - loc_q) / scale_q) ** 2 - 2 * log(ratio)"
    return 0.5 * numexpr.evaluate(
        formula, {"ratio": ratio, "loc_p": loc_p, "loc_q": loc_q, "scale_q": scale_q}
    ).sum(-1)


@peer(TORCH, "kl_normal", threaded=True)
def torch_normal(loc_p, scale_p, loc_q, scale_q):
    ratio = (scale_p / scale_q).square_()
    shift = (loc_p - loc_q).div_(scale_q).square_()
    return shift.add_(ratio).sub_(ratio.log_()).sub_(1).sum(-1).mul_(0.5)


@peer(COMPILED, "kl_normal", threaded=True)
def compiled_normal(loc_p, scale_p, loc_q, scale_q):
    ratio = (scale_p / scale_q).square()
    return 0.5 * (ratio + ((loc_p - loc_q) / scale_q).square() - 1 - ratio.log()).sum(-1)


@peer(DISTRIBUTIONS, "kl_normal", threaded=True)
def distributions_normal(loc_p, scale_p, loc_q, scale_q):
    p, q = Normal(loc_p, scale_p, validate_args=False), Normal(loc_q, scale_q, validate_args=False)
    return kl_divergence(p, q).sum(-1)


@peer(JAX, "kl_normal", threaded=True)
def jax_normal(loc_p, scale_p, loc_q, scale_q):
    ratio = jnp.square(scale_p / scale_q)
    return 0.5 * (ratio + jnp.square((loc_p - loc_q) / scale_q) - 1 - jnp.log(ratio)).sum(-1)


@numba_kernel("kl_normal")
def numba_normal(loc_p, scale_p, loc_q, scale_q):
    result = np.empty(len(loc_p), loc_p.dtype)
    one, half = loc_p.dtype.type(1), loc_p.dtype.type(0.5)
    for i in prange(len(loc_p)):
        total = loc_p.dtype.type(0)
        for j in range(loc_p.shape[1]):
            ratio = scale_p[i, j] / scale_q[i, j]
            shift = (loc_p[i, j] - loc_q[i, j]) / scale_q[i, j]
            ratio *= ratio
            total += ratio + shift * shift - one - log(ratio)
        result[i] = half * total
    return result


# kl_mvn: means and lower Cholesky factors, or covariances


def _augmented(xp, loc_p, scale_tril_p, loc_q):
    """[L_p | μ_p − μ_q]"""
    return xp.concatenate([scale_tril_p, (loc_p - loc_q)[..., None]], -1)


def _divergence_from(xp, solved):
    """The formula, from L_q⁻¹ [L_p | μ_p − μ_q]."""
    size = solved.shape[-2]
    diagonal = xp.diagonal(solved, 0, -2, -1)
    return 0.5 * (xp.square(solved).sum((-2, -1)) - size) - xp.log(diagonal).sum(-1)


@also_from_covariances(NUMPY, np.linalg.cholesky, threaded=True)
def numpy_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    solved = np.linalg.solve(scale_tril_q, _augmented(np, loc_p, scale_tril_p, loc_q))
    return _divergence_from(np, solved)


@also_from_covariances(SCIPY, np.linalg.cholesky, most_items=10_000, rows=True)
def scipy_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    both = _augmented(np, loc_p, scale_tril_p, loc_q)
    for i in range(len(both)):
        both[i] = solve_triangular(scale_tril_q[i], both[i], lower=True, check_finite=False)
    return _divergence_from(np, both)


def _torch_cholesky(cov):
    return torch.linalg.cholesky_ex(cov)[0]


def _torch_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    both = _augmented(torch, loc_p, scale_tril_p, loc_q)
    solved = torch.linalg.solve_triangular(scale_tril_q, both, upper=False)
    return _divergence_from(torch, solved)


for torch_library in (TORCH, COMPILED):
    also_from_covariances(torch_library, _torch_cholesky, threaded=True)(_torch_mvn)


@also_from_covariances(DISTRIBUTIONS, _torch_cholesky, threaded=True)
def distributions_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    p = MultivariateNormal(loc_p, scale_tril=scale_tril_p, validate_args=False)
    q = MultivariateNormal(loc_q, scale_tril=scale_tril_q, validate_args=False)
    return kl_divergence(p, q)


@also_from_covariances(JAX, lambda cov: jnp.linalg.cholesky(cov), threaded=True)
def jax_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    both = _augmented(jnp, loc_p, scale_tril_p, loc_q)
    return _divergence_from(jnp, jax_solve_triangular(scale_tril_q, both, lower=True))


def _numba_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    """Forward substitution by rows; a workspace for each thread."""
    items, size = loc_p.shape
    result = np.empty(items, loc_p.dtype)
    threads = get_num_threads()
    for thread in prange(threads):
        y = np.empty((size, size + 1), loc_p.dtype)
        for item in range(thread * items // threads, (thread + 1) * items // threads):
            p, q = scale_tril_p[item], scale_tril_q[item]
            total = loc_p.dtype.type(-size)
            for i in range(size):
                inverse = 1 / q[i, i]
                shift = loc_p[item, i] - loc_q[item, i]
                for j in range(i + 1):
                    y[i, j] = p[i, j]
                for k in range(i):
                    factor = q[i, k]
                    shift -= factor * y[k, size]
                    for j in range(k + 1):
                        y[i, j] -= factor * y[k, j]
                for j in range(i + 1):
                    y[i, j] *= inverse
                    total += y[i, j] * y[i, j]
                y[i, size] = shift * inverse
                total += y[i, size] * y[i, size] - 2 * log(y[i, i])
            result[item] = total / 2
    return result


def _numba_cholesky(cov):
    """By rows, as (…)ᵢⱼ = (Σᵢⱼ − Σₖ LᵢₖLⱼₖ)/Lⱼⱼ."""
    factor = np.empty_like(cov)
    for item in prange(len(cov)):
        for i in range(cov.shape[1]):
            for j in range(i + 1):
                total = cov[item, i, j]
                for k in range(j):
                    total -= factor[item, i, k] * factor[item, j, k]
                factor[item, i, j] = sqrt(total) if i == j else total / factor[item, j, j]
    return factor


if importlib.util.find_spec("numba"):
    numba_mvn, numba_cholesky = (
        njit(parallel=True, fastmath=True)(f) for f in (_numba_mvn, _numba_cholesky)
    )
    also_from_covariances(NUMBA, numba_cholesky, threaded=True, rows=True)(numba_mvn)
