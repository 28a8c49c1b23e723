"""One row: from operands in memory to a result.

A row is summed block by block in a fixed order: blocks of elements in their own type, longer ones
where they lie side by side in memory, pieces of PIECE elements in double, pieces one after the
other. That order is all that the bits of a result depend on; threads may take pieces of one row in
any order.

What the fast formulas cannot vouch for (values out of their range, a bad ratio, bad input) is
looked at again: values that decide the result end there, the rest is computed with a better ratio,
then in double, then by the family's `hard_value`.
"""

from numpy cimport npy_intp
from gufunc cimport INVALID, Watch, look_for_signals, parallel_for
from sums cimport (
    BLOCK, LANES, LONG_BLOCK, MAX_OPERANDS, Family, Format, LaneParts, Row, Sums, Trait, add, clear,
    clear_lanes, conditioning, divergence_of, even_divergence_of, even_margin, round_off, take_row,
    two_sum,
)
from vecmath cimport (
    INFINITY, NAN, floats_from_bfloat16, floats_from_float16, from_bfloat16, from_float16, larger,
    phi, real, smaller,
)

cdef enum:
    PIECE = 64 * BLOCK
    TEAM = 64                  # pieces that threads take in turn before they are combined
    MAX_PASSES = 6             # over one row, each with the ratio that the one before found


# Loading.

cdef inline real stored(int format, const char *at, real of_type) noexcept nogil:
    if format == Format.FLOAT32:
        return <real> (<const float *> at)[0]
    if format == Format.FLOAT64:
        return <real> (<const double *> at)[0]
    if format == Format.FLOAT16:
        return from_float16((<const unsigned short *> at)[0])
    return from_bfloat16((<const unsigned short *> at)[0])


cdef inline void convert_from(int format, const char *data, npy_intp step, int n,
                              real *into) noexcept nogil:
    cdef int i
    for i in range(n):
        into[i] = stored(format, data + i * step, into[0])


cdef void convert(int format, const char *data, npy_intp step, int n, real *into) noexcept nogil:
    if real is float and step == 2 and format == Format.FLOAT16:
        floats_from_float16(<const unsigned short *> data, n, into)
    elif real is float and step == 2 and format == Format.BFLOAT16:
        floats_from_bfloat16(<const unsigned short *> data, n, into)
    elif format == Format.FLOAT32:
        convert_from(Format.FLOAT32, data, step, n, into)
    elif format == Format.FLOAT64:
        convert_from(Format.FLOAT64, data, step, n, into)
    else:
        convert_from(format, data, step, n, into)


cdef inline int native_format(real of_type) noexcept nogil:
    return Format.FLOAT32 if real is float else Format.FLOAT64


cdef inline bint lies_ready(const Row *row, int operand, real of_type) noexcept nogil:
    return row.format == native_format(of_type) and row.step[operand] == sizeof(real)


cdef void load_copy(const Row *row, npy_intp start, int n, real *buffer,
                    const real **x) noexcept nogil:
    cdef int operand, i, padding = max(0, LANES - n)
    cdef npy_intp step
    for operand in range(row.n_operands):
        step = row.step[operand]
        convert(row.format, row.data[operand] + start * step, step, n, buffer + padding)
        for i in range(padding):
            buffer[i] = buffer[padding]
        x[operand] = buffer + padding
        buffer += BLOCK + LANES


cdef inline bint find_block(const Row *row, npy_intp start, int n, const real **x) noexcept nogil:
    """Whether n elements of each operand lie side by side, as they are wanted: x tells where."""
    cdef int operand
    cdef bint in_place = n >= LANES
    for operand in range(row.n_operands):
        in_place &= lies_ready(row, operand, <real> 0)
        x[operand] = <const real *> row.data[operand] + start
    return in_place


cdef inline void load_block(const Row *row, npy_intp start, int n, real *buffer,
                            const real **x) noexcept nogil:
    """n elements of each operand side by side: in place, or in the buffer. Fewer than LANES have
    LANES - n copies of the first before them, so that whole vectors can be read up to the last."""
    if not find_block(row, start, n, x):
        load_copy(row, start, n, buffer, x)


# Parts of one row, each relative to a shift and a peak of its own.

cdef inline double exponent(double x, double y, double beta, double *rest) noexcept nogil:
    """(x - y) beta in two parts: hundreds would cost their exponential hundreds of ulp."""
    cdef double d_rest
    cdef double d = difference(x, y, &d_rest)
    return product(d, d_rest, beta, 0.0, rest)


cdef inline double clamped_phi(double x, double rest) noexcept nogil:
    """e^(x + rest) - 1 - x, infinity beyond 700. 4 ulp."""
    cdef bint within = (x > -700) & (x < 700)
    cdef double value = phi(larger(-700.0, smaller(x, 700.0)), rest if within else 0.0)
    value = value if x > -700 else -1 - x
    return value if x < 700 else INFINITY


cdef void add_part(Sums *into, const Sums *part, double beta) noexcept nogil:
    """Add a part, made relative to `into`'s shift and peak. With d the change of the shift,
        phi(y + d) = e^d phi(y) + phi(d) + (e^d - 1) y."""
    cdef double d_rest, fall_rest, factor, grown, between
    cdef double d = exponent(into.shift, part.shift, beta, &d_rest)
    cdef double fall = exponent(part.peak, into.peak, beta, &fall_rest)
    cdef double both, both_rest = fall_rest + d_rest
    cdef Sums rounded
    cdef int i
    into.doubtful |= part.doubtful
    into.lowest = smaller(part.lowest, into.lowest)
    into.highest = larger(part.highest, into.highest)
    if d == 0 and fall == 0:
        add(into, part.weight, part.divergence, part.drift, part.direct)
        for i in range(4):
            into.rest[i] += part.rest[i]
        return
    rounded = part[0]
    round_off(&rounded)
    both = two_sum(fall, d, &both_rest)
    factor, grown = clamped_exp(fall, fall_rest), clamped_exp(both, both_rest)
    if rounded.weight == 0:
        add(into, 0, grown * rounded.divergence, 0, 0)
        return
    between = clamped_phi(d, d_rest)
    add(into, factor * rounded.weight, grown * rounded.divergence + (
            factor * between * rounded.weight + (grown - factor) * rounded.drift),
        factor * (rounded.drift + d * rounded.weight), 0)


cdef void combine(const Sums *parts, npy_intp n, double beta, Sums *whole) noexcept nogil:
    """The sums of a whole from those of its parts, relative to the mean of their shifts: by the
    chain rule of divergences, nothing cancels."""
    cdef double weight = 0, mean = 0, share
    cdef npy_intp i
    clear(whole)
    whole.peak = -INFINITY
    for i in range(n):
        if parts[i].weight > 0:
            whole.peak = max(whole.peak, parts[i].peak)
    if whole.peak == -INFINITY:
        whole.peak = 0
    for i in range(n):
        if parts[i].weight > 0:
            share = parts[i].weight
            if parts[i].peak != whole.peak:
                share *= clamped_exp((parts[i].peak - whole.peak) * beta, 0.0)
            weight += share
            mean += share * (parts[i].shift - parts[0].shift)
    whole.shift = parts[0].shift + (mean / weight if weight > 0 else 0)
    for i in range(n):
        add_part(whole, &parts[i], beta)


# One row.

cdef inline int block_length(npy_intp start, npy_intp stop, int most=BLOCK) noexcept nogil:
    """No block of less than LANES at the end of a longer stretch."""
    return most if stop - start >= most + LANES else <int> (stop - start)


cdef inline void rows_of_block(const Row *row, const real **x, const npy_intp *outer, int n,
                               int begin, int end, const double *conditions,
                               LaneParts *into) noexcept nogil:
    """The sums of the rows begin..end-1 with a negative condition, each one block, `outer` bytes
    apart."""
    if row.family == Family.NORMAL:
        normal_rows(x, outer, n, begin, end, conditions, row, into)
    else:
        discrete_rows(x, outer, n, begin, end, conditions, row.normalize, into)


cdef inline void begin_row(LaneParts *parts, double ratio) noexcept nogil:
    clear_lanes(&parts.sums)
    begin_parts(parts)
    parts.ratio[0], parts.scaled = ratio, ratio != 1


cdef inline void sum_block(const Row *row, const real **x, const npy_intp *outer, int n,
                           double ratio, bint *far, Sums *sums) noexcept nogil:
    """What follows lies `outer` bytes on, and may be asked for. `far`: as categorical_block; False
    for the first."""
    cdef double wanted = -1
    cdef LaneParts parts
    clear(sums)
    if row.family == Family.CATEGORICAL:
        categorical_block(x, outer, n, row.inverse_temperature, far, sums)
        return
    begin_row(&parts, ratio)
    rows_of_block(row, x, outer, n, 0, 1, &wanted, &parts)
    take_row(&parts, 0, sums)


cdef void sum_blocks(const Row *row, npy_intp start, npy_intp stop, int most, double ratio,
                     Sums *sums, real of_type) noexcept nogil:
    """What needs a buffer or more than one block: apart from sum_stretch, whose frame is small."""
    cdef real buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef Sums parts[2 * PIECE / BLOCK]
    cdef npy_intp nowhere[MAX_OPERANDS]
    cdef int n = block_length(start, stop, most), blocks = 0, operand
    cdef bint far = False
    for operand in range(MAX_OPERANDS):
        nowhere[operand] = 0
    if start + n == stop:
        load_block(row, start, n, buffer, x)
        sum_block(row, x, nowhere, n, ratio, &far, sums)
        return
    while start < stop:
        n = block_length(start, stop, most)
        load_block(row, start, n, buffer, x)
        sum_block(row, x, nowhere, n, ratio, &far, &parts[blocks])
        blocks += 1
        start += n
    combine(parts, blocks, row.inverse_temperature, sums)


cdef inline int most_together(bint in_place, real of_type) noexcept nogil:
    """Elements of a block. Where they lie, blocks of 1024 take a fifth longer, for what is done
    once for each; copies of more leave the first cache."""
    return LONG_BLOCK * 8 // <int> sizeof(real) if in_place else BLOCK


cdef inline void sum_stretch(const Row *row, npy_intp start, npy_intp stop, double ratio,
                             Sums *sums, real of_type) noexcept nogil:
    """Elements start..stop-1, less than two pieces."""
    cdef const real *x[MAX_OPERANDS]
    cdef bint far = False
    cdef bint in_place = find_block(row, start, block_length(start, stop), x)
    cdef int most = most_together(in_place, of_type)
    cdef int n = block_length(start, stop, most)
    if in_place and start + n == stop:
        sum_block(row, x, row.outer, n, ratio, &far, sums)
    else:
        sum_blocks(row, start, stop, most, ratio, sums, of_type)


cdef inline npy_intp pieces_of(const Row *row) noexcept nogil:
    return max(<npy_intp> 1, row.length // PIECE)


cdef void sum_piece(const Row *row, npy_intp piece, double ratio, Watch *watch, Sums *sums,
                    real of_type) noexcept nogil:
    look_for_signals(watch)
    if not watch.stop:
        sum_stretch(row, piece * PIECE, row.length if piece + 1 == pieces_of(row) else (
            piece + 1) * PIECE, ratio, sums, of_type)


ctypedef struct SumPieces:
    const Row *row
    npy_intp start
    double ratio
    Watch *watch
    Sums *parts


cdef int sum_piece_f32(void *context, npy_intp i) noexcept nogil:
    cdef const SumPieces *job = <const SumPieces *> context
    sum_piece(job.row, job.start + i, job.ratio, job.watch, &job.parts[i], <float> 0)
    return 0


cdef int sum_piece_f64(void *context, npy_intp i) noexcept nogil:
    cdef const SumPieces *job = <const SumPieces *> context
    sum_piece(job.row, job.start + i, job.ratio, job.watch, &job.parts[i], <double> 0)
    return 0


cdef void sum_pieces(const Row *row, double ratio, Watch *watch, Sums *sums,
                     real of_type) noexcept nogil:
    cdef Sums team[TEAM + 1]
    cdef Sums *parts = &team[1]
    cdef npy_intp pieces = pieces_of(row), start = 0, count
    cdef SumPieces job
    job.row, job.ratio, job.watch, job.parts = row, ratio, watch, parts
    while start < pieces and not watch.stop:
        job.start, count = start, min(<npy_intp> TEAM, pieces - start)
        parallel_for(sum_piece_f32 if real is float else sum_piece_f64, &job, count, watch.threads)
        if start == 0:
            combine(parts, count, row.inverse_temperature, sums)
        else:
            team[0] = sums[0]
            combine(team, count + 1, row.inverse_temperature, sums)
        start += count


cdef inline void sum_row(const Row *row, double ratio, Watch *watch, Sums *sums,
                         real of_type) noexcept nogil:
    """All there is, or anything once it is no longer wanted."""
    if pieces_of(row) == 1:
        sum_stretch(row, 0, row.length, ratio, sums, of_type)
    else:
        sum_pieces(row, ratio, watch, sums, of_type)


# What the sums stand for.

cdef inline double finish(const Row *row, double *value, double weight, double divergence,
                          double drift, double direct, bint even=False) noexcept nogil:
    """The value that the sums stand for; returns its conditioning, negative where it is bad.
    `even`: their margin is known not to be negative."""
    cdef double total = weight + divergence + drift
    cdef double finite = 1 if total - total == 0 else -1
    if row.family == Family.NORMAL:
        value[0] = 0.5 * divergence
        return finite
    if not row.normalize:
        value[0] = plain_sum(weight, divergence, drift, direct)
        return finite
    if row.family == Family.DISCRETE:
        value[0] = even_divergence_of(weight, divergence, drift)
        if not even:
            value[0] = value[0] if even_margin(weight, divergence, drift) >= 0 else (
                divergence_of(weight, divergence, drift))
    else:
        value[0] = divergence_of(weight, divergence, drift)
    if row.length == 1:
        value[0] = 0
        return finite if weight > 0 else -1
    return conditioning(row.family, value[0], weight, divergence, drift)


cdef bint fast_sums(const Row *row, Watch *watch, double *value, Sums *sums, double *ratio,
                    real of_type) noexcept nogil:
    """The value by the fast formulas and what it is made of, or anything when it is no longer
    wanted; False when they cannot vouch for it."""
    cdef int attempt
    ratio[0] = 1               # which needs no scaling
    for attempt in range(MAX_PASSES):
        sum_row(row, ratio[0], watch, sums, of_type)
        if watch.stop:
            return True
        round_off(sums)
        if sums.doubtful:
            return False
        if finish(row, value, sums.weight, sums.divergence, sums.drift, sums.direct) >= 0:
            return True
        if row.family != Family.DISCRETE or not discrete_refine(
                sums.weight, sums.divergence, sums.drift, ratio):
            return False
    return False


cdef bint fast_value(const Row *row, Watch *watch, double *value,
                     real of_type) noexcept nogil:
    cdef double ratio
    cdef Sums sums
    return fast_sums(row, watch, value, &sums, &ratio, of_type)


cdef int traits_of(const Row *row, Watch *watch) noexcept nogil:
    cdef double buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const double *x[MAX_OPERANDS]
    cdef npy_intp start = 0
    cdef int n, traits = 0
    while start < row.length:
        look_for_signals(watch)
        if watch.stop:
            break
        n = block_length(start, row.length)
        load_block(row, start, n, buffer, x)
        if row.family == Family.NORMAL:
            traits |= normal_traits(x, n, row)
        elif row.family == Family.DISCRETE:
            traits |= discrete_traits(x, n)
        else:
            traits |= categorical_traits(x, n)
        start += n
    return traits


cdef bint is_decided(const Row *row, Watch *watch, double *value, int *status) noexcept nogil:
    """Whether it is NaN, for bad values or by itself, or infinite."""
    cdef int traits = traits_of(row, watch), mass = Trait.HAS_P | Trait.HAS_Q
    value[0] = NAN
    if watch.stop or traits & Trait.HAS_NAN:
        return True
    if traits & Trait.HAS_BAD or row.normalize and traits & mass != mass:
        status[0] |= INVALID
        return True
    value[0] = INFINITY
    return traits & Trait.HAS_INFINITE != 0


cdef double hard_value(const Row *row, Watch *watch) noexcept nogil:
    if row.family == Family.NORMAL:
        return normal_hard_value(row, watch)
    if row.family == Family.DISCRETE:
        return discrete_hard_value(row, watch)
    return categorical_hard_value(row, watch)


cdef double row_value(const Row *row, Watch *watch, int *status,
                      real of_type) noexcept nogil:
    cdef double value = 0
    if fast_value(row, watch, &value, of_type) or is_decided(row, watch, &value, status):
        return value
    if real is float:
        if fast_value(row, watch, &value, <double> 0):
            return value
    return hard_value(row, watch)
