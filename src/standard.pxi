"""Normal distributions beside N(0, I), from means m and log-variances x: the term of a VAE,

    KL = 1/2 sum [phi(x) + m^2],   d/dm = m,   d/dx = expm1(x)/2,

of one exponential and no division, value and gradients in one pass. Short rows, and rows with
values that the formula has no range for, are those of any pair of normals: zeros stand for q.
"""

from vecmath cimport phi_and_expm1

cdef double zeros[SHORT_ROW]

cdef enum:
    OWN_ROW = 64   # from here on, rows with gradients take less time by themselves than as pairs

ctypedef struct StandardJob:
    Row row                     # of two operands
    Target target
    double cotangent
    npy_intp first_piece
    double *parts
    Watch *watch


cdef inline void standard_run(int wanted, const real *m, const real *x, int n, int first,
                              real cotangent, real *to_m, real *to_x, real *farthest,
                              double *sums) noexcept nogil:
    """Add n terms, twice, of each of the lanes first..LANES-1, and write their gradients."""
    cdef int lane, i
    cdef real mean, log_variance, grown, half = cotangent * <real> 0.5
    cdef real run[LANES]
    cdef real far[LANES]
    cdef real slope_m[LANES]
    cdef real slope_x[LANES]
    copy(farthest, far)
    fill(run, <real> 0)
    for i in range(n):
        for lane in range(LANES):
            mean, log_variance = m[i * LANES + lane], x[i * LANES + lane]
            run[lane] += phi_and_expm1(log_variance, &grown) + mean * mean
            far[lane] = larger(larger(log_variance, -log_variance), far[lane])
            if wanted & 1:
                slope_m[lane] = mean * cotangent
            if wanted & 2:
                slope_x[lane] = grown * half
        if wanted & 1:
            copy(slope_m, to_m + i * LANES)
        if wanted & 2:
            copy(slope_x, to_x + i * LANES)
    copy(far, farthest)
    keep_from(first, run)
    fold(run, sums)


cdef inline void standard_runs(int wanted, const real *m, const real *x, int n, int first,
                               real cotangent, real *to_m, real *to_x, real *farthest,
                               double *sums) noexcept nogil:
    cdef int length
    while n > 0:
        length = run_length(n, 1, <real> 0)
        standard_run(wanted, m, x, length, first, cotangent, to_m, to_x, farthest, sums)
        m, x = m + length * LANES, x + length * LANES
        to_m, to_x = to_m + length * LANES, to_x + length * LANES
        n -= length


cdef void standard_loop(int wanted, const real *m, const real *x, int n, int first, real cotangent,
                        real *to_m, real *to_x, real *farthest, double *sums) noexcept nogil:
    if wanted == 0:
        standard_runs(0, m, x, n, first, cotangent, to_m, to_x, farthest, sums)
    elif wanted == 1:
        standard_runs(1, m, x, n, first, cotangent, to_m, to_x, farthest, sums)
    elif wanted == 2:
        standard_runs(2, m, x, n, first, cotangent, to_m, to_x, farthest, sums)
    else:
        standard_runs(3, m, x, n, first, cotangent, to_m, to_x, farthest, sums)


cdef inline double standard_block(int wanted, const real **x, int n, real cotangent,
                                  real **to) noexcept nogil:
    """Of n elements, LANES or more; the last lanes overlap. NaN for what is out of range."""
    cdef double sums[LANES]
    cdef real farthest[LANES]
    cdef npy_intp last = n - LANES
    cdef double highest = 86 if real is float else 706
    fill(sums, <double> 0)
    fill(farthest, <real> 0)
    standard_loop(wanted, x[0], x[1], n // LANES, 0, cotangent, to[0], to[1], farthest, sums)
    if n % LANES:
        standard_loop(wanted, x[0] + last, x[1] + last, 1, LANES - n % LANES, cotangent,
                      to[0] + last, to[1] + last, farthest, sums)
    return across(sums) if largest(farthest) <= highest else NAN


cdef double standard_stretch(const StandardJob *job, npy_intp start, npy_intp stop,
                             real of_type) noexcept nogil:
    """Elements start..stop-1, LANES or more, or none."""
    cdef real buffer[2 * (BLOCK + LANES)]
    cdef real slopes[2 * (BLOCK + LANES)]
    cdef const real *x[MAX_OPERANDS]
    cdef real *to[2]
    cdef bint in_place[2]
    cdef double total = 0, rest = 0
    cdef npy_intp step
    cdef int n, operand, format = job.row.format, wanted = job.target.wanted
    while start < stop:
        n = block_length(start, stop)
        load_block(&job.row, start, n, buffer, x)
        for operand in range(2):
            step = job.target.step[operand]
            to[operand] = slopes + operand * (BLOCK + LANES)
            in_place[operand] = not wanted >> operand & 1
            if not in_place[operand] and writes_in_place(format, step, n, <real> 0):
                to[operand] = <real *> (job.target.to[operand] + start * step)
                in_place[operand] = True
        total = two_sum(
            total, standard_block(wanted, x, n, <real> job.cotangent, to), &rest)
        for operand in range(2):
            if not in_place[operand]:
                step = job.target.step[operand]
                store_all(
                    format, to[operand], 1, n, job.target.to[operand] + start * step, step)
        start += n
    return 0.5 * (total + rest)


cdef inline int standard_piece(void *context, npy_intp i, real of_type) noexcept nogil:
    cdef const StandardJob *job = <const StandardJob *> context
    cdef npy_intp piece = job.first_piece + i
    look_for_signals(job.watch)
    if not job.watch.stop:
        job.parts[i] = standard_stretch(
            job, piece * PIECE, job.row.length if piece + 1 == pieces_of(&job.row) else (
                piece + 1) * PIECE, of_type)
    return 0


cdef int standard_piece_f32(void *context, npy_intp i) noexcept nogil:
    return standard_piece(context, i, <float> 0)


cdef int standard_piece_f64(void *context, npy_intp i) noexcept nogil:
    return standard_piece(context, i, <double> 0)


cdef double standard_row(StandardJob *job, real of_type) noexcept nogil:
    """The value, and the gradients; not finite where they are left to others."""
    cdef double parts[TEAM]
    cdef double total = 0, rest = 0
    cdef npy_intp pieces = pieces_of(&job.row), count, i
    if pieces == 1:
        return standard_stretch(job, 0, job.row.length, of_type)
    job.parts, job.first_piece = parts, 0
    while job.first_piece < pieces and not job.watch.stop:
        count = min(<npy_intp> TEAM, pieces - job.first_piece)
        parallel_for(standard_piece_f32 if real is float else standard_piece_f64, job, count,
                     job.watch.threads)
        if not job.watch.stop:
            for i in range(count):
                total = two_sum(total, parts[i], &rest)
        job.first_piece += count
    return total + rest


ctypedef struct Pair:           # the same rows with operands for q
    Batch batch
    Kernel kernel
    char *operands[MAX_OPERANDS + 4]
    npy_intp outer[MAX_OPERANDS + 4]
    npy_intp inner[MAX_OPERANDS + 2]


cdef inline int beside(int operand) noexcept nogil:
    """Where an operand is once q's are there."""
    return operand if operand < 2 else operand + 2


cdef void as_pair(const Batch *batch, const Kernel *kernel, Pair *pair) noexcept nogil:
    cdef int operand, cores = 2 + (kernel.wanted & 1) + (kernel.wanted >> 1)
    pair.batch, pair.kernel = batch[0], kernel[0]
    pair.kernel.n_operands = kernel.n_operands + 2
    for operand in range(kernel.n_operands):
        pair.operands[beside(operand)] = batch.operands[operand]
        pair.outer[beside(operand)] = batch.outer[operand]
    for operand in range(cores):
        pair.inner[beside(operand)] = batch.inner[operand]
    for operand in range(2, 4):
        pair.operands[operand], pair.outer[operand] = <char *> zeros, 0
        pair.inner[operand] = item_size(kernel.options[0]) if is_short(batch) else 0
    pair.batch.operands, pair.batch.outer, pair.batch.inner = pair.operands, pair.outer, pair.inner


cdef int pair_of_rows(const Pair *pair, npy_intp first, npy_intp last, Watch *watch,
                      real of_type) noexcept nogil:
    if pair.kernel.wanted:
        return gradients_of_rows(&pair.batch, first, last, &pair.kernel, watch, of_type)
    return any_rows(&pair.batch, first, last, &pair.kernel, watch, of_type)


cdef inline void standard_job_at(const Batch *batch, npy_intp index, const Kernel *kernel,
                                 StandardJob *job) noexcept nogil:
    cdef int operand, out = 3
    job.row.family, job.row.format, job.row.n_operands = kernel.family, kernel.options[0], 2
    job.row.length = batch.core[0]
    for operand in range(2):
        job.row.data[operand] = batch.operands[operand] + index * batch.outer[operand]
        job.row.step[operand] = batch.inner[operand]
    job.target.wanted, job.cotangent = kernel.wanted, 1
    if kernel.wanted:
        job.cotangent = (<const double *> (batch.operands[2] + index * batch.outer[2]))[0]
    for operand in range(2):
        if kernel.wanted >> operand & 1:
            out += 1
            job.target.to[operand] = batch.operands[out] + index * batch.outer[out]
            job.target.step[operand] = batch.inner[out - 2]


cdef inline bint are_pairs(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Whether rows are left to the kernels of any pair of normals: short ones."""
    if kernel.wanted and batch.inner[0] == item_size(kernel.options[0]):
        return batch.core[0] < OWN_ROW
    return is_short(batch) or not kernel.wanted and across_rows(batch, kernel)


cdef inline int standard_rows(const Batch *batch, npy_intp first, npy_intp last,
                              const Kernel *kernel, Watch *watch, real of_type) noexcept nogil:
    cdef Pair pair
    cdef StandardJob job
    cdef npy_intp index
    cdef double value
    cdef int status = 0, out = 3 if kernel.wanted else 2
    as_pair(batch, kernel, &pair)
    if are_pairs(batch, kernel):
        return pair_of_rows(&pair, first, last, watch, of_type)
    job.watch = watch
    for index in range(first, last):
        standard_job_at(batch, index, kernel, &job)
        value = standard_row(&job, of_type)
        if value - value == 0 and job.cotangent != 0:
            store(batch.operands[out] + index * batch.outer[out], job.row.format, value)
        else:
            status |= pair_of_rows(&pair, index, index + 1, watch, of_type)
        if watch.stop:
            break
    return status


cdef int standard_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                           const Kernel *kernel, Watch *watch) noexcept nogil:
    return standard_rows(batch, first, last, kernel, watch, <float> 0)


cdef int standard_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                           const Kernel *kernel, Watch *watch) noexcept nogil:
    return standard_rows(batch, first, last, kernel, watch, <double> 0)
