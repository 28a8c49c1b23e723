"""Kullback-Leibler divergence of multivariate normal distributions, for JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from klfast.jax._calls import as_arrays, divergence, promoted
from klfast.mvn import GUFUNCS, batch_shape, given

__all__ = ["kl_mvn"]


def kl_mvn(
    loc_p: ArrayLike,
    cov_p: ArrayLike | None = None,
    loc_q: ArrayLike | None = None,
    cov_q: ArrayLike | None = None,
    *,
    scale_tril_p: ArrayLike | None = None,
    scale_tril_q: ArrayLike | None = None,
) -> jax.Array:
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

    Returns
    -------
    jax.Array, shape (...)
        The divergence in nats, float64 for float64, else float32. Batch axes broadcast. A
        covariance that is not positive definite gives NaN, as JAX cannot raise; elsewhere the
        values of `klfast.kl_mvn`.

    Raises
    ------
    TypeError, ValueError
        A dtype, shape or combination of keywords that is not taken; the message names the
        argument.
    NotImplementedError
        A second derivative.

    See Also
    --------
    klfast.kl_mvn : bounds and edge cases.
    klfast.grad.kl_mvn : the gradients, and their convention for symmetric matrices.

    Notes
    -----
    Differentiable in every array argument.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, klfast.jax
    >>> mean, factor = jnp.array([1.0, 2.0]), jnp.eye(2)
    >>> print(klfast.jax.kl_mvn(mean, scale_tril_p=factor))
    2.5
    >>> print(jax.grad(lambda mean: klfast.jax.kl_mvn(mean, scale_tril_p=factor))(mean))
    [1. 2.]
    """
    kinds, operands = given(loc_p, cov_p, loc_q, cov_q, scale_tril_p, scale_tril_q)
    names = GUFUNCS[kinds][1]
    arrays = as_arrays(**dict(zip(names, operands, strict=True)))
    result: jax.Array = _compiled("_".join(("mvn", *kinds)), names, *arrays.values())
    return result


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _compiled(name: str, names: tuple[str, ...], *operands: Any) -> jax.Array:
    arrays = list(promoted(dict(zip(names, operands, strict=True))).values())
    batch_shape(names, arrays, None)
    if arrays[0].dtype != jnp.float64:
        arrays = [x.astype(jnp.float32) for x in arrays]
    return divergence(name, arrays)
