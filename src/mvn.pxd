"""Multivariate normals: KL(N_p || N_q) from lower Cholesky factors or covariances.

With S_p = L_p L_p^T, S_q = L_q L_q^T and Y = L_q^-1 (L_p - L_q), lower triangular with diagonal y,

    KL = 1/2 (|L_q^-1 (mu_p - mu_q)|^2 + |Y|^2) + sum_i (y_i - log1p(y_i)),

a sum of terms >= 0: nothing cancels when P is close to Q, where L_p - L_q is exact while
L_q^-1 L_p = I + Y would not be. No inverse and no determinant is formed.

Largest relative error from factors up to D = 17: 1e-13 (9e-15 seen), for float32 4e-6 (8e-7 seen);
from covariances the Cholesky factorisation's own, about D eps cond(S), with the eps of double.

float32 is computed in double from covariances, whose factorisation would lose digits, and below
SINGLE rows, where loading is what costs. From there on factors are taken in float32: vectors hold
twice as many numbers. The solve is accurate unless L_q magnifies rounding errors, which a probe
shows: one more column, L_q s with signs s, is solved along. Where s is not found again to 16 units
of 2^-24, the item is computed in double.

Diagonal elements of L_q below 2^-1024 are good for equality, 0, but not for accuracy.

Matrices of up to LANES_LIMIT rows lie side by side, one in a SIMD lane each, with a kernel for each
number of rows up to SMALL; larger ones are taken one at a time, in panels of rows (mvn.h). Lanes
have the formulas for numbers of ordinary size, one logarithm for four y_i; what they cannot give is
computed in panels, too, which sort out bad input and extreme scales.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY, NAN, isfinite, isinf, isnan
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from numpy cimport npy_intp

from gufunc cimport (
    INVALID, NO_MEMORY, Batch, Kernel, Plan, Watch, look_for_signals, omp_get_thread_num)
from vecmath cimport real

cdef extern from "mvn.h" nogil:
    ctypedef double vec "mvn_vec"  # LANES doubles
    enum:
        LANES "MVN_LANES"
        ROWS "MVN_ROWS"
        COLUMNS "MVN_COLUMNS"
        DEPTH "MVN_DEPTH"
        SMALL "MVN_SMALL"
        LANES_LIMIT "MVN_LANES_LIMIT"
    ctypedef struct Side "mvn_side":  # one distribution of every item: addresses, strides in bytes
        char *loc
        npy_intp loc_outer, loc_inner
        char *matrix
        npy_intp matrix_outer, row, column
        bint covariance
        bint shared
    ctypedef struct SmallFactor "mvn_small_factor":
        pass
    void small_f32 "mvn_small_f32"(
        const Side *p, const Side *q, npy_intp first, npy_intp groups,
        SmallFactor *a, SmallFactor *b, bint fresh, double *kl, npy_intp n)
    void small_f64 "mvn_small_f64"(
        const Side *p, const Side *q, npy_intp first, npy_intp groups,
        SmallFactor *a, SmallFactor *b, bint fresh, double *kl, npy_intp n)
    bint all_finite "mvn_all_finite"(const double *x, npy_intp count)
    ctypedef struct Lanes "mvn_lanes":
        vec *p
        vec *q
        vec *y
        vec *reciprocal
    void lanes_group_f32 "mvn_lanes_group_f32"(
        const Lanes *a, const Side *p, const Side *q, npy_intp item, bint load_p,
        bint load_q, npy_intp stride, npy_intp n, double *kl)
    void lanes_group_f64 "mvn_lanes_group_f64"(
        const Lanes *a, const Side *p, const Side *q, npy_intp item, bint load_p,
        bint load_q, npy_intp stride, npy_intp n, double *kl)
    npy_intp lanes_stride "MVN_STRIDE"(npy_intp n)
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
    void panel_load_f32 "mvn_panel_load_f32"(
        double *x, char *const *at, npy_intp step, npy_intp count)
    void panel_load_f64 "mvn_panel_load_f64"(
        double *x, char *const *at, npy_intp step, npy_intp count)
    void panels_solve_f32 "mvn_panels_solve_f32"(
        float *x, npy_intp size, npy_intp panels, const float *factor, npy_intp stride,
        npy_intp n, const float *zeros, const float *reciprocal, npy_intp begin, npy_intp step,
        npy_intp block, npy_intp first, npy_intp last, float *squares)
    void panels_differences_f32 "mvn_panels_differences_f32"(
        float *x, const float *p, npy_intp stride_p, const float *q, npy_intp stride_q,
        const float *shift, const float *probe, npy_intp index, npy_intp panels, npy_intp n,
        npy_intp padded, npy_intp size)
    void panels_solve_f64 "mvn_panels_solve_f64"(
        double *x, npy_intp size, npy_intp panels, const double *factor, npy_intp stride,
        npy_intp n, const double *zeros, const double *reciprocal, npy_intp begin, npy_intp step,
        npy_intp block, npy_intp first, npy_intp last, double *squares)
    void panels_differences_f64 "mvn_panels_differences_f64"(
        double *x, const double *p, npy_intp stride_p, const double *q, npy_intp stride_q,
        const double *shift, const double *probe, npy_intp index, npy_intp panels, npy_intp n,
        npy_intp padded, npy_intp size)
    void make_probe "mvn_probe"(
        const float *l, npy_intp stride, npy_intp n, float *signs, float *probe)
    double probe_error "mvn_probe_error"(const float *x, const float *signs, npy_intp n)
    void panel_factor "mvn_panel_factor"(double *x, double *reciprocal, npy_intp i)
    void panel_store "mvn_panel_store"(
        const double *x, double *rows, npy_intp stride, npy_intp first, npy_intp last)
    double whiten_standard "mvn_whiten_standard"(
        const double *p, npy_intp stride, const double *shift, npy_intp n)
    void take_diagonal "mvn_diagonal"(
        const double *l, npy_intp stride, npy_intp n, double *diagonal)
    void reciprocals "mvn_reciprocals"(const double *y, double *inverse, npy_intp n)
    void prefetch "mvn_prefetch"(
        const char *matrix, npy_intp row, npy_intp size, npy_intp first, npy_intp last)
    double divergence "mvn_divergence"(
        const double *x, const double *y, double *t, double squares, npy_intp n)

# An item's bits do not depend on its neighbours: its size and numbers alone choose the formulas.
cdef enum:
    MOST_LANES = 8
    MOST_GROUPS = 16  # of small matrices between two looks at what they gave
    MOST_ROWS = 32
    BLOCK = 8        # least panels of a covariance that threads share before they are factorised
    MOST_TOGETHER = 8    # panels that are solved together
    SINGLE = 32      # rows from which on float32 pays, where it is exact enough
    LARGE = 128      # rows from which on signals are looked for within a matrix
    AHEAD = 160      # rows up to which the next item is asked for: the cache holds both

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


cdef inline bint lanes_improper(const double *x, const double *y, npy_intp lane,
                                npy_intp n) noexcept nogil:
    """Whether a diagonal element of either factor of an item is not positive."""
    cdef npy_intp i
    for i in range(n):
        if not (x[i * LANES + lane] > 0 and y[i * LANES + lane] > 0):
            return True
    return False


# ---- small: a kernel for each number of rows up to SMALL --------------------------------------

cdef enum:
    ALONE = 4  # status bit: results that are not finite are to be computed once more, alone


cdef inline int put(const Batch *batch, npy_intp first, npy_intp count, const double *kl,
                    bint standard_q, real type_tag) noexcept nogil:
    """Write results of items side by side; where one is not finite, either the item is bad, or its
    numbers are out of the range of the formulas for lanes."""
    cdef char *out = batch.operands[2 if standard_q else 4]
    cdef npy_intp outer = batch.outer[2 if standard_q else 4], i
    if outer == sizeof(real):
        for i in range(count):
            (<real *> out)[first + i] = <real> kl[i]
    else:
        for i in range(count):
            (<real *> (out + (first + i) * outer))[0] = <real> kl[i]
    return 0 if all_finite(kl, count) else <int> ALONE


cdef inline Side alone(const Side *s, npy_intp item) noexcept nogil:
    """One item, in every lane."""
    cdef Side one = s[0]
    one.loc += item * s.loc_outer
    one.matrix += item * s.matrix_outer
    one.loc_outer = one.matrix_outer = 0
    return one


cdef inline void small_groups(const Side *p, const Side *q, npy_intp first, npy_intp groups,
                              SmallFactor *a, SmallFactor *b, bint fresh, double *kl, npy_intp n,
                              real type_tag) noexcept nogil:
    if real is float:
        small_f32(p, q, first, groups, a, b, fresh, kl, n)
    else:
        small_f64(p, q, first, groups, a, b, fresh, kl, n)


cdef inline int small_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                           const Side *q, npy_intp n, real type_tag) noexcept nogil:
    cdef SmallFactor a, b
    cdef Side one_p, one_q
    cdef double kl[MOST_GROUPS * MOST_LANES]
    cdef npy_intp item = first, groups
    cdef int status = 0
    if last - first < LANES:
        for item in range(first, last):
            one_p = alone(p, item)
            if q != NULL:
                one_q = alone(q, item)
            small_groups(&one_p, NULL if q == NULL else &one_q, 0, 1, &a, &b, True, kl, n, type_tag)
            status |= put(batch, item, 1, kl, q == NULL, type_tag)
        return status
    while item < last:
        item = min(item, last - LANES)  # the last group overlaps the one before
        groups = min(<npy_intp> MOST_GROUPS, (last - item) // LANES)
        small_groups(p, q, item, groups, &a, &b, item == first, kl, n, type_tag)
        status |= put(batch, item, groups * LANES, kl, q == NULL, type_tag)
        item += groups * LANES
    return status


# ---- lanes: matrices of up to LANES_LIMIT rows, LANES items side by side ----------------------

cdef inline void lanes_group(const Lanes *a, const Side *p, const Side *q, npy_intp item,
                             bint fresh, npy_intp stride, npy_intp n, double *kl,
                             real type_tag) noexcept nogil:
    cdef bint load_p = fresh or not p.shared, load_q = q != NULL and (fresh or not q.shared)
    if real is float:
        lanes_group_f32(a, p, q, item, load_p, load_q, stride, n, kl)
    else:
        lanes_group_f64(a, p, q, item, load_p, load_q, stride, n, kl)


cdef inline int lanes_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                           const Side *q, npy_intp n, real type_tag) noexcept nogil:
    cdef npy_intp even = n + n % 2, stride = lanes_stride(n), square = (even + 2) * stride
    cdef npy_intp item = first, i
    cdef Side one_p, one_q
    cdef double kl[MOST_LANES]
    cdef Lanes a
    cdef int status = 0
    cdef void *memory = malloc((3 * square + even) * sizeof(vec) + 64)
    if memory == NULL:
        return NO_MEMORY
    a.p = <vec *> aligned(memory)
    a.q, a.y, a.reciprocal = a.p + square, a.p + 2 * square, a.p + 3 * square
    memset(a.p, 0, 2 * square * sizeof(vec))
    for i in range(even):
        a.reciprocal[i] = ones()
    if last - first < LANES:
        for item in range(first, last):
            one_p = alone(p, item)
            if q != NULL:
                one_q = alone(q, item)
            lanes_group(&a, &one_p, NULL if q == NULL else &one_q, 0, True, stride, n, kl, type_tag)
            status |= put(batch, item, 1, kl, q == NULL, type_tag)
        item = last
    while item < last:
        item = min(item, last - LANES)  # the last group overlaps the one before
        lanes_group(&a, p, q, item, item == first, stride, n, kl, type_tag)
        status |= put(batch, item, <npy_intp> LANES, kl, q == NULL, type_tag)
        item += LANES
    free(memory)
    return status


# ---- panels: one larger matrix at a time ------------------------------------------------------

ctypedef struct Rows:
    # A lower triangular factor in double, row after row; `stride` in elements.
    const double *data
    npy_intp stride

ctypedef struct Rows32:
    const float *data
    npy_intp stride

ctypedef struct Panels:
    # Scratch of one thread, or of several that share a matrix. The arrays have `padded` elements.
    void *memory
    npy_intp n, padded       # rows, and rows up to a whole panel
    npy_intp size            # of a panel in double, and squares behind it
    npy_intp together        # panels that are solved together
    npy_intp block           # panels of a covariance between two factorisations
    npy_intp stride          # from one row to the next of a factor that is not read in place
    double *factor_p
    double *factor_q
    double *x                # panels
    double *diagonal_p
    double *diagonal_q
    double *reciprocal
    double *shift
    double *t
    double *zeros
    double *squares          # one for panels solved together
    float *shift_single      # the same for a solve in float32
    float *reciprocal_single
    float *signs
    float *probe
    double *missed           # mean square of what the probe misses by


cdef inline bint in_place(const Side *s, real type_tag) noexcept nogil:
    """Whether a factor can be read where it lies, as numbers of its type."""
    return (not s.covariance and s.column == sizeof(real)
            and s.row % <npy_intp> sizeof(real) == 0)


cdef inline bint panels_new(Panels *a, npy_intp n, bint copy_p, bint copy_q, bint covariances,
                            int threads) noexcept nogil:
    """Room for the panels that `threads` threads have at hand, and for factors to be copied."""
    cdef npy_intp padded = (n + ROWS - 1) // ROWS * ROWS, stride = padded + ROWS, i
    cdef npy_intp square = padded * stride, size = (padded + 2) * ROWS, panels
    a.together = max(<npy_intp> 2, min(<npy_intp> MOST_TOGETHER, n // 512 * 2))
    a.block = max(<npy_intp> BLOCK, padded // ROWS // 8)
    panels = threads * a.together
    if covariances:
        panels = max(panels, a.block)
    cdef npy_intp length = (copy_p + copy_q) * square + panels * size + 9 * padded + 2 * ROWS
    a.memory = malloc(length * sizeof(double) + 64)
    if a.memory == NULL:
        return False
    a.n, a.padded, a.stride, a.size = n, padded, stride, size
    a.diagonal_p = aligned(a.memory)
    a.diagonal_q = a.diagonal_p + padded
    a.reciprocal = a.diagonal_q + padded
    a.shift = a.reciprocal + padded
    a.t = a.shift + padded
    a.zeros = a.t + padded
    a.squares = a.zeros + padded
    a.shift_single = <float *> (a.squares + padded)
    a.reciprocal_single = a.shift_single + padded
    a.signs = a.reciprocal_single + padded
    a.probe = a.signs + padded
    a.missed = <double *> (a.probe + padded)
    a.x = a.missed + 2 * ROWS
    a.factor_p = a.x + panels * size
    a.factor_q = a.factor_p + copy_p * square
    for i in range(padded):
        a.diagonal_q[i] = 1.0
        a.reciprocal[i] = a.reciprocal_single[i] = 1.0
        a.zeros[i] = 0.0
    return True


cdef inline void panel_load(double *x, char *const *at, npy_intp step, npy_intp count,
                            real type_tag) noexcept nogil:
    if real is float:
        panel_load_f32(x, at, step, count)
    else:
        panel_load_f64(x, at, step, count)


cdef inline void cholesky_load(const Panels *a, const Side *s, npy_intp item, double *x,
                               npy_intp i, real type_tag) noexcept nogil:
    """Rows i .. i + ROWS - 1 of a covariance as a panel, continued by an identity."""
    cdef char *at[MOST_ROWS]
    cdef char *matrix = s.matrix + item * s.matrix_outer
    cdef npy_intp n = a.n, r, k
    for r in range(ROWS):
        at[r] = matrix + min(i + r, n - 1) * s.row
    panel_load(x, at, s.column, min(i + ROWS, n), type_tag)
    if i + ROWS > n:
        memset(x + n * ROWS, 0, (i + ROWS - n) * ROWS * sizeof(double))
        for r in range(n - i, ROWS):
            for k in range(n):
                x[k * ROWS + r] = 0.0
            x[(i + r) * ROWS + r] = 1.0


cdef inline npy_intp rows_of(real type_tag) noexcept nogil:
    """How many rows a panel has: vectors hold twice as many floats."""
    return ROWS if real is double else 2 * ROWS


cdef inline void solve(const Panels *a, real *x, npy_intp panels, const real *factor,
                       npy_intp stride, npy_intp n, const real *reciprocal, npy_intp begin,
                       npy_intp step, npy_intp first, npy_intp last, double *squares,
                       Watch *watch) noexcept nogil:
    """X <- X L^-T in the columns first .. last - 1 of some panels; panel g is 0 left of
    begin + g step. Adds to `squares` the squares of the first panel's rows, then of the others'."""
    cdef npy_intp rows = rows_of(<real> 0), size = rows * (a.padded + 2), block, r
    cdef real *sums = x + rows * a.padded
    for block from max(begin, 0) // DEPTH * DEPTH <= block < last by DEPTH:
        if a.n >= LARGE:
            look_for_signals(watch)
            if watch.stop:
                return
        for r in range(2 * rows):
            sums[r] = 0
        if real is float:
            panels_solve_f32(x, size, panels, factor, stride, n, <const float *> a.zeros,
                             reciprocal, begin, step, block, first, last, sums)
        else:
            panels_solve_f64(x, size, panels, factor, stride, n, a.zeros, reciprocal, begin, step,
                             block, first, last, sums)
        for r in range(2 * rows):
            squares[r] += sums[r]


cdef inline void cholesky_begin(const Panels *a, const Side *s, npy_intp item, double *factor,
                                npy_intp done, npy_intp index, npy_intp panels, Watch *watch,
                                real type_tag) noexcept nogil:
    """Some panels of the block that starts at row `done`, without what is above the block."""
    cdef double squares[2 * MOST_ROWS]
    cdef npy_intp i
    if watch.stop:
        return
    for i in range(index, index + panels):
        cholesky_load(a, s, item, a.x + i * a.size, done + i * ROWS, type_tag)
    solve(a, a.x + index * a.size, panels, factor, a.stride, done, a.reciprocal, 0, 0, 0, done,
          squares, watch)


cdef inline void cholesky(const Panels *a, const Side *s, npy_intp item, double *factor,
                          Watch *watch, real type_tag) noexcept nogil:
    """The factor of a covariance. Threads share the panels of a block up to its first column;
    the block's own triangle is one thread's. Whatever the threads, every sum runs in one order."""
    cdef npy_intp done, index, count, share, i
    cdef double *x
    cdef double squares[2 * MOST_ROWS]
    for done from 0 <= done < a.padded by a.block * ROWS:
        count = min(a.block, (a.padded - done) // ROWS)
        if watch.threads > 1 and done > 0:
            share = max(<npy_intp> 1, min(a.together, count // watch.threads))
            for index in prange((count + share - 1) // share, num_threads=watch.threads,
                                schedule="dynamic"):
                cholesky_begin(a, s, item, factor, done, index * share,
                               min(share, count - index * share), watch, type_tag)
        else:
            for index from 0 <= index < count by MOST_TOGETHER:
                cholesky_begin(a, s, item, factor, done, index,
                               min(<npy_intp> MOST_TOGETHER, count - index), watch, type_tag)
        for index in range(count):
            i = done + index * ROWS
            x = a.x + index * a.size
            solve(a, x, 1, factor, a.stride, i, a.reciprocal, 0, 0, done, i, squares, watch)
            if watch.stop:
                return
            panel_factor(x, a.reciprocal, i)
            panel_store(x, factor + i * a.stride, a.stride, 0, i + ROWS)


cdef inline void copy_factor(const Panels *a, const Side *s, npy_intp item, double *factor,
                             real type_tag) noexcept nogil:
    cdef char *row
    cdef npy_intp i, j
    for i in range(a.n):
        row = s.matrix + item * s.matrix_outer + i * s.row
        if s.column == sizeof(real):
            for j in range(i + 1):
                factor[i * a.stride + j] = (<real *> row)[j]
        else:
            for j in range(i + 1):
                factor[i * a.stride + j] = (<real *> (row + j * s.column))[0]


cdef inline Rows factor_of(const Panels *a, const Side *s, npy_intp item, double *factor,
                           double *diagonal, bint fresh, Watch *watch,
                           real type_tag) noexcept nogil:
    """One side's factor and its diagonal; not `fresh`: those of the item before."""
    cdef Rows rows
    if real is double and in_place(s, type_tag):
        rows.data = <const double *> (s.matrix + item * s.matrix_outer)
        rows.stride = s.row // <npy_intp> sizeof(double)
    else:
        rows.data, rows.stride = factor, a.stride
        if fresh and s.covariance:
            cholesky(a, s, item, factor, watch, type_tag)
        elif fresh:
            copy_factor(a, s, item, factor, type_tag)
    if fresh and not watch.stop:
        take_diagonal(rows.data, rows.stride, a.n, diagonal)
    return rows


cdef inline void load_diagonal(double *diagonal, const Side *s, npy_intp item, npy_intp n,
                               real type_tag) noexcept nogil:
    cdef char *matrix = s.matrix + item * s.matrix_outer
    cdef npy_intp i
    for i in range(n):
        diagonal[i] = (<real *> (matrix + i * (s.row + s.column)))[0]


cdef inline void load_shift(double *shift, const Side *p, const Side *q, npy_intp item,
                            npy_intp n, real type_tag) noexcept nogil:
    """mu_p - mu_q, or mu_p when q is NULL."""
    cdef npy_intp i
    for i in range(n):
        shift[i] = (<real *> (p.loc + item * p.loc_outer + i * p.loc_inner))[0]
        if q != NULL:
            shift[i] -= (<real *> (q.loc + item * q.loc_outer + i * q.loc_inner))[0]


cdef inline void prefetch_rows(const Side *s, npy_intp item, npy_intp first, npy_intp last,
                               real type_tag) noexcept nogil:
    """Ask for some rows of an item's matrix, if they are yet to be read and lie side by side."""
    if s.column == sizeof(real) and not s.shared:
        prefetch(s.matrix + item * s.matrix_outer, s.row, sizeof(real), first, last)


cdef inline double whiten_some(const Panels *a, const real *p, npy_intp stride_p, const real *q,
                               npy_intp stride_q, npy_intp index, npy_intp slot,
                               Watch *watch) noexcept nogil:
    """The squares of some panels of [z | Y]^T from number `index` on, computed in place `slot`."""
    cdef npy_intp rows = rows_of(<real> 0), n = a.n, extra = 1 if real is double else 2, r
    cdef npy_intp panels = min(a.together, (n + extra - 1) // rows + 1 - index)
    cdef npy_intp padded = (n + COLUMNS - 1) // COLUMNS * COLUMNS, begin = index * rows - COLUMNS
    cdef npy_intp first = max(begin, <npy_intp> 0), size = rows * (a.padded + 2)
    cdef real *x = <real *> (a.x + slot * a.together * a.size)
    cdef double squares[2 * MOST_ROWS]
    cdef double total = 0.0
    if watch.stop:
        return 0.0
    for r in range(2 * rows):
        squares[r] = 0.0
    if real is float:
        panels_differences_f32(x, p, stride_p, q, stride_q, a.shift_single, a.probe, index, panels,
                               n, padded, size)
        solve(a, x, panels, q, stride_q, n, a.reciprocal_single, begin, rows, first, padded,
              squares, watch)
        if index == 0:
            a.missed[0] = probe_error(x, a.signs, n)
            squares[rows - 2] = 0.0
    else:
        panels_differences_f64(x, p, stride_p, q, stride_q, a.shift, NULL, index, panels, n, padded,
                               size)
        solve(a, x, panels, q, stride_q, n, a.reciprocal, begin, rows, first, padded, squares,
              watch)
    for r in range(2 * rows):
        total += squares[r]
    return total


# By how much the mean square root a float32 solve may miss its probe, in units of 2^-24.
cdef enum:
    PROBE_ULPS = 16


cdef inline bint found(const Panels *a) noexcept nogil:
    """Whether rounding errors stay small: the solve found the probe again."""
    return a.missed[0] <= (PROBE_ULPS * 2.0 ** -24) ** 2


cdef inline double whiten(const Panels *a, const real *p, npy_intp stride_p, const real *q,
                          npy_intp stride_q, const Side *side_p, const Side *side_q,
                          npy_intp following, Watch *watch) noexcept nogil:
    """|z|^2 + |Y|^2 where [z | Y] = L_q^-1 ([mu_p | L_p] - [mu_q | L_q]). Threads share the panels.
    The matrices of the item `following` (negative: none) are asked for along the way."""
    cdef npy_intp extra = 1 if real is double else 2, step = a.together * rows_of(<real> 0)
    cdef npy_intp groups = (a.n + extra - 1) // step + 1, index, last
    cdef double squares = 0.0
    if watch.threads > 1:
        for index in prange(groups, num_threads=watch.threads, schedule="dynamic"):
            a.squares[index] = whiten_some(a, p, stride_p, q, stride_q, index * a.together,
                                           omp_get_thread_num(), watch)
    else:
        for index in range(groups):
            a.squares[index] = whiten_some(a, p, stride_p, q, stride_q, index * a.together, 0,
                                           watch)
            if following >= 0:
                last = min((index + 1) * step, a.n)
                prefetch_rows(side_p, following, index * step, last, <real> 0)
                prefetch_rows(side_q, following, index * step, last, <real> 0)
            if real is float and not found(a):
                return NAN
    for index in range(groups):
        squares += a.squares[index]
    return squares


cdef inline Rows32 single_factor(const Panels *a, const Side *s, npy_intp item,
                                 float *factor) noexcept nogil:
    """A factor in float32: where it lies, or a copy."""
    cdef Rows32 rows
    cdef npy_intp i, j
    cdef char *row
    if in_place(s, <float> 0):
        rows.data = <const float *> (s.matrix + item * s.matrix_outer)
        rows.stride = s.row // <npy_intp> sizeof(float)
        return rows
    rows.data, rows.stride = factor, a.stride
    for i in range(a.n):
        row = s.matrix + item * s.matrix_outer + i * s.row
        for j in range(i + 1):
            factor[i * a.stride + j] = (<float *> (row + j * s.column))[0]
    return rows


cdef inline bint whiten_single(const Panels *a, const Side *p, const Side *q, npy_intp item,
                               npy_intp following, Watch *watch, double *squares) noexcept nogil:
    """`whiten` of float32 factors in float32; whether the result can be trusted."""
    cdef Rows32 rows_p = single_factor(a, p, item, <float *> a.factor_p)
    cdef Rows32 rows_q = single_factor(a, q, item, <float *> a.factor_q)
    cdef npy_intp i
    for i in range(a.n):
        a.shift_single[i] = <float> a.shift[i]
        a.reciprocal_single[i] = <float> a.reciprocal[i]
    make_probe(rows_q.data, rows_q.stride, a.n, a.signs, a.probe)
    squares[0] = whiten(a, rows_p.data, rows_p.stride, rows_q.data, rows_q.stride, p, q, following,
                        watch)
    return found(a) and 1e-30 < squares[0] < 1e30


cdef inline bint panels_improper(const double *x, const double *y, npy_intp n) noexcept nogil:
    cdef npy_intp i
    for i in range(n):
        if not (x[i] > 0 and y[i] > 0):
            return True
    return False


cdef inline int panels_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                            const Side *q, npy_intp n, Watch *watch,
                            real type_tag) noexcept nogil:
    cdef bint covariances = p.covariance or (q != NULL and q.covariance)
    cdef bint single = real is float and n >= SINGLE and not covariances and q != NULL
    cdef bint copy_p = real is float or not in_place(p, type_tag)
    cdef bint copy_q = q != NULL and (real is float or not in_place(q, type_tag))
    cdef Panels a
    cdef Rows rows_p, rows_q
    cdef double squares, kl
    cdef char *out = batch.operands[2 if q == NULL else 4]
    cdef npy_intp out_outer = batch.outer[2 if q == NULL else 4], item, following, i
    cdef bint fresh, trusted
    cdef int status = 0
    if not panels_new(&a, n, copy_p, copy_q, covariances, watch.threads):
        return NO_MEMORY
    for item in range(first, last):
        following = item + 1 if item + 1 < last and n <= AHEAD else -1
        load_shift(a.shift, p, q, item, n, type_tag)
        trusted = False
        if single:
            load_diagonal(a.diagonal_p, p, item, n, type_tag)
            load_diagonal(a.diagonal_q, q, item, n, type_tag)
            reciprocals(a.diagonal_q, a.reciprocal, n)
            trusted = whiten_single(&a, p, q, item, following, watch, &squares)
        if not trusted:
            fresh = single or item == first or not p.shared
            rows_p = factor_of(&a, p, item, a.factor_p, a.diagonal_p, fresh, watch, type_tag)
            if q != NULL:
                fresh = single or item == first or not q.shared
                rows_q = factor_of(&a, q, item, a.factor_q, a.diagonal_q, fresh, watch, type_tag)
            reciprocals(a.diagonal_q, a.reciprocal, n)
            if q == NULL:
                squares = whiten_standard(rows_p.data, rows_p.stride, a.shift, n)
            else:
                squares = whiten(&a, rows_p.data, rows_p.stride, rows_q.data, rows_q.stride, p, q,
                                 following if real is double else -1, watch)
        if watch.stop:
            break
        for i in range(n):
            a.t[i] = (a.diagonal_p[i] - a.diagonal_q[i]) * a.reciprocal[i]
        kl = divergence(a.diagonal_p, a.diagonal_q, a.t, squares, n)
        if not isfinite(kl):
            status |= settle(&kl, panels_improper(a.diagonal_p, a.diagonal_q, n), p, q, item, n,
                             type_tag)
        (<real *> (out + item * out_outer))[0] = <real> kl
    free(a.memory)
    return status


cdef inline int mvn_rows(const Batch *batch, npy_intp first, npy_intp last, bint cov_p, bint cov_q,
                         bint standard_q, Watch *watch, real type_tag) noexcept nogil:
    """KL of the items first .. last - 1; `type_tag` only chooses the type. Returns status bits."""
    cdef npy_intp n = batch.core[0]
    cdef Side p = side(batch, 0, cov_p), q
    cdef const Side *other = NULL
    if not standard_q:
        q = side(batch, 1, cov_q)
        other = &q
    cdef char *out = batch.operands[2 if standard_q else 4]
    cdef npy_intp outer = batch.outer[2 if standard_q else 4], count = 1
    cdef int status = ALONE
    if 0 < n <= SMALL:
        status = small_rows(batch, first, last, &p, other, n, type_tag)
    elif n <= LANES_LIMIT:
        status = lanes_rows(batch, first, last, &p, other, n, type_tag)
    else:
        count = last - first
    while status & ALONE and first < last:
        if n > LANES_LIMIT or not isfinite((<real *> (out + first * outer))[0]):
            status |= panels_rows(
                batch, first, first + count, &p, other, n, watch, type_tag)
        first += count
    return status & ~ALONE


# The kernel that the gufuncs carry.

cdef inline Plan plan_mvn(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan
    cdef double n = batch.core[0]
    cdef bint covariances = kernel.options[0] or kernel.options[1]
    cdef bint shared = not kernel.options[2] and batch.outer[3] == 0
    plan.row_ns = 5 + n * (3 + n * (0.9 + (0.03 if covariances else 0.008) * n))
    plan.setup_ns = 0.4 * plan.row_ns if shared else 0.0
    plan.group = LANES if n <= LANES_LIMIT else 1
    plan.splits_rows = True
    return plan


cdef inline int mvn_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch) noexcept nogil:
    return mvn_rows(batch, first, last, kernel.options[0], kernel.options[1], kernel.options[2],
                    watch, <float> 0)


cdef inline int mvn_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch) noexcept nogil:
    return mvn_rows(batch, first, last, kernel.options[0], kernel.options[1], kernel.options[2],
                    watch, <double> 0)
