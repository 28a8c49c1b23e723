"""
klfast: Kullback-Leibler divergences of batches of distributions, on the CPU.

Every function computes KL(P‖Q), p first, in nats, over one axis of NumPy arrays and broadcasts the
others. `klfast.reference` holds the definitions in plain NumPy.
"""

from importlib.metadata import version as _version

from klfast import config, grad, reference, threads
from klfast.categorical import kl_categorical
from klfast.config import show_config
from klfast.discrete import kl_discrete
from klfast.mvn import kl_mvn
from klfast.normal import kl_normal
from klfast.threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "config",
    "get_num_threads",
    "grad",
    "kl_categorical",
    "kl_discrete",
    "kl_mvn",
    "kl_normal",
    "num_threads",
    "reference",
    "set_num_threads",
    "show_config",
    "threads",
]

__version__ = _version("klfast")
