"""The definitions of klfast's functions in plain NumPy, and the oracle of its tests.

Every function has the name, the signature and the edge cases of its compiled twin, and is meant to
be read: it computes in float64 what the textbook says. It subtracts numbers of like size where P is
near Q, so it is right for distributions that differ visibly and for nothing closer; that is what
klfast is for. It checks no arguments and raises no floating-point condition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["kl_categorical", "kl_discrete", "kl_mvn", "kl_normal"]

Array = NDArray[Any]
Axis = int | tuple[()]


def _result_type(*arrays: ArrayLike | None) -> np.dtype[Any]:
    """Give NumPy's promotion of the arrays, integers to float64 and halves to float32."""
    scalars_are_weak = [
        a if isinstance(a, (int, float)) else np.asarray(a) for a in arrays if a is not None
    ]
    dtype = np.result_type(*scalars_are_weak)
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    return np.promote_types(dtype, np.float32)


def _core_last(a: ArrayLike, axis: int) -> Array:
    """Give `a` in float64 with the axis that is summed over at the end."""
    return np.moveaxis(np.asarray(a).astype(np.float64), axis, -1)


def _give(
    kl: Array,
    dtype: np.dtype[Any],
    out: Array | None,
    base: float | None = None,
    axis: int | None = None,
) -> Any:
    """Convert nats to `base`, put the summed axis back if `axis` says where, and fill `out`."""
    kl = np.asarray(kl if base is None else kl / np.log(base))
    kl = (kl if axis is None else np.moveaxis(kl[..., np.newaxis], -1, axis)).astype(dtype)
    if out is None:
        return kl[()]
    out[...] = kl
    return out


def _sum_p_log_ratio(p: Array, log_p: Array, log_q: Array, empty: float = np.nan) -> Array:
    """Give Σ p (log p − log q), where p = 0 contributes 0 unless q is NaN; `empty` if K = 0."""
    log_ratio = log_p - log_q
    terms = np.where(log_ratio == np.inf, np.inf, p * log_ratio)  # also where p > 0 underflows
    terms = np.where((log_p == -np.inf) & ~np.isnan(log_q), 0.0, terms)
    return np.asarray(terms.sum(axis=-1, initial=0.0 if terms.shape[-1] else empty))


@np.errstate(all="ignore")
def kl_discrete(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: int = -1,
    keepdims: bool = False,
    normalize: bool = True,
    base: float | None = None,
    out: Array | None = None,
) -> Any:
    """Compute KL(P‖Q) = Σ P log(P/Q) in nats, with P = p/Σp and Q = q/Σq.

    Parameters
    ----------
    p, q : array_like, shape (..., K)
        Non-negative weights; a negative, infinite or NaN weight makes its row NaN.
    axis : int
        The axis of length K.
    keepdims : bool
        Keep that axis, with length one.
    normalize : bool
        If false, Σ p log(p/q) of the weights as they stand.
    base : float, optional
        Of the logarithm; e if left out, 2 for bits.
    out : ndarray, optional
        Where to put the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats.
    """
    x, y = (
        np.where((w >= 0) & (w < np.inf), w, np.nan)
        for w in (_core_last(p, axis), _core_last(q, axis))
    )
    if normalize:
        x, y = (w / w.sum(axis=-1, keepdims=True) for w in (x, y))
    kl = _sum_p_log_ratio(x, np.log(x), np.log(y), empty=np.nan if normalize else 0.0)
    return _give(kl, _result_type(p, q), out, base, axis if keepdims else None)


@np.errstate(all="ignore")
def kl_categorical(
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    axis: int = -1,
    keepdims: bool = False,
    temperature: ArrayLike = 1.0,
    base: float | None = None,
    out: Array | None = None,
) -> Any:
    """Compute KL(P‖Q) in nats, with P = softmax(logits_p/T) and Q = softmax(logits_q/T).

    Parameters
    ----------
    logits_p, logits_q : array_like, shape (..., K)
        Unnormalised log-probabilities; −inf is probability 0, +inf or NaN makes its row NaN.
    axis : int
        The axis of length K.
    keepdims : bool
        Keep that axis, with length one.
    temperature : array_like, shape (...)
        T, which broadcasts against the rows.
    base : float, optional
        Of the logarithm; e if left out, 2 for bits.
    out : ndarray, optional
        Where to put the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats.
    """
    t = np.asarray(temperature, dtype=np.float64)[..., np.newaxis]
    a, b = _core_last(logits_p, axis) / t, _core_last(logits_q, axis) / t
    a, b = (x - x.max(axis=-1, keepdims=True, initial=-np.inf) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (a, b))
    kl = _sum_p_log_ratio(np.exp(log_p), log_p, log_q)
    return _give(kl, _result_type(logits_p, logits_q), out, base, axis if keepdims else None)


def _deviation(scale: ArrayLike | None, var: ArrayLike | None, logvar: ArrayLike | None) -> Array:
    """Give the log of the standard deviation, NaN where that is infinite or the scale negative."""
    log_scale = np.log(np.asarray(1.0 if scale is None else scale, dtype=np.float64))
    if var is not None:
        log_scale = np.log(np.asarray(var, dtype=np.float64)) / 2
    if logvar is not None:
        log_scale = np.asarray(logvar, dtype=np.float64) / 2
    return np.where(log_scale < np.inf, log_scale, np.nan)


@np.errstate(all="ignore")
def kl_normal(
    loc_p: ArrayLike,
    scale_p: ArrayLike | None = None,
    loc_q: ArrayLike | None = None,
    scale_q: ArrayLike | None = None,
    *,
    var_p: ArrayLike | None = None,
    logvar_p: ArrayLike | None = None,
    var_q: ArrayLike | None = None,
    logvar_q: ArrayLike | None = None,
    axis: Axis = -1,
    keepdims: bool = False,
    out: Array | None = None,
) -> Any:
    """Compute KL(P‖Q) = Σ ½ (σp²/σq² − 1 − log σp²/σq² + (μp − μq)²/σq²) in nats.

    Parameters
    ----------
    loc_p, loc_q : array_like, shape (..., D)
        Means μ; an infinite one makes its row NaN. `loc_q` left out is 0.
    scale_p, scale_q, var_p, var_q, logvar_p, logvar_q : array_like, shape (..., D)
        Standard deviation σ, variance σ² or log σ², one of the three a side; for Q none means 1.
    axis : int or ()
        The axis of length D; `()` sums over none.
    keepdims : bool
        Keep that axis, with length one.
    out : ndarray, optional
        Where to put the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats.
    """
    dtype = _result_type(loc_p, scale_p, loc_q, scale_q, var_p, logvar_p, var_q, logvar_q)
    mean_p = np.asarray(loc_p, dtype=np.float64)
    mean_q = np.asarray(0.0 if loc_q is None else loc_q, dtype=np.float64)
    log_p, log_q = _deviation(scale_p, var_p, logvar_p), _deviation(scale_q, var_q, logvar_q)
    d = np.where(np.isfinite(mean_p) & np.isfinite(mean_q), log_p - log_q, np.nan)
    terms = (np.expm1(2 * d) - 2 * d + ((mean_p - mean_q) / np.exp(log_q)) ** 2) / 2
    return _give(
        np.sum(np.where(d == np.inf, np.inf, terms), axis=axis, keepdims=keepdims), dtype, out
    )


def _factor(
    name: str, cov: ArrayLike | None, scale_tril: ArrayLike | None, eye: Array, errors: str
) -> Array:
    """Give the lower Cholesky factor; NaN where there is none and `errors` is "nan"."""
    if cov is None:
        return np.tril(eye if scale_tril is None else np.asarray(scale_tril, dtype=np.float64))
    factor = np.array(cov, dtype=np.float64)
    for index in np.ndindex(factor.shape[:-2]):
        try:
            factor[index] = np.linalg.cholesky(factor[index])
        except np.linalg.LinAlgError:
            if errors == "raise":
                raise np.linalg.LinAlgError(
                    f"{name} is not positive definite at batch index {index}"
                ) from None
            factor[index] = np.nan
    return factor


@np.errstate(all="ignore")
def kl_mvn(
    loc_p: ArrayLike,
    cov_p: ArrayLike | None = None,
    loc_q: ArrayLike | None = None,
    cov_q: ArrayLike | None = None,
    *,
    scale_tril_p: ArrayLike | None = None,
    scale_tril_q: ArrayLike | None = None,
    errors: str = "raise",
    out: Array | None = None,
) -> Any:
    """Compute KL(P‖Q) = ½ (tr Σq⁻¹Σp − D + log|Σq|/|Σp| + (μp − μq)ᵀ Σq⁻¹ (μp − μq)) in nats.

    Parameters
    ----------
    loc_p, loc_q : array_like, shape (..., D)
        Means μ; `loc_q` left out is 0.
    cov_p, cov_q, scale_tril_p, scale_tril_q : array_like, shape (..., D, D)
        Covariance Σ or its lower Cholesky factor L, Σ = L Lᵀ, one of the two a side; for Q none
        means I. Only the lower triangle is read.
    errors : {"raise", "nan"}
        What to do about a covariance that is not positive definite.
    out : ndarray, optional
        Where to put the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats.
    """
    dtype = _result_type(loc_p, cov_p, loc_q, cov_q, scale_tril_p, scale_tril_q)
    delta = np.asarray(loc_p, dtype=np.float64) - np.asarray(
        0.0 if loc_q is None else loc_q, dtype=np.float64
    )
    eye = np.eye(delta.shape[-1])
    factor_p = _factor("cov_p", cov_p, scale_tril_p, eye, errors)
    factor_q = _factor("cov_q", cov_q, scale_tril_q, eye, errors)
    ratio, shift = (
        np.linalg.solve(factor_q, factor_p),
        np.linalg.solve(factor_q, delta[..., np.newaxis]),
    )
    log_det = np.log(np.diagonal(ratio, axis1=-2, axis2=-1)).sum(axis=-1)
    kl = (
        (ratio**2).sum(axis=(-2, -1)) + (shift**2).sum(axis=(-2, -1)) - delta.shape[-1]
    ) / 2 - log_det
    return _give(kl, dtype, out)
