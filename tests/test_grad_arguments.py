"""Gradients: shapes, broadcasting, cotangents, `wrt`, `out`, dtypes, layouts, threads, errors."""

import klfast
import klfast.grad
import ml_dtypes
import numpy as np
import pytest
from klfast.grad import _shared

import fresh
from registry import DTYPES, IDS

NAMES = ["discrete", "discrete-raw", "categorical", "normal-scale", "normal-scale-var"]
entries = pytest.mark.parametrize("entry", [IDS[name] for name in NAMES], ids=NAMES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def call(entry, arrays, **options):
    options = {"wrt": tuple(arrays), **entry.options, **options}
    return getattr(klfast.grad, entry.function)(**arrays, **options)


@dtypes
@entries
def test_cotangent(entry, dtype):
    arrays = entry.inputs(dtype, (3, 4), 20)
    cotangent = np.random.default_rng(0).normal(size=(3, 4))
    value, *plain = call(entry, arrays)
    for given in (cotangent, cotangent[0], cotangent[:, :1], cotangent.astype("f"), 3):
        again, *got = call(entry, arrays, cotangent=given)
        np.testing.assert_array_equal(again, value)
        for x, y in zip(got, plain, strict=True):
            np.testing.assert_allclose(x, y * np.broadcast_to(given, (3, 4))[..., None], rtol=1e-5)


@dtypes
@entries
@pytest.mark.parametrize("slab", [7, 50, 1 << 18])
def test_broadcast_is_summed_back(entry, dtype, slab, monkeypatch):
    monkeypatch.setattr(_shared, "SLAB", slab)
    full = entry.inputs(dtype, (3, 2, 5), 4)
    cotangent = np.random.default_rng(0).normal(size=(3, 2, 5))
    cuts = [np.s_[:], np.s_[0], np.s_[:, :1], np.s_[0, 0], np.s_[:1, :, :1]]
    for shift in range(len(cuts)):
        arrays = {
            name: x[cuts[(i + shift) % len(cuts)]] for i, (name, x) in enumerate(full.items())
        }
        shape = np.broadcast_shapes(*(x.shape for x in arrays.values()))
        spread = {name: np.broadcast_to(x, shape).copy() for name, x in arrays.items()}
        upstream = np.broadcast_to(cotangent[: shape[0] if len(shape) == 4 else 1], (3, 2, 5))
        upstream = upstream[tuple(slice(0, n) for n in shape[:-1])] if len(shape) == 4 else 1.0
        value, *got = call(entry, arrays, cotangent=upstream)
        want_value, *want = call(entry, spread, cotangent=upstream)
        np.testing.assert_array_equal(value, want_value)
        for x, y, own in zip(got, want, arrays.values(), strict=True):
            assert x.shape == own.shape
            assert x.dtype == dtype
            y = y.astype(np.float64).reshape(shape)
            lead = (1,) * (len(shape) - own.ndim) + own.shape
            axes = tuple(i for i, n in enumerate(lead) if n != shape[i])
            total, size = (f.sum(axis=axes).reshape(own.shape) for f in (y, np.abs(y)))
            assert np.all(np.abs(x - total) <= 1e-6 * size)


def test_normal_broadcasts_every_axis():
    rng = np.random.default_rng(1)
    m, s = rng.normal(size=(4, 6)), np.exp(rng.normal(size=(4, 1)))
    n, t = rng.normal(size=6), 1.5
    value, *got = klfast.grad.kl_normal(m, s, n, t)
    full = [np.broadcast_to(x, (4, 6)) for x in (m, s, n, t)]
    want_value, *want = klfast.grad.kl_normal(*full)
    np.testing.assert_allclose(value, want_value, rtol=1e-15)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-14)
    np.testing.assert_allclose(got[1], want[1].sum(-1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(got[2], want[2].sum(0), rtol=1e-12)
    np.testing.assert_allclose(got[3], want[3].sum(), rtol=1e-12)
    assert got[3].shape == ()


@pytest.mark.parametrize("spread", ["scale", "var", "logvar"])
def test_normal_without_q_and_per_element(spread):
    rng = np.random.default_rng(2)
    m, s = rng.normal(size=(3, 50)), np.exp(rng.normal(size=(3, 50)))
    ones = np.zeros(50) if spread == "logvar" else np.ones(50)
    own = {f"{spread}_p": s}
    full = own | {"loc_q": np.zeros(50), f"{spread}_q": ones}
    value, *got = klfast.grad.kl_normal(m, **own)
    want_value, *want = klfast.grad.kl_normal(m, **full, wrt=("loc_p", f"{spread}_p"))
    np.testing.assert_array_equal(value, want_value)
    assert len(got) == 2
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)
    value, *each = klfast.grad.kl_normal(m, **own, axis=())
    np.testing.assert_allclose(value, klfast.kl_normal(m, **own, axis=()), rtol=1e-13)
    for x, y in zip(each, got, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-14)


@dtypes
@entries
def test_wrt_selects_and_orders(entry, dtype):
    arrays = entry.inputs(dtype, (3,), 37)
    value, *every = call(entry, arrays)
    by_name = dict(zip(arrays, every, strict=True))
    backwards = tuple(reversed(tuple(arrays)))
    again, *got = call(entry, arrays, wrt=backwards)
    np.testing.assert_array_equal(again, value)
    for name, x in zip(backwards, got, strict=True):
        np.testing.assert_array_equal(x, by_name[name])
        again, alone = call(entry, arrays, wrt=name)
        np.testing.assert_array_equal(again, value)
        np.testing.assert_array_equal(alone, by_name[name])
    assert len(call(entry, arrays, wrt=None)) == 1 + len(arrays)


@dtypes
@entries
@pytest.mark.parametrize("size", [3, 40, 1500])
def test_layouts(entry, dtype, size):
    """Other axes, strides and outputs of any layout: the same gradients, but for the last bits of
    the row's value, a term of each, that depend on the layout: 2.4e-7 of a float from 2 to 4."""
    close = {"rtol": 1e-5, "atol": 3e-7} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-14}
    arrays = entry.inputs(dtype, (4,), size)
    _, *want = call(entry, arrays)
    turned = {name: np.asfortranarray(x).T.copy().T for name, x in arrays.items()}
    strided = {name: np.repeat(x, 2, axis=-1)[:, ::2] for name, x in arrays.items()}
    outs = tuple(np.empty((4, 2 * size), dtype)[:, ::2] for _ in arrays)
    cases = [
        call(entry, turned),
        call(entry, strided, out=outs),
        call(entry, {name: x.copy() for name, x in arrays.items()}, out=(None,) * len(arrays)),
    ]
    for _, *got in cases:
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x, y, **close)
    _, *got = cases[1]
    assert all(x is out for x, out in zip(got, outs, strict=True))
    _, *got = call(entry, {name: x.T for name, x in arrays.items()}, axis=0)
    for x, y in zip(got, want, strict=True):
        assert x.shape == (size, 4)
        np.testing.assert_allclose(x.T, y, **close)


def test_many_batch_axes():
    a, b = np.random.default_rng(3).normal(size=(2, 3, 4, 5, 6))
    cotangent, t = np.arange(5.0), np.linspace(0.5, 2, 4)[:, None]
    value, *got = klfast.grad.kl_categorical(a, b, cotangent=cotangent, temperature=t)
    for i, j, k in np.ndindex(value.shape):
        options = {"cotangent": cotangent[k], "temperature": t[j, 0]}
        want_value, *want = klfast.grad.kl_categorical(a[i, j, k], b[i, j, k], **options)
        assert value[i, j, k] == want_value
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x[i, j, k], y)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        empty = np.empty(shape)
        with np.errstate(invalid="ignore"):
            value, *got = klfast.grad.kl_discrete(empty, empty)
        assert value.shape == shape[:-1]
        assert all(x.shape == shape for x in got)


@entries
def test_out_may_be_an_input(entry):
    arrays = entry.inputs("float64", (4,), 20)
    _, *want = call(entry, arrays)
    copies = {name: x.copy() for name, x in arrays.items()}
    _, *got = call(entry, copies, out=tuple(copies.values()))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@entries
def test_half_precision(entry, half):
    arrays = {name: x.astype(half) for name, x in entry.inputs("float64", (3,), 40).items()}
    single = {name: x.astype(np.float32) for name, x in arrays.items()}
    for x, y in zip(call(entry, arrays), call(entry, single), strict=True):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, y)


def test_integers_are_doubles():
    value, *got = klfast.grad.kl_discrete([1, 2, 3], [3, 2, 1])
    assert value.dtype == np.float64
    assert all(x.dtype == np.float64 for x in got)


@entries
def test_base(entry):
    if entry.function == "kl_normal":
        pytest.skip("in nats")
    arrays = entry.inputs("float64", (3,), 20)
    nats, bits = call(entry, arrays), call(entry, arrays, base=2)
    for x, y in zip(bits, nats, strict=True):
        np.testing.assert_allclose(x, y / np.log(2), rtol=1e-14)


def test_temperature_of_each_row():
    arrays = IDS["categorical"].inputs("float64", (3,), 20)
    t = np.array([0.5, 1.0, 4.0])
    value, *got = klfast.grad.kl_categorical(**arrays, temperature=t)
    for i in range(3):
        row = {name: x[i] for name, x in arrays.items()}
        want_value, *want = klfast.grad.kl_categorical(**row, temperature=t[i])
        assert value[i] == want_value
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x[i], y)


@entries
@pytest.mark.parametrize(("batch", "size"), [(3000, 20), (300, 3000), (2, 400_000)])
def test_same_bits_from_any_number_of_threads(entry, batch, size):
    arrays = entry.inputs("float32", (batch,), size)
    with klfast.num_threads(1):
        want = call(entry, arrays)
    for threads in (2, 3):
        with klfast.num_threads(threads):
            for x, y in zip(call(entry, arrays), want, strict=True):
                np.testing.assert_array_equal(x, y)


def test_memory_is_bounded():
    """A shared q takes no temporary of the broadcast size."""
    code = """
import resource, numpy as np, klfast.grad
p, q = np.full((20_000, 1000), 0.5, "f"), np.full(1000, 0.3, "f")
klfast.grad.kl_discrete(p[:300], q, wrt="q")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
klfast.grad.kl_discrete(p, q, wrt="q")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    pytest.importorskip("resource")
    assert int(fresh.run(code)) < 20_000  # KiB; the broadcast gradient has 80 MB


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"wrt": "r"}, ValueError, "wrt names 'r'; wanted one of p, q"),
        ({"wrt": ()}, ValueError, "wrt is empty"),
        ({"wrt": ("p", "p")}, ValueError, "twice"),
        ({"wrt": 3}, TypeError, "wrt"),
        ({"cotangent": np.ones(3)}, ValueError, r"cotangent has shape \(3,\).*\(2,\)"),
        ({"cotangent": "one"}, TypeError, "cotangent"),
        ({"out": np.ones((2, 4))}, TypeError, "out must be a tuple of 2"),
        ({"out": (None, np.ones(4))}, ValueError, r"out for q has shape \(4,\); wanted \(2, 4\)"),
        ({"out": (None, np.ones((2, 4), "f"))}, TypeError, "out for q has dtype float32"),
        ({"base": 1}, ValueError, "base"),
        ({"axis": 2}, np.exceptions.AxisError, "p"),
        ({"q": np.ones((2, 3))}, ValueError, r"p and q differ in length.*\(2, 4\).*\(2, 3\)"),
        ({"q": np.ones((3, 4))}, ValueError, "do not broadcast"),
        ({"q": 1.0}, ValueError, "q"),
        ({"q": np.ones((2, 4), complex)}, TypeError, "q has dtype complex128"),
    ],
)
def test_errors_name_the_argument(options, error, says):
    arrays = {"p": np.ones((2, 4)), "q": np.ones((2, 4))}
    with pytest.raises(error, match=says):
        klfast.grad.kl_discrete(**arrays | options)


def test_normal_errors():
    one = np.ones((2, 3))
    with pytest.raises(TypeError, match="exactly one of scale_p"):
        klfast.grad.kl_normal(one)
    with pytest.raises(TypeError, match="loc_q is missing"):
        klfast.grad.kl_normal(one, one, scale_q=one)
    with pytest.raises(ValueError, match="wanted one of loc_p, var_p"):
        klfast.grad.kl_normal(one, var_p=one, wrt="loc_q")
    with pytest.raises(ValueError, match=r"broadcast together.*loc_q \(4,\)"):
        klfast.grad.kl_normal(one, one, np.ones(4), one)
    with pytest.raises(ValueError, match="axis"):
        klfast.grad.kl_normal(one, one, axis=(0,))


def test_temperature_errors():
    with pytest.raises(ValueError, match="temperature"):
        klfast.grad.kl_categorical([1.0], [1.0], temperature=0)
