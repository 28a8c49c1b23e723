"""``klfast demo``: what rounding the weights of a classifier does to its answers, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from klfast.cli.report import DIRECTION, console, number, percent, statistics_table, table
from klfast.cli.rows import RowResults, Summary, compare_rows, mean_and_error, summarise

Array = NDArray[Any]

FULL = "logits_full"
ROUNDED = {"8 bits": "logits_8bit", "4 bits": "logits_4bit"}
DRAWN = 3
BRIGHTEST_PIXEL = 16
SHADES = " ░▒▓█"


@dataclass(frozen=True)
class DigitFacts:
    """What rounding did to the images of one digit; the divergence is a mean."""

    digit: int
    rows: int
    mean: float
    top1_changed: int


@dataclass(frozen=True)
class RoundedFacts:
    """What rounding to some number of bits did."""

    summary: Summary
    accuracy: float
    by_digit: list[DigitFacts]


@dataclass(frozen=True)
class DemoFacts:
    """The facts that the demo shows."""

    accuracy: float
    rounded: dict[str, RoundedFacts]

    def as_dict(self) -> dict[str, Any]:
        """Give the facts as JSON has them, those of a comparison as ``klfast compare`` does."""
        return {
            "accuracy_p": self.accuracy,
            "comparisons": {
                bits: asdict(facts.summary)
                | {
                    "accuracy_q": facts.accuracy,
                    "by_digit": [asdict(digit) for digit in facts.by_digit],
                }
                for bits, facts in self.rounded.items()
            },
        }


def load() -> dict[str, Array]:
    """Read the arrays that ship with the package; data/README.md describes them."""
    resource = resources.files("klfast") / "data" / "digits.npz"
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return dict(archive)


def evaluate(
    data: dict[str, Array], divergence: Callable[[Array, Array], Array], worst: int
) -> DemoFacts:
    """Compare the rounded classifiers with the full one.

    Parameters
    ----------
    data : dict of ndarray
        What `load` gives.
    divergence : callable
        Of two arrays of logits, row by row.
    worst : int
        How many of the worst rows to name.

    Returns
    -------
    DemoFacts
    """
    full, labels = data[FULL], data["labels"]
    rounded = {}
    for bits, name in ROUNDED.items():
        results = compare_rows(full, data[name], divergence)
        rounded[bits] = RoundedFacts(
            summary=summarise(full, data[name], results, worst),
            accuracy=_accuracy(data[name], labels),
            by_digit=[_of_digit(int(digit), labels, results) for digit in np.unique(labels)],
        )
    return DemoFacts(_accuracy(full, labels), rounded)


def _accuracy(logits: Array, labels: Array) -> float:
    return float(np.mean(logits.argmax(-1) == labels))


def _of_digit(digit: int, labels: Array, results: RowResults) -> DigitFacts:
    rows = labels == digit
    mean, _ = mean_and_error(results.kl[rows])
    changed = int(np.count_nonzero(~results.same_top[rows]))
    return DigitFacts(digit, int(np.count_nonzero(rows)), mean, changed)


def show(facts: DemoFacts, data: dict[str, Array], unit_name: str) -> None:
    """Print what the rounding cost, and where."""
    coarsest, last = list(facts.rounded.items())[-1]
    out = console()
    out.print(
        f"A classifier of handwritten digits, asked about {data['labels'].size} images it has not "
        "seen:\nP with its weights as trained, Q with its weights rounded to fewer bits."
    )
    out.print(_cost_table(facts, unit_name))
    out.print(_digit_table(facts, unit_name))
    if last.summary.worst:
        out.print(_worst_table(last.summary, coarsest, data["labels"], unit_name))
        out.print(_drawings(last.summary, data))


def _cost_table(facts: DemoFacts, unit_name: str) -> Table:
    summaries = {bits: rounded.summary for bits, rounded in facts.rounded.items()}
    cost = statistics_table("What it cost", summaries, unit_name)
    accuracies = (percent(rounded.accuracy) for rounded in facts.rounded.values())
    cost.add_row(f"accuracy (P: {percent(facts.accuracy)})", *accuracies)
    return cost


def _digit_table(facts: DemoFacts, unit_name: str) -> Table:
    bits = list(facts.rounded)
    where = table(f"Where: mean {DIRECTION} in {unit_name}, by true digit", "digit", "rows", *bits)
    where.add_column(f"other top-1 at {bits[-1]}", justify="right")
    for same_digit in zip(*(rounded.by_digit for rounded in facts.rounded.values()), strict=True):
        last = same_digit[-1]
        means = (number(digit.mean) for digit in same_digit)
        where.add_row(str(last.digit), str(last.rows), *means, str(last.top1_changed))
    return where


def _worst_table(summary: Summary, bits: str, labels: Array, unit_name: str) -> Table:
    worst = table(f"Worst rows at {bits}", "row", f"{DIRECTION}, {unit_name}")
    for heading in ("true digit", "top-1 of P", "top-1 of Q"):
        worst.add_column(heading, justify="right")
    for row in summary.worst:
        answers = (labels[row.index[0]], row.top1_p, row.top1_q)
        worst.add_row(str(row.index[0]), number(row.kl), *map(str, answers))
    return worst


def _drawings(summary: Summary, data: dict[str, Array]) -> Table:
    """Put the worst images side by side, over what they are and what was read in them."""
    rows = [row.index[0] for row in summary.worst[:DRAWN]]
    grid = Table.grid(padding=(0, 4))
    grid.add_row(*(Text(_draw(data["images"][row]), no_wrap=True) for row in rows))
    grid.add_row(*(f"row {row}, a {data['labels'][row]}" for row in rows))
    return grid


def _draw(image: Array) -> str:
    """Draw an image with two characters a pixel, which makes the pixels square."""
    shade_of = np.rint(image / BRIGHTEST_PIXEL * (len(SHADES) - 1)).astype(int)
    return "\n".join("".join(SHADES[shade] * 2 for shade in line) for line in shade_of)
