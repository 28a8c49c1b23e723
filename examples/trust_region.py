"""Policy steps within a trust region: a mass on a line that is to come to rest at the origin.

    python examples/trust_region.py [directory of the figure]

Claim: every step keeps the mean KL(old‖new) below δ, found by line search, and the reward rises.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from klfast.torch import policy_kl
from torch import nn
from torch.distributions import Categorical

DELTA, STEPS, BATCH, HORIZON = 0.02, 30, 64, 40
FORCES = torch.tensor([-1.0, 0.0, 1.0])


def roll_out(policy):
    """Give states (time, batch, 2), actions and rewards of a batch of episodes."""
    state = torch.randn(BATCH, 2)
    states, actions, rewards = [], [], []
    for _ in range(HORIZON):
        with torch.no_grad():
            action = Categorical(logits=policy(state)).sample()
        states.append(state)
        position, speed = state.unbind(-1)
        speed = speed + 0.2 * FORCES[action]
        state = torch.stack([position + 0.2 * speed, speed], -1)
        actions.append(action)
        rewards.append(-(state**2).sum(-1))
    return torch.stack(states), torch.stack(actions), torch.stack(rewards)


def improve(policy):
    """Take the largest of the halved steps along the gradient that stays within the region and
    improves the surrogate; give its divergence and the mean reward before it."""
    states, actions, rewards = roll_out(policy)
    to_come = rewards.flip(0).cumsum(0).flip(0)
    advantage = to_come - to_come.mean(1, keepdim=True)
    advantage = advantage / advantage.std()
    old = policy(states).detach()
    old_log = Categorical(logits=old).log_prob(actions)

    def surrogate(logits):
        return ((Categorical(logits=logits).log_prob(actions) - old_log).exp() * advantage).mean()

    parameters = list(policy.parameters())
    before = nn.utils.parameters_to_vector(parameters).detach()
    gradient = torch.autograd.grad(surrogate(policy(states)), parameters)
    direction = nn.utils.parameters_to_vector(gradient)
    with torch.no_grad():
        for halvings in range(20):
            nn.utils.vector_to_parameters(before + 20 * 0.5**halvings * direction, parameters)
            new = policy(states)
            kl = policy_kl(old, new).item()
            if kl <= DELTA and surrogate(new) > 0:
                return kl, rewards.mean().item()
        nn.utils.vector_to_parameters(before, parameters)
    return 0.0, rewards.mean().item()


def main(directory="."):
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 3))
    kls, rewards = zip(*(improve(policy) for _ in range(STEPS)), strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    left.plot(rewards)
    left.set(xlabel="step", ylabel="mean reward")
    right.plot(kls, ".")
    right.axhline(DELTA, color="black", linestyle="--")
    right.set(xlabel="step", ylabel="KL(old‖new), nats")
    figure.savefig(Path(directory) / "trust_region.png")
    plt.close(figure)
    print(f"mean reward from {rewards[0]:.2f} to {rewards[-1]:.2f}; KL at most {max(kls):.4f}")
    assert max(kls) <= DELTA
    assert rewards[-1] > rewards[0] / 3, rewards


if __name__ == "__main__":
    main(*sys.argv[1:])
