"""The divergences for autograd, in eager PyTorch and under torch.func.

The forward pass computes the value alone; the backward pass the gradients that are wanted, in one
fused call from the inputs. Nothing of their size is kept but the inputs themselves. A custom
operator with autograd costs some 100 µs a call, and torch.func does not differentiate it: only
tracers are led to those of `klfast.torch._library`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klfast.normal import kernel_name, standard
from klfast.torch._tensors import (
    Call,
    as_array,
    gradients_of,
    is_plain,
    is_traced,
    needs_gradient,
    transforms_active,
    value,
)


@dataclass(frozen=True)
class Family:
    """`cores`: how many axes of each tensor make one distribution; a further tensor, which has no
    gradient, has none. `call` makes the call of the operator's arguments after its tensors."""

    name: str
    schema: str
    cores: tuple[int, ...]
    call: Callable[..., Call]

    @property
    def tensors(self) -> int:
        return len(self.cores)

    def padded(self, tensors: Sequence[Tensor], arguments: tuple[Any, ...]) -> list[Any]:
        """The operator's arguments: None for tensors that are left out; a temperature is a tensor
        there."""
        left_out = [None] * (self.tensors - len(tensors))
        others = [torch.tensor(x).double() if type(x) is float else x for x in arguments]
        return [*tensors, *left_out, *others]


@functools.cache
def discrete_call(normalize: bool) -> Call:
    kernel = "discrete" if normalize else "discrete_plain"
    options = {"normalize": normalize}
    return Call("kl_discrete", ("p", "q"), options, kernel, reads_bits=True)


def categorical_call(temperature: float | Tensor) -> Call:
    if isinstance(temperature, Tensor):
        return of_temperature(as_array(temperature), None)
    return at_temperature(temperature)


@functools.lru_cache
def at_temperature(temperature: float) -> Call:
    return of_temperature(temperature, "categorical" if 0 < temperature < math.inf else None)


def of_temperature(temperature: Any, kernel: str | None) -> Call:
    options = {"temperature": temperature}
    names = ("logits_p", "logits_q")
    return Call("kl_categorical", names, options, kernel, (temperature,), reads_bits=True)


def sides(kind_p: str, kind_q: str) -> tuple[str, ...]:
    """The names of the arguments; no kind of q: none of its own."""
    return ("loc_p", f"{kind_p}_p", *(("loc_q", f"{kind_q}_q") if kind_q else ()))


@functools.cache
def normal_call(kind_p: str, kind_q: str) -> Call:
    names = sides(kind_p, kind_q)
    implied = {} if kind_q else standard(kind_p)
    kernel = None if implied else kernel_name(kind_p, kind_q, names[2:])
    return Call("kl_normal", names, {}, kernel, reads_bits=not implied)


@functools.cache
def mvn_call(kind_p: str, kind_q: str, errors: str) -> Call:
    return Call("kl_mvn", sides(kind_p, kind_q), {"errors": errors})


FAMILIES = {
    family.name: family
    for family in (
        Family("kl_discrete", "Tensor p, Tensor q, bool normalize", (1, 1), discrete_call),
        Family(
            "kl_categorical",
            "Tensor logits_p, Tensor logits_q, Tensor temperature",
            (1, 1),
            categorical_call,
        ),
        Family(
            "kl_normal",
            "Tensor loc_p, Tensor spread_p, Tensor? loc_q, Tensor? spread_q, "
            "str kind_p, str kind_q",
            (1, 1, 1, 1),
            normal_call,
        ),
        Family(
            "kl_mvn",
            "Tensor loc_p, Tensor matrix_p, Tensor? loc_q, Tensor? matrix_q, str kind_p, "
            "str kind_q, str errors",
            (1, 2, 1, 2),
            mvn_call,
        ),
    )
}


def differentiate(ctx: Any, cotangent: Tensor) -> Any:
    """The backward pass of Divergence and Transformed."""
    wanted = ctx.needs_input_grad[2:]
    arguments = (ctx.name, ctx.arguments, wanted, cotangent, *ctx.saved_tensors)
    return None, None, *at_their_places(Gradient.apply(*arguments), wanted)


class Divergence(torch.autograd.Function):
    """The way of eager PyTorch: straight to the kernels."""

    @staticmethod
    def forward(ctx: Any, name: str, arguments: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        ctx.name, ctx.arguments = name, arguments
        ctx.call = FAMILIES[name].call(*arguments)
        ctx.save_for_backward(*tensors)
        return value(ctx.call, tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        if torch.is_grad_enabled() or not is_plain(cotangent):
            return differentiate(ctx, cotangent)
        wanted = ctx.needs_input_grad[2:]
        gradients = gradients_of(ctx.call, cotangent, ctx.saved_tensors, wanted)
        return None, None, *at_their_places(gradients, wanted)


class Transformed(torch.autograd.Function):
    """The same for torch.func, whose way of calling costs some 40 µs more; vmap goes through the
    operators."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, arguments: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        return compute(name, arguments, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, ctx.arguments, *tensors = inputs
        ctx.save_for_backward(*tensors)

    backward = staticmethod(differentiate)


class Gradient(torch.autograd.Function):
    """The gradients, of which there are no further ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str,
        arguments: tuple[Any, ...],
        wanted: Sequence[bool],
        cotangent: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        family = FAMILIES[name]
        if is_plain(cotangent, *tensors):
            call = family.call(*arguments)
            return tuple(gradients_of(call, cotangent, tensors, wanted))
        asked = [*wanted, *[False] * (family.tensors - len(tensors))]
        operator = getattr(torch.ops.klfast, f"{name}_backward")
        return tuple(operator(cotangent, *family.padded(tensors, arguments), asked))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise no_second_derivatives()


def no_second_derivatives() -> RuntimeError:
    return RuntimeError(
        "klfast has no second derivatives: its gradients cannot be differentiated again. Where "
        "they are needed, write the formula in torch operations"
    )


def at_their_places(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Any, ...]:
    """A gradient for each wanted argument, None for the others."""
    following = iter(gradients)
    return tuple(next(following) if wants else None for wants in wanted)


def compute(name: str, arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> Tensor:
    """The divergence by the kernel, or by the operator for who looks on."""
    family = FAMILIES[name]
    if is_plain(*tensors):
        return value(family.call(*arguments), tensors)
    result: Tensor = getattr(torch.ops.klfast, name)(*family.padded(tensors, arguments))
    return result


def divergence(name: str, tensors: tuple[Tensor, ...], *arguments: Any) -> Tensor:
    """The family's divergence over the last axis, or axes, of checked tensors."""
    if not is_traced(*tensors):
        if transforms_active():
            result: Tensor = Transformed.apply(name, arguments, *tensors)
            return result
        if needs_gradient(*tensors):
            result = Divergence.apply(name, arguments, *tensors)
            return result  # noqa: RET504, what has a type
    return compute(name, arguments, tensors)
