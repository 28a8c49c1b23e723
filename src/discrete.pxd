"""Discrete distributions: KL(P/Sp || Q/Sq) for weights p, q >= 0 with sums Sp, Sq.

With q' = r q for any r close to Sp/Sq, every term of
    G = sum p log(p/q') - p + q'
is non-negative, and  KL = G/Sp - (u - log1p(u)),  u = sum(q' - p)/Sp,  exactly: the correction is
of second order, so nothing cancels when P is close to Q. One term, with z = q' 2^e and
s = (p - z)/(p + z), where the integer e brings p/z near 1:
    p e ln2 + (q' - z) + (p - z) s + p (2 atanh(s) - 2 s),
which for e = 0 is (p - z) s + O(s^3): no difference of logarithms. A term is right to 4 ulp.
p = 0 gives q' and p = q = 0 gives 0 by the same formula.

As it stands, sum p log(p/q) = G + (Sp - Sq), or the sum of p (e ln2 + 2 atanh(s)), whichever has
the smaller terms.
"""

from gufunc cimport INVALID
from libc.math cimport fabs, frexp, ldexp
from numpy cimport npy_intp
from sums cimport (
    LANES, RUN, Guess, Row, Sums, across_lanes, add, clear, divergence_of, element, fold, round_off,
)
from vecmath cimport (
    INFINITY, LN2, NAN, atanh_tail, larger, match_exponent, ratio_exponent, real,
    residual_product, smaller,
)

cdef enum:
    WEIGHT = 0
    DIVERGENCE = LANES
    EXCESS = 2 * LANES
    DIRECT = 3 * LANES
    ADDED = 4 * LANES
    DOUBT = 4 * LANES          # not a sum: 1 where a weight is out of range
    EXACT_EXCESS = 5 * LANES   # in two parts: as it stands it counts in first order
    EXCESS_REST = 6 * LANES
    ACCUMULATORS = 7 * LANES


cdef inline real smallest_weight(bint scaled, real of_type) noexcept nogil:
    """Weights in (0, this) are left to a wider type: exponents are read from their bits."""
    if real is float:
        return <float> 7.888609052210118e-31 if scaled else <float> 2.350988701644575e-38
    else:
        return 1.1830521861667747e-271 if scaled else 4.450147717014403e-308


cdef inline void discrete_terms(const real *p, const real *q, const real *ratio, real floor,
                                bint scaled, bint normalize, int first, real *sums) noexcept nogil:
    """Add the terms of lanes first..LANES-1. `scaled`: the ratio is not 1."""
    cdef int lane
    cdef real x, y, e, z, difference, s, tail, term, excess, limit, direct, before, grown, added
    for lane in range(LANES):
        x = p[lane]
        y = q[lane] * ratio[lane] if scaled else q[lane]
        e = ratio_exponent(larger(x, floor), larger(y, floor))
        z = match_exponent(larger(x, floor), larger(y, floor))
        difference = x - z
        if scaled:  # p - r q in one rounding where it matters, at e = 0
            difference += residual_product(ratio[lane], q[lane], y) if e == 0 else <real> 0
        s = difference / (x + z)
        tail = atanh_tail(s)
        term = x * (e * <real> LN2 + tail) + (difference * s + (y - z))
        excess = (y - z) - difference
        limit = floor if x > 0 else <real> 0
        excess = excess if lane >= first else <real> 0
        sums[DIVERGENCE + lane] += term if lane >= first else <real> 0
        sums[DOUBT + lane] = 1 if smaller(x, y) < limit else sums[DOUBT + lane]
        if normalize:
            sums[WEIGHT + lane] += x if lane >= first else <real> 0
            sums[EXCESS + lane] += excess
        else:
            direct = x * (e * <real> LN2 + (tail + 2 * s))
            direct = direct if lane >= first else <real> 0
            sums[WEIGHT + lane] += larger(direct, -direct)
            sums[DIRECT + lane] += direct
            before = sums[EXACT_EXCESS + lane]
            grown = before + excess
            added = grown - before
            sums[EXCESS_REST + lane] += (before - (grown - added)) + (excess - added)
            sums[EXACT_EXCESS + lane] = grown


cdef inline void add_exact_excess(const real *sums, int lane, Sums *into) noexcept nogil:
    add(into, 0, 0, sums[EXACT_EXCESS + lane], 0)
    add(into, 0, 0, sums[EXCESS_REST + lane], 0)


cdef inline void discrete_block(const real **x, int n, bint scaled, bint normalize,
                                const Guess *guess, Sums *into) noexcept nogil:
    """Add n >= LANES elements; the last lanes overlap what was added before and do not count."""
    cdef real sums[ACCUMULATORS]
    cdef double totals[ADDED]
    cdef real ratio[LANES]
    cdef real floor = smallest_weight(scaled, <real> 0)
    cdef int i, step, lane, rest = n % LANES
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for i in range(ADDED):
        totals[i] = 0
    for lane in range(LANES):
        ratio[lane] = <real> guess.ratio
    for step in range(0, n // LANES, 8):
        for i in range(step, min(step + RUN, n // LANES)):
            discrete_terms(
                x[0] + i * LANES, x[1] + i * LANES, ratio, floor, scaled, normalize, 0, sums)
        fold(sums, totals, DIRECT if normalize else ADDED)
    if rest:
        discrete_terms(x[0] + n - LANES, x[1] + n - LANES, ratio, floor, scaled, normalize,
                       LANES - rest, sums)
        fold(sums, totals, DIRECT if normalize else ADDED)
    add(into, across_lanes(&totals[WEIGHT]), across_lanes(&totals[DIVERGENCE]),
        across_lanes(&totals[EXCESS]), across_lanes(&totals[DIRECT]))
    for lane in range(LANES):
        add_exact_excess(sums, lane, into)
        into.doubtful |= sums[DOUBT + lane] != 0


cdef inline void discrete_columns(const real **x, const npy_intp *stride, int n, bint scaled,
                                  bint normalize, const Guess *guess, Sums *into) noexcept nogil:
    """Add n elements of each of those of LANES rows that are `scaled` or are not; their elements
    lie `stride` apart."""
    cdef real sums[ACCUMULATORS]
    cdef double totals[ADDED]
    cdef real ratio[LANES]
    cdef real floor = smallest_weight(scaled, <real> 0)
    cdef int i, step, lane
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for i in range(ADDED):
        totals[i] = 0
    for lane in range(LANES):
        ratio[lane] = <real> guess[lane].ratio
    for step in range(0, n, 8):
        for i in range(step, min(step + RUN, n)):
            discrete_terms(x[0] + i * stride[0], x[1] + i * stride[1], ratio, floor, scaled,
                           normalize, 0, sums)
        fold(sums, totals, DIRECT if normalize else ADDED)
    for lane in range(LANES):
        if (guess[lane].ratio != 1) != scaled:
            continue
        add(&into[lane], totals[WEIGHT + lane], totals[DIVERGENCE + lane], totals[EXCESS + lane],
            totals[DIRECT + lane])
        add_exact_excess(sums, lane, &into[lane])
        into[lane].doubtful |= sums[DOUBT + lane] != 0


cdef inline double total(const real *x, int n) noexcept nogil:
    cdef real sums[LANES]
    cdef int i, lane, rest = n % LANES
    cdef double result = 0
    for lane in range(LANES):
        sums[lane] = 0
    for i in range(n // LANES):
        for lane in range(LANES):
            sums[lane] += x[i * LANES + lane]
    for i in range(n - rest, n):
        result += x[i]
    for lane in range(LANES):
        result += sums[lane]
    return result


cdef inline double ratio_guess(double total_p, double total_q) noexcept nogil:
    """1, which needs no scaling, unless the totals differ by more than a factor of two."""
    cdef double ratio = total_p / total_q
    if 0.5 <= ratio <= 2 or not 9.5e-7 < ratio < 1.05e6:
        return 1
    return ratio


cdef inline bint discrete_guess(const real **x, int n, Guess *guess) noexcept nogil:
    guess.ratio = ratio_guess(total(x[0], n), total(x[1], n))
    return True


cdef inline void discrete_guess_columns(const real **x, const npy_intp *step, int n,
                                        Guess *guesses) noexcept nogil:
    """As discrete_guess, for LANES rows."""
    cdef real total_p[LANES]
    cdef real total_q[LANES]
    cdef int i, lane
    for lane in range(LANES):
        total_p[lane] = total_q[lane] = 0
    for i in range(n):
        for lane in range(LANES):
            total_p[lane] += x[0][i * step[0] + lane]
            total_q[lane] += x[1][i * step[1] + lane]
    for lane in range(LANES):
        guesses[lane].ratio = ratio_guess(total_p[lane], total_q[lane])


cdef inline bint discrete_refine(const Sums *sums, Guess *guess) noexcept nogil:
    """The exact ratio of the sums; False when it is out of the fast formula's range."""
    guess.ratio *= sums.weight / (sums.weight + sums.excess)
    return 9.5e-7 < guess.ratio < 1.05e6


cdef inline double plain_sum(const Sums *sums) noexcept nogil:
    """sum p log(p/q), from the form whose terms are smaller; weight holds sum |p log(p/q)|."""
    if sums.weight <= sums.divergence + fabs(sums.excess):
        return sums.direct
    return sums.divergence - sums.excess


cdef inline double log_ratio(double p, double q) noexcept nogil:
    """log(p/q) for any positive finite p, q, subnormal or far apart. 2 ulp."""
    cdef int exponent_p, exponent_q
    cdef double x = frexp(p, &exponent_p), y = frexp(q, &exponent_q)
    cdef double e = ratio_exponent(x, y), z = match_exponent(x, y)
    cdef double s = (x - z) / (x + z)
    return (e + exponent_p - exponent_q) * LN2 + (2 * s + atanh_tail(s))


cdef inline double discrete_hard_value(const Row *row, int *status) noexcept nogil:
    """Bad values, p > 0 where q = 0, and weights that the fast formula has no range for."""
    cdef double p, q, largest_p = 0, largest_q = 0
    cdef bint bad = False, infinite = False
    cdef npy_intp i
    for i in range(row.length):
        p, q = element(row, 0, i), element(row, 1, i)
        if p != p or q != q:
            return NAN
        bad |= not (0 <= p < INFINITY and 0 <= q < INFINITY)
        infinite |= p > 0 and q == 0
        largest_p, largest_q = larger(p, largest_p), larger(q, largest_q)
    if bad or row.normalize and (largest_p == 0 or largest_q == 0):
        status[0] |= INVALID
        return NAN
    if infinite:
        return INFINITY
    if not row.normalize:
        return hard_plain_sum(row)
    return hard_divergence(row, largest_p, largest_q)


cdef inline double hard_plain_sum(const Row *row) noexcept nogil:
    cdef double p, q, direct
    cdef npy_intp i
    cdef Sums sums
    clear(&sums)
    for i in range(row.length):
        p, q = element(row, 0, i), element(row, 1, i)
        direct = p * log_ratio(p, q) if p > 0 else 0
        add(&sums, fabs(direct), hard_term(p, q, p - q), q - p, direct)
    round_off(&sums)
    return plain_sum(&sums)


cdef inline double hard_divergence(const Row *row, double largest_p,
                                   double largest_q) noexcept nogil:
    """The formula at the head, one element at a time, weights scaled by powers of two so that the
    largest are near 1 and sums cannot overflow."""
    cdef int up_p, up_q
    cdef double p, q, scaled_q, difference, total_p = 0, total_q = 0, ratio
    cdef npy_intp i
    cdef Sums sums
    frexp(largest_p, &up_p)
    frexp(largest_q, &up_q)
    for i in range(row.length):
        total_p += ldexp(element(row, 0, i), -up_p)
        total_q += ldexp(element(row, 1, i), -up_q)
    ratio = total_p / total_q
    clear(&sums)
    for i in range(row.length):
        p, q = ldexp(element(row, 0, i), -up_p), ldexp(element(row, 1, i), -up_q)
        scaled_q = ratio * q
        difference = (p - scaled_q) + residual_product(ratio, q, scaled_q)
        add(&sums, p, hard_term(p, scaled_q, difference), -difference, 0)
    round_off(&sums)
    return divergence_of(&sums)


cdef inline double hard_term(double p, double q, double difference) noexcept nogil:
    """p log(p/q) - p + q, given p - q."""
    cdef double s
    if p == 0:
        return q
    if fabs(difference) < 0.25 * p:
        s = difference / (p + q)
        return difference * s + p * atanh_tail(s)
    if q == 0:  # underflow of a ratio beyond 1e300
        return INFINITY
    return p * log_ratio(p, q) - difference
