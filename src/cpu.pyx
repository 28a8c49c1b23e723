"""What this processor can run, asked before any module compiled for it is imported."""

cdef extern from *:
    """
    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    static int has_avx2(void) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
            && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    }
    static int has_avx512(void) {
        return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl");
    }
    #elif defined(_M_X64)
    #include <windows.h>
    #ifndef PF_AVX2_INSTRUCTIONS_AVAILABLE
    #define PF_AVX2_INSTRUCTIONS_AVAILABLE 40
    #define PF_AVX512F_INSTRUCTIONS_AVAILABLE 41
    #endif
    static int has_avx2(void) {
        return IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE);
    }
    static int has_avx512(void) {
        return IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE);
    }
    #else
    static int has_avx2(void) { return 0; }
    static int has_avx512(void) { return 0; }
    #endif
    """
    int has_avx2()
    int has_avx512()


def available():
    """The instruction sets that this processor runs, the plainest first."""
    return ["baseline"] + ["avx2"] * has_avx2() + ["avx512"] * has_avx512()
