"""Losses of a training loop, forward and backward, beside PyTorch and JAX."""

import pytest

pytest.importorskip("torch")

from suite import THREADS
from training import SIDES, WORKS

CASES = [
    pytest.param(work, side, n, id=f"{work.name}-{side}-{n}")
    for work in WORKS
    for n in THREADS
    for side in SIDES[work.loss]
    if n == 1 or work.threaded
]


@pytest.mark.parametrize(("training", "side", "threads"), CASES)
def test_training(training, side, threads, trained):
    trained(training, side, threads)
