/* What the loop needs from OpenMP, with and without it, from fork() and from signals. */
#ifndef KLFAST_THREADS_H
#define KLFAST_THREADS_H

#include <Python.h>
#include <fenv.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#define KLFAST_OPENMP _OPENMP
#else
#define KLFAST_OPENMP 0
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_in_parallel(void) { return 0; }
#endif

#ifdef _WIN32
#include <windows.h>
static inline double seconds(void) { return 1e-3 * (double)GetTickCount64(); }
static inline void guard_forks(void) {}
#else
#include <pthread.h>
#include <time.h>
static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
#endif

/* A forked child has no worker threads, yet the runtime it inherits believes in them: its first
 * parallel region would wait for ever. `release_workers` before the fork lets parent and child
 * start new teams; a child forked without it (from C) computes serially. */
static int workers_released = 0;
static int orphaned = 0;

static inline void release_workers(void) {
#ifdef KLFAST_CAN_PAUSE
    if (!orphaned && !omp_in_parallel())
        workers_released = omp_pause_resource_all(omp_pause_hard) == 0;
#endif
}
static inline void forked(void) { workers_released = 0; }

#ifndef _WIN32
static void in_child(void) {
    if (KLFAST_OPENMP && !workers_released)
        orphaned = 1;
}
static inline void guard_forks(void) { pthread_atfork(0, 0, in_child); }
#endif

/* The thread count that code asked for: this thread's own before all others'; 0: none. */
#if defined(_MSC_VER)
static __declspec(thread) int threads_here = 0;
#else
static __thread int threads_here = 0;
#endif
static int threads_asked = 0;
static int threads_default = 1;

static inline int thread_limit(void) {
    if (orphaned || omp_in_parallel())
        return 1;
    if (threads_here)
        return threads_here;
    if (threads_asked)
        return threads_asked;
    return threads_default < omp_get_max_threads() ? threads_default : omp_get_max_threads();
}

/* step(context, i) for i < n by up to `threads` threads in turn; gives the steps' bits together.
 * One thread makes no team: among the threads of another loop it keeps its number. Cython's prange
 * would be the same, but takes the GIL before it and after it, where it is not known to be held,
 * even in threads that Python knows nothing of. */
typedef int (*Step)(void *context, Py_ssize_t i);
static int parallel_for(Step step, void *context, Py_ssize_t n, int threads) {
    int bits = 0;
    Py_ssize_t i;
    if (threads == 1) {
        for (i = 0; i < n; i++)
            bits |= step(context, i);
        return bits;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(| : bits)
#endif
    for (i = 0; i < n; i++)
        bits |= step(context, i);
    return bits;
}

/* Let Python's signal handlers run; true when one raised (Ctrl-C). NumPy does not look for
 * exceptions behind a numerical loop, so what was raised waits for the interpreter, which raises
 * it as soon as the call is over. */
static PyObject *raised[3];
static int raise_again(void *unused) {
    (void)unused;
    PyErr_Restore(raised[0], raised[1], raised[2]);
    return -1;
}
static inline int signal_raised(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    int interrupted = PyErr_CheckSignals() != 0;
    if (interrupted) {
        PyErr_Fetch(&raised[0], &raised[1], &raised[2]);
        Py_AddPendingCall(raise_again, NULL);
    }
    PyGILState_Release(state);
    return interrupted;
}

/* MemoryError in the calling thread, raised as soon as the call is over: in Python's own way, as
 * NumPy does not promise to look for exceptions behind a numerical loop. */
static inline void raise_memory_error(void) {
    PyGILState_STATE state = PyGILState_Ensure();
    PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), PyExc_MemoryError);
    PyGILState_Release(state);
}

/* Floating-point status flags belong to the calling thread; NumPy reads them after the loop. */
static inline void report_status(int invalid) {
#if defined(__x86_64__)
    /* feclearexcept would also save and load the x87 state. */
    _mm_setcsr(_mm_getcsr() & ~_MM_EXCEPT_MASK);
#else
    feclearexcept(FE_ALL_EXCEPT);
#endif
    if (invalid)
        feraiseexcept(FE_INVALID);
}

#endif
