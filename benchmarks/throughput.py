"""How long blocks of vector instructions take on this machine if none waits for another.

Each block is the body of a loop, on other registers (`independent`). Registers and memory hold
ordinary numbers, in either precision, and subnormal ones count as zero: no value takes longer.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
import time

from machine_code import Instruction

Block = tuple[Instruction, ...]
READ = 3  # vector registers 0, 1 and 2 are only read, as are mask 1 and rdx
BODY = 400  # instructions of a loop, about: its countdown costs nothing, and caches hold it
RUN = 1 << 20  # instructions that are timed at once: a fraction of a millisecond
DATA = """
    .intel_syntax noprefix
    .section .note.GNU-stack, "", @progbits
    .data
    .p2align 6
ordinary:
    .fill 32, 4, 0x3f9e3779  # 1.236; in double precision 0.0295
masked:
    .long 0x9fc0  # MXCSR: no traps, subnormal numbers are zero
    .text
"""
LOOP = """
    .globl block{n}
block{n}:
    stmxcsr [rsp-4]
    ldmxcsr masked[rip]
    lea rsi, ordinary[rip]
    {before}
    .p2align 6
again{n}:
    {body}
    dec edi
    jnz again{n}
    {after}
    ldmxcsr [rsp-4]
    ret
"""


def independent(instruction: Instruction, n: int) -> str:
    """The n-th instruction of a loop, on registers by which it waits for no other: it reads those
    that nothing writes. Results go in turn to the rest of those that it can name, so many that also
    what adds to its result need not wait, and a prime number, lest a pattern keep to one."""
    turn = READ + n % (29 if "zmm" in instruction.operands else 13)
    result, *sources = re.sub(r"\s*(#.*|<.*>)", "", instruction.operands).split(",")
    operands = [_renamed(result, turn, 2 + n % 6, "a", "rsi+64")]
    for i, source in enumerate(sources, 1):  # SSE's blends read register 0 as the last
        operands.append(_renamed(source, len(sources) - i, 1, "d", "rsi"))
    return f"{instruction.name} {','.join(operands)}"


def _renamed(operand: str, vector: int, mask: int, general: str, address: str) -> str:
    for pattern, name in (
        (r"\[.*\]", f"[{address}]"),
        (r"(?<=\b[xyz]mm)\d+", f"{vector}"),
        (r"^k\d", f"k{mask}"),
        (r"\{k\d\}", "{k1}"),
        (r"^(r\d+d|e[a-ds][xpi])$", f"e{general}x"),
        (r"^(r\d+|r[a-ds][xpi])$", f"r{general}x"),
    ):
        operand = re.sub(pattern, name, operand)
    return operand


def _loop(n: int, block: Block) -> str:
    body = "\n".join(independent(instruction, i) for i, instruction in enumerate(block))
    wide = next((register for register in ("zmm", "ymm") if register in body), None)
    load, after = ("vmovups", "vzeroupper") if wide else ("movups", "")
    before = [f"{load} {wide or 'xmm'}{i}, [rsi]" for i in range(READ)]
    before += ["kxnorw k1, k1, k1"] * ("k1" in body)
    return LOOP.format(n=n, before="\n".join(before), body=body, after=after)


def _assembled(source: str) -> ctypes.CDLL:
    """Raises what the assembler says first, which names the instruction."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["cc", "-shared", "-x", "assembler", "-o", f"{folder}/loops.so", "-"]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        if done.returncode:
            raise ValueError("\n".join(done.stderr.splitlines()[:5]))
        return ctypes.CDLL(command[-2])


def seconds(blocks: list[Block]) -> list[float]:
    """Of each block, in the best of many short runs: neighbours on a shared machine halve its speed
    for a second at a time, so the blocks take turns. An empty one takes a cycle: every x86-64
    processor counts down one a cycle."""
    repeats = [(round(BODY / len(block)) or 1) if block else 1 for block in blocks]
    bodies = [block * times for block, times in zip(blocks, repeats, strict=True)]
    library = _assembled(DATA + "".join(_loop(n, body) for n, body in enumerate(bodies)))
    counts = [RUN // max(1, len(body)) for body in bodies]
    runs = [functools.partial(library[f"block{n}"], count) for n, count in enumerate(counts)]
    best = [float("inf")] * len(blocks)
    for _ in range(max(100, 5000 // len(blocks))):
        for n, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[n] = min(best[n], time.perf_counter() - start)
    return [t / count / times for t, count, times in zip(best, counts, repeats, strict=True)]
