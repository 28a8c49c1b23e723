"""The one way every benchmark goes: check the values of a peer, then time it."""

import warnings

import klfast
import pytest

from peers import COMPILED, KLFAST, LIBRARIES
from suite import error_of, is_wrong, quiet_threads, why_not


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few items: see that everything runs")


def pytest_report_header():
    missing = [library.name for library in LIBRARIES if not library.installed]
    return f"not on this machine: {', '.join(missing)}" if missing else None


def pytest_collection_modifyitems(config, items):
    """A quick run takes the first work of each dtype and way to call, and compiles it once; of two
    layouts the one in question, whose values are compared with the other's."""
    if not config.getoption("--quick"):
        return
    first = {}
    dropped = []
    for item in items:
        case = item.callspec.params if hasattr(item, "callspec") else {}
        if "work" in case:
            work = case["work"]
            wanted = first.setdefault((work.entry, work.dtype, work.covariances), work)
            compiled_again = case["peer"].library is COMPILED and case["threads"] > 1
            if work is not wanted or compiled_again:
                dropped.append(item)
        elif "side" in case and (case["side"], case["threads"]) != ("klfast", 1):
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


def group(name, threads):
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


@pytest.fixture
def measure(benchmark, request):
    def run(work, peer, threads):
        reason = why_not(work, peer)
        if reason:
            pytest.skip(reason)
        if request.config.getoption("--quick"):
            work = work.smaller()
        benchmark.group = group(work.name, threads)
        with quiet_threads(peer, threads):
            call = peer.prepare(work.inputs())
            error = error_of(work, call())
            if is_wrong(work, error):
                wrong = f"{peer.name} is wrong: relative error {error:.1g}"
                assert peer.library is not KLFAST, wrong
                pytest.skip(wrong)
            benchmark.extra_info.update(work=work.id, peer=peer.name, threads=threads, error=error)
            benchmark.extra_info["function"] = work.function
            benchmark(call)

    return run


@pytest.fixture
def contrasted(benchmark):
    def run(contrast, side, threads):
        benchmark.group = group(contrast.name, threads)
        with klfast.num_threads(threads):
            calls = contrast.calls()
            contrast.assert_same(*(call() for call in calls.values()))
            benchmark.extra_info.update(
                function=contrast.function, work=contrast.what, peer=side, threads=threads
            )
            benchmark(calls[side])

    return run


@pytest.fixture
def trained(benchmark, request):
    def run(training, side, threads):
        import training as losses

        library = losses.SIDES[training.loss][side][0]
        if not library.installed:
            pytest.skip(f"needs {library.module}")
        if request.config.getoption("--quick"):
            training = training.smaller()
        benchmark.group = group(training.name, threads)
        with library.threads(threads), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = training.prepare(side)
            training.check(call(), losses.exact(training))
            benchmark.extra_info.update(
                function=training.loss, work=training.name, peer=side, threads=threads
            )
            benchmark(call)

    return run
