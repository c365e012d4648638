/* Quantization of rows to int8, and what follows an integer matmul: scales, bias, low-rank terms and rounding, in one
 * pass. `lorakit.ops.int8` defines the arithmetic. */

#define LEVELS 127.0f
#define SMALLEST 0x1p-100f /* SMALLEST in ops/int8_weight.py: 127 divided by a smaller value may overflow */

static inline uint32_t magnitude(float v) { /* ordered like |v|, with NaN above all other values */
    union { float value; uint32_t bits; } u = {v};
    return u.bits & 0x7fffffff;
}

static inline float quantize_row(const number *x, const float *factors, int64_t d, int8_t *q) { /* returns the scale */
    uint32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < d; j++) {
        uint32_t bits = magnitude(wide(x[j]) * factors[j]);
        most = bits > most ? bits : most;
    }
    union { uint32_t bits; float value; } largest = {most};
    float inverse = largest.value > SMALLEST ? LEVELS / largest.value : 0.0f;
    if (inverse == 0.0f) { /* zeros, NaN or infinity: the scale keeps the latter two, and integers have none */
        memset(q, 0, (size_t)d);
        return largest.value / LEVELS;
    }
#pragma omp simd
    for (int64_t j = 0; j < d; j++) {
        float scaled = wide(x[j]) * factors[j];
        q[j] = (int8_t)(int32_t)rintf(scaled * inverse);
    }
    return largest.value / LEVELS;
}

int int8_quantize(const number *x, const float *factors, const int64_t *kept, int64_t rows, int64_t d, int64_t k,
                  int8_t *q, float *scale, number *columns, int threads) {
    ROWS(i, rows) {
        scale[i] = quantize_row(x + i * d, factors, d, q + i * d);
        for (int64_t j = 0; j < k; j++) columns[i * k + j] = x[i * d + kept[j]]; /* while the row is in the cache */
    }
    return DONE;
}

/* ---- forward: y = t·sums·s + bias + left·right, where `right` (k/2, out, 2) has pairs of rows interleaved */

#if defined(BF16) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>

#define TOGETHER 8 /* rows that share each load of `right` */

static inline __m512 wide16(__mmask16 mask, const number *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

static inline __attribute__((always_inline)) void output_rows(
    int count, const int32_t *sums, const float *t, const float *s, const number *bias, const number *left,
    const number *right, int64_t k, int64_t out, number *y) {
    for (int64_t at = 0; at < out; at += 16) {
        __mmask16 mask = out - at < 16 ? (__mmask16)((1u << (out - at)) - 1) : 0xffff;
        __m512 scale = _mm512_maskz_loadu_ps(mask, s + at), total[TOGETHER];
        __m512 added = bias ? wide16(mask, bias + at) : _mm512_setzero_ps();
        for (int i = 0; i < count; i++) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, sums + i * out + at));
            total[i] = _mm512_fmadd_ps(_mm512_mul_ps(sum, _mm512_set1_ps(t[i])), scale, added);
        }
        for (int64_t pair = 0; pair < k / 2; pair++) {
            __m512i b = _mm512_maskz_loadu_epi32(mask, right + (pair * out + at) * 2);
            for (int i = 0; i < count; i++) {
                int32_t a;
                memcpy(&a, left + i * k + pair * 2, sizeof a);
                total[i] = _mm512_dpbf16_ps(total[i], (__m512bh)b, (__m512bh)_mm512_set1_epi32(a));
            }
        }
        for (int i = 0; i < count; i++)
            _mm256_mask_storeu_epi16(y + i * out + at, mask, (__m256i)_mm512_cvtneps_pbh(total[i]));
    }
}
#else
#define TOGETHER 1

static inline void output_rows(int count, const int32_t *sums, const float *t, const float *s, const number *bias,
                               const number *left, const number *right, int64_t k, int64_t out, number *y) {
    (void)count;
    for (int64_t at = 0; at < out; at += 64) {
        float total[64];
        int64_t n = shorter(64, out - at);
#pragma omp simd
        for (int64_t j = 0; j < n; j++) total[j] = (float)sums[at + j] * t[0] * s[at + j] + (bias ? wide(bias[at + j]) : 0.0f);
        for (int64_t pair = 0; pair < k / 2; pair++) {
            float first = wide(left[pair * 2]), second = wide(left[pair * 2 + 1]);
            const number *b = right + (pair * out + at) * 2;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) total[j] += first * wide(b[2 * j]) + second * wide(b[2 * j + 1]);
        }
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[at + j] = narrow(total[j]);
    }
}
#endif

int int8_output(const int32_t *sums, const float *t, const float *s, const number *bias, const number *left,
                const number *right, int64_t rows, int64_t k, int64_t out, number *y, int threads) {
    int64_t whole = rows / TOGETHER * TOGETHER;
    ROWS(b, whole / TOGETHER) {
        int64_t i = b * TOGETHER;
        output_rows(TOGETHER, sums + i * out, t + i, s, bias, left + i * k, right, k, out, y + i * out);
    }
    for (int64_t i = whole; i < rows; i++)
        output_rows(1, sums + i * out, t + i, s, bias, left + i * k, right, k, out, y + i * out);
    return DONE;
}

/* ---- backward: the sum of u·sums·g over several matmuls, in fp32, and then its addition to the gradient */

int int8_add(const int32_t *sums, const float *u, const float *g, const float *partial, int64_t rows, int64_t d,
             float *total, int threads) {
    ROWS(i, rows) {
        const int32_t *sum = sums + i * d;
        const float *before = partial ? partial + i * d : 0;
        float *row = total + i * d;
#pragma omp simd
        for (int64_t j = 0; j < d; j++) {
            float v = (float)sum[j] * u[i] * g[j];
            row[j] = before ? v + before[j] : v;
        }
    }
    return DONE;
}

int int8_input_gradient(const int32_t *sums, const float *u, const float *g, const float *columns, const int64_t *kept,
                        const float *partial, int64_t rows, int64_t d, int64_t k, number *dx, int threads) {
    int status = DONE;
#pragma omp parallel num_threads(threads)
    {
        float *saved = scratch((size_t)k, &status);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            if (!saved) continue;
            const int32_t *sum = sums + i * d;
            const float *before = partial ? partial + i * d : 0;
            number *row = dx + i * d;
            for (int64_t c = 0; c < k; c++) { /* dx holds what is added; read it before it is overwritten */
                int64_t j = kept[c];
                float v = wide(row[j]) + (float)sum[j] * u[i] * g[j] + columns[i * k + c];
                saved[c] = before ? v + before[j] : v;
            }
#pragma omp simd
            for (int64_t j = 0; j < d; j++) {
                float v = wide(row[j]) + (float)sum[j] * u[i] * g[j];
                row[j] = narrow(before ? v + before[j] : v);
            }
            for (int64_t c = 0; c < k; c++) row[kept[c]] = narrow(saved[c]);
        }
        free(saved);
    }
    return status;
}
