"""Categorical distributions from unnormalised log-probabilities a, b and a temperature T.

With P = softmax(a/T), Q = softmax(b/T), w = (a - b)/T, any c close to lse(a/T) - lse(b/T) and
y = c - w:
    KL = E_P[phi(y)] - (u - log1p(u)),   u = E_P[expm1(y)],   phi(y) = e^y - 1 - y >= 0.
Errors of c enter in second order only, and nothing cancels when P is close to Q. One exponential
of a, one phi, one pass.

Where a or b is infinite or so far from the others that e^a underflows or e^y overflows, the same
terms are e^(b+c) - e^a - e^a y.
"""

from gufunc cimport INVALID
from libc.math cimport exp as libm_exp, expm1, log
from numpy cimport npy_intp
from sums cimport LANES, Guess, Row, Sums, divergence_of, element, lower_by
from vecmath cimport INFINITY, NAN, exp, larger, phi, real, smaller

cdef enum:
    WEIGHT = 0
    DIVERGENCE = LANES
    DRIFT = 2 * LANES    # sum of e^a y; excess = divergence + drift
    INFINITE = 3 * LANES
    ACCUMULATORS = 4 * LANES

cdef enum:
    PEAK = 0
    SHIFT = LANES
    BETA = 2 * LANES     # 1/T, and what its rounding left
    BETA_REST = 3 * LANES
    CONSTANTS = 4 * LANES


cdef inline real safe_exponent(real of_type) noexcept nogil:
    """|x| below this: e^x and 1/e^x are normal numbers."""
    if real is float:
        return 86
    else:
        return 706


cdef inline real scaled_by(real x, real beta, real rest, bint tempered) noexcept nogil:
    return x * beta + x * rest if tempered else x


cdef inline real shifted_difference(real a, real b, real shift) noexcept nogil:
    """shift - (a - b), the rounding error of a - b included (Knuth's two-sum): when all logits
    are shifted by a large constant, nothing of the small differences is lost."""
    cdef real w = a - b
    cdef real minus_b = w - a
    cdef real error = (a - (w - minus_b)) - (b + minus_b)
    return (shift - w) - error


cdef inline void near_terms(const real *a, const real *b, const real *constants, bint tempered,
                            int first, real *sums) noexcept nogil:
    """Add the terms of lanes first..LANES-1, exponents being safe."""
    cdef int lane
    cdef real beta, rest, y, weight
    for lane in range(LANES):
        beta, rest = constants[BETA + lane], constants[BETA_REST + lane]
        weight = exp(scaled_by(a[lane] - constants[PEAK + lane], beta, rest, tempered))
        if first:
            weight = weight if lane >= first else <real> 0
        y = scaled_by(shifted_difference(a[lane], b[lane], constants[SHIFT + lane]),
                      beta, rest, tempered)
        sums[WEIGHT + lane] += weight
        sums[DIVERGENCE + lane] += weight * phi(y)
        sums[DRIFT + lane] += weight * y


cdef inline real clamped_exp(real x) noexcept nogil:
    """e^x: 0 below the safe range, infinity above; NaN counts as above."""
    cdef real safe = safe_exponent(x)
    cdef real value = exp(smaller(larger(x, -safe), safe))
    value = value if x > -safe else <real> 0
    return value if x < safe else <real> INFINITY


cdef inline void far_terms(const real *a, const real *b, const real *constants, bint tempered,
                           int first, real *sums) noexcept nogil:
    """As near_terms, for any logits: -inf is weight 0, in both it is a mask. +inf and NaN end up
    in the drift."""
    cdef int lane
    cdef real x, z, beta, rest, peak, shift, p, q, y, near_y, term
    cdef real masked = -<real> INFINITY
    cdef real safe = safe_exponent(masked)
    for lane in range(LANES):
        beta, rest = constants[BETA + lane], constants[BETA_REST + lane]
        peak, shift = constants[PEAK + lane], constants[SHIFT + lane]
        x = a[lane] if a[lane] != masked else peak
        z = b[lane] if b[lane] != masked else x - shift
        p = clamped_exp(scaled_by(x - peak, beta, rest, tempered))
        q = clamped_exp(scaled_by((z - peak) + shift, beta, rest, tempered))
        p = p if a[lane] != masked else <real> 0
        q = q if b[lane] != masked else <real> 0
        p = p if lane >= first else <real> 0
        q = q if lane >= first else <real> 0
        y = scaled_by(shifted_difference(x, z, shift), beta, rest, tempered)
        near_y = smaller(larger(y, -safe), safe / 2)
        term = p * phi(near_y) if near_y == y else (q - p) - p * y
        sums[WEIGHT + lane] += p
        sums[DIVERGENCE + lane] += term if p > 0 else q
        sums[DRIFT + lane] += p * y
        sums[INFINITE + lane] = (
            1 if (b[lane] == masked and a[lane] != masked) else sums[INFINITE + lane])


cdef struct Range:
    double low_a, high_a, low_b, high_b


cdef inline Range range_of(const real *a, const real *b, int n) noexcept nogil:
    """Smallest and largest values of a and b. NaN are passed over."""
    cdef real low_a[LANES]
    cdef real high_a[LANES]
    cdef real low_b[LANES]
    cdef real high_b[LANES]
    cdef int i, lane
    cdef Range found
    for lane in range(LANES):
        low_a[lane] = low_b[lane] = <real> INFINITY
        high_a[lane] = high_b[lane] = -<real> INFINITY
    i = 0
    while i < n:
        i = min(i, n - LANES)
        for lane in range(LANES):
            low_a[lane] = smaller(a[i + lane], low_a[lane])
            high_a[lane] = larger(a[i + lane], high_a[lane])
            low_b[lane] = smaller(b[i + lane], low_b[lane])
            high_b[lane] = larger(b[i + lane], high_b[lane])
        i += LANES
    start_range(&found)
    for lane in range(LANES):
        found.low_a = smaller(<double> low_a[lane], found.low_a)
        found.high_a = larger(<double> high_a[lane], found.high_a)
        found.low_b = smaller(<double> low_b[lane], found.low_b)
        found.high_b = larger(<double> high_b[lane], found.high_b)
    return found


cdef inline bint is_near(Range seen, const Guess *guess, real of_type) noexcept nogil:
    """Whether all exponents of near_terms are safe. False when anything is infinite."""
    cdef double safe = safe_exponent(of_type) / guess.inverse_temperature
    return (guess.peak - seen.low_a < safe and seen.high_a - guess.peak < safe
            and seen.high_a - seen.low_b - guess.shift < safe
            and seen.high_b - seen.low_a + guess.shift < safe)


cdef inline void set_constants(const Guess *guess, int lane, real *constants) noexcept nogil:
    constants[PEAK + lane] = <real> guess.peak
    constants[SHIFT + lane] = <real> guess.shift
    constants[BETA + lane] = <real> guess.inverse_temperature
    constants[BETA_REST + lane] = <real> (guess.inverse_temperature - constants[BETA + lane])


cdef inline void categorical_flush(const real *sums, int lane, const Guess *guess,
                                   Sums *into) noexcept nogil:
    cdef double divergence = sums[DIVERGENCE + lane]
    into.weight += sums[WEIGHT + lane]
    into.divergence += divergence
    into.excess += divergence + sums[DRIFT + lane]
    into.doubtful |= sums[INFINITE + lane] != 0


cdef inline void categorical_block(const real **x, int n, bint tempered, Guess *guess,
                                   Sums *into) noexcept nogil:
    """Add n >= LANES elements, relative to the largest logit so far."""
    cdef real sums[ACCUMULATORS]
    cdef real constants[CONSTANTS]
    cdef int i, lane, rest = n % LANES
    cdef Range seen = range_of(x[0], x[1], n)
    if seen.high_a > guess.peak:
        lower_by(into, (seen.high_a - guess.peak) * guess.inverse_temperature)
        guess.peak = seen.high_a
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for lane in range(LANES):
        set_constants(guess, lane, constants)
    if is_near(seen, guess, <real> 0):
        for i in range(n // LANES):
            near_terms(x[0] + i * LANES, x[1] + i * LANES, constants, tempered, 0, sums)
        if rest:
            i = n - LANES
            near_terms(x[0] + i, x[1] + i, constants, tempered, LANES - rest, sums)
    else:
        for i in range(n // LANES):
            far_terms(x[0] + i * LANES, x[1] + i * LANES, constants, tempered, 0, sums)
        if rest:
            i = n - LANES
            far_terms(x[0] + i, x[1] + i, constants, tempered, LANES - rest, sums)
    for lane in range(LANES):
        categorical_flush(sums, lane, guess, into)


cdef inline void categorical_columns(const real **x, const npy_intp *step, int n, bint tempered,
                                     const Guess *guess, Sums *into) noexcept nogil:
    """Add n elements of each of LANES rows, whose elements lie `step` apart and are near."""
    cdef real sums[ACCUMULATORS]
    cdef real constants[CONSTANTS]
    cdef int i, lane
    for i in range(ACCUMULATORS):
        sums[i] = 0
    for lane in range(LANES):
        set_constants(&guess[lane], lane, constants)
    for i in range(n):
        near_terms(x[0] + i * step[0], x[1] + i * step[1], constants, tempered, 0, sums)
    for lane in range(LANES):
        categorical_flush(sums, lane, guess, &into[lane])


cdef inline bint categorical_guess(const real **x, int n, Guess *guess) noexcept nogil:
    """From the first block that has finite logits on both sides; False when this has not."""
    cdef Range seen = range_of(x[0], x[1], n)
    guess.peak, guess.shift = seen.high_a, seen.high_a - seen.high_b
    return -INFINITY < guess.shift < INFINITY


cdef inline void start_range(Range *seen) noexcept nogil:
    seen.low_a = seen.low_b = INFINITY
    seen.high_a = seen.high_b = -INFINITY


cdef inline void column_ranges(const real **x, const npy_intp *step, int n,
                               Range *seen) noexcept nogil:
    """Smallest and largest values of LANES rows so far."""
    cdef int i, lane
    cdef real a, b
    cdef real low_a[LANES]
    cdef real high_a[LANES]
    cdef real low_b[LANES]
    cdef real high_b[LANES]
    for lane in range(LANES):
        low_a[lane], high_a[lane] = <real> seen[lane].low_a, <real> seen[lane].high_a
        low_b[lane], high_b[lane] = <real> seen[lane].low_b, <real> seen[lane].high_b
    for i in range(n):
        for lane in range(LANES):
            a, b = x[0][i * step[0] + lane], x[1][i * step[1] + lane]
            low_a[lane], high_a[lane] = smaller(a, low_a[lane]), larger(a, high_a[lane])
            low_b[lane], high_b[lane] = smaller(b, low_b[lane]), larger(b, high_b[lane])
    for lane in range(LANES):
        seen[lane].low_a, seen[lane].high_a = low_a[lane], high_a[lane]
        seen[lane].low_b, seen[lane].high_b = low_b[lane], high_b[lane]


cdef inline bint categorical_refine(const Row *row, const Sums *sums, Guess *guess) noexcept nogil:
    """The exact shift: 1 + u = e^(c - c*). False when the first guess was too far off to tell."""
    cdef double grown = 1 + sums.excess / sums.weight
    if not 1e-3 < grown < INFINITY:
        return False
    guess.shift -= log(grown) / guess.inverse_temperature
    return True


cdef inline double log_sum_exp(const Row *row, int operand, double peak) noexcept nogil:
    """log of the sum of exp((x - peak)/T)."""
    cdef double result = 0
    cdef npy_intp i
    for i in range(row.length):
        result += libm_exp((element(row, operand, i) - peak) * row.inverse_temperature)
    return log(result)


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
    cdef double beta = row.inverse_temperature, a, b, p, y
    cdef double lse_a = log_sum_exp(row, 0, peak_a), lse_b = log_sum_exp(row, 1, peak_b)
    cdef double shift = (peak_a - peak_b) + (lse_a - lse_b) / beta
    cdef npy_intp i
    cdef Sums sums
    sums.weight = sums.divergence = sums.excess = 0
    for i in range(row.length):
        a, b = element(row, 0, i), element(row, 1, i)
        p = libm_exp((a - peak_a) * beta)
        y = shifted_difference(a, b, shift) * beta if a > -INFINITY else 0
        sums.weight += p
        if p > 0 and y < 300:
            sums.divergence += p * (phi(y) if y > -700 else -1 - y)
            sums.excess += p * expm1(y)
        else:
            y = libm_exp((b - peak_b) * beta - lse_b + lse_a)
            sums.divergence += y - p + p * ((a - b - shift) * beta if p > 0 else 0.0)
            sums.excess += y - p
    return divergence_of(&sums)
