"""Every gradient is within its bound of the exact one, and no finite difference contradicts it."""

import klfast.grad
import mpmath
import numpy as np
import pytest

import gradient_oracle
from registry import DTYPES, ENTRIES, IDS, ROWS, SMALLEST_RELATIVE_DIFFERENCE, show

UNDERFLOW = {"float32": 1e-37, "float64": 1e-306}
SIZES = [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 100, 1039, 1040]
NEAR = [None, 1.0, 1e-2, 1e-4, 1e-6, 1e-8]
GRADIENTS = [entry for entry in ENTRIES if hasattr(klfast.grad, entry.function)]
GRADIENTS = [entry for entry in GRADIENTS if hasattr(gradient_oracle, entry.function)]
entries = pytest.mark.parametrize("entry", GRADIENTS, ids=lambda e: e.id)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def gradients(entry, arrays, **options):
    """The value, and the gradients by name."""
    function = getattr(klfast.grad, entry.function)
    value, *found = function(**arrays, **entry.options, wrt=tuple(arrays), **options)
    return value, dict(zip(arrays, found, strict=True))


def check(entry, arrays, **options):
    """Assert that value and gradients of each row are exact within the bounds."""
    value, found = gradients(entry, arrays, **options)
    dtype = value.dtype.name
    np.testing.assert_allclose(value, entry(arrays, **options), rtol=3 * ROWS[dtype], atol=1e-28)
    for row in range(len(value)):
        inputs = {name: x[row] for name, x in arrays.items()}
        exact = getattr(gradient_oracle, entry.function)(**inputs, **entry.options, **options)
        for name, got in found.items():
            want, scale, underflow = exact[name]
            assert got.dtype == value.dtype
            with np.errstate(invalid="ignore"):
                off = np.abs(got[row].astype(np.float64) - want)
                good = (off <= ROWS[dtype] * scale + UNDERFLOW[dtype] * underflow) | (
                    got[row] == want
                )
            worst = int(np.argmin(good))
            assert good.all(), (
                f"to {name}[{worst}]: got {got[row][worst]!r}, want {want[worst]!r}, scale "
                f"{scale[worst]!r}; inputs\n{show(inputs, ())}"
            )


@dtypes
@entries
def test_bound(entry, dtype):
    for size in SIZES:
        for near in NEAR:
            if near is None or near >= SMALLEST_RELATIVE_DIFFERENCE[dtype]:
                if size > 100 and near not in (None, 1e-2, SMALLEST_RELATIVE_DIFFERENCE[dtype]):
                    continue
                check(entry, entry.inputs(dtype, (1 if size > 40 else 2,), size, near))


@dtypes
@pytest.mark.parametrize("name", ["discrete-totals", "categorical", "normal-scale"])
def test_long_rows(name, dtype):
    near = SMALLEST_RELATIVE_DIFFERENCE[dtype]
    check(IDS[name], IDS[name].inputs(dtype, (1,), 100_000, near if dtype == "float64" else None))


@dtypes
@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.3, 10.0])
def test_temperature(dtype, temperature):
    for near in (None, 1e-2, SMALLEST_RELATIVE_DIFFERENCE[dtype]):
        for size in (5, 40, 1100):
            arrays = IDS["categorical"].inputs(dtype, (1,), size, near)
            check(IDS["categorical"], arrays, temperature=temperature)


LOGITS = {
    "one-hot": ([0.0, -90.0, -200.0], [0.0, -80.0, 3.0]),
    "far": ([0.0, 60.0, -60.0, 5.0] * 10, [60.0, -60.0, 10.0, 5.0] * 10),
    "huge": ([1e4, 0.0, -1e4, 3e4], [3e4, 0.0, 1e3, -3e4]),
    "low": ([-500.0, -501.0, -503.0] * 8, [800.0, 801.0, 802.0] * 8),
    "low and near": ([-40.0, -41.0, -43.0] * 8, [-40.0, -41.0, -42.9] * 8),
    "steep": (list(np.linspace(-45, 45, 40)), list(np.linspace(45, -45, 40))),
    "shifted": (list(np.linspace(-3, 3, 40)), list(np.linspace(-3, 3.001, 40) + 100)),
    "almost all masked": ([1.0, 2.0] + [-np.inf] * 60, [2.0, 2.5] + [-np.inf] * 60),
}


@dtypes
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_logits_anywhere(logits, dtype):
    a, b = (np.array([x], dtype) for x in logits)
    check(IDS["categorical"], {"logits_p": a, "logits_q": b})


@dtypes
@pytest.mark.parametrize("spread", [0.5, 0.7, 1.0, 3.0, 6.0])
def test_logits_at_any_distance(spread, dtype):
    """Another formula serves from KL = 1/2 on."""
    entry = IDS["categorical"]
    for size in (40, 1100, 3000):
        rng = np.random.default_rng(size)
        arrays = {
            name: spread * rng.standard_normal((1, size)) for name in ("logits_p", "logits_q")
        }
        check(entry, {name: x.astype(dtype) for name, x in arrays.items()})


@dtypes
@pytest.mark.parametrize("offset", [-35, 35])
def test_offsets_of_far_rows(offset, dtype):
    """Sums of e^b at the ends of float32's range, times a small cotangent."""
    rng = np.random.default_rng(0)
    a, b = (0.3 * rng.standard_normal(30_000) + k * offset for k in (1, 2))
    b += np.linspace(-2.5, 2.5, 30_000)
    a, b = a.astype(dtype), b.astype(dtype)
    value, got = klfast.grad.kl_categorical(a, b, wrt="logits_q", cotangent=1e-8)
    assert value > 0.5
    p, q = (np.exp(x - x.max(), dtype=np.float64) for x in (np.float64(a), np.float64(b)))
    p, q = p / p.sum(), q / q.sum()
    scale = np.abs(q - p) + q
    assert (np.abs(got - 1e-8 * (q - p)) <= 1e-8 * 2 * ROWS[dtype] * scale).all()


WEIGHTS = {
    "far": ([1e-30, 2e-30, 1.0], [1.0, 1e-30, 1e-30]),
    "totals far apart": ([1e-25, 3e-25, 2e-25], [2e20, 5e20, 4e20]),
    "near, totals far apart": ([1e-25, 3e-25, 2e-25], [1e20, 3.00001e20, 2e20]),
    "subnormal in float32": ([1e-39, 0.5, 0.5], [2e-39, 0.25, 0.75]),
}


@dtypes
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_anywhere(weights, dtype):
    p, q = (np.array([x], dtype) for x in weights)
    check(IDS["discrete"], {"p": p, "q": q})
    check(IDS["discrete-raw"], {"p": p, "q": q})


def test_weights_of_any_exponent(monkeypatch):
    monkeypatch.setattr(gradient_oracle, "BITS", 2048)
    p, q = np.array([[1e-310, 2e-300, 4.0]]), np.array([[3e-310, 1e-200, 5.0]])
    check(IDS["discrete"], {"p": p, "q": q})
    check(IDS["discrete"], {"p": p * 1e250, "q": q})


@pytest.mark.parametrize("spread", ["scale", "var", "logvar"])
def test_normals_of_any_exponent(spread):
    s, t = np.array([[1e-300, 1e150, 3.0]]), np.array([[2e-300, 1e140, 3.00001]])
    if spread == "logvar":
        s, t = np.array([[-720.0, 650.0, 3.0]]), np.array([[-721.0, 640.0, 3.00001]])
    m, n = np.array([[0.0, 1e140, 1.0]]), np.array([[1e-308, 2e140, 1.5]])
    entry = IDS[f"normal-{spread}"]
    arrays = {"loc_p": m, "loc_q": n, f"{spread}_p": s, f"{spread}_q": t}
    if spread != "scale":  # 1/v_q is out of range
        arrays = {name: x[:, 1:] for name, x in arrays.items()}
    check(entry, arrays)


def test_mpmath_differentiates_to_the_same():
    """The oracle's formulas against numerical derivatives of the definition."""
    with mpmath.workdps(60):
        for entry in GRADIENTS:
            arrays = entry.inputs("float64", (1,), 4)
            rows = {name: [mpmath.mpf(float(v)) for v in x[0]] for name, x in arrays.items()}
            exact = getattr(gradient_oracle, entry.function)(
                **{name: x[0] for name, x in arrays.items()}, **entry.options
            )
            for name in rows:
                for i in range(4):
                    if not np.isfinite(arrays[name][0][i]) or rows[name][i] == 0:
                        continue

                    def moved(x, name=name, i=i, rows=rows, entry=entry):
                        changed = [x if j == i else v for j, v in enumerate(rows[name])]
                        return definition(entry, {**rows, name: changed})

                    want = mpmath.diff(moved, rows[name][i])
                    assert abs(want - exact[name][0][i]) <= 1e-12 * max(1, abs(want))


def definition(entry, rows):
    """KL in mpmath."""
    if entry.function == "kl_normal":
        zeros = [mpmath.mpf(0)] * len(rows["loc_p"])
        rows = rows if "loc_q" in rows else {**rows, "loc_q": zeros, "logvar_q": zeros}
        variance = {"scale": lambda x: x * x, "var": lambda x: x, "logvar": mpmath.exp}
        (kind_p, s), (kind_q, u) = sorted(
            ((k, x) for k, x in rows.items() if not k.startswith("loc")), key=lambda kx: kx[0][-1]
        )
        v = [variance[kind_p[:-2]](x) for x in s]
        w = [variance[kind_q[:-2]](x) for x in u]
        return sum(
            (x / y - 1 - mpmath.log(x / y) + (m - n) ** 2 / y) / 2
            for x, y, m, n in zip(v, w, rows["loc_p"], rows["loc_q"], strict=True)
        )
    p, q = rows.values()
    if entry.function == "kl_categorical":
        t = mpmath.mpf(entry.options.get("temperature", 1))
        p, q = [mpmath.exp(x / t) for x in p], [mpmath.exp(x / t) for x in q]
    if entry.options.get("normalize", True):
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True) if x)


@entries
def test_finite_differences(entry):
    arrays = entry.inputs("float64", (2,), 5)
    _, found = gradients(entry, arrays)
    for name, gradient in found.items():
        for index in np.ndindex(gradient.shape):
            x = arrays[name][index]
            if not np.isfinite(x) or x == 0:
                continue
            h = 1e-5 * abs(x)
            ends = []
            for moved in (x - h, x + h):
                changed = arrays[name].copy()
                changed[index] = moved
                ends.append(entry({**arrays, name: changed})[index[0]])
            want = (ends[1] - ends[0]) / (2 * h)
            assert abs(gradient[index] - want) <= 1e-5 * max(1, abs(want))
