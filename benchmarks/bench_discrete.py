"""kl_discrete beside its peers, from probabilities."""

import klfast
import numpy as np
import pytest

from suite import Work, parametrize

WORKS = [
    Work("discrete", "float32", 4096, 1000),
    Work("discrete", "float64", 4096, 1000),
    Work("discrete", "float32", 512, 32_000),
    Work("discrete", "float32", 100_000, 10),
    Work("discrete", "float64", 20_011, 77),
    Work("discrete", "float32", 4096, 1000, near=1e-4),
]
SIZES = [
    Work("discrete", "float32", 2_000_000 // size, size)
    for size in (3, 10, 30, 100, 300, 1000, 10_000, 100_000)
]


@parametrize(WORKS)
def test_kl_discrete(work, peer, threads, measure):
    measure(work, peer, threads)


@pytest.mark.benchmark(group="one call, K = 3")
@pytest.mark.parametrize("call", [klfast.kl_discrete, np.vecdot], ids=["kl_discrete", "np.vecdot"])
def test_small_call(call, benchmark):
    p, q = np.array([0.2, 0.3, 0.5]), np.array([0.1, 0.6, 0.3])
    assert 0 < benchmark(call, p, q) < 1
