"""Divergences of policies: whole distributions over actions, and estimates from sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from klfast.torch.losses import reduce_rows
from klfast.torch.operators import kl_categorical, kl_normal

__all__ = ["kl_penalty", "policy_kl"]

Policy = Tensor | tuple[Tensor, Tensor]


def policy_kl(
    old: Policy, new: Policy, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """
    KL(old‖new) of policies: what a trust region bounds.

    Parameters
    ----------
    old, new : Tensor of shape (..., K), or pair of Tensors of shape (..., D)
        Logits of a categorical policy, −inf in both for actions that are not allowed; or mean and
        log standard deviation of a Gaussian one.
    mask : Tensor of bool, shape (...), optional
        Which states count.
    reduction : {"mean", "sum", "none"}
        Over the states that count. The mean of none is 0.

    Returns
    -------
    Tensor
        The divergence in nats. `old` is not detached: do so if it shares parameters with `new`.

    Raises
    ------
    TypeError, ValueError
        An argument that is not taken; the message names it.

    References
    ----------
    .. [1] J. Schulman et al., "Trust Region Policy Optimization" (2015).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        kl = kl_categorical(old, new)
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new) == 2:
        kl = kl_normal(old[0], loc_q=new[0], logvar_p=2 * old[1], logvar_q=2 * new[1])
    else:
        raise TypeError(
            "old and new must be two tensors of logits, or two pairs (mean, log standard deviation)"
        )
    return reduce_rows(kl, mask, reduction)


def kl_penalty(
    policy: Tensor,
    reference: Tensor,
    tokens: Tensor | None = None,
    *,
    estimator: str = "k3",
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """
    KL(policy‖reference) of each token, estimated from the tokens that the policy drew.

    Parameters
    ----------
    policy, reference : Tensor, shape (...), or (..., K) with `tokens` or ``estimator="exact"``
        log-probabilities of the tokens, or logits over the vocabulary.
    tokens : Tensor of integers, shape (...), optional
        The tokens; their log-probabilities are taken from the logits then.
    estimator : {"k1", "k2", "k3", "exact"}
        With r = log reference(token) − log policy(token): k1 = −r, unbiased, of both signs; k2 =
        r²/2, biased, never negative; k3 = exp(r) − 1 − r, unbiased and never negative, computed
        without cancellation. "exact" sums over the vocabulary instead, from logits.
    clip : float, optional
        Bound r to [−clip, clip] first; no gradient flows beyond.
    mask : Tensor of bool, shape (...), optional
        Which tokens count; the others get 0 and have no gradient, whatever they hold.

    Returns
    -------
    Tensor, shape (...)
        The penalty of each token in nats.

    Raises
    ------
    TypeError, ValueError
        An argument that is not taken; the message names it.

    Notes
    -----
    Unbiased are the values. The gradient of a value that was sampled from the policy is not the
    gradient of the divergence: that of k1 has mean 0, that of k2 the mean one wants.

    References
    ----------
    .. [1] J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html
    """
    if estimator not in ("k1", "k2", "k3", "exact"):
        raise ValueError(f"estimator must be 'k1', 'k2', 'k3' or 'exact', got {estimator!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    if estimator == "exact":
        if tokens is not None or clip is not None:
            raise TypeError("estimator='exact' takes neither tokens nor clip: it samples nothing")
        return reduce_rows(kl_categorical(policy, reference), mask, "none")
    if tokens is not None:
        policy, reference = (log_probability(x, tokens, mask) for x in (policy, reference))
    r = reference - policy
    if mask is not None:
        r = torch.where(mask, r, 0)
    if clip is not None:
        r = r.clamp(-clip, clip)
    if estimator == "k1":
        return -r
    if estimator == "k2":
        return r * r / 2
    # φ(r) = exp(r) − 1 − r is twice the divergence of N(0, exp(r)) from N(0, 1).
    return 2 * kl_normal(torch.zeros_like(r), logvar_p=r, axis=())


def log_probability(logits: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Of the tokens, in single precision at least; of those that do not count, anything finite: a
    gradient of 0 times NaN would be NaN."""
    if mask is not None:
        logits, tokens = torch.where(mask.unsqueeze(-1), logits, 0), torch.where(mask, tokens, 0)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)
