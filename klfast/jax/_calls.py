"""How JAX calls the gufuncs: as the XLA target of src/xla.pxi, or else through Python.

`divergence` is what the families share. Within it arrays have one dtype and one number of batch
axes, so that the target, which broadcasts axes of length 1 and sums gradients back over them, needs
no names and no options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from klfast import _kernels
from klfast._arguments import check_axis, check_base, explain

__all__ = ["as_arrays", "divergence", "over_axis", "promoted", "uses_ffi"]

TARGET = "klfast"
Shaped: Any = jax.ShapeDtypeStruct  # JAX leaves it untyped


def _register() -> bool:
    """Make the kernels known to XLA; False where this JAX has no interface for it, or another."""
    try:
        jax.ffi.register_ffi_target(TARGET, _kernels.xla_target(), platform="cpu")
    except (AttributeError, RuntimeError):
        return False
    return True


uses_ffi: bool = _register()


# Arguments.


def as_arrays(**arguments: Any) -> dict[str, Any]:
    """What jax.jit takes as it is, or a JAX array; TypeError that names the argument."""
    return {
        name: x if type(x) in (float, int) else _as_array(name, x) for name, x in arguments.items()
    }


def _as_array(name: str, x: Any) -> Any:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, which klfast does not take")
    try:
        array = x if isinstance(x, (jax.Array, np.ndarray)) else jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be made an array: {error}") from error
    if not _is_real(array.dtype):
        raise TypeError(
            f"{name} has dtype {array.dtype}; wanted float16, bfloat16, float32, float64, an "
            "integer type or bool"
        )
    return array


def _is_real(dtype: Any) -> bool:
    return dtype.name in ("float16", "bfloat16", "float32", "float64") or dtype.kind in "iub"


def promoted(arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
    """All of JAX's common floating dtype."""
    dtype = jnp.result_type(*arrays.values())
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def over_axis(
    name: str,
    arrays: Mapping[str, jax.Array],
    *,
    extra: tuple[jax.Array, ...] = (),
    axis: int = -1,
    keepdims: bool = False,
    base: float | None = None,
) -> jax.Array:
    """The gufunc `name` over one core axis of `arrays`, checked; `extra` have no core axis."""
    log_base = None if base is None else check_base(base)
    operands = list(arrays.values())
    axis = check_axis(axis, arrays, operands)
    moved = [jnp.moveaxis(x, axis, -1) for x in operands]
    try:
        if len({x.shape[-1] for x in moved}) > 1:
            raise ValueError
        np.broadcast_shapes(*(x.shape[:-1] for x in moved), *(x.shape for x in extra))
    except ValueError as error:
        raise explain(error, list(arrays), operands, extra, axis, None) from None
    result = divergence(name, [*moved, *extra])
    if log_base is not None:
        result = result / log_base
    return jnp.expand_dims(result, axis) if keepdims else result


# Value and gradients.


def divergence(name: str, operands: Sequence[jax.Array]) -> jax.Array:
    """The gufunc `name` of operands of one dtype whose shapes fit together. Differentiable in
    operands with core axes."""
    ranks = _core_ranks(name)
    batch = max(x.ndim - rank for x, rank in zip(operands, ranks, strict=True))
    shapes = [(1,) * (batch + r - x.ndim) + x.shape for x, r in zip(operands, ranks, strict=True)]
    return _kl(name, *(x.reshape(s) for x, s in zip(operands, shapes, strict=True)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(name: str, *operands: jax.Array) -> jax.Array:
    shape = _batch_shape(_core_ranks(name), operands)
    result = Shaped(shape, _result_dtype(operands[0].dtype))
    (value,) = _call(name, _kernels.gufuncs[_variant(name, operands)], (result,), operands)
    return value


def _forward(name: str, *primals: Any) -> tuple[jax.Array, Any]:
    """The value, and what the gradients need: themselves for a cotangent of 1, from the same pass,
    or the operands where gradients of broadcast ones have yet to be weighted before they are
    summed."""
    operands = tuple(x.value for x in primals)
    wanted = tuple(() if x.perturbed else None for x in primals)  # kept by the structure alone
    ranks, wrt = _core_ranks(name), _positions(wanted)
    batch = _batch_shape(ranks, operands)
    if not all(operands[i].shape[: len(batch)] == batch for i in wrt):
        return _kl(name, *operands), (wanted, None, operands)
    one = jnp.ones((1,) * len(batch), _result_dtype(operands[0].dtype))
    value, *slopes = _gradients(name, wrt, one, *operands)
    empty = tuple(jnp.zeros((0,), x.dtype) for x in operands)  # which know their dtypes
    return value, (wanted, tuple(slopes), empty)


def _backward(name: str, saved: Any, cotangent: Any) -> tuple[jax.Array | None, ...]:
    wanted, slopes, operands = saved
    wrt = _positions(wanted)
    found: list[jax.Array | None] = [None] * len(operands)
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return tuple(found)
    if slopes is None:
        slopes = _gradients(name, wrt, cotangent, *operands)[1:]
    else:
        slopes = [_weighted(x, cotangent) for x in slopes]
    for i, slope in zip(wrt, slopes, strict=True):
        found[i] = slope.astype(operands[i].dtype)
    return tuple(found)


_kl.defvjp(_forward, _backward, symbolic_zeros=True)


def _positions(wanted: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(i for i, mark in enumerate(wanted) if mark is not None)


def _weighted(slope: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Their product; 0 where the value does not matter, were the slope infinite."""
    weight = cotangent.reshape(cotangent.shape + (1,) * (slope.ndim - cotangent.ndim))
    return jnp.where(weight == 0, jnp.zeros((), slope.dtype), slope * weight)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(
    name: str, wrt: tuple[int, ...], cotangent: jax.Array, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """The value, and the gradients of sum(cotangent * value), each of its operand's shape."""
    dtype = _result_dtype(operands[0].dtype)
    results = (
        Shaped(_batch_shape(_core_ranks(name), operands), dtype),
        *(Shaped(operands[i].shape, dtype) for i in wrt),
    )
    variant = _variant(name, operands)
    mask = sum(1 << i for i in wrt)
    gufunc = _kernels.gradients(variant, mask)
    return _call(f"{name}_gradients_{mask}", gufunc, results, (*operands, cotangent))


@_gradients.defjvp
def _refuse(name: str, wrt: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "klfast.jax gives first derivatives only: a gradient of a divergence cannot be "
        "differentiated again (hessian, grad of grad, forward mode over reverse mode)"
    )


@cache
def _core_ranks(name: str) -> tuple[int, ...]:
    """The number of core axes of each input."""
    inputs = _kernels.gufuncs[name].signature.split("->")[0]  # type: ignore[attr-defined]
    return tuple(len(part.split(",")) if part else 0 for part in inputs[1:-1].split("),("))


def _batch_shape(ranks: tuple[int, ...], operands: Sequence[jax.Array]) -> tuple[int, ...]:
    batches = [x.shape[: x.ndim - rank] for x, rank in zip(operands, ranks, strict=True)]
    return np.broadcast_shapes(*batches)


def _result_dtype(dtype: Any) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _variant(name: str, operands: Sequence[jax.Array]) -> str:
    return name + "_bfloat16" if operands[0].dtype == jnp.bfloat16 else name


# The two ways to compiled code.


def _call(
    name: str,
    gufunc: Callable[..., Any],
    results: tuple[Any, ...],
    operands: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    if not uses_ffi:
        through_python = partial(_in_numpy, gufunc, results)
        return tuple(
            jax.pure_callback(through_python, results, *operands, vmap_method="sequential")
        )
    key = f"{name}_bfloat16" if operands[0].dtype == jnp.bfloat16 else name
    _expose(key, gufunc)
    call = jax.ffi.ffi_call(TARGET, results, vmap_method="expand_dims")
    return tuple(call(*operands, gufunc=key))


@cache
def _expose(name: str, gufunc: Callable[..., Any]) -> None:
    _kernels.xla_expose(name, gufunc)


def _in_numpy(
    gufunc: Callable[..., Any], results: tuple[Any, ...], *operands: Any
) -> tuple[np.ndarray[Any, Any], ...]:
    arrays = [np.asarray(x) for x in operands]
    arrays = [x.view(np.uint16) if x.dtype.name == "bfloat16" else x for x in arrays]
    with np.errstate(invalid="ignore"):
        found = gufunc(*arrays)
    found = found if isinstance(found, tuple) else (found,)
    return tuple(
        _sum_to(np.asarray(x), result.shape, result.dtype)
        for x, result in zip(found, results, strict=True)
    )


def _sum_to(x: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: Any) -> Any:
    axes = tuple(i for i, (n, wanted) in enumerate(zip(x.shape, shape, strict=True)) if n != wanted)
    return x.sum(axes, dtype=np.float64, keepdims=True).astype(dtype) if axes else x
