"""Values and gradients with respect to all arguments, of NumPy arrays and of tensors, beside the
values alone."""

import klfast.grad
import numpy as np
import pytest

from registry import IDS
from suite import Work

torch = pytest.importorskip("torch")
pytest.importorskip("klfast.torch")

VALUES = {
    "discrete": klfast.kl_discrete,
    "categorical": klfast.kl_categorical,
    "normal-scale": klfast.kl_normal,
    "mvn": klfast.kl_mvn,
}
GRADIENTS = {
    "discrete": klfast.grad.kl_discrete,
    "categorical": klfast.grad.kl_categorical,
    "normal-scale": klfast.grad.kl_normal,
    "mvn": klfast.grad.kl_mvn,
}
OF_TENSORS = {
    "discrete": klfast.torch.kl_discrete,
    "categorical": klfast.torch.kl_categorical,
    "normal-scale": klfast.torch.kl_normal,
    "mvn": klfast.torch.kl_mvn,
}
WORKS = [
    Work(entry, dtype, items, size)
    for dtype in ("float32", "float64")
    for entry, items, size in (
        ("discrete", 4096, 1000),
        ("categorical", 4096, 1000),
        ("normal-scale", 4096, 512),
        ("mvn", 976, 32),
    )
]


def value(entry, arrays):
    return lambda: VALUES[entry](**arrays)


def gradients(entry, arrays):
    return lambda: GRADIENTS[entry](**arrays, wrt=tuple(arrays))[1:]


def gradients_of_tensors(entry, arrays):
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in arrays.items()}
    return lambda: torch.autograd.grad(OF_TENSORS[entry](**tensors).sum(), list(tensors.values()))


@pytest.mark.parametrize("way", [value, gradients, gradients_of_tensors], ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", WORKS, ids=lambda work: work.name)
def test_gradients(rows, way, benchmark, request):
    work = rows.smaller() if request.config.getoption("--quick") else rows
    benchmark.group = f"{work.name} and gradients"
    arrays = work.inputs()
    assert IDS[work.entry].function == VALUES[work.entry].__name__
    tolerance = 1e-5 if work.dtype == "float32" else 1e-12
    for one, other in zip(
        gradients(work.entry, arrays)(), gradients_of_tensors(work.entry, arrays)(), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance * np.abs(one).max())
    with klfast.num_threads(1):
        benchmark(way(work.entry, arrays))
