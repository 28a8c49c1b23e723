"""The machine's bound for the same work, on one thread.

Memory: the arrays at the speed of a plain read, a BLAS dot product of p's with q's, timed in turns
with klfast, which can be faster by asking for elements further ahead. Arithmetic: the cycles that
the vector instructions of klfast's kernel need if none ever waits. Single steps
(tests/machine_code.py) count how often each is executed, and those that are executed equally often
are timed together, on registers by which none waits for another (throughput.py). Matrices with
D >= LARGE count floating-point operations instead, at the speed of multiply-adds: from registers
alone, or of a BLAS matrix product where that is faster.

As a program: reads works from stdin, writes the cycles of one item of each (JSON).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import klfast
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import machine_code
import throughput
from machine_code import Instruction

if TYPE_CHECKING:
    from suite import Work

LARGE = 32
ELEMENTS = 8192  # of a row, or of short rows, that single steps are taken through
LANES = 16  # at most so many short rows are computed together
MOVES = re.compile(
    r"v?(mov|lddqu|broadcast|insert|extract|unpck|perm|shuf|zero)|vp?(broadcast|maskmov)|vmaskmov"
)
ZERO = re.compile(r"v?p?xor\w* (\w+)(,\1)+")  # a name for zero: nothing is computed
CHAINS = 64  # multiply-adds that are timed together


def plain_read(arrays: dict[str, np.ndarray]) -> Callable[[], object]:
    """Read every array once."""
    flat = [a.reshape(-1) for a in arrays.values()]
    same = {a.size: [b for b in flat if b.size == a.size] for a in flat}
    pairs = [(b[i], b[i + 1]) for b in same.values() for i in range(0, len(b), 2)]
    return lambda: [np.vecdot(p, q) for p, q in pairs]


def why_no_cycles() -> str | None:
    reason = machine_code.why_no_disassembly() or machine_code.why_no_execution()
    return reason or (None if shutil.which("cc") else "needs a C compiler (cc)")


def clock() -> float:
    """Cycles a second."""
    return 1 / throughput.seconds([()])[0]


def flops_a_second(dtype: str, size: int = 768) -> float:
    """Of multiply-adds from registers alone, or of a matrix product where that is faster; within a
    threads context of one."""
    a = np.ones((size, size), dtype)
    product = max(2 * size**3 / _seconds(lambda: a @ a) for _ in range(5))
    available = klfast.config.describe()["isa_available"]
    if why_no_cycles() or "avx2" not in available:
        return product
    register, real = "zmm0" if "avx512" in available else "ymm0", a.dtype.char.replace("f", "s")
    add = Instruction(0, f"vfmadd231p{real}", ",".join([register] * 3))
    seconds = throughput.seconds([(add,) * CHAINS])[0]
    return max(product, 2 * CHAINS * add.width / a.itemsize / seconds)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flops(work: Work) -> float:
    """D³/3 for a triangular solve of a triangle and for each Cholesky factor."""
    return work.items * work.size**3 * (1 if work.covariances else 1 / 3)


def stepped(work: Work) -> Work:
    """The same with few elements."""
    if work.matrices:
        return replace(work, items=32 if work.size < 8 else 16)
    size = min(work.size, ELEMENTS)
    items = LANES * -(-ELEMENTS // (LANES * size)) if size < 128 else 1
    return replace(work, size=size, items=min(work.items, items))


def needs_cycles(work: Work) -> bool:
    return not (work.matrices and work.size >= LARGE)


def is_vector(instruction: Instruction) -> bool:
    """Whether it computes something in vector registers."""
    text = f"{instruction.name} {instruction.operands}"
    return instruction.width > 0 and not MOVES.match(text) and not ZERO.fullmatch(text)


def cycles(works: list[Work]) -> list[float]:
    """Cycles of one item of each work, from a process of its own, where nothing else runs."""
    asked = json.dumps([asdict(work) for work in works])
    done = subprocess.run(
        [sys.executable, __file__], input=asked, stdout=subprocess.PIPE, text=True, check=True
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def executed_blocks(work: Work) -> dict[int, throughput.Block]:
    """The vector instructions that one call executes, by how often."""
    function = getattr(klfast, work.function)
    # Two batch axes, with which NumPy calls the kernel: there the watch begins.
    arrays = {name: array[np.newaxis] for name, array in work.inputs().items()}
    counts = machine_code.executed(lambda: function(**arrays))
    path = machine_code.module_path(klfast._kernels.isa)
    assert path is not None
    by_count: dict[int, throughput.Block] = {}
    for instruction in machine_code.disassemble(path):
        n = counts[instruction.address]
        if n and is_vector(instruction):
            by_count[n] = (*by_count.get(n, ()), instruction)
    return by_count


def cycles_of_items(works: list[Work]) -> list[float]:
    taken = [stepped(work) for work in works]
    executed = [executed_blocks(work) for work in taken]
    blocks = list({block: None for by_count in executed for block in by_count.values()})
    cycle, *times = throughput.seconds([(), *blocks])
    took = dict(zip(blocks, times, strict=True))
    totals = [sum(n * took[block] for n, block in by_count.items()) for by_count in executed]
    return [
        total / cycle / few.items * work.size / few.size
        for total, few, work in zip(totals, taken, works, strict=True)
    ]


def main() -> None:
    from suite import Work

    machine_code.pin()
    klfast.set_num_threads(1)
    works = [Work(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps(cycles_of_items(works)))


if __name__ == "__main__":
    main()
