"""Row by row comparison of two arrays in slices, and the statistics of its outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Index = tuple[int | slice, ...]

# Large enough to keep every thread busy, small enough to answer Ctrl-C at once.
SLICE_VALUES = 1 << 22
QUANTILES = (0.9, 0.99, 0.999)
FLAGGED_SHOWN = 5


@dataclass(frozen=True)
class RowResults:
    """What is known of each row, in the shape of the batch."""

    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]


@dataclass(frozen=True)
class Flagged:
    """Rows that are counted apart: how many, and where the first ones are."""

    count: int
    first: list[list[int]]


@dataclass(frozen=True)
class WorstRow:
    """A row with a large finite divergence, and the top class of each side: the first of equals."""

    index: list[int]
    kl: float
    top1_p: int
    top1_q: int


@dataclass(frozen=True)
class Summary:
    """The facts about a comparison.

    Mean, standard error, quantiles, maximum and worst rows are those of the finite results. The
    agreement counts every row whose result is not NaN. NaN stands for what too few rows define.
    """

    rows: int
    classes: int
    finite_rows: int
    infinite_rows: Flagged
    nan_rows: Flagged
    mean: float
    standard_error: float
    median: float
    quantiles: dict[str, float]
    maximum: float
    top1_agreement: float
    top1_changed: int
    worst: list[WorstRow]


def row_slices(batch: tuple[int, ...], limit: int) -> Iterator[Index]:
    """Cut a batch into pieces of at most `limit` rows, in order, that index as views.

    Parameters
    ----------
    batch : tuple of int
        The shape of the array without its last axis.
    limit : int
        The number of rows, at least one.

    Yields
    ------
    tuple of int and slice
        An index of the array.
    """
    if math.prod(batch) <= limit:
        yield ()
        return
    step = limit // math.prod(batch[1:])
    if step:
        for start in range(0, batch[0], step):
            yield (slice(start, start + step),)
    else:
        for entry in range(batch[0]):
            for rest in row_slices(batch[1:], limit):
                yield (entry, *rest)


def compare_rows(
    p: Array,
    q: Array,
    divergence: Callable[[Array, Array], Array],
    advance: Callable[[int], object] = lambda rows: None,
) -> RowResults:
    """Compare two arrays row by row, a bounded slice at a time.

    Parameters
    ----------
    p, q : ndarray, shape (..., K)
        The sides, of the same shape, memory-mapped perhaps.
    divergence : callable
        Gives the divergence of each row of a slice.
    advance : callable, optional
        Is told the number of rows done after each slice.

    Returns
    -------
    RowResults
        Of shape (...).
    """
    *batch, classes = p.shape
    results = RowResults(np.empty(batch), np.empty(batch, bool))
    for index in row_slices(tuple(batch), max(1, SLICE_VALUES // classes)):
        p_slice, q_slice = p[index], q[index]
        # Bad values come back as NaN rows, which the summary counts: a warning would say it twice.
        with np.errstate(invalid="ignore"):
            results.kl[index] = divergence(p_slice, q_slice)
        results.same_top[index] = p_slice.argmax(-1) == q_slice.argmax(-1)
        advance(p_slice.size // classes)
    return results


def summarise(p: Array, q: Array, results: RowResults, worst: int) -> Summary:
    """Give the facts about a comparison.

    Parameters
    ----------
    p, q : ndarray, shape (..., K)
        The sides that were compared.
    results : RowResults
        What `compare_rows` found.
    worst : int
        How many of the worst rows to name; among equals the first ones.

    Returns
    -------
    Summary
    """
    is_nan, is_infinite = np.isnan(results.kl), np.isinf(results.kl)
    finite = results.kl[~is_nan & ~is_infinite]
    agreeing = results.same_top[~is_nan]
    mean, standard_error = mean_and_error(finite)
    median, *quantiles = (
        np.quantile(finite, (0.5, *QUANTILES)).tolist()
        if finite.size
        else [math.nan] * (1 + len(QUANTILES))
    )
    return Summary(
        rows=results.kl.size,
        classes=p.shape[-1],
        finite_rows=finite.size,
        infinite_rows=_flagged(is_infinite),
        nan_rows=_flagged(is_nan),
        mean=mean,
        standard_error=standard_error,
        median=median,
        quantiles={str(level): x for level, x in zip(QUANTILES, quantiles, strict=True)},
        maximum=float(finite.max()) if finite.size else math.nan,
        top1_agreement=float(agreeing.mean()) if agreeing.size else math.nan,
        top1_changed=int(np.count_nonzero(~agreeing)),
        worst=_worst_rows(p, q, results.kl, min(worst, finite.size)),
    )


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Give the mean and its standard error; NaN where there are too few values."""
    # Divergences of huge logits may overflow here: an infinite mean is then the honest answer.
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(values.mean()) if values.size else math.nan
        error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan
    return mean, error


def _flagged(mask: NDArray[np.bool_]) -> Flagged:
    return Flagged(int(np.count_nonzero(mask)), np.argwhere(mask)[:FLAGGED_SHOWN].tolist())


def _worst_rows(p: Array, q: Array, kl: NDArray[np.float64], count: int) -> list[WorstRow]:
    if not count:
        return []
    descending = np.argsort(np.where(np.isfinite(kl), -kl, np.inf), axis=None, kind="stable")
    positions = [np.unravel_index(row, kl.shape) for row in descending[:count]]
    return [
        WorstRow([int(i) for i in at], float(kl[at]), int(p[at].argmax()), int(q[at].argmax()))
        for at in positions
    ]
