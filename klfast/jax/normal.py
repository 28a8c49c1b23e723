"""Kullback-Leibler divergence of normal distributions with diagonal covariance, for JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from klfast.jax._calls import as_arrays, over_axis, promoted
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
    keepdims: bool = False,
) -> jax.Array:
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

    Returns
    -------
    jax.Array, shape (...)
        The divergence in nats, float64 for float64, else float32, with the values of
        `klfast.kl_normal` at the edges. All axes of the arguments broadcast.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or combination of keywords that is not taken; the message names the
        argument.
    NotImplementedError
        A second derivative.

    See Also
    --------
    klfast.kl_normal : bounds and edge cases.
    klfast.grad.kl_normal : the gradients.

    Notes
    -----
    Differentiable in every array argument. `axis` and `keepdims` are static under ``jax.jit``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, klfast.jax
    >>> mu, logvar = jnp.array([1.0, 2.0]), jnp.zeros(2)
    >>> print(klfast.jax.kl_normal(mu, logvar_p=logvar))
    2.5
    >>> print(jax.grad(lambda mu: klfast.jax.kl_normal(mu, logvar_p=logvar))(mu))
    [1. 2.]
    """
    kind_p, spread_p = kind_of("p", scale_p, var_p, logvar_p)
    kind_q, spread_q = kind_p, None
    if loc_q is not None:
        kind_q, spread_q = kind_of("q", scale_q, var_q, logvar_q)
    elif not (scale_q is None and var_q is None and logvar_q is None):
        raise TypeError(
            "loc_q is missing: give it with the spread of q, or leave q out for N(0, I)"
        )
    q = standard(kind_p) if loc_q is None else {"loc_q": loc_q, f"{kind_q}_q": spread_q}
    arrays = as_arrays(**{"loc_p": loc_p, f"{kind_p}_p": spread_p} | q)
    name = kernel_name(kind_p, kind_q, q)
    result: jax.Array = _compiled(name, tuple(arrays), axis, keepdims, *arrays.values())
    return result


@partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _compiled(
    name: str,
    names: tuple[str, ...],
    axis: int | tuple[()],
    keepdims: bool,
    *operands: Any,
) -> jax.Array:
    arrays = promoted(dict(zip(names, operands, strict=True)))
    if isinstance(axis, tuple):
        if axis != ():
            raise ValueError(f"axis must be an integer or (), got {axis}")
        if keepdims:
            raise ValueError("keepdims=True needs an axis to keep, got axis=()")
        arrays = {argument: x[..., np.newaxis] for argument, x in arrays.items()}
        axis = -1
    return over_axis(name, _broadcast(arrays, axis), axis=axis, keepdims=keepdims)


def _broadcast(arrays: dict[str, jax.Array], axis: int) -> dict[str, jax.Array]:
    """All arrays with the same number of axes and the same length along `axis`; the target
    broadcasts the others."""
    shapes = {name: x.shape for name, x in arrays.items()}
    try:
        full = np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these shapes do not broadcast together: {listed}") from None
    if not -len(full) <= axis < len(full):
        return arrays  # which is refused
    found = {}
    for name, x in arrays.items():
        shape = [1] * (len(full) - x.ndim) + list(x.shape)
        x = x.reshape(shape)
        shape[axis] = full[axis]
        found[name] = jnp.broadcast_to(x, shape)
    return found
