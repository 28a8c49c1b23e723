"""What the installed kernels look like to the processor: their loops, and what a call executes.

Two views. `disassemble` and `innermost_loops` read a module of any instruction set with objdump,
also one that this machine cannot run. `executed` and `sampled` watch a call in a forked child
(ptrace; Linux on x86-64): the one takes single steps and counts how often every instruction ran,
the other stops it now and then and says where the time goes.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import klfast._kernels

LINE = re.compile(r"^\s*([0-9a-f]+):\s+(?:\{\w+\}\s+)?(\S+)\s*(.*)$")
# add, fused multiply-add, ... on packed (p) or single (s) values of single (s) or double (d)
ARITHMETIC = re.compile(
    r"^v?(?P<kind>add|sub|mul|div|sqrt|min|max|fn?m(?:add|sub)(?:132|213|231))"
    r"(?P<lanes>[ps])(?P<real>[sd])$"
)
REGISTER_BYTES = {"x": 16, "y": 32, "z": 64}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str

    @functools.cached_property
    def arithmetic(self) -> re.Match[str] | None:
        return ARITHMETIC.match(self.name)

    @property
    def packed(self) -> bool:
        return self.arithmetic is not None and self.arithmetic["lanes"] == "p"

    @property
    def scalar(self) -> bool:
        return self.arithmetic is not None and self.arithmetic["lanes"] == "s"

    @property
    def width(self) -> int:
        """Bytes of the vector registers it works on."""
        return max(
            (REGISTER_BYTES[r] for r in re.findall(r"\b([xyz])mm\d", self.operands)), default=0
        )

    @property
    def jump_target(self) -> int | None:
        if not self.name.startswith("j"):
            return None
        target = re.match(r"([0-9a-f]+)\b", self.operands)
        return int(target[1], 16) if target else None


def module_path(level: str) -> Path | None:
    """Where the kernels of an instruction set are installed, if they were built."""
    spec = importlib.util.find_spec(f"klfast._kernels_{level}")
    return Path(spec.origin) if spec and spec.origin else None


def why_no_disassembly() -> str | None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "reads the instructions of x86-64 alone"
    path = module_path(klfast._kernels.isa)
    if path and b"__asan_" in path.read_bytes():
        return "built with sanitizers, whose loops are others"
    return None if shutil.which("objdump") else "needs objdump"


@functools.lru_cache
def disassemble(path: Path) -> list[Instruction]:
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-M", "intel", "--section=.text", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = (LINE.match(line) for line in listing.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in found if m]


def innermost_loops(
    instructions: list[Instruction], longest: int = 1 << 14
) -> list[list[Instruction]]:
    """What a backward jump of at most `longest` bytes spans, unless it spans another such loop, or
    its target never leads back to it: code that was only laid out before."""
    addresses = [i.address for i in instructions]
    spans = []
    for last, instruction in enumerate(instructions):
        target = instruction.jump_target
        if target is not None and 0 <= instruction.address - target <= longest:
            spans.append((bisect.bisect_left(addresses, target), last))
    inner: list[tuple[int, int]] = []
    for first, last in sorted(set(spans), key=lambda span: span[1] - span[0]):
        if not any(first <= a and b <= last for a, b in inner) and _leads(
            instructions[first : last + 1]
        ):
            inner.append((first, last))
    return [instructions[first : last + 1] for first, last in sorted(inner)]


def _leads(span: list[Instruction]) -> bool:
    """Whether control can go from the first instruction to the last without leaving the span."""
    index = {instruction.address: i for i, instruction in enumerate(span)}
    reached, waiting = {0}, [0]
    while waiting:
        i = waiting.pop()
        follows = [] if span[i].name in ("jmp", "ret") else [i + 1]
        if span[i].jump_target in index:
            follows.append(index[span[i].jump_target])
        new = {j for j in follows if j < len(span)} - reached
        reached |= new
        waiting += new
    return len(span) - 1 in reached


# What a call executes

TRACEME, PEEKTEXT, PEEKUSER, POKETEXT, POKEUSER, CONTINUE, STEP = 0, 1, 3, 4, 6, 7, 9
SEIZE, INTERRUPT = 0x4206, 0x4207
RIP, RSP = 16 * 8, 19 * 8  # in struct user
BREAKPOINT = 0xCC
FUNCTIONS_OF_A_UFUNC = 32  # offset of PyUFuncObject.functions


def why_no_execution() -> str | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "a call is watched on Linux on x86-64 alone"
    return None if _may_trace() else "ptrace is forbidden here"


def _may_trace() -> bool:
    """Whether a child may be traced; it says so by its exit status."""
    child = os.fork()
    if child == 0:
        os._exit(int(_libc().ptrace(TRACEME, 0, None, None) != 0))
    return os.waitpid(child, 0)[1] == 0


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return libc


def _entries() -> set[int]:
    """The addresses of the loops that NumPy calls."""
    entries = set()
    for gufunc in klfast._kernels.gufuncs.values():
        functions = ctypes.c_void_p.from_address(id(gufunc) + FUNCTIONS_OF_A_UFUNC).value
        array = (ctypes.c_void_p * len(gufunc.types)).from_address(functions)
        entries |= set(array)
    return entries


def _base(path: Path) -> int:
    """Where the module is in memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return min(int(line.split("-")[0], 16) for line in lines if line.endswith(str(path)))


class _Child:
    """A forked child that runs `body` and is watched."""

    def __init__(self, body: Callable[[], object]) -> None:
        self.libc = _libc()
        self.id = os.fork()
        if self.id == 0:
            try:
                body()
            finally:
                os._exit(0)

    def request(self, what: int, address: int | None = None, data: int | None = None) -> int:
        return int(self.libc.ptrace(what, self.id, address, data)) & (2**64 - 1)

    def wait(self) -> bool:
        """Wait for it; whether it stopped, and did not end."""
        _, self.status = os.waitpid(self.id, 0)
        return os.WIFSTOPPED(self.status)

    def resume(self, how: int) -> bool:
        self.request(how)
        return self.wait()


def _module_in_use() -> tuple[int, int]:
    path = module_path(klfast._kernels.isa)
    assert path is not None
    return _base(path.resolve()), path.stat().st_size


def executed(call: Callable[[], object]) -> Counter[int]:
    """How often each address of the module in use runs in one call. The calling thread must be
    the only one that computes."""
    base, size = _module_in_use()
    call()  # what happens only once

    def body() -> None:
        _libc().ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        call()

    child = _Child(body)
    child.wait()
    entries = {entry: child.request(PEEKTEXT, entry) for entry in _entries()}

    def put(breakpoints: bool) -> None:
        for entry, word in entries.items():
            changed = word & ~0xFF | BREAKPOINT
            child.request(POKETEXT, entry, changed if breakpoints else word)

    counts: Counter[int] = Counter()
    put(breakpoints=True)
    while child.resume(CONTINUE):  # until NumPy calls a loop
        put(breakpoints=False)
        child.request(POKEUSER, RIP, child.request(PEEKUSER, RIP) - 1)
        frame = child.request(PEEKUSER, RSP)
        while child.resume(STEP):
            address = child.request(PEEKUSER, RIP) - base
            if 0 <= address < size:
                counts[address] += 1
            elif child.request(PEEKUSER, RSP) > frame:  # back in NumPy
                break
        put(breakpoints=True)
    assert os.WIFEXITED(child.status), f"status {child.status:#x}"
    return counts


def sampled(call: Callable[[], object], samples: int = 100, pause: float = 2e-4) -> Counter[int]:
    """Where in the module in use a call spends its time: addresses at `samples` moments."""
    base, size = _module_in_use()
    call()  # what happens only once

    def body() -> None:
        while True:
            call()

    child = _Child(body)
    counts: Counter[int] = Counter()
    try:
        child.request(SEIZE)
        for _ in range(samples):
            time.sleep(pause)
            child.request(INTERRUPT)
            child.wait()
            counts[child.request(PEEKUSER, RIP) - base] += 1
            child.request(CONTINUE)
    finally:
        os.kill(child.id, signal.SIGKILL)
        os.waitpid(child.id, 0)
    return Counter({address: n for address, n in counts.items() if 0 <= address < size})


def pin() -> None:
    """Keep to one processor: parent and child take turns faster than across two."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
