from numpy cimport npy_intp
from gufunc cimport Batch, Kernel, Plan, Watch
from mvn cimport LANES_LIMIT, mvn_rows


# The kernel that the gufuncs carry.

cdef inline Plan plan_mvn(const Batch *batch, const Kernel *kernel) noexcept nogil:
    cdef Plan plan
    cdef double n = batch.core[0]
    cdef bint shared = not kernel.options[2] and batch.outer[3] == 0
    plan.row_ns = 20 + 3 * n * n + 0.06 * n * n * n
    plan.setup_ns = 0.3 * plan.row_ns if shared else 0.0
    plan.group = 64 if n <= LANES_LIMIT else 1
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
