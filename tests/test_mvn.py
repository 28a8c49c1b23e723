"""What only multivariate normals have: factors and covariances, triangles, large matrices.

Accuracy over random inputs, dtypes, layouts and threads is tested for every family from the
registry; here are the sizes at which the kernel changes its method, and the hard cases.
"""

from __future__ import annotations

import klfast
import mpmath
import numpy as np
import pytest

import oracle
from registry import IDS, assert_close

DTYPES = ("float32", "float64")
FACTORS = {"float32": 4e-6, "float64": 1e-13}  # relative error allowed from factors
LANES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17)  # blocks and tiles that are cut off
LARGE = (24, 33, 49, 64, 65, 100, 128, 129, 257)  # both sides of every change of method
MANY = 11  # items: 8 of them fill the longest vectors' lanes
MVN = IDS["mvn"]


def factors(size, batch=(), near=None, dtype="float64", seed=0):
    """Give the arguments of kl_mvn with two factors a distribution, well conditioned."""
    return MVN.inputs(dtype, batch, size, near, seed)


def covariances(arrays):
    """Give the same distributions with covariances, rounded once."""

    def product(factor):
        exact = np.tril(factor).astype(np.longdouble if factor.shape[-1] < 300 else np.float64)
        return (exact @ np.swapaxes(exact, -1, -2)).astype(factor.dtype)

    return {
        "loc_p": arrays["loc_p"],
        "cov_p": product(arrays["scale_tril_p"]),
        "loc_q": arrays["loc_q"],
        "cov_q": product(arrays["scale_tril_q"]),
    }


def longdouble_cholesky(cov):
    """Factorise the lower triangle of one matrix in longdouble."""
    factor = np.tril(cov).astype(np.longdouble)
    for j in range(len(factor)):
        factor[j:, j] -= factor[j:, :j] @ factor[j, :j]
        factor[j:, j] /= np.sqrt(factor[j, j])
    return factor


def longdouble_kl(loc_p, loc_q, scale_tril_p, scale_tril_q):
    """Compute the KL of one pair of factors in longdouble."""
    p, q = np.tril(scale_tril_p).astype(np.longdouble), np.tril(scale_tril_q).astype(np.longdouble)
    y = np.column_stack([np.asarray(loc_p, np.longdouble) - loc_q, p - q])
    for i in range(len(q)):
        y[i] = (y[i] - q[i, :i] @ y[:i]) / q[i, i]
    t = np.diagonal(y[:, 1:])
    series = t * t * (1 / np.longdouble(2) - t * (1 / np.longdouble(3) - t * (0.25 - t / 5)))
    return float(np.sum(y * y) / 2 + np.sum(np.where(abs(t) < 1e-4, series, t - np.log1p(t))))


def exact_from_covariances(loc_p, cov_p, loc_q, cov_q):
    """Compute the KL of one pair of covariances with 60 digits; only lower triangles are read."""
    with mpmath.workdps(60):

        def factor(cov):
            return mpmath.cholesky(mpmath.matrix((np.tril(cov) + np.tril(cov, -1).T).tolist()))

        def solve(factor, b):
            x = []
            for i in range(len(b)):
                x.append((b[i] - mpmath.fsum(factor[i, k] * x[k] for k in range(i))) / factor[i, i])
            return x

        p, q, size = factor(cov_p), factor(cov_q), len(loc_p)
        columns = [[p[i, j] for i in range(size)] for j in range(size)]
        columns.append([mpmath.mpf(float(a)) - float(b) for a, b in zip(loc_p, loc_q, strict=True)])
        squares = mpmath.fsum(x * x for column in columns for x in solve(q, column))
        logs = mpmath.fsum(mpmath.log(p[i, i] / q[i, i]) for i in range(size))
        return float((squares - size) / 2 - logs)


def garbage_above(a):
    """Give a copy with NaN in the strict upper triangle."""
    return np.where(np.tri(a.shape[-1], dtype=bool), a, np.nan).astype(a.dtype)


def nan_where_bad(*arguments, **options):
    with np.errstate(invalid="ignore"):
        return klfast.kl_mvn(*arguments, **options, errors="nan")


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", LANES)
@pytest.mark.parametrize(
    ("dtype", "near"),
    [
        ("float32", None),
        ("float32", 1e-3),
        ("float32", 1e-6),
        ("float64", None),
        ("float64", 1e-2),
        ("float64", 1e-8),
    ],
)
def test_factors(size, dtype, near):
    arrays = factors(size, (MANY,), near, dtype)
    MVN.check(klfast.kl_mvn(**arrays), arrays)


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("near", [None, 1e-8])
@pytest.mark.parametrize("count", [1, 8])
def test_large_factors(size, near, count):
    arrays = factors(size, (count,), near)
    got = klfast.kl_mvn(**arrays)
    for i in range(count):
        want = longdouble_kl(**{name: a[i] for name, a in arrays.items()})
        assert abs(got[i] - want) <= 1e-13 * want, (
            f"{size=} {near=} {i=}: {got[i]!r}, want {want!r}"
        )


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("count", [1, 8])
def test_large_factors_float32(size, count):
    arrays = factors(size, (count,), dtype="float32")
    got = klfast.kl_mvn(**arrays)
    assert got.dtype == np.float32
    for i in range(count):
        want = longdouble_kl(**{name: a[i] for name, a in arrays.items()})
        assert abs(got[i] - want) <= 1e-6 * want, f"{size=} {i=}: {got[i]!r}, want {want!r}"


def autoregressive(rng, size):
    """Give the factor of a covariance with correlation 0.999 between neighbours."""
    steps = np.arange(size)
    return np.linalg.cholesky(0.999 ** abs(steps[:, np.newaxis] - steps))


def smooth(rng, size):
    """Give the factor of a Gaussian process at random places: a condition number of 1e3."""
    places = np.sort(rng.random(size))
    distance = (places[:, np.newaxis] - places) / 0.3
    return np.linalg.cholesky(np.exp(-0.5 * distance**2) + 1e-6 * np.eye(size))


def half_smooth(rng, size):
    """Give one that is well conditioned but for its last rows."""
    factor = np.eye(size)
    factor[size // 2 :, size // 2 :] = smooth(rng, size - size // 2)
    return factor


def growing(rng, size):
    """Give a factor whose inverse has elements up to 1.2^size."""
    return np.eye(size) - 0.2 * np.tri(size, k=-1)


@pytest.mark.parametrize("size", [8, 17, 33, 64, 65, 100, 129])
@pytest.mark.parametrize("make", [autoregressive, smooth, half_smooth, growing])
@pytest.mark.parametrize("near", [None, 1e-3, 1e-6])
def test_float32_holds_its_bound_whatever_the_condition(size, make, near):
    """Where rounding errors grow, float32 is computed in double."""
    rng = np.random.default_rng(size)
    for same_loc in (False, True):
        factor_q, loc_q = make(rng, size), rng.normal(size=size)
        factor_p, loc_p = make(rng, size) * 1.1, rng.normal(size=size)
        if near is not None:
            factor_p = factor_q * (1 + near * rng.normal(size=factor_q.shape))
            loc_p = loc_q + near * rng.normal(size=size)
        arrays = {
            "loc_p": loc_q if same_loc else loc_p,
            "loc_q": loc_q,
            "scale_tril_p": factor_p,
            "scale_tril_q": factor_q,
        }
        arrays = {name: a.astype("float32") for name, a in arrays.items()}
        want = longdouble_kl(**arrays)
        got = klfast.kl_mvn(**arrays)
        assert abs(got - want) <= max(1, size / 17) * 4e-6 * want, f"{got!r}, want {want!r}"


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e15, 1e30])
@pytest.mark.parametrize("size", [8, 33, 65, 100])
def test_float32_scales(size, scale):
    """KL does not change with the unit, and may itself be far from 1."""
    arrays = factors(size, (3,), dtype="float32")
    power = np.float32(2.0 ** np.round(np.log2(scale)))
    scaled = {name: a * power for name, a in arrays.items()}
    np.testing.assert_array_equal(klfast.kl_mvn(**scaled), klfast.kl_mvn(**arrays))
    far = {**arrays, "loc_p": arrays["loc_p"] + np.float32(1e17)}
    near = {**arrays, "scale_tril_p": arrays["scale_tril_q"], "loc_p": arrays["loc_q"].copy()}
    near["loc_p"][:] = 0
    near["loc_q"] = np.full_like(near["loc_q"], 1e-17)
    for extreme in (far, near):
        got = klfast.kl_mvn(**extreme)
        for i in range(3):
            want = longdouble_kl(**{name: a[i] for name, a in extreme.items()})
            assert abs(got[i] - want) <= 4e-6 * want


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize(
    ("dtype", "stretch"), [("float32", 1), ("float32", 30), ("float64", 1), ("float64", 1e4)]
)
def test_covariances(size, dtype, stretch):
    """The factorisation's rounding is the limit: about D eps cond(S) of the scale of the terms."""
    arrays = factors(size, (8,))
    axes = np.geomspace(1, stretch, size)
    for side in "pq":
        arrays[f"scale_tril_{side}"] *= axes
    arrays = {name: a.astype(dtype) for name, a in covariances(arrays).items()}
    condition = max(np.linalg.cond(arrays["cov_p"]).max(), np.linalg.cond(arrays["cov_q"]).max())
    got = klfast.kl_mvn(**arrays)
    want = [exact_from_covariances(*row) for row in zip(*arrays.values(), strict=True)]
    bound = 4 * size * condition * 2.0**-53 + np.finfo(dtype).eps  # float32 is factorised in double
    assert_close(got, want, want, bound, arrays)


@pytest.mark.parametrize("size", LARGE)
def test_large_covariances(size):
    arrays = covariances(factors(size))
    got = klfast.kl_mvn(**arrays)
    want = longdouble_kl(
        arrays["loc_p"],
        arrays["loc_q"],
        longdouble_cholesky(arrays["cov_p"]),
        longdouble_cholesky(arrays["cov_q"]),
    )
    condition = max(np.linalg.cond(arrays["cov_p"]), np.linalg.cond(arrays["cov_q"]))
    assert abs(got - want) <= (1e-13 + condition * 1e-16) * want, f"{size=}: {got!r}, want {want!r}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 8, 16, 20, 33, 65])
@pytest.mark.parametrize("count", [1, MANY])
def test_a_factor_against_a_covariance(dtype, size, count):
    arrays = factors(size, (count,), dtype=dtype)
    both = covariances({name: a.astype("float64") for name, a in arrays.items()})
    want = klfast.kl_mvn(**both)
    mixed = {**arrays, "cov_p": both["cov_p"].astype(dtype)}
    del mixed["scale_tril_p"]
    tolerance = 1e-11 if dtype == "float64" else 1e-3
    np.testing.assert_allclose(klfast.kl_mvn(**mixed), want, rtol=tolerance)
    mixed = {**arrays, "cov_q": both["cov_q"].astype(dtype)}
    del mixed["scale_tril_q"]
    np.testing.assert_allclose(klfast.kl_mvn(**mixed), want, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*LANES, 24, 33, 64])
def test_standard_normal(dtype, size):
    arrays = factors(size, (MANY,), dtype=dtype)
    loc, factor = arrays["loc_p"], arrays["scale_tril_p"]
    got = klfast.kl_mvn(loc, scale_tril_p=factor)
    identity = {"loc_q": np.zeros(size, dtype), "scale_tril_q": np.eye(size, dtype=dtype)}
    np.testing.assert_allclose(
        got, klfast.kl_mvn(loc, scale_tril_p=factor, **identity), rtol=8 * np.finfo(dtype).eps
    )
    if size <= 17:
        want, scale = oracle.kl_mvn(loc, scale_tril_p=factor, **identity)
        assert_close(got, want, scale, FACTORS[dtype], arrays)
    assert np.all(klfast.kl_mvn(np.zeros(size, dtype), scale_tril_p=np.eye(size, dtype=dtype)) == 0)
    assert np.all(klfast.kl_mvn(np.zeros(size, dtype), np.eye(size, dtype=dtype)) == 0)


LN2 = np.log(2)


@pytest.mark.parametrize(
    ("loc_p", "factor_p", "loc_q", "factor_q", "want"),
    [
        ([0], [[1]], [1], [[1]], 0.5),
        ([3], [[2]], [3], [[1]], 1.5 - LN2),
        ([3], [[1]], [3], [[2]], LN2 - 0.375),
        ([1], [[1]], [5], [[2]], LN2 - 0.375 + 2),
        ([0, 0], [[1, 0], [0, 1]], [0, 0], [[1, 0], [1, 1]], 0.5),
        ([0, 0], [[1, 0], [1, 1]], [0, 0], [[1, 0], [0, 1]], 0.5),
        ([1, 2], [[2, 0], [0, 3]], [1, 2], [[1, 0], [0, 3]], 1.5 - LN2),
        ([1, 1], [[1, 0], [2, 1]], [0, 0], [[1, 0], [2, 1]], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(loc_p, factor_p, loc_q, factor_q, want, dtype):
    loc_p, p, loc_q, q = (np.array(a, dtype) for a in (loc_p, factor_p, loc_q, factor_q))
    tolerance = 4 * float(np.finfo(dtype).eps)
    got = klfast.kl_mvn(loc_p, loc_q=loc_q, scale_tril_p=p, scale_tril_q=q)
    assert got == pytest.approx(want, rel=tolerance)
    assert klfast.kl_mvn(loc_p, p @ p.T, loc_q, q @ q.T) == pytest.approx(want, rel=tolerance)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33, 64])
@pytest.mark.parametrize(
    ("scale_p", "scale_q", "each"),  # each: what one dimension contributes
    [
        (1e-200, 1e200, 400 * np.log(10) - 0.5),
        (1e-150, 1.0, 150 * np.log(10) - 0.5),
        (1e200, 1e-200, np.inf),
        (1e100, 1.0, 0.5e200),
        (1e300, 1e300, 0),
        (1e-300, 1e-300, 0),
        (2e-300, 1e-300, 1.5 - LN2),
        (1e300, 2e300, LN2 - 0.375),
        (1.7e308, 1.2e308, 0.5 * ((1.7 / 1.2) ** 2 - 1) - np.log(1.7 / 1.2)),
        (4.0, 2.2e-308, np.inf),
        (2.2e-308, 4.0, np.log(4) - np.log(2.2e-308) - 0.5),
        (5e-324, 1.0, -np.log(5e-324) - 0.5),
        (5e-324, 5e-324, 0),
    ],
)
def test_extreme_scales(size, scale_p, scale_q, each):
    zero, eye = np.zeros(size), np.eye(size)
    got = klfast.kl_mvn(zero, loc_q=zero, scale_tril_p=scale_p * eye, scale_tril_q=scale_q * eye)
    want = size * each
    assert got == want or got == pytest.approx(want, rel=1e-14), f"{got!r}, want {want!r}"


@pytest.mark.parametrize("size", [2, 5, 20, 40])
def test_every_dimension_its_own_scale(size):
    """KL does not change when both distributions are mapped by the same diagonal matrix."""
    arrays = factors(size, (MANY,), near=1e-3)
    want = klfast.kl_mvn(**arrays)
    powers = 2.0 ** np.linspace(-400, 400, size).round()
    scaled = {
        name: a * (powers if name.startswith("loc") else powers[:, np.newaxis])
        for name, a in arrays.items()
    }
    np.testing.assert_array_equal(klfast.kl_mvn(**scaled), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*LANES, *LARGE[:-1]])
@pytest.mark.parametrize("count", [1, MANY])
def test_identical_is_exactly_zero(dtype, size, count):
    arrays = factors(size, (count,), dtype=dtype)
    loc, factor = arrays["loc_p"], arrays["scale_tril_p"]
    got = klfast.kl_mvn(loc, loc_q=loc, scale_tril_p=factor, scale_tril_q=factor)
    assert np.all(got == 0), got
    assert not np.signbit(got).any()
    cov = covariances(arrays)["cov_p"]
    assert np.all(klfast.kl_mvn(loc, cov, loc, cov) == 0)
    shared = klfast.kl_mvn(loc[[0] * MANY], cov[[0] * MANY], loc[0], cov[0])
    assert np.all(shared == 0), "the shared side was factorised otherwise"


def test_no_dimensions():
    got = klfast.kl_mvn(np.ones((3, 0)), np.ones((3, 0, 0)), np.ones((3, 0)), np.ones((3, 0, 0)))
    np.testing.assert_array_equal(got, np.zeros(3))


def test_never_negative():
    for size in (1, 2, 3, 6, 20):
        arrays = factors(size, (500,), near=1e-15)
        assert np.all(klfast.kl_mvn(**arrays) >= 0)
        assert np.all(klfast.kl_mvn(**covariances(arrays)) >= 0)


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [None, 1e-2])
@pytest.mark.parametrize("size", [*range(1, 26), 33, 49, 65])
def test_layouts(dtype, size, near):
    """Only the lower triangle is read, however the matrix lies in memory: kernels for items that
    lie one after the other give the same bits as those for any strides."""
    arrays = factors(size, (11,), near, dtype=dtype)
    for form in (arrays, covariances(arrays)):
        want = klfast.kl_mvn(**form)

        def fortran(a):
            return np.ascontiguousarray(np.swapaxes(a, -1, -2)).swapaxes(-1, -2)

        def apart(a):
            padded = np.full([2 * n + 1 for n in a.shape], np.nan, dtype)
            view = padded[tuple(slice(1, None, 2) for _ in a.shape)]
            view[...] = a
            return view

        def backwards(a):
            turn = (slice(None, None, -1),) * a.ndim
            return np.ascontiguousarray(a[turn])[turn]

        for relay in (fortran, apart, backwards):
            other = {
                name: relay(a if name.startswith("loc") else garbage_above(a))
                for name, a in form.items()
            }
            got = klfast.kl_mvn(**other)
            np.testing.assert_array_equal(got, want, err_msg=f"{relay.__name__} {size=} {dtype}")


@pytest.mark.parametrize("size", [1, 2, 5, 17, 20, 33, 49])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 130])
def test_shared_sides(size, count):
    if size > 20 and count > 9:
        count = 66
    arrays = factors(size, (count,))
    for form in (arrays, covariances(arrays)):
        for side in "pq":
            shared = {k: a[0] if k.endswith(side) else a for k, a in form.items()}
            repeated = {
                k: np.repeat(a[:1], count, axis=0) if k.endswith(side) else a
                for k, a in form.items()
            }
            got, want = klfast.kl_mvn(**shared), klfast.kl_mvn(**repeated)
            np.testing.assert_array_equal(got, want, err_msg=f"{side=} {size=} {count=}")
            own_loc = {**shared, f"loc_{side}": form[f"loc_{side}"]}
            repeated[f"loc_{side}"] = form[f"loc_{side}"]
            np.testing.assert_array_equal(klfast.kl_mvn(**own_loc), klfast.kl_mvn(**repeated))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "count"), [(150, 40), (300, 3), (300, 20), (700, 1), (1100, 1)])
def test_same_bits_when_threads_share_a_matrix(dtype, size, count):
    few = factors(size, (min(count, 3),), dtype=dtype)
    arrays = {name: np.resize(a, (count, *a.shape[1:])) for name, a in few.items()}
    shared = {name: a[0] if name.endswith("q") else a for name, a in arrays.items()}
    cases = [arrays, shared, {k: v for k, v in arrays.items() if k.endswith("p")}]
    if count < 20:
        cases += [covariances(shared)]
    for case in cases:
        with klfast.num_threads(1):
            want = klfast.kl_mvn(**case)
        for threads in (2, 3, 5):
            with klfast.num_threads(threads):
                np.testing.assert_array_equal(klfast.kl_mvn(**case), want)


MIXED = ("loc_p", "cov_p", "loc_q", "scale_tril_q")


def one_side(arrays):
    """Leave Q to be N(0, I)."""
    return {name: a for name, a in arrays.items() if name.endswith("p")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 8, 9, 10, 11, 12, 16, 23, 33, 50, 64, 65, 100, 128, 130])
@pytest.mark.parametrize(("near", "count"), [(None, MANY), (1e-5, 13)])
def test_bits_do_not_depend_on_the_batch(dtype, size, near, count):
    """Of 11 and 13, the last fill their lanes, go alone or overlap those before."""
    arrays = factors(size, (count,), near, dtype)
    both = covariances(arrays)
    mixed = {name: (both if name.endswith("p") else arrays)[name] for name in MIXED}
    for form in (arrays, both, mixed, one_side(arrays), one_side(both)):
        together = klfast.kl_mvn(**form)
        for part in (slice(0, 1), slice(3, 6), slice(4, 11), slice(None, None, -2)):
            got = klfast.kl_mvn(**{name: a[part] for name, a in form.items()})
            np.testing.assert_array_equal(got, together[part], err_msg=f"{part} {size=}")


def test_outer_broadcasting():
    arrays = factors(4, (6,))
    every = {k: a[:, np.newaxis] if k.endswith("p") else a for k, a in arrays.items()}
    got = klfast.kl_mvn(**every)
    for i, j in np.ndindex(6, 6):
        one = {k: a[i] if k.endswith("p") else a[j] for k, a in arrays.items()}
        assert got[i, j] == klfast.kl_mvn(**one)


# ---- bad input -------------------------------------------------------------------------------


def indefinite(cov):
    """Give a copy whose last leading minor is negative."""
    bad = cov.copy()
    bad[-1, -1] = -abs(bad[-1, -1])
    return bad


SIZES = [1, 2, 3, 4, 8, 17, 20, 33, 50]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["cov_p", "cov_q"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_positive_definite(size, name, dtype):
    arrays = covariances(factors(size, (9,), dtype=dtype))
    good = klfast.kl_mvn(**arrays)
    bad = [3, 6]
    for i in bad:
        arrays[name][i] = indefinite(arrays[name][i])
    with pytest.raises(np.linalg.LinAlgError, match=rf"{name}.*\b3\b"):
        klfast.kl_mvn(**arrays)
    got = nan_where_bad(**arrays)
    assert np.isnan(got[bad]).all()
    rest = np.delete(np.arange(9), bad)
    np.testing.assert_array_equal(got[rest], good[rest], err_msg="a bad neighbour changed a result")


def test_not_positive_definite_names_the_index():
    arrays = covariances(factors(3, (2, 4)))
    arrays["cov_q"][1, 2] = indefinite(arrays["cov_q"][1, 2])
    with pytest.raises(np.linalg.LinAlgError, match=r"cov_q.*1, 2"):
        klfast.kl_mvn(**arrays)


@pytest.mark.parametrize(
    "matrix",
    [
        [[1, 2], [2, 1]],
        [[0, 0], [0, 1]],
        [[1, 1], [1, 1]],
        [[-1, 0], [0, 1]],
        [[1, 0], [0, 0]],
        [[np.inf, 0], [0, 1]],
        [[1, np.inf], [np.inf, 1]],
    ],
    ids=str,
)
def test_what_is_not_positive_definite(matrix):
    zero, eye, matrix = np.zeros(2), np.eye(2), np.array(matrix, float)
    for arguments in (
        (zero, matrix, zero, eye),
        (zero, eye, zero, matrix),
        (zero, matrix, zero, matrix),
    ):
        assert np.isnan(nan_where_bad(*arguments)), arguments
        with pytest.raises(np.linalg.LinAlgError):
            klfast.kl_mvn(*arguments)
    assert np.isnan(nan_where_bad(zero, matrix))


def spoiled():
    """Give name, index of the element and the bad value put there."""
    for side in "pq":
        for value in (0.0, -1.0, np.inf, -np.inf, np.nan):
            yield f"scale_tril_{side}", (-1, -1), value
            yield f"scale_tril_{side}", (0, 0), value
        for value in (np.inf, -np.inf, np.nan):
            yield f"scale_tril_{side}", (-1, 0), value
            yield f"loc_{side}", (-1,), value


@pytest.mark.parametrize("size", [2, 5, 20, 33, 65])
@pytest.mark.parametrize("count", [1, MANY])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_values(size, count, dtype):
    arrays = factors(size, (count,), dtype=dtype)
    good = klfast.kl_mvn(**arrays)
    for name, index, value in spoiled():
        bad = {k: a.copy() for k, a in arrays.items()}
        bad[name][(count // 2, *index)] = value
        got = nan_where_bad(**bad)
        want = good.copy()
        want[count // 2] = np.nan
        np.testing.assert_array_equal(got, want, err_msg=f"{name}[{index}] = {value}, {size=}")


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_bad_on_both_sides(value):
    """Equal bad distributions are bad, not equal."""
    bad = np.diag([1.0, value])
    zero = np.zeros(2)
    got = nan_where_bad(zero, loc_q=zero, scale_tril_p=bad, scale_tril_q=bad)
    assert np.isnan(got)


def test_overflow_is_infinity():
    """Good values whose KL is too large for the dtype."""
    loc, far, eye = np.zeros(2), np.array([0, 1e300]), np.eye(2)
    assert klfast.kl_mvn(loc, eye, far, eye) == np.inf
    assert klfast.kl_mvn(far, eye) == np.inf
    steep = np.array([[1, 0], [1e300, 1]])
    assert klfast.kl_mvn(loc, loc_q=loc, scale_tril_p=eye, scale_tril_q=steep) == np.inf
    narrow = (loc.astype("f4"), np.eye(2, dtype="f4"), np.array([0, 1e30], "f4"))
    assert klfast.kl_mvn(*narrow, np.eye(2, dtype="f4")) == np.inf
