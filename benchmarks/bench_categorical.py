"""kl_categorical beside its peers, from logits."""

from suite import Work, parametrize

WORKS = [
    Work("categorical", "float32", 100_000, 10, floor=2.0, aim=4),
    Work("categorical", "float32", 4096, 1000, floor=2.0, aim=4),
    Work("categorical", "float32", 512, 32_000, floor=2.3, aim=4),
    Work("categorical", "float32", 64, 128_256, floor=2.3, aim=4),
    Work("categorical", "float32", 512, 32_000, near=1.4e-3, floor=1.5, aim=2.5),  # KL ≈ 1e-6
    Work("categorical", "float64", 100_000, 10, floor=1.4, aim=2.5),
    Work("categorical", "float64", 4096, 1000, floor=1.4, aim=2.5),
    Work("categorical", "float32", 4096, 1000, near=1e-4),
    Work("categorical", "float32", 1, 10_000_000),
]
SIZES = [
    Work("categorical", "float32", 2_000_000 // size, size)
    for size in (3, 10, 30, 100, 300, 1000, 10_000, 100_000)
]


@parametrize(WORKS)
def test_kl_categorical(work, peer, threads, measure):
    measure(work, peer, threads)
