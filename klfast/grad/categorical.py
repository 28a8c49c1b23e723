"""Gradients of the Kullback-Leibler divergence of categorical distributions given as logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast.categorical import check_temperature
from klfast.grad._shared import along_axis, check_wrt

__all__ = ["kl_categorical"]


def kl_categorical(
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    axis: int = -1,
    temperature: ArrayLike = 1.0,
    base: float | None = None,
    wrt: str | Sequence[str] | None = ("logits_p", "logits_q"),
    cotangent: ArrayLike | None = None,
    out: Sequence[NDArray[Any] | None] | None = None,
) -> tuple[Any, ...]:
    """
    KL(P‖Q) of softmax(logits_p / T) and softmax(logits_q / T), and its gradients.

    Parameters
    ----------
    logits_p, logits_q : array_like, shape (..., K)
        Unnormalised log-probabilities. The other axes broadcast. −inf is probability 0; −inf on
        both sides masks an entry.
    axis : int, default -1
        The axis of length K.
    temperature : float or array_like, shape (...), default 1.0
        T > 0, by which the logits are divided; an array broadcasts against the batch. Value and
        gradients have no factor T².
    base : float, optional
        Base of the logarithm, of value and gradients. The default is e, nats.
    wrt : str or sequence of str, default ("logits_p", "logits_q")
        With respect to what: the gradients' order. The others are not computed.
    cotangent : array_like, shape (...), optional
        The gradients are those of Σ cotangent · value; the default is 1. It broadcasts against the
        result. Rows whose cotangent is 0 have gradients 0, whatever they hold.
    out : tuple of ndarray or None, optional
        Where to write the gradients, one entry each.

    Returns
    -------
    value : ndarray or scalar, shape (...)
        What `klfast.kl_categorical` returns, in nats or the unit of `base`.
    *gradients : ndarray
        Each of the shape of its argument: sums over what was broadcast. float64 for float64 and
        integers, else float32. They are P (log(P/Q) − KL)/T and (Q − P)/T: 0 for a mask; that with
        respect to logits_p is 0 where logits_p is −inf. In rows that are +inf it is +inf where Q is
        0 and P is not, and −inf at the other entries of P; that with respect to logits_q stays
        finite. Rows that are NaN have gradients NaN.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or option that is not taken; the message names the argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, a row that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_categorical : the value alone.

    Notes
    -----
    The gradients are right to 1e-6 (float32) and 1e-14 (float64) of
    P (|log(P/Q) − KL| + KL + √(2 KL))/T and (|Q − P| + Q min(√(2 KL), 1))/T, however close P and Q
    are and whatever constants are added to the logits; probabilities below 1e-37 (float32) and
    1e-306 (float64) may count as 0. Sums over what was broadcast: of the sums of these. Q − P is
    computed as P expm1(log(Q/P)). Second derivatives are not offered.

    References
    ----------
    .. [1] S. Kullback, R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
       Statistics 22 (1951), 79-86.
    .. [2] G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network" (2015),
       for the temperature.

    Examples
    --------
    >>> import numpy as np, klfast.grad
    >>> p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    >>> value, to_q = klfast.grad.kl_categorical(p, q, wrt="logits_q")
    >>> print(f"{value:.6f}", to_q)
    0.143841 [-0.25  0.25]
    """
    names = check_wrt(wrt, ("logits_p", "logits_q"))
    return along_axis(
        "categorical",
        {"logits_p": logits_p, "logits_q": logits_q},
        names,
        axis=axis,
        extra=(np.asarray(check_temperature(temperature)),),
        base=base,
        cotangent=cotangent,
        out=out,
    )
