"""What every family of sums over a row has in common.

Each divergence is a sum of non-negative terms and at most one second-order correction:
    KL = divergence/weight - (u - log1p(u)),   u = excess/weight,
computed relative to a guess of log(sum of p / sum of q'). A guess that is off costs no exactness,
only conditioning, which u shows: then the row is summed again with what the first pass found.
"""

from libc.math cimport exp, fabs
from numpy cimport npy_intp
from vecmath cimport INFINITY, from_bfloat16, from_float16, minus_log1p

cdef enum:
    LANES = 16         # rows or elements that are computed side by side
    BLOCK = 512        # elements that are summed in their own type before double takes over
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
    double excess_rest          # what its rounding left; wanted where it counts in first order
    double direct               # sum of p log(p/q), where it is wanted as it stands
    double peak                 # weight, divergence and excess are multiples of exp(peak)
    bint doubtful               # a value outside the fast formula's range


cdef inline void clear(Sums *sums) noexcept nogil:
    sums.weight = sums.divergence = sums.excess = sums.excess_rest = sums.direct = 0
    sums.peak = 0
    sums.doubtful = False


cdef inline void add_excess(Sums *into, double x) noexcept nogil:
    cdef double total = into.excess + x
    cdef double added = total - into.excess
    into.excess_rest += (into.excess - (total - added)) + (x - added)
    into.excess = total


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
    cdef double factor = exp(-exponent) if exponent < INFINITY else 0.0
    sums.weight *= factor
    sums.divergence *= factor
    sums.excess *= factor


cdef inline void merge(Sums *into, Sums *part, double inverse_temperature) noexcept nogil:
    cdef double rise = (part.peak - into.peak) * inverse_temperature
    if rise > 0:
        lower_by(into, rise)
        into.peak = part.peak
    elif rise < 0:
        lower_by(part, -rise)
    into.weight += part.weight
    into.divergence += part.divergence
    add_excess(into, part.excess)
    into.excess_rest += part.excess_rest
    into.direct += part.direct
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
