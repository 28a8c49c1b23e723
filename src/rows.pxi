"""One row at a time, or LANES short rows side by side: from operands in memory to a result.

A row is summed block by block in a fixed order: blocks of BLOCK elements in their own type, pieces
of PIECE elements in double, pieces one after the other. That order is all that the bits of a
result depend on; threads may take pieces of one row in any order.

What the fast formulas cannot vouch for (values out of their range, a bad guess, bad input) is
computed again: with a better guess, then in double, then by `hard_value`.
"""

from cython.parallel cimport prange
from libc.math cimport isfinite
from libc.stdlib cimport free, malloc
from numpy cimport npy_intp
from categorical cimport (
    Range, can_be_plain, categorical_block, categorical_columns, categorical_guess, categorical_guess_lane,
    categorical_hard_value, categorical_refine, column_ranges, start_range,
)
from discrete cimport (
    discrete_block, discrete_columns, discrete_guess, discrete_guess_columns,
    discrete_hard_value, discrete_refine, plain_sum,
)
from gufunc cimport Batch, Kernel, Plan, Watch, look_for_signals
from normal cimport normal_block, normal_columns, normal_hard_value
from sums cimport (
    BLOCK, LANES, MAX_OPERANDS, SHORT_ROW, Family, Format, Guess, Row, Sums, clear, divergence_of,
    merge, round_off, well_conditioned,
)
from vecmath cimport from_bfloat16, from_float16, real

cdef enum:
    PIECE = 64 * BLOCK
    PREFIX = 128               # elements that a first guess of the shift is taken from
    MAX_PASSES = 6             # over one row, each with the guess that the one before found


cdef void convert(const Row *row, int operand, npy_intp start, int n, real *into) noexcept nogil:
    cdef npy_intp step = row.step[operand]
    cdef const char *data = row.data[operand] + start * step
    cdef int i
    if row.format == Format.FLOAT32:
        for i in range(n):
            into[i] = <real> (<const float *> (data + i * step))[0]
    elif row.format == Format.FLOAT64:
        for i in range(n):
            into[i] = <real> (<const double *> (data + i * step))[0]
    elif row.format == Format.FLOAT16:
        for i in range(n):
            into[i] = from_float16((<const unsigned short *> (data + i * step))[0])
    else:
        for i in range(n):
            into[i] = from_bfloat16((<const unsigned short *> (data + i * step))[0])


cdef inline bint lies_ready(const Row *row, int operand, real of_type) noexcept nogil:
    cdef int format = Format.FLOAT32 if real is float else Format.FLOAT64
    return row.format == format and row.step[operand] == sizeof(real)


cdef const real *load(const Row *row, int operand, npy_intp start, int n,
                      real *buffer) noexcept nogil:
    """n elements side by side: in place, or in the buffer. Fewer than LANES have LANES - n copies
    of the first before them, so that whole vectors can be read up to the last."""
    cdef int i
    if n >= LANES and lies_ready(row, operand, buffer[0]):
        return <const real *> (row.data[operand] + start * sizeof(real))
    cdef int padding = max(0, LANES - n)
    convert(row, operand, start, n, buffer + padding)
    for i in range(padding):
        buffer[i] = buffer[padding]
    return buffer + padding


cdef void load_block(const Row *row, npy_intp start, int n, real *buffer,
                     const real **x) noexcept nogil:
    cdef int operand
    for operand in range(row.n_operands):
        x[operand] = load(row, operand, start, n, buffer + operand * (BLOCK + LANES))


cdef inline int block_length(npy_intp start, npy_intp stop) noexcept nogil:
    """No block of less than LANES at the end of a longer stretch."""
    return BLOCK if stop - start >= BLOCK + LANES else <int> (stop - start)


cdef void guess_row(const Row *row, Guess *guess, real of_type) noexcept nogil:
    cdef real buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef npy_intp start = 0
    cdef int n
    cdef bint done = row.family == Family.NORMAL or not row.normalize
    while start < row.length and not done:
        n = block_length(start, row.length)
        load_block(row, start, n, buffer, x)
        if row.family == Family.DISCRETE:
            done = discrete_guess(x, n, guess)
        else:
            done = categorical_guess(x, n, guess)
            if done and row.length > 2 * PREFIX:
                refine_by_prefix(row, x, min(n, PREFIX), guess)
        start += n


cdef void refine_by_prefix(const Row *row, const real **x, int n, Guess *guess) noexcept nogil:
    """The shift of n >= LANES elements: nearer than the difference of two maxima, which every other
    row of nearby P and Q would have to be summed again for."""
    cdef Guess first = guess[0]
    cdef Sums sums
    clear(&sums)
    categorical_block(x, n, &first, &sums)
    round_off(&sums)
    if is_sound(&sums):
        refine(row, &sums, guess, x[0][0])


cdef void add_block(const Row *row, const real **x, int n, Guess *guess,
                    Sums *into) noexcept nogil:
    if row.family == Family.NORMAL:
        normal_block(x, n, row, into)
    elif row.family == Family.DISCRETE:
        if not row.normalize:
            discrete_block(x, n, False, False, guess, into)
        elif guess.ratio == 1:
            discrete_block(x, n, False, True, guess, into)
        else:
            discrete_block(x, n, True, True, guess, into)
    else:
        categorical_block(x, n, guess, into)


cdef Sums sum_piece(const Row *row, npy_intp start, npy_intp stop, Guess guess,
                    real of_type) noexcept nogil:
    cdef real buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef Sums sums
    cdef int n
    clear(&sums)
    while start < stop:
        n = block_length(start, stop)
        load_block(row, start, n, buffer, x)
        add_block(row, x, n, &guess, &sums)
        start += n
    sums.peak = guess.peak
    return sums


cdef inline npy_intp pieces_of(const Row *row) noexcept nogil:
    return max(<npy_intp> 1, row.length // PIECE)


cdef Sums sum_one_piece(const Row *row, npy_intp piece, const Guess *guess,
                        real of_type) noexcept nogil:
    cdef bint last = piece + 1 == pieces_of(row)
    return sum_piece(
        row, piece * PIECE, row.length if last else (piece + 1) * PIECE, guess[0], of_type)


cdef Sums sum_row(const Row *row, const Guess *guess, Watch *watch,
                  real of_type) noexcept nogil:
    cdef npy_intp pieces = pieces_of(row), i
    cdef Sums sums = sum_one_piece(row, 0, guess, of_type)
    cdef Sums part
    cdef Sums *parts = NULL
    if pieces == 1:
        return sums
    if watch.threads > 1:
        parts = <Sums *> malloc(pieces * sizeof(Sums))
    if parts != NULL:
        for i in prange(1, pieces, num_threads=watch.threads, schedule="dynamic"):
            look_for_signals(watch)
            if not watch.stop:
                parts[i] = sum_one_piece(row, i, guess, of_type)
    for i in range(1, pieces):
        look_for_signals(watch)
        if watch.stop:
            break
        part = parts[i] if parts != NULL else sum_one_piece(row, i, guess, of_type)
        merge(&sums, &part, row.inverse_temperature)
    free(parts)
    return sums


cdef bint refine(const Row *row, const Sums *sums, Guess *guess, real of_type) noexcept nogil:
    if row.family == Family.DISCRETE:
        return discrete_refine(sums, guess)
    return categorical_refine(sums, guess, of_type)


cdef inline bint is_sound(const Sums *sums) noexcept nogil:
    return not sums.doubtful and isfinite(sums.weight + sums.divergence + sums.excess)


cdef bint finish(const Row *row, const Sums *sums, double *value) noexcept nogil:
    """The value that the sums stand for; False when it is ill-conditioned."""
    if row.family == Family.NORMAL:
        value[0] = sums.divergence
        return True
    if row.normalize and row.length == 1 and sums.weight > 0:
        value[0] = 0
        return True
    if not row.normalize:
        value[0] = plain_sum(sums)
        return True
    value[0] = divergence_of(sums)
    return well_conditioned(sums)


cdef bint fast_value(const Row *row, Watch *watch, double *value,
                     real of_type) noexcept nogil:
    """The value by the fast formulas, or any when it is no longer wanted; False when they cannot
    vouch for it."""
    cdef Guess guess
    cdef Sums sums
    cdef int attempt
    guess.ratio, guess.shift, guess.peak, guess.wide = 1, 0, 0, False
    guess.inverse_temperature = row.inverse_temperature
    guess_row(row, &guess, of_type)
    for attempt in range(MAX_PASSES):
        sums = sum_row(row, &guess, watch, of_type)
        if watch.stop:
            return True
        round_off(&sums)
        if not is_sound(&sums):
            return False
        if finish(row, &sums, value):
            return True
        if not refine(row, &sums, &guess, of_type):
            return False
    return False


cdef double row_value(const Row *row, Watch *watch, int *status,
                      real of_type) noexcept nogil:
    cdef double value = 0
    if fast_value(row, watch, &value, of_type):
        return value
    if real is float:
        if fast_value(row, watch, &value, <double> 0):
            return value
    if row.family == Family.NORMAL:
        return normal_hard_value(row, status)
    if row.family == Family.DISCRETE:
        return discrete_hard_value(row, status)
    return categorical_hard_value(row, status)


# Short rows, and rows whose elements lie further apart than the rows do: LANES rows side by side.

cdef enum:
    STRIP = SHORT_ROW          # elements of each row that are gathered at a time


cdef void gather(const Row *rows, int operand, npy_intp start, int n,
                 real *into) noexcept nogil:
    """into[i * LANES + lane] = element start + i of the lane's row."""
    cdef int i, lane
    cdef real column[STRIP]
    for lane in range(LANES):
        convert(&rows[lane], operand, start, n, column)
        for i in range(n):
            into[i * LANES + lane] = column[i]


cdef bint side_by_side(const Row *rows, int operand, real of_type) noexcept nogil:
    """Whether the lanes' elements are neighbours in memory already."""
    cdef int format = Format.FLOAT32 if real is float else Format.FLOAT64
    cdef int lane
    if rows[0].format != format or rows[0].step[operand] % sizeof(real):
        return False
    for lane in range(1, LANES):
        if rows[lane].data[operand] - rows[lane - 1].data[operand] != sizeof(real):
            return False
    return True


cdef const real *columns(const Row *rows, int operand, npy_intp start, int n,
                         real *buffer, npy_intp *step) noexcept nogil:
    """n columns of LANES elements, `step` elements apart: in place, or in the buffer."""
    if side_by_side(rows, operand, buffer[0]):
        step[0] = rows[0].step[operand] // <npy_intp> sizeof(real)
        return <const real *> (rows[0].data[operand] + start * rows[0].step[operand])
    step[0] = LANES
    gather(rows, operand, start, n, buffer)
    return buffer


cdef void load_strip(const Row *rows, npy_intp start, real *buffer, const real **x,
                     npy_intp *step, int *n) noexcept nogil:
    cdef int operand
    n[0] = <int> min(<npy_intp> STRIP, rows[0].length - start)
    for operand in range(rows[0].n_operands):
        x[operand] = columns(
            rows, operand, start, n[0], buffer + operand * STRIP * LANES, &step[operand])


cdef void add_columns(const Row *row, const real **x, const npy_intp *step, int n,
                      const Guess *guesses, Sums *into) noexcept nogil:
    """As add_block, for n columns of LANES rows."""
    cdef int lane, simple = 0
    if row.family == Family.NORMAL:
        normal_columns(x, step, n, row, into)
    elif row.family == Family.DISCRETE and not row.normalize:
        discrete_columns(x, step, n, False, False, guesses, into)
    elif row.family == Family.DISCRETE:
        for lane in range(LANES):
            simple += guesses[lane].ratio == 1
        if simple > 0:
            discrete_columns(x, step, n, False, True, guesses, into)
        if simple < LANES:
            discrete_columns(x, step, n, True, True, guesses, into)
    else:
        for lane in range(LANES):
            simple += can_be_plain(&guesses[lane])
        if simple > 0:
            categorical_columns(x, step, n, True, guesses, into)
        if simple < LANES:
            categorical_columns(x, step, n, False, guesses, into)


cdef void sum_columns(const Row *rows, real *buffer, bint loaded, const real **x, npy_intp *step,
                      const Guess *guesses, Sums *sums) noexcept nogil:
    """The sums of LANES rows; `loaded`: a row is one strip, and x holds it."""
    cdef npy_intp start = 0
    cdef int n = <int> rows[0].length, lane
    for lane in range(LANES):
        clear(&sums[lane])
    while start < rows[0].length:
        if not loaded:
            load_strip(rows, start, buffer, x, step, &n)
        add_columns(&rows[0], x, step, n, guesses, sums)
        start += n


cdef void rows_side_by_side(const Row *rows, int used, double *values, Watch *watch,
                            int *status, real of_type) noexcept nogil:
    """The values of LANES rows, of which the first `used` count. What a lane cannot vouch for is
    left to row_value, so that no row's bits depend on its neighbours."""
    cdef real buffer[MAX_OPERANDS * STRIP * LANES]
    cdef const real *x[MAX_OPERANDS]
    cdef npy_intp step[MAX_OPERANDS]
    cdef int n, lane, attempt
    cdef Guess guesses[LANES]
    cdef Sums sums[LANES]
    cdef bint trusted[LANES]
    cdef bint done[LANES]
    cdef bint again = True, loaded = rows[0].length <= STRIP
    for lane in range(LANES):
        guesses[lane].inverse_temperature = rows[lane].inverse_temperature
        guesses[lane].ratio = 1
        trusted[lane], done[lane] = True, lane >= used
    if rows[0].family == Family.CATEGORICAL:
        guess_logits(rows, buffer, guesses, trusted)
    load_strip(rows, 0, buffer, x, step, &n)
    if rows[0].family == Family.DISCRETE and rows[0].normalize:
        discrete_guess_columns(x, step, n, guesses)
    for attempt in range(MAX_PASSES):
        if not again:
            break
        again = False
        sum_columns(rows, buffer, loaded, x, step, guesses, sums)
        for lane in range(LANES):
            if done[lane] or not trusted[lane]:
                continue
            round_off(&sums[lane])
            trusted[lane] = is_sound(&sums[lane])
            done[lane] = trusted[lane] and finish(&rows[lane], &sums[lane], &values[lane])
            if trusted[lane] and not done[lane]:
                trusted[lane] = refine(&rows[lane], &sums[lane], &guesses[lane], of_type)
                again |= trusted[lane]
    for lane in range(used):
        if not done[lane]:
            values[lane] = row_value(&rows[lane], watch, status, of_type)


cdef void guess_logits(const Row *rows, real *buffer, Guess *guesses,
                       bint *trusted) noexcept nogil:
    """Peaks and shifts of LANES rows; a lane that is not near gets harmless ones."""
    cdef const real *x[2]
    cdef npy_intp step[2]
    cdef npy_intp start = 0
    cdef int n, lane
    cdef Range seen[LANES]
    for lane in range(LANES):
        start_range(&seen[lane])
    while start < rows[0].length:
        load_strip(rows, start, buffer, x, step, &n)
        column_ranges(x, step, n, seen)
        start += n
    for lane in range(LANES):
        trusted[lane] = categorical_guess_lane(seen[lane], &guesses[lane], buffer[0])


# The kernel that the gufuncs carry.

cdef Row row_at(const Batch *batch, npy_intp index, const Kernel *kernel) noexcept nogil:
    cdef Row row
    cdef int operand
    row.family, row.format = kernel.family, kernel.options[0]
    row.normalize = kernel.options[1]
    row.spread_p, row.spread_q = kernel.options[2], kernel.options[3]
    row.n_operands = 4 if row.family == Family.NORMAL else 2
    row.length = batch.core[0]
    for operand in range(row.n_operands):
        row.data[operand] = batch.operands[operand] + index * batch.outer[operand]
        row.step[operand] = batch.inner[operand]
    row.inverse_temperature = 1
    if row.family == Family.CATEGORICAL:
        row.inverse_temperature = 1 / (
            <const double *> (batch.operands[2] + index * batch.outer[2]))[0]
    return row


cdef npy_intp item_size(int format) noexcept nogil:
    return 8 if format == Format.FLOAT64 else 4 if format == Format.FLOAT32 else 2


cdef bint across(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Whether to compute LANES rows side by side."""
    cdef npy_intp size = item_size(kernel.options[0])
    return 0 < batch.core[0] < SHORT_ROW or (
        batch.outer[0] == size and batch.inner[0] != size)


cdef Plan plan_rows(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan
    cdef double element_ns = 0.7 if kernel.options[0] == Format.FLOAT64 else 0.4
    if kernel.family != Family.DISCRETE:
        element_ns *= 2
    plan.row_ns = 20 + batch.core[0] * element_ns
    plan.setup_ns = 0
    plan.group = LANES if across(batch, kernel) else 1
    plan.splits_rows = plan.group == 1
    return plan


cdef int reduce_rows(const Batch *batch, npy_intp first, npy_intp last,
                     const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    cdef int n_inputs = kernel.n_operands - 1
    cdef char *out = batch.operands[n_inputs]
    cdef npy_intp out_step = batch.outer[n_inputs], index
    cdef int status = 0, lane
    cdef Row rows[LANES]
    cdef double values[LANES]
    cdef int used = LANES if across(batch, kernel) else 1
    while first < last:
        for lane in range(used):
            rows[lane] = row_at(batch, min(first + lane, last - 1), kernel)
        if used == 1:
            values[0] = row_value(&rows[0], watch, &status, of_type)
        else:
            rows_side_by_side(
                rows, <int> min(<npy_intp> LANES, last - first), values, watch, &status, of_type)
        for lane in range(<int> min(<npy_intp> used, last - first)):
            if kernel.options[0] == Format.FLOAT64:
                (<double *> (out + (first + lane) * out_step))[0] = values[lane]
            else:
                (<float *> (out + (first + lane) * out_step))[0] = <float> values[lane]
        first += used
    return status


cdef int reduce_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                         const Kernel *kernel, Watch *watch) noexcept nogil:
    return reduce_rows(batch, first, last, kernel, watch, <float> 0)


cdef int reduce_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                         const Kernel *kernel, Watch *watch) noexcept nogil:
    return reduce_rows(batch, first, last, kernel, watch, <double> 0)
