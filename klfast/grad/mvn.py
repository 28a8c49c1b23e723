"""Gradients of the divergence of multivariate normal distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast._arguments import is_lazy
from klfast.grad._shared import check_wrt, gradients
from klfast.mvn import GUFUNCS, account_for_nan, batch_shape, given, to_floats

__all__ = ["kl_mvn"]


def kl_mvn(
    loc_p: ArrayLike,
    cov_p: ArrayLike | None = None,
    loc_q: ArrayLike | None = None,
    cov_q: ArrayLike | None = None,
    *,
    scale_tril_p: ArrayLike | None = None,
    scale_tril_q: ArrayLike | None = None,
    errors: str = "raise",
    wrt: str | Sequence[str] | None = None,
    cotangent: ArrayLike | None = None,
    out: Sequence[NDArray[Any] | None] | None = None,
) -> tuple[Any, ...]:
    """
    Kullback-Leibler divergence KL(P‖Q) of multivariate normal distributions and its gradients.

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
        As for P; exactly one of them where `loc_q` is given.
    errors : {"raise", "nan"}, default "raise"
        What to do about a covariance that is not positive definite.
    wrt : str or sequence of str, optional
        With respect to what: the gradients' order. The others are not computed. The default is all
        that were given, in the order loc_p, matrix of P, loc_q, matrix of Q.
    cotangent : array_like, optional
        The gradients are those of Σ cotangent · value; the default is 1. It broadcasts against the
        result. Items whose cotangent is 0 have gradients 0, whatever they hold.
    out : tuple of ndarray or None, optional
        Where to write the gradients, one entry each. What they hold after an error is undefined.

    Returns
    -------
    value : ndarray or scalar, shape (...)
        The divergence in nats, as from `klfast.kl_mvn`.
    *gradients : ndarray
        One for each name in `wrt`, of the argument's shape: float32 for float32, float16 and
        bfloat16, else float64. Arguments that were broadcast have theirs summed over the batch, in
        double. An item whose divergence is NaN has NaN gradients.

        With respect to a lower Cholesky factor the gradient is lower triangular, with zeros above
        the diagonal. With respect to a covariance it is the symmetric matrix G for which a small
        symmetric change dΣ changes the divergence by Σᵢⱼ Gᵢⱼ dΣᵢⱼ: an element above the diagonal
        and its mirror image share what both together contribute.

    Raises
    ------
    numpy.linalg.LinAlgError
        A covariance is not positive definite and ``errors="raise"``; the message names the
        argument and the first batch index.
    TypeError, ValueError
        A dtype, shape, name or combination of keywords that is not taken; the message names the
        argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, an item that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_mvn : the divergence alone.

    Notes
    -----
    With Y = L_q⁻¹ (L_p − L_q), y its diagonal, M = I + Y, z = L_q⁻¹ (μ_p − μ_q) and
    T = tril(L_q⁻ᵀ Y)::

        μ_p, −μ_q   L_q⁻ᵀ z
        L_p         T + diag(y / diag L_p)
        L_q         −tril(T Mᵀ + L_q⁻ᵀ z zᵀ) − diag(y / diag L_q)
        Σ_p         ½ L_p⁻ᵀ (Y + Yᵀ + Yᵀ Y) L_p⁻¹     =  ½ (Σ_q⁻¹ − Σ_p⁻¹)
        Σ_q         −½ L_q⁻ᵀ (Y + Yᵀ + Y Yᵀ + z zᵀ) L_q⁻¹

    Everything is a product with Y or z, so that nothing cancels where P and Q are close. The error
    of an element is at most 2e-14 (float64) and 1e-7 (float32) times the largest element of that
    gradient, from well-conditioned Cholesky factors up to D = 65, however close P and Q are. From
    covariances the rounding of their Cholesky factorisation is the limit, D ε times the condition
    number over the relative distance of P and Q, with the ε of double: pass factors where P is very
    close to Q.

    References
    ----------
    .. [1] K. B. Petersen, M. S. Pedersen, "The Matrix Cookbook" (2012), section 2.

    Examples
    --------
    >>> import numpy as np, klfast.grad
    >>> value, loc, cov = klfast.grad.kl_mvn([1.0, 2.0], [[2.0, 0.0], [0.0, 1.0]])
    >>> print(loc, cov, sep="\\n")
    [1. 2.]
    [[0.25 0.  ]
     [0.   0.  ]]
    >>> shared = klfast.grad.kl_mvn(
    ...     np.zeros((3, 2)), np.eye(2), [0.0, 1.0], np.eye(2), wrt="loc_q"
    ... )
    >>> print(*shared)
    [0.5 0.5 0.5] [0. 3.]
    """
    if errors not in ("raise", "nan"):
        raise ValueError(f"errors must be 'raise' or 'nan', got {errors!r}")
    kinds, operands = given(loc_p, cov_p, loc_q, cov_q, scale_tril_p, scale_tril_q)
    gufunc, names = GUFUNCS[kinds]
    wanted = check_wrt(wrt, names)
    operands = to_floats(names, operands)
    for name, x in zip(names, operands, strict=True):
        if is_lazy(x):
            raise TypeError(f"{name} is a lazy array; klfast.grad takes arrays in memory")
    batch_shape(names, operands, None)
    with np.errstate(invalid="ignore"):
        results = gradients(
            "_".join(("mvn", *kinds)),
            dict(zip(names, operands, strict=True)),
            wanted,
            shapes={name: x.shape for name, x in zip(names, operands, strict=True)},
            cores=[1 if name.startswith("loc") else 2 for name in names],
            cotangent=cotangent,
            out=out,
        )
    if np.isnan(results[0]).any():
        account_for_nan(gufunc, names, operands, np.asarray(results[0]), errors)
    return results
