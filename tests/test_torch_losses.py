"""klfast.torch: losses have the values and gradients of their formulas, and what they promise
beside."""

import tracemalloc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from klfast.torch import (
    distillation_loss,
    elbo,
    kl_categorical,
    kl_div,
    kl_to_standard_normal,
    losses,
)

INF = torch.inf
REDUCTIONS = ("mean", "batchmean", "sum", "none")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def logits(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


# kl_div


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.filterwarnings("ignore:reduction")
def test_kl_div_is_that_of_pytorch(reduction, log_target):
    q, p = logits(3, 4), logits(3, 4)
    log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
    target = log_p if log_target else log_p.exp()
    results = [
        f(log_q, target, reduction=reduction, log_target=log_target) for f in (kl_div, F.kl_div)
    ]
    torch.testing.assert_close(*results)
    got, want = (torch.autograd.grad(r.sum(), (q, p), retain_graph=True) for r in results)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_kl_div_has_the_signature_of_pytorch():
    x = torch.zeros(2, 3).log_softmax(-1)
    assert kl_div(x, x.exp()) == 0
    with pytest.raises(ValueError, match="reduction must be"):
        kl_div(x, x, "average")


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_is_a_number_where_that_of_pytorch_is_not(log_target):
    half = float(np.log(0.5))
    input = torch.tensor([half, -INF, -INF, half, torch.nan], requires_grad=True)
    target = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0])
    target = (target.log() if log_target else target).requires_grad_()
    theirs = F.kl_div(input, target, reduction="none", log_target=log_target)
    assert torch.isnan(theirs[1])
    terms = kl_div(input, target, reduction="none", log_target=log_target)
    assert terms[:4].tolist() == [pytest.approx(0, abs=1e-7), 0, INF, 0]
    assert torch.isnan(terms[4]), "what is not a number stays so"
    finite = [0, 1, 3]
    kl_div(input[finite], target[finite], "sum", log_target).backward()
    torch.testing.assert_close(input.grad, torch.tensor([-0.5, 0, 0, 0, 0]))
    assert torch.isfinite(target.grad).all()
    assert target.grad[1] == target.grad[3] == 0


def test_kl_div_has_second_derivatives():
    q, p = logits(2, 3), logits(2, 3)

    def f(q, p):
        return kl_div(q.log_softmax(-1), p.log_softmax(-1), "sum", log_target=True)

    assert torch.autograd.gradgradcheck(f, (q, p))


# Distillation


def formula(student, teacher, temperature):
    """Of each row, by PyTorch."""
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1) * temperature**2


@pytest.mark.parametrize("labels", [None, torch.tensor([[1, -100, 2], [-100, 0, 1]])])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5])
def test_distillation(reduction, labels, temperature):
    student, teacher = logits(2, 3, 7), logits(2, 3, 7)
    index = None if labels is None else -100
    got = distillation_loss(student, teacher, temperature, reduction, index, labels)
    rows = formula(student, teacher, temperature)
    count = 6
    if labels is not None:
        rows, count = torch.where(labels == -100, 0, rows), 4
    want = {"none": rows, "sum": rows.sum(), "batchmean": rows.sum() / count}[reduction]
    torch.testing.assert_close(got, want)
    upstream = torch.rand_like(want)
    for both in ((student,), (teacher,), (student, teacher)):
        for g, w in zip(
            torch.autograd.grad(got, both, upstream, retain_graph=True),
            torch.autograd.grad(want, both, upstream, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(g, w)


def test_distillation_defaults():
    student, teacher = logits(3, 4), torch.randn(3, 4).double()
    torch.testing.assert_close(
        distillation_loss(student, teacher), formula(student, teacher, 2).mean()
    )
    with torch.no_grad():
        loss = distillation_loss(student, teacher)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, formula(student.detach(), teacher, 2).mean())
    assert distillation_loss(student, student).item() == 0


def test_ignored_rows_may_hold_anything():
    student = torch.tensor([[0.0, 1.0], [torch.nan, INF], [2.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 1.0], [0.0, torch.nan], [0.0, 0.0]])
    labels = torch.tensor([0, 5, 1])
    for reduction in ("batchmean", "sum", "none"):
        student.grad = None
        loss = distillation_loss(student, teacher, 1.0, reduction, 5, labels).sum()
        kept = formula(student[::2], teacher[::2], 1.0)
        torch.testing.assert_close(loss, kept.mean() if reduction == "batchmean" else kept.sum())
        loss.backward()
        assert torch.equal(student.grad[1], torch.zeros(2))
        assert torch.isfinite(student.grad).all()
    none = distillation_loss(student, teacher, ignore_index=5, labels=torch.full((3,), 5))
    none.backward()
    assert none == 0


def test_a_graph_that_is_kept_gives_the_same_again():
    student, teacher = logits(3, 4, dtype=torch.float32), torch.randn(3, 4)
    loss = distillation_loss(student, teacher)
    loss.backward(retain_graph=True)
    first = student.grad.clone()
    student.grad.mul_(100)  # what an optimizer or a clipping may do
    student.grad = None
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(student.grad, 3 * first)
    loss.backward()
    torch.testing.assert_close(student.grad, 4 * first)


def test_distillation_computes_once_and_only_the_students_gradient(monkeypatch):
    asked = []

    def spy(call, tensors, wanted, weight):
        result = weighted(call, tensors, wanted, weight)
        asked.append((tuple(wanted), [x.data_ptr() for x in result[1]]))
        return result

    weighted = losses.weighted
    monkeypatch.setattr(losses, "weighted", spy)
    student, teacher = logits(3, 4, dtype=torch.float32), torch.randn(3, 4)
    distillation_loss(student, teacher).backward()
    ((wanted, gradients),) = asked
    assert wanted == (False, True), "the student's alone"
    assert gradients == [student.grad.data_ptr()], "passed on without a copy"
    with torch.no_grad():
        distillation_loss(student, teacher)
    distillation_loss(student.detach(), teacher)
    assert asked[1:] == [((), [])] * 2, "no gradient where none is wanted"


def test_distillation_takes_no_more_than_the_students_gradient():
    student, teacher = torch.randn(64, 20_000, requires_grad=True), torch.randn(64, 20_000)
    distillation_loss(student, teacher).backward()
    student.grad = None
    tracemalloc.start()
    distillation_loss(student, teacher).backward()
    in_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    student.grad = None
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        distillation_loss(student, teacher).backward()
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    in_torch = sum(n for n in taken if n > 0)
    assert student.nbytes <= in_numpy + in_torch < 1.05 * student.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distillation_of_halves(dtype):
    student, teacher = torch.randn(2, 3, 50).to(dtype)
    student.requires_grad_()
    loss = distillation_loss(student, teacher)
    want = formula(student.float(), teacher.float(), 2).mean()
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert student.grad.dtype == dtype
    (g,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(student.grad, g, rtol=2e-2, atol=1e-5)


def test_distillation_of_near_equal_logits_does_not_cancel():
    teacher = torch.randn(4, 1000)
    student = (teacher + 1e-4 * torch.randn(4, 1000)).requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    wide = student.detach().double().requires_grad_()
    want = distillation_loss(wide, teacher.double())
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    error = (student.grad - wide.grad).abs().max() / wide.grad.abs().max()
    assert error < 1e-6


def test_losses_that_reduce_have_no_second_derivatives():
    student = logits(3, 4)
    loss = distillation_loss(student, torch.randn(3, 4).double())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, student, create_graph=True)
    mu, logvar = logits(3, 4), logits(3, 4)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        elbo(logits(3), mu, logvar).elbo.backward(create_graph=True)


@pytest.mark.filterwarnings("ignore")
def test_distillation_for_tracers():
    student, teacher = logits(5, 4), torch.randn(5, 4).double()
    labels = torch.tensor([0, 1, -100, 2, -100])

    def loss(student):
        return distillation_loss(student, teacher, ignore_index=-100, labels=labels)

    (want,) = torch.autograd.grad(loss(student), student)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(student)
    torch.testing.assert_close(compiled, loss(student))
    torch.testing.assert_close(torch.autograd.grad(compiled, student)[0], want)
    torch.testing.assert_close(torch.func.grad(loss)(student), want)


def test_distillation_refuses():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="reduction must be"):
        distillation_loss(x, x, reduction="mean")
    with pytest.raises(ValueError, match="wanted the same"):
        distillation_loss(x, torch.zeros(3))
    with pytest.raises(TypeError, match="go together"):
        distillation_loss(x, x, labels=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="go together"):
        distillation_loss(x, x, ignore_index=-100)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        distillation_loss(x, x, ignore_index=-100, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="temperature must be positive"):
        distillation_loss(x, x, temperature=0.0)
    with pytest.raises(ValueError, match="CPU library"):
        distillation_loss(x.to("meta"), x)


# Variational autoencoders


def test_kl_to_standard_normal():
    mu, logvar = logits(3, 5), logits(3, 5)
    got = kl_to_standard_normal(mu, logvar)
    want = (mu**2 + logvar.exp() - 1 - logvar).sum(-1) / 2
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(got.sum(), (mu, logvar)),
        torch.autograd.grad(want.sum(), (mu, logvar)),
        strict=True,
    ):
        torch.testing.assert_close(g, w)
    each = kl_to_standard_normal(mu, logvar, axis=())
    torch.testing.assert_close(each.sum(-1), got)
    zero = torch.zeros(2, 3)
    assert torch.equal(kl_to_standard_normal(zero, zero), torch.zeros(2))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_to_standard_normal_reduces(reduction, dtype):
    mu, logvar = torch.randn(2, 4, 3, 50).to(dtype)
    for cut in (np.s_[:], np.s_[..., ::2], np.s_[0, 0]):
        inputs = [x[cut].detach().requires_grad_() for x in (mu, logvar)]
        got = kl_to_standard_normal(*inputs, reduction=reduction)
        rows = kl_to_standard_normal(*inputs)
        want = getattr(rows, reduction)()
        torch.testing.assert_close(got, want)
        for upstream in (1.0, -0.25):
            for g, w in zip(
                torch.autograd.grad(upstream * got, inputs, retain_graph=True),
                torch.autograd.grad(upstream * want, inputs, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(g, w)
        one = kl_to_standard_normal(inputs[0].detach(), inputs[1], reduction=reduction)
        (alone,) = torch.autograd.grad(one, inputs[1])
        torch.testing.assert_close(alone, torch.autograd.grad(got, inputs[1])[0])


def test_kl_to_standard_normal_reduces_whatever_it_is_given():
    mu, logvar = logits(3, 5), logits(5)
    rows = kl_to_standard_normal(mu, logvar)
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar, reduction="mean"), rows.mean())
    each = kl_to_standard_normal(mu, logvar, axis=(), reduction="mean")
    torch.testing.assert_close(5 * each, rows.mean())
    empty = torch.zeros(0, 5)
    assert kl_to_standard_normal(empty, empty, reduction="mean") == 0
    zero = torch.zeros(2, 0)
    assert kl_to_standard_normal(zero, zero, reduction="sum") == 0
    with pytest.raises(ValueError, match="reduction must be"):
        kl_to_standard_normal(mu, logvar, reduction="batchmean")


@pytest.mark.filterwarnings("ignore")
def test_kl_to_standard_normal_reduces_for_tracers():
    mu, logvar = logits(3, 5), logits(3, 5)

    def loss(mu, logvar):
        return kl_to_standard_normal(mu, logvar, reduction="mean")

    want = torch.autograd.grad(loss(mu, logvar), (mu, logvar))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(mu, logvar)
    for found in (
        torch.autograd.grad(compiled, (mu, logvar)),
        torch.func.grad(loss, argnums=(0, 1))(mu, logvar),
    ):
        for g, w in zip(found, want, strict=True):
            torch.testing.assert_close(g, w)


def test_large_gradients_take_the_memory_of_those_that_are_gone():
    student, teacher = torch.randn(2, 40, 1 << 18)
    student.requires_grad_()
    distillation_loss(student, teacher).backward()
    first, address = student.grad.clone(), student.grad.data_ptr()
    assert address % 64 == 0
    view, student.grad = student.grad[0, :2].numpy(), None
    distillation_loss(student, teacher).backward()
    second = student.grad.data_ptr()
    assert second != address, "somebody still looks at it"
    torch.testing.assert_close(student.grad, first, rtol=0, atol=0)
    del view
    student.grad = None
    distillation_loss(student, -teacher).backward()
    assert student.grad.data_ptr() in (address, second)
    student.grad = None
    distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, first, rtol=0, atol=0)


def test_elbo():
    mu, logvar = logits(3, 5), logits(3, 5)
    likelihood = logits(3)
    bound = elbo(likelihood, mu, logvar, beta=4.0)
    kl = kl_to_standard_normal(mu, logvar)
    torch.testing.assert_close(bound.kl, kl.mean())
    torch.testing.assert_close(bound.log_likelihood, likelihood.mean())
    torch.testing.assert_close(bound.elbo, (likelihood - 4 * kl).mean())
    unweighted = elbo(likelihood, mu, logvar).elbo
    torch.testing.assert_close(unweighted, likelihood.mean() - kl.mean())
    got = torch.autograd.grad(bound.elbo, (likelihood, mu, logvar))
    want = (torch.full((3,), 1 / 3), -4 * mu / 3, -2 * (logvar.exp() - 1) / 3)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.double())
    with pytest.raises(ValueError, match=r"log_likelihood has shape \(3, 1\); wanted \(3,\)"):
        elbo(likelihood[:, None], mu, logvar)


def test_reductions_do_not_lose_the_digits_of_rows():
    """A mean of many rows is as exact as its rows."""
    student, teacher = torch.randn(2, 100_000, 3)
    got = distillation_loss(student, teacher, 1.0)
    want = kl_categorical(teacher.double(), student.double()).mean()
    torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=0)
