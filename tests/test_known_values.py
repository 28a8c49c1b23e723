"""Values worked by hand."""

from math import log

import klfast
import numpy as np
import pytest

INF, LN2, LN3 = np.inf, log(2), log(3)

DISCRETE = [  # p, q, options, value
    ([0.5, 0.5], [0.25, 0.75], {}, log(4 / 3) / 2),
    ([1, 1], [1, 3], {}, log(4 / 3) / 2),
    ([0.25, 0.75], [0.5, 0.5], {}, 0.75 * log(3 / 2) - LN2 / 4),
    ([1, 0], [0.5, 0.5], {}, LN2),
    ([1, 0], [0.5, 0.5], {"base": 2}, 1),
    ([0, 1], [0.125, 0.875], {"base": 2}, 3 - log(7) / LN2),
    ([1, 0, 0, 0], [1, 1, 1, 1], {"base": 4}, 1),
    ([1] * 8, [128, 64, 32, 16, 8, 4, 2, 1], {"base": 2}, np.log2(255) - 3 - 3.5),
    ([0.5, 0.5, 0], [0, 0.5, 0.5], {}, INF),
    ([0.5, 0.5, 0], [0.5, 0.5, 0], {}, 0),
    ([7], [2], {}, 0),
    ([1, 2, 3], [10, 20, 30], {}, 0),
    ([2], [1], {"normalize": False}, 2 * LN2),
    ([1], [2], {"normalize": False}, -LN2),
    ([1, 2], [2, 1], {"normalize": False}, LN2),
    ([4], [1], {"normalize": False, "base": 2}, 8),
    ([3, 1, 0], [1, 1, 5], {"normalize": False}, 3 * LN3),
    ([1e-200], [1e200], {"normalize": False}, -1e-200 * 400 * log(10)),
]


@pytest.mark.parametrize(("p", "q", "options", "value"), DISCRETE, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, int])
def test_discrete(p, q, options, value, dtype):
    if dtype is int and not all(float(x).is_integer() for x in p + q):
        pytest.skip("not integers")
    if dtype is not np.float64 and max(p + q) > 1e30:
        pytest.skip("out of range")
    got = klfast.kl_discrete(np.asarray(p, dtype), np.asarray(q, dtype), **options)
    rtol = 2e-6 if dtype is np.float32 else 2e-14
    atol = 0 if value else 1e-20 if dtype is np.float32 else 1e-30
    np.testing.assert_allclose(got, value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bernoulli_grid(dtype):
    p, q = np.meshgrid([0.125, 0.25, 0.5, 0.75], [0.125, 0.25, 0.5, 0.75])
    want = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    got = klfast.kl_discrete(
        np.stack([p, 1 - p], -1).astype(dtype), np.stack([q, 1 - q], -1).astype(dtype)
    )
    np.testing.assert_allclose(got, want, rtol=2e-6 if dtype == np.float32 else 5e-14)


CATEGORICAL = [  # logits_p, logits_q, options, value
    ([0, 0], [0, LN3], {}, log(4 / 3) / 2),
    ([0, 0], [0, LN3], {"base": 2}, log(4 / 3) / 2 / LN2),
    ([5, 5], [-2, LN3 - 2], {}, log(4 / 3) / 2),
    ([0, 0], [0, 2 * LN3], {"temperature": 2}, log(4 / 3) / 2),
    ([0, 0], [0, LN3 / 4], {"temperature": 0.25}, log(4 / 3) / 2),
    ([0, -INF], [0, 0], {}, LN2),
    ([0, 0], [0, -INF], {}, INF),
    ([0, 0, -INF], [0, LN3, -INF], {}, log(4 / 3) / 2),
    ([1e4, 0], [0, 0], {}, LN2),
    ([1e4, 0], [0, 1e4], {}, 1e4),
    ([3], [-8], {}, 0),
]


@pytest.mark.parametrize(("p", "q", "options", "value"), CATEGORICAL, ids=str)
def test_categorical(p, q, options, value):
    np.testing.assert_allclose(
        klfast.kl_categorical(p, q, **options), value, rtol=2e-14, atol=1e-30
    )
    p, q = np.float32(p), np.float32(q)
    np.testing.assert_allclose(klfast.kl_categorical(p, q, **options), value, rtol=2e-6, atol=1e-20)


def test_categorical_of_log_probabilities_is_discrete():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.125, 0.125, 0.75])
    np.testing.assert_allclose(
        klfast.kl_categorical(np.log(p), np.log(q)), klfast.kl_discrete(p, q), rtol=2e-14
    )


NORMAL = [  # arguments, value
    ({"loc_p": [0], "scale_p": [1]}, 0),
    ({"loc_p": [1], "scale_p": [1]}, 0.5),
    ({"loc_p": [3], "scale_p": [2], "loc_q": [1], "scale_q": [2]}, 0.5),
    ({"loc_p": [0], "scale_p": [1], "loc_q": [0], "scale_q": [2]}, LN2 - 3 / 8),
    ({"loc_p": [0], "scale_p": [2], "loc_q": [0], "scale_q": [1]}, 3 / 2 - LN2),
    ({"loc_p": [0], "var_p": [4], "loc_q": [0], "var_q": [1]}, 3 / 2 - LN2),
    ({"loc_p": [0], "logvar_p": [2 * LN2], "loc_q": [0], "logvar_q": [0]}, 3 / 2 - LN2),
    ({"loc_p": [0], "scale_p": [2], "loc_q": [0], "var_q": [1]}, 3 / 2 - LN2),
    ({"loc_p": [0], "var_p": [4], "loc_q": [0], "logvar_q": [0]}, 3 / 2 - LN2),
    ({"loc_p": [0], "logvar_p": [0], "loc_q": [0], "scale_q": [2]}, LN2 - 3 / 8),
    ({"loc_p": [0, 1], "scale_p": [2, 1]}, 2 - LN2),
    ({"loc_p": [0], "scale_p": [0]}, INF),
]


@pytest.mark.parametrize(("arguments", "value"), NORMAL, ids=str)
def test_normal(arguments, value):
    np.testing.assert_allclose(klfast.kl_normal(**arguments), value, rtol=2e-14, atol=1e-30)
    single = {name: np.float32(a) for name, a in arguments.items()}
    np.testing.assert_allclose(
        klfast.kl_normal(**single), value, rtol=2e-6, atol=1e-14 if value == 0 else 0
    )


MVN = [  # arguments, value
    ({"loc_p": [0, 0], "cov_p": [[1, 0], [0, 1]]}, 0),
    ({"loc_p": [1, 2], "cov_p": [[1, 0], [0, 1]]}, 2.5),
    ({"loc_p": [0, 0], "cov_p": [[4, 0], [0, 1]]}, 3 / 2 - LN2),
    ({"loc_p": [0, 0], "scale_tril_p": [[2, 0], [0, 1]]}, 3 / 2 - LN2),
    ({"loc_p": [0, 0], "scale_tril_p": [[1, 0], [3, 1]]}, 4.5),
    ({"loc_p": [0, 0], "cov_p": [[1, 3], [3, 10]]}, 4.5),
    ({"loc_p": [0, 0], "cov_p": [[1, 99], [3, 10]]}, 4.5),  # only the lower triangle is read
    ({"loc_p": [0, 0], "scale_tril_p": [[1, 99], [3, 1]]}, 4.5),
    (
        {"loc_p": [1, 0], "cov_p": [[1, 0], [0, 1]], "loc_q": [0, 0], "cov_q": [[1, 3], [3, 10]]},
        9.5,
    ),
]


@pytest.mark.parametrize(("arguments", "value"), MVN, ids=str)
def test_mvn(arguments, value):
    np.testing.assert_allclose(klfast.kl_mvn(**arguments), value, rtol=2e-13, atol=1e-30)
