"""The hallway: hangs every row kernel up as a NumPy gufunc.

Compiled once for each instruction set, under a module name of its own; `klfast._kernels` picks
one and states what either side owes. Files that are included rather than cimported hold what GCC
may leave un-inlined (see inline.h).
"""

import numpy as np

cimport numpy as cnp
from numpy cimport npy_intp
from libc.stdlib cimport calloc
from gufunc cimport Grid, Kernel, grid_loop, gufunc_loop, report_status
from mvn cimport mvn_rows_f32, mvn_rows_f64, plan_mvn
from mvn_grad cimport mvn_gradient_rows_f32, mvn_gradient_rows_f64, plan_mvn_gradient
from sums cimport MAX_OPERANDS, Family, Format

include "discrete.pxi"
include "categorical.pxi"
include "normal.pxi"
include "rows.pxi"
include "bands.pxi"
include "reduce.pxi"
include "gradients.pxi"
include "standard.pxi"
include "plain.pxi"

cnp.import_array()
cnp.import_ufunc()

cdef extern from "threads.h":
    int KLFAST_OPENMP
    int threads_here, threads_asked, threads_default
    int thread_limit() nogil
    void release_workers() nogil
    void forked() nogil
    void guard_forks() nogil

cdef extern from *:
    """
    #if defined(__VERSION__)
    #define COMPILER __VERSION__
    #elif defined(_MSC_VER)
    #define COMPILER "MSVC"
    #else
    #define COMPILER "unknown"
    #endif
    """
    const char *COMPILER


cdef void loop(char **operands, const npy_intp *dimensions, const npy_intp *steps,
               void *kernel) noexcept nogil:
    gufunc_loop(operands, dimensions, steps, <const Kernel *> kernel)


cdef void loop_of_grids(char **operands, const npy_intp *dimensions, const npy_intp *steps,
                        void *grid) noexcept nogil:
    grid_loop(operands, dimensions, steps, <const Grid *> grid)


# NumPy keeps pointers into these for as long as a gufunc lives.
cdef enum:
    MAX_LOOPS = 96
cdef Kernel kernels[MAX_LOOPS]
cdef cnp.PyUFuncGenericFunction loops[MAX_LOOPS]
cdef void *data[MAX_LOOPS]
cdef char types[MAX_LOOPS * 8]
cdef int n_loops = 0
cdef int n_types = 0
cdef list texts = []   # names and signatures
cdef dict made = {}    # gufuncs: name, signature, first loop, first type


cdef object make_gufunc(str name, str signature, int first_loop, int first_type, int n_inputs):
    """The gufunc of the loops added since first_loop."""
    cdef bytes c_name = name.encode(), c_signature = signature.encode()
    texts.extend((c_name, c_signature))
    gufunc = cnp.PyUFunc_FromFuncAndDataAndSignature(
        &loops[first_loop], &data[first_loop], &types[first_type], n_loops - first_loop,
        n_inputs, 1, cnp.PyUFunc_None, c_name, b"", 0, c_signature)
    made[gufunc] = c_name, signature, first_loop, first_type
    return gufunc


cdef Kernel *add_loop(str dtypes):
    """A new loop over operands of these types; its kernel is left to be filled in."""
    global n_loops, n_types
    cdef Kernel *kernel = &kernels[n_loops]
    loops[n_loops] = <cnp.PyUFuncGenericFunction> loop
    data[n_loops] = kernel
    for dtype in dtypes:
        types[n_types] = np.dtype(dtype).num
        n_types += 1
    n_loops += 1
    kernel.n_operands = len(dtypes)
    return kernel


FORMATS = (  # format, dtype of operands, dtype of the result; bfloat16 comes as its bits
    (<int> Format.FLOAT16, "e", "f"), (<int> Format.FLOAT32, "f", "f"),
    (<int> Format.FLOAT64, "d", "d"),
)
BFLOAT16 = ((<int> Format.BFLOAT16, "H", "f"),)


cdef object row_gufunc(str name, str signature, Family family, tuple formats, bint normalize=True,
                       int spread_p=0, int spread_q=0, bint standard_q=False):
    """Families that sum over the elements of a row. Where the sides of a normal give different
    things for the variance, float32 is computed in double."""
    cdef int first_loop = n_loops, first_type = n_types
    cdef Kernel *kernel
    cdef bint mixed = spread_p != spread_q
    inputs = signature.count("(k)")
    extra = "d" if family == Family.CATEGORICAL else ""  # the temperature
    for form, operand, result in formats:
        kernel = add_loop(inputs * operand + extra + result)
        kernel.rows = reduce_rows_f64 if mixed or operand == "d" else reduce_rows_f32
        if standard_q:
            kernel.rows = standard_rows_f64 if operand == "d" else standard_rows_f32
        kernel.plan = plan_rows
        kernel.family = family
        kernel.options = [form, normalize, spread_p, spread_q]
    gufunc = make_gufunc(name, signature, first_loop, first_type, inputs + len(extra))
    if formats is FORMATS:
        plain[name] = make_plain(
            gufunc, signature, &kernels[first_loop + 1], &kernels[first_loop + 2])
        direct[name, 0] = make_direct(
            &kernels[first_loop + 1], &kernels[first_loop + 2], inputs, len(extra), 0)
    return gufunc


gufuncs = {}
plain = {}  # the same for calls that need no preparation
direct = {}  # the same by addresses, with `wanted` as of gradient_gufunc
for suffix, formats in (("", FORMATS), ("_bfloat16", BFLOAT16)):
    gufuncs["discrete" + suffix] = row_gufunc(
        "discrete", "(k),(k)->()", Family.DISCRETE, formats)
    gufuncs["discrete_plain" + suffix] = row_gufunc(
        "discrete_plain", "(k),(k)->()", Family.DISCRETE, formats, normalize=False)
    gufuncs["categorical" + suffix] = row_gufunc(
        "categorical", "(k),(k),()->()", Family.CATEGORICAL, formats)
    for spread_p, name_p in enumerate(("scale", "var", "logvar")):
        for spread_q, name_q in enumerate(("scale", "var", "logvar")):
            name = f"normal_{name_p}_{name_q}"
            gufuncs[name + suffix] = row_gufunc(
                name, "(k),(k),(k),(k)->()", Family.NORMAL, formats, True, spread_p, spread_q)
    gufuncs["normal_logvar_standard" + suffix] = row_gufunc(
        "normal_logvar_standard", "(k),(k)->()", Family.NORMAL, formats, True,
        Spread.LOG_VARIANCE, Spread.LOG_VARIANCE, standard_q=True)


cdef object mvn_gufunc(str name, str signature, bint cov_p, bint cov_q, bint standard_q):
    cdef int first_loop = n_loops, first_type = n_types
    cdef Kernel *kernel
    inputs = 2 if standard_q else 4
    for dtype in "fd":
        kernel = add_loop((inputs + 1) * dtype)
        kernel.rows = mvn_rows_f64 if dtype == "d" else mvn_rows_f32
        kernel.plan = plan_mvn
        kernel.options = [cov_p, cov_q, standard_q, 0]
    gufunc = make_gufunc(name, signature, first_loop, first_type, inputs)
    plain[name] = make_plain(gufunc, signature, &kernels[first_loop], &kernels[first_loop + 1],
                             explains_nan=True)
    return gufunc


for name_p, cov_p in (("cov", True), ("tril", False)):
    name = f"mvn_{name_p}_standard"
    gufuncs[name] = mvn_gufunc(name, "(d),(d,d)->()", cov_p, False, True)
    for name_q, cov_q in (("cov", True), ("tril", False)):
        name = f"mvn_{name_p}_{name_q}"
        gufuncs[name] = mvn_gufunc(name, "(d),(d,d),(d),(d,d)->()", cov_p, cov_q, False)


cdef struct GridHook:    # what NumPy keeps pointers into
    Grid grids[4]
    cnp.PyUFuncGenericFunction loops[4]
    void *data[4]


def grid_gufunc(gufunc):
    """The same with two batch axes among the core axes of every operand."""
    cdef GridHook *hook = <GridHook *> calloc(1, sizeof(GridHook))
    if hook == NULL:
        raise MemoryError
    cdef bytes c_name
    cdef int first_loop, first_type, i, operand
    c_name, signature, first_loop, first_type = made[gufunc]
    cores = [core.split(",") if core else [] for core in
             signature.replace("->", ",")[1:-1].split("),(")]
    *inputs, output = ["(" + ",".join(["m", "n", *core]) + ")" for core in cores]
    cdef bytes c_signature = (",".join(inputs) + "->" + output).encode()
    texts.append(c_signature)
    for i in range(gufunc.ntypes):
        hook.grids[i].kernel = &kernels[first_loop + i]
        for operand, core in enumerate(cores):
            hook.grids[i].core_axes[operand] = len(core)
        hook.loops[i] = <cnp.PyUFuncGenericFunction> loop_of_grids
        hook.data[i] = &hook.grids[i]
    return cnp.PyUFunc_FromFuncAndDataAndSignature(
        hook.loops, hook.data, &types[first_type], gufunc.ntypes, len(inputs), 1,
        cnp.PyUFunc_None, c_name, b"", 0, c_signature)


cdef struct Hook:        # what NumPy keeps pointers into: of a gufunc made at its first use
    Kernel kernels[4]
    cnp.PyUFuncGenericFunction loops[4]
    void *data[4]
    char types[4 * 16]


cdef object hang_up(Hook *hook, str name, str signature, list dtypes, int n_inputs, int n_outputs):
    """The gufunc of the hook's kernels, one for each entry of dtypes; it stays for good."""
    cdef int i, n_types = 0
    cdef bytes c_name = name.encode(), c_signature = signature.encode()
    texts.extend((c_name, c_signature))
    for i in range(len(dtypes)):
        hook.loops[i] = <cnp.PyUFuncGenericFunction> loop
        hook.data[i] = &hook.kernels[i]
        hook.kernels[i].n_operands = n_inputs + n_outputs
        for dtype in dtypes[i]:
            hook.types[n_types] = np.dtype(dtype).num
            n_types += 1
    return cnp.PyUFunc_FromFuncAndDataAndSignature(
        hook.loops, hook.data, hook.types, len(dtypes), n_inputs, n_outputs, cnp.PyUFunc_None,
        c_name, b"", 0, c_signature)


cdef Hook *new_hook() except NULL:
    cdef Hook *hook = <Hook *> calloc(1, sizeof(Hook))
    if hook == NULL:
        raise MemoryError
    return hook


SPREADS = {"scale": <int> Spread.SCALE, "var": <int> Spread.VARIANCE,
           "logvar": <int> Spread.LOG_VARIANCE, "standard": <int> Spread.LOG_VARIANCE}


cdef object mvn_gradient_gufunc(str name, int wanted):
    cdef Hook *hook = new_hook()
    cdef Kernel *kernel
    _, kind_p, kind_q = name.split("_")
    inputs = ["(d)", "(d,d)"] if kind_q == "standard" else ["(d)", "(d,d)", "(d)", "(d,d)"]
    outputs = [core for i, core in enumerate(inputs) if wanted >> i & 1]
    dtypes = []
    for i, dtype in enumerate("fd"):
        kernel = &hook.kernels[i]
        kernel.rows = mvn_gradient_rows_f64 if dtype == "d" else mvn_gradient_rows_f32
        kernel.plan = plan_mvn_gradient
        kernel.wanted = wanted
        kernel.options = [kind_p == "cov", kind_q == "cov", kind_q == "standard", 0]
        dtypes.append(len(inputs) * dtype + "d" + (1 + len(outputs)) * dtype)
    signature = ",".join([*inputs, "()"]) + "->" + ",".join(["()", *outputs])
    return hang_up(hook, name, signature, dtypes, len(inputs) + 1, 1 + len(outputs))


def gradient_gufunc(name, int wanted):
    """Of value and gradients: takes the operands of the gufunc `name` and the cotangent; gradients
    with respect to operand i where bit i of `wanted` is set."""
    if name.startswith("mvn_"):
        return mvn_gradient_gufunc(name, wanted)
    cdef Hook *hook = new_hook()
    cdef Kernel *kernel
    kind, *given = name.removesuffix("_bfloat16").split("_")
    formats = BFLOAT16 if name.endswith("_bfloat16") else FORMATS
    family = {"discrete": Family.DISCRETE, "categorical": Family.CATEGORICAL,
              "normal": Family.NORMAL}[kind]
    standard_q = "standard" in given
    spreads = [SPREADS[spread] for spread in given] if family == Family.NORMAL else [0, 0]
    inputs, outputs = 4 if family == Family.NORMAL and not standard_q else 2, wanted.bit_count()
    extra = "dd" if family == Family.CATEGORICAL else "d"  # the temperature, the cotangent
    dtypes = []
    for i, (form, operand, result) in enumerate(formats):
        kernel = &hook.kernels[i]
        double = operand == "d" or spreads[0] != spreads[1]
        kernel.rows = gradient_rows_f64 if double else gradient_rows_f32
        if standard_q:
            kernel.rows = standard_rows_f64 if double else standard_rows_f32
        kernel.plan = plan_gradients
        kernel.family, kernel.wanted = family, wanted
        kernel.options = [form, given != ["plain"], spreads[0], spreads[1]]
        dtypes.append(inputs * operand + extra + (1 + outputs) * result)
    if formats is FORMATS:
        direct[name, wanted] = make_direct(
            &hook.kernels[1], &hook.kernels[2], inputs, len(extra), outputs)
    signature = ",".join(["(k)"] * inputs + ["()"] * len(extra)) + "->" + ",".join(
        ["()"] + ["(k)"] * outputs)
    return hang_up(hook, name, signature, dtypes, inputs + len(extra), 1 + outputs)


include "xla.pxi"


def set_threads(*, default=None, everybody=None, here=None):
    """Thread counts: the default, what code asked for, for the calling thread alone (0: none)."""
    global threads_default, threads_asked, threads_here
    if default is not None:
        threads_default = default
    if everybody is not None:
        threads_asked = everybody
    if here is not None:
        threads_here = here


def get_threads():
    """How many threads a call from this thread may use, and what this thread alone asked for."""
    return thread_limit(), threads_here


def before_fork():
    release_workers()


def after_fork():
    forked()


def build():
    """Compiler and OpenMP version (0: built without)."""
    return {"compiler": COMPILER.decode(), "openmp": KLFAST_OPENMP}


guard_forks()
