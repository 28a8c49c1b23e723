"""klfast.jax beside jax.jit: one small call, by XLA and through Python, and value and gradient of a
distillation loss, on one thread with
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"."""

import klfast
import numpy as np
import pytest

jax = pytest.importorskip("jax")
kj = pytest.importorskip("klfast.jax")


def ours(p, q):
    return klfast.jax.kl_categorical(p, q)


def plain(p, q):
    p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
    return (jax.numpy.exp(p) * (p - q)).sum(-1)


def logits(*shape):
    p, q = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    return jax.numpy.asarray(p), jax.numpy.asarray(p + q / 2)


@pytest.mark.parametrize("way", ["ffi", "python", "jax"])
def test_small_call(way, benchmark, monkeypatch):
    benchmark.group = "jax: one call, K = 10"
    monkeypatch.setattr(kj._calls, "uses_ffi", way == "ffi")
    jax.clear_caches()
    call = jax.jit(plain if way == "jax" else ours)
    arrays = logits(10)
    call(*arrays)
    benchmark(lambda: call(*arrays).block_until_ready())
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("shape", [(512, 32_000), (4096, 1000)], ids=str)
@pytest.mark.parametrize("function", [ours, plain], ids=lambda f: f.__name__)
def test_distillation(function, shape, benchmark):
    benchmark.group = f"jax: value and gradient of the student, {shape}"
    call = jax.jit(jax.value_and_grad(lambda q, p: function(p, q).mean()))
    p, q = logits(*shape)
    call(q, p)
    klfast.set_num_threads(1)
    benchmark(lambda: jax.block_until_ready(call(q, p)))
