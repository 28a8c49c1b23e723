"""Categorical distributions from unnormalised log-probabilities a, b and a temperature T.

With P = softmax(a/T), Q = softmax(b/T), any c and y = (c - (a - b))/T:
    KL = E_P[phi(y)] - (u - log1p(u)),   u = E_P[expm1(y)],   phi(y) = e^y - 1 - y >= 0,
and for c = E_P[a - b], found first, nothing cancels at any distance of P and Q. Errors of c enter
in second order only. One exponential of a, one phi.

Where P and Q are far apart nothing cancels either in
    sum e^a phi(y) = e^c sum e^b - sum e^a,   c = E_P[a - b],   T = 1,
whose sums are taken beside those that give c, where their errors, at worst 4e-7 + 6e-7 E_P|a - b|
in float32, are small beside it.

Columns longer than a strip are summed strip by strip, each relative to a shift of its own. Terms
are added up in fours: a heavy term and many equal ones, which all round the same way, cost sums of
float 4e-7 at most.

An exponent that is rounded to half an ulp costs e^x a relative error of |x| eps/2. Loops from the
plainest, the first that is good enough for a block:
    near    T = 1, |a| < 40 (float64: 300), |y| < 0.34: phi is its series;
    plain   T = 1, |a| as before, |y| < 8 (16): exponents are exact, or small;
    unit    as exact, with the weights of plain: T = 1, so that its product is left out;
    exact   exponents in two parts, of any temperature and offset, while e^x and e^y are normal;
    far     infinite or far apart: the same terms as e^(b+c) - e^a - e^a y.
e^a has the same bits in each. Near and plain, y = c - (a - b) is right to eps (|c| + |y|): it needs
no second part while |c| is not much larger than y is on average.
"""

from gufunc cimport Watch, is_unwanted
from libc.math cimport exp as libm_exp, log, sqrt
from numpy cimport npy_intp
from sums cimport (
    COPY_BYTES, LANES, LONG_BLOCK, STRIP, Ahead, LaneParts, LaneSums, Row, Slope, Sums, Trait,
    across, add, clear, clear_lanes, copy, divergence_of, element, fill, fold, full_run, keep_from,
    largest, least, round_off, run_length, two_sum,
)
from vecmath cimport (
    INFINITY, NAN, exp, expm1, larger, magnitude, phi, phi_near, real, residual_product,
    smaller,
)

cdef enum Loop:
    NEAR
    PLAIN
    UNIT
    EXACT
    FAR
    APART    # gradients: e^b too is a normal number, and P and Q are far from each other
    ANY      # gradients: blocks differ


cdef inline double safe_exponent(real of_type) noexcept nogil:
    """|x| below this: e^x and 1/e^x are normal numbers."""
    return 86 if real is float else 706


cdef inline double offset_limit(real of_type) noexcept nogil:
    """|a| below this: e^a e^y and their sums stay finite without a peak, |y| < 16; and
    e^b is normal while |a - b| is below this too."""
    return 40 if real is float else 300

cdef enum:
    WIDE = 4 * LANES     # elements a step


cdef inline double farthest_near() noexcept nogil:
    return 0.34


cdef inline double farthest_plain(real of_type) noexcept nogil:
    """Half an ulp of y is an error of e^y: beyond 8, of 5e-7 in float32."""
    return 8 if real is float else 16


cdef enum:
    MOST_OFFSET = 16     # c^2, in units of the variance of y, that leaves y right to 8 eps of it

cdef enum:               # constants of LANES rows, or LANES times those of one
    PEAK = 0             # what logits_p are taken relative to
    SHIFT = LANES        # c, rounded to the lanes' type
    BETA = 2 * LANES     # 1/T in two parts
    BETA_REST = 3 * LANES
    CONSTANTS = 4 * LANES


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


cdef inline real gap(real a, real b, real shift, real *rest) noexcept nogil:
    """shift - (a - b) in two parts."""
    cdef real w_rest, d_rest
    cdef real w = difference(a, b, &w_rest)
    cdef real d = difference(shift, w, &d_rest)
    cdef real correction = d_rest - w_rest
    cdef real y = d + correction
    rest[0] = correction - (y - d)
    return y


cdef inline real clamped_exp(real x, real rest) noexcept nogil:
    """e^(x + rest): 0 below the safe range, infinity above; NaN counts as above."""
    cdef real safe = <real> safe_exponent(x)
    cdef bint within = (x > -safe) & (x < safe)
    cdef real value = exp(smaller(larger(x, -safe), safe), rest if within else <real> 0)
    value = value if not x <= -safe else <real> 0
    return value if x < safe else <real> INFINITY


cdef inline void ranges(const real *a, npy_intp step, int n, real *lowest,
                        real *highest) noexcept nogil:
    """Smallest and largest values of n terms of each lane. NaN are passed over."""
    cdef int lane, i
    cdef real x
    cdef real low[LANES]
    cdef real high[LANES]
    for lane in range(LANES):
        low[lane], high[lane] = <real> INFINITY, -<real> INFINITY
    for i in range(n):
        for lane in range(LANES):
            x = a[i * step + lane]
            low[lane], high[lane] = smaller(x, low[lane]), larger(x, high[lane])
    copy(low, lowest)
    copy(high, highest)


# First phase: weights e^((a - peak)/T), their sum, and where a - b lies.

ctypedef struct Weighed:      # of LANES rows, or of every LANESth element of one: sums of
    double weight[LANES]      # e^((a - peak)/T)
    double moment[LANES]      # weight (a - b)
    double square[LANES]      # weight (a - b)^2
    double other[LANES]       # e^b, where it is asked for

cdef enum:                    # the same of a few terms of each
    WEIGHT = 0
    MOMENT = LANES
    SQUARE = 2 * LANES
    OTHER = 3 * LANES
    WEIGHED = 4 * LANES

cdef enum:                    # where values of LANES rows, or of one, lie
    LOWEST = 0                # a - b
    HIGHEST = LANES           # a - b
    REACH = 2 * LANES         # |a|, where the loop is plain
    EXTREMES = 3 * LANES


cdef inline int run_of_fours(int n, int sums, real of_type) noexcept nogil:
    """How many of n terms that are left make a run, a sum of sums of four: of a heavy term and
    light ones, which all round the same way, 16 in float meet five roundings, 8 only three."""
    cdef int length = full_run(sums, of_type)
    return n if n < length + 4 else length


cdef inline real weight_of(int loop, real a, const real *constants, int lane) noexcept nogil:
    cdef real x, rest
    if loop <= Loop.PLAIN:
        return exp(a, <real> 0)
    x = difference(a, constants[PEAK + lane], &rest)
    x = product(x, rest, constants[BETA + lane], constants[BETA_REST + lane], &rest)
    if loop == Loop.EXACT:
        return exp(x, rest)
    return clamped_exp(x, rest)


cdef inline void weigh_one(int loop, bint both, const real *a, const real *b, int first,
                           const real *constants, real *weights, real *extremes, Ahead *ahead,
                           real *terms) noexcept nogil:
    """The terms of one element of each lane."""
    cdef int lane
    cdef real x, w, weight, part, low, high, inf = <real> INFINITY, nan = <real> NAN
    ask_along(ahead, <real> 0)
    for lane in range(LANES):
        x = a[lane]
        weight = weight_of(loop, x, constants, lane)
        if first:
            weight = weight if lane >= first else <real> 0
        w = x - b[lane]
        low = high = w
        if loop == Loop.FAR:  # what has no weight on both sides does not count
            w = w if b[lane] > -inf else nan
            w = w if weight > 0 else nan
            low, high = w if w == w else inf, w if w == w else -inf
            w = w if w == w else <real> 0
        part = weight * w
        terms[WEIGHT + lane], terms[MOMENT + lane], terms[SQUARE + lane] = weight, part, part * w
        if both:
            terms[OTHER + lane] = exp(b[lane], <real> 0)
        extremes[LOWEST + lane] = smaller(low, extremes[LOWEST + lane])
        extremes[HIGHEST + lane] = larger(high, extremes[HIGHEST + lane])
        if loop == Loop.PLAIN:
            extremes[REACH + lane] = larger(magnitude(x), extremes[REACH + lane])
    copy(terms + WEIGHT, weights)


cdef inline void add_weighed(bint both, const real *terms, real *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into[WEIGHT + lane] += terms[WEIGHT + lane]
        into[MOMENT + lane] += terms[MOMENT + lane]
        into[SQUARE + lane] += terms[SQUARE + lane]
        if both:
            into[OTHER + lane] += terms[OTHER + lane]


cdef inline void weigh_four(int loop, bint both, const real *a, const real *b, npy_intp step_a,
                            npy_intp step_b, const real *constants, real *weights, real *extremes,
                            Ahead *ahead, real *sums) noexcept nogil:
    cdef real terms[WEIGHED]
    cdef real others[WEIGHED]
    weigh_one(loop, both, a, b, 0, constants, weights, extremes, ahead, sums)
    weigh_one(loop, both, a + step_a, b + step_b, 0, constants, weights + LANES, extremes, ahead,
              terms)
    add_weighed(both, terms, sums)
    weigh_one(loop, both, a + 2 * step_a, b + 2 * step_b, 0, constants, weights + 2 * LANES,
              extremes, ahead, others)
    weigh_one(loop, both, a + 3 * step_a, b + 3 * step_b, 0, constants, weights + 3 * LANES,
              extremes, ahead, terms)
    add_weighed(both, terms, others)
    add_weighed(both, others, sums)


cdef inline void weigh_run(int loop, bint both, const real *a, const real *b, npy_intp step_a,
                           npy_intp step_b, int n, int first, const real *constants, real *weights,
                           real *extremes, Ahead *ahead, Weighed *into) noexcept nogil:
    """Add n terms of each lane, of the lanes from `first` on."""
    cdef int lane, i
    cdef real terms[WEIGHED]
    cdef real last[WEIGHED]
    cdef real sums[WEIGHED]
    for lane in range(WEIGHED):
        sums[lane] = last[lane] = 0
    for i in range(n // 4):
        weigh_four(loop, both, a, b, step_a, step_b, constants, weights, extremes, ahead, terms)
        add_weighed(both, terms, sums)
        a, b, weights = a + 4 * step_a, b + 4 * step_b, weights + 4 * LANES
    for i in range(n % 4):
        weigh_one(loop, both, a, b, first, constants, weights, extremes, ahead, terms)
        add_weighed(both, terms, last)
        a, b, weights = a + step_a, b + step_b, weights + LANES
    if n % 4:
        add_weighed(both, last, sums)
    fold(sums + WEIGHT, into.weight)
    fold(sums + MOMENT, into.moment)
    fold(sums + SQUARE, into.square)
    if both:
        keep_from(first, sums + OTHER)
        fold(sums + OTHER, into.other)


cdef inline void weigh(int loop, bint both, const real *a, const real *b, npy_intp step_a,
                       npy_intp step_b, int n, int first, const real *constants, real *weights,
                       real *extremes, Ahead *ahead, Weighed *into) noexcept nogil:
    """The weights of n terms of each lane, and of the lanes from `first` on, if it is not 0, of one
    more, from a vector that overlaps the last; their sums, and where values lie. `both`: e^b, too.
    """
    cdef int length, lane
    cdef real found[EXTREMES]
    cdef Weighed sums
    copy(into.weight, sums.weight)
    copy(into.moment, sums.moment)
    copy(into.square, sums.square)
    if both:
        copy(into.other, sums.other)
    for lane in range(EXTREMES):
        found[lane] = extremes[lane]
    while n > 0:
        length = run_of_fours(n, 1, <real> 0)
        weigh_run(loop, both, a, b, step_a, step_b, length, 0, constants, weights, found, ahead,
                  &sums)
        a, b, n = a + length * step_a, b + length * step_b, n - length
        weights += length * LANES
    if first:
        weigh_run(loop, both, a - first, b - first, step_a, step_b, 1, first, constants, weights,
                  found, ahead, &sums)
    for lane in range(EXTREMES):
        extremes[lane] = found[lane]
    copy(sums.weight, into.weight)
    copy(sums.moment, into.moment)
    copy(sums.square, into.square)
    if both:
        copy(sums.other, into.other)


cdef inline void weigh_nothing(real *extremes, Weighed *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into.weight[lane] = into.moment[lane] = into.square[lane] = into.other[lane] = 0
        extremes[LOWEST + lane] = <real> INFINITY
        extremes[HIGHEST + lane] = -<real> INFINITY
        extremes[REACH + lane] = 0


# Second phase: the terms, relative to the shift.

cdef inline real far_term(real a, real b, real p, const real *constants, int lane, real *y,
                          real *infinite) noexcept nogil:
    """p phi(y) for any logits: -inf is weight 0, in both it is a mask; +inf or NaN end up in y."""
    cdef real beta = constants[BETA + lane], beta_rest = constants[BETA_REST + lane]
    cdef real peak = constants[PEAK + lane], shift = constants[SHIFT + lane]
    cdef real masked = -<real> INFINITY
    cdef real safe = <real> safe_exponent(masked)
    cdef real x = a if a != masked else peak
    cdef real z = b if b != masked else x - shift
    cdef real q, rest, y_rest, near_y, term
    q = gap(peak, z, shift, &rest)
    q = product(q, rest, beta, beta_rest, &rest)
    q = clamped_exp(q, rest) if b != masked else <real> 0
    y[0] = gap(x, z, shift, &y_rest)
    y[0] = product(y[0], y_rest, beta, beta_rest, &y_rest)
    near_y = smaller(larger(y[0], -safe), <real> (safe_exponent(masked) / 2))
    term = p * phi(near_y, y_rest) if near_y == y[0] else (q - p) - p * y[0]
    infinite[0] = <real> 1 if (b == masked) & (a != masked) else infinite[0]
    return term if p > 0 else q


cdef enum:                    # terms, and sums of a few
    DIVERGENCE = 0
    DRIFT = LANES
    DIVERGED = 2 * LANES


cdef inline void diverge_one(int loop, bint offset, const real *a, const real *b, int first,
                             const real *weights, const real *constants, real *infinite,
                             real *terms) noexcept nogil:
    """The terms of one element of each lane; weights before `first` are 0, and were summed before.
    `offset`: y needs a second part."""
    cdef int lane
    cdef real w, w_rest, x, z, y, y_rest, p, term
    for lane in range(LANES):
        p, x, z = weights[lane], a[lane], b[lane]
        if loop == Loop.FAR:
            term = far_term(x, z, p, constants, lane, &y, &infinite[lane])
            term = term if lane >= first else <real> 0
        elif loop >= Loop.UNIT:
            y = gap(x, z, constants[SHIFT + lane], &y_rest)
            if loop == Loop.EXACT:
                y = product(
                    y, y_rest, constants[BETA + lane], constants[BETA_REST + lane], &y_rest)
            term = p * phi(y, y_rest)
        else:
            if offset:
                w = difference(x, z, &w_rest)
                y = (constants[SHIFT + lane] - w) - w_rest
            else:
                y = constants[SHIFT + lane] - (x - z)
            term = p * (phi_near(y) if loop == Loop.NEAR else phi(y, <real> 0))
        terms[DIVERGENCE + lane], terms[DRIFT + lane] = term, p * y


cdef inline void add_diverged(const real *terms, real *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into[DIVERGENCE + lane] += terms[DIVERGENCE + lane]
        into[DRIFT + lane] += terms[DRIFT + lane]


cdef inline void diverge_four(int loop, bint offset, const real *a, const real *b, npy_intp step_a,
                              npy_intp step_b, const real *weights, const real *constants,
                              real *infinite, real *sums) noexcept nogil:
    cdef real terms[DIVERGED]
    cdef real others[DIVERGED]
    diverge_one(loop, offset, a, b, 0, weights, constants, infinite, sums)
    diverge_one(loop, offset, a + step_a, b + step_b, 0, weights + LANES, constants, infinite,
                terms)
    add_diverged(terms, sums)
    diverge_one(loop, offset, a + 2 * step_a, b + 2 * step_b, 0, weights + 2 * LANES, constants,
                infinite, others)
    diverge_one(loop, offset, a + 3 * step_a, b + 3 * step_b, 0, weights + 3 * LANES, constants,
                infinite, terms)
    add_diverged(terms, others)
    add_diverged(others, sums)


cdef inline void diverge_run(int loop, bint offset, const real *a, const real *b, npy_intp step_a,
                             npy_intp step_b, int n, int first, const real *weights,
                             const real *constants, real *infinite,
                             LaneSums *into) noexcept nogil:
    """Add n terms of each lane, as weigh_run."""
    cdef int lane, i
    cdef real terms[DIVERGED]
    cdef real last[DIVERGED]
    cdef real sums[DIVERGED]
    cdef real unbounded[LANES]
    copy(infinite, unbounded)
    for lane in range(DIVERGED):
        sums[lane] = last[lane] = 0
    for i in range(n // 4):
        diverge_four(loop, offset, a, b, step_a, step_b, weights, constants, unbounded, terms)
        add_diverged(terms, sums)
        a, b, weights = a + 4 * step_a, b + 4 * step_b, weights + 4 * LANES
    for i in range(n % 4):
        diverge_one(loop, offset, a, b, first, weights, constants, unbounded, terms)
        add_diverged(terms, last)
        a, b, weights = a + step_a, b + step_b, weights + LANES
    if n % 4:
        add_diverged(last, sums)
    copy(unbounded, infinite)
    fold(sums + DIVERGENCE, into.divergence)
    fold(sums + DRIFT, into.drift)


cdef inline void diverge(int loop, bint offset, const real *a, const real *b, npy_intp step_a,
                         npy_intp step_b, int n, int first, const real *weights,
                         const real *constants, real *infinite,
                         LaneSums *into) noexcept nogil:
    """Add n terms of each lane, and one more as `weigh`."""
    cdef int length
    while n > 0:
        length = run_of_fours(n, 2, <real> 0)
        diverge_run(
            loop, offset, a, b, step_a, step_b, length, 0, weights, constants, infinite,
            into)
        a, b, n = a + length * step_a, b + length * step_b, n - length
        weights += length * LANES
    if first:
        diverge_run(loop, offset, a - first, b - first, step_a, step_b, 1, first, weights,
                    constants, infinite, into)


cdef inline bint is_plain(double lowest, double highest, double beta, real of_type) noexcept nogil:
    """Whether logits_p in this range need no peak."""
    return beta == 1 and -offset_limit(of_type) < lowest and highest < offset_limit(of_type)


cdef inline int first_loop(double lowest, double highest, double beta, double *peak,
                           real of_type) noexcept nogil:
    """The loop for the weights of logits_p in this range, and the peak: 0, which needs no
    subtraction, where that is safe."""
    peak[0] = 0
    if is_plain(lowest, highest, beta, of_type):
        return Loop.PLAIN
    if highest > -INFINITY:
        peak[0] = highest
    return Loop.EXACT if (peak[0] - lowest) * beta < safe_exponent(of_type) else Loop.FAR


cdef inline int second_loop(int first, double farthest, real of_type) noexcept nogil:
    """The loop for the terms, given that of the weights and the largest |y|. NaN and infinities are
    far."""
    if first == Loop.PLAIN and farthest < farthest_near():
        return Loop.NEAR
    if first == Loop.PLAIN and farthest < farthest_plain(of_type):
        return Loop.PLAIN
    if first <= Loop.EXACT and farthest < safe_exponent(of_type):
        return Loop.UNIT if first == Loop.PLAIN else Loop.EXACT
    return Loop.FAR


cdef inline bint is_offset(double shift, double weight, double square) noexcept nogil:
    """Whether y = c - (a - b) needs a second part; NaN do."""
    return not (MOST_OFFSET + 1) * shift * shift <= MOST_OFFSET * (square / weight)


cdef inline double choose_shift(double weight, double moment, double lowest, double highest,
                                double highest_b, real of_type) noexcept nogil:
    """E_P[a - b], exact where a - b is constant; what keeps e^(b + c) in range where P is all 0."""
    cdef double shift = larger(smaller(moment / weight, highest), lowest)
    shift = <double> <real> (shift if weight > 0 else -highest_b)
    return shift if shift - shift == 0 else 0


cdef inline double farthest_from(double shift, double lowest, double highest,
                                 double beta) noexcept nogil:
    """The largest |y|."""
    return larger(shift - lowest, highest - shift) * beta


cdef void weigh_loop(int loop, bint both, const real *a, const real *b, npy_intp step_a,
                     npy_intp step_b, int n, int first, const real *constants, real *weights,
                     real *extremes, Ahead *ahead, Weighed *into) noexcept nogil:
    if loop <= Loop.PLAIN and both:
        weigh(Loop.PLAIN, True, a, b, step_a, step_b, n, first, constants, weights, extremes,
              ahead, into)
    elif loop <= Loop.PLAIN:
        weigh(Loop.PLAIN, False, a, b, step_a, step_b, n, first, constants, weights, extremes,
              ahead, into)
    elif loop == Loop.EXACT:
        weigh(Loop.EXACT, False, a, b, step_a, step_b, n, first, constants, weights, extremes,
              ahead, into)
    else:
        weigh(Loop.FAR, False, a, b, step_a, step_b, n, first, constants, weights, extremes,
              ahead, into)


cdef void diverge_loop(int loop, bint offset, const real *a, const real *b, npy_intp step_a,
                       npy_intp step_b, int n, int first, const real *weights,
                       const real *constants, real *infinite,
                       LaneSums *into) noexcept nogil:
    if loop == Loop.NEAR and offset:
        diverge(Loop.NEAR, True, a, b, step_a, step_b, n, first, weights, constants, infinite,
                into)
    elif loop == Loop.NEAR:
        diverge(Loop.NEAR, False, a, b, step_a, step_b, n, first, weights, constants,
                infinite, into)
    elif loop == Loop.PLAIN and offset:
        diverge(Loop.PLAIN, True, a, b, step_a, step_b, n, first, weights, constants,
                infinite, into)
    elif loop == Loop.PLAIN:
        diverge(Loop.PLAIN, False, a, b, step_a, step_b, n, first, weights, constants,
                infinite, into)
    elif loop == Loop.UNIT:
        diverge(Loop.UNIT, True, a, b, step_a, step_b, n, first, weights, constants, infinite,
                into)
    elif loop == Loop.EXACT:
        diverge(Loop.EXACT, True, a, b, step_a, step_b, n, first, weights, constants,
                infinite, into)
    else:
        diverge(Loop.FAR, True, a, b, step_a, step_b, n, first, weights, constants, infinite,
                into)


cdef inline void widest_range(const real *a, int n, double *lowest, double *highest) noexcept nogil:
    """Smallest and largest of n elements, WIDE or more: a few vectors a step."""
    cdef int lane, step, at
    cdef real x
    cdef real low[WIDE]
    cdef real high[WIDE]
    for lane in range(WIDE):
        low[lane], high[lane] = <real> INFINITY, -<real> INFINITY
    for step in range((n + WIDE - 1) // WIDE):
        at = min(step * WIDE, n - WIDE)
        for lane in range(WIDE):
            x = a[at + lane]
            low[lane], high[lane] = smaller(x, low[lane]), larger(x, high[lane])
    lowest[0], highest[0] = least(low), largest(high)
    for step in range(1, WIDE / LANES):
        lowest[0] = smaller(least(low + step * LANES), lowest[0])
        highest[0] = larger(largest(high + step * LANES), highest[0])


cdef void range_of(const real *a, int n, double *lowest, double *highest) noexcept nogil:
    """Smallest and largest of n elements, LANES or more once padded."""
    cdef real low[LANES]
    cdef real high[LANES]
    if n >= WIDE:
        widest_range(a, n, lowest, highest)
        return
    ranges(a + n % LANES - (LANES if n < LANES else 0), LANES, max(n // LANES, 1), low, high)
    lowest[0], highest[0] = least(low), largest(high)
    if n > LANES:
        ranges(a, LANES, 1, low, high)
        lowest[0], highest[0] = smaller(least(low), lowest[0]), larger(largest(high), highest[0])


cdef inline double far_divergence(double weight, double moment, double square,
                                  double other) noexcept nogil:
    """sum e^a phi(y) for c = E_P[a - b], which makes it e^c sum e^b - sum e^a; 0 where P and Q are
    too close to each other for that: KL < (1 + sqrt(E_P[(a - b)^2]))/2, which leaves errors of 8e-7
    in float32, the worst that a search found. Branch-free."""
    cdef double share = 1 / weight
    cdef double grown = other * exp(moment * share, 0.0)
    cdef double least_grown = weight * exp(0.5 + 0.5 * sqrt(square * share), 0.0)
    return grown - weight if grown > least_grown else 0


cdef inline double far_block(const Weighed *lanes, const real *extremes) noexcept nogil:
    """The same of one row; 0 also where e^b is out of range."""
    cdef double limit = offset_limit(extremes[0])
    if not (largest(extremes + HIGHEST) < limit and -least(extremes + LOWEST) < limit):
        return 0
    return far_divergence(across(lanes.weight), across(lanes.moment), across(lanes.square),
                          across(lanes.other))


cdef inline bint weigh_plainly(const real **x, int n, bint far, const real *constants,
                               real *weights, real *extremes, Ahead *ahead, Weighed *sums,
                               double *divergence) noexcept nogil:
    """The weights of a block by the plain loop; False where it will not do. And the divergence of P
    and Q far apart, or 0: a first part of a long block shows whether they may be, unless the block
    before was `far`."""
    cdef int steps = n // LANES, begin = 16 if steps > 16 and not far else 0
    cdef double limit = offset_limit(extremes[0])
    cdef bint both = True
    if begin:
        weigh_loop(Loop.PLAIN, True, x[0], x[1], LANES, LANES, begin, 0, constants, weights,
                   extremes, ahead, sums)
        if not largest(extremes + REACH) < limit:
            return False
        both = far_block(sums, extremes) > 0
    weigh_loop(Loop.PLAIN, both, x[0] + begin * LANES, x[1] + begin * LANES, LANES, LANES,
               steps - begin, (LANES - n % LANES) % LANES, constants, weights + begin * LANES,
               extremes, ahead, sums)
    if not largest(extremes + REACH) < limit:
        return False
    divergence[0] = far_block(sums, extremes) if both else 0
    return True


cdef inline int weigh_block(const real **x, int n, double beta, bint far, real *constants,
                            real *weights, real *extremes, Ahead *ahead, Weighed *sums,
                            double *peak, double *divergence) noexcept nogil:
    """The weights of a block, their sums, and its divergence, where they give it. Returns the
    loop."""
    cdef int loop
    cdef double lowest, highest
    divergence[0] = peak[0] = 0
    weigh_nothing(extremes, sums)
    if beta == 1 and weigh_plainly(x, n, far, constants, weights, extremes, ahead, sums,
                                  divergence):
        return Loop.PLAIN
    range_of(x[0], n, &lowest, &highest)
    loop = first_loop(lowest, highest, beta, peak, <real> 0)
    fill(&constants[PEAK], <real> peak[0])
    weigh_nothing(extremes, sums)
    weigh_loop(loop, False, x[0], x[1], LANES, LANES, n // LANES, (LANES - n % LANES) % LANES,
               constants, weights, extremes, ahead if beta != 1 else NULL, sums)
    return loop


cdef void categorical_block(const real **x, const npy_intp *outer, int n, double beta, bint *far,
                            Sums *into) noexcept nogil:
    """The sums of n elements, LANES or more once padded, relative to a shift and a peak of their
    own; the last lanes overlap what was added before and do not count. What follows lies `outer`
    bytes on. `far`: whether those of the block before were far apart; then whether these are."""
    cdef double room[LONG_BLOCK + 2 * LANES]
    cdef real *weights = <real *> room
    cdef real constants[CONSTANTS]
    cdef real extremes[EXTREMES]
    cdef real infinite[LANES]
    cdef LaneSums lanes
    cdef Weighed sums
    cdef int loop
    cdef double lowest, highest, lowest_b, highest_b = 0, weight, divergence
    cdef bint offset
    cdef Ahead ahead
    cdef int operand
    for operand in range(2):
        ahead.data[operand] = <const char *> x[operand] + distance_ahead(
            outer[operand], n * sizeof(real), 2)
        ahead.step[operand] = LANES * sizeof(real)
    fill(&constants[PEAK], <real> 0)
    fill(&constants[BETA], <real> beta)
    fill(&constants[BETA_REST], <real> (beta - <real> beta))
    loop = weigh_block(
        x, n, beta, far[0], constants, weights, extremes, &ahead, &sums, &into.peak, &divergence)
    far[0] = divergence > 0
    weight, lowest, highest = (
        across(sums.weight), least(extremes + LOWEST), largest(extremes + HIGHEST))
    into.lowest = lowest if loop == Loop.PLAIN else -INFINITY
    into.highest = highest if loop == Loop.PLAIN else <double> INFINITY
    if divergence > 0:
        into.shift = across(sums.moment) / weight
        into.weight, into.divergence, into.drift = weight, divergence, 0
        return
    if weight == 0:
        range_of(x[1], n, &lowest_b, &highest_b)
    into.shift = choose_shift(weight, across(sums.moment), lowest, highest, highest_b, <real> 0)
    fill(&constants[SHIFT], <real> into.shift)
    loop = second_loop(loop, farthest_from(into.shift, lowest, highest, beta), <real> 0)
    offset = is_offset(into.shift, weight, across(sums.square))
    fill(infinite, <real> 0)
    clear_lanes(&lanes)
    diverge_loop(loop, offset, x[0], x[1], LANES, LANES, n // LANES, (LANES - n % LANES) % LANES,
                 weights, constants, infinite, &lanes)
    into.divergence, into.drift = across(lanes.divergence), across(lanes.drift)
    into.weight = weight
    into.doubtful = loop == Loop.FAR and largest(infinite) > 0


cdef int choose_peaks(const real **x, const npy_intp *step, int n, int *loops, real *constants,
                      real *high_b, LaneParts *into) noexcept nogil:
    """The peaks of LANES rows and the loops for their weights. Returns the loop for all."""
    cdef real low[LANES]
    cdef real high[LANES]
    cdef int lane, widest = Loop.PLAIN
    ranges(x[0], step[0], n, low, high)
    for lane in range(LANES):
        loops[lane] = first_loop(
            low[lane], high[lane], into.beta[lane], &into.peak[lane], <real> 0)
        constants[PEAK + lane] = <real> into.peak[lane]
        widest = max(widest, loops[lane])
    if widest == Loop.FAR:
        ranges(x[1], step[1], n, low, high_b)
    return widest


ctypedef struct Far:          # of LANES rows
    double divergence[LANES]  # 0 where P and Q are not far from each other
    double shift[LANES]


cdef inline void ask_apart(const LaneParts *parts, double *asked) noexcept nogil:
    """1 for the rows of which e^b is wanted, too."""
    cdef int lane
    for lane in range(LANES):
        asked[lane] = parts.apart[lane] if parts.beta[lane] == 1 else 0


cdef void find_far(const Weighed *lanes, const real *extremes, const LaneParts *parts,
                   Far *into) noexcept nogil:
    """Divergences by far_divergence, of the rows for which these were asked."""
    cdef int lane
    cdef double limit = offset_limit(extremes[0]), divergence
    cdef double asked[LANES]
    ask_apart(parts, asked)
    for lane in range(LANES):
        into.shift[lane] = lanes.moment[lane] / lanes.weight[lane]
        divergence = far_divergence(
            lanes.weight[lane], lanes.moment[lane], lanes.square[lane], lanes.other[lane])
        divergence = divergence if <double> extremes[REACH + lane] < limit else 0
        divergence = divergence if <double> extremes[HIGHEST + lane] < limit else 0
        divergence = divergence if -<double> extremes[LOWEST + lane] < limit else 0
        into.divergence[lane] = divergence if asked[lane] > 0 else 0


cdef inline void go_along(const Far *far, double *farthest) noexcept nogil:
    """Rows far apart are done: what their terms are like does not decide on a loop."""
    cdef int lane
    cdef double most = 0
    for lane in range(LANES):
        most = larger(0.0 if far.divergence[lane] > 0 else farthest[lane], most)
    for lane in range(LANES):
        farthest[lane] = most if far.divergence[lane] > 0 else farthest[lane]


cdef inline void take_far(const Far *far, LaneParts *into) noexcept nogil:
    cdef int lane
    cdef bint done
    for lane in range(LANES):
        done = far.divergence[lane] > 0
        into.shift[lane] = far.shift[lane] if done else into.shift[lane]
        into.sums.divergence[lane] = (
            far.divergence[lane] if done else into.sums.divergence[lane])
        into.sums.drift[lane] = 0 if done else into.sums.drift[lane]


cdef inline void note_apart(const real *extremes, LaneParts *into) noexcept nogil:
    """For the next strip: where a - b spans less, P and Q are hardly far from each other."""
    cdef int lane
    cdef double widest_close = 12
    for lane in range(LANES):
        into.apart[lane] = (
            1 if extremes[HIGHEST + lane] - extremes[LOWEST + lane] > widest_close else 0)


cdef enum Wanted:            # by the plain loop
    NOTHING                  # T is 1 in none of LANES rows
    WEIGHTS
    BOTH                     # e^b, too


cdef int wanted_of(const LaneParts *parts) noexcept nogil:
    cdef double offset[LANES]
    cdef double asked[LANES]
    cdef int lane
    for lane in range(LANES):
        offset[lane] = magnitude(parts.beta[lane] - 1)
    ask_apart(parts, asked)
    if least(offset) > 0:
        return Wanted.NOTHING
    return Wanted.BOTH if largest(asked) > 0 else Wanted.WEIGHTS


cdef inline void weigh_wanted(int wanted, const real **x, const npy_intp *step, int n,
                              real *weights, real *extremes, Ahead *ahead,
                              Weighed *sums) noexcept nogil:
    """Add the weights of n elements of each of LANES rows by the plain loop."""
    if wanted != Wanted.NOTHING:
        weigh_loop(Loop.PLAIN, wanted == Wanted.BOTH, x[0], x[1], step[0], step[1], n, 0,
                   <const real *> NULL, weights, extremes, ahead, sums)


cdef int choose_shifts(const real **x, const npy_intp *step, int n, int *loops, real *constants,
                       real *weights, real *extremes, Weighed *sums,
                       LaneParts *into) noexcept nogil:
    """The shifts that the weights of LANES rows lead to, found again where the plain loop will not
    do. Returns the loop of the weights."""
    cdef real high_b[LANES]
    cdef real *low = extremes + LOWEST
    cdef real *high = extremes + HIGHEST
    cdef int lane, loop = Loop.PLAIN
    fill(high_b, <real> 0)
    for lane in range(LANES):
        loops[lane], into.peak[lane], constants[PEAK + lane] = Loop.PLAIN, 0, 0
        constants[BETA + lane] = <real> into.beta[lane]
        constants[BETA_REST + lane] = <real> (into.beta[lane] - <real> into.beta[lane])
    if not (least(into.beta) == 1 and largest(into.beta) == 1
            and largest(extremes + REACH) < offset_limit(extremes[0])):
        loop = choose_peaks(x, step, n, loops, constants, high_b, into)
        weigh_nothing(extremes, sums)
        weigh_loop(loop, False, x[0], x[1], step[0], step[1], n, 0, constants, weights, extremes,
                   NULL, sums)
    copy(sums.weight, into.sums.weight)
    for lane in range(LANES):
        into.shift[lane] = choose_shift(
            sums.weight[lane], sums.moment[lane], low[lane], high[lane], high_b[lane], <real> 0)
        constants[SHIFT + lane] = <real> into.shift[lane]
        into.farthest[lane] = farthest_from(
            into.shift[lane], low[lane], high[lane], into.beta[lane])
    return loop


cdef inline int column_loop(int first, double farthest, real of_type) noexcept nogil:
    """As `second_loop`; the plain loop saves less than a loop more for some of the rows costs."""
    cdef int loop = second_loop(first, farthest, of_type)
    return Loop.UNIT if loop == Loop.PLAIN else loop


cdef inline int common_loop(int first, const double *farthest, real of_type) noexcept nogil:
    """The loop of all rows whose weights are plain; FAR where they differ."""
    cdef int nearest = column_loop(first, least(farthest), of_type)
    return nearest if column_loop(first, largest(farthest), of_type) == nearest else <int> Loop.FAR


cdef void diverge_columns(const real **x, const npy_intp *step, int n, int *loops,
                          const real *weights, const real *constants, real *infinite,
                          LaneParts *into) noexcept nogil:
    """The second phase of LANES rows, each by its own loop."""
    cdef LaneSums sums
    cdef int lane, loop, used = 0
    for lane in range(LANES):
        loops[lane] = column_loop(loops[lane], into.farthest[lane], <real> 0)
        used |= 1 << loops[lane]
    for loop in range(Loop.FAR + 1):
        if not used >> loop & 1:
            continue
        clear_lanes(&sums)
        diverge_loop(
            loop, True, x[0], x[1], step[0], step[1], n, 0, weights, constants, infinite,
            &sums)
        for lane in range(LANES):
            if loops[lane] == loop:
                into.sums.divergence[lane] = sums.divergence[lane]
                into.sums.drift[lane] = sums.drift[lane]
                if loop == Loop.FAR and infinite[lane] > 0:
                    into.doubtful[lane] = 1


cdef void finish_columns(const real **x, const npy_intp *step, int n, real *weights,
                         real *extremes, Weighed *sums, const Far *far,
                         LaneParts *into) noexcept nogil:
    """The sums of n <= STRIP elements of each of LANES rows, from their weights by the plain loop,
    which are overwritten where that will not do. `far`: NULL where it was not looked for."""
    cdef real constants[CONSTANTS]
    cdef real infinite[LANES]
    cdef int loops[LANES]
    cdef int loop = choose_shifts(x, step, n, loops, constants, weights, extremes, sums, into)
    cdef int common = Loop.FAR
    if far != NULL and least(far.divergence) > 0:
        take_far(far, into)
        return
    if far != NULL:
        go_along(far, into.farthest)
    fill(infinite, <real> 0)
    if loop == Loop.PLAIN:
        common = common_loop(Loop.PLAIN, into.farthest, <real> 0)
    if common == Loop.FAR:
        diverge_columns(x, step, n, loops, weights, constants, infinite, into)
    else:
        diverge_loop(common, True, x[0], x[1], step[0], step[1], n, 0, weights, constants,
                     infinite, &into.sums)
    if far != NULL:
        take_far(far, into)


cdef void categorical_columns(const real **x, const npy_intp *step, int n, Ahead *ahead,
                              LaneParts *into) noexcept nogil:
    """The sums of n <= STRIP elements of each of LANES rows, relative to a shift and a peak of each
    row's own; elements lie `step` apart. A row's bits do not depend on its neighbours."""
    cdef real weights[STRIP * LANES]
    cdef real extremes[EXTREMES]
    cdef Weighed sums
    weigh_nothing(extremes, &sums)
    weigh_wanted(wanted_of(into), x, step, n, weights, extremes, ahead, &sums)
    finish_columns(x, step, n, weights, extremes, &sums, NULL, into)


# Long columns: copied, as lines a power of two apart would evict each other before they are read
# again; wide lines, as from memory narrow ones take longer.

cdef enum:
    PAIR_BYTES = 128         # processors fetch lines of 64 in pairs
    WIDE_BYTES = COPY_BYTES / 2 / STRIP    # of a line that is copied
    WIDE_GROUPS = WIDE_BYTES / 4 / LANES   # of LANES floats
    RUNS_TOGETHER = 2        # of floats, whole ones: the same sums as of all at once


cdef inline Ahead *lines_ahead(const real **x, const npy_intp *step, int group, bint last,
                               npy_intp row, Ahead *ahead) noexcept nogil:
    """What to ask for beside a group: both operands' lines, if it is as wide as a pair of lines, or
    the last and the first of its pair; else P's pair beside the pair's first group, Q's beside its
    second, as half a pair at a time takes nearly twice as long."""
    cdef int groups = PAIR_BYTES // LANES // <int> sizeof(real), part = group % groups
    cdef bint alone = groups == 1 or (last and part == 0)
    cdef int i, operand
    if part > 1:
        return NULL
    for i in range(2):
        operand = i if alone else part
        ahead.step[i] = step[operand] * sizeof(real)
        ahead.data[i] = <const char *> (x[operand] + row * step[operand] + (group - part) * LANES)
        if not alone:
            ahead.data[i] += i * (PAIR_BYTES / 2)
    return ahead


cdef void categorical_lines(const real **x, const npy_intp *step, int n, int groups, real *copies,
                            LaneParts *into) noexcept nogil:
    """As categorical_columns, of groups that lie side by side. What follows is asked for beside the
    weights, or while it is copied, where there are none yet."""
    cdef double room[COPY_BYTES / 2 / 8]
    cdef real *weights = <real *> room
    cdef real extremes[WIDE_GROUPS * EXTREMES]
    cdef Weighed sums[WIDE_GROUPS]
    cdef int wanted[WIDE_GROUPS]
    cdef const real *at[2]
    cdef npy_intp steps[2]
    cdef Ahead ahead
    cdef Far far
    cdef int rows_ahead = full_run(RUNS_TOGETHER, <real> 0)
    cdef int group, operand, count, start = 0, width = groups * LANES
    steps[0] = steps[1] = width
    for group in range(groups):
        weigh_nothing(extremes + group * EXTREMES, &sums[group])
        wanted[group] = wanted_of(&into[group])
    while start < n:
        count = run_length(n - start, RUNS_TOGETHER, <real> 0)
        for operand in range(2):
            copy_lines(<const char *> (x[operand] + start * step[operand]),
                       step[operand] * sizeof(real), count,
                       0 if wanted[0] else rows_ahead * step[operand] * <npy_intp> sizeof(real),
                       width * sizeof(real), WIDE_BYTES,
                       <char *> (copies + (operand * n + start) * width))
        for group in range(groups):
            for operand in range(2):
                at[operand] = copies + (operand * n + start) * width + group * LANES
            weigh_wanted(
                wanted[group], at, steps, count, weights + (group * STRIP + start) * LANES,
                extremes + group * EXTREMES,
                lines_ahead(x, step, group, group == groups - 1, start + rows_ahead, &ahead),
                &sums[group])
        start += count
    for group in range(groups):
        for operand in range(2):
            at[operand] = copies + operand * n * width + group * LANES
        # before finish_columns, which finds sums and extremes again where neighbours are far
        if wanted[group] == Wanted.BOTH:
            find_far(&sums[group], extremes + group * EXTREMES, &into[group], &far)
        note_apart(extremes + group * EXTREMES, &into[group])
        finish_columns(at, steps, n, weights + group * STRIP * LANES, extremes + group * EXTREMES,
                       &sums[group], &far if wanted[group] == Wanted.BOTH else NULL, &into[group])


cdef inline double peak_of(const Row *row, Watch *watch, int operand) noexcept nogil:
    cdef double peak = -INFINITY
    cdef npy_intp i
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        peak = larger(element(row, operand, i), peak)
    return peak


cdef inline double log_sum_exp(const Row *row, Watch *watch, int operand,
                               double peak) noexcept nogil:
    """log of the sum of exp((x - peak)/T)."""
    cdef double x, result = 0, rest = 0
    cdef npy_intp i
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        x = (element(row, operand, i) - peak) * row.inverse_temperature
        result = two_sum(result, libm_exp(x), &rest)
    return log(result + rest)


cdef int categorical_traits(const double **x, int n) noexcept nogil:
    """Of n elements, LANES or more once padded."""
    cdef double a, b
    cdef double peak_a[LANES]
    cdef double peak_b[LANES]
    cdef double missing[LANES]
    cdef double infinite[LANES]
    cdef int lane, step, at
    for lane in range(LANES):
        missing[lane] = infinite[lane] = 0
        peak_a[lane] = peak_b[lane] = -INFINITY
    for step in range((n + LANES - 1) // LANES):
        at = min(step * LANES, n - LANES)
        for lane in range(LANES):
            a, b = x[0][at + lane], x[1][at + lane]
            missing[lane] = missing[lane] if a == a else 1
            missing[lane] = missing[lane] if b == b else 1
            peak_a[lane], peak_b[lane] = larger(a, peak_a[lane]), larger(b, peak_b[lane])
            b = b if a > -INFINITY else 0
            infinite[lane] = infinite[lane] if b > -INFINITY else 1
    a, b = largest(peak_a), largest(peak_b)
    return (
        (Trait.HAS_NAN if largest(missing) > 0 else 0)
        | (Trait.HAS_BAD if larger(a, b) == INFINITY else 0)
        | (Trait.HAS_INFINITE if largest(infinite) > 0 else 0)
        | (Trait.HAS_P if a > -INFINITY else 0) | (Trait.HAS_Q if b > -INFINITY else 0))


cdef inline double categorical_hard_value(const Row *row, Watch *watch) noexcept nogil:
    """Where no shift of a block came near: the formula at the head with the exact shift, one
    element at a time."""
    cdef double beta = row.inverse_temperature, a, b, p, q, y, drift
    cdef double peak_a = peak_of(row, watch, 0), peak_b = peak_of(row, watch, 1)
    cdef double lse_a = log_sum_exp(row, watch, 0, peak_a)
    cdef double lse_b = log_sum_exp(row, watch, 1, peak_b)
    cdef double shift = (peak_a - peak_b) + (lse_a - lse_b) / beta
    cdef npy_intp i
    cdef Sums sums
    clear(&sums)
    for i in range(row.length):
        if is_unwanted(watch, i):
            return NAN
        a, b = element(row, 0, i), element(row, 1, i)
        p = libm_exp((a - peak_a) * beta)
        y = ((shift - (a - b)) * beta) if a > -INFINITY else 0
        if p > 0 and y < 300:
            add(&sums, p, p * (phi(y, <double> 0) if y > -700 else -1 - y), p * y, 0)
        else:
            q = libm_exp((b - peak_b) * beta - lse_b + lse_a)
            drift = p * y if p > 0 else 0
            add(&sums, p, q - p - drift, drift, 0)
    round_off(&sums)
    return divergence_of(sums.weight, sums.divergence, sums.drift)


# Gradients. With r_i = log(P_i/Q_i) = -y_i for the exact shift, log(sum e^a / sum e^b),
#     d/da_i = P_i (r_i - KL)/T,   d/db_i = (Q_i - P_i)/T = P_i expm1(y_i)/T.
# e^a and y are taken by the loops above, y always in two parts: an element's error is its own.
# Where KL > 1/2, errors of Q_i - P_i are measured by Q_i: it is taken as it stands.

cdef enum:
    FACTOR = 4 * LANES       # cotangent/(T W)
    SHIFT_REST = 5 * LANES
    VALUE = 6 * LANES        # KL
    FACTOR_Q = 7 * LANES     # cotangent/sum e^b, for P and Q far from each other
    SLOPE_CONSTANTS = 8 * LANES


cdef inline double far_value() noexcept nogil:
    return 0.5


cdef inline real exact_gap(real a, real b, real shift, real shift_rest, real *rest) noexcept nogil:
    """As gap, for a shift in two parts."""
    cdef real w_rest, d_rest
    cdef real w = difference(a, b, &w_rest)
    cdef real d = difference(shift, w, &d_rest)
    cdef real correction = d_rest + (shift_rest - w_rest)
    cdef real y = d + correction
    rest[0] = correction - (y - d)
    return y


cdef inline void categorical_slope_run(int loop, int wanted, const real *a, const real *b,
                                       npy_intp step_a, npy_intp step_b, int n,
                                       const real *constants, real *to_a,
                                       real *to_b) noexcept nogil:
    """The gradients of n elements of each lane, LANES apart."""
    cdef int lane, i
    cdef real x, z, shift, y_rest, masked = -<real> INFINITY, safe = <real> safe_exponent(masked)
    cdef real p[LANES]
    cdef real q[LANES]
    cdef real y[LANES]
    cdef real rest[LANES]
    cdef real slope[LANES]
    for i in range(n):
        for lane in range(LANES):
            x, z = a[i * step_a + lane], b[i * step_b + lane]
            p[lane] = constants[FACTOR + lane] * weight_of(loop, x, constants, lane)
            if loop == Loop.FAR:
                p[lane] = p[lane] if x != masked else <real> 0
                x = x if x != masked else constants[PEAK + lane]
                z = z if z != masked else x - constants[SHIFT + lane]
            y[lane] = exact_gap(
                x, z, constants[SHIFT + lane], constants[SHIFT_REST + lane], &y_rest)
            if loop >= Loop.EXACT:
                y[lane] = product(
                    y[lane], y_rest, constants[BETA + lane], constants[BETA_REST + lane], &y_rest)
            rest[lane] = y_rest
            if loop == Loop.FAR:
                y[lane] = y[lane] if b[i * step_b + lane] != masked else masked
        if wanted & 1:
            for lane in range(LANES):
                x = constants[VALUE + lane]
                if loop == Loop.FAR:  # where q is 0 the value is infinite, and of lower order
                    x = x if y[lane] != masked else <real> 0
                slope[lane] = -p[lane] * (y[lane] + x)
                if loop == Loop.FAR:
                    slope[lane] = slope[lane] if p[lane] != 0 else <real> 0
            copy(slope, to_a + i * LANES)
        if wanted & 2:
            if loop == Loop.FAR:
                for lane in range(LANES):
                    z = b[i * step_b + lane]
                    x = exact_gap(constants[PEAK + lane], z, constants[SHIFT + lane],
                                  constants[SHIFT_REST + lane], &y_rest)
                    x = product(
                        x, y_rest, constants[BETA + lane], constants[BETA_REST + lane], &y_rest)
                    q[lane] = clamped_exp(x, y_rest) if z != masked else <real> 0
                for lane in range(LANES):
                    x = y[lane]
                    q[lane] = q[lane] * constants[FACTOR + lane] - p[lane]
                    z = smaller(larger(x, -safe), safe)
                    z = p[lane] * expm1(z, rest[lane] if z == x else <real> 0)
                    z = z if p[lane] != 0 else q[lane]
                    slope[lane] = z if (x > -safe) & (x < safe) else q[lane]
            else:
                for lane in range(LANES):
                    slope[lane] = p[lane] * expm1(y[lane], rest[lane])
            copy(slope, to_b + i * LANES)


cdef inline void apart_slope_run(const real *a, const real *b, int n, const real *constants,
                                 real *to_b) noexcept nogil:
    """The gradients with respect to b of n elements of each lane."""
    cdef int lane, i
    cdef real slope[LANES]
    for i in range(n):
        for lane in range(LANES):
            slope[lane] = constants[FACTOR_Q + lane] * exp(b[i * LANES + lane], <real> 0) - (
                constants[FACTOR + lane] * exp(a[i * LANES + lane], <real> 0))
        copy(slope, to_b + i * LANES)


cdef inline int slope_loop(double low_a, double high_a, double low_w, double high_w,
                           const Slope *slope, real of_type) noexcept nogil:
    cdef double safe = safe_exponent(of_type), limit = offset_limit(of_type)
    cdef double beta = slope.beta
    cdef double farthest = larger(slope.shift - low_w, high_w - slope.shift) * beta
    cdef bint within = farthest < safe and (slope.peak - low_a) * beta < safe and (
        (high_a - slope.peak) * beta < safe)
    if not within:
        return Loop.FAR
    if beta == 1 and slope.peak == 0 and -limit < low_a and high_a < limit:
        return Loop.PLAIN
    return Loop.EXACT


cdef inline void gap_ranges(const real *a, const real *b, npy_intp step_a, npy_intp step_b, int n,
                            real *found) noexcept nogil:
    """Smallest and largest of a and of a - b, of n terms of each lane. NaN are passed over."""
    cdef int lane, i
    cdef real x, w
    cdef real low_a[LANES]
    cdef real high_a[LANES]
    cdef real low_w[LANES]
    cdef real high_w[LANES]
    copy(found, low_a)
    copy(found + LANES, high_a)
    copy(found + 2 * LANES, low_w)
    copy(found + 3 * LANES, high_w)
    for i in range(n):
        for lane in range(LANES):
            x = a[i * step_a + lane]
            w = x - b[i * step_b + lane]
            low_a[lane], high_a[lane] = smaller(x, low_a[lane]), larger(x, high_a[lane])
            low_w[lane], high_w[lane] = smaller(w, low_w[lane]), larger(w, high_w[lane])
    copy(low_a, found)
    copy(high_a, found + LANES)
    copy(low_w, found + 2 * LANES)
    copy(high_w, found + 3 * LANES)


cdef inline void slope_constants(const Slope *slopes, int each, real *constants) noexcept nogil:
    """Of LANES rows, or (each = 0) of one."""
    cdef int lane
    cdef const Slope *slope
    for lane in range(LANES):
        slope = slopes + lane * each
        constants[PEAK + lane] = <real> slope.peak
        constants[SHIFT + lane] = <real> slope.shift
        constants[SHIFT_REST + lane] = <real> (
            (slope.shift - <real> slope.shift) + slope.shift_rest)
        constants[BETA + lane] = <real> slope.beta
        constants[BETA_REST + lane] = <real> ((slope.beta - <real> slope.beta) + slope.beta_rest)
        constants[FACTOR + lane] = <real> (slope.cotangent * slope.beta / slope.weight)
        constants[VALUE + lane] = <real> slope.value


cdef void categorical_slope_loop(int loop, int wanted, const real *a, const real *b,
                                 npy_intp step_a, npy_intp step_b, int n, const real *constants,
                                 real *to_a, real *to_b) noexcept nogil:
    if loop == Loop.APART:
        apart_slope_run(a, b, n, constants, to_b)
        loop, wanted = Loop.PLAIN, wanted & 1
    if not wanted:
        return
    if loop == Loop.PLAIN and wanted == 2:
        categorical_slope_run(Loop.PLAIN, 2, a, b, step_a, step_b, n, constants, to_a, to_b)
    elif loop == Loop.PLAIN:
        categorical_slope_run(
            Loop.PLAIN, wanted, a, b, step_a, step_b, n, constants, to_a, to_b)
    elif loop == Loop.EXACT and wanted == 2:
        categorical_slope_run(Loop.EXACT, 2, a, b, step_a, step_b, n, constants, to_a, to_b)
    elif loop == Loop.EXACT:
        categorical_slope_run(
            Loop.EXACT, wanted, a, b, step_a, step_b, n, constants, to_a, to_b)
    else:
        categorical_slope_run(Loop.FAR, wanted, a, b, step_a, step_b, n, constants, to_a, to_b)


cdef inline int slope_loop_of_block(const real **x, int n, const Slope *slope) noexcept nogil:
    """For n elements, LANES or more once padded."""
    cdef real found[4 * LANES]
    cdef npy_intp last = n - LANES
    fill(found, <real> INFINITY)
    fill(found + LANES, -<real> INFINITY)
    fill(found + 2 * LANES, <real> INFINITY)
    fill(found + 3 * LANES, -<real> INFINITY)
    gap_ranges(x[0], x[1], LANES, LANES, n // LANES, found)
    gap_ranges(x[0] + last, x[1] + last, LANES, LANES, 1, found)
    return slope_loop(least(found), largest(found + LANES), least(found + 2 * LANES),
                      largest(found + 3 * LANES), slope, <real> 0)


cdef void categorical_slopes(const real **x, int n, const Slope *slope, int wanted,
                             real **to) noexcept nogil:
    """The gradients of n elements, LANES or more once padded; the last lanes overlap."""
    cdef real constants[SLOPE_CONSTANTS]
    cdef int loop = slope.loop, steps = n // LANES
    cdef npy_intp last = n - LANES
    slope_constants(slope, 0, constants)
    if loop == Loop.ANY:
        loop = slope_loop_of_block(x, n, slope)
    elif loop == Loop.APART and wanted & 2:
        fill(&constants[FACTOR_Q], <real> (slope.cotangent / slope.weight_q))
    else:
        loop = Loop.PLAIN
    categorical_slope_loop(
        loop, wanted, x[0], x[1], LANES, LANES, steps, constants, to[0], to[1])
    if n % LANES:
        categorical_slope_loop(loop, wanted, x[0] + last, x[1] + last, LANES, LANES, 1, constants,
                               to[0] + last, to[1] + last)


cdef inline int slope_loop_of_row(const Sums *sums, Slope *slope, real of_type) noexcept nogil:
    """What serves all blocks of a row, all of whose weights are plain. For P and Q apart, factors
    must be far from the ends of float's range."""
    cdef double limit = offset_limit(of_type)
    if slope.beta != 1 or slope.peak != 0 or not (
            farthest_from(slope.shift, sums.lowest, sums.highest, 1) < safe_exponent(of_type)):
        return Loop.ANY
    if not (slope.value > far_value() and -limit < sums.lowest and sums.highest < limit):
        return Loop.PLAIN
    slope.weight_q = slope.weight * libm_exp(-(slope.shift + slope.shift_rest))
    return Loop.APART if 0.5 < slope.weight_q < 1e20 else Loop.PLAIN


cdef inline void categorical_slope(const Row *row, const Sums *sums, Slope *slope,
                                   real of_type) noexcept nogil:
    """From the sums of a row. A weight below 1 would leave small P_i to underflow."""
    cdef double move, beta = slope.beta
    slope.peak, slope.weight, slope.shift_rest = sums.peak, sums.weight, 0
    slope.shift = two_sum(
        sums.shift, -(sums.drift / sums.weight + slope.value) / beta, &slope.shift_rest)
    if not 0.5 < sums.weight < 1e30:
        move = log(sums.weight)
        slope.peak = <double> <float> (sums.peak + move / beta)
        slope.weight = libm_exp((sums.peak - slope.peak) * beta + move)
    slope.loop = slope_loop_of_row(sums, slope, of_type)


cdef inline void categorical_hard_slope(const Row *row, Watch *watch, Slope *slope) noexcept nogil:
    """Of a row that the fast formulas do not vouch for, or whose value is infinite."""
    cdef double peak_a = peak_of(row, watch, 0), peak_b = peak_of(row, watch, 1)
    cdef double lse_a = log_sum_exp(row, watch, 0, peak_a)
    cdef double lse_b = log_sum_exp(row, watch, 1, peak_b)
    slope.peak, slope.weight, slope.shift_rest = peak_a, libm_exp(lse_a), 0
    slope.loop = Loop.ANY
    slope.shift = two_sum(peak_a, -peak_b, &slope.shift_rest)
    slope.shift = two_sum(slope.shift, (lse_a - lse_b) / slope.beta, &slope.shift_rest)
