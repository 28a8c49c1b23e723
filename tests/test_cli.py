"""The command line: its facts against NumPy, and every way to be refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import klfast
import numpy as np
import pytest
from click.testing import CliRunner, Result
from klfast.cli import demo as demo_data
from klfast.cli import rows
from klfast.cli.app import app
from klfast.cli.report import strict_json

ROWS, CLASSES = 300, 7


def run(*arguments: object) -> Result:
    """Run a command in this process, on a wide page so that no line is folded."""
    environment = {"COLUMNS": "200", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="klfast", env=environment)


def run_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return loads_strictly(result.stdout)


def loads_strictly(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def python(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    options = {"capture_output": True, "timeout": 60} | options
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | options.pop("env", {})
    return subprocess.run(
        command, cwd=cwd, env=environment, text=True, encoding="utf-8", check=False, **options
    )


def save(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def arrays(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and a version of them that is off by some per cent."""
    p = rng.dirichlet(np.ones(CLASSES), ROWS)
    q = p * rng.uniform(0.5, 1.5, p.shape)
    return p, q / q.sum(-1, keepdims=True)


@pytest.fixture
def files(tmp_path: Path, arrays: tuple[np.ndarray, np.ndarray]) -> tuple[Path, Path]:
    return save(tmp_path / "p.npy", arrays[0]), save(tmp_path / "q.npy", arrays[1])


def kl_of(p: np.ndarray, q: np.ndarray, axis: int = -1) -> np.ndarray:
    return (p * np.log(p / q)).sum(axis)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# ---------------------------------------------------------------- what compare says


def test_every_fact_agrees_with_numpy(files, arrays) -> None:
    p, q = arrays
    kl = kl_of(p, q)
    same = p.argmax(-1) == q.argmax(-1)
    worst = np.argsort(-kl)[:5]
    assert not same.all(), "the example must have rows that change their top class"

    facts = run_json("compare", *files)
    found = facts.pop("worst")
    assert [row["index"] for row in found] == [[i] for i in worst]
    assert [row["top1_p"] for row in found] == p[worst].argmax(-1).tolist()
    assert [row["top1_q"] for row in found] == q[worst].argmax(-1).tolist()
    np.testing.assert_allclose([row["kl"] for row in found], kl[worst], rtol=1e-9)

    quantiles = facts.pop("quantiles")
    assert list(quantiles) == ["0.9", "0.99", "0.999"]
    expected = np.quantile(kl, [0.9, 0.99, 0.999])
    np.testing.assert_allclose(list(quantiles.values()), expected, rtol=1e-9)

    numbers = {
        "mean": kl.mean(),
        "standard_error": kl.std(ddof=1) / np.sqrt(ROWS),
        "median": np.median(kl),
        "maximum": kl.max(),
        "top1_agreement": same.mean(),
    }
    for name, value in numbers.items():
        assert facts.pop(name) == pytest.approx(value, rel=1e-9), name
    assert facts == {
        "klfast": klfast.__version__,
        "direction": "KL(P||Q)",
        "unit": "nats",
        "base": None,
        "p": str(files[0]),
        "q": str(files[1]),
        "input": "probabilities",
        "axis": -1,
        "temperature": None,
        "output": None,
        "rows": ROWS,
        "classes": CLASSES,
        "finite_rows": ROWS,
        "infinite_rows": {"count": 0, "first": []},
        "nan_rows": {"count": 0, "first": []},
        "top1_changed": int((~same).sum()),
    }


def test_table_shows_the_facts_with_direction_and_unit(files, arrays) -> None:
    facts = run_json("compare", *files)
    text = run("compare", *files).stdout
    for path in files:
        assert str(path) in text
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert ["rows", "300"] in lines
    assert ["classes", "7"] in lines
    mean = f"{facts['mean']:.4g} ± {facts['standard_error']:.2g}"
    assert ["mean KL(P‖Q), nats", mean] in lines
    assert ["median", f"{facts['median']:.4g}"] in lines
    for level, value in (("90", "0.9"), ("99", "0.99"), ("99.9", "0.999")):
        assert [f"{level} % quantile", f"{facts['quantiles'][value]:.4g}"] in lines
    assert ["maximum", f"{facts['maximum']:.4g}"] in lines
    assert ["same top-1 class", f"{100 * facts['top1_agreement']:.2f} %"] in lines
    assert ["row", "KL(P‖Q), nats", "top-1 of P", "top-1 of Q"] in lines
    for row in facts["worst"]:
        cells = [row["index"][0], f"{row['kl']:.4g}", row["top1_p"], row["top1_q"]]
        assert list(map(str, cells)) in lines
    assert "NaN" not in text
    assert "infinite" not in text


def test_direction_is_p_first(tmp_path: Path) -> None:
    p = save(tmp_path / "p.npy", [0.5, 0.5])
    q = save(tmp_path / "q.npy", [0.25, 0.75])
    assert run_json("compare", p, q)["mean"] == pytest.approx(0.5 * np.log(4 / 3))
    assert run_json("compare", q, p)["mean"] == pytest.approx(np.log(3) * 0.75 - np.log(2))


def test_base_2_gives_bits(files, arrays) -> None:
    facts = run_json("compare", *files, "--base", 2)
    assert (facts["unit"], facts["base"]) == ("bits", 2)
    assert facts["mean"] == pytest.approx(kl_of(*arrays).mean() / np.log(2))
    assert "mean KL(P‖Q), bits" in run("compare", *files, "--base", 2).stdout
    assert run_json("compare", *files, "--base", 10)["unit"] == "hartleys"
    assert "ln 3" in run_json("compare", *files, "--base", 3)["unit"]


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_logits(tmp_path: Path, rng: np.random.Generator, temperature: float | None) -> None:
    a = rng.normal(0, 3, (50, 11))
    b = a + rng.normal(0, 0.5, a.shape)
    options = [] if temperature is None else ["--temperature", temperature]
    paths = save(tmp_path / "a.npy", a), save(tmp_path / "b.npy", b)
    facts = run_json("compare", *paths, "--logits", *options)
    t = temperature or 1
    assert facts["mean"] == pytest.approx(kl_of(softmax(a / t), softmax(b / t)).mean())
    assert (facts["input"], facts["temperature"]) == ("logits", t)
    assert facts["worst"][0]["top1_p"] == a[facts["worst"][0]["index"][0]].argmax()


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "int64", "uint8"])
def test_dtypes(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    p, q = (rng.integers(1, 100, (20, 5)).astype(dtype) for _ in "pq")
    facts = run_json("compare", save(tmp_path / "p.npy", p), save(tmp_path / "q.npy", q))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p.astype(float), q.astype(float)))
    assert facts["mean"] == pytest.approx(kl_of(p, q).mean(), rel=1e-5)


def test_worst_counts_and_orders_equals_by_index(tmp_path: Path, files) -> None:
    assert run_json("compare", *files, "--worst", 0)["worst"] == []
    assert "Worst" not in run("compare", *files, "--worst", 0).stdout
    assert len(run_json("compare", *files, "--worst", 12)["worst"]) == 12
    assert len(run_json("compare", *files, "--worst", 10**6)["worst"]) == ROWS
    flat = save(tmp_path / "flat.npy", np.ones((4, 3)))
    assert [r["index"] for r in run_json("compare", flat, flat)["worst"]] == [[0], [1], [2], [3]]


# ---------------------------------------------------------------- rows that are not finite


@pytest.fixture
def flawed(tmp_path: Path) -> tuple[Path, Path]:
    p = np.full((12, 2), 0.5)
    q = np.tile([0.25, 0.75], (12, 1))
    q[[3, 5], 0] = 0
    p[7] = np.nan
    p[8, 0] = -1
    p[9] = 0
    return save(tmp_path / "p.npy", p), save(tmp_path / "q.npy", q)


def test_rows_that_are_not_finite_are_counted_apart(flawed) -> None:
    facts = run_json("compare", *flawed)
    assert facts["rows"] == 12
    assert facts["finite_rows"] == 7
    assert facts["infinite_rows"] == {"count": 2, "first": [[3], [5]]}
    assert facts["nan_rows"] == {"count": 3, "first": [[7], [8], [9]]}
    kl = 0.5 * np.log(4 / 3)
    for name in ("mean", "median", "maximum"):
        assert facts[name] == pytest.approx(kl), name
    # P ties, so that its top class is the first; Q's is the second, in nine rows without NaN.
    assert (facts["top1_agreement"], facts["top1_changed"]) == (0, 9)
    assert len(run_json("compare", *flawed, "--worst", 12)["worst"]) == 7

    text = run("compare", *flawed).stdout
    assert "2 rows with infinite KL, left out above" in text
    assert "At 3; 5\n" in text
    assert "3 rows with NaN for KL, left out above" in text
    assert "--logits" in text


def test_only_the_first_flagged_rows_are_named(tmp_path: Path) -> None:
    p = save(tmp_path / "p.npy", np.full((2, 4, 2), 0.5))
    q = save(tmp_path / "q.npy", np.tile([0.0, 1.0], (2, 4, 1)))
    facts = run_json("compare", p, q)
    assert facts["infinite_rows"] == {
        "count": 8,
        "first": [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]],
    }
    assert "At 0, 0; 0, 1; 0, 2; 0, 3; 1, 0; …" in run("compare", p, q).stdout


def test_undefined_numbers_are_null(tmp_path: Path) -> None:
    p = save(tmp_path / "p.npy", np.full((3, 2), np.nan))
    facts = run_json("compare", p, p)
    names = ("mean", "standard_error", "median", "maximum", "top1_agreement")
    assert {facts[name] for name in names} == {None}
    assert set(facts["quantiles"].values()) == {None}
    assert facts["worst"] == []
    assert run("compare", p, p).exit_code == 0

    one = save(tmp_path / "one.npy", [0.25, 0.75])
    facts = run_json("compare", one, one)
    assert (facts["rows"], facts["mean"], facts["standard_error"]) == (1, 0, None)
    assert facts["worst"] == [{"index": [], "kl": 0, "top1_p": 1, "top1_q": 1}]
    assert run("compare", one, one).exit_code == 0


def test_statistics_that_overflow_are_null(tmp_path: Path) -> None:
    a = save(tmp_path / "a.npy", np.array([[0.0, -1.7e308]] * 3))
    b = save(tmp_path / "b.npy", np.array([[-1.7e308, 0.0]] * 3))
    facts = run_json("compare", a, b, "--logits")
    assert facts["finite_rows"] == 3
    assert facts["maximum"] == pytest.approx(1.7e308)
    assert facts["mean"] is None
    assert "inf" in run("compare", a, b, "--logits").stdout


def test_strict_json_has_no_constants_that_json_lacks() -> None:
    text = strict_json({"a": [np.inf, (-np.inf, 1.5)], "b": {"c": float("nan")}, "d": "‖"})
    assert loads_strictly(text) == {"a": [None, [None, 1.5]], "b": {"c": None}, "d": "‖"}


# ---------------------------------------------------------------- slices and layouts


@pytest.mark.parametrize("limit", [1, 2, 5, 7, 23, 1000])
@pytest.mark.parametrize("batch", [(), (1,), (23,), (4, 6), (5, 1, 3), (2, 3, 4), (1, 1, 50)])
def test_slices_cover_the_batch_once_and_in_order(batch: tuple[int, ...], limit: int) -> None:
    numbered = np.arange(np.prod(batch, dtype=int)).reshape(batch)
    pieces = [numbered[index] for index in rows.row_slices(batch, limit)]
    assert max(piece.size for piece in pieces) <= limit
    np.testing.assert_array_equal(np.concatenate([x.ravel() for x in pieces]), numbered.ravel())


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(ROWS, CLASSES), (3, 50, 2, CLASSES), (CLASSES,)])
def test_small_slices_change_nothing(tmp_path, rng, monkeypatch, shape, order) -> None:
    p, q = (np.asarray(rng.dirichlet(np.ones(CLASSES), shape[:-1]), order=order) for _ in "pq")
    paths = save(tmp_path / "p.npy", p), save(tmp_path / "q.npy", q)
    whole = run_json("compare", *paths)
    seen = []

    def spy(p_slice, q_slice, **options):
        seen.append(p_slice)
        return real(p_slice, q_slice, **options)

    real = klfast.kl_discrete
    monkeypatch.setattr(klfast, "kl_discrete", spy)
    monkeypatch.setattr(rows, "SLICE_VALUES", 4 * CLASSES)
    assert run_json("compare", *paths) == whole
    assert whole["mean"] == pytest.approx(kl_of(p, q).mean())
    assert len(seen) >= p.size / rows.SLICE_VALUES
    for piece in seen:
        assert piece.size <= rows.SLICE_VALUES
        assert not piece.flags.owndata, "a slice is a view of the mapped file"


def test_memory_does_not_grow_with_the_classes(tmp_path, rng, monkeypatch) -> None:
    p = save(tmp_path / "p.npy", rng.random((2_000, 2_000), dtype=np.float32))
    monkeypatch.setattr(rows, "SLICE_VALUES", 1 << 16)
    run("compare", p, p)
    tracemalloc.start()
    try:
        assert run("compare", p, p).exit_code == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < p.stat().st_size / 4


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_axis(tmp_path, arrays, axis: int) -> None:
    p, q = (np.moveaxis(x.reshape(3, 100, CLASSES), -1, axis) for x in arrays)
    paths = save(tmp_path / "p.npy", p), save(tmp_path / "q.npy", q)
    output = tmp_path / "kl.npy"
    facts = run_json("compare", *paths, "--axis", axis, "-o", output)
    kl = kl_of(p, q, axis)
    np.testing.assert_allclose(np.load(output), kl, rtol=1e-9)
    assert facts["worst"][0]["index"] == list(np.unravel_index(kl.argmax(), kl.shape))


def test_npz_members(tmp_path, arrays) -> None:
    p, q = arrays
    expected = pytest.approx(kl_of(p, q).mean())
    np.savez(tmp_path / "only.npz", p)
    np.savez_compressed(tmp_path / "both.npz", p=p, q=q)
    both = tmp_path / "both.npz"
    assert run_json("compare", f"{both}:p", f"{both}:q")["mean"] == expected
    assert run_json("compare", tmp_path / "only.npz", f"{both}:q")["mean"] == expected


def test_names_with_colons_and_brackets_are_only_names(tmp_path, arrays) -> None:
    p = save(tmp_path / "a[bold]:1.npy", arrays[0])
    assert run_json("compare", p, p)["maximum"] == 0
    assert str(p) in run("compare", p, p).stdout


# ---------------------------------------------------------------- the file that -o writes


def test_output_holds_the_result_of_each_row(files, arrays, tmp_path) -> None:
    output = tmp_path / "kl.npy"
    result = run("compare", *files, "-o", output)
    assert result.exit_code == 0
    assert f"Wrote 300 values to {output}" in result.stdout
    kl = np.load(output)
    assert (kl.dtype, kl.shape) == (np.float64, (ROWS,))
    np.testing.assert_allclose(kl, kl_of(*arrays), rtol=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.npy", "p.npy", "q.npy"]

    facts = run_json("compare", *files, "-o", output, "--base", 2)
    assert facts["output"] == str(output)
    np.testing.assert_allclose(np.load(output), kl / np.log(2), rtol=1e-9)


def test_output_keeps_infinite_and_nan_rows(flawed, tmp_path) -> None:
    output = tmp_path / "kl.npy"
    run("compare", *flawed, "-o", output)
    kl = np.load(output)
    assert np.flatnonzero(np.isposinf(kl)).tolist() == [3, 5]
    assert np.flatnonzero(np.isnan(kl)).tolist() == [7, 8, 9]


def test_output_goes_through_a_link(files, tmp_path) -> None:
    target = save(tmp_path / "target.npy", [1.0])
    link = tmp_path / "link.npy"
    link.symlink_to(target)
    assert run("compare", *files, "-o", link).exit_code == 0
    assert link.is_symlink()
    assert np.load(target).shape == (ROWS,)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
def test_a_failure_leaves_the_old_output(files, tmp_path, monkeypatch, failure) -> None:
    output = save(tmp_path / "kl.npy", [1.0])
    before = output.read_bytes()

    def fail(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(klfast, "kl_discrete", fail)
    result = run("compare", *files, "-o", output)
    assert result.exit_code == (130 if failure is KeyboardInterrupt else 2)
    assert result.stdout == ""
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.npy", "p.npy", "q.npy"]


def test_a_failure_while_writing_leaves_the_old_output(files, tmp_path, monkeypatch) -> None:
    output = save(tmp_path / "kl.npy", [1.0])
    before = output.read_bytes()

    def write_half(file, array) -> None:
        file.write(b"\x93NUMPY")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", write_half)
    assert "No space left on device" in refused("compare", *files, "-o", output)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kl.npy", "p.npy", "q.npy"]


# ---------------------------------------------------------------- refusals


def refused(*arguments: object) -> str:
    """Run a command that must be refused and give its one line."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"klfast: [^\n]+\n", result.stderr), result.stderr
    assert not isinstance(result.exception, Exception)
    return result.stderr


def text_file(path: Path) -> Path:
    path.write_text("0.5 0.5\n")
    return path


def damaged(path: Path, keep: int) -> Path:
    (np.savez_compressed if path.suffix == ".npz" else np.save)(path, np.ones((100, 4)))
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    return path


def corrupt_npz(path: Path) -> Path:
    np.savez(path, np.ones((100, 4)))
    content = bytearray(path.read_bytes())
    content[1000] ^= 0xFF
    path.write_bytes(content)
    return path


def zip_of(path: Path, **texts: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
    return path


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: d / "none.npy", "No such file"),
    "missing member": (lambda d: f"{d / 'none.npz'}:p", "No such file"),
    "directory": (lambda d: d, "not a regular file"),
    "text": (lambda d: text_file(d / "x.npy"), "neither a .npy nor a .npz"),
    "nothing": (lambda d: damaged(d / "x.npy", 0), "neither a .npy nor a .npz"),
    "cut in the data": (lambda d: damaged(d / "x.npy", 1000), "save it again"),
    "cut in the header": (lambda d: damaged(d / "x.npy", 30), "save it again"),
    "cut after the magic": (lambda d: damaged(d / "x.npy", 6), "save it again"),
    "cut archive": (lambda d: damaged(d / "x.npz", 200), "save it again"),
    "corrupt archive": (lambda d: corrupt_npz(d / "x.npz"), "save it again"),
    "objects": (lambda d: save(d / "x.npy", np.array([[1, None]])), "not Python objects"),
    "objects, npz": (lambda d: npz(d / "x.npz", a=np.array([[1, None]])), "not Python objects"),
    "several arrays": (lambda d: npz(d / "x.npz", a=[1.0], b=[1.0]), "holds a, b: pick one, as"),
    "no such array": (lambda d: f"{npz(d / 'x.npz', a=[1.0])}:b", "no array 'b': it holds a"),
    "no array": (lambda d: npz(d / "x.npz"), "holds no array"),
    "other zip": (lambda d: zip_of(d / "x.npz", readme="text"), "not an array"),
    "member of npy": (lambda d: f"{save(d / 'x.npy', [1.0])}:a", "leave out ':a'"),
    "0-d": (lambda d: save(d / "x.npy", 1.0), "a single number"),
    "no rows": (lambda d: save(d / "x.npy", np.ones((0, 4))), "empty"),
    "no classes": (lambda d: save(d / "x.npy", np.ones((4, 0))), "empty"),
    "complex": (lambda d: save(d / "x.npy", np.ones((4, 4), complex)), "dtype complex128"),
    "longdouble": (lambda d: save(d / "x.npy", np.ones((4, 4), np.longdouble)), "real numbers"),
    "strings": (lambda d: save(d / "x.npy", np.array([["a", "b"]])), "real numbers"),
    "records": (lambda d: save(d / "x.npy", np.ones(3, [("a", float)])), "real numbers"),
    "dates": (lambda d: save(d / "x.npy", np.zeros((2, 2), "M8[s]")), "real numbers"),
    "other classes": (lambda d: save(d / "x.npy", np.ones((300, 8))), "7 classes and Q has 8"),
    "other rows": (lambda d: save(d / "x.npy", np.ones((299, 7))), "shape (300, 7) and Q has"),
    "other dimensions": (lambda d: save(d / "x.npy", np.ones((1, 300, 7))), "the same rows"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, files, tmp_path: Path) -> None:
    make, says = BAD_FILES[case]
    if case == "longdouble" and np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long double is double here")
    output = tmp_path / "kl.npy"
    bad = make(tmp_path)
    assert says in refused("compare", files[0], bad, "-o", output)
    if not case.startswith("other "):
        assert says in refused("compare", bad, files[1], "-o", output)
    assert not output.exists()


def test_forbidden_places(files, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("permissions do not bind this user")
    assert "Permission denied" in refused("compare", *files, "-o", closed / "kl.npy")
    files[0].chmod(0)
    assert "Permission denied" in refused("compare", *files)


def test_a_place_that_cannot_be_written_is_known_before_the_work(files, tmp_path, monkeypatch):
    def is_read_only(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", is_read_only)
    monkeypatch.setattr("klfast.cli.files._first_bytes", lambda path: b"\x93NUMPY")
    monkeypatch.setattr(klfast, "kl_discrete", lambda p, q, **options: pytest.fail("worked"))
    line = refused("compare", *files, "-o", tmp_path / "kl.npy")
    assert "cannot write" in line
    assert "Permission denied" in line


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "unknown": (["--tempreature", "2"], "No such option"),
    "temperature alone": (["--temperature", "2"], "needs --logits"),
    "temperature zero": (["--logits", "--temperature", "0"], "above 0"),
    "temperature negative": (["--logits", "--temperature", "-1"], "above 0"),
    "temperature nan": (["--logits", "--temperature", "nan"], "above 0"),
    "temperature inf": (["--logits", "--temperature", "inf"], "above 0"),
    "temperature word": (["--logits", "--temperature", "hot"], "not a valid float"),
    "base one": (["--base", "1"], "above 1"),
    "base zero": (["--base", "0"], "above 1"),
    "base nan": (["--base", "nan"], "above 1"),
    "worst negative": (["--worst", "-1"], "--worst"),
    "worst word": (["--worst", "all"], "not a valid integer"),
    "axis": (["--axis", "2"], "no axis 2"),
    "axis negative": (["--axis", "-3"], "no axis -3"),
    "third file": (["r.npy"], "unexpected extra argument"),
    "output: no directory": (["-o", "{}/none/kl.npy"], "create it first"),
    "output: is P": (["-o", "{}/p.npy"], "also an input"),
    "output: is Q, in other words": (["-o", "{}/../{name}/q.npy"], "also an input"),
    "output: other kind": (["-o", "{}/kl.csv"], "ends in .npy"),
    "output: directory": (["-o", "{}/dir.npy"], "not a regular file"),
    "output: name too long": (["-o", "{}/" + 250 * "x" + ".npy"], "cannot write"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(case: str, files, tmp_path: Path) -> None:
    options, says = BAD_OPTIONS[case]
    (tmp_path / "dir.npy").mkdir()
    before = {path: path.read_bytes() for path in files}
    filled = [option.format(tmp_path, name=tmp_path.name) for option in options]
    assert says in refused("compare", *files, *filled)
    assert {path: path.read_bytes() for path in files} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.npy", "p.npy", "q.npy"]


def test_bad_commands() -> None:
    assert "No such command" in refused("compere")
    assert "Missing argument" in refused("compare")
    assert "See 'klfast compare --help'" in refused("compare")
    assert "--base" in refused("demo", "--base", "-2")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="a device of Unix")
def test_a_device_is_not_replaced(files, tmp_path) -> None:
    link = tmp_path / "null.npy"
    link.symlink_to("/dev/null")
    assert "not a regular file" in refused("compare", *files, "-o", link)


# ---------------------------------------------------------------- demo, config and help


def test_demo_data_is_small_and_as_described() -> None:
    folder = resources.files("klfast") / "data"
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 1_000_000
    data = demo_data.load()
    shapes = {name: (array.dtype.name, array.shape) for name, array in data.items()}
    assert shapes == {
        "logits_full": ("float32", (899, 10)),
        "logits_8bit": ("float32", (899, 10)),
        "logits_4bit": ("float32", (899, 10)),
        "labels": ("uint8", (899,)),
        "images": ("uint8", (899, 8, 8)),
    }
    assert all(np.isfinite(array).all() for array in data.values())
    assert data["images"].max() == 16
    assert set(data["labels"]) == set(range(10))
    assert np.mean(data["logits_full"].argmax(-1) == data["labels"]) > 0.95


def test_demo_facts_agree_with_numpy() -> None:
    data = {name: array.astype(float) for name, array in demo_data.load().items()}
    labels = data["labels"]
    facts = run_json("demo", "--worst", 3)
    assert list(facts["comparisons"]) == ["8 bits", "4 bits"]
    p = softmax(data["logits_full"])
    assert facts["accuracy_p"] == pytest.approx(np.mean(p.argmax(-1) == labels))
    for name, found in zip(["8bit", "4bit"], facts["comparisons"].values(), strict=True):
        q = softmax(data[f"logits_{name}"])
        kl, same = kl_of(p, q), p.argmax(-1) == q.argmax(-1)
        assert found["rows"] == 899
        assert found["mean"] == pytest.approx(kl.mean(), rel=1e-5)
        assert found["top1_agreement"] == pytest.approx(same.mean())
        assert found["accuracy_q"] == pytest.approx(np.mean(q.argmax(-1) == labels))
        assert [row["index"][0] for row in found["worst"]] == np.argsort(-kl)[:3].tolist()
        for digit, of_digit in enumerate(found["by_digit"]):
            of = labels == digit
            mean = pytest.approx(kl[of].mean(), rel=1e-5)
            expected = {"digit": digit, "rows": of.sum(), "mean": mean}
            assert of_digit == expected | {"top1_changed": (~same)[of].sum()}
    coarse, fine = facts["comparisons"]["4 bits"], facts["comparisons"]["8 bits"]
    assert coarse["mean"] > 100 * fine["mean"]


def test_demo_tells_the_cost_and_the_place() -> None:
    facts = run_json("demo")
    coarse = facts["comparisons"]["4 bits"]
    text = run("demo").stdout
    for part in ("8 bits", "4 bits", "by true digit", "Worst rows at 4 bits", "nats"):
        assert part in text
    assert f"{coarse['mean']:.4g}" in text
    assert f"accuracy (P: {100 * facts['accuracy_p']:.2f} %)" in text
    label = demo_data.load()["labels"][coarse["worst"][0]["index"][0]]
    assert f"row {coarse['worst'][0]['index'][0]}, a {label}" in text
    assert "██" in text
    assert "bits" in run("demo", "--base", 2).stdout
    assert "Worst" not in run("demo", "--worst", 0).stdout


def test_version_help_and_config(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--version").stdout == f"klfast {klfast.__version__}\n"
    for arguments in ((), ("--help",), ("compare", "-h"), ("demo", "--help")):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "Usage: klfast" in result.stdout
    assert run("config").exit_code == 0


# ---------------------------------------------------------------- as a program


def test_python_m_klfast(files, tmp_path: Path) -> None:
    done = python("-m", "klfast", "compare", *files, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert loads_strictly(done.stdout) == run_json("compare", *files)
    done = python("-m", "klfast", "compare", files[0], "none.npy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    reason = "No such file or directory: check path and permissions"
    assert done.stderr == f"klfast: cannot read none.npy: {reason}\n"


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; from klfast.cli import main; main()"
    done = python("-c", code, "demo", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert 'pip install "klfast[cli]"' in done.stderr


def test_ctrl_c(files, tmp_path: Path) -> None:
    code = (
        "import os, signal, klfast\n"
        "from klfast.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "klfast.kl_discrete = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "main()"
    )
    done = python("-c", code, "compare", *files, "-o", "kl.npy", cwd=tmp_path)
    assert done.returncode == 130
    assert done.stdout + done.stderr.strip() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.npy", "q.npy"]


@pytest.mark.skipif(os.name != "posix", reason="pipes of Unix")
@pytest.mark.parametrize("options", [["demo"], ["demo", "--json"], ["--help"]])
def test_broken_pipe_is_quiet(options: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python(
            "-m",
            "klfast",
            *options,
            cwd=tmp_path,
            capture_output=False,
            stdout=writer,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""


def test_plain_terminals_get_plain_text(tmp_path: Path) -> None:
    done = python("-m", "klfast", "demo", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "KL(P||Q), nats" in done.stdout
    assert "?" not in done.stdout


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="a terminal of Unix")
def test_progress_only_on_a_terminal_and_for_long_work(files, tmp_path: Path) -> None:
    code = "from klfast.cli import main, rows\nrows.SLICE_VALUES = {}\nmain()"

    def stderr_on_terminal(slice_values: int) -> str:
        ours, theirs = os.openpty()
        try:
            done = python(
                "-c",
                code.format(slice_values),
                "compare",
                *files,
                "--json",
                cwd=tmp_path,
                capture_output=False,
                stdout=subprocess.PIPE,
                stderr=theirs,
                env={"TERM": "xterm"},
            )
            os.write(theirs, b"end")
            seen = os.read(ours, 1 << 16).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert done.returncode == 0
        assert loads_strictly(done.stdout)["rows"] == ROWS
        return seen

    assert "300/300" in stderr_on_terminal(70)
    assert stderr_on_terminal(1 << 20) == "end"
    piped = python("-c", code.format(70), "compare", *files, cwd=tmp_path)
    assert (piped.returncode, piped.stderr) == (0, "")
