"""Normal distributions with diagonal covariance: means m, and scales, variances or log-variances.

    KL = 1/2 sum [ v_p/v_q - 1 - log(v_p/v_q) ] + 1/2 sum (m_p - m_q)^2 / v_q,
both sums of non-negative terms. The first bracket is
    phi(x) = e^x - 1 - x,                                          x = log v_p - log v_q,
    (d/z)(g + s) + (g - e ln2) - t,                                from variances,
    (d/z)((x+z)/z)(g + s(2-s)) + (g - 2 e ln2) - 2 t,              from scales,
with x, y the parameters of p and q, z = y 2^e near x, d = x - z, s = d/(x + z),
t = 2 atanh(s) - 2 s and g = 2^e - 1 (variances) or 4^e - 1 (scales). For e = 0 nothing cancels.
Every term is right to 8 ulp. Where the sides differ, both are converted to variances first; a
scale's square keeps its rounding error, a log-variance's exponential costs one ulp of v_p/v_q.
"""

from gufunc cimport INVALID
from libc.math cimport exp as libm_exp, expm1, fabs, log
from numpy cimport npy_intp
from discrete cimport log_ratio
from sums cimport LANES, RUN, Row, Sums, across_lanes, add, element, fold
from vecmath cimport (
    INFINITY, LN2, NAN, atanh_tail, exp, larger, match_exponent, phi, pow2, ratio_exponent, real,
    residual_product, smaller,
)

cdef enum Spread:
    SCALE
    VARIANCE
    LOG_VARIANCE

cdef enum:
    DIVERGENCE = 0
    DOUBT = LANES
    ACCUMULATORS = 2 * LANES


cdef inline real variance_of(real x, int spread) noexcept nogil:
    if spread == Spread.SCALE:
        return x * x
    if spread == Spread.VARIANCE:
        return x
    return exp(x, <real> 0)


cdef inline real square_rest(real x, real variance, int spread) noexcept nogil:
    """What the rounding of a scale's square left out."""
    if spread == Spread.SCALE:
        return -residual_product(x, x, variance)
    return 0


cdef inline void normal_terms(const real *m_p, const real *s_p, const real *m_q, const real *s_q,
                              int spread_p, int spread_q, int first, real *sums) noexcept nogil:
    """Add twice the terms of lanes first..LANES-1."""
    cdef int lane
    cdef real x, y, z, e, g, d, s, ratio, mean, term, doubt
    cdef real smallest = <real> (1.2e-38 if real is float else 2.3e-308)
    cdef real widest = <real> (60 if real is float else 500)      # |e|: 4^e stays normal
    cdef real highest = <real> (86 if real is float else 706)     # |log-variance| and |x|
    for lane in range(LANES):
        mean = m_p[lane] - m_q[lane]
        if spread_p == Spread.LOG_VARIANCE and spread_q == Spread.LOG_VARIANCE:
            x = s_p[lane] - s_q[lane]
            doubt = larger(larger(x, -x), larger(s_q[lane], -s_q[lane])) - highest
            term = phi(x, <real> 0) + mean * mean * exp(-s_q[lane], <real> 0)
        else:
            x, y = s_p[lane], s_q[lane]
            if spread_p != spread_q:
                x, y = variance_of(x, spread_p), variance_of(y, spread_q)
            e = ratio_exponent(larger(x, smallest), larger(y, smallest))
            z = match_exponent(larger(x, smallest), larger(y, smallest))
            doubt = larger(larger(e, -e) - widest, smallest - smaller(x, y))
            d = x - z
            if spread_p != spread_q and e == 0:
                d += (square_rest(s_p[lane], x, spread_p) - square_rest(s_q[lane], y, spread_q))
            s = d / (x + z)
            ratio = 1 / z
            if spread_p == Spread.SCALE and spread_q == Spread.SCALE:
                g = pow2(2 * e) - 1
                mean *= ratio * pow2(e)
                term = ((d * ratio) * ((x + z) * ratio) * (g + s * (2 - s))
                        + ((g - 2 * e * <real> LN2) - 2 * atanh_tail(s))) + mean * mean
            else:
                g = pow2(e) - 1
                term = ((d * ratio) * (g + s) + ((g - e * <real> LN2) - atanh_tail(s))
                        + mean * mean * ratio * pow2(e))
        sums[DIVERGENCE + lane] += term if lane >= first else <real> 0
        sums[DOUBT + lane] = sums[DOUBT + lane] if doubt <= 0 else 1  # NaN is in doubt


cdef inline void normal_block_of(const real **x, int n, int spread_p, int spread_q,
                                 Sums *into) noexcept nogil:
    cdef real sums[ACCUMULATORS]
    cdef double totals[LANES]
    cdef int i, step, lane, rest = n % LANES
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for lane in range(LANES):
        totals[lane] = 0
    for step in range(0, n // LANES, 8):
        for i in range(step, min(step + RUN, n // LANES)):
            normal_terms(x[0] + i * LANES, x[1] + i * LANES, x[2] + i * LANES, x[3] + i * LANES,
                         spread_p, spread_q, 0, sums)
        fold(sums, totals, LANES)
    if rest:
        i = n - LANES
        normal_terms(
            x[0] + i, x[1] + i, x[2] + i, x[3] + i, spread_p, spread_q, LANES - rest, sums)
        fold(sums, totals, LANES)
    add(into, 0, 0.5 * across_lanes(totals), 0, 0)
    for lane in range(LANES):
        into.doubtful |= sums[DOUBT + lane] != 0


cdef inline void normal_columns_of(const real **x, const npy_intp *stride, int n, int spread_p,
                                   int spread_q, Sums *into) noexcept nogil:
    cdef real sums[ACCUMULATORS]
    cdef double totals[LANES]
    cdef int i, step, lane
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for lane in range(LANES):
        totals[lane] = 0
    for step in range(0, n, 8):
        for i in range(step, min(step + RUN, n)):
            normal_terms(x[0] + i * stride[0], x[1] + i * stride[1], x[2] + i * stride[2],
                         x[3] + i * stride[3], spread_p, spread_q, 0, sums)
        fold(sums, totals, LANES)
    for lane in range(LANES):
        add(&into[lane], 0, 0.5 * totals[lane], 0, 0)
        into[lane].doubtful |= sums[DOUBT + lane] != 0


cdef inline void normal_block(const real **x, int n, const Row *row, Sums *into) noexcept nogil:
    """Add n elements; the common pairs of parametrisations have loops of their own."""
    if row.spread_p == Spread.SCALE and row.spread_q == Spread.SCALE:
        normal_block_of(x, n, Spread.SCALE, Spread.SCALE, into)
    elif row.spread_p == Spread.VARIANCE and row.spread_q == Spread.VARIANCE:
        normal_block_of(x, n, Spread.VARIANCE, Spread.VARIANCE, into)
    elif row.spread_p == Spread.LOG_VARIANCE and row.spread_q == Spread.LOG_VARIANCE:
        normal_block_of(x, n, Spread.LOG_VARIANCE, Spread.LOG_VARIANCE, into)
    else:
        normal_block_of(x, n, row.spread_p, row.spread_q, into)


cdef inline void normal_columns(const real **x, const npy_intp *step, int n, const Row *row,
                                Sums *into) noexcept nogil:
    """Add n elements of each of LANES rows."""
    if row.spread_p == Spread.SCALE and row.spread_q == Spread.SCALE:
        normal_columns_of(x, step, n, Spread.SCALE, Spread.SCALE, into)
    elif row.spread_p == Spread.VARIANCE and row.spread_q == Spread.VARIANCE:
        normal_columns_of(x, step, n, Spread.VARIANCE, Spread.VARIANCE, into)
    elif row.spread_p == Spread.LOG_VARIANCE and row.spread_q == Spread.LOG_VARIANCE:
        normal_columns_of(x, step, n, Spread.LOG_VARIANCE, Spread.LOG_VARIANCE, into)
    else:
        normal_columns_of(x, step, n, row.spread_p, row.spread_q, into)


cdef inline double log_variance(double x, int spread) noexcept nogil:
    if spread == Spread.LOG_VARIANCE:
        return x
    return 2 * log(x) if spread == Spread.SCALE else log(x)


cdef inline bint is_spread(double x, int spread) noexcept nogil:
    """Neither negative nor infinite; 0, a point mass, is one."""
    return x < INFINITY if spread == Spread.LOG_VARIANCE else 0 <= x < INFINITY


cdef inline bint is_point(double x, int spread) noexcept nogil:
    return x == -INFINITY if spread == Spread.LOG_VARIANCE else x == 0


cdef inline double log_variance_ratio(double x, double y, const Row *row) noexcept nogil:
    if row.spread_p == row.spread_q and row.spread_p != Spread.LOG_VARIANCE:
        return log_ratio(x, y) * (2 if row.spread_p == Spread.SCALE else 1)
    return log_variance(x, row.spread_p) - log_variance(y, row.spread_q)


cdef inline double normal_hard_value(const Row *row, int *status) noexcept nogil:
    """Bad values, point masses, and variances that the fast formulas have no range for."""
    cdef double m_p, s_p, m_q, s_q, x, scaled, result = 0
    cdef bint bad = False, infinite = False
    cdef npy_intp i
    for i in range(row.length):
        m_p, s_p = element(row, 0, i), element(row, 1, i)
        m_q, s_q = element(row, 2, i), element(row, 3, i)
        if m_p != m_p or s_p != s_p or m_q != m_q or s_q != s_q:
            return NAN
        bad |= fabs(m_p) == INFINITY or fabs(m_q) == INFINITY
        bad |= not (is_spread(s_p, row.spread_p) and is_spread(s_q, row.spread_q))
        bad |= is_point(s_p, row.spread_p) and is_point(s_q, row.spread_q)
        infinite |= is_point(s_p, row.spread_p) or is_point(s_q, row.spread_q)
        if bad or infinite:
            continue
        x = log_variance_ratio(s_p, s_q, row)
        scaled = m_p - m_q
        if scaled != 0:
            scaled = libm_exp(2 * log(fabs(scaled)) - log_variance(s_q, row.spread_q))
        result += 0.5 * ((expm1(x) - x) + scaled)
    if bad:
        status[0] |= INVALID
        return NAN
    return INFINITY if infinite else result
