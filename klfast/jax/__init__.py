"""
klfast for JAX on the CPU: differentiable, under ``jit``, ``grad`` and ``vmap``.

The functions are those of `klfast`, with the same formulas, bounds and edge cases, computed by the
same kernels: XLA calls them on its own buffers, without Python, without a copy of what is broadcast
or of what ``vmap`` leaves alone. What JAX does not allow is different:

* Bad values, covariances that are not positive definite among them, give NaN and never raise.
* A result is written where XLA wants it: there is no ``out``.
* Types are promoted as JAX promotes them: without ``jax_enable_x64`` everything is float32.
* Gradients are of first order: differentiating one raises NotImplementedError, forward mode
  (``jax.jvp``) TypeError.
* A computation that XLA runs is not interrupted by Ctrl-C.

`klfast.set_num_threads` applies; ``with klfast.num_threads(n):`` may not, as XLA is free to compute
in a thread of its own.

A gradient costs one pass more over each row, and comes with the value; the value may then differ in
its last bit. What is broadcast in the call is summed back in double, without a temporary of the
broadcast size; what ``vmap`` broadcasts JAX sums itself. Rows whose cotangent is 0 have gradient 0.

Where this JAX cannot call the kernels so (`uses_ffi` is False), it calls back into Python, which
gives the same values and costs some 300 µs a call rather than 10 (``benchmarks/bench_jax.py``).
"""

from klfast.jax._calls import uses_ffi
from klfast.jax.categorical import kl_categorical
from klfast.jax.discrete import kl_discrete
from klfast.jax.mvn import kl_mvn
from klfast.jax.normal import kl_normal

__all__ = ["kl_categorical", "kl_discrete", "kl_mvn", "kl_normal", "uses_ffi"]
