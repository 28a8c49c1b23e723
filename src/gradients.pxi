"""Values and gradients, one row at a time: the row's value by the drivers of rows.pxi, then one
pass more over the row, still in cache, that writes the gradients.

What the pass needs from the row is its Slope, made of the sums that the value was made of. Where
those were not vouched for in float, value and gradients are computed in double, and where not in
double, one element at a time. Elements do not depend on each other: blocks are cut as for sums,
and threads may take pieces of one row in any order.
"""

from gufunc cimport Batch, Kernel, Plan, Watch, look_for_signals
from sums cimport BLOCK, LANES, MAX_OPERANDS, Family, Row, Slope, Sums

ctypedef struct Target:
    int wanted                       # bit i: the gradient with respect to operand i
    char *to[MAX_OPERANDS]
    npy_intp step[MAX_OPERANDS]      # bytes from one element to the next


cdef inline void store_all(int format, const real *x, int n, char *to,
                           npy_intp step) noexcept nogil:
    cdef int i
    if format == Format.FLOAT64:
        for i in range(n):
            (<double *> (to + i * step))[0] = x[i]
    else:
        for i in range(n):
            (<float *> (to + i * step))[0] = <float> x[i]


cdef inline bint writes_in_place(int format, npy_intp step, int n, real of_type) noexcept nogil:
    cdef bint native = (format == Format.FLOAT64) == (sizeof(real) == 8)
    return native and n >= LANES and step == sizeof(real)


cdef void fill_slopes(const Row *row, const Target *target, double value) noexcept nogil:
    cdef int operand
    cdef npy_intp i
    for operand in range(row.n_operands):
        if target.wanted >> operand & 1:
            for i in range(row.length):
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
                store_all(row.format, to[operand], n, into, target.step[operand])
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
        fill_slopes(row, target, 0)
        return True
    if row.family == Family.DISCRETE:
        discrete_slope(row, &sums, ratio, slope, of_type)
    elif row.family == Family.CATEGORICAL:
        categorical_slope(row, &sums, slope)
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
        fill_slopes(row, target, 0 if slope.cotangent == 0 else NAN)
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


cdef inline int gradients_of_rows(const Batch *batch, npy_intp first, npy_intp last,
                                  const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    cdef int status = 0, operand, result, out
    cdef npy_intp index
    cdef Row row
    cdef Slope slope
    cdef Target target
    target.wanted = kernel.wanted
    for index in range(first, last):
        row = row_at(batch, index, kernel)
        result = row.n_operands + (2 if row.family == Family.CATEGORICAL else 1)
        slope.beta, slope.beta_rest = row.inverse_temperature, 0
        if row.family == Family.CATEGORICAL:
            slope.beta_rest = slope.beta * residual_product(
                slope.beta, (<const double *> (batch.operands[2] + index * batch.outer[2]))[0], 1.0)
        slope.cotangent = (<const double *> (
            batch.operands[result - 1] + index * batch.outer[result - 1]))[0]
        out = 0
        for operand in range(row.n_operands):
            if kernel.wanted >> operand & 1:
                out += 1
                target.to[operand] = (
                    batch.operands[result + out] + index * batch.outer[result + out])
                target.step[operand] = batch.inner[row.n_operands + out - 1]
        row_gradient(&row, &slope, &target, watch, &status, of_type)
        store(batch.operands[result] + index * batch.outer[result], row.format, slope.value)
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
    plan.group, plan.splits_rows = 1, True
    return plan
