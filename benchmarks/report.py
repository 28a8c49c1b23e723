"""Measure klfast beside its peers; write the README's table, the figures and the numbers.

Usage::

    python benchmarks/report.py                   # ten minutes on a quiet machine
    python benchmarks/report.py --quick           # half a minute: see that it runs; writes nothing
    pytest benchmarks --benchmark-json=run.json
    python benchmarks/report.py --from run.json   # times of that run, values checked anew
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # registry and oracle

import click
import numpy as np
from rich.console import Console
from rich.progress import track

import bench_categorical
import bench_discrete
import bench_mvn
import bench_normal
from figures import draw_error, draw_speed
from peers import peers_of
from registry import IDS
from suite import (
    THREADS,
    TOLERANCE,
    Work,
    error_of,
    exact,
    quiet_threads,
    relative_error,
    why_not,
)
from timing import interleave, machine

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (bench_discrete, bench_categorical, bench_normal, bench_mvn)
WORKS: list[Work] = [work for family in FAMILIES for work in family.WORKS]
SIZES: list[Work] = [work for family in FAMILIES for work in family.SIZES]
HIDDEN = ("reference", "SciPy entropy")  # measured by pytest, not shown here
AGAIN = "klfast again"
BEGIN, END = "<!-- report.py: begin -->", "<!-- report.py: end -->"
NEAR = [10.0**-k for k in range(9)]


@dataclass(frozen=True)
class Result:
    """One peer on one work. No seconds: not timed. `wrong`: beyond what its dtype excuses."""

    function: str
    dtype: str
    shape: str
    size: int
    near: float | None
    threads: int
    peer: str
    seconds: float | None
    error: float | None
    negative: bool
    wrong: bool
    speedup: float | None = None


def shown_peers(work: Work) -> Iterator[Any]:
    for peer in peers_of(work.function):
        if peer.name not in HIDDEN and why_not(work, peer) is None:
            yield peer


def evaluate(work: Work, peer: Any, got: Any, threads: int, quick: bool) -> Result:
    """Judge the values of one peer; the exact ones of large matrices take a minute."""
    error = None
    if not (quick and IDS[work.entry].core == 2 and work.size > 64):
        error = relative_error(np.asarray(got)[work.sample()], exact(work))
    return Result(
        work.function,
        work.dtype,
        work.shape,
        work.size,
        work.near,
        threads,
        peer.name,
        None,
        error,
        bool(np.any(np.asarray(got) < 0)),
        error_of(work, got) > TOLERANCE[work.dtype],
    )


def compare(
    work: Work, threads: int, seconds: float, known: dict[str, float] | None, quick: bool
) -> list[Result]:
    """Judge every peer on one work, and time those whose values are right (unless known)."""
    results, calls = [], {}
    with contextlib.ExitStack() as limits:
        for peer in shown_peers(work):
            if threads > 1 and not peer.threaded:
                continue
            limits.enter_context(quiet_threads(peer, threads))
            call = peer.prepare(work.inputs())
            results.append(evaluate(work, peer, call(), threads, quick))
            if not results[-1].wrong:
                calls[peer.name] = call
                if peer.name == "klfast":
                    calls[AGAIN] = call
        times = interleave(calls, seconds) if known is None else known
    own = times.get("klfast")
    again = replace(results[0], peer=AGAIN)
    return [
        replace(r, seconds=t, speedup=t / own if t and own else None)
        for r in [*results, again]
        for t in [times.get(r.peer)]
    ]


def accuracy(quick: bool) -> list[Result]:
    """Judge every peer on P and Q at ever smaller distances."""
    works = [
        Work(entry, dtype, items, size, near)
        for entry, dtype, items, size in (
            ("discrete", "float32", 8, 1000),
            ("categorical", "float32", 8, 1000),
            ("normal-scale", "float32", 8, 1000),
            ("mvn", "float64", 20, 8),
        )
        for near in NEAR
        if near >= (1e-6 if dtype == "float32" else 1e-8)
    ]
    results = []
    for work in track(works, "errors", console=CONSOLE):
        for peer in shown_peers(work):
            with quiet_threads(peer, 1):
                results.append(evaluate(work, peer, peer.prepare(work.inputs())(), 1, quick))
    return results


def small_call(seconds: float) -> dict[str, float]:
    """Time one call with K = 3 beside np.vecdot, which does next to nothing."""
    arrays = IDS["discrete"].inputs("float64", (), 3)
    calls = {p.name: p.prepare(arrays) for p in peers_of("kl_discrete") if p.library.installed}
    return interleave(calls | {"np.vecdot": lambda: np.vecdot(arrays["p"], arrays["q"])}, seconds)


def times_in(run: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Read the medians of a pytest-benchmark run by function, work and threads."""
    times: dict[tuple[str, str, int], dict[str, float]] = {}
    for benchmark in json.loads(run.read_text())["benchmarks"]:
        info = benchmark["extra_info"]
        if info:
            key = (info["function"], info["work"], info["threads"])
            times.setdefault(key, {})[info["peer"]] = benchmark["stats"]["median"]
    return times


# The table


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def power(error: float | None) -> str:
    if error is None:
        return "–"
    return "0" if error == 0 else "∞" if math.isinf(error) else f"{error:.0e}".replace("e-0", "e-")


def cell(result: Result | None) -> str:
    if result is None:
        return "–"
    if result.wrong:
        return f"*wrong* · {power(result.error)}" + (" · negative" if result.negative else "")
    if result.seconds is None:
        return "–"
    if result.peer == "klfast":
        return f"{milliseconds(result.seconds)} · {power(result.error)}"
    ratio = f"{result.speedup:.1f}×" if result.speedup else "–"
    ratio = f"**{ratio}**" if result.speedup and result.speedup < 1 else ratio
    return f"{milliseconds(result.seconds)} · {ratio} · {power(result.error)}"


def table(results: list[Result]) -> Iterator[str]:
    peers = [p for p in dict.fromkeys(r.peer for r in results) if p not in ("klfast", AGAIN)]
    yield " | ".join(["| work", "klfast", *peers, "klfast, 2 threads |"])
    yield "|---" * (len(peers) + 3) + "|"
    found = {(r.function, r.dtype, r.shape, r.near, r.threads, r.peer): r for r in results}
    works = dict.fromkeys((r.function, r.dtype, r.shape, r.near) for r in results)
    for function, dtype, shape, near in works:
        nearness = "" if near is None else f", near-equal ({near:g})"
        row = [f"`{function}` {dtype} {shape.replace('x', '×')}{nearness}"]
        row += [cell(found.get((function, dtype, shape, near, 1, p))) for p in ("klfast", *peers)]
        two = found.get((function, dtype, shape, near, 2, "klfast"))
        row.append(milliseconds(two.seconds) if two and two.seconds else "–")
        yield "| " + " | ".join(row) + " |"


def noise_of(results: Iterable[Result]) -> tuple[float, float] | None:
    ratios = [r.speedup for r in results if r.peer == AGAIN and r.speedup]
    return (min(ratios), max(ratios)) if ratios else None


def readme_part(results: list[Result], small: dict[str, float], seen: dict[str, Any]) -> str:
    """Give what stands between the markers."""
    versions = ", ".join(f"{name} {number}" for name, number in seen["versions"].items())
    calls = ", ".join(f"{name} {1e6 * t:.3g} µs" for name, t in small.items() if name != "klfast")
    noise = noise_of(results)
    how = "Medians of a pytest-benchmark run, in which each call is timed by itself."
    if noise:
        how = (
            "Medians of calls that take turns in one process; klfast timed against itself in the "
            f"same way: {noise[0]:.2f} to {noise[1]:.2f}."
        )
    lines = [
        "Milliseconds on one thread · how many times klfast's time (**bold** where klfast loses) · "
        "largest relative error against exact values on a sample of the same rows. *Wrong*: the "
        "values are off by more than rounding in that precision excuses, so they are not timed; "
        "*negative*: some of them are below zero, where no divergence can be. Near-equal: Q is P "
        "perturbed by that relative amount.",
        "",
        *table(results),
        "",
        f"One call with K = 3: klfast {1e6 * small['klfast']:.3g} µs; {calls}.",
        "",
        f"{seen['processor']}, {seen['cores']} cores, {seen['system']}, {seen['instruction set']}; "
        f"compiler {seen['compiler']}; {versions}; load {seen['load']:.1f} before the run. {how}",
        "",
        "![Speed-up against size](benchmarks/results/speed.png)",
        "",
        "![Error against the distance of P and Q](benchmarks/results/error.png)",
    ]
    return "\n".join(lines)


PART = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)


def check_markers(path: Path) -> None:
    if not PART.search(path.read_text()):
        raise click.ClickException(f"{path} lacks the markers {BEGIN} and {END}")


def write_between_markers(path: Path, text: str) -> None:
    path.write_text(PART.sub(lambda _: f"{BEGIN}\n{text}\n{END}", path.read_text()))


def write_numbers(path: Path, facts: dict[str, Any]) -> None:
    """One result a line, rounded: small, and a change shows in a diff."""

    def rounded(x: Any) -> Any:
        return float(f"{x:.3g}") if isinstance(x, float) and math.isfinite(x) else x

    def line(result: Result) -> str:
        kept = {k: rounded(v) for k, v in asdict(result).items() if v not in (None, False)}
        return "  " + json.dumps(kept).replace("Infinity", '"inf"')

    parts = [
        f" {json.dumps(key)}: "
        + (
            "[\n" + ",\n".join(map(line, value)) + "\n ]"
            if isinstance(value, list)
            else json.dumps({k: rounded(v) for k, v in value.items()})
        )
        for key, value in facts.items()
    ]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


CONSOLE = Console(stderr=True)


@click.command(help=__doc__.split("\n")[0])
@click.option("--from", "run", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Take the times from this pytest-benchmark JSON.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Few items and rounds; writes only where told to.")
@click.option(
    "--seconds", default=2.0, show_default=True, help="Time for each row and thread count."
)
@click.option("--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Where the table goes.  [default: README.md]")  # fmt: skip
@click.option("--results", type=click.Path(file_okay=False, path_type=Path),
              help="Where figures and numbers go.  [default: benchmarks/results]")  # fmt: skip
def main(
    run: Path | None, quick: bool, seconds: float, readme: Path | None, results: Path | None
) -> None:
    if not quick:
        readme, results = readme or ROOT / "README.md", results or ROOT / "benchmarks" / "results"
    if readme:
        check_markers(readme)
    known = times_in(run) if run else None
    seconds = 0.01 if quick else seconds
    seen = machine()

    def measured(works: list[Work], threads: tuple[int, ...], what: str) -> list[Result]:
        cases = [(work.smaller() if quick else work, n) for work in works for n in threads]
        if known is not None:
            cases = [(work, n) for work, n in cases if (work.function, work.id, n) in known]
        return [
            result
            for work, n in track(cases, what, console=CONSOLE)
            for result in compare(
                work, n, seconds, known and known[work.function, work.id, n], quick
            )
        ]

    rows = measured(WORKS, THREADS, "works")
    sizes = [w for w in SIZES if w not in WORKS]
    sweep = [r for r in rows if r.near is None and r.threads == 1]
    sweep = [r for r in sweep if r.dtype == ("float64" if r.function == "kl_mvn" else "float32")]
    sweep = [r for r in sweep if r.function == "kl_mvn" or known] + measured(sizes, (1,), "sizes")
    near = accuracy(quick)
    small = small_call(seconds)

    text = readme_part(rows, small, seen)
    click.echo(text)
    if readme:
        write_between_markers(readme, text)
    if results:
        results.mkdir(parents=True, exist_ok=True)
        compared = [asdict(r) for r in sweep if r.peer not in ("klfast", AGAIN)]
        if compared:
            draw_speed(compared, results / "speed.png")
        draw_error([asdict(r) for r in near], results / "error.png")
        facts = {"machine": seen, "one call, K = 3, seconds": small, "works": rows}
        write_numbers(results / "report.json", facts | {"sizes": sweep, "distances": near})


if __name__ == "__main__":
    main()
