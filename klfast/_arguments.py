"""Manners: what every public function does with its arguments before and after the gufunc.

The common case (ndarrays of one floating dtype, right shapes, no options) pays a check of types and
nothing else: `_kernels.plain`, before anything is packed for the long way. Such arrays of one shape
with options pay a `look`: what converts and broadcasts takes longer than a small kernel.
Everything that is refused is refused before the gufunc writes anything, by an error that names the
argument, what came and what was wanted; shapes are looked at only after the gufunc refused them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klfast import _kernels

FLOATS = frozenset("efd")
BFLOAT16_BITS = np.dtype([("bfloat16", np.uint16)])  # for those who have bfloat16 without ml_dtypes


def gufunc_for(name: str, arrays: Mapping[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The gufunc and its operands, NumPy arrays or lazy ones, of one dtype it has a loop for."""
    operands = [as_array(argument, x) for argument, x in arrays.items()]
    dtype = common_dtype(operands)
    if is_bfloat16(dtype):
        return _kernels.gufuncs[name + "_bfloat16"], [x.view(np.uint16) for x in operands]
    return _kernels.gufuncs[name], [
        x.astype(dtype) if getattr(x, "dtype", dtype) != dtype else x for x in operands
    ]


def look(operands: Sequence[Any]) -> tuple[bool, bool]:
    """Whether all are ndarrays of one floating dtype, so that there is nothing to convert; and, if
    so, whether of one shape, so that there is nothing to broadcast."""
    first = operands[0]
    if type(first) is not np.ndarray or first.dtype.char not in FLOATS:
        return False, False
    dtype, shape, alike = first.dtype, first.shape, True
    for x in operands:
        if type(x) is not np.ndarray or x.dtype != dtype:
            return False, False
        alike = alike and x.shape == shape
    return True, alike


def as_array(argument: str, x: Any) -> Any:
    """An ndarray, a lazy array (Dask) or a Python scalar; TypeError for what is not taken."""
    if type(x) is np.ndarray and x.dtype.char in FLOATS:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{argument} is a masked array, which klfast does not take: mark masked entries by "
            "weight 0 (logit -inf) on both sides, or pass .filled(...)"
        )
    if isinstance(x, (int, float)) and not isinstance(x, np.generic):
        return x
    array = x if is_lazy(x) else _to_numpy(argument, x)
    if not is_bfloat16(array.dtype) and array.dtype.char not in "efd?bBhHiIlLqQ":
        raise TypeError(
            f"{argument} has dtype {array.dtype}; wanted float16, bfloat16, float32, float64, "
            "an integer type or bool"
        )
    return array


def common_dtype(operands: Sequence[Any]) -> np.dtype[Any]:
    """NumPy's promotion; integers go to float64, and bfloat16 among others to float32 first."""
    dtypes = [_dtype_of(x) for x in operands]
    arrays = [d for d in dtypes if isinstance(d, np.dtype)]
    if len(set(arrays)) == 1 and arrays[0].char in FLOATS and arrays[0].isnative:
        return arrays[0]
    halves = [is_bfloat16(d) for d in arrays]
    if arrays and all(halves) and not any(is_lazy(x) or np.isscalar(x) for x in operands):
        return arrays[0]
    wide: list[Any] = [
        np.dtype(np.float32) if isinstance(d, np.dtype) and is_bfloat16(d) else d for d in dtypes
    ]
    common = np.result_type(*wide)
    return np.dtype(np.float64) if common.kind in "biu" else common


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether it is bfloat16, which is no dtype of NumPy's own: ml_dtypes', or bits that say so."""
    return dtype.kind == "V" and (dtype.name == "bfloat16" or dtype == BFLOAT16_BITS)


def _dtype_of(x: Any) -> Any:
    """A dtype, or the Python scalar itself, whose dtype bends to the others'."""
    return x.dtype if hasattr(x, "dtype") else x


def is_lazy(x: Any) -> bool:
    return hasattr(x, "__array_ufunc__") and hasattr(x, "dask")


def _to_numpy(argument: str, x: Any) -> NDArray[Any]:
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} cannot be made an array: {error}") from error


def check_base(base: Any) -> float:
    """log(base), by which nats are divided."""
    if not isinstance(base, (int, float, np.floating, np.integer)) or isinstance(base, bool):
        raise TypeError(f"base must be a number, got {type(base).__name__}")
    value = float(base)
    if not 0 < value < math.inf or value == 1:
        raise ValueError(f"base must be a positive finite number other than 1, got {base}")
    return math.log(value)


def only_one(side: str, **spreads: Any) -> tuple[str, Any]:
    """Which one of the alternatives was given for this side, and its value."""
    given = [kind for kind, value in spreads.items() if value is not None]
    if len(given) != 1:
        wanted = ", ".join(f"{kind}_{side}" for kind in spreads)
        got = " and ".join(f"{kind}_{side}" for kind in given) or "none of them"
        raise TypeError(f"wanted exactly one of {wanted}, got {got}")
    return given[0], spreads[given[0]]


def only_out(out: Any) -> Any:
    """NumPy takes a tuple of one, too."""
    return out[0] if isinstance(out, tuple) and len(out) == 1 else out


def check_out(out: Any, operands: Sequence[Any], *, keepdims: bool = False, axis: int = -1) -> Any:
    """The array the gufunc writes to: `out`, without the axis that keepdims leaves in."""
    if any(map(is_lazy, operands)):
        raise TypeError("out cannot be filled from lazy arrays: compute these first")
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a numpy.ndarray, got {type(out).__name__}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; wanted a writeable array")
    if not keepdims:
        return out
    if out.ndim == 0 or not -out.ndim <= axis < out.ndim or out.shape[axis] != 1:
        raise ValueError(
            f"out has shape {out.shape}; with keepdims=True wanted length 1 along axis {axis}"
        )
    return out.squeeze(axis)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def reduce(
    name: str,
    arrays: Mapping[str, Any],
    *,
    extra: tuple[Any, ...] = (),
    fit: Callable[[Any, Any], Mapping[str, Any]] | None = None,
    axis: int = -1,
    keepdims: bool = False,
    base: float | None = None,
    out: Any = None,
) -> Any:
    """Call the gufunc `name` over one core axis of `arrays`; `extra` operands have no core axis.
    `fit`: given arrays of several shapes and the axis, broadcasts beyond what the gufunc does."""
    log_base, out = None if base is None else check_base(base), only_out(out)
    gufunc, operands = _kernels.gufuncs[name], list(arrays.values())
    ready, alike = look(operands)
    if fit is not None and not alike:
        arrays = fit(arrays, axis)
        operands = list(arrays.values())
        ready, alike = look(operands)
    if not ready:
        gufunc, operands = gufunc_for(name, arrays)
    axis = check_axis(axis, arrays, operands)
    target = None
    if out is not None:
        target = check_out(out, operands, keepdims=keepdims, axis=axis)
    moved = operands if axis == -1 else [_axis_last(x, axis) for x in operands]
    inputs = [*moved, *extra]
    if alike and (not extra or type(extra[0]) is float):
        batch = moved[0].shape[:-1]
    else:
        batch = common_batch(gufunc, inputs)
    if target is not None and batch is not None and target.shape != batch:
        # the gufunc would broadcast its result to a larger one
        raise ValueError(f"out has shape {out.shape}; wanted the batch shape {batch}")
    try:
        if not ready and any(map(is_lazy, operands)):
            result = gufunc(*inputs)
        else:
            result = call(gufunc, inputs, batch, target)
    except (ValueError, TypeError) as error:
        raise explain(error, list(arrays), operands, extra, axis, out) from None
    if log_base is not None:
        result = np.divide(result, log_base, out=target) if out is not None else result / log_base
    if out is not None:
        return out
    return _with_axis(result, axis) if keepdims else result


def check_axis(axis: Any, arrays: Mapping[str, Any], operands: Sequence[Any]) -> int:
    try:
        axis = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {type(axis).__name__}") from None
    for i, x in enumerate(operands):
        ndim = getattr(x, "ndim", 0)
        if not -ndim <= axis < ndim:
            raise np.exceptions.AxisError(axis, ndim, [*arrays][i])
    return int(axis)


def _axis_last(x: Any, axis: int) -> Any:
    axis %= x.ndim
    if axis == x.ndim - 1:
        return x
    return x.transpose([*range(axis), *range(axis + 1, x.ndim), axis])


def _with_axis(result: Any, axis: int) -> Any:
    """The result with length 1 along the axis that it was reduced over."""
    axis %= result.ndim + 1
    return result[(slice(None),) * axis + (None,)]


def common_batch(gufunc: Any, operands: Sequence[Any]) -> tuple[int, ...] | None:
    """The shape to which the batch axes broadcast; None where they do not. Mostly all have the same
    or none."""
    shapes = set()
    for x, core in zip(operands, _kernels.core_axes(gufunc), strict=True):
        shape = getattr(x, "shape", ())
        if len(shape) > core:
            shapes.add(shape[: len(shape) - core])
    if len(shapes) < 2:
        return shapes.pop() if shapes else ()
    try:
        return np.broadcast_shapes(*shapes)
    except (ValueError, TypeError):  # TypeError: lazy arrays whose shape is not known yet
        return None


def call(
    gufunc: Any, operands: Sequence[Any], batch: tuple[int, ...] | None, out: Any = None
) -> Any:
    """The gufunc; `batch` as of `common_batch`.

    NumPy calls a gufunc's loop once for every innermost batch axis, and threads share one call at a
    time. So two batch axes that do not lie as one, as those of a broadcast (M, 1, K) against
    (1, N, K), are given to it as core axes.
    """
    if batch is None or len(batch) < 2:
        return gufunc(*operands, out=out)
    cores = _kernels.core_axes(gufunc)
    if _lie_as_one(operands, cores, batch):
        return gufunc(*operands, out=out)
    full = [_broadcast(x, core, batch) for x, core in zip(operands, cores, strict=True)]
    return _kernels.grid(gufunc)(*full, out=out)


def _lie_as_one(operands: Sequence[Any], cores: Sequence[int], batch: tuple[int, ...]) -> bool:
    """Whether the last two batch axes of every operand can be walked as one."""
    lines, rows = batch[-2:]
    if lines == 1 or rows == 1:
        return True
    for x, core in zip(operands, cores, strict=True):
        own = getattr(x, "ndim", 0) - core
        if own > 0:  # else one for the whole batch
            if x.shape[:own] != batch:
                x, own = _broadcast(x, core, batch), len(batch)
            if x.strides[own - 2] != rows * x.strides[own - 1]:
                return False
    return True


def _broadcast(x: Any, core: int, batch: tuple[int, ...]) -> NDArray[Any]:
    """The operand with all batch axes."""
    shape = np.shape(x)
    return np.broadcast_to(x, batch + shape[len(shape) - core :])


def explain(
    error: Exception,
    names: Sequence[str],
    operands: Sequence[Any],
    extra: Sequence[Any],
    axis: int,
    out: Any,
) -> Exception:
    """The error to raise where the gufunc refused: it names arguments and shapes."""
    shapes = [np.shape(x) for x in operands]
    for argument, shape in zip(names, shapes, strict=True):
        if len(shape) == 0:
            return ValueError(f"{argument} is a scalar; wanted an array with at least one axis")
    listed = ", ".join(f"{n} {s}" for n, s in zip(names, shapes, strict=True))
    lengths = {s[axis] for s in shapes}
    if len(lengths) > 1:
        return ValueError(f"{' and '.join(names)} differ in length along axis {axis}: {listed}")
    try:
        batch = np.broadcast_shapes(*(_without(s, axis) for s in shapes), *map(np.shape, extra))
    except ValueError:
        also = "".join(f", temperature {np.shape(x)}" for x in extra)
        return ValueError(f"the batch axes of {listed}{also} do not broadcast together")
    if out is not None:
        return ValueError(
            f"out has shape {out.shape} and dtype {out.dtype}; wanted the batch shape {batch} and "
            f"a floating dtype that holds the result ({error})"
        )
    return error
