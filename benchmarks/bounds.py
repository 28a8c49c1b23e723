"""The machine's bound for the same work, on one thread: what no program could do faster.

Memory: the arrays at the speed of a plain read, a BLAS dot product of p's with q's, timed in turns
with klfast. Arithmetic: the cycles that the vector instructions of klfast's kernel need if none
ever waits. Single steps (tests/machine_code.py) count how often each is executed, llvm-mca says how
many of them the processor takes in a cycle, and a countdown measures the clock. Matrices with
D >= LARGE count floating-point operations instead, at the speed of a BLAS matrix product.

The speed of multiply-adds, from registers alone or of a BLAS matrix product, is measured too.

As a program: reads works from stdin, writes the cycles of one item of each (JSON).
"""

from __future__ import annotations

import ctypes
import json
import mmap
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
from machine_code import Instruction

if TYPE_CHECKING:
    from suite import Work

LARGE = 32
ELEMENTS = 512  # of a row, or of short rows, that single steps are taken through
LANES = 16  # at most so many short rows are computed together
MOVES = re.compile(
    r"v?(mov|lddqu|broadcast|insert|extract|unpck|perm|shuf|zero)|vp?broadcast|vperm"
)


def plain_read(arrays: dict[str, np.ndarray]) -> Callable[[], object]:
    """Read every array once."""
    flat = [a.reshape(-1) for a in arrays.values()]
    same = {a.size: [b for b in flat if b.size == a.size] for a in flat}
    pairs = [(b[i], b[i + 1]) for b in same.values() for i in range(0, len(b), 2)]
    return lambda: [np.vecdot(p, q) for p, q in pairs]


def why_no_cycles() -> str | None:
    reason = machine_code.why_no_disassembly() or machine_code.why_no_execution()
    return reason or (None if shutil.which("llvm-mca") else "needs llvm-mca")


def _machine_code(code: bytes) -> Callable[[int], None]:
    """A function of one integer."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    first = ctypes.c_char.from_buffer(page)  # keeps the page
    call = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(ctypes.addressof(first))
    return lambda n: call(n) if first else None


def _times_a_second(code: bytes, n: int) -> float:
    """How often a loop runs, in the best of many short tries: neighbours on a shared machine halve
    it for a second at a time."""
    run = _machine_code(code)
    return max(n / _seconds(lambda: run(n)) for _ in range(2000))


def clock() -> float:
    """Cycles a second: every x86-64 processor counts down one a cycle."""
    return _times_a_second(countdown(b""), 1_000_000)


def countdown(body: bytes) -> bytes:
    """body; dec rdi; jnz to the begin; ret"""
    return body + bytes([0x48, 0xFF, 0xCF, 0x75, 0x100 - len(body) - 5, 0xC3])


def multiply_add(register: int) -> bytes:
    """vfmadd231pd ymm, ymm, ymm, all the same, one of the first eight"""
    source = 0x85 | (~register & 15) << 3
    return bytes([0xC4, 0xE2, source, 0xB8, 0xC0 | register << 3 | register])


def flops_a_second(dtype: str, size: int = 768) -> float:
    """Of eight independent chains of multiply-adds, or of a matrix product where that is faster (on
    wider registers); within a threads context of one."""
    a, lanes = np.ones((size, size), dtype), 32 // np.dtype(dtype).itemsize
    product = max(2 * size**3 / _seconds(lambda: a @ a) for _ in range(5))
    if why_no_cycles() or "avx2" not in klfast.config.describe()["isa_available"]:
        return product
    chains = countdown(b"".join(map(multiply_add, range(8))))
    return max(product, 8 * 2 * lanes * _times_a_second(chains, 500_000))


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
    return instruction.width > 0 and not MOVES.match(instruction.name)


def cycles(works: list[Work]) -> list[float]:
    """Cycles of one item of each work, from a process of its own, where nothing else runs."""
    asked = json.dumps([asdict(work) for work in works])
    done = subprocess.run(
        [sys.executable, __file__], input=asked, capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout.splitlines()[-1]))


def cycles_of_item(work: Work) -> float:
    few = stepped(work)
    arrays, function = few.inputs(), getattr(klfast, few.function)
    counts = machine_code.executed(lambda: function(**arrays))
    path = machine_code.module_path(klfast._kernels.isa)
    assert path is not None
    vector = [i for i in machine_code.disassemble(path) if counts[i.address] and is_vector(i)]
    by_count: dict[int, list[Instruction]] = {}
    for instruction in vector:
        by_count.setdefault(counts[instruction.address], []).append(instruction)
    total = sum(n * t for n, t in zip(by_count, throughputs([*by_count.values()]), strict=True))
    return total / few.items * work.size / few.size if not work.matrices else total / few.items


def throughputs(blocks: list[list[Instruction]]) -> list[float]:
    """Cycles of each block of instructions if it repeats and none waits for another."""
    lines = [".intel_syntax noprefix"]
    for n, block in enumerate(blocks):
        lines += [f"# LLVM-MCA-BEGIN {n}", *map(_source, block), "# LLVM-MCA-END"]
    done = subprocess.run(
        ["llvm-mca", "-mcpu=native", "-iterations=1"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(x) for x in re.findall(r"Block RThroughput:\s*([\d.]+)", done.stdout)]


def _source(instruction: Instruction) -> str:
    operands = re.sub(r"\s*(#.*|<.*>)", "", instruction.operands)
    return f"{instruction.name} {operands}"


def main() -> None:
    from suite import Work

    machine_code.pin()
    klfast.set_num_threads(1)
    works = [Work(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps([cycles_of_item(work) for work in works]))


if __name__ == "__main__":
    main()
