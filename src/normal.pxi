"""Normal distributions with diagonal covariance: means m, and scales, variances or log-variances.

    KL = 1/2 sum [ v_p/v_q - 1 - log(v_p/v_q) ] + 1/2 sum (m_p - m_q)^2 / v_q,
both sums of non-negative terms. The first bracket is
    phi(x) = e^x - 1 - x,                                          x = log v_p - log v_q,
    (d/z)(g + s) + (g - e ln2) - t,                                from variances,
    (d/z)((x+z)/z)(g + s(2-s)) + (g - 2 e ln2) - 2 t,              from scales,
with x, y the parameters of p and q, z = y 2^e near x, d = x - z, s = d/(x + z),
t = 2 atanh(s) - 2 s and g = 2^e - 1 (variances) or 4^e - 1 (scales). For e = 0 nothing cancels.
Every term is right to 8 ulp. Where the sides differ, both are converted to variances first, in two
parts; float32 is then computed in double.
"""

from gufunc cimport Watch, is_unwanted
from libc.math cimport exp as libm_exp, expm1 as libm_expm1, fabs, frexp, ldexp, log
from numpy cimport npy_intp
from sums cimport (
    LANES, MAX_GROUPS, STRIP, Ahead, LaneParts, LaneSums, Row, RowLanes, Trait, across,
    clear_lanes, copy, element, fill, fold, full_run, keep_from, largest, row_of, row_sums,
    run_length, transpose, two_sum,
)
from vecmath cimport (
    INFINITY, LN2, LN2_HIGH, LN2_LOW, NAN, atanh_tail, exp, exp_pair_f64, expm1, larger, magnitude,
    match_exponent, phi, ratio_units, real, residual_product, smaller, times_power, unit_ln2,
)

cdef enum Spread:
    SCALE
    VARIANCE
    LOG_VARIANCE

cdef inline real variance_of(real x, int spread, real *rest) noexcept nogil:
    """The variance that x stands for, and what its rounding left out."""
    cdef real variance = x, size
    rest[0] = 0
    if spread == Spread.SCALE:
        size = magnitude(x)  # negative ones stay
        variance = x * size
        rest[0] = -residual_product(x, size, variance)
    elif spread == Spread.LOG_VARIANCE:
        if real is double:
            variance = exp_pair_f64(x, rest)
        else:
            variance = exp(x, <real> 0)
    return variance


cdef inline void take_terms(bint keep, const real *term, real *terms, real *run) noexcept nogil:
    """Add up one of each lane, or keep them."""
    if keep:
        copy(term, terms)
    else:
        fold(term, run)


cdef enum:
    STEPS = 2   # of floats, one of doubles, in each of two loops that take turns


cdef inline int normal_steps(real of_type) noexcept nogil:
    """More than these leave the registers: 16 of floats, 8 of doubles cost AVX2 up to a fifth."""
    return STEPS if real is float else 1


# Of each lane: the least and the greatest variance or scale so far, and the largest |e|, in its
# unit; of log-variances the largest |s_q| and |s_p - s_q|. NaN are passed over: sums tell.
cdef enum:
    LEAST = 0
    GREATEST = LANES
    FARTHEST = 2 * LANES
    BOUNDS = 3 * LANES


cdef inline void begin_bounds(real *bounds) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        bounds[LEAST + lane] = bounds[GREATEST + lane] = 1
        bounds[FARTHEST + lane] = 0


cdef inline void copy_bounds(const real *bounds, real *into) noexcept nogil:
    copy(bounds + LEAST, into + LEAST)
    copy(bounds + GREATEST, into + GREATEST)
    copy(bounds + FARTHEST, into + FARTHEST)


cdef inline void doubt_lanes(const real *bounds, const Row *row, double *doubtful) noexcept nogil:
    """Which lanes have a value that the fast formulas have no range for: z, 1/z, 1/y and 2^e, for
    scales 4^e, are to be normal numbers."""
    cdef int lane
    cdef bint logs = row.spread_p == Spread.LOG_VARIANCE and row.spread_q == Spread.LOG_VARIANCE
    cdef bint squared = row.spread_p == Spread.SCALE and row.spread_q == Spread.SCALE
    cdef real low, high, most, unit = <real> 1
    if real is float:
        low, high = <real> 2.4e-38, <real> 4.2e37                  # 2^-125, 2^125
        most = <real> (86 if logs else 43.3 if squared else 86.9)  # ln2 times 62.5, 125.4
    else:
        low, high = 4.5e-308, 2.2e307                              # 2^-1021, 2^1021
        most = 706 if logs else 353.8 if squared else 708          # ln2 times 510.4, 1021.4
    if not logs:
        unit = unit_ln2(unit)
    for lane in range(LANES):
        doubtful[lane] = doubtful[lane] if bounds[LEAST + lane] >= low else 1
        doubtful[lane] = doubtful[lane] if bounds[GREATEST + lane] <= high else 1
        doubtful[lane] = doubtful[lane] if bounds[FARTHEST + lane] * unit <= most else 1


cdef inline void log_variance_run(bint keep, const real **at, const npy_intp *step, int n,
                                  real *terms, real *run, real *bounds,
                                  Ahead *ahead) noexcept nogil:
    """Take n terms, twice, of each lane."""
    cdef int lane, i
    cdef real x, rest, s_q, mean, size
    cdef real term[LANES]
    cdef const real *loc_p = at[0]
    cdef const real *spread_of_p = at[1]
    cdef const real *loc_q = at[2]
    cdef const real *spread_of_q = at[3]
    cdef npy_intp step_0 = step[0], step_1 = step[1], step_2 = step[2], step_3 = step[3]
    for i in range(n):
        ask_for(ahead, 4, 1, <real> 0)
        for lane in range(LANES):
            mean = loc_p[i * step_0 + lane] - loc_q[i * step_2 + lane]
            s_q = spread_of_q[i * step_3 + lane]
            x = difference(spread_of_p[i * step_1 + lane], s_q, &rest)
            size = larger(magnitude(x), magnitude(s_q))
            bounds[FARTHEST + lane] = larger(size, bounds[FARTHEST + lane])
            term[lane] = phi(x, rest) + mean * mean * exp(-s_q, <real> 0)
        take_terms(keep, term, terms + i * LANES, run)


cdef inline void normal_factors(const real **at, const npy_intp *step, int n, int spread_p,
                                int spread_q, real *s, real *grown, real *factor, real *rest,
                                real *bounds) noexcept nogil:
    """What the terms are made of: s, g, the factor of g + s or g + s(2-s), and what is added."""
    cdef int lane, i, k
    cdef real s_p, s_q, v_p, v_q, rest_p, rest_q, z, units, power, d, inverse, mean
    cdef const real *loc_p = at[0]
    cdef const real *spread_of_p = at[1]
    cdef const real *loc_q = at[2]
    cdef const real *spread_of_q = at[3]
    cdef npy_intp step_0 = step[0], step_1 = step[1], step_2 = step[2], step_3 = step[3]
    cdef real one = 1, two = 2                                    # literals would be double
    cdef real ln2 = unit_ln2(one)
    for i in range(n):
        for lane in range(LANES):
            k = i * LANES + lane
            mean = loc_p[i * step_0 + lane] - loc_q[i * step_2 + lane]
            s_p, s_q = spread_of_p[i * step_1 + lane], spread_of_q[i * step_3 + lane]
            v_p, v_q, rest_p, rest_q = s_p, s_q, 0, 0
            if spread_p != spread_q:
                v_p = variance_of(s_p, spread_p, &rest_p)
                v_q = variance_of(s_q, spread_q, &rest_q)
            bounds[LEAST + lane] = smaller(smaller(v_p, v_q), bounds[LEAST + lane])
            bounds[GREATEST + lane] = larger(larger(v_p, v_q), bounds[GREATEST + lane])
            z, units = match_exponent(v_p, v_q), ratio_units(v_p, v_q)
            bounds[FARTHEST + lane] = larger(magnitude(units), bounds[FARTHEST + lane])
            mean += v_q - v_q  # NaN stays: in z it is lost. GCC takes v_q * 0 for 0
            power = times_power(one, v_p, v_q)
            d = v_p - z
            if spread_p != spread_q:
                d += rest_p - rest_q if units == 0 else <real> 0
            s[k] = d / (v_p + z)
            inverse = one / z
            factor[k] = d * inverse
            inverse = times_power(inverse, v_p, v_q)  # 1/y
            if spread_p == Spread.SCALE and spread_q == Spread.SCALE:
                factor[k] *= two + factor[k]          # (x + z)/z
                grown[k] = times_power(power, v_p, v_q) - one
                mean *= inverse
                rest[k] = (grown[k] - units * (two * ln2)) + mean * mean
            else:
                grown[k] = power - one
                rest[k] = (grown[k] - units * ln2) + mean * mean * inverse


cdef inline void ratio_steps(bint keep, const real **at, const npy_intp *step, int n, int spread_p,
                             int spread_q, real *terms, real *run, real *bounds) noexcept nogil:
    """Take n terms, twice, at most STEPS, of each lane."""
    cdef int lane, i, k
    cdef real two = 2
    cdef real term[LANES]
    cdef real s[STEPS * LANES]
    cdef real grown[STEPS * LANES]
    cdef real factor[STEPS * LANES]
    cdef real rest[STEPS * LANES]
    normal_factors(at, step, n, spread_p, spread_q, s, grown, factor, rest, bounds)
    for i in range(n):
        for lane in range(LANES):
            k = i * LANES + lane
            if spread_p == Spread.SCALE and spread_q == Spread.SCALE:
                term[lane] = factor[k] * ((grown[k] - s[k] * s[k]) + (s[k] + s[k])) + (
                    rest[k] - two * atanh_tail(s[k]))
            else:
                term[lane] = factor[k] * (grown[k] + s[k]) + (rest[k] - atanh_tail(s[k]))
        take_terms(keep, term, terms + i * LANES, run)


cdef inline void ratio_run(bint keep, const real **x, const npy_intp *step, int n, int steps,
                           int spread_p, int spread_q, real *terms, real *run, real *bounds,
                           Ahead *ahead) noexcept nogil:
    """Take n terms, twice, of each lane."""
    cdef const real *at[4]
    cdef int operand
    for operand in range(4):
        at[operand] = x[operand]
    while n >= steps:
        ask_for(ahead, 4, steps, <real> 0)
        ratio_steps(keep, at, step, steps, spread_p, spread_q, terms, run, bounds)
        for operand in range(4):
            at[operand] += steps * step[operand]
        terms, n = terms + steps * LANES, n - steps
    if n > 0:
        ask_for(ahead, 4, n, <real> 0)
        ratio_steps(keep, at, step, n, spread_p, spread_q, terms, run, bounds)


cdef inline void take_run(bint keep, const real **at, const npy_intp *step, int n, int steps,
                          int spread_p, int spread_q, real *terms, real *run, real *bounds,
                          Ahead *ahead) noexcept nogil:
    if spread_p == Spread.LOG_VARIANCE and spread_q == Spread.LOG_VARIANCE:
        log_variance_run(keep, at, step, n, terms, run, bounds, ahead)
    else:
        ratio_run(keep, at, step, n, steps, spread_p, spread_q, terms, run, bounds, ahead)


cdef inline void normal_run(const real **at, const npy_intp *step, int n, int steps, int spread_p,
                            int spread_q, real *terms, real *bounds_so_far, Ahead *ahead,
                            real *sums) noexcept nogil:
    """The sums of n terms, twice, of each lane. If `terms` is not NULL: these terms."""
    cdef real bounds[BOUNDS]
    cdef real run[LANES]
    copy_bounds(bounds_so_far, bounds)
    fill(run, <real> 0)
    if terms != NULL:
        take_run(True, at, step, n, steps, spread_p, spread_q, terms, run, bounds, ahead)
    else:
        take_run(False, at, step, n, steps, spread_p, spread_q, terms, run, bounds, ahead)
    copy_bounds(bounds, bounds_so_far)
    copy(run, sums)


cdef inline void last_terms(const real **x, npy_intp last, int first, int spread_p, int spread_q,
                            real *bounds, Ahead *ahead, real *sums) noexcept nogil:
    """The same of the lanes first..LANES-1 of one vector, which begins `last` elements on."""
    cdef const real *at[4]
    cdef npy_intp step[4]
    cdef int operand
    for operand in range(4):
        at[operand], step[operand] = x[operand] + last, LANES
    normal_run(at, step, 1, 1, spread_p, spread_q, <real *> NULL, bounds, ahead, sums)
    keep_from(first, sums)


cdef inline void add_terms_of(const real **at, const npy_intp *step, int n, int steps, int spread_p,
                              int spread_q, real *terms, real *bounds, Ahead *ahead,
                              LaneSums *into) noexcept nogil:
    """Add such a run."""
    cdef real run[LANES]
    normal_run(at, step, n, steps, spread_p, spread_q, terms, bounds, ahead, run)
    fold(run, into.divergence)


cdef inline void normal_runs(const real **x, const npy_intp *step, int n, int first, int spread_p,
                             int spread_q, real *terms, real *bounds, Ahead *ahead,
                             LaneSums *into) noexcept nogil:
    """Take n terms, twice, of each lane, and of the lanes from `first` on, if it is not 0, one
    more, from a vector that overlaps the last."""
    cdef const real *at[4]
    cdef real run[LANES]
    cdef int operand, length, full = full_run(1, <real> 0)
    for operand in range(4):
        at[operand] = x[operand]
    while n > 0:
        length = run_length(n, 1, <real> 0)
        if length == full:  # a constant for the loops
            add_terms_of(at, step, full, normal_steps(<real> 0), spread_p, spread_q, terms,
                         bounds, ahead, into)
        else:
            add_terms_of(at, step, length, normal_steps(<real> 0), spread_p, spread_q, terms,
                         bounds, ahead, into)
        for operand in range(4):
            at[operand] += length * step[operand]
        terms = terms + length * LANES if terms != NULL else NULL
        n -= length
    if first:
        last_terms(at, -first, first, spread_p, spread_q, bounds, ahead, run)
        fold(run, into.divergence)


cdef inline void normal_row(const real **at, const npy_intp *step, int n, int first, int spread_p,
                            int spread_q, real *bounds, Ahead *ahead,
                            real *sums) noexcept nogil:
    """The same of a row of one run."""
    cdef real run[LANES]
    normal_run(at, step, n, normal_steps(<real> 0), spread_p, spread_q, <real *> NULL, bounds,
               ahead, sums)
    if first:
        last_terms(at, n * LANES - first, first, spread_p, spread_q, bounds, ahead, run)
        fold(run, sums)


ctypedef struct Beside:       # rows whose elements lie side by side
    npy_intp outer[4]         # bytes from one row to the next
    int begin
    int end
    int first                 # the first lane that counts of a vector after the last, or 0
    const double *conditions  # negative: rows that are wanted
    double *sums              # NULL: only their terms are wanted


cdef inline void rows_beside(const real **x, const Beside *rows, int n, bint one_run, int spread_p,
                             int spread_q, real *terms, real *bounds) noexcept nogil:
    cdef const real *at[4]
    cdef npy_intp step[4]
    cdef LaneSums lanes
    cdef RowLanes runs
    cdef npy_intp size = (n * LANES + (LANES - rows.first) % LANES) * sizeof(real)
    cdef npy_intp beyond[4]
    cdef Ahead ahead
    cdef int operand, row
    step[0] = step[1] = step[2] = step[3] = LANES  # a constant for the loops
    for operand in range(4):
        beyond[operand] = distance_ahead(rows.outer[operand], size, 4)
    for row in range(rows.begin, rows.end):
        if rows.conditions[row] >= 0:
            continue
        for operand in range(4):
            at[operand] = row_of(x[operand], rows.outer[operand], row)
            ahead.data[operand] = <const char *> at[operand] + beyond[operand]
        if one_run:
            normal_row(at, step, n, rows.first, spread_p, spread_q, bounds, &ahead,
                       <real *> runs.sums + row * LANES)
            continue
        fill(lanes.divergence, <double> 0)
        normal_runs(at, step, n, rows.first, spread_p, spread_q, terms, bounds, &ahead, &lanes)
        if rows.sums != NULL:
            rows.sums[row] = across(lanes.divergence)
    if one_run:
        row_sums(<real *> runs.sums, rows.begin, rows.end, rows.sums)


cdef inline void normal_groups(const real **x, const npy_intp *step, int n, int groups, int more,
                               const Beside *rows, int spread_p, int spread_q, real *terms,
                               real *bounds, LaneParts *into) noexcept nogil:
    cdef const real *at[4]
    cdef int operand, group
    if rows != NULL:
        if rows.sums != NULL and run_length(n, 1, <real> 0) == n:
            rows_beside(x, rows, n, True, spread_p, spread_q, terms, bounds)
        else:
            rows_beside(x, rows, n, False, spread_p, spread_q, terms, bounds)
        return
    for group in range(groups):
        for operand in range(4):
            at[operand] = x[operand] + group * LANES
            prefetch_columns(at[operand], step[operand], n, more)
        if more:
            add_terms_of(at, step, n, 1, spread_p, spread_q, <real *> NULL,
                         bounds + group * BOUNDS, NULL, &into[group].sums)
        else:
            normal_runs(at, step, n, 0, spread_p, spread_q, <real *> NULL,
                        bounds + group * BOUNDS, NULL, &into[group].sums)


cdef void normal_loop(const real **x, const npy_intp *step, int n, int groups, int more,
                      const Beside *rows, const Row *row, real *terms, real *bounds,
                      LaneParts *into) noexcept nogil:
    """Take n terms, twice, of each lane of groups that lie side by side, and ask for so many of
    those that follow; or of `rows`, if it is not NULL, whose terms are kept, unless `terms` is.
    Every pair of parametrisations has a loop of its own; mixed ones only in double."""
    cdef int p = row.spread_p, q = row.spread_q
    if p == Spread.SCALE and q == Spread.SCALE:
        normal_groups(x, step, n, groups, more, rows, Spread.SCALE, Spread.SCALE,
                      terms, bounds, into)
    elif p == Spread.VARIANCE and q == Spread.VARIANCE:
        normal_groups(x, step, n, groups, more, rows, Spread.VARIANCE, Spread.VARIANCE,
                      terms, bounds, into)
    elif p == Spread.LOG_VARIANCE and q == Spread.LOG_VARIANCE:
        normal_groups(x, step, n, groups, more, rows, Spread.LOG_VARIANCE, Spread.LOG_VARIANCE,
                      terms, bounds, into)
    elif real is double:
        if p == Spread.SCALE and q == Spread.VARIANCE:
            normal_groups(x, step, n, groups, more, rows, Spread.SCALE, Spread.VARIANCE,
                          terms, bounds, into)
        elif p == Spread.SCALE:
            normal_groups(x, step, n, groups, more, rows, Spread.SCALE, Spread.LOG_VARIANCE,
                          terms, bounds, into)
        elif p == Spread.VARIANCE and q == Spread.SCALE:
            normal_groups(x, step, n, groups, more, rows, Spread.VARIANCE, Spread.SCALE,
                          terms, bounds, into)
        elif p == Spread.VARIANCE:
            normal_groups(x, step, n, groups, more, rows, Spread.VARIANCE, Spread.LOG_VARIANCE,
                          terms, bounds, into)
        elif q == Spread.SCALE:
            normal_groups(x, step, n, groups, more, rows, Spread.LOG_VARIANCE, Spread.SCALE,
                          terms, bounds, into)
        else:
            normal_groups(x, step, n, groups, more, rows, Spread.LOG_VARIANCE, Spread.VARIANCE,
                          terms, bounds, into)


cdef void normal_rows(const real **x, const npy_intp *outer, int n, int begin, int end,
                      const double *conditions, const Row *row, LaneParts *into) noexcept nogil:
    """The sums of n elements, twice, LANES or more once padded, of the rows begin..end-1 with a
    negative condition, which lie `outer` bytes apart; the last lanes overlap what was added before
    and do not count."""
    cdef real bounds[BOUNDS]
    cdef double doubtful[LANES]
    cdef Beside rows
    cdef int operand, each
    rows.begin, rows.end, rows.conditions = begin, end, conditions
    rows.sums = into.sums.divergence
    rows.first = (LANES - n % LANES) % LANES
    for operand in range(4):
        rows.outer[operand] = outer[operand]
    begin_bounds(bounds)
    normal_loop(x, NULL, n // LANES, 0, 0, &rows, row, <real *> NULL, bounds, into)
    fill(doubtful, <double> 0)
    doubt_lanes(bounds, row, doubtful)
    if largest(doubtful) == 0 or end == begin + 1:
        for each in range(begin, end):
            into.doubtful[each] = largest(doubtful)
        return
    for each in range(begin, end):
        normal_rows(x, outer, n, each, each + 1, conditions, row, into)


cdef void normal_columns(const real **x, const npy_intp *step, int n, int groups, int together,
                         const Row *row, LaneParts *into) noexcept nogil:
    """Add n elements, twice, of each of LANES rows; elements lie `step` apart. Groups side by side:
    `together` elements of each, then the next."""
    cdef const real *at[4]
    cdef real bounds[MAX_GROUPS * BOUNDS]
    cdef int group, operand, start = 0
    for group in range(groups):
        begin_bounds(bounds + group * BOUNDS)
    while start < n:
        for operand in range(4):
            at[operand] = x[operand] + start * step[operand]
        normal_loop(at, step, min(together, n - start), groups, together if together < n else 0,
                    NULL, row, <real *> NULL, bounds, into)
        start += together
    for group in range(groups):
        doubt_lanes(bounds + group * BOUNDS, row, into[group].doubtful)


cdef void add_columns(const real *terms, int width, int n, double *sums) noexcept nogil:
    """Add n columns of terms, `width` elements apart, run by run."""
    cdef real run[LANES]
    cdef int lane, i, length
    while n > 0:
        length = run_length(n, 1, <real> 0)
        fill(run, <real> 0)
        for i in range(length):
            for lane in range(LANES):
                run[lane] += terms[i * width + lane]
        fold(run, sums)
        terms, n = terms + length * width, n - length


cdef bint normal_gapless(const real **x, int n, int groups, const Row *row,
                         LaneParts *into) noexcept nogil:
    """As normal_columns, for groups of LANES short rows, one after the other in memory, at most
    STRIP * LANES elements: only the terms need to be transposed. False where one is in doubt."""
    cdef real terms[STRIP * LANES]
    cdef real turned[STRIP * LANES]
    cdef real bounds[BOUNDS]
    cdef double doubtful[LANES]
    cdef double wanted = -1
    cdef Beside rows
    cdef int operand, group
    begin_bounds(bounds)
    fill(doubtful, 0.0)
    rows.begin, rows.end, rows.first = 0, 1, 0
    rows.conditions, rows.sums = &wanted, NULL
    for operand in range(4):
        rows.outer[operand] = groups * n * LANES * sizeof(real)
    normal_loop(x, NULL, groups * n, 0, 0, &rows, row, terms, bounds, into)
    doubt_lanes(bounds, row, doubtful)
    if largest(doubtful) > 0:
        return False
    transpose(terms, n, n, groups * LANES, turned, groups * LANES)
    for group in range(groups):
        clear_lanes(&into[group].sums)
        add_columns(turned + group * LANES, groups * LANES, n, into[group].sums.divergence)
    return True


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


cdef int normal_traits(const double **x, int n, const Row *row) noexcept nogil:
    """Of n elements, LANES or more once padded."""
    cdef double s_p, s_q, mean
    cdef int i, traits = Trait.HAS_P | Trait.HAS_Q
    cdef bint bad = False, infinite = False, point_p, point_q
    for i in range(n):
        s_p, s_q, mean = x[1][i], x[3][i], fabs(x[0][i]) + fabs(x[2][i])
        if mean != mean or s_p != s_p or s_q != s_q:
            return traits | Trait.HAS_NAN
        point_p, point_q = is_point(s_p, row.spread_p), is_point(s_q, row.spread_q)
        bad |= fabs(x[0][i]) == INFINITY or fabs(x[2][i]) == INFINITY
        bad |= not (is_spread(s_p, row.spread_p) and is_spread(s_q, row.spread_q))
        bad |= point_p and point_q
        infinite |= point_p or point_q
    return traits | (Trait.HAS_BAD if bad else 0) | (Trait.HAS_INFINITE if infinite else 0)


cdef inline double variance_parts(double x, int spread, int *exponent) noexcept nogil:
    """The variance that x stands for, without 2^exponent, near 1. 2 ulp."""
    cdef double part, rest
    if spread == Spread.LOG_VARIANCE:
        x = larger(-1e6, smaller(x, 1e6))
        exponent[0] = <int> (x / LN2)
        part = difference(x - exponent[0] * LN2_HIGH, exponent[0] * LN2_LOW, &rest)
        return exp(part, rest)
    part = frexp(x, exponent)
    if spread == Spread.SCALE:
        exponent[0] *= 2
        part *= part
    return part


cdef inline double normal_hard_value(const Row *row, Watch *watch) noexcept nogil:
    """Variances that the fast formulas have no range for: quotients of parts near 1, as the
    exponential of a large logarithm multiplies its error."""
    cdef double s_p, s_q, v_p, v_q, x, mean, term, result = 0, rest = 0
    cdef int up_p, up_q, up
    cdef npy_intp i
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        s_p, s_q = element(row, 1, i), element(row, 3, i)
        v_p = variance_parts(s_p, row.spread_p, &up_p)
        v_q = variance_parts(s_q, row.spread_q, &up_q)
        x = log_variance_ratio(s_p, s_q, row)
        if fabs(x) < 1:
            term = 0.5 * phi(x, 0.0)
        else:
            term = ldexp(v_p / v_q, up_p - up_q - 1) - 0.5 * (1 + x)
        mean = frexp(element(row, 0, i) - element(row, 2, i), &up)
        term += ldexp(mean * mean / v_q, 2 * up - up_q - 1)
        result = two_sum(result, term, &rest)
    return result + rest if result < INFINITY else result


# Gradients. With t = v_p/v_q - 1, without cancellation as above, and m = m_p - m_q,
#     d/dm_p = m/v_q = -d/dm_q,
#     d/dlog v_p = t/2,   d/dlog v_q = -(t + m^2/v_q)/2,
# divided by the variance for the variance, and by half the scale for the scale.

cdef inline real excess_ratio(real s_p, real s_q, int spread_p, int spread_q,
                              real inverse_q) noexcept nogil:
    """t, given the reciprocal of what stands for the variance of q (of the variance itself where
    the sides differ)."""
    cdef real rest, rest_p, rest_q
    if spread_p == Spread.LOG_VARIANCE and spread_q == Spread.LOG_VARIANCE:
        s_p = difference(s_p, s_q, &rest)
        return expm1(s_p, rest)
    if spread_p == spread_q:
        rest = (s_p - s_q) * inverse_q
        return rest * ((s_p + s_q) * inverse_q) if spread_p == Spread.SCALE else rest
    s_p, s_q = variance_of(s_p, spread_p, &rest_p), variance_of(s_q, spread_q, &rest_q)
    return ((s_p - s_q) + (rest_p - rest_q)) * inverse_q


cdef inline real through_spread(real half, real s, int spread) noexcept nogil:
    """From the gradient to the log-variance, times 2."""
    cdef real two = 2
    if spread == Spread.LOG_VARIANCE:
        return half / two
    return half / s if spread == Spread.SCALE else half / (two * s)


cdef inline void normal_slope_run(int spread_p, int spread_q, int wanted, const real **x,
                                  const npy_intp *step, int n, const real *cotangents,
                                  real **to) noexcept nogil:
    """The gradients of n elements of each lane, `step` apart."""
    cdef int lane, i
    cdef real s_p, s_q, rest, m
    cdef npy_intp step_0 = step[0], step_1 = step[1], step_2 = step[2], step_3 = step[3]
    cdef real one = 1
    cdef const real *loc_p = x[0]
    cdef const real *spread_of_p = x[1]
    cdef const real *loc_q = x[2]
    cdef const real *spread_of_q = x[3]
    cdef real inverse[LANES]     # of what stands for the variance of q
    cdef real through_loc[LANES]
    cdef real square[LANES]
    cdef real excess[LANES]
    cdef real slope[LANES]
    cdef real cotangent[LANES]
    copy(cotangents, cotangent)
    for i in range(n):
        for lane in range(LANES):
            s_q = spread_of_q[i * step_3 + lane]
            if spread_q == Spread.LOG_VARIANCE and spread_p == Spread.LOG_VARIANCE:
                inverse[lane] = exp(-s_q, <real> 0)
            else:
                if spread_p != spread_q:
                    s_q = variance_of(s_q, spread_q, &rest)
                inverse[lane] = one / s_q
        if wanted & 13:
            for lane in range(LANES):
                m = loc_p[i * step_0 + lane] - loc_q[i * step_2 + lane]
                through_loc[lane] = m * inverse[lane]
                if spread_p == Spread.SCALE and spread_q == Spread.SCALE:
                    square[lane] = through_loc[lane] * through_loc[lane]
                    through_loc[lane] *= inverse[lane]
                else:
                    square[lane] = through_loc[lane] * m
                through_loc[lane] *= cotangent[lane]
            if wanted & 1:
                copy(through_loc, to[0] + i * LANES)
            if wanted & 4:
                for lane in range(LANES):
                    slope[lane] = -through_loc[lane]
                copy(slope, to[2] + i * LANES)
        if wanted & 10:
            for lane in range(LANES):
                excess[lane] = excess_ratio(
                    spread_of_p[i * step_1 + lane], spread_of_q[i * step_3 + lane], spread_p,
                    spread_q, inverse[lane])
            if wanted & 2:
                for lane in range(LANES):
                    s_p = spread_of_p[i * step_1 + lane]
                    slope[lane] = through_spread(excess[lane], s_p, spread_p) * cotangent[lane]
                copy(slope, to[1] + i * LANES)
            if wanted & 8:
                for lane in range(LANES):
                    s_q = spread_of_q[i * step_3 + lane]
                    slope[lane] = -cotangent[lane] * through_spread(
                        excess[lane] + square[lane], s_q, spread_q)
                copy(slope, to[3] + i * LANES)


cdef void normal_slope_loop(const real **x, const npy_intp *step, int n, const Row *row, int wanted,
                            const real *cotangents, real **to) noexcept nogil:
    cdef int p = row.spread_p, q = row.spread_q
    if p == Spread.SCALE and q == Spread.SCALE:
        normal_slope_run(Spread.SCALE, Spread.SCALE, wanted, x, step, n, cotangents, to)
    elif p == Spread.VARIANCE and q == Spread.VARIANCE:
        normal_slope_run(Spread.VARIANCE, Spread.VARIANCE, wanted, x, step, n, cotangents, to)
    elif p == Spread.LOG_VARIANCE and q == Spread.LOG_VARIANCE:
        normal_slope_run(
            Spread.LOG_VARIANCE, Spread.LOG_VARIANCE, wanted, x, step, n, cotangents, to)
    elif real is double:
        if p == Spread.SCALE and q == Spread.VARIANCE:
            normal_slope_run(Spread.SCALE, Spread.VARIANCE, wanted, x, step, n, cotangents, to)
        elif p == Spread.SCALE:
            normal_slope_run(Spread.SCALE, Spread.LOG_VARIANCE, wanted, x, step, n, cotangents, to)
        elif p == Spread.VARIANCE and q == Spread.SCALE:
            normal_slope_run(Spread.VARIANCE, Spread.SCALE, wanted, x, step, n, cotangents, to)
        elif p == Spread.VARIANCE:
            normal_slope_run(
                Spread.VARIANCE, Spread.LOG_VARIANCE, wanted, x, step, n, cotangents, to)
        elif q == Spread.SCALE:
            normal_slope_run(Spread.LOG_VARIANCE, Spread.SCALE, wanted, x, step, n, cotangents, to)
        else:
            normal_slope_run(
                Spread.LOG_VARIANCE, Spread.VARIANCE, wanted, x, step, n, cotangents, to)


cdef void normal_slopes(const real **x, int n, const Row *row, double cotangent, int wanted,
                        real **to) noexcept nogil:
    """The gradients of n elements, LANES or more once padded; the last lanes overlap."""
    cdef const real *last[4]
    cdef real *to_last[4]
    cdef real cotangents[LANES]
    cdef npy_intp step[4]
    cdef int operand
    fill(cotangents, <real> cotangent)
    for operand in range(4):
        step[operand] = LANES
    normal_slope_loop(x, step, n // LANES, row, wanted, cotangents, to)
    if n % LANES:
        for operand in range(4):
            last[operand] = x[operand] + n - LANES
            to_last[operand] = to[operand] + n - LANES
        normal_slope_loop(last, step, 1, row, wanted, cotangents, to_last)


cdef inline double relative(double p, double q, int power) noexcept nogil:
    """(p/q)^power - 1, subnormal or far apart."""
    cdef double d = (p - q) / q if 0.5 * p < q < 2 * p else quotient(p, q, 0) - 1
    return d if power == 1 else d * (d + 2)


cdef inline double hard_excess_ratio(double s_p, double s_q, const Row *row) noexcept nogil:
    cdef double rest = 0
    if row.spread_p == row.spread_q and row.spread_p != Spread.LOG_VARIANCE:
        return relative(s_p, s_q, 2 if row.spread_p == Spread.SCALE else 1)
    if row.spread_p == row.spread_q:
        s_p = difference(s_p, s_q, &rest)
        return libm_expm1(s_p) + (rest * libm_exp(s_p) if s_p < 709 else 0)
    return libm_expm1(log_variance(s_p, row.spread_p) - log_variance(s_q, row.spread_q))


cdef inline double hard_square(double m, double s_q, int spread) noexcept nogil:
    """m^2/v_q."""
    if m == 0:
        return 0
    if spread == Spread.SCALE:
        return (m / s_q) * (m / s_q)
    return libm_exp(2 * log(fabs(m)) - s_q) if spread == Spread.LOG_VARIANCE else m / s_q * m


cdef inline double hard_through_loc(double m, double s_q, int spread) noexcept nogil:
    """m/v_q."""
    if m == 0:
        return 0
    if spread == Spread.SCALE:
        return m / s_q / s_q
    if spread == Spread.VARIANCE:
        return m / s_q
    return m * libm_exp(-s_q) if fabs(s_q) < 700 else (
        libm_exp(log(fabs(m)) - s_q) * (1 if m > 0 else -1))


cdef void normal_hard_slopes(const Row *row, Watch *watch, double cotangent, int wanted, char **to,
                             const npy_intp *step) noexcept nogil:
    """One element at a time: point masses, and spreads that the fast formulas have no range for."""
    cdef double m, s_p, s_q, excess, mean
    cdef double slopes[4]
    cdef int operand
    cdef npy_intp i
    for i in range(row.length):
        if is_unwanted(watch, i):
            return
        m = element(row, 0, i) - element(row, 2, i)
        s_p, s_q = element(row, 1, i), element(row, 3, i)
        mean = hard_through_loc(m, s_q, row.spread_q)
        if is_point(s_q, row.spread_q):
            excess = INFINITY
        elif is_point(s_p, row.spread_p):
            excess = -1
        else:
            excess = hard_excess_ratio(s_p, s_q, row)
        slopes[0], slopes[2] = mean, -mean
        slopes[1] = through_spread(excess, s_p, row.spread_p)
        slopes[3] = -through_spread(excess + hard_square(m, s_q, row.spread_q), s_q, row.spread_q)
        for operand in range(4):
            if wanted >> operand & 1:
                store_slope(to[operand] + i * step[operand], row.format, slopes[operand], cotangent)
