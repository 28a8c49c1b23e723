"""The penalty of RLHF estimated from sampled tokens by k1, k2 and k3, against the exact value.

    python examples/rlhf_penalty.py [directory of the figure]

Claim: k1 and k3 are right within their standard errors, k3 with the smaller one and never negative;
k2 is biased once the policy has moved; tokens of padding cost nothing.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from klfast.torch import kl_penalty
from torch.distributions import Categorical

SEQUENCES, LENGTH, VOCABULARY = 400, 64, 1000
DISTANCES = (0.01, 0.03, 0.1, 0.3, 1.0)
ESTIMATORS = ("k1", "k2", "k3")


def estimate(distance):
    """Give the exact mean penalty, and mean and standard error of each estimator."""
    reference = 2 * torch.randn(LENGTH, VOCABULARY)
    policy = reference + distance * torch.randn(LENGTH, VOCABULARY)
    exact = kl_penalty(policy, reference, estimator="exact").double().mean().item()
    tokens = Categorical(logits=policy).sample((SEQUENCES,))
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (SEQUENCES, 1))
    mask = torch.arange(LENGTH) < lengths
    both = (x.expand(SEQUENCES, -1, -1) for x in (policy, reference))
    chosen = [torch.log_softmax(x[0], -1).gather(-1, tokens.T).T for x in both]
    found = {}
    for name in ESTIMATORS:
        penalty = kl_penalty(*chosen, estimator=name, mask=mask)
        assert (penalty[~mask] == 0).all()
        assert name == "k1" or (penalty >= 0).all()
        # each position has its own exact value: means over positions of means over sequences
        k, n = penalty.double(), mask.sum(0)
        mean = k.sum(0) / n
        variance = ((k - mean) ** 2 * mask).sum(0) / n**2
        found[name] = (mean.mean().item(), variance.sum().sqrt().item() / LENGTH)
    return exact, found


def main(directory="."):
    torch.manual_seed(0)
    results = {distance: estimate(distance) for distance in DISTANCES}
    figure, axes = plt.subplots()
    for name in ESTIMATORS:
        ratios = [found[name][0] / exact for exact, found in results.values()]
        errors = [2 * found[name][1] / exact for exact, found in results.values()]
        axes.errorbar(DISTANCES, ratios, errors, fmt="o-", capsize=3, label=name)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xscale="log", ylim=(0, 2))
    axes.set(xlabel="distance of policy and reference", ylabel="estimate ± 2 s.e., by exact value")
    axes.legend()
    figure.savefig(Path(directory) / "rlhf_penalty.png")
    plt.close(figure)
    for distance, (exact, found) in results.items():
        shown = ", ".join(f"{name} {m:.3g} ± {e:.1g}" for name, (m, e) in found.items())
        print(f"distance {distance}: exact {exact:.3g}; {shown}")
        for name in ("k1", "k3"):
            assert abs(found[name][0] - exact) < 4 * found[name][1], (distance, name)
        assert found["k3"][1] < found["k1"][1]
    mean, error = found["k2"]
    assert abs(mean - exact) > 4 * error, "k2 is biased at the largest distance"


if __name__ == "__main__":
    main(*sys.argv[1:])
