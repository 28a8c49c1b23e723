"""A variational autoencoder of scikit-learn's digits.

    python examples/vae_digits.py [directory of the figure]

Claim: the evidence lower bound rises, and klfast's divergence is the closed form.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from klfast.torch import elbo, kl_to_standard_normal
from sklearn.datasets import load_digits
from torch import nn

LATENT, EPOCHS, WARM_UP = 8, 25, 5


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


def log_likelihood(logits, x):
    """Of each image, its grey values as probabilities of black."""
    return -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def train(model, images):
    """Give the means of all terms for each epoch; β rises to 1 while it warms up."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for epoch in range(EPOCHS):
        terms = []
        for x in images[torch.randperm(len(images))].split(128):
            logits, mu, logvar = model(x)
            bound = elbo(log_likelihood(logits, x), mu, logvar, beta=min(1, epoch / WARM_UP))
            optimizer.zero_grad()
            (-bound.elbo).backward()
            optimizer.step()
            terms.append(torch.stack([bound.log_likelihood, bound.kl]).detach())
        history.append(torch.stack(terms).mean(0))
    return torch.stack(history)


def draw(model, history, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    left.plot(-history[:, 0], label="−log likelihood")
    left.plot(history[:, 1], label="KL")
    left.set(xlabel="epoch", ylabel="nats per image")
    left.legend()
    samples = torch.sigmoid(model.decoder(torch.randn(36, LATENT))).detach()
    framed = nn.functional.pad(samples.view(6, 6, 8, 8), (1, 1, 1, 1))
    tiles = framed.transpose(1, 2).reshape(60, 60).numpy()
    right.imshow(tiles, cmap="gray_r")
    right.set(title="drawn from the prior", xticks=[], yticks=[])
    figure.savefig(path)
    plt.close(figure)


def main(directory="."):
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    model = VAE()
    history = train(model, images)
    draw(model, history, Path(directory) / "vae_digits.png")
    loss = history[:, 1] - history[:, 0]
    assert loss[-1] < loss[WARM_UP] < loss[0] - 10, loss
    with torch.no_grad():
        mu, logvar = model.encoder(images).double().chunk(2, dim=-1)
        closed_form = (mu**2 + logvar.exp() - 1 - logvar).sum(-1) / 2
        torch.testing.assert_close(kl_to_standard_normal(mu, logvar), closed_form)
    print(
        f"−ELBO fell from {loss[0]:.1f} to {loss[-1]:.1f} nats per image, KL {history[-1, 1]:.1f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
