"""kl_discrete beside its peers, from probabilities."""

from suite import Work, parametrize

WORKS = [
    Work("discrete", "float32", 100_000, 10, floor=2.5, aim=4),
    Work("discrete", "float32", 4096, 1000, floor=2.5, aim=4),
    Work("discrete", "float32", 512, 32_000, floor=2.5, aim=4),
    Work("discrete", "float64", 20_011, 77, floor=2.5, aim=4),
    Work("discrete", "float64", 4096, 1000, floor=2.5, aim=4),
    Work("discrete", "float32", 4096, 1000, near=1e-4),
    Work("discrete", "float32", 1, 10_000_000),
]
SIZES = [
    Work("discrete", "float32", 2_000_000 // size, size)
    for size in (3, 10, 30, 100, 300, 1000, 10_000, 100_000)
]


@parametrize(WORKS)
def test_kl_discrete(work, peer, threads, measure):
    measure(work, peer, threads)
