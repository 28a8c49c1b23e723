"""Categorical distributions from unnormalised log-probabilities a, b and a temperature T.

With P = softmax(a/T), Q = softmax(b/T), any c close to lse(a/T) - lse(b/T) and
y = c - (a - b)/T:
    KL = E_P[phi(y)] - (u - log1p(u)),   u = E_P[expm1(y)],   phi(y) = e^y - 1 - y >= 0.
Errors of c enter in second order only, and nothing cancels when P is close to Q: one exponential
of a, one phi, one pass.

An exponent that is rounded to half an ulp costs e^x a relative error of |x| eps/2. Three loops share
the work, the first that is good enough for a block:
    plain   T = 1, |a| < 50 and |y| < 16: exponents are exact, or small;
    exact   exponents in two parts, of any temperature and offset, while e^x and e^y are normal;
    far     infinite or far apart: the same terms as e^(b+c) - e^a - e^a y.
"""

from gufunc cimport INVALID
from libc.math cimport exp as libm_exp, expm1, log
from numpy cimport npy_intp
from sums cimport (
    LANES, RUN, Guess, Row, Sums, across_lanes, add, clear, divergence_of, element, fold, lower_by,
    round_off, two_sum,
)
from vecmath cimport INFINITY, NAN, exp, larger, phi, real, residual_product, smaller

cdef enum:
    WEIGHT = 0
    DIVERGENCE = LANES
    DRIFT = 2 * LANES    # sum of e^a y; excess = divergence + drift
    ADDED = 3 * LANES
    FARTHEST = 3 * LANES # not a sum: the largest |y|; infinity where q = 0 < p
    ACCUMULATORS = 4 * LANES

cdef enum:               # shift = log(sum e^a / sum e^b) and 1/T in two parts: value and rest
    PEAK = 0
    SHIFT = LANES
    SHIFT_REST = 2 * LANES
    BETA = 3 * LANES
    BETA_REST = 4 * LANES
    CONSTANTS = 5 * LANES


cdef inline real safe_exponent(real of_type) noexcept nogil:
    """|x| below this: e^x and 1/e^x are normal numbers."""
    if real is float:
        return 86
    else:
        return 706


cdef inline real offset_limit(real of_type) noexcept nogil:
    """|a| below this: sums of e^a e^y, y < FARTHEST_PLAIN, stay finite without subtracting a peak."""
    if real is float:
        return 50
    else:
        return 600


cdef enum:
    FARTHEST_PLAIN = 16


cdef inline real difference(real x, real y, real *rest) noexcept nogil:
    """x - y and what its rounding left (Knuth's two-sum)."""
    cdef real d = x - y
    cdef real minus_y = d - x
    rest[0] = (x - (d - minus_y)) - (y + minus_y)
    return d


cdef inline real product(real x, real x_rest, real beta, real beta_rest, real *rest) noexcept nogil:
    """(x + x_rest)(beta + beta_rest) and what its rounding left."""
    cdef real d = x * beta
    rest[0] = (x * beta_rest + x_rest * beta) - residual_product(x, beta, d)
    return d


cdef inline real gap(real a, real b, real shift, real shift_rest, real *rest) noexcept nogil:
    """(shift + shift_rest) - (a - b) in two parts."""
    cdef real w_rest, d_rest, d
    cdef real w = difference(a, b, &w_rest)
    d = difference(shift, w, &d_rest)
    cdef real correction = (d_rest - w_rest) + shift_rest
    cdef real y = d + correction
    rest[0] = correction - (y - d)
    return y


cdef inline void plain_terms(const real *a, const real *b, const real *constants, int first,
                             real *sums) noexcept nogil:
    """Add the terms of lanes first..LANES-1, for T = 1 and peak 0."""
    cdef int lane
    cdef real w, w_rest, y, weight
    for lane in range(LANES):
        weight = exp(a[lane], <real> 0)
        if first:
            weight = weight if lane >= first else <real> 0
        w = difference(a[lane], b[lane], &w_rest)
        y = (constants[SHIFT + lane] - w) + (constants[SHIFT_REST + lane] - w_rest)
        sums[WEIGHT + lane] += weight
        sums[DIVERGENCE + lane] += weight * phi(y, <real> 0)
        sums[DRIFT + lane] += weight * y
        sums[FARTHEST + lane] = larger(larger(y, -y), sums[FARTHEST + lane])


cdef inline void exact_terms(const real *a, const real *b, const real *constants, int first,
                             real *sums) noexcept nogil:
    """As plain_terms, for any temperature and peak."""
    cdef int lane
    cdef real beta, beta_rest, x, x_rest, y, y_rest, weight
    for lane in range(LANES):
        beta, beta_rest = constants[BETA + lane], constants[BETA_REST + lane]
        x = difference(a[lane], constants[PEAK + lane], &x_rest)
        x = product(x, x_rest, beta, beta_rest, &x_rest)
        weight = exp(x, x_rest)
        if first:
            weight = weight if lane >= first else <real> 0
        y = gap(a[lane], b[lane], constants[SHIFT + lane], constants[SHIFT_REST + lane], &y_rest)
        y = product(y, y_rest, beta, beta_rest, &y_rest)
        sums[WEIGHT + lane] += weight
        sums[DIVERGENCE + lane] += weight * phi(y, y_rest)
        sums[DRIFT + lane] += weight * y
        sums[FARTHEST + lane] = larger(larger(y, -y), sums[FARTHEST + lane])


cdef inline real clamped_exp(real x, real rest) noexcept nogil:
    """e^(x + rest): 0 below the safe range, infinity above; NaN counts as above."""
    cdef real safe = safe_exponent(x)
    cdef real value = exp(smaller(larger(x, -safe), safe), rest)
    value = value if x > -safe else <real> 0
    return value if x < safe else <real> INFINITY


cdef inline void far_terms(const real *a, const real *b, const real *constants, int first,
                           real *sums) noexcept nogil:
    """As exact_terms, for any logits: -inf is weight 0, in both it is a mask. +inf and NaN end up
    in the drift."""
    cdef int lane
    cdef real x, z, beta, beta_rest, peak, shift, p, q, y, y_rest, rest, near_y, term
    cdef real masked = -<real> INFINITY
    cdef real safe = safe_exponent(masked)
    for lane in range(LANES):
        beta, beta_rest = constants[BETA + lane], constants[BETA_REST + lane]
        peak, shift = constants[PEAK + lane], constants[SHIFT + lane]
        x = a[lane] if a[lane] != masked else peak
        z = b[lane] if b[lane] != masked else x - shift
        y = difference(x, peak, &rest)
        y = product(y, rest, beta, beta_rest, &rest)
        p = clamped_exp(y, rest if y > -safe and y < safe else <real> 0)
        y = gap(peak, z, shift, constants[SHIFT_REST + lane], &rest)
        y = product(-y, -rest, beta, beta_rest, &rest)
        q = clamped_exp(-y, -rest if y > -safe and y < safe else <real> 0)
        p = p if a[lane] != masked else <real> 0
        q = q if b[lane] != masked else <real> 0
        p = p if lane >= first else <real> 0
        q = q if lane >= first else <real> 0
        y = gap(x, z, shift, constants[SHIFT_REST + lane], &y_rest)
        y = product(y, y_rest, beta, beta_rest, &y_rest)
        near_y = smaller(larger(y, -safe), safe / 2)
        term = p * phi(near_y, y_rest) if near_y == y else (q - p) - p * y
        sums[WEIGHT + lane] += p
        sums[DIVERGENCE + lane] += term if p > 0 else q
        sums[DRIFT + lane] += p * y
        sums[FARTHEST + lane] = (<real> INFINITY if (b[lane] == masked and a[lane] != masked)
                                 else sums[FARTHEST + lane])


cdef struct Range:
    double low_a, high_a, high_b


cdef inline void start_range(Range *seen) noexcept nogil:
    seen.low_a = INFINITY
    seen.high_a = seen.high_b = -INFINITY


cdef inline Range range_of(const real *a, int n) noexcept nogil:
    """Smallest and largest value. NaN are passed over."""
    cdef real low[LANES]
    cdef real high[LANES]
    cdef int i = 0, lane
    cdef Range found
    for lane in range(LANES):
        low[lane], high[lane] = <real> INFINITY, -<real> INFINITY
    while i < n:
        i = min(i, n - LANES)
        for lane in range(LANES):
            low[lane], high[lane] = smaller(a[i + lane], low[lane]), larger(a[i + lane], high[lane])
        i += LANES
    start_range(&found)
    for lane in range(LANES):
        found.low_a = smaller(<double> low[lane], found.low_a)
        found.high_a = larger(<double> high[lane], found.high_a)
    return found


cdef inline void column_ranges(const real **x, const npy_intp *step, int n,
                               Range *seen) noexcept nogil:
    """Smallest and largest values of LANES rows so far."""
    cdef int i, lane
    cdef real a, b
    cdef real low_a[LANES]
    cdef real high_a[LANES]
    cdef real high_b[LANES]
    for lane in range(LANES):
        low_a[lane], high_a[lane] = <real> seen[lane].low_a, <real> seen[lane].high_a
        high_b[lane] = <real> seen[lane].high_b
    for i in range(n):
        for lane in range(LANES):
            a, b = x[0][i * step[0] + lane], x[1][i * step[1] + lane]
            low_a[lane], high_a[lane] = smaller(a, low_a[lane]), larger(a, high_a[lane])
            high_b[lane] = larger(b, high_b[lane])
    for lane in range(LANES):
        seen[lane].low_a, seen[lane].high_a = low_a[lane], high_a[lane]
        seen[lane].high_b = high_b[lane]


cdef inline bint is_plain(Range seen, double peak, double beta, real of_type) noexcept nogil:
    cdef double limit = offset_limit(of_type)
    return beta == 1 and peak == 0 and -limit < seen.low_a and seen.high_a < limit


cdef inline double choose_peak(Range seen, double beta, real of_type) noexcept nogil:
    """0, which needs no subtraction, where that is safe."""
    return 0 if is_plain(seen, 0, beta, of_type) else seen.high_a


cdef inline void set_constants(const Guess *guess, int lane, real *constants) noexcept nogil:
    constants[PEAK + lane] = <real> guess.peak
    constants[SHIFT + lane] = <real> guess.shift
    constants[SHIFT_REST + lane] = <real> (guess.shift - constants[SHIFT + lane])
    constants[BETA + lane] = <real> guess.inverse_temperature
    constants[BETA_REST + lane] = <real> (guess.inverse_temperature - constants[BETA + lane])


cdef enum Loop:
    PLAIN
    EXACT
    FAR


cdef inline void add_terms(int loop, const real *a, const real *b, const real *constants, int first,
                           real *sums) noexcept nogil:
    if loop == Loop.PLAIN:
        plain_terms(a, b, constants, first, sums)
    elif loop == Loop.EXACT:
        exact_terms(a, b, constants, first, sums)
    else:
        far_terms(a, b, constants, first, sums)


cdef inline double run_loop(int loop, const real **x, int n, const real *constants,
                            double *totals) noexcept nogil:
    """The sums of n >= LANES elements; returns the largest |y|, which tells whether they hold."""
    cdef real sums[ACCUMULATORS]
    cdef int i, step, lane, rest = n % LANES
    cdef double farthest = 0
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for i in range(ADDED):
        totals[i] = 0
    for step in range(0, n // LANES, 8):
        for i in range(step, min(step + RUN, n // LANES)):
            add_terms(loop, x[0] + i * LANES, x[1] + i * LANES, constants, 0, sums)
        fold(sums, totals, ADDED)
    if rest:
        add_terms(loop, x[0] + n - LANES, x[1] + n - LANES, constants, LANES - rest, sums)
        fold(sums, totals, ADDED)
    for lane in range(LANES):
        farthest = larger(<double> sums[FARTHEST + lane], farthest)
    return farthest


cdef inline double run(int loop, const real **x, int n, const real *constants,
                       double *totals) noexcept nogil:
    if loop == Loop.PLAIN:
        return run_loop(Loop.PLAIN, x, n, constants, totals)
    if loop == Loop.EXACT:
        return run_loop(Loop.EXACT, x, n, constants, totals)
    return run_loop(Loop.FAR, x, n, constants, totals)


cdef inline void categorical_add(const double *totals, Sums *into) noexcept nogil:
    cdef double divergence = across_lanes(&totals[DIVERGENCE])
    add(into, across_lanes(&totals[WEIGHT]), divergence,
        divergence + across_lanes(&totals[DRIFT]), 0)


cdef inline void categorical_block(const real **x, int n, Guess *guess, Sums *into) noexcept nogil:
    """Add n >= LANES elements, relative to a peak that rises with the logits."""
    cdef double totals[ADDED]
    cdef real constants[CONSTANTS]
    cdef int lane, loop = Loop.FAR
    cdef double beta = guess.inverse_temperature
    cdef double safe = safe_exponent(<real> 0)
    cdef Range seen = range_of(x[0], n)
    cdef bint plain = is_plain(seen, guess.peak, beta, <real> 0)
    if not plain and seen.high_a > guess.peak:
        lower_by(into, (seen.high_a - guess.peak) * beta)
        guess.peak = seen.high_a
    for lane in range(LANES):
        set_constants(guess, lane, constants)
    if plain and not guess.wide:
        guess.wide = not run(Loop.PLAIN, x, n, constants, totals) < <double> FARTHEST_PLAIN
        plain = not guess.wide
    else:
        plain = False
    if not plain:
        if guess.peak - seen.low_a < safe / beta:
            loop = Loop.EXACT if run(Loop.EXACT, x, n, constants, totals) < safe else Loop.FAR
        if loop == Loop.FAR:
            into.doubtful |= run(Loop.FAR, x, n, constants, totals) == INFINITY
    categorical_add(totals, into)


cdef inline bint can_be_plain(const Guess *guess) noexcept nogil:
    return guess.peak == 0 and guess.inverse_temperature == 1


cdef inline void categorical_columns(const real **x, const npy_intp *stride, int n, bint plain,
                                     const Guess *guess, Sums *into) noexcept nogil:
    """Add n elements of each of those of LANES rows that are `plain` or are not; their elements lie
    `stride` apart. A row is doubtful where its logits are out of the loop's range."""
    cdef real sums[ACCUMULATORS]
    cdef double totals[ADDED]
    cdef real constants[CONSTANTS]
    cdef int i, step, lane
    cdef double limit = <double> FARTHEST_PLAIN if plain else safe_exponent(<real> 0)
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for i in range(ADDED):
        totals[i] = 0
    for lane in range(LANES):
        set_constants(&guess[lane], lane, constants)
    for step in range(0, n, 8):
        for i in range(step, min(step + RUN, n)):
            if plain:
                plain_terms(x[0] + i * stride[0], x[1] + i * stride[1], constants, 0, sums)
            else:
                exact_terms(x[0] + i * stride[0], x[1] + i * stride[1], constants, 0, sums)
        fold(sums, totals, ADDED)
    for lane in range(LANES):
        if can_be_plain(&guess[lane]) != plain:
            continue
        add(&into[lane], totals[WEIGHT + lane], totals[DIVERGENCE + lane],
            totals[DIVERGENCE + lane] + totals[DRIFT + lane], 0)
        into[lane].doubtful |= not sums[FARTHEST + lane] < limit


cdef inline bint categorical_guess(const real **x, int n, Guess *guess) noexcept nogil:
    """From the first block that has finite logits on both sides; False when this has not."""
    cdef Range a = range_of(x[0], n), b = range_of(x[1], n)
    guess.shift = a.high_a - b.high_a
    if not -INFINITY < guess.shift < INFINITY:
        guess.shift = 0
        return False
    guess.peak = choose_peak(a, guess.inverse_temperature, x[0][0])
    return True


cdef inline bint categorical_guess_lane(Range seen, Guess *guess, real of_type) noexcept nogil:
    """As categorical_guess, for one of LANES rows; False when its logits are far apart."""
    guess.peak = choose_peak(seen, guess.inverse_temperature, of_type)
    guess.shift = seen.high_a - seen.high_b
    return (guess.peak - seen.low_a) * guess.inverse_temperature < safe_exponent(of_type)


cdef inline bint categorical_refine(const Sums *sums, Guess *guess, real of_type) noexcept nogil:
    """The exact shift: 1 + u = e^(c - c*), as far as u's rounding tells it from 0. False when the
    guess was too far off for that."""
    cdef double grown = 1 + sums.excess / sums.weight
    cdef double least = 1e-7 if real is float else 1e-15
    if not grown < INFINITY:
        return False
    guess.shift -= log(larger(grown, least)) / guess.inverse_temperature
    return True


cdef inline double log_sum_exp(const Row *row, int operand, double peak) noexcept nogil:
    """log of the sum of exp((x - peak)/T)."""
    cdef double result = 0, rest = 0
    cdef npy_intp i
    for i in range(row.length):
        result = two_sum(result, libm_exp((element(row, operand, i) - peak) * row.inverse_temperature), &rest)
    return log(result + rest)


cdef inline double categorical_hard_value(const Row *row, int *status) noexcept nogil:
    """Bad values, p > 0 where q = 0, and rows where no guess of the shift came near."""
    cdef double a, b, peak_a = -INFINITY, peak_b = -INFINITY
    cdef bint infinite = False
    cdef npy_intp i
    for i in range(row.length):
        a, b = element(row, 0, i), element(row, 1, i)
        if a != a or b != b:
            return NAN
        infinite |= a > -INFINITY and b == -INFINITY
        peak_a, peak_b = larger(a, peak_a), larger(b, peak_b)
    if not (-INFINITY < peak_a < INFINITY and -INFINITY < peak_b < INFINITY):
        status[0] |= INVALID
        return NAN
    if infinite:
        return INFINITY
    return hard_divergence(row, peak_a, peak_b)


cdef inline double hard_divergence(const Row *row, double peak_a, double peak_b) noexcept nogil:
    """The formula at the head with the exact shift, one element at a time."""
    cdef double beta = row.inverse_temperature, a, b, p, q, y
    cdef double lse_a = log_sum_exp(row, 0, peak_a), lse_b = log_sum_exp(row, 1, peak_b)
    cdef double shift = (peak_a - peak_b) + (lse_a - lse_b) / beta
    cdef npy_intp i
    cdef Sums sums
    clear(&sums)
    for i in range(row.length):
        a, b = element(row, 0, i), element(row, 1, i)
        p = libm_exp((a - peak_a) * beta)
        y = ((shift - (a - b)) * beta) if a > -INFINITY else 0
        if p > 0 and y < 300:
            add(&sums, p, p * (phi(y, <double> 0) if y > -700 else -1 - y), p * expm1(y), 0)
        else:
            q = libm_exp((b - peak_b) * beta - lse_b + lse_a)
            add(&sums, p, q - p - (p * y if p > 0 else 0), q - p, 0)
    round_off(&sums)
    return divergence_of(&sums)
