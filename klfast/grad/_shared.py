"""What the gradients of all families share: which ones, the cotangent, sums over broadcast axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klfast._arguments import as_array, is_lazy

# Gradients of broadcast arguments are summed from slabs of about so many numbers.
SLAB = 2**17


def check_wrt(wrt: Any, names: Sequence[str]) -> list[int]:
    """The positions among the array arguments `names` that `wrt` names; None: all."""
    if wrt is None:
        return list(range(len(names)))
    wanted = [wrt] if isinstance(wrt, str) else list(wrt)
    for name in wanted:
        if name not in names:
            raise ValueError(f"wrt names {name!r}; wanted some of {', '.join(names)}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"wrt names an argument twice: {wrt!r}")
    return [names.index(name) for name in wanted]


def check_cotangent(cotangent: Any, batch: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The cotangent as an array of `dtype` that broadcasts against the result; None: ones."""
    if cotangent is None:
        return np.ones((), dtype)
    if is_lazy(cotangent):
        raise TypeError("cotangent is a lazy array, which klfast.grad does not take")
    array = np.asarray(as_array("cotangent", cotangent)).astype(dtype, copy=False)
    try:
        fits = np.broadcast_shapes(array.shape, batch) == batch
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"cotangent has shape {array.shape}; wanted one that broadcasts to the result's {batch}"
        )
    return array


def check_outs(
    out: Any, names: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]
) -> list[NDArray[Any] | None]:
    """One array or None for each gradient."""
    if out is None:
        return [None] * len(names)
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"out must be a tuple of {len(names)} arrays or None, one a gradient")
    for name, array, shape in zip(names, out, shapes, strict=True):
        if array is None:
            continue
        if not isinstance(array, np.ndarray):
            raise TypeError(f"out for {name} must be a numpy.ndarray, got {type(array).__name__}")
        if not array.flags.writeable:
            raise ValueError(f"out for {name} is read-only; wanted a writeable array")
        if array.shape != shape or not np.can_cast(dtype, array.dtype, "same_kind"):
            raise ValueError(
                f"out for {name} has shape {array.shape} and dtype {array.dtype}; "
                f"wanted {shape} and {dtype}"
            )
    return list(out)


def gradients(
    gufunc: Callable[..., Any],
    operands: Sequence[NDArray[Any]],
    cores: Sequence[int],
    cotangent: NDArray[Any],
    batch: tuple[int, ...],
    wanted: Sequence[int],
    outs: Sequence[NDArray[Any] | None],
) -> tuple[Any, ...]:
    """Divergence and gradients, each of its argument's shape; `cores` counts core axes.

    `wanted` are the positions of the arguments in the order of the gufunc's outputs. The gradients
    of arguments that were broadcast are summed in double, slab by slab.
    """
    whole = [operands[i].shape[: operands[i].ndim - cores[i]] == batch for i in wanted]
    if all(whole):
        results = gufunc(*operands, cotangent, out=(None, *outs))
        return results if wanted else (results,)
    dtype = operands[0].dtype
    value = np.empty(batch, dtype)
    totals = [
        _own(operands[i], out, operands, dtype) if direct else np.zeros(operands[i].shape)
        for i, direct, out in zip(wanted, whole, outs, strict=True)
    ]
    size = max(math.prod(x.shape[x.ndim - core :]) for x, core in zip(operands, cores, strict=True))
    for slab in _slabs(batch, max(1, SLAB // max(1, size))):
        inputs = [
            _part(x, slab, core).astype(np.float64, copy=False)
            for x, core in zip((*operands, cotangent), (*cores, 0), strict=True)
        ]
        parts = [_part(total, slab, cores[i]) for total, i in zip(totals, wanted, strict=True)]
        into = [part if direct else None for part, direct in zip(parts, whole, strict=True)]
        _, *grads = gufunc(*inputs, out=(value[slab], *into), casting="same_kind")
        for part, grad, direct in zip(parts, grads, whole, strict=True):
            if not direct:
                part += _sum_to(grad, part.shape)
    return value[()], *(_deliver(x, out, dtype) for x, out in zip(totals, outs, strict=True))


def _slabs(batch: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a batch into blocks of at most `most` items."""
    axis, inner = len(batch), 1
    while axis > 0 and inner * batch[axis - 1] <= most:
        axis -= 1
        inner *= batch[axis]
    whole = (slice(None),) * (len(batch) - axis)
    if axis == 0:
        yield whole
        return
    step = max(1, most // max(1, inner))
    for index in np.ndindex(batch[: axis - 1]):
        for begin in range(0, batch[axis - 1], step):
            yield (*(slice(i, i + 1) for i in index), slice(begin, begin + step), *whole)


def _part(x: NDArray[Any], slab: tuple[slice, ...], core: int) -> NDArray[Any]:
    """x in a slab of the batch; whole along axes that it lacks or is broadcast along."""
    axes = x.ndim - core
    along = slab[len(slab) - axes :]
    return x[
        tuple(s if n != 1 else slice(None) for s, n in zip(along, x.shape[:axes], strict=True))
    ]


def _sum_to(x: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """x, summed over the axes that `shape` lacks or has length 1 along."""
    lead = x.ndim - len(shape)
    axes = [i for i in range(x.ndim) if i < lead or shape[i - lead] == 1]
    total: NDArray[Any] = x.sum(axis=tuple(axes), keepdims=True).reshape(shape)
    return total


def _own(
    x: NDArray[Any], out: NDArray[Any] | None, operands: Sequence[NDArray[Any]], dtype: Any
) -> NDArray[Any]:
    """Where the gradient of x can be written while operands are still read."""
    if out is None or any(np.may_share_memory(out, y) for y in operands):
        return np.empty(x.shape, dtype)
    return out


def _deliver(total: NDArray[Any], out: NDArray[Any] | None, dtype: Any) -> NDArray[Any]:
    if out is None:
        return total.astype(dtype, copy=False)
    if total is not out:
        out[...] = total
    return out
