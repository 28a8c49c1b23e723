"""
klfast for PyTorch: divergences of CPU tensors, differentiable, and the losses made of them.

`kl_discrete`, `kl_categorical`, `kl_normal` and `kl_mvn` are those of `klfast` on tensors, read in
place. Memory of gradients over 32 MB is used again, once they are gone: that of up to two stays.
`install()` makes `torch.distributions.kl_divergence` use them. klfast is a CPU library:
tensors on another device are refused.
"""

from klfast.torch.distributions import install, uninstall
from klfast.torch.losses import (
    ELBO,
    distillation_loss,
    elbo,
    kl_div,
    kl_to_standard_normal,
)
from klfast.torch.operators import kl_categorical, kl_discrete, kl_mvn, kl_normal
from klfast.torch.policies import kl_penalty, policy_kl

__all__ = [
    "ELBO",
    "distillation_loss",
    "elbo",
    "install",
    "kl_categorical",
    "kl_discrete",
    "kl_div",
    "kl_mvn",
    "kl_normal",
    "kl_penalty",
    "kl_to_standard_normal",
    "policy_kl",
    "uninstall",
]
