"""The one loop over rows: threads, the GIL, signals, status flags.

NumPy calls `gufunc_loop` once for each innermost batch axis; `data` carries the kernel. Where two
batch axes do not lie as one, as those of (M, 1, K) against (1, N, K), `grid_loop` has both. The
loop cuts rows, or lines of them, into tasks that threads take in turn. A row's result depends on
the row alone, never on how rows were handed out: tasks begin at multiples of the kernel's group of
neighbouring rows, or at the lines of the cache that follow these, and a kernel that spreads one
long row over threads cuts it into pieces of fixed length.
"""

from libc.math cimport INFINITY
from numpy cimport npy_intp

cdef extern from "Python.h" nogil:
    ctypedef struct PyThreadState
    PyThreadState *PyEval_SaveThread()
    void PyEval_RestoreThread(PyThreadState *state)

cdef extern from * nogil:
    """
    /* In every CPython, but not in the header of the limited API. */
    PyAPI_FUNC(int) PyGILState_Check(void);
    """
    int PyGILState_Check()

cdef extern from "threads.h" nogil:
    int thread_limit()
    int omp_get_thread_num()
    double seconds()
    int signal_raised()
    void report_status(int invalid)
    void raise_memory_error()
    ctypedef int (*Step)(void *context, npy_intp i) noexcept nogil
    int parallel_for(Step step, void *context, npy_intp n, int threads)

cdef enum:
    MAX_ARRAYS = 16  # operands of a gufunc
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
    SHORT_LINE = 64            # rows: below, the lines of a grid run along its other axis if longer

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
    # rows first..last-1 of a batch, or those between the lines of the cache that follow these, so
    # that tasks together compute all; returns status bits
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


ctypedef struct Tasks:
    const Batch *batch     # rows; of a grid, its first line of them
    const npy_intp *lines  # of a grid: bytes from one line to the next, one an operand; else NULL
    const Kernel *kernel
    Watch *watch
    npy_intp n             # rows, or lines
    npy_intp length        # of a task


cdef inline int line_rows(const Tasks *tasks, npy_intp line) noexcept nogil:
    cdef char *operands[MAX_ARRAYS]
    cdef Batch batch = tasks.batch[0]
    cdef int i
    for i in range(tasks.kernel.n_operands):
        operands[i] = batch.operands[i] + line * tasks.lines[i]
    batch.operands = operands
    return tasks.kernel.rows(&batch, 0, batch.n, tasks.kernel, tasks.watch)


cdef inline int task_rows(const Tasks *tasks, npy_intp task) noexcept nogil:
    cdef npy_intp first = task * tasks.length, last = min(tasks.n, first + tasks.length), line
    cdef int status = 0
    if tasks.lines == NULL:
        return tasks.kernel.rows(tasks.batch, first, last, tasks.kernel, tasks.watch)
    for line in range(first, last):
        status |= line_rows(tasks, line)
    return status


cdef inline int run_task(void *context, npy_intp task) noexcept nogil:
    cdef const Tasks *tasks = <const Tasks *> context
    look_for_signals(tasks.watch)
    return 0 if tasks.watch.stop else task_rows(tasks, task)


cdef inline int run(const Batch *batch, npy_intp n, const npy_intp *lines, const Kernel *kernel,
                    Plan plan, bint in_python) noexcept nogil:
    """Compute n rows, or n lines of a grid, where the plan's row is a line; returns status bits.
    Signals are looked for where Python waits for it."""
    cdef double total = n * plan.row_ns
    cdef int threads = threads_worth(total)
    cdef Watch watch
    cdef Tasks tasks
    watch.threads, watch.stop, watch.next_look = threads, False, INFINITY
    tasks.batch, tasks.lines, tasks.kernel, tasks.watch = batch, lines, kernel, &watch
    tasks.n = tasks.length = n
    if total < SERIAL_NS:
        return task_rows(&tasks, 0)
    if in_python:
        watch.next_look = seconds() + 0.05
    cdef bint serial = threads == 1 or one_by_one(n, plan, threads)
    cdef double share = total if serial else total / threads
    cdef double task_ns = min(share, max(<double> TASK_NS, 50 * plan.setup_ns))
    tasks.length = <npy_intp> max(1.0, task_ns / plan.row_ns)
    tasks.length = (tasks.length + plan.group - 1) // plan.group * plan.group
    cdef npy_intp count = (n + tasks.length - 1) // tasks.length
    if serial:
        return parallel_for(run_task, &tasks, count, 1)
    watch.threads = 1
    return parallel_for(run_task, &tasks, count, <int> min(<npy_intp> threads, count))


cdef inline int run_grid(Batch *line, npy_intp n, const npy_intp *lines, const Kernel *kernel,
                         Plan plan) noexcept nogil:
    """n lines: long ones one after the other, each by all threads."""
    cdef npy_intp i
    cdef int status = 0, operand
    if line.n * plan.row_ns < SERIAL_NS:
        plan.row_ns *= line.n
        plan.group, plan.splits_rows = 1, False
        return run(line, n, lines, kernel, plan, True)
    for i in range(n):
        status |= run(line, line.n, NULL, kernel, plan, True)
        for operand in range(kernel.n_operands):
            line.operands[operand] += lines[operand]
    return status


cdef inline bint call(Batch *batch, npy_intp n_lines, const npy_intp *lines,
                      const Kernel *kernel) noexcept nogil:
    """For NumPy: a batch of rows or (lines not NULL) a grid, without the GIL unless it is small.
    Whether there was memory: if not, an exception is on its way and results are anything."""
    cdef PyThreadState *released = NULL
    cdef Plan plan = kernel.plan(batch, kernel)
    cdef int status
    if n_lines * batch.n * plan.row_ns > SHARE_NS and PyGILState_Check():
        released = PyEval_SaveThread()
    if lines == NULL:
        status = run(batch, batch.n, NULL, kernel, plan, True)
    else:
        status = run_grid(batch, n_lines, lines, kernel, plan)
    if released != NULL:
        PyEval_RestoreThread(released)
    if status & NO_MEMORY:
        raise_memory_error()
    report_status(status & INVALID)
    return not status & NO_MEMORY


cdef inline bint gufunc_loop(char **operands, const npy_intp *dimensions,
                             const npy_intp *steps, const Kernel *kernel) noexcept nogil:
    """As `call`."""
    cdef Batch batch
    if dimensions[0] == 0:
        return True
    batch.n, batch.operands, batch.outer = dimensions[0], operands, steps
    batch.core, batch.inner = dimensions + 1, steps + kernel.n_operands
    return call(&batch, 1, NULL, kernel)


ctypedef struct Grid:
    const Kernel *kernel
    int core_axes[MAX_ARRAYS]  # of each operand, behind the two of the grid


cdef inline void grid_loop(char **operands, const npy_intp *dimensions, const npy_intp *steps,
                           const Grid *grid) noexcept nogil:
    """As gufunc_loop, for a kernel whose operands have two batch axes among their core axes."""
    cdef npy_intp lines[MAX_ARRAYS]
    cdef npy_intp outer[MAX_ARRAYS]
    cdef npy_intp inner[2 * MAX_ARRAYS]
    cdef char *at[MAX_ARRAYS]
    cdef const npy_intp *step = steps + grid.kernel.n_operands
    cdef npy_intp index
    cdef int operand, axis, axes = 0
    cdef int along = 0 if dimensions[2] < SHORT_LINE and dimensions[2] < dimensions[1] else 1
    cdef Batch line
    for operand in range(grid.kernel.n_operands):
        lines[operand], outer[operand] = step[1 - along], step[along]
        step += 2
        for axis in range(grid.core_axes[operand]):
            inner[axes] = step[0]
            step, axes = step + 1, axes + 1
    line.n, line.operands, line.outer = dimensions[1 + along], at, outer
    line.core, line.inner = dimensions + 3, inner
    for index in range(dimensions[0] if dimensions[1] and dimensions[2] else 0):
        for operand in range(grid.kernel.n_operands):
            at[operand] = operands[operand] + index * steps[operand]
        call(&line, dimensions[2 - along], lines, grid.kernel)
