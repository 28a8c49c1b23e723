"""The one gate to compiled code: imports the kernels for this processor's instruction set.

The same source is compiled once for each instruction set. The best that the processor runs is
taken; the environment variable KLFAST_ISA (baseline, avx2, avx512) forces another.

What Python owes the gufuncs: operands of a registered dtype (float16, float32, float64; the
temperature float64; bfloat16 as the uint16 of its bits, to the gufuncs named for it), arguments
that make sense. What they owe: every row's result by the documented table of edge cases, and
NumPy's "invalid" condition where a row is NaN because of a bad value. `plain` has the same names
for calls that need no preparation; what these cannot do, they answer with None.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

try:
    _cpu = importlib.import_module("klfast._cpu")
except ImportError as error:
    raise ImportError(
        "klfast's compiled kernels are missing. Python may have found the source folder before the "
        "installed package: start it elsewhere (pytest rather than python -m pytest), or install "
        "with pip install -e ."
    ) from error


def _built() -> list[str]:
    """The instruction sets that the package was built for and the processor runs."""
    return [
        isa
        for isa in _cpu.available()
        if importlib.util.find_spec(f"klfast._kernels_{isa}") is not None
    ]


def _chosen() -> str:
    if not available:
        raise ImportError(
            "this build of klfast has no kernels that this processor can run: install it again "
            "without KLFAST_LEVELS, which builds all instruction sets"
        )
    forced = os.environ.get("KLFAST_ISA")
    if not forced:
        return available[-1]
    if forced not in available:
        raise ImportError(
            f"KLFAST_ISA is {forced!r}, but this processor and this build of klfast offer "
            f"{', '.join(available)}: set it to one of these, or not at all"
        )
    return forced


available: list[str] = _built()
isa: str = _chosen()
_module = importlib.import_module(f"klfast._kernels_{isa}")

gufuncs: dict[str, Callable[..., Any]] = _module.gufuncs
plain: dict[str, Callable[..., Any]] = _module.plain
are_plain: Callable[..., bool] = _module.are_plain
set_threads: Callable[..., None] = _module.set_threads
get_threads: Callable[[], tuple[int, int]] = _module.get_threads
build: Callable[[], dict[str, Any]] = _module.build
xla_target: Callable[[], object] = _module.xla_target
xla_expose: Callable[[str, Callable[..., Any]], None] = _module.xla_expose

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_module.before_fork,
        after_in_parent=_module.after_fork,
        after_in_child=_module.after_fork,
    )


@functools.cache
def core_axes(gufunc: Any) -> tuple[int, ...]:
    """How many axes of each operand belong to one distribution."""
    operands: list[str] = gufunc.signature.split("->")[0][1:-1].split("),(")
    return tuple(core.count(",") + 1 if core else 0 for core in operands)


@functools.cache
def grid(gufunc: Callable[..., Any]) -> Callable[..., Any]:
    """The same gufunc with two batch axes among the core axes of every operand."""
    made: Callable[..., Any] = _module.grid_gufunc(gufunc)
    return made


@functools.cache
def gradients(name: str, wanted: int) -> Callable[..., Any]:
    """The gufunc of values and gradients; bit i of `wanted`: with respect to operand i."""
    gufunc: Callable[..., Any] = _module.gradient_gufunc(name, wanted)
    return gufunc


@functools.cache
def direct(name: str, wanted: int) -> Callable[..., float]:
    """Rows given by their addresses: their values, and gradients as of `gradients` unless `wanted`
    is 0."""
    if wanted:
        gradients(name, wanted)
    kernel: Callable[..., float] = _module.direct[name, wanted]
    return kernel
