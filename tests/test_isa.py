"""Every instruction set that this machine has gives results within the bound."""

import klfast
import numpy as np
import pytest

import fresh
from registry import DTYPES, ENTRIES, SMALLEST_RELATIVE_DIFFERENCE

LEVELS = ("baseline", "avx2", "avx512")

CASES = [
    (entry, dtype, size, near)
    for entry in ENTRIES
    for dtype in DTYPES
    for size in (1, 2, 5, 17, 33, 64, 300)
    for near in (None, 1e-1, "smallest")
    if size <= entry.max_size
]


def inputs(entry, dtype, size, near):
    """Make the arrays of one case."""
    eps = SMALLEST_RELATIVE_DIFFERENCE[dtype] if near == "smallest" else near
    return entry.inputs(dtype, (20,), size, eps)


def compute(path):
    """Save the results of all cases (called in a subprocess)."""
    np.savez(path, *[case[0](inputs(*case)) for case in CASES])


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    if request.param not in klfast.config.describe()["isa_available"]:
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def test_results(level, tmp_path):
    fresh.run(
        "import sys, test_isa; test_isa.compute(sys.argv[1])", tmp_path / "r", KLFAST_ISA=level
    )
    with np.load(tmp_path / "r.npz") as results:
        for case, got in zip(CASES, results.values(), strict=True):
            try:
                case[0].check(got, inputs(*case))
            except AssertionError as error:
                raise AssertionError(f"{level}, {case[0].id}, {case[1:]}: {error}") from None


def test_config_says_which(level):
    printed = fresh.run("import klfast; klfast.show_config()", KLFAST_ISA=level)
    assert level in printed
    assert klfast.__version__ in printed


def test_best_is_the_default():
    chosen = fresh.run("import klfast; print(klfast.config.describe()['isa'])").strip()
    assert chosen == klfast.config.describe()["isa_available"][-1]


def test_unknown_level_is_refused():
    done = fresh.attempt("import klfast", KLFAST_ISA="sse9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "ValueError"))
    for word in ("KLFAST_ISA", "sse9", klfast.config.describe()["isa_available"][0]):
        assert word in last


def test_level_of_another_machine_is_refused():
    missing = [name for name in LEVELS if name not in klfast.config.describe()["isa_available"]]
    for name in missing:
        done = fresh.attempt("import klfast", KLFAST_ISA=name)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(("ImportError", "ValueError"))
        assert name in last


def test_a_build_for_other_processors(monkeypatch):
    monkeypatch.setattr(klfast._kernels, "available", [])
    with pytest.raises(ImportError, match="no kernels that this processor can run"):
        klfast._kernels._chosen()
