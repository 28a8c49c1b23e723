"""What is refused: each bad call raises, names the argument, what came and what was wanted.

A refused call leaves `out` as it was.
"""

import klfast
import ml_dtypes  # noqa: F401  (registers its dtypes with NumPy)
import numpy as np
import pytest

from registry import PLAIN

EITHER = (TypeError, ValueError)
P, Q, ONE = np.array([0.5, 0.5]), np.array([0.25, 0.75]), np.ones(2)
LOGITS = np.array([[0.0, 1.0], [2.0, 1.0]])
EYE = np.eye(2)


def refuses(error, words, function, *args, **kwargs):
    """Assert that the call raises `error` with `words` in the message and leaves `out` alone."""
    out = kwargs.get("out")
    before = out.copy() if isinstance(out, np.ndarray) else None
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in message: {caught.value}"
    if before is not None:
        np.testing.assert_array_equal(out, before)


BAD_ARRAYS = {
    "longdouble": (lambda a: a.astype(np.longdouble), str(np.dtype(np.longdouble))),
    "complex": (lambda a: a.astype(complex), "complex128"),
    "complex64": (lambda a: a.astype(np.complex64), "complex64"),
    "object": (lambda a: a.astype(object), "object"),
    "str": (lambda a: a.astype(str), "<U"),
    "bytes": (lambda a: a.astype(bytes), "S"),
    "datetime": (lambda a: a.astype("datetime64[s]"), "datetime64"),
    "timedelta": (lambda a: a.astype("timedelta64[s]"), "timedelta64"),
    "record": (lambda a: np.zeros(a.shape, [("x", float)]), ""),
    "masked": (lambda a: np.ma.masked_array(a, a > 0), "masked"),
    "masked subclass without mask": (lambda a: np.ma.masked_array(a), "masked"),
    "None inside": (lambda a: [None], "object"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
def test_dtypes(entry, kind):
    spoil, word = BAD_ARRAYS[kind]
    arrays = entry.inputs("float64", (2,), 3)
    for name, a in arrays.items():
        out = np.full(2, 7.0)
        refuses(TypeError, [name, word], entry, {**arrays, name: spoil(a)}, out=out)


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
def test_shapes(entry):
    arrays = entry.inputs("float64", (2,), 3)
    out = np.full(2, 7.0)
    for name in arrays:
        if entry.function != "kl_normal":  # whose scalars are the same for every dimension
            for number in (np.float64(1), 1.0, 1):
                refuses(ValueError, [name], entry, {**arrays, name: number}, out=out)
        refuses(ValueError, [name], entry, {**arrays, name: arrays[name][..., :2]}, out=out)
        three = np.repeat(arrays[name][:1], 3, axis=0)
        refuses(ValueError, [name], entry, {**arrays, name: three}, out=np.full(3, 7.0))


def test_shape_messages_say_both_shapes():
    refuses(ValueError, ["p", "q", "(2,)", "(3,)"], klfast.kl_discrete, P, np.ones(3))
    refuses(ValueError, ["(2,)", "(1,)"], klfast.kl_discrete, P, np.ones(1))  # K does not broadcast
    refuses(ValueError, ["(5, 2)", "(4, 2)"], klfast.kl_discrete, np.ones((5, 2)), np.ones((4, 2)))
    refuses(ValueError, ["logits_p", "logits_q"], klfast.kl_categorical, P, np.ones(3))
    refuses(
        ValueError, ["scale_tril_q"], klfast.kl_mvn, ONE, EYE, ONE, scale_tril_q=np.ones((2, 3))
    )
    refuses(ValueError, ["cov_p", "(3, 3)"], klfast.kl_mvn, ONE, np.eye(3))


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_out(entry, batch):
    arrays = entry.inputs("float64", batch, 3)
    refuses(ValueError, ["out"], entry, arrays, out=np.full((*batch, 4), 7.0))
    refuses(EITHER, ["out"], entry, arrays, out=np.full(batch, 7))
    refuses(EITHER, ["out"], entry, arrays, out=np.full(batch, 7.0).tolist())
    locked = np.full(batch, 7.0)
    locked.flags.writeable = False
    refuses(ValueError, ["out"], entry, arrays, out=locked)


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
@pytest.mark.parametrize("batch", [(), (1,), (2,), (2, 3)])
def test_out_of_a_shape_that_the_result_would_broadcast_to(entry, batch):
    arrays = entry.inputs("float64", batch, 3)
    for shape in {(1, *batch), (5, *batch), (*batch[:-1], 5), ()} - {batch}:
        refuses(ValueError, ["out", str(shape), str(batch)], entry, arrays, out=np.full(shape, 7.0))


@pytest.mark.parametrize("entry", PLAIN[:3], ids=lambda e: e.id)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_out_with_options(entry, batch):
    arrays, last = entry.inputs("float64", batch, 3), len(batch)
    for axis in (-1, last):
        for shape in (batch, (*batch, 2), (*batch, 1, 1), (4, *batch, 1)):
            wrong = np.full(shape, 7.0)
            refuses(ValueError, ["out", str(shape)], entry, arrays, axis=axis, keepdims=True,
                    out=wrong)  # fmt: skip
        refuses(EITHER, ["out"], entry, arrays, axis=axis, keepdims=True,
                out=np.full((*batch, 1), 7))  # fmt: skip
        locked = np.full((*batch, 1), 7.0)
        locked.flags.writeable = False
        refuses(ValueError, ["out is read-only"], entry, arrays, axis=axis, keepdims=True,
                out=locked)  # fmt: skip
        refuses(EITHER, ["out"], entry, arrays, axis=axis, out=np.full(batch, 7))
    refuses(np.exceptions.AxisError, [str(last + 1)], entry, arrays, axis=last + 1, keepdims=True,
            out=np.full((*batch, 1), 7.0))  # fmt: skip


def test_normal_shapes_without_q():
    for q in ({}, {"loc_q": 0.0, "scale_q": 1.0}):
        refuses(ValueError, ["loc_p (2,), scale_p (3,), loc_q (), scale_q ()"], klfast.kl_normal,
                ONE, np.ones(3), **q, out=np.array(7.0))  # fmt: skip
    for axis in (-1, 0):
        refuses(np.exceptions.AxisError, ["loc_p"], klfast.kl_normal, np.float64(1), np.float64(1),
                axis=axis)  # fmt: skip


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
def test_axis(entry):
    if entry.function == "kl_mvn":
        pytest.skip("has no axis")
    arrays = entry.inputs("float64", (2,), 3)
    for axis in (2, -3, 100):
        refuses(np.exceptions.AxisError, [str(axis)], entry, arrays, axis=axis, out=np.full(2, 7.0))
    for axis in (1.0, "0", (0, 1)):
        refuses(EITHER, ["axis"], entry, arrays, axis=axis, out=np.full(2, 7.0))


@pytest.mark.parametrize("base", [0, 0.0, -1, -2.0, 1, 1.0, np.nan, np.array([2.0, 3.0]), "2", 2j])
@pytest.mark.parametrize("function", [klfast.kl_discrete, klfast.kl_categorical])
def test_base(function, base):
    refuses(EITHER, ["base"], function, P, Q, base=base, out=np.array(7.0))


@pytest.mark.parametrize(
    ("temperature", "error"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (-1.0, ValueError),
        (np.nan, ValueError),
        ([1.0, 0.0], ValueError),
        ([1.0, -1.0], ValueError),
        ([np.nan, 1.0], ValueError),
        ([1.0, 1.0, 1.0], ValueError),
        (1j, TypeError),
        ("1", EITHER),
        (None, EITHER),
        (np.ma.masked_array([1.0, 1.0]), TypeError),
    ],
)
def test_temperature(temperature, error):
    refuses(
        error,
        ["temperature"],
        klfast.kl_categorical,
        LOGITS,
        LOGITS,
        temperature=temperature,
        out=np.full(2, 7.0),
    )


@pytest.mark.parametrize(
    ("words", "kwargs"),
    [
        (["scale_p", "var_p", "logvar_p"], {"loc_p": ONE}),
        (["scale_p", "var_p"], {"loc_p": ONE, "scale_p": ONE, "var_p": ONE}),
        (["var_p", "logvar_p"], {"loc_p": ONE, "var_p": ONE, "logvar_p": ONE}),
        (["scale_p", "logvar_p"], {"loc_p": ONE, "scale_p": ONE, "logvar_p": ONE}),
        (["scale_q", "var_q", "logvar_q"], {"loc_p": ONE, "scale_p": ONE, "loc_q": ONE}),
        (
            ["scale_q", "var_q"],
            {"loc_p": ONE, "scale_p": ONE, "loc_q": ONE, "scale_q": ONE, "var_q": ONE},
        ),
        (["loc_q"], {"loc_p": ONE, "scale_p": ONE, "scale_q": ONE}),
    ],
)
def test_normal_keywords(words, kwargs):
    refuses(EITHER, words, klfast.kl_normal, **kwargs, out=np.array(7.0))


@pytest.mark.parametrize(
    ("words", "kwargs"),
    [
        (["cov_p", "scale_tril_p"], {"loc_p": ONE}),
        (["cov_p", "scale_tril_p"], {"loc_p": ONE, "cov_p": EYE, "scale_tril_p": EYE}),
        (["cov_q", "scale_tril_q"], {"loc_p": ONE, "cov_p": EYE, "loc_q": ONE}),
        (
            ["cov_q", "scale_tril_q"],
            {"loc_p": ONE, "cov_p": EYE, "loc_q": ONE, "cov_q": EYE, "scale_tril_q": EYE},
        ),
        (["loc_q"], {"loc_p": ONE, "cov_p": EYE, "cov_q": EYE}),
        (["errors", "ignore"], {"loc_p": ONE, "cov_p": EYE, "errors": "ignore"}),
    ],
)
def test_mvn_keywords(words, kwargs):
    refuses(EITHER, words, klfast.kl_mvn, **kwargs, out=np.array(7.0))


def test_unknown_keywords_and_missing_arguments():
    for function in (klfast.kl_discrete, klfast.kl_categorical):
        refuses(TypeError, [], function, P)
        refuses(TypeError, ["eps"], function, P, Q, eps=1e-10)
        refuses(TypeError, [], function, P, Q, -1)  # options are keyword-only
        refuses(EITHER, ["q"], function, P, None)
