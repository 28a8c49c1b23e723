"""`torch.ops.klfast.kl_…` and `…_backward`: custom operators with shapes for fake tensors and rules
for autograd and vmap, which torch.compile and other tracers work with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from klfast.torch._autograd import (
    FAMILIES,
    Family,
    at_their_places,
    no_second_derivatives,
)
from klfast.torch._tensors import Call, gradients_of, result_dtype, value


def split(family: Family, arguments: Sequence[Any]) -> tuple[list[Tensor], Call]:
    """An operator's arguments: the tensors that are there, and the call."""
    tensors = [x for x in arguments[: family.tensors] if x is not None]
    return tensors, family.call(*arguments[family.tensors :])


def batch_shape(family: Family, arguments: Sequence[Any]) -> torch.Size:
    """Of the result; a tensor after the family's own has no core axis."""
    shapes = [
        x.shape if family.name == "kl_normal" else x.shape[: x.ndim - core]
        for x, core in zip(arguments, family.cores, strict=False)
        if x is not None
    ]
    shapes += [x.shape for x in arguments[family.tensors :] if isinstance(x, Tensor)]
    whole: torch.Size = torch.broadcast_shapes(*shapes)
    return whole[:-1] if family.name == "kl_normal" else whole


def align(family: Family, arguments: Sequence[Any], in_dims: Sequence[Any]) -> list[Any]:
    """The arguments with the axis of vmap first, and as many batch axes between it and the core
    that they broadcast without it as before."""
    cores = [*family.cores, *[0] * (len(arguments) - family.tensors)]
    ranks = [
        x.ndim - core - (dim is not None)
        for x, core, dim in zip(arguments, cores, in_dims, strict=True)
        if isinstance(x, Tensor)
    ]
    aligned = list(arguments)
    for i, (x, core, dim) in enumerate(zip(arguments, cores, in_dims, strict=True)):
        if dim is not None:
            first = x.movedim(dim, 0)
            missing = max(ranks) - (first.ndim - core - 1)
            aligned[i] = first.reshape(first.shape[:1] + (1,) * missing + first.shape[1:])
    return aligned


def register(family: Family) -> None:
    """Define the family's two operators with all that PyTorch asks of them."""
    name = f"klfast::{family.name}"

    def forward(*arguments: Any) -> Tensor:
        tensors, call = split(family, arguments)
        return value(call, tensors)

    def backward(cotangent: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, call = split(family, arguments[:-1])
        return gradients_of(call, cotangent, tensors, arguments[-1][: len(tensors)])

    def fake_forward(*arguments: Any) -> Tensor:
        first: Tensor = arguments[0]
        shape = batch_shape(family, arguments)
        return first.new_empty(shape, dtype=result_dtype(first.dtype))

    def fake_backward(cotangent: Tensor, *arguments: Any) -> list[Tensor]:
        pairs = zip(arguments, arguments[-1], strict=False)
        return [x.new_empty(x.shape) for x, wants in pairs if wants]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))

    def differentiate(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = [other if x is None else x for x, other in pairs]
        wanted = list(ctx.needs_input_grad[: family.tensors])
        gradients = backward_operator(cotangent, *arguments, wanted)
        return at_their_places(gradients, [*wanted, *[False] * (len(arguments) - len(wanted))])

    def refuse(ctx: Any, *cotangents: Any) -> Any:
        raise no_second_derivatives()

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        return operator(*align(family, arguments, in_dims)), 0

    def vmap_backward(
        info: Any, in_dims: tuple[Any, ...], cotangent: Tensor, *arguments: Any
    ) -> tuple[list[Tensor], list[int]]:
        *inner, wanted = arguments
        shapes, dims = [], list(in_dims[1:-1])
        for i, wants in enumerate(wanted):
            if wants and dims[i] is None:  # its gradients differ from one of the batch to the other
                inner[i], dims[i] = inner[i].expand(info.batch_size, *inner[i].shape), 0
            if wants:
                inner[i], dims[i] = inner[i].movedim(dims[i], 0), 0
                shapes.append(inner[i].shape)
        aligned = align(family, inner, dims)
        if in_dims[0] is not None:
            cotangent = cotangent.movedim(in_dims[0], 0)
        gradients = backward_operator(cotangent, *aligned, wanted)
        shaped = [g.reshape(shape) for g, shape in zip(gradients, shapes, strict=True)]
        return shaped, [0] * len(shaped)

    operator = torch.library.custom_op(
        name, forward, mutates_args=(), device_types="cpu", schema=f"({family.schema}) -> Tensor"
    )
    operator.register_fake(fake_forward)
    operator.register_autograd(differentiate, setup_context=setup)
    operator.register_vmap(vmap)
    backward_operator = torch.library.custom_op(
        f"{name}_backward",
        backward,
        mutates_args=(),
        device_types="cpu",
        schema=f"(Tensor cotangent, {family.schema}, bool[] wanted) -> Tensor[]",
    )
    backward_operator.register_fake(fake_backward)
    backward_operator.register_autograd(refuse)
    backward_operator.register_vmap(vmap_backward)


def register_all() -> None:
    for family in FAMILIES.values():
        register(family)
