"""klfast.torch: the four divergences of tensors have klfast's values and gradients, and PyTorch's
tools can work with them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import klfast
import klfast.grad
import klfast.torch
from klfast.torch import _autograd

from registry import IDS

ENTRIES = [
    IDS[name]
    for name in (
        "discrete",
        "discrete-raw-counts",
        "categorical",
        "categorical-masked",
        "categorical-cool",
        "normal-scale",
        "normal-logvar",
        "normal-scale-var",
        "mvn",
    )
]
PLAIN = [IDS[name] for name in ("discrete", "categorical-cool", "normal-scale", "mvn")]
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
families = pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
compiles = pytest.mark.filterwarnings("ignore")  # PyTorch's own


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(entry, tensors, **options):
    return getattr(klfast.torch, entry.function)(**tensors, **entry.options, **options)


def gradients(entry, arrays, **options):
    return getattr(klfast.grad, entry.function)(**arrays, **entry.options, **options)


def make(entry, dtype="float64", batch=(3,), size=4, requires_grad=True):
    arrays = entry.inputs(dtype, batch, size)
    return {n: torch.tensor(a, requires_grad=requires_grad) for n, a in arrays.items()}


def as_arrays(tensors):
    return {name: x.detach().numpy() for name, x in tensors.items()}


def operator(entry):
    return getattr(torch.ops.klfast, entry.function)


def operator_arguments(entry, tensors):
    """The arguments of the registered operator for the same call."""
    values = list(tensors.values())
    if entry.function == "kl_discrete":
        return [*values, True]
    if entry.function == "kl_categorical":
        return [*values, torch.tensor(entry.options.get("temperature", 1.0)).double()]
    named = dict(tensors)
    loc_p, loc_q = named.pop("loc_p"), named.pop("loc_q")
    (kind_p, p), (kind_q, q) = named.items()
    kinds = [kind_p.removesuffix("_p"), kind_q.removesuffix("_q")]
    return [loc_p, p, loc_q, q, *kinds] + (["raise"] if entry.function == "kl_mvn" else [])


# Values


@entries
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_are_those_of_klfast(entry, dtype):
    arrays = entry.inputs(dtype, (3, 2), 5)
    got = call(entry, {n: torch.from_numpy(a) for n, a in arrays.items()})
    want = entry(arrays)
    assert got.numpy().dtype == want.dtype
    np.testing.assert_array_equal(got.numpy(), want)


@entries
def test_bfloat16_is_that_of_the_same_numbers_in_float32(entry):
    tensors = {n: x.bfloat16() for n, x in make(entry, "float32", requires_grad=False).items()}
    got = call(entry, tensors)
    want = call(entry, {n: x.float() for n, x in tensors.items()})
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


def test_bfloat16_needs_no_ml_dtypes_and_no_copy(monkeypatch):
    """The bits go to the kernel as they lie."""
    seen = []

    def spy(logits_p, logits_q, **options):
        seen.extend((logits_p, logits_q))
        return np.zeros(3, np.float32)

    x = torch.randn(3, 4).bfloat16()
    monkeypatch.setattr(klfast, "kl_categorical", spy)
    klfast.torch.kl_categorical(x, x)
    assert [a.ctypes.data for a in seen] == [x.data_ptr()] * 2


@families
def test_mixed_dtypes_are_promoted(entry):
    tensors = make(entry, "float32", requires_grad=False)
    first = next(iter(tensors))
    tensors[first] = tensors[first].double()
    assert call(entry, tensors).dtype == torch.float64


def test_integers_are_taken():
    got = klfast.torch.kl_discrete(torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1]))
    assert got.dtype == torch.float64
    assert got.item() == klfast.kl_discrete([1, 2, 3], [3, 2, 1])


def test_q_left_out_is_standard():
    mu, logvar = torch.randn(2, 3, 4).double()
    got = klfast.torch.kl_normal(mu, logvar_p=logvar)
    np.testing.assert_array_equal(
        got.numpy(), klfast.kl_normal(mu.numpy(), logvar_p=logvar.numpy())
    )
    factor = torch.eye(4).double() + 0.1
    got = klfast.torch.kl_mvn(mu, scale_tril_p=factor)
    want = klfast.kl_mvn(mu.numpy(), scale_tril_p=factor.numpy())
    np.testing.assert_array_equal(got.numpy(), want)


def test_nan_comes_silently():
    logits = torch.tensor([[0.0, torch.inf], [0.0, 1.0]])  # warnings are errors here
    got = klfast.torch.kl_categorical(logits, torch.zeros(2))
    assert torch.isnan(got[0])
    assert got[1] > 0


# Shapes


def test_axis_keepdims_and_base():
    p, q = torch.rand(2, 5, 3).double()
    got = klfast.torch.kl_discrete(p, q, axis=0, keepdims=True, base=2)
    want = klfast.kl_discrete(p.numpy(), q.numpy(), axis=0, keepdims=True, base=2)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-14)
    each = klfast.torch.kl_normal(p, q, q, p, axis=())
    assert each.shape == p.shape
    torch.testing.assert_close(each.sum(0), klfast.torch.kl_normal(p, q, q, p, axis=0))


@families
def test_strided_tensors(entry):
    plain = make(entry, requires_grad=False)
    strided = {n: x.repeat_interleave(2, -1)[..., ::2].requires_grad_() for n, x in plain.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    contiguous = {n: x.clone().requires_grad_() for n, x in plain.items()}
    values = [call(entry, t) for t in (strided, contiguous)]
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    for v in values:
        v.sum().backward()
    for name, x in strided.items():
        torch.testing.assert_close(x.grad, contiguous[name].grad, rtol=1e-13, atol=1e-15)


@families
def test_gradients_of_broadcast_arguments_have_their_shape(entry):
    tensors = make(entry)
    alone = {n: x if n.endswith("_p") or n in "p" else x.detach()[0] for n, x in tensors.items()}
    alone = {n: x.detach().requires_grad_() for n, x in alone.items()}
    call(entry, alone).sum().backward()
    whole = {n: x.detach().expand(tensors[n].shape).clone() for n, x in alone.items()}
    whole = {n: x.requires_grad_() for n, x in whole.items()}
    call(entry, whole).sum().backward()
    for name, x in alone.items():
        want = whole[name].grad.sum_to_size(x.shape)
        torch.testing.assert_close(x.grad, want, rtol=1e-12, atol=1e-14)


# Gradients


@entries
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_those_of_klfast(entry, dtype):
    tensors = make(entry, dtype)
    cotangent = torch.rand(3).to(next(iter(tensors.values())).dtype)
    call(entry, tensors).backward(cotangent)
    arrays = as_arrays(tensors)
    _, *want = gradients(entry, arrays, wrt=tuple(arrays), cotangent=cotangent.numpy())
    for x, w in zip(tensors.values(), want, strict=True):
        np.testing.assert_array_equal(x.grad.numpy(), w)


@families
def test_gradcheck(entry):
    tensors = make(entry, batch=(2,), size=3)
    names = list(tensors)

    def f(*values):
        return call(entry, dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(f, tuple(tensors.values()))


@families
def test_second_derivatives_are_refused(entry):
    tensors = make(entry, batch=(2,), size=3)
    names = list(tensors)

    def f(*values):
        return call(entry, dict(zip(names, values, strict=True)))

    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.gradgradcheck(f, tuple(tensors.values()))
    first = next(iter(tensors.values()))
    (g,) = torch.autograd.grad(f(*tensors.values()).sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        g.sum().backward()


@families
def test_one_side_costs_that_side_alone(entry, monkeypatch):
    asked = []

    def spy(call, cotangent, tensors, wanted):
        asked.append([name for name, wants in zip(call.names, wanted, strict=True) if wants])
        return gradients_of(call, cotangent, tensors, wanted)

    gradients_of = _autograd.gradients_of
    monkeypatch.setattr(_autograd, "gradients_of", spy)
    for name in make(entry):
        tensors = make(entry, requires_grad=False)
        tensors[name].requires_grad_()
        result = call(entry, tensors)
        assert not asked, "the forward pass computes the value alone"
        result.sum().backward()
        assert asked.pop() == [name]
    with torch.no_grad():
        assert not call(entry, make(entry)).requires_grad


@families
def test_nothing_is_kept_but_the_inputs(entry):
    tensors = make(entry)
    kept = call(entry, tensors).grad_fn.saved_tensors
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in tensors.values()}


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_are_halves(entry, dtype):
    halves = {n: x.to(dtype).requires_grad_() for n, x in make(entry, "float32").items()}
    halves = {n: x.detach().requires_grad_() for n, x in halves.items()}
    call(entry, halves).sum().backward()
    wide = {n: x.detach().float().requires_grad_() for n, x in halves.items()}
    call(entry, wide).sum().backward()
    for name, x in halves.items():
        assert x.grad.dtype == dtype
        torch.testing.assert_close(x.grad, wide[name].grad.to(dtype), rtol=1e-2, atol=1e-4)


def test_masked_logits_have_gradient_zero():
    masked = [torch.tensor([0.0, 1.0, -torch.inf]).requires_grad_() for _ in range(2)]
    other = torch.tensor([0.5, 0.2, -torch.inf])
    klfast.torch.kl_categorical(masked[0], other).backward()
    klfast.torch.kl_categorical(other, masked[1]).backward()
    for x in masked:
        assert x.grad[2] == 0
        assert torch.isfinite(x.grad).all()
        assert x.grad[0] != 0


def test_temperature_of_each_row():
    p, q = torch.randn(2, 3, 4).double()
    q.requires_grad_()
    t = torch.tensor([0.5, 1.0, 2.0])
    each = klfast.torch.kl_categorical(p, q, temperature=t)
    one_by_one = [
        klfast.torch.kl_categorical(p[i], q[i], temperature=t[i].item()) for i in range(3)
    ]
    torch.testing.assert_close(each, torch.stack(one_by_one), rtol=1e-14, atol=0)
    each.sum().backward()
    got, q.grad = q.grad, None
    torch.stack(one_by_one).sum().backward()
    torch.testing.assert_close(got, q.grad, rtol=1e-13, atol=1e-15)


# PyTorch's tools


@compiles
@families
def test_opcheck(entry):
    tensors = make(entry)
    arguments = operator_arguments(entry, tensors)
    torch.library.opcheck(operator(entry), arguments)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    backward = getattr(torch.ops.klfast, f"{entry.function}_backward")
    wanted = [i % 2 == 0 for i in range(len(tensors))]
    torch.library.opcheck(backward, [torch.rand(3).double(), *plain, wanted])


@compiles
@families
def test_compile(entry):
    tensors = make(entry)
    weights = torch.rand(3).double()

    def loss(tensors):
        return (weights * call(entry, tensors)).sum() * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    got, want = compiled(tensors), loss(tensors)
    torch.testing.assert_close(got, want)
    inputs = list(tensors.values())
    for g, w in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True
    ):
        torch.testing.assert_close(g, w)


@families
def test_vmap(entry):
    """Over any axis of some of the arguments, nested too."""
    tensors = make(entry, batch=(3, 2), requires_grad=False)
    names = list(tensors)
    q = [n for n in names if n == "q" or n.endswith("_q")]
    moved = [x[0, 0] if n in q else x.movedim(0, 1) for n, x in tensors.items()]
    dims = tuple(None if n in q else 1 for n in names)

    def f(*values):
        return call(entry, dict(zip(names, values, strict=True)))

    want = call(entry, {n: x[0, 0] if n in q else x for n, x in tensors.items()})
    torch.testing.assert_close(torch.func.vmap(f, dims)(*moved), want)
    inner = tuple(None if n in q else 0 for n in names)
    twice = torch.func.vmap(torch.func.vmap(f, inner), dims)
    torch.testing.assert_close(twice(*moved), want)


@compiles
@families
def test_gradients_of_each_sample(entry):
    """vmap of grad, with arguments that are shared by the samples."""
    tensors = make(entry, requires_grad=False)
    shared = {n: x[0] for n, x in tensors.items()}
    name = next(iter(tensors))

    def loss(shared, sample):
        return call(entry, {**shared, name: sample})

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(shared, tensors[name])
    for i in range(3):
        want = torch.func.grad(loss)(shared, tensors[name][i])
        for n, x in want.items():
            torch.testing.assert_close(got[n][i], x)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.jacrev(torch.func.grad(loss))(shared, tensors[name][0])


def test_jacobian():
    p, q = torch.randn(2, 3, 4).double()
    got = torch.func.jacrev(lambda q: klfast.torch.kl_categorical(p, q))(q)
    want = torch.autograd.functional.jacobian(lambda q: klfast.torch.kl_categorical(p, q), q)
    torch.testing.assert_close(got, want)


# Errors


@families
def test_other_devices_are_refused(entry):
    tensors = {n: x.to("meta") for n, x in make(entry).items()}
    with pytest.raises(ValueError, match=r"loc_p|logits_p|p is on the device meta.*CPU library"):
        call(entry, tensors)


def test_wrong_arguments():
    x = torch.zeros(3)
    kl = klfast.torch
    with pytest.raises(TypeError, match=r"logits_q must be a torch.Tensor, got list"):
        kl.kl_categorical(x, [0.0] * 3)
    with pytest.raises(TypeError, match=r"q has dtype torch\.complex64"):
        kl.kl_discrete(x, x.to(torch.complex64))
    with pytest.raises(TypeError, match="scale_p, var_p, logvar_p"):
        kl.kl_normal(x)
    with pytest.raises(TypeError, match="loc_q is missing"):
        kl.kl_normal(x, x, var_q=x)
    with pytest.raises(TypeError, match="loc_q is missing"):
        kl.kl_mvn(x, torch.eye(3), cov_q=torch.eye(3))
    with pytest.raises(ValueError, match="differ in length"):
        kl.kl_categorical(x, torch.zeros(4))
    with pytest.raises(ValueError, match="temperature must be positive"):
        kl.kl_categorical(x, x, temperature=0.0)
    with pytest.raises(ValueError, match="temperature is a constant"):
        kl.kl_categorical(x, x, temperature=torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="errors must be"):
        kl.kl_mvn(x, torch.eye(3), errors="ignore")
    with pytest.raises(np.linalg.LinAlgError, match="cov_p is not positive definite"):
        kl.kl_mvn(x, -torch.eye(3))
    with pytest.raises(ValueError, match="keepdims"):
        kl.kl_normal(x, x, axis=(), keepdims=True)


def test_without_torch_klfast_does_not_import_it():
    import fresh

    fresh.run("import sys, klfast; assert 'torch' not in sys.modules")


@entries
@pytest.mark.parametrize("batch", [(), (1,), (9,), (2, 3), (2, 0)], ids=str)
def test_layouts_make_no_difference(entry, batch):
    """Rows without gaps go to the kernels by their addresses, all others as arrays."""
    together, apart = make(entry, "float32", batch), {}
    for name, x in together.items():
        wide = x.detach().new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        apart[name] = wide[..., ::2].copy_(x.detach()).requires_grad_()
    results = [call(entry, tensors) for tensors in (together, apart)]
    assert torch.equal(*results)
    weight = torch.linspace(-1, 1, max(1, results[0].numel()))[: results[0].numel()]
    for result in results:
        result.backward(weight.reshape(batch))
    for name, x in together.items():
        assert torch.equal(x.grad, apart[name].grad)


def test_negated_views_are_read_as_what_they_stand_for():
    complex_loc = torch.complex(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    loc, one = complex_loc.conj().imag, torch.ones(1, 1)
    assert loc.is_neg()
    assert loc.is_contiguous()
    got = klfast.torch.kl_normal(loc, one, one, one)
    torch.testing.assert_close(got, torch.tensor([4.5]))
