"""kl_normal beside its peers, from means and standard deviations."""

from suite import Work, parametrize

WORKS = [
    *[
        Work("normal-scale", dtype, items, size, floor=2.0, aim=3)
        for items, size in ((4096, 512), (100_000, 10))
        for dtype in ("float32", "float64")
    ],
    Work("normal-scale", "float32", 4096, 512, near=1e-4),
    Work("normal-scale", "float32", 1, 10_000_000),
]
SIZES = [
    Work("normal-scale", "float32", 1_000_000 // size, size)
    for size in (3, 10, 30, 100, 300, 1000, 10_000, 100_000)
]


@parametrize(WORKS)
def test_kl_normal(work, peer, threads, measure):
    measure(work, peer, threads)
