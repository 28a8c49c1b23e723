"""High-precision oracles: what each function should return, to the last digit of a double.

python-flint's `arb` computes with rigorous error balls; the precision is doubled until the ball is
smaller than a double's rounding. Every oracle takes arrays of shape (..., K), reads their values as
they are (no rounding) and returns two float64 arrays of shape (...): the value, and the scale its
error is measured against (the value itself, unless terms of both signs cancel by definition).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flint import arb, ctx

FIRST_BITS, LAST_BITS, WANTED_BITS = 256, 4096, 64


def _accurate(compute: Callable[[], tuple[arb, arb]]) -> tuple[float, float]:
    """Run `compute` with ever more bits until value and scale are good for a double."""
    bits = FIRST_BITS
    while True:
        ctx.prec = bits
        results = compute()
        good = all(x.rel_accuracy_bits() >= WANTED_BITS or x.is_zero() for x in results)
        if good or bits >= LAST_BITS:  # a ball that still contains 0 at 4096 bits is 0
            return tuple(0.0 if x.contains(0) else float(x.mid()) for x in results)
        bits *= 4


def _by_row(row_function, *arrays, core=1):
    """Apply `row_function` to the broadcast rows of `arrays`."""
    arrays = [np.asarray(a) for a in arrays]
    batch = np.broadcast_shapes(*[a.shape[: a.ndim - core] for a in arrays])
    rows = [np.broadcast_to(a, batch + a.shape[a.ndim - core :]) for a in arrays]
    value, scale = np.empty(batch), np.empty(batch)
    for index in np.ndindex(batch):
        value[index], scale[index] = row_function(
            *[r[index].astype(np.float64).tolist() for r in rows]
        )
    return value, scale


def kl_discrete(p, q, *, normalize=True):
    """KL of the rows of p and q."""

    def row(p, q):
        if any(x and not y for x, y in zip(p, q, strict=True)):
            return np.inf, np.inf
        if p == q:
            return 0.0, 0.0
        return _accurate(lambda: normalised(p, q) if normalize else raw(p, q))

    def sums(p, q):
        pairs = [(arb(x), arb(y)) for x, y in zip(p, q, strict=True) if x]
        terms = [x * (x / y).log() for x, y in pairs]
        return terms, sum(map(arb, p), arb(0)), sum(map(arb, q), arb(0))

    def normalised(p, q):
        terms, total_p, total_q = sums(p, q)
        kl = sum(terms, arb(0)) / total_p - (total_p / total_q).log()
        return kl, kl

    def raw(p, q):
        terms, total_p, total_q = sums(p, q)
        kl = sum(terms, arb(0))
        generalised = kl - total_p + total_q
        with_sums = generalised + abs(total_p - total_q)
        absolute = sum(map(abs, terms), arb(0))
        return kl, absolute if absolute < with_sums else with_sums

    return _by_row(row, p, q)


def kl_categorical(logits_p, logits_q, *, temperature=1.0):
    """KL of the softmax of the rows; −inf in both is a mask."""

    def row(a, b, temperature):
        if any(x != -np.inf and y == -np.inf for x, y in zip(a, b, strict=True)):
            return np.inf, np.inf
        if a == b:
            return 0.0, 0.0
        return _accurate(lambda: softmax_kl(a, b, arb(temperature[0])))

    def softmax_kl(a, b, t):
        pairs = [(arb(x) / t, arb(y) / t) for x, y in zip(a, b, strict=True) if x != -np.inf]
        weights = [x.exp() for x, _ in pairs]
        total_p = sum(weights, arb(0))
        total_q = sum(((arb(y) / t).exp() for y in b if y != -np.inf), arb(0))
        cross = sum((w * (x - y) for w, (x, y) in zip(weights, pairs, strict=True)), arb(0))
        kl = cross / total_p - total_p.log() + total_q.log()
        return kl, kl

    return _by_row(
        row, logits_p, logits_q, np.asarray(temperature, dtype=np.float64)[..., np.newaxis]
    )


VARIANCE = {"scale": lambda x: x * x, "var": lambda x: x, "logvar": lambda x: x.exp()}


def kl_normal(loc_p, loc_q=None, **spreads):
    """KL of diagonal Gaussians; `spreads` are two of scale_p, var_p, logvar_p, scale_q, …, or one
    and no loc_q: Q is N(0, I)."""
    if loc_q is None:
        loc_q = spreads["logvar_q"] = np.zeros_like(loc_p)
    (name_p, spread_p), (name_q, spread_q) = sorted(spreads.items(), key=lambda item: item[0][-1])
    variance_p, variance_q = VARIANCE[name_p[:-2]], VARIANCE[name_q[:-2]]

    def row(mean_p, spread_p, mean_q, spread_q):
        if (mean_p, name_p[:-1], spread_p) == (mean_q, name_q[:-1], spread_q):
            return 0.0, 0.0
        return _accurate(lambda: total(mean_p, spread_p, mean_q, spread_q))

    def total(*columns):
        kl = arb(0)
        for mean_p, s, mean_q, t in zip(*columns, strict=True):
            var_q = variance_q(arb(t))
            ratio = variance_p(arb(s)) / var_q
            kl += ratio - 1 - ratio.log() + (arb(mean_p) - arb(mean_q)) ** 2 / var_q
        return kl / 2, kl / 2

    return _by_row(row, loc_p, spread_p, loc_q, spread_q)


def kl_mvn(loc_p, loc_q, *, scale_tril_p, scale_tril_q):
    """KL of Gaussians given by lower factors, by forward substitution."""

    def item(p, q):
        if p == q:
            return 0.0, 0.0
        return _accurate(lambda: solved(p, q))

    def solved(p, q):
        factor_p, factor_q = ([[arb(x) for x in line[:-1]] for line in m] for m in (p, q))
        shift = [arb(x[-1]) - arb(y[-1]) for x, y in zip(p, q, strict=True)]
        size = len(p)
        kl = arb(-size)
        columns = [[factor_p[i][j] if i >= j else arb(0) for i in range(size)] for j in range(size)]
        for column in [*columns, shift]:
            for i in range(size):
                column[i] -= sum((factor_q[i][k] * column[k] for k in range(i)), arb(0))
                column[i] /= factor_q[i][i]
                kl += column[i] ** 2
        for i in range(size):
            kl -= 2 * (factor_p[i][i] / factor_q[i][i]).log()
        return kl / 2, kl / 2

    def augmented(factor, loc):
        """Put loc beside its factor, so that one array holds a distribution: (..., D, D + 1)."""
        factor, loc = np.asarray(factor), np.asarray(loc)[..., np.newaxis]
        batch = np.broadcast_shapes(factor.shape[:-2], loc.shape[:-2])
        parts = [np.broadcast_to(a, batch + a.shape[-2:]) for a in (np.tril(factor), loc)]
        return np.concatenate(parts, axis=-1)

    return _by_row(item, augmented(scale_tril_p, loc_p), augmented(scale_tril_q, loc_q), core=2)
