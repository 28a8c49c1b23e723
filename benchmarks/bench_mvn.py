"""kl_mvn beside its peers, in batches of two million numbers: means and lower Cholesky factors, or
means and covariances."""

from suite import Work, parametrize

FLOORS = {2: 10, 3: 7, 4: 5, 8: 4, 16: 3.3, 32: 2.4, 64: 2.2, 128: 1.6, 256: 1.1, 512: 0.95}


def works(dtype: str, covariances: bool) -> list[Work]:
    return [
        Work(
            "mvn",
            dtype,
            2_000_000 // (2 * size**2),
            size,
            floor=floor,
            aim=2 * floor,
            covariances=covariances,
        )
        for size, floor in FLOORS.items()
    ]


SIZES = works("float64", covariances=False)
WORKS = [
    *SIZES,
    *works("float64", covariances=True),
    *works("float32", covariances=False),
    *works("float32", covariances=True),
    Work("mvn", "float64", 4000, 16, near=1e-6),
]


@parametrize(WORKS)
def test_kl_mvn(work, peer, threads, measure):
    measure(work, peer, threads)
