"""A divergence by sampling, with its standard error, beside the closed form.

    python examples/monte_carlo.py [directory of the figure]

Claim: the mean of log P(x) − log Q(x) over x from P lies within four standard errors of klfast's
value, and the standard error falls as 1/√n. The closed form is that of two normals in D dimensions.
"""

import sys
from pathlib import Path

import klfast
import matplotlib.pyplot as plt
import numpy as np

D, LARGEST = 5, 200_000


def random_factor(rng):
    """Give the Cholesky factor of a well-conditioned covariance."""
    return np.tril(0.3 * rng.normal(size=(D, D)), -1) + np.diag(rng.uniform(0.7, 1.5, D))


def log_density(x, loc, factor):
    z = np.linalg.solve(factor, (x - loc).T)
    return -(z**2).sum(0) / 2 - np.log(np.diag(factor)).sum() - D * np.log(2 * np.pi) / 2


def main(directory="."):
    rng = np.random.default_rng(0)
    (loc_p, p), (loc_q, q) = [(rng.normal(size=D), random_factor(rng)) for _ in range(2)]
    exact = klfast.kl_mvn(loc_p, None, loc_q, scale_tril_p=p, scale_tril_q=q)
    x = loc_p + rng.normal(size=(LARGEST, D)) @ p.T
    terms = log_density(x, loc_p, p) - log_density(x, loc_q, q)
    numbers = np.geomspace(100, LARGEST, 30).astype(int)
    means = np.array([terms[:n].mean() for n in numbers])
    errors = np.array([terms[:n].std(ddof=1) / np.sqrt(n) for n in numbers])

    figure, axes = plt.subplots()
    axes.axhline(exact, color="black", label="closed form")
    axes.plot(numbers, means, "o-", markersize=3, label="mean of the samples")
    axes.fill_between(numbers, means - 2 * errors, means + 2 * errors, alpha=0.3)
    axes.set(xscale="log", xlabel="samples", ylabel="KL(P‖Q), nats; ± 2 standard errors")
    axes.legend()
    figure.savefig(Path(directory) / "monte_carlo.png")
    plt.close(figure)

    print(f"exact {exact:.5f}; {LARGEST} samples: {means[-1]:.5f} ± {errors[-1]:.5f}")
    assert np.all(np.abs(means - exact) < 4 * errors)
    assert np.allclose(errors * np.sqrt(numbers), errors[-1] * np.sqrt(LARGEST), rtol=0.3)


if __name__ == "__main__":
    main(*sys.argv[1:])
