"""Manners of tensors: what is taken, how a kernel reads it through its memory, and what comes back.

A call is a klfast function by name, the names of its array arguments and its other keywords; the
tensors are all of one dtype. Nothing here knows of autograd.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

import klfast
from klfast import _kernels, grad
from klfast._arguments import BFLOAT16_BITS
from klfast.grad._shared import call_plainly

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALVES)

LARGE = 1 << 25  # bytes: malloc gives larger memory back to the system as soon as it is free


class Call(NamedTuple):
    """`kernel` and `extra`: the gufunc that ordinary arrays can go to as they are, and its operands
    after them. `reads_bits`: it reads bfloat16 as it is."""

    function: str
    names: tuple[str, ...]
    options: Mapping[str, Any]
    kernel: str | None = None
    extra: tuple[Any, ...] = ()
    reads_bits: bool = False


def is_traced(*tensors: Tensor) -> bool:
    """Whether a compiler or a dispatch mode looks on, or a subclass is among the tensors: they are
    to be shown operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for x in tensors:  # noqa: SIM110, a generator takes three times as long
        if type(x) is not Tensor and type(x) is not Parameter:
            return True
    return False


def transforms_active() -> bool:
    """Whether torch.func transforms the caller."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors of eager PyTorch, with a memory to read."""
    return not is_traced(*tensors) and not transforms_active()


def needs_gradient(*tensors: Tensor) -> bool:
    for x in tensors:
        if x.requires_grad:
            return torch.is_grad_enabled()
    return False


def check(arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The tensors, on the CPU and of one floating dtype; numbers become tensors."""
    tensors = tuple(arguments.values())
    first = tensors[0]
    if isinstance(first, Tensor) and first.dtype in DTYPES:
        dtype = first.dtype
        for x in tensors:
            if not isinstance(x, Tensor) or x.dtype != dtype or not x.is_cpu:
                break
        else:
            return tensors
    for name, x in arguments.items():
        check_one(name, x)
    dtype = common_dtype([x for x in tensors if isinstance(x, Tensor)])
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in tensors
    )


def check_one(name: str, x: Any) -> None:
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_cpu:
        raise ValueError(
            f"{name} is on the device {x.device}, and klfast is a CPU library: pass {name}.cpu()"
        )
    if x.dtype not in DTYPES and (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{name} has dtype {x.dtype}; wanted float16, bfloat16, float32, float64, an integer "
            "type or bool"
        )


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """PyTorch's promotion; integers alone go to float64."""
    if not tensors:
        raise TypeError("wanted at least one torch.Tensor among the arguments")
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype if dtype.is_floating_point else torch.float64


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a divergence of tensors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_array(x: Tensor) -> Any:
    """The memory of a tensor as NumPy has it; bfloat16, which NumPy has not, in float32."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy(force=True)


def as_bits(x: Tensor) -> Any:
    """The memory of a bfloat16 tensor."""
    return x.detach().view(torch.int16).numpy(force=True).view(BFLOAT16_BITS)


def as_tensor(result: Any) -> Tensor:
    return torch.from_numpy(result if type(result) is np.ndarray else np.asarray(result))


def as_arrays(call: Call, tensors: Sequence[Tensor]) -> list[Any]:
    if call.reads_bits and tensors[0].dtype == torch.bfloat16:
        return [as_bits(x) for x in tensors]
    return [as_array(x) for x in tensors]


def lie_alike(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether the call's kernel can go straight to the memory of these: rows of one shape, one
    after the other without gaps, of a dtype of its own."""
    if call.kernel is None:
        return False
    shape, dtype = tensors[0].shape, tensors[0].dtype
    if (dtype is not torch.float32 and dtype is not torch.float64) or not shape or 0 in shape:
        return False
    for x in tensors:  # noqa: SIM110, a generator takes three times as long
        if x.shape != shape or not x.is_contiguous() or x.is_neg():
            return False
    return True


kept: deque[tuple[Any, weakref.ref[Any]]] = deque(maxlen=2)  # memory, and who has it


def empty_like(x: Tensor) -> Tensor:
    """As that of PyTorch, for contiguous tensors. The memory of the last large gradients is kept
    for the next ones, which take it once nobody has these any more: to map it anew takes longer
    than to compute them."""
    size = x.nbytes
    if size < LARGE:
        return torch.empty_like(x)
    memory = spare(size + 64)
    part = memory[-memory.ctypes.data % 64 :][:size]  # aligned as PyTorch does
    kept.append((memory, weakref.ref(part)))  # the tensor holds on to the part
    return torch.from_numpy(part).view(x.dtype).view(x.shape)


def spare(size: int) -> Any:
    """Memory of this size, taken out of what is kept, for no other thread to take, or new."""
    for _ in range(len(kept)):
        with contextlib.suppress(IndexError):
            memory, user = kept.popleft()
            if len(memory) == size and user() is None:
                return memory
            kept.append((memory, user))
    return np.empty(size, np.uint8)


def direct(
    call: Call,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangent: float | Tensor,
    into: Tensor | None = None,
) -> tuple[float, list[Tensor]]:
    """The sum of the values of tensors that lie alike, the values into a tensor, and gradients."""
    shape = tensors[0].shape
    rows, bits, numbers = shape[:-1].numel(), 0, call.extra
    gradients = []
    for i, wants in enumerate(wanted):
        if wants:
            bits |= 1 << i
            gradients.append(empty_like(tensors[i]))
    if bits:
        numbers += (cotangent.data_ptr() if isinstance(cotangent, Tensor) else cotangent,)
    total = _kernels.direct(call.kernel, bits)(
        tensors[0].dtype is torch.float64,
        rows,
        shape[-1],
        tuple([x.data_ptr() for x in tensors]),
        numbers,
        0 if into is None else into.data_ptr(),
        tuple([x.data_ptr() for x in gradients]),
    )
    return total, gradients


def value(call: Call, tensors: Sequence[Tensor]) -> Tensor:
    if lie_alike(call, tensors):
        result = torch.empty(tensors[0].shape[:-1], dtype=tensors[0].dtype, device="cpu")
        direct(call, tensors, (), 1.0, result)
        return result
    arrays = as_arrays(call, tensors)
    with np.errstate(all="ignore"):  # NaN comes without a word, as it does in PyTorch
        if call.kernel is not None:
            result = _kernels.plain[call.kernel](*arrays, *call.extra)
            if result is not None:
                return as_tensor(result)
        function = getattr(klfast, call.function)
        return as_tensor(function(**dict(zip(call.names, arrays, strict=True)), **call.options))


def gradients_of(
    call: Call, cotangent: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Those of the wanted tensors."""
    if lie_alike(call, tensors) and cotangent.shape == tensors[0].shape[:-1]:
        return direct(call, tensors, wanted, cotangent.double().contiguous())[1]
    return value_and_gradients(call, tensors, wanted, as_array(cotangent))[1]


def value_and_gradients(
    call: Call, tensors: Sequence[Tensor], wanted: Sequence[bool], cotangent: Any
) -> tuple[Any, list[Tensor]]:
    """The divergence as an array, and the gradients of the wanted tensors, in their dtype."""
    arrays = as_arrays(call, tensors)
    with np.errstate(all="ignore"):
        results = None
        if call.kernel is not None:
            bits = sum(1 << i for i, wants in enumerate(wanted) if wants)
            results = call_plainly(call.kernel, arrays, bits, cotangent, *call.extra)
        if results is None:
            wrt = tuple(name for name, wants in zip(call.names, wanted, strict=True) if wants)
            function = getattr(grad, call.function)
            named = dict(zip(call.names, arrays, strict=True))
            results = function(**named, **call.options, wrt=wrt, cotangent=cotangent)
    gradients = [as_tensor(g) for g in results[1:]]
    if tensors[0].dtype in HALVES:
        gradients = [g.to(tensors[0].dtype) for g in gradients]
    return results[0], gradients
