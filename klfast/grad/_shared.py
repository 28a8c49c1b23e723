"""Manners of the gradients: `wrt`, `cotangent`, `out`, and arguments that are broadcast.

A gradient has the shape of its argument: what broadcasting repeated is summed back, in double, slab
by slab, so that no temporary has the broadcast size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from klfast import _kernels
from klfast._arguments import as_array, common_dtype, is_bfloat16, is_lazy

SLAB = 1 << 18  # elements of one argument whose gradients are summed back at a time
ONE = np.array(1.0)


def check_wrt(wrt: Any, given: Sequence[str]) -> tuple[str, ...]:
    """The names of the arguments whose gradients are wanted, in order; None: all that were given."""
    if wrt is None:
        return tuple(given)
    if not isinstance(wrt, (str, Sequence)) or not all(isinstance(name, str) for name in wrt):
        raise TypeError(f"wrt must be a name or a sequence of names, got {wrt!r}")
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    for name in names:
        if name not in given:
            raise ValueError(f"wrt names {name!r}; wanted one of {', '.join(given)}")
    if len(set(names)) < len(names):
        raise ValueError(f"wrt names an argument twice: {', '.join(names)}")
    return names


def same_dtype(name: str, arrays: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kernel's name and arrays in memory of one dtype that it takes; bfloat16 as its bits."""
    operands = {argument: as_array(argument, x) for argument, x in arrays.items()}
    for argument, x in operands.items():
        if is_lazy(x):
            raise TypeError(f"{argument} is a lazy array; klfast.grad takes arrays in memory")
    dtype = common_dtype(list(operands.values()))
    if is_bfloat16(dtype):
        return name + "_bfloat16", {k: x.view(np.uint16) for k, x in operands.items()}
    return name, {k: np.asarray(x, dtype) for k, x in operands.items()}


def gradients(
    name: str,
    arrays: Mapping[str, Any],
    wrt: Sequence[str],
    *,
    cores: Sequence[int],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    axis: int = -1,
    extra: tuple[Any, ...] = (),
    cotangent: Any = None,
    scale: float = 1.0,
    out: Any = None,
) -> tuple[Any, ...]:
    """
    (value, *gradients) of the kernel `name`.

    `arrays`: all operands in the kernel's order, of one dtype, with their core axes, as many as
    `cores` says, last; `axis` is where the one core axis was, and belongs in the gradients. `shapes`:
    the arguments' own shapes where an operand is a view of a broadcast one; `extra`: operands between
    arrays and cotangent; `scale`: a factor of value and gradients.
    """
    operands = list(arrays.values())
    own = [np.shape(x) if shapes is None else shapes[k] for k, x in arrays.items()]
    batches = [x.shape[: x.ndim - core] for x, core in zip(operands, cores, strict=True)]
    batch = np.broadcast_shapes(*batches, *map(np.shape, extra))
    dtype = np.dtype(np.float64 if operands[0].dtype == np.float64 else np.float32)
    cotangent = check_cotangent(cotangent, batch)
    if scale != 1:
        cotangent = cotangent * scale
    names = list(arrays)
    wanted = sorted(names.index(argument) for argument in wrt)
    order = [names[i] for i in wanted]
    results = check_outs(out, wrt, [own[names.index(argument)] for argument in wrt], dtype, axis)
    targets = []
    for i in wanted:
        rank = len(batch) + cores[i]
        target = results[wrt.index(names[i])]
        if shapes is not None:  # broadcast before the axis was moved
            target = target[(None,) * (rank - target.ndim)]
        target = target if axis == -1 else np.moveaxis(target, axis, -1)
        targets.append(target[(None,) * (rank - target.ndim)])
    gufunc = _kernels.gradients(name, sum(1 << i for i in wanted))
    full = [(*batch, *operands[i].shape[operands[i].ndim - cores[i] :]) for i in wanted]
    inputs = [*operands, *extra, cotangent]
    if all(target.shape == shape for target, shape in zip(targets, full, strict=True)):
        value = gufunc(*inputs, out=(None, *targets)) if order else gufunc(*inputs)
    else:
        value = np.empty(batch, dtype)
        input_cores = [*cores, *(0 for _ in extra), 0]
        output_cores = [cores[i] for i in wanted]
        _sum_back(gufunc, batch, inputs, input_cores, value, targets, full, output_cores)
        value = value[()]
    return (value if scale == 1 else value * value.dtype.type(scale), *results)


def check_cotangent(cotangent: Any, batch: tuple[int, ...]) -> Any:
    """In double, of a shape that broadcasts to the batch."""
    if cotangent is None:
        return ONE
    cotangent = np.asarray(as_array("cotangent", cotangent), np.float64)
    try:
        np.broadcast_to(cotangent, batch)
    except ValueError:
        raise ValueError(
            f"cotangent has shape {cotangent.shape}; wanted one that broadcasts to that of the "
            f"result, {batch}"
        ) from None
    return cotangent


def check_outs(
    out: Any, wrt: Sequence[str], shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any], axis: int
) -> list[Any]:
    """One array a gradient: those given in `out`, new ones for None."""
    given = [None] * len(wrt) if out is None else out
    if not isinstance(given, (tuple, list)) or len(given) != len(wrt):
        raise TypeError(f"out must be a tuple of {len(wrt)} arrays or None, one a gradient")
    results = []
    for argument, shape, x in zip(wrt, shapes, given, strict=True):
        if x is None:
            x = np.empty(shape, dtype)
        if not isinstance(x, np.ndarray):
            raise TypeError(f"out for {argument} must be a numpy.ndarray, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"out for {argument} has shape {x.shape}; wanted {shape}")
        if x.dtype != dtype:
            raise TypeError(f"out for {argument} has dtype {x.dtype}; wanted {dtype}")
        if not x.flags.writeable:
            raise ValueError(f"out for {argument} is read-only; wanted a writeable array")
        results.append(x)
    return results


def _slabs(batch: tuple[int, ...], rows: int) -> Iterator[tuple[slice, ...]]:
    """Cut a batch into parts of at most `rows` distributions, in C order."""
    steps = []
    for length in reversed(batch):
        steps.append(max(1, min(length, rows)))
        rows //= steps[-1]
    starts = [range(0, n, step) for n, step in zip(batch, reversed(steps), strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(a, a + step) for a, step in zip(corner, reversed(steps), strict=True))


def _part(x: Any, slab: tuple[slice, ...], core: int) -> Any:
    """The slab of an array; all of it along axes that it is broadcast along."""
    rank = x.ndim - core
    lengths = x.shape[:rank]
    cuts = slab[len(slab) - rank :]
    return x[tuple(c if n != 1 else slice(None) for c, n in zip(cuts, lengths, strict=True))]


def _sum_back(
    gufunc: Any,
    batch: tuple[int, ...],
    inputs: Sequence[Any],
    input_cores: Sequence[int],
    value: Any,
    targets: Sequence[Any],
    full: Sequence[tuple[int, ...]],
    cores: Sequence[int],
) -> None:
    """Fill value and targets slab by slab."""
    totals = [
        None if target.shape == shape else np.zeros(target.shape)
        for target, shape in zip(targets, full, strict=True)
    ]
    largest = max(math.prod(shape[len(batch) :]) for shape in full)
    for slab in _slabs(batch, max(1, SLAB // max(1, largest))):
        part = value[slab]
        outs = [
            _part(target, slab, core)
            if total is None
            else np.empty((*part.shape, *shape[len(batch) :]), target.dtype)
            for target, total, shape, core in zip(targets, totals, full, cores, strict=True)
        ]
        gufunc(
            *(_part(x, slab, core) for x, core in zip(inputs, input_cores, strict=True)),
            out=(part, *outs),
        )
        for x, total, core in zip(outs, totals, cores, strict=True):
            if total is not None:
                into = _part(total, slab, core)
                axes = tuple(i for i, n in enumerate(into.shape) if n != x.shape[i])
                into += np.add.reduce(x, axis=axes, dtype=np.float64, keepdims=True)
    for target, total in zip(targets, totals, strict=True):
        if total is not None:
            target[...] = total
