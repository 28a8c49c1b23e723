"""Kullback-Leibler divergence of normal distributions with diagonal covariance."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast import _kernels
from klfast._arguments import as_array, common_dtype, only_one, reduce

__all__ = ["kl_normal"]

STANDARD = {"scale": 1.0, "var": 1.0}


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
    kind_q, spread_q = kind_p, None
    if loc_q is not None:
        kind_q, spread_q = kind_of("q", scale_q, var_q, logvar_q)
        if axis == -1 and not keepdims and out is None:
            plain = _kernels.plain[f"normal_{kind_p}_{kind_q}"]
            result = plain(loc_p, spread_p, loc_q, spread_q)
            if result is not None:
                return result
    elif not (scale_q is None and var_q is None and logvar_q is None):
        raise TypeError(
            "loc_q is missing: give it with the spread of q, or leave q out for N(0, I)"
        )
    elif kind_p == "logvar" and axis == -1 and not keepdims and out is None:
        result = _kernels.plain["normal_logvar_standard"](loc_p, spread_p)
        if result is not None:
            return result
    q = standard(kind_p) if loc_q is None else {"loc_q": loc_q, f"{kind_q}_q": spread_q}
    arrays = _broadcast({"loc_p": loc_p, f"{kind_p}_p": spread_p} | q)
    if isinstance(axis, tuple):
        if axis != ():
            raise ValueError(f"axis must be an integer or (), got {axis}")
        if keepdims:
            raise ValueError("keepdims=True needs an axis to keep, got axis=()")
        arrays = {name: x[..., np.newaxis] for name, x in arrays.items()}
        axis = -1
    elif loc_q is None and axis == -1:
        for name in q:
            arrays[name] = _in_a_row(arrays[name])
    return reduce(kernel_name(kind_p, kind_q, q), arrays, axis=axis, keepdims=keepdims, out=out)


def standard(kind: str) -> dict[str, float]:
    """The arguments that N(0, I) is to the kernels: none beside log-variances, for which there are
    kernels that know."""
    return {} if kind == "logvar" else {"loc_q": 0.0, f"{kind}_q": STANDARD[kind]}


def kernel_name(kind_p: str, kind_q: str, q: Collection[str]) -> str:
    """`q`: the names of its arguments."""
    return f"normal_{kind_p}_{kind_q if q else 'standard'}"


def kind_of(side: str, scale: Any, var: Any, logvar: Any) -> tuple[str, Any]:
    """What was given for the spread of a side, and its value."""
    if var is None and logvar is None and scale is not None:
        return "scale", scale
    return only_one(side, scale=scale, var=var, logvar=logvar)


def _in_a_row(constant: Any) -> Any:
    """The same with its elements side by side along the last axis, where kernels load vectors."""
    if type(constant) is not np.ndarray or constant.size == 0:
        return constant
    row = np.full(constant.shape[-1:], constant.flat[0], constant.dtype)
    return np.broadcast_to(row, constant.shape)


def _broadcast(arrays: dict[str, Any]) -> dict[str, Any]:
    """All arrays in the same shape, without copies; scalars take the others' dtype."""
    operands = {name: as_array(name, x) for name, x in arrays.items()}
    shapes = [np.shape(x) for x in operands.values()]
    if all(shape == shapes[0] for shape in shapes) and hasattr(operands["loc_p"], "dtype"):
        return operands
    dtype = common_dtype(list(operands.values()))
    full = [x if hasattr(x, "dtype") else np.asarray(x, dtype) for x in operands.values()]
    try:
        return dict(zip(operands, np.broadcast_arrays(*full), strict=True))
    except ValueError:
        listed = ", ".join(f"{n} {s}" for n, s in zip(operands, shapes, strict=True))
        raise ValueError(f"these shapes do not broadcast together: {listed}") from None
