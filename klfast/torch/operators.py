"""The four divergences of tensors, and how PyTorch's machinery sees them.

`torch.ops.klfast.kl_…` and `…_backward` are custom operators with shapes for fake tensors, rules
for autograd and vmap: what torch.compile and other tracers work with. Eager calls take a shorter
way to the same kernels, `Divergence`, as an operator with autograd costs some 100 µs; torch.func,
which does not differentiate custom operators, takes it too.

The forward pass computes the value alone; the backward pass the gradients that are wanted, in one
fused call from the inputs. Nothing of their size is kept but the inputs themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klfast._arguments import check_base, only_one
from klfast.torch._tensors import (
    Call,
    as_array,
    check,
    check_one,
    is_plain,
    is_traced,
    needs_gradient,
    result_dtype,
    transforms_active,
    value,
    value_and_gradients,
)

__all__ = ["kl_categorical", "kl_discrete", "kl_mvn", "kl_normal"]

# Eager, and torch.func


class Divergence(torch.autograd.Function):
    """The way of tensors that no compiler traces: straight to the kernels; below torch.func's vmap,
    through the operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, arguments: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        return compute(name, arguments, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, ctx.arguments, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        wanted = ctx.needs_input_grad[2:]
        call = (ctx.name, ctx.arguments, wanted, cotangent, *ctx.saved_tensors)
        direct = is_plain(cotangent) and not torch.is_grad_enabled()
        gradients = Gradient.forward(*call) if direct else Gradient.apply(*call)
        return None, None, *at_their_places(gradients, wanted)


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


def gradients_of(
    call: Call, cotangent: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    return value_and_gradients(call, tensors, wanted, as_array(cotangent))[1]


def compute(name: str, arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> Tensor:
    """The divergence by the kernel, or by the operator for who looks on."""
    family = FAMILIES[name]
    if is_plain(*tensors):
        return value(family.call(*arguments), tensors)
    result: Tensor = getattr(torch.ops.klfast, name)(*family.padded(tensors, arguments))
    return result


def divergence(name: str, tensors: tuple[Tensor, ...], *arguments: Any) -> Tensor:
    """The family's divergence over the last axis, or axes, of checked tensors."""
    if not is_traced(*tensors) and (transforms_active() or needs_gradient(*tensors)):
        result: Tensor = Divergence.apply(name, arguments, *tensors)
        return result
    return compute(name, arguments, tensors)


# The families


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
    return Call("kl_discrete", ("p", "q"), {"normalize": normalize})


def categorical_call(temperature: float | Tensor) -> Call:
    t = as_array(temperature) if isinstance(temperature, Tensor) else temperature
    return Call("kl_categorical", ("logits_p", "logits_q"), {"temperature": t})


@functools.cache
def normal_call(kind_p: str, kind_q: str) -> Call:
    names = ["loc_p", f"{kind_p}_p"] + (["loc_q", f"{kind_q}_q"] if kind_q else [])
    return Call("kl_normal", tuple(names), {}, reads_bits=bool(kind_q))


@functools.cache
def mvn_call(kind_p: str, kind_q: str, errors: str) -> Call:
    names = ["loc_p", f"{kind_p}_p"] + (["loc_q", f"{kind_q}_q"] if kind_q else [])
    return Call("kl_mvn", tuple(names), {"errors": errors}, reads_bits=False)


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


# Operators


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
    whole = torch.broadcast_shapes(*shapes)
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
        return [g.reshape(shape) for g, shape in zip(gradients, shapes, strict=True)], [0] * len(
            gradients
        )

    make = functools.partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
    operator = make(name, forward, schema=f"({family.schema}) -> Tensor")
    operator.register_fake(fake_forward)
    operator.register_autograd(differentiate, setup_context=setup)
    operator.register_vmap(vmap)
    backward_operator = make(
        f"{name}_backward",
        backward,
        schema=f"(Tensor cotangent, {family.schema}, bool[] wanted) -> Tensor[]",
    )
    backward_operator.register_fake(fake_backward)
    backward_operator.register_autograd(refuse)
    backward_operator.register_vmap(vmap_backward)


for each in FAMILIES.values():
    register(each)


# Public


def kl_discrete(
    p: Tensor,
    q: Tensor,
    *,
    axis: int = -1,
    keepdims: bool = False,
    normalize: bool = True,
    base: float | None = None,
) -> Tensor:
    """
    KL(P‖Q) of distributions given as weights: `klfast.kl_discrete` for CPU tensors.

    Parameters
    ----------
    p, q : Tensor, shape (..., K)
        Probabilities, counts or other non-negative weights. Batch axes broadcast.
    axis, keepdims, normalize, base
        As in `klfast.kl_discrete`.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. Differentiable once, with
        respect to p and q; gradients have the dtype of their tensor. The gradient with respect to
        a weight p = 0 is −inf where q > 0: so is the slope of p log p.

    Raises
    ------
    TypeError, ValueError
        A dtype, device, shape or option that is not taken; the message names the argument.
    """
    p, q = check({"p": p, "q": q})
    if axis != -1:
        p, q = p.movedim(axis, -1), q.movedim(axis, -1)
    return finish(divergence("kl_discrete", (p, q), normalize), axis, keepdims, base)


def kl_categorical(
    logits_p: Tensor,
    logits_q: Tensor,
    *,
    axis: int = -1,
    keepdims: bool = False,
    temperature: float | Tensor = 1.0,
    base: float | None = None,
) -> Tensor:
    """
    KL(P‖Q) of softmax(logits_p / T) and softmax(logits_q / T): `klfast.kl_categorical` for CPU
    tensors.

    Parameters
    ----------
    logits_p, logits_q : Tensor, shape (..., K)
        Unnormalised log-probabilities; −inf on both sides masks an entry, whose gradient is 0.
    temperature : float or Tensor, shape (...)
        T, a constant: it has no gradient.
    axis, keepdims, base
        As in `klfast.kl_categorical`.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. Differentiable once, with
        respect to both logits; gradients have the dtype of their tensor.

    Raises
    ------
    TypeError, ValueError
        A dtype, device, shape or option that is not taken; the message names the argument.
    """
    logits_p, logits_q = check({"logits_p": logits_p, "logits_q": logits_q})
    if axis != -1:
        logits_p, logits_q = logits_p.movedim(axis, -1), logits_q.movedim(axis, -1)
    result = divergence("kl_categorical", (logits_p, logits_q), check_temperature(temperature))
    return finish(result, axis, keepdims, base)


def kl_normal(
    loc_p: Tensor,
    scale_p: Tensor | None = None,
    loc_q: Tensor | None = None,
    scale_q: Tensor | None = None,
    *,
    var_p: Tensor | None = None,
    logvar_p: Tensor | None = None,
    var_q: Tensor | None = None,
    logvar_q: Tensor | None = None,
    axis: int | tuple[()] = -1,
    keepdims: bool = False,
) -> Tensor:
    """
    KL(P‖Q) of normal distributions with diagonal covariance: `klfast.kl_normal` for CPU tensors.

    Parameters
    ----------
    loc_p, loc_q : Tensor, shape (..., D)
        Means. Q left out altogether is N(0, I).
    scale_p, scale_q, var_p, var_q, logvar_p, logvar_q : Tensor, shape (..., D)
        Standard deviations, variances or their logarithms, exactly one of the three a side.
    axis, keepdims
        As in `klfast.kl_normal`; ``axis=()`` gives the divergence of each element.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. All axes broadcast, and the
        gradients are summed back. Differentiable once, with respect to all arguments.

    Raises
    ------
    TypeError, ValueError
        A dtype, device, shape or combination of keywords that is not taken; the message names the
        argument.
    """
    kind_p, spread_p = only_one("p", scale=scale_p, var=var_p, logvar=logvar_p)
    arguments, kind_q = {"loc_p": loc_p, f"{kind_p}_p": spread_p}, ""
    if loc_q is not None:
        kind_q, spread_q = only_one("q", scale=scale_q, var=var_q, logvar=logvar_q)
        arguments |= {"loc_q": loc_q, f"{kind_q}_q": spread_q}
    elif not (scale_q is None and var_q is None and logvar_q is None):
        raise TypeError(
            "loc_q is missing: give it with the spread of q, or leave q out for N(0, I)"
        )
    tensors = check(arguments)
    if axis == ():
        tensors = tuple(x.unsqueeze(-1) for x in tensors)
    elif axis != -1:
        tensors = tuple(x.movedim(axis, -1) for x in torch.broadcast_tensors(*tensors))
    return finish(divergence("kl_normal", tensors, kind_p, kind_q), axis, keepdims)


def kl_mvn(
    loc_p: Tensor,
    cov_p: Tensor | None = None,
    loc_q: Tensor | None = None,
    cov_q: Tensor | None = None,
    *,
    scale_tril_p: Tensor | None = None,
    scale_tril_q: Tensor | None = None,
    errors: str = "raise",
) -> Tensor:
    """
    KL(P‖Q) of multivariate normal distributions: `klfast.kl_mvn` for CPU tensors.

    Parameters
    ----------
    loc_p, loc_q : Tensor, shape (..., D)
        Means. Q left out altogether is N(0, I).
    cov_p, scale_tril_p, cov_q, scale_tril_q : Tensor, shape (..., D, D)
        Covariances or their lower Cholesky factors, exactly one of the two a side. Only lower
        triangles are read.
    errors : {"raise", "nan"}
        As in `klfast.kl_mvn`.

    Returns
    -------
    Tensor, shape (...)
        The divergence in nats: float64 for float64, else float32. Differentiable once, with
        respect to all arguments; of covariances by the symmetric convention of
        `klfast.grad.kl_mvn`, of factors in the lower triangle.

    Raises
    ------
    numpy.linalg.LinAlgError
        A covariance is not positive definite and ``errors="raise"``.
    TypeError, ValueError
        A dtype, device, shape or combination of keywords that is not taken; the message names the
        argument.
    """
    if errors not in ("raise", "nan"):
        raise ValueError(f"errors must be 'raise' or 'nan', got {errors!r}")
    kind_p, matrix_p = only_one("p", cov=cov_p, scale_tril=scale_tril_p)
    arguments, kind_q = {"loc_p": loc_p, f"{kind_p}_p": matrix_p}, ""
    if loc_q is not None:
        kind_q, matrix_q = only_one("q", cov=cov_q, scale_tril=scale_tril_q)
        arguments |= {"loc_q": loc_q, f"{kind_q}_q": matrix_q}
    elif cov_q is not None or scale_tril_q is not None:
        raise TypeError("loc_q is missing: give it with its covariance, or leave q out for N(0, I)")
    return divergence("kl_mvn", check(arguments), kind_p, kind_q, errors)


def check_temperature(temperature: Any) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        return float(temperature)
    if temperature.requires_grad:
        raise ValueError("temperature is a constant to klfast: pass temperature.detach()")
    check_one("temperature", temperature)
    return temperature.double()


def finish(
    result: Tensor, axis: int | tuple[()], keepdims: bool, base: float | None = None
) -> Tensor:
    if base is not None:
        result = result / check_base(base)
    if not keepdims:
        return result
    if axis == ():
        raise ValueError("keepdims=True needs an axis to keep, got axis=()")
    return result.unsqueeze(axis)
