"""Gradients of the Kullback-Leibler divergence of normal distributions with diagonal covariance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast._arguments import check_axis
from klfast.grad._shared import call_plainly, check_wrt, gradients, in_order, same_dtype
from klfast.normal import kernel_name, kind_of, standard

__all__ = ["kl_normal"]


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
    wrt: str | Sequence[str] | None = None,
    cotangent: ArrayLike | None = None,
    out: Sequence[NDArray[Any] | None] | None = None,
) -> tuple[Any, ...]:
    """
    KL(P‖Q) of normal distributions with diagonal covariance, and its gradients.

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
    wrt : str or sequence of str, optional
        With respect to what: the gradients' order. The others are not computed. The default is all
        that were given, in the order loc_p, spread of P, loc_q, spread of Q.
    cotangent : array_like, shape (...), optional
        The gradients are those of Σ cotangent · value; the default is 1. It broadcasts against the
        result. Rows whose cotangent is 0 have gradients 0, whatever they hold.
    out : tuple of ndarray or None, optional
        Where to write the gradients, one entry each.

    Returns
    -------
    value : ndarray or scalar, shape (...)
        What `klfast.kl_normal` returns, in nats.
    *gradients : ndarray
        Each of the shape of its argument: sums over what was broadcast. float64 for float64 and
        integers, else float32. With t = v_p/v_q − 1 and m = m_p − m_q they are m/v_q and −m/v_q for
        the means, t/2 and −(t + m²/v_q)/2 for the log-variances, these divided by v for the
        variances and by σ/2 for the scales; in rows that are +inf, their limits. Rows that are NaN
        have gradients NaN.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or combination of keywords that is not taken; the message names the
        argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, a row that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_normal : the value alone.

    Notes
    -----
    Relative error of every gradient at most 1e-6 (float32) and 1e-14 (float64), however close P and
    Q are; with respect to the spread of Q relative to that of |t| + m²/v_q, where the sides give
    different things for the variance with |t| no less than 1e-7, and sums over what was broadcast
    to the sums of absolute values. Second derivatives are not offered.

    References
    ----------
    .. [1] D. P. Kingma, M. Welling, "Auto-Encoding Variational Bayes" (2014), appendix B.

    Examples
    --------
    >>> import klfast.grad
    >>> value, to_loc, to_scale = klfast.grad.kl_normal([1.0, 2.0], [1.0, 2.0])
    >>> print(f"{value:.6f}", to_loc, to_scale)
    3.306853 [1. 2.] [0.  1.5]
    """
    kind_p, spread_p = kind_of("p", scale_p, var_p, logvar_p)
    given = {"loc_p": loc_p, f"{kind_p}_p": spread_p}
    kind_q = kind_p
    if loc_q is not None:
        kind_q, spread_q = kind_of("q", scale_q, var_q, logvar_q)
        given |= {"loc_q": loc_q, f"{kind_q}_q": spread_q}
    elif not (scale_q is None and var_q is None and logvar_q is None):
        raise TypeError(
            "loc_q is missing: give it with the spread of q, or leave q out for N(0, I)"
        )
    wanted = check_wrt(wrt, tuple(given))
    bits = in_order(tuple(given), wanted)
    implied = {} if loc_q is not None else standard(kind_p)
    kernel = kernel_name(kind_p, kind_q, "q" if loc_q is not None else implied)
    if bits and not implied and axis == -1 and out is None:
        results = call_plainly(kernel, tuple(given.values()), bits, cotangent)
        if results is not None:
            return results
    kernel, arrays = same_dtype(kernel, given | implied)
    shapes = {argument: x.shape for argument, x in arrays.items()}
    try:
        shape = np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{argument} {own}" for argument, own in shapes.items())
        raise ValueError(f"these shapes do not broadcast together: {listed}") from None
    if isinstance(axis, tuple):
        if axis != ():
            raise ValueError(f"axis must be an integer or (), got {axis}")
    else:
        axis = check_axis(axis, {"loc_p": None}, [np.broadcast_to(arrays["loc_p"], shape)])

    def layout(x: Any) -> Any:
        full = x[(None,) * (len(shape) - x.ndim)]
        return full[..., None] if isinstance(axis, tuple) else np.moveaxis(full, axis, -1)

    operands = {name: layout(np.broadcast_to(x, shape)) for name, x in arrays.items()}
    for argument in implied:  # a row of its own is read in place
        operands[argument] = np.full(operands["loc_p"].shape[-1], arrays[argument])
    return gradients(
        kernel,
        operands,
        wanted,
        shapes=shapes,
        cores=[1] * len(operands),
        layout=layout,
        cotangent=cotangent,
        out=out,
    )
