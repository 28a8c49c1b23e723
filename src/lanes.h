/* How many rows or elements the loops compute side by side: one vector of floats, two of doubles;
 * more run out of registers. */
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
