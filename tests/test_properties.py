"""What holds for every pair of distributions, tried on many (hypothesis, always the same ones)."""

import klfast
import klfast.reference
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from registry import PLAIN

settings.register_profile("klfast", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("klfast")

TINY, HUGE = 1e-30, 1e30
weight = st.one_of(st.just(0.0), st.floats(1e-3, 10), st.floats(TINY, HUGE))
positive = st.one_of(st.floats(1e-3, 10), st.floats(1e-20, 1e20))
logit = st.one_of(st.floats(-5, 5), st.floats(-500, 500))
sizes = st.integers(1, 70)
whole = st.integers(-1000, 1000).map(float)
BOUND = 3e-14  # of two results that should be equal


def rows(elements, count=2, size=sizes):
    return size.flatmap(lambda k: hnp.arrays(np.float64, (count, k), elements=elements))


def close(got, want, rtol=BOUND, atol=1e-30):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@given(rows(weight), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_discrete_never_negative_and_zero_for_itself(pq, dtype, normalize):
    p, q = pq.astype(dtype)
    if normalize:
        assume(p.any() and q.any())
        assert klfast.kl_discrete(p, q) >= 0
    assert klfast.kl_discrete(p, p, normalize=normalize) == 0


@given(rows(logit), st.sampled_from([np.float32, np.float64]), st.floats(0.1, 10))
def test_categorical_never_negative_and_zero_for_itself(ab, dtype, temperature):
    a, b = ab.astype(dtype)
    assert klfast.kl_categorical(a, b, temperature=temperature) >= 0
    assert klfast.kl_categorical(a, a, temperature=temperature) == 0


@given(rows(logit, 2), rows(positive, 2), st.sampled_from([np.float32, np.float64]))
def test_normal_never_negative_and_zero_for_itself(mean, scale, dtype):
    k = min(mean.shape[1], scale.shape[1])
    (m, n), (s, t) = mean[:, :k].astype(dtype), scale[:, :k].astype(dtype)
    for kind in ("scale", "var"):
        assert klfast.kl_normal(m, loc_q=m, **{f"{kind}_p": s, f"{kind}_q": s}) == 0
    assert klfast.kl_normal(m, loc_q=m, logvar_p=n, logvar_q=n) == 0
    assert klfast.kl_normal(m, s, n, t) >= 0


@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_for_itself_at_every_size(entry, dtype):
    for size in [*range(1, 70), 1000, 4099]:
        arrays = entry.inputs(dtype, (7,), min(size, entry.max_size))
        same = {name: arrays[name[:-1] + "p"] for name in arrays}
        np.testing.assert_array_equal(entry(same), 0)


@given(rows(logit), whole, whole)
def test_categorical_is_blind_to_shifts(ab, shift_p, shift_q):
    a, b = np.round(ab * 256) / 256  # so that the shifted logits are exact
    close(klfast.kl_categorical(a + shift_p, b + shift_q), klfast.kl_categorical(a, b))


@given(rows(weight), st.integers(-60, 60), st.integers(-60, 60))
def test_discrete_is_blind_to_scale(pq, e, f):
    p, q = pq
    assume(p.any() and q.any())
    close(klfast.kl_discrete(np.ldexp(p, e), np.ldexp(q, f)), klfast.kl_discrete(p, q))


@given(rows(weight), rows(logit), st.randoms(use_true_random=False))
def test_order_does_not_matter(pq, ab, random):
    order = list(range(pq.shape[1]))
    random.shuffle(order)
    assume(pq.any(axis=1).all())
    close(klfast.kl_discrete(*pq[:, order]), klfast.kl_discrete(*pq))
    order = list(range(ab.shape[1]))
    random.shuffle(order)
    close(klfast.kl_categorical(*ab[:, order]), klfast.kl_categorical(*ab))


@given(rows(positive, size=st.integers(1, 8)), rows(positive, size=st.integers(1, 8)))
def test_independent_blocks_add_discrete(pq, rs):
    (p, q), (r, s) = pq, rs
    joint = klfast.kl_discrete(np.outer(p, r).ravel(), np.outer(q, s).ravel())
    parts = klfast.kl_discrete(p, q) + klfast.kl_discrete(r, s)
    close(joint, parts, rtol=1e-12)  # the products are rounded


@given(rows(whole, size=st.integers(1, 8)), rows(whole, size=st.integers(1, 8)))
def test_independent_blocks_add_categorical(ab, cd):
    (a, b), (c, d) = ab / 64, cd / 64
    joint = klfast.kl_categorical(np.add.outer(a, c).ravel(), np.add.outer(b, d).ravel())
    close(joint, klfast.kl_categorical(a, b) + klfast.kl_categorical(c, d))


@given(rows(logit), rows(positive))
def test_independent_blocks_add_normal(mean, scale):
    k = min(mean.shape[1], scale.shape[1])
    (m, n), (s, t) = mean[:, :k], scale[:, :k]
    each = klfast.kl_normal(m, s, n, t, axis=())
    close(klfast.kl_normal(m, s, n, t), each.sum(), rtol=1e-13)


@given(rows(positive, size=st.integers(2, 40)), st.data())
def test_chain_rule(pq, data):
    """KL of the whole is KL between two groups plus the expected KL within them."""
    p, q = pq / pq.sum(axis=1, keepdims=True)
    cut = data.draw(st.integers(1, len(p) - 1))
    groups = [np.array([x[:cut].sum(), x[cut:].sum()]) for x in (p, q)]
    within = [klfast.kl_discrete(p[part], q[part]) for part in (np.s_[:cut], np.s_[cut:])]
    whole_kl = klfast.kl_discrete(p, q)
    close(whole_kl, klfast.kl_discrete(*groups) + groups[0] @ within, rtol=1e-11)


@given(rows(weight))
def test_discrete_agrees_with_the_reference(pq):
    p, q = pq
    assume(p.any() and q.any())
    want = klfast.reference.kl_discrete(p, q)
    close(klfast.kl_discrete(p, q), want, rtol=1e-9, atol=1e-12)
    raw, scale = klfast.reference.kl_discrete(p, q, normalize=False), p.max() + q.max()
    close(klfast.kl_discrete(p, q, normalize=False), raw, rtol=1e-9, atol=1e-12 * scale)


@given(rows(logit), st.floats(0.1, 10))
def test_categorical_agrees_with_the_reference(ab, temperature):
    want = klfast.reference.kl_categorical(*ab, temperature=temperature)
    close(klfast.kl_categorical(*ab, temperature=temperature), want, rtol=1e-9, atol=1e-11)


@given(rows(logit), rows(positive))
def test_normal_agrees_with_the_reference(mean, scale):
    k = min(mean.shape[1], scale.shape[1])
    (m, n), (s, t) = mean[:, :k], scale[:, :k]
    want = klfast.reference.kl_normal(m, s, n, t)
    close(klfast.kl_normal(m, s, n, t), want, rtol=1e-9, atol=1e-12)


@given(rows(weight), rows(logit))
def test_base_is_a_factor(pq, ab):
    assume(pq.any(axis=1).all())
    for base in (2, 10, 0.5):
        close(klfast.kl_discrete(*pq, base=base) * np.log(base), klfast.kl_discrete(*pq))
        close(klfast.kl_categorical(*ab, base=base) * np.log(base), klfast.kl_categorical(*ab))


@given(rows(whole), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_temperature_divides_the_logits(ab, temperature):
    a, b = ab / 64
    got = klfast.kl_categorical(a, b, temperature=temperature)
    close(got, klfast.kl_categorical(a / temperature, b / temperature))
