"""Gradients at zeros, masks, infinities and bad values: finite wherever they can be."""

import klfast
import klfast.grad
import numpy as np
import pytest

from registry import DTYPES, IDS

INF, NAN = np.inf, np.nan
POSITIONS = [(1, 0), (3, 1), (16, 15), (17, 16), (100, 50), (1000, 999), (5000, 0)]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def rows(*columns, dtype):
    return [np.array([x], dtype) for x in columns]


@dtypes
@pytest.mark.parametrize(("size", "at"), POSITIONS)
def test_mask_changes_nothing_else(dtype, size, at):
    """A masked entry has gradient 0, and its neighbours' are those without it."""
    for entry, masked in ((IDS["categorical"], -INF), (IDS["discrete"], 0.0)):
        arrays = entry.inputs(dtype, (2,), size)
        with_mask = {name: np.insert(x, at, masked, axis=-1) for name, x in arrays.items()}
        function = getattr(klfast.grad, entry.function)
        value, *want = function(**arrays)
        again, *got = function(**with_mask)
        rtol = 20 * entry.bound[dtype]
        np.testing.assert_allclose(again, value, rtol=rtol)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x[:, at], 0)
            scale = np.abs(y).max(axis=-1, keepdims=True)
            assert np.all(np.abs(np.delete(x, at, axis=-1) - y) <= rtol * scale)


@dtypes
def test_p_zero(dtype):
    a, b = rows([0.5, -INF, 1.0], [0.2, 0.4, 2.0], dtype=dtype)
    _, to_a, to_b = klfast.grad.kl_categorical(a, b)
    q = np.exp(b) / np.exp(b).sum()
    assert to_a[0, 1] == 0
    np.testing.assert_allclose(to_b[0, 1], q[0, 1], rtol=1e-6)
    p, r = rows([0.5, 0.0, 1.0], [0.2, 0.4, 2.0], dtype=dtype)
    _, to_p, to_q = klfast.grad.kl_discrete(p, r, cotangent=-2.0)
    assert to_p[0, 1] == INF
    np.testing.assert_allclose(to_q[0, 1], -2 / 2.6, rtol=1e-6)
    _, to_p, to_q = klfast.grad.kl_discrete(p, r, normalize=False)
    assert (to_p[0, 1], to_q[0, 1]) == (-INF, 0)


@dtypes
@pytest.mark.parametrize("padding", [0, 40, 3000])
def test_infinite_rows(dtype, padding):
    a, b = rows(
        [0.0, 1.0, -INF, -INF] + [0.5] * padding,
        [0.0, -INF, -INF, 1.0] + [0.5] * padding,
        dtype=dtype,
    )
    value, to_a, to_b = klfast.grad.kl_categorical(a, b)
    assert value == INF
    np.testing.assert_array_equal(to_a[0, :4], [-INF, INF, 0, 0])
    assert np.all(to_a[0, 4:] == -INF)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
    np.testing.assert_allclose(to_b, q - p, rtol=1e-5, atol=1e-9)
    value, to_p, to_q = klfast.grad.kl_discrete(p, q)
    assert value == INF
    np.testing.assert_array_equal(to_p[0, :4], [-INF, INF, 0, -INF])
    np.testing.assert_array_equal(to_q[0, 1:3], [-INF, 0])
    assert np.all(np.isfinite(np.delete(to_q, 1)))


@dtypes
@pytest.mark.parametrize("size", [2, 20, 2000])
def test_nan_rows(dtype, size):
    """NaN, bad values and rows without mass: NaN, also where there is one bad value."""
    for entry, bads in (
        (IDS["categorical"], (NAN, INF)),
        (IDS["discrete"], (NAN, -1.0, INF)),
        (IDS["normal-scale"], (NAN, INF)),
    ):
        for bad in bads:
            arrays = entry.inputs(dtype, (3,), size)
            first = next(iter(arrays))
            arrays[first][1, 1] = bad
            good = {name: np.delete(x, 1, axis=0) for name, x in arrays.items()}
            function = getattr(klfast.grad, entry.function)
            with np.errstate(invalid="ignore"):
                value, *got = function(**arrays)
            assert np.isnan(value[1])
            for x, want in zip(got, function(**good)[1:], strict=True):
                assert np.all(np.isnan(x[1]))
                np.testing.assert_array_equal(np.delete(x, 1, axis=0), want)
            if not np.isnan(bad):
                with np.errstate(invalid="raise"), pytest.raises(FloatingPointError):
                    function(**arrays)


@dtypes
def test_cotangent_zero_leaves_a_row_out(dtype):
    a = np.array([[-INF, -INF], [0.0, 1.0], [NAN, 0.0]], dtype)
    b = np.array([[-INF, -INF], [1.0, -INF], [0.0, 0.0]], dtype)
    with np.errstate(invalid="ignore"):
        value, *got = klfast.grad.kl_categorical(a, b, cotangent=0.0)
    np.testing.assert_array_equal(value, [NAN, INF, NAN])
    for x in got:
        np.testing.assert_array_equal(x, 0)


@dtypes
def test_one_outcome_and_none(dtype):
    for function in (klfast.grad.kl_categorical, klfast.grad.kl_discrete):
        value, *got = function(np.array([3.0], dtype), np.array([0.1], dtype))
        assert value == 0
        assert all(x == 0 for x in got)
        empty = np.empty((2, 0), dtype)
        with np.errstate(invalid="ignore"):
            value, *got = function(empty, empty)
        assert np.isnan(value).all()
        assert all(x.shape == (2, 0) for x in got)


@dtypes
def test_point_masses(dtype):
    m, s, n, t = rows([0.0, 1.0], [0.0, 1.0], [1.0, 1.5], [1.0, 1.0], dtype=dtype)
    value, *got = klfast.grad.kl_normal(m, s, n, t)
    assert value == INF
    want = [[-1, -0.5], [-INF, 0], [1, 0.5], [0, -0.25]]
    for x, row in zip(got, want, strict=True):
        np.testing.assert_allclose(x[0], row, rtol=1e-6)
    v, w = rows([-INF, 0.0], [0.0, 0.0], dtype=dtype)
    _, to_v = klfast.grad.kl_normal(m, logvar_p=v, loc_q=n, logvar_q=w, wrt="logvar_p")
    np.testing.assert_array_equal(to_v, [[-0.5, 0]])
    value, *got = klfast.grad.kl_normal(n, t, m, s)
    np.testing.assert_array_equal([x[0, 0] for x in got], [INF, INF, -INF, -INF])


def test_weights_that_are_subnormal():
    p, q = np.array([4e-320, 2e-320, 0.0]), np.array([2e-320, 2e-320, 0.0])
    value, to_p, to_q = klfast.grad.kl_discrete(p, q)
    assert np.isfinite(value)
    np.testing.assert_array_equal(to_p, [INF, -INF, 0])
    np.testing.assert_array_equal(to_q, [-INF, INF, 0])


SHORT = [IDS[name] for name in ("discrete", "discrete-raw", "categorical", "categorical-masked")]
SHORT += [IDS[name] for name in ("discrete-totals", "normal-scale", "normal-standard")]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1, 3, 10, 31])
@pytest.mark.parametrize("entry", SHORT, ids=lambda e: e.id)
def test_short_rows_do_not_depend_on_their_neighbours(entry, size, dtype):
    """They are computed side by side: among them bad ones, far ones, and one whose cotangent is
    0."""
    with np.errstate(over="ignore"):  # in float16
        arrays = entry.inputs(dtype, (21,), size)
        for name, x in arrays.items():
            x[3] = np.nan
            x[4], x[13] = 1e-6 * x[4], 60 * x[13] if dtype == "float16" else 1e9 * x[13]
            x[12] = np.inf if name.startswith("log") else -1.0
    cotangent = np.where(np.arange(21) == 8, 0, np.linspace(-1, 2, 21))
    function = getattr(klfast.grad, entry.function)
    with np.errstate(all="ignore"):
        together = function(**arrays, **entry.options, wrt=tuple(arrays), cotangent=cotangent)
        for i in range(21):
            one = {name: x[i] for name, x in arrays.items()}
            alone = function(**one, **entry.options, wrt=tuple(one), cotangent=cotangent[i])
            for got, want in zip(together, alone, strict=True):
                np.testing.assert_array_equal(got[i], want)
    assert not any(g[8].any() for g in together[1:])
