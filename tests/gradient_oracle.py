"""Exact gradients in python-flint's `arb`, and the scales that their errors are measured against.

Every function takes rows of one distribution each, reads their values as they are and returns
{argument: (gradient, scale, underflow)} in float64, by the formulas of the docstrings of
`klfast.grad`; the last is what a probability that may count as 0 is multiplied by.
"""

from __future__ import annotations

import numpy as np
from flint import arb, ctx

from oracle import VARIANCE

BITS = 256
MINUS_INFINITY = float("-inf")


def _numbers(*columns):
    ctx.prec = BITS
    return [[arb(float(x)) for x in column] for column in columns]


def _arrays(**columns):
    found = {}
    for name, (gradient, scale, *rest) in columns.items():
        underflow = rest[0] if rest else [arb(1)] * len(scale)
        listed = (gradient, scale, underflow)
        found[name] = tuple(np.array([float(x.mid()) for x in column]) for column in listed)
    return found


def _distance(kl):
    """KL + √(2 KL), which bounds E_P |log(P/Q)|, and √(2 KL)."""
    root = (2 * abs(kl.mid())).sqrt()
    return abs(kl.mid()) + root, root


def kl_discrete(p, q, *, normalize=True):
    """Gradients for weights that are positive, or 0 on both sides or in p."""
    x, y = _numbers(p, q)
    zero, one = arb(0), arb(1)
    if normalize:
        sum_p, sum_q = sum(x, zero), sum(y, zero)
        x, y = [a / sum_p for a in x], [b / sum_q for b in y]
    log = [(a / b).log() if a > 0 else None for a, b in zip(x, y, strict=True)]
    if not normalize:
        by_p = [zero if r is None else r + 1 for r in log]
        by_q = [-a / b if b > 0 else zero for a, b in zip(x, y, strict=True)]
        scale_p = [one if r is None else abs(r) + 1 for r in log]
        return _arrays(p=(by_p, scale_p), q=(by_q, [abs(g) for g in by_q]))
    kl = sum((a * r for a, r in zip(x, log, strict=True) if r is not None), zero)
    total, root = _distance(kl)
    by_p = [zero if r is None else (r - kl) / sum_p for r in log]
    scale_p = [one if r is None else (abs(r) + total) / sum_p for r in log]
    ratio = [a / b if b > 0 else None for a, b in zip(x, y, strict=True)]
    by_q = [zero if t is None else (1 - t) / sum_q for t in ratio]
    scale_q = [one if t is None else (abs(1 - t) + t * root) / sum_q for t in ratio]
    found = _arrays(p=(by_p, scale_p), q=(by_q, scale_q))
    found["p"][0][(np.asarray(p) == 0) & (np.asarray(q) > 0)] = -np.inf
    return found


def kl_categorical(logits_p, logits_q, *, temperature=1.0):
    """Gradients for logits, −inf on both sides or in p."""
    ctx.prec = BITS
    t, zero = arb(float(temperature)), arb(0)

    def softmax(logits):
        scaled = [None if x == MINUS_INFINITY else arb(float(x)) / t for x in logits]
        weights = [zero if x is None else x.exp() for x in scaled]
        total = sum(weights, zero)
        logs = [None if x is None else x - total.log() for x in scaled]
        return [w / total for w in weights], logs

    p, log_p = softmax(logits_p)
    q, log_q = softmax(logits_q)
    log = [None if a is None else a - b for a, b in zip(log_p, log_q, strict=True)]
    kl = sum((a * r for a, r in zip(p, log, strict=True) if r is not None), zero)
    total, root = _distance(kl)
    root = root if root < 1 else arb(1)
    off = [zero if r is None else abs(r - kl) / t for r in log]
    return _arrays(
        logits_p=(
            [zero if r is None else a * (r - kl) / t for a, r in zip(p, log, strict=True)],
            [a * (x + total / t) for a, x in zip(p, off, strict=True)],
            [x + total / t for x in off],
        ),
        logits_q=(
            [(b - a) / t for a, b in zip(p, q, strict=True)],
            [(abs(b - a) + b * root) / t for a, b in zip(p, q, strict=True)],
            [1 / t] * len(p),
        ),
    )


def kl_normal(loc_p, loc_q=None, **spreads):
    """Gradients for means and spreads; no loc_q: Q is N(0, I)."""
    if loc_q is None:
        loc_q = spreads["logvar_q"] = np.zeros_like(loc_p)
    (name_p, spread_p), (name_q, spread_q) = sorted(spreads.items(), key=lambda item: item[0][-1])
    least = 0 if name_p[:-2] == name_q[:-2] else arb(1e-7)
    columns = {name: [] for name in ("loc_p", name_p, "loc_q", name_q)}
    scales = {name: [] for name in columns}
    through = {"scale": lambda x: x, "var": lambda x: 2 * x, "logvar": lambda x: arb(2)}
    for m_p, s, m_q, u in zip(*_numbers(loc_p, spread_p, loc_q, spread_q), strict=True):
        var_q, m = VARIANCE[name_q[:-2]](u), m_p - m_q
        t = VARIANCE[name_p[:-2]](s) / var_q - 1
        square = m * m / var_q
        size = abs(t) if abs(t) > least else least
        by_p, by_q = through[name_p[:-2]](s), through[name_q[:-2]](u)
        for name, value, scale in (
            ("loc_p", m / var_q, abs(m / var_q)),
            ("loc_q", -m / var_q, abs(m / var_q)),
            (name_p, t / by_p, size / abs(by_p)),
            (name_q, -(t + square) / by_q, (size + square) / by_q),
        ):
            columns[name].append(value)
            scales[name].append(scale)
    return _arrays(**{name: (columns[name], scales[name]) for name in columns})
