"""Values and gradients: a row's value as rows.pxi and bands.pxi find it, then one pass more over
the row, still in cache, that writes the gradients. Short rows are computed side by side.

What the pass needs from the row is its Slope, made of the sums that the value was made of. Where
those were not vouched for in float, value and gradients are computed in double, and where not in
double, one element at a time. Elements do not depend on each other: threads may take pieces of one
row in any order.
"""

from gufunc cimport Batch, Kernel, Plan, Watch, is_unwanted, look_for_signals
from libc.string cimport memset
from sums cimport (
    BLOCK, LANES, MAX_OPERANDS, Ahead, Family, LaneParts, Row, Slope, Sums, clear, round_off,
    take_row,
)

cdef enum:
    MAX_CONSTANTS = 8 * LANES    # of LANES rows' slopes, in any family

ctypedef struct Target:
    int wanted                       # bit i: the gradient with respect to operand i
    char *to[MAX_OPERANDS]
    npy_intp step[MAX_OPERANDS]      # bytes from one element to the next


cdef inline void nothing_found(real *found) noexcept nogil:
    """Ranges of nothing, for gap_ranges to widen."""
    fill(found, <real> INFINITY)
    fill(found + LANES, -<real> INFINITY)
    fill(found + 2 * LANES, <real> INFINITY)
    fill(found + 3 * LANES, -<real> INFINITY)


cdef inline void store_all(int format, const real *x, int apart, int n, char *to,
                           npy_intp step) noexcept nogil:
    """n numbers that lie `apart` elements from each other."""
    cdef int i
    if format == Format.FLOAT64:
        for i in range(n):
            (<double *> (to + i * step))[0] = x[i * apart]
    else:
        for i in range(n):
            (<float *> (to + i * step))[0] = <float> x[i * apart]


cdef inline bint writes_in_place(int format, npy_intp step, int n, real of_type) noexcept nogil:
    cdef bint native = (format == Format.FLOAT64) == (sizeof(real) == 8)
    return native and n >= LANES and step == sizeof(real)


cdef void fill_slopes(const Row *row, const Target *target, double value,
                      Watch *watch) noexcept nogil:
    cdef int operand
    cdef npy_intp i
    for operand in range(row.n_operands):
        if target.wanted >> operand & 1:
            for i in range(row.length):
                if is_unwanted(watch, i):
                    return
                store(target.to[operand] + i * target.step[operand], row.format, value)


cdef void slope_stretch(const Row *row, const Slope *slope, const Target *target, npy_intp start,
                        npy_intp stop, real of_type) noexcept nogil:
    """Elements start..stop-1."""
    cdef real buffer[MAX_OPERANDS * (BLOCK + LANES)]
    cdef real slopes[MAX_OPERANDS * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef real *to[MAX_OPERANDS]
    cdef bint in_place[MAX_OPERANDS]
    cdef int n, operand
    cdef char *into
    while start < stop:
        n = block_length(start, stop)
        load_block(row, start, n, buffer, x)
        for operand in range(row.n_operands):
            to[operand] = slopes + operand * (BLOCK + LANES) + max(0, LANES - n)
            in_place[operand] = target.wanted >> operand & 1 and writes_in_place(
                row.format, target.step[operand], n, <real> 0)
            if in_place[operand]:
                to[operand] = <real *> (target.to[operand] + start * target.step[operand])
        if row.family == Family.NORMAL:
            normal_slopes(x, n, row, slope.cotangent, target.wanted, to)
        elif row.family == Family.DISCRETE:
            discrete_slopes(x, n, slope, row.normalize, target.wanted, to)
        else:
            categorical_slopes(x, n, slope, target.wanted, to)
        for operand in range(row.n_operands):
            if target.wanted >> operand & 1 and not in_place[operand]:
                into = target.to[operand] + start * target.step[operand]
                store_all(row.format, to[operand], 1, n, into, target.step[operand])
        start += n


cdef void slope_piece(const Row *row, const Slope *slope, const Target *target, npy_intp piece,
                      Watch *watch, real of_type) noexcept nogil:
    look_for_signals(watch)
    if not watch.stop:
        slope_stretch(row, slope, target, piece * PIECE, row.length if piece + 1 == pieces_of(
            row) else (piece + 1) * PIECE, of_type)


ctypedef struct SlopePieces:
    const Row *row
    const Slope *slope
    const Target *target
    Watch *watch


cdef int slope_piece_f32(void *context, npy_intp i) noexcept nogil:
    cdef const SlopePieces *job = <const SlopePieces *> context
    slope_piece(job.row, job.slope, job.target, i, job.watch, <float> 0)
    return 0


cdef int slope_piece_f64(void *context, npy_intp i) noexcept nogil:
    cdef const SlopePieces *job = <const SlopePieces *> context
    slope_piece(job.row, job.slope, job.target, i, job.watch, <double> 0)
    return 0


cdef void slope_row(const Row *row, const Slope *slope, const Target *target, Watch *watch,
                    real of_type) noexcept nogil:
    cdef npy_intp pieces = pieces_of(row)
    cdef SlopePieces job
    if pieces == 1:
        slope_stretch(row, slope, target, 0, row.length, of_type)
    else:
        job.row, job.slope, job.target, job.watch = row, slope, target, watch
        parallel_for(slope_piece_f32 if real is float else slope_piece_f64, &job, pieces,
                     watch.threads)


cdef bint fast_gradient(const Row *row, Slope *slope, const Target *target, Watch *watch,
                        real of_type) noexcept nogil:
    """Value and gradients by the fast formulas; False when they cannot vouch for them."""
    cdef Sums sums
    cdef double ratio
    if not fast_sums(row, watch, &slope.value, &sums, &ratio, of_type):
        return False
    if watch.stop:
        return True
    if slope.cotangent == 0 or row.length == 1 and row.family != Family.NORMAL and row.normalize:
        fill_slopes(row, target, 0, watch)
        return True
    if row.family == Family.DISCRETE:
        discrete_slope(row, &sums, ratio, slope, of_type)
    elif row.family == Family.CATEGORICAL:
        categorical_slope(row, &sums, slope, of_type)
    slope_row(row, slope, target, watch, of_type)
    return True


cdef void row_gradient(const Row *row, Slope *slope, const Target *target, Watch *watch,
                       int *status, real of_type) noexcept nogil:
    cdef bint decided
    if fast_gradient(row, slope, target, watch, of_type):
        return
    decided = is_decided(row, watch, &slope.value, status)
    if watch.stop:
        return
    if real is float:
        if not decided and fast_gradient(row, slope, target, watch, <double> 0):
            return
    if not decided:
        slope.value = hard_value(row, watch)
    if watch.stop:
        return
    if slope.cotangent == 0 or slope.value != slope.value:
        fill_slopes(row, target, 0 if slope.cotangent == 0 else NAN, watch)
        return
    if row.family == Family.NORMAL:
        normal_hard_slopes(
            row, watch, slope.cotangent, target.wanted, <char **> target.to, target.step)
    elif row.family == Family.DISCRETE:
        discrete_hard_slopes(
            row, watch, slope, target.wanted, <char **> target.to, target.step)
    else:
        categorical_hard_slope(row, watch, slope)
        slope_row(row, slope, target, watch, <double> 0)


cdef inline void start_slope(const Batch *batch, npy_intp index, const Row *row,
                             Slope *slope) noexcept nogil:
    """What the operands after the arrays say: the temperature, the cotangent."""
    cdef int at = row.n_operands
    slope.beta, slope.beta_rest = row.inverse_temperature, 0
    if row.family == Family.CATEGORICAL:
        slope.beta = inverse_temperature(batch, index)
        slope.beta_rest = slope.beta * residual_product(
            slope.beta, (<const double *> (batch.operands[2] + index * batch.outer[2]))[0], 1.0)
        at += 1
    slope.cotangent = (<const double *> (batch.operands[at] + index * batch.outer[at]))[0]


cdef inline int result_of(const Row *row) noexcept nogil:
    """The operand that the value is written to; gradients follow."""
    return row.n_operands + (2 if row.family == Family.CATEGORICAL else 1)


cdef inline void aim(const Batch *batch, npy_intp index, const Row *row, int wanted,
                     Target *target) noexcept nogil:
    cdef int operand, out = 0, result = result_of(row)
    target.wanted = wanted
    for operand in range(row.n_operands):
        if wanted >> operand & 1:
            out += 1
            target.to[operand] = (
                batch.operands[result + out] + index * batch.outer[result + out])
            target.step[operand] = batch.inner[row.n_operands + out - 1]


cdef int gradient_alone(const Batch *batch, npy_intp index, const Kernel *kernel, Watch *watch,
                        real of_type) noexcept nogil:
    cdef int status = 0, result
    cdef Row row = row_at(batch, index, kernel)
    cdef Slope slope
    cdef Target target
    result = result_of(&row)
    start_slope(batch, index, &row, &slope)
    aim(batch, index, &row, kernel.wanted, &target)
    row_gradient(&row, &slope, &target, watch, &status, of_type)
    store(batch.operands[result] + index * batch.outer[result], row.format, slope.value)
    return status


# Short rows, LANES of them side by side.

ctypedef struct Group:
    Band band                   # of one group
    Slope slopes[LANES]
    double values[LANES]
    double conditions[LANES]    # negative: left to gradient_alone


cdef inline void lane_slope(const Row *row, const LaneParts *parts, int lane,
                            Slope *slope, real of_type) noexcept nogil:
    """From the sums of a row that were vouched for."""
    cdef Sums sums
    if row.family == Family.NORMAL:
        return
    clear(&sums)
    take_row(parts, lane, &sums)
    round_off(&sums)
    if row.family == Family.DISCRETE:
        discrete_slope(row, &sums, parts.ratio[lane], slope, of_type)
    elif row.family == Family.CATEGORICAL:
        categorical_slope(row, &sums, slope, of_type)


cdef void sum_group(Group *group, real *buffer, const real **x, npy_intp *step) noexcept nogil:
    """Values and slopes; x, step: where the columns are."""
    cdef const Row *row = &group.band.rows.first
    cdef double before[LANES]
    cdef int lane, attempt
    cdef Ahead ahead
    fill(before, <double> -1)
    begin_band(&group.band)
    sum_band(&group.band, buffer, x, step, rows_ahead(&group.band.rows, &ahead))
    finish_lanes(row, group.band.parts, 1, group.values, group.conditions)
    for attempt in range(2):
        for lane in range(LANES):
            group.slopes[lane].value = group.values[lane]
            if before[lane] < 0 and group.conditions[lane] >= 0:
                lane_slope(row, group.band.parts, lane, &group.slopes[lane], buffer[0])
        if attempt or not can_refine(row) or all_good(group.conditions):
            return
        copy(group.conditions, before)
        refine_band(&group.band, buffer, x, step, group.values, group.conditions)


cdef inline void store_columns(const Target *target, int format, int n, int lane,
                               real **columns_of) noexcept nogil:
    cdef int operand
    for operand in range(MAX_OPERANDS):
        if target.wanted >> operand & 1:
            store_all(format, columns_of[operand] + lane, LANES, n, target.to[operand],
                      target.step[operand])


cdef void slope_columns(const Group *group, int loop, const real **x, const npy_intp *step,
                        int wanted, real **to) noexcept nogil:
    """The gradients of LANES rows, in columns."""
    cdef real constants[MAX_CONSTANTS]
    cdef const Row *row = &group.band.rows.first
    cdef int lane, n = <int> row.length
    if row.family == Family.NORMAL:
        for lane in range(LANES):
            constants[lane] = <real> group.slopes[lane].cotangent
        normal_slope_loop(x, step, n, row, wanted, constants, to)
    elif row.family == Family.DISCRETE:
        discrete_constants(group.slopes, 1, row.normalize, constants)
        discrete_slope_loop(
            row.normalize, wanted, x[0], x[1], step[0], step[1], n, constants, to[0], to[1])
    else:
        slope_constants(group.slopes, 1, constants)
        categorical_slope_loop(
            loop, wanted, x[0], x[1], step[0], step[1], n, constants, to[0], to[1])


cdef void choose_loops(const Group *group, const real **x, const npy_intp *step,
                       int *loops) noexcept nogil:
    """That of each row by itself; there is but one for most families."""
    cdef real found[4 * LANES]
    cdef int lane
    if group.band.rows.first.family != Family.CATEGORICAL:
        for lane in range(LANES):
            loops[lane] = 0
        return
    nothing_found(found)
    gap_ranges(x[0], x[1], step[0], step[1], <int> group.band.rows.first.length, found)
    for lane in range(LANES):
        loops[lane] = slope_loop(
            found[lane], found[LANES + lane], found[2 * LANES + lane], found[3 * LANES + lane],
            &group.slopes[lane], found[0])


cdef int group_gradients(const Batch *batch, npy_intp first, const Kernel *kernel, Watch *watch,
                         Group *group, real of_type) noexcept nogil:
    cdef real buffer[MAX_OPERANDS * STRIP * LANES]
    cdef real slopes[MAX_OPERANDS * SHORT_ROW * LANES]
    cdef const real *x[MAX_OPERANDS]
    cdef real *to[MAX_OPERANDS]
    cdef npy_intp step[MAX_OPERANDS]
    cdef int loops[LANES]
    cdef const Row *row = &group.band.rows.first
    cdef Target target
    cdef int status = 0, lane, operand, loop, done = 0, length = <int> row.length
    cdef int all_lanes = (1 << group.band.rows.used) - 1, result = result_of(row)
    cdef bint constant = length == 1 and row.family != Family.NORMAL and row.normalize
    for operand in range(MAX_OPERANDS):
        to[operand] = slopes + operand * SHORT_ROW * LANES
    sum_group(group, buffer, x, step)
    for lane in range(group.band.rows.used):
        if group.conditions[lane] < 0:
            status |= gradient_alone(batch, first + lane, kernel, watch, of_type)
            done |= 1 << lane
            continue
        store(batch.operands[result] + (first + lane) * batch.outer[result], row.format,
              group.values[lane])
        if group.slopes[lane].cotangent == 0 or constant:
            aim(batch, first + lane, row, kernel.wanted, &target)
            fill_slopes(row, &target, 0, watch)
            done |= 1 << lane
    if done == all_lanes:
        return status
    choose_loops(group, x, step, loops)
    for lane in range(group.band.rows.used):
        if done >> lane & 1:
            continue
        loop = loops[lane]
        slope_columns(group, loop, x, step, kernel.wanted, to)
        for operand in range(lane, group.band.rows.used):
            if loops[operand] == loop and not done >> operand & 1:
                aim(batch, first + operand, row, kernel.wanted, &target)
                store_columns(&target, row.format, length, operand, to)
                done |= 1 << operand
    return status


cdef inline int gradients_in_groups(const Batch *batch, npy_intp first, npy_intp last,
                                    const Kernel *kernel, Watch *watch,
                                    real of_type) noexcept nogil:
    cdef Group group
    cdef Row row
    cdef int status = 0, lane, operand
    for operand in range(MAX_OPERANDS):
        group.band.rows.outer[operand] = batch.outer[operand]
    while first < last:
        row = row_at(batch, first, kernel)
        group.band.rows.first = row
        choose_layout(&group.band.rows, <int> min(<npy_intp> LANES, last - first), of_type)
        for lane in range(LANES):
            memset(&group.slopes[lane], 0, sizeof(Slope))
            group.slopes[lane].weight = 1
            start_slope(batch, first + min(lane, group.band.rows.used - 1), &row,
                        &group.slopes[lane])
            group.band.parts[0].beta[lane] = group.slopes[lane].beta
        status |= group_gradients(batch, first, kernel, watch, &group, of_type)
        first += LANES
    return status


cdef inline int gradients_of_rows(const Batch *batch, npy_intp first, npy_intp last,
                                  const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    cdef int status = 0
    cdef npy_intp index
    if is_short(batch):
        return gradients_in_groups(batch, first, last, kernel, watch, of_type)
    for index in range(first, last):
        status |= gradient_alone(batch, index, kernel, watch, of_type)
    return status


cdef int gradient_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                           const Kernel *kernel, Watch *watch) noexcept nogil:
    return gradients_of_rows(batch, first, last, kernel, watch, <float> 0)


cdef int gradient_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                           const Kernel *kernel, Watch *watch) noexcept nogil:
    return gradients_of_rows(batch, first, last, kernel, watch, <double> 0)


cdef Plan plan_gradients(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan = plan_rows(batch, kernel)
    plan.row_ns = 50 + 2.5 * plan.row_ns
    plan.group = LANES if is_short(batch) else 1
    plan.splits_rows = plan.group == 1
    return plan
