"""One row at a time, or LANES short rows side by side: from operands in memory to a result.

A row is summed block by block in a fixed order: blocks of BLOCK elements in their own type, pieces
of PIECE elements in double, pieces one after the other. That order is all that the bits of a
result depend on; threads may take pieces of one row in any order.

What the fast formulas cannot vouch for (values out of their range, a bad ratio, bad input) is
looked at again: values that decide the result end there, the rest is computed with a better ratio,
then in double, then by the family's `hard_value`.
"""

from numpy cimport npy_intp
from gufunc cimport (
    INVALID, Batch, Kernel, Plan, Watch, look_for_signals, parallel_for, thread_limit,
)
from sums cimport (
    BLOCK, LANES, MAX_OPERANDS, SHORT_ROW, STRIP, Family, Format, LaneParts, LaneSums, Row, Sums,
    Trait, add, clear, clear_lanes, conditioning, copy, divergence_of, fill, least, round_off,
    two_sum,
)
from vecmath cimport (
    INFINITY, NAN, exp, floats_from_bfloat16, floats_from_float16, from_bfloat16, from_float16,
    larger, phi, real, smaller,
)

cdef extern from "transpose.h" nogil:
    void copy_line(const char *line, npy_intp ahead, npy_intp n, char *into)
    void prefetch(const char *data, npy_intp n)
    void transpose_f32(const float *x, npy_intp outer, npy_intp n, npy_intp rows, float *into,
                       npy_intp width)
    void transpose_f64(const double *x, npy_intp outer, npy_intp n, npy_intp rows, double *into,
                       npy_intp width)

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


cdef inline void load_block(const Row *row, npy_intp start, int n, real *buffer,
                            const real **x) noexcept nogil:
    """n elements of each operand side by side: in place, or in the buffer. Fewer than LANES have
    LANES - n copies of the first before them, so that whole vectors can be read up to the last."""
    cdef int operand
    cdef bint in_place = n >= LANES
    for operand in range(row.n_operands):
        in_place &= lies_ready(row, operand, buffer[0])
        x[operand] = <const real *> row.data[operand] + start
    if not in_place:
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

cdef inline int block_length(npy_intp start, npy_intp stop) noexcept nogil:
    """No block of less than LANES at the end of a longer stretch."""
    return BLOCK if stop - start >= BLOCK + LANES else <int> (stop - start)


cdef inline void sum_block(const Row *row, const real **x, int n, double ratio,
                           Sums *sums) noexcept nogil:
    clear(sums)
    if row.family == Family.NORMAL:
        normal_block(x, n, row, sums)
    elif row.family == Family.DISCRETE:
        discrete_block(x, n, row.normalize, ratio, sums)
    else:
        categorical_block(x, n, row.inverse_temperature, sums)


cdef void sum_stretch(const Row *row, npy_intp start, npy_intp stop, double ratio, Sums *sums,
                      real of_type) noexcept nogil:
    """Elements start..stop-1, less than two pieces."""
    cdef real buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef Sums parts[2 * PIECE / BLOCK]
    cdef int n = block_length(start, stop), blocks = 0
    load_block(row, start, n, buffer, x)
    if start + n == stop:
        sum_block(row, x, n, ratio, sums)
        return
    while start < stop:
        n = block_length(start, stop)
        load_block(row, start, n, buffer, x)
        sum_block(row, x, n, ratio, &parts[blocks])
        blocks += 1
        start += n
    combine(parts, blocks, row.inverse_temperature, sums)


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


cdef void sum_row(const Row *row, double ratio, Watch *watch, Sums *sums,
                  real of_type) noexcept nogil:
    """All there is, or anything once it is no longer wanted."""
    cdef Sums team[TEAM + 1]
    cdef Sums *parts = &team[1]
    cdef npy_intp pieces = pieces_of(row), start = 0, count
    cdef SumPieces job
    if pieces == 1:
        sum_stretch(row, 0, row.length, ratio, sums, of_type)
        return
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


# What the sums stand for.

cdef inline double finish(const Row *row, double *value, double weight, double divergence,
                          double drift, double direct) noexcept nogil:
    """The value that the sums stand for; returns its conditioning, negative where it is bad."""
    cdef double total = weight + divergence + drift
    cdef double finite = 1 if total - total == 0 else -1
    if row.family == Family.NORMAL:
        value[0] = 0.5 * divergence
        return finite
    if not row.normalize:
        value[0] = plain_sum(weight, divergence, drift, direct)
        return finite
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


# Short rows, and rows whose elements lie further apart than the rows do: LANES rows side by side, in
# bands of a few such groups.

cdef enum:
    BAND_BYTES = 256           # of neighbouring columns: wider lines are no faster
    ROWS_AHEAD = 4             # nor are 8
    MAX_GROUPS = BAND_BYTES / 4 / LANES

cdef enum Layout:
    COLUMNS            # elements of neighbouring rows side by side
    ROWS               # elements of each row side by side, to be transposed
    SCATTERED          # to be gathered

ctypedef struct Rows:
    Row first
    npy_intp outer[MAX_OPERANDS]     # bytes from one row to the next
    int layout[MAX_OPERANDS]
    int groups                       # of LANES rows
    int used                         # how many of these there are: all, or less than LANES
    bint gapless                     # whether each row begins where the one before ends
    bint in_lines                    # whether all operands lie in columns

ctypedef struct LaneTotals:
    LaneSums sums
    LaneSums rests               # what the rounding of these left out
    double shift[LANES]
    double peak[LANES]

ctypedef struct Band:
    Rows rows
    bint wanted[MAX_GROUPS]
    LaneParts parts[MAX_GROUPS]
    LaneTotals whole[MAX_GROUPS]     # of rows of more than one strip


cdef int layout_of(const Rows *rows, int operand, real of_type) noexcept nogil:
    if rows.used < LANES or rows.first.format != native_format(of_type):
        return Layout.SCATTERED
    if rows.outer[operand] == sizeof(real):
        return Layout.COLUMNS
    return Layout.ROWS if rows.first.step[operand] == sizeof(real) else Layout.SCATTERED


cdef void choose_layout(Rows *rows, int used, real of_type) noexcept nogil:
    cdef int operand
    rows.used, rows.groups = used, max(1, used // LANES)
    rows.gapless = rows.in_lines = True
    for operand in range(rows.first.n_operands):
        rows.layout[operand] = layout_of(rows, operand, of_type)
        rows.in_lines &= rows.layout[operand] == Layout.COLUMNS
        rows.gapless &= rows.layout[operand] == Layout.ROWS and (
            rows.outer[operand] == rows.first.length * <npy_intp> sizeof(real))


cdef inline void transpose(const real *x, npy_intp outer, int n, int rows, real *into,
                           int width) noexcept nogil:
    """into[i * width + row] = element i of a row."""
    if real is float:
        transpose_f32(x, outer, n, rows, into, width)
    else:
        transpose_f64(x, outer, n, rows, into, width)


cdef void gather(int format, const char *data, npy_intp outer, npy_intp step, int n, int used,
                 real *into, int width) noexcept nogil:
    """The same for LANES rows anywhere; the first instead of those from `used` on."""
    cdef real converted[LANES * STRIP]
    cdef int i, lane
    convert(format, data, step, n, converted)
    if outer == 0:
        for i in range(n):
            for lane in range(LANES):
                into[i * width + lane] = converted[i]
        return
    for lane in range(1, LANES):
        convert(format, data + (lane if lane < used else 0) * outer, step, n, converted + lane * n)
    transpose(converted, n, n, LANES, into, width)


cdef inline int strip_length(const Rows *rows, npy_intp start) noexcept nogil:
    return <int> min(<npy_intp> STRIP, rows.first.length - start)


cdef void load_lines(const Rows *rows, npy_intp start, int n, real *buffer, const real **x,
                     npy_intp *step) noexcept nogil:
    """Copies: lines of the cache a power of two apart evict each other. Those of all operands in
    turn, each asked for some rows ahead: processors do not foresee the way from row to row. 0.50 to
    0.60 of the speed of rows, for logits of 1000 x 4096."""
    cdef const Row *row = &rows.first
    cdef int operand, i, n_operands = row.n_operands, width = rows.groups * LANES
    cdef npy_intp line = width * sizeof(real), pitch = n * line
    cdef const char *data[MAX_OPERANDS]
    cdef npy_intp outer[MAX_OPERANDS]
    cdef char *into = <char *> buffer
    for operand in range(n_operands):
        outer[operand] = row.step[operand]
        data[operand] = row.data[operand] + start * outer[operand]
        x[operand], step[operand] = buffer + operand * n * width, width
    for i in range(n):
        for operand in range(n_operands):
            copy_line(data[operand], ROWS_AHEAD * outer[operand], line, into + operand * pitch)
            data[operand] += outer[operand]
        into += line


cdef void load_rows(const Rows *rows, int operand, npy_intp start, int n,
                    real *into) noexcept nogil:
    cdef const Row *row = &rows.first
    cdef npy_intp outer = rows.outer[operand]
    cdef const char *data = row.data[operand] + start * row.step[operand]
    cdef int group, width = rows.groups * LANES
    if rows.layout[operand] == Layout.ROWS:
        if rows.gapless and rows.groups == 1:  # longer rows
            prefetch(data + 2 * LANES * outer, LANES * outer)
        transpose(<const real *> data, outer // <npy_intp> sizeof(real), n, width, into, width)
        return
    for group in range(rows.groups):
        gather(row.format, data + group * LANES * outer, outer, row.step[operand], n, rows.used,
               into + group * LANES, width)


cdef void load_strip(const Rows *rows, npy_intp start, int n, real *buffer, const real **x,
                     npy_intp *step) noexcept nogil:
    """n elements of each row as columns, `step` elements apart: in the buffer, or in place."""
    cdef const Row *row = &rows.first
    cdef int operand, width = rows.groups * LANES
    if rows.in_lines:
        load_lines(rows, start, n, buffer, x, step)
        return
    for operand in range(row.n_operands):
        if rows.layout[operand] == Layout.COLUMNS:
            x[operand] = <const real *> (row.data[operand] + start * row.step[operand])
            step[operand] = row.step[operand] // <npy_intp> sizeof(real)
        else:
            load_rows(rows, operand, start, n, buffer)
            x[operand], step[operand] = buffer, width
            buffer += n * width


cdef void columns(const Row *row, const real **x, const npy_intp *step, int n,
                  LaneParts *into) noexcept nogil:
    """Add n columns."""
    if row.family == Family.NORMAL:
        normal_columns(x, step, n, row, into)
    elif row.family == Family.DISCRETE:
        discrete_columns(x, step, n, row.normalize, into)
    else:
        categorical_columns(x, step, n, into)


# Strips of LANES rows, put together side by side as add_part does it for one row.

cdef inline void add_exactly(double *sums, const double *terms, double *rests) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        sums[lane] = two_sum(sums[lane], terms[lane], &rests[lane])


cdef inline void exp_lanes(const double *x, const double *rests, double *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into[lane] = clamped_exp(x[lane], rests[lane])


cdef inline void phi_lanes(const double *x, const double *rests, double *into) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        into[lane] = clamped_phi(x[lane], rests[lane])


cdef void rebase(LaneSums *sums, const double *shift, const double *peak, const double *beta,
                 const double *new_shift, const double *new_peak) noexcept nogil:
    """Make sums relative to another shift and peak."""
    cdef int lane
    cdef double mixed
    cdef double d[LANES]
    cdef double d_rest[LANES]
    cdef double fall[LANES]
    cdef double fall_rest[LANES]
    cdef double both[LANES]
    cdef double both_rest[LANES]
    cdef double factor[LANES]
    cdef double grown[LANES]
    cdef double between[LANES]
    for lane in range(LANES):
        d[lane] = exponent(new_shift[lane], shift[lane], beta[lane], &d_rest[lane])
        fall[lane] = exponent(peak[lane], new_peak[lane], beta[lane], &fall_rest[lane])
        both_rest[lane] = fall_rest[lane] + d_rest[lane]
        both[lane] = two_sum(fall[lane], d[lane], &both_rest[lane])
    exp_lanes(fall, fall_rest, factor)
    exp_lanes(both, both_rest, grown)
    phi_lanes(d, d_rest, between)
    for lane in range(LANES):
        mixed = factor[lane] * between[lane] * sums.weight[lane]
        mixed += (grown[lane] - factor[lane]) * sums.drift[lane]
        mixed = mixed if sums.weight[lane] > 0 else 0
        sums.divergence[lane] = grown[lane] * sums.divergence[lane] + mixed
        sums.drift[lane] = factor[lane] * (sums.drift[lane] + d[lane] * sums.weight[lane])
        sums.weight[lane] *= factor[lane]


cdef void add_shifted(LaneTotals *whole, const LaneParts *part) noexcept nogil:
    """Relative to the mean of the shifts, as `combine` does it."""
    cdef int lane
    cdef double peak, other
    cdef double zeros[LANES]
    cdef double falls[2][LANES]
    cdef double shares[2][LANES]
    cdef double new_shift[LANES]
    cdef double new_peak[LANES]
    cdef LaneSums added = part.sums
    fill(zeros, 0.0)
    for lane in range(LANES):
        peak = whole.peak[lane] if whole.sums.weight[lane] > 0 else -INFINITY
        peak = larger(peak, part.peak[lane] if added.weight[lane] > 0 else -INFINITY)
        new_peak[lane] = peak if peak > -INFINITY else 0
        falls[0][lane] = (whole.peak[lane] - new_peak[lane]) * part.beta[lane]
        falls[1][lane] = (part.peak[lane] - new_peak[lane]) * part.beta[lane]
    exp_lanes(falls[0], zeros, shares[0])
    exp_lanes(falls[1], zeros, shares[1])
    for lane in range(LANES):
        other = shares[1][lane] * added.weight[lane]
        other = other / (shares[0][lane] * whole.sums.weight[lane] + other) if other > 0 else 0
        new_shift[lane] = whole.shift[lane] + other * (part.shift[lane] - whole.shift[lane])
    rebase(&whole.sums, whole.shift, whole.peak, part.beta, new_shift, new_peak)
    rebase(&added, part.shift, part.peak, part.beta, new_shift, new_peak)
    for lane in range(LANES):
        whole.sums.weight[lane] += added.weight[lane]
        whole.sums.divergence[lane] += added.divergence[lane]
        whole.sums.drift[lane] += added.drift[lane]
    copy(new_shift, whole.shift)
    copy(new_peak, whole.peak)


cdef void add_strip(LaneTotals *whole, const LaneParts *part, bint first,
                    bint shifted) noexcept nogil:
    if first:
        whole.sums = part.sums
        copy(part.shift, whole.shift)
        copy(part.peak, whole.peak)
        clear_lanes(&whole.rests)
        copy(part.sums.rest, whole.rests.drift)
        return
    if shifted:
        add_shifted(whole, part)
        return
    add_exactly(whole.sums.weight, part.sums.weight, whole.rests.weight)
    add_exactly(whole.sums.divergence, part.sums.divergence, whole.rests.divergence)
    add_exactly(whole.sums.drift, part.sums.drift, whole.rests.drift)
    add_exactly(whole.sums.drift, part.sums.rest, whole.rests.drift)
    add_exactly(whole.sums.direct, part.sums.direct, whole.rests.direct)


cdef inline void take_whole(const LaneTotals *whole, LaneParts *parts) noexcept nogil:
    cdef int lane
    for lane in range(LANES):
        parts.sums.weight[lane] = whole.sums.weight[lane] + whole.rests.weight[lane]
        parts.sums.divergence[lane] = whole.sums.divergence[lane] + whole.rests.divergence[lane]
        parts.sums.drift[lane] = whole.sums.drift[lane] + whole.rests.drift[lane]
        parts.sums.direct[lane] = whole.sums.direct[lane] + whole.rests.direct[lane]
        parts.sums.rest[lane] = 0
        parts.shift[lane], parts.peak[lane] = whole.shift[lane], whole.peak[lane]


# A band.

cdef void sum_strip(Band *band, int n, const real **x, const npy_intp *step) noexcept nogil:
    """The sums of n columns, of the groups that are wanted."""
    cdef const real *at[MAX_OPERANDS]
    cdef int group, operand
    for group in range(band.rows.groups):
        if band.wanted[group]:
            for operand in range(band.rows.first.n_operands):
                at[operand] = x[operand] + group * LANES
            clear_lanes(&band.parts[group].sums)
            columns(&band.rows.first, at, step, n, &band.parts[group])


cdef void sum_band(Band *band, real *buffer, const real **x, npy_intp *step) noexcept nogil:
    """The sums of the groups that are wanted."""
    cdef const Row *row = &band.rows.first
    cdef npy_intp start = 0
    cdef int n, group
    if row.length <= STRIP:
        load_strip(&band.rows, 0, <int> row.length, buffer, x, step)
        sum_strip(band, <int> row.length, x, step)
        return
    while start < row.length:
        n = strip_length(&band.rows, start)
        load_strip(&band.rows, start, n, buffer, x, step)
        sum_strip(band, n, x, step)
        for group in range(band.rows.groups):
            if band.wanted[group]:
                add_strip(&band.whole[group], &band.parts[group], start == 0,
                          row.family == Family.CATEGORICAL)
        start += n
    for group in range(band.rows.groups):
        if band.wanted[group]:
            take_whole(&band.whole[group], &band.parts[group])


cdef bint sum_gapless(Band *band, real of_type) noexcept nogil:
    """The same from where the rows lie; False where it cannot be had."""
    cdef const Row *row = &band.rows.first
    cdef const real *x[MAX_OPERANDS]
    cdef int operand
    if row.family != Family.NORMAL or not band.rows.gapless or row.length >= SHORT_ROW:
        return False
    for operand in range(MAX_OPERANDS):
        x[operand] = <const real *> row.data[operand]
    return normal_gapless(x, <int> row.length, band.rows.groups, row, band.parts)


cdef inline void finish_lanes_of(const Row *row, const LaneParts *parts, int groups,
                                 double *values, double *conditions) noexcept nogil:
    cdef double value[LANES]
    cdef double condition[LANES]
    cdef const LaneSums *sums
    cdef int group, lane
    for group in range(groups):
        sums = &parts[group].sums
        for lane in range(LANES):
            condition[lane] = finish(
                row, &value[lane], sums.weight[lane], sums.divergence[lane],
                sums.drift[lane] + sums.rest[lane], sums.direct[lane])
            condition[lane] = condition[lane] if condition[lane] >= 0 else -1  # NaN too
            condition[lane] = condition[lane] if parts[group].doubtful[lane] == 0 else -1
        copy(value, values + group * LANES)
        copy(condition, conditions + group * LANES)


cdef void finish_lanes(const Row *row, const LaneParts *parts, int groups, double *values,
                       double *conditions) noexcept nogil:
    """As `finish`, for groups of LANES rows; families apart, so that each is packed."""
    cdef Row fixed = row[0]
    if row.family == Family.CATEGORICAL and row.length > 1:
        fixed.family, fixed.normalize, fixed.length = Family.CATEGORICAL, True, 2
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    elif row.family == Family.DISCRETE and row.normalize and row.length > 1:
        fixed.family, fixed.normalize, fixed.length = Family.DISCRETE, True, 2
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    elif row.family == Family.NORMAL:
        fixed.family = Family.NORMAL
        finish_lanes_of(&fixed, parts, groups, values, conditions)
    else:
        finish_lanes_of(row, parts, groups, values, conditions)


cdef inline void choose_ratios(LaneParts *parts, const double *conditions) noexcept nogil:
    """Of badly conditioned rows."""
    cdef int lane
    for lane in range(LANES):
        if conditions[lane] < 0:
            discrete_refine(parts.sums.weight[lane], parts.sums.divergence[lane],
                            parts.sums.drift[lane], &parts.ratio[lane])
            parts.ratio[lane] = usable(parts.ratio[lane])
    parts.scaled = True


cdef inline void finish_again(const Row *row, const LaneParts *parts, double *values,
                              double *conditions) noexcept nogil:
    """The values of rows that were badly conditioned."""
    cdef double new_values[LANES]
    cdef double new_conditions[LANES]
    cdef int lane
    finish_lanes(row, parts, 1, new_values, new_conditions)
    for lane in range(LANES):
        if conditions[lane] < 0:
            values[lane], conditions[lane] = new_values[lane], new_conditions[lane]


cdef inline void begin_parts(LaneParts *parts) noexcept nogil:
    cdef int lane
    parts.scaled = False
    for lane in range(LANES):
        parts.ratio[lane] = 1
        parts.shift[lane] = parts.peak[lane] = 0
        parts.doubtful[lane] = 0


cdef inline void begin_band(Band *band) noexcept nogil:
    cdef int group
    for group in range(band.rows.groups):
        begin_parts(&band.parts[group])
        band.wanted[group] = True


cdef inline bint can_refine(const Row *row) noexcept nogil:
    return row.family == Family.DISCRETE and row.normalize


cdef inline bint all_good(const double *conditions) noexcept nogil:
    return least(conditions) >= 0


cdef void refine_band(Band *band, real *buffer, const real **x, npy_intp *step, double *values,
                      double *conditions) noexcept nogil:
    """Weights of badly conditioned rows again, with the ratios that their sums gave."""
    cdef int group
    cdef bint refine = False
    for group in range(band.rows.groups):
        band.wanted[group] = not all_good(conditions + group * LANES)
        if band.wanted[group]:
            choose_ratios(&band.parts[group], conditions + group * LANES)
            refine = True
    if refine:
        sum_band(band, buffer, x, step)
    for group in range(band.rows.groups):
        if band.wanted[group]:
            finish_again(&band.rows.first, &band.parts[group], values + group * LANES,
                         conditions + group * LANES)


cdef void band_values(Band *band, double *values, double *conditions, real of_type) noexcept nogil:
    """The values of all rows; those with a negative condition the fast formulas do not vouch
    for."""
    cdef double buffer[MAX_OPERANDS * STRIP * BAND_BYTES / 8]
    cdef const Row *row = &band.rows.first
    cdef const real *x[MAX_OPERANDS]
    cdef npy_intp step[MAX_OPERANDS]
    begin_band(band)
    if not sum_gapless(band, of_type):
        sum_band(band, <real *> buffer, x, step)
    finish_lanes(row, band.parts, band.rows.groups, values, conditions)
    if can_refine(row):
        refine_band(band, <real *> buffer, x, step, values, conditions)


# The kernel that the gufuncs carry.

cdef inline double inverse_temperature(const Batch *batch, npy_intp index) noexcept nogil:
    return 1 / (<const double *> (batch.operands[2] + index * batch.outer[2]))[0]


cdef inline void point_at(Row *row, const Batch *batch, npy_intp index) noexcept nogil:
    """Turn to another row of the same batch."""
    cdef int operand
    for operand in range(row.n_operands):
        row.data[operand] = batch.operands[operand] + index * batch.outer[operand]
    if row.family == Family.CATEGORICAL:
        row.inverse_temperature = inverse_temperature(batch, index)


cdef inline Row row_at(const Batch *batch, npy_intp index, const Kernel *kernel) noexcept nogil:
    cdef Row row
    cdef int operand
    row.family, row.format = kernel.family, kernel.options[0]
    row.normalize = kernel.options[1]
    row.spread_p, row.spread_q = kernel.options[2], kernel.options[3]
    row.n_operands = 4 if row.family == Family.NORMAL else 2
    row.length = batch.core[0]
    for operand in range(row.n_operands):
        row.step[operand] = batch.inner[operand]
    row.inverse_temperature = 1
    point_at(&row, batch, index)
    return row


cdef npy_intp item_size(int format) noexcept nogil:
    return 8 if format == Format.FLOAT64 else 4 if format == Format.FLOAT32 else 2


cdef inline bint is_short(const Batch *batch) noexcept nogil:
    return 0 < batch.core[0] < SHORT_ROW


cdef bint across_rows(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Whether to compute LANES rows side by side."""
    cdef npy_intp size = item_size(kernel.options[0])
    return is_short(batch) or (
        batch.n >= LANES and batch.outer[0] == size and batch.inner[0] != size)


cdef inline npy_intp rows_together(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Of a task: bands as wide as leaves some for each thread."""
    cdef npy_intp share = batch.n // thread_limit(), most = MAX_GROUPS * LANES
    return max(8 * LANES, min(share, most) // LANES * LANES)


cdef Plan plan_rows(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan
    cdef double element_ns = 0.7 if kernel.options[0] == Format.FLOAT64 else 0.4
    if kernel.family != Family.DISCRETE:
        element_ns *= 2
    plan.row_ns = 20 + batch.core[0] * element_ns
    plan.setup_ns = 0
    plan.group = rows_together(batch, kernel) if across_rows(batch, kernel) else 1
    plan.splits_rows = plan.group == 1
    return plan


cdef inline void store(char *at, int format, double value) noexcept nogil:
    if format == Format.FLOAT64:
        (<double *> at)[0] = value
    else:
        (<float *> at)[0] = <float> value


cdef inline void store_lanes(char *at, npy_intp outer, int n, int format,
                             const double *values) noexcept nogil:
    cdef int lane
    cdef float *results = <float *> at
    if n == LANES and outer == sizeof(float) and format != Format.FLOAT64:
        for lane in range(LANES):
            results[lane] = <float> values[lane]
        return
    for lane in range(n):
        store(at + lane * outer, format, values[lane])


cdef inline bint lie_in_columns(const Batch *batch, const Kernel *kernel, real of_type) noexcept nogil:
    """Whether all operands' rows are neighbouring columns."""
    cdef int operand
    if batch.n < LANES or kernel.options[0] != native_format(of_type):
        return False
    for operand in range(4 if kernel.family == Family.NORMAL else 2):
        if batch.outer[operand] != sizeof(real):
            return False
    return True


cdef inline int finish_group(const Batch *batch, npy_intp first, int used, const Kernel *kernel,
                             Watch *watch, double *values, const double *conditions,
                             real of_type) noexcept nogil:
    """Store the values of neighbouring rows. Bits of a row do not depend on its neighbours: what
    the fast formulas cannot vouch for is computed again by itself."""
    cdef int out = kernel.n_operands - 1, status = 0, lane
    cdef Row row
    for lane in range(0 if all_good(conditions) else used):
        if conditions[lane] < 0:
            row = row_at(batch, first + lane, kernel)
            values[lane] = row_value(&row, watch, &status, of_type)
    store_lanes(batch.operands[out] + first * batch.outer[out], batch.outer[out], used,
                kernel.options[0], values)
    return status


cdef inline void keep_sums(const Sums *sums, int lane, LaneParts *into) noexcept nogil:
    into.sums.weight[lane] = sums.weight + sums.rest[0]
    into.sums.divergence[lane] = sums.divergence + sums.rest[1]
    into.sums.drift[lane] = sums.drift + sums.rest[2]
    into.sums.direct[lane] = sums.direct + sums.rest[3]
    into.doubtful[lane] = sums.doubtful


cdef void sum_each(Row *row, const Batch *batch, npy_intp first, int used,
                   const double *conditions, Watch *watch, LaneParts *parts,
                   real of_type) noexcept nogil:
    """The sums of neighbouring rows, of those with a negative condition."""
    cdef Sums sums
    cdef int lane
    for lane in range(used):
        if conditions[lane] < 0:
            point_at(row, batch, first + lane)
            sum_row(row, parts.ratio[lane], watch, &sums, of_type)
            keep_sums(&sums, lane, parts)


cdef inline int rows_one_by_one(const Batch *batch, npy_intp first, npy_intp last,
                                const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    """Summed one after the other, finished side by side."""
    cdef int status = 0, used, lane
    cdef Row row = row_at(batch, first, kernel)
    cdef LaneParts parts
    cdef double values[LANES]
    cdef double conditions[LANES]
    clear_lanes(&parts.sums)
    while first < last:
        used = <int> min(<npy_intp> LANES, last - first)
        begin_parts(&parts)
        fill(conditions, -1.0)
        sum_each(&row, batch, first, used, conditions, watch, &parts, of_type)
        finish_lanes(&row, &parts, 1, values, conditions)
        if can_refine(&row) and not all_good(conditions):
            choose_ratios(&parts, conditions)
            sum_each(&row, batch, first, used, conditions, watch, &parts, of_type)
            finish_again(&row, &parts, values, conditions)
        status |= finish_group(batch, first, used, kernel, watch, values, conditions, of_type)
        first += used
    return status


cdef inline void set_betas(const Batch *batch, npy_intp first, int used, const Kernel *kernel,
                           LaneParts *parts) noexcept nogil:
    cdef int lane
    if kernel.family != Family.CATEGORICAL:
        fill(parts.beta, 1.0)
    elif batch.outer[2] == 0:
        fill(parts.beta, inverse_temperature(batch, first))
    else:
        for lane in range(LANES):
            parts.beta[lane] = inverse_temperature(batch, first + min(lane, used - 1))


cdef inline int most_groups(const Batch *batch, const Kernel *kernel, real of_type) noexcept nogil:
    """A line of columns, or as many short rows as the first cache holds easily."""
    if lie_in_columns(batch, kernel, of_type):
        return BAND_BYTES / sizeof(real) / LANES
    return <int> max(<npy_intp> 1, min(<npy_intp> MAX_GROUPS, STRIP // batch.core[0]))


cdef inline int rows_in_bands(const Batch *batch, npy_intp first, npy_intp last,
                              const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    cdef int status = 0, operand, group, used, at
    cdef Band band
    cdef Rows *rows = &band.rows
    cdef double values[MAX_GROUPS * LANES]
    cdef double conditions[MAX_GROUPS * LANES]
    cdef npy_intp most = most_groups(batch, kernel, of_type) * LANES
    rows.first, rows.used = row_at(batch, first, kernel), 0
    for operand in range(MAX_OPERANDS):
        rows.outer[operand] = batch.outer[operand]
    while first < last:
        if last - first < LANES and batch.n >= LANES and not is_short(batch):
            first = last - LANES  # whole vectors: some rows are computed twice
        used = <int> min(most, last - first)
        used = used // LANES * LANES if used > LANES else used
        point_at(&rows.first, batch, first)
        if used != rows.used:
            choose_layout(rows, used, of_type)
        for group in range(rows.groups):
            set_betas(batch, first + group * LANES, used, kernel, &band.parts[group])
        band_values(&band, values, conditions, of_type)
        for group in range(rows.groups):
            at = group * LANES
            status |= finish_group(batch, first + at, min(used, LANES), kernel, watch, values + at,
                                   conditions + at, of_type)
        first += used
    return status


cdef inline int any_rows(const Batch *batch, npy_intp first, npy_intp last, const Kernel *kernel,
                         Watch *watch, real of_type) noexcept nogil:
    if across_rows(batch, kernel):
        return rows_in_bands(batch, first, last, kernel, watch, of_type)
    return rows_one_by_one(batch, first, last, kernel, watch, of_type)


cdef int reduce_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                         const Kernel *kernel, Watch *watch) noexcept nogil:
    return any_rows(batch, first, last, kernel, watch, <float> 0)


cdef int reduce_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                         const Kernel *kernel, Watch *watch) noexcept nogil:
    return any_rows(batch, first, last, kernel, watch, <double> 0)
