"""
Values and gradients of the divergences, for optimisers that work on NumPy arrays.

The functions have the names and arguments of `klfast`'s own. Each returns ``(value, *gradients)``
for the arguments named in `wrt`, the gradients of Σ cotangent · value.
"""

from klfast.grad.categorical import kl_categorical
from klfast.grad.discrete import kl_discrete
from klfast.grad.mvn import kl_mvn
from klfast.grad.normal import kl_normal

__all__ = ["kl_categorical", "kl_discrete", "kl_mvn", "kl_normal"]
