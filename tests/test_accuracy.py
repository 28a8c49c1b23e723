"""Every result is within its bound of the exact value, at every scale and length, and ≥ 0."""

import klfast
import mpmath
import numpy as np
import pytest

import oracle
from registry import DTYPES, ENTRIES, IDS, PLAIN, ROWS, SMALLEST_RELATIVE_DIFFERENCE, assert_close

SIZES = [1, 2, 3, 7, 10, 31, 32, 33, 77, 1000, 4099, 20_000, 100_000]
NEAR = [None, 3.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8]


def kept(dtype, size, near):
    """Leave out what a dtype cannot tell apart, and most of the middle for long rows."""
    smallest = SMALLEST_RELATIVE_DIFFERENCE[dtype]
    if near is not None and near < smallest:
        return False
    return size <= 4099 or near in (None, smallest) or (size <= 20_000 and near in (1e-1, 1e-3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
def test_bound(entry, dtype, size):
    if size > entry.max_size:
        pytest.skip("too large for the oracle")
    if size > 20_000 and entry.function == "kl_normal" and entry not in PLAIN:
        pytest.skip("as long rows of the other spreads")
    rows = 1 if size > 4000 else max(2, min(20, 400 // size))
    for near in NEAR:
        if kept(dtype, size, near):
            arrays = entry.inputs(dtype, (rows,), size, near)
            got = entry(arrays)
            assert got.dtype == dtype
            try:
                entry.check(got, arrays)
            except AssertionError as error:
                raise AssertionError(f"near={near}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
def test_every_small_size(entry, dtype):
    near = [None, 1e-2, SMALLEST_RELATIVE_DIFFERENCE[dtype]]
    for size in range(1, min(100, entry.max_size + 1)):
        for eps in near:
            arrays = entry.inputs(dtype, (2,), size, eps, seed=1)
            entry.check(entry(arrays), arrays)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 3.3, 10.0, "per row"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [None, 1e-1, 1e-3, "smallest"])
def test_temperature(dtype, near, temperature):
    near = SMALLEST_RELATIVE_DIFFERENCE[dtype] if near == "smallest" else near
    t = np.geomspace(0.1, 10, 8).astype(dtype) if temperature == "per row" else temperature
    for size in (5, 33, 1000):
        arrays = IDS["categorical"].inputs(dtype, (8,), size, near)
        IDS["categorical"].check(
            klfast.kl_categorical(**arrays, temperature=t), arrays, temperature=t
        )


def check_logits(a, b, dtype):
    a, b = np.atleast_2d(a).astype(dtype), np.atleast_2d(b).astype(dtype)
    got = klfast.kl_categorical(a, b)
    IDS["categorical"].check(got, {"logits_p": a, "logits_q": b})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 10, 33, 1000, 20_000])
@pytest.mark.parametrize("shift", [1.0, -5.0, 100.0, -1000.0])
@pytest.mark.parametrize("tiny", [1e-1, 1e-3, 1e-5])
def test_common_shift(dtype, size, shift, tiny):
    rng = np.random.default_rng(size)
    a = (3 * rng.normal(size=(3 if size < 2000 else 1, size))).astype(dtype)
    check_logits(a, a + shift + tiny * rng.normal(size=a.shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 10, 33, 1000, 20_000])
@pytest.mark.parametrize("scale", [10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("near", [None, 10.0, 1e-1, 1e-3])
def test_large_logits(dtype, size, scale, near):
    rng = np.random.default_rng(size)
    a = (scale * rng.uniform(-1, 1, (3 if size < 2000 else 1, size))).astype(dtype)
    b = scale * rng.uniform(-1, 1, a.shape) if near is None else a + near * rng.normal(size=a.shape)
    check_logits(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 10, 33, 1000, 20_000])
@pytest.mark.parametrize("peak", [5.0, 15.0, 30.0, 80.0])
@pytest.mark.parametrize("where", ["both", "p", "q", "apart"])
def test_peaked_logits(dtype, size, peak, where):
    rng = np.random.default_rng(size)
    a = rng.normal(size=(3 if size < 2000 else 1, size)).astype(dtype)
    b = a + 1e-3 * rng.normal(size=a.shape)
    a[:, size // 2] += peak if where in ("both", "p", "apart") else 0
    b[:, size // 2 - (where == "apart")] += peak if where in ("both", "q", "apart") else 0
    check_logits(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 100, 1000, 5000, 20_000])
@pytest.mark.parametrize("peak", [20.0, 80.0, 600.0])
@pytest.mark.parametrize("in_p", [True, False])
def test_a_peak_anywhere(in_p, peak, size, dtype):
    """A block far above the ones before it; where the peak stands makes no difference."""
    places = np.unique(np.linspace(0, size - 1, 23).astype(int))
    flat = np.zeros(size, dtype)
    peaked = np.where(np.arange(size) == places[:, None], np.dtype(dtype).type(peak), flat)
    names = ("logits_p", "logits_q") if in_p else ("logits_q", "logits_p")
    arrays = dict(zip(names, (peaked, flat), strict=True))
    want, scale = (np.repeat(x, len(places)) for x in oracle.kl_categorical(**{
        name: np.atleast_2d(a)[:1] for name, a in arrays.items()}))  # fmt: skip
    assert_close(klfast.kl_categorical(**arrays), want, scale, ROWS[dtype], arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("scale", [10.0, 30.0, 100.0])
def test_wide_logits(scale, size, dtype):
    a, b = scale * np.random.default_rng(size).normal(size=(2, 300, size))
    check_logits(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [150, 700, 3000])
@pytest.mark.parametrize("peak", [50.0, 100.0, 400.0, 2000.0])
def test_far_rows_with_peaks_near_their_end(peak, size, dtype):
    """P and Q agree about one peak, and are far apart at the other."""
    a, b = 3 * np.random.default_rng(size).normal(size=(2, 5, size))
    a[:, [-3, -9]] += peak
    b[:, [-3, -9]] += peak, peak - 8
    check_logits(a, b, dtype)


PARTS = {  # what differs from part to part of a row
    "nothing": lambda a, b, ramp: (a, b),
    "peaks": lambda a, b, ramp: (a + 900 * ramp, b + 900 * ramp),
    "shifts": lambda a, b, ramp: (a, b + 30 * ramp),
    "shifts of what is near": lambda a, b, ramp: (a, a + 1e-3 * (b - a) + 0.01 * ramp),
    "P in the last": lambda a, b, ramp: (a + 200 * (ramp > 0.75), b),
    "peaks and shifts": lambda a, b, ramp: (a - 2000 * ramp, b - 1990 * ramp),
    "no weight in P": lambda a, b, ramp: (np.where(ramp < 0.25, -np.inf, a), b),
    "a mask": lambda a, b, ramp: tuple(np.where(ramp < 0.25, -np.inf, x) for x in (a, b)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize(("rows", "size", "axis"), [(70, 500, 0), (3, 9000, 1)])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_that_differ(parts, rows, size, axis, temperature, dtype):
    """Columns of more than one strip, rows of more than one block."""
    rng = np.random.default_rng(0)
    a = 2 * rng.normal(size=(rows, size))
    b = a + 0.7 * rng.normal(size=a.shape)
    a, b = (x.astype(dtype) for x in PARTS[parts](a, b, np.linspace(0, 1, size)))
    arrays = (np.ascontiguousarray(np.moveaxis(x, -1, axis)) for x in (a, b))
    got = klfast.kl_categorical(*arrays, axis=axis, temperature=temperature)
    few = slice(0, None, 7)
    want, scale = oracle.kl_categorical(a[few], b[few], temperature=temperature)
    assert_close(got[few], want, scale, ROWS[dtype], {"logits_p": a[few], "logits_q": b[few]})


def at(index, x, more):
    """A copy with so much more in one place."""
    return np.concatenate([x[:index], x[index : index + 1] + more, x[index + 1 :]])


KINDS = {  # of columns: what the first elements say about the rest, and what has no range
    "unrelated": lambda a, b: (a, b),
    "near": lambda a, b: (a, a + 1e-4 * b),
    "offset": lambda a, b: (a + 3, a + 1e-4 * b),
    "far": lambda a, b: (9 * a, 9 * b),
    "apart": lambda a, b: (3 * a, 3 * b),
    "apart at first": lambda a, b: (3 * a, np.where(np.arange(a.size) < 140, 3, 0.1) * b + 3 * a),
    "apart later": lambda a, b: (3 * a, np.where(np.arange(a.size) < 140, 0.1, 3) * b + 3 * a),
    "most of the mass late": lambda a, b: (at(150, a, 25), at(150, b, 23)),
    "another shift late": lambda a, b: (at(90, a, 9), b - 9),
    "large": lambda a, b: (a + 95, b + 95),
    "large late": lambda a, b: (at(150, a, 60), at(150, b, 61)),
    "huge in P late": lambda a, b: (at(150, a, 800), b),
    "huge in Q late": lambda a, b: (a, at(150, b, 800)),
    "tiny in P late": lambda a, b: (at(150, a, -800), b),
    "tiny in Q late": lambda a, b: (a, at(150, b, -800)),
    "mask": lambda a, b: (at(40, a, -np.inf), at(40, b, -np.inf)),
    "mask of P": lambda a, b: (at(3, a, -np.inf), b),
    "mask of Q": lambda a, b: (a, at(120, b, -np.inf)),
    "NaN": lambda a, b: (at(70, a, np.nan), b),
    "infinite": lambda a, b: (a, at(70, b, np.inf)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [160, 500])
@pytest.mark.parametrize("hot", [False, True])
def test_columns_of_all_kinds_side_by_side(size, dtype, hot):
    """Each is right, and has the bits that it has among its own kind, wherever it begins."""
    rng = np.random.default_rng(size)
    kinds = [kind for _ in range(6) for kind in KINDS]
    columns = [KINDS[kind](*rng.normal(size=(2, size)).astype(dtype)) for kind in kinds]
    a, b = (np.stack(x, axis=-1).astype(dtype) for x in zip(*columns, strict=True))
    temperature = np.where(np.arange(len(kinds)) // 3 % 3 < hot, 2.0, 1.0)

    def kl(which):
        p, q = a[:, which], b[:, which]
        if not isinstance(which, slice):
            p, q = np.ascontiguousarray(p), np.ascontiguousarray(q)
        with np.errstate(invalid="ignore"):
            return klfast.kl_categorical(p, q, axis=0, temperature=temperature[which])

    got = kl(slice(None))
    for first in range(1, 17):
        np.testing.assert_array_equal(kl(slice(first, None)), got[first:], err_msg=str(first))
    undefined = np.isin(kinds, ["NaN", "infinite"])
    assert np.isnan(got[undefined]).all()
    for t in np.unique(temperature):
        for kind in KINDS:
            which = np.flatnonzero((np.array(kinds) == kind) & (temperature == t))
            alike = np.resize(which, 20 if which.size else 0)
            np.testing.assert_array_equal(kl(alike), got[alike], err_msg=kind)
        few = np.flatnonzero(~undefined & (temperature == t))[:30]
        p, q = a.T[few], b.T[few]
        want, scale = oracle.kl_categorical(p, q, temperature=t)
        assert_close(got[few], want, scale, ROWS[dtype], {"logits_p": p, "logits_q": q})


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_more_than_one_band(dtype):
    """Bits do not depend on tasks, which begin at lines of the cache, nor on threads."""
    rng = np.random.default_rng(0)
    a, b = 3 * rng.normal(size=(2, 160, 2501)).astype(dtype)
    a[rng.integers(160, size=900), rng.integers(2501, size=900)] = -np.inf
    temperature = np.where(rng.random(2501) < 0.1, 2.0, 1.0)

    def kl(first=0, last=2501):
        return klfast.kl_categorical(
            a[:, first:last], b[:, first:last], axis=0, temperature=temperature[first:last]
        )

    want = np.concatenate([kl(i, i + 61) for i in range(0, 2501, 61)])
    for threads in (1, 2, 3):
        with klfast.num_threads(threads):
            np.testing.assert_array_equal(kl(), want, err_msg=str(threads))
            np.testing.assert_array_equal(kl(3), want[3:], err_msg=str(threads))
    rows = klfast.kl_categorical(
        np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), temperature=temperature
    )
    assert_close(want, rows, rows, 2 * ROWS[dtype], {"logits_p": a, "logits_q": b})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 31, 1000])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("near", [None, 1e-3])
def test_subnormals(dtype, size, normalize, near):
    rng = np.random.default_rng(size)
    step = float(np.finfo(dtype).smallest_subnormal)
    p = step * rng.integers(1, 2**20, (3 if size < 2000 else 1, size)).astype(np.float64)
    q = (
        np.maximum(p * (1 + near * rng.normal(size=p.shape)), step)
        if near
        else rng.permuted(p, axis=1)
    )
    mixed = np.where(rng.random(p.shape) < 0.5, rng.random(p.shape), 1)
    for scale in (1.0, mixed):
        arrays = {"p": (p * scale).astype(dtype), "q": (q * scale).astype(dtype)}
        arrays = {name: np.maximum(a, np.dtype(dtype).type(step)) for name, a in arrays.items()}
        entry = IDS["discrete" if normalize else "discrete-raw"]
        entry.check(entry(arrays), arrays)


HARD = {  # SciPy issue 20710 and its kin
    "near-equal": [
        (0.5, np.nextafter(0.5, 1)),
        (1 - 1e-15, 1.0),
        (1e300, np.nextafter(1e300, np.inf)),
    ],
    "tiny q": [(4.0, 2.2e-308), (4.0, 5e-324), (1.0, 1e-300)],
    "tiny p": [(2.2e-308, 4.0), (5e-324, 4.0), (1e-300, 1.0)],
    "far apart": [(1e-200, 1e200), (1e200, 1e-200), (1e-308, 1e308)],
    "powers of two": [
        (1.0, 2.0),
        (2.0, 1.0),
        (1.0, np.sqrt(2)),
        (np.sqrt(2), 1.0),
        (1.0, np.sqrt(0.5)),
    ],
}


@pytest.mark.parametrize("pairs", HARD.values(), ids=HARD)
def test_hard_pairs(pairs):
    p, q = np.array(pairs).T
    entry = IDS["discrete-raw"]
    arrays = {"p": p[:, None], "q": q[:, None]}
    entry.check(entry(arrays), arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_around_every_ratio(dtype):
    ratio = np.concatenate([np.linspace(0.25, 4, 2001), np.geomspace(1e-30, 1e30, 601)])
    p = np.random.default_rng(0).uniform(1, 2, ratio.size).astype(dtype)
    arrays = {"p": p[:, None], "q": (p * ratio).astype(dtype)[:, None]}
    IDS["discrete-raw"].check(IDS["discrete-raw"](arrays), arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["scale", "var", "logvar"])
def test_normal_around_every_ratio(dtype, spread):
    rng = np.random.default_rng(0)
    if spread == "logvar":
        p = rng.uniform(-30, 30, 2001)
        q = p + np.concatenate([np.linspace(-3, 3, 1001), np.geomspace(1e-8, 50, 1000)])
    else:
        p = rng.uniform(1, 2, 2001) * 10.0 ** rng.uniform(-9, 9, 2001)
        q = p * np.concatenate([np.linspace(0.25, 4, 1001), np.geomspace(1e-6, 1e6, 1000)])
    p, q, loc = p.astype(dtype)[:, None], q.astype(dtype)[:, None], np.zeros((2001, 1), dtype)
    for x, y in ((p, q), (q, p)):
        arrays = {"loc_p": loc, "loc_q": loc, f"{spread}_p": x, f"{spread}_q": y}
        IDS[f"normal-{spread}"].check(IDS[f"normal-{spread}"](arrays), arrays)


@pytest.mark.parametrize("spread_q", ["scale", "var", "logvar"])
@pytest.mark.parametrize("spread_p", ["scale", "var", "logvar"])
def test_normals_of_any_exponent(spread_p, spread_q):
    """Of which most are out of the fast formulas' range."""
    rng = np.random.default_rng(5)
    logs = rng.uniform(-700, 700, (2, 300, 1))
    logs[1] = np.clip(logs[1], logs[0] - 700, logs[0] + 700)
    far = {"scale": np.exp(logs / 2), "var": np.exp(logs), "logvar": logs}
    loc = np.exp(np.clip(rng.uniform(-300, 300, (300, 1)), None, logs[1] / 2 + 340))
    arrays = {"loc_p": loc, "loc_q": 0 * loc}
    arrays |= {f"{spread_p}_p": far[spread_p][0], f"{spread_q}_q": far[spread_q][1]}
    got = klfast.kl_normal(**arrays)
    assert_close(got, *oracle.kl_normal(**arrays), ROWS["float64"], arrays)


@pytest.mark.parametrize("entry", ENTRIES[:1], ids=lambda e: e.id)
def test_long_row(entry):
    arrays = entry.inputs("float32", (1,), 400_000, 1e-3)
    entry.check(entry(arrays), arrays)


@pytest.mark.parametrize("spread", [0.5, 1, 2, 3, 5])
@pytest.mark.parametrize("offset", [0, 20])
def test_far_apart_and_peaked_logits(spread, offset):
    """The sums of e^a and e^b alone, and the choice to leave it at them. float64 has a bound of its
    own, and takes thousands of rows quickly."""
    rng = np.random.default_rng(11)
    a, b = spread * rng.normal(size=(2, 3000, 100)).astype(np.float32)
    a[::2, 0] += 10
    b[::3, -1] += 12
    b += np.float32(offset)
    arrays = {"logits_p": a, "logits_q": b}
    exact = klfast.kl_categorical(a.astype(np.float64), b.astype(np.float64))
    assert_close(klfast.kl_categorical(a, b), exact, exact, ROWS["float32"], arrays)


@pytest.mark.parametrize("few", [2, 3, 5, 8])
@pytest.mark.parametrize("spread", [0.3, 3, 5])
@pytest.mark.parametrize("size", [8, 100])
def test_a_few_terms_decide(size, spread, few):
    """The error of the exponent of a single term is that of the sum."""
    rng = np.random.default_rng(13)
    a = np.full((4, 5000, size), -38, np.float32)
    a[..., :few] = np.array([1, 4, 6, 8])[:, None, None] * rng.normal(size=(4, 5000, few))
    b = a.copy()
    b[..., :few] += spread * rng.normal(size=(4, 5000, few))
    b[:, ::2] += 5
    exact = klfast.kl_categorical(a.astype(np.float64), b.astype(np.float64))
    arrays = {"logits_p": a, "logits_q": b}
    assert_close(klfast.kl_categorical(a, b), exact, exact, ROWS["float32"], arrays)


def two_valued(rng, dtype, rows, size, every, limits):
    """Rows of two arrays: one pair of values in the first of so many places, another elsewhere."""
    heavy = np.arange(size) % every == 0
    values = [rng.uniform(*limit, (rows, 1)) for limit in limits]
    a, b = np.where(heavy, values[0], values[2]), np.where(heavy, values[1], values[3])
    return a.astype(dtype), b.astype(dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("every", [12, 144, 10**9])
@pytest.mark.parametrize("size", [12, 100, 156, 168, 192, 300, 1500])
def test_one_heavy_term_and_many_alike(size, every, axis):
    """All of these round the same way."""
    rng = np.random.default_rng(size)
    rows = 2_000_000 // size
    a, b = two_valued(rng, np.float32, rows, size, every, [(0, 14), (-34, 0), (-6, 2), (-14, 2)])
    p, q = two_valued(rng, np.float32, rows, size, every, [(0, 10), (-9, 9), (-8, 2), (-8, 2)])
    p, q = np.exp(p), np.exp(q)
    for kl, arrays in [
        (klfast.kl_categorical, {"logits_p": a, "logits_q": b}),
        (klfast.kl_discrete, {"p": p, "q": q}),
    ]:
        exact = kl(*[x.astype(np.float64) for x in arrays.values()])
        placed = [np.ascontiguousarray(x.T) if axis == 0 else x for x in arrays.values()]
        assert_close(kl(*placed, axis=axis), exact, exact, ROWS["float32"], arrays, zero=1e-12)


def exact_two_valued(a, b):
    """Closed form of one row."""
    (x, z), (y, w) = (a.max(), a.min()), (b[a.argmax()], b[a.argmin()])
    count = int((a == x).sum())
    with mpmath.workdps(40):
        x, y, z, w = map(mpmath.mpf, map(float, (x, y, z, w)))
        total_a = count * mpmath.exp(x) + (a.size - count) * mpmath.exp(z)
        total_b = count * mpmath.exp(y) + (a.size - count) * mpmath.exp(w)
        shift = mpmath.log(total_b / total_a)
        return float(
            count * mpmath.exp(x) / total_a * (x - y + shift)
            + (a.size - count) * mpmath.exp(z) / total_a * (z - w + shift)
        )


@pytest.mark.parametrize("size", [12, 156, 168, 300])
def test_one_heavy_term_and_many_alike_in_float64(size):
    rng = np.random.default_rng(size)
    limits = [(3, 14), (-34, 0), (-6, 2), (-14, 2)]
    a, b = two_valued(rng, np.float64, 400, size, 10**9, limits)
    want = np.array([exact_two_valued(*pair) for pair in zip(a, b, strict=True)])
    arrays = {"logits_p": a, "logits_q": b}
    for got in (klfast.kl_categorical(a, b), klfast.kl_categorical(a.T.copy(), b.T.copy(), axis=0)):
        assert_close(got, want, want, ROWS["float64"], arrays, zero=1e-12)


@pytest.mark.parametrize("every", [3, 7, 50])
def test_columns_of_many_strips(every):
    """Strips that are added to hundreds of others cost nothing."""
    rng = np.random.default_rng(every)
    limits = [(0, 0.5), (0, 2), (-0.5, 0), (-1, 1)]
    a, b = two_valued(rng, np.float64, 20, 100_000, every, limits)
    want = np.array([exact_two_valued(*pair) for pair in zip(a, b, strict=True)])
    got = klfast.kl_categorical(a.T.copy(), b.T.copy(), axis=0)
    assert_close(got, want, want, ROWS["float64"] / 10, {"logits_p": a, "logits_q": b})


def test_oracle_agrees_with_mpmath():
    rng = np.random.default_rng(0)
    p = rng.random(50)
    q = p * (1 + 1e-8 * rng.normal(size=50))
    a, b = np.log(p) * 3, np.log(q) * 3 + 100
    with mpmath.workdps(60):
        sp, sq = mpmath.fsum(p.tolist()), mpmath.fsum(q.tolist())
        discrete = mpmath.fsum(
            x / sp * mpmath.log((x / sp) / (y / sq))
            for x, y in zip(map(mpmath.mpf, p), q, strict=True)
        )
        ea, eb = [[mpmath.exp(mpmath.mpf(x) / 0.7) for x in row] for row in (a, b)]
        sa, sb = mpmath.fsum(ea), mpmath.fsum(eb)
        categorical = mpmath.fsum(
            x / sa * mpmath.log((x / sa) / (y / sb)) for x, y in zip(ea, eb, strict=True)
        )
        var_p, var_q = mpmath.mpf(p[0]) ** 2, mpmath.exp(mpmath.mpf(b[0]))
        delta = mpmath.mpf(a[0]) - mpmath.mpf(a[1])
        normal = (var_p / var_q - 1 - mpmath.log(var_p / var_q) + delta**2 / var_q) / 2
    for want, (got, _) in [
        (discrete, oracle.kl_discrete(p, q)),
        (categorical, oracle.kl_categorical(a, b, temperature=0.7)),
        (normal, oracle.kl_normal(a[:1], a[1:2], scale_p=p[:1], logvar_q=b[:1])),
    ]:
        assert_close(
            np.float64(want), got, got, ROWS["float64"] / 10, {"p": p, "q": q, "a": a, "b": b}
        )
