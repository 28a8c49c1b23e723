"""klfast.torch.install(): torch.distributions.kl_divergence by klfast, and back."""

import pytest

torch = pytest.importorskip("torch")

import klfast.torch
from klfast.torch import distributions
from torch.distributions import (
    Beta,
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    OneHotCategoricalStraightThrough,
    kl_divergence,
)
from torch.distributions.kl import _kl_expfamily_expfamily

INF = torch.inf


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """Install klfast, and list the functions of it that are called."""
    called = []
    for name in ("kl_categorical", "kl_discrete", "kl_normal", "kl_mvn"):
        function = getattr(distributions, name)

        def spy(*args, function=function, name=name, **options):
            called.append(name)
            return function(*args, **options)

        monkeypatch.setattr(distributions, name, spy)
    klfast.torch.install()
    yield called
    klfast.torch.uninstall()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def factor(*batch):
    a = torch.randn(*batch, 3, 3, dtype=torch.float64)
    return (a.tril(-1) / 3 + torch.diag_embed(a.diagonal(dim1=-2, dim2=-1).exp())).requires_grad_()


def covariance(*batch):
    f = factor(*batch).detach()
    return (f @ f.mT).requires_grad_()


def of(kind, convert=lambda x: x, keyword="logits"):
    """Make two categorical distributions of two tensors."""
    return lambda a, b: (kind(**{keyword: convert(a)}), kind(**{keyword: convert(b)}))


def normals(axes):
    """Make two Normals, or Independents over so many axes, of means and log scales."""

    def make(a, b, c, d):
        p, q = Normal(a, b.exp()), Normal(c, d.exp())
        return (p, q) if axes is None else (Independent(p, axes), Independent(q, axes))

    return make


def mvn(keyword_p, keyword_q):
    def make(a, f, b, g):
        return MultivariateNormal(a, **{keyword_p: f}), MultivariateNormal(b, **{keyword_q: g})

    return make


def probs_and_logits(a, b):
    return Categorical(a.exp()), Categorical(logits=b)


FACTOR, COVARIANCE, PRECISION = "scale_tril", "covariance_matrix", "precision_matrix"
PAIRS = {  # klfast's function, the pair made of tensors, the tensors
    "logits": ("kl_categorical", of(Categorical), lambda: (random(5, 4), random(4))),
    "probs": (
        "kl_discrete",
        of(Categorical, torch.exp, "probs"),
        lambda: (random(5, 4), random(4)),
    ),
    "probs and logits": ("kl_discrete", probs_and_logits, lambda: (random(5, 4), random(5, 4))),
    "one-hot": ("kl_categorical", of(OneHotCategorical), lambda: (random(5, 4), random(5, 4))),
    "straight-through": (
        "kl_discrete",
        of(OneHotCategoricalStraightThrough, torch.exp, "probs"),
        lambda: (random(5, 4), random(5, 4)),
    ),
    "normal": (
        "kl_normal",
        normals(None),
        lambda: (random(5, 4), random(4), random(4), random(5, 1)),
    ),
    "independent": (
        "kl_normal",
        normals(1),
        lambda: (random(5, 4), random(5, 4), random(4), random(4)),
    ),
    "independent, 2 axes": (
        "kl_normal",
        normals(2),
        lambda: (random(3, 5, 4), random(3, 5, 4), random(5, 4), random(1, 4)),
    ),
    "independent, no axes": (
        "kl_normal",
        normals(0),
        lambda: (random(5, 4), random(5, 4), random(5, 4), random(5, 4)),
    ),
    "mvn, factors": (
        "kl_mvn",
        mvn(FACTOR, FACTOR),
        lambda: (random(5, 3), factor(), random(3), factor(5)),
    ),
    "mvn, covariances": (
        "kl_mvn",
        mvn(COVARIANCE, COVARIANCE),
        lambda: (random(5, 3), covariance(5), random(3), covariance()),
    ),
    "mvn, precision": (
        "kl_mvn",
        mvn(PRECISION, COVARIANCE),
        lambda: (random(3), covariance(), random(3), covariance()),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_values_and_gradients_are_those_of_pytorch(pair, calls):
    name, make, inputs = PAIRS[pair]
    inputs = inputs()
    got = kl_divergence(*make(*inputs))
    assert set(calls) == {name}
    klfast.torch.uninstall()
    want = kl_divergence(*make(*inputs))
    torch.testing.assert_close(got, want)
    weights = torch.rand_like(want)
    for g, w in zip(
        torch.autograd.grad(got, inputs, weights),
        torch.autograd.grad(want, inputs, weights),
        strict=True,
    ):
        if g.shape[-2:] == (3, 3) and "factors" in pair:
            w = w.tril()  # PyTorch's formula reads the upper triangle too, which is no part of it
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_pytorch(dtype, calls):
    x, y = torch.randn(2, 3, 4).to(dtype)
    p, q = Categorical(logits=x), Categorical(logits=y)
    assert kl_divergence(p, q).dtype == dtype
    assert kl_divergence(Normal(x, y.exp()), Normal(y, x.exp())).dtype == dtype
    assert calls == ["kl_categorical", "kl_normal"]


def test_sampling_does_not_change_the_way(calls):
    """A policy that was sampled from has its probabilities too."""
    p = Categorical(logits=random(5, 4)).expand((3, 5))
    p.sample()
    assert "probs" in vars(p)
    kl_divergence(p, p)
    assert calls == ["kl_categorical"]


def test_zeros(calls):
    """Values and gradients at probabilities of zero."""
    certain = Categorical(torch.tensor([0.0, 1.0]))
    assert kl_divergence(certain, certain) == 0
    assert (
        kl_divergence(Categorical(torch.tensor([0.9, 0.1])), Categorical(torch.tensor([1.0, 0.0])))
        == INF
    )
    p = torch.tensor([0.0, 0.3, 0.7], requires_grad=True)
    q = torch.tensor([0.0, 0.6, 0.4], requires_grad=True)
    kl_divergence(Categorical(p), Categorical(q)).backward()
    got = p.grad, q.grad
    p.grad = q.grad = None
    klfast.torch.uninstall()
    kl_divergence(Categorical(p), Categorical(q)).backward()
    for g, w in zip(got, (p.grad, q.grad), strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g[1:], w[1:])


def test_masked_logits_have_gradients(calls):
    """PyTorch's are NaN."""
    a = torch.tensor([0.0, 1.0, -INF], requires_grad=True)
    b = torch.tensor([1.0, 0.0, -INF], requires_grad=True)
    with_mask = kl_divergence(Categorical(logits=a), Categorical(logits=b))
    without = kl_divergence(Categorical(logits=a[:2]), Categorical(logits=b[:2]))
    torch.testing.assert_close(with_mask, without)
    got = torch.autograd.grad(with_mask, b)[0]
    torch.testing.assert_close(got, torch.autograd.grad(without, b)[0])


@pytest.mark.parametrize("kind", [Normal, Categorical])
def test_agrees_with_the_bregman_divergence_of_exponential_families(kind, calls):
    if kind is Normal:
        p, q = Normal(random(4), random(4).exp()), Normal(random(4), random(4).exp())
        torch.testing.assert_close(kl_divergence(p, q), _kl_expfamily_expfamily(p, q))
    assert kl_divergence(Normal(0.0, 1.0), Normal(0.0, 1.0)).shape == ()


def test_monte_carlo(calls):
    """Within four standard errors of the mean log ratio."""
    pairs = [
        (Categorical(logits=torch.randn(4)), Categorical(logits=torch.randn(4))),
        (Normal(0.3, 1.2), Normal(-0.2, 0.8)),
        (
            Independent(Normal(torch.zeros(3), torch.ones(3)), 1),
            Independent(Normal(torch.ones(3), 2 * torch.ones(3)), 1),
        ),
        (
            MultivariateNormal(torch.zeros(3), covariance().detach().float()),
            MultivariateNormal(torch.ones(3), covariance().detach().float()),
        ),
    ]
    for p, q in pairs:
        x = p.sample((20_000,))
        terms = p.log_prob(x) - q.log_prob(x)
        assert abs(terms.mean() - kl_divergence(p, q)) < 4 * terms.std() / len(terms) ** 0.5
    assert len(calls) == len(pairs)


def test_batches_are_their_items(calls):
    a, f, b, g = random(7, 3), factor(7), random(7, 3), factor()
    whole = kl_divergence(MultivariateNormal(a, scale_tril=f), MultivariateNormal(b, scale_tril=g))
    for i in range(7):
        one = kl_divergence(
            MultivariateNormal(a[i], scale_tril=f[i]), MultivariateNormal(b[i], scale_tril=g)
        )
        torch.testing.assert_close(whole[i], one)


def test_other_pairs_go_as_before(calls):
    x = torch.ones(3)
    low_rank = LowRankMultivariateNormal(torch.zeros(3), torch.ones(3, 1), x)
    kl_divergence(low_rank, low_rank)
    kl_divergence(low_rank, MultivariateNormal(torch.zeros(3), torch.eye(3)))
    kl_divergence(Beta(x, x), Beta(x, 2 * x))
    kl_divergence(Independent(Beta(x, x), 1), Independent(Beta(x, 2 * x), 1))
    meta = Normal(torch.zeros(3, device="meta"), torch.ones(3, device="meta"), validate_args=False)
    assert kl_divergence(meta, meta).device.type == "meta"
    assert not calls
    with pytest.raises(ValueError, match="shape"):
        kl_divergence(
            MultivariateNormal(torch.zeros(3), torch.eye(3)),
            MultivariateNormal(torch.zeros(2), torch.eye(2)),
        )
    with pytest.raises(NotImplementedError):
        kl_divergence(Independent(Normal(x, x), 1), Independent(Normal(x, x), 0))


def test_what_torch_func_looks_at_goes_as_before(calls):
    """And can be differentiated twice."""

    def f(a):
        return kl_divergence(
            Normal(a, 1.0, validate_args=False), Normal(0.0, 1.0, validate_args=False)
        )

    assert torch.func.vmap(f)(torch.ones(3)).tolist() == [0.5] * 3
    assert torch.func.grad(torch.func.grad(f))(torch.ones(())) == 1
    assert not calls


def test_uninstall_restores():
    registry = torch.distributions.kl._KL_REGISTRY
    before = dict(registry)
    klfast.torch.uninstall()
    assert registry == before
    klfast.torch.install()
    klfast.torch.install()
    changed = {pair[0] for pair in registry if registry[pair] is not before[pair]}
    assert changed == {Categorical, OneHotCategorical, Normal, Independent, MultivariateNormal}
    klfast.torch.uninstall()
    assert registry == before
