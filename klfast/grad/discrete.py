"""Gradients of the Kullback-Leibler divergence of discrete distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike, NDArray

from klfast.grad._shared import along_axis, check_wrt

__all__ = ["kl_discrete"]


def kl_discrete(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: int = -1,
    normalize: bool = True,
    base: float | None = None,
    wrt: str | Sequence[str] | None = ("p", "q"),
    cotangent: ArrayLike | None = None,
    out: Sequence[NDArray[Any] | None] | None = None,
) -> tuple[Any, ...]:
    """
    KL(P‖Q) of discrete distributions, and its gradients with respect to the weights.

    Parameters
    ----------
    p, q : array_like, shape (..., K)
        Non-negative weights: probabilities or counts. The other axes broadcast.
    axis : int, default -1
        The axis of length K.
    normalize : bool, default True
        As in `klfast.kl_discrete`: P = p/Σp and Q = q/Σq, or Σ p log(p/q) as it stands.
    base : float, optional
        Base of the logarithm, of value and gradients. The default is e, nats.
    wrt : str or sequence of str, default ("p", "q")
        With respect to what: the gradients' order. The others are not computed.
    cotangent : array_like, shape (...), optional
        The gradients are those of Σ cotangent · value; the default is 1. It broadcasts against the
        result. Rows whose cotangent is 0 have gradients 0, whatever they hold.
    out : tuple of ndarray or None, optional
        Where to write the gradients, one entry each.

    Returns
    -------
    value : ndarray or scalar, shape (...)
        What `klfast.kl_discrete` returns, in nats or the unit of `base`.
    *gradients : ndarray
        Each of the shape of its argument: sums over what was broadcast. float64 for float64 and
        integers, else float32. With the rows' sums Sp and Sq they are (log(P/Q) − KL)/Sp and
        (1 − P/Q)/Sq, or log(p/q) + 1 and −p/q with ``normalize=False``. Where only p is 0, that
        with respect to p is −inf; where only q is 0, they are +inf and −inf; where both are 0, a
        mask, both are 0. In rows that are +inf the normalised gradient with respect to p is −inf
        wherever q is not 0. Rows that are NaN have gradients NaN.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or option that is not taken; the message names the argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, a row that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_discrete : the value alone.
    klfast.grad.kl_categorical : from logits, with gradients that are finite everywhere.

    Notes
    -----
    The gradients are right to 1e-6 (float32) and 1e-14 (float64) of (|log(P/Q)| + KL + √(2 KL))/Sp
    and (|1 − P/Q| + P/Q √(2 KL))/Sq, however close P and Q are, or of |log(p/q)| + 1 and p/q with
    ``normalize=False``; sums over what was broadcast, of the sums of these. Second derivatives are
    not offered.

    References
    ----------
    .. [1] S. Kullback, R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
       Statistics 22 (1951), 79-86.

    Examples
    --------
    >>> import klfast.grad
    >>> value, to_p, to_q = klfast.grad.kl_discrete([0.5, 0.5], [0.25, 0.75])
    >>> print(f"{value:.6f}", to_p.round(6), to_q.round(6))
    0.143841 [ 0.549306 -0.549306] [-1.        0.333333]
    """
    names = check_wrt(wrt, ("p", "q"))
    name = "discrete" if normalize else "discrete_plain"
    return along_axis(
        name, {"p": p, "q": q}, names, axis=axis, base=base, cotangent=cotangent, out=out
    )
