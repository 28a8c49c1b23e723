"""A fast backend for code that calls torch.distributions.kl_divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)
from torch.distributions.kl import _KL_REGISTRY, kl_divergence, register_kl

from klfast.torch._tensors import DTYPES, is_plain
from klfast.torch.operators import kl_categorical, kl_discrete, kl_mvn, kl_normal

__all__ = ["install", "uninstall"]

Formula = Callable[[Any, Any], Tensor]
before: dict[type[Distribution], Formula] = {}  # what PyTorch had, while klfast is installed


def install() -> None:
    """
    Make `torch.distributions.kl_divergence` use klfast.

    For pairs of Categorical, OneHotCategorical, Normal, Independent(Normal) and MultivariateNormal
    on the CPU. All others, other devices, and what torch.compile or torch.func look at go the way
    they went before. Values have the dtype that PyTorch gives them. Installed again, it does
    nothing.

    Notes
    -----
    There are no second derivatives through these pairs while klfast is installed. `Categorical`
    with ``probs`` of zero on both sides, or ``logits`` of −inf, has finite gradients.
    """
    for kind, formula in FORMULAS.items():
        if kind not in before:
            before[kind] = _KL_REGISTRY[kind, kind]
            register_kl(kind, kind)(formula)


def uninstall() -> None:
    """Restore what `install` replaced; without it, do nothing."""
    for kind in list(before):
        register_kl(kind, kind)(before.pop(kind))


def takes(*tensors: Tensor) -> bool:
    return is_plain(*tensors) and all(x.is_cpu and x.dtype in DTYPES for x in tensors)


def logits_of(distribution: Categorical) -> Tensor | None:
    """The logits it was made of; None where they were made of its probabilities."""
    logits = vars(distribution).get("logits")
    made_of = distribution._param
    given = logits is not None and logits.data_ptr() == made_of.data_ptr()
    return logits if given else None


def categorical_categorical(p: Categorical, q: Categorical) -> Tensor:
    """From logits where both are made of them, else from probabilities. A probability of 0 gets no
    gradient, as it gets none from PyTorch: −inf would reach all others when they are normalised."""
    if not takes(p._param, q._param):
        return before[Categorical](p, q)
    logits_p, logits_q = logits_of(p), logits_of(q)
    if logits_p is not None and logits_q is not None:
        return kl_categorical(logits_p, logits_q).to(p._param.dtype)
    weights = p.probs
    if weights.requires_grad:
        weights = torch.where(weights > 0, weights, 0)
    return kl_discrete(weights, q.probs).to(p._param.dtype)


def one_hot_one_hot(p: OneHotCategorical, q: OneHotCategorical) -> Tensor:
    return kl_divergence(p._categorical, q._categorical)


def normal_normal(p: Normal, q: Normal) -> Tensor:
    if not takes(p.loc, p.scale, q.loc, q.scale):
        return before[Normal](p, q)
    return kl_normal(p.loc, p.scale, q.loc, q.scale, axis=()).to(p.loc.dtype)


def independent_independent(p: Independent[Any], q: Independent[Any]) -> Tensor:
    """Normals are summed over their event axes as they are computed."""
    axes, bases = p.reinterpreted_batch_ndims, (p.base_dist, q.base_dist)
    if axes == 0 or axes != q.reinterpreted_batch_ndims or {type(b) for b in bases} != {Normal}:
        return before[Independent](p, q)
    tensors = [x for base in bases for x in (base.loc, base.scale)]
    if not takes(*tensors):
        return before[Independent](p, q)
    flat = [x.flatten(-axes) for x in tensors] if axes > 1 else tensors
    return kl_normal(*flat).to(tensors[0].dtype)


def mvn_mvn(p: MultivariateNormal, q: MultivariateNormal) -> Tensor:
    factors = p._unbroadcasted_scale_tril, q._unbroadcasted_scale_tril
    if p.event_shape != q.event_shape or not takes(p.loc, q.loc, *factors):
        return before[MultivariateNormal](p, q)
    kl = kl_mvn(p.loc, loc_q=q.loc, scale_tril_p=factors[0], scale_tril_q=factors[1])
    return kl.to(p.loc.dtype)


FORMULAS: dict[type[Distribution], Formula] = {
    Categorical: categorical_categorical,
    OneHotCategorical: one_hot_one_hot,
    Normal: normal_normal,
    Independent: independent_independent,
    MultivariateNormal: mvn_mvn,
}
