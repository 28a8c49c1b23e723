"""Multivariate normals: KL(N_p || N_q) from lower Cholesky factors or covariances.

With S_p = L_p L_p^T, S_q = L_q L_q^T and Y = L_q^-1 (L_p - L_q), lower triangular with diagonal y,

    KL = 1/2 (|L_q^-1 (mu_p - mu_q)|^2 + |Y|^2) + sum_i (y_i - log1p(y_i)),

a sum of terms >= 0: nothing cancels when P is close to Q, where L_p - L_q is exact while
L_q^-1 L_p = I + Y would not be. No inverse and no determinant is formed.

All arithmetic is double, for float32 too: a float32 solve would lose the condition number of L_q,
and for small matrices loading is what costs. Largest relative error from factors up to D = 17:
1e-13 (2e-15 seen), for float32 the rounding of the result; from covariances the Cholesky
factorisation's own, about D eps cond(S), with the eps of double.

Diagonal elements of L_q below 2^-1024 are good for equality, 0, but not for accuracy.

Small matrices lie side by side, one in a SIMD lane each; large ones are taken one at a time, in
panels of rows (mvn.h).
"""

from libc.math cimport INFINITY, NAN, isfinite, isinf, isnan
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from numpy cimport npy_intp

from gufunc cimport INVALID, NO_MEMORY, Batch, Kernel, Plan, Watch
from vecmath cimport real

cdef extern from "mvn.h" nogil:
    ctypedef double vec "mvn_vec"  # LANES doubles
    enum:
        LANES "MVN_LANES"
        ROWS "MVN_ROWS"
    vec gather_f32 "mvn_gather_f32"(char *const *at, npy_intp offset)
    vec gather_f64 "mvn_gather_f64"(char *const *at, npy_intp offset)
    vec ones "mvn_ones"()
    void lanes_cholesky "mvn_lanes_cholesky"(vec *a, vec *reciprocal, npy_intp stride, npy_intp n)
    void lanes_reciprocals "mvn_lanes_reciprocals"(
        const vec *a, vec *reciprocal, npy_intp stride, npy_intp n)
    void lanes_whiten "mvn_lanes_whiten"(
        const vec *p, const vec *q, const vec *reciprocal, vec *y, vec *squares,
        npy_intp stride, npy_intp n)
    void lanes_whiten_standard "mvn_lanes_whiten_standard"(
        const vec *p, vec *y, vec *squares, npy_intp stride, npy_intp n)
    void lanes_diagonal "mvn_lanes_diagonal"(
        const vec *a, vec *diagonal, npy_intp stride, npy_intp n)
    void lanes_divergence "mvn_lanes_divergence"(
        const double *x, const double *y, double *t, const double *squares, npy_intp n, double *kl)
    double safe_reciprocal "mvn_reciprocal"(double y)
    npy_intp element "mvn_element"(npy_intp i, npy_intp j)
    npy_intp panels_size "mvn_panel"(npy_intp n)
    void panels_cholesky "mvn_panels_cholesky"(double *a, double *reciprocal, npy_intp n)
    void panels_whiten "mvn_panels_whiten"(
        const double *p, const double *q, const double *shift, const double *reciprocal,
        double *x, npy_intp n, double *t, double *squares)
    void panels_whiten_standard "mvn_panels_whiten_standard"(
        const double *p, const double *shift, npy_intp n, double *t, double *squares)
    double panels_divergence "mvn_panels_divergence"(
        const double *x, const double *y, double *t, double squares, npy_intp n)

# Up to LANES_LIMIT rows, items in lanes are faster than one by one; from PANELS_START rows on, a
# few items left over are faster one by one than in a group that is half empty.
cdef enum:
    MOST_LANES = 8
    MOST_ROWS = 16
    LANES_LIMIT = 48
    PANELS_START = 16

ctypedef struct Side:
    # One of the two distributions of every item: addresses and strides in bytes.
    char *loc
    npy_intp loc_outer, loc_inner
    char *matrix
    npy_intp matrix_outer, row, column
    bint covariance
    bint shared             # the same matrix for every item


cdef inline Side side(const Batch *batch, int which, bint covariance) noexcept nogil:
    cdef Side s
    s.loc, s.matrix = batch.operands[2 * which], batch.operands[2 * which + 1]
    s.loc_outer, s.matrix_outer = batch.outer[2 * which], batch.outer[2 * which + 1]
    s.loc_inner = batch.inner[3 * which]
    s.row, s.column = batch.inner[3 * which + 1], batch.inner[3 * which + 2]
    s.covariance = covariance
    s.shared = s.matrix_outer == 0
    return s


cdef inline bint survey(const Side *s, npy_intp item, npy_intp n, bint *infinite,
                        real type_tag) noexcept nogil:
    """Whether one side of an item contains NaN; adds to `infinite` whether it contains +-inf."""
    cdef char *loc = s.loc + item * s.loc_outer
    cdef char *matrix = s.matrix + item * s.matrix_outer
    cdef bint nan = False
    cdef npy_intp i, j
    cdef real x
    for i in range(n):
        x = (<real *> (loc + i * s.loc_inner))[0]
        nan |= isnan(x)
        infinite[0] |= isinf(x)
        for j in range(i + 1):
            x = (<real *> (matrix + i * s.row + j * s.column))[0]
            nan |= isnan(x)
            infinite[0] |= isinf(x)
    return nan


cdef inline int settle(double *kl, bint improper, const Side *p, const Side *q, npy_intp item,
                       npy_intp n, real type_tag) noexcept nogil:
    """Give a result that is not finite its meaning: NaN for bad input, inf for overflow.

    `improper`: a diagonal element of a factor is not positive. `q` is NULL for N(0, I).
    """
    cdef bint infinite = False
    cdef bint nan = survey(p, item, n, &infinite, type_tag)
    if q != NULL:
        nan |= survey(q, item, n, &infinite, type_tag)
    kl[0] = NAN if nan or infinite or improper else INFINITY
    return INVALID if (infinite or improper) and not nan else 0


cdef inline double *aligned(void *memory) noexcept nogil:
    return <double *> ((<uintptr_t> memory + 63) // 64 * 64)


# ---- lanes: matrices of up to LANES_LIMIT rows, LANES items side by side ----------------------

cdef inline vec gather(char *const *at, npy_intp offset, real type_tag) noexcept nogil:
    if real is float:
        return gather_f32(at, offset)
    else:
        return gather_f64(at, offset)


cdef inline void lanes_load(vec *a, const Side *s, npy_intp first, npy_intp last, npy_intp n,
                            npy_intp stride, bint loc_only, real type_tag) noexcept nogil:
    """[mu | L] of the items from `first` on; beyond the last one, the last one again.

    An odd number of rows gets one more, of an identity matrix: it adds nothing.
    """
    cdef char *loc[MOST_LANES]
    cdef char *matrix[MOST_LANES]
    cdef npy_intp loc_inner = s.loc_inner, row = s.row, column = s.column, i, j, lane, item
    for lane in range(LANES):
        item = min(first + lane, last - 1)
        loc[lane] = s.loc + item * s.loc_outer
        matrix[lane] = s.matrix + item * s.matrix_outer
    for i in range(n):
        a[i * stride] = gather(loc, i * loc_inner, type_tag)
    if loc_only:
        return
    for i in range(n):
        for j in range(i + 1):
            a[i * stride + j + 1] = gather(matrix, i * row + j * column, type_tag)
    if n % 2 == 1:
        memset(a + n * stride, 0, (n + 1) * sizeof(vec))
        a[n * stride + n + 1] = ones()


cdef inline bint lanes_improper(const double *x, const double *y, npy_intp lane,
                                npy_intp n) noexcept nogil:
    """Whether a diagonal element of either factor of an item is not positive."""
    cdef npy_intp i
    for i in range(n):
        if not (x[i * LANES + lane] > 0 and y[i * LANES + lane] > 0):
            return True
    return False


cdef inline int lanes_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                           const Side *q, npy_intp n, real type_tag) noexcept nogil:
    cdef npy_intp even = n + n % 2, stride = (n + 4) // 4 * 4
    cdef npy_intp square = (even + 2) * stride * LANES, line = even * LANES
    cdef npy_intp length = 3 * square + 4 * line + LANES
    cdef void *memory = malloc(length * sizeof(double) + 64)
    if memory == NULL:
        return NO_MEMORY
    cdef double *factor_p = aligned(memory)
    cdef double *factor_q = factor_p + square
    cdef double *y = factor_q + square
    cdef double *reciprocal = y + square
    cdef double *t = reciprocal + line
    cdef double *diagonal_p = t + line
    cdef double *diagonal_q = diagonal_p + line
    cdef double *squares = diagonal_q + line
    cdef double kl[MOST_LANES]
    cdef char *out = batch.operands[2 if q == NULL else 4]
    cdef npy_intp out_outer = batch.outer[2 if q == NULL else 4]
    cdef npy_intp group, lane, i
    cdef bint fresh
    cdef int status = 0
    memset(factor_p, 0, 2 * square * sizeof(double))
    if q == NULL:
        for i in range(line):
            diagonal_q[i] = 1.0
    for group from first <= group < last by LANES:
        if q != NULL:
            fresh = group == first or not q.shared
            lanes_load(<vec *> factor_q, q, group, last, n, stride, not fresh, type_tag)
            if fresh:
                if q.covariance:
                    lanes_cholesky(<vec *> factor_q, <vec *> reciprocal, stride, even)
                else:
                    lanes_reciprocals(<vec *> factor_q, <vec *> reciprocal, stride, even)
                lanes_diagonal(<vec *> factor_q, <vec *> diagonal_q, stride, even)
        fresh = group == first or not p.shared
        lanes_load(<vec *> factor_p, p, group, last, n, stride, not fresh, type_tag)
        if fresh:
            if p.covariance:
                lanes_cholesky(<vec *> factor_p, <vec *> t, stride, even)
            lanes_diagonal(<vec *> factor_p, <vec *> diagonal_p, stride, even)
        if q == NULL:
            lanes_whiten_standard(<vec *> factor_p, <vec *> y, <vec *> squares, stride, even)
        else:
            lanes_whiten(<vec *> factor_p, <vec *> factor_q, <vec *> reciprocal, <vec *> y,
                         <vec *> squares, stride, even)
        lanes_diagonal(<vec *> y, <vec *> t, stride, even)
        lanes_divergence(diagonal_p, diagonal_q, t, squares, even, kl)
        for lane in range(min(<npy_intp> LANES, last - group)):
            if not isfinite(kl[lane]):
                status |= settle(&kl[lane], lanes_improper(diagonal_p, diagonal_q, lane, n),
                                 p, q, group + lane, n, type_tag)
            (<real *> (out + (group + lane) * out_outer))[0] = <real> kl[lane]
    free(memory)
    return status


# ---- panels: one larger matrix at a time ------------------------------------------------------

cdef inline void panels_load_matrix(double *a, const Side *s, npy_intp item, npy_intp n,
                                    npy_intp padded, real type_tag) noexcept nogil:
    """Lower triangle, continued by an identity to whole panels."""
    cdef char *at[MOST_ROWS]
    cdef char *matrix = s.matrix + item * s.matrix_outer
    cdef npy_intp row = s.row, column = s.column, i, k, r, rows
    cdef double *x
    for i from 0 <= i < padded by ROWS:
        x = a + panels_size(i)
        rows = min(n - i, <npy_intp> ROWS)
        for r in range(ROWS):
            at[r] = matrix + (i + min(r, rows - 1)) * row
        for k in range(i):
            for r in range(ROWS):
                x[k * ROWS + r] = (<real *> (at[r] + k * column))[0]
        for k in range(i, i + rows):
            for r in range(k - i, rows):
                x[k * ROWS + r] = (<real *> (at[r] + k * column))[0]
        for r in range(rows, ROWS):
            for k in range(i + r):
                x[k * ROWS + r] = 0.0
            x[(i + r) * ROWS + r] = 1.0


cdef inline void panels_load_shift(double *shift, const Side *p, const Side *q, npy_intp item,
                                   npy_intp n, npy_intp padded, real type_tag) noexcept nogil:
    """mu_p - mu_q, or mu_p when q is NULL."""
    cdef npy_intp i
    for i in range(n):
        shift[i] = (<real *> (p.loc + item * p.loc_outer + i * p.loc_inner))[0]
        if q != NULL:
            shift[i] -= (<real *> (q.loc + item * q.loc_outer + i * q.loc_inner))[0]
    for i in range(n, padded):
        shift[i] = 0.0


cdef inline bint panels_improper(const double *x, const double *y, npy_intp n) noexcept nogil:
    cdef npy_intp i
    for i in range(n):
        if not (x[i] > 0 and y[i] > 0):
            return True
    return False


cdef inline int panels_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                            const Side *q, npy_intp n, real type_tag) noexcept nogil:
    cdef npy_intp padded = (n + ROWS - 1) // ROWS * ROWS, size = panels_size(padded)
    cdef void *memory = malloc((2 * size + (ROWS + 5) * padded) * sizeof(double) + 64)
    if memory == NULL:
        return NO_MEMORY
    cdef double *factor_p = aligned(memory)
    cdef double *factor_q = factor_p + size
    cdef double *scratch = factor_q + size
    cdef double *reciprocal = scratch + ROWS * padded
    cdef double *shift = reciprocal + padded
    cdef double *t = shift + padded
    cdef double *diagonal_p = t + padded
    cdef double *diagonal_q = diagonal_p + padded
    cdef double squares, kl
    cdef char *out = batch.operands[2 if q == NULL else 4]
    cdef npy_intp out_outer = batch.outer[2 if q == NULL else 4]
    cdef npy_intp item, i
    cdef int status = 0
    for i in range(padded):
        diagonal_q[i] = 1.0
    for item in range(first, last):
        if q != NULL and (item == first or not q.shared):
            panels_load_matrix(factor_q, q, item, n, padded, type_tag)
            if q.covariance:
                panels_cholesky(factor_q, reciprocal, padded)
            for i in range(padded):
                diagonal_q[i] = factor_q[element(i, i)]
                reciprocal[i] = safe_reciprocal(diagonal_q[i])
        if item == first or not p.shared:
            panels_load_matrix(factor_p, p, item, n, padded, type_tag)
            if p.covariance:
                panels_cholesky(factor_p, t, padded)
            for i in range(padded):
                diagonal_p[i] = factor_p[element(i, i)]
        panels_load_shift(shift, p, q, item, n, padded, type_tag)
        if q == NULL:
            panels_whiten_standard(factor_p, shift, padded, t, &squares)
        else:
            panels_whiten(factor_p, factor_q, shift, reciprocal, scratch, padded, t, &squares)
        kl = panels_divergence(diagonal_p, diagonal_q, t, squares, padded)
        if not isfinite(kl):
            status |= settle(&kl, panels_improper(diagonal_p, diagonal_q, n), p, q, item, n,
                             type_tag)
        (<real *> (out + item * out_outer))[0] = <real> kl
    free(memory)
    return status


cdef inline int mvn_rows(const Batch *batch, npy_intp first, npy_intp last, bint cov_p, bint cov_q,
                         bint standard_q, real type_tag) noexcept nogil:
    """KL of the items first .. last - 1; `type_tag` only chooses the type. Returns status bits."""
    cdef npy_intp n = batch.core[0]
    cdef Side p = side(batch, 0, cov_p), q
    cdef const Side *other = NULL
    if not standard_q:
        q = side(batch, 1, cov_q)
        other = &q
    cdef npy_intp alone = last - first
    cdef int status = 0
    if n <= LANES_LIMIT:
        alone %= LANES
        if n < PANELS_START or 2 * alone > LANES:
            alone = 0
    if alone < last - first:
        status |= lanes_rows(batch, first, last - alone, &p, other, n, type_tag)
    if alone > 0:
        status |= panels_rows(batch, last - alone, last, &p, other, n, type_tag)
    return status


# The kernel that the gufuncs carry.

cdef inline Plan plan_mvn(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan
    cdef double n = batch.core[0]
    cdef bint shared = not kernel.options[2] and batch.outer[3] == 0
    plan.row_ns = 20 + n * (3 + n * (0.9 + 0.03 * n))
    plan.setup_ns = 0.4 * plan.row_ns if shared else 0.0
    plan.group = LANES if n <= LANES_LIMIT else 1
    plan.splits_rows = False
    return plan


cdef inline int mvn_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch) noexcept nogil:
    return mvn_rows(batch, first, last, kernel.options[0], kernel.options[1], kernel.options[2],
                    <float> 0)


cdef inline int mvn_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch) noexcept nogil:
    return mvn_rows(batch, first, last, kernel.options[0], kernel.options[1], kernel.options[2],
                    <double> 0)
