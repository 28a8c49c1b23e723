"""Make the data behind ``klfast demo``: class scores of one classifier at three precisions.

Usage::

    python tools/make_demo_data.py [DIRECTORY]      # default: klfast/data

A small multilayer perceptron is trained on half of scikit-learn's handwritten digits. Its weights
are then rounded to 8 and to 4 bits, and the scores (logits) of the three networks on the other half
are stored, with the true digits and the images. Only this script needs scikit-learn.

Every step is seeded and the archive carries no dates, so that the same versions of NumPy,
scikit-learn and BLAS give the same file; others may differ in the last digits of the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

SEED = 0
HIDDEN_UNITS = 64
WEIGHT_BITS = (8, 4)
BRIGHTEST_PIXEL = 16


def quantise(weights: np.ndarray, bits: int) -> np.ndarray:
    """Round to the 2**bits - 1 levels of a symmetric grid with one scale for the whole tensor."""
    largest_level = 2 ** (bits - 1) - 1
    scale = np.abs(weights).max() / largest_level
    return np.rint(weights / scale) * scale


def logits(pixels: np.ndarray, weights: list[np.ndarray], biases: list[np.ndarray]) -> np.ndarray:
    """Scores before the softmax, which scikit-learn's public methods do not return."""
    activation = pixels
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        activation = np.maximum(activation @ weight + bias, 0)
    return (activation @ weights[-1] + biases[-1]).astype(np.float32)


def make_arrays() -> dict[str, np.ndarray]:
    digits = load_digits()
    train, test = train_test_split(
        np.arange(digits.target.size), test_size=0.5, stratify=digits.target, random_state=SEED
    )
    pixels = digits.data / BRIGHTEST_PIXEL
    model = MLPClassifier((HIDDEN_UNITS,), alpha=1e-2, max_iter=1000, random_state=SEED)
    model.fit(pixels[train], digits.target[train])

    held_out, biases = pixels[test], model.intercepts_
    scores = {"logits_full": logits(held_out, model.coefs_, biases)}
    for bits in WEIGHT_BITS:
        rounded = [quantise(weight, bits) for weight in model.coefs_]
        scores[f"logits_{bits}bit"] = logits(held_out, rounded, biases)
    return scores | {
        "labels": digits.target[test].astype(np.uint8),
        "images": digits.images[test].astype(np.uint8),
    }


def main() -> None:
    default = Path(__file__).resolve().parents[1] / "klfast" / "data"
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path = directory / "digits.npz"
    arrays = make_arrays()
    np.savez_compressed(path, **arrays)
    for name, array in arrays.items():
        accuracy = ""
        if name.startswith("logits"):
            accuracy = f"accuracy {np.mean(array.argmax(-1) == arrays['labels']):.4f}"
        print(f"{name:12} {array.dtype!s:8} {array.shape!s:12} {accuracy}")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
