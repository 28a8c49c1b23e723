"""Kullback-Leibler divergence of categorical distributions given as logits, for JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from klfast.categorical import check_temperature
from klfast.jax._calls import as_arrays, over_axis, promoted

__all__ = ["kl_categorical"]


def kl_categorical(
    logits_p: ArrayLike,
    logits_q: ArrayLike,
    *,
    axis: int = -1,
    keepdims: bool = False,
    temperature: ArrayLike = 1.0,
    base: float | None = None,
) -> jax.Array:
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
        shape without `axis`. No factor T² is applied to the result. It is a constant to
        differentiation (``stop_gradient``).
    base : float, optional
        Base of the logarithm: 2 for bits. The default is e, nats.

    Returns
    -------
    jax.Array, shape (...)
        The divergence in nats (or the unit of `base`), float64 for float64, else float32, with the
        values of `klfast.kl_categorical` at the edges. A temperature that is a JAX array cannot
        be refused: rows where it is not positive and finite are NaN.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or option that is not taken; the message names the argument.
    NotImplementedError
        A second derivative.

    See Also
    --------
    klfast.kl_categorical : bounds and edge cases.
    klfast.grad.kl_categorical : the gradients.

    Notes
    -----
    Differentiable in both logits, by one pass more over each row. `axis`, `keepdims` and `base` are
    static under ``jax.jit``. Without ``jax_enable_x64`` the temperature is rounded to float32.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, klfast.jax
    >>> teacher, student = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{klfast.jax.kl_categorical(teacher, student):.6f}")
    0.143841
    >>> print(jax.grad(klfast.jax.kl_categorical, argnums=1)(teacher, student).round(4))
    [-0.25  0.25]
    """
    arrays = as_arrays(logits_p=logits_p, logits_q=logits_q)
    if not isinstance(temperature, jax.Array):
        check_temperature(temperature)
    extra = as_arrays(temperature=temperature)
    result: jax.Array = _compiled(arrays, extra["temperature"], axis, keepdims, base)
    return result


@partial(jax.jit, static_argnums=(2, 3, 4), inline=True)
def _compiled(
    arrays: dict[str, Any], temperature: Any, axis: int, keepdims: bool, base: float | None
) -> jax.Array:
    t = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.result_type(float)))
    t = jnp.where((t > 0) & (t < jnp.inf), t, jnp.nan)
    return over_axis(
        "categorical", promoted(arrays), extra=(t,), axis=axis, keepdims=keepdims, base=base
    )
