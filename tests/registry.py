"""The table of public functions that drives the tests: one entry for every way to call one.

An entry says how to make inputs, how exact the result must be and what the exact result is. A new
function, or a new way to call one, is an entry here; the tests of accuracy, arrays, threads,
instruction sets and memory bounds pick it up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import klfast
import klfast.reference
import numpy as np

import oracle

ROWS = {"float32": 1e-6, "float64": 1e-14}
FACTORS = {"float32": 4e-6, "float64": 1e-13}
DTYPES = ("float32", "float64")
SMALLEST_RELATIVE_DIFFERENCE = {"float32": 1e-6, "float64": 1e-8}
# The absolute error allowed where the result does not depend on the scale of its inputs: what
# rounding one common factor leaves of an exact zero (K = 1, proportional weights). It is far below
# what the rounding of the inputs themselves makes, 4e-15 and 1e-32.
ZERO = {"float32": 1e-28, "float64": 1e-40}


@dataclass(frozen=True)
class Entry:
    """One way to call a public function.

    `make(rng, shape, near)` gives the arrays by keyword in float64; `near` is None for unrelated
    P and Q, else Q is P perturbed by that relative amount. `core` counts the axes that belong to
    one distribution in each array, `exact` gives (value, scale) of arrays and options.
    """

    id: str
    function: str
    make: Callable[..., dict[str, np.ndarray]]
    exact: Callable[..., tuple[np.ndarray, np.ndarray]]
    bound: dict[str, float] = field(default_factory=lambda: ROWS)
    options: dict[str, object] = field(default_factory=dict)
    core: int = 1
    max_size: int = 10**9

    def __call__(self, arrays, **options):
        """Call the public function."""
        return getattr(klfast, self.function)(**arrays, **self.options, **options)

    def reference(self, arrays, **options):
        """Call its twin in klfast.reference."""
        return getattr(klfast.reference, self.function)(**arrays, **self.options, **options)

    def inputs(self, dtype, batch, size, near=None, seed=0):
        """Make arrays of `dtype` for a batch of distributions of `size`, always the same."""
        key = f"{self.id} {dtype} {batch} {size} {near} {seed}"
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        arrays = self.make(rng, (*batch, size), near)
        return {name: np.ascontiguousarray(a.astype(dtype)) for name, a in arrays.items()}

    def core_axes(self, name):
        """Count the axes of one distribution in the array called `name`."""
        return 1 if name.startswith("loc") else self.core

    def check(self, got, arrays, factor=1.0, **options):
        """Assert that `got` is the exact result of `arrays` within the bound, and not negative."""
        want, scale = self.exact(**arrays, **self.options, **options)
        proper = self.options.get("normalize", True)
        length = next(iter(arrays.values())).shape[-1]
        tiny = length * np.finfo(got.dtype).smallest_subnormal  # each term may be rounded to it
        zero = ZERO[got.dtype.name] if proper else tiny
        assert_close(got, want, scale, factor * self.bound[got.dtype.name], arrays, zero)
        if proper:
            assert np.all(got >= 0), f"negative: {got[got < 0]}"


def assert_close(got, want, scale, bound, arrays, zero=0.0):
    """Assert |got − want| ≤ bound · scale + zero; show the worst row of `arrays` if not."""
    got, want, scale = np.asarray(got), np.asarray(want), np.asarray(scale)
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    zero = zero + np.finfo(got.dtype).smallest_subnormal
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        same = want.astype(got.dtype) == got
        difference = np.abs(got.astype(np.float64) - want) - zero
        error = np.where(same, 0.0, difference / scale)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[worst] <= bound, (
        f"row {tuple(map(int, worst))}: relative error {error[worst]:.3g} > {bound:.3g}; "
        f"got {got[worst]!r}, want {want[worst]!r}, scale {scale[worst]!r}; "
        f"inputs\n{show(arrays, worst)}"
    )


def show(arrays, index, most=12):
    """Print the start of one row of each array so that it can be pasted."""
    lines = []
    for name, a in arrays.items():
        a = np.asarray(a)
        row = a[index] if index and a.ndim > len(index) else a
        lines.append(f"  {name} ({a.dtype}, {a.shape}): {row.ravel()[:most].tolist()}")
    return "\n".join(lines)


def _weights(rng, shape, near):
    p = rng.exponential(size=shape) ** 2 + 1e-12
    q = (
        rng.exponential(size=shape) ** 2 + 1e-12
        if near is None
        else p * np.exp(near * rng.normal(size=shape))
    )
    return p, q


def make_probabilities(rng, shape, near=None):
    """Give two distributions that sum to one up to rounding."""
    p, q = _weights(rng, shape, near)
    return {"p": p / p.sum(-1, keepdims=True), "q": q / q.sum(-1, keepdims=True)}


def make_sparse(rng, shape, near=None):
    """Give probabilities with masks, zeros in both; if P and Q are unrelated, zeros in p too."""
    p, q = _weights(rng, shape, near)
    kind = rng.random(shape)
    kind[..., 0] = 1
    p[kind < (0.4 if near is None else 0.2)], q[kind < 0.2] = 0, 0
    return {"p": p / p.sum(-1, keepdims=True), "q": q / q.sum(-1, keepdims=True)}


def make_counts(rng, shape, near=None):
    """Give integer counts whose totals differ: q is about 3 p."""
    most = 100 if near is None else min(2**21, 1 + int(2 / near))
    p = rng.integers(1, 1 + most, shape).astype(np.float64)
    q = rng.integers(1, 100, shape) if near is None else 3 * p + rng.integers(0, 3, shape)
    return {"p": p, "q": q.astype(np.float64)}


def make_totals(rng, shape, near=None):
    """Give weights whose totals differ by odd factors."""
    p, q = _weights(rng, shape, near)
    return {"p": p, "q": q * 10.0 ** rng.uniform(-5, 5, (*shape[:-1], 1))}


def make_logits(rng, shape, near=None, scale=3.0):
    """Give logits of a few units."""
    a = scale * rng.normal(size=shape)
    b = scale * rng.normal(size=shape) if near is None else a + near * rng.normal(size=shape)
    return {"logits_p": a, "logits_q": b}


def make_masked_logits(rng, shape, near=None):
    """Give logits with masks, −inf in both, and if P and Q are unrelated with −inf in p."""
    arrays = make_logits(rng, shape, near)
    kind = rng.random(shape)
    kind[..., 0] = 1
    arrays["logits_p"][kind < (0.4 if near is None else 0.2)] = -np.inf
    arrays["logits_q"][kind < 0.2] = -np.inf
    return arrays


def make_normal(spread_p, spread_q):
    """Give a maker of means and one kind of spread a side."""
    convert = {"scale": lambda s: s, "var": lambda s: s * s, "logvar": lambda s: 2 * np.log(s)}

    def make(rng, shape, near=None):
        mean_p, scale_p = rng.normal(size=shape), np.exp(rng.normal(size=shape))
        mean_q, scale_q = rng.normal(size=shape), np.exp(rng.normal(size=shape))
        if near is not None:
            mean_q = mean_p + near * scale_p * rng.normal(size=shape)
            scale_q = scale_p * np.exp(near * rng.normal(size=shape))
        spreads = {
            f"{spread_p}_p": convert[spread_p](scale_p),
            f"{spread_q}_q": convert[spread_q](scale_q),
        }
        return {"loc_p": mean_p, "loc_q": mean_q, **spreads}

    return make


def make_standard(rng, shape, near=None):
    """Give means and log-variances, of normals beside N(0, I)."""
    size = 1.0 if near is None else near
    return {"loc_p": size * rng.normal(size=shape), "logvar_p": size * rng.normal(size=shape)}


def make_factors(rng, shape, near=None):
    """Give means and well-conditioned lower Cholesky factors."""
    square = (*shape, shape[-1])

    def factor():
        return np.tril(rng.normal(size=square), -1) / np.sqrt(shape[-1]) + np.eye(
            shape[-1]
        ) * np.exp(0.3 * rng.normal(size=square))

    loc_p, factor_p, loc_q, factor_q = (
        rng.normal(size=shape),
        factor(),
        rng.normal(size=shape),
        factor(),
    )
    if near is not None:
        loc_q = loc_p + near * rng.normal(size=shape)
        factor_q = factor_p * np.exp(near * rng.normal(size=square))
    return {"loc_p": loc_p, "scale_tril_p": factor_p, "loc_q": loc_q, "scale_tril_q": factor_q}


RAW = {"normalize": False}
COOL = {"temperature": 0.7}
ENTRIES = [
    Entry("discrete", "kl_discrete", make_probabilities, oracle.kl_discrete),
    Entry("discrete-sparse", "kl_discrete", make_sparse, oracle.kl_discrete),
    Entry("discrete-counts", "kl_discrete", make_counts, oracle.kl_discrete),
    Entry("discrete-totals", "kl_discrete", make_totals, oracle.kl_discrete),
    Entry("discrete-raw", "kl_discrete", make_probabilities, oracle.kl_discrete, options=RAW),
    Entry("discrete-raw-counts", "kl_discrete", make_counts, oracle.kl_discrete, options=RAW),
    Entry("categorical", "kl_categorical", make_logits, oracle.kl_categorical),
    Entry("categorical-masked", "kl_categorical", make_masked_logits, oracle.kl_categorical),
    Entry("categorical-cool", "kl_categorical", make_logits, oracle.kl_categorical, options=COOL),
    Entry("normal-scale", "kl_normal", make_normal("scale", "scale"), oracle.kl_normal),
    Entry("normal-var", "kl_normal", make_normal("var", "var"), oracle.kl_normal),
    Entry("normal-logvar", "kl_normal", make_normal("logvar", "logvar"), oracle.kl_normal),
    Entry("normal-scale-var", "kl_normal", make_normal("scale", "var"), oracle.kl_normal),
    Entry("normal-var-scale", "kl_normal", make_normal("var", "scale"), oracle.kl_normal),
    Entry("normal-logvar-scale", "kl_normal", make_normal("logvar", "scale"), oracle.kl_normal),
    Entry("normal-var-logvar", "kl_normal", make_normal("var", "logvar"), oracle.kl_normal),
    Entry("normal-standard", "kl_normal", make_standard, oracle.kl_normal),
    Entry("mvn", "kl_mvn", make_factors, oracle.kl_mvn, FACTORS, core=2, max_size=17),
]
IDS = {entry.id: entry for entry in ENTRIES}
PLAIN = [IDS[name] for name in ("discrete", "categorical", "normal-scale", "mvn")]  # one a family
