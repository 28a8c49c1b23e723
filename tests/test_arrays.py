"""Any array NumPy can describe is read where it lies and gives the right result."""

import tracemalloc

import klfast
import ml_dtypes
import numpy as np
import pytest

from registry import DTYPES, ENTRIES, IDS, PLAIN, ROWS, assert_close

WITH_AXIS = [entry for entry in PLAIN if entry.core == 1]
by_id = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
plain = pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
with_axis = pytest.mark.parametrize("entry", WITH_AXIS, ids=lambda e: e.id)


def spread_out(a, *, step=2, reverse=False):
    """Give a view like `a` in which every axis is strided."""
    wide = np.full([n * step for n in a.shape], 99, a.dtype)
    view = wide[tuple(slice(None, None, step) for _ in a.shape)]
    view[...] = a[(slice(None, None, -1),) * a.ndim] if reverse else a
    return view[(slice(None, None, -1),) * a.ndim] if reverse else view


def unaligned(a):
    view = np.frombuffer(bytearray(a.nbytes + 1), a.dtype, offset=1, count=a.size).reshape(a.shape)
    view[...] = a
    assert a.size == 0 or not view.flags.aligned
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def memory_mapped(a, tmp_path):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
    np.save(path, a)
    return np.load(path, mmap_mode="r")


LAYOUTS = {
    "C order": lambda a, _: a,
    "Fortran order": lambda a, _: np.asfortranarray(a),
    "strided": lambda a, _: spread_out(a),
    "far apart": lambda a, _: spread_out(a, step=5),
    "reversed": lambda a, _: spread_out(a, step=1, reverse=True),
    "reversed and strided": lambda a, _: spread_out(a, reverse=True),
    "field of records": lambda a, _: np.rec.fromarrays([a, np.zeros(a.shape, "u1")])["f0"],
    "read-only": lambda a, _: read_only(a),
    "unaligned": lambda a, _: unaligned(a),
    "byte-swapped": lambda a, _: a.astype(a.dtype.newbyteorder()),
    "memory-mapped": memory_mapped,
    "nested list": lambda a, _: a.tolist() if a.size else a,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@by_id
def test_layout(entry, dtype, layout, tmp_path):
    for shape, size in [((4, 3), 5), ((3,), 1), ((2,), 67), ((), 33), ((0, 3), 5), ((3, 0), 5)]:
        arrays = entry.inputs(dtype, shape, min(size, entry.max_size))
        laid = {name: LAYOUTS[layout](a, tmp_path) for name, a in arrays.items()}
        got = entry(laid)
        first = next(iter(laid.values()))
        assert got.dtype == ("float64" if isinstance(first, list) else dtype)
        assert isinstance(got, np.ndarray if shape else np.floating)
        if got.size:
            entry.check(got, {name: np.asarray(a, dtype) for name, a in laid.items()})
        assert got.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@by_id
def test_one_array_strided_at_a_time(entry, dtype):
    arrays = entry.inputs(dtype, (6,), min(40, entry.max_size))
    for name, a in arrays.items():
        entry.check(entry({**arrays, name: spread_out(a)}), arrays)
        entry.check(entry({**arrays, name: a[::-1].copy()[::-1]}), arrays)


BATCHES = [
    ((5,), ()),
    ((), (5,)),
    ((4, 1), (1, 3)),
    ((2, 1, 4), (3, 1)),
    ((1,), (7,)),
    ((0,), (1,)),
    ((2, 3), (2, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 17, 50])
@by_id
def test_broadcasting(entry, size, dtype):
    size = min(size, entry.max_size)
    for batch_p, batch_q in BATCHES:
        p, q = entry.inputs(dtype, batch_p, size), entry.inputs(dtype, batch_q, size, seed=1)
        arrays = {name: (p if name.endswith("p") else q)[name] for name in p}
        got = entry(arrays)
        batches = [batch_p if name.endswith("p") else batch_q for name in p]
        assert got.shape == np.broadcast_shapes(*batches)
        if got.size:
            entry.check(got, arrays)


def every_pair(entry, dtype, size, m, n):
    """Make m of P against n of Q, and the same in rows."""
    p, q = entry.inputs(dtype, (m, 1), size), entry.inputs(dtype, (1, n), size, seed=1)
    arrays = {name: (p if name.endswith("p") else q)[name] for name in p}
    rows = {
        name: np.broadcast_to(a, (m, n, *a.shape[2:])).reshape(m * n, *a.shape[2:])
        for name, a in arrays.items()
    }
    return arrays, rows


@by_id
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "m", "n"), [(3, 5, 70), (17, 70, 5), (40, 60, 60), (3, 0, 4), (3, 4, 0)]
)
def test_pairs_are_as_rows(entry, dtype, size, m, n):
    if entry.id.endswith("standard"):
        pytest.skip("has no Q")
    size = min(size, entry.max_size)
    arrays, rows = every_pair(entry, dtype, size, m, n)
    want = entry(rows).reshape(m, n)
    for threads in (1, 3):
        with klfast.num_threads(threads):
            np.testing.assert_array_equal(entry(arrays), want, f"{threads} threads")
    out = np.full((m, 2 * n), 99, dtype)
    entry(arrays, out=out[:, ::2])
    np.testing.assert_array_equal(out[:, ::2], want)
    assert (out[:, 1::2] == 99).all()
    stacked = {name: np.stack([a, a[::-1, ::-1]]) for name, a in arrays.items()}
    np.testing.assert_array_equal(entry(stacked), [want, want[::-1, ::-1]])


def test_pairs_with_temperatures():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 1, 9)), rng.normal(size=(1, 7, 9))
    for shape in ((), (7,), (5, 1), (5, 7), (3, 5, 7)):
        temperature = rng.uniform(0.5, 2, shape)
        batch = np.broadcast_shapes((5, 7), shape)
        rows = [np.broadcast_to(x, (*batch, 9)).reshape(-1, 9) for x in (a, b)]
        each = np.broadcast_to(temperature, batch).ravel()
        want = klfast.kl_categorical(*rows, temperature=each).reshape(batch)
        np.testing.assert_array_equal(klfast.kl_categorical(a, b, temperature=temperature), want)


def test_bad_values_among_pairs_are_reported():
    p, q = np.ones((3, 1, 4)), np.ones((1, 5, 4))
    p[1, 0, 2] = -1
    with pytest.warns(RuntimeWarning, match="invalid value"):
        got = klfast.kl_discrete(p, q)
    np.testing.assert_array_equal(np.isnan(got), np.arange(3)[:, None] == [1] * 5)


@by_id
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_one_distribution_alone_is_as_in_a_batch(entry, dtype, size):
    arrays = entry.inputs(dtype, (3,), size)
    alone = [entry({name: a[i] for name, a in arrays.items()}) for i in range(3)]
    assert [type(x) for x in alone] == [np.dtype(dtype).type] * 3
    np.testing.assert_array_equal(alone, entry(arrays), f"{arrays}")


@plain
def test_every_array_broadcasts_by_itself(entry):
    arrays = entry.inputs("float64", (3,), 5)
    for name in arrays:
        mixed = {key: a if key == name else a[0] for key, a in arrays.items()}
        entry.check(entry(mixed), mixed)


def test_one_standard_normal_for_all():
    loc, scale = np.random.default_rng(0).uniform(0.5, 2, (2, 7, 5))
    zero, one = np.zeros(5), np.ones(5)
    np.testing.assert_allclose(
        klfast.kl_normal(loc, scale), klfast.kl_normal(loc, scale, zero, one), rtol=1e-14
    )
    factor = scale[..., None] * np.eye(5)
    got = klfast.kl_mvn(loc, scale_tril_p=factor)
    np.testing.assert_allclose(got, klfast.kl_normal(loc, scale), rtol=1e-13)
    np.testing.assert_allclose(klfast.kl_mvn(loc, factor**2), got, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", range(-3, 3))
@with_axis
def test_axis_and_keepdims(entry, axis, dtype):
    arrays = entry.inputs(dtype, (3, 4), 5)
    moved = {name: np.moveaxis(a, -1, axis) for name, a in arrays.items()}
    for laid in (moved, {name: np.ascontiguousarray(a) for name, a in moved.items()}):
        got = entry(laid, axis=axis)
        entry.check(got, arrays)
        kept = entry(laid, axis=axis, keepdims=True)
        np.testing.assert_array_equal(kept, np.expand_dims(got, axis))
        out = np.empty(kept.shape, dtype)
        assert entry(laid, axis=axis, keepdims=True, out=out) is out
        np.testing.assert_array_equal(out, kept)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_per_element(dtype):
    arrays = IDS["normal-scale"].inputs(dtype, (3, 4), 5)
    got = klfast.kl_normal(**arrays, axis=())
    assert got.shape == (3, 4, 5)
    assert got.dtype == dtype
    IDS["normal-scale"].check(got, {name: a[..., np.newaxis] for name, a in arrays.items()})
    np.testing.assert_allclose(got.sum(-1), klfast.kl_normal(**arrays), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@by_id
def test_out(entry, dtype):
    arrays = entry.inputs(dtype, (4, 3), 5)
    want = entry(arrays)
    for out in (
        np.empty((4, 3), dtype),
        np.empty((3, 4), dtype).T,
        np.empty((8, 6), dtype)[::-2, ::2],
    ):
        assert entry(arrays, out=out) is out
        np.testing.assert_array_equal(out, want)
    out = np.empty((), dtype)
    assert entry({name: a[0, 0] for name, a in arrays.items()}, out=out) is out
    assert out == want[0, 0]


def refuse(*args, **kwargs):
    raise AssertionError("arrays of one shape need no broadcasting")


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.parametrize("batch", [(), (1,), (4,), (3, 4), (2, 3, 4)], ids=str)
@with_axis
def test_options_of_arrays_of_one_shape(entry, batch, dtype, monkeypatch):
    """With axis, keepdims and out: the same bits, past what takes longer than a small kernel."""
    arrays = {name: a.astype(dtype) for name, a in entry.inputs("float32", batch, 5).items()}
    want = entry(arrays)
    across = {name: np.ascontiguousarray(np.moveaxis(a, -1, 0)) for name, a in arrays.items()}
    first, last = (1, *batch), (*batch, 1)
    for laid, axis, kept in ((arrays, -1, last), (arrays, len(batch), last), (across, 0, first)):
        outs = [np.full(shape, 7, want.dtype) for shape in (batch, kept)]
        with monkeypatch.context() as patch:
            for name in ("broadcast_shapes", "broadcast_arrays", "broadcast_to", "result_type"):
                patch.setattr(np, name, refuse)
            got = entry(laid, axis=axis)
            got_kept = entry(laid, axis=axis, keepdims=True)
            assert entry(laid, axis=axis, out=outs[0]) is outs[0]
            assert entry(laid, axis=axis, keepdims=True, out=outs[1]) is outs[1]
        assert got_kept.flags.writeable
        np.testing.assert_array_equal(got, want, strict=True)
        np.testing.assert_array_equal(got_kept, want.reshape(kept), strict=True)
        for out in outs:
            np.testing.assert_array_equal(out, want.reshape(out.shape), strict=True)


@pytest.mark.parametrize("function", [klfast.kl_discrete, klfast.kl_categorical])
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)
def test_base_with_out(function, batch):
    p, q = np.random.default_rng(0).uniform(1, 2, (2, *batch, 5))
    want = function(p, q) / np.log(2)
    np.testing.assert_array_equal(function(p, q, base=2), want, strict=True)
    out = np.full((*batch, 1), 7.0)
    assert function(p, q, base=2, keepdims=True, out=out) is out
    np.testing.assert_array_equal(out[..., 0], want)


@pytest.mark.parametrize("kind", [float, int, np.float64, np.float32, np.array])
def test_one_temperature_of_any_kind(kind):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    for p, q in ((a[0, 0], b[0, 0]), (a[0], b[0]), (a, b), (a, b[0, 0])):
        want = klfast.kl_categorical(p / 2, q / 2)
        got = klfast.kl_categorical(p, q, temperature=kind(2))
        np.testing.assert_allclose(got, want, rtol=1e-13, strict=True)
        out = np.empty(want.shape)
        klfast.kl_categorical(p, q, temperature=kind(2), out=out)
        np.testing.assert_array_equal(out, got)


@pytest.mark.parametrize("kind", ["scale", "var"])
@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)
def test_standard_normal_with_options(kind, dtype, batch):
    """Left out, or given by numbers, as by arrays."""
    loc, spread = np.random.default_rng(0).uniform(0.5, 2, (2, *batch, 5)).astype(dtype)
    zero, one = np.zeros_like(loc), np.ones_like(loc)

    def call(*q, **options):
        of_q = dict(zip(("loc_q", f"{kind}_q"), q, strict=False))
        return klfast.kl_normal(loc, **{f"{kind}_p": spread}, **of_q, **options)

    for options in ({}, {"keepdims": True}, *({"axis": i} for i in (0, len(batch), ()))):
        want = call(zero, one, **options)
        np.testing.assert_array_equal(call(**options), want, strict=True)
        np.testing.assert_array_equal(call(0.0, 1, **options), want, strict=True)
        np.testing.assert_array_equal(call(0.0, one, **options), want, strict=True)
        out = np.empty(want.shape, want.dtype)
        for q in ((), (0.0, 1.0)):
            out[...] = 7
            assert call(*q, **options, out=out) is out
            np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("given", [np.float32, np.float64])
@plain
def test_out_of_another_precision(entry, given):
    for batch in ((), (4,)):
        arrays = entry.inputs(np.dtype(given).name, batch, 5)
        want = entry(arrays)
        for dtype in ("float16", "float32", "float64"):
            out = np.full(batch, 7, dtype)
            assert entry(arrays, out=out) is out
            np.testing.assert_array_equal(out, np.asarray(want).astype(dtype))


@plain
def test_out_in_a_tuple(entry):
    """As NumPy's ufuncs take it."""
    for batch in ((), (4,)):
        arrays = entry.inputs("float64", batch, 5)
        out = np.full(batch, 7.0)
        assert entry(arrays, out=(out,)) is out
        np.testing.assert_array_equal(out, entry(arrays))
        with pytest.raises(ValueError, match=r"out has shape \(3, 9\)"):
            entry(arrays, out=(np.empty((3, 9)),))


@plain
def test_out_may_be_an_element_of_the_input(entry):
    arrays = entry.inputs("float64", (), 5)
    want = entry(arrays)
    for name in arrays:
        copies = {key: a.copy() for key, a in arrays.items()}
        out = copies[name].reshape(-1)[:1].reshape(())
        entry(copies, out=out)
        assert out == want
        if entry.core == 1:
            copies[name][...] = arrays[name]
            entry(copies, keepdims=True, out=copies[name][:1])
            assert copies[name][0] == want


@plain
def test_out_may_overlap_the_input(entry):
    arrays = entry.inputs("float64", (40,), 40 if entry.core == 1 else 5)
    want = entry(arrays)
    name = next(iter(arrays))
    out = arrays[name].reshape(40, -1)[:, 0]
    entry(arrays, out=out)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@by_id
def test_half_precision_is_computed_in_single(entry, half):
    arrays = entry.inputs("float32", (4,), min(40, entry.max_size))
    arrays = {
        name: (np.clip(a, 0.01, 1000) if name in ("p", "q") else a).astype(half)
        for name, a in arrays.items()
    }
    got = entry(arrays)
    assert got.dtype == np.float32
    entry.check(got, arrays)
    single = {name: a.astype(np.float32) for name, a in arrays.items()}
    np.testing.assert_array_equal(got, entry(single))


@pytest.mark.parametrize("dtype", [*np.typecodes["AllInteger"], "?"])
@plain
def test_integers_give_double(entry, dtype):
    rng = np.random.default_rng(0)
    arrays = entry.inputs("float64", (3,), 4)
    for name, a in arrays.items():
        whole = np.ones(a.shape) if name.startswith(("scale", "p", "q")) else np.zeros(a.shape)
        if dtype != "?":
            whole = rng.integers(1, 9, a.shape)
        arrays[name] = (np.tril(whole) if name.startswith("scale_tril") else whole).astype(dtype)
    got = entry(arrays)
    assert got.dtype == np.float64
    entry.check(got, arrays)


MIXED = [
    ("f4", "f8"),
    ("f4", "i8"),
    ("f4", "i1"),
    ("f2", "f4"),
    ("f2", "f8"),
    ("f2", "i2"),
    ("i4", "u1"),
    ("f4", ">f4"),
]


@pytest.mark.parametrize("pair", MIXED, ids=str)
@plain
def test_mixed_dtypes_promote(entry, pair):
    arrays = entry.inputs("float64", (3,), 4)
    for flip in (1, -1):
        first, second = (np.dtype(d) for d in pair[::flip])
        mixed = {name: np.round(2 + np.abs(a)).astype(first) for name, a in arrays.items()}
        for name in list(mixed)[1:]:
            mixed[name] = mixed[name].astype(second)
        got = entry(mixed)
        want = np.result_type(first, second)
        assert got.dtype == (
            np.float64 if want.kind in "iu" else np.promote_types(want, np.float32)
        )
        entry.check(got, mixed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "strided", "axis 0", "shared q"])
@plain
def test_no_temporaries(entry, dtype, layout):
    if layout == "axis 0" and entry.core == 2:
        pytest.skip("has no axis")
    size = min(1000, entry.max_size)
    names = entry.inputs(dtype, (), 2)
    count = (
        64_000_000
        // np.dtype(dtype).itemsize
        // sum(size ** entry.core_axes(name) for name in names)
    )
    few = entry.inputs(dtype, (50,), size)
    arrays = {name: np.resize(a, (count, *a.shape[1:])) for name, a in few.items()}
    options = {}
    if layout == "strided":
        arrays = {name: a[::-2] for name, a in arrays.items()}
    if layout == "axis 0":
        arrays, options = {name: np.asfortranarray(a).T for name, a in arrays.items()}, {"axis": 0}
    if layout == "shared q":
        arrays = {name: a[0] if name.endswith("q") else a for name, a in arrays.items()}
    entry(arrays, **options)
    tracemalloc.start()
    try:
        got = entry(arrays, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 + 2 * got.nbytes, f"{peak} bytes"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns", "size"), [(64, 10), (65, 128), (100, 129), (50, 145), (33, 300), (70, 2200)]
)
@pytest.mark.parametrize("name", ["discrete", "discrete-totals", "categorical", "normal-scale"])
def test_columns_side_by_side(name, columns, size, dtype):
    """axis=0 of C-ordered arrays, whose columns are read in bands, beside rows of float64."""
    entry = IDS[name]
    arrays = entry.inputs(dtype, (columns,), size)
    next(iter(arrays.values()))[7, size // 2] = np.nan
    across = {key: np.ascontiguousarray(x.T) for key, x in arrays.items()}
    function = getattr(klfast, entry.function)
    got = function(**across, **entry.options, axis=0)
    assert np.flatnonzero(np.isnan(got)).tolist() == [7]
    double = {key: x.astype(np.float64) for key, x in arrays.items()}
    want = np.delete(function(**double, **entry.options), 7)
    assert_close(np.delete(got, 7), want, want, ROWS[dtype], {})


SHORT = [1, 3, 10, 31, 33]  # elements


@pytest.mark.parametrize("size", [*SHORT, 64, 77, 95, 100, 143, 300])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [None, 1e-3])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
def test_rows_have_the_same_bits_alone_and_in_a_batch(entry, near, dtype, size):
    if size > entry.max_size:
        pytest.skip("too large for the oracle")
    arrays = entry.inputs(dtype, (21,), size, near)
    want = entry(arrays)
    alone = [entry({k: x[i] for k, x in arrays.items()}) for i in range(21)]
    gaps = {k: np.concatenate([x, x], -1)[..., : x.shape[-1]] for k, x in arrays.items()}
    np.testing.assert_array_equal(alone, want, err_msg=f"{arrays}")
    np.testing.assert_array_equal(entry(gaps), want, err_msg=f"{arrays}")
    columns = {k: np.asfortranarray(x) for k, x in arrays.items()}
    if size in SHORT:
        np.testing.assert_array_equal(entry(columns), want, err_msg=f"{arrays}")
    if size < 96:  # short on every instruction set
        few = entry({k: x[:5] for k, x in columns.items()})
        np.testing.assert_array_equal(few, entry(columns)[:5], err_msg=f"{arrays}")
