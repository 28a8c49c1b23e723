"""Losses of a training loop, forward and backward: klfast.torch beside the same formula in eager
PyTorch, torch.compile and jax.jit, from the arrays to the gradients."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from peers import COMPILED, JAX, KLFAST, TORCH, Library, _torch_mvn, jax_mvn
from registry import IDS
from timing import Contestant, interleave, ratio

if importlib.util.find_spec("torch"):
    import klfast.torch
    import torch
    import torch.nn.functional as F
if importlib.util.find_spec("jax"):
    import jax
    import jax.numpy as jnp

Arrays = dict[str, np.ndarray]
Loss = Callable[..., Any]
TOLERANCE = {"float32": 1e-3, "float64": 1e-9}  # of a gradient, beside its largest element


@dataclass(frozen=True)
class Training:
    """`wanted`: the arrays whose gradients are; `floor`: how many times klfast's time the best of
    the others, or of the `rivals`, should take, on one thread."""

    loss: str
    entry: str
    dtype: str
    shape: tuple[int, int]
    wanted: tuple[str, ...]
    floor: float
    threaded: bool = True
    rivals: tuple[str, ...] = ("PyTorch", "torch.compile", "jax.jit")

    @property
    def what(self) -> str:
        return f"{self.loss} {self.dtype} {'×'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        return f"{self.what}, forward and backward"

    def smaller(self) -> Training:
        items, size = self.shape
        return replace(self, shape=(max(1, min(items, 20_000 // size)), size))

    def inputs(self) -> Arrays:
        items, size = self.shape
        arrays = IDS[self.entry].inputs(self.dtype, (items,), size)
        return {name: a for name, a in arrays.items() if not self.skips(name)}

    def skips(self, name: str) -> bool:
        """A VAE's prior is no argument."""
        return self.loss == "vae" and name.endswith("_q")

    def prepare(self, side: str) -> Callable[[], list[Any]]:
        """Give a call without arguments that computes the gradients; arrays are converted here."""
        library, loss = SIDES[self.loss][side]
        make = jax_gradients if library is JAX else torch_gradients
        return make(library, loss, self.inputs(), self.wanted)

    def check(self, gradients: list[Any], exact: list[Any]) -> None:
        for name, g, w in zip(self.wanted, gradients, exact, strict=True):
            got, want = np.asarray(g, np.float64), np.asarray(w, np.float64)
            if name.startswith("scale_tril"):
                got, want = np.tril(got), np.tril(want)
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < TOLERANCE[self.dtype], f"{name}: error {error:.1g}"

    def exact(self) -> list[Any]:
        """The gradients of the plain formula in double."""
        double = {name: a.astype(np.float64) for name, a in self.inputs().items()}
        loss = SIDES[self.loss]["PyTorch"][1]
        return torch_gradients(TORCH, loss, double, self.wanted)()


def torch_gradients(
    library: Library, loss: Loss, arrays: Arrays, wanted: tuple[str, ...]
) -> Callable[[], list[Any]]:
    tensors = {n: torch.from_numpy(a).requires_grad_(n in wanted) for n, a in arrays.items()}
    targets = [tensors[name] for name in wanted]
    f = library.compile(loss)
    return lambda: list(torch.autograd.grad(f(**tensors), targets))


def jax_gradients(
    library: Library, loss: Loss, arrays: Arrays, wanted: tuple[str, ...]
) -> Callable[[], list[Any]]:
    converted = {name: library.convert(a) for name, a in arrays.items()}
    fixed = {name: x for name, x in converted.items() if name not in wanted}
    moving = {name: converted[name] for name in wanted}
    gradient = library.compile(jax.value_and_grad(lambda moving, fixed: loss(**moving, **fixed)))

    def call() -> list[Any]:
        found = jax.block_until_ready(gradient(moving, fixed))[1]
        return [found[name] for name in wanted]

    return call


# Distillation: the student is q


def klfast_distillation(logits_p, logits_q):
    return klfast.torch.distillation_loss(logits_q, logits_p, temperature=1.0)


def torch_distillation(logits_p, logits_q):
    log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def jax_distillation(logits_p, logits_q):
    log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()


# The divergence of a VAE, from means and log-variances


def klfast_vae(loc_p, logvar_p):
    return klfast.torch.kl_to_standard_normal(loc_p, logvar_p, reduction="mean")


def torch_vae(loc_p, logvar_p):
    return -0.5 * (1 + logvar_p - loc_p.square() - logvar_p.exp()).sum(-1).mean()


def jax_vae(loc_p, logvar_p):
    return -0.5 * (1 + logvar_p - jnp.square(loc_p) - jnp.exp(logvar_p)).sum(-1).mean()


# Multivariate normals, from means and Cholesky factors


def klfast_mvn(loc_p, scale_tril_p, loc_q, scale_tril_q):
    kl = klfast.torch.kl_mvn(
        loc_p, None, loc_q, scale_tril_p=scale_tril_p, scale_tril_q=scale_tril_q
    )
    return kl.mean()


def torch_mvn(**arrays):
    return _torch_mvn(**arrays).mean()


def jax_mvn_mean(**arrays):
    return jax_mvn(**arrays).mean()


def sides(ours: Loss, theirs: Loss, in_jax: Loss) -> dict[str, tuple[Library, Loss]]:
    return {
        "klfast": (KLFAST, ours),
        "PyTorch": (TORCH, theirs),
        "torch.compile": (COMPILED, theirs),
        "jax.jit": (JAX, in_jax),
    }


SIDES = {
    "distillation": sides(klfast_distillation, torch_distillation, jax_distillation),
    "vae": sides(klfast_vae, torch_vae, jax_vae),
    "mvn": sides(klfast_mvn, torch_mvn, jax_mvn_mean),
}
STUDENT = ("logits_q",)
POSTERIOR = ("loc_p", "logvar_p")
BOTH = ("loc_p", "scale_tril_p", "loc_q", "scale_tril_q")
WORKS = [
    Training("distillation", "categorical", "float32", (512, 32_000), STUDENT, floor=2.0),
    Training("distillation", "categorical", "float32", (4096, 1000), STUDENT, floor=1.8),
    Training("vae", "normal-logvar", "float32", (4096, 512), POSTERIOR, floor=1.8),
    Training("mvn", "mvn", "float64", (15_625, 8), BOTH, floor=2.0),
    Training("mvn", "mvn", "float64", (976, 32), BOTH, floor=2.0),
    Training(
        "distillation",
        "categorical",
        "float32",
        (8, 10),
        STUDENT,
        floor=1.0,
        threaded=False,
        rivals=("PyTorch",),  # the same arrays in eager calls
    ),
]


@functools.lru_cache(maxsize=1)
def exact(work: Training) -> list[Any]:
    return work.exact()


@dataclass
class Trained:
    """Seconds of each side on one thread, and how many times klfast's they are."""

    training: Training
    seconds: dict[str, float]
    times: dict[str, float]

    @property
    def best(self) -> str | None:
        """The fastest of the rivals."""
        rivals = [side for side in self.training.rivals if side in self.times]
        return min(rivals, key=lambda side: self.times[side]) if rivals else None

    @property
    def ratio(self) -> float | None:
        return self.times[self.best] if self.best else None

    def record(self) -> dict[str, Any]:
        facts = {"what": self.training.what, "floor": self.training.floor, "best": self.best}
        return facts | {"ratio": self.ratio, "seconds": self.seconds, "times": self.times}


def compare(work: Training, seconds: float) -> Trained:
    """Check the gradients of each side, then time them. Calls take turns."""
    contestants = {}
    for side, (library, _) in SIDES[work.loss].items():
        if library.installed:
            with library.threads(1):
                call = work.prepare(side)
                work.check(call(), exact(work))
            contestants[side] = Contestant(call, functools.partial(library.threads, 1))
    times = interleave(contestants, seconds)
    others = [side for side in times if side != "klfast"]
    return Trained(
        work,
        {side: median(t) for side, t in times.items()},
        {side: ratio(times, side, "klfast") for side in others},
    )
