"""klfast.torch: divergences of policies and the penalties of RLHF."""

import pytest

torch = pytest.importorskip("torch")

from klfast.torch import kl_penalty, policy_kl
from torch.distributions import Categorical, Independent, Normal, kl_divergence

INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_categorical_policy():
    old, new = random(2, 3, 4), random(2, 3, 4)
    want = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    torch.testing.assert_close(policy_kl(old, new), want.mean())
    torch.testing.assert_close(policy_kl(old, new, reduction="sum"), want.sum())
    torch.testing.assert_close(policy_kl(old, new, reduction="none"), want)


def test_gaussian_policy():
    old, new = (random(5, 2), random(5, 2)), (random(5, 2), random(2))
    p, q = (Independent(Normal(m, s.exp().expand_as(m)), 1) for m, s in (old, new))
    want = kl_divergence(p, q).mean()
    got = policy_kl(old, new)
    torch.testing.assert_close(got, want)
    inputs = (*old, *new)
    for g, w in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_policy_masks():
    """Actions that are not allowed, states that do not count."""
    old = torch.tensor([[0.0, 1.0, -INF], [NAN, 0.0, 0.0]])
    new = torch.tensor([[1.0, 0.0, -INF], [0.0, 0.0, 0.0]], requires_grad=True)
    kl = policy_kl(old, new, mask=torch.tensor([True, False]))
    torch.testing.assert_close(kl, policy_kl(old[0, :2], new[0, :2]))
    kl.backward()
    assert torch.isfinite(new.grad).all()
    assert new.grad[0, 2] == 0
    assert torch.equal(new.grad[1], torch.zeros(3))
    assert policy_kl(old, new, mask=torch.tensor([False, False])) == 0


def test_policy_refuses():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="pairs"):
        policy_kl(x, (x, x))
    with pytest.raises(ValueError, match="reduction must be"):
        policy_kl(x, x, reduction="batchmean")


# Penalties


def exact_k3(r):
    """exp(r) − 1 − r as its series, r small."""
    term, total = r.double() ** 2 / 2, 0
    for n in range(3, 12):
        total, term = total + term, term * r.double() / n
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_does_not_cancel(dtype):
    r = torch.cat([10.0 ** torch.arange(-15, 0), -(10.0 ** torch.arange(-15, 0)), torch.zeros(1)])
    r = r.to(dtype).requires_grad_()
    k3 = kl_penalty(torch.zeros_like(r), r)
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(k3.double(), exact_k3(r), rtol=bound, atol=1e-35)
    k3.sum().backward()
    torch.testing.assert_close(r.grad.double(), torch.expm1(r.double()), rtol=bound, atol=1e-35)
    large = torch.tensor([2.0, 10.0, -10.0, -50.0], dtype=dtype)
    want = torch.expm1(large) - large
    torch.testing.assert_close(kl_penalty(torch.zeros_like(large), large), want)


def test_estimators():
    policy, reference = random(4, 6), random(4, 6)
    r = reference - policy
    formulas = {"k1": -r, "k2": r**2 / 2, "k3": torch.expm1(r) - r}
    for name, want in formulas.items():
        got = kl_penalty(policy, reference, estimator=name)
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(got.sum(), (policy, reference), retain_graph=True),
            torch.autograd.grad(want.sum(), (policy, reference), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(g, w)


def test_clip_bounds_the_log_ratio():
    policy = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    reference = torch.tensor([-9.0, -1.5, 20.0])
    penalty = kl_penalty(policy, reference, clip=1.0)
    r = torch.tensor([-1.0, -0.5, 1.0])
    torch.testing.assert_close(penalty, torch.expm1(r) - r)
    penalty.sum().backward()
    assert policy.grad[0] == policy.grad[2] == 0
    torch.testing.assert_close(policy.grad[1], -torch.expm1(r[1]))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_masked_tokens_cost_nothing_whatever_they_hold(estimator):
    policy = torch.tensor([-1.0, NAN, -INF, INF], requires_grad=True)
    reference = torch.tensor([-2.0, 0.0, -INF, NAN], requires_grad=True)
    mask = torch.tensor([True, False, False, False])
    penalty = kl_penalty(policy, reference, estimator=estimator, mask=mask)
    assert penalty[0] != 0
    assert torch.equal(penalty[1:], torch.zeros(3))
    penalty.sum().backward()
    for x in (policy, reference):
        assert x.grad[0] != 0
        assert torch.equal(x.grad[1:], torch.zeros(3))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_masked_rows_cost_nothing_whatever_they_hold(estimator):
    policy, reference = torch.randn(2, 4, 5)
    policy[1], policy[2], reference[3] = NAN, -INF, INF
    policy.requires_grad_()
    mask, tokens = torch.tensor([True, False, False, False]), torch.tensor([0, 1, -100, 2])
    penalty = kl_penalty(policy, reference, tokens, estimator=estimator, mask=mask)
    assert penalty[0] != 0
    assert torch.equal(penalty[1:], torch.zeros(3))
    penalty.sum().backward()
    assert (policy.grad[0] != 0).all()
    assert torch.equal(policy.grad[1:], torch.zeros(3, 5))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_from_logits(estimator):
    policy, reference = random(2, 5, 7), random(2, 5, 7)
    tokens = torch.randint(7, (2, 5))
    chosen = [x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (policy, reference)]
    got = kl_penalty(policy, reference, tokens, estimator=estimator)
    want = kl_penalty(*chosen, estimator=estimator)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), policy)[0] for x in (got, want)))


def test_the_mean_over_all_tokens_is_the_divergence():
    """E over tokens of the policy, of k1 and of k3, and the sum of "exact"."""
    policy, reference = random(3, 6), random(3, 6)
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    exact = kl_penalty(policy, reference, estimator="exact")
    for estimator in ("k1", "k3"):
        mean = (log_p.exp() * kl_penalty(log_p, log_q, estimator=estimator)).sum(-1)
        torch.testing.assert_close(mean, exact)
    masked = kl_penalty(
        policy, reference, estimator="exact", mask=torch.tensor([True, False, True])
    )
    torch.testing.assert_close(masked, exact * torch.tensor([1, 0, 1]))


def test_halves_from_logits_are_not_rounded_before_the_difference():
    policy = torch.randn(3, 100).bfloat16()
    tokens = torch.randint(100, (3,))
    got = kl_penalty(policy, (policy.float() + 1e-3).bfloat16(), tokens, estimator="k1")
    want = kl_penalty(
        policy.float(), (policy.float() + 1e-3).bfloat16().float(), tokens, estimator="k1"
    )
    assert torch.equal(got, want)


def test_penalty_refuses():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="estimator must be"):
        kl_penalty(x, x, estimator="k4")
    with pytest.raises(ValueError, match="clip must be positive"):
        kl_penalty(x, x, clip=0)
    with pytest.raises(TypeError, match="neither tokens nor clip"):
        kl_penalty(x, x, estimator="exact", clip=1.0)
