"""Manners: what every public function does with its arguments before and after the gufunc.

The common case (ndarrays of one floating dtype, right shapes, no options) pays a check of types and
nothing else: `_kernels.plain`, before anything is packed for the long way.
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
    operands = list(arrays.values())
    first = operands[0]
    if type(first) is np.ndarray and first.dtype.char in FLOATS:
        dtype = first.dtype
        for x in operands:
            if type(x) is not np.ndarray or x.dtype != dtype:
                break
        else:
            return _kernels.gufuncs[name], operands
    operands = [as_array(argument, x) for argument, x in arrays.items()]
    dtype = common_dtype(operands)
    if is_bfloat16(dtype):
        return _kernels.gufuncs[name + "_bfloat16"], [x.view(np.uint16) for x in operands]
    return _kernels.gufuncs[name], [
        x.astype(dtype) if _dtype_of(x) != dtype else x for x in operands
    ]


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


def check_out(out: Any, keepdims: bool = False, axis: int = -1) -> Any:
    """The array the gufunc writes to: `out`, without the axis that keepdims leaves in."""
    if isinstance(out, tuple) and len(out) == 1:
        out = out[0]
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
    return np.squeeze(out, axis)


def check_out_shape(
    out: Any, target: Any, operands: Sequence[Any], extra: Sequence[Any], axis: int
) -> None:
    """The gufunc would broadcast its result to a larger `out`."""
    try:
        batch = np.broadcast_shapes(
            *(_without(np.shape(x), axis) for x in operands), *map(np.shape, extra)
        )
    except ValueError:
        return  # the gufunc refuses the operands
    if target.shape != batch:
        raise ValueError(f"out has shape {out.shape}; wanted the batch shape {batch}")


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def reduce(
    name: str,
    arrays: Mapping[str, Any],
    *,
    extra: tuple[Any, ...] = (),
    axis: int = -1,
    keepdims: bool = False,
    base: float | None = None,
    out: Any = None,
) -> Any:
    """Call the gufunc `name` over one core axis of `arrays`; `extra` operands have no core axis."""
    log_base = None if base is None else check_base(base)
    gufunc, operands = gufunc_for(name, arrays)
    axis = check_axis(axis, arrays, operands)
    target = None if out is None else check_out(out, keepdims, axis)
    if target is not None:
        check_out_shape(out, target, operands, extra, axis)
    moved = operands if axis == -1 else [_axis_last(x, axis) for x in operands]
    try:
        cores = [1] * len(operands) + [0] * len(extra)
        result = call(gufunc, [*moved, *extra], cores, target)
    except (ValueError, TypeError) as error:
        raise explain(error, list(arrays), operands, extra, axis, out) from None
    if log_base is not None:
        result = np.divide(result, log_base, out=target) if out is not None else result / log_base
    if out is not None:
        return out
    return np.expand_dims(result, axis) if keepdims else result


def check_axis(axis: Any, arrays: Mapping[str, Any], operands: Sequence[Any]) -> int:
    try:
        axis = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {type(axis).__name__}") from None
    for argument, x in zip(arrays, operands, strict=True):
        if not -np.ndim(x) <= axis < np.ndim(x):
            raise np.exceptions.AxisError(axis, np.ndim(x), f"{argument}")
    return int(axis)


def _axis_last(x: Any, axis: int) -> Any:
    return np.moveaxis(x, axis, -1)


def call(gufunc: Any, operands: Sequence[Any], cores: Sequence[int], out: Any = None) -> Any:
    """The gufunc; `cores`: how many axes of each operand belong to one distribution.

    NumPy calls a gufunc's loop once for every innermost batch axis, and threads share one call at a
    time. So two batch axes that do not lie as one, as those of a broadcast (M, 1, K) against
    (1, N, K), are given to it as core axes.
    """
    if any(is_lazy(x) for x in operands):
        return gufunc(*operands)
    if max(np.ndim(x) - core for x, core in zip(operands, cores, strict=True)) < 2:
        return gufunc(*operands, out=out)
    if all(np.ndim(x) == 0 or _is_like(x, operands[0]) for x in operands):
        return gufunc(*operands, out=out)
    full = _broadcast(operands, cores)
    if all(_lies_as_one(x, core) for x, core in zip(full, cores, strict=True)):
        return gufunc(*operands, out=out)
    return _kernels.grid(gufunc)(*full, out=out)


def _is_like(x: Any, first: Any) -> bool:
    """Whether both are of one shape and without gaps, which most batches are."""
    return bool(x.shape == first.shape and x.flags.c_contiguous)


def _broadcast(operands: Sequence[Any], cores: Sequence[int]) -> list[NDArray[Any]]:
    """Operands with all batch axes."""
    shapes = [np.shape(x) for x in operands]
    splits = [len(shape) - core for shape, core in zip(shapes, cores, strict=True)]
    batch = np.broadcast_shapes(*(s[:at] for s, at in zip(shapes, splits, strict=True)))
    return [
        np.broadcast_to(x, batch + shape[at:])
        for x, shape, at in zip(operands, shapes, splits, strict=True)
    ]


def _lies_as_one(x: NDArray[Any], core: int) -> bool:
    """Whether the last two batch axes can be walked as one."""
    n = x.ndim - core
    lines, rows = x.shape[n - 2 : n]
    return bool(lines == 1 or rows == 1 or x.strides[n - 2] == rows * x.strides[n - 1])


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
