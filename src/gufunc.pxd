"""The one loop over rows: threads, the GIL, signals, status flags.

NumPy calls `gufunc_loop` once for each innermost batch axis; `data` carries the kernel. The loop
cuts the rows into tasks that threads take in turn. A row's result depends on the row alone, never
on how rows were handed out: tasks begin at multiples of the kernel's group of neighbouring rows,
and a kernel that spreads one long row over threads cuts it into pieces of fixed length.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY
from numpy cimport npy_intp

cdef extern from "Python.h" nogil:
    ctypedef struct PyThreadState
    int PyGILState_Check()
    PyThreadState *PyEval_SaveThread()
    void PyEval_RestoreThread(PyThreadState *state)

cdef extern from "threads.h" nogil:
    int thread_limit()
    int omp_get_thread_num()
    double seconds()
    int signal_raised()
    void report_status(int invalid)
    void raise_memory_error()

cdef enum:
    INVALID = 1    # status bit: a row came back NaN for a bad value that was not NaN itself
    NO_MEMORY = 2  # status bit: scratch memory could not be had

# Waking a sleeping team costs 30 to 80 us: a call below SERIAL_NS stays on its thread, and no
# thread gets less than SHARE_NS. A task is long enough to hide its handing out and what it
# prepares, and short enough to look for signals between two. A row of LONG_NS or more is not left
# to one thread: the calling one, which alone looks for signals, could wait for it in vain.
cdef enum:
    SERIAL_NS = 200_000
    SHARE_NS = 50_000
    TASK_NS = 500_000
    LONG_NS = 50_000_000

ctypedef struct Batch:
    npy_intp n             # rows
    char **operands        # inputs, then the output
    const npy_intp *outer  # bytes from one row to the next, one an operand
    const npy_intp *core   # core dimensions
    const npy_intp *inner  # bytes from one element to the next, in the order of the signature

ctypedef struct Watch:
    int threads            # how many threads may share one row
    bint stop              # a signal handler raised: results no longer matter
    double next_look       # when to look for signals again

ctypedef struct Plan:
    double row_ns          # what one row takes on one thread, roughly
    double setup_ns        # what a task takes before its first row
    npy_intp group         # rows that are computed side by side
    bint splits_rows       # the kernel itself can spread a row over threads, and looks for signals

ctypedef struct Kernel:
    # rows first..last-1 of a batch; returns status bits
    int (*rows)(const Batch *batch, npy_intp first, npy_intp last,
                const Kernel *kernel, Watch *watch) noexcept nogil
    Plan (*plan)(const Batch *batch, const Kernel *kernel) noexcept nogil
    int n_operands         # inputs and output
    int family
    int options[4]         # the family's own
    int wanted             # gradients: bit i for that with respect to operand i


cdef inline void look_for_signals(Watch *watch) noexcept nogil:
    if not watch.stop and omp_get_thread_num() == 0 and seconds() > watch.next_look:
        watch.stop = signal_raised()
        watch.next_look = seconds() + 0.05


cdef inline bint is_unwanted(Watch *watch, npy_intp i) noexcept nogil:
    """For loops of many slow steps i: looks for signals now and then."""
    if i % 16384 == 16383:
        look_for_signals(watch)
    return watch.stop


cdef inline int threads_worth(double nanoseconds) noexcept nogil:
    if nanoseconds < SERIAL_NS:
        return 1
    return <int> min(<double> thread_limit(), nanoseconds / SHARE_NS)


cdef inline bint one_by_one(npy_intp n, Plan plan, int threads) noexcept nogil:
    """Whether threads share each row instead of the batch: few rows do not go round evenly."""
    return (plan.splits_rows and plan.row_ns > SERIAL_NS
            and (n < 4 * threads or plan.row_ns > LONG_NS))


cdef inline int run(const Batch *batch, npy_intp n, const Kernel *kernel, Plan plan) noexcept nogil:
    cdef double total = n * plan.row_ns
    cdef int threads = threads_worth(total), status = 0
    cdef Watch watch
    watch.threads, watch.stop, watch.next_look = threads, False, INFINITY
    if total < SERIAL_NS:
        return kernel.rows(batch, 0, n, kernel, &watch)
    watch.next_look = seconds() + 0.05
    cdef bint serial = threads == 1 or one_by_one(n, plan, threads)
    cdef double share = total if serial else total / threads
    cdef double task_ns = min(share, max(<double> TASK_NS, 50 * plan.setup_ns))
    cdef npy_intp length = <npy_intp> max(1.0, task_ns / plan.row_ns)
    length = (length + plan.group - 1) // plan.group * plan.group
    cdef npy_intp tasks = (n + length - 1) // length, task
    if serial:
        for task in range(tasks):
            look_for_signals(&watch)
            if watch.stop:
                break
            status |= kernel.rows(batch, task * length, min(n, (task + 1) * length), kernel, &watch)
    else:
        watch.threads = 1
        threads = <int> min(<npy_intp> threads, tasks)
        for task in prange(tasks, num_threads=threads, schedule="dynamic"):
            look_for_signals(&watch)
            if not watch.stop:
                status |= kernel.rows(
                    batch, task * length, min(n, (task + 1) * length), kernel, &watch)
    return status


cdef inline void gufunc_loop(char **operands, const npy_intp *dimensions,
                             const npy_intp *steps, const Kernel *kernel) noexcept nogil:
    cdef Batch batch
    cdef PyThreadState *released = NULL
    cdef npy_intp n = dimensions[0]
    if n == 0:
        return
    batch.n, batch.operands, batch.outer = n, operands, steps
    batch.core, batch.inner = dimensions + 1, steps + kernel.n_operands
    cdef Plan plan = kernel.plan(&batch, kernel)
    if n * plan.row_ns > SHARE_NS and PyGILState_Check():
        released = PyEval_SaveThread()
    cdef int status = run(&batch, n, kernel, plan)
    if released != NULL:
        PyEval_RestoreThread(released)
    if status & NO_MEMORY:
        raise_memory_error()
    report_status(status & INVALID)
