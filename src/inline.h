/* Included before everything Cython generates. Functions that a .pxd declares inline are the bodies
 * of hot loops, specialised by constant arguments: they must be inlined, however large GCC finds
 * them, or the loops around them stay generic and run 2 to 4 times slower. Not with sanitizers,
 * whose checks make such functions take many minutes to compile. */
#if defined(__SANITIZE_ADDRESS__)
#elif defined(__GNUC__) || defined(__clang__)
#define CYTHON_INLINE __inline__ __attribute__((always_inline))
#elif defined(_MSC_VER)
#define CYTHON_INLINE __forceinline
#endif
