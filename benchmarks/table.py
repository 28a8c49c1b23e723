"""What stands between the README's markers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from measure import Pair, Result, Row
from peers import LIBRARIES
from training import SIDES, Trained

LONG = 0.010  # seconds: from here on a second thread should give GAIN
GAIN, LEAST_GAIN = 1.8, 0.9


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{1e3 * seconds:.3g} ms" if seconds > 1e-4 else f"{1e6 * seconds:.3g} µs"


def power(error: float | None) -> str:
    if error is None:
        return "–"
    return "0" if error == 0 else "∞" if math.isinf(error) else f"{error:.0e}".replace("e-0", "e-")


def times(ratio: float | None, floor: float = 1.0) -> str:
    """A ratio; bold below its floor."""
    if ratio is None:
        return "–"
    text = f"{ratio:.2g}×" if ratio < 9.95 else f"{ratio:.0f}×"
    return f"**{text}**" if ratio < floor else text


def verdict(ratio: float | None, floor: float | None, aim: float | None) -> str:
    if floor is None:
        return "–"
    marks = f"{floor:g}" if aim is None else f"{floor:g} · {aim:g}"
    if ratio is None:
        return marks
    held = "held" if aim is None or ratio < aim else "reached"
    return f"{marks}: " + ("**missed**" if ratio < floor else held)


def two_threads(one: float | None, two: float | None, gain: float | None) -> str:
    """Time and gain on two threads; bold where it is less than it should be."""
    if gain is None or one is None:
        return "–"
    return f"{milliseconds(two)} · {times(gain, GAIN if one > LONG else LEAST_GAIN)}"


def name_of(row: Row) -> str:
    work = row.work
    shape = f"{work.dtype} {work.shape.replace('x', '×')}"
    kind = " covariances" if work.covariances else ""
    near = "" if work.near is None else f", near-equal ({work.near:g})"
    return f"`{work.function}` {shape}{kind}{near}"


def in_a_line(result: Row | Pair | Trained) -> str:
    """Give the gist of a row while the others are measured."""
    if isinstance(result, Trained):
        peer = f"{result.best} {result.ratio:.2f}" if result.best else "no peer"
        return f"{result.training.name}: {peer}, floor {result.training.floor:g}"
    if isinstance(result, Pair):
        contrast, ratio = result.contrast, result.times
        return f"{contrast.name}: {contrast.beside} {ratio:.2f}, floor {contrast.floor:g}"
    best, floor = result.best, result.work.floor
    peer = f"{best.peer} {best.times:.2f}" if best else "no peer is right"
    return f"{result.work.name}: {peer}" + (f", floor {floor:g}" if floor else "")


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> Iterator[str]:
    yield line(*cells)
    yield "|---" * len(cells) + "|"


def klfast_table(rows: list[Row]) -> Iterator[str]:
    yield from head(
        "work", "klfast · error", "best peer", "floor · aim", "of the bound", "two threads"
    )
    for row in rows:
        own, best = row.own, row.best
        wrong = " *wrong*" if best and best.wrong else ""
        fraction = "–" if row.fraction is None else f"{row.fraction:.2f} {row.limit}"
        yield line(
            name_of(row),
            f"{milliseconds(own.seconds)} · {power(own.error)}",
            f"{best.peer} {times(best.times)}{wrong}" if best else "none is right",
            verdict(best.times if best else None, row.work.floor, row.work.aim),
            fraction,
            two_threads(own.seconds, row.two, row.gain),
        )


def cell(results: list[Result]) -> str:
    """A library by the fastest of its right ways."""
    if not results:
        return "–"
    timed = [r.times for r in results if r.times is not None and not r.wrong]
    if timed:
        return times(min(timed))
    best = min(results, key=lambda r: r.error or 0)
    if not best.wrong:
        return "–"
    anyway = min((r.times for r in results if r.times is not None), default=None)
    return (
        (f"{times(anyway)} " if anyway else "")
        + f"*wrong* {power(best.error)}"
        + (", negative" if best.negative else "")
    )


def peers_table(rows: list[Row]) -> Iterator[str]:
    libraries = [library.name for library in LIBRARIES if library.installed]
    yield from head("work", *libraries)
    for row in rows:
        yield line(
            name_of(row), *(cell([r for r in row.results if r.library == n]) for n in libraries)
        )


def layouts_table(pairs: list[Pair]) -> Iterator[str]:
    yield from head("work", "klfast", "beside", "floor · aim", "two threads")
    for pair in pairs:
        contrast = pair.contrast
        yield line(
            f"`{contrast.function}` {contrast.what}",
            milliseconds(pair.seconds),
            f"{contrast.beside} {times(pair.times, contrast.floor)}",
            verdict(pair.times, contrast.floor, contrast.aim),
            two_threads(pair.seconds, pair.two, pair.gain),
        )


def training_table(trained: list[Trained]) -> Iterator[str]:
    peers = list(dict.fromkeys(side for sides in SIDES.values() for side in sides))[1:]
    yield from head("loss and gradients", "klfast", "floor", *peers)
    for t in trained:
        yield line(
            t.training.what,
            milliseconds(t.seconds["klfast"]),
            verdict(t.ratio, t.training.floor, None),
            *(times(t.times.get(side)) for side in peers),
        )


def summary(rows: list[Row], pairs: list[Pair], trained: list[Trained]) -> str:
    """How many floors hold."""
    ratios = [(r.best.times, r.work.floor) for r in rows if r.best and r.work.floor]
    ratios += [(p.times, p.contrast.floor) for p in pairs]
    ratios += [(t.ratio, t.training.floor) for t in trained]
    held = sum(ratio is not None and ratio >= floor for ratio, floor in ratios)
    lost = sum(bool(r.best and r.best.times and r.best.times < 1) for r in rows)
    gains = [(t.gain, one) for t, one in
             [*((r, r.own.seconds) for r in rows), *((p, p.seconds) for p in pairs)]
             if t.gain is not None and one is not None and one > LONG]  # fmt: skip
    gained = sum(gain >= GAIN for gain, _ in gains)
    return (
        f"{held} of {len(ratios)} floors hold; klfast loses to the best peer on {lost} of "
        f"{len(rows)} works. Of {len(gains)} calls over {1e3 * LONG:.0f} ms, {gained} gain {GAIN}× "
        "or more from a second thread."
    )


def noise_of(rows: list[Row]) -> str:
    noise = [row.noise for row in rows if row.noise]
    if not noise:
        return "Medians of a pytest-benchmark run, in which each call is timed by itself."
    return (
        "Calls take turns in one process; ratios are medians over the turns. klfast timed against "
        f"itself in the same way: {min(noise):.2f} to {max(noise):.2f}."
    )


def readme_part(
    rows: list[Row], pairs: list[Pair], trained: list[Trained], seen: dict[str, Any]
) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in seen["versions"].items())
    missing = [library.name for library in LIBRARIES if not library.installed]
    absent = f" Not on this machine: {', '.join(missing)}." if missing else ""
    lines = [
        "One thread unless said otherwise. *Error*: the largest relative one against exact values "
        "on a sample of the same rows. *Best peer*: how many times klfast's time the fastest one "
        "takes whose values are right (**bold** where klfast loses). *Bound*: a plain read of the "
        "same arrays (a BLAS dot product: asking memory further ahead can beat it) or the cycles "
        "that the vector instructions need; the number is the part of the speed at that bound "
        "that klfast reaches. Near-equal: Q is P perturbed by that relative amount.",
        "",
        *klfast_table(rows),
        "",
        "Every peer, as times klfast's time. *Wrong*: the values are off by more than rounding in "
        "that precision excuses (near-equal: by more than klfast's bound), so they are not timed, "
        "unless there is a floor and nobody else is right; *negative*: some of them are below "
        "zero, where no divergence can be.",
        "",
        "<details><summary>Table of all peers</summary>",
        "",
        *peers_table(rows),
        "",
        "</details>",
        "",
        "klfast beside itself on other layouts of the same rows, and one small call beside "
        "`np.vecdot` of the same arrays, which does next to nothing:",
        "",
        *layouts_table(pairs),
        "",
        "Losses of a training loop, forward and backward together, as times klfast's time; the "
        "gradients of each are checked first. The floor of the smallest is beside eager PyTorch:",
        "",
        *training_table(trained),
        "",
        summary(rows, pairs, trained),
        "",
        f"{seen['processor']}, {seen['cores']} cores, {seen['system']}, {seen['instruction set']}; "
        f"compiler {seen['compiler']}; {versions}; load {seen['load']:.1f} before the run. "
        f"{noise_of(rows)}{absent}",
        "",
        "![Speed-up against size](benchmarks/results/speed.png)",
        "",
        "![Error against the distance of P and Q](benchmarks/results/error.png)",
        "",
        "![Time per element as the work grows](benchmarks/results/growth.png)",
    ]
    return "\n".join(lines)
