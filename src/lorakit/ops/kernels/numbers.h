/* The element type for which the library is compiled, and scalar functions. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef BF16
typedef uint16_t number; /* the upper half of an fp32 */

static inline float wide(number v) {
    union { uint32_t bits; float value; } u = {(uint32_t)v << 16};
    return u.value;
}

static inline number narrow(float v) { /* rounds to nearest, ties to even, like PyTorch */
    union { float value; uint32_t bits; } u = {v};
    return (number)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16); /* NaN stays NaN: generated NaNs have no low bits set */
}
#else
typedef float number;

static inline float wide(number v) { return v; }
static inline number narrow(float v) { return v; }
#endif

#define ROWS(i, n) _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t i = 0; i < (n); i++)

enum { DONE, NO_MEMORY, DISORDER }; /* status that a function returns; STATUSES in gateway.py maps it to an exception */

#define BLOCK 8192 /* number of elements that a thread processes at a time in elementwise functions */

/* allocates a thread's scratch buffer of `count` fp32 values; if the result is null, the thread must skip its rows */
static inline float *scratch(size_t count, int *status) {
    float *room = malloc(count ? count * sizeof(float) : 1);
    if (!room) {
#pragma omp atomic write
        *status = NO_MEMORY;
    }
    return room;
}

static inline int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- scalar functions; the polynomials are those of Cephes (S. L. Moshier) and accurate to 2 ulp */

#define LEAST -87.0f /* e^LEAST = 1.6e-38, the smallest power that is not denormal */

/* Returns 0 for x < LEAST. A power that is tiny instead of 0 would give the gradients of masked positions denormal
   values, with which matmuls take a hundred times as long. */
static inline float power_of_e(float x) {
    float some = x < LEAST ? 0.0f : 1.0f;
    x = x > 87.9f ? 87.9f : x;
    x = x < LEAST ? LEAST : x;
    union { float value; uint32_t bits; } whole = {x * 1.44269504088896341f + 12582912.0f}; /* 1.5·2^23: rounds to an integer */
    float k = whole.value - 12582912.0f;
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { float value; uint32_t bits; } power = {p * (r * r) + (r + 1.0f)};
    power.bits += whole.bits << 23; /* times 2^k */
    return power.value * some;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_e(-x)); }

static inline float logarithm(float x) { /* x > 0, not subnormal */
    union { float value; uint32_t bits; } u = {x};
    int32_t exponent = (int32_t)(u.bits >> 23) - 126;
    u.bits = (u.bits & 0x007fffff) | 0x3f000000; /* [0.5, 1) */
    float m = u.value;
    int low = m < 0.707106781186547524f;
    float e = (float)(exponent - low);
    m = (low ? m + m : m) - 1.0f;
    float z = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - 2.12194440e-4f * e - 0.5f * z;
    return m + p + 0.693359375f * e;
}
