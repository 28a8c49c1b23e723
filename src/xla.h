/* What the JAX target needs of XLA's foreign function interface, major version 0: the layouts that
 * jaxlib's xla/ffi/api/c_api.h documents, declared anew so that klfast builds without JAX. Later
 * minor versions only add fields at the ends of structs. */
#ifndef KLFAST_XLA_H
#define KLFAST_XLA_H

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

enum { XLA_F16 = 10, XLA_F32 = 11, XLA_F64 = 12, XLA_BF16 = 16 };
enum { XLA_STRING = 4 };   /* kind of an attribute */
enum { XLA_EXECUTE = 3 };  /* stage of a call */
enum { XLA_METADATA = 1 }; /* kind of an extension: the call asks which version the target speaks */
enum { XLA_INVALID_ARGUMENT = 3, XLA_RESOURCE_EXHAUSTED = 8, XLA_UNIMPLEMENTED = 12 };

typedef struct XlaError XlaError;

typedef struct XlaExtension {
    size_t size;
    int kind;
    struct XlaExtension *next;
} XlaExtension;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    int major, minor;
} XlaVersion;

typedef struct {
    XlaExtension head;
    struct {
        size_t size;
        XlaVersion version;
        uint32_t traits;
    } *metadata;
} XlaMetadata;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    const char *message;
    int code;
} XlaFailure;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    XlaVersion version;
    void *internal;
    XlaError *(*make_error)(XlaFailure *);
} XlaApi;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} XlaBuffer;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    int64_t count;
    int *kinds; /* all buffers */
    void **items;
} XlaBuffers;

typedef struct {
    const char *text;
    size_t length;
} XlaText;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    int64_t count;
    int *kinds;
    XlaText **names;
    void **items;
} XlaAttributes;

typedef struct {
    size_t size;
    XlaExtension *extensions;
    const XlaApi *api;
    void *context;
    int stage;
    XlaBuffers inputs;
    XlaBuffers results;
    XlaAttributes attributes;
} XlaCall;

/* The version the caller itself speaks, as far as it is one of ours. */
static inline void xla_tell_version(const XlaCall *call) {
    XlaMetadata *asked = (XlaMetadata *)call->extensions;
    XlaVersion *version = &asked->metadata->version;
    version->size = sizeof(XlaVersion);
    version->extensions = NULL;
    version->major = 0;
    version->minor = call->api && call->api->version.major == 0 ? call->api->version.minor : 1;
    asked->metadata->traits = 0;
}

static inline XlaError *xla_fail(const XlaCall *call, int code, const char *message) {
    XlaFailure failure = {sizeof(XlaFailure), NULL, message, code};
    return call->api->make_error(&failure);
}

/* XLA flushes subnormal numbers to zero in its threads; klfast's bounds hold for them too. */
#if defined(__x86_64__) || defined(_M_X64)
typedef unsigned int Arithmetic;
static inline Arithmetic exact_arithmetic(void) {
    Arithmetic before = _mm_getcsr();
    _mm_setcsr(0x1f80); /* round to nearest, nothing trapped, nothing flushed */
    return before;
}
static inline void restore_arithmetic(Arithmetic before) { _mm_setcsr(before); }
#else
typedef fenv_t Arithmetic;
static inline Arithmetic exact_arithmetic(void) {
    Arithmetic before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    return before;
}
static inline void restore_arithmetic(Arithmetic before) { fesetenv(&before); }
#endif

#endif
