"""Measure klfast beside its peers; write the README's table, the figures and the numbers.

Usage::

    python benchmarks/report.py                   # a quarter of an hour on a quiet machine
    python benchmarks/report.py --quick           # a minute: see that it runs; writes nothing
    python benchmarks/report.py -k 'mvn float64'  # works whose names have these words; prints only
    pytest benchmarks --benchmark-json=run.json
    python benchmarks/report.py --from run.json   # times of that run, values checked anew
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "1")  # XLA: peers are timed on one thread
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # registry and oracle

import click
from rich.console import Console
from rich.progress import Progress, track

import bench_categorical
import bench_discrete
import bench_mvn
import bench_normal
import table
import training
from contrasts import CONTRASTS, Contrast
from figures import draw_error, draw_growth, draw_speed
from measure import Known, Machine, Pair, Row, accuracy, compare, growth, measure_machine, oppose
from peers import TORCH
from suite import Work
from timing import machine as describe_machine

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (bench_discrete, bench_categorical, bench_normal, bench_mvn)
WORKS: list[Work] = [work for family in FAMILIES for work in family.WORKS]
SIZES: list[Work] = [work for family in FAMILIES for work in family.SIZES]
DISTANCES = [
    Work(entry, dtype, items, size, 10.0**-k)
    for entry, dtype, items, size, last in (
        ("discrete", "float32", 8, 1000, 6),
        ("categorical", "float32", 8, 1000, 6),
        ("normal-scale", "float32", 8, 1000, 6),
        ("mvn", "float64", 20, 8, 8),
    )
    for k in range(last + 1)
]
BEGIN, END = "<!-- report.py: begin -->", "<!-- report.py: end -->"
PART = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
CONSOLE = Console(stderr=True)


def times_in(run: Path) -> dict[tuple[str, str, int], Known]:
    """Read the medians of a pytest-benchmark run by function, work and threads."""
    times: dict[tuple[str, str, int], Known] = {}
    for benchmark in json.loads(run.read_text())["benchmarks"]:
        info = benchmark["extra_info"]
        key = (info["function"], info["work"], info["threads"])
        times.setdefault(key, {})[info["peer"]] = benchmark["stats"]["median"]
    return times


def from_run(run: dict[tuple[str, str, int], Known], work: Work) -> Row | None:
    """The row of a work by the times of a pytest-benchmark run, if it is there."""
    key = (work.function, work.id)
    if (*key, 1) not in run:
        return None
    row = compare(work, 0, None, run[*key, 1])
    row.two = run.get((*key, 2), {}).get("klfast")
    row.gain = row.own.seconds / row.two if row.two and row.own.seconds else None
    return row


def pair_from_run(run: dict[tuple[str, str, int], Known], contrast: Contrast) -> Pair | None:
    key = (contrast.function, contrast.what)
    one, two = (run.get((*key, n), {}) for n in (1, 2))
    if not set(contrast.sides) <= set(one):
        return None
    own, beside = (one[side] for side in contrast.sides)
    both = two.get("klfast")
    return Pair(contrast, own, beside, beside / own, both, own / both if both else None)


def trained_from_run(
    run: dict[tuple[str, str, int], Known], work: training.Training
) -> training.Trained | None:
    seconds = run.get((work.loss, work.name, 1), {})
    if "klfast" not in seconds:
        return None
    times = {side: t / seconds["klfast"] for side, t in seconds.items() if side != "klfast"}
    return training.Trained(work, seconds, times)


def in_turn(what: str, things: Iterable[Any], do: Callable[[Any], Any]) -> Iterator[Any]:
    """Do one after the other; show which and what came out."""
    things = list(things)
    with Progress(console=CONSOLE) as progress:
        task = progress.add_task(what, total=len(things))
        for thing in things:
            progress.update(task, description=f"{what}: {thing.name}")
            result = do(thing)
            if result is not None:
                progress.print(table.in_a_line(result))
                yield result
            progress.advance(task)


def check_markers(path: Path) -> None:
    if not PART.search(path.read_text()):
        raise click.ClickException(f"{path} lacks the markers {BEGIN} and {END}")


def write_between_markers(path: Path, text: str) -> None:
    path.write_text(PART.sub(lambda _: f"{BEGIN}\n{text}\n{END}", path.read_text()))


def rounded(x: Any) -> Any:
    """The same with numbers of three digits: small, and a change shows in a diff."""
    if isinstance(x, float):
        return float(f"{x:.3g}") if abs(x) < float("inf") else str(x)
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items() if v is not None and v is not False}
    return [rounded(v) for v in x] if isinstance(x, list | tuple) else x


def write_numbers(path: Path, facts: dict[str, Any]) -> None:
    """One result a line."""
    parts = []
    for key, value in facts.items():
        lines = [json.dumps(rounded(v)) for v in value] if isinstance(value, list) else None
        text = "[\n  " + ",\n  ".join(lines) + "\n ]" if lines else json.dumps(rounded(value))
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


@click.command(help=__doc__.split("\n")[0])
@click.option("--from", "run", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Take the times from this pytest-benchmark JSON.")  # fmt: skip
@click.option("-k", "words", default="", help="Only works whose names have all of these words.")
@click.option("--quick", is_flag=True, help="Few items and rounds; writes only where told to.")
@click.option("--seconds", default=1.0, show_default=True, help="Time for each row.")
@click.option("--readme", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Where the tables go.  [default: README.md]")  # fmt: skip
@click.option("--results", type=click.Path(file_okay=False, path_type=Path),
              help="Where figures and numbers go.  [default: benchmarks/results]")  # fmt: skip
def main(
    run: Path | None,
    words: str,
    quick: bool,
    seconds: float,
    readme: Path | None,
    results: Path | None,
) -> None:
    if not quick and not words:
        readme, results = readme or ROOT / "README.md", results or ROOT / "benchmarks" / "results"
    if readme:
        check_markers(readme)
    known = times_in(run) if run else None
    seconds = 0.01 if quick else seconds
    seen = describe_machine()

    def chosen(things: list[Any]) -> list[Any]:
        return [t for t in things if all(w in t.name for w in words.split())]

    def small(works: list[Work]) -> list[Work]:
        """In a quick run, one work of each way to call."""
        first = {(work.entry, work.dtype, work.covariances): work for work in reversed(works)}
        return [work.smaller() for work in first.values()] if quick else works

    def few(works: list[training.Training]) -> list[training.Training]:
        first = {work.loss: work for work in reversed(works)}
        return [work.smaller() for work in first.values()] if quick else works

    works, sizes = small(chosen(WORKS)), [] if quick else chosen(SIZES)
    with CONSOLE.status("the machine's bounds"):
        limits = Machine() if quick or known is not None else measure_machine(works)

    def row(work: Work) -> Row | None:
        return compare(work, seconds, limits, None) if known is None else from_run(known, work)

    def pair(contrast: Contrast) -> Pair | None:
        return oppose(contrast, seconds) if known is None else pair_from_run(known, contrast)

    def trained(work: training.Training) -> training.Trained | None:
        if known is None:
            return training.compare(work, 3 * seconds)
        return trained_from_run(known, work)

    rows: list[Row] = [*in_turn("works", works, row)]
    pairs: list[Pair] = [*in_turn("layouts", chosen(CONTRASTS)[:: 5 if quick else 1], pair)]
    losses = few(chosen(training.WORKS)) if TORCH.installed else []
    trainings: list[training.Trained] = [*in_turn("training", losses, trained)]
    text = table.readme_part(rows, pairs, trainings, seen)
    click.echo(text)
    if readme:
        write_between_markers(readme, text)
    if words:
        return
    done = {r.work: r for r in rows}
    swept = rows if quick else [done[w] for w in sizes if w in done]
    swept += [*in_turn("sizes", [w for w in sizes if w not in done], row)]
    near = [*accuracy(track(DISTANCES[:: 7 if quick else 1], "distances", console=CONSOLE))]
    grown = [*track(growth(quick), "growth", console=CONSOLE)]
    if results:
        results.mkdir(parents=True, exist_ok=True)
        draw_speed([r.record() for r in swept], results / "speed.png")
        draw_error(near, results / "error.png")
        draw_growth(grown, results / "growth.png")
        facts: dict[str, Any] = {"machine": seen | {"clock": limits.clock, "flops": limits.flops}}
        facts |= {"works": [r.record() for r in rows], "layouts": [p.record() for p in pairs]}
        facts |= {"training": [t.record() for t in trainings]}
        facts |= {"sizes": [r.record() for r in swept], "distances": near, "growth": grown}
        write_numbers(results / "report.json", facts)


if __name__ == "__main__":
    main()
