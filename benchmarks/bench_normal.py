"""kl_normal beside its peers, from means and standard deviations."""

from suite import Work, parametrize

WORKS = [
    Work("normal-scale", "float32", 4096, 512),
    Work("normal-scale", "float64", 4096, 512),
    Work("normal-scale", "float32", 100_000, 10),
    Work("normal-scale", "float64", 100_000, 10),
    Work("normal-scale", "float32", 4096, 512, near=1e-4),
]
SIZES = [
    Work("normal-scale", "float32", 1_000_000 // size, size)
    for size in (3, 10, 30, 100, 300, 1000, 10_000, 100_000)
]


@parametrize(WORKS)
def test_kl_normal(work, peer, threads, measure):
    measure(work, peer, threads)
