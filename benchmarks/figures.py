"""Draw how speed-up depends on size, error on the distance of P and Q, and time on the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from peers import PEERS

PALETTE = [plt.get_cmap("tab20")(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
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


def _finish(figure: Any, path: Path, most_columns: int = 6) -> None:
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    columns = min(len(handles), most_columns)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _by_peer(points: list[tuple[str, str, float, float]]) -> dict[str, dict[str, list[Any]]]:
    """Give the points (function, peer, x, y) of each peer of each function, in the order of x."""
    lines: dict[str, dict[str, list[Any]]] = {}
    for function, peer, x, y in sorted(points, key=lambda p: (FUNCTIONS.index(p[0]), p[2])):
        lines.setdefault(function, {}).setdefault(peer, []).append((x, y))
    return lines


def draw_speed(records: list[dict[str, Any]], path: Path) -> None:
    """Draw how many times klfast's time each peer takes against the size, a line a peer."""
    lines = _by_peer(
        [
            (record["function"], result["peer"], record["size"], result["times"])
            for record in records
            for result in record["results"]
            if result["times"] is not None and result["peer"] != "klfast"
        ]
    )
    figure, axes = _panels("How many times klfast's time the others take, one thread", [*lines])
    for function, axis in axes.items():
        for peer, points in lines[function].items():
            axis.plot(*zip(*points, strict=True), "o-", ms=3, color=COLOURS[peer], label=peer)
        axis.axhline(1, color="black", lw=0.8)
        low, high = axis.get_ylim()
        axis.set(ylim=(min(0.5, low), max(20, high)), title=function)
        axis.set(xlabel="D" if function == "kl_mvn" else "length of a row")
        axis.yaxis.set_major_formatter("{x:g}")
    _finish(figure, path)


def draw_error(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the error against the distance, a line a peer; crosses where results are negative."""
    known = [r for r in records if r["error"] is not None]
    lines = _by_peer([(r["function"], r["peer"], r["near"], r["error"]) for r in known])
    figure, axes = _panels("Largest relative error (×: negative results)", [*lines])
    for function, axis in axes.items():
        mine = [r for r in known if r["function"] == function]
        for peer, points in lines[function].items():
            axis.plot(*zip(*points, strict=True), "o-", ms=3, color=COLOURS[peer], label=peer)
        for r in mine:
            if r["negative"]:
                axis.plot(r["near"], r["error"], "x", ms=8, color=COLOURS[r["peer"]])
        axis.set(title=f"{function}, {mine[0]['dtype']}", xlabel="perturbation of Q")
    _finish(figure, path)


def draw_growth(records: list[dict[str, Any]], path: Path) -> None:
    """Draw klfast's time per element against the length of one row and the number of rows."""
    titles = {"length": "one row, as it grows", "rows": "short rows, as they become more"}
    figure, axes = _panels("klfast: nanoseconds per element", [*titles])
    figure.set_size_inches(11, 4.5)
    lines: dict[tuple[str, str, int], list[Any]] = {}
    for r in records:
        point = (r["n"], 1e9 * r["seconds an element"])
        lines.setdefault((r["along"], r["function"], r["threads"]), []).append(point)
    for (along, function, threads), points in lines.items():
        axes[along].plot(
            *zip(*points, strict=True),
            "-" if threads == 1 else ":",
            color=PALETTE[FUNCTIONS.index(function)],
            label=f"{function}, {threads} thread{'s' * (threads > 1)}",
        )
    for along, axis in axes.items():
        axis.set(title=titles[along], xlabel={"length": "K", "rows": "rows"}[along])
        axis.yaxis.set_major_formatter("{x:g}")
    _finish(figure, path, most_columns=4)
