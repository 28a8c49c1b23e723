"""Draw how speed-up depends on size, and error on the distance of P and Q."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from peers import PEERS

PALETTE = plt.rcParams["axes.prop_cycle"].by_key()["color"]
NAMES = list(dict.fromkeys(peer.name for peer in PEERS))
COLOURS = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(NAMES)}
FUNCTIONS = list(dict.fromkeys(peer.function for peer in PEERS))


def _panels(title: str, families: list[str]) -> tuple[Any, dict[str, Any]]:
    figure, axes = plt.subplots(
        1, len(families), figsize=(3.2 * len(families), 3.2), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    for axis in axes[0]:
        axis.set(xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    return figure, dict(zip(families, axes[0], strict=True))


def _finish(figure: Any, path: Path) -> None:
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _lines(records: list[dict[str, Any]], x: str, y: str) -> dict[str, dict[str, list[Any]]]:
    """Give the points of each peer of each family, in the order of x."""
    lines: dict[str, dict[str, list[Any]]] = {}
    for record in sorted(records, key=lambda r: (FUNCTIONS.index(r["function"]), r[x])):
        if record[y] is not None:
            family = lines.setdefault(record["function"], {})
            family.setdefault(record["peer"], []).append((record[x], record[y], record["negative"]))
    return lines


def draw_speed(records: list[dict[str, Any]], path: Path) -> None:
    """Draw `speedup` against `size`, a line for each peer."""
    lines = _lines(records, "size", "speedup")
    figure, axes = _panels("How many times klfast's time the others take, one thread", [*lines])
    for function, axis in axes.items():
        for peer, points in lines[function].items():
            x, y, _ = zip(*points, strict=True)
            axis.plot(x, y, marker="o", ms=3, color=COLOURS[peer], label=peer)
        axis.axhline(1, color="black", lw=0.8)
        low, high = axis.get_ylim()
        axis.set(ylim=(min(0.5, low), max(20, high)), title=function)
        axis.set(xlabel="D" if function == "kl_mvn" else "length of a row")
        axis.yaxis.set_major_formatter("{x:g}")
    _finish(figure, path)


def draw_error(records: list[dict[str, Any]], path: Path) -> None:
    """Draw `error` against `near`, a line for each peer; crosses where results are negative."""
    lines = _lines(records, "near", "error")
    figure, axes = _panels("Largest relative error (×: negative results)", [*lines])
    for function, axis in axes.items():
        dtype = next(r["dtype"] for r in records if r["function"] == function)
        for peer, points in lines[function].items():
            x, y, negative = zip(*points, strict=True)
            colour = COLOURS[peer]
            axis.plot(x, y, marker="o", ms=3, color=colour, label=peer)
            crossed = [(a, b) for a, b, below in zip(x, y, negative, strict=True) if below]
            axis.plot(*zip(*crossed, strict=True) if crossed else ([], []), "x", ms=8, color=colour)
        axis.set(title=f"{function}, {dtype}", xlabel="perturbation of Q")
    _finish(figure, path)
