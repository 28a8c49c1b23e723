"""A public function lacks nothing: twin, docstring, bound, types, tests and benchmark."""

import doctest
import importlib
import inspect
import re
import typing
from pathlib import Path

import klfast
import klfast.grad
import klfast.reference
import pytest

from registry import DTYPES, ENTRIES

NAMES = [name for name in klfast.__all__ if name.startswith("kl_")]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
each = pytest.mark.parametrize("name", NAMES)


def sections(function):
    """Split a numpydoc docstring into its sections."""
    lines = inspect.getdoc(function).splitlines()
    found, title = {"Summary": []}, "Summary"
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and re.fullmatch(r"-{3,}", below):
            title = line
            found[title] = []
        elif not re.fullmatch(r"-{3,}", line):
            found[title].append(line)
    return {title: "\n".join(body).strip() for title, body in found.items()}


def test_all_is_complete():
    assert NAMES
    public = {name for name in vars(klfast) if name.startswith("kl_")}
    assert public == set(NAMES)
    assert set(klfast.reference.__all__) == set(NAMES)
    for name in ("set_num_threads", "get_num_threads", "num_threads", "show_config", "__version__"):
        assert hasattr(klfast, name)


@each
def test_twin_has_the_same_parameters(name):
    twins = [inspect.signature(getattr(module, name)) for module in (klfast, klfast.reference)]
    plain = [[(p.name, p.kind, p.default) for p in twin.parameters.values()] for twin in twins]
    assert plain[0] == plain[1]


@each
def test_docstring(name):
    function = getattr(klfast, name)
    doc = sections(function)
    for title in ("Parameters", "Returns", "Raises", "Notes", "References", "Examples"):
        assert doc.get(title), f"{name} has no section {title}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", doc["Parameters"]), f"{parameter} is not explained"
    assert re.search(r"\(\.\.\., [KD]", doc["Parameters"]), "no shapes"
    assert re.search(r"\bnats\b", doc["Returns"]), "no unit"
    assert re.search(r"KL\(P ?(‖|\|\|) ?Q\)", "\n".join(doc.values())), "no direction"
    for error in ("ValueError", "TypeError"):
        assert error in doc["Raises"]


@each
def test_docstring_states_the_tested_bound(name):
    notes = sections(getattr(klfast, name))["Notes"]
    for bound in {entry.bound[d] for entry in ENTRIES if entry.function == name for d in DTYPES}:
        assert re.search(rf"\b{bound:.0e}\b".replace("e-0", "e-0?"), notes), f"no {bound:.0e}"


@each
def test_examples_run(name):
    module = importlib.import_module(getattr(klfast, name).__module__)
    found = doctest.DocTestFinder(recurse=False).find(getattr(klfast, name), name, module=module)
    assert any(test.examples for test in found)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert not runner.failures


@each
@pytest.mark.parametrize("module", [klfast, klfast.reference], ids=lambda m: m.__name__)
def test_types(module, name):
    function = inspect.unwrap(getattr(module, name))
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    hints = typing.get_type_hints(function)
    assert "return" in hints


def test_types_are_shipped():
    assert (Path(klfast.__file__).parent / "py.typed").exists()


@each
def test_is_in_the_registry(name):
    entries = [entry for entry in ENTRIES if entry.function == name]
    assert entries, f"{name} has no entry in tests/registry.py"
    for entry in entries:
        assert set(entry.bound) == set(DTYPES)


@each
def test_has_a_benchmark(name):
    path = BENCHMARKS / f"bench_{name.removeprefix('kl_')}.py"
    assert path.exists()
    text = path.read_text()
    assert re.search(rf"\b{name}\b", text)
    for dtype in DTYPES:
        assert f'"{dtype}"' in text, f"no work in {dtype}"
    assert "floor=" in text, "no floor to hold"


@each
def test_has_peers(name):
    family = name.removeprefix("kl_")
    libraries = re.findall(rf"def (\w+)_{family}\(", (BENCHMARKS / "peers.py").read_text())
    assert len(libraries) >= 4, libraries


FRONTS = ("klfast.grad", "klfast.torch", "klfast.jax")
# What makes a benchmark of their own idle.
NOT_BENCHMARKED = {
    "klfast.torch.elbo": "kl_to_standard_normal and means",
    "klfast.torch.policy_kl": "kl_categorical or kl_normal and a mean",
    "klfast.torch.kl_div": "PyTorch's own operations, element by element",
    "klfast.torch.kl_penalty": "PyTorch's own operations, element by element",
    "klfast.torch.install": "registers functions",
    "klfast.torch.uninstall": "registers functions",
    "klfast.jax.kl_discrete": "XLA calls every kernel as it calls that of kl_categorical",
    "klfast.jax.kl_normal": "XLA calls every kernel as it calls that of kl_categorical",
    "klfast.jax.kl_mvn": "XLA calls every kernel as it calls that of kl_categorical",
}


@pytest.mark.parametrize("front", FRONTS)
def test_fronts_have_benchmarks(front):
    pytest.importorskip(front.replace("klfast.", "") if front != "klfast.grad" else "klfast")
    module = importlib.import_module(front)
    text = "\n".join(path.read_text() for path in sorted(BENCHMARKS.glob("*.py")))
    functions = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    assert functions
    for name in functions:
        benchmarked = re.search(rf"\b{re.escape(front)}\.{name}\b", text) is not None
        listed = f"{front}.{name}" in NOT_BENCHMARKED
        assert benchmarked or listed, f"{front}.{name} has no benchmark"
        assert not (benchmarked and listed), f"{front}.{name} has a benchmark"
    known = {f"{front}.{name}" for name in functions}
    assert {name for name in NOT_BENCHMARKED if name.startswith(front)} <= known


GRADIENTS = [name for name in klfast.grad.__all__ if name.startswith("kl_")]
each_gradient = pytest.mark.parametrize("name", GRADIENTS)


@each_gradient
def test_gradient_has_the_arguments_of_its_value(name):
    value, gradient = (
        inspect.signature(getattr(module, name)).parameters for module in (klfast, klfast.grad)
    )
    for parameter in set(value) - {"keepdims", "out"}:
        assert gradient[parameter].default == value[parameter].default
        assert gradient[parameter].kind == value[parameter].kind
    assert {"wrt", "cotangent", "out"} <= set(gradient)


@each_gradient
def test_gradient_docstring(name):
    function = getattr(klfast.grad, name)
    doc = sections(function)
    for title in ("Parameters", "Returns", "Raises", "Notes", "References", "Examples"):
        assert doc.get(title), f"{name} has no section {title}"
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", doc["Parameters"]), f"{parameter} is not explained"
    assert re.search(r"\(\.\.\., [KD]", doc["Parameters"]), "no shapes"
    assert re.search(r"\bnats\b", doc["Returns"]), "no unit"
    assert "KL(P‖Q)" in "\n".join(doc.values()), "no direction"
    assert re.search(r"\be-\d|\de-\d", doc["Notes"]), "no bound"
    for error in ("ValueError", "TypeError"):
        assert error in doc["Raises"]


@each_gradient
def test_gradient_types_and_examples(name):
    function = getattr(klfast.grad, name)
    assert set(typing.get_type_hints(function)) == {
        *inspect.signature(function).parameters,
        "return",
    }
    module = importlib.import_module(function.__module__)
    found = doctest.DocTestFinder(recurse=False).find(function, name, module=module)
    assert any(test.examples for test in found)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert not runner.failures
