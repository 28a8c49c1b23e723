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

Matrices of up to LANES_LIMIT rows in double lie side by side, one in a SIMD lane each, with a
kernel for each number of rows up to SMALL; all others, and those that fill no lanes, are taken one
at a time, in panels of rows (mvn.h). Where lanes could be, panels have the same bits: formulas for
numbers of ordinary size, one logarithm for four y_i. What these cannot give is left to panels, too,
which sort out bad input and extreme scales.
"""

from libc.math cimport INFINITY, NAN, isfinite, isinf, isnan
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from numpy cimport npy_intp

from gufunc cimport (
    INVALID, NO_MEMORY, Batch, Kernel, Plan, Step, Watch, look_for_signals,
    omp_get_thread_num, parallel_for)
from vecmath cimport real, wide

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
    ctypedef struct Out "mvn_out":
        char *at
        npy_intp outer
    bint small_f32 "mvn_small_f32"(
        const Side *p, const Side *q, npy_intp first, npy_intp groups,
        SmallFactor *a, SmallFactor *b, bint fresh, Out out, npy_intp n)
    bint small_f64 "mvn_small_f64"(
        const Side *p, const Side *q, npy_intp first, npy_intp groups,
        SmallFactor *a, SmallFactor *b, bint fresh, Out out, npy_intp n)
    bint all_finite "mvn_all_finite"(const double *x, npy_intp count)
    ctypedef struct Lanes "mvn_lanes":  # a group of items, and scratch
        const Side *p
        const Side *q
        npy_intp item, n, stride
        bint load_p, load_q
        vec *a
        vec *b
        vec *y
        vec *reciprocal
    void lanes_divergences_f32 "mvn_lanes_divergences_f32"(const Lanes *group, double *kl)
    void lanes_divergences_f64 "mvn_lanes_divergences_f64"(const Lanes *group, double *kl)
    npy_intp lanes_stride "MVN_STRIDE"(npy_intp n)
    vec ones "mvn_ones"()
    void panel_load_f32 "mvn_panel_load_f32"(
        double *x, char *const *at, npy_intp step, npy_intp count)
    void panel_load_f64 "mvn_panel_load_f64"(
        double *x, char *const *at, npy_intp step, npy_intp count)
    void line_read_f32 "mvn_line_read_f32"(
        double *line, const char *start, npy_intp step, npy_intp count)
    void line_read_f64 "mvn_line_read_f64"(
        double *line, const char *start, npy_intp step, npy_intp count)
    void line_read_single "mvn_line_read_single"(
        float *line, const char *start, npy_intp step, npy_intp count)
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
    double squares_in_tiles "mvn_squares_in_tiles"(
        const double *x, npy_intp size, const double *p, npy_intp stride, const double *shift,
        npy_intp n)
    double sum_as_lanes "mvn_sum_as_lanes"(
        const double *t, const double *x, const double *reciprocal, double squares, npy_intp n)
    double divergence "mvn_divergence"(
        const double *x, const double *y, double *t, double squares, npy_intp n)

# An item's bits do not depend on its neighbours: its size and numbers alone choose the formulas.
cdef enum:
    MOST_LANES = 8
    MOST_ROWS = 32
    MOST_TOGETHER = 8  # panels that are solved together
    BLOCK = 8          # least panels of a covariance that threads share before they are factorised
    SINGLE = 65        # rows from which on float32 pays, where it is exact enough
    LARGE = 128        # rows from which on signals are looked for within a matrix
    AHEAD = 160        # rows up to which the next item is asked for: the cache holds both

cdef enum:  # what a kernel's options say
    COV_P = 0
    COV_Q = 1
    STANDARD_Q = 2


cdef inline bint has_covariances(const Kernel *kernel) noexcept nogil:
    return kernel.options[COV_P] or kernel.options[COV_Q]


cdef inline bint in_single(const Kernel *kernel, npy_intp n, real type_tag) noexcept nogil:
    """Whether factors are taken in float32."""
    return real is float and n >= SINGLE and not (
        has_covariances(kernel) or kernel.options[STANDARD_Q])


cdef inline bint may_go_in_lanes(const Kernel *kernel, npy_intp n, real type_tag) noexcept nogil:
    return n <= LANES_LIMIT and not in_single(kernel, n, type_tag)


cdef inline Side side(const Batch *batch, const Kernel *kernel, int which) noexcept nogil:
    cdef Side s
    s.loc, s.matrix = batch.operands[2 * which], batch.operands[2 * which + 1]
    s.loc_outer, s.matrix_outer = batch.outer[2 * which], batch.outer[2 * which + 1]
    s.loc_inner = batch.inner[3 * which]
    s.row, s.column = batch.inner[3 * which + 1], batch.inner[3 * which + 2]
    s.covariance = kernel.options[COV_Q if which else COV_P]
    s.shared = s.matrix_outer == 0
    return s


cdef inline const Side *second_side(const Batch *batch, const Kernel *kernel,
                                    Side *q) noexcept nogil:
    """Q; NULL for N(0, I)."""
    if kernel.options[STANDARD_Q]:
        return NULL
    q[0] = side(batch, kernel, 1)
    return q


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


cdef inline bint improper(const double *x, const double *y, npy_intp step,
                          npy_intp n) noexcept nogil:
    """Whether a diagonal element of either factor of an item is not positive; `step` apart."""
    cdef npy_intp i
    for i in range(n):
        if not (x[i * step] > 0 and y[i * step] > 0):
            return True
    return False


# Results that are not finite are to be computed once more, alone: either the item is bad, or its
# numbers are out of the range of the formulas for lanes.
cdef enum:
    ALONE = 4  # status bit


cdef inline Side alone(const Side *s, npy_intp item) noexcept nogil:
    """One item, in every lane."""
    cdef Side one = s[0]
    one.loc += item * s.loc_outer
    one.matrix += item * s.matrix_outer
    one.loc_outer = one.matrix_outer = 0
    return one


# ---- small: a kernel for each number of rows up to SMALL --------------------------------------

cdef inline int small_groups(const Side *p, const Side *q, npy_intp first, npy_intp groups,
                             SmallFactor *a, SmallFactor *b, bint fresh, Out out, npy_intp n,
                             real type_tag) noexcept nogil:
    if real is float:
        return 0 if small_f32(p, q, first, groups, a, b, fresh, out, n) else <int> ALONE
    else:
        return 0 if small_f64(p, q, first, groups, a, b, fresh, out, n) else <int> ALONE


cdef inline int small_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                           const Side *q, npy_intp n, real type_tag) noexcept nogil:
    cdef SmallFactor a, b
    cdef Side one_p, one_q
    cdef Out out
    cdef npy_intp output = 2 if q == NULL else 4, groups = (last - first) // LANES, item
    cdef int status = 0
    out.at, out.outer = batch.operands[output], batch.outer[output]
    if groups == 0:
        out.outer = 0  # every lane's result to one place
        for item in range(first, last):
            out.at = batch.operands[output] + item * batch.outer[output]
            one_p = alone(p, item)
            if q != NULL:
                one_q = alone(q, item)
            status |= small_groups(&one_p, NULL if q == NULL else &one_q, 0, 1, &a, &b, True, out,
                                   n, type_tag)
        return status
    status = small_groups(p, q, first, groups, &a, &b, True, out, n, type_tag)
    if first + groups * LANES < last:  # the last group overlaps the one before
        status |= small_groups(p, q, last - LANES, 1, &a, &b, False, out, n, type_tag)
    return status


# ---- lanes: matrices of up to LANES_LIMIT rows, LANES items side by side ----------------------

cdef inline int put(const Batch *batch, npy_intp first, npy_intp count, const double *kl,
                    bint standard_q, real type_tag) noexcept nogil:
    """Write results of items side by side."""
    cdef char *out = batch.operands[2 if standard_q else 4]
    cdef npy_intp outer = batch.outer[2 if standard_q else 4], i
    for i in range(count):
        (<real *> (out + (first + i) * outer))[0] = <real> kl[i]
    return 0 if all_finite(kl, count) else <int> ALONE


cdef inline void lanes_divergences(const Lanes *group, double *kl, real type_tag) noexcept nogil:
    if real is float:
        lanes_divergences_f32(group, kl)
    else:
        lanes_divergences_f64(group, kl)


cdef inline int lanes_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                           const Side *q, npy_intp n, real type_tag) noexcept nogil:
    """LANES items or more."""
    cdef npy_intp stride = lanes_stride(n), square = n * stride, item = first, i
    cdef double kl[MOST_LANES]
    cdef Lanes group
    cdef int status = 0
    cdef void *memory = malloc((3 * square + n) * sizeof(vec) + 64)
    if memory == NULL:
        return NO_MEMORY
    group.p, group.q, group.n, group.stride = p, q, n, stride
    group.a = <vec *> aligned(memory)
    group.b, group.y = group.a + square, group.a + 2 * square
    group.reciprocal = group.a + 3 * square
    for i in range(n):
        group.reciprocal[i] = ones()
    group.load_p = group.load_q = True
    while item < last:
        item = min(item, last - LANES)  # the last group overlaps the one before
        group.item = item
        lanes_divergences(&group, kl, type_tag)
        status |= put(batch, item, <npy_intp> LANES, kl, q == NULL, type_tag)
        group.load_p, group.load_q = not p.shared, q != NULL and not q.shared
        item += LANES
    free(memory)
    return status


# ---- panels: one larger matrix at a time ------------------------------------------------------

ctypedef struct Rows:
    # A lower triangular factor in double or float, row after row; `stride` in elements.
    const void *data
    npy_intp stride

ctypedef struct Panels:
    # Scratch of one thread, or of several that share a matrix. The arrays have `padded` elements.
    void *memory
    Watch *watch             # over the threads that share it
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
                            bint all_together, Watch *watch) noexcept nogil:
    """Room for the panels that the threads have at hand, and for factors to be copied."""
    cdef npy_intp padded = (n + ROWS - 1) // ROWS * ROWS, stride = padded + ROWS, i
    cdef npy_intp square = padded * stride, size = (padded + 2) * ROWS, panels
    a.together = max(<npy_intp> 2, min(<npy_intp> MOST_TOGETHER, n // 512 * 2))
    if all_together:
        a.together = n // ROWS + 1
    a.block = max(<npy_intp> BLOCK, padded // ROWS // 8)
    panels = watch.threads * a.together
    if covariances:
        panels = max(panels, a.block)
    cdef npy_intp length = (copy_p + copy_q) * square + panels * size + 9 * padded + 2 * ROWS
    a.memory = malloc(length * sizeof(double) + 64)
    if a.memory == NULL:
        return False
    a.watch, a.n, a.padded, a.stride, a.size = watch, n, padded, stride, size
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


cdef inline bint is_stopped(const Panels *a) noexcept nogil:
    """Looks for signals within a large matrix."""
    if a.n >= LARGE:
        look_for_signals(a.watch)
    return a.watch.stop


cdef inline npy_intp own_place(const Panels *a) noexcept nogil:
    """This thread's number among those that share the panels."""
    return omp_get_thread_num() if a.watch.threads > 1 else 0


cdef inline void solve(const Panels *a, real *x, npy_intp panels, const real *factor,
                       npy_intp stride, npy_intp n, const real *reciprocal, npy_intp begin,
                       npy_intp step, npy_intp first, npy_intp last,
                       double *squares) noexcept nogil:
    """X <- X L^-T in the columns first .. last - 1 of some panels; panel g is 0 left of
    begin + g step. Adds to `squares` (NULL: they are not wanted) the squares of the first panel's
    rows, then of the others'."""
    cdef npy_intp rows = rows_of(<real> 0), size = rows * (a.padded + 2), block, r
    cdef real *sums = x + rows * a.padded
    for block from max(begin, 0) // DEPTH * DEPTH <= block < last by DEPTH:
        if is_stopped(a):
            return
        for r in range(2 * rows):
            sums[r] = 0
        if real is float:
            panels_solve_f32(x, size, panels, factor, stride, n, <const float *> a.zeros,
                             reciprocal, begin, step, block, first, last, sums)
        else:
            panels_solve_f64(x, size, panels, factor, stride, n, a.zeros, reciprocal, begin, step,
                             block, first, last, sums)
        if squares != NULL:
            for r in range(2 * rows):
                squares[r] += sums[r]


ctypedef struct Block:
    # Rows of a covariance, in panels, that are factorised when those above them are.
    const Panels *a
    const Side *s
    npy_intp item
    double *factor
    npy_intp done, panels    # rows above, and panels
    npy_intp share           # panels that are solved together


cdef inline int cholesky_begin(const Block *b, npy_intp index, real type_tag) noexcept nogil:
    """One share of the panels up to the block's first column."""
    cdef const Panels *a = b.a
    cdef npy_intp first = index * b.share, last = min(first + b.share, b.panels), i
    if a.watch.stop:
        return 0
    for i in range(first, last):
        cholesky_load(a, b.s, b.item, a.x + i * a.size, b.done + i * ROWS, type_tag)
    solve(a, a.x + first * a.size, last - first, b.factor, a.stride, b.done, a.reciprocal, 0, 0, 0,
          b.done, <double *> NULL)
    return 0


cdef inline int cholesky_begin_f32(void *block, npy_intp index) noexcept nogil:
    return cholesky_begin(<const Block *> block, index, <float> 0)


cdef inline int cholesky_begin_f64(void *block, npy_intp index) noexcept nogil:
    return cholesky_begin(<const Block *> block, index, <double> 0)


cdef inline void cholesky(const Panels *a, const Side *s, npy_intp item, double *factor,
                          real type_tag) noexcept nogil:
    """The factor of a covariance. Threads share the panels of a block up to its first column;
    the block's own triangle is one thread's. Whatever the threads, every sum runs in one order."""
    cdef npy_intp done, index, i
    cdef int threads
    cdef double *x
    cdef Block b
    b.a, b.s, b.item, b.factor = a, s, item, factor
    for done from 0 <= done < a.padded by a.block * ROWS:
        threads = a.watch.threads if done > 0 else 1
        b.done, b.panels = done, min(a.block, (a.padded - done) // ROWS)
        b.share = MOST_TOGETHER
        if threads > 1:
            b.share = max(<npy_intp> 1, min(a.together, b.panels // threads))
        parallel_for(cholesky_begin_f32 if real is float else cholesky_begin_f64, &b,
                     (b.panels + b.share - 1) // b.share, threads)
        for index in range(b.panels):
            i = done + index * ROWS
            x = a.x + index * a.size
            solve(a, x, 1, factor, a.stride, i, a.reciprocal, 0, 0, done, i, <double *> NULL)
            if a.watch.stop:
                return
            panel_factor(x, a.reciprocal, i)
            panel_store(x, factor + i * a.stride, a.stride, 0, i + ROWS)


cdef inline void copy_factor(const Side *s, npy_intp item, npy_intp n, wide *factor,
                             npy_intp stride, real type_tag) noexcept nogil:
    cdef char *row
    cdef npy_intp i
    for i in range(n):
        row = s.matrix + item * s.matrix_outer + i * s.row
        if wide is float:
            line_read_single(factor + i * stride, row, s.column, i + 1)
        elif real is float:
            line_read_f32(factor + i * stride, row, s.column, i + 1)
        else:
            line_read_f64(factor + i * stride, row, s.column, i + 1)


cdef inline Rows factor_of(const Panels *a, const Side *s, npy_intp item, wide *factor,
                           double *diagonal, bint fresh, real type_tag) noexcept nogil:
    """One side's factor, where it lies or computed or copied, and if that is in double, its
    diagonal; not `fresh`: those of the item before."""
    cdef Rows rows
    if sizeof(wide) == sizeof(real) and in_place(s, type_tag):
        rows.data = s.matrix + item * s.matrix_outer
        rows.stride = s.row // <npy_intp> sizeof(real)
    else:
        rows.data, rows.stride = factor, a.stride
        if wide is double and fresh and s.covariance:
            cholesky(a, s, item, <double *> factor, type_tag)
        elif fresh:
            copy_factor(s, item, a.n, factor, a.stride, type_tag)
    if wide is double and fresh:
        take_diagonal(<const double *> rows.data, rows.stride, a.n, diagonal)
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


# By how much the mean square root a float32 solve may miss its probe, in units of 2^-24.
cdef enum:
    PROBE_ULPS = 16


cdef inline bint found(const Panels *a) noexcept nogil:
    """Whether rounding errors stay small: the solve found the probe again."""
    return a.missed[0] <= (PROBE_ULPS * 2.0 ** -24) ** 2


ctypedef struct Whitening:
    # Of one item, in the type of its factors. The matrices of the item `following` (negative:
    # none) are asked for along the way.
    const Panels *a
    Rows factor_p, factor_q
    const Side *p
    const Side *q
    npy_intp following


cdef inline double whiten_some(const Whitening *w, npy_intp group, real type_tag) noexcept nogil:
    """The squares of some panels of [z | Y]^T; a float32 solve that missed its probe gives up."""
    cdef const Panels *a = w.a
    cdef const real *p = <const real *> w.factor_p.data
    cdef const real *q = <const real *> w.factor_q.data
    cdef npy_intp stride_p = w.factor_p.stride, stride_q = w.factor_q.stride
    cdef npy_intp rows = rows_of(<real> 0), n = a.n, extra = 1 if real is double else 2, r
    cdef npy_intp index = group * a.together, last = min((index + a.together) * rows, n)
    cdef npy_intp panels = min(a.together, (n + extra - 1) // rows + 1 - index)
    cdef npy_intp padded = (n + COLUMNS - 1) // COLUMNS * COLUMNS, begin = index * rows - COLUMNS
    cdef npy_intp first = max(begin, <npy_intp> 0), size = rows * (a.padded + 2)
    cdef real *x = <real *> (a.x + own_place(a) * a.together * a.size)
    cdef double squares[2 * MOST_ROWS]
    cdef double total = 0.0
    if a.watch.stop or (real is float and not found(a)):
        return 0.0
    for r in range(2 * rows):
        squares[r] = 0.0
    if real is float:
        panels_differences_f32(x, p, stride_p, q, stride_q, a.shift_single, a.probe, index, panels,
                               n, padded, size)
        solve(a, x, panels, q, stride_q, n, a.reciprocal_single, begin, rows, first, padded,
              squares)
        if index == 0:
            a.missed[0] = probe_error(x, a.signs, n)
            squares[rows - 2] = 0.0
    else:
        panels_differences_f64(x, p, stride_p, q, stride_q, a.shift, NULL, index, panels, n, padded,
                               size)
        solve(a, x, panels, q, stride_q, n, a.reciprocal, begin, rows, first, padded, squares)
    if w.following >= 0:
        prefetch_rows(w.p, w.following, index * rows, last, type_tag)
        prefetch_rows(w.q, w.following, index * rows, last, type_tag)
    for r in range(2 * rows):
        total += squares[r]
    return total


cdef inline int whiten_some_f32(void *whitening, npy_intp group) noexcept nogil:
    cdef const Whitening *w = <const Whitening *> whitening
    w.a.squares[group] = whiten_some(w, group, <float> 0)
    return 0


cdef inline int whiten_some_f64(void *whitening, npy_intp group) noexcept nogil:
    cdef const Whitening *w = <const Whitening *> whitening
    w.a.squares[group] = whiten_some(w, group, <double> 0)
    return 0


cdef inline double sum_squares(const Panels *a, Step step, void *context,
                               npy_intp groups) noexcept nogil:
    """Those of all groups of panels, which threads share, in one order; a step finds one's."""
    cdef double squares = 0.0
    cdef npy_intp group
    parallel_for(step, context, groups, a.watch.threads)
    for group in range(groups):
        squares += a.squares[group]
    return squares


cdef inline double whiten(Whitening *w, real type_tag) noexcept nogil:
    """|z|^2 + |Y|^2 where [z | Y] = L_q^-1 ([mu_p | L_p] - [mu_q | L_q])."""
    cdef npy_intp extra = 1 if real is double else 2, step = w.a.together * rows_of(type_tag)
    w.a.missed[0] = 0.0
    return sum_squares(w.a, whiten_some_f32 if real is float else whiten_some_f64, w,
                       (w.a.n + extra - 1) // step + 1)


cdef inline bint whiten_single(Whitening *w, npy_intp item, double *squares) noexcept nogil:
    """`whiten` of float32 factors in float32; whether the result can be trusted."""
    cdef const Panels *a = w.a
    cdef npy_intp i
    w.factor_p = factor_of(a, w.p, item, <float *> a.factor_p, NULL, True, <float> 0)
    w.factor_q = factor_of(a, w.q, item, <float *> a.factor_q, NULL, True, <float> 0)
    for i in range(a.n):
        a.shift_single[i] = <float> a.shift[i]
        a.reciprocal_single[i] = <float> a.reciprocal[i]
    make_probe(<const float *> w.factor_q.data, w.factor_q.stride, a.n, a.signs, a.probe)
    squares[0] = whiten(w, <float> 0)
    return found(a) and 1e-30 < squares[0] < 1e30


cdef inline int panels_rows(const Batch *batch, npy_intp first, npy_intp last, const Side *p,
                            const Side *q, npy_intp n, const Kernel *kernel, Watch *watch,
                            real type_tag) noexcept nogil:
    cdef bint covariances = has_covariances(kernel), single = in_single(kernel, n, type_tag)
    cdef bint as_lanes = may_go_in_lanes(kernel, n, type_tag)
    cdef bint copy_p = real is float or not in_place(p, type_tag)
    cdef bint copy_q = q != NULL and (real is float or not in_place(q, type_tag))
    cdef Panels a
    cdef Whitening w
    cdef double squares, kl
    cdef char *out = batch.operands[2 if q == NULL else 4]
    cdef npy_intp out_outer = batch.outer[2 if q == NULL else 4], item, i
    cdef bint fresh, trusted
    cdef int status = 0
    if not panels_new(&a, n, copy_p, copy_q, covariances, as_lanes, watch):
        return NO_MEMORY
    w.a, w.p, w.q = &a, p, q
    for item in range(first, last):
        w.following = item + 1 if item + 1 < last and n <= AHEAD else -1
        load_shift(a.shift, p, q, item, n, type_tag)
        trusted = False
        if single:
            load_diagonal(a.diagonal_p, p, item, n, type_tag)
            load_diagonal(a.diagonal_q, q, item, n, type_tag)
            reciprocals(a.diagonal_q, a.reciprocal, n)
            trusted = whiten_single(&w, item, &squares)
        if not trusted:
            fresh = single or item == first or not p.shared
            w.factor_p = factor_of(&a, p, item, a.factor_p, a.diagonal_p, fresh, type_tag)
            if q != NULL:
                fresh = single or item == first or not q.shared
                w.factor_q = factor_of(&a, q, item, a.factor_q, a.diagonal_q, fresh, type_tag)
            reciprocals(a.diagonal_q, a.reciprocal, n)
            if q != NULL:
                squares = whiten(&w, <double> 0)
            elif not as_lanes:
                squares = whiten_standard(
                    <const double *> w.factor_p.data, w.factor_p.stride, a.shift, n)
        if watch.stop:
            break
        for i in range(n):
            a.t[i] = (a.diagonal_p[i] - a.diagonal_q[i]) * a.reciprocal[i]
        kl = NAN
        if as_lanes:  # all panels are one thread's, in its first place
            squares = squares_in_tiles(NULL if q == NULL else a.x, a.size,
                                       <const double *> w.factor_p.data, w.factor_p.stride, a.shift,
                                       n)
            kl = sum_as_lanes(a.t, a.diagonal_p, a.reciprocal, squares, n)
        if not isfinite(kl):
            kl = divergence(a.diagonal_p, a.diagonal_q, a.t, squares, n)
        if not isfinite(kl):
            status |= settle(&kl, improper(a.diagonal_p, a.diagonal_q, 1, n), p, q, item, n,
                             type_tag)
        (<real *> (out + item * out_outer))[0] = <real> kl
    free(a.memory)
    return status


cdef inline npy_intp end_of_lanes(npy_intp first, npy_intp last) noexcept nogil:
    """Where the items end that go side by side: few that fill no lanes are faster one by one."""
    cdef npy_intp rest = (last - first) % LANES
    return last - rest if rest < LANES / 2 or last - first < LANES else last


cdef inline int mvn_rows(const Batch *batch, npy_intp first, npy_intp last, const Kernel *kernel,
                         Watch *watch, real type_tag) noexcept nogil:
    """KL of the items first .. last - 1; `type_tag` only chooses the type. Returns status bits."""
    cdef npy_intp n = batch.core[0], output = 2 if kernel.options[STANDARD_Q] else 4
    cdef npy_intp item, end = first
    cdef Side p = side(batch, kernel, 0), other
    cdef const Side *q = second_side(batch, kernel, &other)
    cdef char *out = batch.operands[output]
    cdef int status = 0
    if 0 < n <= SMALL:
        end = last
        status = small_rows(batch, first, end, &p, q, n, type_tag)
    elif may_go_in_lanes(kernel, n, type_tag):
        end = end_of_lanes(first, last)
        if first < end:
            status = lanes_rows(batch, first, end, &p, q, n, type_tag)
    for item in range(first, end if status & ALONE else first):
        if not isfinite((<real *> (out + item * batch.outer[output]))[0]):
            status |= panels_rows(batch, item, item + 1, &p, q, n, kernel, watch, type_tag)
    if end < last:
        status |= panels_rows(batch, end, last, &p, q, n, kernel, watch, type_tag)
    return status & ~ALONE


# The kernel that the gufuncs carry.

cdef inline Plan plan_of(const Batch *batch, const Kernel *kernel, double row_ns, double setup,
                         bint in_lanes) noexcept nogil:
    """`setup`: what share of a row's time a matrix of Q that all rows have in common takes."""
    cdef Plan plan
    cdef bint shared = not kernel.options[STANDARD_Q] and batch.outer[3] == 0
    plan.row_ns, plan.setup_ns = row_ns, setup * row_ns if shared else 0.0
    plan.splits_rows = not in_lanes
    plan.group = LANES if in_lanes and batch.n >= LANES else 1
    return plan


cdef inline Plan plan_mvn(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef double n = batch.core[0], cube = 0.03 if has_covariances(kernel) else 0.008
    return plan_of(batch, kernel, 5 + n * (3 + n * (0.9 + cube * n)), 0.4, n <= LANES_LIMIT)


cdef inline int mvn_rows_f32(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch) noexcept nogil:
    return mvn_rows(batch, first, last, kernel, watch, <float> 0)


cdef inline int mvn_rows_f64(const Batch *batch, npy_intp first, npy_intp last,
                             const Kernel *kernel, Watch *watch) noexcept nogil:
    return mvn_rows(batch, first, last, kernel, watch, <double> 0)
