"""Judge and time klfast and its peers on one work; klfast on one thread and on two; its growth."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import klfast
import numpy as np

import bounds
from contrasts import Contrast
from peers import Peer, blas_threads
from registry import IDS
from suite import Work, error_of, exact, is_wrong, quiet_threads, relative_error, why_not
from timing import Contestant, interleave, ratio

HIDDEN = ("reference",)  # measured by pytest, not here
AGAIN, READ = "klfast again", "plain read"
MEASURED = ("noise", "read", "arithmetic", "limit", "fraction", "two", "gain")
Known = dict[str, float]  # seconds of each peer


@dataclass
class Result:
    """One peer on one work and one thread. No seconds: not timed. `wrong`: beyond what its dtype
    excuses. `times`: how many times klfast's time."""

    peer: str
    library: str
    error: float | None
    negative: bool
    wrong: bool
    seconds: float | None = None
    times: float | None = None


@dataclass
class Row:
    """All about one work."""

    work: Work
    results: list[Result]
    noise: float | None = None  # klfast's time against itself
    read: float | None = None  # seconds of a plain read of the arrays
    arithmetic: float | None = None  # seconds that the kernel's vector instructions need
    two: float | None = None  # seconds on two threads
    gain: float | None = None

    @property
    def own(self) -> Result:
        return self.results[0]

    @property
    def best(self) -> Result | None:
        """The fastest of the peers whose values are right, or of all that are timed."""
        timed = [r for r in self.results[1:] if r.times is not None]
        timed = [r for r in timed if not r.wrong] or timed
        return min(timed, key=lambda r: r.times or 0) if timed else None

    @property
    def limit(self) -> str | None:
        """What binds: memory or arithmetic."""
        known = {"reading": self.read, "arithmetic": self.arithmetic}
        found = {name: t for name, t in known.items() if t}
        return max(found, key=lambda name: found[name]) if found else None

    @property
    def fraction(self) -> float | None:
        """Of the machine's bound."""
        bound = max(self.read or 0, self.arithmetic or 0)
        return bound / self.own.seconds if bound and self.own.seconds else None

    def record(self) -> dict[str, Any]:
        """Give everything in plain types."""
        best = self.best
        return {
            "function": self.work.function,
            "id": self.work.id,
            **asdict(self.work),
            **{
                name: getattr(self, name) for name in ("noise", "read", "arithmetic", "two", "gain")
            },
            "limit": self.limit,
            "fraction": self.fraction,
            "best": best and best.peer,
            "ratio": best and best.times,
            "results": [asdict(r) for r in self.results],
        }


@dataclass
class Machine:
    """What bounds are made of."""

    clock: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    cycles: dict[Work, float] = field(default_factory=dict)  # of one item

    def arithmetic(self, work: Work) -> float | None:
        if not bounds.needs_cycles(work):
            return bounds.flops(work) / self.flops[work.dtype] if self.flops else None
        if self.clock is None or work not in self.cycles:
            return None
        return work.items * self.cycles[work] / self.clock


def measure_machine(works: list[Work]) -> Machine:
    with blas_threads(1):
        flops = {dtype: bounds.flops_a_second(dtype) for dtype in ("float32", "float64")}
    if bounds.why_no_cycles():
        return Machine(flops=flops)
    traced = [work for work in works if bounds.needs_cycles(work)]
    cycles = dict(zip(traced, bounds.cycles(traced), strict=True))
    return Machine(bounds.clock(), flops, cycles)


def shown_peers(work: Work) -> Iterator[Peer]:
    for peer in work.peers():
        if peer.name not in HIDDEN and why_not(work, peer) is None:
            yield peer


def judge(work: Work, peer: Peer, got: Any) -> Result:
    return Result(
        peer.name,
        peer.library.name,
        relative_error(np.asarray(got)[work.sample()], exact(work)),
        bool(np.any(np.asarray(got) < 0)),
        is_wrong(work, error_of(work, got)),
    )


def contestant(peer: Peer, call: Any, threads: int) -> Contestant:
    return Contestant(call, functools.partial(quiet_threads, peer, threads))


def compare(work: Work, seconds: float, machine: Machine | None, known: Known | None) -> Row:
    """Judge every peer on one work, and time those whose values are right (unless known). Of
    near-equal P and Q nobody else's are: where there is a floor, all are timed all the same."""
    results, contestants = [], {}
    for peer in shown_peers(work):
        with quiet_threads(peer, 1):
            call = peer.prepare(work.inputs())
            results.append(judge(work, peer, call()))
        if not results[-1].wrong or (work.near and work.floor):
            contestants[peer.name] = contestant(peer, call, 1)
    row = Row(work, results, arithmetic=machine and machine.arithmetic(work))
    if known is not None:
        for result in results:
            result.seconds = known.get(result.peer)
            if result.seconds and "klfast" in known:
                result.times = result.seconds / known["klfast"]
        return row
    contestants[READ] = Contestant(
        bounds.plain_read(work.inputs()), functools.partial(blas_threads, 1)
    )
    contestants[AGAIN] = contestants["klfast"]
    times = interleave(contestants, seconds)
    for result in results:
        if result.peer in times:
            result.seconds = median(times[result.peer])
            result.times = ratio(times, result.peer, "klfast")
    row.noise, row.read = ratio(times, AGAIN, "klfast"), median(times[READ])
    row.two, row.gain = two_threads(contestants["klfast"].call, seconds / 2)
    return row


def two_threads(call: Any, seconds: float) -> tuple[float, float]:
    """klfast's time on two threads, and how many times that one thread takes."""
    both = {n: Contestant(call, functools.partial(klfast.num_threads, n)) for n in (1, 2)}
    times = interleave({str(n): c for n, c in both.items()}, seconds)
    return median(times["2"]), ratio(times, "1", "2")


@dataclass
class Pair:
    """A contrast and its times: `times` says how many times klfast's the other takes."""

    contrast: Contrast
    seconds: float
    beside: float
    times: float
    two: float | None = None
    gain: float | None = None

    def record(self) -> dict[str, Any]:
        facts = {
            n: getattr(self.contrast, n) for n in ("function", "what", "beside", "floor", "aim")
        }
        return facts | {
            "seconds": self.seconds,
            "seconds beside": self.beside,
            **{name: getattr(self, name) for name in ("times", "two", "gain")},
        }


def oppose(contrast: Contrast, seconds: float) -> Pair:
    calls = contrast.calls()
    with klfast.num_threads(1):
        contrast.assert_same(*(call() for call in calls.values()))
    one = functools.partial(klfast.num_threads, 1)
    times = interleave({n: Contestant(c, one) for n, c in calls.items()}, seconds)
    own, other = contrast.sides
    pair = Pair(contrast, median(times[own]), median(times[other]), ratio(times, other, own))
    if contrast.large:
        pair.two, pair.gain = two_threads(calls[own], seconds / 2)
    return pair


# How the time grows

STEPS = (1, 1.5, 2, 3, 5, 7)
FAMILIES = {"discrete": 10, "categorical": 10, "normal-scale": 10, "mvn": 4}  # size of one of many


def growing(first: int, last: int) -> list[int]:
    """Numbers from first to last, about six a decade, and what lies around powers of two."""
    numbers = {round(s * 10**e) for e in range(8) for s in STEPS}
    numbers |= {2**e + d for e in range(2, 11) for d in (0, 1)}
    return [first, *sorted(n for n in numbers if first < n < last), last]


def growth(quick: bool) -> Iterator[dict[str, Any]]:
    """Time per element of one row that grows, and of a batch of short rows that grows."""
    longest, most = (3000, 1000) if quick else (10_000_000, 1_000_000)
    for id, size in FAMILIES.items():
        if IDS[id].core == 1:
            yield from grow(id, "length", [(1, k) for k in growing(3, longest)])
        yield from grow(id, "rows", [(n, size) for n in growing(1, most)])


def grow(id: str, along: str, shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The same arrays, cut to each of the shapes."""
    items, size = shapes[-1]
    arrays, core = IDS[id].inputs("float32", (items,), size), IDS[id].core
    function = getattr(klfast, IDS[id].function)
    for threads in (1, 2):
        for items, size in shapes:
            cut = {name: a[:items, :size] for name, a in arrays.items()}

            def call(cut: Any = cut) -> Any:
                return function(**cut)

            within = functools.partial(klfast.num_threads, threads)
            times = interleave({"klfast": Contestant(call, within)}, 0.01)
            yield {
                "function": IDS[id].function,
                "along": along,
                "n": items if along == "rows" else size,
                "threads": threads,
                "seconds an element": median(times["klfast"]) / (items * size**core),
            }


def accuracy(works: list[Work]) -> Iterator[dict[str, Any]]:
    """Judge every peer on P and Q at ever smaller distances."""
    for work in works:
        for peer in shown_peers(work):
            with quiet_threads(peer, 1):
                result = judge(work, peer, peer.prepare(work.inputs())())
            yield {"function": work.function, "dtype": work.dtype, "near": work.near} | asdict(
                result
            )
