"""kl_mvn beside its peers, from means and lower Cholesky factors of two million numbers."""

from suite import Work, parametrize

SIZES = [
    Work("mvn", "float64", 2_000_000 // (2 * size**2), size)
    for size in (2, 4, 8, 16, 32, 64, 128, 256, 512)
]
WORKS = [*SIZES, Work("mvn", "float64", 4000, 16, near=1e-6)]


@parametrize(WORKS)
def test_kl_mvn(work, peer, threads, measure):
    measure(work, peer, threads)
