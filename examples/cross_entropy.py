"""Cross-entropy = entropy + divergence, on where the ink of scikit-learn's digits is.

    python examples/cross_entropy.py

Claim: H(P, Q) = H(P) + KL(P‖Q), P the distribution of the ink of one digit over 64 pixels, Q that
of all; so a code made for all digits costs KL(P‖Q) bits a drop of ink more than one made for P.
"""

import klfast
import numpy as np
from sklearn.datasets import load_digits


def main():
    data = load_digits()
    ink = np.array([data.data[data.target == digit].sum(0) for digit in range(10)])
    p, q = ink / ink.sum(-1, keepdims=True), ink.sum(0) / ink.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log2(p), 0).sum(-1)
        cross_entropy = -np.where(p > 0, p * np.log2(q), 0).sum(-1)
    divergence = klfast.kl_discrete(ink, ink.sum(0), base=2)  # counts will do
    print("digit   H(P, Q) =   H(P) + KL(P‖Q)   bits")
    for digit in range(10):
        print(
            f"{digit:5} {cross_entropy[digit]:9.4f} {entropy[digit]:8.4f} {divergence[digit]:9.4f}"
        )
    np.testing.assert_allclose(cross_entropy, entropy + divergence, rtol=1e-13)


if __name__ == "__main__":
    main()
