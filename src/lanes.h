/* LANES: how many rows or elements the loops compute side by side: one vector of floats, two of
 * doubles; more run out of registers.
 * STEP_BYTES: how much of the weights a first loop, up to the quotients, is ahead of a second one.
 * Processors keep few steps of a chain as long as both in flight, but what the first loop loads,
 * the second does not wait for: more hides less of the memory's time. On Zen 5, 128 bytes in place
 * of 512 cost AVX2 a tenth, and save AVX-512 a third, in double, out of the cache. */
#ifndef KLFAST_LANES_H
#define KLFAST_LANES_H

#if defined(__AVX512F__)
#define LANES 16
#define STEP_BYTES 128
#else
#define LANES 8
#define STEP_BYTES 512
#endif

/* A member of no size that puts a struct at the begin of a line of the cache: vectors as long as a
 * line would lie across two. */
#if defined(__GNUC__) || defined(__clang__)
typedef struct { char nothing[0]; } __attribute__((aligned(64))) Aligned;
#else
typedef char Aligned;
#endif

#endif
