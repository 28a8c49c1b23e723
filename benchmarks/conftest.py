"""The one way every benchmark goes: check the values of a peer, then time it."""

import pytest

from peers import KLFAST
from suite import TOLERANCE, error_of, quiet_threads, why_not


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few items: see that everything runs")


@pytest.fixture
def measure(benchmark, request):
    def run(work, peer, threads):
        reason = why_not(work, peer)
        if reason:
            pytest.skip(reason)
        if request.config.getoption("--quick"):
            work = work.smaller()
        benchmark.group = f"{work.function} {work.id}, {threads} thread{'s' * (threads > 1)}"
        with quiet_threads(peer, threads):
            call = peer.prepare(work.inputs())
            error = error_of(work, call())
            if error > TOLERANCE[work.dtype]:
                wrong = f"{peer.name} is wrong: relative error {error:.1g}"
                assert peer.library is not KLFAST, wrong
                pytest.skip(wrong)
            benchmark.extra_info.update(work=work.id, peer=peer.name, threads=threads, error=error)
            benchmark.extra_info["function"] = work.function
            benchmark(call)

    return run
