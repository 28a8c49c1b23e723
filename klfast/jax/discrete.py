"""Kullback-Leibler divergence of discrete distributions given as weights, for JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.typing import ArrayLike

from klfast.jax._calls import as_arrays, over_axis, promoted

__all__ = ["kl_discrete"]


def kl_discrete(
    p: ArrayLike,
    q: ArrayLike,
    *,
    axis: int = -1,
    keepdims: bool = False,
    normalize: bool = True,
    base: float | None = None,
) -> jax.Array:
    """
    Kullback-Leibler divergence KL(P‖Q) of discrete distributions.

    Parameters
    ----------
    p, q : array_like, shape (..., K)
        Non-negative weights: probabilities or counts. The other axes broadcast.
    axis : int, default -1
        The axis of length K.
    keepdims : bool, default False
        Leave `axis` in the result with length 1.
    normalize : bool, default True
        Divide each row by its sum first. If False, the result is Σ p log(p/q) of the weights as
        they stand, which may be negative.
    base : float, optional
        Base of the logarithm: 2 for bits. The default is e, nats.

    Returns
    -------
    jax.Array, shape (...)
        The divergence in nats (or the unit of `base`), float64 for float64, else float32, with the
        values of `klfast.kl_discrete` at the edges.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or option that is not taken; the message names the argument.
    NotImplementedError
        A second derivative.

    See Also
    --------
    klfast.kl_discrete : bounds and edge cases.
    klfast.grad.kl_discrete : the gradients.

    Notes
    -----
    Differentiable in `p` and `q`, by one pass more over each row. `axis`, `keepdims`, `normalize`
    and `base` are static under ``jax.jit``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, klfast.jax
    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
    >>> print(f"{klfast.jax.kl_discrete(p, q):.6f}")
    0.143841
    >>> print(jax.grad(klfast.jax.kl_discrete, argnums=1)(p, q).round(4))
    [-1.      0.3333]
    """
    name = "discrete" if normalize else "discrete_plain"
    result: jax.Array = _compiled(name, as_arrays(p=p, q=q), axis, keepdims, base)
    return result


@partial(jax.jit, static_argnums=(0, 2, 3, 4), inline=True)
def _compiled(
    name: str, arrays: dict[str, Any], axis: int, keepdims: bool, base: float | None
) -> jax.Array:
    return over_axis(name, promoted(arrays), axis=axis, keepdims=keepdims, base=base)
