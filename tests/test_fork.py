"""A forked child that calls klfast after its parent used threads does not hang."""

import sys

import pytest

import fresh

pytestmark = pytest.mark.skipif(
    not hasattr(sys, "getswitchinterval") or sys.platform == "win32", reason="needs fork"
)

SETUP = """
    import os, sys, time, warnings
    import numpy as np, klfast
    warnings.simplefilter("ignore", DeprecationWarning)  # Python's own about fork and threads
    klfast.set_num_threads(2)
    rng = np.random.default_rng(0)
    p, q = rng.random((2, 4000, 300), dtype=np.float32)

    def work(i=0):
        return klfast.kl_discrete(p, q).tobytes()

    def wait_for(pid, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        sys.exit("the child hangs")

    def child(right):
        os._exit(0 if work() == right else 3)

    right = work()
"""

CASES = {
    "os.fork": """
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            child(right)
        assert wait_for(pid) == 0
        assert work() == right
    """,
    "grandchild": """
    pid = os.fork()
    if pid == 0:
        assert work() == right
        grandchild = os.fork()
        if grandchild == 0:
            child(right)
        os._exit(wait_for(grandchild, 10))
    assert wait_for(pid) == 0
    """,
    "fork from C": """
    import ctypes
    pid = ctypes.PyDLL(None).fork()  # runs none of Python's hooks
    if pid == 0:
        child(right)
    assert wait_for(pid) == 0
    assert work() == right
    """,
    "fork from C, then from Python": """
    import ctypes
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        pid = os.fork()
        if pid == 0:
            child(right)
        os._exit(wait_for(pid, 10))
    assert wait_for(pid) == 0
    """,
    "Python thread at work": """
    import threading
    stop = threading.Event()
    def busy():
        while not stop.is_set():
            work()
    threads = [threading.Thread(target=busy) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(10):
        time.sleep(0.01)
        pid = os.fork()
        if pid == 0:
            child(right)
        assert wait_for(pid) == 0
    stop.set()
    for t in threads:
        t.join()
    assert work() == right
    """,
    "multiprocessing": """
    import multiprocessing
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        assert pool.map_async(work, range(6)).get(timeout=30) == [right] * 6
    assert work() == right
    """,
}


@pytest.mark.parametrize("case", CASES)
def test_child_does_not_hang(case):
    fresh.run(SETUP + CASES[case], timeout=60)
