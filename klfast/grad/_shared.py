"""Manners of the gradients: `wrt`, `cotangent`, `out`, and arguments that are broadcast.

A gradient has the shape of its argument: what broadcasting repeated is summed back, in double, slab
by slab, so that no temporary has the broadcast size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from klfast import _kernels
from klfast._arguments import (
    as_array,
    check_axis,
    check_base,
    common_dtype,
    explain,
    is_bfloat16,
    is_lazy,
)

SLAB = 1 << 18  # elements of one argument whose gradients are summed back at a time
ONE = np.array(1.0)


def check_wrt(wrt: Any, given: Sequence[str]) -> tuple[str, ...]:
    """The names of the arguments whose gradients are wanted, in order; None: all given."""
    if wrt is None:
        return tuple(given)
    if not isinstance(wrt, (str, Sequence)) or not all(isinstance(name, str) for name in wrt):
        raise TypeError(f"wrt must be a name or a sequence of names, got {wrt!r}")
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    if not names:
        raise ValueError(f"wrt is empty; wanted at least one of {', '.join(given)}")
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


def call_plainly(
    name: str, operands: Sequence[Any], wanted: int, cotangent: Any, *extra: Any
) -> tuple[Any, ...] | None:
    """The gufunc's results where operands of one dtype and shape can go to it as they are; None
    where something needs a look. `wanted` as in `_kernels.gradients`."""
    first = operands[0]
    if type(first) is not np.ndarray or first.ndim == 0 or first.dtype.char not in "fd":
        return None
    shape, dtype = first.shape, first.dtype
    for x in operands:
        if type(x) is not np.ndarray or x.shape != shape or x.dtype != dtype:
            return None
    if cotangent is None:
        cotangent = ONE
    elif type(cotangent) is not float and not (
        type(cotangent) is np.ndarray
        and cotangent.dtype.char in "fd"
        and cotangent.shape == shape[:-1]
    ):
        return None
    for x in extra:
        if type(x) is not float and x.ndim:
            return None
    results: tuple[Any, ...] = _kernels.gradients(name, wanted)(*operands, *extra, cotangent)
    return results


def in_order(names: Sequence[str], wrt: Sequence[str]) -> int:
    """The bits of the wanted among the names, or 0 where they come in another order."""
    places = [names.index(argument) for argument in wrt]
    return sum(1 << i for i in places) if places == sorted(places) else 0


def gradients(
    name: str,
    arrays: Mapping[str, Any],
    wrt: Sequence[str],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    cores: Sequence[int],
    layout: Callable[[Any], Any] = lambda x: x,
    extra: tuple[Any, ...] = (),
    cotangent: Any = None,
    unit: float = 1.0,
    out: Any = None,
) -> tuple[Any, ...]:
    """
    (value, *gradients) of the kernel `name`, both divided by `unit`.

    `arrays`: the kernel's operands in order, of one dtype, their core axes, as many as `cores`
    says, last. `shapes`: of the arguments, which are those of the gradients; `layout` makes an
    array of that shape a view that lies as the operand does. `extra`: operands between arrays and
    cotangent.
    """
    names, operands = list(arrays), list(arrays.values())
    batches = [x.shape[: x.ndim - core] for x, core in zip(operands, cores, strict=True)]
    batch = np.broadcast_shapes(*batches, *map(np.shape, extra))
    dtype = np.dtype(np.float64 if operands[0].dtype == np.float64 else np.float32)
    results = check_out(out, [(argument, shapes[argument]) for argument in wrt], dtype)
    scaled = np.asarray(check_cotangent(cotangent, batch) / unit)
    inputs = [*operands, *map(np.asarray, extra), scaled]
    if out is not None:  # rows are read again after their gradients were begun
        inputs = [
            x.copy() if any(np.may_share_memory(x, y) for y in results) else x for x in inputs
        ]
    wanted = sorted(names.index(argument) for argument in wrt)
    gufunc = _kernels.gradients(name, sum(1 << i for i in wanted))
    targets, full = [], []
    for i in wanted:
        rank = operands[i].ndim - cores[i]
        full.append((*batch, *operands[i].shape[rank:]))
        target = layout(results[wrt.index(names[i])])
        targets.append(target[(None,) * (len(full[-1]) - target.ndim)])
    if all(target.shape == shape for target, shape in zip(targets, full, strict=True)):
        value = _in_one(gufunc, inputs, cores, targets, batch)
    else:
        value = np.empty(batch, dtype)
        inner = [*cores, *(0 for _ in extra), 0], [cores[i] for i in wanted]
        sum_back(gufunc, inputs, inner[0], value, targets, full, inner[1])
        value = value[()]
    return (value if unit == 1 else value / value.dtype.type(unit), *results)


def _in_one(
    gufunc: Any,
    inputs: Sequence[Any],
    cores: Sequence[int],
    targets: Sequence[Any],
    batch: tuple[int, ...],
) -> Any:
    """The value; arrays without gaps go as one batch axis, which threads share."""
    arrays = [*inputs[: len(cores)], *targets]
    rank = len(batch)
    if rank < 2 or not all(x.flags.c_contiguous and x.shape[:rank] == batch for x in arrays):
        return gufunc(*inputs, out=(None, *targets))[0]
    flat = [x.reshape(math.prod(batch), *x.shape[rank:]) for x in arrays]
    extra = [np.broadcast_to(x, batch).reshape(-1) if x.ndim else x for x in inputs[len(cores) :]]
    outs = (None, *flat[len(cores) :])
    return gufunc(*flat[: len(cores)], *extra, out=outs)[0].reshape(batch)


def along_axis(
    name: str,
    arrays: Mapping[str, Any],
    wrt: Sequence[str],
    *,
    axis: int,
    extra: tuple[Any, ...] = (),
    base: float | None = None,
    cotangent: Any,
    out: Any,
) -> tuple[Any, ...]:
    """For the families that sum over one axis."""
    wanted = in_order(tuple(arrays), wrt)
    if wanted and axis == -1 and base is None and out is None:
        results = call_plainly(name, tuple(arrays.values()), wanted, cotangent, *extra)
        if results is not None:
            return results
    unit = 1.0 if base is None else check_base(base)
    name, operands = same_dtype(name, arrays)
    axis = check_axis(axis, operands, list(operands.values()))

    def layout(x: Any) -> Any:
        return x if axis == -1 else np.moveaxis(x, axis, -1)

    moved = {argument: layout(x) for argument, x in operands.items()}
    try:
        return gradients(
            name,
            moved,
            wrt,
            shapes={argument: x.shape for argument, x in operands.items()},
            cores=[1] * len(moved),
            layout=layout,
            extra=extra,
            cotangent=cotangent,
            unit=unit,
            out=out,
        )
    except ValueError as error:
        raise _explain(error, operands, extra, axis) from None


def _explain(
    error: ValueError, operands: Mapping[str, Any], extra: Sequence[Any], axis: int
) -> Exception:
    """The error to raise: it names arguments where their shapes do not fit."""
    lengths = {x.shape[axis] for x in operands.values()}
    batches = [np.delete(x.shape, axis) for x in operands.values()]
    try:
        np.broadcast_shapes(*map(tuple, batches), *map(np.shape, extra))
    except ValueError:
        pass
    else:
        if len(lengths) == 1:
            return error
    return explain(error, list(operands), list(operands.values()), extra, axis, None)


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


def check_out(
    out: Any, wanted: Sequence[tuple[str, tuple[int, ...]]], dtype: np.dtype[Any]
) -> list[Any]:
    """One array a gradient: those given in `out`, new ones for None."""
    given = [None] * len(wanted) if out is None else out
    if not isinstance(given, (tuple, list)) or len(given) != len(wanted):
        raise TypeError(f"out must be a tuple of {len(wanted)} arrays or None, one a gradient")
    results = []
    for (argument, shape), x in zip(wanted, given, strict=True):
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


def sum_back(
    gufunc: Any,
    inputs: Sequence[Any],
    input_cores: Sequence[int],
    value: Any,
    targets: Sequence[Any],
    full: Sequence[tuple[int, ...]],
    cores: Sequence[int],
) -> None:
    """Fill value and targets slab by slab; `full`: the shapes of the gradients before they are
    summed to the targets'."""
    totals = [
        None if target.shape == shape else np.zeros(target.shape)
        for target, shape in zip(targets, full, strict=True)
    ]
    largest = max(math.prod(shape[value.ndim :]) for shape in full)
    for slab in _slabs(value.shape, max(1, SLAB // max(1, largest))):
        part = value[slab]
        outs = [
            _part(target, slab, core)
            if total is None
            else np.empty((*part.shape, *shape[value.ndim :]), target.dtype)
            for target, total, shape, core in zip(targets, totals, full, cores, strict=True)
        ]
        cut = (_part(x, slab, core) for x, core in zip(inputs, input_cores, strict=True))
        gufunc(*cut, out=(part, *outs))
        for x, total, core in zip(outs, totals, cores, strict=True):
            if total is not None:
                into = _part(total, slab, core)
                axes = tuple(i for i, n in enumerate(into.shape) if n != x.shape[i])
                into += np.add.reduce(x, axis=axes, dtype=np.float64, keepdims=True)
    for target, total in zip(targets, totals, strict=True):
        if total is not None:
            target[...] = total
