"""The loops that take the time are packed: they work on whole vector registers.

For every instruction set that was built, also those that this machine cannot run, the loops are
read from the disassembly of the installed modules. For those that it can run, single steps tell
which arithmetic is executed for every element.
"""

import json
from collections import Counter

import klfast
import pytest

import fresh
import machine_code
from machine_code import Instruction
from registry import IDS

REGISTER = {"baseline": 16, "avx2": 32, "avx512": 64}  # bytes
TERMS = 12  # arithmetic instructions of a loop that computes terms, at least
PACKED_LOOPS = {"s": 25, "d": 80}  # at least so many of each real type
# At most so many loops one element at a time: rows of bad or extreme values, operands that lie
# apart, and normals whose sides give different things for the variance.
SCALAR_LOOPS = {"s": 5, "d": 9}
SCALAR_TIME = 0.55  # of a call; mixed normals on baseline: 0.46, all others up to 0.11

levels = pytest.mark.parametrize("level", REGISTER)


def loops_of(level):
    reason = machine_code.why_no_disassembly()
    if reason:
        pytest.skip(reason)
    path = machine_code.module_path(level)
    assert path is not None, f"klfast was built without {level}"
    return machine_code.innermost_loops(machine_code.disassemble(path))


def character(loop):
    """Whether a loop computes terms packed ("ps", "pd") or one by one ("ss", "sd"): what most of
    its products, quotients and comparisons are. None if it calls functions or only adds up."""
    if any(i.name == "call" for i in loop):
        return None
    arithmetic = [i.arithmetic for i in loop if i.arithmetic]
    others = Counter(m["lanes"] + m["real"] for m in arithmetic if m["kind"] not in ("add", "sub"))
    if len(arithmetic) < TERMS or others.total() < TERMS / 2:
        return None
    return max(others, key=others.get)


@levels
def test_loops_of_terms_are_packed(level):
    found = {"ps": [], "pd": [], "ss": [], "sd": [], None: []}
    for loop in loops_of(level):
        found[character(loop)].append(f"{loop[0].address:x}")
    for real in "sd":
        packed, alone = len(found["p" + real]), len(found["s" + real])
        assert packed >= PACKED_LOOPS[real], f"{packed} packed loops"
        assert alone <= SCALAR_LOOPS[real], (
            f"{alone} loops one element at a time, at {found['s' + real]}"
        )


@levels
def test_packed_loops_fill_the_registers(level):
    for loop in loops_of(level):
        if character(loop) in ("ps", "pd"):
            widths = Counter(i.width for i in loop if i.packed)
            full = widths[REGISTER[level]] / widths.total()
            assert full > 0.9, f"{loop[0].address:x}: bytes of the registers {dict(widths)}"


ROWS, SHORT, MATRICES = (64, 1000), (2000, 10), (200, 24)
CASES = [
    *[
        (id, dtype, shape)
        for id in ("discrete", "categorical", "normal-scale")
        for dtype in ("float32", "float64")
        for shape in (ROWS, SHORT)
    ],
    *[
        (id, dtype, ROWS)
        for id in ("discrete-raw", "categorical-cool", "normal-var", "normal-logvar")
        for dtype in ("float32", "float64")
    ],
    ("categorical-masked", "float32", ROWS),
    ("discrete", "float16", ROWS),
    ("categorical", "float16", ROWS),
    ("normal-var-logvar", "float64", ROWS),
    *[("mvn", dtype, shape) for dtype in ("float32", "float64") for shape in (SHORT, MATRICES)],
]


def share_of_scalar_loops(id, dtype, shape):
    """Give the share of time spent in loops whose arithmetic is mostly scalar."""
    entry = IDS[id]
    items, size = shape if entry.core == 1 else (shape[0], min(shape[1], 24))
    arrays = entry.inputs(dtype, (items,), size)
    counts = machine_code.sampled(lambda: entry(arrays))
    path = machine_code.module_path(klfast._kernels.isa)
    scalar = [
        (loop[0].address, loop[-1].address)
        for loop in machine_code.innermost_loops(machine_code.disassemble(path))
        if sum(i.scalar for i in loop) > sum(i.packed for i in loop)
    ]
    inside = sum(n for at, n in counts.items() if any(a <= at <= b for a, b in scalar))
    return inside / max(1, counts.total())


def sample():
    """Print the result of every case, or why there is none (called in a process of its own)."""
    reason = machine_code.why_no_execution()
    machine_code.pin()
    klfast.set_num_threads(1)
    print(json.dumps(reason or [share_of_scalar_loops(*case) for case in CASES]))


@levels
def test_time_is_spent_in_packed_loops(level):
    reason = machine_code.why_no_disassembly()
    if reason:
        pytest.skip(reason)
    if level not in klfast.config.describe()["isa_available"]:
        pytest.skip(f"this machine has no {level}")
    found = json.loads(fresh.run("import test_packed; test_packed.sample()", KLFAST_ISA=level))
    if isinstance(found, str):
        pytest.skip(found)
    shares = dict(zip(CASES, found, strict=True))
    scalar = {case: share for case, share in shares.items() if share > SCALAR_TIME}
    assert not scalar, f"shares of the time spent in loops of scalar arithmetic: {scalar}"


# The check itself


def listing(*lines):
    """Make instructions of one byte each."""
    parts = [line.partition(" ") for line in lines]
    return [Instruction(address, name, rest) for address, (name, _, rest) in enumerate(parts)]


TERM = "v{}{} {r}mm0,{r}mm1,{r}mm2"


@pytest.mark.parametrize(("lanes", "r"), [("ps", "z"), ("pd", "y"), ("ss", "x"), ("sd", "x")])
def test_loop_is_judged_by_its_arithmetic(lanes, r):
    body = [TERM.format(kind, lanes, r=r) for kind in ("mul", "add", "div", "fmadd213") * 4]
    code = listing("vaddsd xmm0,xmm1,xmm2", *body, "add rax,1", "jne 1", "ret ")
    (loop,) = machine_code.innermost_loops(code)
    assert (loop[0].address, loop[-1].name) == (1, "jne")
    assert character(loop) == lanes
    assert {i.width for i in loop if i.packed} <= {machine_code.REGISTER_BYTES[r]}
    assert character(listing("call 99", *body)) is None


def test_loop_within_a_loop_is_found():
    code = listing("nop ", "vmulps ymm0,ymm1,ymm2", "jb 1", "jmp 0", "ja 5000")
    assert [loop[0].address for loop in machine_code.innermost_loops(code)] == [1]


def test_sums_are_no_terms():
    assert character(listing(*["vaddsd xmm0,xmm1,xmm2"] * 40)) is None
