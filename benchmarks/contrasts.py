"""Pairs of calls whose times should have a certain ratio: klfast on two layouts of the same rows,
and one small call beside np.vecdot, which does next to nothing."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import klfast
import numpy as np

from registry import IDS
from suite import as_covariances

Arrays = dict[str, np.ndarray]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Contrast:
    """`make` gives the call in question and the one it is measured by. `floor` and `aim`: how many
    times the first one's time the second should take."""

    function: str
    what: str
    beside: str
    make: Callable[[], tuple[Call, Call]]
    floor: float
    aim: float
    large: bool = True  # whether threads make a difference
    same: bool = True  # whether both calls have the same result

    @property
    def name(self) -> str:
        return f"{self.function} {self.what}"

    @property
    def sides(self) -> tuple[str, str]:
        return ("klfast", self.beside)

    def calls(self) -> dict[str, Call]:
        return dict(zip(self.sides, self.make(), strict=True))

    def assert_same(self, got: Any, want: Any) -> None:
        if self.same:
            got, want = (np.asarray(x, dtype=np.float64).ravel() for x in (got, want))
            np.testing.assert_allclose(got, want, rtol=1e-5)


def bind(function: str, arrays: Arrays, **options: Any) -> Call:
    call = getattr(klfast, function)
    return lambda: call(**arrays, **options)


def is_q(name: str) -> bool:
    return name.rpartition("_")[2] == "q"


def transposed(
    id: str, dtype: str, items: int, size: int, near: float | None = None
) -> tuple[Call, Call]:
    function, arrays = IDS[id].function, IDS[id].inputs(dtype, (items,), size, near)
    turned = {name: np.ascontiguousarray(a.T) for name, a in arrays.items()}
    return bind(function, turned, axis=0), bind(function, arrays)


def shared(id: str, dtype: str, items: int, size: int, convert: Any = dict) -> tuple[Call, Call]:
    """One q against a batch, beside as many copies of it."""
    function, arrays = IDS[id].function, convert(IDS[id].inputs(dtype, (items,), size))
    one = {name: a[0] if is_q(name) else a for name, a in arrays.items()}
    copies = {
        name: np.repeat(a[:1], items, axis=0) if is_q(name) else a for name, a in arrays.items()
    }
    return bind(function, one), bind(function, copies)


def factors_and_covariances(arrays: Arrays) -> Arrays:
    """Give P by its factor and Q by its covariance."""
    q = as_covariances(arrays)
    return {name: arrays[name] for name in ("loc_p", "loc_q", "scale_tril_p")} | {
        "cov_q": q["cov_q"]
    }


def outer(id: str, dtype: str, side: int, size: int) -> tuple[Call, Call]:
    """(M, 1, K) against (1, N, K), beside the same pairs one after the other."""
    function, arrays = IDS[id].function, IDS[id].inputs(dtype, (side,), size)
    crossed = {name: a[None] if is_q(name) else a[:, None] for name, a in arrays.items()}
    pairs = {
        name: np.ascontiguousarray(np.broadcast_to(a, (side, side, size)).reshape(-1, size))
        for name, a in crossed.items()
    }
    return bind(function, crossed), bind(function, pairs)


def half(id: str, dtype: str, items: int, size: int) -> tuple[Call, Call]:
    """16-bit values beside the same in float32."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.float16
    function, arrays = IDS[id].function, IDS[id].inputs("float32", (items,), size)
    short = {name: a.astype(kind) for name, a in arrays.items()}
    return bind(function, short), bind(
        function, {name: a.astype(np.float32) for name, a in short.items()}
    )


def small(id: str, out: bool = False) -> tuple[Call, Call]:
    """One row of three, or one 2×2 pair, beside np.vecdot of the same arrays."""
    call, p, q = small_call(id)
    beside = functools.partial(np.vecdot, p, q)
    if out:
        call = functools.partial(call, out=np.empty(()))
        beside = functools.partial(beside, out=np.empty(p.shape[:-1]))
    return call, beside


def small_call(id: str) -> tuple[Callable[..., Any], np.ndarray, np.ndarray]:
    """The call, and two of its arrays."""
    size = 3 if IDS[id].core == 1 else 2
    a = IDS[id].inputs("float64", (), size)
    if id == "mvn":
        p, q, mean_p, mean_q = (a[n] for n in ("scale_tril_p", "scale_tril_q", "loc_p", "loc_q"))
        spreads = {"scale_tril_p": p, "scale_tril_q": q}
        return functools.partial(klfast.kl_mvn, mean_p, None, mean_q, **spreads), p, q
    if id == "normal-scale":
        m, s, n, t = (a[name] for name in ("loc_p", "scale_p", "loc_q", "scale_q"))
        return functools.partial(klfast.kl_normal, m, s, n, t), m, n
    p, q = a.values()
    return functools.partial(getattr(klfast, IDS[id].function), p, q), p, q


ROWS = ("discrete", "categorical", "normal-scale")
HALVES = ("float16", "bfloat16") if importlib.util.find_spec("ml_dtypes") else ("float16",)


def contrast(
    id: str, what: str, beside: str, make: Any, *arguments: Any, **options: Any
) -> Contrast:
    return Contrast(IDS[id].function, what, beside, lambda: make(id, *arguments), **options)


CONTRASTS = [
    *[
        contrast(
            id,
            "one call, " + ("D = 2" if id == "mvn" else "K = 3") + ", out" * out,
            "np.vecdot",
            small,
            out,
            floor=0.6,
            aim=1,
            large=False,
            same=False,
        )
        for out in (False, True)
        for id in (*ROWS, "mvn")
    ],
    *[
        contrast(
            id,
            f"{dtype} 1000×4096, axis=0",
            "contiguous rows",
            transposed,
            dtype,
            4096,
            1000,
            floor=round(1 / 1.5, 3),
            aim=1,
        )
        for id in ROWS
        for dtype in ("float32", "float64")
    ],
    *[
        contrast(
            "categorical",
            f"{dtype} 1000×4096, near equal, axis=0",
            "contiguous rows",
            transposed,
            dtype,
            4096,
            1000,
            1e-3,
            floor=round(1 / 1.5, 3),
            aim=1,
        )
        for dtype in ("float32", "float64")
    ],
    *[
        contrast(
            id,
            "float32 4096×1000, one q",
            "copies of q",
            shared,
            "float32",
            4096,
            1000,
            floor=0.95,
            aim=1,
        )
        for id in ROWS
    ],
    *[
        contrast(
            "mvn",
            f"float64 {items}×{size}×{size}, one covariance of q",
            "copies of q",
            shared,
            "float64",
            items,
            size,
            factors_and_covariances,
            floor=1.3,
            aim=2,
        )
        for items, size in ((3906, 16), (244, 64))
    ],
    *[
        contrast(
            id,
            f"float32 ({side}, 1, {size}) against (1, {side}, {size})",
            "the pairs in rows",
            outer,
            "float32",
            side,
            size,
            floor=0.9,
            aim=1,
        )
        for id in ("discrete", "categorical")
        for side, size in ((64, 1000), (300, 10))
    ],
    *[
        contrast(
            "categorical",
            f"{dtype} {items}×{size}",
            "float32",
            half,
            dtype,
            items,
            size,
            floor=0.8,
            aim=1,
        )
        for dtype in HALVES
        for items, size in ((4096, 1000), (512, 32_000))
    ],
]
