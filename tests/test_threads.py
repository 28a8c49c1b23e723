"""Threads: how many, the same bits from any number, and no harm to anybody else."""

import os
import signal
import subprocess
import sys
import threading
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import klfast
import numpy as np
import pytest

import fresh
from registry import DTYPES, ENTRIES, IDS, PLAIN

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")
ASK = "import klfast; print(klfast.get_num_threads())"


def default_threads(**variables):
    return int(fresh.run(ASK, **variables))


def test_default_is_at_most_the_cpus():
    assert 1 <= default_threads() <= CPUS


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_default_follows_the_affinity():
    one = min(os.sched_getaffinity(0))
    assert fresh.run(f"import os; os.sched_setaffinity(0, [{one}]); {ASK}").strip() == "1"


@pytest.mark.parametrize("name", ["KLFAST_NUM_THREADS", "OMP_NUM_THREADS"])
def test_variables_lower_the_default(name):
    full = default_threads()
    assert default_threads(**{name: "1"}) == 1
    assert default_threads(**{name: "2"}) == min(2, full)
    assert default_threads(**{name: "1000"}) == full
    assert default_threads(**{name: ""}) == full


def test_own_variable_comes_first():
    full = default_threads()
    assert default_threads(KLFAST_NUM_THREADS="2", OMP_NUM_THREADS="1") in (1, min(2, full))
    assert default_threads(KLFAST_NUM_THREADS="1", OMP_NUM_THREADS="2") == 1
    assert default_threads(OMP_NUM_THREADS="1,2") == 1  # OpenMP's list for nested regions


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5"])
def test_bad_variable_is_named(value):
    done = fresh.attempt(ASK, KLFAST_NUM_THREADS=value)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "ValueError")), last
    assert "KLFAST_NUM_THREADS" in last
    assert value in last


@pytest.fixture
def restored():
    before = klfast.get_num_threads()
    yield before
    klfast.set_num_threads(before)


def test_a_number_asked_for_is_obeyed(restored):
    for n in (1, 2, 3, 64, np.int64(5)):
        klfast.set_num_threads(n)
        assert klfast.get_num_threads() == n


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (10**12, (ValueError, OverflowError)),
        (1.5, TypeError),
        ("2", TypeError),
        ([2], TypeError),
    ],
)
def test_bad_numbers(n, error, restored):
    with pytest.raises(error, match=r"\bn\b"):
        klfast.set_num_threads(n)
    with pytest.raises(error, match=r"\bn\b"), klfast.num_threads(n):
        pass
    assert klfast.get_num_threads() == restored


def test_context_manager_restores(restored):
    with klfast.num_threads(2):
        assert klfast.get_num_threads() == 2
        with klfast.num_threads(7):
            assert klfast.get_num_threads() == 7
        assert klfast.get_num_threads() == 2
    assert klfast.get_num_threads() == restored
    with pytest.raises(KeyError), klfast.num_threads(3):
        raise KeyError
    assert klfast.get_num_threads() == restored


def with_threads(n, call):
    with klfast.num_threads(n):
        return np.asarray(call())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
def test_same_bits_for_any_number(entry, dtype):
    shapes = [((1,), 3_000_000), ((3,), 400_000), ((997,), 1000), ((100_000,), 7)]
    if entry.core == 2:
        shapes = [((20_000,), 4), ((2_000,), 17), ((100_001,), 2)]
    for batch, size in shapes:
        few = entry.inputs(dtype, (min(batch[0], 100),), min(size, 10_000), near=0.3)
        arrays = {
            name: np.resize(a, (*batch, *[size] * entry.core_axes(name)))
            if size > 10_000
            else np.resize(a, (*batch, *a.shape[1:]))
            for name, a in few.items()
        }
        one = with_threads(1, lambda a=arrays: entry(a))
        for n in (2, 3):
            np.testing.assert_array_equal(with_threads(n, lambda a=arrays: entry(a)), one)


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
def test_same_bits_for_all_pairs(entry):
    size = min(300, entry.max_size)
    p, q = entry.inputs("float32", (60, 1), size), entry.inputs("float32", (1, 70), size)
    arrays = {name: (p if name.endswith("p") else q)[name] for name in p}
    one = with_threads(1, lambda: entry(arrays))
    assert one.shape == (60, 70)
    for n in (2, 3):
        np.testing.assert_array_equal(with_threads(n, lambda: entry(arrays)), one)
    single = {name: a.squeeze()[5] for name, a in arrays.items()}
    assert entry(single) == one[5, 5]


def test_many_more_threads_than_work():
    arrays = IDS["discrete"].inputs("float64", (3,), 200_000)
    one = with_threads(1, lambda: IDS["discrete"](arrays))
    np.testing.assert_array_equal(with_threads(50, lambda: IDS["discrete"](arrays)), one)


def long_row(function):
    """Give a row that takes no memory and the function 0.1 s or more."""
    length, seconds = 20_000_000, 0.0
    while seconds < 0.1:
        length *= 2
        row = np.broadcast_to(np.float64(0.5), length)
        seconds = min(timeit.repeat(partial(function, row, row), number=1, repeat=2))
    return row


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("function", [klfast.kl_discrete, klfast.kl_categorical])
def test_gil_is_released_for_one_long_row(function, threads):
    with klfast.num_threads(threads):
        a = long_row(function)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        with klfast.num_threads(threads):
            start = time.perf_counter()
            function(a, a)
            end = time.perf_counter()
    finally:
        stop.set()
        ticker.join()
    inside = [t for t in ticks if start + 0.01 < t < end - 0.01]
    assert end - start > 0.04, "too short a call to tell"
    assert len(inside) >= 3, f"{len(inside)} ticks in {end - start:.3f} s"


def test_concurrent_calls_agree():
    cases = [(entry, entry.inputs("float32", (4000,), min(100, e.max_size)))
             for e in PLAIN for entry in [e]]  # fmt: skip
    want = [entry(arrays) for entry, arrays in cases]
    with ThreadPoolExecutor(6) as pool:
        jobs = [(i, pool.submit(cases[i][0], cases[i][1])) for i in list(range(len(cases))) * 12]
        for i, job in jobs:
            np.testing.assert_array_equal(job.result(timeout=60), want[i])


def test_thread_count_of_a_with_block_stays_in_its_thread_or_is_restored(restored):
    def work(n):
        for _ in range(50):
            with klfast.num_threads(n):
                assert klfast.get_num_threads() == n
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [1, 2, 3, 4]))
    assert klfast.get_num_threads() == restored


LIMITS = """
    import os
    import numpy as np, threadpoolctl, klfast
    a = np.broadcast_to(np.float64(0.5), 40_000_000)  # enough for hundreds of threads
    before = set(os.listdir("/proc/self/task"))
    with threadpoolctl.threadpool_limits(1):
        print(klfast.get_num_threads())
        klfast.kl_discrete(a, a)
    print(len(set(os.listdir("/proc/self/task")) - before))
    klfast.kl_discrete(a, a)
    print(len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are not listed")
@pytest.mark.skipif(not klfast.config.describe()["openmp"], reason="built without OpenMP")
def test_threadpoolctl_limits_threads():
    threads, started, started_without_limit = map(int, fresh.run(LIMITS).split())
    assert threads == 1
    assert started == 0
    assert started_without_limit == default_threads() - 1  # else the count says nothing


INTERRUPTED = """
    import sys, time
    import numpy as np, klfast
    klfast.set_num_threads(int(sys.argv[1]))
    shape = {"row": (10**11,), "rows": (10**8, 1000)}[sys.argv[2]]
    a = np.broadcast_to(np.float32(0.5), shape)
    out = np.empty(shape[:-1], np.float32)
    if out.ndim == 0:
        out[()] = 7
    print("ready", flush=True)
    try:
        klfast.kl_discrete(a, a, out=out)
    except KeyboardInterrupt:
        assert out.ndim or out == 7
        assert klfast.kl_discrete([0.5, 0.5], [0.5, 0.5]) == 0
        b = np.broadcast_to(np.float32(0.5), 3_000_000)
        assert klfast.kl_discrete(b, b) == 0
        print("interrupted", flush=True)
"""


@posix
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", ["row", "rows"])
def test_ctrl_c_answers_soon(shape, threads):
    with subprocess.Popen(
        fresh.command(INTERRUPTED, threads, shape),
        env=fresh.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout.readline() == "ready\n", child.stderr.read()
            time.sleep(0.6)
            start = time.perf_counter()
            child.send_signal(signal.SIGINT)
            printed, errors = child.communicate(timeout=15)
            waited = time.perf_counter() - start
        finally:
            child.kill()
    assert printed == "interrupted\n", errors
    assert waited < 5, f"{waited:.2f} s"


INTERRUPTED_GRADIENT = """
    import os, signal, sys, threading, time
    import numpy as np, klfast, klfast.grad
    klfast.set_num_threads(int(sys.argv[1]))
    n = 400_000_000
    row = np.broadcast_to(np.float32(0.5), n)
    call = {
        "discrete": lambda **o: klfast.grad.kl_discrete(row, row, wrt="q", **o),
        "categorical": lambda **o: klfast.grad.kl_categorical(row, row, wrt="logits_q", **o),
        "normal": lambda **o: klfast.grad.kl_normal(row, row, row, row, wrt="scale_q", **o),
        "standard": lambda **o: klfast.grad.kl_normal(row, logvar_p=row, wrt="logvar_p", **o),
        "constant": lambda **o: klfast.grad.kl_discrete(row, row, wrt="q", cotangent=0.0, **o),
    }[sys.argv[2]]
    gradient = np.empty(n, np.float32)
    gradient[0] = gradient[-1] = 7

    def interrupt():
        while gradient[0] == 7:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        call(out=(gradient,))
    except KeyboardInterrupt:
        assert gradient[-1] == 7, "written to the end"
        print("interrupted", flush=True)
"""


@posix
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["discrete", "categorical", "normal", "standard", "constant"])
def test_ctrl_c_answers_within_the_gradient_of_one_row(kind, threads):
    """The signal comes when the first element is written; the last one never is."""
    assert fresh.run(INTERRUPTED_GRADIENT, threads, kind) == "interrupted\n"


TRIANGLE = """
    import sys, time
    import numpy as np, klfast

    def identity(n):  # a matrix that takes no memory
        row = np.zeros(2 * n - 1)
        row[n - 1] = 1
        return np.lib.stride_tricks.as_strided(row[n - 1 :], (n, n), (-8, 8))
"""

INTERRUPTED_IN_A_MATRIX = (
    TRIANGLE
    + """
    kind, size = sys.argv[2:]
    klfast.set_num_threads(int(sys.argv[1]))
    eye, loc = identity(int(size)), np.zeros(int(size))
    sides = {f"{kind}_p": eye, f"{kind}_q": eye}
    print("ready", flush=True)
    try:
        klfast.kl_mvn(loc, loc_q=loc, **sides)
    except KeyboardInterrupt:
        print(time.monotonic(), flush=True)
        assert klfast.kl_mvn(loc[:300], eye[:300, :300]) == 0
        print("interrupted", flush=True)
"""
)


@posix
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kind", "size"), [("cov", 10_000), ("scale_tril", 20_000)])
def test_ctrl_c_answers_within_one_matrix(threads, kind, size):
    """A call that would take a minute."""
    with subprocess.Popen(
        fresh.command(INTERRUPTED_IN_A_MATRIX, threads, kind, size),
        env=fresh.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout.readline() == "ready\n", child.stderr.read()
            time.sleep(0.7)
            start = time.monotonic()
            child.send_signal(signal.SIGINT)
            printed, errors = child.communicate(timeout=30)
        finally:
            child.kill()
    assert printed.endswith("interrupted\n"), errors
    waited = float(printed.split()[0]) - start
    assert 0 < waited < 5, f"{waited:.2f} s"


NO_MEMORY = (
    TRIANGLE
    + """
    import pathlib, resource, threading

    eye, loc = identity(20_000), np.zeros(20_000)
    klfast.kl_mvn(loc[:300], eye[:300, :300])  # whatever is allocated once
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (1 << 30)  # a third of what one call asks for
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))

    def refused():
        some = np.broadcast_to(loc, (3, *loc.shape)), np.broadcast_to(eye, (3, *eye.shape))
        for arguments in ((loc, eye), (loc, eye, loc, eye), some):
            out = np.full(arguments[0].shape[:-1], 7.0)
            try:
                klfast.kl_mvn(*arguments, out=out)
            except MemoryError:
                print("MemoryError", out, flush=True)
        assert klfast.kl_mvn(loc[:300], eye[:300, :300]) == 0

    refused()
    worker = threading.Thread(target=refused)
    worker.start()
    worker.join()
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_no_memory_is_an_error_of_the_calling_thread():
    assert (
        fresh.run(NO_MEMORY, KLFAST_NUM_THREADS="2").splitlines()
        == [
            "MemoryError 7.0",
            "MemoryError 7.0",
            "MemoryError [7. 7. 7.]",
        ]
        * 2
    )
