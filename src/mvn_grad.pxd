"""Gradients of KL(N_p || N_q), multivariate normals, from lower Cholesky factors or covariances.

With Y = L_q^-1 (L_p - L_q), diagonal y, M = I + Y = L_q^-1 L_p, z = L_q^-1 (mu_p - mu_q) and
T = tril(L_q^-T Y), everything is a product with Y or z, so that nothing cancels near P = Q:

    mu_p   L_q^-T z                             mu_q   minus that
    L_p    T + diag(y / diag L_p)
    L_q    -tril(T M^T + L_q^-T z z^T) - diag(y / diag L_q)
    S_p    1/2 L_p^-T (Y + Y^T + Y^T Y) L_p^-1
    S_q    -1/2 L_q^-T (Y + Y^T + Y Y^T + z z^T) L_q^-1

The two brackets, symmetric, are tril(M^T Y) + diag(y) and tril(Y M^T + z z^T) + diag(y) below. All
is computed in double. The gradient of an item whose divergence is NaN is NaN.

As for the values, matrices of up to LANES_LIMIT rows lie side by side, one in a SIMD lane each;
larger ones are taken one at a time. [z | Y] are the columns of one matrix: column j of Y is its
column j + 1.
"""

from cython.parallel cimport prange
from libc.math cimport NAN, isfinite, isnan
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from numpy cimport npy_intp

from gufunc cimport (
    NO_MEMORY, Batch, Kernel, Plan, Watch, look_for_signals, omp_get_thread_num)
from mvn cimport (
    COLUMNS, LANES, LANES_LIMIT, LARGE, MOST_LANES, MOST_ROWS, ROWS, Panels, Side, aligned,
    cholesky, divergence, lanes_cholesky, lanes_diagonal, lanes_divergence, lanes_improper,
    lanes_reciprocals, lanes_whiten, lanes_whiten_standard, ones, panels_improper,
    panels_new, reciprocals, settle, side, solve, vec)
from vecmath cimport real

cdef extern from "mvn_grad.h" nogil:
    void lanes_read_f32 "mvn_lanes_read_f32"(
        vec *a, char *const *at, npy_intp offset, npy_intp step, npy_intp count, npy_intp size)
    void lanes_read_f64 "mvn_lanes_read_f64"(
        vec *a, char *const *at, npy_intp offset, npy_intp step, npy_intp count, npy_intp size)
    void lanes_write_f32 "mvn_lanes_write_f32"(
        const vec *a, char *const *at, npy_intp offset, npy_intp step, npy_intp count)
    void lanes_write_f64 "mvn_lanes_write_f64"(
        const vec *a, char *const *at, npy_intp offset, npy_intp step, npy_intp count)
    void lanes_back "mvn_lanes_back"(
        const vec *b, const vec *factor, const vec *reciprocal, vec *x, npy_intp stride, npy_intp n,
        npy_intp reach, npy_intp columns)
    void lanes_times "mvn_lanes_times"(
        const vec *a, const vec *y, vec *product, npy_intp stride, npy_intp n)
    void lanes_gram "mvn_lanes_gram"(const vec *y, vec *product, npy_intp stride, npy_intp n)
    void lanes_add_diagonal "mvn_lanes_add_diagonal"(
        vec *a, const vec *diagonal, npy_intp stride, npy_intp n)
    void lanes_congruence "mvn_lanes_congruence"(
        vec *s, vec *room, const vec *factor, const vec *reciprocal, npy_intp stride, npy_intp n)
    void lanes_triangle "mvn_lanes_triangle"(
        const vec *a, const vec *d, vec scale, vec *into, npy_intp stride, npy_intp n)
    void lanes_symmetric "mvn_lanes_symmetric"(
        const vec *s, vec scale, vec *into, npy_intp stride, npy_intp n)
    void lanes_scale "mvn_lanes_scale"(
        const vec *x, npy_intp stride, vec scale, vec *into, npy_intp n)
    void lanes_multiply "mvn_lanes_multiply"(
        const vec *x, const vec *y, vec *product, npy_intp n)
    void panels_back "mvn_panels_back"(
        double *x, npy_intp size, npy_intp panels, const double *l, npy_intp stride,
        const double *reciprocal, npy_intp n, npy_intp begin, npy_intp step)
    void panel_subtract "mvn_panel_subtract"(
        double *x, const double *p, const double *q, npy_intp stride, npy_intp first, npy_intp n)
    void rows_times "mvn_rows_times"(
        const double *a, npy_intp size, const double *b, npy_intp stride, npy_intp i, npy_intp n,
        double *into, npy_intp stride_into)
    void rows_gram "mvn_rows_gram"(
        const double *a, npy_intp size, const double *m, npy_intp stride, npy_intp i, npy_intp n,
        double *into, npy_intp stride_into)
    void panels_row "mvn_panels_row"(
        const double *x, npy_intp size, npy_intp i, npy_intp count, double *row)
    void panels_put "mvn_panels_put"(
        double *x, npy_intp size, npy_intp i, npy_intp count, const double *row)
    void panels_mirror "mvn_panels_mirror"(double *x, npy_intp size, npy_intp n)
    void panels_transpose "mvn_panels_transpose"(
        double *x, npy_intp size, double *into, npy_intp n)
    void panel_rows "mvn_panel_rows"(
        const double *x, double *rows, npy_intp stride, npy_intp first, npy_intp n)
    void line_read_f32 "mvn_line_read_f32"(
        double *line, const char *start, npy_intp step, npy_intp count)
    void line_read_f64 "mvn_line_read_f64"(
        double *line, const char *start, npy_intp step, npy_intp count)
    void line_write_f32 "mvn_line_write_f32"(
        const double *line, char *to, npy_intp step, double scale, npy_intp count, npy_intp n)
    void line_write_f64 "mvn_line_write_f64"(
        const double *line, char *to, npy_intp step, double scale, npy_intp count, npy_intp n)

cdef enum:
    TOGETHER = 8       # panels that are solved together

# Bits of `wanted`, in the order of the arguments.
cdef enum:
    LOC_P = 1
    MATRIX_P = 2
    LOC_Q = 4
    MATRIX_Q = 8

ctypedef struct Gradient:  # one gradient of every item; strides in bytes
    char *data
    npy_intp outer, row, column

ctypedef struct Results:
    int wanted
    bint cov_p, cov_q
    char *cotangent
    npy_intp cotangent_outer
    char *kl
    npy_intp kl_outer
    Gradient loc_p, matrix_p, loc_q, matrix_q


cdef inline void take_gradient(const Batch *batch, Gradient *g, bint wanted, bint matrix,
                               npy_intp *operand, npy_intp *inner) noexcept nogil:
    if wanted:
        g.data, g.outer = batch.operands[operand[0]], batch.outer[operand[0]]
        g.row = batch.inner[inner[0]]
        g.column = batch.inner[inner[0] + 1] if matrix else 0
        operand[0] += 1
        inner[0] += 2 if matrix else 1


cdef inline Results results(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Where results go: the divergence, then gradients in the order of the inputs; behind those is
    the cotangent."""
    cdef Results r
    cdef bint standard = kernel.options[2]
    cdef npy_intp inputs = 2 if standard else 4, inner = 3 if standard else 6, operand = inputs + 2
    r.wanted, r.cov_p, r.cov_q = kernel.wanted, kernel.options[0], kernel.options[1]
    r.cotangent, r.cotangent_outer = batch.operands[inputs], batch.outer[inputs]
    r.kl, r.kl_outer = batch.operands[inputs + 1], batch.outer[inputs + 1]
    take_gradient(batch, &r.loc_p, r.wanted & LOC_P, False, &operand, &inner)
    take_gradient(batch, &r.matrix_p, r.wanted & MATRIX_P, True, &operand, &inner)
    take_gradient(batch, &r.loc_q, r.wanted & LOC_Q, False, &operand, &inner)
    take_gradient(batch, &r.matrix_q, r.wanted & MATRIX_Q, True, &operand, &inner)
    return r


cdef inline double finish(const Results *r, double kl, bint improper, const Side *p, const Side *q,
                          npy_intp item, npy_intp n, int *status, real type_tag) noexcept nogil:
    """Write the divergence; by what to multiply the gradients: the cotangent, NaN for bad items."""
    cdef double cotangent = (<double *> (r.cotangent + item * r.cotangent_outer))[0]
    if not isfinite(kl):
        status[0] |= settle(&kl, improper, p, q, item, n, type_tag)
    (<real *> (r.kl + item * r.kl_outer))[0] = <real> kl
    return NAN if isnan(kl) and cotangent != 0 else cotangent


cdef inline void blank(const Gradient *g, npy_intp item, npy_intp rows, npy_intp columns,
                       real type_tag) noexcept nogil:
    cdef npy_intp i, j
    for i in range(rows):
        for j in range(columns):
            (<real *> (g.data + item * g.outer + i * g.row + j * g.column))[0] = 0


cdef inline void blank_all(const Results *r, npy_intp item, npy_intp n,
                           real type_tag) noexcept nogil:
    """Zeros: where the cotangent is 0, also for what is not finite."""
    if r.wanted & LOC_P:
        blank(&r.loc_p, item, n, 1, type_tag)
    if r.wanted & MATRIX_P:
        blank(&r.matrix_p, item, n, n, type_tag)
    if r.wanted & LOC_Q:
        blank(&r.loc_q, item, n, 1, type_tag)
    if r.wanted & MATRIX_Q:
        blank(&r.matrix_q, item, n, n, type_tag)


# ---- lanes ------------------------------------------------------------------------------------

cdef inline void lanes_read(vec *a, char *const *at, npy_intp offset, npy_intp step, npy_intp count,
                            npy_intp size, real type_tag) noexcept nogil:
    if real is float:
        lanes_read_f32(a, at, offset, step, count, size)
    else:
        lanes_read_f64(a, at, offset, step, count, size)


cdef inline void lanes_write(const vec *a, char *const *at, npy_intp offset, npy_intp step,
                             npy_intp count, real type_tag) noexcept nogil:
    if real is float:
        lanes_write_f32(a, at, offset, step, count)
    else:
        lanes_write_f64(a, at, offset, step, count)


cdef inline void lanes_clear(vec *a, npy_intp stride, npy_intp n) noexcept nogil:
    """Zeros right of the diagonal, where reading went four by four."""
    cdef npy_intp i
    for i in range(n):
        memset(a + i * stride + i + 2, 0, min(<npy_intp> 4, stride - i - 2) * sizeof(vec))


cdef inline void lanes_side(vec *a, const Side *s, npy_intp first, npy_intp last, npy_intp n,
                            npy_intp stride, bint loc_only, real type_tag) noexcept nogil:
    """[mu | L] of the items from `first` on; beyond the last one, the last one again.

    An odd number of rows gets one more, of an identity matrix: it adds nothing.
    """
    cdef char *loc[MOST_LANES]
    cdef char *matrix[MOST_LANES]
    cdef npy_intp i, lane, item
    for lane in range(LANES):
        item = min(first + lane, last - 1)
        loc[lane] = s.loc + item * s.loc_outer
        matrix[lane] = s.matrix + item * s.matrix_outer
    if not loc_only:
        for i in range(n):
            lanes_read(a + i * stride + 1, matrix, i * s.row, s.column, i + 1, n, type_tag)
        if n % 2 == 1:
            memset(a + n * stride, 0, (n + 1) * sizeof(vec))
            a[n * stride + n + 1] = ones()
        lanes_clear(a, stride, n + n % 2)
    for i in range(n):
        lanes_read(a + i * stride, loc, i * s.loc_inner, 0, 1, 1, type_tag)


cdef inline void lanes_store(const Gradient *g, const vec *a, npy_intp stride, npy_intp first,
                             npy_intp last, npy_intp n, real type_tag) noexcept nogil:
    cdef char *at[MOST_LANES]
    cdef npy_intp i, lane
    for lane in range(LANES):
        at[lane] = g.data + min(first + lane, last - 1) * g.outer
    for i in range(n):
        lanes_write(a + i * stride, at, i * g.row, g.column, n, type_tag)


cdef inline void lanes_store_loc(const Gradient *g, const vec *a, npy_intp first, npy_intp last,
                                 npy_intp n, real type_tag) noexcept nogil:
    cdef char *at[MOST_LANES]
    cdef npy_intp lane
    for lane in range(LANES):
        at[lane] = g.data + min(first + lane, last - 1) * g.outer
    lanes_write(a, at, 0, g.row, n, type_tag)


ctypedef struct Lanes:
    # Scratch of one thread: matrices of `square` and columns of `line` numbers.
    void *memory
    npy_intp n, even, stride
    vec *factor_p        # [mu | L]
    vec *factor_q
    vec *y               # [z | Y]
    vec *t               # L_q^-T [z | Y], lower triangle
    vec *s
    vec *room
    vec *reciprocal_p
    vec *reciprocal_q
    vec *diagonal_p
    vec *diagonal_q
    vec *diagonal_y
    vec *diagonal        # what a gradient's diagonal gets
    vec *column


cdef inline bint lanes_new(Lanes *a, npy_intp n) noexcept nogil:
    cdef npy_intp even = n + n % 2, stride = (even + 4) // 4 * 4
    cdef npy_intp square = (even + 2) * stride, i
    a.memory = malloc((6 * square + 7 * even) * sizeof(vec) + 64)
    if a.memory == NULL:
        return False
    a.n, a.even, a.stride = n, even, stride
    a.factor_p = <vec *> aligned(a.memory)
    a.factor_q = a.factor_p + square
    a.y = a.factor_q + square
    a.t = a.y + square
    a.s = a.t + square
    a.room = a.s + square
    a.reciprocal_p = a.room + square
    a.reciprocal_q = a.reciprocal_p + even
    a.diagonal_p = a.reciprocal_q + even
    a.diagonal_q = a.diagonal_p + even
    a.diagonal_y = a.diagonal_q + even
    a.diagonal = a.diagonal_y + even
    a.column = a.diagonal + even
    memset(a.factor_p, 0, 6 * square * sizeof(vec))
    for i in range(even):
        a.diagonal_q[i] = ones()
        a.reciprocal_q[i] = ones()
    return True


cdef inline void lanes_factor(const Lanes *a, vec *factor, vec *reciprocal, vec *diagonal,
                              const Side *s, npy_intp first, npy_intp last, bint fresh,
                              real type_tag) noexcept nogil:
    """One side's [mu | L] and what belongs to it; not `fresh`: only mu is another."""
    lanes_side(factor, s, first, last, a.n, a.stride, not fresh, type_tag)
    if fresh:
        if s.covariance:
            lanes_cholesky(factor, reciprocal, a.stride, a.even)
        else:
            lanes_reciprocals(factor, reciprocal, a.stride, a.even)
        lanes_diagonal(factor, diagonal, a.stride, a.even)


cdef inline void lanes_gradients(const Lanes *a, const Results *r, const Side *q, vec scale,
                                 npy_intp first, npy_intp last, real type_tag) noexcept nogil:
    cdef npy_intp n = a.n, even = a.even, stride = a.stride
    cdef bint cov_p = r.cov_p, cov_q = r.cov_q
    cdef vec *t = a.y if q == NULL else a.t
    cdef bint triangles = (r.wanted & MATRIX_P and not cov_p) or (r.wanted & MATRIX_Q and not cov_q)
    if q != NULL and (triangles or r.wanted & (LOC_P | LOC_Q)):
        lanes_back(a.y, a.factor_q, a.reciprocal_q, t, stride, even, 1, even + 1 if triangles else 1)
    if r.wanted & LOC_P:
        lanes_scale(t, stride, scale, a.column, n)
        lanes_store_loc(&r.loc_p, a.column, first, last, n, type_tag)
    if r.wanted & LOC_Q:
        lanes_scale(t, stride, -scale, a.column, n)
        lanes_store_loc(&r.loc_q, a.column, first, last, n, type_tag)
    if r.wanted & MATRIX_P:
        if cov_p:
            lanes_gram(a.y, a.s, stride, even)
            lanes_add_diagonal(a.s, a.diagonal_y, stride, even)
            lanes_congruence(a.s, a.room, a.factor_p, a.reciprocal_p, stride, even)
            lanes_symmetric(a.s, 0.5 * scale, a.room, stride, n)
        else:
            lanes_multiply(a.diagonal_y, a.reciprocal_p, a.diagonal, n)
            lanes_triangle(t + 1, a.diagonal, scale, a.room, stride, n)
        lanes_store(&r.matrix_p, a.room, stride, first, last, n, type_tag)
    if r.wanted & MATRIX_Q:
        if cov_q:
            lanes_times(a.y, a.y, a.s, stride, even)
            lanes_add_diagonal(a.s, a.diagonal_y, stride, even)
            lanes_congruence(a.s, a.room, a.factor_q, a.reciprocal_q, stride, even)
            lanes_symmetric(a.s, -0.5 * scale, a.room, stride, n)
        else:
            lanes_times(t, a.y, a.s, stride, even)
            lanes_multiply(a.diagonal_y, a.reciprocal_q, a.diagonal, n)
            lanes_triangle(a.s, a.diagonal, -scale, a.room, stride, n)
        lanes_store(&r.matrix_q, a.room, stride, first, last, n, type_tag)


cdef inline int lanes_gradient_rows(npy_intp first, npy_intp last, const Side *p, const Side *q,
                                    const Results *r, npy_intp n, real type_tag) noexcept nogil:
    cdef Lanes a
    cdef vec squares, scale
    cdef double kl[MOST_LANES]
    cdef npy_intp group, lane, item
    cdef bint improper
    cdef int status = 0
    if not lanes_new(&a, n):
        return NO_MEMORY
    for group from first <= group < last by LANES:
        if q != NULL:
            lanes_factor(&a, a.factor_q, a.reciprocal_q, a.diagonal_q, q, group, last,
                         group == first or not q.shared, type_tag)
        lanes_factor(&a, a.factor_p, a.reciprocal_p, a.diagonal_p, p, group, last,
                     group == first or not p.shared, type_tag)
        if q == NULL:
            lanes_whiten_standard(a.factor_p, a.y, &squares, a.stride, a.even)
            lanes_copy_below(&a)
        else:
            lanes_whiten(a.factor_p, a.factor_q, a.reciprocal_q, a.y, &squares, a.stride, a.even)
        lanes_diagonal(a.y, a.diagonal_y, a.stride, a.even)
        lanes_diagonal(a.y, a.diagonal, a.stride, a.even)
        lanes_divergence(<double *> a.diagonal_p, <double *> a.diagonal_q, <double *> a.diagonal,
                         <double *> &squares, a.even, kl)
        for lane in range(LANES):
            item = min(group + lane, last - 1)
            improper = not isfinite(kl[lane]) and lanes_improper(
                <double *> a.diagonal_p, <double *> a.diagonal_q, lane, n)
            (<double *> &scale)[lane] = finish(r, kl[lane], improper, p, q, item, n, &status,
                                               type_tag)
        lanes_gradients(&a, r, q, scale, group, last, type_tag)
        for lane in range(min(<npy_intp> LANES, last - group)):
            if (<double *> &scale)[lane] == 0:
                blank_all(r, group + lane, n, type_tag)
    free(a.memory)
    return status


cdef inline void lanes_copy_below(const Lanes *a) noexcept nogil:
    """[mu_p | L_p - I] below the diagonal, which is there already."""
    cdef npy_intp i, j
    for i in range(a.even):
        for j in range(i + 1):
            a.y[i * a.stride + j] = a.factor_p[i * a.stride + j]


# ---- panels -----------------------------------------------------------------------------------

ctypedef struct Work:
    # Scratch for one matrix, beside that of the factors.
    void *memory
    npy_intp n, rows         # rows, and rows up to whole tiles
    npy_intp panels, size    # panels of [z | Y], and elements from one to the next
    npy_intp stride          # from one row of `m` and `line` to the next
    double *x                # [z | Y], then L_q^-T [z | Y], in panels
    double *m                # [z | M]^T in rows
    double *s                # symmetric matrices in panels
    double *room
    double *reciprocal_p
    double *reciprocal_q
    double *line             # COLUMNS rows for each thread


cdef inline bint work_new(Work *w, npy_intp n, npy_intp size, bint covariances,
                          int threads) noexcept nogil:
    w.n, w.rows = n, (n + COLUMNS - 1) // COLUMNS * COLUMNS
    w.panels, w.size = w.rows // ROWS + 1, size
    w.stride = (w.panels + 1) * ROWS
    cdef npy_intp square = w.panels * size, rows = w.panels * ROWS * w.stride
    cdef npy_intp length = (3 if covariances else 1) * square + rows
    length += (2 + (COLUMNS + 1) * threads) * w.stride
    cdef npy_intp i
    w.memory = calloc(length + 8, sizeof(double))
    if w.memory == NULL:
        return False
    w.x = aligned(w.memory)
    w.s = w.x + square
    w.room = w.s + square
    w.m = w.x + (3 if covariances else 1) * square
    w.reciprocal_p = w.m + rows
    w.reciprocal_q = w.reciprocal_p + w.stride
    w.line = w.reciprocal_q + w.stride
    for i in range(w.stride):
        w.reciprocal_q[i] = 1.0
    return True


cdef inline void line_read(double *line, const char *start, npy_intp step, npy_intp count,
                           real type_tag) noexcept nogil:
    if real is float:
        line_read_f32(line, start, step, count)
    else:
        line_read_f64(line, start, step, count)


cdef inline void line_write(const double *line, char *to, npy_intp step, double scale,
                            npy_intp count, npy_intp n, real type_tag) noexcept nogil:
    if real is float:
        line_write_f32(line, to, step, scale, count, n)
    else:
        line_write_f64(line, to, step, scale, count, n)


cdef inline void load_matrix(double *rows, npy_intp stride, const Side *s, npy_intp item,
                             npy_intp n, npy_intp padded, real type_tag) noexcept nogil:
    """The lower triangle of a factor, continued by an identity."""
    cdef char *matrix = s.matrix + item * s.matrix_outer
    cdef npy_intp i
    for i in range(n):
        line_read(rows + i * stride, matrix + i * s.row, s.column, i + 1, type_tag)
    for i in range(n, padded):
        rows[i * (stride + 1)] = 1.0


cdef inline void load_loc(double *rows, npy_intp stride, const Side *s, npy_intp item,
                          npy_intp n, real type_tag) noexcept nogil:
    cdef npy_intp i
    for i in range(n):
        rows[i * stride] = (<real *> (s.loc + item * s.loc_outer + i * s.loc_inner))[0]


cdef inline void panels_factor(const Panels *a, double *factor, double *diagonal,
                               double *reciprocal, const Side *s, npy_intp item, bint fresh,
                               Watch *watch, real type_tag) noexcept nogil:
    """One side's [mu | L], with zeros above the diagonal; not `fresh`: only mu is another."""
    cdef npy_intp i, j
    cdef double *rows = factor + 1
    load_loc(factor, a.stride, s, item, a.n, type_tag)
    if not fresh:
        return
    if s.covariance:
        cholesky(a, s, item, rows, watch, type_tag)
        for i in range(a.padded):
            for j in range(i + 1, i // ROWS * ROWS + ROWS):
                rows[i * a.stride + j] = 0.0
    else:
        load_matrix(rows, a.stride, s, item, a.n, a.padded, type_tag)
    for i in range(a.padded):
        diagonal[i] = rows[i * (a.stride + 1)]
    reciprocals(diagonal, reciprocal, a.padded)


cdef inline bint is_stopped(const Panels *a, Watch *watch) noexcept nogil:
    """Looks for signals within a large matrix."""
    if a.n >= LARGE:
        look_for_signals(watch)
    return watch.stop


cdef inline double whiten_panels(const Panels *a, const Work *w, npy_intp index, bint standard,
                                 Watch *watch) noexcept nogil:
    """[z | Y] in some panels from number `index` on and, in rows, its transpose; |z|^2 + |Y|^2."""
    cdef npy_intp panels = min(<npy_intp> TOGETHER, w.panels - index)
    cdef npy_intp begin = index * ROWS - COLUMNS, first, g, r, i
    cdef double squares[2 * MOST_ROWS]
    cdef double total = 0.0
    cdef double *x = w.x + index * w.size
    if is_stopped(a, watch):
        return 0.0
    for r in range(2 * ROWS):
        squares[r] = 0.0
    for g in range(panels):
        first = max(begin + g * ROWS, <npy_intp> 0)
        panel_subtract(x + g * w.size, a.factor_p + (index + g) * ROWS,
                       a.factor_q + (index + g) * ROWS, a.stride, first, w.rows)
    if standard:
        for g in range(panels):
            for i in range(max(begin + g * ROWS, <npy_intp> 0) * ROWS, w.rows * ROWS):
                total += x[g * w.size + i] * x[g * w.size + i]
    else:
        solve(a, x, panels, a.factor_q + 1, a.stride, w.rows, w.reciprocal_q, begin, ROWS,
              max(begin, <npy_intp> 0), w.rows, squares, watch)
        for r in range(2 * ROWS):
            total += squares[r]
    for g in range(panels):
        panel_rows(x + g * w.size, w.m + (index + g) * ROWS * w.stride, w.stride,
                   max(begin + g * ROWS, <npy_intp> 0), w.rows)
    return total


cdef inline double whiten(const Panels *a, const Work *w, bint standard,
                          Watch *watch) noexcept nogil:
    """[z | Y] and its transpose; |z|^2 + |Y|^2. Threads share the panels."""
    cdef npy_intp groups = (w.panels + TOGETHER - 1) // TOGETHER, index
    cdef double squares = 0.0
    if watch.threads > 1:
        for index in prange(groups, num_threads=watch.threads, schedule="dynamic"):
            a.squares[index] = whiten_panels(a, w, index * TOGETHER, standard, watch)
    else:
        for index in range(groups):
            a.squares[index] = whiten_panels(a, w, index * TOGETHER, standard, watch)
    for index in range(groups):
        squares += a.squares[index]
    return squares


cdef inline void back_some(const Panels *a, const Work *w, double *x, npy_intp index,
                           npy_intp panels, const double *factor, const double *reciprocal,
                           npy_intp begin, npy_intp step, Watch *watch) noexcept nogil:
    """X <- L^-T X in some of `panels` panels from number `index` on, in panel g down to row
    begin + g step."""
    if not is_stopped(a, watch):
        panels_back(x + index * w.size, w.size, min(<npy_intp> TOGETHER, panels - index),
                    factor + 1, a.stride, reciprocal, w.rows, begin + index * step, step)


cdef inline void back(const Panels *a, const Work *w, double *x, npy_intp panels,
                      const double *factor, const double *reciprocal, npy_intp begin,
                      npy_intp step, Watch *watch) noexcept nogil:
    """The same in all panels, which threads share."""
    cdef npy_intp groups = (panels + TOGETHER - 1) // TOGETHER, index
    if watch.threads > 1:
        for index in prange(groups, num_threads=watch.threads, schedule="dynamic"):
            back_some(a, w, x, index * TOGETHER, panels, factor, reciprocal, begin, step, watch)
    else:
        for index in range(groups):
            back_some(a, w, x, index * TOGETHER, panels, factor, reciprocal, begin, step, watch)


cdef inline void store_loc(const Gradient *g, const Work *w, npy_intp item, double scale,
                           real type_tag) noexcept nogil:
    cdef npy_intp i
    for i in range(w.n):
        (<real *> (g.data + item * g.outer + i * g.row))[0] = <real> (scale * w.x[i * ROWS])


cdef inline void store_tril_p(const Panels *a, const Work *w, const Gradient *g, npy_intp item,
                              double scale, real type_tag) noexcept nogil:
    cdef double *row = w.line + 1
    cdef npy_intp i
    for i in range(w.n):
        panels_row(w.x, w.size, i, i + 2, w.line)
        row[i] += a.t[i] * w.reciprocal_p[i]
        line_write(row, g.data + item * g.outer + i * g.row, g.column, scale, i + 1, w.n, type_tag)


cdef inline double *own_line(const Work *w, const Watch *watch) noexcept nogil:
    """This thread's, among those that share a matrix."""
    cdef npy_intp thread = omp_get_thread_num() if watch.threads > 1 else 0
    return w.line + thread * (COLUMNS + 1) * w.stride


cdef inline void store_tril_q_rows(const Panels *a, const Work *w, const Gradient *g,
                                   npy_intp item, npy_intp begin, double scale, Watch *watch,
                                   real type_tag) noexcept nogil:
    """Rows begin .. begin + COLUMNS - 1."""
    cdef double *line = own_line(w, watch)
    cdef double *row
    cdef npy_intp i
    if is_stopped(a, watch):
        return
    rows_times(w.x, w.size, w.m, w.stride, begin, w.rows, line, w.stride)
    for i in range(begin, min(begin + COLUMNS, w.n)):
        row = line + (i - begin) * w.stride
        row[i] += a.t[i] * w.reciprocal_q[i]
        line_write(row, g.data + item * g.outer + i * g.row, g.column, -scale, i + 1, w.n, type_tag)


cdef inline void store_tril_q(const Panels *a, const Work *w, const Gradient *g, npy_intp item,
                              double scale, Watch *watch, real type_tag) noexcept nogil:
    cdef npy_intp blocks = w.rows // COLUMNS, index
    if watch.threads > 1:
        for index in prange(blocks, num_threads=watch.threads, schedule="dynamic"):
            store_tril_q_rows(a, w, g, item, index * COLUMNS, scale, watch, type_tag)
    else:
        for index in range(blocks):
            store_tril_q_rows(a, w, g, item, index * COLUMNS, scale, watch, type_tag)


cdef inline void bracket_rows(const Panels *a, const Work *w, npy_intp begin, bint of_p,
                              Watch *watch) noexcept nogil:
    """Rows begin .. begin + COLUMNS - 1 of `bracket`, up to the diagonal."""
    cdef double *line = own_line(w, watch)
    cdef double *row
    cdef npy_intp i
    if is_stopped(a, watch):
        return
    if of_p:
        rows_gram(w.x, w.size, w.m + (begin + 1) * w.stride, w.stride, begin, w.rows, line,
                  w.stride)
    else:
        rows_times(w.x, w.size, w.m, w.stride, begin, w.rows, line, w.stride)
    for i in range(begin, begin + COLUMNS):
        row = line + (i - begin) * w.stride + of_p
        row[i] += a.t[i]
        panels_put(w.s, w.size, i, i + 1, row)


cdef inline void bracket(const Panels *a, const Work *w, bint of_p, Watch *watch) noexcept nogil:
    """The symmetric matrix between the factors of a covariance's gradient."""
    cdef npy_intp blocks = w.rows // COLUMNS, index
    if watch.threads > 1:
        for index in prange(blocks, num_threads=watch.threads, schedule="dynamic"):
            bracket_rows(a, w, index * COLUMNS, of_p, watch)
    else:
        for index in range(blocks):
            bracket_rows(a, w, index * COLUMNS, of_p, watch)
    panels_mirror(w.s, w.size, w.rows)


cdef inline void store_cov(const Panels *a, const Work *w, const Gradient *g, npy_intp item,
                           const double *factor, const double *reciprocal, double scale,
                           Watch *watch, real type_tag) noexcept nogil:
    cdef npy_intp panels = (w.rows + ROWS - 1) // ROWS, i
    back(a, w, w.s, panels, factor, reciprocal, 0, 0, watch)
    panels_transpose(w.s, w.size, w.room, w.rows)
    back(a, w, w.room, panels, factor, reciprocal, 0, ROWS, watch)
    panels_mirror(w.room, w.size, w.rows)
    for i in range(w.n):
        panels_row(w.room, w.size, i, w.n, w.line)
        line_write(w.line, g.data + item * g.outer + i * g.row, g.column, scale, w.n, w.n, type_tag)


cdef inline void panels_gradients(const Panels *a, const Work *w, const Results *r, const Side *q,
                                  npy_intp item, double scale, Watch *watch,
                                  real type_tag) noexcept nogil:
    cdef bint triangles = ((r.wanted & MATRIX_P and not r.cov_p)
                           or (r.wanted & MATRIX_Q and not r.cov_q))
    cdef npy_intp i, panels
    for i in range(w.n):
        w.m[(i + 1) * w.stride + i] += 1.0
    if r.wanted & MATRIX_P and r.cov_p:
        bracket(a, w, True, watch)
        store_cov(a, w, &r.matrix_p, item, a.factor_p, w.reciprocal_p, 0.5 * scale, watch, type_tag)
    if r.wanted & MATRIX_Q and r.cov_q:
        bracket(a, w, False, watch)
        store_cov(a, w, &r.matrix_q, item, a.factor_q, w.reciprocal_q, -0.5 * scale, watch, type_tag)
    if q != NULL and (triangles or r.wanted & (LOC_P | LOC_Q)):
        panels = w.panels if triangles else 1
        back(a, w, w.x, panels, a.factor_q, w.reciprocal_q, -COLUMNS, ROWS, watch)
    if r.wanted & LOC_P:
        store_loc(&r.loc_p, w, item, scale, type_tag)
    if r.wanted & LOC_Q:
        store_loc(&r.loc_q, w, item, -scale, type_tag)
    if r.wanted & MATRIX_P and not r.cov_p:
        store_tril_p(a, w, &r.matrix_p, item, scale, type_tag)
    if r.wanted & MATRIX_Q and not r.cov_q:
        store_tril_q(a, w, &r.matrix_q, item, scale, watch, type_tag)


cdef inline int panels_gradient_rows(npy_intp first, npy_intp last, const Side *p, const Side *q,
                                     const Results *r, npy_intp n, Watch *watch,
                                     real type_tag) noexcept nogil:
    cdef Panels a
    cdef Work w
    cdef npy_intp item, i
    cdef double squares, kl, scale
    cdef bint improper
    cdef int status = 0
    if not panels_new(&a, n, True, True, r.cov_p or r.cov_q, watch.threads):
        return NO_MEMORY
    if not work_new(&w, n, a.size, r.cov_p or r.cov_q, watch.threads):
        free(a.memory)
        return NO_MEMORY
    memset(a.factor_p, 0, 2 * a.padded * a.stride * sizeof(double))
    if q == NULL:
        for i in range(a.padded):
            a.factor_q[i * (a.stride + 1) + 1] = 1.0
    for item in range(first, last):
        panels_factor(&a, a.factor_p, a.diagonal_p, w.reciprocal_p, p, item,
                      item == first or not p.shared, watch, type_tag)
        if q != NULL:
            panels_factor(&a, a.factor_q, a.diagonal_q, w.reciprocal_q, q, item,
                          item == first or not q.shared, watch, type_tag)
        squares = whiten(&a, &w, q == NULL, watch)
        if watch.stop:
            break
        for i in range(w.rows):
            a.t[i] = w.line[i] = (a.diagonal_p[i] - a.diagonal_q[i]) * w.reciprocal_q[i]
        kl = divergence(a.diagonal_p, a.diagonal_q, w.line, squares, n)
        improper = not isfinite(kl) and panels_improper(a.diagonal_p, a.diagonal_q, n)
        scale = finish(r, kl, improper, p, q, item, n, &status, type_tag)
        panels_gradients(&a, &w, r, q, item, scale, watch, type_tag)
        if scale == 0:
            blank_all(r, item, n, type_tag)
    free(w.memory)
    free(a.memory)
    return status


cdef inline int gradient_rows(const Batch *batch, npy_intp first, npy_intp last,
                              const Kernel *kernel, Watch *watch, real type_tag) noexcept nogil:
    cdef npy_intp n = batch.core[0]
    cdef Results r = results(batch, kernel)
    cdef Side p = side(batch, 0, r.cov_p), q
    cdef const Side *other = NULL
    if not kernel.options[2]:
        q = side(batch, 1, r.cov_q)
        other = &q
    if n <= LANES_LIMIT:
        return lanes_gradient_rows(first, last, &p, other, &r, n, type_tag)
    return panels_gradient_rows(first, last, &p, other, &r, n, watch, type_tag)


# The kernel that the gufuncs carry.

cdef inline Plan plan_mvn_gradient(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan
    cdef double n = batch.core[0]
    cdef bint covariances = kernel.options[0] or kernel.options[1]
    cdef bint shared = not kernel.options[2] and batch.outer[3] == 0
    plan.row_ns = 10 + n * (6 + n * (3 + (0.2 if covariances else 0.05) * n))
    plan.setup_ns = 0.2 * plan.row_ns if shared else 0.0
    plan.group = LANES if n <= LANES_LIMIT else 1
    plan.splits_rows = n > LANES_LIMIT
    return plan


cdef inline int mvn_gradient_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                                      const Kernel *kernel, Watch *watch) noexcept nogil:
    return gradient_rows(batch, first, last, kernel, watch, <float> 0)


cdef inline int mvn_gradient_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                                      const Kernel *kernel, Watch *watch) noexcept nogil:
    return gradient_rows(batch, first, last, kernel, watch, <double> 0)
