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

As for the values, matrices of up to MOST_ROWS_IN_LANES rows lie side by side, one in a lane each;
larger ones are taken one at a time. [z | Y] are the columns of one matrix: column j of Y is its
column j + 1.
"""

from libc.math cimport NAN, isfinite, isnan
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from numpy cimport npy_intp

from gufunc cimport NO_MEMORY, Batch, Kernel, Plan, Watch, parallel_for
from mvn cimport (
    COLUMNS, COV_P, COV_Q, LANES, MOST_LANES, MOST_ROWS, MOST_TOGETHER, ROWS,
    STANDARD_Q, Panels, Side, aligned, cholesky, copy_factor, divergence, has_covariances,
    improper, is_stopped, lanes_stride, ones, own_place, panels_new, plan_of, reciprocals,
    second_side, settle, side, solve, sum_squares, take_diagonal, vec)
from vecmath cimport real

cdef enum:
    MOST_ROWS_IN_LANES = 24  # larger items are taken one by one

cdef extern from "mvn_grad.h" nogil:
    void lanes_cholesky "mvn_lanes_cholesky"(vec *a, vec *reciprocal, npy_intp stride, npy_intp n)
    void lanes_reciprocals "mvn_lanes_reciprocals"(
        const vec *a, vec *reciprocal, npy_intp stride, npy_intp n)
    void lanes_whiten "mvn_lanes_whiten"(
        const vec *p, const vec *q, const vec *reciprocal, vec *y, vec *squares,
        npy_intp stride, npy_intp n)
    void lanes_diagonal "mvn_lanes_diagonal"(
        const vec *a, vec *diagonal, npy_intp stride, npy_intp n)
    void lanes_divergence "mvn_lanes_divergence"(
        const double *x, const double *y, double *t, const double *squares, npy_intp n, double *kl)
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
    void line_write_f32 "mvn_line_write_f32"(
        const double *line, char *to, npy_intp step, double scale, npy_intp count, npy_intp n)
    void line_write_f64 "mvn_line_write_f64"(
        const double *line, char *to, npy_intp step, double scale, npy_intp count, npy_intp n)

ctypedef struct Gradient:
    # One gradient of every item, in the shape of a matrix: that of a mean is one row.
    bint wanted
    npy_intp rows
    char *data
    npy_intp outer, row, column  # strides in bytes

ctypedef struct Results:
    bint cov_p, cov_q
    bint means, triangles        # what L_q^-T z and L_q^-T Y are needed for
    char *cotangent
    npy_intp cotangent_outer
    char *kl
    npy_intp kl_outer
    Gradient loc_p, matrix_p, loc_q, matrix_q


cdef inline Gradient take_gradient(const Batch *batch, const Kernel *kernel, int i,
                                   npy_intp *operand, const npy_intp **inner) noexcept nogil:
    """The one with respect to input i, the next of those that are wanted."""
    cdef Gradient g
    g.wanted = kernel.wanted >> i & 1
    if g.wanted:
        g.data, g.outer = batch.operands[operand[0]], batch.outer[operand[0]]
        operand[0] += 1
        g.rows, g.row = 1, 0
        if i % 2 == 1:
            g.rows, g.row = batch.core[0], inner[0][0]
            inner[0] += 1
        g.column = inner[0][0]
        inner[0] += 1
    return g


cdef inline Results results(const Batch *batch, const Kernel *kernel) noexcept nogil:
    """Where results go: the divergence, then gradients in the order of the inputs; behind those is
    the cotangent."""
    cdef Results r
    cdef npy_intp inputs = 2 if kernel.options[STANDARD_Q] else 4, operand = inputs + 2
    cdef const npy_intp *inner = batch.inner + inputs // 2 * 3
    r.cov_p, r.cov_q = kernel.options[COV_P], kernel.options[COV_Q]
    r.cotangent, r.cotangent_outer = batch.operands[inputs], batch.outer[inputs]
    r.kl, r.kl_outer = batch.operands[inputs + 1], batch.outer[inputs + 1]
    r.loc_p = take_gradient(batch, kernel, 0, &operand, &inner)
    r.matrix_p = take_gradient(batch, kernel, 1, &operand, &inner)
    r.loc_q = take_gradient(batch, kernel, 2, &operand, &inner)
    r.matrix_q = take_gradient(batch, kernel, 3, &operand, &inner)
    r.means = r.loc_p.wanted or r.loc_q.wanted
    r.triangles = (r.matrix_p.wanted and not r.cov_p) or (r.matrix_q.wanted and not r.cov_q)
    return r


cdef inline double finish(const Results *r, double kl, const double *x, const double *y,
                          npy_intp step, const Side *p, const Side *q, npy_intp item, npy_intp n,
                          int *status, real type_tag) noexcept nogil:
    """Write the divergence; by what to multiply the gradients: the cotangent, NaN for bad items.
    The diagonals x and y of the factors have their elements `step` apart."""
    cdef double cotangent = (<double *> (r.cotangent + item * r.cotangent_outer))[0]
    if not isfinite(kl):
        status[0] |= settle(&kl, improper(x, y, step, n), p, q, item, n, type_tag)
    (<real *> (r.kl + item * r.kl_outer))[0] = <real> kl
    return NAN if isnan(kl) and cotangent != 0 else cotangent


cdef inline void blank(const Gradient *g, npy_intp item, npy_intp n,
                       real type_tag) noexcept nogil:
    cdef npy_intp i, j
    for i in range(g.rows if g.wanted else 0):
        for j in range(n):
            (<real *> (g.data + item * g.outer + i * g.row + j * g.column))[0] = 0


cdef inline void blank_all(const Results *r, npy_intp item, npy_intp n,
                           real type_tag) noexcept nogil:
    """Zeros: where the cotangent is 0, also for what is not finite."""
    blank(&r.loc_p, item, n, type_tag)
    blank(&r.matrix_p, item, n, type_tag)
    blank(&r.loc_q, item, n, type_tag)
    blank(&r.matrix_q, item, n, type_tag)


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
    for i in range(g.rows):
        lanes_write(a + i * stride, at, i * g.row, g.column, n, type_tag)


ctypedef struct Lanes:
    # Scratch of one thread: matrices of `even` rows and two more, columns of `even` vectors.
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
    cdef npy_intp even = n + n % 2, stride = lanes_stride(even)
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


cdef inline void lanes_store_loc(const Lanes *a, const Gradient *g, const vec *x, vec scale,
                                 npy_intp first, npy_intp last, real type_tag) noexcept nogil:
    """That of a mean, from column 0 of x."""
    lanes_scale(x, a.stride, scale, a.column, a.n)
    lanes_store(g, a.column, a.stride, first, last, a.n, type_tag)


cdef inline void lanes_store_tril(const Lanes *a, const Gradient *g, const vec *x,
                                  const vec *reciprocal, vec scale, npy_intp first, npy_intp last,
                                  real type_tag) noexcept nogil:
    """That of a factor, from all but what its diagonal gets."""
    lanes_multiply(a.diagonal_y, reciprocal, a.diagonal, a.n)
    lanes_triangle(x, a.diagonal, scale, a.room, a.stride, a.n)
    lanes_store(g, a.room, a.stride, first, last, a.n, type_tag)


cdef inline void lanes_store_cov(const Lanes *a, const Gradient *g, const vec *factor,
                                 const vec *reciprocal, vec scale, npy_intp first, npy_intp last,
                                 real type_tag) noexcept nogil:
    """That of a covariance, from all of its bracket in `s` but the diagonal y."""
    lanes_add_diagonal(a.s, a.diagonal_y, a.stride, a.even)
    lanes_congruence(a.s, a.room, factor, reciprocal, a.stride, a.even)
    lanes_symmetric(a.s, scale, a.room, a.stride, a.n)
    lanes_store(g, a.room, a.stride, first, last, a.n, type_tag)


cdef inline void lanes_gradients(const Lanes *a, const Results *r, const Side *q, vec scale,
                                 npy_intp first, npy_intp last, real type_tag) noexcept nogil:
    cdef npy_intp even = a.even, stride = a.stride
    cdef vec *t = a.y if q == NULL else a.t
    if q != NULL and (r.means or r.triangles):
        lanes_back(a.y, a.factor_q, a.reciprocal_q, t, stride, even, 1,
                   even + 1 if r.triangles else 1)
    if r.loc_p.wanted:
        lanes_store_loc(a, &r.loc_p, t, scale, first, last, type_tag)
    if r.loc_q.wanted:
        lanes_store_loc(a, &r.loc_q, t, -scale, first, last, type_tag)
    if r.matrix_p.wanted:
        if r.cov_p:
            lanes_gram(a.y, a.s, stride, even)
            lanes_store_cov(a, &r.matrix_p, a.factor_p, a.reciprocal_p, 0.5 * scale, first, last,
                            type_tag)
        else:
            lanes_store_tril(a, &r.matrix_p, t + 1, a.reciprocal_p, scale, first, last, type_tag)
    if r.matrix_q.wanted:
        if r.cov_q:
            lanes_times(a.y, a.y, a.s, stride, even)
            lanes_store_cov(a, &r.matrix_q, a.factor_q, a.reciprocal_q, -0.5 * scale, first, last,
                            type_tag)
        else:
            lanes_times(t, a.y, a.s, stride, even)
            lanes_store_tril(a, &r.matrix_q, a.s, a.reciprocal_q, -scale, first, last, type_tag)


cdef inline int lanes_gradient_rows(npy_intp first, npy_intp last, const Side *p, const Side *q,
                                    const Results *r, npy_intp n, real type_tag) noexcept nogil:
    cdef Lanes a
    cdef vec squares, scale
    cdef double kl[MOST_LANES]
    cdef npy_intp group, lane, item
    cdef int status = 0
    if not lanes_new(&a, n):
        return NO_MEMORY
    for group from first <= group < last by LANES:
        if q != NULL:
            lanes_factor(&a, a.factor_q, a.reciprocal_q, a.diagonal_q, q, group, last,
                         group == first or not q.shared, type_tag)
        lanes_factor(&a, a.factor_p, a.reciprocal_p, a.diagonal_p, p, group, last,
                     group == first or not p.shared, type_tag)
        lanes_whiten(a.factor_p, NULL if q == NULL else a.factor_q, a.reciprocal_q, a.y, &squares,
                     a.stride, a.even)
        lanes_diagonal(a.y, a.diagonal_y, a.stride, a.even)
        lanes_diagonal(a.y, a.diagonal, a.stride, a.even)
        lanes_divergence(<double *> a.diagonal_p, <double *> a.diagonal_q, <double *> a.diagonal,
                         <double *> &squares, a.even, kl)
        for lane in range(LANES):
            item = min(group + lane, last - 1)
            (<double *> &scale)[lane] = finish(
                r, kl[lane], <double *> a.diagonal_p + lane, <double *> a.diagonal_q + lane, LANES,
                p, q, item, n, &status, type_tag)
        lanes_gradients(&a, r, q, scale, group, last, type_tag)
        for lane in range(min(<npy_intp> LANES, last - group)):
            if (<double *> &scale)[lane] == 0:
                blank_all(r, group + lane, n, type_tag)
    free(a.memory)
    return status


# ---- panels -----------------------------------------------------------------------------------

ctypedef struct Work:
    # Scratch for one matrix, beside that of the factors.
    void *memory
    const Panels *a          # [mu | L] of both sides
    bint standard            # Q is N(0, I)
    npy_intp n, rows         # rows, and rows up to whole tiles
    npy_intp panels, size    # panels of [z | Y], and elements from one to the next
    npy_intp stride          # from one row of `m` and `line` to the next
    double *x                # [z | Y], then L_q^-T [z | Y], in panels
    double *m                # [z | M]^T in rows
    double *s                # symmetric matrices in panels
    double *room
    double *reciprocal_p
    double *reciprocal_q
    double *line             # COLUMNS + 1 rows for each thread


cdef inline bint work_new(Work *w, const Panels *a, bint standard,
                          bint covariances) noexcept nogil:
    w.a, w.standard, w.n, w.rows = a, standard, a.n, (a.n + COLUMNS - 1) // COLUMNS * COLUMNS
    w.panels, w.size = w.rows // ROWS + 1, a.size
    w.stride = (w.panels + 1) * ROWS
    cdef npy_intp square = w.panels * w.size, rows = w.panels * ROWS * w.stride
    cdef npy_intp length = (3 if covariances else 1) * square + rows
    length += (2 + (COLUMNS + 1) * a.watch.threads) * w.stride
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


cdef inline void store_row(const Gradient *g, npy_intp item, npy_intp i, const double *line,
                           double scale, npy_intp count, npy_intp n, real type_tag) noexcept nogil:
    """Row i of n numbers, zeros from number `count` on."""
    cdef char *row = g.data + item * g.outer + i * g.row
    if real is float:
        line_write_f32(line, row, g.column, scale, count, n)
    else:
        line_write_f64(line, row, g.column, scale, count, n)


cdef inline void load_loc(double *rows, npy_intp stride, const Side *s, npy_intp item,
                          npy_intp n, real type_tag) noexcept nogil:
    cdef npy_intp i
    for i in range(n):
        rows[i * stride] = (<real *> (s.loc + item * s.loc_outer + i * s.loc_inner))[0]


cdef inline void panels_factor(const Panels *a, double *factor, double *diagonal,
                               double *reciprocal, const Side *s, npy_intp item, bint fresh,
                               real type_tag) noexcept nogil:
    """One side's [mu | L], with zeros above the diagonal and continued by an identity; not `fresh`:
    only mu is another."""
    cdef npy_intp i, j
    cdef double *rows = factor + 1
    load_loc(factor, a.stride, s, item, a.n, type_tag)
    if not fresh:
        return
    if s.covariance:
        cholesky(a, s, item, rows, type_tag)
        for i in range(a.padded):
            for j in range(i + 1, i // ROWS * ROWS + ROWS):
                rows[i * a.stride + j] = 0.0
    else:
        copy_factor(s, item, a.n, rows, a.stride, type_tag)
        for i in range(a.n, a.padded):
            rows[i * (a.stride + 1)] = 1.0
    take_diagonal(rows, a.stride, a.padded, diagonal)
    reciprocals(diagonal, reciprocal, a.padded)


cdef inline npy_intp shares(npy_intp panels) noexcept nogil:
    """How many times MOST_TOGETHER panels there are to be shared."""
    return (panels + MOST_TOGETHER - 1) // MOST_TOGETHER


# Steps work on copies of what threads share: compilers know that nothing else changes them.

cdef inline int whiten_some(void *work, npy_intp share) noexcept nogil:
    """[z | Y] in some panels and, in rows, its transpose; finds its squares."""
    cdef Work w = (<const Work *> work)[0]
    cdef const Panels *a = w.a
    cdef npy_intp index = share * MOST_TOGETHER
    cdef npy_intp panels = min(<npy_intp> MOST_TOGETHER, w.panels - index)
    cdef npy_intp begin = index * ROWS - COLUMNS, first, g, r, i
    cdef double squares[2 * MOST_ROWS]
    cdef double total = 0.0
    cdef double *x = w.x + index * w.size
    if is_stopped(a):
        return 0
    for r in range(2 * ROWS):
        squares[r] = 0.0
    for g in range(panels):
        first = max(begin + g * ROWS, <npy_intp> 0)
        panel_subtract(x + g * w.size, a.factor_p + (index + g) * ROWS,
                       a.factor_q + (index + g) * ROWS, a.stride, first, w.rows)
    if w.standard:
        for g in range(panels):
            for i in range(max(begin + g * ROWS, <npy_intp> 0) * ROWS, w.rows * ROWS):
                total += x[g * w.size + i] * x[g * w.size + i]
    else:
        solve(a, x, panels, a.factor_q + 1, a.stride, w.rows, w.reciprocal_q, begin, ROWS,
              max(begin, <npy_intp> 0), w.rows, squares)
        for r in range(2 * ROWS):
            total += squares[r]
    for g in range(panels):
        panel_rows(x + g * w.size, w.m + (index + g) * ROWS * w.stride, w.stride,
                   max(begin + g * ROWS, <npy_intp> 0), w.rows)
    a.squares[share] = total
    return 0


ctypedef struct Back:
    # X <- L^-T X in panels, in panel g down to row begin + g step.
    const Work *w
    double *x
    npy_intp panels
    const double *factor
    const double *reciprocal
    npy_intp begin, step


cdef inline int back_some(void *context, npy_intp share) noexcept nogil:
    cdef Back b = (<const Back *> context)[0]
    cdef npy_intp index = share * MOST_TOGETHER
    if not is_stopped(b.w.a):
        panels_back(b.x + index * b.w.size, b.w.size,
                    min(<npy_intp> MOST_TOGETHER, b.panels - index), b.factor + 1, b.w.a.stride,
                    b.reciprocal, b.w.rows, b.begin + index * b.step, b.step)
    return 0


cdef inline void back(const Work *w, double *x, npy_intp panels, const double *factor,
                      const double *reciprocal, npy_intp begin, npy_intp step) noexcept nogil:
    cdef Back b
    b.w, b.x, b.panels, b.factor, b.reciprocal, b.begin, b.step = (
        w, x, panels, factor, reciprocal, begin, step)
    parallel_for(back_some, &b, shares(panels), w.a.watch.threads)


cdef inline void store_loc(const Gradient *g, const Work *w, npy_intp item, double scale,
                           real type_tag) noexcept nogil:
    cdef npy_intp i
    for i in range(w.n):
        (<real *> (g.data + item * g.outer + i * g.column))[0] = <real> (scale * w.x[i * ROWS])


cdef inline void store_tril_p(const Work *w, const Gradient *g, npy_intp item, double scale,
                              real type_tag) noexcept nogil:
    cdef double *row = w.line + 1
    cdef npy_intp i
    for i in range(w.n):
        panels_row(w.x, w.size, i, i + 2, w.line)
        row[i] += w.a.t[i] * w.reciprocal_p[i]
        store_row(g, item, i, row, scale, i + 1, w.n, type_tag)


cdef inline double *own_line(const Work *w) noexcept nogil:
    return w.line + own_place(w.a) * (COLUMNS + 1) * w.stride


ctypedef struct Products:
    # Products of [z | Y] with [z | M], COLUMNS rows at a time, up to the diagonal.
    const Work *w
    bint of_p                # a bracket: M^T Y
    const Gradient *g        # of a factor: where it goes
    npy_intp item
    double scale


cdef inline int tril_q_rows(const Products *o, npy_intp block, real type_tag) noexcept nogil:
    cdef Work w = o.w[0]
    cdef double *line = own_line(&w)
    cdef double *row
    cdef npy_intp begin = block * COLUMNS, i
    if is_stopped(w.a):
        return 0
    rows_times(w.x, w.size, w.m, w.stride, begin, w.rows, line, w.stride)
    for i in range(begin, min(begin + COLUMNS, w.n)):
        row = line + (i - begin) * w.stride
        row[i] += w.a.t[i] * w.reciprocal_q[i]
        store_row(o.g, o.item, i, row, o.scale, i + 1, w.n, type_tag)
    return 0


cdef inline int tril_q_rows_f32(void *products, npy_intp block) noexcept nogil:
    return tril_q_rows(<const Products *> products, block, <float> 0)


cdef inline int tril_q_rows_f64(void *products, npy_intp block) noexcept nogil:
    return tril_q_rows(<const Products *> products, block, <double> 0)


cdef inline void store_tril_q(const Work *w, const Gradient *g, npy_intp item, double scale,
                              real type_tag) noexcept nogil:
    cdef Products o
    o.w, o.g, o.item, o.scale = w, g, item, scale
    parallel_for(tril_q_rows_f32 if real is float else tril_q_rows_f64, &o, w.rows // COLUMNS,
                 w.a.watch.threads)


cdef inline int bracket_rows(void *products, npy_intp block) noexcept nogil:
    cdef const Products *o = <const Products *> products
    cdef Work w = o.w[0]
    cdef double *line = own_line(&w)
    cdef double *row
    cdef npy_intp begin = block * COLUMNS, i
    if is_stopped(w.a):
        return 0
    if o.of_p:
        rows_gram(w.x, w.size, w.m + (begin + 1) * w.stride, w.stride, begin, w.rows, line,
                  w.stride)
    else:
        rows_times(w.x, w.size, w.m, w.stride, begin, w.rows, line, w.stride)
    for i in range(begin, begin + COLUMNS):
        row = line + (i - begin) * w.stride + o.of_p
        row[i] += w.a.t[i]
        panels_put(w.s, w.size, i, i + 1, row)
    return 0


cdef inline void bracket(const Work *w, bint of_p) noexcept nogil:
    """The symmetric matrix between the factors of a covariance's gradient."""
    cdef Products o
    o.w, o.of_p = w, of_p
    parallel_for(bracket_rows, &o, w.rows // COLUMNS, w.a.watch.threads)
    panels_mirror(w.s, w.size, w.rows)


cdef inline void store_cov(const Work *w, const Gradient *g, npy_intp item, const double *factor,
                           const double *reciprocal, double scale, real type_tag) noexcept nogil:
    cdef npy_intp panels = (w.rows + ROWS - 1) // ROWS, i
    back(w, w.s, panels, factor, reciprocal, 0, 0)
    panels_transpose(w.s, w.size, w.room, w.rows)
    back(w, w.room, panels, factor, reciprocal, 0, ROWS)
    panels_mirror(w.room, w.size, w.rows)
    for i in range(w.n):
        panels_row(w.room, w.size, i, w.n, w.line)
        store_row(g, item, i, w.line, scale, w.n, w.n, type_tag)


cdef inline void panels_gradients(const Work *w, const Results *r, npy_intp item, double scale,
                                  real type_tag) noexcept nogil:
    cdef const Panels *a = w.a
    cdef npy_intp i
    for i in range(w.n):
        w.m[(i + 1) * w.stride + i] += 1.0
    if r.matrix_p.wanted and r.cov_p:
        bracket(w, True)
        store_cov(w, &r.matrix_p, item, a.factor_p, w.reciprocal_p, 0.5 * scale, type_tag)
    if r.matrix_q.wanted and r.cov_q:
        bracket(w, False)
        store_cov(w, &r.matrix_q, item, a.factor_q, w.reciprocal_q, -0.5 * scale, type_tag)
    if not w.standard and (r.means or r.triangles):
        back(w, w.x, w.panels if r.triangles else 1, a.factor_q, w.reciprocal_q, -COLUMNS, ROWS)
    if r.loc_p.wanted:
        store_loc(&r.loc_p, w, item, scale, type_tag)
    if r.loc_q.wanted:
        store_loc(&r.loc_q, w, item, -scale, type_tag)
    if r.matrix_p.wanted and not r.cov_p:
        store_tril_p(w, &r.matrix_p, item, scale, type_tag)
    if r.matrix_q.wanted and not r.cov_q:
        store_tril_q(w, &r.matrix_q, item, -scale, type_tag)


cdef inline int panels_gradient_rows(npy_intp first, npy_intp last, const Side *p, const Side *q,
                                     const Results *r, npy_intp n, Watch *watch,
                                     real type_tag) noexcept nogil:
    cdef Panels a
    cdef Work w
    cdef npy_intp item, i
    cdef double squares, kl, scale
    cdef int status = 0
    if not panels_new(&a, n, True, True, r.cov_p or r.cov_q, False, watch):
        return NO_MEMORY
    if not work_new(&w, &a, q == NULL, r.cov_p or r.cov_q):
        free(a.memory)
        return NO_MEMORY
    memset(a.factor_p, 0, 2 * a.padded * a.stride * sizeof(double))
    if q == NULL:
        for i in range(a.padded):
            a.factor_q[i * (a.stride + 1) + 1] = 1.0
    for item in range(first, last):
        panels_factor(&a, a.factor_p, a.diagonal_p, w.reciprocal_p, p, item,
                      item == first or not p.shared, type_tag)
        if q != NULL:
            panels_factor(&a, a.factor_q, a.diagonal_q, w.reciprocal_q, q, item,
                          item == first or not q.shared, type_tag)
        squares = sum_squares(&a, whiten_some, &w, shares(w.panels))
        if watch.stop:
            break
        for i in range(w.rows):
            a.t[i] = w.line[i] = (a.diagonal_p[i] - a.diagonal_q[i]) * w.reciprocal_q[i]
        kl = divergence(a.diagonal_p, a.diagonal_q, w.line, squares, n)
        scale = finish(r, kl, a.diagonal_p, a.diagonal_q, 1, p, q, item, n, &status, type_tag)
        panels_gradients(&w, r, item, scale, type_tag)
        if scale == 0:
            blank_all(r, item, n, type_tag)
    free(w.memory)
    free(a.memory)
    return status


cdef inline int gradient_rows(const Batch *batch, npy_intp first, npy_intp last,
                              const Kernel *kernel, Watch *watch, real type_tag) noexcept nogil:
    cdef npy_intp n = batch.core[0]
    cdef Results r = results(batch, kernel)
    cdef Side p = side(batch, kernel, 0), other
    cdef const Side *q = second_side(batch, kernel, &other)
    if n <= MOST_ROWS_IN_LANES:
        return lanes_gradient_rows(first, last, &p, q, &r, n, type_tag)
    return panels_gradient_rows(first, last, &p, q, &r, n, watch, type_tag)


# The kernel that the gufuncs carry.

cdef inline Plan plan_mvn_gradient(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef double n = batch.core[0], cube = 0.2 if has_covariances(kernel) else 0.05
    return plan_of(batch, kernel, 10 + n * (6 + n * (3 + cube * n)), 0.2,
                   n <= MOST_ROWS_IN_LANES)


cdef inline int mvn_gradient_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                                      const Kernel *kernel, Watch *watch) noexcept nogil:
    return gradient_rows(batch, first, last, kernel, watch, <float> 0)


cdef inline int mvn_gradient_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                                      const Kernel *kernel, Watch *watch) noexcept nogil:
    return gradient_rows(batch, first, last, kernel, watch, <double> 0)
