"""One normal distribution fitted to a mixture of two, by either direction of the divergence.

    python examples/forward_and_reverse.py [directory of the figure]

Claim: the forward KL(P‖Q), minimised over Q, covers the mass of P: it matches mean and variance.
The reverse KL(Q‖P) seeks a mode. (The names are often swapped.)
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from klfast.torch import kl_categorical
from torch.distributions import Categorical, MixtureSameFamily, Normal

MODES, WIDTH, WEIGHTS = (-2.0, 3.0), 0.6, (0.4, 0.6)
X = torch.linspace(-12, 12, 4001, dtype=torch.float64)


def mixture():
    components = Normal(torch.tensor(MODES).double(), torch.full((2,), WIDTH).double())
    return MixtureSameFamily(Categorical(torch.tensor(WEIGHTS).double()), components)


def fit(divergence, start):
    """Give mean and standard deviation of the Q that minimises divergence(log Q) on the grid."""
    loc = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([loc, log_scale], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        kl = divergence(Normal(loc, log_scale.exp()).log_prob(X))
        kl.backward()
        return kl

    optimizer.step(loss)
    return loc.item(), log_scale.exp().item()


def main(directory="."):
    p = mixture()
    log_p = p.log_prob(X)  # logits: kl_categorical normalises them on the grid
    forward = fit(lambda log_q: kl_categorical(log_p, log_q), start=0.0)
    reverse = [fit(lambda log_q: kl_categorical(log_q, log_p), start) for start in MODES]

    figure, axes = plt.subplots()
    axes.fill_between(X, p.log_prob(X).exp(), color="lightgray", label="P")
    axes.plot(X, Normal(*forward).log_prob(X).exp(), label="forward KL(P‖Q): mass-covering")
    for i, q in enumerate(reverse):
        label = "reverse KL(Q‖P): mode-seeking" if i == 0 else None
        axes.plot(X, Normal(*q).log_prob(X).exp(), "--", color="C1", label=label)
    axes.set(xlim=(-7, 8), ylim=(0, 0.95), xlabel="x", ylabel="density")
    axes.legend(loc="upper left")
    figure.savefig(Path(directory) / "forward_and_reverse.png")
    plt.close(figure)

    print(f"forward: N({forward[0]:.3f}, {forward[1]:.3f}²), P has {p.mean:.3f}, {p.stddev:.3f}")
    for loc, scale in reverse:
        print(f"reverse: N({loc:.3f}, {scale:.3f}²)")
    assert math.isclose(forward[0], p.mean, abs_tol=1e-3)
    assert math.isclose(forward[1], p.stddev, abs_tol=1e-3)
    for (loc, scale), mode in zip(reverse, MODES, strict=True):
        assert abs(loc - mode) < 0.05
        assert abs(scale - WIDTH) < 0.05


if __name__ == "__main__":
    main(*sys.argv[1:])
