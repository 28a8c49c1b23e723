"""What every family of sums over a row has in common.

Each divergence is a sum of non-negative terms and at most one second-order correction:
    KL = divergence/weight - (u - log1p(u)),   u = excess/weight,
computed relative to a guess of log(sum of p / sum of q'). A guess that is off costs no exactness,
only conditioning, which u shows: then the row is summed again with what the first pass found.
"""

from libc.math cimport exp, fabs
from numpy cimport npy_intp
from vecmath cimport INFINITY, from_bfloat16, from_float16, minus_log1p, real

cdef enum:
    LANES = 16         # rows or elements that are computed side by side
    BLOCK = 512        # elements that are looked at together
    RUN = 8            # terms a lane sums in its own type before double takes over
    MAX_OPERANDS = 4

ctypedef struct Guess:
    double ratio                # discrete: sum of p / sum of q
    double shift                # categorical: max logits_p - max logits_q, before the temperature
    double peak                 # categorical: a logit that exponentials are taken relative to
    double inverse_temperature
    bint wide                   # categorical: a block had logits far apart; so will others

ctypedef struct Sums:
    double weight               # sum of p
    double divergence           # sum of p log(p/q') - p + q'
    double excess               # sum of q' - p
    double direct               # sum of p log(p/q), where it is wanted as it stands
    double rest[4]              # what the rounding of each of these left out
    double peak                 # weight, divergence and excess are multiples of exp(peak)
    bint doubtful               # a value outside the fast formula's range


cdef inline void clear(Sums *sums) noexcept nogil:
    cdef int i
    sums.weight = sums.divergence = sums.excess = sums.direct = 0
    for i in range(4):
        sums.rest[i] = 0
    sums.peak = 0
    sums.doubtful = False


cdef inline double two_sum(double x, double y, double *rest) noexcept nogil:
    """x + y; what its rounding left is added to `rest` (Knuth)."""
    cdef double total = x + y
    cdef double added = total - x
    rest[0] += (x - (total - added)) + (y - added)
    return total


cdef inline void add(Sums *into, double weight, double divergence, double excess,
                     double direct) noexcept nogil:
    into.weight = two_sum(into.weight, weight, &into.rest[0])
    into.divergence = two_sum(into.divergence, divergence, &into.rest[1])
    into.excess = two_sum(into.excess, excess, &into.rest[2])
    into.direct = two_sum(into.direct, direct, &into.rest[3])


cdef inline void round_off(Sums *sums) noexcept nogil:
    """Every sum to its nearest double, the rests included."""
    sums.weight += sums.rest[0]
    sums.divergence += sums.rest[1]
    sums.excess += sums.rest[2]
    sums.direct += sums.rest[3]


cdef inline void fold(real *sums, double *totals, int n) noexcept nogil:
    """Empty lanes of sums into double: a long run of equal terms would round the same way."""
    cdef int i
    for i in range(n):
        totals[i] += sums[i]
        sums[i] = 0


cdef inline double across_lanes(const double *totals) noexcept nogil:
    cdef double result = 0
    cdef int lane
    for lane in range(LANES):
        result += totals[lane]
    return result


cdef inline double divergence_of(const Sums *sums) noexcept nogil:
    cdef double value = (sums.divergence / sums.weight
                         - minus_log1p(sums.excess / sums.weight))
    return value if not value < 0 else 0.0  # NaN stays


cdef inline bint well_conditioned(const Sums *sums) noexcept nogil:
    """Whether rounding errors of the sums are at most doubled by the correction, which takes no
    more than half of the sum, and by an error of u = E[phi] + E[y], which counts u / (1 + u)
    times. False for NaN."""
    cdef double g = sums.divergence / sums.weight, u = sums.excess / sums.weight
    cdef double correction = minus_log1p(u)
    return (2 * correction <= g
            and (g + fabs(u - g)) * fabs(u) <= (g - correction) * (1 + u))


cdef inline void lower_by(Sums *sums, double exponent) noexcept nogil:
    """Make the sums relative to a peak that is higher by this exponent."""
    cdef int i
    cdef double factor = exp(-exponent) if exponent < INFINITY else 0.0
    sums.weight *= factor
    sums.divergence *= factor
    sums.excess *= factor
    for i in range(4):
        sums.rest[i] *= factor


cdef inline void merge(Sums *into, Sums *part, double inverse_temperature) noexcept nogil:
    cdef int i
    cdef double rise = (part.peak - into.peak) * inverse_temperature
    if rise > 0:
        lower_by(into, rise)
        into.peak = part.peak
    elif rise < 0:
        lower_by(part, -rise)
    for i in range(4):
        into.rest[i] += part.rest[i]
    add(into, part.weight, part.divergence, part.excess, part.direct)
    into.doubtful |= part.doubtful


cdef enum Family:
    DISCRETE
    CATEGORICAL
    NORMAL

cdef enum Format:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16

cdef enum:
    SHORT_ROW = 2 * LANES      # below: side by side

ctypedef struct Row:
    int family
    int format                 # how the operands lie in memory
    int n_operands
    bint normalize             # discrete: False for sum p log(p/q) as it stands
    int spread_p               # normal: what stands for the variance
    int spread_q
    double inverse_temperature
    npy_intp length
    const char *data[MAX_OPERANDS]
    npy_intp step[MAX_OPERANDS]


cdef inline double element(const Row *row, int operand, npy_intp i) noexcept nogil:
    cdef const char *data = row.data[operand] + i * row.step[operand]
    if row.format == FLOAT32:
        return (<const float *> data)[0]
    if row.format == FLOAT64:
        return (<const double *> data)[0]
    if row.format == FLOAT16:
        return from_float16((<const unsigned short *> data)[0])
    return from_bfloat16((<const unsigned short *> data)[0])
