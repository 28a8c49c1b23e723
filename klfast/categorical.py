"""Kullback-Leibler divergence of categorical distributions given as logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klfast import _kernels
from klfast._arguments import as_array, reduce

__all__ = ["kl_categorical"]


def kl_categorical(
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    axis: int = -1,
    keepdims: bool = False,
    temperature: ArrayLike = 1.0,
    base: float | None = None,
    out: NDArray[Any] | None = None,
) -> Any:
    """
    Kullback-Leibler divergence KL(P‖Q) of softmax(logits_p / T) and softmax(logits_q / T).

    Parameters
    ----------
    logits_p, logits_q : array_like, shape (..., K)
        Unnormalised log-probabilities; log-probabilities are a special case. The other axes
        broadcast. −inf is probability 0; −inf on both sides masks an entry.
    axis : int, default -1
        The axis of length K.
    keepdims : bool, default False
        Leave `axis` in the result with length 1.
    temperature : float or array_like, shape (...), default 1.0
        T > 0, by which the logits are divided; an array broadcasts against the batch, that is the
        shape without `axis`. No factor T² is applied to the result.
    base : float, optional
        Base of the logarithm: 2 for bits. The default is e, nats.
    out : ndarray, optional
        Where to write the result.

    Returns
    -------
    ndarray or scalar, shape (...)
        The divergence in nats (or the unit of `base`), float32 for float32, float16 and bfloat16,
        else float64. +inf where P has mass and Q has none. Rows with NaN or +inf, of −inf alone
        on either side, or with K = 0 give NaN.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or option that is not taken; the message names the argument.
    FloatingPointError
        Under ``numpy.errstate(invalid="raise")``, a row that is NaN because of a bad value.

    See Also
    --------
    klfast.kl_discrete : from probabilities or counts.
    torch.nn.functional.kl_div : takes log-probabilities, q first.

    Notes
    -----
    Relative error at most 1e-6 (float32) and 1e-14 (float64), however close P and Q are and
    whatever constants are added to the logits, and never negative. Each block gives E_P[φ(y)]
    with φ(y) = e^y − 1 − y ≥ 0 and y = c − (logits_p − logits_q)/T, where c is the mean of
    (logits_p − logits_q)/T under P, and a correction of second order; or, with T = 1 and P and Q
    far apart, c and the logarithms of the sums of both exponentials. The chain rule joins blocks.

    References
    ----------
    .. [1] S. Kullback, R. A. Leibler, "On Information and Sufficiency", Annals of Mathematical
       Statistics 22 (1951), 79-86.
    .. [2] G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network" (2015),
       for the temperature.

    Examples
    --------
    >>> import numpy as np, klfast
    >>> p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    >>> print(f"{klfast.kl_categorical(p, q + 100):.6f}")
    0.143841
    """
    temperature = check_temperature(temperature)
    if axis == -1 and not keepdims and base is None:
        result = _kernels.plain["categorical"](logits_p, logits_q, temperature, out=out)
        if result is not None:
            return result
    return reduce(
        "categorical",
        {"logits_p": logits_p, "logits_q": logits_q},
        extra=(temperature,),
        axis=axis,
        keepdims=keepdims,
        base=base,
        out=out,
    )


def check_temperature(temperature: Any) -> Any:
    if type(temperature) is int:
        temperature = float(temperature)
    if type(temperature) is float:
        if 0 < temperature < math.inf:
            return temperature
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    temperature = np.asarray(as_array("temperature", temperature), dtype=np.float64)
    if not (temperature.min(initial=1) > 0 and temperature.max(initial=1) < math.inf):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return temperature if temperature.ndim else float(temperature)
