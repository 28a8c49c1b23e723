"""Distillation of a classifier of scikit-learn's digits into a student that never sees a 3.

    python examples/distillation.py [directory of the figure]

Claim: from labels the student cannot learn what a 3 is; from the teacher it does, as that says of
every other digit how much of a 3 is in it, the louder the higher the temperature (G. Hinton, O.
Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, section 3).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from klfast.torch import distillation_loss
from sklearn.datasets import load_digits
from torch import nn

UNSEEN, STEPS = 3, 180
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def network(width):
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(model, loss):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def accuracy(model, x, labels):
    with torch.no_grad():
        return (model(x).argmax(-1) == labels).double().mean().item()


def main(directory="."):
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.data))
    x = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    labels = torch.tensor(data.target)[order]
    x, test, labels, test_labels = x[:1000], x[1000:], labels[:1000], labels[1000:]
    cross_entropy = nn.functional.cross_entropy

    teacher = train(network(128), lambda model: cross_entropy(model(x), labels))
    seen = labels != UNSEEN
    x, labels = x[seen], labels[seen]
    with torch.no_grad():
        said = teacher(x)
    students = {"labels": train(network(32), lambda model: cross_entropy(model(x), labels))}
    for t in TEMPERATURES:
        students[f"T = {t:g}"] = train(
            network(32), lambda model, t=t: distillation_loss(model(x), said, temperature=t)
        )

    threes = test_labels == UNSEEN
    right = {
        name: (accuracy(s, test[threes], test_labels[threes]), accuracy(s, test, test_labels))
        for name, s in students.items()
    }
    figure, axes = plt.subplots()
    axes.bar(list(right), [overall for _, overall in right.values()], label="all digits")
    axes.bar(list(right), [unseen for unseen, _ in right.values()], width=0.5, label="3, unseen")
    axes.set(ylabel="accuracy of the student")
    axes.set_ylim(0, 1.2)
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(Path(directory) / "distillation.png")
    plt.close(figure)
    for name, (unseen, overall) in right.items():
        print(f"from {name:7} {overall:6.1%} of all digits, {unseen:6.1%} of the 3s")
    assert right["labels"][0] == 0
    assert right["T = 8"][0] > 0.4
    assert right["T = 8"][1] > right["labels"][1]


if __name__ == "__main__":
    main(*sys.argv[1:])
