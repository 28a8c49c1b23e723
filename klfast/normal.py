"""Kullback-Leibler divergence of normal distributions with diagonal covariance."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast import _kernels
from klfast._arguments import as_array, common_dtype, look, only_one, reduce

__all__ = ["kl_normal"]

STANDARD = {"scale": 1.0, "var": 1.0}
PLAIN = {  # by kind of P and of Q
    (p, q): _kernels.plain[f"normal_{p}_{q}"]
    for p in ("scale", "var", "logvar")
    for q in ("scale", "var", "logvar", "standard")
    if q != "standard" or p == "logvar"
}


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
    axis: int | tuple[()] = -1,
    keepdims: bool = False,
    out: NDArray[Any] | None = None,
) -> Any:
    """
    Kullback-Leibler divergence KL(P‖Q) of normal distributions with diagonal covariance.

    Parameters
    ----------
    loc_p : array_like, shape (..., D)
        Means of P.
    scale_p, var_p, logvar_p : array_like, shape (..., D)
        Standard deviations, variances or logarithms of variances of P: exactly one of them.
    loc_q : array_like, shape (..., D), optional
        Means of Q. Q left out altogether is the standard normal distribution N(0, I).
    scale_q, var_q, logvar_q : array_like, shape (..., D), optional
        As for P; exactly one of them where `loc_q` is given.
    axis : int or (), default -1
        The axis to sum over; ``()`` gives the divergence of each element.
    keepdims : bool, default False
        Leave `axis` in the result with length 1.
    out : ndarray, optional
        Where to write the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats, float32 for float32, float16 and bfloat16, else float64. All axes
        of the arguments broadcast. A variance of zero on one side alone gives +inf. Rows with NaN,
        an infinite mean or variance, a negative scale or variance, or zero variances on both
        sides give NaN. D = 0 gives 0.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or combination of keywords that is not taken; the message names the
        argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, a row that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_mvn : full covariances.

    Notes
    -----
    Relative error at most 1e-6 (float32) and 1e-14 (float64), however close P and Q are, and never
    negative. Per dimension the result is ½ (v_p/v_q − 1 − log(v_p/v_q)) + ½ (m_p − m_q)²/v_q, the
    first bracket evaluated without cancellation.

    References
    ----------
    .. [1] D. P. Kingma, M. Welling, "Auto-Encoding Variational Bayes" (2014), appendix B.

    Examples
    --------
    >>> import klfast
    >>> print(klfast.kl_normal([1.0, 2.0], [1.0, 1.0]))
    2.5
    >>> print(klfast.kl_normal([0.0], logvar_p=[0.0], loc_q=[1.0], logvar_q=[0.0], axis=()))
    [0.5]
    """
    kind_p, spread_p = kind_of("p", scale_p, var_p, logvar_p)
    q: tuple[Any, ...]
    if loc_q is not None:
        kind_q, spread_q = kind_of("q", scale_q, var_q, logvar_q)
        q = loc_q, spread_q
    elif not (scale_q is None and var_q is None and logvar_q is None):
        raise TypeError(
            "loc_q is missing: give it with the spread of q, or leave q out for N(0, I)"
        )
    elif kind_p == "logvar":
        kind_q, q = "standard", ()
    else:
        kind_q, q = kind_p, _standard_beside(loc_p, spread_p, kind_p, axis)
    if axis == -1 and not keepdims:
        result = PLAIN[kind_p, kind_q](loc_p, spread_p, *q, out=out)
        if result is not None:
            return result
    kernel, arrays = f"normal_{kind_p}_{kind_q}", {"loc_p": loc_p, f"{kind_p}_p": spread_p}
    if q:
        arrays["loc_q"], arrays[f"{kind_q}_q"] = q
    if not isinstance(axis, tuple):
        return reduce(kernel, arrays, fit=_broadcast, axis=axis, keepdims=keepdims, out=out)
    arrays = _broadcast(arrays, axis)
    if axis != ():
        raise ValueError(f"axis must be an integer or (), got {axis}")
    if keepdims:
        raise ValueError("keepdims=True needs an axis to keep, got axis=()")
    return reduce(kernel, {name: x[..., np.newaxis] for name, x in arrays.items()}, out=out)


def standard(kind: str) -> dict[str, float]:
    """The arguments that N(0, I) is to the kernels: none beside log-variances, for which there are
    kernels that know."""
    return {} if kind == "logvar" else {"loc_q": 0.0, f"{kind}_q": STANDARD[kind]}


def _standard_beside(loc: Any, spread: Any, kind: str, axis: Any) -> tuple[Any, ...]:
    """The arguments of `standard`, as rows where the shape of those of P is known."""
    numbers = standard(kind).values()
    if axis != -1 or not look([loc, spread])[1] or loc.ndim == 0:
        return tuple(numbers)
    return tuple(_row(x, loc.shape[-1], loc.dtype) for x in numbers)


def kernel_name(kind_p: str, kind_q: str, q: Collection[str]) -> str:
    """`q`: the names of its arguments."""
    return f"normal_{kind_p}_{kind_q if q else 'standard'}"


def kind_of(side: str, scale: Any, var: Any, logvar: Any) -> tuple[str, Any]:
    """What was given for the spread of a side, and its value."""
    if var is None and logvar is None and scale is not None:
        return "scale", scale
    return only_one(side, scale=scale, var=var, logvar=logvar)


def _broadcast(arrays: dict[str, Any], axis: Any) -> dict[str, Any]:
    """All arrays in the same shape, without copies, and numbers in the others' dtype; along the
    last axis a row will do."""
    operands = {name: as_array(name, x) for name, x in arrays.items()}
    full = {name: x for name, x in operands.items() if hasattr(x, "dtype")}
    shapes = {x.shape for x in full.values()}
    largest: tuple[int, ...] = max(shapes, key=len, default=())
    if len(shapes) > 1 and not (axis == -1 and shapes == {largest, largest[-1:]}):
        try:
            full = dict(zip(full, np.broadcast_arrays(*full.values()), strict=True))
        except ValueError:
            listed = ", ".join(f"{name} {np.shape(x)}" for name, x in operands.items())
            raise ValueError(f"these shapes do not broadcast together: {listed}") from None
    if len(full) == len(operands):
        return full
    dtype = common_dtype(list(operands.values()))
    shape = next((x.shape for x in full.values()), ())
    for name in operands.keys() - full.keys():
        if axis == -1 and shape:
            full[name] = _row(operands[name], shape[-1], dtype)
        else:
            full[name] = np.broadcast_to(np.asarray(operands[name], dtype), shape)
    return {name: full[name] for name in operands}


def _row(number: float, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The number side by side, where kernels load vectors."""
    return np.asarray(number, dtype).repeat(length)
