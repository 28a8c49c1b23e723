"""Normals beside N(0, I), which have kernels of their own, are as any pair of normals is."""

import klfast
import klfast.grad
import numpy as np
import pytest

from registry import IDS, ROWS

STANDARD = IDS["normal-standard"]
SIZES = [0, 1, 31, 39, 40, 41, 63, 64, 71, 95, 97, 143, 145, 1039, 1040, 2000, 131_072 + 5]


def as_pair(arrays):
    zeros = np.zeros_like(arrays["loc_p"])
    return arrays | {"loc_q": zeros, "logvar_q": zeros}


def check(arrays, cotangent=1.0, **options):
    value, *found = klfast.grad.kl_normal(**arrays, cotangent=cotangent, **options)
    wrt = ("loc_p", "logvar_p")
    pair = klfast.grad.kl_normal(**as_pair(arrays), wrt=wrt, cotangent=cotangent, **options)
    bound = ROWS[value.dtype.name]
    np.testing.assert_allclose(klfast.kl_normal(**arrays, **options), value, rtol=bound)
    for got, want in zip((value, *found), pair, strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(got, want, rtol=2 * bound)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_length(dtype, size):
    rows = 3 if size < 10_000 else 1
    check(STANDARD.inputs(dtype, (rows,), size), cotangent=np.linspace(-1, 1, rows))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layouts(dtype):
    wide = STANDARD.inputs(dtype, (6,), 80)
    for cut in (np.s_[:, ::2], np.s_[::-1, 40:], np.s_[::2, ::-1]):
        check({name: x[cut] for name, x in wide.items()})
    check({name: np.asfortranarray(x) for name, x in wide.items()})
    for axis in (0, ()):
        check(wide, axis=axis)


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, -90.0, 89.0, -800.0, 1e30])
@pytest.mark.parametrize("name", ["loc_p", "logvar_p"])
@pytest.mark.parametrize("size", [5, 64, 71, 1100])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_out_of_range(dtype, size, name, value):
    arrays = STANDARD.inputs(dtype, (3,), size)
    arrays[name][1, size - 2] = value
    with np.errstate(all="ignore"):
        check(arrays)
        check(arrays, cotangent=np.array([1.0, 0.0, 2.0]))


def test_one_gradient_alone():
    arrays = STANDARD.inputs("float32", (4,), 100)
    _, *both = klfast.grad.kl_normal(**arrays)
    for name, want in zip(arrays, both, strict=True):
        _, got = klfast.grad.kl_normal(**arrays, wrt=name)
        np.testing.assert_array_equal(got, want)


def test_a_long_row_has_the_same_bits_for_any_number_of_threads():
    arrays = STANDARD.inputs("float32", (), 70 * 65_536 + 1)
    with klfast.num_threads(1):
        alone = klfast.kl_normal(**arrays), *klfast.grad.kl_normal(**arrays)
    with klfast.num_threads(3):
        shared = klfast.kl_normal(**arrays), *klfast.grad.kl_normal(**arrays)
    for got, want in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(got, want)
