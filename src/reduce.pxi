"""Batches of rows: the kernel that the gufuncs carry. Short rows and columns go side by side, longer
ones LANES in turn, finished side by side; what is left over is computed again, each row by itself.
"""

from numpy cimport npy_intp
from gufunc cimport Batch, Kernel, Plan, Watch, thread_limit
from sums cimport (
    LANES, MAX_GROUPS, MAX_OPERANDS, SHORT_ROW, SHORTER_ROW, STRIP, Family, Format, LaneParts, Row,
    Sums, clear_lanes, fill,
)
from vecmath cimport real


cdef inline double inverse_temperature(const Batch *batch, npy_intp index) noexcept nogil:
    return 1 / (<const double *> (batch.operands[2] + index * batch.outer[2]))[0]


cdef inline void point_at(Row *row, const Batch *batch, npy_intp index) noexcept nogil:
    """Turn to another row of the same batch."""
    cdef int operand
    for operand in range(row.n_operands):
        row.data[operand] = batch.operands[operand] + index * batch.outer[operand]
    if row.family == Family.CATEGORICAL:
        row.inverse_temperature = inverse_temperature(batch, index)


cdef inline int row_operands(const Kernel *kernel) noexcept nogil:
    """Those that have a row's elements."""
    return 4 if kernel.family == Family.NORMAL else 2


cdef inline Row row_at(const Batch *batch, npy_intp index, const Kernel *kernel) noexcept nogil:
    cdef Row row
    cdef int operand
    row.family, row.format = kernel.family, kernel.options[0]
    row.normalize = kernel.options[1]
    row.spread_p, row.spread_q = kernel.options[2], kernel.options[3]
    row.n_operands = row_operands(kernel)
    row.length = batch.core[0]
    for operand in range(row.n_operands):
        row.step[operand], row.outer[operand] = batch.inner[operand], batch.outer[operand]
    row.inverse_temperature = 1
    point_at(&row, batch, index)
    return row


cdef npy_intp item_size(int format) noexcept nogil:
    return 8 if format == Format.FLOAT64 else 4 if format == Format.FLOAT32 else 2


cdef inline bint is_short(const Batch *batch) noexcept nogil:
    """For logits, elements that lie apart and gradients of any pair; values of others are up to
    SHORTER_ROW."""
    return 0 < batch.core[0] < SHORT_ROW


cdef bint across_rows(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Whether to compute LANES rows side by side."""
    cdef npy_intp size = item_size(kernel.options[0])
    cdef bint ready = batch.inner[0] == size and kernel.family != Family.CATEGORICAL
    return 0 < batch.core[0] < (SHORTER_ROW if ready else SHORT_ROW) or (
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


cdef inline bint lie_in_columns(const Batch *batch, const Kernel *kernel,
                                real of_type) noexcept nogil:
    """Whether all operands' rows are neighbouring columns."""
    cdef int operand
    if batch.n < LANES or kernel.options[0] != native_format(of_type):
        return False
    for operand in range(row_operands(kernel)):
        if batch.outer[operand] != sizeof(real):
            return False
    return True


cdef inline bint are_read_in_place(const Batch *batch, const Kernel *kernel,
                                   real of_type) noexcept nogil:
    return batch.core[0] > STRIP and lie_in_columns(batch, kernel, of_type)


cdef inline npy_intp next_line(const Batch *batch, npy_intp first) noexcept nogil:
    """The column from `first` on at which a line of the cache begins, or a vector, if that is
    shorter: what lies across two lines is fetched twice where rows are long, and takes half again
    as long."""
    cdef size_t size = batch.outer[0]
    cdef size_t line = min(<size_t> 64 // size, <size_t> LANES)
    return first + <npy_intp> (-(<size_t> batch.operands[0] // size + first) % line)


cdef inline npy_intp begin_of(const Batch *batch, npy_intp first) noexcept nogil:
    """Where tasks of long columns begin and end: at lines."""
    return min(next_line(batch, first), batch.n) if first > 0 else 0


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


cdef void sum_copies(const Row *row, const Batch *batch, int used, const double *conditions,
                     LaneParts *parts, real of_type) noexcept nogil:
    """The sums of neighbouring rows of LANES to BLOCK elements, as many at a time as a buffer
    holds."""
    cdef real buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef npy_intp outer[MAX_OPERANDS]
    cdef int n = <int> row.length, operand, lane, begin = 0, end
    cdef real *into
    while begin < used:
        end = min(begin + BLOCK // n, used)
        for operand in range(row.n_operands):
            into = buffer + operand * (BLOCK + LANES)
            x[operand], outer[operand] = into - begin * n, n * sizeof(real)  # of lane 0
            for lane in range(begin, end):
                if conditions[lane] < 0:
                    convert(row.format, row.data[operand] + lane * batch.outer[operand],
                            row.step[operand], n, into)
                into += n
        rows_of_block(row, x, outer, n, begin, end, conditions, parts)
        begin = end


cdef inline bint sum_together(const Row *row, const Batch *batch, int used,
                              const double *conditions, LaneParts *parts,
                              real of_type) noexcept nogil:
    """The sums of neighbouring rows, each of which is one block; False if they are not."""
    cdef const real *x[MAX_OPERANDS]
    cdef int n = block_length(0, row.length, most_together(True, of_type))
    if row.family == Family.CATEGORICAL or n != row.length:
        return False
    if find_block(row, 0, n, x):
        rows_of_block(row, x, batch.outer, n, 0, used, conditions, parts)
        return True
    if not LANES <= n <= BLOCK:
        return False
    sum_copies(row, batch, used, conditions, parts, of_type)
    return True


cdef void sum_each(Row *row, const Batch *batch, npy_intp first, int used,
                   const double *conditions, Watch *watch, LaneParts *parts,
                   real of_type) noexcept nogil:
    """The sums of neighbouring rows, of those with a negative condition."""
    cdef Sums sums
    cdef int lane
    point_at(row, batch, first)
    if sum_together(row, batch, used, conditions, parts, of_type):
        return
    for lane in range(used):
        if conditions[lane] < 0:
            point_at(row, batch, first + lane)
            sum_row(row, parts.ratio[lane], watch, &sums, of_type)
            keep_sums(&sums, lane, parts)


cdef inline int rows_in_turn(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    """LANES rows, each of one block, are summed in one call, others one after the other; either
    are finished side by side."""
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
        for lane in range(used, LANES):  # where there is no row
            conditions[lane] = 0
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
    """All columns that are read in place; copied ones, as those of logits are in any case, as many
    as the buffer holds; short rows, as many as the first cache holds easily, beside those that were
    asked for. Of normals, few: while terms are added up, none comes from memory."""
    if are_read_in_place(batch, kernel, of_type) and kernel.family != Family.CATEGORICAL:
        return MAX_GROUPS
    if lie_in_columns(batch, kernel, of_type):
        return most_copied(row_operands(kernel), max(<npy_intp> 1, batch.core[0]), of_type)
    cdef npy_intp length = max(<npy_intp> 1, batch.core[0])
    cdef npy_intp most = 20 if kernel.family == Family.NORMAL else STRIP // 2
    return <int> max(<npy_intp> 1, min(<npy_intp> MAX_GROUPS, most // length))


cdef inline int rows_in_bands(const Batch *batch, npy_intp first, npy_intp last,
                              const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    cdef int status = 0, operand, group, used, at
    cdef npy_intp following
    cdef bint in_place = are_read_in_place(batch, kernel, of_type)
    cdef Band band
    cdef Rows *rows = &band.rows
    cdef double values[MAX_GROUPS * LANES]
    cdef double conditions[MAX_GROUPS * LANES]
    cdef npy_intp most = most_groups(batch, kernel, of_type) * LANES
    rows.first, rows.used = row_at(batch, first, kernel), 0
    for operand in range(MAX_OPERANDS):
        rows.outer[operand] = batch.outer[operand]
    if in_place:
        first, last = begin_of(batch, first), begin_of(batch, last)
    while first < last:
        if last - first < LANES and batch.n >= LANES and not is_short(batch):
            first = last - LANES  # whole vectors: some rows are computed twice
        used = <int> min(most, last - first)
        used = used // LANES * LANES if used > LANES else used
        following = first + used
        if in_place and following < last and next_line(batch, first) > first:
            used, following = LANES, next_line(batch, first)
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
        first = following
    return status


cdef inline int any_rows(const Batch *batch, npy_intp first, npy_intp last, const Kernel *kernel,
                         Watch *watch, real of_type) noexcept nogil:
    if across_rows(batch, kernel):
        return rows_in_bands(batch, first, last, kernel, watch, of_type)
    return rows_in_turn(batch, first, last, kernel, watch, of_type)


cdef int reduce_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                         const Kernel *kernel, Watch *watch) noexcept nogil:
    return any_rows(batch, first, last, kernel, watch, <float> 0)


cdef int reduce_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                         const Kernel *kernel, Watch *watch) noexcept nogil:
    return any_rows(batch, first, last, kernel, watch, <double> 0)
