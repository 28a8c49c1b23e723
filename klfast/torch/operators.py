"""The four divergences of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from klfast._arguments import check_base, only_one
from klfast.torch import _library
from klfast.torch._autograd import divergence
from klfast.torch._tensors import check, check_one

__all__ = ["kl_categorical", "kl_discrete", "kl_mvn", "kl_normal"]

_library.register_all()


def kl_discrete(
    p: Tensor,
    q: Tensor,
    *,
    axis: int = -1,
    keepdims: bool = False,
    normalize: bool = True,
    base: float | None = None,
) -> Tensor:
    """
    KL(P‖Q) of distributions given as weights: `klfast.kl_discrete` for CPU tensors.

    Parameters
    ----------
    p, q : Tensor, shape (..., K)
        Probabilities, counts or other non-negative weights. Batch axes broadcast.
    axis, keepdims, normalize, base
        As in `klfast.kl_discrete`.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. Differentiable once, with
        respect to p and q; gradients have the dtype of their tensor. The gradient with respect to
        a weight p = 0 is −inf where q > 0: so is the slope of p log p.

    Raises
    ------
    TypeError, ValueError
        A dtype, device, shape or option that is not taken; the message names the argument.
    """
    p, q = check({"p": p, "q": q})
    if axis != -1:
        p, q = p.movedim(axis, -1), q.movedim(axis, -1)
    return finish(divergence("kl_discrete", (p, q), normalize), axis, keepdims, base)


def kl_categorical(
    logits_p: Tensor,
    logits_q: Tensor,
    *,
    axis: int = -1,
    keepdims: bool = False,
    temperature: float | Tensor = 1.0,
    base: float | None = None,
) -> Tensor:
    """
    KL(P‖Q) of softmax(logits_p / T) and softmax(logits_q / T): `klfast.kl_categorical` for CPU
    tensors.

    Parameters
    ----------
    logits_p, logits_q : Tensor, shape (..., K)
        Unnormalised log-probabilities; −inf on both sides masks an entry, whose gradient is 0.
    temperature : float or Tensor, shape (...)
        T, a constant: it has no gradient.
    axis, keepdims, base
        As in `klfast.kl_categorical`.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. Differentiable once, with
        respect to both logits; gradients have the dtype of their tensor.

    Raises
    ------
    TypeError, ValueError
        A dtype, device, shape or option that is not taken; the message names the argument.
    """
    logits_p, logits_q = check({"logits_p": logits_p, "logits_q": logits_q})
    if axis != -1:
        logits_p, logits_q = logits_p.movedim(axis, -1), logits_q.movedim(axis, -1)
    result = divergence("kl_categorical", (logits_p, logits_q), check_temperature(temperature))
    return finish(result, axis, keepdims, base)


def kl_normal(
    loc_p: Tensor,
    scale_p: Tensor | None = None,
    loc_q: Tensor | None = None,
    scale_q: Tensor | None = None,
    *,
    var_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    var_q: Tensor | None = None,
    logvar_q: Tensor | None = None,
    axis: int | tuple[()] = -1,
    keepdims: bool = False,
) -> Tensor:
    """
    KL(P‖Q) of normal distributions with diagonal covariance: `klfast.kl_normal` for CPU tensors.

    Parameters
    ----------
    loc_p, loc_q : Tensor, shape (..., D)
        Means. Q left out altogether is N(0, I).
    scale_p, scale_q, var_p, var_q, logvar_p, logvar_q : Tensor, shape (..., D)
        Standard deviations, variances or their logarithms, exactly one of the three a side.
    axis, keepdims
        As in `klfast.kl_normal`; ``axis=()`` gives the divergence of each element.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. All axes broadcast, and the
        gradients are summed back. Differentiable once, with respect to all arguments.

    Raises
    ------
    TypeError, ValueError
        A dtype, device, shape or combination of keywords that is not taken; the message names the
        argument.
    """
    kind_p, spread_p = only_one("p", scale=scale_p, var=var_p, logvar=logvar_p)
    arguments, kind_q = {"loc_p": loc_p, f"{kind_p}_p": spread_p}, ""
    if loc_q is not None:
        kind_q, spread_q = only_one("q", scale=scale_q, var=var_q, logvar=logvar_q)
        arguments |= {"loc_q": loc_q, f"{kind_q}_q": spread_q}
    elif not (scale_q is None and var_q is None and logvar_q is None):
        raise TypeError(
            "loc_q is missing: give it with the spread of q, or leave q out for N(0, I)"
        )
    tensors = check(arguments)
    if axis == ():
        tensors = tuple(x.unsqueeze(-1) for x in tensors)
    elif axis != -1:
        tensors = tuple(x.movedim(axis, -1) for x in torch.broadcast_tensors(*tensors))
    return finish(divergence("kl_normal", tensors, kind_p, kind_q), axis, keepdims)


def kl_mvn(
    loc_p: Tensor,
    cov_p: Tensor | None = None,
    loc_q: Tensor | None = None,
    cov_q: Tensor | None = None,
    *,
    scale_tril_p: Tensor | None = None,
    scale_tril_q: Tensor | None = None,
    errors: str = "raise",
) -> Tensor:
    """
    KL(P‖Q) of multivariate normal distributions: `klfast.kl_mvn` for CPU tensors.

    Parameters
    ----------
    loc_p, loc_q : Tensor, shape (..., D)
        Means. Q left out altogether is N(0, I).
    cov_p, scale_tril_p, cov_q, scale_tril_q : Tensor, shape (..., D, D)
        Covariances or their lower Cholesky factors, exactly one of the two a side. Only lower
        triangles are read.
    errors : {"raise", "nan"}
        As in `klfast.kl_mvn`.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. Differentiable once, with
        respect to all arguments; of covariances by the symmetric convention of
        `klfast.grad.kl_mvn`, of factors in the lower triangle.

    Raises
    ------
    numpy.linalg.LinAlgError
        A covariance is not positive definite and ``errors="raise"``.
    TypeError, ValueError
        A dtype, device, shape or combination of keywords that is not taken; the message names the
        argument.
    """
    if errors not in ("raise", "nan"):
        raise ValueError(f"errors must be 'raise' or 'nan', got {errors!r}")
    kind_p, matrix_p = only_one("p", cov=cov_p, scale_tril=scale_tril_p)
    arguments, kind_q = {"loc_p": loc_p, f"{kind_p}_p": matrix_p}, ""
    if loc_q is not None:
        kind_q, matrix_q = only_one("q", cov=cov_q, scale_tril=scale_tril_q)
        arguments |= {"loc_q": loc_q, f"{kind_q}_q": matrix_q}
    elif cov_q is not None or scale_tril_q is not None:
        raise TypeError("loc_q is missing: give it with its covariance, or leave q out for N(0, I)")
    return divergence("kl_mvn", check(arguments), kind_p, kind_q, errors)


def check_temperature(temperature: Any) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return float(temperature)
    if temperature.requires_grad:
        raise ValueError("temperature is a constant to klfast: pass temperature.detach()")
    check_one("temperature", temperature)
    return temperature.double()


def finish(
    result: Tensor, axis: int | tuple[()], keepdims: bool, base: float | None = None
) -> Tensor:
    if base is not None:
        result = result / check_base(base)
    if not keepdims:
        return result
    if isinstance(axis, tuple):
        raise ValueError("keepdims=True needs an axis to keep, got axis=()")
    return result.unsqueeze(axis)
