"""Every example runs, and its claim, which it checks itself, holds."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, monkeypatch, capsys):
    text = path.read_text()
    for module in ("torch", "sklearn", "matplotlib"):
        if f"import {module}" in text or f"from {module}" in text:
            pytest.importorskip(module)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    if "torch" in text:  # small tensors: a second thread would only get in the way
        import torch

        torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    draws = "savefig" in text
    module.main(*[tmp_path] * draws)
    assert capsys.readouterr().out
    assert [f.name for f in tmp_path.iterdir()] == [f"{path.stem}.png"] * draws


def test_examples_are_there():
    assert len(EXAMPLES) == 7
