"""The gufuncs as one target of XLA's foreign function interface, for JAX.

A call names a gufunc and brings buffers in row-major order: the inputs, then the results, all with
the same number of batch axes. An axis of length 1 is broadcast, and a result is summed over the
axes in which it has length 1: that takes gradients back to the shape of a broadcast argument,
summed in double. Neither Python nor the GIL is needed. Bad values give NaN; no status is reported.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, strlen
from gufunc cimport NO_MEMORY, SERIAL_NS, Batch, Plan, parallel_for, run, threads_worth

cdef extern from "numpy/ufuncobject.h":
    enum:
        NPY_HALF
    ctypedef struct PyUFuncObject:
        int nin, nargs, ntypes, core_num_dim_ix
        void **data
        const char *types
        int *core_num_dims
        int *core_dim_ixs

cdef extern from "xla.h" nogil:
    enum:
        XLA_F16, XLA_F32, XLA_F64, XLA_BF16, XLA_STRING, XLA_EXECUTE, XLA_METADATA
        XLA_INVALID_ARGUMENT, XLA_RESOURCE_EXHAUSTED, XLA_UNIMPLEMENTED
    ctypedef struct XlaError
    ctypedef struct XlaExtension:
        int kind
    ctypedef struct XlaBuffer:
        int dtype
        void *data
        int64_t rank
        int64_t *dims
    ctypedef struct XlaBuffers:
        int64_t count
        void **items
    ctypedef struct XlaText:
        const char *text
        size_t length
    ctypedef struct XlaAttributes:
        int64_t count
        int *kinds
        void **items
    ctypedef struct XlaCall:
        XlaExtension *extensions
        int stage
        XlaBuffers inputs
        XlaBuffers results
        XlaAttributes attributes
    ctypedef struct Arithmetic:
        pass
    void xla_tell_version(const XlaCall *call)
    XlaError *xla_fail(const XlaCall *call, int code, const char *message)
    Arithmetic exact_arithmetic()
    void restore_arithmetic(Arithmetic before)

cdef enum:
    MAX_TARGETS = 256
    MAX_AXES = 64
    MAX_ARRAYS = 12
    MAX_CORE = 4         # core dimensions of a gufunc, and of one operand
    SLAB_BYTES = 1 << 20   # gradients that are summed back wait in slabs of about this size

ctypedef struct XlaTarget:
    char name[64]
    const PyUFuncObject *gufunc

cdef XlaTarget targets[MAX_TARGETS]
cdef int n_targets = 0


def xla_expose(str name, gufunc):
    """Let XLA call the gufunc by this name, for the life of the process."""
    global n_targets
    cdef bytes text = name.encode()
    cdef XlaTarget *target = &targets[n_targets]
    if n_targets == MAX_TARGETS or len(text) >= <Py_ssize_t> sizeof(target.name):
        raise RuntimeError(f"no room for the XLA target {name}")
    texts.append(gufunc)
    memcpy(target.name, <const char *> text, len(text) + 1)
    target.gufunc = <const PyUFuncObject *> gufunc
    n_targets += 1


def xla_target():
    """The capsule for jax.ffi.register_ffi_target."""
    return PyCapsule_New(<void *> xla_call, NULL, NULL)


# One operand of a call, and a call whose batch axes are broadcast and, where memory allows, merged.

ctypedef struct Array:
    char *data
    npy_intp item                # bytes of an element
    npy_intp core                # elements of a row
    npy_intp steps[MAX_AXES]     # bytes along the batch axes
    bint owned                   # a converted copy, or sums
    double *sums                 # of a result that is summed over batch axes
    npy_intp total               # elements of those

ctypedef struct Job:
    const PyUFuncObject *gufunc
    int loop                     # which of the gufunc's
    const Kernel *kernel
    int n_axes
    npy_intp shape[MAX_AXES]
    Array arrays[MAX_ARRAYS]
    npy_intp dimensions[MAX_CORE]
    npy_intp inner[MAX_ARRAYS * MAX_CORE]
    npy_intp outer[MAX_ARRAYS]   # bytes from one row to the next along the last axis
    npy_intp rows                # length of the last axis
    npy_intp calls               # product of the others


cdef bint choose(const XlaCall *call, Job *job) noexcept nogil:
    """The gufunc that is named and its loop for these dtypes; False where there is none."""
    cdef const XlaText *name
    cdef int t, loop
    if call.attributes.count != 1 or call.attributes.kinds[0] != XLA_STRING:
        return False
    name = <const XlaText *> call.attributes.items[0]
    for t in range(n_targets):
        if strlen(targets[t].name) == name.length and (
                memcmp(targets[t].name, name.text, name.length) == 0):
            for loop in range(targets[t].gufunc.ntypes):
                if takes(targets[t].gufunc, loop, call):
                    job.gufunc, job.loop = targets[t].gufunc, loop
                    job.kernel = <const Kernel *> job.gufunc.data[loop]
                    return True
    return False


cdef bint takes(const PyUFuncObject *gufunc, int loop, const XlaCall *call) noexcept nogil:
    """Whether the loop takes these dtypes. Scalars that it wants in double may come as float32."""
    cdef int operand, wanted, given
    if call.inputs.count != gufunc.nin or call.results.count != gufunc.nargs - gufunc.nin:
        return False
    for operand in range(gufunc.nargs):
        wanted = gufunc.types[loop * gufunc.nargs + operand]
        given = type_number(buffer_of(call, operand).dtype)
        if given != wanted and not (given == cnp.NPY_FLOAT and wants_double(gufunc, loop, operand)):
            return False
    return True


cdef inline bint wants_double(const PyUFuncObject *gufunc, int loop, int operand) noexcept nogil:
    return (operand < gufunc.nin and gufunc.core_num_dims[operand] == 0
            and gufunc.types[loop * gufunc.nargs + operand] == cnp.NPY_DOUBLE)


cdef inline int type_number(int dtype) noexcept nogil:
    if dtype == XLA_F32:
        return cnp.NPY_FLOAT
    if dtype == XLA_F64:
        return cnp.NPY_DOUBLE
    if dtype == XLA_F16:
        return NPY_HALF
    return cnp.NPY_USHORT if dtype == XLA_BF16 else -1


cdef inline const XlaBuffer *buffer_of(const XlaCall *call, int operand) noexcept nogil:
    if operand < call.inputs.count:
        return <const XlaBuffer *> call.inputs.items[operand]
    return <const XlaBuffer *> call.results.items[operand - call.inputs.count]


cdef bint describe(const XlaCall *call, Job *job) noexcept nogil:
    """Shapes and steps; False where they do not fit together."""
    cdef int operand, axis, place = 0, n_core
    cdef const XlaBuffer *buffer
    for axis in range(MAX_CORE):
        job.dimensions[axis] = -1
    for operand in range(job.gufunc.nargs):
        buffer = buffer_of(call, operand)
        n_core = job.gufunc.core_num_dims[operand]
        if operand == 0:
            job.n_axes = <int> buffer.rank - n_core
            if not 0 <= job.n_axes <= MAX_AXES:
                return False
            for axis in range(job.n_axes):
                job.shape[axis] = 1
        if buffer.rank - n_core != job.n_axes:
            return False
        if not (describe_core(buffer, job, n_core, &place)
                and describe_batch(buffer, job, &job.arrays[operand])):
            return False
    return True


cdef bint describe_core(const XlaBuffer *buffer, Job *job, int n_core, int *place) noexcept nogil:
    """Core dimensions and the bytes along them, in the order of the signature."""
    cdef npy_intp step = 2 if buffer.dtype in (XLA_F16, XLA_BF16) else (
        8 if buffer.dtype == XLA_F64 else 4)
    cdef int axis, dimension
    for axis in range(n_core - 1, -1, -1):
        dimension = job.gufunc.core_dim_ixs[place[0] + axis]
        if job.dimensions[dimension] < 0:
            job.dimensions[dimension] = buffer.dims[job.n_axes + axis]
        if job.dimensions[dimension] != buffer.dims[job.n_axes + axis]:
            return False
        job.inner[place[0] + axis] = step
        step *= job.dimensions[dimension]
    place[0] += n_core
    return True


cdef bint describe_batch(const XlaBuffer *buffer, Job *job, Array *array) noexcept nogil:
    """Batch axes and the bytes along them: none where they are broadcast."""
    cdef int axis
    cdef npy_intp step
    array.data, array.owned, array.sums, array.core = <char *> buffer.data, False, NULL, 1
    array.item = 2 if buffer.dtype in (XLA_F16, XLA_BF16) else 8 if buffer.dtype == XLA_F64 else 4
    for axis in range(job.n_axes, buffer.rank):
        array.core *= buffer.dims[axis]
    step = array.item * array.core
    for axis in range(job.n_axes - 1, -1, -1):
        array.steps[axis] = 0 if buffer.dims[axis] == 1 else step
        step *= buffer.dims[axis]
        if buffer.dims[axis] != 1:
            if job.shape[axis] not in (1, buffer.dims[axis]):
                return False
            job.shape[axis] = buffer.dims[axis]
    array.total = step // array.item
    return True


cdef void merge_axes(Job *job) noexcept nogil:
    """Batch axes that every array steps through evenly become one; at least one is left."""
    cdef int axis, last = -1, operand
    for axis in range(job.n_axes):
        if job.shape[axis] == 1 and job.n_axes > 1:
            continue
        if last >= 0 and are_even(job, last, axis):
            job.shape[last] *= job.shape[axis]
        else:
            last += 1
            job.shape[last] = job.shape[axis]
        for operand in range(job.gufunc.nargs):
            job.arrays[operand].steps[last] = job.arrays[operand].steps[axis]
    if last < 0:
        last = 0
        job.shape[0] = 1
        for operand in range(job.gufunc.nargs):
            job.arrays[operand].steps[0] = 0
    job.n_axes, job.rows, job.calls = last + 1, job.shape[last], 1
    for axis in range(last):
        job.calls *= job.shape[axis]
    for operand in range(job.gufunc.nargs):
        job.outer[operand] = job.arrays[operand].steps[last]


cdef inline bint are_even(const Job *job, int outer, int inner) noexcept nogil:
    cdef int operand
    for operand in range(job.gufunc.nargs):
        if job.arrays[operand].steps[outer] != (
                job.shape[inner] * job.arrays[operand].steps[inner]):
            return False
    return True


cdef bint widen(const XlaCall *call, Job *job) noexcept nogil:
    """float32 scalars where the loop wants double; False where memory cannot be had."""
    cdef int operand, axis
    cdef npy_intp i
    cdef Array *array
    cdef double *wide
    for operand in range(job.gufunc.nin):
        array = &job.arrays[operand]
        if array.item == sizeof(double) or not wants_double(job.gufunc, job.loop, operand):
            continue
        wide = <double *> malloc(array.total * sizeof(double) + 1)
        if wide == NULL:
            return False
        for i in range(array.total):
            wide[i] = (<const float *> array.data)[i]
        array.data, array.item, array.owned = <char *> wide, sizeof(double), True
        for axis in range(job.n_axes):
            array.steps[axis] *= 2
    return True


cdef inline npy_intp offset(const Job *job, const Array *array, npy_intp index) noexcept nogil:
    """Bytes to the first row of one of the calls."""
    cdef npy_intp bytes = 0
    cdef int axis
    for axis in range(job.n_axes - 2, -1, -1):
        bytes += index % job.shape[axis] * array.steps[axis]
        index //= job.shape[axis]
    return bytes


cdef int compute_rows(Job *job, npy_intp index, npy_intp first, npy_intp count,
                      char **slabs) noexcept nogil:
    """Rows of one of the calls; results that are summed go to their slab. Returns status bits."""
    cdef char *data[MAX_ARRAYS]
    cdef npy_intp outer[MAX_ARRAYS]
    cdef const Array *array
    cdef Batch batch
    cdef int operand
    for operand in range(job.gufunc.nargs):
        array = &job.arrays[operand]
        outer[operand] = job.outer[operand]
        data[operand] = array.data + offset(job, array, index) + first * outer[operand]
        if array.sums != NULL:
            data[operand], outer[operand] = slabs[operand], array.core * array.item
    batch.n, batch.operands, batch.outer = count, data, outer
    batch.core, batch.inner = job.dimensions, job.inner
    return run(
        &batch, count, NULL, job.kernel, job.kernel.plan(&batch, job.kernel), False)


cdef int compute(Job *job) noexcept nogil:
    """The calls one after the other, or side by side where each is too short for threads."""
    cdef int threads
    cdef double call_ns
    if job.calls * job.rows == 0:
        return 0
    if job.calls == 1:
        return compute_rows(job, 0, 0, job.rows, NULL)
    call_ns = nanoseconds(job)
    threads = threads_worth(job.calls * call_ns) if call_ns < SERIAL_NS else 1
    return parallel_for(compute_call, job, job.calls, threads)


cdef int compute_call(void *job, npy_intp index) noexcept nogil:
    return compute_rows(<Job *> job, index, 0, (<Job *> job).rows, NULL)


cdef double nanoseconds(Job *job) noexcept nogil:
    """What one of the calls takes on one thread, roughly."""
    cdef Batch batch
    batch.n, batch.operands, batch.outer = job.rows, NULL, job.outer
    batch.core, batch.inner = job.dimensions, job.inner
    cdef Plan plan = job.kernel.plan(&batch, job.kernel)
    return plan.setup_ns + job.rows * plan.row_ns


# Gradients of broadcast arguments.

cdef bint is_summed(const Job *job, int operand) noexcept nogil:
    cdef int axis
    if operand < job.gufunc.nin:
        return False
    for axis in range(job.n_axes):
        if job.shape[axis] != 1 and job.arrays[operand].steps[axis] == 0:
            return True
    return False


cdef int compute_and_sum(Job *job, npy_intp length, char *slab) noexcept nogil:
    """As `compute`, in slabs of `length` rows that are added to the sums before the next."""
    cdef char *slabs[MAX_ARRAYS]
    cdef npy_intp index, first, count
    cdef int operand, status = 0
    for operand in range(job.gufunc.nargs):
        slabs[operand] = slab
        if job.arrays[operand].sums != NULL:
            slab += length * job.arrays[operand].core * job.arrays[operand].item
    for index in range(job.calls):
        first = 0
        while first < job.rows:
            count = min(length, job.rows - first)
            status |= compute_rows(job, index, first, count, slabs)
            for operand in range(job.gufunc.nin, job.gufunc.nargs):
                if job.arrays[operand].sums != NULL:
                    add_rows(job, &job.arrays[operand], index, first, count, job.outer[operand],
                             slabs[operand])
            first += length
    return status


cdef void add_rows(const Job *job, const Array *array, npy_intp index, npy_intp first,
                   npy_intp count, npy_intp outer, const char *slab) noexcept nogil:
    cdef double *sums = array.sums + (offset(job, array, index) + first * outer) // array.item
    cdef npy_intp row, i
    for row in range(count):
        if array.item == sizeof(double):
            for i in range(array.core):
                sums[i] += (<const double *> slab)[i]
        else:
            for i in range(array.core):
                sums[i] += (<const float *> slab)[i]
        slab += array.core * array.item
        sums += outer // array.item


cdef void store_sums(const Array *array) noexcept nogil:
    cdef npy_intp i
    for i in range(array.total):
        if array.item == sizeof(double):
            (<double *> array.data)[i] = array.sums[i]
        else:
            (<float *> array.data)[i] = <float> array.sums[i]


cdef int sum_back(Job *job, npy_intp row_bytes) noexcept nogil:
    cdef npy_intp length = min(job.rows, max(<npy_intp> 1, SLAB_BYTES // row_bytes))
    cdef char *slab = <char *> malloc(length * row_bytes + 64)
    cdef int operand, status = NO_MEMORY
    if slab != NULL:
        status = compute_and_sum(job, length, slab)
        free(slab)
    for operand in range(job.gufunc.nin, job.gufunc.nargs):
        if job.arrays[operand].sums != NULL:
            store_sums(&job.arrays[operand])
    return status


cdef int dispatch(const XlaCall *call, Job *job) noexcept nogil:
    """Returns status bits."""
    cdef npy_intp row_bytes = 0
    cdef int operand
    cdef Array *array
    if not widen(call, job):
        return NO_MEMORY
    merge_axes(job)
    for operand in range(job.gufunc.nargs):
        array = &job.arrays[operand]
        if is_summed(job, operand):
            array.sums = <double *> calloc(array.total + 1, sizeof(double))
            if array.sums == NULL:
                return NO_MEMORY
            row_bytes += array.core * array.item
    if row_bytes:
        return sum_back(job, row_bytes)
    return compute(job)


cdef void release(Job *job) noexcept nogil:
    cdef int operand
    for operand in range(job.gufunc.nargs):
        free(job.arrays[operand].sums)
        if job.arrays[operand].owned:
            free(job.arrays[operand].data)


cdef XlaError *xla_call(const XlaCall *call) noexcept nogil:
    cdef Job job
    cdef Arithmetic arithmetic
    cdef int status
    if call.extensions != NULL and call.extensions.kind == XLA_METADATA:
        xla_tell_version(call)
        return NULL
    if call.stage != XLA_EXECUTE:
        return NULL
    if not choose(call, &job):
        return xla_fail(call, XLA_UNIMPLEMENTED,
                        "klfast: no such kernel for these dtypes; trace the function again")
    if not describe(call, &job):
        return xla_fail(call, XLA_INVALID_ARGUMENT, "klfast: shapes do not fit together")
    arithmetic = exact_arithmetic()
    status = dispatch(call, &job)
    restore_arithmetic(arithmetic)
    release(&job)
    if status & NO_MEMORY:
        return xla_fail(call, XLA_RESOURCE_EXHAUSTED, "klfast: no memory for scratch space")
    return NULL
