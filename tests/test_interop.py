"""Arrays of other libraries: pandas and xarray arrive well, Dask arrays stay lazy."""

import dask
import dask.array as da
import klfast
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from registry import IDS, PLAIN

plain = pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)


def test_pandas_and_xarray():
    arrays = IDS["discrete"].inputs("float64", (4,), 3)
    want = klfast.kl_discrete(**arrays)
    frames = {name: pd.DataFrame(a) for name, a in arrays.items()}
    np.testing.assert_array_equal(np.asarray(klfast.kl_discrete(**frames)), want)
    first = {name: frame.iloc[0] for name, frame in frames.items()}
    assert np.asarray(klfast.kl_discrete(**first)) == want[0]
    p, q = (xr.DataArray(a, dims=("row", "k")) for a in arrays.values())
    got = xr.apply_ufunc(klfast.kl_discrete, p, q, input_core_dims=[["k"], ["k"]])
    assert got.dims == ("row",)
    np.testing.assert_array_equal(got, want)


@dask.delayed
def explode():
    raise RuntimeError("computed too early")


@plain
def test_dask_stays_lazy(entry):
    arrays = entry.inputs("float32", (6,), 5)
    chunked = {name: da.from_array(a, chunks=(2, *a.shape[1:])) for name, a in arrays.items()}
    got = entry(chunked)
    assert isinstance(got, da.Array)
    assert got.dtype == np.float32
    assert got.shape == (6,)
    np.testing.assert_array_equal(got.compute(), entry(arrays))
    name = list(arrays)[-1]  # one lazy batch against one distribution in memory
    mixed = {key: a if key == name else a[0] for key, a in arrays.items()}
    lazy = entry({**mixed, name: chunked[name]})
    assert isinstance(lazy, da.Array)
    np.testing.assert_array_equal(lazy.compute(), entry(mixed))
    unready = {
        name: da.from_delayed(explode(), a.shape, dtype=a.dtype) for name, a in arrays.items()
    }
    assert isinstance(entry(unready), da.Array)


@plain
def test_dask_fills_no_out(entry):
    arrays = entry.inputs("float64", (6,), 3)
    chunked = {name: da.from_array(a) for name, a in arrays.items()}
    out = np.full(6, 7.0)
    with pytest.raises(TypeError, match="out cannot be filled from lazy arrays"):
        entry(chunked, out=out)
    np.testing.assert_array_equal(out, 7)


def test_dask_options():
    arrays = IDS["discrete"].inputs("float64", (6,), 5)
    p, q = (da.from_array(a, chunks=(3, 5)) for a in arrays.values())
    for options in ({"base": 2}, {"normalize": False}, {"axis": 1}):
        got = klfast.kl_discrete(p, q, **options)
        assert isinstance(got, da.Array), options
        np.testing.assert_array_equal(
            got.compute(), klfast.kl_discrete(**arrays, **options), err_msg=str(options)
        )
    a, b = da.log(p), da.log(q)
    got = klfast.kl_categorical(a, b, temperature=2.0)
    assert isinstance(got, da.Array)
    np.testing.assert_allclose(
        got.compute(), klfast.kl_categorical(a.compute(), b.compute(), temperature=2.0)
    )
