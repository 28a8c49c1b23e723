"""Discrete distributions: KL(P/Sp || Q/Sq) for weights p, q >= 0 with sums Sp, Sq.

With q' = r q for any r close to Sp/Sq, every term of
    G = sum p log(p/q') - p + q'
is non-negative, and  KL = G/Sp - (u - log1p(u)),  u = sum(q' - p)/Sp,  exactly: the correction is
of second order, so nothing cancels when P is close to Q. One term, with z = q' 2^e and
s = (p - z)/(p + z), where the integer e brings p/z near 1:
    p e ln2 + (q' - z) + (p - z) s + p (2 atanh(s) - 2 s),
which for e = 0 is (p - z) s + O(s^3): no difference of logarithms. The first two nearly cancel
where log(p/q') is about ln2/2; added in one rounding, they leave a term right to 4 ulp.
p = 0 gives q' and p = q = 0 gives 0 by the same formula.

As it stands, sum p log(p/q) = G + (Sp - Sq), or the sum of p (e ln2 + 2 atanh(s)), whichever has
the smaller terms.
"""

from gufunc cimport Watch, is_unwanted
from libc.math cimport fabs, frexp, ldexp, log, log1p
from numpy cimport npy_intp
from sums cimport (
    LANES, MAX_GROUPS, MOST_STEPS, RUN, Ahead, Format, LaneParts, LaneSums, Row,
    RowLanes, Slope, Sums, Trait, add, clear, clear_lanes, copy, divergence_of, element, fill, fold,
    full_run, keep_from, largest, least, round_off, row_of, row_sums, run_length, steps_together,
    take_lanes, take_lanes_exactly, two_sum,
)
from vecmath cimport (
    INFINITY, LN2, NAN, at_least, atanh_tail, larger, match_exponent, plus_product, ratio_exponent,
    ratio_log, real, residual_product, smaller,
)


cdef inline real smallest_weight(bint scaled, real of_type) noexcept nogil:
    """Weights in (0, this) are left to a wider type: exponents are read from their bits."""
    if real is float:
        return <float> 7.888609052210118e-31 if scaled else <float> 2.350988701644575e-38
    else:
        return 1.1830521861667747e-271 if scaled else 4.450147717014403e-308


cdef inline real largest_weight(real of_type) noexcept nogil:
    """Below this, p + z cannot overflow."""
    if real is float:
        return 1e38
    else:
        return 5e307


cdef inline real counted(real x, int lane, bint partial, int first) noexcept nogil:
    """A weight, or 0 before the first lane that counts of a partial vector; compared as in
    keep_from."""
    if partial:
        return x if <real> lane >= <real> first else <real> 0
    return x


cdef inline void discrete_factors(const real *p, const real *q, npy_intp step_p, npy_intp step_q,
                                  int n, bint partial, int first, bint scaled, const real *ratio,
                                  real *s, real *head, real *excess,
                                  real *lowest) noexcept nogil:
    """What the terms are made of: s, and all but their series. `scaled`: the ratio is not 1; adds
    to the excess sum(q' - p)."""
    cdef int lane, i, at
    cdef real x, y, x_normal, e_ln2, z, difference
    cdef real floor = smallest_weight(scaled, <real> 0)
    for i in range(n):
        for lane in range(LANES):
            at = i * LANES + lane
            x, y = p[i * step_p + lane], q[i * step_q + lane]
            if scaled:
                y *= ratio[lane]
            lowest[lane] = smaller(smaller(x, y), lowest[lane])
            x, y = counted(x, lane, partial, first), counted(y, lane, partial, first)
            x_normal = at_least(floor, x)
            e_ln2, z = ratio_log(x_normal, y), match_exponent(x_normal, y)
            difference = x - z
            if scaled:  # p - r q in one rounding where it matters, at e = 0
                difference += (residual_product(ratio[lane], q[i * step_q + lane], y)
                               if e_ln2 == 0 else <real> 0)
                excess[lane] += (y - z) - difference
            s[at] = difference / (x + z)
            head[at] = difference * s[at] + plus_product(x, e_ln2, y - z)


cdef inline void add_terms(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                           bint partial, int first, bint scaled, const real *s, const real *head,
                           real *weights, real *divergences,
                           real *excesses) noexcept nogil:
    cdef int lane, i, at
    cdef real x, y
    cdef real weight[LANES]
    cdef real divergence[LANES]
    cdef real excess[LANES]
    for lane in range(LANES):
        weight[lane] = divergence[lane] = excess[lane] = 0
    for i in range(n):
        for lane in range(LANES):
            at, x, y = i * LANES + lane, p[i * step_p + lane], q[i * step_q + lane]
            x, y = counted(x, lane, partial, first), counted(y, lane, partial, first)
            weight[lane] += x
            divergence[lane] += x * atanh_tail(s[at]) + head[at]
            if not scaled:
                excess[lane] += y - x
    fold(weight, weights)
    fold(divergence, divergences)
    if not scaled:
        fold(excess, excesses)


cdef inline void add_steps(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                           bint partial, int first, bint scaled, const real *ratios, real *lowest,
                           real *weight, real *divergence, real *excess) noexcept nogil:
    """Add n terms, at most MOST_STEPS, of each lane, or, if `partial`, of those from `first` on:
    one loop up to the quotients, one for their series, in two sums where one would be too long."""
    cdef int half = n if n <= RUN else (n + 1) // 2
    cdef real s[MOST_STEPS * LANES]
    cdef real head[MOST_STEPS * LANES]
    discrete_factors(p, q, step_p, step_q, n, partial, first, scaled, ratios, s, head, excess,
                     lowest)
    add_terms(p, q, step_p, step_q, half, partial, first, scaled, s, head, weight, divergence,
              excess)
    if n > half:
        add_terms(p + half * step_p, q + half * step_q, step_p, step_q, n - half, partial, first,
                  scaled, s + half * LANES, head + half * LANES, weight, divergence, excess)


cdef inline void discrete_run(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                              int steps, int first, bint scaled, const real *ratios,
                              real *lowest_so_far, Ahead *ahead, real *weights, real *divergences,
                              real *drifts) noexcept nogil:
    """The sums of n terms of each lane, and of the lanes from `first` on, if it is not 0, of one
    more, from a vector that overlaps the last: read before the others, it costs half of the speed
    from memory."""
    cdef int lane
    cdef real weight[LANES]
    cdef real divergence[LANES]
    cdef real excess[LANES]
    cdef real lowest[LANES]
    copy(lowest_so_far, lowest)
    for lane in range(LANES):
        weight[lane] = divergence[lane] = excess[lane] = 0
    while n >= steps:
        ask_for(ahead, 2, steps, <real> 0)
        add_steps(p, q, step_p, step_q, steps, False, 0, scaled, ratios, lowest, weight, divergence,
                  excess)
        p, q, n = p + steps * step_p, q + steps * step_q, n - steps
    if n > 0:
        ask_for(ahead, 2, n, <real> 0)
        add_steps(p, q, step_p, step_q, n, False, 0, scaled, ratios, lowest, weight, divergence,
                  excess)
        p, q = p + n * step_p, q + n * step_q
    if first:
        ask_for(ahead, 2, 1, <real> 0)
        add_steps(p - first, q - first, LANES, LANES, 1, True, first, scaled, ratios, lowest,
                  weight, divergence, excess)
    copy(lowest, lowest_so_far)
    copy(weight, weights)
    copy(divergence, divergences)
    for lane in range(LANES):
        drifts[lane] = excess[lane] - divergence[lane]


cdef inline void plain_run(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                           int first, real *lowest_so_far, LaneSums *into) noexcept nogil:
    """Add n terms of the lanes first..LANES-1 to the sum as it stands: the excess counts in first
    order and is summed in two parts, and the weight is the sum of |p log(p/q)|."""
    cdef int lane, i
    cdef real x, y, x_normal, e_ln2, z, difference, s, tail, term, before, added
    cdef real floor = smallest_weight(False, <real> 0)
    cdef real weight[LANES]
    cdef real divergence[LANES]
    cdef real direct[LANES]
    cdef real excess[LANES]
    cdef real excess_rest[LANES]
    cdef real lowest[LANES]
    copy(lowest_so_far, lowest)
    for lane in range(LANES):
        weight[lane] = divergence[lane] = direct[lane] = excess[lane] = excess_rest[lane] = 0
    for i in range(n):
        for lane in range(LANES):
            x, y = p[i * step_p + lane], q[i * step_q + lane]
            x_normal = at_least(floor, x)
            e_ln2, z = ratio_log(x_normal, y), match_exponent(x_normal, y)
            difference = x - z
            s = difference / (x + z)
            tail = atanh_tail(s)
            divergence[lane] += x * tail + (difference * s + plus_product(x, e_ln2, y - z))
            term = x * (e_ln2 + (tail + (s + s)))
            direct[lane] += term
            weight[lane] += larger(term, -term)
            term = y - x
            before = excess[lane]
            excess[lane] = before + term
            added = excess[lane] - before
            excess_rest[lane] += (before - (excess[lane] - added)) + (term - added)
            lowest[lane] = smaller(smaller(x, y) if x < largest_weight(x) else -1, lowest[lane])
    copy(lowest, lowest_so_far)
    keep_from(first, weight)
    keep_from(first, divergence)
    keep_from(first, direct)
    keep_from(first, excess)
    keep_from(first, excess_rest)
    fold(weight, into.weight)
    fold(divergence, into.divergence)
    fold(direct, into.direct)
    fold(excess_rest, into.rest)
    for lane in range(LANES):
        into.drift[lane] = two_sum(into.drift[lane], excess[lane], &into.rest[lane])
        into.drift[lane] = two_sum(into.drift[lane], -divergence[lane], &into.rest[lane])


cdef inline void add_run(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                         int steps, bint scaled, bint normalize, const real *ratio, real *lowest,
                         Ahead *ahead, LaneSums *into) noexcept nogil:
    """Add n terms of each lane."""
    cdef real weight[LANES]
    cdef real divergence[LANES]
    cdef real drift[LANES]
    if not normalize:
        ask_for(ahead, 2, n, <real> 0)
        plain_run(p, q, step_p, step_q, n, 0, lowest, into)
        return
    discrete_run(p, q, step_p, step_q, n, steps, 0, scaled, ratio, lowest, ahead, weight,
                 divergence, drift)
    fold(weight, into.weight)
    fold(divergence, into.divergence)
    fold(drift, into.drift)


cdef inline void add_last(const real *p, const real *q, int first, bint scaled, bint normalize,
                          const real *ratio, real *lowest, Ahead *ahead,
                          LaneSums *into) noexcept nogil:
    """Add the lanes first..LANES-1 of a vector that overlaps the last, which ends at p and q."""
    cdef real weight[LANES]
    cdef real divergence[LANES]
    cdef real drift[LANES]
    if not normalize:
        ask_for(ahead, 2, 1, <real> 0)
        plain_run(p - first, q - first, LANES, LANES, 1, first, lowest, into)
        return
    discrete_run(p, q, LANES, LANES, 0, 1, first, scaled, ratio, lowest, ahead,
                 weight, divergence, drift)
    fold(weight, into.weight)
    fold(divergence, into.divergence)
    fold(drift, into.drift)


cdef inline void add_runs(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                          int first, bint scaled, bint normalize, const real *ratio, real *lowest,
                          Ahead *ahead, LaneSums *into) noexcept nogil:
    """Add n terms of each lane, and of the lanes from `first` on, if it is not 0, one more, from a
    vector that overlaps the last."""
    cdef int length, full = full_run(2 if normalize else 1, <real> 0)
    while n > 0:
        length = run_length(n, 2 if normalize else 1, <real> 0)
        if length == full:  # a constant for the loops
            add_run(p, q, step_p, step_q, full, steps_together(<real> 0), scaled, normalize, ratio,
                    lowest, ahead, into)
        else:
            add_run(p, q, step_p, step_q, length, steps_together(<real> 0), scaled, normalize,
                    ratio, lowest, ahead, into)
        p, q, n = p + length * step_p, q + length * step_q, n - length
    if first:
        add_last(p, q, first, scaled, normalize, ratio, lowest, ahead, into)


cdef inline void discrete_groups(const real *p, const real *q, npy_intp step_p, npy_intp step_q,
                                 int n, int groups, int more, bint scaled, bint normalize,
                                 const real *ratio, real *lowest, Ahead *ahead,
                                 LaneParts *into) noexcept nogil:
    cdef int group, at
    for group in range(groups):
        at = group * LANES
        prefetch_columns(p + at, step_p, n, more)
        prefetch_columns(q + at, step_q, n, more)
        if more and normalize:
            add_run(p + at, q + at, step_p, step_q, n, 1, scaled, True, ratio + at, lowest + at,
                    NULL, &into[group].sums)
        else:
            add_runs(p + at, q + at, step_p, step_q, n, 0, scaled, normalize, ratio + at,
                     lowest + at, ahead, &into[group].sums)


cdef void discrete_loop(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                        int groups, int more, bint scaled, bint normalize, const real *ratio,
                        real *lowest, Ahead *ahead, LaneParts *into) noexcept nogil:
    """Add n terms of each lane of groups that lie side by side, and ask for so many more of their
    terms and for what is `ahead`."""
    if not normalize:
        discrete_groups(p, q, step_p, step_q, n, groups, more, False, False, ratio, lowest,
                        ahead, into)
    elif scaled:
        discrete_groups(p, q, step_p, step_q, n, groups, more, True, True, ratio, lowest,
                        ahead, into)
    else:
        discrete_groups(p, q, step_p, step_q, n, groups, more, False, True, ratio, lowest,
                        ahead, into)


cdef void lower_margins(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                        bint scaled, const real *ratios, real *margins) noexcept nogil:
    """By how much weights are above the least that the fast formula has a range for, which what is
    0 in P need not be; negative where one is too large, too."""
    cdef int lane, i
    cdef real x, y, above
    cdef real floor = smallest_weight(scaled, <real> 0)
    cdef real margin[LANES]
    copy(margins, margin)
    for i in range(n):
        for lane in range(LANES):
            x, y = p[i * step_p + lane], q[i * step_q + lane] * ratios[lane]
            above = smaller(x, y) - (floor if x > 0 else <real> 0)
            margin[lane] = smaller(above if x < largest_weight(x) else -1, margin[lane])
    copy(margin, margins)


cdef inline bint out_of_range(double margin, double weight, real of_type) noexcept nogil:
    return (margin < 0) | (weight >= largest_weight(of_type))


cdef inline void discrete_rows_of(const real **x, const npy_intp *outer, int n, int begin, int end,
                                  const double *conditions, bint scaled, bint normalize,
                                  bint one_run, RowLanes *rows, LaneParts *into) noexcept nogil:
    """The sums of neighbouring rows, and what is the lowest in each lane of each of them."""
    cdef const real *p
    cdef const real *q
    cdef real *sums = <real *> rows.sums
    cdef real *lowest = <real *> rows.lowest
    cdef LaneSums lanes
    cdef real ratio[LANES]
    cdef npy_intp size = n * sizeof(real)
    cdef npy_intp beyond_p = distance_ahead(outer[0], size, 2)
    cdef npy_intp beyond_q = distance_ahead(outer[1], size, 2)
    cdef Ahead ahead
    cdef int row
    fill(ratio, <real> 1)
    for row in range(begin, end):
        fill(lowest + row * LANES, <real> 1)
        if conditions[row] >= 0:
            continue
        if scaled:
            fill(ratio, <real> into.ratio[row])
        p, q = row_of(x[0], outer[0], row), row_of(x[1], outer[1], row)
        ahead.data[0], ahead.data[1] = <const char *> p + beyond_p, <const char *> q + beyond_q
        if one_run:
            discrete_run(p, q, LANES, LANES, n // LANES, steps_together(<real> 0),
                         (LANES - n % LANES) % LANES, scaled, ratio, lowest + row * LANES, &ahead,
                         sums + row * LANES, sums + (LANES + row) * LANES,
                         sums + (2 * LANES + row) * LANES)
            continue
        clear_lanes(&lanes)
        add_runs(p, q, LANES, LANES, n // LANES, (LANES - n % LANES) % LANES, scaled, normalize,
                 ratio, lowest + row * LANES, &ahead, &lanes)
        if normalize:
            take_lanes(&lanes, row, into)
        else:
            take_lanes_exactly(&lanes, row, into)
    if one_run:
        row_sums(sums, begin, end, into.sums.weight)
        row_sums(sums + LANES * LANES, begin, end, into.sums.divergence)
        row_sums(sums + 2 * LANES * LANES, begin, end, into.sums.drift)


cdef inline bint any_low(const real *lowest, int begin, int end, real floor) noexcept nogil:
    cdef real joint[LANES]
    cdef int row, lane
    fill(joint, <real> 1)
    for row in range(begin, end):
        for lane in range(LANES):
            joint[lane] = smaller(lowest[row * LANES + lane], joint[lane])
    return least(joint) < floor


cdef double row_margin(const real *p, const real *q, int n, bint scaled,
                       double ratio) noexcept nogil:
    """The smallest margin of n elements, LANES or more once padded."""
    cdef real ratios[LANES]
    cdef real margins[LANES]
    cdef npy_intp last = n - LANES
    fill(ratios, <real> ratio)
    fill(margins, <real> 0)
    lower_margins(p, q, LANES, LANES, n // LANES, scaled, ratios, margins)
    lower_margins(p + last, q + last, LANES, LANES, 1, scaled, ratios, margins)
    return least(margins)


cdef void discrete_rows(const real **x, const npy_intp *outer, int n, int begin, int end,
                        const double *conditions, bint normalize, LaneParts *into) noexcept nogil:
    """The sums of n elements, LANES or more once padded, of the rows begin..end-1 with a negative
    condition, which lie `outer` bytes apart; the last lanes overlap what was added before and do
    not count."""
    cdef RowLanes rows
    cdef real *lowest = <real *> rows.lowest
    cdef real floor = smallest_weight(into.scaled, <real> 0)
    cdef double margin
    cdef int row
    cdef bint low
    cdef bint one_run = run_length(n // LANES, 2, <real> 0) == n // LANES
    if not normalize:
        discrete_rows_of(x, outer, n, begin, end, conditions, False, False, False, &rows, into)
    elif into.scaled and one_run:
        discrete_rows_of(x, outer, n, begin, end, conditions, True, True, True, &rows, into)
    elif into.scaled:
        discrete_rows_of(x, outer, n, begin, end, conditions, True, True, False, &rows, into)
    elif one_run:
        discrete_rows_of(x, outer, n, begin, end, conditions, False, True, True, &rows, into)
    else:
        discrete_rows_of(x, outer, n, begin, end, conditions, False, True, False, &rows, into)
    low = any_low(lowest, begin, end, floor)
    for row in range(begin, end):
        margin = 0
        if low and least(lowest + row * LANES) < floor:
            margin = row_margin(row_of(x[0], outer[0], row), row_of(x[1], outer[1], row), n,
                                into.scaled, into.ratio[row])
        into.doubtful[row] = out_of_range(margin, into.sums.weight[row], <real> 0)


cdef void doubt_columns(const real *p, const real *q, npy_intp step_p, npy_intp step_q, int n,
                        const real *ratios, real *lowest, LaneParts *into) noexcept nogil:
    """Whether n elements of each of LANES rows are in range, the lowest of which is known."""
    cdef int lane
    if least(lowest) < smallest_weight(into.scaled, <real> 0):
        fill(lowest, <real> 0)
        lower_margins(p, q, step_p, step_q, n, into.scaled, ratios, lowest)
    for lane in range(LANES):
        into.doubtful[lane] = 1 if out_of_range(
            lowest[lane], into.sums.weight[lane], <real> 0) else into.doubtful[lane]


cdef void discrete_columns(const real **x, const npy_intp *step, int n, int groups, int together,
                           bint normalize, Ahead *ahead, LaneParts *into) noexcept nogil:
    """Add n elements of each of LANES rows; elements lie `step` apart. Groups side by side, either
    all scaled or none: `together` elements of each group, then the next."""
    cdef real ratios[MAX_GROUPS * LANES]
    cdef real lowest[MAX_GROUPS * LANES]
    cdef int lane, group, at, start = 0
    for group in range(groups):
        for lane in range(LANES):
            ratios[group * LANES + lane] = <real> into[group].ratio[lane]
            lowest[group * LANES + lane] = 1
    while start < n:
        discrete_loop(x[0] + start * step[0], x[1] + start * step[1], step[0], step[1],
                      min(together, n - start), groups, together if together < n else 0,
                      into.scaled, normalize, ratios, lowest, ahead, into)
        start += together
    for group in range(groups):
        at = group * LANES
        doubt_columns(x[0] + at, x[1] + at, step[0], step[1], n, ratios + at, lowest + at,
                      &into[group])


cdef inline double usable(double ratio) noexcept nogil:
    """1, which needs no scaling, where products with the ratio leave the fast formula's range."""
    ratio = ratio if ratio > 9.5e-7 else 1
    return ratio if ratio < 1.05e6 else 1


cdef inline bint discrete_refine(double weight, double divergence, double drift,
                                 double *ratio) noexcept nogil:
    """The exact ratio of the sums; False when it is out of the fast formula's range."""
    ratio[0] *= weight / (weight + (divergence + drift))
    return ratio[0] == usable(ratio[0])


cdef inline double plain_sum(double weight, double divergence, double drift,
                             double direct) noexcept nogil:
    """sum p log(p/q), from the form whose terms are smaller; weight holds sum |p log(p/q)|."""
    return direct if weight <= divergence + fabs(divergence + drift) else -drift


cdef inline double log_ratio(double p, double q) noexcept nogil:
    return log_scaled_ratio(p, q, 0)


cdef inline double log_scaled_ratio(double p, double q, int up) noexcept nogil:
    """log(2^up p/q) for any positive finite p, q, subnormal or far apart. 2 ulp."""
    cdef int exponent_p, exponent_q
    cdef double x = frexp(p, &exponent_p), y = frexp(q, &exponent_q)
    cdef double e = ratio_exponent(x, y), z = match_exponent(x, y)
    cdef double s = (x - z) / (x + z)
    return (e + exponent_p - exponent_q + up) * LN2 + (2 * s + atanh_tail(s))


cdef int discrete_traits(const double **x, int n) noexcept nogil:
    """Of n elements, LANES or more once padded."""
    cdef double p, q
    cdef double lowest[LANES]
    cdef double highest[LANES]
    cdef double support[LANES]   # the least q where p > 0
    cdef double mass_p[LANES]
    cdef double mass_q[LANES]
    cdef double missing[LANES]
    cdef int lane, step, at
    for lane in range(LANES):
        lowest[lane] = mass_p[lane] = mass_q[lane] = missing[lane] = 0
        support[lane] = 1
    for step in range((n + LANES - 1) // LANES):
        at = min(step * LANES, n - LANES)
        for lane in range(LANES):
            p, q = x[0][at + lane], x[1][at + lane]
            missing[lane] = missing[lane] if p == p else 1
            missing[lane] = missing[lane] if q == q else 1
            lowest[lane] = smaller(smaller(p, q), lowest[lane])
            mass_p[lane], mass_q[lane] = larger(p, mass_p[lane]), larger(q, mass_q[lane])
            support[lane] = smaller(q if p > 0 else 1, support[lane])
    for lane in range(LANES):
        highest[lane] = larger(mass_p[lane], mass_q[lane])
    return (
        (Trait.HAS_NAN if largest(missing) > 0 else 0)
        | (Trait.HAS_BAD if least(lowest) < 0 or largest(highest) == INFINITY else 0)
        | (Trait.HAS_INFINITE if least(support) == 0 else 0)
        | (Trait.HAS_P if largest(mass_p) > 0 else 0)
        | (Trait.HAS_Q if largest(mass_q) > 0 else 0))


cdef inline double discrete_hard_value(const Row *row, Watch *watch) noexcept nogil:
    """Weights that the fast formula has no range for."""
    return discrete_hard_divergence(row, watch) if row.normalize else hard_plain_sum(row, watch)


cdef inline double hard_plain_sum(const Row *row, Watch *watch) noexcept nogil:
    cdef double p, q, log_p_q, direct, term
    cdef npy_intp i
    cdef Sums sums
    clear(&sums)
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        p, q = element(row, 0, i), element(row, 1, i)
        log_p_q = log_ratio(p, q) if p > 0 else 0
        direct = p * log_p_q
        term = hard_term(p, q, p - q, log_p_q)
        add(&sums, fabs(direct), term, (q - p) - term, direct)
    round_off(&sums)
    return plain_sum(sums.weight, sums.divergence, sums.drift, sums.direct)


cdef inline double discrete_hard_divergence(const Row *row, Watch *watch) noexcept nogil:
    """The formula at the head, one element at a time, weights scaled by powers of two so that the
    largest are near 1 and sums cannot overflow."""
    cdef int up_p, up_q
    cdef double p, q, scaled_q, difference, term, log_p_q, total_p = 0, total_q = 0, ratio
    cdef double largest_p = 0, largest_q = 0
    cdef npy_intp i
    cdef Sums sums
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        largest_p = larger(element(row, 0, i), largest_p)
        largest_q = larger(element(row, 1, i), largest_q)
    frexp(largest_p, &up_p)
    frexp(largest_q, &up_q)
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        total_p += ldexp(element(row, 0, i), -up_p)
        total_q += ldexp(element(row, 1, i), -up_q)
    ratio = total_p / total_q
    clear(&sums)
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        p, q = element(row, 0, i), element(row, 1, i)
        log_p_q = log_scaled_ratio(p, q, up_q - up_p) - log(ratio) if p > 0 else 0
        p, q = ldexp(p, -up_p), ldexp(q, -up_q)
        scaled_q = ratio * q
        difference = (p - scaled_q) + residual_product(ratio, q, scaled_q)
        term = hard_term(p, scaled_q, difference, log_p_q)
        add(&sums, p, term, -difference - term, 0)
    round_off(&sums)
    return divergence_of(sums.weight, sums.divergence, sums.drift)


cdef inline double hard_term(double p, double q, double difference,
                             double log_p_q) noexcept nogil:
    """p log(p/q) - p + q, given p - q and log(p/q); q may have underflowed."""
    cdef double s
    if p == 0:
        return q
    if fabs(difference) < 0.25 * p:
        s = difference / (p + q)
        return difference * s + p * atanh_tail(s)
    return p * log_p_q - difference


# Gradients. With r_i = log(P_i/Q_i) = log(p_i/q'_i) + log1p(u),  q' = r q and u as at the head,
#     d/dp_i = (r_i - KL)/Sp,   d/dq_i = (1 - P_i/Q_i)/Sq = -((p_i - q'_i) + u p_i)/q'_i / Sq;
# of the sum as it stands  log(p_i/q_i) + 1  and  -p_i/q_i.

cdef enum:
    SLOPE_RATIO = 0
    SLOPE_FLOOR = LANES
    SLOPE_EXCESS = 2 * LANES     # u
    SLOPE_ADDED = 3 * LANES      # to log(p/q')
    SLOPE_FACTOR_P = 4 * LANES
    SLOPE_FACTOR_Q = 5 * LANES
    DISCRETE_CONSTANTS = 6 * LANES


cdef inline void discrete_slope_run(bint normalize, int wanted, const real *p, const real *q,
                                    npy_intp step_p, npy_intp step_q, int n, const real *constants,
                                    real *to_p, real *to_q) noexcept nogil:
    """The gradients of n elements of each lane, LANES apart."""
    cdef int lane, i
    cdef real x, y, rest, floor, x_normal, y_normal, e_ln2, z, d, s, ratio, infinite
    cdef real inf = <real> INFINITY
    cdef real slope[LANES]
    for i in range(n):
        if wanted & 1:
            for lane in range(LANES):
                ratio, floor = constants[SLOPE_RATIO + lane], constants[SLOPE_FLOOR + lane]
                x, y = p[i * step_p + lane], q[i * step_q + lane] * ratio
                x_normal, y_normal = larger(x, floor), larger(y, floor)
                e_ln2, z = ratio_log(x_normal, y_normal), match_exponent(x_normal, y_normal)
                d = x_normal - z
                d += (residual_product(ratio, q[i * step_q + lane], y) if e_ln2 == 0 else <real> 0)
                s = d / (x_normal + z)
                z = e_ln2 + ((s + s) + atanh_tail(s)) + constants[SLOPE_ADDED + lane]
                infinite = -inf if y > 0 else <real> 0
                infinite *= constants[SLOPE_FACTOR_P + lane] if y > 0 else <real> 1
                slope[lane] = z * constants[SLOPE_FACTOR_P + lane] if x > 0 else infinite
            copy(slope, to_p + i * LANES)
        if wanted & 2:
            for lane in range(LANES):
                ratio = constants[SLOPE_RATIO + lane]
                x, y = p[i * step_p + lane], q[i * step_q + lane] * ratio
                if normalize:
                    rest = residual_product(ratio, q[i * step_q + lane], y)
                    d = ((x - y) + rest) + constants[SLOPE_EXCESS + lane] * x
                else:
                    d = x
                d = d / (y if y > 0 else <real> 1) * constants[SLOPE_FACTOR_Q + lane]
                slope[lane] = -d if y > 0 else <real> 0
            copy(slope, to_q + i * LANES)


cdef inline void discrete_constants(const Slope *slopes, int each, bint normalize,
                                    real *constants) noexcept nogil:
    """Of LANES rows, or (each = 0) of one."""
    cdef int lane
    cdef double total = 1, added = 1
    cdef const Slope *slope
    for lane in range(LANES):
        slope = slopes + lane * each
        if normalize:
            total, added = slope.weight, slope.change - slope.value
        constants[SLOPE_RATIO + lane] = <real> slope.ratio
        constants[SLOPE_FLOOR + lane] = smallest_weight(slope.ratio != 1, <real> 0)
        constants[SLOPE_EXCESS + lane] = <real> slope.excess
        constants[SLOPE_ADDED + lane] = <real> added
        constants[SLOPE_FACTOR_P + lane] = <real> (slope.cotangent / total)
        constants[SLOPE_FACTOR_Q + lane] = <real> (
            slope.cotangent / total * (slope.ratio / (1 + slope.excess) if normalize else 1))


cdef void discrete_slope_loop(bint normalize, int wanted, const real *p, const real *q,
                              npy_intp step_p, npy_intp step_q, int n, const real *constants,
                              real *to_p, real *to_q) noexcept nogil:
    if normalize:
        discrete_slope_run(True, wanted, p, q, step_p, step_q, n, constants, to_p, to_q)
    else:
        discrete_slope_run(False, wanted, p, q, step_p, step_q, n, constants, to_p, to_q)


cdef void discrete_slopes(const real **x, int n, const Slope *slope, bint normalize, int wanted,
                          real **to) noexcept nogil:
    """The gradients of n elements, LANES or more once padded; the last lanes overlap."""
    cdef real constants[DISCRETE_CONSTANTS]
    cdef npy_intp last = n - LANES
    discrete_constants(slope, 0, normalize, constants)
    discrete_slope_loop(
        normalize, wanted, x[0], x[1], LANES, LANES, n // LANES, constants, to[0], to[1])
    if n % LANES:
        discrete_slope_loop(normalize, wanted, x[0] + last, x[1] + last, LANES, LANES, 1, constants,
                            to[0] + last, to[1] + last)


cdef inline void discrete_slope(const Row *row, const Sums *sums, double ratio, Slope *slope,
                                real of_type) noexcept nogil:
    """From the sums of a row."""
    slope.ratio, slope.weight, slope.excess, slope.change = 1, sums.weight, 0, 0
    if row.normalize:
        slope.ratio = <double> <real> ratio
        slope.excess = (sums.divergence + sums.drift) / sums.weight
        slope.change = slope.value + sums.drift / sums.weight


cdef inline double quotient(double p, double q, int up) noexcept nogil:
    """p/q 2^up, which may be out of range, though p/q or 2^up alone is."""
    cdef int exponent_p, exponent_q
    cdef double x = frexp(p, &exponent_p), y = frexp(q, &exponent_q)
    return ldexp(x / y, exponent_p - exponent_q + up)


cdef void discrete_hard_slopes(const Row *row, Watch *watch, const Slope *slope, int wanted,
                               char **to, const npy_intp *step) noexcept nogil:
    """One element at a time, for weights that the fast formula has no range for."""
    cdef double p, q, d, s, x, slope_of, total_p = 0, total_q = 0, excess = 0, rest = 0, ratio = 1
    cdef double added = 1
    cdef bint near
    cdef int up_p = 0, up_q = 0
    cdef npy_intp i
    if row.normalize:
        frexp(peak_of(row, watch, 0), &up_p)
        frexp(peak_of(row, watch, 1), &up_q)
        for i in range(row.length):
            if is_unwanted(watch, i):
                return
            total_p = two_sum(total_p, ldexp(element(row, 0, i), -up_p), &excess)
            total_q = two_sum(total_q, ldexp(element(row, 1, i), -up_q), &rest)
        total_p, total_q, excess = total_p + excess, total_q + rest, 0
        ratio = total_p / total_q
        rest = 0
        for i in range(row.length):
            if is_unwanted(watch, i):
                return
            p, q = ldexp(element(row, 0, i), -up_p), ldexp(element(row, 1, i), -up_q)
            excess = two_sum(
                excess, (ratio * q - p) - residual_product(ratio, q, ratio * q), &rest)
        excess = (excess + rest) / total_p
        added = log1p(excess) - slope.value
    else:
        total_p = total_q = 1
    for i in range(row.length):
        if is_unwanted(watch, i):
            return
        p, q = ldexp(element(row, 0, i), -up_p), ldexp(element(row, 1, i), -up_q)
        x = ratio * q
        d = (p - x) + residual_product(ratio, q, x)
        near = fabs(d) < 0.25 * p
        p, q = element(row, 0, i), element(row, 1, i)
        if wanted & 1:
            if p == 0 or q == 0:
                slope_of = INFINITY if p > 0 else -INFINITY if q > 0 else 0
            elif near:
                s = d / (ldexp(p, -up_p) + x)
                slope_of = ldexp((2 * s + atanh_tail(s) + added) / total_p, -up_p)
            else:
                s = log_scaled_ratio(p, q, up_q - up_p) - log(ratio)
                slope_of = ldexp((s + added) / total_p, -up_p)
            store_slope(to[0] + i * step[0], row.format, slope_of, slope.cotangent)
        if wanted & 2:
            if q == 0:
                slope_of = -INFINITY if p > 0 else 0
            elif not row.normalize:
                slope_of = -quotient(p, q, 0)
            elif near:
                slope_of = -ldexp((d + excess * ldexp(p, -up_p)) / x / total_q, -up_q)
            else:
                x = quotient(p, q, up_q - up_p) / total_p
                slope_of = ldexp(1 / total_q - x, -up_q) if x < INFINITY else (
                    -quotient(p, q, -up_p) / total_p)
            store_slope(to[1] + i * step[1], row.format, slope_of, slope.cotangent)


cdef inline void store_slope(char *at, int format, double slope, double cotangent) noexcept nogil:
    cdef double value = slope * cotangent if slope != 0 else 0
    if format == Format.FLOAT64:
        (<double *> at)[0] = value
    else:
        (<float *> at)[0] = <float> value
