"""The edge table of the design, each line a test: what zeros, masks, NaN and bad values mean.

What is refused by an exception is in test_errors.py.
"""

import klfast
import klfast.reference
import mpmath as mp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from registry import DTYPES, IDS, PLAIN

INF, NAN = np.inf, np.nan
POSITIONS = [
    (1, 0),
    (2, 1),
    (3, 0),
    (8, 7),
    (17, 16),
    (33, 31),
    (64, 5),
    (65, 64),
    (100, 50),
    (1000, 999),
    (5000, 0),
]

# one element of p and q, what it makes of its row (None: the rest of the row), raises "invalid"
DISCRETE = {
    "p zero": (0.0, 0.3, None, False),
    "p minus zero": (-0.0, 0.3, None, False),
    "q zero": (0.3, 0.0, INF, False),
    "q minus zero": (0.3, -0.0, INF, False),
    "mask": (0.0, 0.0, None, False),
    "tiny p, q zero": (1e-40, 0.0, INF, False),
    "p negative": (-0.1, 0.3, NAN, True),
    "q negative": (0.3, -0.1, NAN, True),
    "p negative, q zero": (-0.1, 0.0, NAN, True),
    "p zero, q negative": (0.0, -0.1, NAN, True),
    "p tiny negative": (-1e-40, 0.3, NAN, True),
    "p infinite": (INF, 0.3, NAN, True),
    "q infinite": (0.3, INF, NAN, True),
    "both infinite": (INF, INF, NAN, True),
    "p zero, q infinite": (0.0, INF, NAN, True),
    "p infinite, q zero": (INF, 0.0, NAN, True),
    "p minus infinite": (-INF, 0.3, NAN, True),
    "p NaN": (NAN, 0.3, NAN, False),
    "q NaN": (0.3, NAN, NAN, False),
    "p NaN, q zero": (NAN, 0.0, NAN, False),
    "p zero, q NaN": (0.0, NAN, NAN, False),
    "both NaN": (NAN, NAN, NAN, False),
}
CATEGORICAL = {
    "p −inf": (-INF, 0.3, None, False),
    "q −inf": (0.3, -INF, INF, False),
    "mask": (-INF, -INF, None, False),
    "p far below, q −inf": (-1e4, -INF, INF, False),
    "p +inf": (INF, 0.3, NAN, True),
    "q +inf": (0.3, INF, NAN, True),
    "both +inf": (INF, INF, NAN, True),
    "p −inf, q +inf": (-INF, INF, NAN, True),
    "p +inf, q −inf": (INF, -INF, NAN, True),
    "p NaN": (NAN, 0.3, NAN, False),
    "q NaN": (0.3, NAN, NAN, False),
    "p −inf, q NaN": (-INF, NAN, NAN, False),
    "p NaN, q −inf": (NAN, -INF, NAN, False),
}


def check_row(entry, arrays, row, want, invalid):
    """Check the value of one row, that the others keep theirs, and the floating-point condition."""
    with np.errstate(invalid="ignore"):
        got = entry(arrays)
    plain = entry.reference(arrays)
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-20, err_msg=f"{arrays}")
    if want is not None:
        np.testing.assert_equal(got[row], want)
    good = {name: np.delete(a, row, axis=0) for name, a in arrays.items()}
    rtol = 2 * entry.bound[got.dtype.name]
    np.testing.assert_allclose(np.delete(got, row), entry(good), rtol=rtol, atol=1e-20)
    with np.errstate(all="raise"):
        if invalid:
            with pytest.raises(FloatingPointError, match="invalid"):
                entry(arrays)
        else:
            entry(arrays)


@pytest.mark.parametrize(("size", "position"), POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DISCRETE)
@pytest.mark.parametrize("entry", [IDS["discrete"], IDS["discrete-raw"]], ids=lambda e: e.id)
def test_discrete_element(entry, case, dtype, size, position):
    p, q, want, invalid = DISCRETE[case]
    if size == 1 and 0 in (p, q) and not np.isnan([p, q]).any() and entry.id == "discrete":
        want, invalid = NAN, True  # nothing is left of the row
    arrays = entry.inputs(dtype, (3,), size)
    arrays["p"][1, position], arrays["q"][1, position] = p, q
    check_row(entry, arrays, 1, want, invalid)


@pytest.mark.parametrize(("size", "position"), POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CATEGORICAL)
def test_categorical_element(case, dtype, size, position):
    p, q, want, invalid = CATEGORICAL[case]
    if size == 1 and -INF in (p, q) and not np.isnan([p, q]).any():
        want, invalid = NAN, True
    arrays = IDS["categorical"].inputs(dtype, (3,), size)
    arrays["logits_p"][1, position], arrays["logits_q"][1, position] = p, q
    check_row(IDS["categorical"], arrays, 1, want, invalid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["p", "q", "pq"])
@pytest.mark.parametrize("size", [1, 5, 40, 1000])
def test_empty_support_is_nan(size, side, dtype):
    for name, nothing in (("discrete", 0), ("categorical", -INF)):
        arrays = IDS[name].inputs(dtype, (3,), size)
        for key, a in arrays.items():
            if key[-1] in side:
                a[1] = nothing
        check_row(IDS[name], arrays, 1, NAN, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_categories(dtype):
    empty = np.zeros((2, 0), dtype)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(klfast.kl_discrete(empty, empty), [NAN, NAN])
        np.testing.assert_array_equal(klfast.kl_categorical(empty, empty), [NAN, NAN])
    np.testing.assert_array_equal(klfast.kl_discrete(empty, empty, normalize=False), [0, 0])
    np.testing.assert_array_equal(klfast.kl_normal(empty, empty, empty, empty), [0, 0])


def test_no_elements_in_columns():
    """Of two arrays whose rows lie differently far apart."""
    near, far = np.empty((5, 20))[:0].T, np.empty((5, 40))[:0, ::2].T
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(klfast.kl_discrete(near, far), np.full(20, NAN))
        np.testing.assert_array_equal(klfast.kl_categorical(near, far), np.full(20, NAN))
    np.testing.assert_array_equal(klfast.kl_normal(near, far, near, far), np.zeros(20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 40, 1000])
def test_all_zero_weights_as_they_stand(size, dtype):
    zero, one = np.zeros(size, dtype), np.ones(size, dtype)
    with np.errstate(all="raise"):
        assert klfast.kl_discrete(zero, one, normalize=False) == 0
        assert klfast.kl_discrete(zero, zero, normalize=False) == 0
        assert klfast.kl_discrete(one, zero, normalize=False) == INF


NORMAL = {  # loc_p, scale_p, loc_q, scale_q, what it makes of its row, raises "invalid"
    "p a point": (0.0, 0.0, 1.0, 2.0, INF, False),
    "q a point": (0.0, 1.0, 1.0, 0.0, INF, False),
    "q a point, same mean": (1.0, 1.0, 1.0, 0.0, INF, False),
    "both points": (0.0, 0.0, 1.0, 0.0, NAN, True),
    "same points": (1.0, 0.0, 1.0, 0.0, NAN, True),
    "p scale negative": (0.0, -1.0, 1.0, 2.0, NAN, True),
    "q scale negative": (0.0, 1.0, 1.0, -2.0, NAN, True),
    "both scales negative": (0.0, -1.0, 1.0, -2.0, NAN, True),
    "p scale infinite": (0.0, INF, 1.0, 2.0, NAN, True),
    "q scale infinite": (0.0, 1.0, 1.0, INF, NAN, True),
    "both scales infinite": (0.0, INF, 1.0, INF, NAN, True),
    "p a point, q infinite": (0.0, 0.0, 1.0, INF, NAN, True),
    "p mean infinite": (INF, 1.0, 1.0, 2.0, NAN, True),
    "q mean infinite": (0.0, 1.0, -INF, 2.0, NAN, True),
    "both means infinite": (INF, 1.0, INF, 2.0, NAN, True),
    "p mean infinite, a point": (INF, 0.0, 1.0, 2.0, NAN, True),
    "p mean NaN": (NAN, 1.0, 1.0, 2.0, NAN, False),
    "q mean NaN": (0.0, 1.0, NAN, 2.0, NAN, False),
    "p scale NaN": (0.0, NAN, 1.0, 2.0, NAN, False),
    "q scale NaN": (0.0, 1.0, 1.0, NAN, NAN, False),
    "q scale NaN, same mean": (1.0, 1.0, 1.0, NAN, NAN, False),
    "q scale NaN, same mean, p wide": (1.0, 2.0, 1.0, NAN, NAN, False),
    "q scale NaN, same mean, p narrow": (1.0, 0.25, 1.0, NAN, NAN, False),
    "p scale NaN, q a point": (0.0, NAN, 1.0, 0.0, NAN, False),
}


@pytest.mark.parametrize(("size", "position"), POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["scale", "var", "logvar"])
@pytest.mark.parametrize("case", NORMAL)
def test_normal_element(case, spread, dtype, size, position):
    loc_p, scale_p, loc_q, scale_q, want, invalid = NORMAL[case]
    if spread == "logvar":
        if min(scale_p, scale_q) < 0:
            pytest.skip("a log has no bad sign")
        with np.errstate(divide="ignore"):
            scale_p, scale_q = 2 * np.log([scale_p, scale_q])
    entry = IDS[f"normal-{spread}"]
    arrays = entry.inputs(dtype, (3,), size)
    bad = {"loc_p": loc_p, f"{spread}_p": scale_p, "loc_q": loc_q, f"{spread}_q": scale_q}
    for name, value in bad.items():
        arrays[name][1, position] = value
    check_row(entry, arrays, 1, want, invalid)


@pytest.mark.parametrize(("size", "position"), POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread_q", ["scale", "var", "logvar"])
@pytest.mark.parametrize("spread_p", ["scale", "var", "logvar"])
def test_bad_spread_beside_any(spread_p, spread_q, dtype, size, position):
    """Of a side of its own kind or of another, near or far; the others keep their values."""
    rng = np.random.default_rng(0)
    ordinary = {"loc_p": 0.0, "loc_q": 0.0, f"{spread_p}_p": 1.0, f"{spread_q}_q": 1.5}
    for bad, other in ((f"{spread_p}_p", f"{spread_q}_q"), (f"{spread_q}_q", f"{spread_p}_p")):
        for value in (NAN, INF) if bad.startswith("logvar") else (NAN, INF, -2.0):
            for beside in (0.2, 1, 3, 9.1, 100):
                arrays = {name: np.full((3, size), x, dtype) for name, x in ordinary.items()}
                arrays["loc_p"] += rng.normal(size=(3, size)).astype(dtype)
                arrays[bad][1, position], arrays[other][1, position] = value, beside
                with np.errstate(invalid="ignore"):
                    got = klfast.kl_normal(**arrays)
                assert np.isnan(got).tolist() == [False, True, False], (bad, value, beside, got)
                if not np.isnan(value):
                    with np.errstate(invalid="raise"), pytest.raises(FloatingPointError):
                        klfast.kl_normal(**arrays)


@pytest.mark.parametrize(("size", "position"), POSITIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["scale", "var"])
def test_infinite_spread_beside_a_huge_one(spread, dtype, size, position):
    """Their exponents are no further apart than those of ordinary spreads."""
    entry = IDS[f"normal-{spread}"]
    for infinite, huge in ("pq", "qp"):
        arrays = entry.inputs(dtype, (3,), size)
        arrays[f"{spread}_{infinite}"][1, position] = INF
        arrays[f"{spread}_{huge}"][1, position] = np.finfo(dtype).max / 2
        check_row(entry, arrays, 1, NAN, True)


@pytest.mark.parametrize("size", [1, 20, 200, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", ["scale", "var"])
def test_nearly_equal_spreads_of_any_size(spread, dtype, size):
    """Also far apart from each other, and at the ends of what is a normal number."""
    info = np.finfo(dtype)
    far = 2.0 ** (info.maxexp // 3)
    for sizes in ([1 / far, far], [far * far], [info.tiny * 1.5], [info.max / 8]):
        q = np.resize(np.repeat(np.array(sizes, dtype), 16), size)
        p = (q * 1.0001).astype(dtype)
        zero = np.zeros_like(q)
        got = klfast.kl_normal(zero, loc_q=zero, **{f"{spread}_p": p, f"{spread}_q": q})
        with mp.workdps(50):
            ratios = [mp.mpf(float(x)) / mp.mpf(float(y)) for x, y in zip(p, q, strict=True)]
            ratios = [r * r if spread == "scale" else r for r in ratios]
            want = float(mp.fsum((r - 1 - mp.log(r)) / 2 for r in ratios))
        bound = 1e-6 if dtype == "float32" else 1e-14
        assert got == pytest.approx(want, rel=bound, abs=0), (sizes, got, want)


def test_overlapping_windows():
    """Columns a vector apart are not the next columns of the same group."""
    values = np.random.default_rng(0).uniform(0.5, 2, (4, 64 + 16 * 200))
    for step in (8, 16):
        windows = [sliding_window_view(x, step * 199 + 1)[:64, ::step] for x in values]
        want = klfast.kl_normal(*(np.ascontiguousarray(w) for w in windows))
        np.testing.assert_allclose(klfast.kl_normal(*windows), want, rtol=1e-14, err_msg=str(step))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_beside_a_row_of_another_sum(dtype):
    rng = np.random.default_rng(0)
    for size in (3, 10, 50, 300):
        p, q = rng.dirichlet(np.ones(size), (2, 64)).astype(dtype)
        want = klfast.kl_discrete(p, q)
        p[5] *= 1.5
        got = klfast.kl_discrete(p, q)
        np.testing.assert_array_equal(np.delete(got, 5), np.delete(want, 5), err_msg=str(size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_bad_elements_give_nan(dtype):
    rows = np.array([[0.5, 0.5, 0.0], [0.5, -0.5, 1.0], [NAN, 0.5, 0.5]], dtype)
    q = np.array([0.0, 0.5, 0.5], dtype)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(klfast.kl_discrete(rows, q), [INF, NAN, NAN])
        np.testing.assert_array_equal(klfast.kl_discrete(rows, q, normalize=False), [INF, NAN, NAN])


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
def test_good_values_raise_no_condition(entry):
    with np.errstate(all="raise"):
        for dtype in DTYPES:
            for size in (1, 3, 16):
                arrays = entry.inputs(dtype, (5,), size)
                entry(arrays)


def test_conditions_are_raised_from_any_thread_count():
    p = np.full((4000, 200), 0.1)
    p[3999, 199] = -1
    for threads in (1, 2, 3):
        with klfast.num_threads(threads), np.errstate(invalid="raise"):
            with pytest.raises(FloatingPointError):
                klfast.kl_discrete(p, p[0])
            klfast.kl_discrete(p[:3999], p[0])  # and it does not stick


def test_condition_warns_by_default():
    with pytest.warns(RuntimeWarning, match="invalid value"):
        assert np.isnan(klfast.kl_discrete([1.0, -1.0], [0.5, 0.5]))


def test_extreme_but_valid_values():
    huge, tiny = np.finfo(np.float64).max, np.finfo(np.float64).smallest_subnormal
    with np.errstate(all="raise"):
        assert klfast.kl_discrete([huge / 4, huge / 4], [huge / 4, huge / 4]) == 0
        assert klfast.kl_discrete([tiny, tiny], [tiny, tiny]) == 0
        assert klfast.kl_discrete([1.0, 0.0], [tiny, tiny]) == pytest.approx(np.log(2), rel=1e-14)
        assert klfast.kl_categorical([1e308, -1e308], [1e308, -1e308]) == 0
        assert klfast.kl_categorical([-1e5, -1e5], [0.0, 0.0]) == 0
