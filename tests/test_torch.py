"""Calls that alternate with PyTorch's stay fast, whichever is imported first."""

import importlib.util

import pytest

import fresh

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")

ALTERNATE = """
    import sys, time
    if sys.argv[1] == "torch first":
        import torch, klfast
    else:
        import klfast, torch
    import numpy as np
    torch.set_num_threads(2)
    klfast.set_num_threads(2)
    p = np.random.default_rng(0).random((4096, 1000), dtype=np.float32) + 0.1
    t = torch.from_numpy(p)
    ours, theirs = lambda: klfast.kl_discrete(p, p), lambda: torch.softmax(t, -1)

    def median(calls, rounds=25):
        seconds = [[] for _ in calls]
        for _ in range(rounds):
            for call, spent in zip(calls, seconds):
                start = time.perf_counter()
                call()
                spent.append(time.perf_counter() - start)
        return [sorted(spent)[rounds // 2] for spent in seconds]

    median([ours, theirs], 5)
    alone = median([ours]) + median([theirs])
    mixed = median([ours, theirs])
    print(*[m / a for m, a in zip(mixed, alone)])
"""


@pytest.mark.parametrize("order", ["torch first", "klfast first"])
def test_alternation_is_not_slow(order):
    for _ in range(3):  # a busy machine may spoil one run
        ratios = [
            float(r)
            for r in fresh.run(ALTERNATE.replace("import sys", "import sys"), order).split()
        ]
        if max(ratios) < 3:
            return
    pytest.fail(f"klfast and torch take {ratios} times as long when they alternate")
