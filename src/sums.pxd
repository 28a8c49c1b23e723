"""What every family of sums over a row has in common.

With q' = q e^shift for any shift near log(sum of p / sum of q), and y = log(q'/p), each divergence
is made of three sums:
    weight W = sum p,   divergence D = sum p phi(y) = sum p log(p/q') - p + q',   drift Y = sum p y,
    KL = log1p(u) - Y/W = D/W - (u - log1p(u)),   u = (D + Y)/W = (sum q' - sum p)/W.
Every term of D is non-negative and the correction is of second order, so nothing cancels when P is
close to Q. A shift that is off costs no exactness, only conditioning.
"""

from libc.math cimport fabs
from numpy cimport npy_intp
from vecmath cimport (
    INFINITY, LN2, atanh_tail, from_bfloat16, from_float16, larger, match_exponent, ratio_exponent,
    real, residual_product, smaller, wide,
)

cdef extern from "lanes.h":
    ctypedef struct Aligned:
        pass
    enum:
        LANES          # rows or elements that are computed side by side
        STEP_BYTES     # of an operand that two loops take one after the other

cdef extern from "across.h" nogil:
    double across(const double *lanes)
    void row_sums_f32(const float *lanes, double *sums)
    void row_sums_f64(const double *lanes, double *sums)

cdef extern from "transpose.h" nogil:
    void transpose_f32(const float *x, npy_intp outer, npy_intp n, npy_intp rows, float *into,
                       npy_intp width)
    void transpose_f64(const double *x, npy_intp outer, npy_intp n, npy_intp rows, double *into,
                       npy_intp width)

cdef enum:
    BLOCK = 1024       # elements of one row that are loaded together
    LONG_BLOCK = 4 * BLOCK   # doubles that are summed where they lie; of floats twice as many
    HALF = LANES / 2
    QUARTER = LANES / 4
    EIGHTH = LANES / 8
    STRIP = 112 + 2 * LANES  # elements of each of LANES rows that are summed together
    RUN = 8            # terms a lane sums in float before double takes over
    LONG_RUN = 32      # terms a lane sums in double before other sums take over
    MOST_STEPS = STEP_BYTES / 4 / LANES
    MAX_OPERANDS = 4
    MOST_COLUMNS = 1024      # in a band: a page of floats
    COPY_BYTES = 1024 * STRIP  # of columns that are copied, of all operands together
    MAX_GROUPS = MOST_COLUMNS / LANES
    AHEAD_BYTES = 20 * 1024  # of a row, of all operands together, that are on their way at a time

cdef enum Family:
    DISCRETE
    CATEGORICAL
    NORMAL

ctypedef struct LaneSums:       # of LANES rows, or of every LANESth element of one
    Aligned begin
    double weight[LANES]
    double divergence[LANES]
    double drift[LANES]
    double direct[LANES]        # sum of p log(p/q), where it is wanted as it stands
    double rest[LANES]          # what the rounding of the drift left out, where it counts

ctypedef struct RowLanes:       # of LANES rows, whose lanes are still to be added up: room for
    Aligned begin
    double sums[3 * LANES * LANES]  # three sums of each, in the rows' own type
    double lowest[LANES * LANES]

ctypedef struct Sums:
    double weight
    double divergence
    double drift
    double direct
    double rest[4]              # what the rounding of each of these left out
    double shift                # categorical: what they are relative to, in units of the logits
    double peak                 # categorical: the other sums are multiples of e^(peak/T)
    double lowest               # categorical: where a - b lies, if all weights are plain
    double highest
    bint doubtful               # a value outside the fast formula's range

ctypedef struct LaneParts:      # of LANES rows: a part of each
    Aligned begin
    LaneSums sums
    double shift[LANES]         # as those of Sums
    double peak[LANES]
    double beta[LANES]          # categorical: 1/T
    double farthest[LANES]      # categorical: the largest |y|
    double apart[LANES]         # categorical: 1 where P and Q may be far from each other, or 0
    double ratio[LANES]         # discrete: q' = ratio q
    bint scaled                 # whether any is not 1
    double doubtful[LANES]      # 0 or 1, for vectors

ctypedef struct Ahead:          # what comes later, to be asked for along the way
    const char *data[MAX_OPERANDS]
    npy_intp step[MAX_OPERANDS] # categorical: bytes from one vector to the next


ctypedef struct Slope:          # what the gradients of a row's elements are made of
    double cotangent            # of the row's value
    double value
    double change               # log(Q_i/P_i) = y_i - change
    double weight               # sum p
    double ratio                # discrete: y_i = log(ratio q/p)
    double excess               # discrete: e^change - 1
    double beta                 # categorical: 1/T, in two parts
    double beta_rest
    double peak                 # categorical: P_i = e^((a_i - peak)/T) / weight
    double shift                # categorical: log(Q_i/P_i) = (shift - (a_i - b_i))/T, in two parts
    double shift_rest
    double weight_q             # categorical: sum e^b, where it is wanted
    int loop                    # categorical: that of all blocks, if one serves all


cdef inline void clear(Sums *sums) noexcept nogil:
    cdef int i
    sums.weight = sums.divergence = sums.drift = sums.direct = 0
    for i in range(4):
        sums.rest[i] = 0
    sums.shift = sums.peak = 0
    sums.lowest, sums.highest = INFINITY, -INFINITY
    sums.doubtful = False


cdef inline void clear_lanes(LaneSums *sums) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        sums.weight[lane] = sums.divergence[lane] = sums.drift[lane] = 0
        sums.direct[lane] = sums.rest[lane] = 0


cdef inline double two_sum(double x, double y, double *rest) noexcept nogil:
    """x + y; what its rounding left is added to `rest` (Knuth)."""
    cdef double total = x + y
    cdef double added = total - x
    rest[0] += (x - (total - added)) + (y - added)
    return total


cdef inline void add(Sums *into, double weight, double divergence, double drift,
                     double direct) noexcept nogil:
    into.weight = two_sum(into.weight, weight, &into.rest[0])
    into.divergence = two_sum(into.divergence, divergence, &into.rest[1])
    into.drift = two_sum(into.drift, drift, &into.rest[2])
    into.direct = two_sum(into.direct, direct, &into.rest[3])


cdef inline void round_off(Sums *sums) noexcept nogil:
    """Every sum to its nearest double, the rests included."""
    cdef int i
    sums.weight += sums.rest[0]
    sums.divergence += sums.rest[1]
    sums.drift += sums.rest[2]
    sums.direct += sums.rest[3]
    for i in range(4):
        sums.rest[i] = 0


cdef inline void transpose(const real *x, npy_intp outer, int n, int rows, real *into,
                           int width) noexcept nogil:
    """into[i * width + row] = element i of a row."""
    if real is float:
        transpose_f32(x, outer, n, rows, into, width)
    else:
        transpose_f64(x, outer, n, rows, into, width)


cdef inline void row_sums(const real *lanes, int begin, int end, double *sums) noexcept nogil:
    """The sums of LANES rows of lanes, of which begin..end-1 are wanted: side by side, as within a
    row each addition waits for the one before, and processors are hardly further ahead than the
    next row."""
    cdef double found[LANES]
    cdef int row
    if real is float:
        row_sums_f32(lanes, found)
    else:
        row_sums_f64(lanes, found)
    for row in range(begin, end):
        sums[row] = found[row]


cdef inline double least(const real *lanes) noexcept nogil:
    """NaN are passed over."""
    cdef real part[HALF]
    cdef int i
    for i in range(HALF):
        part[i] = smaller(lanes[i], lanes[i + HALF])
    for i in range(QUARTER):
        part[i] = smaller(part[i], part[i + QUARTER])
    for i in range(EIGHTH):
        part[i] = smaller(part[i], part[i + EIGHTH])
    return smaller(part[0], part[1]) if EIGHTH > 1 else part[0]


cdef inline double largest(const real *lanes) noexcept nogil:
    cdef real negative[LANES]
    cdef int i
    for i in range(LANES):
        negative[i] = -lanes[i]
    return -least(negative)


cdef inline void take_lanes(const LaneSums *lanes, int row, LaneParts *into) noexcept nogil:
    """The sums of one row's lanes."""
    into.sums.weight[row] = across(lanes.weight)
    into.sums.divergence[row] = across(lanes.divergence)
    into.sums.drift[row] = across(lanes.drift)


cdef inline void take_lanes_exactly(const LaneSums *lanes, int row,
                                    LaneParts *into) noexcept nogil:
    """The sums of one row's lanes as they stand."""
    cdef double drift = across(lanes.rest), rest = 0
    cdef int lane
    for lane in range(LANES):
        drift = two_sum(drift, lanes.drift[lane], &rest)
    into.sums.weight[row], into.sums.divergence[row] = (
        across(lanes.weight), across(lanes.divergence))
    into.sums.drift[row], into.sums.rest[row] = drift, rest
    into.sums.direct[row] = across(lanes.direct)


cdef inline void take_row(const LaneParts *parts, int row, Sums *into) noexcept nogil:
    """The sums of one of LANES rows."""
    into.weight, into.divergence = parts.sums.weight[row], parts.sums.divergence[row]
    into.drift, into.rest[2] = parts.sums.drift[row], parts.sums.rest[row]
    into.direct = parts.sums.direct[row]
    into.shift, into.peak = parts.shift[row], parts.peak[row]
    into.doubtful = parts.doubtful[row] > 0


cdef inline const real *row_of(const real *x, npy_intp outer, int row) noexcept nogil:
    return <const real *> (<const char *> x + row * outer)


cdef inline int steps_together(real of_type) noexcept nogil:
    return STEP_BYTES // <int> sizeof(real) // LANES


cdef inline int full_run(int sums, real of_type) noexcept nogil:
    """How many terms a lane adds up in so many sums. A long run of equal terms rounds one way: 32
    in one sum in float, 1.2e-6."""
    return sums * RUN if real is float else LONG_RUN


cdef inline int run_length(int n, int sums, real of_type) noexcept nogil:
    """The same of n terms that are left: all, if few more."""
    cdef int length = full_run(sums, of_type)
    return n if n <= length + length / 2 else length


cdef inline void fold(const real *run, wide *lanes) noexcept nogil:
    """Add a run."""
    cdef int lane
    for lane in range(LANES):
        lanes[lane] += run[lane]


cdef inline void copy(const real *lanes, real *into) noexcept nogil:
    """Loops work on copies of their own, which compilers know to be apart from all else."""
    cdef int lane
    for lane in range(LANES):
        into[lane] = lanes[lane]


cdef inline void fill(real *lanes, real value) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        lanes[lane] = value


cdef inline void keep_from(int first, real *run) noexcept nogil:
    """Lanes before `first` do not count. By way of a copy, and compared as numbers of their type:
    else GCC makes a loop over the first ones, whose narrow stores the next wide load waits for."""
    cdef int lane
    cdef real limit = <real> first
    cdef real kept[LANES]
    for lane in range(LANES):
        kept[lane] = run[lane] if <real> lane >= limit else <real> 0
    copy(kept, run)


cdef inline double divergence_of(double weight, double divergence, double drift) noexcept nogil:
    """KL from its three sums, branch-free; never negative, NaN stays. With e the exponent of 1 + u
    and s = (1 + u - 2^e)/(1 + u + 2^e):
        e = 0:   D/W - (u s - (2 atanh(s) - 2 s)), as u - 2 s = u s;
        else     e ln2 + 2 atanh(s) - Y/W."""
    cdef double share = 1 / weight
    cdef double u = (divergence + drift) * share, grown = 1 + u
    cdef double e = ratio_exponent(grown, 1.0), power = match_exponent(grown, 1.0)
    cdef double s = (u if e == 0 else grown - power) / (grown + power)
    cdef double tail = atanh_tail(s)
    cdef double near = divergence * share - (u * s - tail)
    cdef double far = (e * LN2 + (tail + 2 * s)) - drift * share
    cdef double value = near if e == 0 else far
    return value if not value < 0 else 0.0


cdef inline double even_margin(double weight, double divergence, double drift) noexcept nogil:
    """Not negative where |u| <= 2^-10, as usual where p and q both sum to 1."""
    return weight * 0.0009765625 - fabs(divergence + drift)


cdef inline double even_divergence_of(double weight, double divergence,
                                      double drift) noexcept nogil:
    """KL where |u| <= 2^-10, with the series of u - log1p(u): a division and a long chain less. The
    same bits wherever it is inlined: no choice which product is fused."""
    cdef double share = 1 / weight, u = (divergence + drift) * share
    cdef double series = 0.5 - u * (1.0 / 3 - u * (0.25 - u * (0.2 - u * (1.0 / 6))))
    cdef double value = residual_product(u * u, series, divergence * share)
    return value if not value < 0 else 0.0


cdef inline double conditioning(int family, double value, double weight, double divergence,
                                double drift) noexcept nogil:
    """Not negative where the sums are finite and their rounding errors hardly grow, as arithmetic
    that vectors can follow. D/W - (u - log1p(u)): the correction takes no more than a fifth, and
    an error of u, which counts u/(1 + u) times, is small. Or log1p(u) - Y/W, where the drift was
    summed itself: it is no larger than the value."""
    cdef double share = 1 / weight
    cdef double g = divergence * share, y = fabs(drift * share), u = (divergence + drift) * share
    cdef double margin = smaller(1.25 * value - g, value * (1 + u) - (g + y) * fabs(u))
    if family == CATEGORICAL:
        margin = larger(margin, smaller(value - y, u - 0.5))
    cdef double total = weight + divergence + drift
    margin = margin if weight > 0 else -1
    return margin if total - total == 0 else -1


cdef enum Trait:      # what a row's values decide by themselves
    HAS_NAN = 1
    HAS_BAD = 2       # neither NaN nor a value of the family
    HAS_INFINITE = 4  # a term is +inf
    HAS_P = 8         # some mass
    HAS_Q = 16

cdef enum Format:
    FLOAT32
    FLOAT64
    FLOAT16
    BFLOAT16

cdef enum:
    # Below, side by side: what is done once for a row takes half its time or more. Logits and
    # gradients of any pair, for which more is done, longer, at most STRIP.
    SHORT_ROW = 48 + 6 * LANES
    SHORTER_ROW = 16 + 3 * LANES

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
    npy_intp outer[MAX_OPERANDS]  # bytes to the row that follows


cdef inline double element(const Row *row, int operand, npy_intp i) noexcept nogil:
    cdef const char *data = row.data[operand] + i * row.step[operand]
    if row.format == FLOAT32:
        return (<const float *> data)[0]
    if row.format == FLOAT64:
        return (<const double *> data)[0]
    if row.format == FLOAT16:
        return from_float16((<const unsigned short *> data)[0])
    return from_bfloat16((<const unsigned short *> data)[0])
