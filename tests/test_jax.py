"""klfast.jax: the values and gradients of klfast and klfast.grad under jit, grad and vmap."""

import ctypes
import doctest
import importlib
import inspect
import itertools
import re
import threading
import time

import klfast
import numpy as np
import pytest

import fresh
from registry import ENTRIES, IDS, PLAIN

jax = pytest.importorskip("jax")
jnp = jax.numpy
kj = importlib.import_module("klfast.jax")
grad = importlib.import_module("klfast.grad")
calls = importlib.import_module("klfast.jax._calls")

NAMES = [name for name in klfast.__all__ if name.startswith("kl_")]
every = pytest.mark.parametrize(  # all in float32, one a family in float64
    ("entry", "dtype"),
    [(e, "float32") for e in ENTRIES] + [(e, "float64") for e in PLAIN],
    ids=lambda x: getattr(x, "id", x),
)
plain = pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
same = np.testing.assert_array_equal


@pytest.fixture(params=["ffi", "python"])
def way(request, monkeypatch):
    """Both ways to compiled code."""
    if request.param == "ffi":
        assert kj.uses_ffi
        yield
        return
    monkeypatch.setattr(calls, "uses_ffi", False)
    jax.clear_caches()
    yield
    jax.clear_caches()


def options_of(entry, dtype="float32"):
    """The options of an entry; JAX takes the temperature in the arrays' precision."""
    return {
        name: float(np.dtype(dtype).type(x)) if name == "temperature" else x
        for name, x in entry.options.items()
    }


def function_of(entry, names, **options):
    """The function of klfast.jax as one of positional arrays."""
    function = getattr(kj, entry.function)
    return lambda *arrays: function(**dict(zip(names, arrays, strict=True)), **options)


def gradients_of(entry, arrays, wrt=None, cotangent=None, **options):
    """klfast.grad's gradients in the order of the arrays."""
    wrt = tuple(arrays) if wrt is None else wrt
    return getattr(grad, entry.function)(**arrays, wrt=wrt, cotangent=cotangent, **options)[1:]


@every
def test_values_are_those_of_klfast(entry, dtype):
    options = options_of(entry, dtype)
    for batch, size in (((), 3), ((2, 3), min(700, entry.max_size))):
        arrays = entry.inputs(dtype, batch, size)
        want = np.asarray(getattr(klfast, entry.function)(**arrays, **options))
        with jax.enable_x64(dtype == "float64"):
            function = function_of(entry, arrays, **options)
            got = function(*arrays.values())
            assert isinstance(got, jax.Array)
            assert got.dtype == want.dtype
            same(got, want)
            if batch and entry in PLAIN:
                same(jax.jit(function)(*arrays.values()), want)


@plain
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(entry, dtype):
    half = jnp.dtype(dtype)
    arrays = {k: np.asarray(x, half) for k, x in entry.inputs("float32", (5,), 9).items()}
    got = function_of(entry, arrays)(*arrays.values())
    assert got.dtype == jnp.float32
    same(got, entry(arrays))
    f = function_of(entry, arrays)
    found = jax.grad(lambda *x: f(*x).sum(), range(len(arrays)))(*map(jnp.asarray, arrays.values()))
    for g, want in zip(found, gradients_of(entry, arrays), strict=True):
        assert g.dtype == half
        same(g, want.astype(half))


@plain
def test_other_types_follow_jax(entry):
    arrays = entry.inputs("float32", (2,), 3)
    one = {k: x.astype(np.int32) if k[-1] == "p" else x for k, x in arrays.items()}
    whole = {k: np.abs(x.round()).astype(np.int32) for k, x in arrays.items()}
    for given in (one, whole):
        got = function_of(entry, given)(*given.values())
        assert got.dtype == jnp.float32
        with np.errstate(invalid="ignore"):
            want = entry({k: x.astype(np.float32) for k, x in given.items()}, **nan_of(entry))
        same(got, want)
    wrong = list(arrays)[1]
    with pytest.raises(TypeError, match=f"{wrong} has dtype complex64"):
        getattr(kj, entry.function)(**arrays | {wrong: arrays[wrong].astype(np.complex64)})
    listed = function_of(entry, arrays)(*(x.tolist() for x in arrays.values()))
    same(listed, entry(arrays))


def nan_of(entry):
    return {"errors": "nan"} if entry.function == "kl_mvn" else {}


@plain
def test_broadcasting_and_vmap(entry, way):
    batches = [(4, 1), (3,), (1, 3), ()]
    arrays = {
        name: entry.inputs("float32", batch, 5)[name]
        for name, batch in zip(entry.inputs("float32", (), 5), itertools.cycle(batches))
    }
    f = function_of(entry, arrays)
    want = entry(arrays)
    same(f(*arrays.values()), want)
    full = {
        name: np.broadcast_to(x, want.shape + x.shape[x.ndim - entry.core_axes(name) :])
        for name, x in arrays.items()
    }
    same(jax.jit(jax.vmap(jax.vmap(f)))(*full.values()), want)
    first = next(iter(full))
    alone = {name: x if name == first else x[0, 0] for name, x in full.items()}
    axes = [0 if name == first else None for name in alone]
    same(jax.jit(jax.vmap(f, axes))(*alone.values()), entry(alone))
    mapped = [jnp.moveaxis(x, 0, 1) if name == first else x for name, x in alone.items()]
    axes = [1 if name == first else None for name in alone]
    same(jax.jit(jax.vmap(f, axes))(*mapped), entry(alone))


@plain
def test_what_is_broadcast_is_not_repeated(entry):
    arrays = entry.inputs("float32", (512,), 17)
    first = next(iter(arrays))
    shared = {name: x if name == first else x[0] for name, x in arrays.items()}
    f = function_of(entry, arrays)
    mapped = jax.vmap(f, [0 if name == first else None for name in arrays])
    slopes = jax.grad(lambda *x: f(*x).sum(), range(1, len(arrays)))
    for function in (f, mapped, slopes):
        compiled = jax.jit(function).lower(*shared.values()).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 10_000


@every
def test_gradients_are_those_of_klfast_grad(entry, dtype):
    arrays = entry.inputs(dtype, (3, 2), 6)
    options = options_of(entry, dtype)
    weights = np.array([[1, -2], [0, 0.5], [8, 1]], dtype)  # products are exact
    want = gradients_of(entry, arrays, cotangent=weights, **options)
    with jax.enable_x64(dtype == "float64"):
        f = function_of(entry, arrays, **options)

        def loss(*x):
            value = f(*x)
            return (weights * value).sum(), value

        both = jax.jit(jax.value_and_grad(loss, range(len(arrays)), has_aux=True))
        (_, value), found = both(*arrays.values())
        precision = 3e-7 if dtype == "float32" else 1e-14
        np.testing.assert_allclose(value, f(*arrays.values()), rtol=precision)
        for got, expected in zip(found, want, strict=True):
            assert got.dtype == dtype
            same(got, expected)
        if entry not in PLAIN or dtype == "float64":
            return
        again = jax.grad(jax.checkpoint(lambda *x: loss(*x)[0]), range(len(arrays)))
        for got, expected in zip(again(*arrays.values()), want, strict=True):
            same(got, expected)
        single = jax.vmap(jax.vmap(jax.grad(f, range(len(arrays)))))
        ones = gradients_of(entry, arrays, **options)
        for got, expected in zip(single(*arrays.values()), ones, strict=True):
            same(got, expected)


@plain
def test_gradients_of_broadcast_arguments(entry, way):
    shapes = entry.inputs("float32", (), 5)
    for batches in (((), (3,)), ((4, 1), (3,)), ((4, 3), (4, 1)), ((), ())):
        arrays = {
            name: entry.inputs("float32", batches[name[-1] == "q"], 5)[name] for name in shapes
        }
        f = function_of(entry, arrays)
        batch = np.broadcast_shapes(*batches)
        weights = np.random.default_rng(1).normal(size=batch).astype(np.float32)
        loss = jax.grad(lambda *x, f=f, w=weights: (w * f(*x)).sum(), range(len(arrays)))
        found = jax.jit(loss)(*arrays.values())
        want = gradients_of(entry, arrays, cotangent=weights)
        for got, expected, x in zip(found, want, arrays.values(), strict=True):
            assert got.shape == x.shape
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@plain
def test_long_sums_are_in_double(entry):
    """Sums in float32 of so many terms that alternate in size would be off by more."""
    size = 5
    arrays = entry.inputs("float32", (20_000,), size)
    name = list(arrays)[-1]
    arrays[name] = arrays[name][0]
    f = function_of(entry, arrays)
    got = jax.grad(lambda *x: f(*x).sum(), len(arrays) - 1)(*arrays.values())
    each = jax.vmap(jax.grad(f, len(arrays) - 1), [0] * (len(arrays) - 1) + [None])
    terms = np.asarray(each(*arrays.values()), np.float64)
    same(got, terms.sum(0).astype(np.float32))


@plain
def test_only_what_is_wanted_is_computed(entry):
    arrays = entry.inputs("float32", (2,), 3)
    f = function_of(entry, arrays)
    for i in range(len(arrays)):
        text = str(jax.make_jaxpr(jax.grad(lambda *x: f(*x).sum(), i))(*arrays.values()))
        (wanted,) = set(re.findall(r"_gradients_(\d+)", text))
        assert int(wanted).bit_count() == 1
    constant = jax.grad(lambda x: x.sum() + jax.lax.stop_gradient(f(*arrays.values())).sum())
    assert "gradients" not in str(jax.make_jaxpr(constant)(np.ones(2, np.float32)))


@plain
def test_second_derivatives_are_refused(entry):
    arrays = entry.inputs("float32", (), 3)
    f = function_of(entry, arrays)
    rest = list(arrays.values())[1:]
    x = jnp.asarray(next(iter(arrays.values())))
    twice = jax.grad(lambda x: jax.grad(f)(x, *rest).sum())
    for second in (twice, jax.jit(twice), jax.jacrev(jax.grad(lambda x: f(x, *rest)))):
        with pytest.raises(NotImplementedError, match=r"klfast\.jax gives first derivatives only"):
            second(x)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: f(x, *rest), (x,), (x,))


def test_training_loop():
    """Gradient descent under scan finds the distribution."""
    p = jnp.asarray([0.2, 0.3, 0.5])

    def step(logits, _):
        value, slope = jax.value_and_grad(lambda q: kj.kl_categorical(jnp.log(p), q))(logits)
        return logits - 2.0 * slope, value

    logits, values = jax.jit(lambda x: jax.lax.scan(step, x, length=200))(jnp.zeros(3))
    np.testing.assert_allclose(jax.nn.softmax(logits), p, atol=1e-6)
    assert values[-1] < 1e-12 < values[0]


def test_options():
    p, q = IDS["discrete-counts"].inputs("float32", (4, 3), 6).values()
    for axis in (0, 1, -2):
        got = kj.kl_discrete(p, q, axis=axis, keepdims=True)
        same(got, klfast.kl_discrete(p, q, axis=axis, keepdims=True))
        slope = jax.grad(lambda q, a=axis: kj.kl_discrete(p, q, axis=a).sum())(q)
        same(slope, grad.kl_discrete(p, q, axis=axis, wrt="q")[1])
    bits = kj.kl_discrete(p, q, base=2)
    np.testing.assert_allclose(bits, klfast.kl_discrete(p, q, base=2), rtol=3e-7)
    loc, loc_q, scale, _ = IDS["normal-scale"].inputs("float32", (4,), 6).values()
    same(kj.kl_normal(loc, scale), klfast.kl_normal(loc, scale))
    same(kj.kl_normal(loc, 2.0, loc_q, 3.0), klfast.kl_normal(loc, 2.0, loc_q, 3.0))
    each = klfast.kl_normal(loc, scale, loc_q, logvar_q=0.0, axis=())
    same(kj.kl_normal(loc, scale, loc_q, logvar_q=0.0, axis=()), each)
    columns = klfast.kl_normal(loc, scale[0], loc_q[:, :1], 2.0, axis=0, keepdims=True)
    same(kj.kl_normal(loc, scale[0], loc_q[:, :1], 2.0, axis=0, keepdims=True), columns)
    slope = jax.grad(lambda s: kj.kl_normal(loc, s).sum())(2.0)
    np.testing.assert_allclose(
        slope, grad.kl_normal(loc, np.float32(2), wrt="scale_p")[1], rtol=1e-6
    )
    mean, factor = (IDS["mvn"].inputs("float32", (4,), 3)[k] for k in ("loc_p", "scale_tril_p"))
    same(kj.kl_mvn(mean, scale_tril_p=factor), klfast.kl_mvn(mean, scale_tril_p=factor))
    cov = factor @ factor.mT
    same(kj.kl_mvn(mean, cov, mean[0], cov[0]), klfast.kl_mvn(mean, cov, mean[0], cov[0]))
    slopes = jax.grad(lambda *x: kj.kl_mvn(*x).sum(), (1, 3))(mean, cov, mean[0], cov[0])
    want = grad.kl_mvn(mean, cov, mean[0], cov[0], wrt=("cov_p", "cov_q"))[1:]
    same(slopes[0], want[0])
    np.testing.assert_allclose(slopes[1], want[1], rtol=1e-5, atol=1e-6)


def test_temperature():
    a, b = IDS["categorical"].inputs("float32", (3, 4), 9).values()
    warm = np.float32([[0.5], [1.5], [2.5]])
    want = klfast.kl_categorical(a, b, temperature=warm)
    for f in (kj.kl_categorical, jax.jit(kj.kl_categorical)):
        same(f(a, b, temperature=warm), want)
    mapped = jax.vmap(lambda a, b, t: kj.kl_categorical(a, b, temperature=t))
    same(mapped(a, b, jnp.asarray(warm[:, 0])), want)
    slope = jax.grad(lambda t: kj.kl_categorical(a, b, temperature=t).sum())(2.0)
    assert slope == 0
    got = jax.grad(lambda b: kj.kl_categorical(a, b, temperature=jnp.asarray(warm)).sum())(b)
    same(got, grad.kl_categorical(a, b, temperature=warm, wrt="logits_q")[1])
    bad = jnp.asarray([1.0, 0.0, -1.0, np.inf])
    got = np.asarray(kj.kl_categorical(a[0], b[0], temperature=bad))
    assert np.isfinite(got[0])
    assert np.isnan(got[1:]).all()
    for t in (0, -1.0, float("nan"), np.array([1.0, 0.0])):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            kj.kl_categorical(a, b, temperature=t)


def test_edges():
    """Nothing is raised: bad rows are NaN, and their neighbours untouched."""
    p = np.float32([[0.5, 0.5, 0], [0, 0, 0], [-1, 1, 1], [np.nan, 1, 1], [1, 1, 1]])
    q = np.float32([[0.5, 0, 0.5], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    with np.errstate(invalid="raise"):
        got = kj.kl_discrete(p, q)
    same(got, [np.inf, np.nan, np.nan, np.nan, 0])
    masked = np.float32([[0, 1, -np.inf], [0, 1, 2]])
    same(kj.kl_categorical(masked, masked), [0, 0])
    slopes = jax.grad(lambda a, b: kj.kl_categorical(a, b).sum(), (0, 1))(masked, masked + 1)
    for slope in slopes:
        assert np.isfinite(slope).all()
    assert np.isnan(
        kj.kl_mvn(np.zeros((2, 2)), np.float32([[[1, 2], [2, 1]], [[1, 0], [0, 1]]]))[0]
    )
    assert np.isnan(kj.kl_discrete(np.zeros((2, 0)), np.zeros((2, 0)))).all()
    same(kj.kl_normal(np.zeros((2, 0)), np.zeros((2, 0))), [0, 0])
    assert (
        jax.grad(lambda q: kj.kl_discrete(np.zeros((0, 3)), q).sum())(np.ones(3)).tolist()
        == [0] * 3
    )


def test_subnormal_numbers_are_not_flushed():
    """XLA's threads flush them to zero."""
    p, q = np.float32([1e-40, 3e-40]), np.float32([2e-40, 1e-40])
    large = (np.stack([p] * 100_000), np.stack([q] * 100_000))
    for arrays in ((p, q), large):
        want = klfast.kl_discrete(*arrays)
        assert np.isfinite(want).all()
        same(jax.jit(kj.kl_discrete)(*arrays), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: kj.kl_discrete(x, x[:, :2]),
            r"p and q differ in length along axis -1: p \(4, 3\)",
        ),
        (lambda x: kj.kl_discrete(x, x[:3]), r"batch axes of p \(4, 3\), q \(3, 3\) do not broad"),
        (lambda x: kj.kl_discrete(1.0, x), "p: axis -1 is out of bounds"),
        (lambda x: kj.kl_discrete(x, x, axis=2), "p: axis 2 is out of bounds"),
        (lambda x: kj.kl_discrete(x, x, base=1), "base must be"),
        (lambda x: kj.kl_categorical(x, x, temperature=x), r"temperature \(4, 3\)"),
        (lambda x: kj.kl_normal(x, x[:3]), r"broadcast together: loc_p \(4, 3\), scale_p \(3, 3\)"),
        (lambda x: kj.kl_normal(x, x, x, x, axis=(0,)), "axis must be an integer"),
        (lambda x: kj.kl_normal(x, x, x, x, axis=(), keepdims=True), "keepdims"),
        (lambda x: kj.kl_mvn(x, x), r"cov_p has shape \(4, 3\); wanted \(..., 3, 3\)"),
        (lambda x: kj.kl_mvn(x, scale_tril_p=x[0, 0]), r"scale_tril_p has shape \(\)"),
    ],
)
def test_wrong_shapes_and_options(call, message):
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        call(x)


def test_wrong_keywords():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(TypeError, match="exactly one of scale_p, var_p, logvar_p"):
        kj.kl_normal(x)
    with pytest.raises(TypeError, match="loc_q is missing"):
        kj.kl_normal(x, x, scale_q=x)
    with pytest.raises(TypeError, match="loc_q is missing"):
        kj.kl_mvn(x[0], np.eye(3), cov_q=np.eye(3))
    with pytest.raises(TypeError, match="p cannot be made an array"):
        kj.kl_discrete("abc", x)
    with pytest.raises(TypeError, match="q is a masked array"):
        kj.kl_discrete(x, np.ma.masked_equal(x, 1))


@plain
def test_threads_change_no_bit(entry):
    size = min(300, entry.max_size)
    arrays = entry.inputs("float32", (3000,), size)
    shared = {name: x if name[-1] == "p" else x[0] for name, x in arrays.items()}
    outer = {name: x[:60, None] if name[-1] == "p" else x[:50] for name, x in arrays.items()}
    before = klfast.get_num_threads()
    for given in (arrays, shared, outer):
        f = function_of(entry, given)
        both = jax.jit(jax.value_and_grad(lambda *x, f=f: f(*x).sum(), tuple(range(len(given)))))
        found = []
        try:
            for threads in (1, 3):
                klfast.set_num_threads(threads)
                found.append((f(*given.values()), *both(*given.values())[1]))
                jax.block_until_ready(found)
        finally:
            klfast.set_num_threads(before)
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                same(a, b)
        same(found[0][0], entry(given))


def test_python_threads_side_by_side():
    entry = IDS["categorical"]
    inputs = [entry.inputs("float32", (200,), 100, seed=i) for i in range(6)]
    step = jax.jit(jax.value_and_grad(lambda a, b: kj.kl_categorical(a, b).sum(), (0, 1)))
    want = [step(*x.values()) for x in inputs]
    got = [None] * len(inputs)

    def work(i):
        for _ in range(5):
            got[i] = step(*inputs[i].values())

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        same(a, b)


def test_python_is_not_needed():
    """A long call goes on while another thread holds the GIL."""
    logits = np.random.default_rng(0).normal(size=(2, 8000)).astype(np.float32)
    warm = jnp.linspace(0.5, 2, 4_000)
    f = jax.jit(lambda t: kj.kl_categorical(*logits, temperature=t))
    f(warm).block_until_ready()
    before = time.perf_counter()
    f(warm).block_until_ready()
    seconds = time.perf_counter() - before
    result = f(warm + 0)
    ctypes.PyDLL(None).usleep(int(1e6 * (6 * seconds + 0.2)))  # a PyDLL keeps the GIL
    assert result.is_ready()


def test_klfast_does_not_import_jax():
    assert fresh.run("import sys, klfast; print('jax' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_docstring(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (kj, klfast))
    kept = {k: v for k, v in theirs.items() if k not in ("out", "errors")}
    assert [(k, v.kind, v.default) for k, v in ours.items()] == [
        (k, v.kind, v.default) for k, v in kept.items()
    ]
    module = importlib.import_module(f"klfast.jax.{name.removeprefix('kl_')}")
    found = doctest.DocTestFinder(recurse=False).find(getattr(kj, name), name, module=module)
    assert any(test.examples for test in found)
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert not runner.failures
