"""Divergences with their gradients: the names of klfast's, each returns (value, gradients)."""

from klfast.grad.mvn import kl_mvn

__all__ = ["kl_mvn"]
