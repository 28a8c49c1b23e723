"""Gradients of kl_mvn against 300-bit arithmetic, mpmath's derivatives and finite differences."""

from __future__ import annotations

import itertools
import tracemalloc

import klfast
import klfast.grad
import mpmath
import numpy as np
import pytest
from flint import arb, arb_mat, ctx

from registry import IDS

DTYPES = ("float32", "float64")
BOUND = {"float32": 4e-7, "float64": 1e-13}  # of the largest element of a gradient, from factors
NEAR = [("float32", None), ("float32", 1e-6), ("float64", None), ("float64", 1e-8)]
SIZES = (1, 2, 3, 4, 5, 8, 9, 17, 24, 25, 28, 33, 65)  # both sides of every change of method
FACTORS = ("loc_p", "scale_tril_p", "loc_q", "scale_tril_q")


def factors(size, batch=(), near=None, dtype="float64", seed=0):
    """Give the arguments with two factors a distribution, well conditioned."""
    arrays = IDS["mvn"].inputs(dtype, batch, size, near, seed)
    return {name: arrays[name] for name in FACTORS}


def with_covariances(arrays, sides="pq"):
    """Give the same with covariances, rounded once, for these sides."""
    given = {}
    for name, a in arrays.items():
        side = name[-1]
        if name.startswith("scale_tril") and side in sides:
            wide = np.tril(a).astype(np.longdouble)
            given[f"cov_{side}"] = (wide @ np.swapaxes(wide, -1, -2)).astype(a.dtype)
        else:
            given[name] = a
    return given


def take(arrays, index):
    return {name: a[index] for name, a in arrays.items()}


def matrix(a):
    return arb_mat([[arb(float(x)) for x in row] for row in a])


def numbers(a):
    return np.array([[float(a[i, j].mid()) for j in range(a.ncols())] for i in range(a.nrows())])


def exact(arrays):
    """Compute the gradients of one item by their definitions with 300 bits."""
    ctx.prec = 300
    size = len(arrays["loc_p"])
    factor, cov = {}, {}
    for side in "pq":
        if f"cov_{side}" in arrays:
            lower = np.tril(arrays[f"cov_{side}"])
            cov[side] = matrix(lower + np.tril(lower, -1).T)
        else:
            factor[side] = matrix(np.tril(arrays.get(f"scale_tril_{side}", np.eye(size))))
            cov[side] = factor[side] * factor[side].transpose()
    inverse = {side: cov[side].inv() for side in "pq"}
    shift = matrix(arrays["loc_p"][:, np.newaxis])
    shift -= matrix(arrays.get("loc_q", np.zeros(size))[:, np.newaxis])
    half = arb(0.5)
    to_loc = numbers(inverse["q"] * shift)[:, 0]
    second = cov["p"] + shift * shift.transpose()
    to_cov = {
        "p": (inverse["q"] - inverse["p"]) * half,
        "q": (inverse["q"] - inverse["q"] * second * inverse["q"]) * half,
    }
    results = {"loc_p": to_loc, "loc_q": -to_loc}
    for side in "pq":
        results[f"cov_{side}"] = numbers(to_cov[side])
        if side in factor:
            results[f"scale_tril_{side}"] = np.tril(numbers(to_cov[side] * factor[side] * arb(2)))
    return results


def assert_near(got, want, bound, what=""):
    scale = np.abs(want).max(initial=0.0)
    error = np.abs(got - want).max(initial=0.0)
    assert error <= bound * scale + np.finfo(got.dtype).smallest_subnormal, (
        f"{what}: {error / scale:.3g} of the largest element"
    )


def check(arrays, bound, **options):
    """Assert that value and gradients of a batch are right."""
    value, *gradients = klfast.grad.kl_mvn(**arrays, **options)
    np.testing.assert_allclose(value, klfast.kl_mvn(**arrays), rtol=4 * bound)
    for index in np.ndindex(value.shape):
        want = exact(take(arrays, index))
        for name, gradient in zip(arrays, gradients, strict=True):
            assert gradient.shape == arrays[name].shape
            assert gradient.dtype == arrays[name].dtype
            assert_near(gradient[index], want[name], bound, name)


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "near"), NEAR)
def test_factors(size, dtype, near):
    check(factors(size, (5 if size < 10 else 2,), near, dtype), BOUND[dtype])


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 25, 33])
@pytest.mark.parametrize("sides", ["pq", "p", "q"])
@pytest.mark.parametrize(
    ("dtype", "near"), [("float32", None), ("float64", None), NEAR[1], NEAR[3]]
)
def test_covariances(size, sides, dtype, near):
    """The rounding of the factorisation, in double, is divided by the distance of P and Q."""
    arrays = with_covariances(factors(size, (2,), near, dtype), sides)
    condition = max(np.linalg.cond(a).max() for name, a in arrays.items() if name[:3] == "cov")
    distance = 1.0
    if near is not None:  # what rounding the covariances has left of it
        distance = max(near, float(np.finfo(dtype).eps))
    bound = BOUND[dtype] / 4 + size * condition * 2.0**-53 / distance
    for index in range(2):
        item = take(arrays, index)
        want = exact(item)
        for name, got in zip(item, klfast.grad.kl_mvn(**item)[1:], strict=True):
            assert_near(got, want[name], bound, name)
            if name.startswith("cov"):
                np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 24, 25, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_standard_normal(size, dtype):
    arrays = factors(size, (3,), dtype=dtype)
    arrays = {name: arrays[name] for name in FACTORS[:2]}
    check(arrays, BOUND[dtype])
    check(with_covariances(arrays), 20 * BOUND[dtype])


def mpmath_kl(arguments):
    """Compute the divergence of lists of mpmath numbers; covariances are symmetrised."""

    def cov(side):
        if f"cov_{side}" in arguments:
            a = arguments[f"cov_{side}"]
            return (a + a.T) / 2
        return arguments[f"scale_tril_{side}"] * arguments[f"scale_tril_{side}"].T

    shift, inverse = arguments["loc_p"] - arguments["loc_q"], cov("q") ** -1
    product = inverse * cov("p")
    trace = mpmath.fsum(product[i, i] for i in range(product.rows))
    return (
        trace - product.rows - mpmath.log(mpmath.det(product)) + (shift.T * inverse * shift)[0, 0]
    ) / 2


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("sides", ["", "p", "q", "pq"])
@pytest.mark.parametrize("near", [None, 1e-3])
def test_mpmath_derivatives(size, sides, near):
    """Central differences with 80 digits: every element of every gradient, and the convention for
    symmetric matrices."""
    arrays = with_covariances(factors(size, near=near), sides)
    gradients = dict(zip(arrays, klfast.grad.kl_mvn(**arrays)[1:], strict=True))
    with mpmath.workdps(80):
        step = mpmath.mpf(10) ** -30
        arguments = {
            name: mpmath.matrix((np.tril(a) if name[:5] == "scale" else a).tolist())
            for name, a in arrays.items()
        }
        for name, gradient in gradients.items():
            want = np.zeros(gradient.shape)
            for index in np.ndindex(want.shape):
                if name[:5] == "scale" and index[1] > index[0]:
                    continue
                place = index if len(index) == 2 else (index[0], 0)
                kept = arguments[name][place]
                ends = []
                for sign in (1, -1):
                    arguments[name][place] = kept + sign * step
                    ends.append(mpmath_kl(arguments))
                arguments[name][place] = kept
                want[index] = float((ends[0] - ends[1]) / (2 * step))
            assert_near(gradient, want, 1e-10 if sides else 1e-14, name)


@pytest.mark.parametrize("size", [4, 30])
@pytest.mark.parametrize("sides", ["", "pq"])
def test_finite_differences(size, sides):
    """The change along a random direction."""
    arrays = with_covariances(factors(size, (3,)), sides)
    rng = np.random.default_rng(size)
    change = {name: rng.normal(size=a.shape) / size for name, a in arrays.items()}
    for name in change:
        if name.startswith("cov"):
            change[name] = change[name] + np.swapaxes(change[name], -1, -2)
    step = 1e-5
    ends = [
        klfast.kl_mvn(**{name: a + sign * step * change[name] for name, a in arrays.items()})
        for sign in (1, -1)
    ]
    gradients = klfast.grad.kl_mvn(**arrays)[1:]
    along = [
        np.sum(g * change[name], axis=tuple(range(1, g.ndim)))
        for name, g in zip(arrays, gradients, strict=True)
    ]
    np.testing.assert_allclose(sum(along), (ends[0] - ends[1]) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 8, 24, 25, 64])
def test_identical_gives_exact_zeros(dtype, size):
    arrays = factors(size, (5,), dtype=dtype)
    arrays |= {"loc_q": arrays["loc_p"], "scale_tril_q": arrays["scale_tril_p"]}
    for form in (arrays, with_covariances(arrays)):
        for result in klfast.grad.kl_mvn(**form):
            assert not result.any()


@pytest.mark.parametrize("size", [5, 30])
@pytest.mark.parametrize("power", [-150, 150])
def test_unit_of_measurement(size, power):
    """A gradient scales as one over its argument, and covariances as the squares of factors."""
    scale = 2.0**power
    arrays = factors(size, (3,), near=1e-3)
    for form in (arrays, with_covariances(arrays)):
        want = klfast.grad.kl_mvn(**form)
        units = {name: scale**2 if name[:3] == "cov" else scale for name in form}
        got = klfast.grad.kl_mvn(**{name: a * units[name] for name, a in form.items()})
        np.testing.assert_array_equal(got[0], want[0])
        for name, g, w in zip(form, got[1:], want[1:], strict=True):
            np.testing.assert_array_equal(g, w / units[name])


# ---- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 6, 13, 27])
@pytest.mark.parametrize("sides", ["", "p", "q", "pq"])
def test_wrt(size, sides):
    """Every subset, in any order, gives the bits that all together give."""
    arrays = with_covariances(factors(size, (5,)), sides)
    value, *gradients = klfast.grad.kl_mvn(**arrays)
    everything = dict(zip(arrays, gradients, strict=True))
    names = list(arrays)
    for bits in range(1, 16):
        wrt = [name for i, name in enumerate(names) if bits >> i & 1][::-1]
        got = klfast.grad.kl_mvn(**arrays, wrt=wrt)
        np.testing.assert_array_equal(got[0], value)
        assert len(got) == 1 + len(wrt)
        for name, gradient in zip(wrt, got[1:], strict=True):
            np.testing.assert_array_equal(gradient, everything[name])
    np.testing.assert_array_equal(klfast.grad.kl_mvn(**arrays, wrt="loc_q")[1], everything["loc_q"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17, 27, 40])
@pytest.mark.parametrize("sides", ["", "pq"])
def test_layouts(dtype, size, sides):
    """However matrices lie in memory, and whatever is above the diagonal of those that come in;
    factors' gradients are 0 there."""
    arrays = with_covariances(factors(size, (7,), dtype=dtype), sides)
    want = klfast.grad.kl_mvn(**arrays)
    upper = ~np.tri(size, dtype=bool)
    for name, gradient in zip(arrays, want[1:], strict=True):
        if name.startswith("scale_tril"):
            assert not gradient[:, upper].any()
    garbage = {
        name: np.where(upper, np.nan, a).astype(dtype) if a.ndim == 3 else a
        for name, a in arrays.items()
    }
    turned = {name: np.asfortranarray(a) for name, a in garbage.items()}
    spread = {name: np.repeat(a, 2, axis=-1)[::-1, ..., ::2][::-1] for name, a in garbage.items()}
    for form in (garbage, turned, spread):
        out = tuple(np.full(a.shape[::-1], np.nan, dtype).T for a in arrays.values())
        got = klfast.grad.kl_mvn(**form, out=out)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g, w)
        for g, o in zip(got[1:], out, strict=True):
            assert g is o


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 8, 27])
@pytest.mark.parametrize("sides", ["", "pq"])
def test_broadcast_arguments_are_summed_back(dtype, size, sides):
    """In double: float32 is rounded only once more, however many terms cancel."""
    count = 3000 // size
    arrays = with_covariances(factors(size, (2, count), dtype=dtype), sides)
    loc, one = list(arrays)[2], list(arrays)[3]
    shared = arrays | {loc: arrays[loc][:, :1], one: arrays[one][0, 0]}
    full = {
        name: np.ascontiguousarray(np.broadcast_to(a, arrays[name].shape))
        for name, a in shared.items()
    }
    value, *got = klfast.grad.kl_mvn(**shared)
    want_value, *want = klfast.grad.kl_mvn(**full)
    np.testing.assert_array_equal(value, want_value)
    for g, w, name in zip(got, want, shared, strict=True):
        assert g.shape == shared[name].shape
        assert g.dtype == dtype
        axes = {loc: (1,), one: (0, 1)}.get(name, ())
        total = w.astype(np.longdouble).sum(axis=axes, keepdims=True).reshape(g.shape)
        absolute = np.abs(w).astype(np.longdouble).sum(axis=axes, keepdims=True).reshape(g.shape)
        rounding = 2.0**-53 * count * absolute
        assert np.all(np.abs(g - total) <= np.finfo(dtype).eps * np.abs(total) + rounding)


def test_one_q_for_many_takes_no_memory_of_the_batch():
    arrays = factors(8, (30_000,))
    shared = arrays | {"loc_q": arrays["loc_q"][0], "scale_tril_q": arrays["scale_tril_q"][0]}
    klfast.grad.kl_mvn(**shared, wrt=("loc_q", "scale_tril_q"))
    tracemalloc.start()
    try:
        klfast.grad.kl_mvn(**shared, wrt=("loc_q", "scale_tril_q"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < arrays["scale_tril_p"].nbytes / 2


@pytest.mark.parametrize("size", [1, 3, 8, 27])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cotangent(size, dtype):
    arrays = factors(size, (2, 7), dtype=dtype)
    value, *gradients = klfast.grad.kl_mvn(**arrays)
    weights = np.array([[0.5], [-2.0]]) * np.array([1.0, 0, 4, 0.25, 1, 1, -1])
    for cotangent in (weights, weights[0], weights[:, :1], 2.0):
        got_value, *got = klfast.grad.kl_mvn(**arrays, cotangent=cotangent)
        np.testing.assert_array_equal(got_value, value)
        full = np.broadcast_to(cotangent, value.shape)
        for g, w in zip(got, gradients, strict=True):
            assert g.dtype == dtype
            np.testing.assert_array_equal(g, full[(...,) + (None,) * (w.ndim - 2)] * w)
    with pytest.raises(ValueError, match=r"cotangent has shape \(3,\)"):
        klfast.grad.kl_mvn(**arrays, cotangent=np.ones(3))
    with pytest.raises(ValueError, match="cotangent has shape"):
        klfast.grad.kl_mvn(**arrays, cotangent=np.ones((5, 2, 7)))


@pytest.mark.parametrize("size", [3, 27])
def test_dtypes(size):
    arrays = factors(size, (2,))
    half = {name: a.astype("float16") for name, a in arrays.items()}
    single = {name: a.astype("float32") for name, a in half.items()}
    for got, want in zip(klfast.grad.kl_mvn(**half), klfast.grad.kl_mvn(**single), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
    whole = [np.arange(size), np.eye(size, dtype=int), np.zeros(size, int), 2 * np.eye(size)]
    for got in klfast.grad.kl_mvn(*whole):
        assert got.dtype == np.float64


def test_empty():
    for result in klfast.grad.kl_mvn(np.ones((3, 0)), np.ones((3, 0, 0))):
        assert result.shape[0] == 3
        assert not result.any()
    value, *gradients = klfast.grad.kl_mvn(np.ones((0, 2)), np.ones((0, 2, 2)), [1, 2], np.eye(2))
    assert value.shape == (0,)
    assert [g.shape for g in gradients] == [(0, 2), (0, 2, 2), (2,), (2, 2)]
    assert not gradients[3].any()


@pytest.mark.parametrize("size", [5, 20, 33, 150])
@pytest.mark.parametrize("sides", ["", "pq", "p"])
def test_threads_give_the_same_bits(size, sides):
    """Many items that threads take in turn, and few large ones that they share."""
    arrays = with_covariances(factors(size, (max(1, 150 // size) ** 2 * 3,)), sides)
    results = []
    for threads in (1, 2, 3):
        with klfast.num_threads(threads):
            results.append(klfast.grad.kl_mvn(**arrays))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("size", [2, 8, 20, 30])
def test_neighbours_do_not_matter(size):
    arrays = factors(size, (9,))
    for form in (arrays, with_covariances(arrays)):
        together = klfast.grad.kl_mvn(**form)
        for i in range(9):
            for got, want in zip(klfast.grad.kl_mvn(**take(form, i)), together, strict=True):
                np.testing.assert_array_equal(got, want[i])


# ---- what is bad -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8, 20, 30])
@pytest.mark.parametrize(
    ("which", "bad"),
    [
        *itertools.product(FACTORS, (np.nan, np.inf)),
        *itertools.product(FACTORS[1::2], (0.0, -1.0)),
    ],
)
def test_bad_items_are_nan_alone(size, which, bad):
    arrays = factors(size, (9,))
    want = klfast.grad.kl_mvn(**arrays)
    arrays[which][(4,) + (1,) * (arrays[which].ndim - 1)] = bad
    with np.errstate(invalid="ignore"):
        got = klfast.grad.kl_mvn(**arrays)
        blank = klfast.grad.kl_mvn(**arrays, cotangent=np.arange(9) != 4)
    assert np.isnan(got[0][4])
    others = np.arange(9) != 4
    lower = np.tri(size, dtype=bool)
    for g, b, w in zip(got[1:], blank[1:], want[1:], strict=True):
        np.testing.assert_array_equal(g[others], w[others])
        np.testing.assert_array_equal(b[others], w[others])
        assert np.isnan(g[4][lower] if g.ndim == 3 else g[4]).all()
        assert not b[4].any()


def test_invalid_condition():
    arrays = factors(3, (4,))
    arrays["scale_tril_p"][2, 0, 0] = -1
    with np.errstate(invalid="raise"), pytest.raises(FloatingPointError):
        klfast.grad.kl_mvn(**arrays)
    arrays["scale_tril_p"][2, 0, 0] = np.nan
    with np.errstate(invalid="raise"):
        assert np.isnan(klfast.grad.kl_mvn(**arrays)[0][2])


@pytest.mark.parametrize("size", [2, 20, 30])
@pytest.mark.parametrize("side", ["p", "q"])
def test_indefinite_covariances(size, side):
    arrays = with_covariances(factors(size, (5,)))
    arrays[f"cov_{side}"][3, 1, 1] = -1
    message = rf"cov_{side} is not positive definite at batch index \(3,\)"
    with pytest.raises(np.linalg.LinAlgError, match=message):
        klfast.grad.kl_mvn(**arrays)
    results = klfast.grad.kl_mvn(**arrays, errors="nan")
    for result in results:
        assert np.isnan(result[3]).all()
        assert np.isfinite(np.delete(result, 3, axis=0)).all()


def test_refused():
    eye = np.eye(2)
    arrays = {"loc_p": [0.0, 1], "cov_p": eye, "loc_q": [1.0, 0], "cov_q": eye}
    for wrt in ("cov", ["loc_p", "scale_tril_q"]):
        with pytest.raises(ValueError, match="wrt names"):
            klfast.grad.kl_mvn(**arrays, wrt=wrt)
    with pytest.raises(ValueError, match="errors must be"):
        klfast.grad.kl_mvn(**arrays, errors="ignore")
    with pytest.raises(TypeError, match="exactly one of cov_p, scale_tril_p"):
        klfast.grad.kl_mvn(**arrays, scale_tril_p=eye)
    with pytest.raises(ValueError, match="cov_q has shape"):
        klfast.grad.kl_mvn(**arrays | {"cov_q": np.eye(3)})
    with pytest.raises(ValueError, match="do not broadcast"):
        klfast.grad.kl_mvn(np.zeros((2, 2)), eye, np.zeros((3, 2)), eye)
    with pytest.raises(TypeError, match="loc_q is missing"):
        klfast.grad.kl_mvn([0.0, 1], eye, cov_q=eye)
    with pytest.raises(TypeError, match="out must be"):
        klfast.grad.kl_mvn(**arrays, out=np.zeros(2))
    with pytest.raises(ValueError, match="out for cov_p has shape"):
        klfast.grad.kl_mvn(**arrays, wrt="cov_p", out=(np.zeros(2),))
    dask = pytest.importorskip("dask.array")
    with pytest.raises(TypeError, match="loc_p is a lazy array"):
        klfast.grad.kl_mvn(**arrays | {"loc_p": dask.zeros(2)})
