"""Losses: PyTorch's kl_div without its NaN, distillation, and the terms of a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from klfast.torch._autograd import (
    at_their_places,
    categorical_call,
    no_second_derivatives,
    normal_call,
)
from klfast.torch._tensors import (
    Call,
    as_array,
    check,
    check_one,
    direct,
    is_plain,
    lie_alike,
    needs_gradient,
    value,
    value_and_gradients,
)
from klfast.torch.operators import kl_categorical, kl_normal

__all__ = ["ELBO", "distillation_loss", "elbo", "kl_div", "kl_to_standard_normal"]


def kl_div(
    input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    """
    `torch.nn.functional.kl_div`, with 0 where a target of probability 0 makes that NaN.

    Parameters
    ----------
    input : Tensor
        Log-probabilities of Q, the second argument of KL(P‖Q).
    target : Tensor
        Probabilities of P, or their logarithms if `log_target`.
    reduction : {"mean", "batchmean", "sum", "none"}
        "mean" divides by the number of elements, "batchmean" by the length of the first axis.
    log_target : bool
        Whether `target` holds logarithms.

    Returns
    -------
    Tensor
        p (log p − input) of each element, or their sum or mean. P and Q are taken as they are, not
        normalised. Elements with p = 0 are 0 and have no gradient.

    Notes
    -----
    The formula is in torch operations, for any device and any number of derivatives: terms that are
    wanted one by one leave nothing to fuse. Where they are summed anyway, `kl_categorical` and
    `distillation_loss` start from logits, are exact near P = Q and read them once.
    """
    if reduction not in ("mean", "batchmean", "sum", "none"):
        raise ValueError(
            f"reduction must be 'mean', 'batchmean', 'sum' or 'none', got {reduction!r}"
        )
    absent = target == (-torch.inf if log_target else 0)
    present = torch.where(absent, 0 if log_target else 1, target)
    log_ratio = (present if log_target else present.log()) - torch.where(absent, 0, input)
    terms = torch.where(absent, 0, (present.exp() if log_target else target) * log_ratio)
    terms = terms.masked_fill(torch.isnan(input), torch.nan)  # not a number, whatever the weight
    if reduction == "none":
        return terms
    if reduction == "mean":
        return terms.mean()
    return terms.sum() / (terms.shape[0] if reduction == "batchmean" and terms.ndim else 1)


class Weighted(torch.autograd.Function):
    """Σ weight · divergence, and the gradients in the same pass."""

    @staticmethod
    def forward(ctx: Any, call: Call, weight: Any, *tensors: Tensor) -> Any:
        ctx.wanted = ctx.needs_input_grad[2:]
        loss, gradients = weighted(call, tensors, ctx.wanted, weight)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise no_second_derivatives()
        gradients = ctx.saved_tensors
        # A graph that is kept keeps these: they are passed on, or multiplied, never written to.
        if not is_plain(upstream) or upstream.item() != 1:
            gradients = [g * upstream.to(g.dtype) for g in gradients]
        return None, None, *at_their_places(gradients, ctx.wanted)


def weighted(
    call: Call, tensors: Sequence[Tensor], wanted: Sequence[bool], weight: Any
) -> tuple[Tensor, list[Tensor]]:
    """Σ weight · divergence, and the wanted gradients."""
    if type(weight) is float and lie_alike(call, tensors):
        total, gradients = direct(call, tensors, wanted, weight)
        dtype = tensors[0].dtype
        return torch.scalar_tensor(total * weight, dtype=dtype, device="cpu"), gradients
    if not any(wanted):
        return weighted_sum(value(call, tensors).numpy(), weight), []
    rows, gradients = value_and_gradients(call, tensors, wanted, weight)
    return weighted_sum(rows, weight), gradients


def weighted_loss(call: Call, tensors: Sequence[Tensor], weight: Any) -> Tensor:
    if needs_gradient(*tensors):
        loss: Tensor = Weighted.apply(call, weight, *tensors)
        return loss
    return weighted(call, tensors, (), weight)[0]


def weighted_sum(rows: Any, weight: Any) -> Tensor:
    """In double; rows of no weight may be NaN."""
    if type(weight) is np.ndarray:
        total = np.sum(rows * weight, where=weight != 0, dtype=np.float64)
    else:
        total = np.add.reduce(rows, axis=None, dtype=np.float64) * weight
    return torch.from_numpy(np.asarray(total, dtype=rows.dtype))


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    reduction: str = "batchmean",
    ignore_index: int | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """
    Knowledge distillation: T² KL(teacher‖student) at temperature T.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor, shape (..., K)
        Of one shape.
    temperature : float, default 2.0
        T > 0, by which both are divided.
    reduction : {"batchmean", "sum", "none"}
        "batchmean": the mean over all rows that count, whatever axes they are on; 0 if none does.
        "none": one number a row, 0 for a row that does not count.
    ignore_index : int, optional
        The label of rows that do not count, whatever they hold; -100 in many data sets.
    labels : Tensor of integers, shape (...), optional
        The labels; they say which rows count and nothing else.

    Returns
    -------
    Tensor
        The loss in nats, float64 for float64, else float32. T² keeps the size of the gradient as T
        grows.

    Raises
    ------
    TypeError, ValueError
        An argument that is not taken; the message names it.

    Notes
    -----
    Eager calls that reduce compute the loss and the gradient in one pass when they are called:
    the student's gradient is all that is kept. What autograd then brings from above multiplies it,
    unless it is 1. There are no second derivatives.

    References
    ----------
    .. [1] G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network" (2015).
    """
    if reduction not in ("batchmean", "sum", "none"):
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'none', got {reduction!r}")
    student, teacher = check({"student_logits": student_logits, "teacher_logits": teacher_logits})
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits has shape {tuple(student.shape)} and teacher_logits "
            f"{tuple(teacher.shape)}; wanted the same"
        )
    counts = rows_that_count(student, ignore_index, labels)
    temperature = float(temperature)
    square = temperature * temperature
    if reduction == "none" or not is_plain(student, teacher):
        rows = kl_categorical(teacher, student, temperature=temperature)
        return reduce_rows(rows, counts, reduction) * square
    if counts is None:
        n = student.numel() // student.shape[-1] if student.shape[-1] else 0
        weight: Any = square / max(n, 1) if reduction == "batchmean" else square
    else:
        kept = as_array(counts)
        weight = kept * (square / max(kept.sum(), 1) if reduction == "batchmean" else square)
    return weighted_loss(categorical_call(temperature), (teacher, student), weight)


def rows_that_count(
    logits: Tensor, ignore_index: int | None, labels: Tensor | None
) -> Tensor | None:
    """Which rows count; None for all."""
    if labels is None and ignore_index is None:
        return None
    if labels is None or ignore_index is None:
        raise TypeError("labels and ignore_index go together: the rows with that label are ignored")
    check_one("labels", labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; wanted {tuple(logits.shape[:-1])}, a label "
            "for each row of logits"
        )
    return labels != ignore_index


def reduce_rows(rows: Tensor, counts: Tensor | None, reduction: str) -> Tensor:
    """The sum or mean over the rows that count, without what the others hold."""
    if counts is not None:
        rows = torch.where(counts, rows, 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (max(rows.numel(), 1) if counts is None else counts.sum().clamp(min=1))


def kl_to_standard_normal(
    mu: Tensor, logvar: Tensor, *, axis: int | tuple[()] = -1, reduction: str = "none"
) -> Tensor:
    """
    KL(N(mu, exp(logvar)) ‖ N(0, I)): the term of a variational autoencoder.

    Parameters
    ----------
    mu, logvar : Tensor, shape (..., D)
        Means and logarithms of variances of the posterior.
    axis : int or (), default -1
        The axis that is summed over; ``()`` gives the divergence of each latent dimension.
    reduction : {"none", "mean", "sum"}
        "mean": over the batch, 0 if it is empty. "none": the divergence of each item.

    Returns
    -------
    Tensor, shape (...) or ()
        The divergence in nats.

    Raises
    ------
    TypeError, ValueError
        An argument that is not taken; the message names it.

    Notes
    -----
    Eager calls that reduce compute value and gradients in one pass when they are called, and keep
    the gradients. What autograd then brings from above multiplies them, unless it is 1; there are
    no second derivatives. Those that do not reduce keep the inputs alone, and read them again.

    References
    ----------
    .. [1] D. P. Kingma, M. Welling, "Auto-Encoding Variational Bayes" (2014), appendix B.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if reduction != "none" and axis == -1:
        tensors = check({"mu": mu, "logvar": logvar})
        if is_plain(*tensors) and mu.shape == logvar.shape and mu.numel():
            rows = mu.numel() // mu.shape[-1] if reduction == "mean" else 1
            return weighted_loss(normal_call("logvar", ""), tensors, 1 / rows)
    return reduce_rows(kl_normal(mu, logvar_p=logvar, axis=axis), None, reduction)


class ELBO(NamedTuple):
    """Means over the batch: `elbo` = `log_likelihood` − β `kl`."""

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor


def elbo(log_likelihood: Tensor, mu: Tensor, logvar: Tensor, *, beta: float | Tensor = 1.0) -> ELBO:
    """
    The evidence lower bound of a variational autoencoder and its two terms.

    Parameters
    ----------
    log_likelihood : Tensor, shape (...)
        log p(x|z) of each item, summed over its pixels.
    mu, logvar : Tensor, shape (..., D)
        Means and logarithms of variances of the posterior q(z|x), against the prior N(0, I).
    beta : float or Tensor, default 1.0
        The weight of the divergence: 1 is the bound itself, more makes a β-VAE, a rising schedule
        warms up.

    Returns
    -------
    ELBO
        ``(elbo, log_likelihood, kl)``, means over the batch in nats. The loss is ``-elbo``.

    Raises
    ------
    TypeError, ValueError
        An argument that is not taken; the message names it.

    References
    ----------
    .. [1] I. Higgins et al., "β-VAE: Learning Basic Visual Concepts with a Constrained Variational
       Framework" (2017).
    """
    shape = torch.broadcast_shapes(mu.shape, logvar.shape)[:-1]
    if log_likelihood.shape != shape:
        raise ValueError(
            f"log_likelihood has shape {tuple(log_likelihood.shape)}; wanted {tuple(shape)}, "
            "one number for each row of mu"
        )
    likelihood = log_likelihood.mean()
    divergence = kl_to_standard_normal(mu, logvar, reduction="mean")
    return ELBO(likelihood - beta * divergence, likelihood, divergence)
