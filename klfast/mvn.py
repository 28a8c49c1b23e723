"""Kullback-Leibler divergence of multivariate normal distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast import _kernels
from klfast._arguments import (
    as_array,
    call,
    check_out,
    common_batch,
    common_dtype,
    is_lazy,
    look,
    only_one,
    only_out,
)

__all__ = ["kl_mvn"]

KEYWORDS = {"cov": "cov", "tril": "scale_tril"}  # part of a gufunc's name: of its arguments'
GUFUNCS = {  # kind of P and of Q: gufunc and names of its arguments
    (p, q): (
        _kernels.gufuncs[f"mvn_{p}_{q}"],
        ("loc_p", f"{KEYWORDS[p]}_p") + (() if q == "standard" else ("loc_q", f"{KEYWORDS[q]}_q")),
    )
    for p in KEYWORDS
    for q in (*KEYWORDS, "standard")
}


def kl_mvn(
    loc_p: ArrayLike,
    cov_p: ArrayLike | None = None,
    loc_q: ArrayLike | None = None,
    cov_q: ArrayLike | None = None,
    *,
    scale_tril_p: ArrayLike | None = None,
    scale_tril_q: ArrayLike | None = None,
    errors: str = "raise",
    out: NDArray[Any] | None = None,
) -> Any:
    """
    Kullback-Leibler divergence KL(P‖Q) of multivariate normal distributions.

    Parameters
    ----------
    loc_p : array_like, shape (..., D)
        Means of P.
    cov_p, scale_tril_p : array_like, shape (..., D, D)
        Covariances of P, or their lower Cholesky factors: exactly one of them. Only the lower
        triangles are read.
    loc_q : array_like, shape (..., D), optional
        Means of Q. Q left out altogether is the standard normal distribution N(0, I).
    cov_q, scale_tril_q : array_like, shape (..., D, D), optional
        As for P; exactly one of them where `loc_q` is given. One Q for a whole batch of P is
        factorised once.
    errors : {"raise", "nan"}, default "raise"
        What to do about a covariance that is not positive definite.
    out : ndarray, optional
        Where to write the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats, float32 for float32, float16 and bfloat16, else float64. Batch
        axes broadcast. Items with NaN, an infinite value or a factor whose diagonal is not
        positive give NaN. D = 0 gives 0.

    Raises
    ------
    numpy.linalg.LinAlgError
        A covariance is not positive definite and ``errors="raise"``; the message names the
        argument and the first batch index. `out` is untouched then.
    TypeError, ValueError
        A dtype, shape or combination of keywords that is not taken; the message names the
        argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, an item that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_normal : diagonal covariances.

    Notes
    -----
    From Cholesky factors the relative error is at most 4e-6 (float32) and 1e-13 (float64) up to
    D = 17, however close P and Q are, and grows in proportion to D; never negative. From
    covariances the rounding of their Cholesky factorisation, about D ε times the condition number,
    is the limit: pass factors where P is very close to Q. With Y = L_q⁻¹ (L_p − L_q), the result
    is ½ [Σᵢ (yᵢ(2 + yᵢ) − 2 log1p(yᵢ)) + Σ_{i>j} Yᵢⱼ² + ‖L_q⁻¹ (μ_p − μ_q)‖²], yᵢ = Yᵢᵢ.

    References
    ----------
    .. [1] T. M. Cover, J. A. Thomas, "Elements of Information Theory", 2nd ed. (2006), chapter 8.

    Examples
    --------
    >>> import numpy as np, klfast
    >>> print(klfast.kl_mvn([1.0, 2.0], np.eye(2)))
    2.5
    >>> print(klfast.kl_mvn(np.zeros((3, 2)), np.eye(2), [0.0, 1.0], scale_tril_q=np.eye(2)))
    [0.5 0.5 0.5]
    """
    if errors not in ("raise", "nan"):
        raise ValueError(f"errors must be 'raise' or 'nan', got {errors!r}")
    kinds, operands = given(loc_p, cov_p, loc_q, cov_q, scale_tril_p, scale_tril_q)
    result = _kernels.plain["_".join(("mvn", *kinds))](*operands, out=out)
    if result is not None:
        return result
    gufunc, names = GUFUNCS[kinds]
    operands = to_floats(names, operands)
    target = None if out is None else check_out(only_out(out), operands)
    if any(map(is_lazy, operands)):
        batch_shape(names, operands, None)
        return gufunc(*operands)
    result = _of_batch(gufunc, names, operands, target if errors == "nan" else None)
    if target is not None and (target.shape != result.shape or target.dtype != result.dtype):
        batch_shape(names, operands, target)
    if np.isnan(result).any():
        account_for_nan(gufunc, names, operands, np.asarray(result), errors)
    if target is None:
        return result
    if result is not target:
        target[...] = result
    return target


def _of_batch(
    gufunc: Callable[..., Any], names: tuple[str, ...], operands: list[Any], target: Any
) -> Any:
    """The gufunc's result, with NaN that nothing was said about yet, in `target` if given."""
    if target is not None:  # the gufunc would broadcast to a larger one
        batch_shape(names, operands, target)
    try:
        with np.errstate(invalid="ignore"):
            return call(gufunc, operands, common_batch(gufunc, operands), target)
    except ValueError:
        batch_shape(names, operands, target)
        raise


def given(
    loc_p: Any, cov_p: Any, loc_q: Any, cov_q: Any, scale_tril_p: Any, scale_tril_q: Any
) -> tuple[tuple[str, str], list[Any]]:
    """What P and Q were given by, as in the gufunc's name, and the operands."""
    kind_p, matrix_p = _kind("p", cov_p, scale_tril_p)
    if loc_q is not None:
        kind_q, matrix_q = _kind("q", cov_q, scale_tril_q)
        return (kind_p, kind_q), [loc_p, matrix_p, loc_q, matrix_q]
    if cov_q is not None or scale_tril_q is not None:
        raise TypeError("loc_q is missing: give it with its covariance, or leave q out for N(0, I)")
    return (kind_p, "standard"), [loc_p, matrix_p]


def _kind(side: str, cov: Any, scale_tril: Any) -> tuple[str, Any]:
    """What was given for a side, as in the gufunc's name, and its value."""
    if scale_tril is None and cov is not None:
        return "cov", cov
    if cov is None and scale_tril is not None:
        return "tril", scale_tril
    return only_one(side, cov=cov, scale_tril=scale_tril)  # which refuses it


def to_floats(names: tuple[str, ...], operands: list[Any]) -> list[Any]:
    """All in float32 or float64."""
    dtype = operands[0].dtype if look(operands)[0] else None
    if dtype is not None and dtype.char in "fd" and dtype.isnative:
        return operands
    converted = [as_array(name, x) for name, x in zip(names, operands, strict=True)]
    converted = [x if hasattr(x, "dtype") else np.asarray(x) for x in converted]
    dtype = common_dtype(converted)
    if dtype != np.float64:
        dtype = np.dtype(np.float32)
    return [x if x.dtype == dtype else x.astype(dtype) for x in converted]


def batch_shape(names: tuple[str, ...], operands: list[Any], out: Any) -> tuple[int, ...]:
    """The broadcast batch shape; ValueError that names the argument which does not fit."""
    size = None
    batches = []
    for name, x in zip(names, operands, strict=True):
        n_core = 1 if name.startswith("loc") else 2
        if x.ndim < n_core:
            wanted = "(..., D)" if n_core == 1 else "(..., D, D)"
            raise ValueError(f"{name} has shape {x.shape}; wanted {wanted}")
        core = x.shape[-n_core:]
        size = core[0] if size is None else size
        if core != (size,) * n_core:
            wanted = f"(..., {size})" if n_core == 1 else f"(..., {size}, {size})"
            raise ValueError(
                f"{name} has shape {x.shape}; wanted {wanted}, as loc_p has D = {size}"
            )
        batches.append(x.shape[:-n_core])
    try:
        batch = np.broadcast_shapes(*batches)
    except ValueError:
        listed = ", ".join(f"{name} {x.shape}" for name, x in zip(names, operands, strict=True))
        raise ValueError(f"the batch axes of {listed} do not broadcast together") from None
    dtype = operands[0].dtype
    if out is not None and (out.shape != batch or not np.can_cast(dtype, out.dtype, "same_kind")):
        raise ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; wanted {batch} and {dtype}"
        )
    return batch


def account_for_nan(
    gufunc: Callable[..., Any],
    names: tuple[str, ...],
    operands: list[Any],
    result: NDArray[Any],
    errors: str,
) -> None:
    """LinAlgError for the first covariance that is not positive definite, or NumPy's "invalid"
    condition for the first other bad item. NaN among the input is nobody's error."""
    batch = result.shape
    full = [
        np.broadcast_to(x, batch + x.shape[x.ndim - (1 if name.startswith("loc") else 2) :])
        for name, x in zip(names, operands, strict=True)
    ]
    reported = False
    for index in map(tuple, np.argwhere(np.isnan(result))):
        item = [x[index] for x in full]
        indefinite = [
            name
            for name, x in zip(names, item, strict=True)
            if name.startswith("cov") and _is_indefinite(x)
        ]
        if indefinite and errors == "raise":
            where = f" at batch index {tuple(map(int, index))}" if batch else ""
            raise np.linalg.LinAlgError(f"{indefinite[0]} is not positive definite{where}")
        if not indefinite and not reported:
            gufunc(*item)
            reported = True


def _is_indefinite(cov: NDArray[Any]) -> bool:
    """Whether the lower triangle holds no NaN and the kernel cannot factorise it."""
    if np.isnan(np.tril(cov)).any():
        return False
    zero = np.zeros(len(cov), cov.dtype)
    with np.errstate(invalid="ignore"):
        return bool(np.isnan(_kernels.gufuncs["mvn_cov_standard"](zero, cov)))
